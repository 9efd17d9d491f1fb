"""The predictive distribution p(y*) = E_q[p(y*|f)] of any supported likelihood, without sampling."""

from __future__ import annotations

import torch
from gpytorch.likelihoods import BernoulliLikelihood, Likelihood, SoftmaxLikelihood
from gpytorch.likelihoods.likelihood import _OneDimensionalLikelihood
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution, MixtureSameFamily, Normal

from dualgp.duals import check_marginals, check_shape_of_targets, conditional_log_prob, gaussian_noise, num_nodes
from dualgp.errors import InputError, UnsupportedError
from dualgp.quadrature import expectation, expected_softmax, hermite_points


def predictive_distribution(likelihood: Likelihood, mean: Tensor, var: Tensor, **params: Tensor) -> Distribution:
    """Return p(y) = ∫ p(y|f) N(f; mean, var) df as a torch Distribution, elementwise over data.

    Gaussian likelihoods give a Normal, binary ones a Bernoulli, softmax a Categorical; every other one-dimensional
    likelihood gives the mixture of its conditionals at the Gauss–Hermite nodes.

    Args:
        likelihood: a supported GPyTorch likelihood.
        mean: [*batch, N] or [*batch, N, C].
        var: the same shape.
        params: per-datum parameters (`noise=` for FixedNoiseGaussianLikelihood).

    Raises:
        UnsupportedError: if the likelihood has no elementwise conditional.

    Example:
        >>> predictive_distribution(BernoulliLikelihood(), torch.zeros(1), torch.ones(1)).probs
        tensor([0.5000])
    """
    check_marginals(mean, var)
    noise = gaussian_noise(likelihood, **params)
    if noise is not None:
        total = var + noise.to(var)
        if not bool(mean.isfinite().all() and (total.isfinite() & (total > 0)).all()):
            raise InputError("mean and var must be finite and var ≥ 0, but hold NaN, infinity or less than that.")
        return Normal(mean, total.sqrt())
    if type(likelihood) is SoftmaxLikelihood:
        return Categorical(probs=expected_softmax(mean, var))
    if type(likelihood) is BernoulliLikelihood:
        return Bernoulli(probs=torch.special.ndtr(mean / (1.0 + var).sqrt()))
    _require_one_dimensional(likelihood)
    if isinstance(likelihood, BernoulliLikelihood):
        return Bernoulli(probs=expectation(lambda f: likelihood.forward(f, **params).probs, mean, var).clamp(0, 1))
    points, w = hermite_points(mean, var, num_nodes(likelihood))
    by_datum = {name: value.unsqueeze(-1) for name, value in params.items()}  # beside the nodes, which come last
    components = likelihood.forward(points.movedim(0, -1), **by_datum)
    return MixtureSameFamily(Categorical(probs=w.expand(*mean.shape, -1)), components, validate_args=False)


def log_predictive(likelihood: Likelihood, y: Tensor, mean: Tensor, var: Tensor, **params: Tensor) -> Tensor:
    """Return log E_q[p(y_i|f_i)] with the shape of y, in float64; accurate in the tails.

    Arguments and errors as in `predictive_distribution`.

    Example:
        >>> log_predictive(BernoulliLikelihood(), torch.ones(1), torch.zeros(1), torch.ones(1))
        tensor([-0.6931], dtype=torch.float64)
    """
    check_marginals(mean, var)
    check_shape_of_targets(likelihood, y, mean)
    if y.dtype == torch.bool or not bool(y.isfinite().all()):
        raise InputError(f"y must hold finite numbers or integer labels, got {y.dtype} with NaN, infinity or bools.")
    mean, var = mean.double(), var.double()
    if gaussian_noise(likelihood, **params) is not None or type(likelihood) is SoftmaxLikelihood:
        return predictive_distribution(likelihood, mean, var, **params).log_prob(y)
    y = y.double()
    if type(likelihood) is BernoulliLikelihood:
        return torch.special.log_ndtr((2.0 * y - 1.0) * mean / (1.0 + var).sqrt())
    _require_one_dimensional(likelihood)
    points, w = hermite_points(mean, var, num_nodes(likelihood))
    log_p = conditional_log_prob(likelihood, y, points, **params)
    return torch.logsumexp(log_p + w.log().reshape(-1, *[1] * mean.ndim), 0)


def _require_one_dimensional(likelihood: Likelihood) -> None:
    if not isinstance(likelihood, _OneDimensionalLikelihood):
        raise UnsupportedError(
            f"{type(likelihood).__name__} has no elementwise conditional p(y|f), so its predictive distribution needs "
            "sampling: draw f with `sample` and call the likelihood on the draws."
        )
