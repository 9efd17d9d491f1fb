"""Which way each parameter of a network is differentiated: by the factors of its layer if that agrees with autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dualgp.errors import UnsupportedError
from dualgp.kernels.layers import ExplicitLayer, Layer
from dualgp.kernels.networks import as_outputs, plain_kernels
from dualgp.kernels.taps import Call, MismatchError, Plan, find_plans, rows_by_func, rows_by_loop, trace

# Relative to the largest derivative of a tensor, and of all tensors.
_TOLERANCES = {torch.float32: (1e-3, 1e-5), torch.float64: (1e-8, 1e-12)}


@dataclass(frozen=True, eq=False)
class Reader:
    """Reads f and the layers of J off a network; parameters that f does not depend on have no layer."""

    network: nn.Module
    names: tuple[str, ...]
    plans: tuple[Plan, ...]
    explicit: tuple[int, ...]  # parameters to differentiate explicitly
    rows_of: Callable[[nn.Module, Sequence[str], Tensor], list[Tensor]] = rows_by_func

    @classmethod
    def verified(cls, network: nn.Module, names: tuple[str, ...], x: Tensor) -> Reader:
        """Return a reader that agrees with autograd on Σᵢ Jᵢᵀ uᵢ, for random u, at the rows x.

        Raises:
            UnsupportedError: if there is none, or no parameter has a derivative.
        """
        parameters = [network.get_parameter(name) for name in names]
        with torch.enable_grad(), plain_kernels(network):
            f = as_outputs(network(x), len(x))
        generator = torch.Generator("cpu").manual_seed(0)
        u = torch.randn(f.shape, generator=generator, dtype=torch.float64, device="cpu").to(f)
        truth: dict[int, Tensor] = {}
        if f.requires_grad:
            try:
                grads = torch.autograd.grad(f, parameters, u, allow_unused=True)
            except RuntimeError as error:
                raise UnsupportedError(f"autograd cannot differentiate the network: {error}") from error
            truth = {i: g for i, g in enumerate(grads) if g is not None}
        if not truth:
            raise UnsupportedError(
                f"The outputs have no derivative in any of {list(names)}: they are not used, or the forward pass "
                "runs under no_grad or detaches them. Select parameters that the outputs depend on."
            )
        plans = find_plans(network, {id(p): i for i, p in enumerate(parameters) if i in truth})
        _, calls = trace(network, x, _modules(plans))
        kept = [found for plan in plans for found in _verified_plans(plan, calls, u, truth)]
        covered = {t for plan in kept for t in plan.tensors}
        reader = cls(network, names, tuple(kept), tuple(i for i in truth if i not in covered))
        return reader._with_rows(x, u, truth) if reader.explicit else reader

    def _with_rows(self, x: Tensor, u: Tensor, truth: dict[int, Tensor]) -> Reader:
        """Return this reader with a way to the explicit derivatives that agrees with autograd."""
        names, reasons = [self.names[i] for i in self.explicit], []
        for rows_of in (rows_by_func, rows_by_loop):
            try:
                values = [torch.tensordot(u, jac, 2) for jac in rows_of(self.network, names, x)]
            except Exception as error:  # whatever a network does that cannot be mapped
                reasons.append(f"{rows_of.__name__}: {error}")
                continue
            if all(_agrees(value, i, truth) for i, value in zip(self.explicit, values, strict=True)):
                return replace(self, rows_of=rows_of)
            reasons.append(f"{rows_of.__name__}: derivatives of single rows differ from those of the batch")
        raise UnsupportedError(
            f"The derivatives of {names} by rows cannot be had: {'; '.join(reasons)}. Leave these parameters out with "
            "`params`, or write the layer with torch operations that torch.func can map."
        )

    def read(self, x: Tensor) -> tuple[Tensor, tuple[Layer, ...]]:
        """Return f [n, C] and the layers of J.

        Raises:
            UnsupportedError: if a layer does not act on these rows as it did on the example.
        """
        f, calls = trace(self.network, x, _modules(self.plans))
        try:
            layers = [plan.build(calls, len(x)) for plan in self.plans]
        except MismatchError as error:
            raise UnsupportedError(
                f"A layer that acted on each row of the example does not on these {len(x)} rows ({error}). Wrap the "
                "network so that it treats every number of rows alike."
            ) from error
        if self.explicit:
            rows = self.rows_of(self.network, [self.names[i] for i in self.explicit], x)
            jacs = [jac.reshape(*f.shape, -1) for jac in rows]
            layers.append(ExplicitLayer(self.explicit, tuple(j.shape[-1] for j in jacs), torch.cat(jacs, -1)))
        return f.detach(), tuple(layers)


def _modules(plans: Sequence[Plan]) -> list[nn.Module]:
    """The modules to tap, each once."""
    return list(dict.fromkeys(m for plan in plans for m in plan.modules))


def _verified_plans(plan: Plan, calls: Sequence[Call], u: Tensor, truth: dict[int, Tensor]) -> list[Plan]:
    """Return the plan with the batch dimension at which it agrees with autograd; else what does of its parts."""
    for batch_dim in (0, 1):
        candidate = replace(plan, batch_dim=batch_dim)
        try:
            pulled = candidate.build(calls, len(u)).rmatmul(u.unsqueeze(-1)).squeeze(-1)
        except (MismatchError, RuntimeError, ValueError, IndexError):
            continue
        values = pulled.split([truth[t].numel() for t in plan.tensors])
        if all(_agrees(v.view_as(truth[t]), t, truth) for t, v in zip(plan.tensors, values, strict=True)):
            return [candidate]
    parts = zip((plan.kind, "bias"), plan.tensors, strict=True) if len(plan.tensors) > 1 else ()
    return [p for kind, t in parts for p in _verified_plans(replace(plan, kind=kind, tensors=(t,)), calls, u, truth)]


def _agrees(value: Tensor, tensor: int, truth: dict[int, Tensor]) -> bool:
    own, all_ = _TOLERANCES[value.dtype]
    scale = max(float(g.abs().max()) for g in truth.values())
    true = truth[tensor]
    return bool((value - true).abs().max() <= own * true.abs().max() + all_ * scale)
