"""Trained networks as Gaussian processes in dual form: uncertainty, evidence and new data without retraining."""

from dualgp.nets.layerwise import Structure, StructuredSite
from dualgp.nets.preactivations import (
    GaussianPreactivation,
    KSTest,
    ks_normal,
    network_ks,
    preactivation_ks,
    symmetric_weibull_,
)
from dualgp.nets.structured import StructuredPosterior

__all__ = [
    "GaussianPreactivation",
    "KSTest",
    "Structure",
    "StructuredPosterior",
    "StructuredSite",
    "ks_normal",
    "network_ks",
    "preactivation_ks",
    "symmetric_weibull_",
]
