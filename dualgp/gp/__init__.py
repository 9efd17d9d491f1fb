"""The dual sparse Gaussian process: its bound, its E- and M-steps, the schedule, the model."""
