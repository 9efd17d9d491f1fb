"""The hybrid bound, by plain autograd: some data as sites per datum (form S), all else as one site on u (form U).

    L(θ, Z) = s Σ_i E_q[log p(y_i|f_i)] + E_q[log t_old(u)] − KL(q ‖ p) + log p(θ)

t_old is anchored where it was found: on w_old = L_old⁻¹(u_old − μ_old). At other hyperparameters, or with Z moved,

    w_old = T w + shift + ε,   T = L_old⁻¹ K(Z_old, Z) L⁻ᵀ,   cov ε = L_old⁻¹ K(Z_old, Z_old) L_old⁻ᵀ − T Tᵀ

so that its site is pulled back along T, and E_q[log t_old] loses ½ tr(B cov ε): nothing where Z contains Z_old.

Form U holds the map from u to the f_i of forgotten data at the θ where it was found, and so does not know that their
residuals r_i = k_ii − φ_iᵀφ_i change with θ: it would shorten lengthscales batch after batch. A fair sample S of all
that was seen says by how much: E_q[log t_old] loses ½ (n_old / n_S) Σ_S β_i (r_i(θ) − r_i(θ_old)) as well.

Source: form U of Bui et al. 2017 (streaming sparse GPs); the hybrid with sites per datum is this package's own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dualgp.basis import InducingBasis
from dualgp.distributed import ALONE, Ranks
from dualgp.duals import expected_log_prob
from dualgp.gp.data import Data
from dualgp.gp.hyper import Hyper
from dualgp.kernels import cross_covariance, kernel_diagonal, prior_covariance
from dualgp.linalg import logdet, precision_cholesky, psd_cholesky
from dualgp.sites import Site, Sites


class Noise(NamedTuple):
    """What keeps the noise of a Gaussian likelihood learnable after its data are forgotten.

    Under noise σ² a site found under σ₀² becomes itself to the power s = σ₀²/σ², and the forgotten data say
    −½ num_data log 2πσ² − ½ s · power of it, with power = Σ β_i ((y_i − μ_i)² + r_i) under σ₀².
    """

    variance: float
    num_data: float
    power: float

    def shifted(self, site: Site, shift: Tensor) -> Noise:
        """Return the same about another mean μ, given the site of the data and w_old = Tw + shift there."""
        return self._replace(power=self.power - 2.0 * float(at_shift(site, shift)))

    def under(self, variance: float) -> Noise:
        """Return the same under another noise variance."""
        return Noise(variance, self.num_data, self.power * (self.variance / variance))


class Anchor(NamedTuple):
    """A site on u with what is needed to read it elsewhere: L⁻¹, Z, μ(Z), jitter and noise of where it was found."""

    L_inv: Tensor
    Z: Tensor
    mean: Tensor
    jitter: float
    site: Site
    noise: Noise | None = None

    @classmethod
    def of(cls, basis: InducingBasis, site: Site, noise: Noise | None = None) -> Anchor:
        """Anchor a site on `basis`; nothing of it changes when the basis's modules train on."""
        Z = basis.expand(basis.inducing_points)
        return cls(basis.L_inv, Z, basis.prior_mean(Z).detach().clone(), basis.jitter, site, noise)

    def carry(self, hyper: Hyper, Z: Tensor, L: Tensor) -> Site:
        """Read the site at other θ and Z; differentiable. Each uᵢ takes its jitter along: an unmoved Z is exact."""
        return self.along(hyper, *self.map_from(hyper, Z, L))

    def along(self, hyper: Hyper, T: Tensor, shift: Tensor) -> Site:
        """Pull the site back along a map found by `map_from`, under the present noise."""
        site = self.site.pull_back(T, shift)
        return site * self.power_of(hyper)

    def constant(self, hyper: Hyper, Z: Tensor, T: Tensor, shift: Tensor) -> Tensor:
        """Return what E_q[log t_old] has beside the carried site: λᵀs − ½ sᵀBs − ½ tr(B cov ε), s the shift."""
        value = at_shift(self.site, shift)
        if not self._holds(Z):
            own = self._jittered(prior_covariance(hyper.kernel, self.Z), hyper, self.Z)
            value = value - 0.5 * (self.site.B * (self.L_inv @ own @ self.L_inv.mT - T @ T.mT)).sum()
        if self.noise is None:
            return value
        log_noise = torch.log(2 * torch.pi * hyper.likelihood.noise.double()).sum()
        return self.power_of(hyper) * (value - 0.5 * self.noise.power) - 0.5 * self.noise.num_data * log_noise

    def power_of(self, hyper: Hyper) -> Tensor | float:
        """Return s = σ₀²/σ², the power that the present noise raises the site to; 1 for other likelihoods."""
        if self.noise is None:
            return 1.0
        return self.noise.variance / hyper.likelihood.noise.double().sum()

    def _holds(self, Z: Tensor) -> bool:
        return self.Z.shape == Z.shape and bool((self.Z == Z).all())

    def map_from(self, hyper: Hyper, Z: Tensor, L: Tensor) -> tuple[Tensor, Tensor]:
        """Return (T, shift) with E[w_old | w] = T w + shift."""
        cross = cross_covariance(hyper.kernel, self.Z, Z, torch.float64)
        if Z.shape[-2] == self.Z.shape[-2]:
            cross = self._jittered(cross, hyper, Z)
        T = self.L_inv @ torch.linalg.solve_triangular(L, cross.mT, upper=False).mT
        mean = torch.zeros_like(self.mean) if hyper.mean is None else hyper.mean(self.Z.double())
        return T, (self.L_inv @ (mean - self.mean).unsqueeze(-1)).squeeze(-1)

    def _jittered(self, K: Tensor, hyper: Hyper, Z: Tensor) -> Tensor:
        jitter = self.jitter * kernel_diagonal(hyper.kernel, Z).mean(-1)[..., None, None]
        return K + jitter * torch.eye(Z.shape[-2], dtype=torch.float64, device=Z.device)


