"""An optimiser's parameters by number and by name: their state as it is saved, and their layout."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

from torch import Tensor, nn

from dualgp.errors import InputError
from dualgp.optim.flat import Bucket
from dualgp.weights import WeightLayout

Tensors: TypeAlias = Mapping[str, Tensor]


def numbers_of(mine: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> dict[nn.Parameter, int]:
    """Return the number that each parameter has in a saved state.

    Raises:
        InputError: if its groups are of other numbers of parameters.
    """
    if [len(g["params"]) for g in theirs] != [len(g["params"]) for g in mine]:
        raise InputError(
            f"The state has groups of {[len(g['params']) for g in theirs]} parameters, this optimiser of "
            f"{[len(g['params']) for g in mine]}; build it as the one that was saved."
        )
    pairs = zip(mine, theirs, strict=True)
    return {p: k for a, b in pairs for p, k in zip(a["params"], b["params"], strict=True)}


def by_parameter(buckets: Iterable[Bucket], names: Iterable[str]) -> dict[nn.Parameter, Tensors]:
    """Return what buffers hold of each parameter."""
    return {p: {n: b.views[n][k] for n in names} for b in buckets for k, p in enumerate(b.params)}


def check_tensors(
    numbers: Mapping[nn.Parameter, int], mine: Mapping[Any, Tensors], saved: Mapping[int, Tensors]
) -> None:
    """Raise InputError unless what was saved of each parameter has the names and shapes of mine."""
    for p, number in numbers.items():
        found = saved.get(number, {})
        if wrong := [n for n, value in mine[p].items() if n not in found or found[n].shape != value.shape]:
            raise InputError(
                f"The state of parameter {number}, of shape {tuple(p.shape)}, lacks {wrong} of that shape; it was "
                "saved by another optimiser or for another network."
            )
        if more := sorted(set(found) - set(mine[p]) - {"mean"}):
            raise InputError(
                f"The state of parameter {number} has {more}, which this optimiser knows nothing of: build it as the "
                "one that was saved, with prior= if that had one."
            )


def layout_of(params: list[nn.Parameter], groups: list[dict[str, Any]], network: nn.Module | None) -> WeightLayout:
    """Return names and shapes of parameters, named by the network, else by their groups, else by number.

    Raises:
        InputError: if one is not the network's.
    """
    if network is not None:
        names = {id(p): name for name, p in network.named_parameters()}
        if missing := [tuple(p.shape) for p in params if id(p) not in names]:
            raise InputError(f"{len(missing)} parameters are not the network's, the first of shape {missing[0]}.")
    else:
        named = (zip(g["params"], g.get("param_names", []), strict=False) for g in groups)
        names = {id(p): name for pairs in named for p, name in pairs}
    return WeightLayout({names.get(id(p), str(k)): p.shape for k, p in enumerate(params)})
