"""Training data: checked once, cut into blocks, moved to the shapes that the sites need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from gpytorch.kernels import Kernel
from gpytorch.likelihoods import Likelihood, SoftmaxLikelihood
from gpytorch.means import LinearMean, Mean
from torch import Tensor

from dualgp.checks import check_tensor, recordable
from dualgp.distributed import ALONE, Ranks
from dualgp.duals import check_param_names, check_targets, check_variances, gaussian_noise, training_params
from dualgp.errors import InputError
from dualgp.kernels import check_columns
from dualgp.sites import Sites

CACHE_BYTES = 128 << 20  # features are kept between passes up to this size, a constant; beyond, they are recomputed


@dataclass(frozen=True, eq=False)
class Data:
    """Inputs x [*batch, n, D], targets y [*batch, n] or [*batch, n, C], per-datum likelihood parameters, weights [n].

    A weight is the power to which a datum's likelihood is raised; None is 1 for all.
    """

    x: Tensor
    y: Tensor
    targets_multi: bool  # whether y has a dimension for the outputs
    params: dict[str, Tensor] = field(default_factory=dict)
    weights: Tensor | None = None

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
        weights = None if self.weights is None else self.weights[rows]
        return Data(self.x[..., rows, :], y, self.targets_multi, params, weights)

    def weigh(self, values: Tensor) -> Tensor:
        """Multiply values that have the shape of y by the weights."""
        if self.weights is None:
            return values
        return values * (self.weights.unsqueeze(-1) if self.targets_multi else self.weights)

    def weigh_latent(self, values: Tensor) -> Tensor:
        """Multiply values with the data last by the weights."""
        return values if self.weights is None else values * self.weights

    @classmethod
    def cat(cls, parts: Sequence[Data]) -> Data:
        """Join data, in order."""
        multi = parts[0].targets_multi
        return cls(
            torch.cat([d.x for d in parts], -2),
            torch.cat([d.y for d in parts], -2 if multi else -1),
            multi,
            {k: torch.cat([d.params[k] for d in parts], -1) for k in parts[0].params},
            None if all(d.weights is None for d in parts) else torch.cat([d.all_weights() for d in parts]),
        )

    def all_weights(self) -> Tensor:
        """Return the weights, float64 [n], ones where none were given."""
        return (
            torch.ones(len(self), dtype=torch.float64, device=self.x.device) if self.weights is None else self.weights
        )


def gaussian_sites(likelihood: Likelihood, data: Data) -> Sites | None:
    """Return the sites of a Gaussian likelihood, λ = y/σ² and β = 1/σ², exact whatever q is; None for others."""
    noise = gaussian_noise(likelihood, **data.params)
    if noise is None:
        return None
    y = data.y.double()
    beta = data.weigh((1.0 / noise.detach().double()).expand(y.shape))
    return Sites(y * beta, beta, data.targets_multi)


def gaussian_spread(data: Data, lam: Tensor, beta: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Return β(y − μ)² and w log 2πσ² of Gaussian sites, data last; 0 for data of weight 0."""
    counts = beta != 0
    safe = torch.where(counts, beta, 1.0)
    weights = torch.ones_like(beta) if data.weights is None else data.weights.expand(beta.shape)
    spread = beta * (lam / safe - mean).square()
    return spread, torch.where(counts, weights * (2 * torch.pi * weights.clamp_min(1e-300) / safe).log(), 0.0)


def check_inputs(x: Tensor, *, num_dims: int | None = None, what: str = "X") -> None:
    """Raise unless x is a finite floating-point tensor [*batch, n, D].

    Raises:
        InputError: saying what was expected and what came.
    """
    if isinstance(x, Tensor) and x.is_complex():
        raise InputError(f"{what} must be float32 or float64, got {x.dtype}; use {what}.real.")
    check_tensor(what, x)
    if not x.is_floating_point() or x.dtype not in (torch.float32, torch.float64):
        raise InputError(f"{what} must be float32 or float64, got {x.dtype}; use {what}.float() or {what}.double().")
    if x.ndim < 2:
        raise InputError(
            f"{what} must have shape [*batch, n, D], got {tuple(x.shape)}; one input dimension is {what}.unsqueeze(-1)."
        )
    if not x.shape[-1]:
        raise InputError(f"{what} must have at least one column, got {tuple(x.shape)}.")
    if num_dims is not None and x.shape[-1] != num_dims:
        raise InputError(f"{what} must have {num_dims} columns, as the model was fitted with, got {x.shape[-1]}.")
    finite = x.isfinite()
    if not finite.all():
        row = int((~finite).any(-1).reshape(-1).nonzero()[0])
        raise InputError(
            f"{what} must be finite; {int((~finite).sum())} values are NaN or infinite, the first in row {row}. "
            "Drop or impute them."
        )


