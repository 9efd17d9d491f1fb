"""Trained networks as posteriors: structures of weight space."""

from dualgp.nets.structured import StructuredPosterior, StructuredSite

__all__ = ["StructuredPosterior", "StructuredSite"]
