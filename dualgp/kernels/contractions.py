"""Contractions of what two layers keep, a tile of rows at a time: by pairs of positions, or by J where that is less."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dualgp.kernels.layers import FactoredLayer, Layer, LookupLayer

_CACHE_BYTES = 4 << 20  # a tile of products of pairs: it is read again at once
SCRATCH_BYTES = 32 << 20  # a tile of explicit Jacobians: large enough to feed a matrix product


def tiles(n: int, width: int, like: Tensor, size: int = _CACHE_BYTES) -> Iterator[slice]:
    """Yield slices that cut n rows of `width` numbers into tiles of about `size` bytes (more on a GPU)."""
    size = _tile_bytes(like.device, size)
    step = max(1, size // max(1, width * like.element_size()))
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))


def _tile_bytes(device: torch.device, size: int) -> int:
    """On a GPU an eighth of what is free: an explicit Jacobian that no tile holds is made again for each of its own."""
    if device.type != "cuda":
        return size
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(8 * SCRATCH_BYTES, (torch.cuda.mem_get_info(device)[0] + unused) // 8)


def explicit_tiles(layer: Layer) -> Iterator[tuple[slice, Layer]]:
    """Yield (rows, layer of those rows), as many as one tile holds J of."""
    g = layer.jac if hasattr(layer, "jac") else layer.g
    for rows in tiles(len(g), g.shape[1] * layer.size, g, SCRATCH_BYTES):
        yield rows, layer[rows]


def add_gram_explicit(out: Tensor, x: Layer, z: Layer) -> None:
    """Out [n, C, m, C] += J J'ᵀ, by J itself."""
    for columns, right in explicit_tiles(z):
        jac = right.dense().flatten(0, 1).mT
        for rows, left in explicit_tiles(x):
            block = out[rows, :, columns]
            block += (left.dense().flatten(0, 1) @ jac).view(block.shape)


def add_independent_explicit(out: Tensor, x: Layer, z: Layer) -> None:
    """Out [C, n, m] += J_c J'_cᵀ for each output c, by J itself."""
    C, _, m = out.shape
    if C > 1 and m * C * z.size * out.element_size() > _tile_bytes(out.device, SCRATCH_BYTES):
        for c in range(C):  # a tile holds C times as many rows of one output: each is made as many times less often
            add_independent_explicit(out[c : c + 1], x.output(c), z.output(c))
        return
    for columns, right in explicit_tiles(z):
        jac = right.dense().permute(1, 2, 0)  # [C, p, m]
        for rows, left in explicit_tiles(x):
            out[:, rows, columns] += left.dense().transpose(0, 1) @ jac


def add_gram_pairs(out: Tensor, x: FactoredLayer | LookupLayer, z: FactoredLayer | LookupLayer) -> None:
    """Out [n, C, m, C] += Σ_{s,t} (a_s·a'_t)(g_s·g'_t)."""
    C, m = x.g.shape[1], len(z.g)
    for rows in tiles(len(x.g), C * m * C, x.g):
        left, block = x[rows], out[rows].view(-1, C, m * C)
        for s, t in product(range(x.g.shape[2]), range(z.g.shape[2])):
            A = left.inner(z, s, t)  # [n, m]
            if is_one_row(left.g) and is_one_row(z.g):  # the last layer: one [C, C] block of g for every pair of rows
                _add_shared(out[rows], A, left.g[0, :, s] @ z.g[0, :, t].mT)
                continue
            G = left.g[:, :, s].flatten(0, 1) @ z.g[:, :, t].flatten(0, 1).mT  # [nC, mC]
            block.addcmul_(A.repeat_interleave(C, 1).unsqueeze(1), G.view(block.shape))


def _add_shared(out: Tensor, A: Tensor, G: Tensor) -> None:
    if torch.equal(G, G.diagonal().diag()):
        out.diagonal(dim1=1, dim2=3).add_(A.unsqueeze(-1) * G.diagonal())
    else:
        out.add_(A[:, None, :, None] * G[:, None, :])


def add_independent_pairs(out: Tensor, x: FactoredLayer | LookupLayer, z: FactoredLayer | LookupLayer) -> None:
    """Out [C, n, m] += Σ_{s,t} (a_s·a'_t)(g_cs·g'_ct) for each output c."""
    C, m = x.g.shape[1], len(z.g)
    for rows in tiles(len(x.g), C * m, x.g):
        left = x[rows]
        for s, t in product(range(x.g.shape[2]), range(z.g.shape[2])):
            A = left.inner(z, s, t)
            if is_one_row(left.g) and is_one_row(z.g):
                G = (left.g[0, :, s] * z.g[0, :, t]).sum(-1)[:, None, None]  # [C, 1, 1]
            else:
                G = left.g[:, :, s].transpose(0, 1) @ z.g[:, :, t].permute(1, 2, 0)  # [C, n, m]
            out[:, rows].addcmul_(A, G)


def is_one_row(g: Tensor) -> bool:
    """Whether all rows are one row, as autograd leaves the derivative of the outputs by themselves."""
    return g.stride(0) == 0


def quad_pairs(g: Tensor, A: Tensor, h: Tensor) -> Tensor:
    """Return Σ_{s,t} A_st g_s h_tᵀ [n, C, C]."""
    return g.flatten(2) @ (A.unsqueeze(1) @ h).flatten(2).mT
