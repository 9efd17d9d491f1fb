"""Kernel matrices and network Jacobians, a block of rows at a time."""

from dualgp.kernels.keops import keops_status
from dualgp.kernels.lazy import LazyKernel
from dualgp.kernels.ntk import JacobianBlock, NetworkJacobian
from dualgp.kernels.products import (
    check_columns,
    check_kernel,
    cross_covariance,
    describe,
    frozen_copy,
    kernel_diagonal,
    prior_covariance,
)

__all__ = [
    "JacobianBlock",
    "LazyKernel",
    "NetworkJacobian",
    "check_columns",
    "check_kernel",
    "cross_covariance",
    "describe",
    "frozen_copy",
    "keops_status",
    "kernel_diagonal",
    "prior_covariance",
]
