"""Random numbers are drawn on the device of their generator and used on another, if need be.

torch refuses a generator of the CPU for tensors of a GPU. Here it serves both, so that one seed draws one sequence of
numbers on every machine.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def normal(shape: Sequence[int], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return standard normal numbers of the dtype and on the device of `like`.

    Example:
        >>> normal((2, 3), torch.zeros(0), torch.Generator().manual_seed(0)).shape
        torch.Size([2, 3])
    """
    return torch.randn(*shape, dtype=like.dtype, device=source(like.device, generator), generator=generator).to(like)


def uniform(shape: Sequence[int], device: torch.device, generator: torch.Generator | None) -> Tensor:
    """Return uniform numbers on [0, 1), in float64."""
    numbers = torch.rand(*shape, dtype=torch.float64, device=source(device, generator), generator=generator)
    return numbers.to(device)


def whole_number(limit: int, generator: torch.Generator | None) -> int:
    """Return a whole number below `limit`."""
    return int(torch.randint(limit, (), generator=generator, device=source(torch.device("cpu"), generator)))


def source(device: torch.device, generator: torch.Generator | None) -> torch.device:
    """Return where numbers for a device are drawn."""
    return device if generator is None else generator.device
