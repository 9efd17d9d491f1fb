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
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from dualgp.basis import Features
from dualgp.errors import NotPositiveDefiniteError
from dualgp.influence.formulas import Order, Shift, removal_shift
from dualgp.jacobian import JacobianBasis
from dualgp.kernels import JacobianBlock
from dualgp.kernels.contractions import explicit_tiles
from dualgp.linalg import symmetrise
from dualgp.nets.eigenbasis import linear
from dualgp.sites import Site

if TYPE_CHECKING:
    from dualgp.nets.structured import StructuredPosterior


class Seen(NamedTuple):
    """What sites of n data act on that were seen through fewer coordinates than there are now, g = μ' + φ'w.

    Its mean [n, C] and parametric covariance [n, C, C], and that of f, by rows, with it [n, C, C].
    """

    mean: Tensor
    V: Tensor
    cross: Tensor


@dataclass(frozen=True, eq=False)
class FunctionBlocks:
    """Of n data, in float64: mean [n, C], parametric covariance V [n, C, C], and the residual's [n, C, C], or 0.

    `seen` is what their sites act on, where that is not f itself.
    """

    mean: Tensor
    V: Tensor
    residual: Tensor | float
    seen: Seen | None = None

    def without(self, lam: Tensor, B: Tensor, max_hat: float) -> tuple[Tensor, Tensor, Shift]:
        """Return mean and covariance (residual included) of each datum without its own site (λ, B), and the shift."""
        mean, V, cross = self.seen or (self.mean, self.V, None)
        alpha = lam - (B @ mean.unsqueeze(-1)).squeeze(-1)
        shift = removal_shift(V, alpha, B, max_hat=max_hat, cross=cross)
        return self.mean + shift.mean, self.V + self.residual + shift.cov, shift


@dataclass(frozen=True, eq=False)
class DiagonalBlocks(FunctionBlocks):
    """The same on all weights with a diagonal precision D, w̄ = λ/D: a datum takes diag(φᵀBφ) out of it, not φᵀBφ."""

    phi: JacobianBlock | None = None
    precision: Tensor | None = None  # D [P]
    mean_w: Tensor | None = None

    def without(self, lam: Tensor, B: Tensor, max_hat: float) -> tuple[Tensor, Tensor, Shift]:
        """Return the same without a datum's own site, exactly, in whatever share it has of a weight's precision."""
        assert self.phi is not None
        assert self.precision is not None
        assert self.mean_w is not None
        shift = diagonal_shift(self.phi, self.precision, self.mean_w, lam, B, "removal")
        return self.mean + shift.mean, self.V + shift.cov, shift


