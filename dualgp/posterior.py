"""The waist: a posterior is a prior plus sites, in the coordinates of a basis."""

from __future__ import annotations

import torch
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from jaxtyping import Float
from linear_operator import to_linear_operator
from torch import Tensor

from dualgp.basis import Features, InducingBasis
from dualgp.errors import BasisMismatchError, InputError
from dualgp.linalg import GramSum, logdet, precision_cholesky, squared_norms, symmetrise, tri_inverse
from dualgp.sites import Site, Sites


class Posterior:
    """q(w) = N(P⁻¹λ, P⁻¹) with P = I + B: the standard normal prior of a basis, times the site (λ, B).

    A value: every verb (`add`, `remove`, `scale`, `temper`, `rebase`) returns a new posterior and leaves this one as
    it was. All M × M work is float64; predictions come back in the dtype of the basis. With outputs, per-datum
    quantities have shape [..., T, C]; without, [..., T].

    Args:
        basis: the coordinates.
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

    def __init__(self, basis: InducingBasis, site: Site | None = None) -> None:
        is_prior = site is None
        if site is None:
            site = Site.zero(basis.batch_shape, basis.num_inducing, basis.device)
        if site.lam.shape != (*basis.batch_shape, basis.num_inducing):
            raise BasisMismatchError(
                f"The basis has coordinates {(*basis.batch_shape, basis.num_inducing)}, the site "
                f"{tuple(site.lam.shape)}. Use site.pull_back to carry it over."
            )
        self.basis = basis
        self.site = site
        self._is_prior = is_prior
        eye = torch.eye(basis.num_inducing, dtype=torch.float64, device=basis.device)
        self.precision = eye + site.B  # P = I + B
        self.chol = precision_cholesky(self.precision)
        self.mean_w = torch.cholesky_solve(site.lam.unsqueeze(-1), self.chol).squeeze(-1)  # w̄ = P⁻¹λ
        self.chol_inv = tri_inverse(self.chol)  # C⁻¹ with P = CCᵀ, so that φᵀP⁻¹φ = |C⁻¹φ|²

    def predict(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance of f(x), each [*batch, T] or [*batch, T, C], in blocks of bounded memory.

        mean = μ + φᵀw̄,  var = r + φᵀP⁻¹φ.  Differentiable in x.

        Args:
            x: inputs [*batch, T, D], in the dtype and on the device of the basis.

        Raises:
            InputError: if x has the wrong shape, dtype or device.
        """
        self.check_inputs(x)
        means, variances = [], []
        for _, features in self.basis.blocks(x):
            mean, var = self.marginals(features)
            means.append(mean)
            variances.append(var)
        if not means:
            means = variances = [x.new_zeros((*self.basis.batch_shape, 0))]
        return self._present(means), self._present(variances)

    def marginals(self, features: Features) -> tuple[Tensor, Tensor]:
        """Return float64 mean and variance, data last, at given features (see `InducingBasis.features`)."""
        phi = features.phi
        if self._is_prior:  # w̄ = 0 and φᵀP⁻¹φ = φᵀφ: no product to take
            shape = (*self.basis.batch_shape, phi.shape[-2])
            return features.prior_mean.expand(shape), features.prior_var.expand(shape)
        mean = features.prior_mean + (phi @ self.mean_w.to(phi.dtype).unsqueeze(-1)).squeeze(-1)
        return mean, features.residual + self.parametric_variance(phi)

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
        joint = MultivariateNormal(mean.to(dtype), to_linear_operator(cov.to(dtype)))
        return joint if self.basis.num_outputs is None else MultitaskMultivariateNormal.from_batch_mvn(joint)

    def joint(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean [*b, T] and covariance [*b, T, T] of f(x) in float64, outputs (if any) before the data."""
        self.check_inputs(x)
        basis = self.basis
        features = basis.features(x)
        phi = features.phi.double()
        mean = features.prior_mean + (phi @ self.mean_w.unsqueeze(-1)).squeeze(-1)
        half = phi @ self.chol_inv.mT
        cov = symmetrise(basis.prior_covariance(basis.expand(x)) - phi @ phi.mT + half @ half.mT)
        batch = torch.broadcast_shapes(basis.batch_shape, cov.shape[:-2])
        cov = cov.expand(*batch, *cov.shape[-2:])
        return mean.expand(cov.shape[:-1]), cov

    def sample(self, x: Tensor, num_samples: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Return joint draws of f(x), shape [S, *batch, T] or [S, *batch, T, C].

        Drawn by an eigendecomposition, since the covariance of close inputs is singular to rounding; no jitter.

        Args:
            x: inputs [*batch, T, D].
            num_samples: S ≥ 1.
            generator: source of randomness; torch's default one otherwise.

        Raises:
            InputError: if x has the wrong shape, dtype or device.
        """
        joint = self.predict_joint(x)
        if isinstance(joint, MultitaskMultivariateNormal):
            cov = joint.covariance_matrix.double()
            mean = joint.mean.double().reshape(*joint.mean.shape[:-2], -1)
        else:
            cov, mean = joint.covariance_matrix.double(), joint.mean.double()
        values, vectors = torch.linalg.eigh(cov)
        root = vectors * values.clamp_min(0).sqrt().unsqueeze(-2)
        noise = torch.randn(num_samples, *mean.shape, dtype=mean.dtype, device=mean.device, generator=generator)
        draws = mean + (root @ noise.unsqueeze(-1)).squeeze(-1)
        return draws.reshape(num_samples, *joint.mean.shape).to(self.basis.dtype)

    def project(self, x: Tensor, sites: Sites) -> Site:
        """Return the site on w that per-datum `sites` at inputs x make: Σᵢ (φᵢ(λᵢ − βᵢμᵢ), βᵢ φᵢφᵢᵀ), in blocks.

        Raises:
            InputError: if x and the sites do not fit the basis or each other.
        """
        self.check_inputs(x)
        if len(sites) != x.shape[-2] or sites.multi_output != (self.basis.num_outputs is not None):
            raise InputError(
                f"{x.shape[-2]} inputs and num_outputs={self.basis.num_outputs} need sites to match, got sites of "
                f"shape {tuple(sites.lam.shape)} (multi_output={sites.multi_output})."
            )
        lam, beta = (s.to(x.device) for s in sites.by_latent())
        total = SiteSum(self.basis)
        for rows, features in self.basis.blocks(x):
            total.add(features, lam[..., rows], beta[..., rows])
        return total.site()

    def add(self, x: Tensor, sites: Sites) -> Posterior:
        """Return the posterior with the sites of inputs x added. Errors as in `project`."""
        return Posterior(self.basis, self.site + self.project(x, sites))

    def remove(self, x: Tensor, sites: Sites) -> Posterior:
        """Return the posterior with the sites of inputs x taken out: the posterior without those data.

        Raises:
            NotPositiveDefiniteError: if no Gaussian is left; the message has the smallest eigenvalue.
        """
        return Posterior(self.basis, self.site - self.project(x, sites))

    def scale(self, factor: float | int) -> Posterior:
        """Return the posterior with every site scaled, prior · tᶠ: forgetting for factor < 1.

        Raises:
            InputError: if the factor is negative or not finite.
        """
        if not (factor >= 0 and factor < float("inf")):
            raise InputError(f"Sites can be scaled by a finite factor ≥ 0, got {factor}.")
        return Posterior(self.basis, factor * self.site)

    def temper(self, temperature: float | int) -> Posterior:
        """Return prior · t^{1/T}: the likelihood at temperature T > 0 (see `scale`)."""
        if not temperature > 0:
            raise InputError(f"The temperature must be positive, got {temperature}.")
        return self.scale(1.0 / temperature)

    def rebase(self, basis: InducingBasis) -> Posterior:
        """Return this posterior's site pulled back to another basis: Z moved, or hyperparameters changed.

        Raises:
            BasisMismatchError: see `InducingBasis.change_to`.
        """
        return Posterior(basis, self.site.pull_back(*self.basis.change_to(basis)))

    def kl(self) -> Float[Tensor, "*b"]:
        """Return KL(q ‖ prior), summed over outputs, in nats.

        ½ [tr P⁻¹ − M + log|P| + |w̄|²]
        """
        trace = self.chol_inv.square().sum((-2, -1))
        kl = 0.5 * (trace - self.basis.num_inducing + logdet(self.chol) + self.mean_w.square().sum(-1))
        return kl if self.basis.num_outputs is None else kl.sum(-1)

    def expected_log(self, site: Site | None) -> Tensor:
        """Return E_q[λᵀw − ½ wᵀBw] of a site on this basis, summed over outputs; 0 for None."""
        if site is None:
            return self.mean_w.new_zeros(())
        w = self.mean_w.unsqueeze(-1)
        spread = (self.chol_inv @ site.B * self.chol_inv).sum()  # tr B P⁻¹
        return (site.lam * self.mean_w).sum() - 0.5 * (spread + (w * (site.B @ w)).sum())

    def by_output(self, values: Tensor) -> Tensor:
        """Data last [*b, n] to outputs last [*batch, n, C]; nothing to do for one output."""
        return values if self.basis.num_outputs is None else values.mT

    def _present(self, parts: list[Tensor]) -> Tensor:
        return self.by_output(torch.cat(parts, -1)).to(self.basis.dtype)

    def check_inputs(self, x: Tensor) -> None:
        """Raise unless x can be predicted at.

        Raises:
            InputError: if x has the wrong shape, dtype or device.
        """
        d = self.basis.inducing_points.shape[-1]
        if x.ndim < 2 or x.shape[-1] != d:
            raise InputError(f"Inputs must have shape [*batch, T, {d}], got {tuple(x.shape)}.")
        if x.dtype != self.basis.dtype or x.device != self.basis.device:
            raise InputError(
                f"Inputs must be {self.basis.dtype} on {self.basis.device}, got {x.dtype} on {x.device}; use x.to(...)."
            )


class SiteSum:
    """A running sum, block by block, of the sites that per-datum (λ, β) make on w: Σ (φᵢ(λᵢ − βᵢμᵢ), βᵢφᵢφᵢᵀ)."""

    def __init__(self, basis: InducingBasis) -> None:
        self._lam = Site.zero(basis.batch_shape, basis.num_inducing, basis.device).lam
        self._gram = GramSum(basis.batch_shape, basis.num_inducing, basis.device)

    def add(self, features: Features, lam: Tensor, beta: Tensor) -> None:
        """Add a block of data; λ and β have their data last."""
        centred = (lam - beta * features.prior_mean).to(features.phi.dtype)
        self._lam = self._lam + (features.phi.mT @ centred.unsqueeze(-1)).squeeze(-1)
        self._gram.add(features.phi, beta)

    def site(self) -> Site:
        """Return the sum so far."""
        return Site(self._lam.clone(), self._gram.total())
