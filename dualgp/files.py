"""Tensors and a header in one safetensors file: written atomically, checked and never executed on loading."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from dualgp._version import __version__
from dualgp.errors import InputError, UnsupportedError

Config: TypeAlias = dict[str, Any]
Tensors: TypeAlias = dict[str, torch.Tensor]
Schema: TypeAlias = Mapping[str, tuple[type, ...]]  # what a header holds, and of which types
Migrations: TypeAlias = Mapping[int, Callable[[Config, Tensors], None]]  # version → to the next, in place

NONE = type(None)
_LEFTOVER = 3600.0  # seconds after which a part of a file is of a writer that has been killed


def write(
    path: str | PathLike[str], kind: str, version: int, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Write tensors and a header to `path`: to a file beside it first, then renamed over it once it is on the disk.

    Raises:
        InputError: if the folder does not exist, or `path` is one.
    """
    target = _path(path)
    if not target.parent.is_dir():
        raise InputError(f"There is no folder {target.parent} to write {target.name} to: create it first.")
    if target.is_dir():
        raise InputError(f"{target} is a folder: give the name of a file in it.")
    held = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    about = {"format": f"dualgp.{kind}", "version": str(version), "dualgp": __version__, "config": json.dumps(config)}
    about["sha256"] = _digest(about, held)
    _remove_leftovers(target)
    part = target.with_name(f"{target.name}.{secrets.token_hex(4)}.part")
    try:
        with part.open("xb") as file:
            file.write(save(held, about))
            file.flush()
            os.fsync(file.fileno())  # or a power cut may leave the new name with nothing under it
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def read(
    path: str | PathLike[str], kind: str, version: int, schema: Schema, migrations: Migrations | None = None
) -> tuple[Config, Tensors]:
    """Return the header, which has what `schema` says, and the tensors of a file that `write` wrote.

    A file of an older version goes through `migrations` one by one, that of its own version first.

    Raises:
        InputError: if there is no such file, or it is of another kind, of a version that is not read, truncated or
            damaged.
    """
    path, steps = _path(path), migrations or {}
    if not path.is_file():
        raise InputError(f"There is no file at {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{path} is not a safetensors file, or is truncated: {error}.") from error
    if about.get("format") != f"dualgp.{kind}":
        raise InputError(f"{path} does not hold a {kind} (its format is {_short(about.get('format'))}).")
    found = _version(path, about)
    if not (found == version or found in steps):
        _refuse_version(path, kind, found, version, steps, about)
    if "sha256" in about and about["sha256"] != _digest(about, tensors):
        raise InputError(f"{path} is damaged: its contents are not those of its checksum.")
    try:
        config = json.loads(about["config"], parse_constant=_no_constant)
        if not isinstance(config, dict):
            raise ValueError(f"a {type(config).__name__} in place of an object")
        for step in range(found, version):
            steps[step](config, tensors)
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, RecursionError) as error:
        raise InputError(f"{path} has a damaged header: {_short(error)}.") from error
    if missing := sorted(schema.keys() - config.keys()):
        raise InputError(f"{path} has a damaged header: it lacks {missing}.")
    for name, kinds in schema.items():
        value = config[name]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            wanted = " or ".join("null" if t is NONE else t.__name__ for t in kinds)
            raise InputError(f"{path} has a damaged header: {name} is {_short(value)}, where {wanted} is expected.")
    return config, tensors


@contextmanager
def undamaged(path: str | PathLike[str], *modules: nn.Module | None) -> Iterator[None]:
    """Within, a file is read into modules: what goes wrong is the file's fault, and leaves the modules as they were.

    Raises:
        InputError: in place of any error that says that numbers, shapes or types do not go together.
    """
    before = [(m, {k: v.clone() for k, v in m.state_dict().items()}) for m in modules if m is not None]
    try:
        yield
    except BaseException as error:
        for module, state in before:
            module.load_state_dict(state)
        mine = isinstance(error, InputError | UnsupportedError)
        faults = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
        if mine or not isinstance(error, faults):
            raise
        raise InputError(f"{path} is damaged, or does not fit the modules given: {_short(error)}.") from error


def _path(path: object) -> Path:
    if not isinstance(path, str | PathLike):
        raise InputError(f"A path must be a string or a pathlib.Path, got {type(path).__name__}.")
    return Path(path)  # type: ignore[arg-type]


def _digest(about: Mapping[str, str], tensors: Tensors) -> str:
    """A checksum of everything in a file: against accidents, not against malice."""
    found = hashlib.sha256("\n".join(about.get(key, "") for key in ("format", "version", "dualgp", "config")).encode())
    for name, value in sorted(tensors.items()):
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def _remove_leftovers(target: Path) -> None:
    """Remove what writers of `target` that were killed have left beside it."""
    for part in target.parent.glob(f"{glob.escape(target.name)}.????????.part"):
        try:
            if time.time() - part.stat().st_mtime > _LEFTOVER:
                part.unlink()
        except OSError:  # another process has removed it, or it is not ours to remove
            continue


def _version(path: Path, about: Mapping[str, str]) -> int:
    told = about.get("version", "")
    if not (told.isascii() and told.isdigit() and len(told) < 9):
        raise InputError(f"{path} has a damaged header: its version is {_short(told)}.")
    return int(told)


def _refuse_version(
    path: Path, kind: str, found: int, version: int, migrations: Migrations, about: Mapping[str, str]
) -> NoReturn:
    oldest = min([version, *migrations])
    reads = f"version {version}" if oldest == version else f"versions {oldest} to {version}"
    writer = f" written by dualgp {_short(about['dualgp'])}" if "dualgp" in about else ""
    remedy = (
        "Update dualgp." if found > version else "Read it with the dualgp that wrote it, and save it anew from there."
    )
    raise InputError(
        f"{path} holds a {kind} of format version {found}{writer}; this dualgp ({__version__}) reads {reads}. {remedy}"
    )


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _short(value: object) -> str:
    """At most 300 characters of what a file says."""
    try:
        told = str(value) if isinstance(value, Exception) else repr(value)
    except (RecursionError, ValueError) as error:
        return f"a {type(value).__name__} ({type(error).__name__})"
    return told if len(told) <= 300 else f"{told[:300]}…"
