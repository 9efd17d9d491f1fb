"""From a network to the blocks of its layers: what each module saw, what the outputs made of it, and in which factors.

A tap is a forward hook on a layer: it keeps the layer's input a and the place of its output z in the graph, and one
batched backward pass gives g = ∂f/∂z. Which parameters may be read off so is not assumed but verified against
autograd; all others are differentiated explicitly, row by row under `torch.func`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from dualgp.kernels.layers import ExplicitLayer, FactoredLayer, Layer, LookupLayer, total
from dualgp.kernels.networks import as_outputs, plain_kernels

_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CHANNELS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm)
_TRAILING = (nn.LayerNorm, nn.RMSNorm)


class MismatchError(Exception):
    """A layer does not act on rows as its plan supposes."""


class Call(NamedTuple):
    """One call of a module: its input, and ∂f_c/∂z of its output for each c, [C, *z.shape]."""

    module: nn.Module
    input: Tensor
    g: Tensor


@dataclass(frozen=True)
class Plan:
    """How the Jacobian of some tensors is read off the calls of some modules."""

    kind: str  # "matrix", "grouped", "gain", "table" or "bias"
    tensors: tuple[int, ...]  # the weight and the bias where both are read off, else one
    modules: tuple[nn.Module, ...]
    batch_dim: int = 0  # where z has its rows: 1 for sequences that come first

    def build(self, calls: Sequence[Call], n: int) -> Layer:
        """Return the block of these tensors.

        Raises:
            MismatchError: if the layer's input cannot be cut into n rows.
        """
        first: Any = self.modules[0]
        parts = []
        for call in calls:
            if call.module in self.modules:
                a, g = _features_last(self.kind, call)
                parts.append((_by_rows(a, n, self.batch_dim, 0), _by_rows(g, n, self.batch_dim, 1).transpose(0, 1)))
        if not parts:
            raise MismatchError("not called")
        if self.kind == "matrix":
            a, bias = torch.cat([a for a, _ in parts], 1), len(self.tensors) > 1
            a = F.pad(a, (0, 1), value=1.0) if bias else a
            return FactoredLayer(self.tensors, a, _cat([g for _, g in parts]), bias)
        if self.kind == "table":
            tokens = torch.cat([a for a, _ in parts], 1).squeeze(-1)
            return LookupLayer(self.tensors, tokens, _cat([g for _, g in parts]), first.num_embeddings)
        jacs: list[Tensor] = []
        if self.kind == "gain":
            jacs.append(total(torch.einsum("ncso,nso->nco", g, a) for a, g in parts))
        elif self.kind == "grouped":
            split = (tuple(t.unflatten(-1, (first.groups, -1)) for t in part) for part in parts)
            jacs.append(total(torch.einsum("ncsgo,nsgi->ncgoi", g, a).flatten(2) for a, g in split))
        if self.kind == "bias" or len(self.tensors) > 1:
            jacs.append(total(g.sum(2) for _, g in parts))
        return ExplicitLayer(self.tensors, tuple(j.shape[-1] for j in jacs), torch.cat(jacs, -1))


def _cat(g: list[Tensor]) -> Tensor:
    return g[0] if len(g) == 1 else torch.cat(g, 2)  # alone it keeps its strides: see layers._shared


def _by_rows(t: Tensor, n: int, batch_dim: int, lead: int) -> Tensor:
    """Bring [*lead, *batch, features] to [*lead, n, S, features]."""
    if t.ndim < lead + batch_dim + 2:
        raise MismatchError("no such dimension")
    t = t.transpose(lead, lead + batch_dim)
    if t.shape[lead] % n:
        raise MismatchError("no multiple of n")
    if t.ndim == lead + 2 and t.shape[lead] == n:
        return t.unsqueeze(-2)
    return t.reshape(*t.shape[:lead], n, -1, t.shape[-1])


def _features_last(kind: str, call: Call) -> tuple[Tensor, Tensor]:
    """Return what meets the weight [*batch, I] and what it makes [C, *batch, O]."""
    module: Any = call.module
    x, g = call.input, call.g
    if isinstance(module, _CONV):
        if x.ndim != len(module.kernel_size) + 2:
            raise MismatchError("no batch")
        return (_patches(module, x) if kind != "bias" else x.flatten(2).mT), g.flatten(3).mT
    if isinstance(module, nn.Embedding):
        if module.padding_idx is not None:
            g = g.masked_fill((x == module.padding_idx).unsqueeze(-1), 0.0)
        return x.unsqueeze(-1), g
    if isinstance(module, nn.Linear):
        return x, g
    x = _normalised(module, x) if kind == "gain" else x
    if isinstance(module, _CHANNELS):
        return x.movedim(1, -1), g.movedim(2, -1)
    k = len(module.normalized_shape)
    return x.flatten(-k), g.flatten(-k)


def _patches(module: Any, x: Tensor) -> Tensor:
    """Unfold [B, C_in, *size] into patches [B, positions, C_in · kernel], in the order of the weight (by groups)."""
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padding = module._reversed_padding_repeated_twice
    x = F.pad(x, padding, mode=mode) if any(padding) else x
    k = len(module.kernel_size)
    for d, (size, step, gap) in enumerate(zip(module.kernel_size, module.stride, module.dilation, strict=True)):
        x = x.unfold(2 + d, gap * (size - 1) + 1, step)[..., ::gap]
    order = [0, *range(2, 2 + k), 1, *range(2 + k, 2 + 2 * k)]  # [B, *positions, C_in, *kernel]
    return x.permute(order).flatten(1 + k).flatten(1, k)


def _normalised(module: Any, x: Tensor) -> Tensor:
    """Return the input of the gain."""
    if isinstance(module, nn.LayerNorm):
        return F.layer_norm(x, module.normalized_shape, eps=module.eps)
    if isinstance(module, nn.RMSNorm):
        return F.rms_norm(x, module.normalized_shape, eps=module.eps)
    if isinstance(module, nn.GroupNorm):
        return F.group_norm(x, module.num_groups, eps=module.eps)
    return F.batch_norm(x, module.running_mean, module.running_var, eps=module.eps)


def trace(network: nn.Module, x: Tensor, modules: Sequence[nn.Module]) -> tuple[Tensor, list[Call]]:
    """Return f [n, C], part of the graph, and the calls of `modules`."""
    taps: list[tuple[nn.Module, Tensor, GradientEdge]] = []

    def tap(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if isinstance(output, Tensor) and output.requires_grad:
            (x, *_) = args or tuple(kwargs.values())
            taps.append((module, x.detach(), get_gradient_edge(output)))

    with torch.enable_grad(), plain_kernels(network), ExitStack() as hooks:  # one thread's hooks at a time
        for module in modules:
            hooks.callback(module.register_forward_hook(tap, prepend=True, with_kwargs=True).remove)
        f = as_outputs(network(x), len(x))
        gradients = output_gradients(f, [edge for _, _, edge in taps])
    # A call that the outputs do not depend on adds nothing.
    return f, [Call(m, x, g) for (m, x, _), g in zip(taps, gradients, strict=True) if g is not None]


def output_gradients(f: Tensor, inputs: Sequence[Any]) -> list[Tensor | None]:
    """Return ∂(Σᵢ f_ic)/∂(each input) for every c, [C, *shape]; None where f does not depend on it."""
    if not inputs:
        return []
    n, C = f.shape
    seeds = torch.eye(C, dtype=f.dtype, device=f.device).unsqueeze(1).expand(C, n, C)
    options: dict[str, Any] = {"allow_unused": True, "retain_graph": True}
    try:
        return list(torch.autograd.grad(f, inputs, seeds, is_grads_batched=True, **options))
    except RuntimeError:  # an operation that cannot be batched
        columns = [torch.autograd.grad(f, inputs, seed, **options) for seed in seeds]
        return [None if g[0] is None else torch.stack(g) for g in zip(*columns, strict=True)]


def find_plans(network: nn.Module, index: dict[int, int]) -> list[Plan]:
    """Return a plan for each selected tensor that a known layer owns; `index`: id of a parameter → its number.

    Modules that share a weight have one plan; a weight that different kinds of layers share has none.
    """
    readers: dict[int, dict[nn.Module, str]] = defaultdict(dict)
    for module in network.modules():
        for name, parameter in module._parameters.items():
            kind = _kind(module, name)
            if parameter is not None and id(parameter) in index and kind:
                readers[index[id(parameter)]][module] = kind
    plans: list[Plan] = []
    joined: set[int] = set()
    for i, modules in sorted(readers.items(), key=lambda item: ("bias" in item[1].values(), item[0])):  # weights first
        kinds, bias = set(modules.values()), {id(m._parameters.get("bias")) for m in modules}
        if i in joined or len(kinds) > 1:
            continue
        b = index.get(bias.pop()) if len(bias) == 1 and kinds != {"bias"} else None
        tensors: tuple[int, ...] = (i,)
        if b is not None and set(readers.get(b, {})) == set(modules):
            joined.add(b)
            tensors = (i, b)
        plans.append(Plan(kinds.pop(), tensors, tuple(modules)))
    return plans


def _kind(module: nn.Module, name: str) -> str | None:
    known = isinstance(module, (nn.Linear, nn.Embedding, *_CONV, *_CHANNELS, *_TRAILING))
    if not known or name not in ("weight", "bias"):
        return None
    if name == "bias":
        return "bias"
    if isinstance(module, nn.Embedding):  # max_norm changes the weight in the forward pass
        return None if module.scale_grad_by_freq or module.max_norm is not None else "table"
    if isinstance(module, _CONV):
        return "matrix" if module.groups == 1 else "grouped"
    return "matrix" if isinstance(module, nn.Linear) else "gain"


def rows_by_func(network: nn.Module, names: Sequence[str], x: Tensor) -> list[Tensor]:
    """Return J of each named parameter [n, C, *shape], by `torch.func` over rows."""
    parameters = dict(network.named_parameters())

    def one(values: dict[str, Tensor], row: Tensor) -> Tensor:
        return as_outputs(torch.func.functional_call(network, values, (row.unsqueeze(0),)), 1).squeeze(0)

    values = {name: parameters[name].detach() for name in names}
    with plain_kernels(network), torch.no_grad():
        jac = torch.func.vmap(torch.func.jacrev(one), (None, 0))(values, x)
    return [jac[name] for name in names]


def rows_by_loop(network: nn.Module, names: Sequence[str], x: Tensor) -> list[Tensor]:
    """Return the same by one pass for each row: slow, for what `torch.func` cannot map (recurrent layers)."""
    parameters = dict(network.named_parameters())
    rows = []
    for row in x:
        with torch.enable_grad(), plain_kernels(network):
            f = as_outputs(network(row.unsqueeze(0)), 1)
            grads = output_gradients(f, [parameters[name] for name in names])
        missing = [f.new_zeros(f.shape[-1], *parameters[name].shape) for name in names]
        rows.append([zero if g is None else g for g, zero in zip(grads, missing, strict=True)])
    return [torch.stack(jac) for jac in zip(*rows, strict=True)]
