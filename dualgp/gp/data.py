"""Training data: checked once, cut into blocks, moved to the shapes that the sites need."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from gpytorch.likelihoods import (
    BernoulliLikelihood,
    GaussianLikelihood,
    Likelihood,
    MultitaskGaussianLikelihood,
    SoftmaxLikelihood,
)
from torch import Tensor

from dualgp.duals import check_targets, gaussian_noise, training_params
from dualgp.errors import InputError
from dualgp.sites import Sites

CACHE_BYTES = 128 << 20  # features are kept between passes up to this size, a constant; beyond, they are recomputed
_WITHOUT_PARAMS = (GaussianLikelihood, MultitaskGaussianLikelihood, BernoulliLikelihood, SoftmaxLikelihood)


@dataclass(frozen=True, eq=False)
class Data:
    """Inputs x [*batch, n, D], targets y [*batch, n] or [*batch, n, C], per-datum likelihood parameters."""

    x: Tensor
    y: Tensor
    targets_multi: bool  # whether y has a dimension for the outputs
    params: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.x.shape[-2]

    @property
    def count(self) -> int:
        """How many data there are, all batch dimensions counted."""
        return self.x.shape[:-1].numel()

    def rows(self, rows: slice | Tensor) -> Data:
        """Return some of the data."""
        y = self.y[..., rows, :] if self.targets_multi else self.y[..., rows]
        params = {k: v[..., rows] for k, v in self.params.items()}
        return Data(self.x[..., rows, :], y, self.targets_multi, params)


def gaussian_sites(likelihood: Likelihood, data: Data) -> Sites | None:
    """Return the sites of a Gaussian likelihood, λ = y/σ² and β = 1/σ², exact whatever q is; None for others."""
    noise = gaussian_noise(likelihood, **data.params)
    if noise is None:
        return None
    y = data.y.double()
    beta = (1.0 / noise.detach().double()).expand(y.shape)
    return Sites(y * beta, beta, data.targets_multi)


def check_inputs(x: Tensor, *, num_dims: int | None = None, what: str = "X") -> None:
    """Raise unless x is a finite floating-point tensor [*batch, n, D].

    Raises:
        InputError: saying what was expected and what came.
    """
    if not isinstance(x, Tensor):
        raise InputError(f"{what} must be a torch.Tensor, got {type(x).__name__}; use torch.as_tensor.")
    if not x.is_floating_point() or x.dtype not in (torch.float32, torch.float64):
        raise InputError(f"{what} must be float32 or float64, got {x.dtype}; use {what}.float() or {what}.double().")
    if x.ndim < 2:
        raise InputError(
            f"{what} must have shape [*batch, n, D], got {tuple(x.shape)}; one input dimension is {what}.unsqueeze(-1)."
        )
    if num_dims is not None and x.shape[-1] != num_dims:
        raise InputError(f"{what} must have {num_dims} columns, as the model was fitted with, got {x.shape[-1]}.")
    finite = x.isfinite()
    if not finite.all():
        row = int((~finite).any(-1).reshape(-1).nonzero()[0])
        raise InputError(
            f"{what} must be finite; {int((~finite).sum())} values are NaN or infinite, the first in row {row}. "
            "Drop or impute them."
        )


def check_data(
    likelihood: Likelihood, x: Tensor, y: Tensor, num_outputs: int | None, params: dict[str, Tensor] | None = None
) -> Data:
    """Return the data with per-datum parameters of the likelihood (`noise`), checked against it.

    Raises:
        InputError: for a wrong shape, dtype, device or value, or targets outside the likelihood's support.
    """
    check_inputs(x)
    if not isinstance(y, Tensor):
        raise InputError(f"y must be a torch.Tensor, got {type(y).__name__}; use torch.as_tensor.")
    if y.device != x.device:
        raise InputError(f"X is on {x.device} and y on {y.device}; move one with .to(...).")
    multi = num_outputs is not None and not isinstance(likelihood, SoftmaxLikelihood)
    want = (*x.shape[:-1], num_outputs) if multi else tuple(x.shape[:-1])
    if tuple(y.shape) != want:
        hint = " Use y.squeeze(-1)." if tuple(y.shape) == (*want, 1) else ""
        raise InputError(f"y must have shape {want} to go with X {tuple(x.shape)}, got {tuple(y.shape)}.{hint}")
    if y.is_complex() or y.dtype == torch.bool:
        raise InputError(f"y must hold real numbers or integer labels, got {y.dtype}; use y.to(X.dtype).")
    if not y.isfinite().all():
        raise InputError(f"y must be finite; {int((~y.isfinite()).sum())} values are NaN or infinite.")
    if y.numel():
        check_targets(likelihood, y)
    params = params or {}
    for name, values in params.items():
        if type(likelihood) in _WITHOUT_PARAMS:
            raise InputError(f"{type(likelihood).__name__} takes no {name}= per datum; leave it out.")
        if not isinstance(values, Tensor):
            raise InputError(f"{name}= must be a torch.Tensor with one value per datum, got {type(values).__name__}.")
        if values.shape[-1] != x.shape[-2] or not values.isfinite().all():
            raise InputError(
                f"{name}= must hold one finite value per datum ({x.shape[-2]}), got {tuple(values.shape)}."
            )
        if name == "noise" and not bool((values > 0).all()):
            raise InputError(f"noise= must be positive variances; the smallest is {values.min().item():g}.")
    return Data(x, y, multi, {name: values.to(x.device) for name, values in params.items()})


def check_training_data(likelihood: Likelihood, x: Tensor, y: Tensor, num_outputs: int | None) -> Data:
    """Return the data to fit, checked; per-datum parameters are those the likelihood carries.

    Raises:
        InputError: as `check_data`, or if a column of x is constant: a kernel learns nothing from it.
    """
    check_inputs(x)
    data = check_data(likelihood, x, y, num_outputs, training_params(likelihood, x.shape[-2]))
    if len(data) > 1:
        spread = x.amax(-2) - x.amin(-2)
        constant = (spread == 0).reshape(-1, x.shape[-1]).all(0).nonzero().reshape(-1).tolist()
        if constant:
            raise InputError(f"Columns {constant} of X are constant over all {len(data)} data; drop them.")
    return data
