"""Kernel matrices of any GPyTorch kernel: dense blocks, diagonals, and frozen copies."""

from __future__ import annotations

import copy

import gpytorch
import torch
from gpytorch.kernels import AdditiveKernel, Kernel, ProductKernel, RFFKernel, ScaleKernel
from gpytorch.likelihoods.likelihood import _Likelihood
from gpytorch.means import Mean
from jaxtyping import Float
from torch import Tensor

from dualgp.errors import InputError, UnsupportedError
from dualgp.kernels.stationary import as_stationary, fused_cross
from dualgp.threads import ONE_AT_A_TIME

# Kernels of several outputs per input, or that bring their own approximation or training data.
_UNSUPPORTED = {
    "MultitaskKernel": "outputs that share one latent covariance; use one kernel with batch_shape=[C] per output",
    "LCMKernel": "coregionalised outputs; use one kernel with batch_shape=[C] per output",
    "GridKernel": "a kernel bound to a grid of training inputs; pass its base kernel",
    "GridInterpolationKernel": "an approximation of its own (KISS-GP); pass its base kernel",
    "InducingPointKernel": "an inducing-point approximation of its own; pass its base kernel",
    "MultiDeviceKernel": "a kernel spread over devices; pass its base kernel",
}


_SOFTPLUS = ("Positive", "GreaterThan")


def check_kernel(kernel: object) -> None:
    """Raise unless `kernel` is a GPyTorch kernel with one output per input.

    Raises:
        UnsupportedError: naming the kernel and what to use in its place.
    """
    if not isinstance(kernel, Kernel):
        raise UnsupportedError(
            f"Expected a gpytorch.kernels.Kernel, got {type(kernel).__name__}. Pass for example "
            "gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel())."
        )
    for part in kernel.modules():
        reason = _UNSUPPORTED.get(type(part).__name__)
        if reason or type(part).__name__.endswith(("Grad", "GradGrad")):
            reason = reason or "values and derivatives as several outputs per input"
            raise UnsupportedError(f"{type(part).__name__} is not supported: it has {reason}.")
        if isinstance(part, RFFKernel) and not hasattr(part, "randn_weights"):
            raise UnsupportedError("An RFFKernel without num_dims= has drawn no features yet: give num_dims=.")


def check_columns(kernel: Kernel, count: int) -> None:
    """Raise InputError unless the kernel takes inputs of so many columns."""
    _check_columns(kernel, count, kernel.active_dims)


def _check_columns(kernel: Kernel, count: int, active_dims: Tensor | None) -> None:
    taken = count
    if active_dims is not None:
        last, taken = int(active_dims.max()), active_dims.numel()
        if last >= count:
            raise InputError(f"{type(kernel).__name__} takes column {last} (active_dims), but there are {count}.")
    own = type(kernel).__module__.startswith("gpytorch.")  # a user's kernel may put inputs into other coordinates
    if own and kernel.ard_num_dims not in (None, 1, taken):  # 1: one lengthscale for all
        raise InputError(
            f"{type(kernel).__name__} has ard_num_dims={kernel.ard_num_dims}, but takes {taken} columns of inputs."
        )
    if isinstance(kernel, ScaleKernel):  # which has taken over the active_dims of its base
        _check_columns(kernel.base_kernel, taken, None)
    elif isinstance(kernel, AdditiveKernel | ProductKernel):
        for part in kernel.kernels:
            check_columns(part, taken)


def cross_covariance(kernel: Kernel, x: Tensor, z: Tensor, dtype: torch.dtype | None = None) -> Float[Tensor, "*b n m"]:
    """Return k(x, z), dense, in `dtype` (that of x unless given); differentiable in x, z and the hyperparameters.

    RBF and Matérn kernels, scaled or not, take a fused path in `dtype`; every other kernel is evaluated by
    GPyTorch in float64 and rounded.
    """
    dtype = dtype or x.dtype
    x, z = x.double(), z.double()
    form = as_stationary(kernel)
    if form is not None:
        return fused_cross(form, x, z, dtype)
    with ONE_AT_A_TIME, gpytorch.settings.lazily_evaluate_kernels(False):
        return kernel(x, z).to_dense().to(dtype).contiguous()  # a ConstantKernel's is one number, expanded


def kernel_diagonal(kernel: Kernel, x: Tensor) -> Float[Tensor, "*b n"]:
    """Return k(xᵢ, xᵢ) in float64; differentiable."""
    form = as_stationary(kernel)
    if form is not None:
        batch = torch.broadcast_shapes(x.shape[:-2], form.lengthscale.shape[:-2])
        ones = torch.ones((*batch, x.shape[-2]), dtype=torch.float64, device=x.device)
        return ones if form.outputscale is None else form.outputscale.double()[..., None] * ones
    return kernel(x.double(), diag=True).contiguous()


def prior_covariance(kernel: Kernel, x: Tensor) -> Float[Tensor, "*b n n"]:
    """Return k(x, x) in float64, symmetric, with an exact diagonal; differentiable."""
    K = cross_covariance(kernel, x, x, torch.float64)
    return (0.5 * (K + K.mT)).diagonal_scatter(kernel_diagonal(kernel, x).expand(K.shape[:-1]), dim1=-2, dim2=-1)


def frozen_copy(module: torch.nn.Module) -> torch.nn.Module:
    """Return a float64 copy of a GPyTorch module that shares nothing with it and takes no gradient."""
    module = copy.deepcopy(module).double()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return module


def describe(module: torch.nn.Module | None) -> str | None:
    """Name a module with its parts and those settings that its state does not hold, to tell look-alikes apart."""
    if module is None:
        return None
    settings = ("nu", "power", "num_mixtures", "num_samples", "active_dims")
    parts = []
    for name, part in module.named_modules():
        if isinstance(part, Kernel | _Likelihood | Mean):
            held = [
                f"{k}={getattr(part, k)}" for k in settings if isinstance(getattr(part, k, None), int | float | str)
            ]
            constraints = getattr(part, "_constraints", {})
            held += [f"{k}={type(c).__name__}" for k, c in constraints.items() if type(c).__name__ not in _SOFTPLUS]
            parts.append(f"{name}:{type(part).__name__}({', '.join(held)})".removeprefix(":"))
    return " ".join(parts)
