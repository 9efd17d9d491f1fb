"""Data selection in the loop: which label to ask for next, and which few data to keep.

The same functions for a `DualGP` and a `NetworkPosterior`: all that is asked of a model is the joint Gaussian of the
function at candidates, and the precision β̄ that the site of a datum will have, expected before its label is known.
"""

from dualgp.active.batch import Selection, select
from dualgp.active.coreset import core_set
from dualgp.active.pool import PoolLoop, Stop, learn_more
from dualgp.active.scores import Prospects, score

__all__ = [
    "PoolLoop",
    "Prospects",
    "Selection",
    "Stop",
    "core_set",
    "learn_more",
    "score",
    "select",
]
