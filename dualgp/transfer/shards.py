"""Merging models that do not fit in memory: safetensors shards in, shards out, a piece of one tensor at a time."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from dualgp.errors import InputError, NotPositiveDefiniteError
from dualgp.transfer.precisions import layer_precision
from dualgp.transfer.stored import Layer, Open, Shards, Source, StoredTensor, factored_layers, read
from dualgp.weights import Number

_PIECE = 1 << 20  # numbers of a tensor that are worked on at once


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
    """Write the merge θ₀ + S⁻¹ Σ α_t (S₀ + c_tB_t)(θ_t − θ₀), S = S₀ + Σ α_t c_tB_t, in the base's shards.

    A piece of one tensor of every model is in memory at a time, some tens of megabytes in all; of a layer with factors
    the whole. Integers are the base's. `out` appears when all is written, and not at all if something is wrong.

    Args:
        base: θ₀, a safetensors file or a folder of shards.
        models: θ_t, with the same names, shapes and dtypes.
        out: a file, or a folder as the base is; it must not exist.
        curvatures: B_t, as files or folders: diagonals, named as the floating-point tensors; or for a layer "x.weight"
            the factors "x.weight.G" and "x.weight.A" of B = G ⊗ A, with one more column for "x.bias", as
            `KroneckerCurvature.to_tensors` names them. None for zero: task arithmetic.
        weights: α_t; 1 if None.
        scales: c_t, for curvatures that are means over data: how many data; 1 if None.
        base_precision: S₀, a number, or a file or folder of diagonals.

    Raises:
        InputError: if a shard is missing or truncated, names, shapes or dtypes differ, a value is or becomes infinite,
            or `out` exists.
        NotPositiveDefiniteError: if S is not positive definite.

    Source: Daheim et al. 2024, eq. 12, elementwise or layer by layer.

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
    if curvatures is None and scales is not None:
        raise InputError("Scales are of curvatures, and there are none: leave them out.")
    target = Path(out)
    if not target.parent.is_dir():
        raise InputError(f"There is no folder {target.parent} to write into.")
    if target.exists():
        raise InputError(f"{target} exists; merge into a new place.")
    start, experts = Shards(base), [Shards(m) for m in models]
    precisions = None if curvatures is None else [Shards(c) for c in curvatures]
    if not isinstance(base_precision, int | float | str | PathLike):
        raise InputError(f"base_precision is a number or a path, got a {type(base_precision).__name__}.")
    prior = float(base_precision) if isinstance(base_precision, int | float) else Shards(base_precision)
    _check_alike(start, experts)
    layers = _check_curvatures(start, precisions or [])
    if isinstance(prior, Shards):
        _check_diagonals(start, prior, {})
    plan = _Plan(start, experts, precisions, prior, alphas, counts, layers)
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
    layers: dict[str, Layer]  # by the name of a weight or a bias that has factors
    held: dict[str, Tensor] = field(default_factory=dict)  # merged with a layer, and not written yet

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
                for piece in self._pieces(name, tensor, file):
                    out.write(piece.view(torch.uint8).numpy().tobytes())

    def _pieces(self, name: str, tensor: StoredTensor, file: Open) -> Iterator[Tensor]:
        """Yield the result of one tensor in order."""
        if name in self.layers:
            if name not in self.held:
                self.held.update(self._merged_layer(self.layers[name], file))
            yield _rounded(name, self.held.pop(name).flatten().contiguous(), tensor.dtype)
            return
        for begin, count in _pieces(tensor.numel):
            piece = read(file(tensor.file), tensor, begin, count)
            if tensor.dtype.is_floating_point:
                work = torch.float64 if piece.dtype == torch.float64 else torch.float32
                piece = _rounded(name, self._merged(name, file, begin, count, work), tensor.dtype)
            yield piece

    def _merged(self, name: str, file: Open, begin: int, count: int, work: torch.dtype) -> Tensor:
        def values(shards: Shards) -> Tensor:
            return shards.values(name, file, begin, count).to(work)

        theta = values(self.base)
        S0 = values(self.prior) if isinstance(self.prior, Shards) else theta.new_tensor(self.prior)
        S, total = S0.expand(count).clone(), torch.zeros_like(theta)
        for t, (model, alpha) in enumerate(zip(self.models, self.alphas, strict=True)):
            B = theta.new_zeros(()) if self.curvatures is None else self.counts[t] * values(self.curvatures[t])
            S += alpha * B
            total += alpha * (S0 + B) * (values(model) - theta)
        if not bool((S > 0).all()):
            raise NotPositiveDefiniteError(
                f"The merged precision of {name!r} has an element {float(S.min()):.3g}: raise base_precision, or give "
                "less negative weight."
            )
        return theta + total / S

    def _merged_layer(self, layer: Layer, file: Open) -> dict[str, Tensor]:
        """θ₀ + S⁻¹ Σ α_t (S₀ + c_t G_t ⊗ A_t)(θ_t − θ₀) of one layer, whole, in float64."""

        def values(shards: Shards) -> Tensor:
            W = shards.values(layer.weight, file).double().flatten(1)
            if layer.bias is None:
                return W
            return torch.cat([W, shards.values(layer.bias, file).double().unsqueeze(1)], 1)

        theta = values(self.base)
        S0 = values(self.prior) if isinstance(self.prior, Shards) else torch.full_like(theta, self.prior)
        terms, total = [], torch.zeros_like(theta)
        for t, (model, curvature) in enumerate(zip(self.models, self.curvatures or (), strict=True)):
            G, A = (curvature.values(f"{layer.weight}.{side}", file).double() for side in "GA")
            gap = values(model) - theta
            total += self.alphas[t] * (S0 * gap + self.counts[t] * (G @ gap @ A.mT))
            terms.append((self.alphas[t] * self.counts[t] * G, A))
        theta = theta + layer_precision(layer.weight, tuple(terms), S0.flatten()).solve(total.flatten()).view_as(theta)
        if layer.bias is None:
            return {layer.weight: theta}
        return {layer.weight: theta[:, :-1], layer.bias: theta[:, -1]}


