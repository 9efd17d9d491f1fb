"""Choice of inducing inputs: take those of greatest conditional variance, drop those that cost the bound least."""

from __future__ import annotations

from collections.abc import Callable

import torch
from gpytorch.kernels import Kernel
from jaxtyping import Float, Int
from torch import Tensor

from dualgp.checks import check_tensor
from dualgp.errors import InputError, check_count
from dualgp.kernels import LazyKernel, cross_covariance, frozen_copy, kernel_diagonal, prior_covariance
from dualgp.linalg import psd_cholesky
from dualgp.solvers import pivoted_cholesky


@torch.no_grad()
def greedy_variance(
    kernel: Kernel,
    x: Float[Tensor, "n d"],
    num_inducing: int,
    *,
    given: Float[Tensor, "k d"] | None = None,
    tol: float = 1e-10,
) -> Int[Tensor, "m"]:
    """Return the rows of x chosen by greatest conditional variance: the pivots of a pivoted Cholesky factor.

    Each step takes the point whose prior variance given those already taken is largest, and stops early when
    none has more than `tol` of the largest prior variance left (so fewer than `num_inducing` rows may come back:
    duplicated inputs are never taken twice). Costs O(n M²) operations and n·M numbers.

    Args:
        kernel: a GPyTorch kernel with no batch dimension (of a batch, the first is used).
        x: candidate inputs.
        num_inducing: how many rows to choose, ≥ 1.
        given: inputs whose values are known already; what they explain is not chosen again.
        tol: relative residual variance under which to stop.

    Raises:
        InputError: if `num_inducing` is not between 1 and n, or n·M numbers do not fit into memory.

    Source: Fine & Scheinberg 2001; Burt et al. 2020 ("Convergence of sparse variational inference"), § 4.

    Example:
        >>> from gpytorch.kernels import RBFKernel
        >>> greedy_variance(RBFKernel(), torch.tensor([[0.0], [0.1], [3.0]]), 2)
        tensor([0, 2])
    """
    check_tensor("x", x)
    check_count("num_inducing", num_inducing, 1)
    if x.ndim != 2 or not x.shape[-1] or not bool(x.isfinite().all()):
        raise InputError(f"x must be finite, of shape [n, D], got {tuple(x.shape)}.")
    n = x.shape[-2]
    if num_inducing > n:
        raise InputError(f"num_inducing must be at most the {n} inputs given, got {num_inducing}.")
    return greedy_rows(frozen_copy(kernel), x, num_inducing, given, tol)


@torch.no_grad()
def greedy_rows(kernel: Kernel, x: Tensor, num_inducing: int, given: Tensor | None, tol: float) -> Int[Tensor, "m"]:
    """Return what `greedy_variance` does, for a kernel that is in float64 already; of a batch the first."""
    x = _first(x, 2)
    diagonal = _first(kernel_diagonal(kernel, x), 1)
    rows = None
    if given is not None and given.shape[-2]:
        given = _first(given, 2)
        L, _ = psd_cholesky(_first(prior_covariance(kernel, given), 2), 1e-10)
        cross = _first(cross_covariance(kernel, given, x, torch.float64), 2)
        rows = torch.linalg.solve_triangular(L, cross, upper=False)
    found = pivoted_cholesky(diagonal, _columns(kernel, x), num_inducing, tol=tol, given=rows)
    return torch.tensor(found.pivots, dtype=torch.int64, device=x.device)


def _columns(kernel: Kernel, x: Tensor) -> Callable[[int], Tensor]:
    """Return j ↦ k(x, x_j) in float64."""
    if kernel.batch_shape:
        return lambda j: _first(cross_covariance(kernel, x, x[j : j + 1], torch.float64), 2)[:, 0]
    return LazyKernel(kernel, x.double()).column_reader()


@torch.no_grad()
def cheapest_to_drop(L_inv: Float[Tensor, "*a m m"], B: Float[Tensor, "*b m m"], size: int) -> Int[Tensor, "k"]:
    """Return the rows of Z to keep: at most `size`, dropped one by one by what each costs the bound.

    Without u_j, what a site with precision B on w says of it is lost: with Q = K_zz⁻¹ and B_u = L⁻ᵀBL⁻¹,

        cost_j = ½ tr(B cov(w | u_{−j})) = ½ [B_u]_jj / Q_jj        in nats

    the fall of E_q[log t] (see `gp.hybrid`).

    Args:
        L_inv: L⁻¹ of the present Z.
        B: precision on w of all that is known.
        size: M, ≥ 1.
    """
    B = L_inv.mT @ B @ L_inv
    Q = (L_inv.mT @ L_inv).expand(B.shape).clone()
    left = torch.ones(Q.shape[-1], dtype=torch.bool, device=Q.device)
    for _ in range(Q.shape[-1] - size):
        q, b = Q.diagonal(dim1=-2, dim2=-1), B.diagonal(dim1=-2, dim2=-1)
        cost = (0.5 * b / q).reshape(-1, len(left)).sum(0).masked_fill(~left, float("inf"))
        j = int(cost.argmin())
        left[j] = False
        # u_j = gᵀu_{−j} + rest: downdate K⁻¹, and pull B_u back
        q_j, b_j = Q[..., j], B[..., j]
        g = -q_j / q_j[..., j, None]
        g[..., j] = 0.0
        Q = Q - _outer(q_j, q_j / q_j[..., j, None])
        B = B + _outer(g, b_j) + _outer(b_j, g) + _outer(g, g * b_j[..., j, None])
        Q[..., j, j] = 1.0
    return left.nonzero().reshape(-1)


def _outer(left: Tensor, right: Tensor) -> Tensor:
    return left.unsqueeze(-1) * right.unsqueeze(-2)


def _first(values: Tensor, event_dims: int) -> Tensor:
    """Of a batch of kernels, take the first."""
    return values.reshape(-1, *values.shape[values.ndim - event_dims :])[0]
