"""The directions of weight space that the coordinates of a network's basis span: all of them, or what Z sees."""

from __future__ import annotations

from collections.abc import Iterator
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
    where no direction is cut), or φ = J where both are None. W or Φ is in float64 where it has directions that products
    of J in the network's dtype would not tell from rounding; products are then in float64 too, and the error of φ is
    that of J.
    """

    jacobian: NetworkJacobian
    rank_tol: float = 0.0
    Z: Tensor | None = None
    at_Z: JacobianBlock | None = None
    W: Tensor | None = None
    Phi: Tensor | None = None
    origin: object = field(default_factory=object)  # shared by the spans that were grown from one

    def block(self, x: Tensor) -> JacobianBlock:
        """J of all rows of x, as products with it are taken."""
        return self._as_taken(self.jacobian.block(x))

    def blocks(self, x: Tensor) -> Iterator[tuple[slice, JacobianBlock]]:
        """The same by rows, as many at a time as the budget holds."""
        for rows, block in self.jacobian.blocks(x):
            yield rows, self._as_taken(block)

    @property
    def matrix(self) -> Tensor | None:
        """W, or Φ, or None for all weights."""
        return self.W if self.Phi is None else self.Phi

    def _as_taken(self, rows: JacobianBlock) -> JacobianBlock:
        return rows if self.matrix is None or self.matrix.dtype == rows.f.dtype else rows.double()

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

    def seen(self, direction: Tensor) -> Tensor:
        """Φᵀv in float64: what w sees of a direction v [P]; [r], or [C, r] output by output."""
        v = direction.double()
        if self.Phi is not None:
            return self.Phi.double().mT @ v
        if self.W is None or self.at_Z is None:
            return v
        at_Z = self.at_Z.matmul(v.unsqueeze(-1)).double()  # J_Z v [M, C, 1]
        return (self.W.double().mT @ (at_Z.movedim(1, 0) if self.W.ndim == 3 else at_Z.flatten(0, 1))).squeeze(-1)

    def first(self, size: int) -> Span:
        """Return the span of the first coordinates: this one before it grew."""
        W, Phi = (None if t is None else t[..., :size] for t in (self.W, self.Phi))
        return replace(self, W=W, Phi=Phi)

    def grown(self, x: Tensor) -> Span:
        """Return the span with what the outputs at x see besides: its first r coordinates are the present ones.

        Of the residual kernel r(x, z) = κ(x, z) − φφᵀ, in the same way: W' = [[W, −W φ(x)ᵀW_r], [0, W_r]].
        """
        assert self.Z is not None
        new, Z = self.block(x), torch.cat([self.Z, x.to(self.Z)])
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
        return replace(self, Z=Z, W=torch.cat([top, below], -2).to(self.W.dtype)).held()

    def held(self) -> Span:
        """Return the span with J at Z, which W acts on."""
        assert self.Z is not None
        return replace(self, at_Z=self.jacobian.kept(self.Z)).widened()

    def widened(self) -> Span:
        """Return the span with J at Z as products with it are taken, unless that is more than the budget.

        Then it is brought to float64 layer by layer, at each product.
        """
        assert self.at_Z is not None
        return replace(self, at_Z=self._as_taken(self.at_Z)) if 2 * self.at_Z.nbytes <= self.jacobian.budget else self

    def _root(self, residual: Tensor, largest: Tensor) -> Tensor:
        """VΛ^{-1/2} of the eigenvalues of a residual that are no rounding of the kernel it is left of."""
        assert self.matrix is not None
        values, vectors = eigenpairs_above(residual, max(self.rank_tol, ten_roundings(self.matrix.dtype)), largest)
        return vectors * values.rsqrt().unsqueeze(-2)


def ten_roundings(dtype: torch.dtype) -> float:
    """The least eigenvalue, relative to the largest, that products in this dtype tell from their rounding."""
    return 10 * torch.finfo(dtype).eps


def least_tol(dtype: torch.dtype) -> float:
    """The same of products in float64 of Jacobians in this dtype, whose singular values are good to ten roundings."""
    return max(ten_roundings(torch.float64), ten_roundings(dtype) ** 2)


def coupled_span(jacobian: NetworkJacobian, Z: Tensor, tol: float) -> Span:
    """The row space of J_Z: by J_Z J_Zᵀ [MC, MC], or by J_ZᵀJ_Z [P, P] where that is smaller."""
    P = jacobian.num_params
    if len(Z) * jacobian.num_outputs < P:
        return _function_span(jacobian, Z, tol, independent=False)
    total = GramSum(torch.Size(), P, jacobian.device)
    for outer in row_chunks(len(Z), jacobian.num_outputs * P, jacobian.dtype, jacobian.device):
        for _, rows in jacobian.blocks(Z[outer]):
            J = rows.dense().flatten(0, 1).double()
            total.add(J, torch.ones_like(J[:, 0]))
    values, Phi = eigenpairs_above(_checked(total.total()), tol)
    if Phi.shape[-1] == P:
        return Span(jacobian, tol, Z)
    told = bool(values.min() > ten_roundings(jacobian.dtype) * values.max())
    return Span(jacobian, tol, Z, Phi=Phi.to(jacobian.dtype) if told else Phi)


def independent_span(jacobian: NetworkJacobian, Z: Tensor, tol: float) -> Span:
    """The row space of J_Z output by output, by C matrices [M, M]; an output of lower rank has zeros in W."""
    return _function_span(jacobian, Z, tol, independent=True)


def _function_span(jacobian: NetworkJacobian, Z: Tensor, tol: float, independent: bool) -> Span:
    """By products in the network's dtype if they tell all directions that are above the tolerance, else in float64."""
    at_Z, dtype = jacobian.kept(Z), jacobian.dtype
    K, coarse = _checked(_gram(at_Z, at_Z, independent)).double(), max(tol, ten_roundings(dtype))
    W = _cholesky_root(K, coarse)
    if W is None and coarse > tol:
        dtype, step = torch.float64, max(1, jacobian.budget * len(at_Z) // (2 * at_Z.nbytes))
        some = (at_Z[start : start + step].double() for start in range(0, len(at_Z), step))
        K = torch.cat([_gram(rows, at_Z, independent) for rows in some], -2)
        W = _cholesky_root(K, tol)
    if W is None:
        values, vectors = eigenpairs_above(K, tol)
        W = vectors * values.rsqrt().unsqueeze(-2)
    return Span(jacobian, tol, Z, at_Z, W=W.to(dtype)).widened()


def _gram(rows: JacobianBlock, at_Z: JacobianBlock, independent: bool) -> Tensor:
    return rows.gram_independent(at_Z) if independent else rows.gram(at_Z).flatten(2).flatten(0, 1)


def _cholesky_root(K: Tensor, tol: float) -> Tensor | None:
    """L⁻ᵀ of K = LLᵀ [*b, n, n] in float64, or None if an eigenvalue is not above the tolerance."""
    K = symmetrise(K)
    L, info = torch.linalg.cholesky_ex(K)
    pivots, diagonal = L.diagonal(dim1=-2, dim2=-1).square(), K.diagonal(dim1=-2, dim2=-1)
    if info.any() or not bool((pivots.amin(-1) > tol * diagonal.amax(-1)).all()):  # then one eigenvalue is below
        return None
    values = torch.linalg.eigvalsh(K)
    return tri_inverse(L).mT if bool((values[..., 0] > tol * values[..., -1]).all()) else None


def _checked(K: Tensor) -> Tensor:
    if not bool((K.diagonal(dim1=-2, dim2=-1).amax(-1) > 0).all()):
        raise InputError("The network does not depend on its parameters at Z: its Jacobian there is zero.")
    return K
