"""Which backend a product takes, and why."""

from __future__ import annotations

from typing import NamedTuple

from dualgp.kernels.tiles import Operand


class Choice(NamedTuple):
    """A backend, "chunked" or "keops", and the reason for it."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def choose_backend(op: Operand, width: int, requested: str) -> Choice:
    """Return the backend of a product with [m, width]."""
    if requested != "auto":
        return Choice(requested, "asked for")
    return Choice("chunked", "KeOps is slower on a CPU")
