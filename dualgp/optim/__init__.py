"""Variational training: optimisers that end with a posterior over the weights."""

from dualgp.optim.bsam import BSAM
from dualgp.optim.engine import SampledOptimizer
from dualgp.optim.evon import EVON
from dualgp.optim.ivon import IVON
from dualgp.optim.liegroup import AdditiveBLR, AffineBLR, MultiplicativeBLR
from dualgp.optim.pruning import prune
from dualgp.optim.vogn import VOGN

__all__ = ["BSAM", "EVON", "IVON", "VOGN", "AdditiveBLR", "AffineBLR", "MultiplicativeBLR", "SampledOptimizer", "prune"]
