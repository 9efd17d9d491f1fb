"""Is the network a maximum of its posterior? What its weights say, and what it means for the mean one chose."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from torch import Tensor

from dualgp.errors import NumericalWarning
from dualgp.jacobian import JacobianBasis

_STATIONARY = 0.1


@dataclass(frozen=True)
class Stationarity:
    """How well θ* solves Jᵀα = τθ*, the condition of a maximum of Σ log p(y_i|f_i) − τ|θ|²/2.

    Print it to read what it means.

    Args:
        residual: |Jᵀα − τθ*| / |τθ*|: 0 at a maximum; 1 if the data pull no longer, as on a fitted training set.
        best_factor: the multiple of τ at which the residual would be least; ≤ 0 if the data pull the weights down.
        best_residual: that least residual.
        centre: of the posterior that reports.
    """

    residual: float
    best_factor: float
    best_residual: float
    centre: str

    def __str__(self) -> str:
        head = f"|Jᵀα − τθ*| / |τθ*| = {self.residual:.2g}"
        if self.residual <= _STATIONARY:
            return f"{head}: the network maximises its posterior, and both centres give its predictions as the mean."
        if self.best_residual <= _STATIONARY:
            advice = (
                f"At {self.best_factor:.3g} of this prior precision it would be one: check its scale with "
                "from_weight_decay."
            )
        else:
            advice = "It is one at no prior precision: training stopped early, or regularised otherwise."
        means = {
            "network": "The mean is the network all the same (centre='network'); the variance is that of a maximum.",
            "map": "The mean is that of the linearised model (centre='map'), which leaves the network's predictions "
            "and is often worse.",
        }
        return f"{head}: the network is no maximum of its posterior. {advice} {means[self.centre]}"


def stationarity(basis: JacobianBasis, pull: Tensor, centre: str) -> Stationarity:
    """Return the report, from Jᵀα of the training data.

    Args:
        basis: at the prior precision τ.
        pull: Jᵀα [P].
        centre: "network" or "map".
    """
    prior = basis.whitened_theta  # √τ θ*; Jᵀα in the same coordinates is Jᵀα / √τ
    g = basis.whiten(pull)
    size, along = prior.square().sum(), (g * prior).sum()
    best = along / size
    residual = (g - prior).norm() / size.sqrt()
    return Stationarity(
        float(residual), float(best), float((g - best * prior).norm() / (best.abs() * size.sqrt())), centre
    )


def warn_unless_maximum(report: Stationarity) -> None:
    """Warn that the evidence of what is left of the data is none, if the network is no maximum."""
    if report.residual > _STATIONARY:
        warnings.warn(
            f"Data were forgotten of a network that is no maximum of its posterior (|Jᵀα − τθ*| / |τθ*| = "
            f"{report.residual:.2g}). With centre 'network' the prior pulls against all data that it was converted "
            "with, so this is no evidence of those that are left: use with_centre('map'), or convert those anew.",
            NumericalWarning,
            stacklevel=3,
        )
