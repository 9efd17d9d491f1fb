"""What a posterior leans on: the same functions for a Gaussian process and for a network.

A `Posterior` knows the parametric covariance V_i of the function at each datum, and the datum's site has precision B_i
and pull α_i = λ_i − B_i m_i. That is all there is to it: tr B_iV_i is the leverage, and without the datum the function
there has mean m_i − V_i (I − B_iV_i)⁻¹ α_i and covariance V_i (I − B_iV_i)⁻¹.
"""

from dualgp.influence.formulas import Shift, removal_shift
from dualgp.influence.left_out import LeftOut, Ranking, leave_group_out, leave_one_out, mislabelled
from dualgp.influence.measures import Sensitivity, leverage, leverage_by_class, perturb, sensitivity, sum_by
from dualgp.influence.preconditioner import DiagonalPosterior, preconditioner_variance
from dualgp.influence.validation import validation_influence

__all__ = [
    "DiagonalPosterior",
    "LeftOut",
    "Ranking",
    "Sensitivity",
    "Shift",
    "leave_group_out",
    "leave_one_out",
    "leverage",
    "leverage_by_class",
    "mislabelled",
    "perturb",
    "preconditioner_variance",
    "removal_shift",
    "sensitivity",
    "sum_by",
    "validation_influence",
]
