"""Sites on all the weights of a network whose precision is block-diagonal over layers, and their sum over data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from dualgp.errors import BasisMismatchError, InputError
from dualgp.jacobian import JacobianBasis
from dualgp.kernels import JacobianBlock
from dualgp.kernels.layers import Layer
from dualgp.nets.factors import Curvature, Kronecker, Moments, added, curvature, kind_of, moments, split_bias
from dualgp.sites import Sites

Key: TypeAlias = tuple[int, ...]  # the parameter tensors of a layer, by their numbers


@dataclass(frozen=True, eq=False)
class StructuredSite:
    """One Gaussian factor on w, t(w) = exp(λᵀw − ½ wᵀBw), with B block-diagonal over layers.

    Args:
        lam: λ, [P], in float64.
        blocks: B of each layer that data have said something of.
    """

    lam: Float[Tensor, "P"]
    blocks: Mapping[Key, Curvature]

    def __add__(self, other: StructuredSite) -> StructuredSite:
        if self.lam.shape != other.lam.shape:
            raise BasisMismatchError(f"Sites of one basis add; got {len(self.lam)} and {len(other.lam)} coordinates.")
        blocks = dict(self.blocks)
        for key, block in other.blocks.items():
            blocks[key] = blocks[key] + block if key in blocks else block
        kept = {k: b for k, b in blocks.items() if not (isinstance(b, Kronecker) and not b.terms)}
        return StructuredSite(self.lam + other.lam, kept)

    def __sub__(self, other: StructuredSite) -> StructuredSite:
        return self + (-1.0) * other

    def __mul__(self, factor: float | int) -> StructuredSite:
        return StructuredSite(self.lam * factor, {key: block * factor for key, block in self.blocks.items()})

    __rmul__ = __mul__


@dataclass(frozen=True)
class Structure:
    """What is kept of the precision of a network's weights.

    Args:
        kind: "kronecker", or "diagonal".
        separate_bias: drop the block between weight and bias of a layer, as laplace-torch does.
        dense_limit: parameters of a layer up to which a dense eigendecomposition is taken where factors do not do:
            where several sets of data have been added, and where a layer has none.

    Raises:
        InputError: if the kind is unknown.
    """

    kind: Literal["kronecker", "diagonal"] = "kronecker"
    separate_bias: bool = False
    dense_limit: int = 3000

    def __post_init__(self) -> None:
        if self.kind not in ("kronecker", "diagonal"):
            raise InputError(f"structure must be 'diagonal' or 'kronecker', got {self.kind!r}.")

    def layers(self, block: JacobianBlock) -> Iterator[Layer]:
        """Yield the layers that have a block of their own."""
        for layer in block.layers:
            yield from split_bias(layer) if self.separate_bias else (layer,)


class StructuredSum:
    """A running sum of the sites that one set of data makes on w, block by block, in any order.

    λ = Σ φᵢᵀαᵢ,   B of a layer = (Σᵢ gᵢᵀβᵢgᵢ) ⊗ (mean of aaᵀ), or Σᵢ φᵢᵀβᵢφᵢ, or the diagonal of that
    """

    def __init__(self, basis: JacobianBasis, structure: Structure) -> None:
        self._basis, self._structure = basis, structure
        self._lam = torch.zeros(basis.size, dtype=torch.float64, device=basis.device)
        self._sums: dict[Key, tuple[type[Curvature], bool, Moments]] = {}

    def add(self, phi: JacobianBlock, sites: Sites) -> None:
        """Add data by φ = J/√τ there."""
        self._lam += phi.rmatmul(sites.alpha(phi.f.double()).unsqueeze(-1)).squeeze(-1)
        for layer in self._structure.layers(phi):
            key, kind = layer.tensors, kind_of(layer, self._structure.kind, self._structure.dense_limit)
            new = moments(kind, layer, sites)
            if key in self._sums:
                new = added(self._sums[key][2], new)
            self._sums[key] = kind, bool(getattr(layer, "bias", False)), new

    def site(self) -> StructuredSite:
        """Return the sum so far."""
        shapes, blocks = self._basis.jacobian.shapes, {}
        for key, (kind, bias, sums) in self._sums.items():
            blocks[key] = curvature(kind, sums, tuple(shapes[t].numel() for t in key), bias)
        return StructuredSite(self._lam.clone(), blocks)
