"""What `DualGP` is built from, checked by name."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch
from gpytorch.kernels import Kernel
from gpytorch.likelihoods import Likelihood
from gpytorch.means import Mean
from torch import Tensor

from dualgp.checks import check_number
from dualgp.distributed import Ranks
from dualgp.duals import check_likelihood, has_batch_shape, num_outputs_of
from dualgp.errors import InputError, UnsupportedError, check_count
from dualgp.kernels import check_kernel, describe
from dualgp.selection import RULES, Rule, check_rule

if TYPE_CHECKING:
    from dualgp.gp.model import DualGP


def check_arguments(
    kernel: Kernel,
    likelihood: Likelihood,
    mean: Mean | None,
    num_inducing: int | None,
    inducing_points: Tensor | None,
    num_outputs: int | None,
    jitter: float | None,
) -> None:
    """Raise unless these make a model.

    Raises:
        UnsupportedError: if the kernel, mean or likelihood cannot be used.
        InputError: if the arguments contradict each other.
    """
    check_kernel(kernel)
    check_likelihood(likelihood)
    if mean is not None and not isinstance(mean, Mean):
        raise UnsupportedError(f"mean must be a gpytorch.means.Mean or None, got {type(mean).__name__}.")
    if num_inducing is not None and inducing_points is not None:
        raise InputError("Give num_inducing or inducing_points, not both.")
    if num_inducing is not None:
        check_count("num_inducing", num_inducing, 1)
    if num_outputs is not None:
        check_count("num_outputs", num_outputs, 1)
    fixed = num_outputs_of(likelihood)
    if fixed is not None and num_outputs not in (None, fixed):
        raise InputError(f"{type(likelihood).__name__} has {fixed} outputs, but num_outputs={num_outputs}.")
    if num_outputs is not None and fixed is None and has_batch_shape(likelihood):
        raise UnsupportedError(
            f"{type(likelihood).__name__} with parameters per output or per datum is not supported for num_outputs="
            f"{num_outputs}: use MultitaskGaussianLikelihood(num_tasks={num_outputs}, rank=0), or one DualGP each."
        )
    if jitter is not None:
        check_number("jitter", jitter, least=0)


def check_mode() -> None:
    """Raise InputError in `torch.inference_mode()`, whose tensors no gradient passes through ever after."""
    if torch.is_inference_mode_enabled():
        raise InputError(
            "Data cannot be taken in within torch.inference_mode(): its tensors would stay in the model, which could "
            "not learn from then on. Call this outside of it; torch.no_grad() does no harm."
        )


def check_memory(memory: int | None, rule: str | Rule, window: int | None) -> None:
    """Raise InputError unless this says what a stream keeps."""
    for name, size in (("memory", memory), ("window", window)):
        if size is not None and (not isinstance(size, int) or isinstance(size, bool)):
            raise InputError(f"{name} must be an integer or None, got {size!r}.")
    if window is not None and (memory is not None or window < 1):
        raise InputError(f"window must be at least 1 and stand in place of memory; got {window} and {memory}.")
    if memory is not None and memory < 0:
        raise InputError(f"memory must be at least 0, got {memory}.")
    check_rule(rule, RULES, "memory_rule")


def check_fit(tol: float, max_rounds: int, batch_size: int | None) -> None:
    """Raise InputError unless a fit can go by these."""
    check_number("tol", tol, above=0)
    check_count("max_rounds", max_rounds, 1)
    if batch_size is not None:
        check_count("batch_size", batch_size, 1)


def check_same(model: DualGP, ranks: Ranks, arguments: dict[str, object]) -> None:
    """Raise InputError on every rank unless all fit the same model with the same arguments, and no memory."""
    if ranks.group is None:
        return
    if model.memory_size or model.window:
        raise InputError("memory and window hold data of one process: fit with a process_group without them.")
    facts: dict[str, object] = {name: getattr(model, name) for name in ("num_outputs", "num_inducing", "jitter")}
    for part in ("kernel", "likelihood", "mean"):
        module = getattr(model, part)
        facts[part] = describe(module) or "none"
        for name, p in [] if module is None else module.named_parameters():
            facts[f"{part} {name}"] = f"{_summary(p)}{'' if p.requires_grad else ' frozen'}"
    Z = model.inducing_points
    facts["inducing_points"] = "none" if Z is None else f"{_summary(Z)}{' given' if model._Z_given else ''}"
    ranks.same(facts | arguments)


def _summary(values: Tensor) -> str:
    """Name a tensor's dtype, shape and values, many of them by their hash."""
    held = values.detach().cpu()
    told = held.tolist() if held.numel() <= 4 else hashlib.sha256(held.numpy().tobytes()).hexdigest()[:8]
    return f"{held.dtype} {tuple(held.shape)} {told}"
