"""The prior precision that data prefer: by evidence, by leaving one out, or on data held back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal, get_args

import torch
from gpytorch.likelihoods import SoftmaxLikelihood
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from dualgp.errors import InputError
from dualgp.influence.blocks import as_matrices, limit_of, warn_capped
from dualgp.influence.formulas import removal_shift
from dualgp.nets.data import Batch, Source, check_batch, rows_of
from dualgp.nets.links import Link, class_log_probs
from dualgp.nets.spectrum import FunctionBlocks
from dualgp.predictive import log_predictive

if TYPE_CHECKING:
    from dualgp.nets.posterior import NetworkPosterior

Method = Literal["evidence", "leave_one_out", "validation"]
_FINER = 9  # values between the neighbours of the best, twice


def scores(
    q: NetworkPosterior,
    factors: Float[Tensor, "k"],
    method: Method,
    source: Source | None,
    link: Link = "probit",
    progress: bool | None = None,
) -> Float[Tensor, "k"]:
    """Return what each multiple of the prior precision scores, in nats; higher is better.

    "evidence": log Z. "validation": the mean log predictive density of the data given. "leave_one_out": the same of
    training data, each without its own site.

    Raises:
        InputError: if the method is unknown, or its data are missing or were given for none.
    """
    if method not in get_args(Method):
        raise InputError(f"method must be one of {get_args(Method)}, got {method!r}.")
    if (source is None) != (method == "evidence"):
        raise InputError(
            "Evidence takes no data: it is of those the posterior holds."
            if source is not None
            else f"{method} needs data (x, y): {'those of the training' if method == 'leave_one_out' else 'held back'}."
        )
    factors = factors.double()
    if source is None:
        return q.sweep_evidence(factors)
    total, rows_seen, capped = torch.zeros_like(factors, device=q.basis.device), [], []
    with tqdm(
        desc=method, unit="row", leave=False, delay=1.0, disable=None if progress is None else not progress
    ) as bar:
        for batch in source:
            batch = check_batch(q.likelihood, batch, q.num_outputs, q.basis.device)
            q.basis.check_inputs(batch.x)
            rows_seen.append(rows_of(batch, q.basis.dtype))
            for rows, sweep in q.spectrum.blocks(batch.x, factors):
                part = Batch(batch.x[rows], batch.y[rows], {k: v[rows] for k, v in batch.params.items()})
                scored, over = zip(*_score(q, part, sweep, method, link), strict=True)
                total += torch.stack(scored)
                capped.append(torch.stack(over))
                bar.update(len(part.x))
    seen = torch.cat(rows_seen)
    if method == "leave_one_out":
        q.held.remove(seen)  # raises if one cannot be left out
        warn_capped(torch.cat(capped, -1)[total.argmax()], limit_of(q.posterior, None))  # the rest is not chosen
    return total / len(seen)


def best_factor(
    q: NetworkPosterior,
    factors: Float[Tensor, "k"],
    method: Method,
    source: Source | None,
    link: Link = "probit",
    progress: bool | None = None,
) -> float:
    """Return the best multiple of the prior precision: on the grid, then twice on finer ones beside the best.

    To leave one out, the prior is centred at zero whatever the posterior's centre: centred at a network that has seen
    the datum, it scores log p(y|f(x; θ*)) as τ → ∞, the fit of the training, which no honest score reaches.
    """
    factors = factors.double().sort().values
    q = q.with_centre("map") if method == "leave_one_out" else q
    for _ in range(3):
        values = scores(q, factors, method, source, link, progress)
        best = int(values.nan_to_num(nan=-float("inf")).argmax())
        found, around = float(factors[best]), factors[max(best - 1, 0) : best + 2].log()
        if len(factors) == 1:
            break
        factors = torch.linspace(float(around[0]), float(around[-1]), _FINER + 2, dtype=factors.dtype).exp()
    return found


def _score(
    q: NetworkPosterior, batch: Batch, sweep: Iterator[FunctionBlocks], method: Method, link: Link
) -> Iterator[tuple[Tensor, Tensor]]:
    """The sum of the scores at each prior precision, and whose removal was capped."""
    lam, B = as_matrices(q.sites_at(batch.x, batch.y, **batch.params)) if method == "leave_one_out" else (None, None)
    for function in sweep:
        mean, cov = function.mean, function.V + function.residual
        capped = torch.zeros(len(mean), dtype=torch.bool, device=mean.device)
        if lam is not None and B is not None:
            alpha = lam - (B @ mean.unsqueeze(-1)).squeeze(-1)
            shift = removal_shift(function.V, alpha, B, max_hat=limit_of(q.posterior, None))
            mean, cov, capped = mean + shift.mean, cov + shift.cov, shift.capped
        if isinstance(q.likelihood, SoftmaxLikelihood):
            log_p = class_log_probs(mean, cov, link).gather(-1, batch.y.long().unsqueeze(-1))
        else:
            mean, var = (t.reshape(batch.y.shape) for t in (mean, cov.diagonal(dim1=-2, dim2=-1)))
            log_p = log_predictive(q.likelihood, batch.y, mean, var, **batch.params)
        yield log_p.sum(), capped
