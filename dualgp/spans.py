"""The directions of weight space that the coordinates of a network's basis span: all of them, or what Z sees."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from dualgp.errors import InputError
from dualgp.kernels import JacobianBlock, NetworkJacobian
from dualgp.linalg import GramSum, eigenpairs_above, row_chunks, symmetrise, tri_inverse, whiten


@dataclass(frozen=True, eq=False)
class Span:
    """The directions of weight space that w spans, whatever the scale of the prior.

    φ = J Φ for orthonormal Φ [P, r], or φ = κ(x, Z) W with W = VΛ^{-1/2} ([MC, r], or [C, M, r] output by output; L⁻ᵀ
    where no direction is cut), or φ = J where both are None.
    """

    jacobian: NetworkJacobian
    rank_tol: float = 0.0
    Z: Tensor | None = None
    at_Z: JacobianBlock | None = None
    W: Tensor | None = None
    Phi: Tensor | None = None
    origin: object = field(default_factory=object)  # shared by the spans that were grown from one

    def phi(self, rows: JacobianBlock) -> Tensor:
        """φ of rows, [n, C, r], or [C, n, r] output by output."""
        if self.Phi is not None:
            return rows.matmul(self.Phi)
        if self.W is None or self.at_Z is None:
            return rows.dense()
        if self.W.ndim == 3:
            return rows.gram_independent(self.at_Z) @ self.W
        K = rows.gram(self.at_Z).flatten(2)
        return whiten(K.flatten(0, 1), self.W.mT).view(K.shape) if self._triangular else K @ self.W

    @cached_property
    def _triangular(self) -> bool:
        return self.W is not None and self.W.shape[-1] == self.W.shape[-2] and torch.equal(self.W, self.W.triu())

    def seen(self, directions: Tensor) -> Tensor:
        """Φᵀv in float64: what w sees of directions v [P, k]; [r, k], or [C, r, k] output by output."""
        if self.Phi is not None:
            return self.Phi.double().mT @ directions.double()
        if self.W is None or self.at_Z is None:
            return directions.double()
        at_Z = self.at_Z.matmul(directions).double()  # J_Z v [M, C, k]
        return self.W.double().mT @ (at_Z.movedim(1, 0) if self.W.ndim == 3 else at_Z.flatten(0, 1))

    def first(self, size: int) -> Span:
        """Return the span of the first coordinates: this one before it grew."""
        W, Phi = (None if t is None else t[..., :size] for t in (self.W, self.Phi))
        return replace(self, W=W, Phi=Phi)

    def grown(self, x: Tensor) -> Span:
        """Return the span with what the outputs at x see besides: its first r coordinates are the present ones.

        Of the residual kernel r(x, z) = κ(x, z) − φφᵀ, in the same way: W' = [[W, −W φ(x)ᵀW_r], [0, W_r]].
        """
        new = self.jacobian.block(x)
        Z = x if self.Z is None else torch.cat([self.Z, x.to(self.Z)])
        phi = self.phi(new).double()
        if self.Phi is not None:
            J, Phi = new.dense().double(), self.Phi.double()
            rest = (J - phi @ Phi.mT).flatten(0, 1)
            beside = rest.mT @ self._root(rest @ rest.mT, J.square().sum(-1).max())
            return replace(self, Z=Z, Phi=torch.cat([Phi, beside], -1).to(self.Phi.dtype))
        assert self.W is not None
        if self.W.ndim == 3:
            K = new.gram_independent(new).double()
        else:
            K, phi = new.gram(new).flatten(2).flatten(0, 1).double(), phi.flatten(0, 1)
        W, beside = self.W.double(), self._root(K - phi @ phi.mT, K.diagonal(dim1=-2, dim2=-1).max())
        top = torch.cat([W, -W @ phi.mT @ beside], -1)
        below = torch.cat([W.new_zeros(*beside.shape[:-1], W.shape[-1]), beside], -1)
        return replace(self, Z=Z, at_Z=self.jacobian.kept(Z), W=torch.cat([top, below], -2).to(self.W.dtype))

    def _root(self, residual: Tensor, largest: Tensor) -> Tensor:
        """VΛ^{-1/2} of the eigenvalues of a residual that are no rounding of the kernel it is left of."""
        values, vectors = eigenpairs_above(residual, self.rank_tol, largest)
        return vectors * values.rsqrt().unsqueeze(-2)


def coupled_span(jacobian: NetworkJacobian, Z: Tensor, tol: float) -> Span:
    """The row space of J_Z: by J_Z J_Zᵀ [MC, MC], or by J_ZᵀJ_Z [P, P] where that is smaller."""
    P = jacobian.num_params
    if len(Z) * jacobian.num_outputs < P:
        at_Z = jacobian.kept(Z)
        return Span(jacobian, tol, Z, at_Z, W=_inverse_root(at_Z.gram(at_Z).flatten(2).flatten(0, 1), tol))
    total = GramSum(torch.Size(), P, jacobian.device)
    for outer in row_chunks(len(Z), jacobian.num_outputs * P, jacobian.dtype, jacobian.device):
        for _, rows in jacobian.blocks(Z[outer]):
            J = rows.dense().flatten(0, 1).double()
            total.add(J, torch.ones_like(J[:, 0]))
    _, Phi = eigenpairs_above(_checked(total.total()), tol)
    return Span(jacobian, tol, Z, Phi=None if Phi.shape[-1] == P else Phi.to(jacobian.dtype))


def independent_span(jacobian: NetworkJacobian, Z: Tensor, tol: float) -> Span:
    """The row space of J_Z output by output, by C matrices [M, M]; an output of lower rank has zeros in W."""
    at_Z = jacobian.kept(Z)
    return Span(jacobian, tol, Z, at_Z, W=_inverse_root(at_Z.gram_independent(at_Z), tol))


def _inverse_root(K: Tensor, tol: float) -> Tensor:
    """W = VΛ^{-1/2} of K = VΛVᵀ above the tolerance, found in float64; L⁻ᵀ of K = LLᵀ where all of it is above."""
    exact = symmetrise(_checked(K.double()))
    L, info = torch.linalg.cholesky_ex(exact)
    pivots, diagonal = L.diagonal(dim1=-2, dim2=-1).square(), exact.diagonal(dim1=-2, dim2=-1)
    if not info.any() and bool((pivots.amin(-1) > tol * diagonal.amax(-1)).all()):  # else one eigenvalue is below
        values = torch.linalg.eigvalsh(exact)
        if bool((values[..., 0] > tol * values[..., -1]).all()):
            return tri_inverse(L).mT.to(K.dtype)
    values, vectors = eigenpairs_above(exact, tol)
    return (vectors * values.rsqrt().unsqueeze(-2)).to(K.dtype)


def _checked(K: Tensor) -> Tensor:
    if not bool((K.diagonal(dim1=-2, dim2=-1).amax(-1) > 0).all()):
        raise InputError("The network does not depend on its parameters at Z: its Jacobian there is zero.")
    return K
