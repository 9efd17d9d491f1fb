"""KeOps as an optional backend: whether it works here, found out once, and a product by it.

That `import pykeops` succeeds says nothing: the first product compiles, and fails, falls back to the CPU on a CUDA
machine, or ends the process (all three were seen). So a product is tried in another process first.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dualgp.errors import UnsupportedError
from dualgp.kernels.cuda import cuda_shim
from dualgp.kernels.forms import Combined, Form, Linear, Radial, Scaled
from dualgp.kernels.tiles import Operand

_TIMEOUT = 600  # seconds; a formula takes 5, or 30 on a busy machine, and the binders of a GPU as many again
_INSTALL = "pykeops is not installed: pip install 'dualgp[keops]'"

_TRIAL = """
import sys, torch, pykeops
from pykeops.torch import LazyTensor
device = sys.argv[1]
if device == "cuda" and not pykeops.config.gpu_available:
    sys.exit("KeOps has fallen back to the CPU: it does not find CUDA's libraries and headers")
x = torch.linspace(0, 1, 20, device=device).reshape(10, 2)
found = (-0.5 * ((LazyTensor(x[:, None, :]) - LazyTensor(x[None, :, :])) ** 2).sum(-1)).exp() @ x
expected = (-0.5 * (x[:, None] - x).square().sum(-1)).exp() @ x
sys.exit(0 if (found - expected).abs().max() < 1e-5 else "a KeOps product is wrong")
"""


class KeopsStatus(NamedTuple):
    """Whether KeOps works on a device, and why not or what was tried."""

    available: bool
    reason: str

    def __str__(self) -> str:
        return f"KeOps is {'' if self.available else 'not '}available: {self.reason}"


def keops_status(device: str = "cpu") -> KeopsStatus:
    """Return whether a KeOps product compiles and runs on "cpu" or "cuda"; the first call takes seconds, others none.

    On a CUDA machine where KeOps finds no libraries, the reason tells which environment to start Python with.

    Example:
        >>> keops_status("abacus")
        KeopsStatus(available=False, reason='there is no KeOps for abacus')
    """
    if device not in ("cpu", "cuda"):
        return KeopsStatus(False, f"there is no KeOps for {device}")
    if importlib.util.find_spec("pykeops") is None:
        return KeopsStatus(False, _INSTALL)
    return _status(device)


@functools.cache
def _status(device: str) -> KeopsStatus:
    reason = _try(device, {})
    if reason is None:
        return KeopsStatus(True, "a product was compiled and is right")
    if device == "cuda":
        shim = cuda_shim()
        if not shim.missing and _try(device, shim.environment) is None:
            return KeopsStatus(False, f"{reason}. It works if Python is started with {shim.command}")
        if shim.missing:
            reason = f"{reason}; not found on this machine: {', '.join(shim.missing)}"
    return KeopsStatus(False, reason)


def _try(device: str, environment: dict[str, str]) -> str | None:
    """Run the trial in a process of its own; return what is wrong, or None."""
    env = {
        **os.environ,
        "KEOPS_VERBOSE": "0",
        "PYKEOPS_VERBOSE": "0",
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        **environment,
    }
    try:
        done = subprocess.run(
            [sys.executable, "-c", _TRIAL, device],
            capture_output=True,
            text=True,
            env=env,
            timeout=_TIMEOUT,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"the trial did not end: {type(error).__name__}"
    if done.returncode == 0:
        return None
    if done.returncode < 0:
        return f"the trial was ended by signal {-done.returncode}"
    lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else f"the trial ended with status {done.returncode}"


def keops_product(op: Operand, v: Tensor) -> Tensor:
    """Return K v for v [m, w] in the dtype of tiles, by KeOps; differentiable by KeOps itself.

    Raises:
        UnsupportedError: for a kernel that has no closed form here.
    """
    if not op.form.closed:
        raise UnsupportedError(f'{op.form} has no closed form for KeOps; use backend="chunked".')
    from pykeops import torch as keops

    psi_x = [t.to(op.dtype) for t in _centred(op.form.warp(op.x), op)]
    psi_z = psi_x if op.z is None else [t.to(op.dtype) for t in _centred(op.form.warp(op.z), op)]
    numbers = [t.to(op.dtype).reshape(1) for t in op.form.numbers()]
    lazy = _lazy(op.form, iter(psi_x), iter(psi_z), iter(numbers), keops.LazyTensor)
    return lazy @ v.to(op.dtype).contiguous()


def _centred(psi: list[Tensor], op: Operand) -> list[Tensor]:
    """Shift features of which only differences matter, so that rounding to float32 costs less."""
    first = op.x if op.z is None else op.z
    with torch.no_grad():
        centres = [t.mean(0) for t in op.form.warp(first)]
    shift = [isinstance(leaf, Radial) for leaf in op.form.leaves()]
    return [t - c if s else t for t, c, s in zip(psi, centres, shift, strict=True)]


def _lazy(form: Form, rows: Iterator[Tensor], columns: Iterator[Tensor], numbers: Iterator[Tensor], make: Any) -> Any:
    """The expression in KeOps's terms."""
    if isinstance(form, Scaled):
        scale = make(next(numbers))
        return scale * _lazy(form.inner, rows, columns, numbers, make)
    if isinstance(form, Combined):
        parts = [_lazy(part, rows, columns, numbers, make) for part in form.parts]
        total = parts[0]
        for part in parts[1:]:
            total = total * part if form.product else total + part
        return total
    psi_x = next(rows)
    x, z = make(psi_x.unsqueeze(1).contiguous()), make(next(columns).unsqueeze(0).contiguous())
    if isinstance(form, Linear):
        return (x * z).sum(-1)
    assert isinstance(form, Radial)
    square = ((x - z) ** 2).sum(-1)
    if form.rational:
        alpha = make(next(numbers))
        return (-alpha * (1.0 + 0.5 * square / alpha).log()).exp()
    if math.isinf(form.nu):
        return (-0.5 * square).exp()
    # √ has no derivative at 0; what is added is below rounding there
    a = (2.0 * form.nu * square + (1e-12 if psi_x.dtype == torch.float32 else 1e-28)).sqrt()
    polynomial = {0.5: None, 1.5: 1.0 + a, 2.5: 1.0 + a + a**2 / 3.0}[form.nu]
    return (-a).exp() if polynomial is None else polynomial * (-a).exp()
