"""The curvature of one layer, B = Σ φᵢᵀβᵢφᵢ over its p parameters: diagonal, dense, or a sum of Kronecker products.

Each kind is a frozen value that adds, scales, and has a spectrum B = Q diag(e) Qᵀ, so that functions of I + sB are
functions of numbers at any scale s. An exact sum is kept: Kronecker products of two sets of data remain two terms.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import reduce

import torch
from jaxtyping import Float
from torch import Tensor

from dualgp.errors import BasisMismatchError
from dualgp.kernels.contractions import tiles
from dualgp.kernels.layers import ExplicitLayer, FactoredLayer, Layer, LookupLayer
from dualgp.linalg import symmetrise
from dualgp.sites import Sites

_ZERO = torch.zeros((), dtype=torch.float64, device="cpu")
_SAME = 1e-10  # relative; factors closer than this are of the same data, computed again


class Curvature(ABC):
    """B [p, p] of a layer, in one of three structures, in float64."""

    @abstractmethod
    def __add__(self, other: Curvature) -> Curvature: ...

    @abstractmethod
    def __mul__(self, factor: float | int) -> Curvature: ...

    @abstractmethod
    def rescaled(self, factors: Float[Tensor, "tensors"]) -> Curvature:
        """Return diag(s) B diag(s), one factor for each parameter tensor of the layer."""

    @abstractmethod
    def spectrum(self, dense_limit: int) -> LayerSpectrum | None:
        """Return B = Q diag(e) Qᵀ, or None where that takes a dense matrix of more than `dense_limit` rows."""

    @abstractmethod
    def to_dense(self) -> Float[Tensor, "p p"]:
        """Return B itself."""

    def _same_kind(self, other: Curvature) -> None:
        if type(self) is not type(other):
            raise BasisMismatchError(
                f"A {type(self).__name__} and a {type(other).__name__} of one layer do not add: build both with the "
                "same structure."
            )


@dataclass(frozen=True, eq=False)
class Diagonal(Curvature):
    """B = diag(d)."""

    d: Float[Tensor, "p"]
    sizes: tuple[int, ...]  # of the layer's parameter tensors

    def __add__(self, other: Curvature) -> Diagonal:
        self._same_kind(other)
        return replace(self, d=self.d + other.d)  # type: ignore[attr-defined]

    def __mul__(self, factor: float | int) -> Diagonal:
        return replace(self, d=self.d * factor)

    def rescaled(self, factors: Float[Tensor, "tensors"]) -> Diagonal:
        """Return diag(s) B diag(s)."""
        return replace(self, d=self.d * _per_parameter(factors, self.sizes).square())

    def spectrum(self, dense_limit: int) -> LayerSpectrum:
        """Return d with Q = I."""
        return LayerSpectrum(self.d)

    def to_dense(self) -> Float[Tensor, "p p"]:
        """Return B itself."""
        return torch.diag(self.d)


@dataclass(frozen=True, eq=False)
class Dense(Curvature):
    """B itself, of a layer with few parameters."""

    B: Float[Tensor, "p p"]
    sizes: tuple[int, ...]

    def __add__(self, other: Curvature) -> Dense:
        self._same_kind(other)
        return replace(self, B=self.B + other.B)  # type: ignore[attr-defined]

    def __mul__(self, factor: float | int) -> Dense:
        return replace(self, B=self.B * factor)

    def rescaled(self, factors: Float[Tensor, "tensors"]) -> Dense:
        """Return diag(s) B diag(s)."""
        s = _per_parameter(factors, self.sizes)
        return replace(self, B=s.unsqueeze(-1) * self.B * s)

    def spectrum(self, dense_limit: int) -> LayerSpectrum:
        """Return the eigendecomposition of B."""
        return LayerSpectrum(*torch.linalg.eigh(symmetrise(self.B)))

    def to_dense(self) -> Float[Tensor, "p p"]:
        """Return B itself."""
        return self.B


@dataclass(frozen=True, eq=False)
class Kronecker(Curvature):
    """B = Σₖ Gₖ ⊗ Aₖ on weights [O, I] (a bias is the last column), one term (G, A) for each set of data.

    A sum is exact and stays one: terms become one only where they share A. Source: Martens and Grosse 2015 (KFAC).
    """

    terms: tuple[tuple[Tensor, Tensor], ...]  # (G [O, O], A [I, I])
    bias: bool

    def __add__(self, other: Curvature) -> Kronecker:
        self._same_kind(other)
        terms = list(self.terms)
        for G, A in other.terms:  # type: ignore[attr-defined]
            same = [k for k, (_, mine) in enumerate(terms) if _close(mine, A)]
            if not same:
                terms.append((G, A))
                continue
            total = terms[same[0]][0] + G
            terms[same[0]] = (total, A)
            if total.abs().max() <= _SAME * G.abs().max():  # the same data, taken out again
                del terms[same[0]]
        return replace(self, terms=tuple(terms))

    def __mul__(self, factor: float | int) -> Kronecker:
        return replace(self, terms=tuple((G * factor, A) for G, A in self.terms))

    def rescaled(self, factors: Float[Tensor, "tensors"]) -> Kronecker:
        """Return diag(s) B diag(s)."""
        if not self.terms:
            return self
        s = factors[:1].expand(len(self.terms[0][1])).clone()
        s[-1] = factors[-1]
        return replace(self, terms=tuple((G, s.unsqueeze(-1) * A * s) for G, A in self.terms))

    def spectrum(self, dense_limit: int) -> LayerSpectrum | None:
        """Return the exact spectrum: by the factors of one term, or of the dense sum of several."""
        if len(self.terms) == 1:
            (G, A) = self.terms[0]
            g, Q_out = torch.linalg.eigh(symmetrise(G))
            a, Q_in = torch.linalg.eigh(symmetrise(A))
            return LayerSpectrum(torch.outer(g, a).flatten(), Q_out, Q_in, self.bias)
        size = len(self.terms[0][0]) * len(self.terms[0][1]) if self.terms else 0
        return None if size > dense_limit else LayerSpectrum(*torch.linalg.eigh(symmetrise(self.to_dense())))

    def to_dense(self) -> Float[Tensor, "p p"]:
        """Return B itself, in the order weights [O · I], biases [O]."""
        B = torch.stack([torch.kron(G, A) for G, A in self.terms]).sum(0)
        if not self.bias:
            return B
        grid = torch.arange(len(B), device=B.device).view(len(self.terms[0][0]), -1)  # [O, I]
        order = torch.cat([grid[:, :-1].flatten(), grid[:, -1]])
        return B[order][:, order]

    def nearest(self) -> Kronecker:
        """Return the one Kronecker product nearest to the sum in the Frobenius norm; an approximation.

        G = Σ uₖGₖ with u the leading eigenvector of [⟨Aⱼ, Aₖ⟩][⟨Gⱼ, Gₖ⟩], and A = Σ ⟨Gₖ, G⟩Aₖ / |G|²: of positive
        semi-definite terms both are so too. Source: Van Loan and Pitsianis 1993.
        """
        if len(self.terms) < 2:
            return self
        Gs, As = (torch.stack(factors) for factors in zip(*self.terms, strict=True))
        inner_G, inner_A = (torch.einsum("jab,kab->jk", F, F) for F in (Gs, As))
        values, vectors = torch.linalg.eig(inner_A @ inner_G)
        u = vectors[:, values.real.argmax()].real
        G = torch.einsum("k,kab->ab", u * u.sum().sign(), Gs)
        A = torch.einsum("k,kab->ab", torch.einsum("kab,ab->k", Gs, G) / G.square().sum(), As)
        return replace(self, terms=((G, A),))


@dataclass(frozen=True, eq=False)
class LayerSpectrum:
    """B = Q diag(values) Qᵀ of one layer, with Q = I, `left`, or `left` ⊗ `right` on weights [O, I]; 0 by default."""

    values: Tensor = _ZERO  # [p], or one for all
    left: Tensor | None = None
    right: Tensor | None = None
    bias: bool = False

    def quad(self, layer: Layer, scale: float) -> Float[Tensor, "n C C"]:
        """Return J(scale · I + B)⁻¹Jᵀ for each row: the factors of a layer are turned, and nothing else is made."""
        if self.left is not None and self.right is None:
            return torch.cat([half @ half.mT for half in self._halves(layer, scale)])
        return self._turned(layer).quad((1.0 / (scale + self.values)).to(_by_rows(layer)).expand(layer.size))

    def cross(self, x: Layer, z: Layer, scale: float) -> Float[Tensor, "n C m C"]:
        """Return J(x)(scale · I + B)⁻¹J(z)ᵀ for all pairs of rows and outputs; takes explicit Jacobians, in tiles."""
        columns = torch.cat([half.flatten(0, 1) for half in self._halves(z, scale)])
        out = torch.cat([half @ columns.mT for half in self._halves(x, scale)])
        return out.unflatten(-1, (-1, out.shape[1]))

    def forward(self, v: Float[Tensor, "p r"]) -> Float[Tensor, "p r"]:
        """Return Qᵀv."""
        if self.left is None:
            return v
        if self.right is None:
            return self.left.mT @ v
        u = _as_matrix(v, len(self.left), self.bias)
        return torch.einsum("oq,oir,ij->qjr", self.left, u, self.right).flatten(0, 1)

    def back(self, v: Float[Tensor, "p r"]) -> Float[Tensor, "p r"]:
        """Return Qv."""
        if self.left is None:
            return v
        if self.right is None:
            return self.left @ v
        u = torch.einsum("oq,qjr,ij->oir", self.left, v.unflatten(0, (len(self.left), -1)), self.right)
        return _flat(u, self.bias)

    def _turned(self, layer: Layer) -> Layer:
        """J Q: in factors, or explicit where Q is dense."""
        if self.left is None:
            return layer
        left = self.left.to(_by_rows(layer))
        if self.right is None:
            return ExplicitLayer(layer.tensors, (layer.size,), layer.dense() @ left)
        assert isinstance(layer, FactoredLayer)
        return FactoredLayer(layer.tensors, layer.a @ self.right.to(left), layer.g @ left, bias=False)

    def _halves(self, layer: Layer, scale: float) -> Iterator[Tensor]:
        """J Q (scale · I + diag(values))^{-1/2}, [n, C, p], in tiles of rows."""
        like = _by_rows(layer)
        root = (scale + self.values).rsqrt().to(like)
        for rows in tiles(len(like), like.shape[1] * layer.size, like):
            yield self._turned(layer[rows]).dense() * root


def _by_rows(layer: Layer) -> Tensor:
    """What a layer keeps for each row, [n, C, ...]; not `parts`, in which a last layer's is of one row for all."""
    return layer.jac if isinstance(layer, ExplicitLayer) else layer.g


