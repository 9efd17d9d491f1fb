"""The Jacobian of a trained network, layer by layer, and the products of it that dual posteriors need.

κ(x, z) = J(x) J(z)ᵀ is the empirical neural tangent kernel [C, C] of each pair of inputs. It is the sum over layers
of products of what the layers keep (`layers`), so [n, C, P] is not formed unless `dense` is asked for.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dualgp.checks import check_tensor, recordable
from dualgp.errors import InputError, UnsupportedError
from dualgp.kernels.layers import FactoredLayer, Layer, doubled, joined, total
from dualgp.kernels.networks import (
    Selection,
    as_outputs,
    frozen_network,
    full_precision,
    has_own_parameters,
    plain_kernels,
    select_parameters,
    unwrapped,
)
from dualgp.kernels.readers import Reader

_NUM_CHECKED = 3  # rows of the example on which the layers are verified


@dataclass(frozen=True, eq=False)
class JacobianBlock:
    """f and J of n rows, in the network's dtype: products with J by layers."""

    f: Float[Tensor, "n C"]
    layers: tuple[Layer, ...]
    slices: tuple[slice, ...]  # where each parameter tensor lies among the P

    def __len__(self) -> int:
        return len(self.f)

    def __getitem__(self, rows: slice) -> JacobianBlock:
        return JacobianBlock(self.f[rows], tuple(layer[rows] for layer in self.layers), self.slices)

    @property
    def num_params(self) -> int:
        """P."""
        return self.slices[-1].stop

    def compact(self) -> JacobianBlock:
        """Return the same with each layer in the form that takes less memory; factors may be gone."""
        layers = (layer.compact() if isinstance(layer, FactoredLayer) else layer for layer in self.layers)
        return JacobianBlock(self.f, tuple(layers), self.slices)

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return sum(_bytes(part) for layer in self.layers for part in layer.parts)

    def double(self) -> JacobianBlock:
        """Return the same numbers in float64, for products whose rounding matters."""
        return JacobianBlock(self.f.double(), tuple(map(doubled, self.layers)), self.slices)

    @full_precision()
    def gram(self, other: JacobianBlock) -> Float[Tensor, "n C m C"]:
        """Return κ(x, z) = J(x) J(z)ᵀ for all pairs of rows and of outputs, in the dtype of these rows.

        Raises:
            InputError: if `other` is a block of other parameters.
        """
        (n, C), m = self.f.shape, len(other)
        out = self.f.new_zeros(n, C, m, C)
        for mine, theirs in self._paired(other):
            mine.add_gram(out, theirs)  # type: ignore[arg-type]
        return out

    @full_precision()
    def gram_independent(self, other: JacobianBlock) -> Float[Tensor, "C n m"]:
        """Return the C diagonal blocks of `gram`: J_c(x) J_c(z)ᵀ for each output.

        Raises:
            InputError: if `other` is a block of other parameters.
        """
        (n, C), m = self.f.shape, len(other)
        out = self.f.new_zeros(C, n, m)
        for mine, theirs in self._paired(other):
            mine.add_gram_independent(out, theirs)  # type: ignore[arg-type]
        return out

    @full_precision()
    def diag(self) -> Float[Tensor, "n C C"]:
        """Return κ(xᵢ, xᵢ) for each row."""
        return self._sum_of([layer.quad() for layer in self.layers], self.f.shape[1])

    @full_precision()
    def quad(self, d: Float[Tensor, "P"]) -> Float[Tensor, "n C C"]:
        """Return J diag(d) Jᵀ for each row."""
        d = d.to(self.f)
        return self._sum_of([layer.quad(self._columns(layer, d)) for layer in self.layers], self.f.shape[1])

    def dense(self) -> Float[Tensor, "n C P"]:
        """Return J itself: n C P numbers."""
        out = self.f.new_zeros(*self.f.shape, self.num_params)
        for layer in self.layers:
            self._scatter(layer, layer.dense().movedim(-1, 0), out.movedim(-1, 0))
        return out

    @full_precision()
    def matmul(self, u: Float[Tensor, "P r"]) -> Float[Tensor, "n C r"]:
        """Return J u."""
        u = u.to(self.f)
        return self._sum_of([layer.matmul(self._columns(layer, u)) for layer in self.layers], u.shape[-1])

    @full_precision()
    def rmatmul(self, v: Float[Tensor, "n C r"]) -> Float[Tensor, "P r"]:
        """Return Σᵢ Jᵢᵀ vᵢ."""
        out = self.f.new_zeros(self.num_params, v.shape[-1])
        for layer in self.layers:
            self._scatter(layer, layer.rmatmul(v.to(self.f)), out)
        return out

    def scaled(self, scales: Float[Tensor, "tensors"]) -> JacobianBlock:
        """Return J diag(s), one scale for each parameter tensor."""
        layers = (layer.scaled([scales[t] for t in layer.tensors]) for layer in self.layers)
        return JacobianBlock(self.f, tuple(layers), self.slices)

    def _paired(self, other: JacobianBlock) -> Iterator[tuple[Layer, Layer]]:
        if [layer.tensors for layer in self.layers] != [layer.tensors for layer in other.layers] or (
            self.slices != other.slices
        ):
            raise InputError("The blocks are of different networks or parameters: take both from one NetworkJacobian.")
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            yield mine, theirs if self.f.dtype == other.f.dtype else doubled(theirs)  # one at a time, for their memory

    def _columns(self, layer: Layer, u: Tensor) -> Tensor:
        return torch.cat([u[self.slices[t]] for t in layer.tensors])

    def _scatter(self, layer: Layer, values: Tensor, out: Tensor) -> None:
        pieces = values.split([self.slices[t].stop - self.slices[t].start for t in layer.tensors])
        for t, piece in zip(layer.tensors, pieces, strict=True):
            out[self.slices[t]] = piece

    def _sum_of(self, parts: list[Tensor], r: int) -> Tensor:
        return total(parts) if parts else self.f.new_zeros(*self.f.shape, r)


