"""Kernel matrices, a block of rows at a time."""

from dualgp.kernels.products import (
    check_kernel,
    cross_covariance,
    describe,
    frozen_copy,
    kernel_diagonal,
    prior_covariance,
)

__all__ = ["check_kernel", "cross_covariance", "describe", "frozen_copy", "kernel_diagonal", "prior_covariance"]
