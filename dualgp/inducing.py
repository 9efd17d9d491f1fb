"""Choice of inducing inputs: greedy conditional variance."""

from __future__ import annotations

import torch
from gpytorch.kernels import Kernel
from jaxtyping import Float, Int
from torch import Tensor

from dualgp.errors import InputError
from dualgp.kernels import cross_covariance, frozen_copy, kernel_diagonal


@torch.no_grad()
def greedy_variance(
    kernel: Kernel, x: Float[Tensor, "n d"], num_inducing: int, *, tol: float = 1e-10
) -> Int[Tensor, "m"]:
    """Return the rows of x chosen by greatest conditional variance: the pivots of a pivoted Cholesky factor.

    Each step takes the point whose prior variance given those already taken is largest, and stops early when
    none has more than `tol` of the largest prior variance left (so fewer than `num_inducing` rows may come back:
    duplicated inputs are never taken twice). Costs O(n M²) operations and n·M numbers.

    Args:
        kernel: a GPyTorch kernel with no batch dimension (of a batch, the first is used).
        x: candidate inputs.
        num_inducing: how many rows to choose, ≥ 1.
        tol: relative residual variance under which to stop.

    Raises:
        InputError: if `num_inducing` is not between 1 and n.

    Source: Fine & Scheinberg 2001; Burt et al. 2020 ("Convergence of sparse variational inference"), § 4.

    Example:
        >>> from gpytorch.kernels import RBFKernel
        >>> greedy_variance(RBFKernel(), torch.tensor([[0.0], [0.1], [3.0]]), 2)
        tensor([0, 2])
    """
    n = x.shape[-2]
    if not 1 <= num_inducing <= n:
        raise InputError(f"num_inducing must be between 1 and the {n} inputs given, got {num_inducing}.")
    kernel = frozen_copy(kernel)  # in float64, as the inputs will be
    residual = _first(kernel_diagonal(kernel, x), 1).clone()
    floor = tol * residual.max()
    factor = residual.new_zeros(num_inducing, n)
    chosen: list[int] = []
    for k in range(num_inducing):
        pivot = int(residual.argmax())
        if residual[pivot] <= floor:
            break
        column = _first(cross_covariance(kernel, x, x[pivot : pivot + 1], torch.float64), 2)[:, 0]
        column = column - factor[:k, pivot] @ factor[:k]
        factor[k] = column / residual[pivot].sqrt()
        residual = (residual - factor[k].square()).clamp_min_(0)
        residual[pivot] = 0.0
        chosen.append(pivot)
    return torch.tensor(chosen, device=x.device)


def _first(values: Tensor, event_dims: int) -> Tensor:
    """Of a batch of kernels, take the first."""
    return values.reshape(-1, *values.shape[values.ndim - event_dims :])[0]
