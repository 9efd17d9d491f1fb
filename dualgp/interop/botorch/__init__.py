"""BoTorch: a dual Gaussian process wherever BoTorch expects a model, with fantasies for any likelihood.

| BoTorch | here |
|---|---|
| `posterior(X)` | the joint Gaussian of f(X), b x q x m |
| `observation_noise=True` | and the noise; for labels and counts 1/β̄, that of the site of a datum |
| `condition_on_observations` | `DualGP.condition`: exact in the new data, whatever the likelihood |
| `fantasize` | the same on targets drawn from p(y∣f), f drawn by the sampler |
"""

try:
    from dualgp.interop.botorch.acquisition import BALD
    from dualgp.interop.botorch.model import DualGPModel
except ModuleNotFoundError as error:
    if error.name != "botorch":
        raise
    raise ImportError("BoTorch is not installed: pip install 'dualgp[botorch]'.") from error

__all__ = ["BALD", "DualGPModel"]
