"""Arguments checked by name, before anything is done with them."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

from dualgp.errors import InputError


def check_tensor(name: str, value: object) -> None:
    """Raise InputError unless this is a dense tensor of real numbers that are there."""
    if not isinstance(value, Tensor):
        raise InputError(f"{name} must be a torch.Tensor, got {type(value).__name__}; use torch.as_tensor.")
    if value.layout != torch.strided:
        raise InputError(f"{name} must be a dense tensor, got {value.layout}; use {name}.to_dense().")
    if value.is_meta:
        raise InputError(f"{name} is on the device 'meta', where tensors have no values; move it before it is cleared.")
    if value.is_complex():
        raise InputError(f"{name} must hold real numbers, got {value.dtype}.")


def check_number(
    name: str,
    value: object,
    *,
    least: float | int = -math.inf,
    above: float | int = -math.inf,
    most: float | int = math.inf,
    why: str = "",
) -> None:
    """Raise InputError unless this is a finite number, or a tensor of one, within limits."""
    found: object = value
    if isinstance(value, Tensor):
        check_tensor(name, value)
        found = value.item() if value.numel() == 1 else None
    try:
        number = float(found) if isinstance(found, Real) else math.nan
    except OverflowError:
        number = math.inf
    if not (math.isfinite(number) and number >= least and number > above and number <= most):
        came = f"{value!r:.40}" if isinstance(value, Real) else type(value).__name__
        wanted = "be a finite number"
        if least > -math.inf:
            wanted = f"be ≥ {least:g} and finite" if most == math.inf else f"lie in [{least:g}, {most:g}]"
        elif above > -math.inf:
            wanted = "be positive" if above == 0 else f"be above {above:g}"
        raise InputError(f"{name} must {wanted}, got {came}{why}.")


def check_value(name: str, value: object) -> None:
    """Raise InputError unless this is a tensor as in `check_tensor`, or a number as in `check_number`."""
    if isinstance(value, Tensor):
        check_tensor(name, value)
    else:
        check_number(name, value)


def check_generator(generator: object) -> None:
    """Raise InputError unless this is a torch.Generator or None."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise InputError(f"generator must be a torch.Generator or None, got {type(generator).__name__}.")


def recordable(values: Tensor) -> Tensor:
    """Return what autograd can save: a tensor made in `torch.inference_mode()` it cannot."""
    if not values.is_inference():
        return values
    with torch.inference_mode(False):
        return values.clone()
