"""The Jacobian basis: a trained network, linear in its weights around them, in whitened coordinates."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import pad

from dualgp.basis import Basis, Features
from dualgp.checks import check_tensor
from dualgp.errors import BasisMismatchError, InputError
from dualgp.kernels import JacobianBlock, NetworkJacobian
from dualgp.linalg import first_tensor, row_chunks
from dualgp.sites import Site
from dualgp.spans import Span, coupled_span, independent_span, least_tol

Precision: TypeAlias = float | int | Tensor
Outputs: TypeAlias = Literal["coupled", "independent"]


class JacobianBasis(Basis):
    """f(x) = f(x; θ*) + φ(x)w + r(x): the network linearised at θ*, with prior θ ~ N(θ*, τ⁻¹I) and so w ~ N(0, I).

    Made by `of_weights` (w are all the weights, nothing left out) or by `at_inputs` (w spans what a sample Z of inputs
    sees, the rest keeps its prior). The C outputs share w, so data couple them; or each is a process of its own.
    Not differentiable in x. With `zero_mean` the weights that w does not span have their prior mean at 0, not at θ*,
    and μ(x) = f(x; θ*) − u(x), u(x) = J(x)θ* − φ(x)Φᵀ√τθ*; the pull on w itself is a site, (−Φᵀ√τθ*, 0).

    Source: Khan et al. 2019 (DNN2GP); Immer et al. 2021 (GLM predictive); Scannell et al. 2024 (SFR), with full blocks.

    Example:
        >>> from dualgp.kernels import NetworkJacobian
        >>> from dualgp.posterior import Posterior
        >>> jacobian = NetworkJacobian(torch.nn.Linear(1, 1, bias=False), torch.zeros(2, 1))
        >>> q = Posterior(JacobianBasis.of_weights(jacobian, prior_precision=4.0))
        >>> q.predict(torch.tensor([[3.0]]))[1]  # x²/τ
        tensor([[2.2500]])
    """

    num_outputs: int

    def __init__(
        self,
        jacobian: NetworkJacobian,
        prior_precision: Precision,
        span: Span,
        *,
        coupled: bool = True,
        zero_mean: bool = False,
    ) -> None:
        self.jacobian = jacobian
        self._tau = _per_tensor(jacobian, prior_precision)
        if not isinstance(prior_precision, float | int):  # of a caller who may write to it
            device = first_tensor(prior_precision).device
            prior_precision = torch.as_tensor(prior_precision, device=device).detach().clone()
        self.prior_precision = prior_precision
        self._span = span
        self._sd = float(self._tau[0].rsqrt())
        self.coupled = coupled
        self.num_outputs = jacobian.num_outputs
        self.batch_shape = torch.Size([] if coupled else [self.num_outputs])
        self.has_residual = span.matrix is not None
        self.zero_mean = zero_mean
        self._theta: tuple[Tensor, Tensor] | None = None
        if zero_mean and self.has_residual:  # √τθ*, and what w sees of it
            theta = self.whitened_theta
            self._theta = theta.unsqueeze(-1), self.coordinates(theta).unsqueeze(-1)

    @classmethod
    def of_weights(cls, jacobian: NetworkJacobian, prior_precision: Precision) -> JacobianBasis:
        """Return the basis of all P weights: w = √τ(θ − θ*), φ = J/√τ, no residual. Takes P² numbers.

        Args:
            jacobian: of the trained network, `dualgp.kernels.NetworkJacobian`.
            prior_precision: τ > 0, of the prior on the weights beside a loss that is summed over data; or a tensor
                with one value for each parameter tensor.

        Raises:
            InputError: if a prior precision is not positive and finite.
        """
        return cls(jacobian, prior_precision, Span(_relative(jacobian, prior_precision)))

    @classmethod
    @torch.no_grad()
    def at_inputs(
        cls,
        jacobian: NetworkJacobian,
        Z: Tensor,
        prior_precision: Precision,
        *,
        outputs: Outputs = "coupled",
        rank_tol: float = 1e-11,
    ) -> JacobianBasis:
        """Return the basis of what the network's outputs at Z see of the weights: K_zz = κ(Z, Z) = VΛVᵀ.

            φ(x) = κ(x, Z)VΛ^{-1/2},   r(x) of covariance κ(x, x) − φφᵀ,   κ(x, z) = J(x)J(z)ᵀ/τ

        Directions whose eigenvalue is not above `rank_tol` of the largest are left to the residual, where they keep
        their prior variance; no jitter. Inputs of Z that repeat what others say only lower the rank. Where Z sees all
        of weight space, this is `of_weights`.

        Args:
            jacobian: of the trained network.
            Z: inputs, [M, *input_shape].
            prior_precision: as in `of_weights`.
            outputs: "coupled", or "independent" to ignore the prior covariance between outputs (C M × M matrices in
                place of one that is CM × CM): the sites must then be independent too.
            rank_tol: relative, at least 1.5e-12 for a network in float32. Where directions of such a network are kept
                below 1.2e-6, products of its Jacobians are taken in float64.

        Raises:
            InputError: if Z has the wrong shape or holds nothing, or if a prior precision is not positive.

        Source: notes on SFR, § 1.5: V = J[(I − ΦΦᵀ)/τ + Φ(ΦᵀGΦ + τI)⁻¹Φᵀ]Jᵀ, Φ an orthonormal basis of rowspace(J_Z).
        """
        if outputs not in ("coupled", "independent"):
            raise InputError(f"outputs must be 'coupled' or 'independent', got {outputs!r}.")
        relative = _relative(jacobian, prior_precision)
        if not _check_inputs(jacobian, Z):
            raise InputError("Z must hold at least one input.")
        tol = max(rank_tol, least_tol(jacobian.dtype))
        span = (coupled_span if outputs == "coupled" else independent_span)(relative, Z.detach().clone(), tol)
        return cls(jacobian, prior_precision, span, coupled=outputs == "coupled")

    @property
    def inducing_inputs(self) -> Tensor | None:
        """Z, or None for the basis of all weights."""
        return self._span.Z

    @property
    def size(self) -> int:
        """The number of coordinates: P, or the rank r."""
        return self.jacobian.num_params if self._span.matrix is None else self._span.matrix.shape[-1]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the network."""
        return self.jacobian.dtype

    @property
    def device(self) -> torch.device:
        """Where the network lives."""
        return self.jacobian.device

    def check_inputs(self, x: Tensor) -> int:
        """Return how many data x [T, *input_shape] holds; the network's Jacobian brings them to its dtype and device.

        Raises:
            InputError: if x has the wrong shape.
        """
        return _check_inputs(self.jacobian, x)

    @torch.no_grad()
    def features(self, x: Tensor) -> Features:
        """Return φ(x), prior (co)variances and f(x; θ*) for all of x at once."""
        if not len(x):
            return self._no_features()
        return self._features(self._span.block(x))

    @torch.no_grad()
    def blocks(self, x: Tensor) -> Iterator[tuple[slice, Features]]:
        """Yield (data, features) of blocks of x of bounded memory."""
        for outer in row_chunks(len(x), self._row_width(), self.dtype, self.device):
            for rows, block in self._span.blocks(x[outer]):
                yield slice(outer.start + rows.start, outer.start + rows.stop), self._features(block)

    @torch.no_grad()
    def residual_covariance(self, x: Tensor, phi: Tensor) -> Tensor:
        """Return κ(x, x) − φφᵀ between all rows of the features in float64; 0 for the basis of all weights."""
        if not self.has_residual:
            return phi.new_zeros(())
        if not len(x):
            return phi @ phi.mT
        rows = self._span.block(x)
        K = rows.gram(rows).flatten(2).flatten(0, 1) if self.coupled else rows.gram_independent(rows)
        return self._sd**2 * K.double() - phi @ phi.mT

    def with_prior_precision(self, prior_precision: Precision) -> JacobianBasis:
        """Return the basis of the same network and Z under another prior; free if all of τ changes by one factor.

        Raises:
            InputError: if a prior precision is not positive and finite.
        """
        change = _per_tensor(self.jacobian, prior_precision) / self._tau
        if bool((change - change[0]).abs().max() <= 1e-14 * change[0]):
            return self._like(self._span, prior_precision)
        Z, tol = self._span.Z, self._span.rank_tol
        if Z is None or not self.has_residual:
            span = replace(self._span, jacobian=_relative(self.jacobian, prior_precision))
            return self._like(span, prior_precision)
        outputs: Outputs = "coupled" if self.coupled else "independent"
        new = JacobianBasis.at_inputs(self.jacobian, Z, prior_precision, outputs=outputs, rank_tol=tol)
        return new.with_zero_mean(self.zero_mean)

    def with_zero_mean(self, zero_mean: bool) -> JacobianBasis:
        """Return the basis in the same coordinates, the weights that they do not span with prior mean 0, or θ*."""
        same = zero_mean == self.zero_mean
        return self if same else self._like(self._span, self.prior_precision, zero_mean)

    @torch.no_grad()
    def grown(self, x: Tensor) -> JacobianBasis:
        """Return the basis that sees what the outputs at x see as well; this one where w are all the weights.

        The present coordinates come first in it, so that nothing is lost: `carry` fills sites of data up with zeros.
        (Of the pull of a prior with mean 0, a posterior on the new basis needs the new coordinates: Φᵀ√τθ* anew.)
        """
        if not self.has_residual:
            return self
        return self._like(self._span.grown(x), self.prior_precision)

    def first(self, size: int) -> JacobianBasis:
        """Return the basis of the first coordinates only: a grown one as it was before."""
        return self._like(self._span.first(size), self.prior_precision)

    def _like(self, span: Span, prior_precision: Precision, zero_mean: bool | None = None) -> JacobianBasis:
        zero_mean = self.zero_mean if zero_mean is None else zero_mean
        return JacobianBasis(self.jacobian, prior_precision, span, coupled=self.coupled, zero_mean=zero_mean)

    def carry(self, site: Site, new: Basis) -> Site:
        """Return a site on this basis as one under another prior precision τ', w = √(τ/τ') w', or on a grown basis.

        Raises:
            BasisMismatchError: unless `new` is this basis `with_prior_precision` or `grown`, with its directions.
        """
        if not isinstance(new, JacobianBasis) or new.jacobian is not self.jacobian:
            raise BasisMismatchError("The site is on another network; project the data anew.")
        if self.has_residual and self.zero_mean != new.zero_mean:
            raise BasisMismatchError("The two bases differ in zero_mean, and so in prior mean; project the data anew.")
        more = new.size - self.size
        if more >= 0 and self._span.origin is new._span.origin and torch.equal(self._tau, new._tau):
            return Site(pad(site.lam, (0, more)), pad(site.B, (0, more, 0, more)))
        if more:
            raise BasisMismatchError("The site is on other inputs; project the data anew.")
        factor = (self._tau / new._tau).sqrt()  # w = √(τ/τ') w'
        if self._span is new._span:
            factor = factor[:1]
        elif self.has_residual or new.has_residual:
            raise BasisMismatchError(
                "The two bases span other directions of weight space. One factor for all of prior_precision keeps "
                "them, by basis.with_prior_precision(...); for any other change, project the data anew."
            )
        else:
            factor = self.jacobian.by_weight(factor)
        factor = factor.to(site.lam.device)
        return Site(factor * site.lam, factor.unsqueeze(-1) * site.B * factor)

    def span_state(self) -> tuple[dict[str, Tensor], float]:
        """Return what w spans, as the tensors that are there of Z, W and Phi, and the tolerance of the rank."""
        held = {name: getattr(self._span, name) for name in ("Z", "W", "Phi")}
        return {name: value for name, value in held.items() if value is not None}, self._span.rank_tol

    @classmethod
    def from_span_state(
        cls, jacobian: NetworkJacobian, prior_precision: Precision, state: dict[str, Tensor], tol: float, coupled: bool
    ) -> JacobianBasis:
        """Return the basis that `span_state` was taken of, given the same network and prior precision.

        Raises:
            InputError: if the tensors do not fit the network or each other.
        """
        relative, C, P = _relative(jacobian, prior_precision), jacobian.num_outputs, jacobian.num_params
        held = {name: value.to(jacobian.device) for name, value in state.items()}
        W, Phi, Z = held.get("W"), held.get("Phi"), held.get("Z")
        if W is not None and (Z is None or W.shape[:-1] != ((len(Z) * C,) if coupled else (C, len(Z)))):
            raise InputError(f"W of shape {tuple(W.shape)} does not fit its inputs.")
        if (Phi is not None and (Phi.ndim != 2 or len(Phi) != P)) or (W is not None and Phi is not None):
            raise InputError("Phi does not fit the network.")
        span = Span(relative, tol, Z, None, W, Phi)
        return cls(jacobian, prior_precision, span.held() if W is not None else span, coupled=coupled)

    @property
    def whitened_theta(self) -> Tensor:
        """√τ θ*, [P] in float64: where the network stands in units of a prior N(0, τ⁻¹I)."""
        return self.jacobian.theta.double() * self._each_parameter().sqrt()

    def whiten(self, gradient: Tensor) -> Tensor:
        """Return a gradient [P] in the weights as one in the whitened weights √τ(θ − θ*), in float64."""
        return gradient.double() / self._each_parameter().sqrt()

    def _each_parameter(self) -> Tensor:
        """τ of each parameter, [P] in float64."""
        return self.jacobian.by_weight(self._tau).to(self.device)

    @torch.no_grad()
    def coordinates(self, direction: Tensor) -> Tensor:
        """Return Φᵀv: what w sees of a direction v [P] of the whitened weights √τ(θ − θ*); [r], or [C, r] by output.

        A factor exp(vᵀ√τ(θ − θ*)) is the linear site (Φᵀv, 0) on w, but for the directions left to the residual.
        """
        return self._span.seen(direction)

    def _row_width(self) -> int:
        """Numbers that a datum takes on its way to its features."""
        C, at_Z = self.num_outputs, self._span.at_Z
        if at_Z is None:
            return C * self.jacobian.num_params
        return C * len(at_Z) * (C if self.coupled else 1)

    def _no_features(self) -> Features:
        """Of no inputs."""
        C, shape = self.num_outputs, (*self.batch_shape, 0)
        phi = torch.zeros(*shape, self.size, dtype=self.dtype, device=self.device)
        none = phi.new_zeros(shape, dtype=torch.float64)
        return Features(phi, none, none, none.reshape(0, C, C) if self.coupled and self.has_residual else None)

    def _features(self, rows: JacobianBlock) -> Features:
        phi = self._span.phi(rows) * self._sd
        f = rows.f.double()
        if self._theta is not None:
            theta, seen = self._theta
            inside = (phi @ seen.to(phi.dtype)).squeeze(-1)
            outside = self._sd * rows.matmul(theta).squeeze(-1) - (inside if self.coupled else inside.mT)
            f = f - outside.double()  # u(x)
        if not self.has_residual:
            phi = phi.flatten(0, 1)
            return Features(phi, phi.square().sum(-1).double(), f.flatten())
        prior = self._sd**2 * rows.diag().double()
        var = prior.diagonal(dim1=-2, dim2=-1)
        if self.coupled:
            return Features(phi.flatten(0, 1), var.flatten(), f.flatten(), prior)
        return Features(phi, var.mT, f.mT)


