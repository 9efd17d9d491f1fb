"""The schedule of E- and M-steps: what `DualGP.fit` does, with nothing to tune.

1. A random subset of max(10 M, 1000) data, when there are at least eight times as many: sites, hyperparameters and Z
   are brought near, at a small fraction of the cost of a pass over everything.
2. All data. Gaussian likelihoods: L-BFGS on the collapsed bound. Others: rounds of an E-step to convergence and an
   M-step on form S, whose optimum lies close to that of the E-step re-run at every θ, so a few rounds suffice.
3. A last E-step to the end.

Positive hyperparameters are learned as logarithms inside a trust region per M-step. The M-step is deterministic and
line-searched: many noisy steps at sites grown stale, which never converge, cannot happen here.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from gpytorch.kernels import Kernel
from torch import Tensor

from dualgp.basis import InducingBasis
from dualgp.distributed import ALONE, Ranks
from dualgp.errors import ConvergenceWarning, InputError, NumericalWarning
from dualgp.gp.bound import Bound, conjugate_sites, site_bound
from dualgp.gp.data import Data
from dualgp.gp.estep import Source, e_step
from dualgp.gp.hyper import Hyper
from dualgp.gp.minibatch import Batches, TensorBatches, gather, learn_by_batches, sample_rows
from dualgp.gp.mstep import m_step
from dualgp.gp.progress import Progress, TracePoint
from dualgp.gp.stop import Stop
from dualgp.inducing import greedy_variance
from dualgp.posterior import Posterior
from dualgp.sites import Site, Sites

M_ITERATIONS = 50  # of L-BFGS in one M-step at Gaussian noise
M_ITERATIONS_BETWEEN = 12  # when sites have to be found again afterwards


@dataclass(frozen=True)
class FitResult:
    """How a fit went.

    Attributes:
        elbo: evidence lower bound of all data at the end, in nats, without the log prior of hyperparameters.
        num_data: n, all batch dimensions counted.
        rounds: E- and M-rounds on all data.
        converged: whether the stopping rule was met before `max_rounds`.
        seconds: wall time.
        trace: the bound after each evaluation; points of the first stage are of the subset, as their `num_data` says.
    """

    elbo: float
    num_data: int
    rounds: int
    converged: bool
    seconds: float
    trace: list[TracePoint] = field(repr=False)


class Outcome(NamedTuple):
    """What a fit hands to the model: learned modules and Z, q with its per-datum sites, and how it went."""

    hyper: Hyper
    posterior: Posterior
    sites: Sites | None
    result: FitResult
    power: float | None  # see `EStep`
    num_rows: int  # n, batch dimensions not counted


def fit_in_memory(
    make: Callable[[Data], Hyper],
    data: Data,
    num_inducing: int,
    stop: Stop,
    progress: Progress,
    generator: torch.Generator | None,
    ranks: Ranks = ALONE,
) -> Outcome:
    """Learn sites, hyperparameters and Z on data held in memory.

    Args:
        make: makes the working copy, with Z chosen from the data it is given.
        data: all of it.
        num_inducing: M, for the size of the subset that Z is chosen from and the first stage runs on.
        stop: the stopping rule.
        progress: told of every evaluation.
        generator: for the subset of the first stage.
        ranks: the processes that have a share of the data each, this one `data`.
    """
    share, size = data, subset_size(num_inducing)
    if ranks.count(len(data)) >= 8 * size:
        subset, share, _ = sample_rows(data, size, generator, ranks)
    else:
        subset = gather(data, ranks)
    hyper = make(subset)
    _align(hyper, ranks)
    if share is not data and hyper.trained():
        alternate(hyper, share, stop.looser(), progress, ranks)
    rounds, converged, start = alternate(hyper, data, stop, progress, ranks)
    return _finish(hyper, data, rounds, converged, start, stop, progress, ranks)


def fit_batches(
    make: Callable[[Data], Hyper],
    batches: Batches | TensorBatches,
    num_inducing: int,
    stop: Stop,
    progress: Progress,
    generator: torch.Generator | None,
    ranks: Ranks = ALONE,
) -> Outcome:
    """Learn on batches: a sample in memory first, then stochastic steps, then E-steps over all of them.

    Arguments as in `fit_in_memory`, with the source of batches in place of the data.
    """
    subset, share, n = batches.sample(subset_size(num_inducing), generator, ranks)
    hyper = make(subset)
    _align(hyper, ranks)
    rounds, converged = 0, True
    if hyper.trained():
        *_, start = alternate(hyper, share, stop.looser(), progress, ranks)
        none = subset.rows(slice(0, 0))
        rounds, converged = learn_by_batches(hyper, batches, start[0], len(subset), n, stop, progress, none, ranks)
    return _finish(hyper, batches.whole(), rounds, converged, None, stop, progress, ranks)


@torch.no_grad()
def _align(hyper: Hyper, ranks: Ranks) -> None:
    """Take the values of rank 0, to the last bit."""
    for p, value in zip(hyper.parameters(), ranks.first(*hyper.parameters()), strict=True):
        p.copy_(value)


def _finish(
    hyper: Hyper,
    data: Data | Batches,
    rounds: int,
    converged: bool,
    start: tuple[Posterior, Sites | None] | None,
    stop: Stop,
    progress: Progress,
    ranks: Ranks,
) -> Outcome:
    """Round the hyperparameters to how they are stored, find the sites there, and report."""
    hyper.round()
    _align(hyper, ranks)
    with torch.no_grad():
        basis = hyper.basis()
        if start is not None and start[1] is not None and isinstance(data, Data):
            own = Posterior(basis).project(data.x, start[1])
            start = Posterior(basis, Site(*ranks.sum(own.lam, own.B))), start[1]
        else:
            start = None
    final = e_step(Source(basis, data, ranks), hyper.likelihood, start, tol=1e-3 * stop.tol)
    site = final.posterior.site
    posterior = Posterior(basis, Site(*ranks.first(site.lam, site.B)))
    why = None
    if not converged:
        why = f"at its limit of rounds ({rounds}) before a round gained less than tol; raise max_rounds, or tol"
    elif not final.converged:
        why = f"with its last E-step still gaining after {final.passes} passes; fit again from here, or raise tol"
    if why:
        warnings.warn(f"The fit stopped {why}.", ConvergenceWarning, stacklevel=4)
    result = FitResult(
        final.elbo, final.num_data, rounds, converged and final.converged, progress.seconds, progress.trace
    )
    rows = ranks.count(len(data)) if isinstance(data, Data) else final.num_data
    sites = final.sites if isinstance(data, Data) else None
    return Outcome(hyper, posterior, sites, result, final.power, rows)


def initial_inducing_points(
    kernel: Kernel, present: Tensor | None, held: bool, num_inducing: int | None, data: Data
) -> Tensor:
    """Return Z: the present one if it is held or still fits, or M of the data by greatest conditional variance.

    A Z that an earlier fit found fits as long as it explains the data's prior variance about as well as a new one does.

    Raises:
        InputError: if Z does not fit the data, or there are fewer data than inducing points.
    """
    x = data.x
    given = present
    if given is not None and held:
        if given.shape[-1] != x.shape[-1] or given.device != x.device:
            raise InputError(
                f"inducing_points have {given.shape[-1]} columns on {given.device}, X has {x.shape[-1]} on {x.device}; "
                "they must agree (move the model with .to)."
            )
        return given.to(x.dtype).expand(*x.shape[:-2], *given.shape[-2:])
    n = x.shape[-2]
    m = min(100, n) if num_inducing is None else num_inducing
    if not 1 <= m <= n:
        raise InputError(
            f"{m} inducing points need at least as many data, got {n}; lower num_inducing or leave it out."
        )
    flat = x.reshape(-1, *x.shape[-2:])
    rows = [greedy_variance(kernel, one, m) for one in flat]
    found = min(len(r) for r in rows)  # fewer than M where the rest is explained to rounding
    if found < m and num_inducing is not None and min(len(one.unique(dim=0)) for one in flat) < m:
        warnings.warn(
            f"Only {found} inputs differ, of the {m} asked for as inducing points.", NumericalWarning, stacklevel=5
        )
    m = found
    Z = torch.stack([one[r[:m]] for one, r in zip(flat, rows, strict=True)]).reshape(*x.shape[:-2], m, x.shape[-1])
    if present is None or present.device != Z.device or present.shape[:-2] != Z.shape[:-2]:
        return Z
    fits = present.shape[-1] == Z.shape[-1] and present.shape[-2] <= n
    if fits and _unexplained(kernel, present.to(x.dtype), x) < _unexplained(kernel, Z, x) + 0.1:
        return present.to(x.dtype)
    return Z


def _unexplained(kernel: Kernel, Z: Tensor, x: Tensor) -> float:
    """The share of the prior variance at x that inducing inputs Z leave."""
    with torch.no_grad():
        basis = InducingBasis(kernel, Z)
        left = [(f.residual.sum(), f.prior_var.sum()) for _, f in basis.blocks(x)]
    residual, total = (float(sum(parts)) for parts in zip(*left, strict=True))
    return residual / total


def alternate(
    hyper: Hyper, data: Data, stop: Stop, progress: Progress, ranks: Ranks = ALONE
) -> tuple[int, bool, tuple[Posterior, Sites | None]]:
    """Alternate E- and M-steps; return the rounds taken, whether the rule was met, and the last q with its sites."""
    n = max(1, ranks.count(data.count))
    conjugate = conjugate_sites(hyper, data) is not None
    iterations = M_ITERATIONS if conjugate else M_ITERATIONS_BETWEEN
    start: tuple[Posterior, Sites | None] = Posterior(hyper.basis()), None
    last = -float("inf")
    for done in range(1, stop.max_rounds + 1):
        sites = None
        if not conjugate:
            found = e_step(Source(start[0].basis, data, ranks), hyper.likelihood, start, tol=0.1 * stop.tol)
            sites = found.sites
        bound = m_step(
            hyper,
            functools.partial(_bound, hyper, data, sites, ranks),
            n,
            max_iter=iterations,
            tol=0.1 * stop.tol,
            callback=lambda v: progress.bound(v, n),
        )
        start = bound.posterior, sites
        progress.round(f"fit {n}")
        if progress.checkpoint is not None:
            progress.checkpoint(hyper, bound.posterior, n)
        if bound.value - last < stop.tol * n or not hyper.trained():
            return done, True, start
        last = bound.value
    return stop.max_rounds, False, start


def _bound(hyper: Hyper, data: Data, sites: Sites | None, ranks: Ranks) -> Bound:
    """`site_bound`, whose domain ends for all ranks where it does for one."""
    with ranks.guard():
        return site_bound(hyper, data, sites, ranks)


def subset_size(num_inducing: int) -> int:
    """Return how many data the first stage takes."""
    return max(10 * num_inducing, 1000)
