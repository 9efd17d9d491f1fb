"""Several queries at once that do not say the same twice."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dualgp.active.field import Learner, check_candidates, is_coupled, num_outputs
from dualgp.active.scores import RULES, Rule, after, checked, random, reduction, score, with_targets
from dualgp.errors import InputError, check_count
from dualgp.selection import check_rule

_ROWS = 4000  # of the covariance that is held for coupled outputs
_NUMBERS = 1 << 24  # in that of independent ones


class Selection(NamedTuple):
    """Which candidates, [k], in the order they were chosen, and what each was worth when it was, [k]."""

    indices: Int[Tensor, "k"]
    scores: Float[Tensor, "k"]


@torch.no_grad()
def select(
    q: Learner,
    x: Tensor,
    count: int,
    rule: str | Rule = "bald",
    *,
    diverse: bool = True,
    shortlist: int | None = None,
    targets: Tensor | None = None,
    level: float | None = None,
    generator: torch.Generator | None = None,
    **params: Tensor,
) -> Selection:
    """Return the candidates to ask for next: the best by a rule, each given that those before it will be observed.

    The covariance of f after an observation does not depend on what is observed, only on the precision of its site,
    which is known in expectation: V ← V − V_i (V_ii + β̄_i⁻¹)⁻¹ V_iᵀ. So the rule is asked anew after every choice, at
    the same mean and the smaller variance, and what is near a chosen candidate loses its worth. With "bald" under
    Gaussian noise this is the greedy choice of the greatest joint information ½ log|I + V/σ²| (batch BALD; a
    determinantal process's mode); with "variance" the pivots of a Cholesky factor.

    Args:
        q: a fitted `DualGP` or a `NetworkPosterior`.
        x: candidates, [n, D] or [n, *input_shape].
        count: how many, k.
        rule: as in `score`.
        diverse: if False the k best by themselves.
        shortlist: how many, best by themselves, are considered together, at n² numbers; as many as memory takes if None
            (4000, fewer with several outputs).
        targets: as in `score`.
        level: as in `score`.
        generator: as in `score`.
        params: per-datum parameters of the likelihood, such as `noise` [n].

    Raises:
        InputError: if more are asked for than there are; and as `score`.
        NotFittedError: if the model was never fitted.
        UnsupportedError: as `score`.

    Source: Kirsch et al. 2019 (batch BALD), by Gaussian sites in place of sampled labels.

    Example:
        >>> import gpytorch
        >>> from dualgp import DualGP
        >>> x = torch.linspace(-1, 1, 20).unsqueeze(-1)
        >>> gp = DualGP(gpytorch.kernels.RBFKernel(), gpytorch.likelihoods.GaussianLikelihood(), num_inducing=8)
        >>> result = gp.fit(x, x.squeeze(-1), learn_hyperparameters=False)
        >>> candidates = torch.tensor([[9.0], [9.01], [-9.0]])
        >>> sorted(select(gp, candidates, 2).indices.tolist())[-1]  # one of the twins, and the other side
        2
    """
    rule = check_rule(rule, RULES)
    check_candidates(x)
    check_count("count", count, 1)
    if count > len(x):
        raise InputError(f"Asked for {count} of {len(x)} candidates: ask for fewer, or give more.")
    first = score(q, x, rule, targets=targets, level=level, generator=generator, **params)
    order = first.argsort(descending=True, stable=True)
    if count == 1 or not diverse or rule is random:
        return Selection(order[:count], first[order[:count]])
    rows = order[: _size(q, len(x), count, shortlist, 0 if targets is None else len(targets))]
    given = {name: value[rows] for name, value in params.items()}
    found = with_targets(q, x[rows], targets if rule is reduction else None, level, given)
    chosen: list[int] = []
    scores: list[Tensor] = []
    for _ in range(count):
        now = checked(rule, found)
        now[chosen] = -torch.inf
        best = int(now.argmax())
        chosen.append(best)
        scores.append(now[best])
        if len(chosen) < count:
            found = after(found, best)
    return Selection(rows[chosen], torch.stack(scores))


def _size(q: Learner, n: int, count: int, shortlist: int | None, num_targets: int) -> int:
    if shortlist is not None:
        check_count("shortlist", shortlist, count)
        return min(n, shortlist)
    C = num_outputs(q)
    room = _ROWS // C if is_coupled(q) else int((_NUMBERS / C) ** 0.5)
    return min(n, max(room - num_targets, 2 * count))
