"""The waist: a posterior is a prior plus sites, in the coordinates of a basis."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic

import torch
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from jaxtyping import Float
from linear_operator import to_linear_operator
from torch import Tensor

from dualgp.basis import Basis, Features, InducingBasis, SiteSum
from dualgp.checks import check_generator, check_number
from dualgp.draws import normal
from dualgp.errors import BasisMismatchError, InputError, check_count
from dualgp.linalg import logdet, mul_lower, precision_cholesky, squared_norms, symmetrise, tri_inverse
from dualgp.sites import Site, Sites, check_sites_are_finite

if TYPE_CHECKING:
    from typing_extensions import TypeVar

    BasisT = TypeVar("BasisT", bound=Basis, covariant=True, default=InducingBasis)
else:  # a check at run time may take a default for a bound
    from typing import TypeVar

    BasisT = TypeVar("BasisT", bound=Basis, covariant=True)
NewT = TypeVar("NewT", bound=Basis)


class Posterior(Generic[BasisT]):
    """q(w) = N(P⁻¹λ, P⁻¹) with P = I + B: the standard normal prior of a basis, times the site (λ, B).

    A value: every verb (`add`, `remove`, `scale`, `temper`, `rebase`) returns a new posterior and leaves this one as
    it was. All M × M work is float64; predictions come back in the dtype of the basis. With outputs, per-datum
    quantities have shape [..., T, C]; without, [..., T]. Inputs are x [*batch, T, D] for a process, in
    the dtype and on the device of the basis, and [T, *input_shape] for a network.

    Args:
        basis: the coordinates: `InducingBasis` or `JacobianBasis`.
        site: the sum of the data's sites on w; the prior itself if None.

    Raises:
        BasisMismatchError: if the site is not on this basis.
        NotPositiveDefiniteError: if I + B is not positive definite.

    Source: Adam et al. 2021, eq. 12; whitened form in the package's notation page.

    Example:
        >>> from gpytorch.kernels import RBFKernel
        >>> q = Posterior(InducingBasis(RBFKernel(), torch.zeros(1, 1)))
        >>> q = q.add(torch.zeros(1, 1), Sites(torch.tensor([1.0]), torch.tensor([1.0])))
        >>> [round(v.item(), 3) for v in q.predict(torch.zeros(1, 1))]  # half way to the datum, half the variance
        [0.5, 0.5]
    """

    def __init__(self, basis: BasisT, site: Site | None = None) -> None:
        is_prior = site is None
        if site is None:
            site = Site.zero(basis.batch_shape, basis.size, basis.device)
        if site.lam.shape != (*basis.batch_shape, basis.size):
            raise BasisMismatchError(
                f"The basis has coordinates {(*basis.batch_shape, basis.size)}, the site "
                f"{tuple(site.lam.shape)}. Use site.pull_back to carry it over."
            )
        self.basis = basis
        self.site = site
        self._is_prior = is_prior
        chol = precision_cholesky(self.precision)
        self.mean_w = torch.cholesky_solve(site.lam.unsqueeze(-1), chol).squeeze(-1)  # w̄ = P⁻¹λ
        self._logdet = logdet(chol)  # log|P|
        self.chol_inv = tri_inverse(chol)  # C⁻¹ with P = CCᵀ, so that φᵀP⁻¹φ = |C⁻¹φ|²

    @property
    def precision(self) -> Tensor:
        """P = I + B, [*batch, M, M]."""
        return self.site.B + torch.eye(self.basis.size, dtype=torch.float64, device=self.basis.device)

    def predict(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance of f(x), each [*batch, T] or [*batch, T, C], in blocks of bounded memory.

        mean = μ + φᵀw̄,  var = r + φᵀP⁻¹φ.  Differentiable in x, of a process.

        Raises:
            InputError: if x has the wrong shape, dtype or device.
        """
        self.basis.check_inputs(x)
        means, variances = [], []
        for _, features in self.basis.blocks(x):
            mean, var = self.marginals(features)
            means.append(mean)
            variances.append(var)
        if not means:
            means = variances = [self.mean_w.new_zeros((*self.basis.batch_shape, 0))]
        return self._present(means), self._present(variances)

    def predict_blocks(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean [*batch, T, C] and covariance between the outputs of each datum [*batch, T, C, C].

        C = 1 without outputs; diagonal where outputs are independent.

        Raises:
            InputError: if x has the wrong shape, dtype or device.
        """
        mean, cov = self.double_blocks(x)
        return mean.to(self.basis.dtype), cov.to(self.basis.dtype)

    def function_blocks(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean [*batch, T, C] and parametric covariance φP⁻¹φᵀ [*batch, T, C, C] of each datum, in float64.

        That part of the covariance which sites can change: no residual. Shapes as in `predict_blocks`.

        Raises:
            InputError: if x has the wrong shape, dtype or device.
        """
        return self.double_blocks(x, residual=False)

    def function_cross(self, x: Tensor, z: Tensor) -> Tensor:
        """Return the parametric covariance φ(x)P⁻¹φ(z)ᵀ, [*batch, T, C, T', C], in float64.

        Raises:
            InputError: if x or z has the wrong shape, dtype or device.
        """
        cross = self.halves(x) @ self.halves(z).mT
        C = self.basis.num_outputs
        if self.basis.coupled:
            return cross.unflatten(-1, (-1, C)).unflatten(0, (-1, C))
        if C is None:
            return cross.unsqueeze(-2).unsqueeze(-1)
        return torch.diag_embed(cross.movedim(-3, -1)).movedim(-2, -3)

    def _half(self, phi: Tensor) -> Tensor:
        """C⁻¹φ by rows, so that φP⁻¹φᵀ is a product of two; float64."""
        return mul_lower(phi, self.chol_inv, transpose=True).double()

    def halves(self, x: Tensor) -> Tensor:
        """Return C⁻¹φ(x) by rows in float64, [*b, T, M], whose products are the parametric covariances φP⁻¹φᵀ.

        Raises:
            InputError: if x has the wrong shape, dtype or device.
        """
        self.basis.check_inputs(x)
        parts = [self._half(features.phi) for _, features in self.basis.blocks(x)]
        return torch.cat(parts, -2) if parts else self.chol_inv[..., :0, :]

    def double_blocks(self, x: Tensor, *, residual: bool = True) -> tuple[Tensor, Tensor]:
        """Return what `predict_blocks` does, in float64: differences between outputs lose nothing to its rounding."""
        basis = self.basis
        basis.check_inputs(x)
        means, covs = [], []
        for _, features in basis.blocks(x):
            if basis.coupled:
                half = self._half(features.phi).unflatten(0, (-1, basis.num_outputs))
                cov = half @ half.mT
                block = features.residual_block if residual else None
                cov = cov if block is None else cov + block
            else:
                var = self.parametric_variance(features.phi) + (features.residual if residual else 0.0)
                cov = torch.diag_embed(self._with_outputs(var))
            means.append(self._with_outputs(self._mean(features)))
            covs.append(cov)
        if not means:
            none = self._with_outputs(self.mean_w.new_zeros((*basis.batch_shape, 0)))
            means, covs = [none], [torch.diag_embed(none)]
        return torch.cat(means, -2), torch.cat(covs, -3)

    def marginals(self, features: Features) -> tuple[Tensor, Tensor]:
        """Return float64 mean and variance, data last, at given features (see `InducingBasis.features`)."""
        phi = features.phi
        if self._is_prior:  # w̄ = 0 and φᵀP⁻¹φ = φᵀφ: no product to take
            shape = (*self.basis.batch_shape, phi.shape[-2])
            return features.prior_mean.expand(shape), features.prior_var.expand(shape)
        return self._mean(features), features.residual + self.parametric_variance(phi)

    def _mean(self, features: Features) -> Tensor:
        """μ + φᵀw̄ in float64, data last."""
        phi = features.phi
        return features.prior_mean + (phi @ self.mean_w.to(phi.dtype).unsqueeze(-1)).squeeze(-1)

    def parametric_variance(self, phi: Tensor) -> Tensor:
        """Return φᵀP⁻¹φ in float64, data last: the part of the variance that sites can change."""
        chol_inv = self.chol_inv
        if phi.ndim == 2 and chol_inv.ndim > 2:
            flat = [squared_norms(phi, c) for c in chol_inv.reshape(-1, *chol_inv.shape[-2:])]
            return torch.stack(flat).reshape(*chol_inv.shape[:-2], -1)
        return squared_norms(phi, chol_inv)

    def predict_joint(self, x: Tensor) -> MultivariateNormal:
        """Return the joint Gaussian of f(x): a MultivariateNormal, or a MultitaskMultivariateNormal for C outputs.

        cov = k(x, x) − φφᵀ + φP⁻¹φᵀ. Takes T² numbers; `predict` is the way to marginals.

        Raises:
            InputError: if x has the wrong shape, dtype or device.
        """
        mean, cov = self.joint(x)
        dtype = self.basis.dtype
        covariance = to_linear_operator(cov.to(dtype))
        if self.basis.coupled:
            return MultitaskMultivariateNormal(self.by_output(mean).to(dtype), covariance)
        joint = MultivariateNormal(mean.to(dtype), covariance)
        return joint if self.basis.num_outputs is None else MultitaskMultivariateNormal.from_batch_mvn(joint)

    def joint(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean [*b, T] and covariance [*b, T, T] of f(x) in float64, outputs (if any) before the data.

        Coupled outputs are rows beside the data, data first: [T · C] and [T · C, T · C].
        """
        basis = self.basis
        basis.check_inputs(x)
        features = basis.features(x)
        phi = features.phi.double()
        mean = features.prior_mean + (phi @ self.mean_w.unsqueeze(-1)).squeeze(-1)
        half = phi @ self.chol_inv.mT
        cov = symmetrise(basis.residual_covariance(x, phi) + half @ half.mT)
        return mean.expand(cov.shape[:-1]), cov

    def sample(self, x: Tensor, num_samples: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Return joint draws of f(x), shape [S, *batch, T] or [S, *batch, T, C].

        Drawn by an eigendecomposition, since the covariance of close inputs is singular to rounding; no jitter. A
        basis without residual is drawn from in w, in blocks of x.

        Args:
            x: inputs, as in `predict`.
            num_samples: S ≥ 1.
            generator: source of randomness; torch's default one otherwise.

        Raises:
            InputError: if x has the wrong shape, dtype or device, or num_samples is no whole number ≥ 1.
        """
        check_count("num_samples", num_samples, 1)
        check_generator(generator)
        if not self.basis.has_residual:
            return self._sample_weights(x, num_samples, generator)
        joint = self.predict_joint(x)
        if isinstance(joint, MultitaskMultivariateNormal):
            cov = joint.covariance_matrix.double()
            mean = joint.mean.double().reshape(*joint.mean.shape[:-2], -1)
        else:
            cov, mean = joint.covariance_matrix.double(), joint.mean.double()
        values, vectors = torch.linalg.eigh(cov)
        root = vectors * values.clamp_min(0).sqrt().unsqueeze(-2)
        noise = normal((num_samples, *mean.shape), mean, generator)
        draws = mean + (root @ noise.unsqueeze(-1)).squeeze(-1)
        return draws.reshape(num_samples, *joint.mean.shape).to(self.basis.dtype)

    def _sample_weights(self, x: Tensor, num_samples: int, generator: torch.Generator | None) -> Tensor:
        """Draws of f = μ + φw at one draw of w for all x: w = w̄ + C⁻ᵀε, of covariance P⁻¹."""
        self.basis.check_inputs(x)
        shape = (num_samples, *self.mean_w.shape)
        noise = normal(shape, self.mean_w, generator)
        w = self.mean_w + (noise.unsqueeze(-2) @ self.chol_inv).squeeze(-2)
        parts = [noise.new_zeros(*shape[:-1], 0)]
        for _, features in self.basis.blocks(x):
            drawn = (features.phi @ w.to(features.phi.dtype).unsqueeze(-1)).squeeze(-1)
            parts.append(features.prior_mean + drawn)
        return self._present(parts)

    def project(self, x: Tensor, sites: Sites) -> Site:
        """Return the site on w that per-datum `sites` at inputs x make: Σᵢ φᵢᵀ(λᵢ − βᵢμᵢ), Σᵢ φᵢᵀβᵢφᵢ, in blocks.

        Coupled sites make B = Σᵢ (Rᵢᵀφᵢ)ᵀ(Rᵢᵀφᵢ), with RᵢRᵢᵀ = βᵢ: positive semi-definite by construction.

        Raises:
            InputError: if x and the sites do not fit the basis or each other.
        """
        self.check_sites(self.basis.check_inputs(x), sites)
        if isinstance(self.basis, InducingBasis) and x.ndim - 2 > len(self.basis.batch_shape):
            raise InputError(f"x has shape {tuple(x.shape)}, the posterior no more than {self.basis.batch_shape}.")
        sites = sites.to(self.basis.device)
        total = SiteSum(self.basis)
        if self.basis.coupled:
            for rows, features in self.basis.blocks(x):
                total.add_coupled(features, sites[rows])
            return total.site()
        lam, beta = sites.by_latent()
        for rows, features in self.basis.blocks(x):
            total.add(features, lam[..., rows], beta[..., rows])
        return total.site()

    def check_sites(self, n: int, sites: Sites) -> None:
        """Raise InputError unless the sites are those of n inputs, for this basis."""
        check_sites_are_finite(sites)
        C = self.basis.num_outputs
        fits = sites.multi_output == (C is not None) and (C is None or sites.lam.shape[-1] == C)
        if len(sites) != n or not fits:
            raise InputError(
                f"{n} inputs and num_outputs={C} need sites to match, got sites of shape {tuple(sites.lam.shape)} "
                f"(multi_output={sites.multi_output})."
            )
        if sites.coupled and not self.basis.coupled:
            raise InputError(
                "Coupled sites need a basis whose outputs are coupled, and those of this one are independent; take "
                "the diagonal with sites.decoupled(mean), or a basis with outputs='coupled'."
            )

    def add(self, x: Tensor, sites: Sites) -> Posterior[BasisT]:
        """Return the posterior with the sites of inputs x added. Errors as in `project`."""
        return Posterior(self.basis, self.site + self.project(x, sites))

    def remove(self, x: Tensor, sites: Sites) -> Posterior[BasisT]:
        """Return the posterior with the sites of inputs x taken out: the posterior without those data.

        Raises:
            NotPositiveDefiniteError: if no Gaussian is left; the message has the smallest eigenvalue.
        """
        return Posterior(self.basis, self.site - self.project(x, sites))

    def scale(self, factor: float | int) -> Posterior[BasisT]:
        """Return the posterior with every site scaled, prior · tᶠ: forgetting for factor < 1.

        Raises:
            InputError: if the factor is negative or not finite.
        """
        check_number("The factor by which sites are scaled", factor, least=0)
        return Posterior(self.basis, factor * self.site)

    def temper(self, temperature: float | int) -> Posterior[BasisT]:
        """Return prior · t^{1/T}: the likelihood at temperature T > 0 (see `scale`)."""
        check_number("The temperature", temperature, above=0)
        return self.scale(1.0 / temperature)

    def rebase(self, basis: NewT) -> Posterior[NewT]:
        """Return this posterior's site pulled back to another basis: Z moved, or hyperparameters changed.

        Raises:
            BasisMismatchError: see `InducingBasis.change_to` and `JacobianBasis.carry`.
        """
        return Posterior(basis, self.basis.carry(self.site, basis))

    def kl(self) -> Float[Tensor, "*b"]:
        """Return KL(q ‖ prior), summed over outputs, in nats.

        ½ [tr P⁻¹ − M + log|P| + |w̄|²]
        """
        trace = self.chol_inv.square().sum((-2, -1))
        kl = 0.5 * (trace - self.basis.size + self._logdet + self.mean_w.square().sum(-1))
        return kl if self.basis.num_outputs is None or self.basis.coupled else kl.sum(-1)

    def expected_log(self, site: Site | None) -> Tensor:
        """Return E_q[λᵀw − ½ wᵀBw] of a site on this basis, summed over outputs; 0 for None."""
        if site is None:
            return self.mean_w.new_zeros(())
        w = self.mean_w.unsqueeze(-1)
        spread = (self.chol_inv @ site.B * self.chol_inv).sum()  # tr B P⁻¹
        return (site.lam * self.mean_w).sum() - 0.5 * (spread + (w * (site.B @ w)).sum())

    def by_output(self, values: Tensor) -> Tensor:
        """Data last [*b, n] to outputs last [*batch, n, C]; nothing to do for one output."""
        C = self.basis.num_outputs
        if self.basis.coupled:  # rows are outputs of data
            return values.unflatten(-1, (-1, C))
        return values if C is None else values.mT

    def _with_outputs(self, values: Tensor) -> Tensor:
        """Data last [*b, n] to [*batch, n, C], with C = 1 for one output."""
        return values.unsqueeze(-1) if self.basis.num_outputs is None else self.by_output(values)

    def _present(self, parts: list[Tensor]) -> Tensor:
        return self.by_output(torch.cat(parts, -1)).to(self.basis.dtype)
