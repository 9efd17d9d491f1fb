"""Reductions of a kernel matrix over tiles that stay in cache, with gradients that compute every tile anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from gpytorch.kernels import Kernel
from torch import Tensor
from torch.autograd.function import once_differentiable

from dualgp.kernels.forms import Form, Parts

# Numbers in a tile: with its scratch it stays in the second-level cache. On a GPU, what keeps all of it busy.
_TILE = {"cpu": 1 << 18, "cuda": 1 << 26}
_ROWS = {"cpu": 256, "cuda": 8192}


class Operand(NamedTuple):
    """A kernel as a form, its matrix's inputs (z None: x itself, so symmetric) and the dtype of tiles."""

    kernel: Kernel
    form: Form
    x: Tensor
    z: Tensor | None
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return len(self.x), len(self.x if self.z is None else self.z)

    def parameters(self) -> list[Tensor]:
        """Return the hyperparameters that learn."""
        return [p for p in self.kernel.parameters() if p.requires_grad]

    def at(self, x: Tensor, z: Tensor | None) -> Operand:
        """Return the same with other inputs."""
        return self._replace(x=x, z=z)


class Prepared(NamedTuple):
    """Features of rows and columns and numbers, from which any tile is computed."""

    form: Form
    rows: list[Tensor]
    columns: list[Tensor]
    numbers: list[Tensor]

    @classmethod
    def of(cls, op: Operand) -> Prepared:
        """Prepare an operand; differentiable where gradients are enabled."""
        return cls(op.form, *op.form.prepare(op.x, op.z, op.dtype), op.form.numbers())

    def tile(self, i: slice, j: slice, *, on_diagonal: bool = False) -> Tensor:
        """Return K[i, j]."""
        rows, columns = iter([t[i] for t in self.rows]), iter([t[j] for t in self.columns])
        return self.form.tile(Parts(rows, columns, iter(self.numbers), on_diagonal))


def strips(n: int, step: int) -> Iterator[slice]:
    """Cut n into pieces of `step`."""
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))


def tiles(op: Operand) -> Iterator[tuple[slice, slice]]:
    """Yield the tiles of a matrix, or of its lower triangle if it is symmetric."""
    n, m = op.shape
    kind = op.x.device.type
    rows, size = _ROWS.get(kind, _ROWS["cuda"]), _TILE.get(kind, _TILE["cuda"])
    columns = size // rows
    if op.z is None:  # square, so that diagonal tiles are symmetric
        rows = columns = max(64, int(size**0.5))
    for i in strips(n, rows):
        for j in strips(m, columns):
            if op.z is not None or j.start <= i.start:
                yield i, j


