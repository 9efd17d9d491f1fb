"""Parameters side by side in flat buffers, so that an update is a handful of passes whatever the number of tensors.

The parameters keep their own memory: what is drawn is copied into them, and the mean copied back, bit by bit. State is
float32, or float64 for float64 parameters, so that weights in half precision lose nothing between steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dualgp.errors import InputError

_CHUNK = 1 << 16  # numbers of a buffer at a time: half a dozen buffers stay in the second-level cache


class Bucket:
    """The parameters of one group that share device and dtype, and their buffers, each flat.

    Args:
        group: the optimiser's group, whose settings hold for all of them.
        params: at least one.
        names: of the buffers that last from step to step, besides the mean.
    """

    def __init__(self, group: dict[str, Any], params: list[nn.Parameter], names: tuple[str, ...]) -> None:
        self.group, self.params = group, params
        self.dtype = torch.float64 if params[0].dtype == torch.float64 else torch.float32
        self.low_precision = params[0].dtype != self.dtype
        self.sizes = [p.numel() for p in params]
        self.size = sum(self.sizes)
        self.names = ("mean", *names)
        with torch.inference_mode(False), torch.no_grad():
            like = torch.zeros(self.size, dtype=self.dtype, device=params[0].device)
            self.buffers = {name: like.clone() for name in (*self.names, "sample", "grad")}
            self.views = {name: self._split(flat) for name, flat in self.buffers.items()}
            torch._foreach_copy_(self.views["mean"], [p.detach() for p in params])
            # Weights in low precision come back from a copy: the mean, rounded again at random, would be others.
            self.kept = [torch.empty_like(p) for p in params] if self.low_precision else self.views["mean"]
        self._learned = [p.requires_grad for p in params]
        self.seen = [False] * len(params)  # whose gradients the averages hold
        self.uniform: Callable[[Tensor], Tensor] | None = None  # noise to round low precision by, or to the nearest
        self.read_versions()

    def read_versions(self, as_of: Bucket | None = None) -> None:
        """Take the parameters to be what `mean` says, rounded; or those that are so in a bucket which this copies."""
        same = [True] * len(self.params) if as_of is None else as_of._unchanged()
        self._written = [p._version if s else -1 for p, s in zip(self.params, same, strict=True)]

    def _unchanged(self) -> list[bool]:
        return [p._version == v for p, v in zip(self.params, self._written, strict=True)]

    def __getitem__(self, name: str) -> Tensor:
        return self.buffers[name]

    def add(self, name: str) -> Tensor:
        """Return a buffer, made of zeros if it is not there yet."""
        if name not in self.buffers:
            with torch.inference_mode(False), torch.no_grad():
                self.buffers[name] = torch.zeros_like(self.buffers["mean"])
                self.views[name] = self._split(self.buffers[name])
        return self.buffers[name]

    def _split(self, flat: Tensor) -> list[Tensor]:
        parts = flat.split(self.sizes)
        return [part.view(p.shape) for part, p in zip(parts, self.params, strict=True)]

    def chunks(self, *names: str, runs: list[slice] | None = None) -> Iterator[tuple[Tensor, ...]]:
        """Yield pieces of buffers, the same of each, that stay in cache; of some runs of them only, or of all."""
        step = _CHUNK if self["mean"].device.type == "cpu" else self.size
        for run in [slice(0, self.size)] if runs is None else runs:
            for start in range(run.start, run.stop, max(1, step)):
                yield tuple(self.buffers[name][start : min(start + step, run.stop)] for name in names)

    def average(self, name: str, source: str, share: float) -> None:
        """Let a buffer have a share in an average: a whole one takes its place, and leaves it the old one."""
        if share == 1.0:
            self.buffers[name], self.buffers[source] = self.buffers[source], self.buffers[name]
            self.views[name], self.views[source] = self.views[source], self.views[name]
        else:
            for mean, value in self.chunks(name, source):
                mean.lerp_(value, share)

    def runs(self, wanted: list[bool]) -> list[slice]:
        """Return where the wanted parameters lie, neighbours joined."""
        found: list[slice] = []
        start = 0
        for size, want in zip(self.sizes, wanted, strict=True):
            if want and found and found[-1].stop == start:
                found[-1] = slice(found[-1].start, start + size)
            elif want:
                found.append(slice(start, start + size))
            start += size
        return found

    def learned(self) -> list[bool]:
        """Return which parameters are no constants: those that required a gradient when they came, or do now."""
        return [came or p.requires_grad for came, p in zip(self._learned, self.params, strict=True)]

    def of_learned(self, flat: Tensor) -> Tensor:
        """Return the numbers of a flat tensor that are of parameters which are learned."""
        parts = [flat[run] for run in self.runs(self.learned())]
        return torch.cat(parts) if parts else flat[:0]

    def read_mean(self) -> None:
        """Take the parameters as the mean: someone may have changed them since.

        Of low-precision weights the mean is kept to more digits than they hold, so only those are read that were
        written to (through torch, whose version counter tells).
        """
        self._copy(self.views["mean"], self.params, [not (self.low_precision and same) for same in self._unchanged()])

    def keep(self) -> None:
        """Keep what the parameters are, and read the mean."""
        self.read_mean()
        if self.low_precision:
            self._copy(self.kept, self.params, [True] * len(self.params))

    def restore(self, wanted: list[bool]) -> None:
        """Put the parameters wanted back to what was kept."""
        self._copy(self.params, self.kept, wanted)
        self.read_versions()

    def write(self, name: str, wanted: list[bool]) -> None:
        """Copy a buffer into the parameters wanted."""
        if self.low_precision and self.uniform is not None and name == "mean":
            for p, value, want in zip(self.params, self.views[name], wanted, strict=True):
                if want:
                    p.copy_(_round_at_random(value, p.dtype, self.uniform(torch.empty_like(value))))
        else:
            self._copy(self.params, self.views[name], wanted)
        if name == "mean":
            self.read_versions()

    def read_gradients(self, wanted: list[bool]) -> None:
        """Copy gradients into their buffer, zeros where there is none, and let go of them."""
        have = [want and p.grad is not None for p, want in zip(self.params, wanted, strict=True)]
        if not all(have):
            self["grad"].zero_()
        grads = [p.grad if h else p for p, h in zip(self.params, have, strict=True)]
        self._copy(self.views["grad"], grads, have)  # type: ignore[arg-type]
        self.drop_gradients()

    def drop_gradients(self) -> None:
        """Let go of the gradients."""
        for p in self.params:
            p.grad = None

    @staticmethod
    def _copy(to: list[Any], source: list[Any], wanted: list[bool]) -> None:
        if not all(wanted):
            to = [t for t, want in zip(to, wanted, strict=True) if want]
            source = [s for s, want in zip(source, wanted, strict=True) if want]
        if to:
            torch._foreach_copy_(to, [s.detach() for s in source])


def average_product(mean: Tensor, a: Tensor, b: Tensor, share: float) -> None:
    """Let a∘b have a share in an average, in place; a whole one overwrites."""
    if share == 1.0:
        torch.mul(a, b, out=mean)
    else:
        mean.mul_(1.0 - share).addcmul_(a, b, value=share)


def buckets_of(group: dict[str, Any], names: tuple[str, ...]) -> list[Bucket]:
    """Return the buckets of a group, one for each device and dtype in it.

    Raises:
        InputError: for a parameter that is no real floating-point tensor, or shares memory with itself.
    """
    kinds: dict[tuple[torch.device, torch.dtype], list[nn.Parameter]] = {}
    for number, p in enumerate(group["params"]):
        if not p.is_floating_point() or p.layout != torch.strided:
            raise InputError(
                f"Parameter {number} of a group, of shape {tuple(p.shape)}, is {p.dtype} and {p.layout}; expected a "
                "dense tensor of floating-point numbers. Leave it out, or view complex numbers as pairs of real ones."
            )
        kinds.setdefault((p.device, p.dtype), []).append(p)
    return [Bucket(group, params, names) for params in kinds.values()]


def _round_at_random(value: Tensor, dtype: torch.dtype, uniform: Tensor) -> Tensor:
    """Round up or down at random so that the expectation is exact: small steps are not lost to half precision."""
    near = value.to(dtype)
    gap = value - near.to(value.dtype)
    up = torch.full_like(near, float("inf")).copysign(gap.to(dtype))
    other = torch.nextafter(near, up)
    width = (other.to(value.dtype) - near.to(value.dtype)).abs()
    take = uniform * width < gap.abs()
    return torch.where(take & (gap != 0), other, near)
