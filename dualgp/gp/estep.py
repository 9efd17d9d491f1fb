"""The E-step: natural gradients on the sites, with a step that never lowers the bound nor leaves the Gaussians."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from gpytorch.likelihoods import Likelihood, SoftmaxLikelihood
from torch import Tensor

from dualgp.basis import Features, InducingBasis, SiteSum
from dualgp.distributed import ALONE, Ranks
from dualgp.duals import dual_parameters, is_gaussian
from dualgp.errors import NotPositiveDefiniteError
from dualgp.gp.data import CACHE_BYTES, Data, gaussian_sites, gaussian_spread
from dualgp.linalg import row_chunks
from dualgp.posterior import Posterior
from dualgp.sites import Site, Sites

_MIN_LR = 2.0**-20
_DEPTH = 5  # steps that Anderson acceleration looks back


class EStep(NamedTuple):
    """q with its ELBO (summed over the batch), passes taken, and whether it converged.

    `num_data` counts all batch dimensions; `sites` are the per-datum sites that q is made of, None if the source does
    not keep its data in one order.
    """

    posterior: Posterior
    sites: Sites | None
    elbo: float
    passes: int
    converged: bool
    num_data: int
    power: float | None = None  # of Gaussian likelihoods: Σ β((y − μ)² + r), see `hybrid.Noise`


class Source:
    """Data in blocks with their features at one basis, kept between passes when they fit the cache.

    Args:
        basis: where the features are taken.
        batches: the data: one `Data`, or anything that can be iterated again and again for `Data` batches.
        ranks: the processes that have a share of the data each, this one `batches`.
    """

    def __init__(self, basis: InducingBasis, batches: Iterable[Data] | Data, ranks: Ranks = ALONE) -> None:
        self.basis, self.ranks = basis, ranks
        self.batches = [batches] if isinstance(batches, Data) else batches
        self.size = len(batches) if isinstance(batches, Data) else None  # of data that keep one order
        self._cache: list[tuple[Data, Features]] | None = None
        if isinstance(batches, Data):
            size = len(batches) * basis.num_inducing * torch.finfo(basis.dtype).bits // 8
            kernels = basis.L.shape[:-2].numel() * batches.x.shape[:-2].numel()
            self._cache = [] if size * kernels <= CACHE_BYTES else None

    def blocks(self, *, keep: bool = True) -> Iterator[tuple[Data, Features]]:
        """Yield blocks of data with their features; `keep` them for the next pass, if there is to be one."""
        if self._cache:
            yield from self._cache
            return
        basis = self.basis
        for data in self.batches:
            for rows in row_chunks(len(data), basis.num_inducing, basis.dtype, basis.device):
                block = data.rows(rows)
                features = basis.features(block.x)
                if keep and self._cache is not None:
                    self._cache.append((block, features))
                yield block, features
                del features


@torch.no_grad()
def e_step(
    source: Source,
    likelihood: Likelihood,
    start: tuple[Posterior, Sites | None] | None = None,
    *,
    base: Site | None = None,
    tol: float = 1e-8,
    max_passes: int = 200,
) -> EStep:
    """Return the optimal q at fixed hyperparameters and Z, by natural gradients on the sites.

        λ ← (1 − ρ) λ + ρ (α + β_q m),   β ← (1 − ρ) β + ρ β_q

    with the duals (α, β_q) taken at the present q. Gaussian likelihoods are exact in one pass. Otherwise ρ = 1 (2/3 for
    softmax: q factorises over the classes, so this is a Jacobi step, whose eigenvalues against the true curvature
    diag(p) − ppᵀ lie anywhere in [0, 2]; `_Anderson` mixes such steps). ρ is halved when the bound would fall or the
    precision lose positivity, as can be where the likelihood is not log-concave, and doubled after a success; no β is
    clipped, so the fixed point is a stationary point of the ELBO.

    Args:
        source: data and basis.
        likelihood: any supported likelihood.
        start: where to start: a posterior on the source's basis and the sites it is made of; the prior (with the
            base) if None.
        base: a site on the source's basis that stands beside those of the data and stays: what a stream has forgotten.
            The ELBO then holds E_q[log base] as well.
        tol: stop when a pass gains less than `tol` nats per datum.
        max_passes: limit on passes over the data.

    Source: Adam et al. 2021, eq. 18; Khan & Lin 2017; mixing: Walker & Ni 2011, eq. 2.2.
    """
    if source.basis.dtype == torch.float32:  # gains below the rounding of float32 are noise
        tol = max(tol, 1e-6)
    q, made_of = start or (Posterior(source.basis, base), None)
    best: _Visit | None = None
    factorised = isinstance(likelihood, SoftmaxLikelihood)
    lr = longest = 2.0 / 3.0 if factorised else 1.0
    mixing = _Anderson() if factorised else None
    for step in range(1, max_passes + 1):
        visit = _visit(q, made_of, likelihood, source, base)
        if visit.exact:
            q = Posterior(source.basis, visit.target)
            data = q.site if base is None else q.site - base
            power = float(visit.constants[:2].sum() - data.B.diagonal(dim1=-2, dim2=-1).sum())
            return EStep(q, visit.wanted, _collapsed(q, visit, base), step, True, visit.num_data, power)
        gain = float("inf") if best is None else visit.elbo - best.elbo
        if best is None or gain >= -1e-9 * abs(best.elbo):
            best, lr = visit, min(longest, 2.0 * lr)
        else:
            lr *= 0.5
            mixing = _Anderson() if factorised else None  # from the best visit on, plain steps first
        if gain < tol * visit.num_data and (gain >= 0 or lr < _MIN_LR):
            last = _advance(best, longest)[:2] if lr == longest else (best.posterior, best.made_of)
            return EStep(*last, best.elbo, step, True, best.num_data)
        mixed = mixing.mix(best, lr) if mixing is not None else None
        q, made_of, lr = mixed or _advance(best, lr)
    assert best is not None
    return EStep(best.posterior, best.made_of, best.elbo, max_passes, False, best.num_data)


class _Visit(NamedTuple):
    """One pass at q: the sites it is made of, its ELBO, the sites it asks for, and q's site if it had them."""

    posterior: Posterior
    made_of: Sites | None
    elbo: float
    wanted: Sites | None
    target: Site
    num_data: int
    exact: bool
    constants: Tensor  # of a Gaussian likelihood: Σβ(y−μ)², Σβ·k(x,x), Σ log 2πσ²


