"""Processes that fit one model together: sums over their data, by `torch.distributed`.

Site sums are sums, so each process (rank) adds up its own data and an all-reduce does the rest. Before any data move,
the ranks exchange three numbers: how each is, what it is about to send and how much. So a rank that raised is heard,
ranks that went different ways find out, and none waits for a message that never comes:

    every error is announced in exactly one exchange, in which all ranks take part, and after which all raise.

A rank whose process has ended closes its connections, and the others' next call raises; one that hangs is given up
after the timeout of the process group.
"""

from __future__ import annotations

import contextlib
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dualgp.errors import DistributedError, InputError, NotPositiveDefiniteError

_FINE, _NO_GAUSSIAN, _FAILED = 0, 1, 2
_TEXT_BYTES = 1024

BatchT = TypeVar("BatchT", bound=Sized)


class Ranks:
    """The processes of a group; without one, this process alone, for which every method is the identity.

    A context: its end is agreed on, so that either all ranks leave it without an error or none does.

    Args:
        group: of `torch.distributed`; None for this process alone.
        remedy: what to do when a rank fails, for the message.

    Raises:
        InputError: if torch.distributed is not initialised, or this process is not in the group.
    """

    def __init__(self, group: Any = None, remedy: str = "") -> None:
        self.group, self.remedy = group, remedy
        self.rank, self.size, self.device = 0, 1, torch.device("cpu")
        self._heard: BaseException | None = None
        if group is None:
            return
        if not dist.is_available() or not dist.is_initialized():
            raise InputError("A process_group needs torch.distributed.init_process_group(backend) first.")
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise InputError("This process is not in the process_group given; call from those that are.")
        if dist.get_backend(group) == "nccl":
            self.device = torch.device("cuda", torch.cuda.current_device())

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.group is None or isinstance(error, DistributedError):
            return
        if error is None:
            self._exchange("end")
        elif isinstance(error, Exception):  # an interrupt ends the process, which the others notice
            with contextlib.suppress(DistributedError):
                self._exchange("error", status=_FAILED, message=f"{type(error).__name__}: {error}")

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Within it, NotPositiveDefiniteError on one rank is one on every rank: a wall that all of them see."""
        try:
            yield
        except NotPositiveDefiniteError as error:
            if self.group is not None and error is not self._heard:
                self._exchange("error", status=_NO_GAUSSIAN, message=str(error))  # raises here and everywhere
            raise

    def sum(self, *tensors: Tensor) -> list[Tensor]:
        """Return the sums over ranks, in float64, in one all-reduce.

        Raises:
            DistributedError: on every rank, as in all methods, if one has failed, is gone, or sends another size.
        """
        if self.group is None:
            return list(tensors)
        flat = self._flat(tensors)
        self._exchange("sum", flat.numel(), equal=True)
        self._call(dist.all_reduce, flat, group=self.group)
        return _unflat(flat, tensors, torch.float64)

    def sum_with_graph(self, *tensors: Tensor) -> list[Tensor]:
        """Return the sums over ranks; the gradient of what all ranks make of them, summed, flows back to each."""
        return list(tensors) if self.group is None else list(_Sum.apply(self, *tensors))

    def count(self, number: int) -> int:
        """Return the sum of a whole number over ranks."""
        return number if self.group is None else sum(self._exchange("count", number))

    def first(self, *tensors: Tensor) -> list[Tensor]:
        """Return what rank 0 has, which must have the shapes that the others have."""
        if self.group is None:
            return list(tensors)
        flat = self._flat(tensors)
        self._exchange("first", flat.numel(), equal=True)
        self._call(dist.broadcast, flat, src=dist.get_global_rank(self.group, 0), group=self.group)
        return _unflat(flat, tensors, None)

    def cat(self, tensor: Tensor, dim: int) -> Tensor:
        """Return the tensors of all ranks joined along a dimension, in the order of ranks; the others must agree."""
        if self.group is None:
            return tensor
        rows = tensor.movedim(dim, 0).contiguous()
        sizes = self._exchange(f"cat {rows.dtype} {tuple(rows.shape[1:])}", len(rows))
        if not any(sizes):
            return tensor
        padded = rows.new_zeros(max(sizes), *rows.shape[1:], device=self.device)
        padded[: len(rows)] = rows
        parts = self._all_gather(padded)
        joined = torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
        return joined.to(tensor.device).movedim(0, dim)

    def same(self, facts: Mapping[str, object]) -> None:
        """Raise InputError on every rank unless all have the same facts; one that is None is not compared."""
        if self.group is None:
            return
        text = json.dumps({name: None if value is None else str(value) for name, value in facts.items()})
        encoded = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        sizes = self._exchange("same", len(encoded))
        padded = encoded.new_zeros(max(sizes), device=self.device)
        padded[: len(encoded)] = encoded
        parts = zip(self._all_gather(padded), sizes, strict=True)
        told = [json.loads(bytes(part[:size].tolist()).decode()) for part, size in parts]
        wrong = []
        for name in dict.fromkeys(name for facts in told for name in facts):
            values = {rank: t[name] for rank, t in enumerate(told) if t.get(name) is not None}
            if len(set(values.values())) > 1:
                wrong.append(f"{name} ({', '.join(f'rank {rank}: {value}' for rank, value in values.items())})")
        if wrong:
            raise InputError(
                f"The {self.size} ranks disagree on {'; '.join(wrong)}. Give every rank the same model and arguments, "
                "and data that differ in their number only."
            )

    def turns(self, batches: Iterable[BatchT], none: BatchT) -> Iterator[tuple[BatchT, int]]:
        """Yield this rank's next batch and how many data all ranks have in theirs, until the last rank is through.

        Args:
            batches: of this rank.
            none: a batch without data, for when the others have more.
        """
        if self.group is None:
            yield from ((batch, len(batch)) for batch in batches)
            return
        rest = iter(batches)
        while True:
            batch = next(rest, none)
            total = self.count(len(batch))
            if total == 0:
                return
            yield batch, total

    def _exchange(
        self, what: str, size: int = 0, *, equal: bool = False, status: int = _FINE, message: str = ""
    ) -> list[int]:
        """Tell the others how this rank is and what it does next; return everyone's sizes, or raise what was heard."""
        mine = torch.tensor([status, zlib.crc32(what.encode()), size], dtype=torch.int64, device=self.device)
        told = torch.stack(self._all_gather(mine)).tolist()
        worst = max(row[0] for row in told)
        if worst != _FINE:
            texts = self._texts(message)
            heard = "; ".join(f"rank {r}: {t}" for r, (t, row) in enumerate(zip(texts, told, strict=True)) if row[0])
            if worst == _NO_GAUSSIAN:
                self._heard = NotPositiveDefiniteError(heard)
                raise self._heard
            raise DistributedError(f"The fit of {self.size} ranks has failed on {heard} {self.remedy}".rstrip())
        if len({row[1] for row in told}) > 1 or (equal and len({row[2] for row in told}) > 1):
            raise DistributedError(
                f"The {self.size} ranks have gone different ways: rank {self.rank} was at {what!r} of size {size}. "
                "Call the same methods with the same arguments on every rank, and use equal machines."
            )
        return [row[2] for row in told]

    def _texts(self, message: str) -> list[str]:
        encoded = message.encode()[:_TEXT_BYTES].ljust(_TEXT_BYTES, b"\0")
        parts = self._all_gather(torch.frombuffer(bytearray(encoded), dtype=torch.uint8).to(self.device))
        return [bytes(part.tolist()).rstrip(b"\0").decode(errors="ignore") for part in parts]

    def _flat(self, tensors: Iterable[Tensor]) -> Tensor:
        return torch.cat([t.detach().reshape(-1).to(self.device, torch.float64) for t in tensors])

    def _all_gather(self, tensor: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        self._call(dist.all_gather, parts, tensor, group=self.group)
        return parts

    def _call(self, collective: Callable[..., object], *args: Any, **options: Any) -> None:
        try:
            collective(*args, **options)
        except RuntimeError as error:  # what the backends raise when a connection ends or time is up
            raise DistributedError(
                f"Rank {self.rank} of {self.size} has lost another: a process has ended, or did not answer in time "
                f"({str(error).splitlines()[0]}). {self.remedy}".rstrip()
            ) from error


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ranks: Ranks, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.ranks = ranks
        return tuple(ranks.sum(*tensors))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.ranks.sum(*gradients)


def _unflat(flat: Tensor, like: tuple[Tensor, ...], dtype: torch.dtype | None) -> list[Tensor]:
    parts = flat.split([t.numel() for t in like])
    return [p.reshape(t.shape).to(t.device, dtype or t.dtype) for p, t in zip(parts, like, strict=True)]


ALONE = Ranks()
