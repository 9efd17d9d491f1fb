"""Posteriors at a temperature: the likelihood's, the whole posterior's, or the variance's alone."""

from __future__ import annotations

from typing import Literal, TypeAlias

from dualgp.checks import check_number
from dualgp.errors import InputError
from dualgp.weights import Number, WeightPosterior

TemperingMode: TypeAlias = Literal["likelihood", "cold", "variance"]


def temper(q: WeightPosterior, temperature: Number, mode: TemperingMode = "likelihood") -> WeightPosterior:
    """Return a posterior at a temperature T; colder, T < 1, is more concentrated.

    | mode | S | mean |
    |---|---|---|
    | "likelihood": tempered, p₀ t^{1/T} | S₀ + B/T | moves |
    | "cold": (p₀ t)^{1/T} | (S₀ + B)/T | stays |
    | "variance": the likelihood's share of S alone | S₀ + B/T | stays |

    Their KL to the prior is `result.kl(prior)`: the first minimises E_q[loss] + T KL(q ‖ p₀).

    Raises:
        InputError: unless T is positive and finite.

    Source: Wenzel et al. 2020 (cold and tempered); Pitas & Arbel 2022 temper the variance of a Laplace posterior and
    keep its mean at the MAP, "variance" here, which is no tempered posterior.

    Example:
        >>> import torch
        >>> from dualgp import WeightLayout, WeightSite
        >>> prior = WeightPosterior(WeightLayout({"w": torch.Size([1])}), prior_precision=1.0)
        >>> q = prior.add(WeightSite(torch.ones(1), torch.ones(1)))
        >>> [(round(p.mean.item(), 2), p.precision.item()) for p in (q, temper(q, 0.25), temper(q, 0.25, "cold"))]
        [(0.5, 2.0), (0.8, 5.0), (0.5, 8.0)]
    """
    check_number("The temperature", temperature, above=0)
    if mode == "likelihood":
        return q.temper(temperature)
    if mode == "cold":
        site = None if q.site is None else q.site * (1.0 / temperature)
        return WeightPosterior(
            q.layout, site, prior_mean=q.prior_mean, prior_precision=q.prior_precision * (1.0 / temperature)
        )
    if mode == "variance":
        return WeightPosterior(q.layout, prior_mean=q.mean, prior_precision=q.temper(temperature).precision)
    raise InputError(f'mode must be "likelihood", "cold" or "variance", got {mode!r}.')