def _check_inputs(jacobian: NetworkJacobian, x: Tensor) -> int:
    shape = tuple(jacobian.input_shape)
    check_tensor("Inputs", x)
    if x.ndim != len(shape) + 1 or tuple(x.shape[1:]) != shape:
        raise InputError(f"Inputs must have shape {('T', *shape)}, got {tuple(x.shape)}.")
    return len(x)


def _per_tensor(jacobian: NetworkJacobian, prior_precision: Precision) -> Tensor:
    """The prior precision of each parameter tensor, in float64."""
    try:
        tau = torch.as_tensor(prior_precision, dtype=torch.float64, device="cpu").detach().clone()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"prior_precision must be a positive number, got {prior_precision!r}.") from error
    count = len(jacobian.shapes)
    if tau.ndim and tau.shape != (count,):
        raise InputError(
            f"prior_precision must be a number, or hold one for each of the {count} parameter tensors, got shape "
            f"{tuple(tau.shape)}."
        )
    if not bool(((tau > 0) & tau.isfinite()).all()):
        raise InputError(f"prior_precision must be positive and finite, got {tau.tolist()}.")
    return tau.expand(count)


def _relative(jacobian: NetworkJacobian, prior_precision: Precision) -> NetworkJacobian:
    """J in units of the prior, but for the one factor 1/√τ₀ of all parameters: J diag(√(τ₀/τ))."""
    tau = _per_tensor(jacobian, prior_precision)
    return jacobian if bool((tau == tau[0]).all()) else jacobian.scaled((tau[0] / tau).sqrt())
