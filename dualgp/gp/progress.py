"""One progress bar for long work; silent where nobody watches."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import NamedTuple

from tqdm.auto import tqdm

from dualgp.gp.hyper import Hyper
from dualgp.posterior import Posterior

Checkpoint = Callable[[Hyper, Posterior, int], None]


class TracePoint(NamedTuple):
    """Seconds since the start of the fit, bound in nats per datum, and how many data it is the bound of."""

    seconds: float
    bound: float
    num_data: int


class Progress:
    """Counts rounds, remembers the trace of the bound per datum, and shows both after a second of work.

    Args:
        show: True, False, or None for "if standard error is a terminal".
        checkpoint: called after each round with hyperparameters, q and the number of its data.
    """

    def __init__(self, show: bool | None, checkpoint: Checkpoint | None = None) -> None:
        self.start, self.checkpoint = time.perf_counter(), checkpoint
        self.trace: list[TracePoint] = []
        disable = None if show is None else not show
        self._bar = tqdm(desc="fit", unit="round", leave=False, delay=1.0, disable=disable)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._bar.close()

    def bound(self, value: float, n: int) -> None:
        """Note a value of the bound on n data."""
        self.trace.append(TracePoint(time.perf_counter() - self.start, value / n, n))

    def round(self, stage: str) -> None:
        """Note the end of a round."""
        self._bar.set_description(stage, refresh=False)
        if self.trace:
            self._bar.set_postfix_str(f"ELBO/n {self.trace[-1].bound:.4f}", refresh=False)
        self._bar.update()

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.start