def _visit(q: Posterior, made_of: Sites | None, likelihood: Likelihood, source: Source, base: Site | None) -> _Visit:
    basis = source.basis
    total = SiteSum(basis)
    constants = torch.zeros(3, dtype=torch.float64, device=basis.device)
    # One allocation for all data: small tensors kept from block to block would pin the heap.
    kept = (
        [q.site.lam.new_empty(*basis.batch_shape, source.size) for _ in range(2)] if source.size is not None else None
    )
    fit = torch.zeros((), dtype=torch.float64, device=basis.device)
    count, at, exact = 0, 0, is_gaussian(likelihood)
    for data, features in source.blocks(keep=not is_gaussian(likelihood)):
        sites = gaussian_sites(likelihood, data)
        if sites is not None:
            lam, beta = sites.by_latent()
            constants += _constants(data, lam, beta, features)
        else:
            m, v = (q.by_output(t) for t in q.marginals(features))
            duals = dual_parameters(likelihood, data.y, m, v, **data.params)
            lam, beta = Sites(duals.alpha + duals.beta * m, duals.beta, basis.num_outputs is not None).by_latent()
            lam, beta = data.weigh_latent(lam), data.weigh_latent(beta)
            fit = fit + data.weigh(duals.expected_log_prob).sum()
        total.add(features, lam, beta)
        if kept is not None:
            for store, values in zip(kept, (lam, beta), strict=True):
                store[..., at : at + len(data)] = values
        at += len(data)
        count += data.count
        del features  # before the next block asks for memory: its pages are warm
    wanted = None if kept is None else Sites.from_latent(kept[0], kept[1], basis.num_outputs is not None)
    if made_of is None and wanted is not None:
        made_of = wanted * 0.0
    own = total.site()
    number = own.lam.new_tensor(count, dtype=torch.float64)
    lam_sum, B_sum, fit, constants, number = source.ranks.sum(own.lam, own.B, fit, constants, number)
    (elbo,) = source.ranks.first(fit - q.kl().sum() + q.expected_log(base))  # which all decide by, to the last bit
    value = float(elbo) if math.isfinite(float(elbo)) else -math.inf
    target = Site(lam_sum, B_sum) if base is None else Site(lam_sum, B_sum) + base
    return _Visit(q, made_of, value, wanted, target, max(int(number), 1), exact, constants)


