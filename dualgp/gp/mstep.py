"""The M-step: hyperparameters and Z by L-BFGS on a bound with the sites frozen and q moving through K(θ)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
from scipy.optimize import minimize
from torch import Tensor

from dualgp.errors import NotPositiveDefiniteError
from dualgp.gp.hyper import Hyper

TRUST_RADIUS = 2.5  # of the logarithm of a positive hyperparameter, in one M-step


@runtime_checkable
class Evaluation(Protocol):
    """A bound in nats, and its gradient in `hyper.trained()` order."""

    @property
    def value(self) -> float: ...  # noqa: D102
    @property
    def gradient(self) -> list[Tensor]: ...  # noqa: D102


E = TypeVar("E", bound=Evaluation)


def m_step(
    hyper: Hyper,
    evaluate: Callable[[], E],
    n: int,
    *,
    max_iter: int,
    tol: float,
    radius: float = TRUST_RADIUS,
    callback: Callable[[float], None] = lambda value: None,
) -> E:
    """Maximise a bound over what `hyper` learns; leave `hyper` at the best point visited and return the bound there.

    Args:
        hyper: changed in place.
        evaluate: the bound at the present values of `hyper`; NotPositiveDefiniteError marks the end of its domain.
        n: how many data it is the bound of.
        max_iter: L-BFGS iterations, at most.
        tol: stop when an iteration gains less than `tol` nats per datum.
        radius: how far the logarithm of a positive hyperparameter may go.
        callback: told the bound after each evaluation.

    Raises:
        NotPositiveDefiniteError: if the bound is finite nowhere it was asked for.

    Source: form S of Adam et al. 2021, § 3.3; Byrd et al. 1995 for L-BFGS-B.
    """
    start = hyper.vector()
    if start.size == 0 or max_iter == 0:
        return evaluate()
    best: list[tuple[E, np.ndarray]] = []
    reached = -np.inf

    def objective(values: np.ndarray) -> tuple[float, np.ndarray]:
        hyper.set_vector(values)
        try:
            found = evaluate()
        except NotPositiveDefiniteError:
            found = None
        if found is None or not np.isfinite(found.value):  # outside the domain: a wall for the line search
            worst = -best[0][0].value / n if best else 0.0
            return abs(worst) * 10 + 1e3, np.zeros_like(values)
        if not best or found.value > best[0][0].value:
            best[:] = [(found, values.copy())]
        callback(found.value)
        return -found.value / n, -hyper.vector_gradient(found.gradient) / n

    def stop_when_flat(_: np.ndarray) -> None:  # scipy's own ftol is relative to |f|, which has y's units in it
        nonlocal reached
        if best[0][0].value - reached < tol * n:
            raise StopIteration
        reached = best[0][0].value

    options = {"maxiter": max_iter, "ftol": 0.0, "maxcor": 20}
    box = hyper.trust_box(radius)
    minimize(objective, start, jac=True, method="L-BFGS-B", bounds=box, callback=stop_when_flat, options=options)
    if not best:
        raise NotPositiveDefiniteError(
            "The bound is not finite at the hyperparameters given: check that targets, weights and hyperparameters are "
            "finite and of a reasonable size."
        )
    found, values = best[0]
    hyper.set_vector(values)
    return found
