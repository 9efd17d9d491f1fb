"""Tensors and a header in one safetensors file: written atomically, checked and never executed on loading."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dualgp.errors import InputError


def write(
    path: str | PathLike[str], kind: str, version: int, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Write tensors and a header to `path`: to a file beside it first, then renamed over it.

    Raises:
        InputError: if the folder does not exist.
    """
    held = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    metadata = {"format": f"dualgp.{kind}", "version": str(version), "config": json.dumps(config)}
    target = Path(path)
    if not target.parent.is_dir():
        raise InputError(f"There is no folder {target.parent} to write {target.name} to: create it first.")
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=target.name, suffix=".part")
    os.close(handle)
    try:
        save_file(held, temporary, metadata=metadata)
        os.replace(temporary, target)
    finally:
        Path(temporary).unlink(missing_ok=True)


def read(
    path: str | PathLike[str], kind: str, version: int, keys: set[str]
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the header, which has `keys`, and the tensors of a file that `write` wrote.

    Raises:
        InputError: if there is no such file, or it is of another kind or version, truncated or damaged.
    """
    if not Path(path).is_file():
        raise InputError(f"There is no file at {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise InputError(f"{path} is not a safetensors file, or is truncated: {error}.") from error
    if metadata.get("format") != f"dualgp.{kind}":
        raise InputError(f"{path} does not hold a {kind} (its format is {metadata.get('format')!r}).")
    if metadata.get("version") != str(version):
        raise InputError(
            f"{path} has format version {metadata.get('version')}, this dualgp reads {version}; update dualgp."
        )
    try:
        config = json.loads(metadata["config"])
        missing = keys - config.keys()
    except (KeyError, ValueError, AttributeError) as error:
        raise InputError(f"{path} has a damaged header: {error}.") from error
    if missing:
        raise InputError(f"{path} has a damaged header: it lacks {sorted(missing)}.")
    return config, tensors