def check_modules(x: Tensor, kernel: Kernel, mean: Mean | None, likelihood: Likelihood) -> None:
    """Raise InputError unless x is where their parameters are, with the columns that kernel and mean take."""
    check_columns(kernel, x.shape[-1])
    if isinstance(mean, LinearMean) and mean.weights.shape[-2] != x.shape[-1]:
        raise InputError(f"The LinearMean takes {mean.weights.shape[-2]} columns, X has {x.shape[-1]}.")
    for module in (kernel, mean, likelihood):
        for name, parameter in () if module is None else module.named_parameters():
            if parameter.device != x.device:
                where = f"{type(module).__name__}'s {name} on {parameter.device}"
                raise InputError(f"X is on {x.device} and {where}; move one with .to(...).")


def has_multi_targets(likelihood: Likelihood, num_outputs: int | None) -> bool:
    """Return whether targets have a dimension for the outputs: a label of a softmax is one for all of them."""
    return num_outputs is not None and not isinstance(likelihood, SoftmaxLikelihood)


def check_data(
    likelihood: Likelihood, x: Tensor, y: Tensor, num_outputs: int | None, params: dict[str, Tensor] | None = None
) -> Data:
    """Return the data with per-datum parameters of the likelihood (`noise`), checked against it.

    Raises:
        InputError: for a wrong shape, dtype, device or value, or targets outside the likelihood's support.
    """
    check_inputs(x)
    if not isinstance(y, Tensor):
        check_tensor("y", y)
    if y.device != x.device:
        raise InputError(f"X is on {x.device} and y on {y.device}; move one with .to(...).")
    multi = has_multi_targets(likelihood, num_outputs)
    want = (*x.shape[:-1], num_outputs) if multi else tuple(x.shape[:-1])
    if tuple(y.shape) != want:
        hint = " Use y.squeeze(-1)." if tuple(y.shape) == (*want, 1) else ""
        raise InputError(f"y must have shape {want} to go with X {tuple(x.shape)}, got {tuple(y.shape)}.{hint}")
    if y.is_complex() or y.dtype == torch.bool:
        raise InputError(f"y must hold real numbers or integer labels, got {y.dtype}; use y.to(X.dtype).")
    if y.numel():
        check_targets(likelihood, y)
    params = params or {}
    check_param_names(likelihood, params)
    for name, values in params.items():
        check_tensor(f"{name}=", values)
        if not values.ndim or values.shape[-1] != x.shape[-2] or not values.isfinite().all():
            raise InputError(
                f"{name}= must hold one finite value per datum ({x.shape[-2]}), got {tuple(values.shape)}."
            )
        if name == "noise":
            check_variances(values)
    params = {name: recordable(values.to(x.device)) for name, values in params.items()}
    return Data(recordable(x), recordable(y), multi, params)


def check_weights(weights: Tensor, data: Data) -> Tensor:
    """Return the weights in float64, checked.

    Raises:
        InputError: unless there is one finite number ≥ 0 per datum.
    """
    if not isinstance(weights, Tensor) or weights.shape != (len(data),):
        came = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        raise InputError(f"weights must be a torch.Tensor of shape ({len(data)},), one per datum; got {came}.")
    check_tensor("weights", weights)
    if not bool((weights.isfinite() & (weights >= 0)).all()):
        raise InputError(f"weights must be finite and ≥ 0; the smallest is {weights.min().item():g}.")
    return weights.to(data.x.device, torch.float64)


def check_training_data(
    likelihood: Likelihood, x: Tensor, y: Tensor, num_outputs: int | None, ranks: Ranks = ALONE
) -> Data:
    """Return the data to fit, checked; per-datum parameters are those the likelihood carries.

    Of several `ranks` each checks its own, and all learn whether one has found a fault.

    Raises:
        InputError: as `check_data`, or if a column of x is constant: a kernel learns nothing from it.
    """
    check_inputs(x)
    x, y = x.detach(), y.detach() if isinstance(y, Tensor) else y  # a fit learns what the model has, not the data
    data = check_data(likelihood, x, y, num_outputs, training_params(likelihood, x.shape[-2]))
    check_alike(data, ranks)
    n = ranks.count(len(data))
    ends = ranks.cat(torch.stack([x.amin(-2), x.amax(-2)], -2) if len(data) else x, -2)
    if n > 1:
        spread = ends.amax(-2) - ends.amin(-2)
        constant = (spread == 0).reshape(-1, x.shape[-1]).all(0).nonzero().reshape(-1).tolist()
        if constant:
            raise InputError(f"Columns {constant} of X are constant over all {n} data; drop them.")
    return data


def check_alike(data: Data, ranks: Ranks) -> None:
    """Raise InputError on every rank unless their data differ in number only."""
    x, y = data.x, data.y
    facts = {"columns of X": x.shape[-1], "dtype of X": x.dtype, "batch dimensions of X": tuple(x.shape[:-2])}
    facts |= {"dtype of y": y.dtype, "outputs in y": y.shape[-1] if data.targets_multi else None}
    ranks.same({**facts, "parameters per datum": sorted(data.params)})