Moments = tuple[Tensor, ...]  # what sums over data, before it is a Curvature


def kind_of(layer: Layer, structure: str, dense_limit: int) -> type[Curvature]:
    """Return the structure that a layer gets: embeddings, and other layers without factors if large, a diagonal."""
    if structure == "diagonal" or isinstance(layer, LookupLayer):
        return Diagonal
    if isinstance(layer, FactoredLayer):
        return Kronecker
    return Dense if layer.size <= dense_limit else Diagonal


def moments(kind: type[Curvature], layer: Layer, sites: Sites) -> Moments:
    """Return the sums over a block of data that a `Curvature` of this kind is made of, in float64."""
    like = _by_rows(layer)
    in_factors = isinstance(layer, FactoredLayer) and (kind is Kronecker or layer.a.shape[1] == 1)
    width = like[0].numel() if in_factors else like.shape[1] * layer.size
    parts = (_moments(kind, layer[rows], sites[rows]) for rows in tiles(len(like), width, like))
    return reduce(added, parts)


def added(some: Moments, more: Moments) -> Moments:
    """Return the sums over the data of both."""
    return tuple(map(torch.add, some, more))


def _moments(kind: type[Curvature], layer: Layer, sites: Sites) -> Moments:
    if isinstance(layer, FactoredLayer) and kind is Kronecker:
        a, S = layer.a.flatten(0, 1).double(), layer.a.shape[1]
        rows, weights = sites.rotate(layer.g.flatten(2))  # Rᵢᵀgᵢ [nC, S · O]
        g = rows.unflatten(-1, (S, -1)).double()
        G = (g * weights[:, None, None]).flatten(0, 1).mT @ g.flatten(0, 1)
        return G, a.mT @ a, torch.tensor(float(len(a)), dtype=torch.float64, device=a.device)
    if isinstance(layer, FactoredLayer) and layer.a.shape[1] == 1:  # d_oi = Σ (Σ_c w_c g_co²) a_i²
        rows, weights = sites.rotate(layer.g[:, :, 0])
        g2 = (rows.square() * weights.to(rows).unsqueeze(-1)).unflatten(0, (len(layer.a), -1)).sum(1)
        d = g2.double().mT @ layer.a[:, 0].square().double()
        return (_flat(d, layer.bias),)
    rows, weights = sites.rotate(layer.dense())
    rows, weights = rows.double(), weights.double()
    return (weights @ rows.square() if kind is Diagonal else (rows.mT * weights) @ rows,)