class NetworkJacobian:
    """A trained network f(x; θ) and J = ∂f/∂θ at its parameters θ*, layer by layer.

    It owns a frozen copy in eval mode: the network itself, its mode and its buffers are left alone, and may train on.
    Layers with known factors (dense, convolution, embedding, normalisation, shared or not) are read off hooks; every
    other parameter is differentiated explicitly, [n, C, p]. Which is which is verified against autograd on the
    example, which must therefore take every branch of the network. The work is in the network's dtype; networks in
    half precision, or of several dtypes, are raised to float32 or beyond. Inputs are brought to the network's dtype
    and device.

    Args:
        network: maps [n, *input_shape] to outputs [n, C] or [n], each row by itself.
        example: two rows of inputs or more, [n, *input_shape].
        params: "all" that require a gradient; "last_layer", the last module with parameters that the forward pass
            calls; names and prefixes of names; or a predicate of a name. Those named need not require a gradient.
        budget: bytes that the layers of one block of rows may take; products need some tens of megabytes more.

    Raises:
        UnsupportedError: if the outputs are not [n, C], a row depends on others, or derivatives cannot be had.
        InputError: if weights or outputs are not finite, `params` selects nothing, or one row exceeds the budget.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 3))
        >>> jacobian = NetworkJacobian(net, torch.randn(5, 2))
        >>> block = jacobian.block(torch.randn(4, 2))
        >>> jacobian.num_params, block.gram(block).shape
        (51, torch.Size([4, 3, 4, 3]))
    """

    def __init__(
        self, network: nn.Module, example: Tensor, *, params: Selection = "all", budget: int = 256 << 20
    ) -> None:
        self._network = frozen_network(network)
        trainable = {name for name, p in unwrapped(network).named_parameters() if p.requires_grad}
        first = next(p for p in self._network.parameters() if p.is_floating_point())
        self.dtype, self.device, self.budget = first.dtype, first.device, int(budget)
        if not isinstance(example, Tensor) or example.ndim < 1 or len(example) < 2:
            raise InputError("example must be a tensor of two rows of inputs or more, [n, *input_shape].")
        check_tensor("example", example)
        self.input_shape, self._takes_floats = example.shape[1:], example.is_floating_point()
        rows = self._rows(example[:_NUM_CHECKED])
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            order, activations = self._forward(rows)
            self.names: tuple[str, ...] = tuple(select_parameters(self._network, trainable, params, order))
            selected = self._parameters = [self._network.get_parameter(name) for name in self.names]
            for parameter in selected:  # on the copy; the graph of a trace starts at these
                parameter.requires_grad_()
            self.shapes = tuple(p.shape for p in selected)
            stops = [0, *accumulate(p.numel() for p in selected)]
            self.slices = tuple(slice(a, b) for a, b in pairwise(stops))
            self._scales: Tensor | None = None
            self._reader = Reader.verified(self._network, self.names, rows)
            self.row_bytes = activations + self._layer_bytes(rows)
        if self.row_bytes > self.budget:
            raise InputError(
                f"One row of the Jacobian takes {self.row_bytes:,} bytes, more than the budget of {self.budget:,}. "
                "Raise the budget, or select fewer parameters (params='last_layer', or names)."
            )

    @property
    def network(self) -> nn.Module:
        """The frozen copy, to be read and not changed; the selected parameters require a gradient."""
        return self._network

    @property
    def num_params(self) -> int:
        """P, the number of parameters."""
        return self.slices[-1].stop

    @property
    def theta(self) -> Float[Tensor, "P"]:
        """θ*, flat, in the order of `names`."""
        return torch.cat([p.detach().flatten() for p in self._parameters])

    def state_dict(self) -> dict[str, Tensor]:
        """Return the parameters and buffers of the copy of the network."""
        return self._network.state_dict()

    def __call__(self, x: Tensor) -> Float[Tensor, "n C"]:
        """Return f(x).

        Raises:
            InputError: if x has not the shape of the example, or an output is not finite.
        """
        with torch.no_grad(), full_precision():
            parts = [as_outputs(self._network(x), len(x)) for _, x in self._chunks(x)]
        f = torch.cat(parts) if parts else torch.zeros(0, self.num_outputs, dtype=self.dtype, device=self.device)
        return _finite(f, "The network's outputs")

    def blocks(self, x: Tensor) -> Iterator[tuple[slice, JacobianBlock]]:
        """Yield (rows, block) of as many rows at a time as the budget holds."""
        for rows, chunk in self._chunks(x):
            yield rows, self.block(chunk)

    def kept(self, x: Tensor) -> JacobianBlock:
        """Return f and J of all rows of x, made in chunks and in the form that takes least memory, to be kept.

        Raises:
            InputError: as `block`.
        """
        parts = [block.compact() for _, block in self.blocks(x)] or [self.block(x)]
        if len(parts) == 1:
            return parts[0]
        layers = tuple(joined(same) for same in zip(*(part.layers for part in parts), strict=True))
        return JacobianBlock(torch.cat([part.f for part in parts]), layers, self.slices)

    def block(self, x: Tensor) -> JacobianBlock:
        """Return f and J of all rows of x at once.

        Raises:
            InputError: if x has not the shape of the example, has no rows, or f or J is not finite.
        """
        x = self._rows(x)
        if len(x) == 0:
            raise InputError("x has no rows.")
        f, layers = self._reader.read(x)
        _finite(f, "The network's outputs")
        for layer in layers:
            for part in layer.parts:
                _finite(part, f"The Jacobian of {[self.names[t] for t in layer.tensors]}")
        block = JacobianBlock(f, layers, self.slices)
        return block if self._scales is None else block.scaled(self._scales)

    def scaled(self, scales: Float[Tensor, "tensors"]) -> NetworkJacobian:
        """Return J diag(s), one scale for each parameter tensor: a prior precision by layers, s = τ^(−1/2).

        Raises:
            InputError: if there is not one finite scale for each tensor.
        """
        if len(scales) != len(self.names) or not scales.isfinite().all():
            raise InputError(f"Expected {len(self.names)} finite scales, one for each of {list(self.names)}.")
        new = copy.copy(self)
        scales = scales.detach().to(self.device, self.dtype)
        new._scales = scales if self._scales is None else self._scales * scales
        return new

    def by_weight(self, values: Float[Tensor, "tensors"]) -> Float[Tensor, "P"]:
        """Return one value for each parameter tensor as one for each weight."""
        sizes = torch.tensor([shape.numel() for shape in self.shapes], device=values.device)
        return values.repeat_interleave(sizes)

    def vjp(self, x: Tensor, u: Float[Tensor, "n C"]) -> Float[Tensor, "P"]:
        """Return Σᵢ Jᵢᵀ uᵢ, by one backward pass for each chunk."""
        out = torch.zeros(self.num_params, dtype=torch.float64, device=self.device)
        for rows, chunk in self._chunks(x):
            out += self._vjp(chunk, u[rows].to(self.device, self.dtype)).double()
        if self._scales is not None:
            out *= self.by_weight(self._scales)
        return out.to(self.dtype)

    def jvp(self, x: Tensor, v: Float[Tensor, "P"]) -> Float[Tensor, "n C"]:
        """Return J v for each row."""
        parts = [block.matmul(v.unsqueeze(-1)).squeeze(-1) for _, block in self.blocks(x)]
        return torch.cat(parts) if parts else torch.zeros(0, self.num_outputs, dtype=self.dtype, device=self.device)

    def _vjp(self, x: Tensor, u: Tensor) -> Tensor:
        with torch.enable_grad(), plain_kernels(self._network):
            f = as_outputs(self._network(x), len(x))
            grads = torch.autograd.grad(f, self._parameters, u, allow_unused=True)
        pairs = zip(grads, self._parameters, strict=True)
        return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])

    def _layer_bytes(self, x: Tensor) -> int:
        """Return the bytes of the layers of a row, twice: while they are made, derivatives of what lies between are."""
        _, layers = self._reader.read(x)
        parts = [part for layer in layers for part in layer.parts if len(part) == len(x)]  # one row may serve all
        return 2 * sum(map(_bytes, parts)) // len(x)

    def _rows(self, x: Tensor) -> Tensor:
        check_tensor("x", x)
        if x.shape[1:] != self.input_shape or x.ndim == 0:
            sizes = ", ".join(["n", *map(str, self.input_shape)])
            raise InputError(f"Expected x of shape [{sizes}], got {tuple(x.shape)}.")
        if self._takes_floats != x.is_floating_point():
            kind = "floating point" if self._takes_floats else "whole numbers"
            raise InputError(f"Expected x of {kind}, as in the example that the network was read with, got {x.dtype}.")
        return recordable(x.detach().to(self.device, self.dtype if x.is_floating_point() else x.dtype))

    def _chunks(self, x: Tensor) -> Iterator[tuple[slice, Tensor]]:
        x, step = self._rows(x), self.budget // self.row_bytes
        for start in range(0, len(x), step):
            yield slice(start, min(start + step, len(x))), x[start : start + step]

    def _forward(self, x: Tensor) -> tuple[list[str], int]:
        """Check f on rows together and alone; return the order of modules, and the bytes of activations of a row."""
        order: list[str] = []
        sizes = [_bytes(x)]
        with torch.no_grad(), full_precision(), ExitStack() as hooks:
            for name, module in self._network.named_modules():
                if has_own_parameters(module) and "parametrizations" not in name.split("."):
                    hook = module.register_forward_pre_hook(lambda *_, name=name: order.append(name))
                    hooks.callback(hook.remove)
                if not any(module.children()):
                    hook = module.register_forward_hook(lambda _, __, z: sizes.append(_bytes(z)))
                    hooks.callback(hook.remove)
            try:
                f = self._network(x)
            except (RuntimeError, ValueError, IndexError, TypeError) as error:
                raise InputError(
                    f"The network does not take inputs [n, {', '.join(map(str, x.shape[1:]))}] of {x.dtype}: {error}"
                ) from error
            f = _finite(as_outputs(f, len(x)), "The network's outputs")
        self.num_outputs = f.shape[1]
        reason = "their values differ"
        try:
            with torch.no_grad(), full_precision():
                alone = torch.cat([as_outputs(self._network(row.unsqueeze(0)), 1) for row in x])
            tolerance = 1e-4 if f.dtype == torch.float32 else 1e-9
            same = bool((f - alone).abs().max() <= tolerance * f.abs().max())
        except (RuntimeError, ValueError, IndexError) as error:
            same, reason = False, f"a row alone raises {error}"
        if not same:
            raise UnsupportedError(
                f"The outputs of a row change with the other rows of the batch, or from call to call: {reason}. Batch "
                "normalisation without running statistics and dropout that ignores eval mode are common causes: "
                "replace them."
            )
        return order, sum(sizes) // len(x)


def _bytes(z: object) -> int:
    return z.numel() * z.element_size() if isinstance(z, Tensor) else 0


def _finite(t: Tensor, what: str) -> Tensor:
    if not t.sum().isfinite() and not t.isfinite().all():
        raise InputError(f"{what} hold NaN or infinity: check the inputs and the weights.")
    return t
