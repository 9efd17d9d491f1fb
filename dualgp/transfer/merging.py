"""Models fine-tuned apart, put together: a sum of sites, and the averages that it explains.

Models t = 1 … T start from one base N(θ₀, S₀⁻¹), are trained on losses ℓ_t, and end at θ_t with curvature B_t. Each is
the base times a site, and the merged model is the base times all of them:

    S = S₀ + Σ α_t B_t,        θ = θ₀ + S⁻¹ Σ α_t (S₀ + B_t)(θ_t − θ₀)

exact where the losses are quadratic. Task arithmetic is B_t = 0, the plain average besides has α_t = 1/T.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dualgp.checks import check_number, check_tensor
from dualgp.errors import BasisMismatchError, InputError
from dualgp.sites import WeightSite, apply_precision
from dualgp.transfer.kronecker import KroneckerPosterior
from dualgp.weights import Number, WeightLayout, WeightPosterior, check_layouts

Q = TypeVar("Q", WeightPosterior, KroneckerPosterior)
_SAME = 1e-6  # priors are one if they agree to this, relative to their largest value


def expanded_site(mean: Float[Tensor, "P"], gradient: Float[Tensor, "P"], curvature: Tensor) -> WeightSite:
    """Return the site of a loss expanded at a point m: λ = Bm − g, so that −∇log t(m) = g and −∇²log t = B.

    With gradient and curvature in expectation under q, the site of variational inference: sites plus prior are then
    the posterior at its optimum.

    Args:
        mean: m.
        gradient: ∇ℓ, of a sum over data, at m or in expectation under q.
        curvature: B, [P] or [P, P].

    Source: Khan & Rue 2023, § 5.4 (sites as natural gradients).

    Example:
        >>> expanded_site(torch.tensor([1.0]), torch.tensor([0.5]), torch.tensor([2.0])).lam
        tensor([1.5000])
    """
    site = WeightSite(gradient, curvature)
    check_tensor("mean", mean)
    if mean.shape != gradient.shape or mean.dtype == torch.bool or gradient.dtype == torch.bool:
        raise InputError(
            f"mean must be numbers of shape {tuple(gradient.shape)}, as the gradient, got {mean.dtype} "
            f"{tuple(mean.shape)}."
        )
    return WeightSite(apply_precision(site.B, mean) - gradient, site.B.clone())  # the caller may write to its own


def fine_tuned(base: WeightPosterior, mean: Float[Tensor, "P"], curvature: Tensor) -> WeightPosterior:
    """Return a model trained from a base as that base times one site: of this mean, and of precision S₀ + B.

    At the optimum of ℓ(θ) + ½(θ − θ₀)ᵀS₀(θ − θ₀) the site is the expansion of ℓ there: λ = (S₀ + B)θ_t − S₀θ₀.

    Args:
        base: N(θ₀, S₀⁻¹); if it has seen data, they count as its prior (`as_prior`).
        mean: θ_t, of a model trained from the base.
        curvature: B, the Hessian of the *sum* of losses, or the squared gradients N·v of an optimiser; [P] or [P, P].

    Raises:
        BasisMismatchError: if there are not as many weights.
        NotPositiveDefiniteError: if S₀ + B is not positive definite.

    Source: Daheim et al. 2024, § 3.

    Example:
        >>> base = WeightPosterior(WeightLayout({"w": torch.Size([1])}), prior_precision=1.0)
        >>> fine_tuned(base, torch.tensor([2.0]), torch.tensor([3.0])).site.lam
        tensor([8.])
    """
    base = base if base.site is None else base.as_prior()
    check_tensor("mean", mean)
    check_tensor("curvature", curvature)
    if mean.dtype == torch.bool:
        raise InputError("mean must be floating point, got torch.bool.")
    if mean.shape != (base.layout.size,):
        raise BasisMismatchError(f"The base has {base.layout.size} weights, the model {tuple(mean.shape)}.")
    if curvature.shape not in ((len(mean),), (len(mean), len(mean))):
        raise BasisMismatchError(
            f"For {len(mean)} weights a curvature is [{len(mean)}] or [{len(mean)}, {len(mean)}], got "
            f"{tuple(curvature.shape)}; a KroneckerCurvature goes into KroneckerPosterior.fine_tuned."
        )
    gradient = -apply_precision(base.precision, mean - base.mean)
    return base.add(expanded_site(mean, gradient, curvature))


def merge(posteriors: Sequence[Q], weights: Sequence[Number] | None = None) -> Q:
    """Return prior · Π t_kʷᵏ: posteriors under one prior, merged by adding up their sites.

    Args:
        posteriors: under one prior, over the same weights: `fine_tuned` models, runs of IVON from one base, Laplace
            posteriors. Diagonal and dense ones mix; Kronecker ones merge with their like.
        weights: α_k, one for each; 1 if None, which is the sum of all evidence. Negative ones take away.

    Raises:
        InputError: if there are none, not as many weights, or dtypes or devices differ.
        BasisMismatchError: if they are over other weights, or under other priors.
        NotPositiveDefiniteError: if negative weights leave no Gaussian.

    Source: Daheim et al. 2024, eq. 12; Khan & Rue 2023.

    Example:
        >>> prior = WeightPosterior(WeightLayout({"w": torch.Size([1])}), prior_precision=1.0)
        >>> a, b = (prior.add(WeightSite(torch.tensor([lam]), torch.ones(1))) for lam in (3.0, 6.0))
        >>> merge([a, b]).mean
        tensor([3.])
    """
    alphas = _weights(posteriors, weights)
    _check_together(posteriors)
    total = None
    for q, alpha in zip(posteriors, alphas, strict=True):
        if q.site is not None:
            part = q.site * alpha
            total = part if total is None else total + part  # type: ignore[operator]
    return posteriors[0].with_site(total)  # type: ignore[arg-type, return-value]


def forget(merged: Q, posterior: Q, weight: Number = 1.0) -> Q:
    """Return a merged model without one of its parts: its site taken out again, q / tʷ.

    Raises:
        BasisMismatchError: if they are over other weights, or under other priors.
        NotPositiveDefiniteError: if no Gaussian is left: it was not in there, or not with this weight.

    Example:
        >>> prior = WeightPosterior(WeightLayout({"w": torch.Size([1])}), prior_precision=1.0)
        >>> a, b = (prior.add(WeightSite(torch.tensor([lam]), torch.ones(1))) for lam in (3.0, 6.0))
        >>> forget(merge([a, b]), b).mean, a.mean
        (tensor([1.5000]), tensor([1.5000]))
    """
    check_number("weight", weight)
    return merge([merged, posterior], [1.0, -weight])


def average(posteriors: Sequence[Q], weights: Sequence[Number] | None = None) -> Float[Tensor, "P"]:
    """Return the plain average of means, Σ α_t θ_t with α_t = 1/T unless given: a merge of equal curvatures.

    Source: Wortsman et al. 2022 (model soups).

    Example:
        >>> prior = WeightPosterior(WeightLayout({"w": torch.Size([1])}), prior_precision=1.0)
        >>> average([prior, prior.add(WeightSite(torch.tensor([4.0]), torch.ones(1)))])
        tensor([1.])
    """
    alphas = _weights(posteriors, [1.0 / max(len(posteriors), 1)] * len(posteriors) if weights is None else weights)
    _check_alike(posteriors)
    return torch.stack([alpha * q.mean for q, alpha in zip(posteriors, alphas, strict=True)]).sum(0)


def task_arithmetic(posteriors: Sequence[Q], weights: Sequence[Number] | None = None) -> Float[Tensor, "P"]:
    """Return θ₀ + Σ α_t (θ_t − θ₀), α_t = 1 unless given: a merge that takes every B_t for zero.

    Raises:
        InputError: as `merge`.
        BasisMismatchError: as `merge`.

    Source: Ilharco et al. 2023.

    Example:
        >>> prior = WeightPosterior(WeightLayout({"w": torch.Size([1])}), prior_mean=1.0, prior_precision=1.0)
        >>> q = prior.add(WeightSite(torch.tensor([4.0]), torch.ones(1)))
        >>> task_arithmetic([q, q])
        tensor([4.])
    """
    alphas = _weights(posteriors, weights)
    _check_together(posteriors)
    base = posteriors[0].prior_mean
    return base + torch.stack([a * (q.mean - base) for q, a in zip(posteriors, alphas, strict=True)]).sum(0)


def fisher_average(
    posteriors: Sequence[WeightPosterior], weights: Sequence[Number] | None = None
) -> Float[Tensor, "P"]:
    """Return (Σ α_t S_t)⁻¹ Σ α_t S_t θ_t: means weighted by precision, which counts the prior T times over.

    S_t has the prior in it: weights that no datum informs would be 0/0 otherwise.

    Raises:
        InputError: as `merge`, or if they are Kronecker posteriors.
        BasisMismatchError: if they are over other weights.
        NotPositiveDefiniteError: if Σ α_t S_t is not positive definite.

    Source: Matena & Raffel 2022.

    Example:
        >>> prior = WeightPosterior(WeightLayout({"w": torch.Size([1])}), prior_precision=1.0)
        >>> a, b = (prior.add(WeightSite(torch.tensor([lam]), torch.ones(1))) for lam in (2.0, 4.0))
        >>> fisher_average([a, b])
        tensor([1.5000])
    """
    alphas = _weights(posteriors, weights)
    _check_alike(posteriors)
    if any(isinstance(q, KroneckerPosterior) for q in posteriors):
        raise InputError("Means are weighted by diagonal or dense precisions: turn Kronecker ones into to_dense().")
    sites = [natural_parameters(q) for q in posteriors]
    total = alphas[0] * sites[0]
    for site, alpha in zip(sites[1:], alphas[1:], strict=True):
        total = total + alpha * site
    zero = torch.zeros((), dtype=total.lam.dtype, device=total.lam.device)
    return WeightPosterior(posteriors[0].layout, total, prior_precision=zero).mean


@dataclass(frozen=True, eq=False)
class Mismatch:
    """How far merged weights are from the optimum of all losses, measured by gradients and without a test set.

    Attributes:
        per_task: |∇ℓ_t(θ) + ∇log t_t(θ)|, [T]: what the site of each model does not know of its loss at θ.
        joint: |∇J(θ)|, with J the prior's quadratic plus Σ α_t ℓ_t: zero at the joint model.
        at_base: |∇J(θ₀)|, for scale.
    """

    per_task: Tensor
    joint: float
    at_base: float

    @property
    def relative(self) -> float:
        """`joint` beside `at_base`: near 0 the merge is as good as joint training, near 1 no better than the base.

        Infinite where the base is the optimum itself.
        """
        return self.joint / self.at_base if self.at_base else math.inf


def gradient_mismatch(
    network: nn.Module,
    theta: Float[Tensor, "P"],
    losses: Sequence[Callable[[nn.Module], Tensor]],
    posteriors: Sequence[WeightPosterior],
    weights: Sequence[Number] | None = None,
) -> Mismatch:
    """Return how far the weights θ are from the joint optimum, from one gradient of each task's training loss.

    ∇J(θ) = S₀(θ − θ₀) + Σ α_t ∇ℓ_t(θ). At merged weights it is Σ α_t [∇ℓ_t(θ) − (B_tθ − λ_t)]: the gradients that
    sites predict against the true ones.

    Args:
        network: of the weights' layout; it is copied, and not touched.
        theta: merged weights, of whatever method.
        losses: loss of each task as a function of the network: a *sum* over its training data.
        posteriors: the models merged, of the same tasks.
        weights: α_t; 1 if None.

    Raises:
        InputError: as `merge`, or if a loss is not one finite number that depends on the weights of the network.
        BasisMismatchError: as `merge`.

    Source: Daheim et al. 2024, eq. 9.

    Example:
        >>> net, x = nn.Linear(1, 1, bias=False), torch.ones(3, 1)
        >>> prior = WeightPosterior(WeightLayout.of(net), prior_precision=1.0)
        >>> losses = [lambda f, c=c: 0.5 * (f(x) - c).square().sum() for c in (1.0, 2.0)]
        >>> models = [prior.add(WeightSite(torch.tensor([3 * c]), torch.tensor([3.0]))) for c in (1.0, 2.0)]
        >>> gradient_mismatch(net, merge(models).mean, losses, models).relative < 1e-6  # quadratic: exact
        True
    """
    alphas = _weights(posteriors, weights)
    _check_together(posteriors)
    if len(losses) != len(posteriors):
        raise InputError(f"Expected one loss for each of {len(posteriors)} models, got {len(losses)}.")
    if theta.shape != posteriors[0].mean.shape:
        raise InputError(f"The models have {posteriors[0].layout.size} weights, θ is {tuple(theta.shape)}.")
    first, per_task = posteriors[0], []
    S0, m0 = first.prior_precision, first.prior_mean
    here, there = apply_precision(S0, theta - m0), torch.zeros_like(m0)
    for q, loss, alpha in zip(posteriors, losses, alphas, strict=True):
        g = loss_gradient(network, q.layout, theta, loss)
        here = here + alpha * g
        there = there + alpha * loss_gradient(network, q.layout, m0, loss)
        per_task.append((g if q.site is None else g - apply_precision(q.site.B, theta) + q.site.lam).norm())
    return Mismatch(torch.stack(per_task), float(here.norm()), float(there.norm()))


def natural_parameters(q: WeightPosterior) -> WeightSite:
    """Return (S m, S) of a posterior, its prior included."""
    return WeightSite(apply_precision(q.precision, q.mean), q.precision)


def loss_gradient(
    network: nn.Module, layout: WeightLayout, theta: Float[Tensor, "P"], loss: Callable[[nn.Module], Tensor]
) -> Float[Tensor, "P"]:
    """Return the gradient of loss(network) at weights θ, flat; the network itself is left alone.

    Raises:
        InputError: if the network has not these weights, or the loss is not one finite number that depends on them.

    Example:
        >>> net = nn.Linear(1, 1)
        >>> layout = WeightLayout.of(net)
        >>> loss_gradient(net, layout, torch.tensor([2.0, 0.0]), lambda f: f(torch.ones(1, 1)).square().sum())
        tensor([4., 4.])
    """
    layout.parameters_of(network)
    if theta.shape != (layout.size,):
        raise InputError(f"The network has {layout.size} weights, and {tuple(theta.shape)} were given.")
    held = copy.deepcopy(network)
    found = dict(held.named_parameters())
    with torch.no_grad():
        for name, value in layout.split(theta).items():
            found[name].copy_(value)
            found[name].requires_grad_()
    with torch.enable_grad():
        value = loss(held)
        if value.numel() != 1 or not value.requires_grad or not bool(value.isfinite()):
            got = value.detach() if value.numel() == 1 else f"{tuple(value.shape)} numbers: sum them"
            raise InputError(f"A loss must be one finite number and depend on the network's weights; got {got}.")
        value = value.sum()
        grads = torch.autograd.grad(value, [found[name] for name in layout.shapes], allow_unused=True)
    pairs = zip(grads, layout.shapes, strict=True)
    return torch.cat([(torch.zeros_like(found[n]) if g is None else g).flatten() for g, n in pairs]).to(theta.dtype)


def _weights(posteriors: Sequence[object], weights: Sequence[Number] | None) -> list[float]:
    for w in weights or ():
        check_number("A weight", w)
    alphas = [1.0] * len(posteriors) if weights is None else [float(w) for w in weights]
    if not posteriors or len(alphas) != len(posteriors):
        raise InputError(
            f"Expected one model or more, and a finite weight for each; got {len(posteriors)} models and weights "
            f"{alphas}."
        )
    return alphas


def _check_alike(posteriors: Sequence[Q]) -> None:
    """Raise unless all are of one kind, over the same weights, in one dtype on one device."""
    for q in posteriors:
        if not isinstance(q, WeightPosterior | KroneckerPosterior):
            raise InputError(
                f"Models are merged as posteriors over weights, got {type(q).__name__}. Posteriors on one basis merge "
                "by their sites: Posterior(basis, a.site + b.site)."
            )
    check_layouts(posteriors)
    first, *others = posteriors
    for other in others:
        if type(other) is not type(first):
            raise BasisMismatchError(
                "Kronecker posteriors merge with their like; turn one into a dense one with to_dense()."
            )
        if (other.mean.dtype, other.mean.device) != (first.mean.dtype, first.mean.device):
            raise InputError(
                f"Models of one dtype on one device were expected, got {first.mean.dtype} on {first.mean.device} and "
                f"{other.mean.dtype} on {other.mean.device}. Use posterior.to(device, dtype)."
            )


def _check_together(posteriors: Sequence[Q]) -> None:
    """Raise unless they are alike, and under one prior."""
    _check_alike(posteriors)
    first, *others = posteriors
    for other in others:
        if not (_same(first.prior_mean, other.prior_mean) and _same(first.prior_precision, other.prior_precision)):
            raise BasisMismatchError(
                "Models under one prior were expected: sites are relative to it. State all relative to one base with "
                "fine_tuned(base, mean, curvature), or take the evidence of one base away first."
            )


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= _SAME * a.abs().max())
