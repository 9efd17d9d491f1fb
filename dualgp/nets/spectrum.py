"""One eigendecomposition of the data's precision, after which any prior precision costs O(rank).

At prior precision sτ the coordinates are √s times those at τ, so with B = U diag(b) Uᵀ, pulls a = Uᵀλ of the data (and
whatever centres them) and c = Uᵀ(√τ Φᵀθ*) of the prior where it is centred at zero, and ψ = φU, all at τ:

    log|P| = Σ log(1 + b/s),    mean = μ + ψ(a − sc)/(s + b),    V = ψ diag(1/(s + b)) ψᵀ,    residual(s) = residual/s
    log Z(s) = Σ log p(y_i|f_i) − ½ s τ|θ*|² − ½ log|P| + ½ Σ (a − sc)²/(s + b)

Where the prior is centred at zero, |c|² stands for τ|θ*|²: directions that w does not span integrate to 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dualgp.basis import Features
from dualgp.errors import NotPositiveDefiniteError
from dualgp.jacobian import JacobianBasis
from dualgp.linalg import symmetrise
from dualgp.sites import Site


@dataclass(frozen=True, eq=False)
class FunctionBlocks:
    """Of n data, in float64: mean [n, C], parametric covariance V [n, C, C], and the residual's [n, C, C], or 0."""

    mean: Tensor
    V: Tensor
    residual: Tensor | float


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The site of the data in its eigenbasis, on a Jacobian basis.

    Args:
        basis: at prior precision τ.
        values: b, [*batch, r].
        vectors: U, [*batch, r, r].
        data: a, [*batch, r].
        prior: c, the same; 0 where the prior is centred at the network.
        energy: what the prior takes from the evidence, twice: τ|θ*|², or |c|² where it is centred at zero.
    """

    basis: JacobianBasis
    values: Float[Tensor, "*b r"]
    vectors: Float[Tensor, "*b r r"]
    data: Float[Tensor, "*b r"]
    prior: Float[Tensor, "*b r"]
    energy: Float[Tensor, ""]

    @classmethod
    def of(cls, basis: JacobianBasis, site: Site, prior: Tensor, energy: Tensor) -> Spectrum:
        """Return the spectrum of a site on a basis; `prior` is √τ Φᵀθ*, or zeros.

        B is a sum of products in the dtype of the basis, whose rounding makes its null space negative here and there:
        that is taken for zero.
        """
        values, vectors = torch.linalg.eigh(symmetrise(site.B))
        scale = site.B.shape[-1] * values.abs().amax()
        nothing = values.abs() <= torch.finfo(values.dtype).eps * scale
        rounded = (values < 0) & (-values <= torch.finfo(basis.dtype).eps * scale)
        values = torch.where(nothing | rounded, 0.0, values)
        a, c = ((vectors.mT @ v.unsqueeze(-1)).squeeze(-1) for v in (site.lam, prior))
        return cls(basis, values, vectors, a, c, energy)

    def log_evidence(self, s: Float[Tensor, "k"]) -> Float[Tensor, "k"]:
        """Return log Z(s) − Σ log p(y_i|f_i) at prior precisions sτ, each in O(r).

        Raises:
            NotPositiveDefiniteError: if more was removed from the site than was in it.
        """
        self._check(s)
        return log_evidence(self.energy, self.values.flatten(), self.data.flatten(), self.prior.flatten(), s)

    def blocks(self, x: Tensor, s: Float[Tensor, "k"]) -> Iterator[tuple[slice, Iterator[FunctionBlocks]]]:
        """Yield, for blocks of x, the function there at each of the prior precisions sτ, in O(C²r) per datum.

        Raises:
            NotPositiveDefiniteError: as in `log_evidence`.
        """
        self._check(s)
        for rows, features in self.basis.blocks(x):
            yield rows, self._sweep(features, s)

    def _sweep(self, features: Features, s: Tensor) -> Iterator[FunctionBlocks]:
        C, coupled = self.basis.num_outputs, self.basis.coupled
        psi = (features.phi @ self.vectors.to(features.phi.dtype)).double()
        f = features.prior_mean
        psi = psi.unflatten(0, (-1, C)) if coupled else psi.movedim(0, 1)  # [n, C, r]
        f = f.reshape(-1, C) if coupled else f.mT
        residual = features.residual_block if coupled else torch.diag_embed(features.residual.mT)
        for one in s.tolist():
            shrink = 1.0 / (one + self.values)  # [r], or [C, r]
            mean = f + (psi * (shrink * (self.data - one * self.prior))).sum(-1)
            half = psi * shrink.sqrt()
            V = half @ half.mT if coupled else torch.diag_embed(half.square().sum(-1))
            yield FunctionBlocks(mean, V, 0.0 if residual is None else residual / one)

    def _check(self, s: Tensor) -> None:
        least = float(self.values.min())
        if float(s.min()) + least <= 0:
            raise NotPositiveDefiniteError(
                f"At {float(s.min()):.3e} of the present prior precision no Gaussian is left: the sites have smallest "
                f"eigenvalue {least:.3e}. More was removed than had been added."
            )


def log_evidence(energy: Tensor, b: Tensor, a: Tensor, c: Tensor, s: Float[Tensor, "k"]) -> Float[Tensor, "k"]:
    """Return log Z(s) − Σ log p(y_i|f_i) at prior precisions sτ, by the formula above."""
    s = s.to(b).unsqueeze(-1)
    fit = ((a - s * c).square() / (s + b)).sum(-1)
    return 0.5 * (fit - s.squeeze(-1) * energy - torch.log1p(b / s).sum(-1))
