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
    """A multiset of fingerprints: the data that a posterior holds.

    Args:
        keys: fingerprints, ascending and distinct, [u].
        counts: how often each is held, [u].
    """

    keys: Int[Tensor, "u"]
    counts: Int[Tensor, "u"]

    @classmethod
    def of(cls, rows: Tensor) -> Held:
        """Return the multiset of these fingerprints [n]."""
        return cls(*rows.cpu().unique(return_counts=True))

    def add(self, rows: Tensor) -> Held:
        """Return the multiset with these besides."""
        return self._plus(Held.of(rows), 1)

    def remove(self, rows: Tensor) -> Held:
        """Return the multiset without these.

        Raises:
            InputError: if one is not held, or not so often.
        """
        taken = Held.of(rows)
        left = self._plus(taken, -1)
        if (left.counts < 0).any():
            bad = torch.isin(rows.cpu(), left.keys[left.counts < 0]).nonzero().flatten()
            raise InputError(
                f"{len(bad)} of {len(rows)} data are not in the posterior, or not so often: they were never added, "
                f"with these targets, or are forgotten already. The first is row {int(bad[0])}."
            )
        return left

    def _plus(self, other: Held, sign: int) -> Held:
        keys, where = torch.cat([self.keys, other.keys]).unique(return_inverse=True)
        counts = torch.zeros_like(keys).index_add_(0, where, torch.cat([self.counts, sign * other.counts]))
        return Held(keys[counts != 0], counts[counts != 0])