def row_blocks(op: Operand) -> Iterator[slice]:
    """Yield blocks of whole rows."""
    n, m = op.shape
    yield from strips(n, max(1, _TILE.get(op.x.device.type, _TILE["cuda"]) // max(1, m)))


def product(op: Operand, v: Tensor) -> Tensor:
    """Return K v for v [m, w], in float64; differentiable, in float64 always: such sums of either sign cancel."""
    return _Product.apply(op, op.x, op.z, v, *op.parameters())


def row_reduction(
    op: Operand, reduce: Callable[..., Tensor], total: bool, per_row: Tensor | None, extra: Tensor | None
) -> Tensor:
    """Return f(K[i, :], per_row[i], extra) of blocks i of rows, joined, or summed if `total`; differentiable."""
    z = op.x if op.z is None else op.z
    return _RowReduction.apply(op, reduce, total, op.x, z, per_row, extra, *op.parameters())


class _Product(torch.autograd.Function):
    """K v, tile by tile; float64 sums."""

    @staticmethod
    def forward(ctx: Any, op: Operand, x: Tensor, z: Tensor | None, v: Tensor, *parameters: Tensor) -> Tensor:
        ctx.op = op
        ctx.save_for_backward(x, z, v, *parameters)
        return multiply(op.at(x, z), v)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, z, v, *parameters = ctx.saved_tensors
        v_double, grad = v.double(), grad.double()
        needs = ctx.needs_input_grad
        d_v = torch.zeros_like(v_double) if needs[3] else None
        op = ctx.op.at(x, z)
        if not (needs[1] or needs[2] or any(needs[4:])):
            d_v = multiply(op, grad, transpose=True)
            return (None, None, None, d_v.to(v.dtype), *[None] * len(parameters))
        op = op._replace(dtype=torch.float64)
        pull = _Pull(op, parameters)
        for i, j in tiles(op):
            tile = pull.tile(i, j, on_diagonal=z is None and i == j)
            adjoint = grad[i] @ v_double[j].mT
            mirrored = z is None and i != j
            if mirrored:
                adjoint += v_double[i] @ grad[j].mT
            pull.back(tile, adjoint, i, j)
            if d_v is not None:
                tile = tile.detach()
                d_v[j] += tile.mT @ grad[i]
                if mirrored:
                    d_v[i] += tile @ grad[j]
        d_x, d_z, *d_parameters = pull.finish(needs[1], needs[2])
        return (None, d_x, d_z, None if d_v is None else d_v.to(v.dtype), *d_parameters)


@torch.no_grad()
def multiply(op: Operand, v: Tensor, *, transpose: bool = False) -> Tensor:
    """Return K v or Kᵀ v [., w] in float64, holding a tile at a time."""
    n, m = op.shape
    if transpose and op.z is None:
        transpose = False
    prepared = Prepared.of(op)
    symmetric = op.z is None
    out = v.new_zeros(m if transpose else n, v.shape[-1], dtype=torch.float64)
    v = v.to(op.dtype)
    for i, j in tiles(op):
        tile = prepared.tile(i, j, on_diagonal=symmetric and i == j)
        if not transpose:
            out[i] += tile @ v[j]
        if transpose or (symmetric and i != j):
            out[j] += tile.mT @ v[i]
    return out


class _RowReduction(torch.autograd.Function):
    """A sum or concatenation over blocks of rows."""

    @staticmethod
    def forward(
        ctx: Any,
        op: Operand,
        reduce: Callable[..., Tensor],
        total: bool,
        x: Tensor,
        z: Tensor,
        per_row: Tensor | None,
        extra: Tensor | None,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.op, ctx.reduce, ctx.total = op, reduce, total
        ctx.save_for_backward(x, z, per_row, extra, *parameters)
        op = op.at(x, z)
        prepared = Prepared.of(op)
        parts: list[Tensor] = []
        for i in row_blocks(op):
            part = reduce(prepared.tile(i, slice(None)), None if per_row is None else per_row[i], extra)
            if total and parts:
                parts[0] += part
            else:
                parts.append(part)
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, z, per_row, extra, *parameters = ctx.saved_tensors
        op = ctx.op.at(x, z)._replace(dtype=torch.float64)
        pull = _Pull(op, parameters)
        d_row = None if per_row is None else torch.zeros_like(per_row)
        d_extra = None if extra is None else torch.zeros_like(extra)
        for i in row_blocks(op):
            tile = pull.tile(i, slice(None))
            with torch.enable_grad():
                K = tile.detach().requires_grad_()
                mine = None if per_row is None else per_row[i].detach().requires_grad_()
                given = None if extra is None else extra.detach().requires_grad_()
                part = ctx.reduce(K, mine, given)
            live = [t for t in (K, mine, given) if t is not None]
            found = iter(torch.autograd.grad(part, live, grad if ctx.total else grad[i]))
            pull.back(tile, next(found), i, slice(None))
            if d_row is not None:
                d_row[i] = next(found)
            if d_extra is not None:
                d_extra += next(found)
        d_x, d_z, *d_parameters = pull.finish(ctx.needs_input_grad[3], ctx.needs_input_grad[4])
        return (None, None, None, d_x, d_z, d_row, d_extra, *d_parameters)


class _Pull:
    """Tiles with a graph, one at a time, and what their adjoints are to inputs and hyperparameters."""

    def __init__(self, op: Operand, parameters: list[Tensor]) -> None:
        self.op, self.parameters = op, parameters
        with torch.enable_grad():
            self.x = op.x.detach().requires_grad_()
            self.z = None if op.z is None else op.z.detach().requires_grad_()
            self.source = Prepared.of(op.at(self.x, self.z))
        self.sources = [*self.source.rows, *self.source.columns, *self.source.numbers]
        self.sums = [torch.zeros_like(t, dtype=torch.float64) for t in self.sources]
        # Kernels without a closed form read their parameters inside the tile.
        self.inside = [] if op.form.closed else parameters
        self.direct = [torch.zeros_like(p) for p in self.inside]
        self.leaves: list[Tensor] = []

    def tile(self, i: slice, j: slice, *, on_diagonal: bool = False) -> Tensor:
        """Return K[i, j], remembering what it was made of."""
        rows, columns, numbers = self.source.rows, self.source.columns, self.source.numbers
        parts = ([t[i].detach().requires_grad_() for t in rows], [t[j].detach().requires_grad_() for t in columns])
        last = [t.detach().requires_grad_() for t in numbers]
        self.leaves = [*parts[0], *parts[1], *last]
        with torch.enable_grad():
            return self.op.form.tile(Parts(iter(parts[0]), iter(parts[1]), iter(last), on_diagonal))

    def back(self, tile: Tensor, adjoint: Tensor, i: slice, j: slice) -> None:
        """Add what an adjoint of the last tile says."""
        found = torch.autograd.grad(tile, [*self.leaves, *self.inside], adjoint, allow_unused=True)
        count = len(self.source.rows)
        where = [i] * count + [j] * count + [...] * len(self.source.numbers)
        for total, at, g in zip(self.sums, where, found, strict=False):
            if g is not None:
                total[at] += g
        for total, g in zip(self.direct, found[len(self.leaves) :], strict=True):
            if g is not None:
                total += g

    def finish(self, need_x: bool, need_z: bool) -> list[Tensor | None]:
        """Return the gradients of x, z and the hyperparameters."""
        wanted = [self.x, *([] if self.z is None else [self.z]), *self.parameters]
        live = [(t, s.to(t.dtype)) for t, s in zip(self.sources, self.sums, strict=True) if t.requires_grad]
        tensors, adjoints = zip(*live, strict=True)
        found = list(torch.autograd.grad(tensors, wanted, adjoints, allow_unused=True))
        d_x, d_z = found[0], None if self.z is None else found[1]
        rest = found[1 if self.z is None else 2 :]
        if self.inside:
            rest = [d if g is None else g + d for g, d in zip(rest, self.direct, strict=True)]
        return [d_x if need_x else None, d_z if need_z else None, *rest]
