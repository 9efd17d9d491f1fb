"""From the units that users think in to those of the update, and back."""

from __future__ import annotations

import math
import warnings
from typing import Any

from dualgp.checks import check_number
from dualgp.errors import InputError, NumericalWarning

INIT_STD = 0.018  # of weights at the start: σ₀ of 0.003 to 0.03 is what published runs have
WEIGHT_DECAY = 1e-3  # per datum: a prior precision of a thousandth of the data, and of 1 at least
HORIZON = 3.6  # how many of the curvature's time constants a run lasts


def settings(
    *,
    num_data: float | int | None,
    ess: float | int | None,
    temperature: float | int,
    prior_precision: float | int | None,
    weight_decay: float | int | None,
    init_std: float | int | None,
    hess_init: float | int | None,
    total_steps: int | None,
    curvature_horizon: float | int | None,
    beta2: float | int | None,
    has_prior: bool = False,
) -> dict[str, float]:
    """Return what an update reads, from either of two ways to give each.

    λ = N/T, d = s₀/λ, h₀ = 1/(λσ₀²) − d, 1 − β₂ = c/total_steps

    Raises:
        InputError: if both ways are taken, neither where one must be, or a value is out of range.
    """
    _one("num_data", num_data, "ess", ess)
    if num_data is None and ess is None:
        raise InputError("num_data= is needed: the number of data that the mean loss is a mean over.")
    _positive(num_data=num_data, ess=ess, temperature=temperature, init_std=init_std, hess_init=hess_init)
    _positive(curvature_horizon=curvature_horizon, total_steps=total_steps)
    if temperature != 1.0 and ess is not None:
        raise InputError("temperature= goes with num_data=; ess is N/T already.")
    check_number("temperature", temperature, above=0)
    lam = float(num_data) / temperature if ess is None else float(ess)  # type: ignore[arg-type]
    d = _decay(lam, prior_precision, weight_decay, has_prior)
    _one("init_std", init_std, "hess_init", hess_init)
    if hess_init is None:
        std = INIT_STD if init_std is None else init_std
        hess_init = 1.0 / max(lam * std**2, 1e-300) - d
        if not hess_init > 0:
            raise InputError(
                f"init_std={std} is no smaller than what the prior allows, {(lam * d) ** -0.5:.3g}: give a smaller "
                "one, or a smaller prior_precision."
            )
    beta2 = _memory(beta2, total_steps, curvature_horizon)
    return {"ess": lam, "weight_decay": d, "hess_init": float(hess_init), "beta2": beta2}


def _decay(lam: float, prior_precision: float | int | None, weight_decay: float | int | None, has_prior: bool) -> float:
    _one("prior_precision", prior_precision, "weight_decay", weight_decay)
    for name, value in (("prior_precision", prior_precision), ("weight_decay", weight_decay)):
        if value is not None:
            check_number(name, value, least=0)
    if has_prior:
        if prior_precision is not None or weight_decay is not None:
            raise InputError("prior= has a precision already: leave prior_precision= and weight_decay= out.")
        return 0.0
    if prior_precision is not None:
        return prior_precision / lam
    return max(WEIGHT_DECAY, 1.0 / lam) if weight_decay is None else float(weight_decay)


def _memory(beta2: float | int | None, total_steps: int | None, horizon: float | int | None) -> float:
    if beta2 is not None:
        if horizon is not None:
            raise InputError("beta2 and curvature_horizon say the same: give one of them.")
        check_number("beta2", beta2, least=0, most=1)
        if total_steps is not None and (1 - beta2) * total_steps < 0.5:
            warnings.warn(
                f"In {total_steps} steps at beta2={beta2} the curvature is learned to "
                f"{100 * -math.expm1(-(1 - beta2) * total_steps):.0f} %: the variance is mostly its initial value. "
                "Leave beta2 out to have it follow total_steps.",
                NumericalWarning,
                stacklevel=4,
            )
        return float(beta2)
    if total_steps is None:
        raise InputError(
            "total_steps= is needed (or beta2=): it says over how many steps the variance is learned, 1 − beta2 = "
            f"{HORIZON}/total_steps."
        )
    return 1.0 - min(0.5, (HORIZON if horizon is None else horizon) / total_steps)


def _one(a: str, x: object, b: str, y: object) -> None:
    if x is not None and y is not None:
        raise InputError(f"{a} and {b} say the same in two units: give one of them.")


def _positive(**values: float | int | None) -> None:
    for name, value in values.items():
        if value is not None:
            _check_positive(name, value)


def _check_positive(name: str, value: object) -> None:
    if not (isinstance(value, float) and value == math.inf):  # without limit, as a radius of clipping may be
        check_number(name, value, above=0)


def check_units(group: dict[str, Any]) -> None:
    """Raise InputError if a group's own settings are in the units that only the whole run is given in."""
    own = {"num_data", "temperature", "prior_precision", "init_std", "total_steps", "curvature_horizon"} & group.keys()
    if own:
        raise InputError(
            f"{', '.join(sorted(own))} cannot be given for one group of parameters: there, give weight_decay "
            "(prior_precision / ess), hess_init (1 / (ess init_std²) − weight_decay), ess and beta2."
        )


def first_std(group: dict[str, Any]) -> float:
    """Return the standard deviation of weights at the start, 1/√(λ(h₀ + d))."""
    return float((group["ess"] * (group["hess_init"] + group["weight_decay"])) ** -0.5)


def warn_if_wide(std: float) -> None:
    """Warn if weights are drawn so far from the mean that networks seldom train."""
    if std > 0.1:
        warnings.warn(
            f"Weights are drawn with a standard deviation of {std:.3g} at the start; networks seldom train above 0.1. "
            "Give init_std= (0.003 to 0.03), or a larger hess_init.",
            NumericalWarning,
            stacklevel=3,
        )


def decay_of(group: dict[str, Any]) -> float:
    """Return what a prior of absolute precision s₀ adds to the curvature of the mean loss, d = s₀/N."""
    return float(group["prior_precision"] / group["num_data"])


def check_group(group: dict[str, Any], positive: tuple[str, ...], at_least_0: tuple[str, ...]) -> None:
    """Raise InputError unless step size, momentum and memory are in range, and what must be positive or ≥ 0 is."""
    check_number("lr", group["lr"], least=0)
    for name in ("beta1", "beta2"):
        if name in group:
            check_number(name, group[name], least=0, most=1)
    if group["beta1"] == 1:
        raise InputError("beta1 must be below 1, or the mean never moves.")
    for name in positive:
        _check_positive(name, group[name])
    for name in at_least_0:
        check_number(name, group[name], least=0)
