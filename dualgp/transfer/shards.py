"""Merging models that do not fit in memory: safetensors shards in, shards out, a piece of one tensor at a time."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import torch
from torch import Tensor

from dualgp.errors import InputError, NotPositiveDefiniteError
from dualgp.weights import Number

Source: TypeAlias = str | PathLike[str]
_PIECE = 1 << 20  # numbers of a tensor that are worked on at once
_INDEX = "*.safetensors.index.json"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a safetensors file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # in bytes, from the beginning of the file

    @property
    def numel(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)


class Shards:
    """The tensors of a model on disk by name, and the files they lie in; nothing is read until it is asked for.

    Args:
        source: a safetensors file, or a folder of them, with or without an index.

    Raises:
        InputError: if there is no such file, a shard of the index is missing, or one is damaged or truncated.
    """

    def __init__(self, source: Source) -> None:
        self.source = Path(source)
        self.index, self.files = self._find()
        self.headers: dict[Path, dict[str, Any]] = {}
        self.data_start: dict[Path, int] = {}
        self.tensors: dict[str, StoredTensor] = {}
        for file in self.files:
            self._read_header(file)
        named = set() if self.index is None else set(self.index["weight_map"])
        if missing := sorted(named - set(self.tensors)):
            raise InputError(f"{self.source} lacks {len(missing)} tensors of its index, the first {missing[0]!r}.")

    def _find(self) -> tuple[dict[str, Any] | None, list[Path]]:
        path = self.source
        if path.is_file():
            return None, [path]
        if not path.is_dir():
            raise InputError(f"There is no file or folder at {path}.")
        found = sorted(path.glob(_INDEX))
        if not found:
            files = sorted(path.glob("*.safetensors"))
            if not files:
                raise InputError(f"The folder {path} has no safetensors file.")
            return None, files
        try:
            index = json.loads(found[0].read_text(encoding="utf-8"))
            names = sorted(set(index["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise InputError(f"The index {found[0]} is damaged: {error}.") from error
        outside = [n for n in names if Path(n).name != n]
        missing = [n for n in names if n not in outside and not (path / n).is_file()]
        if outside or missing:
            raise InputError(
                f"The index {found[0]} names {(outside + missing)[0]!r}, which is not in the folder ({len(missing)} of "
                f"{len(names)} shards missing): fetch it again."
            )
        index["file"] = found[0].name
        return index, [path / name for name in names]

    def _read_header(self, file: Path) -> None:
        size = file.stat().st_size
        try:
            with file.open("rb") as f:
                length = int.from_bytes(f.read(8), "little")
                if size < 8 or length > size - 8:
                    raise ValueError(f"a header of {length} bytes in a file of {size}")
                header = json.loads(f.read(length))
            self.headers[file], self.data_start[file] = header, 8 + length
            for name, entry in header.items():
                if name == "__metadata__":
                    continue
                first, last = entry["data_offsets"]
                tensor = StoredTensor(file, _DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + first)
                if last - first != tensor.numel * tensor.dtype.itemsize or 8 + length + last > size:
                    raise ValueError(f"{name!r} ends at byte {8 + length + last} of {size}")
                if name in self.tensors:
                    raise ValueError(f"{name!r} is in another shard too")
                self.tensors[name] = tensor
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{file} is no safetensors file, or is truncated: {error}.") from error


def merge_shards(
    base: Source,
    models: Sequence[Source],
    out: Source,
    *,
    curvatures: Sequence[Source] | None = None,
    weights: Sequence[Number] | None = None,
    scales: Sequence[Number] | None = None,
    base_precision: Source | Number = 1.0,
) -> None:
    """Write the diagonal merge θ₀ + S⁻¹ Σ α_t (S₀ + c_tB_t)(θ_t − θ₀), S = S₀ + Σ α_t c_tB_t, in the base's shards.

    A piece of one tensor of every model is in memory at a time, some tens of megabytes in all. Integers are the
    base's. `out` appears when all is written, and not at all if something is wrong.

    Args:
        base: θ₀, a safetensors file or a folder of shards.
        models: θ_t, with the same names, shapes and dtypes.
        out: a file, or a folder as the base is; it must not exist.
        curvatures: diagonals B_t, named as the floating-point tensors; None for zero: task arithmetic.
        weights: α_t; 1 if None.
        scales: c_t, for curvatures that are means over data: how many data; 1 if None.
        base_precision: S₀, a number or a file or folder as `curvatures`.

    Raises:
        InputError: if a shard is missing or truncated, names, shapes or dtypes differ, a value is not finite, or `out`
            exists.
        NotPositiveDefiniteError: if S has an element that is not positive.

    Source: Daheim et al. 2024, eq. 12, elementwise.

    Example:
        >>> from safetensors.torch import load_file, save_file
        >>> folder = tempfile.mkdtemp()
        >>> for name, value in {"base": 0.0, "a": 1.0, "b": 3.0}.items():
        ...     save_file({"w": torch.full((2,), value)}, f"{folder}/{name}.safetensors")
        >>> merge_shards(*(f"{folder}/base.safetensors", [f"{folder}/{n}.safetensors" for n in "ab"]),
        ...     f"{folder}/out.safetensors", weights=[0.5, 0.5])
        >>> load_file(f"{folder}/out.safetensors")["w"]
        tensor([2., 2.])
    """
    alphas = _numbers("weights", weights, len(models))
    counts = _numbers("scales", scales, len(models))
    if curvatures is not None and len(curvatures) != len(models):
        raise InputError(f"Expected a curvature for each of {len(models)} models, got {len(curvatures)}.")
    target = Path(out)
    if target.exists():
        raise InputError(f"{target} exists; merge into a new place.")
    start, experts = Shards(base), [Shards(m) for m in models]
    precisions = None if curvatures is None else [Shards(c) for c in curvatures]
    prior = Shards(base_precision) if not isinstance(base_precision, int | float) else float(base_precision)
    _check_alike(start, experts, [*(precisions or ()), *([prior] if isinstance(prior, Shards) else ())])
    plan = _Plan(start, experts, precisions, prior, alphas, counts)
    folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=target.name, suffix=".part"))
    try:
        for file in start.files:
            plan.write(file, folder / file.name)
        if start.source.is_file():
            (folder / start.files[0].name).rename(target)
        else:
            if start.index is not None:
                index = {k: v for k, v in start.index.items() if k != "file"}
                (folder / start.index["file"]).write_text(json.dumps(index, indent=2), encoding="utf-8")
            folder.rename(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class _Plan:
    base: Shards
    models: list[Shards]
    curvatures: list[Shards] | None
    prior: Shards | float
    alphas: list[float]
    counts: list[float]

    def write(self, source: Path, target: Path) -> None:
        """Write one shard of the result, with the header of the base's."""
        header = json.dumps(self.base.headers[source], separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        with target.open("wb") as out, ExitStack() as stack:
            opened: dict[Path, BinaryIO] = {}

            def file(path: Path) -> BinaryIO:
                if path not in opened:
                    opened[path] = stack.enter_context(path.open("rb"))
                return opened[path]

            out.write(len(header).to_bytes(8, "little") + header)
            inside = [(name, t) for name, t in self.base.tensors.items() if t.file == source]
            shift = 8 + len(header) - self.base.data_start[source]
            for name, tensor in sorted(inside, key=lambda item: item[1].start):
                out.seek(tensor.start + shift)
                for begin, count in _pieces(tensor.numel):
                    piece = _read(file(tensor.file), tensor, begin, count)
                    if tensor.dtype.is_floating_point:
                        piece = self._merged(name, piece, begin, count, file).to(tensor.dtype)
                    out.write(piece.view(torch.uint8).numpy().tobytes())

    def _merged(self, name: str, piece: Tensor, begin: int, count: int, file: Any) -> Tensor:
        def read(shards: Shards) -> Tensor:
            tensor = shards.tensors[name]
            values = _read(file(tensor.file), tensor, begin, count).to(work)
            if not bool(values.isfinite().all()):
                raise InputError(f"{name!r} in {tensor.file} has values that are not finite.")
            return values

        work = torch.float64 if piece.dtype == torch.float64 else torch.float32
        theta = read(self.base)
        S0 = read(self.prior) if isinstance(self.prior, Shards) else torch.tensor(self.prior, dtype=work)
        S, total = S0.expand(count).clone(), torch.zeros(count, dtype=work)
        for t, (model, alpha) in enumerate(zip(self.models, self.alphas, strict=True)):
            B = torch.zeros((), dtype=work) if self.curvatures is None else self.counts[t] * read(self.curvatures[t])
            S += alpha * B
            total += alpha * (S0 + B) * (read(model) - theta)
        if not bool((S > 0).all()):
            raise NotPositiveDefiniteError(
                f"The merged precision of {name!r} has an element {float(S.min()):.3g}: raise base_precision, or give "
                "less negative weight."
            )
        return theta + total / S


def _pieces(numel: int) -> Iterator[tuple[int, int]]:
    for begin in range(0, numel, _PIECE):
        yield begin, min(_PIECE, numel - begin)


def _read(file: BinaryIO, tensor: StoredTensor, begin: int, count: int) -> Tensor:
    width = tensor.dtype.itemsize
    buffer = bytearray(count * width)
    file.seek(tensor.start + begin * width)
    if file.readinto(buffer) != len(buffer):  # type: ignore[attr-defined]
        raise InputError(f"{tensor.file} ended while it was read: it has been truncated.")
    return torch.frombuffer(buffer, dtype=tensor.dtype)


def _numbers(name: str, values: Sequence[Number] | None, count: int) -> list[float]:
    found = [1.0] * count if values is None else [float(v) for v in values]
    if count == 0 or len(found) != count or not all(math.isfinite(v) for v in found):
        raise InputError(f"Expected one model or more and as many finite {name}; got {count} models and {found}.")
    return found


def _check_alike(base: Shards, models: Sequence[Shards], diagonals: Sequence[Shards]) -> None:
    for shards in models:
        _check_names(base, shards, base.tensors)
        for name, tensor in base.tensors.items():
            other = shards.tensors[name]
            if (other.shape, other.dtype) != (tensor.shape, tensor.dtype):
                raise InputError(
                    f"{name!r} is {tensor.shape} of {tensor.dtype} in {base.source} and {other.shape} of {other.dtype} "
                    f"in {shards.source}. Models of one architecture and dtype were expected."
                )
    floats = {name: t for name, t in base.tensors.items() if t.dtype.is_floating_point}
    for shards in diagonals:
        _check_names(base, shards, floats)
        wrong = [n for n, t in floats.items() if shards.tensors[n].shape != t.shape]
        if wrong:
            raise InputError(f"The diagonal {shards.source} has another shape for {wrong[0]!r} than the model.")


def _check_names(base: Shards, other: Shards, wanted: Mapping[str, StoredTensor]) -> None:
    missing, more = sorted(set(wanted) - set(other.tensors)), sorted(set(other.tensors) - set(base.tensors))
    if missing or more:
        raise InputError(
            f"{other.source} has not the tensors of {base.source}: it lacks {missing[:3]} ({len(missing)}) and has "
            f"{more[:3]} ({len(more)}) besides."
        )
