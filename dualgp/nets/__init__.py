"""Trained networks as Gaussian processes in dual form: uncertainty, evidence and new data without retraining."""

from dualgp.nets.structured import StructuredPosterior

__all__ = ["StructuredPosterior"]
