"""What a datum would tell before its y is known: expected precision of its site, entropies, mutual information."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from gpytorch.likelihoods import BernoulliLikelihood, Likelihood, SoftmaxLikelihood
from gpytorch.likelihoods.likelihood import _OneDimensionalLikelihood
from torch import Tensor

from dualgp.duals import gaussian_noise
from dualgp.errors import UnsupportedError
from dualgp.quadrature import MANY_NODES, expectation, softmax_entropies


def expected_beta(likelihood: Likelihood, mean: Tensor, var: Tensor, **params: Tensor) -> Tensor:
    """Return E_q[E_{y|f}[β]], the precision that the site of a datum will have, with the shape of `mean`, in float64.

    1/σ² under Gaussian noise, E_q[Φ'²/Φ(1 − Φ)] for probit, E_q[(∂ E[y|f])² / var(y|f)] for any other likelihood of one
    latent: the Fisher information of f where y is the sufficient statistic (logit, Poisson, binomial), else less.
    For softmax E_q[p_c(1 − p_c)], the diagonal.

    Args:
        likelihood: a supported GPyTorch likelihood.
        mean: [*batch, N] or [*batch, N, C].
        var: the same shape.
        params: per-datum parameters, such as `noise`.

    Raises:
        UnsupportedError: if the likelihood has no elementwise conditional.

    Example:
        >>> expected_beta(BernoulliLikelihood(), torch.zeros(1), torch.zeros(1))  # 2/π
        tensor([0.6366], dtype=torch.float64)
    """
    mean, var = mean.double(), var.double()
    noise = gaussian_noise(likelihood, **params)
    if noise is not None:
        return (1.0 / noise.detach().double()).expand(mean.shape)
    if type(likelihood) is SoftmaxLikelihood:
        return softmax_entropies(mean, var).spread
    _check(likelihood)
    if isinstance(likelihood, BernoulliLikelihood):
        return _bump(lambda f: _binary_information(likelihood, f, params), mean, var)
    return expectation(lambda f: _information(likelihood, f, params), mean, var, MANY_NODES)


def predictive_entropy(likelihood: Likelihood, mean: Tensor, var: Tensor, **params: Tensor) -> Tensor:
    """Return the entropy of p(y_i) = E_q[p(y_i|f)] in nats, in float64, with the shape of y.

    Arguments as in `expected_beta`.

    Raises:
        UnsupportedError: for a likelihood that is neither Gaussian, binary nor softmax.

    Example:
        >>> predictive_entropy(BernoulliLikelihood(), torch.zeros(1), torch.ones(1))
        tensor([0.6931], dtype=torch.float64)
    """
    mean, var = mean.double(), var.double()
    noise = gaussian_noise(likelihood, **params)
    if noise is not None:
        return 0.5 * (2.0 * math.pi * math.e * (var + noise.double())).log()
    if type(likelihood) is SoftmaxLikelihood:
        return softmax_entropies(mean, var).of_mean
    if isinstance(likelihood, BernoulliLikelihood):
        return _binary_entropy(_mean_probability(likelihood, mean, var, params))
    raise UnsupportedError(
        f"The predictive entropy of {type(likelihood).__name__} is not known: it is for Gaussian, binary and softmax "
        "likelihoods. Use mutual information (BALD) or the variance."
    )


def mutual_information(likelihood: Likelihood, mean: Tensor, var: Tensor, **params: Tensor) -> Tensor:
    """Return I(y_i; f_i) = H[E_q p(y_i|f)] − E_q H[p(y_i|f)] in nats (BALD), in float64, with the shape of y.

    ½ log(1 + v/σ²) under Gaussian noise; quadrature for binary likelihoods; for softmax, of independent latents,
    integrals on a line, without sampling. For any other likelihood ½ E_q[log(1 + v I(f))] with the Fisher information
    I, which is exact for little and for much information, and within 3 % between them for counts at v ≤ 1.

    Raises:
        UnsupportedError: if the likelihood has no elementwise conditional.

    Source: Houlsby et al. 2011 (BALD); there an approximation for probit, here quadrature.

    Example:
        >>> from gpytorch.likelihoods import GaussianLikelihood
        >>> lik = GaussianLikelihood(); lik.noise = 1.0
        >>> round(mutual_information(lik, torch.zeros(1), torch.ones(1)).item(), 4)  # ½ log 2
        0.3466
    """
    mean, var = mean.double(), var.double()
    noise = gaussian_noise(likelihood, **params)
    if noise is not None:
        return 0.5 * (var / noise.double()).log1p()
    if type(likelihood) is SoftmaxLikelihood:
        found = softmax_entropies(mean, var)
        return (found.of_mean - found.mean_of).clamp_min(0.0)
    _check(likelihood)
    if isinstance(likelihood, BernoulliLikelihood):
        total = _binary_entropy(_mean_probability(likelihood, mean, var, params))
        expected = _bump(lambda f: _binary_entropy(_probability(likelihood, f, params)), mean, var)
        return (total - expected).clamp_min(0.0)
    return 0.5 * expectation(lambda f: (var * _information(likelihood, f, params)).log1p(), mean, var, MANY_NODES)


def _binary_entropy(p: Tensor) -> Tensor:
    p = p.clamp(1e-300, 1.0 - 1e-16)  # at 0 and 1 its slope is infinite
    return torch.special.entr(p) + torch.special.entr(1.0 - p)


def _probability(likelihood: Likelihood, f: Tensor, params: dict[str, Tensor]) -> Tensor:
    if type(likelihood) is BernoulliLikelihood:
        return torch.special.ndtr(f)
    return likelihood.forward(f, **params).probs


def _mean_probability(likelihood: Likelihood, mean: Tensor, var: Tensor, params: dict[str, Tensor]) -> Tensor:
    """E[p(f)], for any variance: that of Φ(cf), and what p has beside it."""
    if type(likelihood) is BernoulliLikelihood:
        return torch.special.ndtr(mean / (1.0 + var).sqrt())
    c = (math.pi / 8.0) ** 0.5  # the slope of the logistic function
    beside = _bump(lambda f: _probability(likelihood, f, params) - torch.special.ndtr(c * f), mean, var)
    return (torch.special.ndtr(c * mean / (1.0 + c**2 * var).sqrt()) + beside).clamp(0.0, 1.0)


def _binary_information(likelihood: Likelihood, f: Tensor, params: dict[str, Tensor]) -> Tensor:
    if type(likelihood) is BernoulliLikelihood:  # Φ'² / Φ(1 − Φ), accurate in the tails
        log_ndtr = torch.special.log_ndtr
        return (-f.square() - math.log(2.0 * math.pi) - log_ndtr(f) - log_ndtr(-f)).exp()
    return _information(likelihood, f, params)


def _information(likelihood: Likelihood, f: Tensor, params: dict[str, Tensor]) -> Tensor:
    """(∂ E[y|f])² / var(y|f); 0 where nothing is left of either."""
    create = torch.is_grad_enabled() and f.requires_grad
    with torch.enable_grad():
        at = f if create else f.detach().requires_grad_()
        y = likelihood.forward(at, **params)
        slope = torch.autograd.grad(y.mean.sum(), at, create_graph=create)[0]
    spread = y.variance if create else y.variance.detach()
    sound = (spread > 1e-300) & spread.isfinite()
    return torch.where(sound, slope.square() / torch.where(sound, spread, 1.0), 0.0)


def _bump(g: Callable[[Tensor], Tensor], mean: Tensor, var: Tensor) -> Tensor:
    """E[g(f)] of a function that is smooth and vanishes away from 0, for any variance; differentiable.

    Below variance 1 by Gauss–Hermite quadrature; above, where its nodes would lie too far apart, by the trapezoid rule
    on the line of f, whose error falls geometrically.
    """
    wide = var > 1.0
    narrow = expectation(g, mean, torch.where(wide, 1.0, var), MANY_NODES)
    if not bool(wide.any()):
        return narrow
    line = torch.arange(-40.0, 40.5, 0.5, dtype=mean.dtype, device=mean.device).reshape(-1, *[1] * mean.ndim)
    safe = torch.where(wide, var, 1.0)
    density = (-0.5 * (line - mean).square() / safe).exp() / (2.0 * math.pi * safe).sqrt()
    return torch.where(wide, 0.5 * (g(line) * density).sum(0), narrow)


def _check(likelihood: Likelihood) -> None:
    if not isinstance(likelihood, _OneDimensionalLikelihood):
        raise UnsupportedError(f"{type(likelihood).__name__} has no elementwise conditional p(y|f); score by variance.")
