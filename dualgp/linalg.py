"""Dense linear algebra: a Cholesky that reports its jitter, and the products of the hot path.

M x M work is done in float64 always. The n x M products (`mul_lower`, `GramSum`) run in the dtype of the data, their
sums over blocks of rows in float64. Both cut the M columns into a few panels and skip the half that a triangular or
symmetric matrix makes redundant; that is what BLAS's trmm and syrk do, which torch does not offer (and a second BLAS
beside torch's own would fight it for the cores).
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from dualgp.errors import InputError, NotPositiveDefiniteError, NumericalWarning

_MAX_JITTER = 1e-2  # relative; beyond this the matrix is not a kernel matrix with rounding errors
_CHUNK_BYTES = 4 << 20  # a block of rows that stays in the second-level cache
_SCRATCH = 1 << 17  # numbers in a product that is copied to its place


class Factor(NamedTuple):
    """A lower Cholesky factor and the relative jitter that it took (0 when none was added)."""

    lower: Tensor
    jitter: float


def psd_cholesky(matrix: Float[Tensor, "*b m m"], jitter: float) -> Factor:
    """Return chol(matrix + jitter · mean(diag) · I), raising the jitter tenfold, and saying so, if it must.

    The jitter is relative to the mean of the diagonal, so a model's answer does not depend on the units of y.

    Raises:
        NotPositiveDefiniteError: if no jitter up to 1e-2 makes the matrix positive definite.
    """
    diag = matrix.diagonal(dim1=-2, dim2=-1)
    scale = diag.mean(-1, keepdim=True)
    used = jitter
    while used <= _MAX_JITTER:
        shift = torch.diag_embed((used * scale).expand(diag.shape))
        lower, info = torch.linalg.cholesky_ex(matrix + shift)
        if not info.any():
            if used > jitter:
                warnings.warn(
                    f"Cholesky needed a relative jitter of {used:.0e}, not {jitter:.0e}: inducing points may be "
                    "duplicated, or the lengthscale very long.",
                    NumericalWarning,
                    stacklevel=3,
                )
            return Factor(lower, used)
        used = max(10 * used, 1e-10)
    raise NotPositiveDefiniteError(
        f"A kernel matrix of size {matrix.shape[-1]} is not positive definite, even with a relative jitter of "
        f"{_MAX_JITTER:.0e}. Check that the kernel is positive definite and that its inputs and hyperparameters "
        "are finite."
    )


def precision_cholesky(precision: Float[Tensor, "*b m m"]) -> Float[Tensor, "*b m m"]:
    """Return the lower Cholesky factor of a posterior precision P = I + B; add nothing to it.

    Raises:
        NotPositiveDefiniteError: if P is not positive definite, with its smallest eigenvalue.
    """
    lower, info = torch.linalg.cholesky_ex(precision)
    if info.any():
        smallest = torch.linalg.eigvalsh(precision).min().item() if precision.isfinite().all() else float("nan")
        raise NotPositiveDefiniteError(
            f"The posterior precision has smallest eigenvalue {smallest:.3e}; a Gaussian needs it positive. More was "
            "removed than had been added, or sites with negative beta outweigh the prior."
        )
    return lower


def tri_inverse(lower: Float[Tensor, "*b m m"]) -> Float[Tensor, "*b m m"]:
    """Return the inverse of a lower triangular matrix (lower triangular)."""
    eye = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
    return torch.linalg.solve_triangular(lower, eye.expand(lower.shape), upper=False)


def logdet(lower: Float[Tensor, "*b m m"]) -> Float[Tensor, "*b"]:
    """Return log |L Lᵀ| of a Cholesky factor L."""
    return 2.0 * lower.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def symmetrise(matrix: Float[Tensor, "*b m m"]) -> Float[Tensor, "*b m m"]:
    """Return ½ (A + Aᵀ), to remove the rounding error of a product that is symmetric on paper."""
    return 0.5 * (matrix + matrix.mT)


def eigenpairs_above(
    matrix: Float[Tensor, "*b m m"], tol: float, largest: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues [*b, r] above tol · largest of a positive semi-definite matrix, and vectors [*b, m, r].

    Matrices of a batch that have fewer than the others are filled up with the value 1 and the vector 0. `largest` is
    the greatest eigenvalue unless given: what is left of a larger matrix has none of its own size.
    """
    values, vectors = torch.linalg.eigh(symmetrise(matrix))
    keep = values > tol * (values[..., -1:] if largest is None else largest)
    cut = values.shape[-1] - int(keep.sum(-1).max())
    values, vectors = torch.where(keep, values, 1.0), torch.where(keep.unsqueeze(-2), vectors, 0.0)
    return values[..., cut:], vectors[..., cut:]


