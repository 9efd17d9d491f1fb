"""The prior precision that data prefer: by evidence, by leaving one out, or on data held back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from gpytorch.likelihoods import SoftmaxLikelihood
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from dualgp.errors import InputError
from dualgp.influence.blocks import as_matrices, limit_of, warn_capped
from dualgp.nets.data import Batch, Source, check_batch, rows_of
from dualgp.nets.links import Link, class_log_probs
from dualgp.nets.spectrum import FunctionBlocks
from dualgp.predictive import log_predictive

if TYPE_CHECKING:
    from dualgp.nets.posterior import NetworkPosterior

Method = Literal["evidence", "leave_one_out", "validation"]
GRID = torch.logspace(-6, 8, 57, dtype=torch.float64, device="cpu")  # of prior precisions
_FINER = 9  # values between the neighbours of the best, twice


@dataclass(frozen=True, eq=False)
class Task:
    """What a prior precision is scored by.

    "evidence": log Z. "validation": the mean log predictive density of the data given. "leave_one_out": the same of
    training data, each without its own site.
    """

    q: NetworkPosterior
    method: Method
    source: Source | None
    link: Link
    progress: bool | None

    @classmethod
    def of(
        cls, q: NetworkPosterior, method: Method, data: Any, y: Tensor | None, link: Link, progress: bool | None
    ) -> Task:
        """Return the task, checked.

        Raises:
            InputError: if the method is unknown, or its data are missing or were given for none.
        """
        if method not in get_args(Method):
            raise InputError(f"method must be one of {get_args(Method)}, got {method!r}.")
        given = data is not None or y is not None
        if given and method == "evidence":
            raise InputError("Evidence takes no data: it is of those the posterior holds.")
        if not given and method != "evidence":
            kind = "those of the training" if method == "leave_one_out" else "held back"
            raise InputError(f"{method} needs data (x, y): {kind}.")
        return cls(q, method, Source(data, y, q.likelihood) if given else None, link, progress)

    def scores(self, factors: Float[Tensor, "k"], *, checked: bool = False) -> Float[Tensor, "k"]:
        """Return what each multiple of the prior precision scores, in nats; higher is better.

        Args:
            factors: the multiples.
            checked: whether these data are known to be held.
        """
        q = self.q
        if self.source is None:
            return q.sweep_evidence(factors)
        leaving = self.method == "leave_one_out"
        known = checked and q.held.all_through(q.basis.size)
        total, rows_seen, capped, count = torch.zeros_like(factors, device=q.basis.device), [], [], 0
        disable = None if self.progress is None else not self.progress
        with tqdm(desc=self.method, unit="row", leave=False, delay=1.0, disable=disable) as bar:
            for batch in self.source:
                batch = check_batch(q.likelihood, batch, q.basis.num_outputs, q.basis.device)
                q.basis.check_inputs(batch.x)
                rows = rows_of(batch, q.basis.dtype) if leaving and not known else None
                if rows is not None:
                    rows_seen.append(rows)
                for part, size in self._parts(batch, rows):
                    for at, sweep in q.spectrum.blocks(part.x, factors, size):
                        scored, over = zip(*self._score(part.at(at), sweep), strict=True)
                        total += torch.stack(scored)
                        capped.append(torch.stack(over))
                count += len(batch.x)
                bar.update(len(batch.x))
        if leaving:
            if not checked:
                q.held.sizes_of(torch.cat(rows_seen))  # raises if one was counted twice
            at_best = torch.cat(capped, -1)[total.argmax()]  # the rest is not chosen
            warn_capped(at_best, limit_of(q.posterior, None))
        return total / count

    def _parts(self, batch: Batch, rows: Tensor | None) -> Iterator[tuple[Batch, int | None]]:
        """The data by how many coordinates they were seen through; None for all."""
        if rows is None:
            yield batch, None
            return
        sizes = self.q.held.sizes_of(rows)
        for size in sizes.unique().tolist():
            yield batch.at(sizes == size), size

    def best(self, factors: Float[Tensor, "k"]) -> float:
        """Return the best multiple of the prior precision: on the grid, then twice on finer ones beside the best.

        To leave one out, the prior is centred at zero whatever the posterior's centre: centred at a network that has
        seen the datum, it scores log p(y|f(x; θ*)) as τ → ∞, the fit of the training, which no honest score reaches.
        """
        task = replace(self, q=self.q.with_centre("map")) if self.method == "leave_one_out" else self
        factors = factors.sort().values
        for step in range(3):
            values = task.scores(factors, checked=step > 0)
            best = int(values.nan_to_num(nan=-float("inf")).argmax())
            found, around = float(factors[best]), factors[max(best - 1, 0) : best + 2].log()
            if len(factors) == 1:
                break
            low, high = float(around[0]), float(around[-1])
            factors = torch.linspace(low, high, _FINER + 2, dtype=factors.dtype, device=factors.device).exp()
        return found

    def _score(self, batch: Batch, sweep: Iterator[FunctionBlocks]) -> Iterator[tuple[Tensor, Tensor]]:
        """The sum of the scores at each prior precision, and whose removal was capped."""
        q, lam, B = self.q, None, None
        if self.method == "leave_one_out":
            lam, B = as_matrices(q.sites_at(batch.x, batch.y, **batch.params))
        for function in sweep:
            mean, cov = function.mean, function.V + function.residual
            capped = torch.zeros(len(mean), dtype=torch.bool, device=mean.device)
            if lam is not None and B is not None:
                mean, cov, shift = function.without(lam, B, limit_of(q.posterior, None))
                capped = shift.capped
            if isinstance(q.likelihood, SoftmaxLikelihood):
                log_p = class_log_probs(mean, cov, self.link).gather(-1, batch.y.long().unsqueeze(-1))
            else:
                mean, var = (t.reshape(batch.y.shape) for t in (mean, cov.diagonal(dim1=-2, dim2=-1)))
                log_p = log_predictive(q.likelihood, batch.y, mean, var, **batch.params)
            yield log_p.sum(), capped


def factors_of(q: NetworkPosterior, grid: Tensor | Sequence[float]) -> Float[Tensor, "k"]:
    """Return the multiples of the prior precision that a grid of prior precisions makes.

    Raises:
        InputError: if it is not a list of positive numbers.
    """
    grid = torch.as_tensor(grid, dtype=torch.float64, device="cpu")
    if grid.ndim != 1 or not len(grid) or not bool(((grid > 0) & grid.isfinite()).all()):
        raise InputError(f"grid must hold positive numbers [k], got {grid.tolist()}.")
    tau = q.prior_precision
    return grid if isinstance(tau, Tensor) and tau.ndim else grid / float(tau)
