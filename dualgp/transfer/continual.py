"""Continual learning: earlier data as terms of a loss, from a quadratic in the weights to the data themselves.

With w* the network so far and D its data, of which a memory M is kept:

| what is kept | term | gradient it reconstructs |
|---|---|---|
| sites of all, quadratic | `quadratic`: ½(w − w*)ᵀS(w − w*) | of all, to first order |
| M as functions | `soft_labels`: Σ_M CE(σ(f*), σ(f)) | Σ_M J(σ(f) − σ(f*)), at every w |
| and their labels' residuals | `residuals`: Σ_M fᵀ(σ(f*) − y) | turns soft labels into true ones |
| M and labels | `replay`: −Σ_M log p(y|f) | of M |

A K-prior is soft labels on M with the prior's quadratic around w*; on the rest, D∖M, a quadratic site may stand. For
a generalised linear model with M = D its gradient is exact, whatever w is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from gpytorch.likelihoods import Likelihood, SoftmaxLikelihood
from torch import Tensor, nn

from dualgp.checks import check_number, check_tensor, check_value
from dualgp.errors import InputError, NotPositiveDefiniteError
from dualgp.fingerprints import fingerprints
from dualgp.sites import WeightSite, add_precisions, apply_precision
from dualgp.transfer.curvature import network_curvature
from dualgp.transfer.memory import MemorySet
from dualgp.transfer.terms import (
    Term,
    check_canonical,
    check_soft_targets,
    cross_entropy,
    encoded,
    flat_weights,
    predicted_mean,
    quadratic,
)
from dualgp.weights import Number, WeightLayout, WeightPosterior

_ROUNDING = 1e-4  # relative; a curvature this little below 0 is rounding, of networks in float32


def soft_labels(memory: MemorySet, likelihood: Likelihood, temperature: Number = 1.0) -> Term:
    """Return Σ_M wᵢ CE(σ(f*ᵢ/T), σ(fᵢ/T)): functional regularisation, distillation.

    Raises:
        InputError: unless T is positive.
        UnsupportedError: if the likelihood has no canonical link.

    Source: Hinton et al. 2015; Khan & Swaroop 2021, eq. 6.

    Example:
        >>> from dualgp.likelihoods import LogitBernoulliLikelihood
        >>> net, x = nn.Linear(1, 1), torch.randn(4, 1)
        >>> loss = soft_labels(MemorySet.of(net, x), LogitBernoulliLikelihood())(net)
        >>> torch.autograd.grad(loss, net.weight)[0].abs().max() < 1e-6  # at its own labels
        tensor(True)
    """
    check_canonical(likelihood)
    check_number("The temperature", temperature, above=0)
    target = predicted_mean(likelihood, memory.f / temperature)
    return Term(lambda net: memory.weights @ cross_entropy(likelihood, target, net(memory.x) / temperature))


def residuals(memory: MemorySet, likelihood: Likelihood) -> Term:
    """Return Σ_M wᵢ fᵢᵀ(σ(f*ᵢ) − yᵢ): with soft labels, whose gradient it completes to the one of the true labels.

    J(σ(f) − σ(f*)) + J(σ(f*) − y) = J(σ(f) − y): needed where w* is no optimum of all data.

    Raises:
        InputError: if the memory has no targets.
        UnsupportedError: if the likelihood has no canonical link.

    Source: Daxberger et al. 2023, eq. 7.

    Example:
        >>> from dualgp.likelihoods import LogitBernoulliLikelihood
        >>> net, x, y, lik = nn.Linear(1, 1), torch.randn(4, 1), torch.ones(4, 1), LogitBernoulliLikelihood()
        >>> m = MemorySet.of(net, x, y)
        >>> both = torch.autograd.grad((soft_labels(m, lik) + residuals(m, lik))(net), net.weight)[0]
        >>> torch.allclose(both, torch.autograd.grad(replay(x, y, lik)(net), net.weight)[0])
        True
    """
    if memory.y is None:
        raise InputError("Residuals need the targets of the memory: keep them with MemorySet.of(network, x, y).")
    check_soft_targets(likelihood, memory.y)
    gap = predicted_mean(likelihood, memory.f) - encoded(likelihood, memory.y, memory.f)
    noise = getattr(likelihood, "noise", gap.new_ones(1)).detach().to(gap)
    weighted = (gap / noise).reshape(len(memory), -1) * memory.weights.unsqueeze(-1)

    def of(network: nn.Module) -> Tensor:
        f = network(memory.x)
        if f.numel() != weighted.numel():
            raise InputError(f"Expected outputs as of the memory, {tuple(memory.f.shape)}, got {tuple(f.shape)}.")
        return (f.reshape(weighted.shape) * weighted).sum()

    return Term(of)


def replay(x: Tensor, y: Tensor, likelihood: Likelihood, weights: Tensor | Number = 1.0) -> Term:
    """Return −Σ wᵢ log p(yᵢ|f(xᵢ)) up to a constant: the loss of the data themselves.

    Raises:
        InputError: if x, y and weights are not of as many data, or a target cannot be of the likelihood.
        UnsupportedError: if the likelihood has no canonical link.

    Example:
        >>> from gpytorch.likelihoods import SoftmaxLikelihood
        >>> net, x = nn.Linear(1, 2), torch.randn(5, 1)
        >>> loss = replay(x, torch.zeros(5).long(), SoftmaxLikelihood(num_classes=2, mixing_weights=False))(net)
        >>> torch.allclose(loss, nn.functional.cross_entropy(net(x), torch.zeros(5).long(), reduction="sum"))
        True
    """
    check_soft_targets(likelihood, y)
    check_tensor("x", x)
    check_value("weights", weights)
    w = torch.as_tensor(weights, device=x.device)
    if not (x.ndim and y.ndim) or len(x) != len(y) or w.numel() not in (1, len(x)):
        raise InputError(
            f"Expected as many inputs, targets and weights, got {tuple(x.shape)}, {tuple(y.shape)} and "
            f"{tuple(w.shape)}."
        )

    def of(network: nn.Module) -> Tensor:
        f = network(x)
        values = cross_entropy(likelihood, encoded(likelihood, y, f), f)
        return (values * w.flatten().to(values)).sum()

    return Term(of)


def gradient_reconstruction(
    q: WeightPosterior | None,
    memory: MemorySet,
    likelihood: Likelihood,
    *,
    labelled: MemorySet | None = None,
    strength: Number = 1.0,
    tau: Number = 1.0,
    temperature: Number = 1.0,
) -> Term:
    """Return EWC, functional regularisation and replay in one: each reconstructs a part of the gradient of old data.

        strength · ½(w − w*)ᵀS(w − w*) + τ Σ_{M₁∪M₂} CE(σ(f*/T), σ(f/T)) + Σ_{M₂} fᵀ(σ(f*) − y)

    Args:
        q: of the data that are in no memory; None leaves the quadratic out.
        memory: M₁, with soft labels only.
        likelihood: of the network's outputs.
        labelled: M₂, with targets.
        strength: of the quadratic; 1 is its place in Bayes' rule.
        tau: of the soft labels; 1 likewise.
        temperature: T of the soft labels.

    Raises:
        InputError: if `labelled` has no targets, or T is not positive.
        UnsupportedError: if the likelihood has no canonical link.

    Source: Daxberger et al. 2023, eq. 8.

    Example:
        >>> from dualgp.likelihoods import LogitBernoulliLikelihood
        >>> net, x = nn.Linear(1, 1), torch.randn(4, 1)
        >>> term = gradient_reconstruction(None, MemorySet.of(net, x), LogitBernoulliLikelihood(), tau=0.5)
        >>> term(net).shape
        torch.Size([])
    """
    both = memory if labelled is None else memory.join(labelled)
    term = tau * soft_labels(both, likelihood, temperature)
    if labelled is not None:
        term = term + residuals(labelled, likelihood)
    return term if q is None else term + strength * quadratic(q)


@dataclass(frozen=True, eq=False)
class KPrior:
    """What a network has learned, as a prior for its next: soft labels on a memory, quadratics around w* for the rest.

        K(w) = Σ_M CE(σ(f*), σ(f)) + ½(w − w*)ᵀ(S₀ + B_{D∖M})(w − w*)

    Four verbs make the loss to minimise next: `add_data`, `remove_data`, `change_prior`, `distil`. None trains.

    Args:
        posterior: of mean w*, with the prior of the first training and, as its site, what stands for D ∖ M. No site
            means that the memory is all that is known of the data.
        memory: M at w*.
        likelihood: of the network's outputs, with a canonical link.

    Source: Khan & Swaroop 2021 (K-priors), eq. 6 and 8.

    Example:
        >>> from dualgp import WeightLayout
        >>> from dualgp.likelihoods import LogitBernoulliLikelihood
        >>> net, x = nn.Linear(1, 1), torch.randn(4, 1)
        >>> K = KPrior.of(net, x, LogitBernoulliLikelihood(), prior_precision=2.0)
        >>> loss = K.add_data(torch.ones(1, 1), torch.ones(1, 1))
        >>> loss(net).requires_grad
        True
    """

    posterior: WeightPosterior
    memory: MemorySet
    likelihood: Likelihood

    def __post_init__(self) -> None:
        check_canonical(self.likelihood)

    @classmethod
    def of(
        cls,
        network: nn.Module,
        x: Tensor,
        likelihood: Likelihood,
        *,
        prior_precision: Tensor | Number,
        prior_mean: Tensor | Number = 0.0,
        rest: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> KPrior:
        """Return the K-prior of a trained network with a memory of inputs x.

        Args:
            network: at its optimum.
            x: inputs of the memory.
            likelihood: of its outputs.
            prior_precision: S₀ of its training, on losses that are sums.
            prior_mean: m₀ of its training.
            rest: curvature of the data that are not in memory, [P] or [P, P] (`network_curvature`); None for none.
            weights: how many data each input stands for.

        Raises:
            InputError: if shapes do not fit, or a value is not finite.
            NotPositiveDefiniteError: if S₀ + B is not positive definite.
        """
        check_value("prior_mean", prior_mean)
        check_value("prior_precision", prior_precision)
        layout = WeightLayout.of(network)
        theta = flat_weights(network, layout).detach()
        prior = WeightPosterior(
            layout,
            prior_mean=torch.as_tensor(prior_mean, device=theta.device).to(theta),
            prior_precision=torch.as_tensor(prior_precision, device=theta.device).to(theta),
        )
        B = torch.zeros_like(theta) if rest is None else rest.to(theta)
        if B.shape not in ((len(theta),), (len(theta), len(theta))):
            raise InputError(f"The network has {len(theta)} weights, the curvature of the rest is {tuple(B.shape)}.")
        S = add_precisions(prior.prior_precision, B)
        lam = apply_precision(S, theta) - apply_precision(prior.prior_precision, prior.prior_mean)
        return cls(prior.add(WeightSite(lam, B)), MemorySet.of(network, x, weights=weights), likelihood)

    def term(self) -> Term:
        """Return K(w)."""
        return quadratic(self.posterior) + soft_labels(self.memory, self.likelihood)

    def add_data(self, x: Tensor, y: Tensor) -> Term:
        """Return K(w) + ℓ(w; x, y): the loss with new data."""
        return self.term() + replay(x, y, self.likelihood)

    def remove_data(self, network: nn.Module, x: Tensor, y: Tensor) -> Term:
        """Return K(w) − ℓ(w; x, y), where x are functions and no longer a part of the quadratic: the loss without them.

        Args:
            network: w*, the network that this is of.
            x: inputs to remove, which are not in memory.
            y: their targets, as they were trained on.

        Raises:
            InputError: if some are in memory; of those, take the loss away: `K.term() - replay(x, y, likelihood)`.
            NotPositiveDefiniteError: if they were no part of the quadratic.
        """
        return self.remember(network, x).term() - replay(x, y, self.likelihood)

    def remember(self, network: nn.Module, x: Tensor) -> KPrior:
        """Return the same with data moved from the quadratic to the memory.

        Raises:
            InputError: if some are in memory already, where they would count twice.
            NotPositiveDefiniteError: if they were no part of the quadratic.
        """
        if (twice := _rows_held(self.memory.x, x)) > 0:
            raise InputError(
                f"{twice} of {len(x)} inputs are in memory already, and no part of the quadratic. What is in memory is "
                "taken out by its loss alone: K.term() - replay(x, y, likelihood)."
            )
        moved = replace(self, memory=self.memory.join(MemorySet.of(network, x)))
        q, site = self.posterior, self.posterior.site
        if site is None or not bool(site.B.any()):
            return moved
        f = moved.memory.f[-len(x) :]
        y = f.new_zeros(f.shape[:-1] if type(self.likelihood) is SoftmaxLikelihood else f.shape)  # B sees no labels
        structure: Literal["diagonal", "dense"] = "dense" if q.structure == "dense" else "diagonal"
        B = network_curvature(network, x, y, self.likelihood, structure).to(q.mean)
        left = add_precisions(site.B, -B)
        smallest = float(left.min() if left.ndim == 1 else torch.linalg.eigvalsh(left.double())[0])
        if smallest < -_ROUNDING * float(site.B.abs().max()):
            raise NotPositiveDefiniteError(
                f"These data were no part of the quadratic: it would be left with an eigenvalue {smallest:.3g}. Give "
                "the K-prior the curvature of all data that are not in memory (rest=)."
            )
        return replace(moved, posterior=q.remove(WeightSite(apply_precision(B, q.mean), B)))

    def change_prior(self, prior: WeightPosterior) -> Term:
        """Return K(w) + ½|w − m|²_S of a new prior − that of the old one: the loss under another prior.

        Exact for a generalised linear model with M = D.
        """
        q = self.posterior
        old = WeightPosterior(q.layout, prior_mean=q.prior_mean, prior_precision=q.prior_precision)
        return self.term() + quadratic(prior) - quadratic(old)

    def distil(self, prior: WeightPosterior) -> Term:
        """Return Σ_M CE(σ(f*), σ(f)) + ½|v − m|²_S: for a network of another architecture, with a prior of its own.

        Quadratics in w say nothing of other weights: M must stand for all data, by its weights if it is smaller.
        """
        return soft_labels(self.memory, self.likelihood) + quadratic(prior)


def _rows_held(held: Tensor, x: Tensor) -> int:
    """Return how many rows of x are rows of `held`, to the last bit."""
    if held.shape[1:] != x.shape[1:] or held.dtype != x.dtype or not len(x) or not len(held):
        return 0
    known = set(fingerprints(held.cpu()).tolist())
    return sum(key in known for key in fingerprints(x.cpu()).tolist())
