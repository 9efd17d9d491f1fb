"""The Jacobian of n rows with respect to the parameters of one layer, kept in factors.

A layer that maps features to features at S positions has J[c, (o, i)] = Σ_s g_s[c, o] a_s[i], with inputs a [n, S, I]
and output derivatives g = ∂f/∂z [n, C, S, O], so that κ(x, z) = Σ_{s,t} (a_s·a'_t)(g_s·g'_t): the products that a
contraction of explicit Jacobians needs are C O I per pair of rows, those of the factors S² (I + C O) and fewer where
S = 1. Each method takes the cheaper way, a tile of rows at a time.

Source: Novak, Sohl-Dickstein, Schoenholz 2022 (fast finite-width neural tangent kernels).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import reduce
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dualgp.kernels.contractions import (
    SCRATCH_BYTES,
    add_gram_explicit,
    add_gram_pairs,
    add_independent_explicit,
    add_independent_pairs,
    explicit_tiles,
    is_one_row,
    quad_pairs,
    tiles,
)


@dataclass(frozen=True, eq=False)
class FactoredLayer:
    """J[c, (o, i)] = Σ_s g_s[c, o] a_s[i]: dense layers and convolutions over unfolded patches.

    With a bias (`bias=True`) the last column of `a` belongs to it; the flat order is the weight [O, I], then the bias
    [O]. A Kronecker factorisation takes its two factors from `a` and `g`.
    """

    tensors: tuple[int, ...]  # positions of its parameters among those of the Jacobian
    a: Float[Tensor, "n S I"]
    g: Float[Tensor, "n C S O"]
    bias: bool

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """What it keeps of each row, in floating point."""
        return (self.a, self.g[:1] if is_one_row(self.g) else self.g)

    @property
    def size(self) -> int:
        """The number p of its parameters."""
        return self.a.shape[-1] * self.g.shape[-1]

    def __getitem__(self, rows: slice) -> FactoredLayer:
        return replace(self, a=self.a[rows], g=self.g[rows])

    def compact(self) -> FactoredLayer | ExplicitLayer:
        """Return the layer in the form that takes less memory: J itself, where positions are many and weights few."""
        (_, S, n_in), (_, C, _, n_out) = self.a.shape, self.g.shape
        if S < C or C * n_in * n_out >= S * (n_in + C * n_out):
            return self
        weights = (n_in - self.bias) * n_out
        return ExplicitLayer(self.tensors, (weights, n_out) if self.bias else (weights,), self.dense())

    def output(self, c: int) -> FactoredLayer:
        """Return the Jacobian of one output."""
        return replace(self, g=self.g[:, c : c + 1])

    def scaled(self, scales: Sequence[Tensor]) -> FactoredLayer:
        """Return J diag(s), one scale for each of its tensors."""
        columns = self.a.new_ones(self.a.shape[-1]) * scales[0]
        if self.bias:
            columns[-1] = scales[-1]
        return replace(self, a=self.a * columns)

    def inner(self, other: Any, s: int, t: int) -> Tensor:
        """Return a_s·a'_t for every pair of rows [n, m]."""
        return self.a[:, s] @ other.a[:, t].mT

    def add_gram(self, out: Float[Tensor, "n C m C"], other: FactoredLayer | ExplicitLayer) -> None:
        """Add J J'ᵀ to `out`."""
        way = add_gram_explicit if self._explicit(other, self.g.shape[1] ** 2) else add_gram_pairs
        way(out, self, other)  # type: ignore[arg-type]

    def add_gram_independent(self, out: Float[Tensor, "C n m"], other: FactoredLayer | ExplicitLayer) -> None:
        """Add J_c J'_cᵀ for each output c to `out`."""
        explicit = self._explicit(other, self.g.shape[1])
        (add_independent_explicit if explicit else add_independent_pairs)(out, self, other)  # type: ignore[arg-type]

    def _explicit(self, other: FactoredLayer | ExplicitLayer, outputs: int) -> bool:
        if isinstance(other, ExplicitLayer):
            return True
        pairs, n_in, n_out = self.a.shape[1] * other.a.shape[1], self.a.shape[-1], self.g.shape[-1]
        return pairs > 1 and pairs * (n_in + outputs * n_out) > outputs * n_out * n_in

    def dense(self) -> Float[Tensor, "n C p"]:
        """Return J."""
        jac = self.g.mT @ self.a.unsqueeze(1)  # [n, C, O, I]
        if not self.bias:
            return jac.flatten(2)
        return torch.cat([jac[..., :-1].flatten(2), jac[..., -1]], -1)

    def _as_matrix(self, u: Float[Tensor, "p r"]) -> Float[Tensor, "I O r"]:
        n_out, weights = self.g.shape[-1], len(u) - self.g.shape[-1] * self.bias
        matrix = u[:weights].unflatten(0, (n_out, -1)).transpose(0, 1)
        return torch.cat([matrix, u[weights:].unsqueeze(0)]) if self.bias else matrix.contiguous()

    def matmul(self, u: Float[Tensor, "p r"]) -> Float[Tensor, "n C r"]:
        """Return J u."""
        if self._explicit_columns(u.shape[-1]):
            return torch.cat([part.dense() @ u for _, part in explicit_tiles(self)])
        (_, S, _), (_, C, _, n_out), r = self.a.shape, self.g.shape, u.shape[-1]
        matrix, parts = self._as_matrix(u).flatten(1), []  # [I, O r]
        for rows in tiles(len(self.a), S * n_out * (r + C), self.a, SCRATCH_BYTES):
            mapped = (self.a[rows] @ matrix).view(-1, S * n_out, r)
            parts.append(self.g[rows].flatten(2) @ mapped)  # Σ_s g_s (U a_s)
        return torch.cat(parts)

    def rmatmul(self, v: Float[Tensor, "n C r"]) -> Float[Tensor, "p r"]:
        """Return Σᵢ Jᵢᵀ vᵢ."""
        (_, S, n_in), (_, C, _, n_out), r = self.a.shape, self.g.shape, v.shape[-1]
        if self._explicit_columns(r):
            return total(part.dense().flatten(0, 1).mT @ v[rows].flatten(0, 1) for rows, part in explicit_tiles(self))
        out = self.a.new_zeros(n_in, n_out * r)
        for rows in tiles(len(self.a), S * n_out * (r + C), self.a, SCRATCH_BYTES):
            pulled = self.g[rows].flatten(2).mT @ v[rows]  # [n, S O, r]
            out += self.a[rows].flatten(0, 1).mT @ pulled.view(-1, n_out * r)
        out = out.view(n_in, n_out, r)
        if not self.bias:
            return out.transpose(0, 1).flatten(0, 1)
        return torch.cat([out[:-1].transpose(0, 1).flatten(0, 1), out[-1]])

    def _explicit_columns(self, r: int) -> bool:
        (_, S, n_in), C = self.a.shape, self.g.shape[1]
        return S > 1 and C * n_in * (S + r) < S * r * (n_in + C)

    def quad(self, d: Float[Tensor, "p"] | None = None) -> Float[Tensor, "n C C"]:
        """Return J diag(d) Jᵀ for each row, with d = 1 unless given."""
        (_, S, n_in), (_, C, _, n_out) = self.a.shape, self.g.shape
        if S == 1:
            a, g = self.a[:, 0].square(), self.g[:, :, 0]
            weights = a.sum(-1, keepdim=True) if d is None else a @ self._as_matrix(d.unsqueeze(-1)).squeeze(-1)
            return (g * weights.unsqueeze(1)) @ g.mT  # Σ_o (Σ_i d_oi a_i²) g_o g_oᵀ
        if d is None and S * S * (n_in + C * n_out) + C * C * S * n_out < C * n_out * n_in * (S + C):
            rows = tiles(len(self.a), S * (S + C * n_out), self.a)
            return torch.cat([quad_pairs(self.g[t], self.a[t] @ self.a[t].mT, self.g[t]) for t in rows])
        jacs = (part.dense() for _, part in explicit_tiles(self))
        return torch.cat([(jac if d is None else jac * d) @ jac.mT for jac in jacs])


