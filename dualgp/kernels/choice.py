"""Which backend a product takes, and why: what was measured, on the machine at hand where it has a GPU.

On a CPU chunked products were faster in all that was measured: 8 to 16 times in float32, 1.1 to 15 times in float64. On
a GPU both run once, on a part of the matrix, before the first large product of a shape.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dualgp.errors import BackendWarning
from dualgp.kernels.keops import keops_product, keops_status
from dualgp.kernels.tiles import Operand, product

_WIDEST = 8  # right-hand sides beyond which KeOps, which does not reuse an entry, falls behind
_MOST_DIMS = 20
_SMALLEST = 10**8  # entries, below which a product takes no time that matters
_RACE = 20_000  # rows and columns that are tried


class Choice(NamedTuple):
    """A backend, "chunked" or "keops", and the reason for it."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


_measured: dict[tuple[object, ...], Choice] = {}  # like the trial compile, once in a process


def choose_backend(op: Operand, width: int, requested: str = "auto") -> Choice:
    """Return the backend of a product with [m, width]; chunked, with a warning, where KeOps was asked for in vain."""
    if requested == "chunked":
        return Choice("chunked", "asked for")
    device = op.x.device.type
    if requested == "keops":
        status = keops_status(device)
        if not op.form.closed:
            return _instead(f"{op.form} has no closed form")
        return Choice("keops", "asked for") if status.available else _instead(str(status))
    if device != "cuda":
        return Choice("chunked", "KeOps is slower on a CPU")
    n, m = op.shape
    if not op.form.closed:
        return Choice("chunked", f"{op.form} has no closed form")
    if width > _WIDEST or op.x.shape[-1] > _MOST_DIMS or n * m < _SMALLEST:
        return Choice(
            "chunked", f"{n} × {m} in {op.x.shape[-1]} dimensions, {width} wide: for KeOps too wide or too small"
        )
    status = keops_status(device)
    return race(op, width) if status.available else Choice("chunked", str(status))


def race(op: Operand, width: int) -> Choice:
    """Return the backend that was faster on a part of the matrix; measured once for a form, dtype, shape and device."""
    key = (str(op.form), op.x.shape[-1], op.dtype, width, str(op.x.device))
    if key not in _measured:
        part = op.at(op.x[:_RACE], None if op.z is None else op.z[:_RACE])
        v = torch.ones(part.shape[1], width, dtype=op.dtype, device=op.x.device)
        with torch.no_grad():
            keops, chunked = (_seconds(f, part, v) for f in (keops_product, product))
        name = "keops" if keops < chunked else "chunked"
        times = f"KeOps {1e3 * keops:.1f} ms, chunked {1e3 * chunked:.1f} ms"
        _measured[key] = Choice(name, f"measured on {part.shape[0]} × {part.shape[1]}: {times}")
    return _measured[key]


def _seconds(function: Callable[[Operand, Tensor], Tensor], op: Operand, v: Tensor) -> float:
    """Median seconds of three runs, after one that compiles."""
    times = []
    for _ in range(4):
        _wait(op.x)
        start = time.perf_counter()
        function(op, v)
        _wait(op.x)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def _wait(x: Tensor) -> None:
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)


def _instead(reason: str) -> Choice:
    warnings.warn(f"Products are chunked: {reason}.", BackendWarning, stacklevel=5)
    return Choice("chunked", reason)
