"""Sites in function space: what a network says at some inputs, as a factor of a posterior that is not Gaussian."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from gpytorch.likelihoods import Likelihood, SoftmaxLikelihood
from torch import Tensor, nn

from dualgp.errors import BasisMismatchError, InputError
from dualgp.sites import WeightSite, apply_precision
from dualgp.transfer.curvature import network_curvature
from dualgp.transfer.memory import MemorySet
from dualgp.transfer.merging import loss_gradient
from dualgp.transfer.terms import Term, check_canonical, cross_entropy, predicted_mean
from dualgp.weights import Number, WeightLayout


@dataclass(frozen=True, eq=False)
class FunctionSite:
    """One factor t(θ) = exp(−Σ wᵢ[A(fᵢ(θ)) − ŷᵢᵀfᵢ(θ)]): soft labels ŷ at inputs, with −log p(y|f) = A(f) − yᵀf.

    Natural parameters are (w, wŷ): sites at the same inputs add, and are scaled by numbers, as Gaussian ones are.

    Args:
        x: inputs, [m, ...].
        labels: ŷ, means of y as a network predicts them (or damped ones), [m, C] or [m].
        weights: w > 0, how many data each input stands for, [m].
        likelihood: with a canonical link.

    Raises:
        InputError: if lengths differ, labels are not finite, or a weight is not positive.
        UnsupportedError: if the likelihood has no canonical link.

    Source: Swaroop, Khan & Doshi-Velez 2025, § 3.4; Khan & Swaroop 2021.

    Example:
        >>> from dualgp.likelihoods import LogitBernoulliLikelihood
        >>> net, x, lik = nn.Linear(1, 1), torch.randn(4, 1), LogitBernoulliLikelihood()
        >>> a, b = (FunctionSite.of(net, x, lik, weights=torch.full((4,), w)) for w in (0.5, 1.0))
        >>> torch.allclose((a + b).term()(net), 1.5 * b.term()(net))
        True
    """

    x: Tensor
    labels: Tensor
    weights: Tensor
    likelihood: Likelihood

    def __post_init__(self) -> None:
        check_canonical(self.likelihood)
        if not 0 < len(self.x) == len(self.labels) == len(self.weights) or self.weights.ndim != 1:
            raise InputError(
                f"Inputs, labels and weights [m] of as many data were expected, got {len(self.x)}, {len(self.labels)} "
                f"and {tuple(self.weights.shape)}."
            )
        if not (bool(self.labels.isfinite().all()) and bool(((self.weights > 0) & self.weights.isfinite()).all())):
            raise InputError("Soft labels must be finite, and weights positive: the network may have diverged.")

    @classmethod
    def of(
        cls, network: nn.Module, x: Tensor, likelihood: Likelihood, *, weights: Tensor | None = None
    ) -> FunctionSite:
        """Return the site of a network's own predictions; every weight is 1 unless given. Errors as of the class."""
        memory = MemorySet.of(network, x, weights=weights)
        return cls(x, predicted_mean(likelihood, memory.f), memory.weights, likelihood)

    def term(self) -> Term:
        """Return −log t(θ) as a function of a network, to add to a loss.

        Raises:
            InputError: when called, if the network has not as many outputs as there are labels.
        """

        def of(network: nn.Module) -> Tensor:
            f = network(self.x)
            if f.numel() != self.labels.numel():
                raise InputError(f"Expected outputs for labels {tuple(self.labels.shape)}, got {tuple(f.shape)}.")
            return self.weights @ cross_entropy(self.likelihood, self.labels.reshape(f.shape), f)

        return Term(of)

    def expanded(
        self, network: nn.Module, layout: WeightLayout, structure: Literal["diagonal", "dense"] = "diagonal"
    ) -> WeightSite:
        """Return the Gaussian site that this is near a network's weights θ: B = Σ wᵢJᵢᵀβᵢJᵢ, λ = Bθ + ∇log t(θ)."""
        theta = layout.join(dict(network.named_parameters()))
        softmax = type(self.likelihood) is SoftmaxLikelihood
        y = torch.zeros_like(self.labels[..., 0] if softmax else self.labels)  # B of a canonical link sees no labels
        B = network_curvature(network, self.x, y, self.likelihood, structure, weights=self.weights).to(theta)
        return WeightSite(apply_precision(B, theta) - loss_gradient(network, layout, theta, self.term()), B)

    def __mul__(self, factor: Number) -> FunctionSite:
        return FunctionSite(self.x, self.labels, self.weights * factor, self.likelihood)

    __rmul__ = __mul__

    def __add__(self, other: FunctionSite) -> FunctionSite:
        if not self.same_inputs(other):
            raise BasisMismatchError("Function sites at the same inputs add; these are at others. Add their terms.")
        weights = self.weights + other.weights
        share = (other.weights / weights).view(-1, *(1,) * (self.labels.ndim - 1))
        return FunctionSite(self.x, torch.lerp(self.labels, other.labels, share), weights, self.likelihood)

    def same_inputs(self, other: FunctionSite) -> bool:
        """Return whether both are of one kind of labels at the same inputs, in the same order."""
        alike = self.labels.shape == other.labels.shape and type(self.likelihood) is type(other.likelihood)
        return alike and torch.equal(self.x, other.x)
