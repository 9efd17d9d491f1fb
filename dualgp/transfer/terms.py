"""Terms to add to a loss: what is remembered of earlier data, as functions of a network.

A term takes a network and returns a number to differentiate, on the scale of losses that are sums over data. Terms add,
and are scaled by numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from gpytorch.likelihoods import GaussianLikelihood, Likelihood, SoftmaxLikelihood
from torch import Tensor, nn

from dualgp.checks import check_tensor
from dualgp.errors import InputError, UnsupportedError
from dualgp.likelihoods import LogitBernoulliLikelihood, LogPoissonLikelihood
from dualgp.sites import apply_precision
from dualgp.weights import Number, WeightLayout, WeightPosterior


@dataclass(frozen=True, eq=False)
class Term:
    """A function of a network that adds to a loss, or to other terms.

    Example:
        >>> norm = Term(lambda net: sum(p.square().sum() for p in net.parameters()))
        >>> net = nn.Linear(1, 1)
        >>> bool((0.5 * norm + norm)(net) == 1.5 * norm(net))
        True
    """

    of: Callable[[nn.Module], Tensor]

    def __call__(self, network: nn.Module) -> Tensor:
        """Return the term's value, differentiable in the network's parameters."""
        return self.of(network)

    def __add__(self, other: Term) -> Term:
        return Term(lambda network: self(network) + other(network))

    def __sub__(self, other: Term) -> Term:
        return self + (-1.0) * other

    def __mul__(self, factor: Number) -> Term:
        return Term(lambda network: factor * self(network))

    __rmul__ = __mul__


def quadratic(q: WeightPosterior) -> Term:
    """Return ½(θ − m)ᵀS(θ − m), −log q(θ) up to a constant: elastic weight consolidation, with S diagonal or dense.

    Source: Kirkpatrick et al. 2017; of several tasks in turn the sites add up, and m is the last mean.

    Example:
        >>> net = nn.Linear(1, 1, bias=False)
        >>> q = WeightPosterior(WeightLayout.of(net), prior_mean=net.weight.item() - 1.0, prior_precision=4.0)
        >>> round(quadratic(q)(net).item(), 4)
        2.0
    """

    def of(network: nn.Module) -> Tensor:
        gap = flat_weights(network, q.layout) - q.mean
        return 0.5 * gap @ apply_precision(q.precision, gap)

    return Term(of)


def log_site(q: WeightPosterior) -> Term:
    """Return −log t(θ) = ½θᵀBθ − λᵀθ: a site without its prior; 0 where there is none."""

    def of(network: nn.Module) -> Tensor:
        theta = flat_weights(network, q.layout)
        return theta.sum() * 0.0 if q.site is None else theta @ (0.5 * apply_precision(q.site.B, theta) - q.site.lam)

    return Term(of)


def flat_weights(network: nn.Module, layout: WeightLayout) -> Tensor:
    """Return the network's parameters as one flat vector that can be differentiated.

    Raises:
        InputError: if the network has not these weights.
    """
    found = dict(network.named_parameters())
    wrong = [n for n, shape in layout.shapes.items() if n not in found or found[n].shape != shape]
    if wrong:
        raise InputError(f"The network has not the weights {wrong[:4]} that the term is over.")
    return torch.cat([found[name].flatten() for name in layout.shapes])


def check_canonical(likelihood: Likelihood) -> None:
    """Raise unless −log p(y|f) = A(f) − yᵀf up to a constant, with f the network's output: then soft labels do.

    Raises:
        UnsupportedError: naming what to use.
    """
    if type(likelihood) not in (
        SoftmaxLikelihood,
        LogitBernoulliLikelihood,
        GaussianLikelihood,
        LogPoissonLikelihood,
    ):
        raise UnsupportedError(
            f"{type(likelihood).__name__} has no canonical link; use SoftmaxLikelihood, GaussianLikelihood, or "
            "LogitBernoulliLikelihood and LogPoissonLikelihood of dualgp.likelihoods."
        )


def predicted_mean(likelihood: Likelihood, f: Tensor) -> Tensor:
    """Return h(f) = A′(f), the mean of y: softmax, 1/(1 + e^{−f}), f, e^f."""
    check_canonical(likelihood)
    if type(likelihood) is SoftmaxLikelihood:
        return f.softmax(-1)
    if type(likelihood) is LogitBernoulliLikelihood:
        return f.sigmoid()
    return f if type(likelihood) is GaussianLikelihood else f.exp()


def cross_entropy(likelihood: Likelihood, target: Tensor, f: Tensor) -> Tensor:
    """Return Σ over outputs of (A(f) − target · f)/φ for each datum, [n]: of labels or of soft ones.

    φ is the noise of a Gaussian likelihood, and 1 for the others. The gradient in f is (h(f) − target)/φ.

    Raises:
        InputError: unless there are as many targets as outputs.
    """
    check_canonical(likelihood)
    if target.numel() != f.numel():
        raise InputError(f"Expected outputs for targets {tuple(target.shape)}, got {tuple(f.shape)}.")
    target = target.reshape(f.shape)  # [n] for outputs [n, 1]
    if type(likelihood) is SoftmaxLikelihood:
        return f.logsumexp(-1) - (target * f).sum(-1)
    if type(likelihood) is LogitBernoulliLikelihood:
        value = nn.functional.softplus(f) - target * f
    elif type(likelihood) is GaussianLikelihood:
        value = (0.5 * f.square() - target * f) / likelihood.noise.detach().to(f)
    else:
        value = f.exp() - target * f
    return value.flatten(1).sum(-1) if value.ndim > 1 else value


def encoded(likelihood: Likelihood, y: Tensor, f: Tensor) -> Tensor:
    """Return targets in the shape of f: one-hot for a softmax.

    Raises:
        InputError: if targets do not fit the outputs.
    """
    if type(likelihood) is SoftmaxLikelihood:
        if y.shape != f.shape[:1] or bool((y >= f.shape[-1]).any()):
            raise InputError(
                f"Expected classes 0 … {f.shape[-1] - 1} of {len(f)} data, [{len(f)}], got {tuple(y.shape)} and up to "
                f"{y.max()}."
            )
        return nn.functional.one_hot(y.long(), f.shape[-1]).to(f)
    if y.numel() != f.numel():
        raise InputError(f"Expected targets for outputs {tuple(f.shape)}, got {tuple(y.shape)}.")
    return y.reshape(f.shape).to(f)


def check_targets(likelihood: Likelihood, y: Tensor) -> None:
    """Raise unless targets can be of this likelihood: whole classes ≥ 0, in [0, 1], counts, or finite numbers.

    Raises:
        InputError: with the first that cannot.
        UnsupportedError: if the likelihood has no canonical link.
    """
    check_canonical(likelihood)
    check_tensor("y", y)
    kind = type(likelihood)
    fits = y.isfinite() if y.is_floating_point() else torch.ones_like(y, dtype=torch.bool)
    if kind is not GaussianLikelihood:
        fits = fits & (y >= 0)
    if kind is SoftmaxLikelihood:
        fits = fits & (y == y.long())
    if kind is LogitBernoulliLikelihood:
        fits = fits & (y <= 1)
    if not bool(fits.all()):
        raise InputError(f"{kind.__name__} has no target {y[~fits].flatten()[0].item():g}.")
