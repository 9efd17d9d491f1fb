"""Posteriors over a network's weights that are block-diagonal over layers: diagonal, or sums of Kronecker products.

    f(x) = f(x; θ*) + φ(x)w,   w = √τ(θ − θ*) ~ N(0, I),   P = I + B,   B block-diagonal over layers

as for a dense B (`Posterior` on `JacobianBasis.of_weights`), whose verbs these have. What is dropped is said by the
structure: "diagonal" keeps diag(B), exactly. "kronecker" drops the blocks between layers and, within a layer, replaces
Σᵢ gᵢᵀβᵢgᵢ ⊗ aᵢaᵢᵀ over one set of data by the product of its factors (KFAC); sets of data then add without more loss.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from gpytorch.distributions import MultitaskMultivariateNormal
from jaxtyping import Float
from linear_operator import to_linear_operator
from torch import Tensor

from dualgp.checks import check_generator
from dualgp.draws import normal
from dualgp.errors import BasisMismatchError, InputError, NotPositiveDefiniteError, check_count
from dualgp.influence.formulas import Order, Shift
from dualgp.jacobian import JacobianBasis
from dualgp.kernels import JacobianBlock
from dualgp.linalg import symmetrise
from dualgp.nets.eigenbasis import Eigenbasis, linear
from dualgp.nets.factors import Kronecker
from dualgp.nets.layerwise import Structure, StructuredSite, StructuredSum
from dualgp.nets.spectrum import StructuredSpectrum, diagonal_shift
from dualgp.sites import Sites, check_sites_are_finite

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
        _eigenbasis: Eigenbasis | None = None,
    ) -> None:
        if basis.has_residual or not basis.coupled:
            raise InputError("A structured posterior is over all weights: use JacobianBasis.of_weights(...).")
        if site is None:
            site = StructuredSite(torch.zeros(basis.size, dtype=torch.float64, device=basis.device), {})
        if site.lam.shape != (basis.size,):
            raise BasisMismatchError(f"The basis has {basis.size} coordinates, the site {tuple(site.lam.shape)}.")
        self.basis, self.site = basis, site
        self.structure = Structure(structure) if isinstance(structure, str) else structure  # type: ignore[arg-type]
        self.eigenbasis = _eigenbasis or Eigenbasis.of(basis.jacobian, self.structure, site)
        smallest = self.eigenbasis.smallest
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
            covs.append(self.eigenbasis.covariance(phi))
        return torch.cat(means), torch.cat(covs)

    @torch.no_grad()
    def removal_shift(self, x: Tensor, lam: Tensor, B: Tensor, order: Order) -> Shift | None:
        """Return what changes at each datum of x when its own site goes, where the structure holds a diagonal.

        Args:
            x: inputs, n of them.
            lam: λ of their sites, [n, C].
            B: their precisions, [n, C, C].
            order: "removal", or "first" for the derivative in the weight of a datum.
        """
        if self.structure.kind != "diagonal":
            return None
        D, w = 1.0 + self.eigenbasis.values, self.mean_w
        parts = [diagonal_shift(phi, D, w, lam[rows], B[rows], order) for rows, phi in self.blocks(x)]
        return Shift(*(torch.cat(part) for part in zip(*parts, strict=True)))

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
                out[rows, :, columns] = self.eigenbasis.cross(left, right)
        return out

    def predict_joint(self, x: Tensor) -> MultitaskMultivariateNormal:
        """Return the joint Gaussian of f(x), of T · C values. Errors as in `predict`."""
        mean = self.function_blocks(x)[0]
        cov = symmetrise(self.function_cross(x, x).flatten(2).flatten(0, 1))
        # An operator is not factorised before it is asked: equal inputs make it singular.
        return MultitaskMultivariateNormal(mean.to(self.basis.dtype), to_linear_operator(cov.to(self.basis.dtype)))

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
        check_generator(generator)
        lam = self.site.lam
        noise = normal((num_samples, len(lam)), lam, generator).mT
        scale = (1.0 + self.eigenbasis.values).rsqrt().unsqueeze(-1)
        return (self.mean_w.unsqueeze(-1) + self.eigenbasis.back(scale * noise)).mT

    @property
    def mean_w(self) -> Float[Tensor, "P"]:
        """w̄ = P⁻¹λ, in float64."""
        lam = self.site.lam.unsqueeze(-1)
        if not bool(lam.any()):
            return self.site.lam
        scale = 1.0 / (1.0 + self.eigenbasis.values).unsqueeze(-1)
        return self.eigenbasis.back(scale * self.eigenbasis.forward(lam)).squeeze(-1)

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
        same = self.eigenbasis if site.blocks is self.site.blocks else None
        return StructuredPosterior(self.basis, site, self.structure, _eigenbasis=same)

    def rebase(self, basis: JacobianBasis) -> StructuredPosterior:
        """Return this posterior under another prior precision, `basis.with_prior_precision(τ)`; exact.

        With w = √(τ/τ')w': λ ← √(τ/τ')λ, B ← √(τ/τ') B √(τ/τ'). One factor for all of τ costs no eigendecomposition.

        Raises:
            BasisMismatchError: if the basis is of another network.
        """
        if not isinstance(basis, JacobianBasis) or basis.jacobian is not self.basis.jacobian:
            raise BasisMismatchError("The site is on another network; project the data anew.")
        factor = (_tau(self.basis) / _tau(basis)).sqrt().to(self.basis.device)
        lam = basis.jacobian.by_weight(factor) * self.site.lam
        blocks = {key: block.rescaled(factor[list(key)]) for key, block in self.site.blocks.items()}
        uniform = bool((factor == factor[0]).all())
        same = self.eigenbasis.scaled(factor[0] ** 2) if uniform else None
        return StructuredPosterior(basis, StructuredSite(lam, blocks), self.structure, _eigenbasis=same)

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
        return self.eigenbasis.values.log1p().sum()

    def kl(self) -> Tensor:
        """Return KL(q ‖ prior) in nats: ½ [tr P⁻¹ − P + log|P| + |w̄|²]."""
        e = self.eigenbasis.values
        return 0.5 * (e.log1p() - e / (1.0 + e)).sum() + 0.5 * self.mean_w.square().sum()

    def spectrum(self, site: StructuredSite, prior: Float[Tensor, "P"]) -> StructuredSpectrum:
        """Return what predictions and evidence at other prior precisions need, for the site of the data alone.

        Args:
            site: with the precision of this posterior's.
            prior: √τ θ*, or zeros where the prior is centred at the network.
        """
        turned = [self.eigenbasis.forward(v.unsqueeze(-1)).squeeze(-1) for v in (site.lam, prior)]
        return StructuredSpectrum(self, self.eigenbasis.values, *turned)

    def blocks(self, x: Tensor) -> Iterator[tuple[slice, JacobianBlock]]:
        """Yield (data, f and φ = J/√τ by layers) of blocks of x of bounded memory."""
        jacobian = self.basis.jacobian.scaled(_tau(self.basis).rsqrt())
        step = max(_MIN_ROWS, _BLOCK_BYTES // jacobian.row_bytes)
        for start in range(0, len(x), step):
            for rows, phi in jacobian.blocks(x[start : start + step]):
                yield slice(start + rows.start, start + rows.stop), phi

    def check_sites(self, n: int, sites: Sites) -> None:
        """Raise InputError unless the sites are those of n inputs, for this basis."""
        check_sites_are_finite(sites)
        C = self.basis.num_outputs
        if len(sites) != n or not sites.multi_output or sites.lam.shape[-1] != C:
            raise InputError(
                f"{n} inputs and num_outputs={C} need sites of shape [{n}, {C}] with multi_output=True, got "
                f"{tuple(sites.lam.shape)}."
            )


def _tau(basis: JacobianBasis) -> Float[Tensor, "tensors"]:
    """The prior precision of each parameter tensor, in float64."""
    tau = torch.as_tensor(basis.prior_precision, dtype=torch.float64, device="cpu").detach()
    return tau.expand(len(basis.jacobian.shapes))
