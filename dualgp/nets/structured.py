"""Posteriors over the weights of a network that are block-diagonal over layers: diagonal, or sums of Kronecker products.

    f(x) = f(x; θ*) + φ(x)w,   w = √τ(θ − θ*) ~ N(0, I),   P = I + B,   B block-diagonal over layers

as for a dense B (`Posterior` on `JacobianBasis.of_weights`), whose verbs these have. What is dropped is said by the
structure: "diagonal" keeps diag(B), exactly. "kronecker" drops the blocks between layers and, within a layer, replaces
Σᵢ aᵢaᵢᵀ ⊗ gᵢβᵢgᵢᵀ over one set of data by its factors' product (KFAC); sets of data then add without further loss.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from gpytorch.distributions import MultitaskMultivariateNormal
from jaxtyping import Float
from torch import Tensor

from dualgp.errors import BasisMismatchError, InputError, NotPositiveDefiniteError, UnsupportedError
from dualgp.jacobian import JacobianBasis
from dualgp.kernels import JacobianBlock
from dualgp.kernels.layers import FactoredLayer, Layer
from dualgp.linalg import symmetrise
from dualgp.nets.factors import Curvature, Kronecker, Moments, Spectrum, curvature, kind_of, moments, split_bias
from dualgp.sites import Sites

Structure: TypeAlias = Literal["diagonal", "kronecker"]
Key: TypeAlias = tuple[int, ...]  # the parameter tensors of a layer


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


class StructuredPosterior:
    """q(w) = N(P⁻¹λ, P⁻¹) with P = I + B block-diagonal over layers; verbs and shapes are those of `Posterior`.

    The coordinates are all the weights, so there is no residual. Predictions are taken layer by layer in the
    eigenbasis of B, and no Jacobian is formed. Layers without Kronecker factors have a block of their own: normalisation,
    lone biases and unknown layers a dense one (a diagonal above `dense_limit`), embeddings a diagonal.

    Args:
        basis: `JacobianBasis.of_weights(jacobian, prior_precision)`.
        site: the sum of the data's sites; the prior itself if None.
        structure: "kronecker" or "diagonal".
        separate_bias: also drop the block between weight and bias of a layer, as laplace-torch does.
        dense_limit: parameters of a layer up to which a dense eigendecomposition is taken where factors do not do:
            where several sets of data have been added, and where a layer has none.

    Raises:
        InputError: if the basis is not one of all weights, or the structure unknown.
        BasisMismatchError: if the site is not on this basis.
        NotPositiveDefiniteError: if I + B is not positive definite.

    Source: Ritter et al. 2018 (Kronecker-factored Laplace); Daxberger et al. 2021 (laplace-torch), whose numbers one
    set of data gives with `separate_bias=True`.

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
        *,
        structure: Structure = "kronecker",
        separate_bias: bool = False,
        dense_limit: int = 3000,
        _spectra: Mapping[Key, Spectrum | None] | None = None,
    ) -> None:
        if basis.has_residual or not basis.coupled:
            raise InputError("A structured posterior is over all weights: use JacobianBasis.of_weights(...).")
        if structure not in ("diagonal", "kronecker"):
            raise InputError(f"structure must be 'diagonal' or 'kronecker', got {structure!r}.")
        if site is None:
            site = StructuredSite(torch.zeros(basis.size, dtype=torch.float64, device=basis.device), {})
        if site.lam.shape != (basis.size,):
            raise BasisMismatchError(f"The basis has {basis.size} coordinates, the site {tuple(site.lam.shape)}.")
        self.basis, self.site, self.structure = basis, site, structure
        self.separate_bias, self.dense_limit = separate_bias, dense_limit
        self._phi = basis.jacobian.scaled(_tau(basis).rsqrt())  # φ = J/√τ
        if _spectra is None:
            _spectra = {key: block.spectrum(dense_limit) for key, block in site.blocks.items()}
        self._spectra = _spectra
        smallest = min((float(s.values.min()) for s in _spectra.values() if s is not None), default=0.0)
        if not smallest > -1.0:
            raise NotPositiveDefiniteError(
                f"The posterior precision has smallest eigenvalue {1 + smallest:.3e}; a Gaussian needs it positive. "
                "More was removed than had been added."
            )

    # ---- predictions

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

    @torch.no_grad()
    def function_blocks(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean [T, C] and covariance φP⁻¹φᵀ [T, C, C] of each datum in float64. Errors as in `predict`."""
        self.basis.check_inputs(x)
        variances = {key: self._variance(key) for key in self._spectra}
        C, w = self.basis.num_outputs, self.mean_w.unsqueeze(-1)
        means, covs = [self.site.lam.new_zeros(0, C)], [self.site.lam.new_zeros(0, C, C)]
        for _, block in self._phi.blocks(x):
            parts = [
                self._spectrum(layer.tensors).quad(layer, variances[layer.tensors])
                if layer.tensors in variances
                else layer.quad()
                for layer in self._layers(block)
            ]
            covs.append(torch.stack(parts).sum(0).double())
            means.append(block.f.double() + block.matmul(w).squeeze(-1).double())
        return torch.cat(means), torch.cat(covs)

    @torch.no_grad()
    def function_cross(self, x: Tensor, z: Tensor) -> Float[Tensor, "n C m C"]:
        """Return the covariance φ(x)P⁻¹φ(z)ᵀ in float64, by explicit Jacobians of a layer at a time.

        Errors as in `predict`.
        """
        self.basis.check_inputs(x)
        self.basis.check_inputs(z)
        C = self.basis.num_outputs
        out = self.site.lam.new_zeros(len(x), C, len(z), C)
        for columns, right in self._phi.blocks(z):
            for rows, left in self._phi.blocks(x):
                for mine, theirs in zip(self._layers(left), self._layers(right), strict=True):
                    key = mine.tensors
                    if key in self._spectra:
                        block = self._spectrum(key).cross(mine, theirs, self._variance(key))
                    else:
                        block = left.f.new_zeros(len(left), C, len(right), C)
                        mine.add_gram(block, theirs)  # type: ignore[arg-type]
                    out[rows, :, columns] += block
        return out

    def predict_joint(self, x: Tensor) -> MultitaskMultivariateNormal:
        """Return the joint Gaussian of f(x), of T · C values. Errors as in `predict`."""
        mean = self.function_blocks(x)[0]
        cov = symmetrise(self.function_cross(x, x).flatten(2).flatten(0, 1))
        return MultitaskMultivariateNormal(mean.to(self.basis.dtype), cov.to(self.basis.dtype))

    @torch.no_grad()
    def sample(self, x: Tensor, num_samples: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Return joint draws of f(x) = f(x; θ*) + φ(x)w at draws of w, [S, T, C]. Errors as in `predict`."""
        self.basis.check_inputs(x)
        w = self.sample_weights(num_samples, generator=generator).mT  # [P, S]
        parts = [w.new_zeros(0, self.basis.num_outputs, num_samples)]
        parts += [block.f.double().unsqueeze(-1) + block.matmul(w).double() for _, block in self._phi.blocks(x)]
        return torch.cat(parts).movedim(-1, 0).to(self.basis.dtype)

    def sample_weights(self, num_samples: int, *, generator: torch.Generator | None = None) -> Float[Tensor, "S P"]:
        """Return draws of w = √τ(θ − θ*) ~ N(w̄, P⁻¹), in float64. Errors as in `predict`."""
        lam = self.site.lam
        noise = torch.randn(num_samples, len(lam), dtype=lam.dtype, device=lam.device, generator=generator).mT
        return (self.mean_w.unsqueeze(-1) + self._apply(noise, -0.5)).mT

    @property
    def mean_w(self) -> Float[Tensor, "P"]:
        """w̄ = P⁻¹λ, in float64."""
        return self._apply(self.site.lam.unsqueeze(-1), -1.0).squeeze(-1)

    # ---- the algebra of sites

    def project(self, x: Tensor, sites: Sites) -> StructuredSite:
        """Return the site on w of one set of data: for Kronecker one term for each layer; see `project_batches`.

        Raises:
            InputError: if x and the sites do not fit the basis or each other.
        """
        return self.project_batches([(x, sites)])

    @torch.no_grad()
    def project_batches(self, batches: Iterable[tuple[Tensor, Sites]]) -> StructuredSite:
        """Return the site on w of one set of data that comes in batches, whose order does not matter.

            λ = Σ φᵢᵀαᵢ,   B of a layer = (Σᵢ gᵢᵀβᵢgᵢ) ⊗ (1/(NS) Σ aᵢaᵢᵀ),   or Σᵢ φᵢᵀβᵢφᵢ, or the diagonal of that

        Raises:
            InputError: if a batch does not fit the basis or its sites.
        """
        lam = torch.zeros_like(self.site.lam)
        sums: dict[Key, Moments] = {}
        made: dict[Key, tuple[type[Curvature], tuple[int, ...], bool]] = {}
        for x, sites in batches:
            self._check_sites(self.basis.check_inputs(x), sites)
            sites = sites.to(self.basis.device)
            for rows, block in self._phi.blocks(x):
                at = sites[rows]
                lam += block.rmatmul(at.alpha(block.f.double()).unsqueeze(-1)).squeeze(-1)
                for layer in self._layers(block):
                    key, kind = layer.tensors, kind_of(layer, self.structure, self.dense_limit)
                    new = moments(kind, layer, at)
                    sums[key] = tuple(map(torch.add, sums[key], new)) if key in sums else new
                    sizes = tuple(self.basis.jacobian.shapes[t].numel() for t in key)
                    made[key] = kind, sizes, isinstance(layer, FactoredLayer) and layer.bias
        blocks = {key: curvature(kind, sums[key], sizes, bias) for key, (kind, sizes, bias) in made.items()}
        return StructuredSite(lam, blocks)

    def add(self, x: Tensor, sites: Sites) -> StructuredPosterior:
        """Return the posterior with the sites of inputs x added, a set of data of its own. Errors as in `project`."""
        return self._with(self.site + self.project(x, sites))

    def remove(self, x: Tensor, sites: Sites) -> StructuredPosterior:
        """Return the posterior with the sites of inputs x taken out.

        Exact in the structure: a whole set of data that was added leaves nothing of itself; part of one subtracts its
        own Kronecker product, which the product of the whole need not contain.

        Raises:
            NotPositiveDefiniteError: if no Gaussian is left; the message has the smallest eigenvalue.
        """
        return self._with(self.site - self.project(x, sites))

    def scale(self, factor: float | int) -> StructuredPosterior:
        """Return the posterior with every site scaled, prior · tᶠ.

        Raises:
            InputError: if the factor is negative or not finite.
        """
        if not (factor >= 0 and factor < float("inf")):
            raise InputError(f"Sites can be scaled by a finite factor ≥ 0, got {factor}.")
        return self._with(self.site * factor)

    def temper(self, temperature: float | int) -> StructuredPosterior:
        """Return prior · t^{1/T}: the likelihood at temperature T > 0."""
        if not temperature > 0:
            raise InputError(f"The temperature must be positive, got {temperature}.")
        return self.scale(1.0 / temperature)

    def shift(self, lam: Float[Tensor, "P"]) -> StructuredPosterior:
        """Return the posterior times a linear site exp(λᵀw): another centre, the same covariance."""
        site = replace(self.site, lam=self.site.lam + lam.to(self.site.lam))
        return self._with(site, spectra=self._spectra)

    def rebase(self, basis: JacobianBasis) -> StructuredPosterior:
        """Return this posterior under another prior precision, `basis.with_prior_precision(τ)`; exact.

        With w = √(τ/τ')w': λ ← √(τ/τ')λ, B ← √(τ/τ') B √(τ/τ'). One factor for all of τ costs no eigendecomposition.

        Raises:
            BasisMismatchError: if the basis is of another network.
        """
        if not isinstance(basis, JacobianBasis) or basis.jacobian is not self.basis.jacobian:
            raise BasisMismatchError("The site is on another network; project the data anew.")
        factor = (_tau(self.basis) / _tau(basis)).sqrt()
        sizes = torch.tensor([shape.numel() for shape in basis.jacobian.shapes])
        lam = factor.repeat_interleave(sizes).to(self.site.lam) * self.site.lam
        device = self.site.lam.device
        blocks = {key: block.rescaled(factor[list(key)].to(device)) for key, block in self.site.blocks.items()}
        uniform = bool((factor == factor[0]).all())
        spectra = {k: s and replace(s, values=s.values * float(factor[0]) ** 2) for k, s in self._spectra.items()}
        return self._with(StructuredSite(lam, blocks), basis, spectra if uniform else None)

    def nearest(self) -> StructuredPosterior:
        """Return an approximation: each layer's sum of Kronecker products replaced by the nearest single one.

        For layers too large to factorise a sum, after `add`. Keep the posterior that this was called on for further
        data, since this one has forgotten which they were.
        """
        near = {k: b.nearest() if isinstance(b, Kronecker) else b for k, b in self.site.blocks.items()}
        return self._with(replace(self.site, blocks=near))

    # ---- evidence

    def logdet(self, prior_precision: float | Tensor | None = None) -> Tensor:
        """Return log|I + B| at this or another prior precision τ, in O(P) for one number.

        Errors as in `predict` and `JacobianBasis.with_prior_precision`.
        """
        if prior_precision is not None:
            return self.rebase(self.basis.with_prior_precision(prior_precision)).logdet()
        logs = [self._spectrum(key).values.log1p().sum() for key in self._spectra]
        return torch.stack(logs).sum() if logs else self.site.lam.new_zeros(())

    def kl(self) -> Tensor:
        """Return KL(q ‖ prior) in nats: ½ [tr P⁻¹ − P + log|P| + |w̄|²]."""
        traces = [(self._variance(key) - 1.0).sum() for key in self._spectra]
        return 0.5 * (sum(traces, self.logdet()) + self.mean_w.square().sum())

    def _with(
        self,
        site: StructuredSite,
        basis: JacobianBasis | None = None,
        spectra: Mapping[Key, Spectrum | None] | None = None,
    ) -> StructuredPosterior:
        return StructuredPosterior(
            basis or self.basis,
            site,
            structure=self.structure,
            separate_bias=self.separate_bias,
            dense_limit=self.dense_limit,
            _spectra=spectra,
        )

    def _layers(self, block: JacobianBlock) -> Iterator[Layer]:
        for layer in block.layers:
            yield from split_bias(layer) if self.separate_bias else (layer,)

    def _spectrum(self, key: Key) -> Spectrum:
        spectrum = self._spectra[key]
        if spectrum is None:
            names = [self.basis.jacobian.names[t] for t in key]
            raise UnsupportedError(
                f"The curvature of {names} is a sum of Kronecker products of several sets of data, which has no "
                f"factors, and it has more than dense_limit = {self.dense_limit} parameters. Take the nearest single "
                "product with q.nearest(), an approximation; raise dense_limit; or project all data as one set."
            )
        return spectrum

    def _variance(self, key: Key) -> Tensor:
        return 1.0 / (1.0 + self._spectrum(key).values)

    def _apply(self, v: Float[Tensor, "P r"], power: float) -> Float[Tensor, "P r"]:
        """Return Pᵖ v for p = −1, and the root of it by Q for p = −½."""
        out = v.clone()
        for key in self._spectra:
            spectrum, slices = self._spectrum(key), [self.basis.jacobian.slices[t] for t in key]
            mine = torch.cat([v[s] for s in slices])
            scale = (1.0 + spectrum.values).pow(power).unsqueeze(-1)
            mine = spectrum.back(scale * (mine if power == -0.5 else spectrum.forward(mine)))
            for s, piece in zip(slices, mine.split([s.stop - s.start for s in slices]), strict=True):
                out[s] = piece
        return out

    def _check_sites(self, n: int, sites: Sites) -> None:
        C = self.basis.num_outputs
        if len(sites) != n or not sites.multi_output or sites.lam.shape[-1] != C:
            raise InputError(
                f"{n} inputs and num_outputs={C} need sites of shape [{n}, {C}] with multi_output=True, got "
                f"{tuple(sites.lam.shape)}."
            )


def _tau(basis: JacobianBasis) -> Tensor:
    """The prior precision of each parameter tensor, in float64."""
    tau = torch.as_tensor(basis.prior_precision, dtype=torch.float64).detach().cpu()
    return tau.expand(len(basis.jacobian.shapes))
