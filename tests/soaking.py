"""A stream that saves itself after each batch, in a process that can be killed at any time and started again."""

import contextlib
import ctypes
import gc
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from gpytorch.kernels import RBFKernel, ScaleKernel
from gpytorch.likelihoods import BernoulliLikelihood, GaussianLikelihood, Likelihood
from torch import Tensor

from dualgp import DualGP

SIZE = 20  # data in a batch
KINDS = {
    "regression": (GaussianLikelihood, {"memory": 40}),
    "labels": (BernoulliLikelihood, {"memory": 40, "memory_rule": "leverage"}),
    "window": (GaussianLikelihood, {"window": 60}),
}


def modules(kind: str) -> tuple[ScaleKernel, Likelihood]:
    return ScaleKernel(RBFKernel()).double(), KINDS[kind][0]().double()


def batch(kind: str, i: int) -> tuple[Tensor, Tensor]:
    """The i-th batch of a stream without end, whose function drifts."""
    g = torch.Generator().manual_seed(1000 + i)
    x = 6 * torch.rand(SIZE, 1, generator=g, dtype=torch.float64)
    f = (2 * x[:, 0] + 0.001 * i).sin() + 0.3 * torch.randn(SIZE, generator=g, dtype=torch.float64)
    return x, (f > 0).double() if kind == "labels" else f


class _Malloc(ctypes.Structure):
    """What glibc's mallinfo2 tells."""

    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in _names.split()]


def in_use() -> tuple[float, int]:
    """MB that this process holds from malloc, and how many blocks Python holds besides.

    What is resident rises and falls by megabytes as heaps fragment and tables are copied; these tell each byte.
    """
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = _Malloc
    told = libc.mallinfo2()
    return (told.uordblks + told.hblkhd) / 1e6, sys.getallocatedblocks()


@contextlib.contextmanager
def _few_to_collect() -> Iterator[None]:
    """Let gc.collect() look at what is made within only, which takes no time."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def stream(kind: str, path: Path, log: Path, limit: int | None) -> None:
    """Go on from `path`, if it is there, until `limit` batches are in; say after each how many, in what memory."""
    torch.set_num_threads(1)
    if path.exists():
        gp = DualGP.load(path, *modules(kind))
    else:
        gp = DualGP(*modules(kind), num_inducing=15, **KINDS[kind][1])
    with warnings.catch_warnings(), log.open("a") as out, _few_to_collect():
        warnings.simplefilter("ignore")
        while limit is None or int(gp.num_seen or 0) < SIZE * limit:
            i = int(gp.num_seen or 0) // SIZE
            gp.update(*batch(kind, i))
            gp.save(path)
            gc.collect()
            out.write("{} {} {:.4f} {}\n".format(os.getpid(), i, *in_use()))
            out.flush()


if __name__ == "__main__":
    kind, path, log, limit = sys.argv[1:]
    stream(kind, Path(path), Path(log), int(limit) if limit != "-" else None)
