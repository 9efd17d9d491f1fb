"""Tensors on disk in the safetensors format, read by name and piece by piece."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import torch
from torch import Tensor

from dualgp.errors import InputError

Source: TypeAlias = str | PathLike[str]
Open: TypeAlias = Callable[[Path], BinaryIO]  # a file of a shard, opened once
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
            if not names:
                raise ValueError("it names no shard")
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
            places = sorted(e["data_offsets"] for name, e in header.items() if name != "__metadata__")
            if any(one[1] > other[0] for one, other in pairwise(places)):
                raise ValueError("two tensors overlap")
            for name, entry in header.items():
                if name == "__metadata__":
                    continue
                first, last = entry["data_offsets"]
                tensor = StoredTensor(file, _DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + first)
                if first < 0 or any(side < 0 for side in tensor.shape):
                    raise ValueError(f"{name!r} has a negative size or place")
                if last - first != tensor.numel * tensor.dtype.itemsize or 8 + length + last > size:
                    raise ValueError(f"{name!r} ends at byte {8 + length + last} of {size}")
                if name in self.tensors:
                    raise ValueError(f"{name!r} is in another shard too")
                self.tensors[name] = tensor
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{file} is no safetensors file, or is truncated: {error}.") from error

    def values(self, name: str, file: Open, begin: int = 0, count: int | None = None) -> Tensor:
        """Return a tensor, or `count` of its numbers from the `begin`-th on, flat.

        Raises:
            InputError: if a value is not finite, or the file has become shorter.
        """
        tensor = self.tensors[name]
        found = read(file(tensor.file), tensor, begin, tensor.numel if count is None else count)
        if not bool(found.isfinite().all()):
            raise InputError(f"{name!r} in {tensor.file} has values that are not finite.")
        return found.view(tensor.shape) if count is None else found


@dataclass(frozen=True)
class Layer:
    """A weight, and the bias that is one more column of its curvature's second factor, if it is."""

    weight: str
    bias: str | None


def factored_layers(base: Shards, curvature: Shards) -> dict[str, Layer]:
    """Return the layers of a model whose curvature is stored as factors, by the names of both their tensors.

    Raises:
        InputError: if a factor is missing, or does not fit the weight.
    """
    found: dict[str, Layer] = {}
    for name, tensor in base.tensors.items():
        G, A = (curvature.tensors.get(f"{name}.{side}") for side in "GA")
        if (G is None and A is None) or f"{name}.G" in base.tensors:
            continue
        bias = name.removesuffix("weight") + "bias"
        n_out, n_in = (tensor.shape[0], math.prod(tensor.shape[1:])) if len(tensor.shape) > 1 else (0, 0)
        sides = None if G is None or A is None else (G.shape, A.shape)
        with_bias = sides == ((n_out,) * 2, (n_in + 1,) * 2) and bias in base.tensors
        if not with_bias and sides != ((n_out,) * 2, (n_in,) * 2):
            raise InputError(
                f"{name!r} of {tensor.shape} needs factors {name + '.G'!r} and {name + '.A'!r} of its two sides in "
                f"{curvature.source}, with one more column for {bias!r}; got {G and G.shape} and {A and A.shape}."
            )
        if with_bias and base.tensors[bias].shape != (n_out,):
            raise InputError(f"{bias!r} of {base.tensors[bias].shape} is no bias of {name!r}, {tensor.shape}.")
        layer = Layer(name, bias if with_bias else None)
        found |= dict.fromkeys([name, bias] if with_bias else [name], layer)
    return found


def read(file: BinaryIO, tensor: StoredTensor, begin: int, count: int) -> Tensor:
    """Return `count` numbers of a tensor from the `begin`-th on, flat.

    Raises:
        InputError: if the file has become shorter.
    """
    width = tensor.dtype.itemsize
    buffer = bytearray(count * width)
    file.seek(tensor.start + begin * width)
    if file.readinto(buffer) != len(buffer):  # type: ignore[attr-defined]
        raise InputError(f"{tensor.file} ended while it was read: it has been truncated.")
    return torch.frombuffer(buffer, dtype=tensor.dtype)