@dataclass(frozen=True, eq=False)
class LookupLayer:
    """J[c, (v, e)] = Σ_s [token_s = v] g_s[c, e]: an embedding, whose inputs are one-hot and never formed."""

    tensors: tuple[int, ...]
    tokens: Int[Tensor, "n S"]
    g: Float[Tensor, "n C S E"]
    vocabulary: int

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """What it keeps of each row, in floating point."""
        return (self.g,)

    @property
    def size(self) -> int:
        """The number p of its parameters."""
        return self.vocabulary * self.g.shape[-1]

    def __getitem__(self, rows: slice) -> LookupLayer:
        return replace(self, tokens=self.tokens[rows], g=self.g[rows])

    def output(self, c: int) -> LookupLayer:
        """Return the Jacobian of one output."""
        return replace(self, g=self.g[:, c : c + 1])

    def scaled(self, scales: Sequence[Tensor]) -> LookupLayer:
        """Return J diag(s), one scale for each of its tensors."""
        return replace(self, g=self.g * scales[0])

    def inner(self, other: Any, s: int, t: int) -> Tensor:
        """Return [token_s = token'_t] for every pair of rows [n, m]."""
        return (self.tokens[:, s, None] == other.tokens[:, t]).to(self.g.dtype)

    def add_gram(self, out: Float[Tensor, "n C m C"], other: LookupLayer) -> None:
        """Add J J'ᵀ to `out`."""
        x, z = self._compressed(other)
        (add_gram_explicit if x._explicit(z) else add_gram_pairs)(out, x, z)

    def add_gram_independent(self, out: Float[Tensor, "C n m"], other: LookupLayer) -> None:
        """Add J_c J'_cᵀ for each output c to `out`."""
        x, z = self._compressed(other)
        (add_independent_explicit if x._explicit(z) else add_independent_pairs)(out, x, z)

    def _compressed(self, other: LookupLayer) -> tuple[LookupLayer, LookupLayer]:
        """Number anew the tokens that occur: the others have no part in the product."""
        used, index = torch.cat([self.tokens.flatten(), other.tokens.flatten()]).unique(return_inverse=True)
        mine, theirs = index.split([self.tokens.numel(), other.tokens.numel()])
        x = replace(self, tokens=mine.view_as(self.tokens), vocabulary=len(used))
        return x, replace(other, tokens=theirs.view_as(other.tokens), vocabulary=len(used))

    def _explicit(self, other: LookupLayer) -> bool:
        return self.vocabulary < self.tokens.shape[1] * other.tokens.shape[1]

    def dense(self) -> Float[Tensor, "n C p"]:
        """Return J."""
        n, C, _, E = self.g.shape
        jac = self.g.new_zeros(n, C, self.vocabulary, E)
        return jac.scatter_add_(2, self.tokens[:, None, :, None].expand(self.g.shape), self.g).flatten(2)

    def matmul(self, u: Float[Tensor, "p r"]) -> Float[Tensor, "n C r"]:
        """Return J u."""
        table = u.unflatten(0, (self.vocabulary, -1))
        rows = tiles(len(self.g), self.g[0, 0].numel() * u.shape[-1], self.g)
        return torch.cat([self.g[t].flatten(2) @ table[self.tokens[t]].flatten(1, 2) for t in rows])

    def rmatmul(self, v: Float[Tensor, "n C r"]) -> Float[Tensor, "p r"]:
        """Return Σᵢ Jᵢᵀ vᵢ."""
        total = self.g.new_zeros(self.vocabulary, self.g.shape[-1], v.shape[-1])
        for rows in tiles(len(self.g), self.g[0, 0].numel() * v.shape[-1], self.g):
            pulled = torch.einsum("ncse,ncr->nser", self.g[rows], v[rows])
            total.index_add_(0, self.tokens[rows].flatten(), pulled.flatten(0, 1))
        return total.flatten(0, 1)

    def quad(self, d: Float[Tensor, "p"] | None = None) -> Float[Tensor, "n C C"]:
        """Return J diag(d) Jᵀ for each row, with d = 1 unless given."""
        same = (self.tokens.unsqueeze(-1) == self.tokens.unsqueeze(-2)).to(self.g.dtype)
        weighted = self.g if d is None else self.g * d.view(self.vocabulary, -1)[self.tokens].unsqueeze(1)
        return quad_pairs(self.g, same, weighted)