def _rounded(name: str, merged: Tensor, dtype: torch.dtype) -> Tensor:
    found = merged.to(dtype)
    if not bool(found.isfinite().all()):
        raise InputError(
            f"The merged {name!r} is too large for {dtype}: give less weight, or store the base in another."
        )
    return found


def _pieces(numel: int) -> Iterator[tuple[int, int]]:
    for begin in range(0, numel, _PIECE):
        yield begin, min(_PIECE, numel - begin)


def _numbers(name: str, values: Sequence[Number] | None, count: int) -> list[float]:
    found = [1.0] * count if values is None else [float(v) for v in values]
    if count == 0 or len(found) != count or not all(math.isfinite(v) for v in found):
        raise InputError(f"Expected one model or more and as many finite {name}; got {count} models and {found}.")
    return found


def _check_alike(base: Shards, models: Sequence[Shards]) -> None:
    for shards in models:
        _check_names(base, shards, base.tensors)
        for name, tensor in base.tensors.items():
            other = shards.tensors[name]
            if (other.shape, other.dtype) != (tensor.shape, tensor.dtype):
                raise InputError(
                    f"{name!r} is {tensor.shape} of {tensor.dtype} in {base.source} and {other.shape} of {other.dtype} "
                    f"in {shards.source}. Models of one architecture and dtype were expected."
                )


def _check_diagonals(base: Shards, shards: Shards, layers: Mapping[str, Layer]) -> None:
    """Raise unless every floating-point tensor of the base has a diagonal, or is of a layer with factors."""
    floats = {name: t for name, t in base.tensors.items() if t.dtype.is_floating_point and name not in layers}
    factors = {f"{layer.weight}.{side}" for layer in layers.values() for side in "GA"}
    _check_names(base, shards, floats, besides=factors)
    wrong = [n for n, t in floats.items() if shards.tensors[n].shape != t.shape]
    if wrong:
        raise InputError(f"The diagonal {shards.source} has another shape for {wrong[0]!r} than the model.")


def _check_curvatures(base: Shards, curvatures: Sequence[Shards]) -> dict[str, Layer]:
    """Return the layers that have factors in all curvatures, by the names of their weights and biases."""
    found = [factored_layers(base, shards) for shards in curvatures]
    for shards, layers in zip(curvatures, found, strict=True):
        if layers != found[0]:
            one = sorted(set(layers) ^ set(found[0])) or sorted(layers)
            raise InputError(
                f"{shards.source} and {curvatures[0].source} have factors for different tensors, such as {one[0]!r}. "
                "Curvatures of one structure were expected."
            )
        _check_diagonals(base, shards, layers)
    return found[0] if found else {}


def _check_names(
    base: Shards, other: Shards, wanted: Mapping[str, StoredTensor], besides: Collection[str] = ()
) -> None:
    missing = sorted(set(wanted) - set(other.tensors))
    more = sorted(set(other.tensors) - set(base.tensors) - set(besides))
    if missing or more:
        raise InputError(
            f"{other.source} has not the tensors of {base.source}: it lacks {missing[:3]} ({len(missing)}) and has "
            f"{more[:3]} ({len(more)}) besides."
        )
