"""Saving and loading a fitted `DualGP`."""

from __future__ import annotations

import copy
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
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
NAME, COUNT = (str, files.NONE), (int, files.NONE)
MODULES: files.Schema = {"kernel": (str,), "likelihood": (str,), "mean": NAME, "num_outputs": COUNT}
SCHEMA: files.Schema = {
    **MODULES,
    "jitter": (int, float, files.NONE),
    "num_inducing": COUNT,
    "inducing_given": (bool,),
    "memory": COUNT,
    "memory_rule": NAME,
    "window": COUNT,
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
    config, tensors = files.read(path, KIND, FORMAT_VERSION, SCHEMA, {2: _count_rest})
    drawn = tensors.pop(GENERATOR, None)
    memory_rule = config["memory_rule"] if memory_rule is None else memory_rule
    if memory_rule is None:
        raise InputError(
            f"{path} was saved with a memory rule of your own, which files do not hold: give memory_rule=."
        )
    check_modules(path, config, kernel, likelihood, mean)
    same = {key: config[key] for key in ("num_outputs", "jitter", "num_inducing", "memory", "window")}
    with files.undamaged(path, kernel, likelihood, mean):
        model = cls(kernel, likelihood, mean=mean, memory_rule=memory_rule, **same)
        check_shapes(path, model, tensors, {"inducing_points", "site_lam", "site_B"}, {"lam", "beta", *BUFFERS})
        _check_sizes(path, config["num_outputs"], tensors)
        model.load_state_dict(tensors)
        model._Z_given = config["inducing_given"]
        if drawn is not None:
            model.generator.set_state(drawn)
        _ = model.posterior
    return model


def _count_rest(config: files.Config, tensors: files.Tensors) -> None:
    """From version 2, which did not count the data that `rest` stands for: those that are not in memory."""
    if "rest_lam" in tensors:
        memory = len(tensors["memory_ids"]) if "memory_ids" in tensors else 0
        tensors["num_rest"] = (tensors["num_seen"] - memory).double()


def _check_sizes(path: str | PathLike[str], num_outputs: int | None, tensors: dict[str, Tensor]) -> None:
    """Raise InputError unless the buffers of a model go together."""
    Z, lam = tensors["inducing_points"], tensors["site_lam"]
    if Z.ndim < 2 or lam.ndim < 1:
        raise InputError(f"{path} is damaged: inducing_points have shape {tuple(Z.shape)}.")
    (*batch, M, D), B = Z.shape, lam.shape[:-1]
    outputs = () if num_outputs is None else (num_outputs,)
    wanted: dict[str, tuple[int, ...]] = dict.fromkeys(("site_lam", "rest_lam"), (*B, M))
    wanted |= dict.fromkeys(("site_B", "rest_B"), (*B, M, M))
    wanted |= {"noise_statistics": (3,), "num_rest": (), "num_seen": ()}
    if "lam" in tensors:
        wanted |= dict.fromkeys(("lam", "beta"), tuple(tensors["lam"].shape))
    if "memory_ids" in tensors:
        n = len(tensors["memory_ids"])
        wanted |= dict.fromkeys(("memory_ids", "memory_keys", "memory_weights", "memory_noise"), (n,))
        wanted |= {"memory_x": (*batch, n, D)} | dict.fromkeys(("memory_lam", "memory_beta"), (*batch, n, *outputs))
        missing = [name for name in ("memory_x", "memory_y", "memory_lam", "memory_beta") if name not in tensors]
        if missing or tensors["memory_y"].shape[: len(batch) + 1] != (*batch, n):
            raise InputError(f"{path} is damaged: its memory of {n} data lacks {missing or 'some of their targets'}.")
    check_tensors(path, tensors, wanted, whole={"memory_ids", "num_seen"}, single={"inducing_points", "memory_x"})


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
        if value.is_floating_point() and not tensors[name].is_floating_point():
            raise InputError(f"{path} is damaged: {name} is {tensors[name].dtype}, where {value.dtype} is expected.")
        if value.shape != tensors[name].shape:
            raise InputError(
                f"{path} has {name} of shape {tuple(tensors[name].shape)}, the modules given {tuple(value.shape)}."
            )


def check_tensors(
    path: str | PathLike[str],
    tensors: dict[str, Tensor],
    wanted: dict[str, tuple[int, ...]],
    whole: set[str],
    single: set[str],
) -> None:
    """Raise InputError unless those tensors that are there have these shapes, and all are finite and of their dtypes.

    Float64, but for those that are whole numbers and those that may be in single precision.
    """
    for name, value in tensors.items():
        if value.is_floating_point() and not name.endswith("_bound") and not bool(value.isfinite().all()):
            raise InputError(f"{path} is damaged: {name} holds NaN or infinity.")
        if name in wanted and tuple(value.shape) != wanted[name]:
            came = tuple(value.shape)
            raise InputError(f"{path} is damaged: {name} has shape {came}, where {wanted[name]} goes with the rest.")
        may = [torch.int64] if name in whole else [torch.float64, *([torch.float32] if name in single else [])]
        if name in {*wanted, *whole, *single} and value.dtype not in may:
            raise InputError(f"{path} is damaged: {name} is {value.dtype}, where {may[0]} is expected.")