def at_shift(site: Site, shift: Tensor) -> Tensor:
    """Return λᵀs − ½ sᵀBs: log t at the shift that another mean makes, which the site pulled back leaves out."""
    return (site.lam * shift).sum() - 0.5 * (site.B * (shift.unsqueeze(-1) * shift.unsqueeze(-2))).sum()


class Sample(NamedTuple):
    """A fair sample of what is forgotten: the first rows of the data at hand, standing for `scale` times as many.

    Attributes:
        beta: precisions of their sites where they were found, data last.
        residual: their r there.
        scale: n_old / n_S, by weight.
    """

    beta: Tensor
    residual: Tensor
    scale: float

    def change(self, residual: Tensor) -> Tensor:
        """Return (n_old / n_S) Σ β (r − r_old), given the residuals of all data at hand."""
        now = residual[..., : self.beta.shape[-1]]
        return self.scale * (self.beta * (now - self.residual)).sum()


class _Terms(NamedTuple):
    """The parts of the bound: Σ E_q[log p], KL(q ‖ p), and E_q[log t_old]; and the residuals of the data."""

    fit: Tensor
    kl: Tensor
    old: Tensor
    residual: Tensor


def batch_bound(
    hyper: Hyper,
    data: Data,
    sites: Sites,
    old: Anchor | None = None,
    scale: float = 1.0,
    ranks: Ranks = ALONE,
) -> Tensor:
    """Return scale · Σ_batch E_q[log p(y_i|f_i)] − KL(q ‖ p) + log p(θ), where q is prior, batch's sites and `old`.

    The law that `site_bound` is held to (without `old`), and the objective of learning by batches (where E_q[log t_old]
    has no place: the scaled batch stands for all data).

    Args:
        hyper: parameters, with gradient.
        data: the batch.
        sites: its sites, scaled already if they stand for more data than the batch holds.
        old: all that is not in the batch, anchored where it was found.
        scale: n / batch size, on the expected log-likelihood only.
        ranks: the processes that have a share of the batch each. What comes back is then this one's share of the bound;
            all take the gradient of theirs at the same time, and the sum of the gradients is that of the bound.

    Raises:
        NotPositiveDefiniteError: as in `site_bound`.
    """
    terms = _terms(hyper, data, sites, old, with_old=False, ranks=ranks)
    return scale * terms.fit - (terms.kl - hyper.log_prior()) / ranks.size


