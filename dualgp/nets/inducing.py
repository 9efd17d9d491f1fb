"""Which inputs of the data stand for all of them: a sample that no order of the data changes, spread by the kernel."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from dualgp.errors import InputError
from dualgp.kernels import NetworkJacobian
from dualgp.nets.data import Source
from dualgp.nets.fingerprints import fingerprints

_CANDIDATES = 4  # per input that is chosen


def choose(
    jacobian: NetworkJacobian, source: Source, count: int, generator: torch.Generator | None, *, greedy: bool = True
) -> Tensor:
    """Return M inputs of the data, [M, *input_shape], or as many distinct ones as there are.

    A sample of 4M distinct inputs (those of the smallest seeded fingerprints: the same in any order of the data), and
    of it those that are worst known from the ones before, by the trace of the kernel over outputs.

    Args:
        jacobian: of the network.
        source: the data.
        count: M.
        generator: of the sample; a fixed seed if None.
        greedy: False for a sample of M as it is.
    """
    seed = 0 if generator is None else int(torch.randint(1 << 20, (1,), generator=generator, device=generator.device))
    size = count * (_CANDIDATES if greedy else 1)
    kept, keys = None, torch.zeros(0, dtype=torch.int64)
    for batch in source:
        x = batch.x.to(jacobian.device)
        if x.shape[1:] != jacobian.input_shape:
            raise InputError(f"Inputs must have shape {('n', *jacobian.input_shape)}, got {tuple(x.shape)}.")
        kept = x if kept is None else torch.cat([kept, x])
        rows = fingerprints(x.to(jacobian.dtype) if x.is_floating_point() else x, seed=seed).cpu()
        keys, first = _first_of_each(torch.cat([keys, rows]))
        keys, kept = keys[:size], kept[first[:size].to(kept.device)]
    assert kept is not None
    return kept[_pivots(_trace_kernel(jacobian, kept), count)] if greedy and len(kept) > count else kept


def _first_of_each(keys: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct keys in order, and where each is first."""
    distinct, where = keys.unique(return_inverse=True)
    first = torch.full_like(distinct, len(keys)).scatter_reduce_(0, where, torch.arange(len(keys)), "amin")
    return distinct, first


@torch.no_grad()
def _trace_kernel(jacobian: NetworkJacobian, x: Tensor) -> Float[Tensor, "n n"]:
    """Σ_c J_c(x)J_c(z)ᵀ of all pairs, in blocks."""
    blocks = [(rows, block) for rows, block in jacobian.blocks(x)]
    K = torch.zeros(len(x), len(x), dtype=torch.float64, device=jacobian.device)
    for i, (rows, block) in enumerate(blocks):
        for others, other in blocks[: i + 1]:
            part = block.gram_independent(other).sum(0).double()
            K[rows, others], K[others, rows] = part, part.T
    return K


def _pivots(K: Tensor, count: int, tol: float = 1e-10) -> Tensor:
    """The rows of greatest variance given those before: pivots of a Cholesky factor, found in O(n M²)."""
    left = K.diagonal().clone()
    floor, chosen = tol * left.max(), []
    factor = K.new_zeros(count, len(K))
    for k in range(count):
        pivot = int(left.argmax())
        if left[pivot] <= floor:
            break
        factor[k] = (K[pivot] - factor[:k, pivot] @ factor[:k]) / left[pivot].sqrt()
        left = (left - factor[k].square()).clamp_min_(0.0)
        left[pivot] = 0.0
        chosen.append(pivot)
    return torch.tensor(chosen, device=K.device)
