"""Data as a network's users hold them, tensors or a loader: checked, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from gpytorch.likelihoods import Likelihood, SoftmaxLikelihood
from torch import Tensor

from dualgp.checks import check_tensor, recordable
from dualgp.duals import check_param_names, check_targets, num_outputs_of, training_params
from dualgp.errors import InputError
from dualgp.fingerprints import fingerprints
from dualgp.jacobian import JacobianBasis


class Batch(NamedTuple):
    """Inputs [n, *input_shape], targets, and parameters of the likelihood for each datum."""

    x: Tensor
    y: Tensor
    params: dict[str, Tensor]

    def at(self, rows: slice | Tensor) -> Batch:
        """Return some of the data."""

        def of(values: Tensor) -> Tensor:
            return values[rows if isinstance(rows, slice) else rows.to(values.device)]

        return Batch(of(self.x), of(self.y), {name: of(value) for name, value in self.params.items()})


class Source:
    """Batches (x, y) or (x, y, noise) that can be read again and again; the global random state stays as it was.

    Args:
        data: (X, y), (X, y, noise), X alone with `y`, or a DataLoader: anything that yields such batches each time it
            is iterated over.
        y: targets, where `data` is X.
        likelihood: for the noise that a FixedNoiseGaussianLikelihood holds of its training data.

    Raises:
        InputError: for anything else, and if there are no data.
    """

    def __init__(self, data: Any, y: Tensor | None = None, likelihood: Likelihood | None = None) -> None:
        pair = data if isinstance(data, tuple | list) else (data,)
        for part in (*pair, y):
            if type(part).__module__ in ("numpy", "pandas"):
                raise InputError(f"Data must be tensors, got {type(part).__name__}: use torch.as_tensor.")
        if isinstance(data, Tensor):
            if y is None:
                raise InputError("Inputs need their targets: give (X, y), or X and y=.")
            data = (data, y)
        elif y is not None:
            raise InputError("With a loader, or a pair (X, y), the targets come from it: leave out y=.")
        self._tensors = None
        if isinstance(data, tuple | list) and data and all(isinstance(part, Tensor) for part in data):
            batch = _batch(data)
            params = training_params(likelihood, len(batch.x)) if likelihood is not None and not batch.params else {}
            self._tensors = batch._replace(params=batch.params | params)
            if not len(batch.x):
                raise InputError("There are no data: X has no rows.")
        elif isinstance(data, torch.utils.data.Dataset):
            raise InputError("A Dataset yields one datum at a time: wrap it in torch.utils.data.DataLoader.")
        elif not hasattr(data, "__iter__") or hasattr(data, "__next__"):
            raise InputError(
                f"Expected (X, y), or a DataLoader that can be read again and again, got {type(data).__name__}."
            )
        self._loader = data

    def __iter__(self) -> Iterator[Batch]:
        if self._tensors is not None:
            yield self._tensors
            return
        count = 0
        with torch.random.fork_rng(devices=[]):  # a loader draws a seed from the global state, shuffling or not
            for item in self._loader:
                batch = _batch(item)
                count += len(batch.x)
                if len(batch.x):
                    yield batch
        if not count:
            raise InputError("There are no data: the loader yields nothing.")

    def example(self, count: int = 3) -> Tensor:
        """Return the first rows of inputs, repeated where there are fewer."""
        rows: list[Tensor] = []
        for batch in self:
            rows.append(batch.x[: count - sum(map(len, rows))])
            if sum(map(len, rows)) == count:
                break
        x = torch.cat(rows)
        return x[torch.arange(count, device=x.device) % len(x)]


def _batch(item: Any) -> Batch:
    if not isinstance(item, tuple | list) or len(item) not in (2, 3) or not all(isinstance(t, Tensor) for t in item):
        came = [type(t).__name__ for t in item] if isinstance(item, tuple | list) else type(item).__name__
        raise InputError(
            f"Each batch must be (x, y), or (x, y, noise), of tensors, got {came}. A network of several inputs needs a "
            "module whose forward takes one tensor apart."
        )
    for name, part in zip(("Inputs", "Targets", "noise="), item, strict=False):
        check_tensor(name, part)
    x, y = item[0], item[1]
    if x.ndim < 1 or y.ndim < 1 or len(x) != len(y):
        raise InputError(
            f"Inputs and targets must have one row each per datum, got {tuple(x.shape)}, {tuple(y.shape)}."
        )
    x, y, *noise = (recordable(t.detach()) for t in item)
    return Batch(x, y, {"noise": noise[0]} if noise else {})


def check_outputs(likelihood: Likelihood, num_outputs: int) -> None:
    """Raise unless the network's outputs are what the likelihood needs.

    Raises:
        InputError: saying how many it needs.
    """
    want = num_outputs_of(likelihood)
    if want is not None and want != num_outputs:
        raise InputError(f"{type(likelihood).__name__} needs {want} outputs of the network, which has {num_outputs}.")


def check_batch(likelihood: Likelihood, batch: Batch, num_outputs: int, device: torch.device) -> Batch:
    """Return the batch with targets [n] (softmax, or one output) or [n, C] on the device of the network.

    Raises:
        InputError: for a wrong shape or dtype, or values outside the likelihood's support.
    """
    x, y, params = batch
    n = len(x)
    if x.is_floating_point() and not x.isfinite().all():
        row = int((~x.isfinite()).flatten(1).any(1).nonzero()[0])
        raise InputError(f"Inputs must be finite; the first row with NaN or infinity is {row}.")
    single = isinstance(likelihood, SoftmaxLikelihood) or num_outputs == 1
    if single and y.shape == (n, 1):
        y, params = y.squeeze(-1), {name: value.reshape(n) for name, value in params.items()}
    want = (n,) if single else (n, num_outputs)
    if y.shape != want:
        raise InputError(
            f"A network of {num_outputs} outputs and {type(likelihood).__name__} need targets of shape {want}, got "
            f"{tuple(y.shape)}."
        )
    if y.is_complex() or y.dtype == torch.bool or not y.isfinite().all():
        raise InputError(f"Targets must be finite real numbers or integer labels, got {y.dtype}; use y.to(x.dtype).")
    check_targets(likelihood, y)
    check_param_names(likelihood, params)
    for name, value in params.items():
        if value.shape != want or not bool((value.isfinite() & (value > 0)).all()):
            raise InputError(f"{name}= must hold positive numbers of shape {want}, got {tuple(value.shape)}.")
    return Batch(x, y.to(device), {name: value.to(device) for name, value in params.items()})


def check_data(basis: JacobianBasis, likelihood: Likelihood, batch: Batch) -> Batch:
    """Return data given to a posterior as `check_batch` does.

    Raises:
        InputError: for what it raises, and for inputs or targets that are no tensors, or not as many.
    """
    x, y, _ = batch
    basis.check_inputs(x)
    if not isinstance(y, Tensor):
        raise InputError(f"Targets must be a tensor, got {type(y).__name__}: use torch.as_tensor.")
    if not y.is_complex():  # which `check_batch` refuses
        check_tensor("Targets", y)
    if not y.ndim or len(x) != len(y):
        raise InputError(f"Inputs and targets must have one row each per datum, got {len(x)} and {tuple(y.shape)}.")
    return check_batch(likelihood, batch, basis.num_outputs, basis.device)


def rows_of(batch: Batch, dtype: torch.dtype) -> Tensor:
    """Return fingerprints [n] of checked data, as a network of this dtype sees them."""
    x = batch.x.to(dtype) if batch.x.is_floating_point() else batch.x
    return fingerprints(x.to(batch.y.device), batch.y, *batch.params.values())