class _Anderson:
    """Anderson acceleration: the affine mixture of the last steps in which their residuals cancel best.

    Residuals (target − site) are measured as q sees them, C⁻¹(r_λ − r_B w̄) and C⁻¹ r_B C⁻ᵀ / √2 with P = CCᵀ: the
    Fisher metric of (mean, precision). An affine mixture of sites is no convex one: what it gives is judged by its
    bound on the next visit, and plain steps follow where it was no gain.
    """

    def __init__(self) -> None:
        self.visits: list[_Visit] = []

    def mix(self, visit: _Visit, lr: float) -> tuple[Posterior, Sites | None, float] | None:
        """Take in a visit; return the mixed step, or None where there is nothing to mix or no Gaussian comes of it."""
        self.visits = [*self.visits[-_DEPTH:], visit]
        if len(self.visits) < 2:
            return None
        residuals = torch.stack([self._residual(v, visit.posterior) for v in self.visits])
        differences = (residuals[:-1] - residuals[-1]).mT
        found = torch.linalg.lstsq(differences, -residuals[-1].unsqueeze(-1), driver=_driver(differences)).solution
        weights = [*found.squeeze(-1).tolist(), 1.0 - float(found.sum())]
        steps = [(v.posterior.site * (1.0 - lr) + v.target * lr) * w for v, w in zip(self.visits, weights, strict=True)]
        try:
            q = Posterior(visit.posterior.basis, functools.reduce(operator.add, steps))
        except NotPositiveDefiniteError:
            self.visits = []
            return None
        made_of = None
        if visit.made_of is not None and visit.wanted is not None:
            parts = [
                (v.made_of * (1.0 - lr) + v.wanted * lr) * w
                for v, w in zip(self.visits, weights, strict=True)
                if v.made_of is not None and v.wanted is not None
            ]
            made_of = functools.reduce(operator.add, parts)
        return q, made_of, lr

    @staticmethod
    def _residual(visit: _Visit, q: Posterior) -> Tensor:
        r = visit.target - visit.posterior.site
        shift = q.chol_inv @ (r.lam - (r.B @ q.mean_w.unsqueeze(-1)).squeeze(-1)).unsqueeze(-1)
        return torch.cat([shift.reshape(-1), (q.chol_inv @ r.B @ q.chol_inv.mT).reshape(-1) / 2**0.5])


def _driver(matrix: Tensor) -> str:
    """LAPACK's rank-revealing solver where there is one."""
    return "gelsd" if matrix.device.type == "cpu" else "gels"


def _constants(data: Data, lam: Tensor, beta: Tensor, features: Features) -> Tensor:
    """The sums over a block of Gaussian sites that the collapsed bound needs beside A and c."""
    lam, beta, _ = torch.broadcast_tensors(lam, beta, features.prior_var)  # of each process, if targets are of all
    spread, log_noise = gaussian_spread(data, lam, beta, features.prior_mean)
    squares = spread.sum()
    return torch.stack([squares, (beta * features.prior_var).sum(), log_noise.sum()])


def _collapsed(q: Posterior, visit: _Visit, base: Site | None) -> float:
    """The ELBO of the exact q of a Gaussian likelihood, from sums that the pass has: no second pass."""
    squares, prior_var, log_noise = visit.constants
    data = q.site if base is None else q.site - base
    spread = prior_var - data.B.diagonal(dim1=-2, dim2=-1).sum()
    fit = -0.5 * (squares + spread + log_noise) + q.expected_log(data)
    return float(fit - q.kl().sum() + q.expected_log(base))


def _advance(best: _Visit, lr: float) -> tuple[Posterior, Sites | None, float]:
    """Step from the best visit towards the sites it asks for, halving the step until it leaves a Gaussian.

    Raises:
        NotPositiveDefiniteError: if no step does.
    """
    while True:
        try:
            q = Posterior(best.posterior.basis, best.posterior.site * (1.0 - lr) + best.target * lr)
        except NotPositiveDefiniteError:
            lr *= 0.5
            if lr < _MIN_LR:
                raise
            continue
        if best.made_of is None or best.wanted is None:
            return q, None, lr
        return q, best.made_of * (1.0 - lr) + best.wanted * lr, lr