@dataclass(frozen=True, eq=False)
class ExplicitLayer:
    """J itself [n, C, p]: biases and gains, where it is small, and parameters of which no factors are known."""

    tensors: tuple[int, ...]
    sizes: tuple[int, ...]  # numbers of parameters of its tensors, which add up to p
    jac: Float[Tensor, "n C p"]

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """What it keeps of each row, in floating point."""
        return (self.jac,)

    @property
    def size(self) -> int:
        """The number p of its parameters."""
        return self.jac.shape[-1]

    def __getitem__(self, rows: slice) -> ExplicitLayer:
        return replace(self, jac=self.jac[rows])

    def output(self, c: int) -> ExplicitLayer:
        """Return the Jacobian of one output."""
        return replace(self, jac=self.jac[:, c : c + 1])

    def scaled(self, scales: Sequence[Tensor]) -> ExplicitLayer:
        """Return J diag(s), one scale for each of its tensors."""
        columns = [scale.expand(size) for scale, size in zip(scales, self.sizes, strict=True)]
        return replace(self, jac=self.jac * torch.cat(columns))

    def add_gram(self, out: Float[Tensor, "n C m C"], other: ExplicitLayer) -> None:
        """Add J J'ᵀ to `out`."""
        add_gram_explicit(out, self, other)

    def add_gram_independent(self, out: Float[Tensor, "C n m"], other: ExplicitLayer) -> None:
        """Add J_c J'_cᵀ for each output c to `out`."""
        add_independent_explicit(out, self, other)

    def dense(self) -> Float[Tensor, "n C p"]:
        """Return J."""
        return self.jac

    def matmul(self, u: Float[Tensor, "p r"]) -> Float[Tensor, "n C r"]:
        """Return J u."""
        return self.jac @ u

    def rmatmul(self, v: Float[Tensor, "n C r"]) -> Float[Tensor, "p r"]:
        """Return Σᵢ Jᵢᵀ vᵢ."""
        return self.jac.flatten(0, 1).mT @ v.flatten(0, 1)

    def quad(self, d: Float[Tensor, "p"] | None = None) -> Float[Tensor, "n C C"]:
        """Return J diag(d) Jᵀ for each row, with d = 1 unless given."""
        return (self.jac if d is None else self.jac * d) @ self.jac.mT


