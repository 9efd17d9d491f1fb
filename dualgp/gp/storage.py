"""Saving and loading a fitted `DualGP`."""

from __future__ import annotations

import copy
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpytorch.kernels import Kernel
from gpytorch.likelihoods import Likelihood
from gpytorch.means import Mean
from torch import Tensor, nn

from dualgp import files
from dualgp.errors import InputError, NotFittedError
from dualgp.gp.hyper import Hyper
from dualgp.gp.progress import Checkpoint
from dualgp.gp.stream import BUFFERS
from dualgp.kernels import describe
from dualgp.posterior import Posterior
from dualgp.selection import Rule

if TYPE_CHECKING:
    from dualgp.gp.model import DualGP

KIND = "DualGP"
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
    """Write the model's state to `path`, atomically."""
    if model.site_lam is None:
        raise NotFittedError("There is nothing to save: call fit(X, y) first.")
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
    tensors = {**model.state_dict(), GENERATOR: model.generator.get_state()}
    files.write(path, KIND, FORMAT_VERSION, config, tensors)


def checkpoint(model: DualGP, path: str | PathLike[str]) -> Checkpoint:
    """Return what writes a fit under way to `path`, as the model that it would be if it ended now.

    Raises:
        InputError: if the folder of `path` is not there.
    """
    if not Path(path).parent.is_dir():
        raise InputError(f"There is no folder {Path(path).parent} to write the checkpoint {path} in; make it first.")

    def write(hyper: Hyper, posterior: Posterior, n: int) -> None:
        kernel, likelihood, mean = copy.deepcopy((model.kernel, model.likelihood, model.mean))
        same = ("num_outputs", "jitter", "num_inducing", "memory_rule", "window", "generator")
        kept: dict[str, Any] = {name: getattr(model, name) for name in same}
        now = type(model)(kernel, likelihood, mean=mean, memory=model.memory_size, **kept)
        now._Z_given = model._Z_given
        now._hold(hyper, posterior, n)
        save(now, path)

    return write


def load(
    cls: type[DualGP],
    path: str | PathLike[str],
    kernel: Kernel,
    likelihood: Likelihood,
    mean: Mean | None,
    memory_rule: str | Rule | None,
) -> DualGP:
    """Read a model written by `save` into the modules given."""
    config, tensors = files.read(path, KIND, FORMAT_VERSION, KEYS)
    drawn = tensors.pop(GENERATOR, None)
    memory_rule = config["memory_rule"] if memory_rule is None else memory_rule
    if memory_rule is None:
        raise InputError(
            f"{path} was saved with a memory rule of your own, which files do not hold: give memory_rule=."
        )
    check_modules(path, config, kernel, likelihood, mean)
    same = {key: config[key] for key in ("num_outputs", "jitter", "num_inducing", "memory", "window")}
    model = cls(kernel, likelihood, mean=mean, memory_rule=memory_rule, **same)
    check_shapes(path, model, tensors, {"inducing_points", "site_lam", "site_B"}, {"lam", "beta", *BUFFERS})
    model.load_state_dict(tensors)
    model._Z_given = config["inducing_given"]
    if drawn is not None:
        model.generator.set_state(drawn)
    return model


def check_modules(
    path: str | PathLike[str], config: dict[str, Any], kernel: Kernel, likelihood: Likelihood, mean: Mean | None
) -> None:
    """Raise InputError unless the modules given are of the kinds that were saved."""
    given = {"kernel": describe(kernel), "likelihood": describe(likelihood), "mean": describe(mean)}
    for part, name in given.items():
        if config[part] != name:
            raise InputError(
                f"{path} was saved with {part} {config[part]}, but {name} was given; give one of that kind."
            )


def check_shapes(
    path: str | PathLike[str], model: nn.Module, tensors: dict[str, Tensor], needed: set[str], allowed: set[str]
) -> None:
    """Raise InputError unless a file has the tensors of a new model, in their shapes, and those that a fit adds."""
    expected = model.state_dict().keys() | needed
    missing, extra = expected - tensors.keys(), tensors.keys() - expected - allowed
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