def diagonal_shift(
    phi: JacobianBlock,
    precision: Float[Tensor, "P"],
    mean_w: Float[Tensor, "P"],
    lam: Float[Tensor, "n c"],
    B: Float[Tensor, "n c c"],
    order: Order,
) -> Shift:
    """Return what changes at each datum without its own site (λ, B), under a diagonal precision D of the weights.

    D' = D − diag(φᵀBφ),    D'(w̄' − w̄) = diag(φᵀBφ)w̄ − φᵀ(λ − Bμ);    order "first" is the derivative in its weight.
    """
    pull = lam - (B @ phi.f.double().unsqueeze(-1)).squeeze(-1)
    mean, cov, hat = torch.zeros_like(lam), torch.zeros_like(B), torch.zeros_like(lam[:, 0])
    for layer in phi.layers:
        D, w = (torch.cat([v[phi.slices[t]] for t in layer.tensors]) for v in (precision, mean_w))
        for rows, part in explicit_tiles(layer):
            J = part.dense().double()  # [k, C, p]
            own = (J * (B[rows] @ J)).sum(1)
            left = D - own if order == "removal" else D.expand_as(own)
            if not bool((left > 0).all()):
                raise NotPositiveDefiniteError("Without one datum no Gaussian is left: the sites are not of these.")
            step = (own * w - (J * pull[rows].unsqueeze(-1)).sum(1)) / left
            mean[rows] += (J @ step.unsqueeze(-1)).squeeze(-1)
            cov[rows] += (J * (own / (left * D)).unsqueeze(1)) @ J.mT  # 1/D' − 1/D
            hat[rows] = torch.maximum(hat[rows], (own / D).amax(-1))
    return Shift(mean, cov, hat, torch.zeros_like(hat, dtype=torch.bool))


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

        What is taken out of B is found anew in the dtype of the basis, and so may be more than what is there by its
        rounding, as B of another origin may have been: eigenvalues that are negative by no more are taken for zero.
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

    def blocks(
        self, x: Tensor, s: Float[Tensor, "k"], size: int | None = None
    ) -> Iterator[tuple[slice, Iterator[FunctionBlocks]]]:
        """Yield, for blocks of x, the function there at each of the prior precisions sτ, in O(C²r) per datum.

        Args:
            x: inputs.
            s: factors on the prior precision.
            size: through how many of the first coordinates the sites at x were seen; all if None.

        Raises:
            NotPositiveDefiniteError: as in `log_evidence`.
        """
        self._check(s)
        for rows, features in self.basis.blocks(x):
            yield rows, self._sweep(features, s, self.basis.size if size is None else size)

    def _sweep(self, features: Features, s: Tensor, size: int) -> Iterator[FunctionBlocks]:
        coupled = self.basis.coupled
        psi, f = self._rotated(features.phi, slice(None)), self._by_output(features.prior_mean)
        narrow = size < self.basis.size
        first = self._rotated(features.phi, slice(size)) if narrow else psi
        if narrow and self.basis.zero_mean:  # less of θ was seen then, and so more of it was in the prior mean
            c = (self.vectors @ self.prior.unsqueeze(-1))[..., size:, :].to(features.phi.dtype)
            f_seen = f - self._by_output((features.phi[..., size:] @ c).squeeze(-1).double())
        else:
            f_seen = f
        residual = features.residual_block if coupled else torch.diag_embed(features.residual.mT)
        for one in s.tolist():
            shrink = 1.0 / (one + self.values)  # [r], or [C, r]
            w, root = shrink * (self.data - one * self.prior), shrink.sqrt()
            half = psi * root
            seen = None
            if narrow:
                part = first * root
                seen = Seen(f_seen + (first * w).sum(-1), self._product(part, part), self._product(half, part))
            left = 0.0 if residual is None else residual / one
            yield FunctionBlocks(f + (psi * w).sum(-1), self._product(half, half), left, seen)

    def _rotated(self, phi: Tensor, at: slice) -> Tensor:
        """φU of some coordinates, [n, C, r] in float64."""
        psi = (phi[..., at] @ self.vectors[..., at, :].to(phi.dtype)).double()
        return psi.unflatten(0, (-1, self.basis.num_outputs)) if self.basis.coupled else psi.movedim(0, 1)

    def _by_output(self, values: Tensor) -> Tensor:
        """Rows of the basis to [n, C]."""
        return values.reshape(-1, self.basis.num_outputs) if self.basis.coupled else values.mT

    def _product(self, a: Tensor, b: Tensor) -> Tensor:
        """abᵀ of each datum, [n, C, C]; between an output and itself where they are independent."""
        return a @ b.mT if self.basis.coupled else torch.diag_embed((a * b).sum(-1))

    def _check(self, s: Tensor) -> None:
        least = float(self.values.min())
        if float(s.min()) + least <= 0:
            raise NotPositiveDefiniteError(
                f"At {float(s.min()):.3e} of the present prior precision no Gaussian is left: the sites have smallest "
                f"eigenvalue {least:.3e}. More was removed than had been added."
            )


@dataclass(frozen=True, eq=False)
class StructuredSpectrum:
    """The site of the data in its eigenbasis, on all weights; see `Spectrum`.

    Args:
        posterior: at prior precision τ.
        values: b, [P].
        data: a = Qᵀλ, [P].
        prior: c = Qᵀ√τθ*, the same; 0 where the prior is centred at the network.
    """

    posterior: StructuredPosterior
    values: Float[Tensor, "P"]
    data: Float[Tensor, "P"]
    prior: Float[Tensor, "P"]

    def log_evidence(self, s: Float[Tensor, "k"]) -> Float[Tensor, "k"]:
        """Return log Z(s) − Σ log p(y_i|f_i) at prior precisions sτ, each in O(P)."""
        energy = self.posterior.basis.whitened_theta.square().sum()
        return log_evidence(energy, self.values, self.data, self.prior, s)

    def blocks(
        self, x: Tensor, s: Float[Tensor, "k"], size: int | None = None
    ) -> Iterator[tuple[slice, Iterator[FunctionBlocks]]]:
        """Yield, for blocks of x, the function there at each of the prior precisions sτ; all coordinates are seen."""
        for rows, phi in self.posterior.blocks(x):
            yield rows, self._sweep(phi, s)

    def _sweep(self, phi: JacobianBlock, s: Tensor) -> Iterator[FunctionBlocks]:
        for one in s.tolist():
            w = ((self.data - one * self.prior) / (one + self.values)).unsqueeze(-1)
            w = self.posterior.eigenbasis.back(w).squeeze(-1)
            mean, V = linear(phi, w), self.posterior.eigenbasis.covariance(phi, one)
            if self.posterior.structure.kind == "diagonal":
                yield DiagonalBlocks(mean, V, 0.0, phi=phi, precision=one + self.values, mean_w=w)
            else:
                yield FunctionBlocks(mean, V, 0.0)


def log_evidence(energy: Tensor, b: Tensor, a: Tensor, c: Tensor, s: Float[Tensor, "k"]) -> Float[Tensor, "k"]:
    """Return log Z(s) − Σ log p(y_i|f_i) at prior precisions sτ, by the formula above."""
    s = s.to(b).unsqueeze(-1)
    fit = ((a - s * c).square() / (s + b)).sum(-1)
    return 0.5 * (fit - s.squeeze(-1) * energy - torch.log1p(b / s).sum(-1))
