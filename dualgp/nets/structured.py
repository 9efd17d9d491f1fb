"""Posteriors over a network's weights that are block-diagonal over layers: diagonal, or sums of Kronecker products.

    f(x) = f(x; θ*) + φ(x)w,   w = √τ(θ − θ*) ~ N(0, I),   P = I + B,   B block-diagonal over layers

as for a dense B (`Posterior` on `JacobianBasis.of_weights`), whose verbs these have. What is dropped is said by the
structure: "diagonal" keeps diag(B), exactly. "kronecker" drops the blocks between layers and, within a layer, replaces
Σᵢ gᵢᵀβᵢgᵢ ⊗ aᵢaᵢᵀ over one set of data by the product of its factors (KFAC); sets of data then add without more loss.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from gpytorch.distributions import MultitaskMultivariateNormal
from jaxtyping import Float
from torch import Tensor

from dualgp.errors import BasisMismatchError, InputError, NotPositiveDefiniteError, UnsupportedError, check_count
from dualgp.jacobian import JacobianBasis
from dualgp.kernels import JacobianBlock
from dualgp.kernels.layers import Layer
from dualgp.linalg import symmetrise
from dualgp.nets.factors import Kronecker, LayerSpectrum
from dualgp.nets.layerwise import Key, Structure, StructuredSite, StructuredSum
from dualgp.nets.spectrum import FunctionBlocks, log_evidence
from dualgp.sites import Sites

Spectra = Mapping[Key, LayerSpectrum | None]
_BLOCK_BYTES, _MIN_ROWS = 16 << 20, 64  # of a block of rows: more is not faster


class StructuredPosterior:
    """q(w) = N(P⁻¹λ, P⁻¹) with P = I + B block-diagonal over layers; verbs and shapes are those of `Posterior`.

    The coordinates are all the weights, so there is no residual. Predictions are taken layer by layer in the
    eigenbasis of B, and no Jacobian is formed. Layers without Kronecker factors have a block of their own:
    normalisation, lone biases and unknown layers a dense one (a diagonal above `dense_limit`), embeddings a diagonal.

    Args:
        basis: `JacobianBasis.of_weights(jacobian, prior_precision)`.
        site: the sum of the data's sites; the prior itself if None.
        structure: "kronecker", "diagonal", or a `Structure` with its options.

    Raises:
        InputError: if the basis is not one of all weights, or the structure unknown.
        BasisMismatchError: if the site is not on this basis.
        NotPositiveDefiniteError: if I + B is not positive definite.

    Source: Ritter et al. 2018 (Kronecker-factored Laplace); Daxberger et al. 2021 (laplace-torch), whose numbers one
    set of data gives with `Structure(separate_bias=True)`.

    Example:
        >>> from dualgp.kernels import NetworkJacobian
        >>> jacobian = NetworkJacobian(torch.nn.Linear(1, 1, bias=False), torch.zeros(2, 1))
        >>> q = StructuredPosterior(JacobianBasis.of_weights(jacobian, prior_precision=4.0))
        >>> q = q.add(torch.ones(1, 1), Sites(torch.zeros(1, 1), torch.full((1, 1), 4.0), multi_output=True))
        >>> q.predict(torch.tensor([[3.0]]))[1]  # x²/(τ + β)
        tensor([[1.1250]])
    """

    def __init__(
        self,
        basis: JacobianBasis,
        site: StructuredSite | None = None,
        structure: Structure | str = "kronecker",
        *,
        _spectra: Spectra | None = None,
    ) -> None:
        if basis.has_residual or not basis.coupled:
            raise InputError("A structured posterior is over all weights: use JacobianBasis.of_weights(...).")
        if site is None:
            site = StructuredSite(torch.zeros(basis.size, dtype=torch.float64, device=basis.device), {})
        if site.lam.shape != (basis.size,):
            raise BasisMismatchError(f"The basis has {basis.size} coordinates, the site {tuple(site.lam.shape)}.")
        self.basis, self.site = basis, site
        self.structure = Structure(structure) if isinstance(structure, str) else structure  # type: ignore[arg-type]
        if _spectra is None:
            _spectra = {key: block.spectrum(self.structure.dense_limit) for key, block in site.blocks.items()}
        self._spectra = _spectra
        smallest = min((float(s.values.min()) for s in _spectra.values() if s is not None), default=0.0)
        if not smallest > -1.0:
            raise NotPositiveDefiniteError(
                f"The posterior precision has smallest eigenvalue {1 + smallest:.3e}; a Gaussian needs it positive. "
                "More was removed than had been added."
            )

    def predict(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance of f(x), each [T, C].

        Raises:
            InputError: if x has the wrong shape.
            UnsupportedError: if a layer holds more terms than can be factorised; see `nearest`.
        """
        mean, cov = self.predict_blocks(x)
        return mean, cov.diagonal(dim1=-2, dim2=-1)

    def predict_blocks(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean [T, C] and covariance between the outputs of each datum [T, C, C]. Errors as in `predict`."""
        mean, cov = self.function_blocks(x)
        return mean.to(self.basis.dtype), cov.to(self.basis.dtype)

    def function_blocks(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean [T, C] and covariance φP⁻¹φᵀ [T, C, C] of each datum in float64. Errors as in `predict`."""
        self.basis.check_inputs(x)
        C, w = self.basis.num_outputs, self.mean_w
        means, covs = [w.new_zeros(0, C)], [w.new_zeros(0, C, C)]
        for _, phi in self.blocks(x):
            means.append(linear(phi, w))
            covs.append(self.covariance(phi))
        return torch.cat(means), torch.cat(covs)

    def double_blocks(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return what `predict_blocks` does, in float64; there is no residual. Errors as in `predict`."""
        return self.function_blocks(x)

    @torch.no_grad()
    def function_cross(self, x: Tensor, z: Tensor) -> Float[Tensor, "n C m C"]:
        """Return the covariance φ(x)P⁻¹φ(z)ᵀ in float64, by explicit Jacobians of a layer at a time.

        Errors as in `predict`.
        """
        self.basis.check_inputs(x)
        self.basis.check_inputs(z)
        C = self.basis.num_outputs
        out = self.site.lam.new_zeros(len(x), C, len(z), C)
        for columns, right in self.blocks(z):
            for rows, left in self.blocks(x):
                pairs = zip(self._layers(left), self._layers(right), strict=True)
                for mine, theirs in pairs:
                    out[rows, :, columns] += self._spectrum(mine.tensors).cross(mine, theirs, 1.0)
        return out

    def predict_joint(self, x: Tensor) -> MultitaskMultivariateNormal:
        """Return the joint Gaussian of f(x), of T · C values. Errors as in `predict`."""
        mean = self.function_blocks(x)[0]
        cov = symmetrise(self.function_cross(x, x).flatten(2).flatten(0, 1))
        return MultitaskMultivariateNormal(mean.to(self.basis.dtype), cov.to(self.basis.dtype))

    def sample(self, x: Tensor, num_samples: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Return joint draws of f(x) = f(x; θ*) + φ(x)w at draws of w, [S, T, C]. Errors as in `predict`."""
        self.basis.check_inputs(x)
        w = self.sample_weights(num_samples, generator=generator).mT
        parts = [w.new_zeros(0, self.basis.num_outputs, num_samples)]
        parts += [phi.f.double().unsqueeze(-1) + phi.matmul(w).double() for _, phi in self.blocks(x)]
        return torch.cat(parts).movedim(-1, 0).to(self.basis.dtype)

    def sample_weights(self, num_samples: int, *, generator: torch.Generator | None = None) -> Float[Tensor, "S P"]:
        """Return draws of w = √τ(θ − θ*) ~ N(w̄, P⁻¹), in float64.

        Raises:
            InputError: if num_samples is no whole number ≥ 1.
            UnsupportedError: as in `predict`.
        """
        check_count("num_samples", num_samples, 1)
        lam = self.site.lam
        noise = torch.randn(num_samples, len(lam), dtype=lam.dtype, device=lam.device, generator=generator).mT
        scale = (1.0 + self.eigenvalues).rsqrt().unsqueeze(-1)
        return (self.mean_w.unsqueeze(-1) + self.from_eigenbasis(scale * noise)).mT

    @property
    def mean_w(self) -> Float[Tensor, "P"]:
        """w̄ = P⁻¹λ, in float64."""
        lam = self.site.lam.unsqueeze(-1)
        if not bool(lam.any()):
            return self.site.lam
        scale = 1.0 / (1.0 + self.eigenvalues).unsqueeze(-1)
        return self.from_eigenbasis(scale * self.to_eigenbasis(lam)).squeeze(-1)

    @torch.no_grad()
    def project(self, x: Tensor, sites: Sites) -> StructuredSite:
        """Return the site on w of one set of data: for Kronecker one term for each layer; see `project_batches`.

        Raises:
            InputError: if x and the sites do not fit the basis or each other.
        """
        return self.project_batches([(x, sites)])

    @torch.no_grad()
    def project_batches(self, batches: Iterable[tuple[Tensor, Sites]]) -> StructuredSite:
        """Return the site on w of one set of data that comes in batches, in any order. Errors as in `project`."""
        total = StructuredSum(self.basis, self.structure)
        for x, sites in batches:
            self.check_sites(self.basis.check_inputs(x), sites)
            sites = sites.to(self.basis.device)
            for rows, phi in self.blocks(x):
                total.add(phi, sites[rows])
        return total.site()

    def add(self, x: Tensor, sites: Sites) -> StructuredPosterior:
        """Return the posterior with the sites of inputs x added, a set of data of its own. Errors as in `project`."""
        return self.with_site(self.site + self.project(x, sites))

    def remove(self, x: Tensor, sites: Sites) -> StructuredPosterior:
        """Return the posterior with the sites of inputs x taken out.

        Exact in the structure: a whole set of data that was added leaves nothing of itself; part of one subtracts its
        own Kronecker product, which the product of the whole need not contain: off by
        [n/N · G_rest − (1 − n/N) · G_gone] ⊗ (A_gone − A_rest), n of N data gone, G = Σgᵀβg and A the mean of aaᵀ.

        Raises:
            NotPositiveDefiniteError: if no Gaussian is left; the message has the smallest eigenvalue.
        """
        return self.with_site(self.site - self.project(x, sites))

    def scale(self, factor: float | int) -> StructuredPosterior:
        """Return the posterior with every site scaled, prior · tᶠ.

        Raises:
            InputError: if the factor is negative or not finite.
        """
        if not (factor >= 0 and factor < float("inf")):
            raise InputError(f"Sites can be scaled by a finite factor ≥ 0, got {factor}.")
        return self.with_site(self.site * factor)

    def temper(self, temperature: float | int) -> StructuredPosterior:
        """Return prior · t^{1/T}: the likelihood at temperature T > 0."""
        if not temperature > 0:
            raise InputError(f"The temperature must be positive, got {temperature}.")
        return self.scale(1.0 / temperature)

    def with_site(self, site: StructuredSite) -> StructuredPosterior:
        """Return the posterior of another site, in the same basis and structure; free if only λ is another."""
        spectra = self._spectra if site.blocks is self.site.blocks else None
        return StructuredPosterior(self.basis, site, self.structure, _spectra=spectra)

    def rebase(self, basis: JacobianBasis) -> StructuredPosterior:
        """Return this posterior under another prior precision, `basis.with_prior_precision(τ)`; exact.

        With w = √(τ/τ')w': λ ← √(τ/τ')λ, B ← √(τ/τ') B √(τ/τ'). One factor for all of τ costs no eigendecomposition.

        Raises:
            BasisMismatchError: if the basis is of another network.
        """
        if not isinstance(basis, JacobianBasis) or basis.jacobian is not self.basis.jacobian:
            raise BasisMismatchError("The site is on another network; project the data anew.")
        factor = (_tau(self.basis) / _tau(basis)).sqrt().to(self.basis.device)
        sizes = torch.tensor([shape.numel() for shape in basis.jacobian.shapes], device=self.basis.device)
        lam = factor.repeat_interleave(sizes) * self.site.lam
        blocks = {key: block.rescaled(factor[list(key)]) for key, block in self.site.blocks.items()}
        uniform = bool((factor == factor[0]).all())
        spectra = {k: s and replace(s, values=s.values * factor[0] ** 2) for k, s in self._spectra.items()}
        site = StructuredSite(lam, blocks)
        return StructuredPosterior(basis, site, self.structure, _spectra=spectra if uniform else None)

    def nearest(self) -> StructuredPosterior:
        """Return an approximation: each layer's sum of Kronecker products replaced by the nearest single one.

        For layers too large to factorise a sum, after `add`. Keep the posterior that this was called on for further
        data, since this one has forgotten which they were.
        """
        near = {k: b.nearest() if isinstance(b, Kronecker) else b for k, b in self.site.blocks.items()}
        return self.with_site(replace(self.site, blocks=near))

    def logdet(self, prior_precision: float | Tensor | None = None) -> Tensor:
        """Return log|I + B| at this or another prior precision τ, in O(P) for one number.

        Errors as in `predict` and `JacobianBasis.with_prior_precision`.
        """
        if prior_precision is not None:
            return self.rebase(self.basis.with_prior_precision(prior_precision)).logdet()
        return self.eigenvalues.log1p().sum()

    def kl(self) -> Tensor:
        """Return KL(q ‖ prior) in nats: ½ [tr P⁻¹ − P + log|P| + |w̄|²]."""
        e = self.eigenvalues
        return 0.5 * (e.log1p() - e / (1.0 + e)).sum() + 0.5 * self.mean_w.square().sum()

    def spectrum(self, site: StructuredSite, prior: Float[Tensor, "P"]) -> StructuredSpectrum:
        """Return what predictions and evidence at other prior precisions need, for the site of the data alone.

        Args:
            site: with the precision of this posterior's.
            prior: √τ θ*, or zeros where the prior is centred at the network.
        """
        turned = [self.to_eigenbasis(v.unsqueeze(-1)).squeeze(-1) for v in (site.lam, prior)]
        return StructuredSpectrum(self, self.eigenvalues, *turned)

    def blocks(self, x: Tensor) -> Iterator[tuple[slice, JacobianBlock]]:
        """Yield (data, f and φ = J/√τ by layers) of blocks of x of bounded memory."""
        jacobian = self.basis.jacobian.scaled(_tau(self.basis).rsqrt())
        step = max(_MIN_ROWS, _BLOCK_BYTES // jacobian.row_bytes)
        for start in range(0, len(x), step):
            for rows, phi in jacobian.blocks(x[start : start + step]):
                yield slice(start + rows.start, start + rows.stop), phi

    @property
    def eigenvalues(self) -> Float[Tensor, "P"]:
        """Those of B, in the order of `to_eigenbasis`; 0 where data have said nothing."""
        out = torch.zeros_like(self.site.lam).unsqueeze(-1)
        for key in self._spectra:
            self._put(out, key, self._spectrum(key).values.unsqueeze(-1))
        return out.squeeze(-1)

    def to_eigenbasis(self, v: Float[Tensor, "P r"]) -> Float[Tensor, "P r"]:
        """Return Qᵀv, with B = Q diag(eigenvalues) Qᵀ."""
        out = v.clone()
        for key in self._spectra:
            self._put(out, key, self._spectrum(key).forward(self._take(v, key)))
        return out

    def from_eigenbasis(self, v: Float[Tensor, "P r"]) -> Float[Tensor, "P r"]:
        """Return Qv."""
        out = v.clone()
        for key in self._spectra:
            self._put(out, key, self._spectrum(key).back(self._take(v, key)))
        return out

    @torch.no_grad()
    def covariance(self, phi: JacobianBlock, scale: float = 1.0) -> Float[Tensor, "n C C"]:
        """Return φ(scale · I + B)⁻¹φᵀ of each row, in float64."""
        layers = self._layers(phi)
        return torch.stack([self._spectrum(layer.tensors).quad(layer, scale) for layer in layers]).sum(0).double()

    def _layers(self, phi: JacobianBlock) -> list[Layer]:
        layers = list(self.structure.layers(phi))
        unknown = set(self._spectra) - {layer.tensors for layer in layers}
        if unknown:
            raise BasisMismatchError(
                f"The site has blocks of the tensors {sorted(unknown)}, which are no layers of the structure "
                f"{self.structure}: it was made for another one."
            )
        return layers

    def _spectrum(self, key: Key) -> LayerSpectrum:
        spectrum = self._spectra.get(key, LayerSpectrum())
        if spectrum is None:
            names = [self.basis.jacobian.names[t] for t in key]
            raise UnsupportedError(
                f"The curvature of {names} is a sum of Kronecker products of several sets of data, which has no "
                f"factors, and it has more than dense_limit = {self.structure.dense_limit} parameters. Take the "
                "nearest single product with nearest(), an approximation; raise dense_limit; or project all data as "
                "one set."
            )
        return spectrum

    def _take(self, v: Tensor, key: Key) -> Tensor:
        return torch.cat([v[self.basis.jacobian.slices[t]] for t in key])

    def _put(self, out: Tensor, key: Key, values: Tensor) -> None:
        slices = [self.basis.jacobian.slices[t] for t in key]
        for at, piece in zip(slices, values.split([s.stop - s.start for s in slices]), strict=True):
            out[at] = piece

    def check_sites(self, n: int, sites: Sites) -> None:
        """Raise InputError unless the sites are those of n inputs, for this basis."""
        C = self.basis.num_outputs
        if len(sites) != n or not sites.multi_output or sites.lam.shape[-1] != C:
            raise InputError(
                f"{n} inputs and num_outputs={C} need sites of shape [{n}, {C}] with multi_output=True, got "
                f"{tuple(sites.lam.shape)}."
            )


@dataclass(frozen=True, eq=False)
class StructuredSpectrum:
    """The site of the data in its eigenbasis, on all weights; see `dualgp.nets.spectrum.Spectrum`.

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
            mean = linear(phi, self.posterior.from_eigenbasis(w).squeeze(-1))
            yield FunctionBlocks(mean, self.posterior.covariance(phi, one), 0.0)


def linear(phi: JacobianBlock, w: Float[Tensor, "P"]) -> Float[Tensor, "n C"]:
    """Return f(x; θ*) + φw in float64."""
    f = phi.f.double()
    return f + phi.matmul(w.unsqueeze(-1)).squeeze(-1).double() if bool(w.any()) else f


def _tau(basis: JacobianBasis) -> Float[Tensor, "tensors"]:
    """The prior precision of each parameter tensor, in float64."""
    tau = torch.as_tensor(basis.prior_precision, dtype=torch.float64).detach().cpu()
    return tau.expand(len(basis.jacobian.shapes))
