"""What the label of a candidate would be worth, before it is known: one number for each.

| rule | score |
|---|---|
| `"entropy"` | H[E_q p(y∣f)]: how uncertain the label is, noise included |
| `"bald"` | I(y; f(x)): how much of that the model could learn |
| `"variance"` | Σ_c v_c of the latent |
| `"leverage"` | Σ_c β̄_c v_c / (1 + β̄_c v_c): the leverage that the datum will have once it is in |
| `"boundary"` | −∣m − level∣ / √v: how likely f is on the other side of a level than its mean |
| `"reduction"` | by how much it lowers the variance at targets, or the error of which side of a level they are on |
| `"random"` | a number drawn |

A rule is a function of `Prospects`, and you can give your own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from gpytorch.likelihoods import Likelihood
from torch import Tensor

from dualgp.active.field import (
    Field,
    Learner,
    as_targets,
    check_candidates,
    check_learner,
    check_params,
    joint_field,
    moments,
)
from dualgp.checks import check_generator
from dualgp.draws import uniform
from dualgp.errors import InputError
from dualgp.information import expected_beta, mutual_information, predictive_entropy
from dualgp.quadrature import gauss_legendre
from dualgp.selection import check_rule

_CHUNK = 1024  # candidates that are held beside the targets at once


@dataclass(frozen=True, eq=False)
class Prospects:
    """What a rule may look at.

    Attributes:
        likelihood: of the data.
        mean: means of f at n candidates, [n, C]; of a softmax network what its softmax sees.
        var: variances, [n, C].
        params: per-datum parameters of the likelihood, such as `noise` [n].
        level: of f, for "boundary" and "reduction".
        keys: a uniform number for each.
        field: their joint Gaussian with the targets, after them; for "reduction".
    """

    likelihood: Likelihood
    mean: Tensor
    var: Tensor
    params: dict[str, Tensor] = field(default_factory=dict)
    level: float | None = None
    keys: Tensor | None = None
    field: Field | None = None

    def per_datum(self, values: Tensor) -> Tensor:
        """Sum over independent outputs, where there are several: one number per candidate."""
        return values.reshape(len(self.mean), -1).sum(-1)

    def as_targets(self) -> tuple[Tensor, Tensor]:
        """Return means and variances in the shape of targets, as the functions of `dualgp.information` take them."""
        return as_targets(self.mean, self.var, self.likelihood)


Rule = Callable[[Prospects], Tensor]


def entropy(c: Prospects) -> Tensor:
    """Return the entropy of the label in nats."""
    return c.per_datum(predictive_entropy(c.likelihood, *c.as_targets(), **c.params))


def bald(c: Prospects) -> Tensor:
    """Return the information of the label about f in nats: I(y; f(x)).

    Source: Houlsby et al. 2011.
    """
    return c.per_datum(mutual_information(c.likelihood, *c.as_targets(), **c.params))


def variance(c: Prospects) -> Tensor:
    """Return the variance of f, summed over outputs."""
    return c.var.sum(-1)


def leverage(c: Prospects) -> Tensor:
    """Return Σ_c β̄v/(1 + β̄v), the share of its own prediction that the datum will decide, with its expected β̄."""
    mean, var = c.as_targets()
    h = expected_beta(c.likelihood, mean, var, **c.params) * var
    return c.per_datum(h / (1.0 + h))


def boundary(c: Prospects) -> Tensor:
    """Return −|m − level|/√v: greatest where f is as likely above the level as below.

    Raises:
        InputError: for several outputs.

    Source: Bryan et al. 2005, their "probability of misclassification", which has the same order.
    """
    _one_output(c, "boundary")
    level = 0.0 if c.level is None else c.level
    return -((c.mean - level).abs() / c.var.clamp_min(1e-300).sqrt()).squeeze(-1)


def reduction(c: Prospects) -> Tensor:
    """Return the expected fall of the mean variance at the targets, or of their misclassification with a level.

    An observation at x explains s² = cov(f(t), f(x))²β̄/(1 + β̄v) of the variance at t. With p the probability that f(t)
    exceeds the level, the expected fall of p(1 − p) is, with z = (m − level)/√v and a² = (1 − s²/v)/(1 + s²/v),

        2 [T(z, 1) − T(z, a)],  Owen's T: a smooth integral from a to 1, where others take a bivariate normal.

    Raises:
        InputError: without targets; with a level, for several outputs.

    Source: Cohn 1996 (variance); Chevalier et al. 2014 (level, their SUR criterion).
    """
    if c.field is None:
        raise InputError('The rule "reduction" needs targets=, the inputs at which it is to lower the uncertainty.')
    n = len(c.mean)
    explained = c.field.explained(slice(0, n), slice(n, None))  # [n, T, P, c]
    if c.level is None:
        return explained.flatten(2).sum(-1).mean(-1)
    _one_output(c, "reduction")
    m, v = c.field.mean[n:, 0], c.field.var[n:, 0].clamp_min(1e-300)
    share = (explained.flatten(1) / v).clamp(0.0, 1.0)  # [n, T]
    a = ((1.0 - share) / (1.0 + share)).sqrt()
    half = -0.5 * (m - c.level).square() / v  # −z²/2
    total = torch.zeros_like(share)
    for x, w in zip(*gauss_legendre(8, v), strict=True):
        square = (a + (1.0 - a) * x).square() + 1.0
        total += w * (half * square).exp() / square
    return ((1.0 - a) * total).mean(-1) / math.pi


def random(c: Prospects) -> Tensor:
    """Return the keys: a fair sample."""
    assert c.keys is not None
    return c.keys


RULES: dict[str, Rule] = {f.__name__: f for f in (entropy, bald, variance, leverage, boundary, reduction, random)}


def score(
    q: Learner,
    x: Tensor,
    rule: str | Rule = "bald",
    *,
    targets: Tensor | None = None,
    level: float | None = None,
    generator: torch.Generator | None = None,
    **params: Tensor,
) -> Tensor:
    """Return what a label at each candidate would be worth, [n], in float64: greater is better.

    Args:
        q: a fitted `DualGP` or a `NetworkPosterior`.
        x: candidates, [n, D] or [n, *input_shape].
        rule: a name of the table above, or a function of `Prospects`.
        targets: for "reduction": inputs at which the uncertainty is to fall.
        level: of f; for "boundary" 0 if None; for "reduction" the variance counts if None.
        generator: for "random"; torch's default one otherwise.
        params: per-datum parameters of the likelihood, such as `noise` [n].

    Raises:
        InputError: for candidates that are not finite or none, an unknown rule, or several outputs with a level.
        NotFittedError: if the model was never fitted.
        UnsupportedError: if the rule needs what the likelihood does not have.

    Example:
        >>> import gpytorch
        >>> from dualgp import DualGP
        >>> x = torch.linspace(-1, 1, 20).unsqueeze(-1)
        >>> gp = DualGP(gpytorch.kernels.RBFKernel(), gpytorch.likelihoods.BernoulliLikelihood(), num_inducing=8)
        >>> result = gp.fit(x, (x > 0).float().squeeze(-1), learn_hyperparameters=False)
        >>> int(score(gp, torch.tensor([[-0.9], [0.0], [4.0]]), "entropy").argmin())  # the label at −0.9 is known best
        0
    """
    rule = check_rule(rule, RULES)
    check_learner(q)
    check_candidates(x)
    check_params(q.likelihood, params, len(x))
    if level is not None and not math.isfinite(level):
        raise InputError(f"level must be a finite number, got {level}.")
    if rule is not reduction or targets is None:
        return checked(rule, prospects(q, x, level, generator, params))
    check_candidates(targets, "Targets")
    if targets.shape[1:] != x.shape[1:] or targets.dtype != x.dtype or targets.device != x.device:
        raise InputError(
            f"Targets must be like the candidates, rows {tuple(x.shape[1:])} in {x.dtype} on {x.device}; got "
            f"{tuple(targets.shape[1:])} in {targets.dtype} on {targets.device}."
        )
    parts = []
    for start in range(0, len(x), _CHUNK):
        rows = slice(start, start + _CHUNK)
        given = {name: value[rows] for name, value in params.items()}
        parts.append(checked(rule, with_targets(q, x[rows], targets, level, given)))
    return torch.cat(parts)


@torch.no_grad()
def prospects(
    q: Learner, x: Tensor, level: float | None, generator: torch.Generator | None, params: dict[str, Tensor]
) -> Prospects:
    """Return what rules look at, but for the joint Gaussian."""
    check_generator(generator)
    keys = uniform((len(x),), torch.device("cpu"), generator)
    return Prospects(q.likelihood, *moments(q, x), params, level, keys)


@torch.no_grad()
def with_targets(
    q: Learner, x: Tensor, targets: Tensor | None, level: float | None, params: dict[str, Tensor]
) -> Prospects:
    """Return what rules look at, with the joint Gaussian of candidates and targets."""
    both = x if targets is None else torch.cat([x, targets])
    padded = {}
    for name, value in params.items():  # targets are not observed: theirs is any
        padded[name] = torch.cat([value, value[:1].expand(len(both) - len(x), *value.shape[1:])])
    joint = joint_field(q, both, padded)
    n = len(x)
    return Prospects(q.likelihood, joint.mean[:n], joint.var[:n], params, level, None, joint)


def after(c: Prospects, i: int) -> Prospects:
    """Return the prospects once candidate i is observed, whatever it says."""
    assert c.field is not None
    joint = c.field.given(i)
    return replace(c, var=joint.var[: len(c.mean)], field=joint)


@torch.no_grad()
def checked(rule: Rule, c: Prospects) -> Tensor:
    """Return the scores of a rule.

    Raises:
        InputError: unless there is one finite number per candidate.
    """
    found = rule(c)
    if not isinstance(found, Tensor) or found.shape != (len(c.mean),):
        came = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise InputError(f"A rule must return one score per candidate, shape ({len(c.mean)},); got {came}.")
    bad = int((~found.isfinite()).sum())
    if bad:
        raise InputError(f"A rule must return finite numbers; {bad} of {len(found)} are NaN or infinite.")
    return found.detach().double().clone()  # its own, whatever the rule does with what it returned


def _one_output(c: Prospects, name: str) -> None:
    if c.mean.shape[-1] != 1:
        raise InputError(
            f'The rule "{name}" with a level is for one output; this model has {c.mean.shape[-1]}. Use "bald" or '
            '"variance".'
        )
