"""Which data are in a posterior, without the data: 64-bit fingerprints of rows (x, y), counted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from dualgp.errors import InputError

_GOLDEN, _A, _B = -0x61C8864680B583EB, -0x4B47D0C5A3A6B11B, -0x6B2FB644ECCEEE15  # odd constants of SplitMix64, signed


def fingerprints(*columns: Tensor, seed: int = 0) -> Int[Tensor, "n"]:
    """Return a 64-bit number for each row, equal for equal values; two of n rows collide by chance n²/2⁶⁵ of times.

    Σⱼ mix(bits of vⱼ xor keyⱼ), mixed once more: floating-point values count as float64, so that a row has one
    fingerprint in every dtype that holds it exactly, and −0 is 0.

    Args:
        columns: values of the rows, each [n, ...].
        seed: of the keys.

    Source: Steele, Lea & Flood 2014 (SplitMix64).

    Example:
        >>> a, b = fingerprints(torch.tensor([[1.0, 2.0], [2.0, 1.0]]))
        >>> bool(a == b)
        False
    """
    total, offset = torch.zeros(len(columns[0]), dtype=torch.int64, device=columns[0].device), 0
    for column in columns:
        for values in column.detach().flatten(1).split(1 << 16, dim=1) if column.ndim > 1 else [column.unsqueeze(1)]:
            width = values.shape[1]
            keys = _mix((torch.arange(offset, offset + width, device=total.device) + (seed << 40)) * _GOLDEN)
            for rows in torch.arange(len(total), device=total.device).split(max(1, (1 << 20) // max(1, width))):
                bits = (values[rows].double() + 0.0).view(torch.int64)
                total[rows] += _mix(bits.to(total.device) ^ keys).sum(1)
            offset += width
    return _mix(total)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift(z, 30)) * _A
    z = (z ^ _shift(z, 27)) * _B
    return z ^ _shift(z, 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    """A logical shift to the right."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


@dataclass(frozen=True, eq=False)
class Held:
    """A multiset of fingerprints: the data that a posterior holds, and how many coordinates w each was seen through.

    Args:
        keys: fingerprints, ascending, [u]; one may stand for several sizes.
        sizes: how many coordinates w had when the datum was added, [u]: its site acts on those.
        counts: how often each is held, [u].
    """

    keys: Int[Tensor, "u"]
    sizes: Int[Tensor, "u"]
    counts: Int[Tensor, "u"]

    @classmethod
    def of(cls, rows: Tensor, size: int) -> Held:
        """Return the multiset of these fingerprints [n]."""
        keys, counts = rows.cpu().unique(return_counts=True)
        return cls(keys, torch.full_like(keys, size), counts)

    def all_through(self, size: int) -> bool:
        """Return whether all were seen through so many coordinates."""
        return bool((self.sizes == size).all())

    def add(self, rows: Tensor, size: int) -> Held:
        """Return the multiset with these besides, whose sites act on so many coordinates."""
        return self._plus(Held.of(rows, size), 1)

    def sizes_of(self, rows: Tensor) -> Int[Tensor, "n"]:
        """Return how many coordinates the site of each acts on, the most where it is held through several.

        Raises:
            InputError: if one is not held, or not so often.
        """
        rows = rows.cpu()
        keys, where, wanted = rows.unique(return_inverse=True, return_counts=True)
        owner, at = self.keys.unique(return_inverse=True)
        total = torch.zeros_like(owner).index_add_(0, at, self.counts)
        found = torch.searchsorted(owner, keys).clamp_max(max(len(owner) - 1, 0))
        held = total[found] * (owner[found] == keys) if len(owner) else torch.zeros_like(keys)
        bad = (held < wanted)[where].nonzero().flatten()
        if len(bad):
            raise InputError(
                f"{len(bad)} of {len(rows)} data are not in the posterior, or not so often: they were never added, "
                f"with these targets, or are forgotten already. The first is row {int(bad[0])}."
            )
        last = torch.searchsorted(self.keys, keys, right=True) - 1  # its greatest size
        sizes = self.sizes[last][where]
        for i in (self.counts[last] < wanted).nonzero().flatten().tolist():  # held through several sizes
            of = self.keys == keys[i]
            each = self.sizes[of].repeat_interleave(self.counts[of]).flip(0)
            sizes[where == i] = each[: int(wanted[i])]
        return sizes

    def remove(self, rows: Tensor, sizes: Int[Tensor, "n"] | None = None) -> Held:
        """Return the multiset without these; `sizes` are those that `sizes_of` has found. Errors as there."""
        sizes, left = self.sizes_of(rows) if sizes is None else sizes, self
        for size in sizes.unique().tolist():
            left = left._plus(Held.of(rows.cpu()[sizes == size], size), -1)
        return left

    def _plus(self, other: Held, sign: int) -> Held:
        pairs = torch.cat([torch.stack([h.keys, h.sizes], -1) for h in (self, other)])
        both, where = pairs.unique(dim=0, return_inverse=True)
        counts = torch.zeros_like(both[:, 0]).index_add_(0, where, torch.cat([self.counts, sign * other.counts]))
        keep = counts != 0
        return Held(both[keep, 0], both[keep, 1], counts[keep])
