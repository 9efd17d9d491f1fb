"""The M-step: hyperparameters and Z by L-BFGS on the bound of form S, sites frozen and q moving through K(θ)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize

from dualgp.errors import NotPositiveDefiniteError
from dualgp.gp.bound import Bound, site_bound
from dualgp.gp.data import Data
from dualgp.gp.hyper import Hyper
from dualgp.sites import Sites

TRUST_RADIUS = 2.5  # of the logarithm of a positive hyperparameter, in one M-step


class MStep(NamedTuple):
    """The best bound that was visited, and how often it was evaluated."""

    bound: Bound
    evaluations: int


def m_step(
    hyper: Hyper,
    data: Data,
    sites: Sites | None,
    *,
    max_iter: int,
    tol: float,
    callback: Callable[[float], None] = lambda value: None,
) -> MStep:
    """Maximise `site_bound` over what `hyper` learns; leave `hyper` at the best point visited.

    Args:
        hyper: changed in place.
        data: the data.
        sites: frozen sites, or None for the conjugate ones, which follow the noise.
        max_iter: L-BFGS iterations, at most.
        tol: stop when an iteration gains less than `tol` nats per datum.
        callback: told the bound after each evaluation.

    Source: form S of Adam et al. 2021, § 3.3; Byrd et al. 1995 for L-BFGS-B.
    """
    n = max(1, data.count)
    best: list[tuple[Bound, np.ndarray]] = []
    evaluations = 0

    def objective(values: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal evaluations
        evaluations += 1
        hyper.set_vector(values)
        try:
            bound = site_bound(hyper, data, sites)
        except NotPositiveDefiniteError:
            bound = None
        if bound is None or not np.isfinite(bound.value):  # outside the domain: a wall for the line search
            worst = -best[0][0].value / n if best else 0.0
            return abs(worst) * 10 + 1e3, np.zeros_like(values)
        if not best or bound.value > best[0][0].value:
            best[:] = [(bound, values.copy())]
        callback(bound.value)
        return -bound.value / n, -hyper.vector_gradient(bound.gradient) / n

    start = hyper.vector()
    if start.size == 0 or max_iter == 0:
        return MStep(site_bound(hyper, data, sites), 1)
    reached = -np.inf

    def stop_when_flat(_: np.ndarray) -> None:  # scipy's own ftol is relative to |f|, which has y's units in it
        nonlocal reached
        if best[0][0].value - reached < tol * n:
            raise StopIteration
        reached = best[0][0].value

    options = {"maxiter": max_iter, "ftol": 0.0, "maxcor": 20}
    box = hyper.trust_box(TRUST_RADIUS)
    minimize(objective, start, jac=True, method="L-BFGS-B", bounds=box, callback=stop_when_flat, options=options)
    bound, values = best[0]
    hyper.set_vector(values)
    return MStep(bound, evaluations)
