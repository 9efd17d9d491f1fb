"""Kernel matrices, a block of rows at a time."""

from dualgp.kernels.products import check_kernel, cross_covariance, frozen_copy, kernel_diagonal

__all__ = ["check_kernel", "cross_covariance", "frozen_copy", "kernel_diagonal"]
