"""A trained network as a function of rows: a frozen copy, the parameters asked for, and what its outputs must be."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parameter import is_lazy

from dualgp.errors import InputError, UnsupportedError
from dualgp.threads import ONE_AT_A_TIME

Selection = str | Sequence[str] | Callable[[str], bool]


def unwrapped(network: nn.Module) -> nn.Module:
    """Return the module that torch.compile wraps, or the module itself."""
    return getattr(network, "_orig_mod", network)


def frozen_network(network: object) -> nn.Module:
    """Return an eval-mode copy that shares nothing with `network` and takes no gradient, in float32 or float64.

    Raises:
        UnsupportedError: if it is no module, cannot be copied, is a TorchScript module, or has parameters that are
            complex, uninitialised or without values (on the device "meta").
        InputError: if a parameter is not finite, or there is none.
    """
    if not isinstance(network, nn.Module):
        raise UnsupportedError(f"Expected a torch.nn.Module, got {type(network).__name__}.")
    network = unwrapped(network)
    if isinstance(network, torch.jit.ScriptModule):
        raise UnsupportedError("TorchScript modules cannot be called with other parameters: pass the module itself.")
    state = [*network.parameters(), *network.buffers()]
    if any(is_lazy(t) for t in state):
        raise UnsupportedError("The network has lazy layers without parameters yet: call it once, then pass it.")
    if any(t.is_meta for t in state):
        raise UnsupportedError("The network is on the device 'meta', without values: load its weights, then pass it.")
    if any(t.is_complex() for t in network.parameters()):
        raise UnsupportedError("Complex parameters are not supported; hold their real and imaginary parts.")
    try:
        network = copy.deepcopy(network)
    except (RuntimeError, TypeError) as error:
        raise UnsupportedError(
            f"The network cannot be copied: {error}. Old-style weight_norm is a common cause: use "
            "torch.nn.utils.parametrizations, or remove it after training."
        ) from error
    for module in network.modules():  # hooks on the backward pass see gradients; those on the forward pass are f
        module._backward_hooks.clear()
        module._backward_pre_hooks.clear()
    for name, parameter in network.named_parameters():  # a buffer may hold −∞, as attention masks do
        parameter.requires_grad_(False)
        if not parameter.isfinite().all():
            raise InputError(f"The network's {name} holds NaN or infinity: training has diverged.")
    dtypes = {p.dtype for p in network.parameters() if p.is_floating_point()}
    if not dtypes:
        raise InputError("The network has no parameters.")
    if len(dtypes) > 1 or dtypes & {torch.float16, torch.bfloat16}:
        network = network.to(reduce(torch.promote_types, dtypes, torch.float32))
    return network.eval()


def select_parameters(network: nn.Module, trainable: set[str], params: Selection, order: list[str]) -> list[str]:
    """Return the names of the parameters asked for, in the order of `named_parameters`.

    Args:
        network: the frozen copy.
        trainable: the names that require a gradient in the network of the user; "all" means these.
        params: "all", "last_layer", names and prefixes of names, or a predicate of a name.
        order: names of the modules with parameters of their own, in the order in which the forward pass calls them.

    Raises:
        InputError: if a name is unknown or nothing is left.
    """
    first = {id(p): name for name, p in network.named_parameters()}
    canonical = {name: first[id(p)] for name, p in network.named_parameters(remove_duplicate=False)}
    if params == "all":
        chosen = trainable
    elif params == "last_layer":
        chosen = {canonical[name] for name in canonical if order and _is_under(name, order[-1])}
    elif callable(params):
        chosen = {canonical[name] for name in canonical if params(name)}
    elif isinstance(params, str):
        raise InputError(f"params must be 'all', 'last_layer', a list of names or a predicate, got {params!r}.")
    else:
        unknown = [prefix for prefix in params if not any(_is_under(name, prefix) for name in canonical)]
        if unknown:
            raise InputError(f"No parameters are named {unknown}; the network has {list(canonical)}.")
        chosen = {canonical[name] for name in canonical if any(_is_under(name, prefix) for prefix in params)}
    if not chosen:
        raise InputError(
            f"params={params!r} selects no parameters of {list(canonical)}. 'all' leaves out those with "
            "requires_grad=False: name them to have them."
        )
    return [name for name in first.values() if name in chosen]


def _is_under(name: str, prefix: str) -> bool:
    return not prefix or name == prefix or name.startswith(prefix + ".")


def has_own_parameters(module: nn.Module) -> bool:
    """Return whether parameters, perhaps under a parametrisation, belong to this module and not to a child."""
    return any("." not in name or name.startswith("parametrizations.") for name, _ in module.named_parameters())


def as_outputs(f: object, n: int) -> Tensor:
    """Return the network's outputs as [n, C].

    Raises:
        UnsupportedError: if they are not a tensor of shape [n, C] or [n].
    """
    if isinstance(f, Tensor) and f.is_floating_point():
        if f.shape == (n,):
            return f.unsqueeze(-1)
        if f.ndim == 2 and len(f) == n:
            return f
        came = f"shape {tuple(f.shape)}"
    else:
        came = str(f.dtype) if isinstance(f, Tensor) else type(f).__name__
    raise UnsupportedError(
        f"The network must map n = {n} rows to a floating-point tensor [n, C], but returned {came}. Wrap it in a "
        "module whose forward picks the outputs and flattens them to [n, C]."
    )


@contextmanager
def full_precision() -> Iterator[None]:
    """Within, float32 products are of float32: TensorFloat32, cuDNN's default, has 10 bits, too few to tell a rank."""
    b: Any = torch.backends
    switches: list[tuple[Any, str, Any]]
    if hasattr(b.cuda.matmul, "fp32_precision"):
        products = (b.cuda.matmul, b.cudnn.conv, b.cudnn.rnn, b.mkldnn.matmul, b.mkldnn.conv, b.mkldnn.rnn)
        switches = [(owner, "fp32_precision", "ieee") for owner in products]
    else:  # torch before 2.9
        switches = [(b.cuda.matmul, "allow_tf32", False), (b.cudnn, "allow_tf32", False)]
    with ONE_AT_A_TIME, ExitStack() as stack:
        for owner, name, value in switches:
            stack.enter_context(_set(owner, name, value))
        yield


@contextmanager
def _set(owner: object, name: str, value: object) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def plain_kernels(network: nn.Module) -> Iterator[None]:
    """Within, attention and recurrent layers run on kernels whose derivatives can be batched, in eval mode too.

    Gradients can be recorded, also where the caller is in `torch.inference_mode()`.
    """
    recurrent = any(isinstance(m, nn.RNNBase) for m in network.modules())
    cudnn = torch.backends.cudnn
    with (
        torch.inference_mode(False),
        full_precision(),
        sdpa_kernel(SDPBackend.MATH),
        _set(cudnn, "enabled", cudnn.enabled and not recurrent),
    ):
        yield
