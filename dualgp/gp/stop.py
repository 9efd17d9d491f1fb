"""When to stop."""

from __future__ import annotations

from typing import NamedTuple


class Stop(NamedTuple):
    """The stopping rule: a round that gains less than `tol` nats per datum is the last; `max_rounds` at most."""

    tol: float
    max_rounds: int

    def looser(self) -> Stop:
        """The rule of a first stage, which only has to come near."""
        return Stop(10 * self.tol, self.max_rounds)
