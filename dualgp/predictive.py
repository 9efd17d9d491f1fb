"""The predictive distribution p(y*) = E_q[p(y*|f)] of any supported likelihood, without sampling."""

from __future__ import annotations

import functools

import torch
from gpytorch.likelihoods import BernoulliLikelihood, Likelihood, SoftmaxLikelihood
from gpytorch.likelihoods.likelihood import _OneDimensionalLikelihood
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution, MixtureSameFamily, Normal

from dualgp.duals import (
    check_marginals,
    check_shape_of_targets,
    conditional_log_prob,
    gaussian_noise,
    has_batch_shape,
    num_nodes,
)
from dualgp.errors import InputError, UnsupportedError
from dualgp.quadrature import expectation, expected_softmax, hermite_points, log_expectation

_SETTLED = 1e-6  # nats between two numbers of nodes
_ROWS = 4096  # data at once, of some 1000 nodes each


def predictive_distribution(likelihood: Likelihood, mean: Tensor, var: Tensor, **params: Tensor) -> Distribution:
    """Return p(y) = ∫ p(y|f) N(f; mean, var) df as a torch Distribution, elementwise over data.

    Gaussian likelihoods give a Normal, binary ones a Bernoulli, softmax a Categorical; every other one-dimensional
    likelihood gives the mixture of its conditionals at the Gauss–Hermite nodes; its `log_prob` is `log_predictive`.

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
    mixture = _Mixture(Categorical(probs=w.expand(*mean.shape, -1)), components, validate_args=False)
    mixture.marginals = likelihood, mean, var, params
    return mixture


class _Mixture(MixtureSameFamily):
    """A mixture at the nodes, with the log density of the integral: components may be narrower than they are apart."""

    marginals: tuple[Likelihood, Tensor, Tensor, dict[str, Tensor]] | None = None

    def log_prob(self, value: Tensor) -> Tensor:
        if self.marginals is None:  # expanded
            return super().log_prob(value)
        likelihood, mean, var, params = self.marginals
        value, mean, var = torch.broadcast_tensors(value, mean, var)
        return log_predictive(likelihood, value, mean, var, **params).to(mean.dtype)


def log_predictive(likelihood: Likelihood, y: Tensor, mean: Tensor, var: Tensor, **params: Tensor) -> Tensor:
    """Return log E_q[p(y_i|f_i)] with the shape of y, in float64, to 1e-6 in the tails too.

    In closed form for Gaussian and probit likelihoods; else by Gauss–Hermite quadrature, and where that has not settled
    (q wide beside the likelihood, or y far from what q expects) by panels around the peak of the integrand; then to
    1e-4, if var is above 10³ for labels of a logistic link.

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
    y, mean, var = torch.broadcast_tensors(y, mean, var)
    return _log_mean(likelihood, y, mean, var, params)


def mean_nlpd(log_p: Tensor) -> float:
    """Return the mean of −log p; raise InputError where there are no data, of which there is none."""
    if not log_p.numel():
        raise InputError("There are no data to score: x and y have no rows.")
    return float(-log_p.mean())


def _log_mean(likelihood: Likelihood, y: Tensor, mean: Tensor, var: Tensor, params: dict[str, Tensor]) -> Tensor:
    nodes = num_nodes(likelihood)
    found, coarser = (_by_nodes(likelihood, y, mean, var, params, count) for count in (nodes, 3 * nodes // 4))
    rough = ~((found - coarser).abs() <= _SETTLED)
    if not bool(rough.any()):
        return found
    if has_batch_shape(likelihood):  # its parameters go with the last dimensions of y: no row can be taken out
        whole = log_expectation(lambda f: conditional_log_prob(likelihood, y, f, **params), mean, var)
        return torch.where(rough, whole, found)
    by_datum = {name: value.expand(y.shape).flatten() for name, value in params.items()}
    flat, parts = [t.flatten() for t in (y, mean, var)], []
    rows = rough.flatten().nonzero().squeeze(-1)
    for some in rows.split(_ROWS):
        own, (y_i, m_i, v_i) = {name: value[some] for name, value in by_datum.items()}, (t[some] for t in flat)
        log_p = functools.partial(conditional_log_prob, likelihood, y_i, **own)
        parts.append(log_expectation(log_p, m_i, v_i))
    return found.flatten().index_put((rows,), torch.cat(parts)).reshape(y.shape)


def _by_nodes(
    likelihood: Likelihood, y: Tensor, mean: Tensor, var: Tensor, params: dict[str, Tensor], count: int
) -> Tensor:
    points, w = hermite_points(mean, var, count)
    log_p = conditional_log_prob(likelihood, y, points, **params)
    return torch.logsumexp(log_p + w.log().reshape(-1, *[1] * mean.ndim), 0)


def _require_one_dimensional(likelihood: Likelihood) -> None:
    if not isinstance(likelihood, _OneDimensionalLikelihood):
        raise UnsupportedError(
            f"{type(likelihood).__name__} has no elementwise conditional p(y|f), so its predictive distribution needs "
            "sampling: draw f with `sample` and call the likelihood on the draws."
        )
