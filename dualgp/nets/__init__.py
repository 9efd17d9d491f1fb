"""Trained networks as Gaussian processes in dual form: uncertainty, evidence and new data without retraining."""