def curvature(kind: type[Curvature], sums: Moments, layer_sizes: tuple[int, ...], bias: bool) -> Curvature:
    """Return the curvature that sums over all data of one set make; for Kronecker (Σ g̃g̃ᵀ) ⊗ (mean aaᵀ)."""
    if kind is Kronecker:
        G, A, count = sums
        return Kronecker(((symmetrise(G), symmetrise(A) / count),), bias)
    return kind(sums[0], layer_sizes)  # type: ignore[call-arg]


def split_bias(layer: Layer) -> tuple[Layer, ...]:
    """Return a layer's weight and bias as layers of their own."""
    if not (isinstance(layer, FactoredLayer) and layer.bias):
        return (layer,)
    weight = FactoredLayer(layer.tensors[:1], layer.a[..., :-1], layer.g, False)
    return weight, FactoredLayer(layer.tensors[1:], layer.a[..., -1:], layer.g, False)


def _as_matrix(v: Tensor, n_out: int, bias: bool) -> Tensor:
    if not bias:
        return v.unflatten(0, (n_out, -1))
    return torch.cat([v[:-n_out].unflatten(0, (n_out, -1)), v[-n_out:].unsqueeze(1)], 1)


def _flat(u: Tensor, bias: bool) -> Tensor:
    return torch.cat([u[:, :-1].flatten(0, 1), u[:, -1]]) if bias else u.flatten(0, 1)


def _per_parameter(factors: Tensor, sizes: tuple[int, ...]) -> Tensor:
    return factors.repeat_interleave(torch.tensor(sizes, device=factors.device))


def _close(A: Tensor, B: Tensor) -> bool:
    return bool((A - B).abs().max() <= _SAME * A.abs().max())
