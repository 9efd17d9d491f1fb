"""Dual parameters (α, β) of any likelihood: closed form, quadrature, or the likelihood's own expectation.

    α_i = E_q[∂ log p(y_i|f)] = ∂/∂m_i E_q[log p],        β_i = −E_q[∂² log p(y_i|f)] = −2 ∂/∂v_i E_q[log p]

(Bonnet's and Price's theorems), so one accurate and differentiable `expected_log_prob` gives everything.

| likelihood | E_q[log p] |
|---|---|
| Gaussian, fixed noise, multitask Gaussian of rank 0 | closed form; λ = y/σ², β = 1/σ² whatever q is |
| Poisson with rate e^f, Laplace | closed form |
| softmax, one latent per class | one-dimensional integral of one-dimensional integrals, no sampling |
| Bernoulli probit, logit | Gauss–Hermite on `torch.special.log_ndtr`, `logsigmoid` |
| any other one-dimensional GPyTorch likelihood | Gauss–Hermite on its `forward` |
| any other with an `expected_log_prob` of its own | that |
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from gpytorch.likelihoods import (
    BernoulliLikelihood,
    BetaLikelihood,
    FixedNoiseGaussianLikelihood,
    GaussianLikelihood,
    LaplaceLikelihood,
    Likelihood,
    MultitaskGaussianLikelihood,
    PoissonLikelihood,
    SoftmaxLikelihood,
    StudentTLikelihood,
)
from gpytorch.likelihoods.likelihood import _Likelihood, _OneDimensionalLikelihood
from linear_operator.operators import DiagLinearOperator
from torch import Tensor

from dualgp.checks import check_tensor, recordable
from dualgp.errors import InputError, UnsupportedError
from dualgp.likelihoods import LogitBernoulliLikelihood, LogPoissonLikelihood
from dualgp.quadrature import MANY_NODES, NUM_NODES, expectation, expected_logsumexp

_LOG_2PI = 1.8378770664093453


class DualParameters(NamedTuple):
    """E_q[log p(y|f)] with the shape of y, and α, β with the shape of the marginal means."""

    expected_log_prob: Tensor
    alpha: Tensor
    beta: Tensor


def dual_parameters(likelihood: Likelihood, y: Tensor, mean: Tensor, var: Tensor, **params: Tensor) -> DualParameters:
    """Return E_q[log p], α and β at the marginals q(f_i) = N(mean_i, var_i), in float64.

    Args:
        likelihood: any supported GPyTorch likelihood.
        y: targets [*batch, N] or [*batch, N, C].
        mean: marginal means, [*batch, N] or [*batch, N, C] (softmax: y [N] and mean [N, C]).
        var: marginal variances, the same shape, ≥ 0.
        params: per-datum parameters, for instance `noise=` of a FixedNoiseGaussianLikelihood.

    Raises:
        UnsupportedError: for a likelihood that `check_likelihood` refuses.

    Source: Opper & Archambeau 2009; Khan & Lin 2017; Adam et al. 2021, eq. 10.

    Example:
        >>> lik = GaussianLikelihood(); lik.noise = 0.5
        >>> d = dual_parameters(lik, torch.ones(1), torch.zeros(1), torch.ones(1))
        >>> round(d.alpha.item(), 4), round(d.beta.item(), 4)
        (2.0, 2.0)
    """
    check_marginals(mean, var)
    check_shape_of_targets(likelihood, y, mean)
    return _duals(likelihood, y, mean.detach(), var.detach(), params, create_graph=False)


def differentiable_dual_parameters(
    likelihood: Likelihood, y: Tensor, mean: Tensor, var: Tensor, **params: Tensor
) -> DualParameters:
    """Return what `dual_parameters` does, differentiable in mean and var where E_q[log p] is twice (not softmax)."""
    return _duals(likelihood, y, mean, var, params, create_graph=True)


def _duals(
    likelihood: Likelihood, y: Tensor, mean: Tensor, var: Tensor, params: dict[str, Tensor], *, create_graph: bool
) -> DualParameters:
    mean, var = mean.double(), var.double()
    noise = gaussian_noise(likelihood, **params)
    if noise is not None:
        noise = noise.detach().double()
        elp = _gaussian(y.double(), mean, var, noise)
        beta = (1.0 / noise).expand(mean.shape)
        return DualParameters(elp, (y.double() - mean) * beta, beta.clone())
    with torch.inference_mode(False):  # gradients are taken within inference_mode() and no_grad() as outside of them
        mean, var, y = (recordable(t) for t in (mean, var, y))
        params = {name: recordable(values) for name, values in params.items()}
        if not create_graph:
            mean, var = mean.requires_grad_(), var.requires_grad_()
        elp = _expected_log_prob(likelihood, y, mean, var, params)
        d_mean, d_var = torch.autograd.grad(elp.sum(), (mean, var), create_graph=create_graph)
    return DualParameters(elp if create_graph else elp.detach(), d_mean, -2.0 * d_var)


def expected_log_prob(likelihood: Likelihood, y: Tensor, mean: Tensor, var: Tensor, **params: Tensor) -> Tensor:
    """Return E[log p(y_i|f_i)] for f_i ~ N(mean_i, var_i), with the shape of y, in float64.

    Differentiable in mean, var and the likelihood's parameters. Arguments as in `dual_parameters`.

    Example:
        >>> lik = BernoulliLikelihood()
        >>> expected_log_prob(lik, torch.ones(1), torch.zeros(1), torch.zeros(1))
        tensor([-0.6931], dtype=torch.float64)
    """
    check_marginals(mean, var)
    check_shape_of_targets(likelihood, y, mean)
    return _expected_log_prob(likelihood, y, mean.double(), var.double(), params)


def _expected_log_prob(
    likelihood: Likelihood, y: Tensor, mean: Tensor, var: Tensor, params: dict[str, Tensor]
) -> Tensor:
    noise = gaussian_noise(likelihood, **params)
    if noise is not None:
        return _gaussian(y.double(), mean, var, noise.double())
    if type(likelihood) is SoftmaxLikelihood:
        picked = torch.gather(mean, -1, y.long().unsqueeze(-1)).squeeze(-1)
        return picked - expected_logsumexp(mean, var)
    y = y.double()
    if type(likelihood) is LogPoissonLikelihood:
        return y * mean - (mean + 0.5 * var).exp() - torch.lgamma(y + 1.0)
    if type(likelihood) is LaplaceLikelihood:
        return _laplace(y, mean, var, likelihood.noise.double().sqrt())
    if isinstance(likelihood, _OneDimensionalLikelihood):
        return expectation(lambda f: conditional_log_prob(likelihood, y, f, **params), mean, var, num_nodes(likelihood))
    return likelihood.expected_log_prob(y, _diagonal_normal(y, mean, var), **params)


def check_marginals(mean: Tensor, var: Tensor) -> None:
    """Raise InputError unless marginals are tensors of one shape."""
    check_tensor("mean", mean)
    check_tensor("var", var)
    if mean.shape != var.shape:
        raise InputError(f"mean and var must have one shape, got {tuple(mean.shape)} and {tuple(var.shape)}.")


def check_shape_of_targets(likelihood: Likelihood, y: Tensor, mean: Tensor) -> None:
    """Raise InputError unless targets have the shape of the marginals: a label of a softmax is one for all outputs."""
    check_tensor("y", y)
    shape = mean.shape[:-1] if type(likelihood) is SoftmaxLikelihood else mean.shape
    k = min(len(shape), y.ndim)
    pairs = zip(shape[len(shape) - k :], y.shape[y.ndim - k :], strict=True)
    column = y.ndim > len(shape) and shape[-1:] != y.shape[-1:]
    if column or not all(a == b or 1 in (a, b) for a, b in pairs):
        raise InputError(f"y must have shape {tuple(shape)}, as the marginals have, got {tuple(y.shape)}.")


def num_nodes(likelihood: Likelihood) -> int:
    """Return how many Gauss–Hermite nodes a one-dimensional likelihood takes."""
    narrow = StudentTLikelihood, LaplaceLikelihood, BetaLikelihood  # (Laplace in prediction only)
    return MANY_NODES if isinstance(likelihood, narrow) else NUM_NODES


def conditional_log_prob(likelihood: Likelihood, y: Tensor, f: Tensor, **params: Tensor) -> Tensor:
    """Return log p(y|f) elementwise for f of shape [..., *y.shape]; accurate in the tails."""
    if type(likelihood) is BernoulliLikelihood:
        return torch.special.log_ndtr((2.0 * y - 1.0) * f)
    if type(likelihood) is LogitBernoulliLikelihood:
        return torch.nn.functional.logsigmoid((2.0 * y - 1.0) * f)
    if type(likelihood) is PoissonLikelihood:  # log softplus(f) tends to f, where softplus underflows
        rate = torch.nn.functional.softplus(f)
        log_rate = torch.where(f < -30.0, f, rate.clamp_min(1e-30).log())
        return y * log_rate - rate - torch.lgamma(y + 1.0)
    return likelihood.forward(f, **params).log_prob(y)


def is_gaussian(likelihood: Likelihood) -> bool:
    """Return whether the likelihood is Gaussian: then its sites are known whatever q is."""
    return type(likelihood) in (GaussianLikelihood, FixedNoiseGaussianLikelihood, MultitaskGaussianLikelihood)


def gaussian_noise(likelihood: Likelihood, noise: Tensor | None = None, **_: Tensor) -> Tensor | None:
    """Return the noise variance of a Gaussian likelihood, broadcastable to y; None for any other likelihood."""
    kind = type(likelihood)
    if kind is GaussianLikelihood:
        return likelihood.noise
    if kind is FixedNoiseGaussianLikelihood:
        if noise is None:
            raise InputError(
                "A FixedNoiseGaussianLikelihood knows the noise of its training data only: pass noise= with the "
                "noise variance of each datum given here."
            )
        return noise + likelihood.second_noise
    if kind is MultitaskGaussianLikelihood:
        if not likelihood.has_task_noise:
            return likelihood.noise
        return likelihood.task_noises + likelihood.noise if likelihood.has_global_noise else likelihood.task_noises
    return None


def training_params(likelihood: Likelihood, n: int) -> dict[str, Tensor]:
    """Return the per-datum parameters that a likelihood carries for its n training data.

    Raises:
        InputError: if it carries them for another number of data.
    """
    if type(likelihood) is not FixedNoiseGaussianLikelihood:
        return {}
    noise = likelihood.noise_covar.noise
    if noise.shape[-1] != n:
        raise InputError(
            f"FixedNoiseGaussianLikelihood holds noise for {noise.shape[-1]} data, but {n} were given. Build it with "
            "the noise variance of every training datum."
        )
    return {"noise": noise}


def has_batch_shape(likelihood: Likelihood) -> bool:
    """Return whether the likelihood holds parameters for several processes or data, rather than for all."""
    return type(likelihood) is FixedNoiseGaussianLikelihood or any(p.ndim > 1 for p in likelihood.parameters())


def num_outputs_of(likelihood: Likelihood) -> int | None:
    """Return the number of latent functions that the likelihood itself fixes, or None."""
    if isinstance(likelihood, SoftmaxLikelihood):
        return int(likelihood.num_classes)
    if isinstance(likelihood, MultitaskGaussianLikelihood):
        return int(likelihood.num_tasks)
    return None


def check_likelihood(likelihood: object) -> None:
    """Raise unless the dual parameters of `likelihood` can be computed without sampling.

    Raises:
        UnsupportedError: naming the likelihood and what to use in its place.
    """
    name = type(likelihood).__name__
    known = _REMEDIES.get(name) or _REMEDIES.get(type(getattr(likelihood, "noise_covar", None)).__name__)
    remedy = None
    if not isinstance(likelihood, _Likelihood):
        remedy = "expected a gpytorch.likelihoods.Likelihood, for example GaussianLikelihood()"
    elif isinstance(likelihood, SoftmaxLikelihood) and likelihood.mixing_weights is not None:
        remedy = "mixing weights couple the latents; pass mixing_weights=False and num_classes latents"
    elif isinstance(likelihood, MultitaskGaussianLikelihood) and likelihood.rank > 0:
        remedy = "noise correlated between outputs couples the latents; pass rank=0"
    elif known:
        remedy = known
    elif not _has_expectation(likelihood):
        remedy = (
            "it would need Monte Carlo; derive it from gpytorch's _OneDimensionalLikelihood, or give it an "
            "expected_log_prob of its own"
        )
    if remedy:
        raise UnsupportedError(f"{name} is not supported: {remedy}.")


_REMEDIES = {
    "DirichletClassificationLikelihood": "it is a regression on transformed labels; use "
    "SoftmaxLikelihood(num_classes=C, mixing_weights=False)",
    "GaussianLikelihoodWithMissingObs": "drop the rows that have no target and use GaussianLikelihood",
    "HadamardGaussianLikelihood": "it needs a task index per datum; use MultitaskGaussianLikelihood(rank=0)",
    "LikelihoodList": "use one DualGP per likelihood",
    "HeteroskedasticNoise": "use FixedNoiseGaussianLikelihood",
}


def _has_expectation(likelihood: _Likelihood) -> bool:
    if isinstance(likelihood, _OneDimensionalLikelihood | SoftmaxLikelihood):
        return True
    return type(likelihood).expected_log_prob not in (_Likelihood.expected_log_prob, Likelihood.expected_log_prob)


def check_param_names(likelihood: Likelihood, names: Iterable[str]) -> None:
    """Raise unless a likelihood of the libraries takes these parameters per datum: noise if it is fixed, else none.

    Raises:
        InputError: with the first that it does not take.
    """
    library = type(likelihood).__module__.split(".")[0] in ("gpytorch", "dualgp")
    known = {"noise"} if isinstance(likelihood, FixedNoiseGaussianLikelihood) else set()
    unknown = sorted(set(names) - known) if library else []
    if unknown:
        raise InputError(f"{type(likelihood).__name__} takes no {unknown[0]}= per datum; leave it out.")


def check_variances(noise: Tensor, what: str = "noise=") -> None:
    """Raise unless all variances of noise are positive.

    Raises:
        InputError: with the smallest.
    """
    if not bool((noise > 0).all()):
        raise InputError(f"{what} must be positive variances; the smallest is {noise.min().item():g}.")


def check_targets(likelihood: Likelihood, y: Tensor) -> None:
    """Raise unless every target is one the likelihood can produce.

    Raises:
        InputError: with the range expected and the first value outside it.
    """
    check_tensor("y", y)
    if y.dtype == torch.bool:
        raise InputError("y must hold real numbers or integer labels, got torch.bool; use y.long().")
    if not bool(y.isfinite().all()):
        raise InputError(f"y must be finite; {int((~y.isfinite()).sum())} values are NaN or infinite.")
    if type(likelihood) is SoftmaxLikelihood:
        bad, want = (y != y.round()) | (y < 0) | (y >= likelihood.num_classes), f"0 … {likelihood.num_classes - 1}"
    elif isinstance(likelihood, BernoulliLikelihood):
        bad, want = (y != 0) & (y != 1), "0 or 1 (turn labels −1/+1 into (y + 1) / 2)"
    elif isinstance(likelihood, _OneDimensionalLikelihood):
        with torch.no_grad():
            at_zero = likelihood.forward(torch.zeros_like(y, dtype=torch.float64))
            bad = ~at_zero.support.check(y.double())
            if not bad.any():  # on the closed boundary of a support the density may be 0 or infinite
                bad = ~torch.isfinite(at_zero.log_prob(y.double()))
        want = f"in the support of {type(at_zero).__name__}: {at_zero.support}"
    else:
        return
    if bad.any():
        at = int(bad.reshape(-1).nonzero()[0])
        raise InputError(
            f"{type(likelihood).__name__} expects targets {want}; {int(bad.sum())} of {y.numel()} are not, the first "
            f"being {y.reshape(-1)[at].item():g}."
        )


def _gaussian(y: Tensor, mean: Tensor, var: Tensor, noise: Tensor) -> Tensor:
    return -0.5 * (((y - mean).square() + var) / noise + noise.log() + _LOG_2PI)


def _laplace(y: Tensor, mean: Tensor, var: Tensor, scale: Tensor) -> Tensor:
    """−log 2s − E|y − f| / s: quadrature would see the kink at f = y as jagged."""
    gap, sd = y - mean, var.clamp_min(1e-12).sqrt()
    z = gap / sd
    absolute = gap * torch.erf(z / 2**0.5) + sd * (2 / torch.pi) ** 0.5 * (-0.5 * z.square()).exp()
    return -(2.0 * scale).log() - absolute / scale


def _diagonal_normal(y: Tensor, mean: Tensor, var: Tensor) -> MultivariateNormal:
    if mean.ndim == y.ndim and mean.ndim >= 2 and mean.shape == y.shape:
        batch = MultivariateNormal(mean.mT, DiagLinearOperator(var.mT))
        return MultitaskMultivariateNormal.from_batch_mvn(batch)
    return MultivariateNormal(mean, DiagLinearOperator(var))
