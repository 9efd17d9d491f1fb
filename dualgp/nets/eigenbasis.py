"""B = Q diag(e) Qᵀ of a precision that is block-diagonal over layers: on vectors, and on features by I + B."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from dualgp.errors import BasisMismatchError, UnsupportedError
from dualgp.kernels import JacobianBlock, NetworkJacobian
from dualgp.kernels.layers import Layer
from dualgp.nets.factors import LayerSpectrum
from dualgp.nets.layerwise import Key, Structure, StructuredSite

Spectra: TypeAlias = Mapping[Key, LayerSpectrum | None]


@dataclass(frozen=True, eq=False)
class Eigenbasis:
    """The spectra of a network's layers, and what they say of vectors and features of all weights.

    Args:
        jacobian: of the network.
        structure: which layers have a block.
        spectra: of those that data have said something of; None of a sum of products that is too large to factorise.
    """

    jacobian: NetworkJacobian
    structure: Structure
    spectra: Spectra

    @classmethod
    def of(cls, jacobian: NetworkJacobian, structure: Structure, site: StructuredSite) -> Eigenbasis:
        """Return that of a site."""
        spectra = {key: block.spectrum(structure.dense_limit) for key, block in site.blocks.items()}
        return cls(jacobian, structure, spectra)

    def scaled(self, factor: float | Tensor) -> Eigenbasis:
        """Return that of factor · B."""
        spectra = {key: s and replace(s, values=s.values * factor) for key, s in self.spectra.items()}
        return replace(self, spectra=spectra)

    @property
    def smallest(self) -> float:
        """The least eigenvalue of what is known, or 0."""
        return min((float(s.values.min()) for s in self.spectra.values() if s is not None), default=0.0)

    @cached_property
    def values(self) -> Float[Tensor, "P"]:
        """e, in the order of `forward`; 0 where data have said nothing.

        Raises:
            UnsupportedError: here and below, if a layer holds more terms than can be factorised.
        """
        theta = self.jacobian.theta
        out = torch.zeros(len(theta), 1, dtype=torch.float64, device=theta.device)
        for key in self.spectra:
            self._put(out, key, self._spectrum(key).values.unsqueeze(-1))
        return out.squeeze(-1)

    def forward(self, v: Float[Tensor, "P r"]) -> Float[Tensor, "P r"]:
        """Return Qᵀv."""
        out = v.clone()
        for key in self.spectra:
            self._put(out, key, self._spectrum(key).forward(self._take(v, key)))
        return out

    def back(self, v: Float[Tensor, "P r"]) -> Float[Tensor, "P r"]:
        """Return Qv."""
        out = v.clone()
        for key in self.spectra:
            self._put(out, key, self._spectrum(key).back(self._take(v, key)))
        return out

    @torch.no_grad()
    def covariance(self, phi: JacobianBlock, scale: float = 1.0) -> Float[Tensor, "n C C"]:
        """Return φ(scale · I + B)⁻¹φᵀ of each row, in float64."""
        layers = self._layers(phi)
        return torch.stack([self._spectrum(layer.tensors).quad(layer, scale) for layer in layers]).sum(0).double()

    @torch.no_grad()
    def cross(self, left: JacobianBlock, right: JacobianBlock) -> Float[Tensor, "n C m C"]:
        """Return φ(I + B)⁻¹φ'ᵀ between rows, in float64, by explicit Jacobians of a layer at a time."""
        pairs = zip(self._layers(left), self._layers(right), strict=True)
        return sum(self._spectrum(mine.tensors).cross(mine, theirs, 1.0).double() for mine, theirs in pairs)  # type: ignore[return-value]

    def _layers(self, phi: JacobianBlock) -> list[Layer]:
        layers = list(self.structure.layers(phi))
        unknown = set(self.spectra) - {layer.tensors for layer in layers}
        if unknown:
            raise BasisMismatchError(
                f"The site has blocks of the tensors {sorted(unknown)}, which are no layers of the structure "
                f"{self.structure}: it was made for another one."
            )
        return layers

    def _spectrum(self, key: Key) -> LayerSpectrum:
        spectrum = self.spectra.get(key, LayerSpectrum())
        if spectrum is None:
            names = [self.jacobian.names[t] for t in key]
            raise UnsupportedError(
                f"The curvature of {names} is a sum of Kronecker products of several sets of data, which has no "
                f"factors, and it has more than dense_limit = {self.structure.dense_limit} parameters. Take the "
                "nearest single product with nearest(), an approximation; raise dense_limit; or project all data as "
                "one set."
            )
        return spectrum

    def _take(self, v: Tensor, key: Key) -> Tensor:
        return torch.cat([v[self.jacobian.slices[t]] for t in key])

    def _put(self, out: Tensor, key: Key, values: Tensor) -> None:
        slices = [self.jacobian.slices[t] for t in key]
        for at, piece in zip(slices, values.split([s.stop - s.start for s in slices]), strict=True):
            out[at] = piece


def linear(phi: JacobianBlock, w: Float[Tensor, "P"]) -> Float[Tensor, "n C"]:
    """Return f(x; θ*) + φw in float64."""
    f = phi.f.double()
    return f + phi.matmul(w.unsqueeze(-1)).squeeze(-1).double() if bool(w.any()) else f
