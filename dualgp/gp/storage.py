"""Saving and loading a fitted `DualGP`: tensors in safetensors, written atomically, nothing executed on loading."""

from __future__ import annotations

import json
import os
import tempfile
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from gpytorch.kernels import Kernel
from gpytorch.likelihoods import Likelihood
from gpytorch.means import Mean
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dualgp.errors import InputError, NotFittedError
from dualgp.gp.memory import Rule
from dualgp.gp.stream import BUFFERS
from dualgp.kernels import describe

if TYPE_CHECKING:
    from dualgp.gp.model import DualGP

FORMAT = "dualgp.DualGP"
GENERATOR = "generator_state"
FORMAT_VERSION = 3
KEYS = {
    "kernel",
    "likelihood",
    "mean",
    "num_outputs",
    "jitter",
    "num_inducing",
    "inducing_given",
    "memory",
    "memory_rule",
    "window",
}


def save(model: DualGP, path: str | PathLike[str]) -> None:
    """Write the model's state to `path`: to a file beside it first, then renamed over it."""
    if model.site_lam is None:
        raise NotFittedError("There is nothing to save: call fit(X, y) first.")
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}
    config = {
        "kernel": describe(model.kernel),
        "likelihood": describe(model.likelihood),
        "mean": describe(model.mean),
        "num_outputs": model.num_outputs,
        "jitter": model.jitter,
        "num_inducing": model.num_inducing,
        "inducing_given": model._Z_given,
        "memory": model.memory_size,
        "memory_rule": model.memory_rule if isinstance(model.memory_rule, str) else None,
        "window": model.window,
    }
    tensors[GENERATOR] = model.generator.get_state().cpu()
    metadata = {"format": FORMAT, "version": str(FORMAT_VERSION), "config": json.dumps(config)}
    target = Path(path)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=target.name, suffix=".part")
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata=metadata)
        os.replace(temporary, target)
    finally:
        Path(temporary).unlink(missing_ok=True)


def load(
    cls: type[DualGP],
    path: str | PathLike[str],
    kernel: Kernel,
    likelihood: Likelihood,
    mean: Mean | None,
    memory_rule: str | Rule | None,
) -> DualGP:
    """Read a model written by `save` into the modules given."""
    config, tensors = _read(path)
    drawn = tensors.pop(GENERATOR, None)
    memory_rule = config["memory_rule"] if memory_rule is None else memory_rule
    if memory_rule is None:
        raise InputError(
            f"{path} was saved with a memory rule of your own, which files do not hold: give memory_rule=."
        )
    given = {"kernel": describe(kernel), "likelihood": describe(likelihood), "mean": describe(mean)}
    for part, name in given.items():
        if config[part] != name:
            raise InputError(
                f"{path} was saved with {part} {config[part]}, but {name} was given; give one of that kind."
            )
    same = {key: config[key] for key in ("num_outputs", "jitter", "num_inducing", "memory", "window")}
    model = cls(kernel, likelihood, mean=mean, memory_rule=memory_rule, **same)
    expected = model.state_dict().keys() | {"inducing_points", "site_lam", "site_B"}
    missing, extra = expected - tensors.keys(), tensors.keys() - expected - {"lam", "beta", *BUFFERS}
    if missing or extra:
        raise InputError(
            f"{path} does not fit the modules given: it lacks {sorted(missing)} and has {sorted(extra)} besides. Build "
            "the kernel, likelihood and mean as they were when it was saved."
        )
    for name, value in model.state_dict().items():
        if value.shape != tensors[name].shape:
            raise InputError(
                f"{path} has {name} of shape {tuple(tensors[name].shape)}, the modules given {tuple(value.shape)}."
            )
    model.load_state_dict(tensors)
    model._Z_given = config["inducing_given"]
    if drawn is not None:
        model.generator.set_state(drawn)
    return model


def _read(path: str | PathLike[str]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    if not Path(path).is_file():
        raise InputError(f"There is no file at {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise InputError(f"{path} is not a safetensors file, or is truncated: {error}.") from error
    if metadata.get("format") != FORMAT:
        raise InputError(f"{path} does not hold a DualGP (its format is {metadata.get('format')!r}).")
    if metadata.get("version") != str(FORMAT_VERSION):
        raise InputError(
            f"{path} has format version {metadata.get('version')}, this dualgp reads {FORMAT_VERSION}; update dualgp."
        )
    try:
        config = json.loads(metadata["config"])
        missing = KEYS - config.keys()
    except (KeyError, ValueError, AttributeError) as error:
        raise InputError(f"{path} has a damaged header: {error}.") from error
    if missing:
        raise InputError(f"{path} has a damaged header: it lacks {sorted(missing)}.")
    return config, tensors