Layer = FactoredLayer | LookupLayer | ExplicitLayer


def joined(parts: Sequence[Layer]) -> Layer:
    """Return one layer of the rows of several that are alike."""
    first = parts[0]
    if isinstance(first, ExplicitLayer):
        return replace(first, jac=torch.cat([part.jac for part in parts]))  # type: ignore[union-attr]
    g = [part.g for part in parts]  # type: ignore[union-attr]
    n = sum(map(len, g))
    shared = all(map(is_one_row, g)) and all(torch.equal(one[0], g[0][0]) for one in g)
    g_all = g[0][:1].expand(n, *g[0].shape[1:]) if shared else torch.cat(g)
    if isinstance(first, LookupLayer):
        return replace(first, tokens=torch.cat([part.tokens for part in parts]), g=g_all)  # type: ignore[union-attr]
    return replace(first, a=torch.cat([part.a for part in parts]), g=g_all)  # type: ignore[union-attr]


def doubled(layer: Layer) -> Layer:
    """Return a layer in float64; rows that are one row stay one."""
    held = {field.name: getattr(layer, field.name) for field in fields(layer)}
    floats = {name: t for name, t in held.items() if isinstance(t, Tensor) and t.is_floating_point()}
    wide = {name: t[:1].double().expand(t.shape) if is_one_row(t) else t.double() for name, t in floats.items()}
    return replace(layer, **wide)  # type: ignore[arg-type]


def total(parts: Iterable[Tensor]) -> Tensor:
    """Return the sum of tensors of one shape."""
    return reduce(torch.add, parts)
