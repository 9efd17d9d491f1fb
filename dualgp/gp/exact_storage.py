"""Saving and loading a fitted `ExactGP`: its data, sites and solves; what follows from them is made anew."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING

import torch
from gpytorch.kernels import Kernel
from gpytorch.likelihoods import Likelihood
from gpytorch.means import Mean
from torch import Tensor

from dualgp import files
from dualgp.errors import InputError, NotFittedError
from dualgp.gp.data import Data, has_multi_targets
from dualgp.gp.hyper import Hyper
from dualgp.gp.products import Fitted, Products, State
from dualgp.gp.storage import GENERATOR, MODULES, check_modules, check_shapes, check_tensors
from dualgp.kernels import describe

if TYPE_CHECKING:
    from dualgp.gp.exact import ExactGP

KIND = "ExactGP"
FORMAT_VERSION = 1
FIT, PARAMETER = "fit_", "fit_parameter_"
_OF_STATES = ("lam", "beta", "a", "shift", "u")
_SINGLE = {FIT + "x"}
_NEEDED = {FIT + name for name in ("x", "y", "noise", "pivots", "kl", *_OF_STATES)}
_CONFIG = ("num_outputs", "tol", "rank", "num_probes", "max_iterations", "backend")
_SCHEMA: files.Schema = {
    **MODULES,
    "tol": (int, float, files.NONE),
    **dict.fromkeys(("rank", "num_probes", "max_iterations"), (int,)),
    "backend": (str,),
}


def pack(fitted: Fitted) -> dict[str, Tensor]:
    """Return the tensors that a fit is made of: n · (2S + 5 + D) numbers for one output, none n × rank."""
    data, process, states = fitted.data, fitted.process, fitted.states
    held = {"x": data.x, "y": data.y, "noise": process.noise, "pivots": torch.tensor(process.pivots, device="cpu")}
    held |= {name: torch.stack([getattr(s, name) for s in states]) for name in _OF_STATES}
    held["kl"] = torch.tensor([list(s.kl) for s in states], dtype=torch.float64, device="cpu")
    parameters = {PARAMETER + name: values for name, values in data.params.items()}
    return {FIT + name: values for name, values in held.items()} | parameters


def unpack(model: ExactGP, tensors: dict[str, Tensor]) -> Fitted:
    """Return the fit that `pack` took apart, under the hyperparameters that the model has."""
    x, y, noise, kl = (tensors[FIT + name] for name in ("x", "y", "noise", "kl"))
    multi = has_multi_targets(model.likelihood, model.num_outputs)
    params = {name.removeprefix(PARAMETER): t for name, t in tensors.items() if name.startswith(PARAMETER)}
    hyper = Hyper(
        model.kernel, model.mean, model.likelihood, x[:1], dtype=x.dtype, num_outputs=model.num_outputs, jitter=0.0,
        learn_inducing=False, learn_hyperparameters=False,
    )  # fmt: skip
    pivots = tensors[FIT + "pivots"].tolist()
    process = Products(hyper.kernel, hyper.mean, x, model.effort_in(x.dtype), noise, pivots)
    rows = zip(*(tensors[FIT + name] for name in _OF_STATES), kl.tolist(), strict=True)
    states: list[State] = [process.restored(*row) for row in rows]
    return Fitted(hyper, Data(x, y, multi, params), process, states)


def save(model: ExactGP, path: str | PathLike[str]) -> None:
    """Write the model's state to `path`, atomically."""
    if not model.fitted:
        raise NotFittedError("There is nothing to save: call fit(X, y) first.")
    parts = {"kernel": describe(model.kernel), "likelihood": describe(model.likelihood), "mean": describe(model.mean)}
    settings = {"num_outputs": model.num_outputs, **model.effort._asdict(), "tol": model.tol}
    tensors = {**model.state_dict(), GENERATOR: model.generator.get_state()}
    files.write(path, KIND, FORMAT_VERSION, parts | settings, tensors)


def load(
    cls: type[ExactGP], path: str | PathLike[str], kernel: Kernel, likelihood: Likelihood, mean: Mean | None
) -> ExactGP:
    """Read a model written by `save` into the modules given."""
    config, tensors = files.read(path, KIND, FORMAT_VERSION, _SCHEMA)
    drawn = tensors.pop(GENERATOR, None)
    check_modules(path, config, kernel, likelihood, mean)
    with files.undamaged(path, kernel, likelihood, mean):
        model = cls(kernel, likelihood, mean=mean, **{name: config[name] for name in _CONFIG})
        check_shapes(path, model, tensors, _NEEDED, {name for name in tensors if name.startswith(PARAMETER)})
        _check_sizes(path, model, tensors)
        model.load_state_dict(tensors)
        if drawn is not None:
            model.generator.set_state(drawn)
        model._ready()
    return model


def _check_sizes(path: str | PathLike[str], model: ExactGP, tensors: dict[str, Tensor]) -> None:
    """Raise InputError unless the tensors of a fit go together."""
    x, y, pivots = (tensors[FIT + name] for name in ("x", "y", "pivots"))
    if x.ndim != 2 or pivots.ndim != 1:
        raise InputError(f"{path} is damaged: its inputs have shape {tuple(x.shape)}.")
    n, S, C = len(x), model.effort.num_probes, model.num_outputs or 1
    wanted = dict.fromkeys(_OF_STATES, (C, n)) | {"u": (C, n, S), "kl": (C, 2), "noise": (n + len(pivots), S)}
    of_fit = {FIT + name: shape for name, shape in wanted.items()}
    of_fit |= {name: (n,) for name in tensors if name.startswith(PARAMETER)}
    check_tensors(path, tensors, of_fit, whole={FIT + "pivots"}, single=_SINGLE | of_fit.keys())
    multi = has_multi_targets(model.likelihood, model.num_outputs)
    fits = y.shape == ((n, C) if multi else (n,)) and not y.is_complex()
    if not fits or not bool(((pivots >= 0) & (pivots < n)).all()):
        raise InputError(f"{path} is damaged: its targets or pivots do not go with its {n} inputs.")