def stream_bound(hyper: Hyper, data: Data, sites: Sites, old: Anchor | None, sample: Sample | None = None) -> Tensor:
    """Return the bound on all that a stream has seen: `data` with its sites, and what is forgotten in `old`, if any.

    Σ E_q[log p(y_i|f_i)] + E_q[log t_old(u)] − KL(q ‖ p) + log p(θ); arguments and errors as in `batch_bound`. Where
    there is no `sample`, forgotten data are taken to keep their residuals.
    """
    terms = _terms(hyper, data, sites, old, with_old=True)
    value = terms.fit + terms.old - terms.kl + hyper.log_prior()
    if old is None or sample is None:
        return value
    return value - 0.5 * old.power_of(hyper) * sample.change(terms.residual)


@torch.no_grad()
def residuals(hyper: Hyper, x: Tensor) -> Tensor:
    """Return r = k − φᵀφ at inputs x, in float64, data last."""
    basis = hyper.basis()
    x, Z = basis.expand(x), basis.expand(basis.inducing_points)
    phi = _features(hyper, x, Z, basis.L)
    return kernel_diagonal(hyper.kernel, x) - phi.square().sum(-1)


def _features(hyper: Hyper, x: Tensor, Z: Tensor, L: Tensor) -> Tensor:
    cross = cross_covariance(hyper.kernel, x, Z, hyper.dtype)
    return torch.linalg.solve_triangular(L, cross.mT.double(), upper=False).mT


def _terms(
    hyper: Hyper, data: Data, sites: Sites, old: Anchor | None, *, with_old: bool, ranks: Ranks = ALONE
) -> _Terms:
    Z = hyper.Z.to(hyper.dtype)
    Z = Z.unsqueeze(-3) if hyper.num_outputs is not None and Z.ndim > 2 else Z
    x = data.x.unsqueeze(-3) if hyper.num_outputs is not None and data.x.ndim > 2 else data.x
    L, _ = psd_cholesky(prior_covariance(hyper.kernel, Z), hyper.jitter)
    phi = _features(hyper, x, Z, L)
    mu = x.new_zeros(1, dtype=torch.float64) if hyper.mean is None else hyper.mean(x.double())
    own = sites.pull_back(phi, mu)
    site = Site(*ranks.sum_with_graph(own.lam, own.B))
    carried, T, shift = None, None, None
    if old is not None:
        T, shift = old.map_from(hyper, Z, L)
        carried = old.along(hyper, T, shift)
        site = site + carried
    C = precision_cholesky(torch.eye(Z.shape[-2], dtype=torch.float64, device=Z.device) + site.B)
    w = torch.cholesky_solve(site.lam.unsqueeze(-1), C).squeeze(-1)
    half = torch.linalg.solve_triangular(C, phi.mT, upper=False)
    m = mu + (phi @ w.unsqueeze(-1)).squeeze(-1)
    residual = kernel_diagonal(hyper.kernel, x) - phi.square().sum(-1)
    v = residual + half.square().sum(-2)
    m, v = (m.mT, v.mT) if hyper.num_outputs is not None else (m, v)
    fit = data.weigh(expected_log_prob(hyper.likelihood, data.y, m, v, **data.params)).sum()
    P_inv = torch.cholesky_inverse(C)
    trace = P_inv.diagonal(dim1=-2, dim2=-1).sum(-1)
    kl = 0.5 * (trace - Z.shape[-2] + logdet(C) + w.square().sum(-1)).sum()
    log_old = fit.new_zeros(())
    if old is not None and carried is not None and T is not None and shift is not None and with_old:
        Bw = (carried.B @ w.unsqueeze(-1)).squeeze(-1)
        log_old = (carried.lam * w - 0.5 * w * Bw).sum() - 0.5 * (carried.B * P_inv).sum()
        log_old = log_old + old.constant(hyper, Z, T, shift)
    return _Terms(fit, kl, log_old, residual)
