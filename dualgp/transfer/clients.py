"""The client's side of federated learning: what it is given in a round, and its answer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dualgp.checks import check_tensor
from dualgp.errors import BasisMismatchError, InputError
from dualgp.sites import WeightSite, apply_precision
from dualgp.transfer.functions import FunctionSite
from dualgp.transfer.merging import loss_gradient, natural_parameters
from dualgp.transfer.terms import Term, flat_weights, quadratic
from dualgp.weights import WeightPosterior, check_layouts


@dataclass(frozen=True, eq=False)
class Reply:
    """A client's answer: its new site, of which round.

    Attributes:
        client: its name.
        round: the round of the task that it answers.
        site: the site of its own data, not damped.
        functions: what stands for a part of its loss besides, or None.
    """

    client: str
    round: int
    site: WeightSite
    functions: FunctionSite | None = None


@dataclass(frozen=True, eq=False)
class ClientTask:
    """What a client is given: the cavity q / t_k, a prior that knows of all data but its own.

    Attributes:
        client: its name.
        round: the round that its reply belongs to.
        cavity: N(m, S⁻¹) of the others and the prior; with a penalty, q / t_k^{1/penalty}.
        method: of the server.
        penalty: 1, or ADMM's: the client's loss counts 1/penalty times in its fit.
        others: the other clients' sites of functions.
    """

    client: str
    round: int
    cavity: WeightPosterior
    method: str
    penalty: float = 1.0
    others: tuple[FunctionSite, ...] = ()

    def term(self) -> Term:
        """Return ½(θ − m)ᵀS(θ − m), and others' functions: minimise it with 1/penalty times the client's sum loss."""
        return with_functions(quadratic(self.cavity), self.others)

    def reply(self, mean: Float[Tensor, "P"], curvature: Tensor | None = None) -> Reply:
        """Return the answer of a maximum a posteriori fit: λ = Bw_k − ∇ℓ_k(w_k), with ∇ℓ_k = −penalty · S(w_k − m).

        Args:
            mean: w_k, the minimiser of the client's loss plus `term`.
            curvature: B, of the client's loss there, [P] or [P, P]; not for "fedlap".

        Raises:
            InputError: if a curvature is given to "fedlap", missing otherwise, a value is not finite, or other clients
                have sites of functions (see `reply_functions`).
            BasisMismatchError: if there are not as many weights.
        """
        if self.others:
            raise InputError("Other clients have sites of functions, whose gradients need a network: reply_functions.")
        return self._checked(self._expanded(mean, curvature))

    def reply_functions(
        self, network: nn.Module, functions: FunctionSite | None, curvature: Tensor | None = None
    ) -> Reply:
        """Return the answer of a maximum a posteriori fit whose loss is in part what the network says at some inputs.

        With F_k = −log of `functions`, the rest of the loss is expanded: λ = Bw_k − ∇(ℓ_k − F_k)(w_k).

        Args:
            network: with the weights w_k, the minimiser of the client's loss plus `term`; not touched.
            functions: F_k, such as `FunctionSite.of(network, inputs, likelihood)`; None for none.
            curvature: B, of the data that are *not* among the inputs, [P] or [P, P]: all would count these twice.

        Raises:
            InputError: as `reply`; if the network has not these weights, or the method is "bayes-admm".
        """
        if self.method == "bayes-admm":
            raise InputError('"bayes-admm" has no sites of functions: use "fedlap" or "fedlap-cov".')
        with torch.no_grad():
            mean = flat_weights(network, self.cavity.layout).clone()
        site, layout = self._expanded(mean, curvature), self.cavity.layout
        given = (*self.others, *(() if functions is None else (functions,)))
        if given:  # −∇ℓ_k = S(w_k − m) + Σ_{j≠k} ∇F_j
            gradient = loss_gradient(network, layout, mean, with_functions(given[0].term(), given[1:]))
            site = WeightSite(site.lam + gradient, site.B)
        return replace(self._checked(site), functions=functions)

    def _expanded(self, mean: Float[Tensor, "P"], curvature: Tensor | None) -> WeightSite:
        if (curvature is None) != (self.method == "fedlap"):
            what = "no curvature: its sites are linear" if self.method == "fedlap" else "the curvature of the loss"
            raise InputError(f'A reply of "{self.method}" has {what}; use network_curvature or leave it out.')
        for name, value in (("mean", mean), ("curvature", mean if curvature is None else curvature)):
            check_tensor(name, value)
            if not value.is_floating_point():
                raise InputError(f"{name} must be floating point, got {value.dtype}.")
        P = self.cavity.layout.size
        B = torch.zeros_like(mean) if curvature is None else curvature
        if mean.shape != (P,) or B.shape not in ((P,), (P, P)):
            raise BasisMismatchError(
                f"The model has {P} weights; client {self.client!r} has a mean of {tuple(mean.shape)} and a curvature "
                f"of {tuple(B.shape)}."
            )
        gradient = -self.penalty * apply_precision(self.cavity.precision, mean - self.cavity.mean)  # ∇ℓ_k(w_k)
        return WeightSite(apply_precision(B, mean) - gradient, B)

    def reply_posterior(self, q: WeightPosterior) -> Reply:
        """Return the answer of a variational fit with the cavity as its prior: the site q_k / cavity.

        Args:
            q: minimises E_q[ℓ_k]/penalty + KL(q ‖ cavity), for instance the posterior of an IVON run.

        Raises:
            InputError: if the method has no posteriors, or a value is not finite.
            BasisMismatchError: if q is over other weights.
        """
        if self.method == "fedlap":
            raise InputError('A reply of "fedlap" is a mean: use reply(mean), or another method.')
        if not isinstance(q, WeightPosterior):
            raise BasisMismatchError(f"The server's sites are diagonal or dense, not those of a {type(q).__name__}.")
        check_layouts([self.cavity, q])
        return self._checked((natural_parameters(q) - natural_parameters(self.cavity)) * self.penalty)

    def _checked(self, site: WeightSite) -> Reply:
        if not bool(site.lam.isfinite().all() and site.B.isfinite().all()):
            raise InputError(f"The site of client {self.client!r} is not finite: its fit has diverged.")
        return Reply(self.client, self.round, site)


def with_functions(term: Term, functions: Iterable[FunctionSite]) -> Term:
    """Return the sum of a term and those of sites of functions."""
    for site in functions:
        term = term + site.term()
    return term
