"""Trained networks as Gaussian processes in dual form: uncertainty, evidence and new data without retraining."""

from dualgp.nets.layerwise import Structure, StructuredSite
from dualgp.nets.structured import StructuredPosterior

__all__ = ["Structure", "StructuredPosterior", "StructuredSite"]
