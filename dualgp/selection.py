"""Which data to keep: rules that score candidates, and the choice of those of highest score."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from dualgp.errors import InputError


@dataclass(frozen=True, eq=False)
class Candidates:
    """What a rule may look at, one row per datum; with several outputs the last dimension is theirs.

    Attributes:
        x: inputs, [*batch, n, D].
        y: targets.
        ids: numbers of arrival, int64 [n].
        keys: a uniform number each, drawn on arrival, [n].
        multi_output: whether there is a dimension of outputs.
        find_moments: returns α, β and the posterior variance; asked once, by the first rule that looks.
    """

    x: Tensor
    y: Tensor
    ids: Tensor
    keys: Tensor
    multi_output: bool
    find_moments: Callable[[], tuple[Tensor, Tensor, Tensor]]

    @cached_property
    def _moments(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.find_moments()

    @property
    def alpha(self) -> Tensor:
        """α = E_q[∂ log p] times the datum's weight, [*batch, n] or [*batch, n, C]."""
        return self._moments[0]

    @property
    def beta(self) -> Tensor:
        """β = −E_q[∂² log p] times the datum's weight, [*batch, n] or [*batch, n, C]."""
        return self._moments[1]

    @property
    def var(self) -> Tensor:
        """The posterior variance of f, [*batch, n] or [*batch, n, C]."""
        return self._moments[2]

    def per_datum(self, values: Tensor) -> Tensor:
        """Sum over outputs and over batch dimensions: one number per datum."""
        values = values.sum(-1) if self.multi_output else values
        return values.reshape(-1, values.shape[-1]).sum(0)


Rule = Callable[[Candidates], Tensor]


def leverage(data: Candidates) -> Tensor:
    """Return Bayesian leverage Σ_c β_c v_c: how much of its own prediction a datum decides.

    Source: Chang et al. 2023, eq. 15.
    """
    return data.per_datum(data.beta * data.var)


def sensitivity(data: Candidates) -> Tensor:
    """Return Σ_c |α_c| v_c: how far the prediction at a datum moves without it, to first order.

    Source: Nickl et al. 2023 (memory perturbation), eq. 12.
    """
    return data.per_datum(data.alpha.abs() * data.var)


def random(data: Candidates) -> Tensor:
    """Return the keys: a uniform sample without replacement of all that came by (a reservoir)."""
    return data.keys


def recency(data: Candidates) -> Tensor:
    """Return the number of arrival: the last data."""
    return data.ids.double()


def balanced(data: Candidates) -> Tensor:
    """Return a score that takes equally many of every class, within each those of greatest leverage.

    Raises:
        InputError: if the targets are no labels.
    """
    y = data.y
    if y.ndim != 1 or bool((y != y.round()).any()):
        raise InputError('The rule "balanced" needs one class label per datum; use "leverage".')
    own = leverage(data)
    score = torch.empty_like(own)
    for label in y.unique():
        of_class = (y == label).nonzero().reshape(-1)
        order = own[of_class].argsort(descending=True, stable=True)
        score[of_class[order]] = -torch.arange(len(of_class), dtype=own.dtype, device=own.device)
    return score + own / (1.0 + own.abs().max())  # the same rank in two classes: the greater leverage first


RULES: dict[str, Rule] = {f.__name__: f for f in (leverage, sensitivity, random, recency, balanced)}


R = TypeVar("R", bound=Callable[..., Tensor])


def check_rule(rule: str | R, rules: Mapping[str, R], what: str = "rule") -> R:
    """Return the rule of a name, or the function given.

    Raises:
        InputError: if there is no such rule.
    """
    if callable(rule):
        return rule
    if not isinstance(rule, str) or rule not in rules:
        raise InputError(f"{what} must be a function or one of {sorted(rules)}, got {rule!r}.")
    return rules[rule]


def choose(rule: Rule, candidates: Candidates, capacity: int) -> Tensor:
    """Return the rows to keep, in order of arrival: those of highest score, the later of equals.

    Raises:
        InputError: if the rule does not give one finite number per datum.
    """
    n = len(candidates.ids)
    if n <= capacity:
        return torch.arange(n, device=candidates.ids.device)
    score = rule(candidates)
    if not isinstance(score, Tensor) or score.shape != (n,):
        raise InputError(
            f"A memory rule must return one finite score per datum, shape ({n},); got "
            f"{tuple(score.shape) if isinstance(score, Tensor) else type(score).__name__}."
        )
    if not bool(score.isfinite().all()):
        bad = int((~score.isfinite()).sum())
        raise InputError(f"A memory rule must return one finite score per datum; {bad} of {n} are NaN or infinite.")
    order = score.flip(0).argsort(descending=True, stable=True)[:capacity]
    return (n - 1 - order).sort().values