def psd_part(matrix: Float[Tensor, "*b m m"]) -> Float[Tensor, "*b m m"]:
    """Return the nearest positive semi-definite matrix, where rounding made negative eigenvalues of small matrices."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0.0).unsqueeze(-2)) @ vectors.mT


def mul_lower(
    rows: Float[Tensor, "*a n m"], lower: Float[Tensor, "*b m m"], *, transpose: bool = False
) -> Float[Tensor, "*c n m"]:
    """Return rows · lower, or rows · lowerᵀ, for a lower triangular factor, in the dtype of `rows`."""
    lower = lower.to(rows.dtype)
    panels = _panels(lower.shape[-1])
    if transpose:  # column j of the result needs rows[:, :j] only
        parts = [rows[..., : p.stop] @ lower[..., p, : p.stop].mT for p in panels]
    else:
        parts = [rows[..., p.start :] @ lower[..., p.start :, p] for p in panels]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def whiten(cross: Float[Tensor, "*a n m"], L_inv: Float[Tensor, "*b m m"]) -> Float[Tensor, "*c n m"]:
    """Return φ = L⁻¹ k by rows, cross · L⁻ᵀ; without a graph it takes the memory of `cross`, which is then spent.

    Fresh pages for n × M numbers would cost about as much as the product.
    """
    if cross.ndim > 2 or L_inv.ndim > 2 or (torch.is_grad_enabled() and cross.requires_grad):
        return mul_lower(cross, L_inv, transpose=True)
    lower = L_inv.to(cross.dtype)
    panels = _panels(lower.shape[-1])
    for rows in cross.split(max(64, _SCRATCH // panels[0].stop)):
        for p in reversed(panels):  # from the last: column j needs columns up to j
            rows[:, p] = rows[:, : p.stop] @ lower[p, : p.stop].mT
    return cross


def squared_norms(rows: Float[Tensor, "*a n m"], lower: Float[Tensor, "*b m m"]) -> Float[Tensor, "*c n"]:
    """Return |lower · rowᵢ|² in float64, a few columns at a time."""
    lower = lower.to(rows.dtype)
    panels = _panels(lower.shape[-1])
    parts = [(rows[..., : p.stop] @ lower[..., p, : p.stop].mT).square().sum(-1).double() for p in panels]
    return torch.stack(parts).sum(0)


class GramSum:
    """A running sum of Φᵀ diag(weights) Φ [*b, M, M] over blocks of rows: products in their dtype, sums in float64."""

    def __init__(self, batch: torch.Size, size: int, device: torch.device) -> None:
        self._panels = _panels(size)
        self._lower = torch.zeros(*batch, size, size, dtype=torch.float64, device=device)

    def add(self, phi: Float[Tensor, "*a n m"], weights: Float[Tensor, "*b n"]) -> None:
        """Add a block; `weights` may have batch dimensions that `phi` lacks (outputs that share a kernel)."""
        if phi.dtype == torch.float32 and _too_precise(phi, weights):
            phi = phi.double()
        weights = weights.to(phi.dtype)
        if torch.is_grad_enabled() and phi.requires_grad:  # nothing in place
            self._lower = self._lower + (phi.mT * weights.unsqueeze(-2)) @ phi
            return
        shared = phi.ndim == 2 and weights.ndim > 1  # then one n x M block at a time, never [C, n, M]
        sums = self._lower.flatten(0, -3) if shared else self._lower.unsqueeze(0)
        all_weights = weights.flatten(0, -2) if shared else weights.unsqueeze(0)
        for total, w in zip(sums, all_weights, strict=True):
            constant = w[..., :1]  # as under homoscedastic noise: then the weight waits for the M × M sum
            same = w.shape[-1] > 0 and bool((w == constant).all())
            for p in self._panels:
                weighted = phi[..., p] if same else phi[..., p] * w.unsqueeze(-1)
                block = weighted.mT @ phi[..., : p.stop]
                total[..., p, : p.stop] += block * constant.unsqueeze(-1) if same else block

    def total(self) -> Float[Tensor, "*b m m"]:
        """Return the sum so far, symmetric to the last bit."""
        return self._lower.tril() + self._lower.tril(-1).mT


def _too_precise(phi: Tensor, weights: Tensor) -> bool:
    """Whether float32 rounding of a block's sum could reach the unit eigenvalues of P = I + Φᵀ diag(β) Φ."""
    norms = torch.linalg.vector_norm(phi.detach(), dim=-1).square()
    trace = (norms * weights.to(norms.dtype).abs()).sum(-1).max() if norms.numel() else norms.new_zeros(())
    return bool(trace * torch.finfo(torch.float32).eps > 0.1)


def _panels(size: int) -> list[slice]:
    """Cut M columns into panels about 96 wide: the best measured for both dtypes and for one and two threads."""
    width = 8 * math.ceil(size / (8 * max(1, round(size / 96))))
    return [slice(start, min(start + width, size)) for start in range(0, size, width)]


def row_chunks(n: int, width: int, dtype: torch.dtype, device: torch.device) -> Iterator[slice]:
    """Yield slices that cut n rows of `width` numbers into blocks that stay in cache (larger on a GPU)."""
    budget = _CHUNK_BYTES if device.type == "cpu" else 64 * _CHUNK_BYTES
    step = max(64, budget // max(1, width * torch.finfo(dtype).bits // 8))
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))


def check_fits(count: int, dtype: torch.dtype, device: torch.device, what: str, remedy: str) -> None:
    """Raise InputError if this many numbers are more than the memory of a device, all of it."""
    if device.type == "cuda":
        held = torch.cuda.get_device_properties(device).total_memory
    elif hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        held = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        return
    needed = count * torch.finfo(dtype).bits // 8
    if needed > held:
        raise InputError(
            f"{what[0].upper()}{what[1:]} would take {needed / 2**30:.3g} GiB, and {device} has "
            f"{held / 2**30:.3g} GiB: {remedy}."
        )


def first_tensor(*values: object) -> Tensor:
    """Return the first tensor among values: its dtype and device are those of the numbers beside it.

    A float32 zero on the CPU where there is none.
    """
    return next((v for v in values if isinstance(v, Tensor)), torch.zeros((), device="cpu"))
