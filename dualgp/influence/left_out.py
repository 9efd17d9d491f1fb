"""Data predicted by the posterior without them: one at a time, by groups, and ranked by how much they surprise it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from gpytorch.likelihoods import Likelihood, SoftmaxLikelihood
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dualgp.basis import Basis
from dualgp.checks import check_tensor
from dualgp.duals import check_targets, expected_log_prob, num_outputs_of
from dualgp.errors import InputError, NotPositiveDefiniteError, check_count
from dualgp.influence.blocks import (
    FunctionPosterior,
    HasPosterior,
    as_matrices,
    bare,
    blocks_of,
    by_output,
    check_sites,
    limit_of,
    warn_capped,
)
from dualgp.influence.formulas import Order, removal_shift
from dualgp.posterior import Posterior
from dualgp.predictive import log_predictive
from dualgp.sites import Sites


@dataclass(frozen=True, eq=False)
class LeftOut:
    """What the posterior says of m data without them, in float64.

    Args:
        index: which datum, [m].
        group: with which group it was left out, [m]; for one at a time the datum itself.
        mean: mean of f_i without it, [m], or [m, C] with outputs.
        cov: covariance between the outputs of f_i without it, residual included, [m, C, C].
        log_predictive: log ∫ p(y_i|f) q_{−i}(f) df, [m].
        log_likelihood: log p(y_i|f) at f = mean, [m]: what a network trained without the datum would score.
        hat: the largest eigenvalue of BV of what was left out together, [m].
        capped: whose removal was capped, [m].
    """

    index: Int[Tensor, "m"]
    group: Int[Tensor, "m"]
    mean: Tensor
    cov: Float[Tensor, "m c c"]
    log_predictive: Float[Tensor, "m"]
    log_likelihood: Float[Tensor, "m"]
    hat: Float[Tensor, "m"]
    capped: Bool[Tensor, "m"]

    @property
    def nlpd(self) -> float:
        """The mean of −log_predictive, in nats per datum: an estimate of the test NLPD."""
        return -float(self.log_predictive.mean())

    @property
    def nll(self) -> float:
        """The mean of −log_likelihood, in nats per datum: an estimate of the test loss of the point prediction."""
        return -float(self.log_likelihood.mean())

    @property
    def num_capped(self) -> int:
        """How many removals were capped; 0 if the precision contains the sites."""
        return int(self.capped.sum())


def leave_one_out(
    q: FunctionPosterior | HasPosterior,
    x: Tensor,
    y: Tensor,
    sites: Sites,
    likelihood: Likelihood,
    *,
    order: Order = "removal",
    max_hat: float | None = None,
    **params: Tensor,
) -> LeftOut:
    """Return every datum predicted without it: validation without a validation set, at the cost of one prediction.

    f_{−i} = m_i − V_{−i}α_i,  V_{−i} = V_i (I − B_i V_i)⁻¹ (+ the residual, which sites do not change). Exact for
    Gaussian noise at fixed hyperparameters; otherwise the other sites stay as they are.

    With coupled outputs a softmax is expected under independent ones of the same spread: its variances are those of
    HV_{−i}H·C/(C − 1), H = I − 11ᵀ/C, since V keeps a prior-sized variance along 1, which no softmax sees.

    Args:
        q: a fitted `DualGP`, a `NetworkPosterior`, a `Posterior` or a `DiagonalPosterior`. (Of a network's diagonal
            structure the diagonal of φᵀBφ is taken out, which is what it holds.)
        x: inputs, [n, D] or [n, *input_shape].
        y: targets, [n] or [n, C]; [n] for a network with one output too.
        sites: the sites of the n data.
        likelihood: of the data.
        order: "first" where q's precision does not contain the sites.
        max_hat: as in `sensitivity`.
        params: per-datum parameters of the likelihood, such as `noise` [n].

    Raises:
        InputError: if inputs, targets and sites do not fit each other, or targets the likelihood.
        NotPositiveDefiniteError: if a network's diagonal structure does not hold the sites.
        UnsupportedError: if the likelihood has no elementwise conditional.

    Warns:
        NumericalWarning: if removals were capped.

    Source: Nickl et al. 2023, eq. 15, which is `order="first"` and `LeftOut.nll`; they drop the off-diagonal of V too.

    Example:
        >>> from dualgp import InducingBasis; from gpytorch.kernels import RBFKernel
        >>> from gpytorch.likelihoods import GaussianLikelihood
        >>> x, y, noise = torch.zeros(1, 1), torch.tensor([2.0]), GaussianLikelihood()
        >>> sites = Sites(y / noise.noise.detach(), 1 / noise.noise.detach())
        >>> q = Posterior(InducingBasis(RBFKernel(), x, jitter=0.0)).add(x, sites)
        >>> left = leave_one_out(q, x, y, sites, noise)
        >>> abs(round(left.mean.item(), 6)), round(left.cov.item(), 4)  # the prior is what is left
        (0.0, 1.0)
    """
    check_sites(x, sites)
    q = bare(q)
    limit = limit_of(q, max_hat)
    parts = []
    for block in blocks_of(q, x, sites):
        shift = block.shift(order, limit)
        cov = shift.cov + _covariance(q, x[block.rows], block.V)
        parts.append((block.mean + shift.mean, cov, shift.hat, shift.capped))
    mean, cov, hat, capped = (torch.cat(part) for part in zip(*parts, strict=True))
    warn_capped(capped, limit)
    return scored(mean, cov, hat, capped, y, sites, likelihood, **params)


def scored(
    mean: Tensor,
    cov: Float[Tensor, "n c c"],
    hat: Float[Tensor, "n"],
    capped: Bool[Tensor, "n"],
    y: Tensor,
    sites: Sites,
    likelihood: Likelihood,
    **params: Tensor,
) -> LeftOut:
    """Return n data left out one at a time, given what is said of each without it: see `LeftOut`, `leave_one_out`."""
    y, params = _targets(likelihood, y, sites, params)
    index = torch.arange(len(mean), device=mean.device)
    return LeftOut(index, index, *_scored(mean, cov, y, sites, likelihood, params), hat, capped)


def leave_group_out(
    q: Posterior[Basis] | HasPosterior,
    x: Tensor,
    y: Tensor,
    sites: Sites,
    likelihood: Likelihood,
    groups: Sequence[Sequence[int] | Tensor],
    **params: Tensor,
) -> LeftOut:
    """Return the data of each group predicted without the whole group: cross-validation from one posterior.

    The formulas of `leave_one_out` with V the joint covariance of the group, |M|C × |M|C, and B block-diagonal. Once
    that is larger than the coordinates of the basis, the sites are taken out there instead; both are exact.

    Args:
        q: a `Posterior` that holds the sites, or the model around it.
        x: inputs, [n, D] or [n, *input_shape].
        y: targets, [n] or [n, C]; [n] for a network with one output too.
        sites: the sites of the n data.
        likelihood: of the data.
        groups: indices of the data of each group; groups may overlap. `torch.randperm(n).chunk(10)` is ten folds.
        params: per-datum parameters of the likelihood, such as `noise` [n].

    Raises:
        InputError: for a group that is empty, or has an index out of range or twice; and as in `leave_one_out`.
        NotPositiveDefiniteError: if no Gaussian is left without a group, which then was not in q.
        UnsupportedError: if the likelihood has no elementwise conditional.

    Source: Nickl et al. 2023, eq. 14, which has V α for the solve. Without the cross-terms too (eq. 43, second form),
    shifts hardly correlate with the truth.

    Example:
        >>> from dualgp import InducingBasis; from gpytorch.kernels import RBFKernel
        >>> from gpytorch.likelihoods import GaussianLikelihood
        >>> x, y = torch.tensor([[0.0], [0.1]]), torch.tensor([2.0, 2.0])
        >>> lik = GaussianLikelihood(); lik.noise = 0.5
        >>> sites = Sites(2.0 * y, torch.tensor([2.0, 2.0]))
        >>> q = Posterior(InducingBasis(RBFKernel(), x)).add(x, sites)
        >>> left = leave_group_out(q, x, y, sites, lik, [[0, 1]])
        >>> left.cov.flatten()  # the prior is what is left
        tensor([1.0000, 1.0000], dtype=torch.float64)
    """
    check_sites(x, sites)
    posterior: Posterior[Basis] = bare(q)
    y, params = _targets(likelihood, y, sites, params)
    members = [_check_group(group, number, len(x)).to(x.device) for number, group in enumerate(groups)]
    if not members:
        raise InputError("There is no group.")
    parts = []
    with torch.no_grad():
        for number, index in enumerate(members):
            mean, cov, hat = _without(posterior, x[index], sites[index], number)
            parts.append((mean, cov, hat.expand(len(index)), torch.full_like(index, number)))
    mean, cov, hat, group = (torch.cat(part) for part in zip(*parts, strict=True))
    index = torch.cat(members)
    params = {name: value[index] for name, value in params.items()}
    scored = _scored(mean, cov, y[index], sites[index], likelihood, params)
    return LeftOut(index, group, *scored, hat, torch.zeros_like(index, dtype=torch.bool))


class Ranking(NamedTuple):
    """Data from the most surprising to the least: which, [k], and −log p(y_i | the other data) in nats, [k]."""

    indices: Int[Tensor, "k"]
    surprise: Float[Tensor, "k"]


def mislabelled(left_out: LeftOut, count: int | None = None) -> Ranking:
    """Return the data whose targets surprise the posterior without them most: candidates for a wrong label.

    Args:
        left_out: from `leave_one_out`, or from `leave_group_out` where labels of a group may be wrong together.
        count: how many; all if None.

    Raises:
        InputError: if count is not between 1 and the number of data.

    Example:
        >>> from dualgp import InducingBasis; from gpytorch.kernels import RBFKernel
        >>> from gpytorch.likelihoods import GaussianLikelihood
        >>> x, y = torch.tensor([[0.0], [0.1], [0.2], [0.3]]), torch.tensor([1.0, 1.0, -1.0, 1.0])
        >>> lik = GaussianLikelihood(); lik.noise = 0.5
        >>> sites = Sites(2.0 * y, torch.full((4,), 2.0))
        >>> q = Posterior(InducingBasis(RBFKernel(), x)).add(x, sites)
        >>> mislabelled(leave_one_out(q, x, y, sites, lik), count=1).indices
        tensor([2])
    """
    m = len(left_out.index)
    count = m if count is None else count
    check_count("count", count, 1)
    if count > m:
        raise InputError(f"count must be between 1 and {m}, got {count}.")
    order = (-left_out.log_predictive).argsort(descending=True, stable=True)[:count]
    return Ranking(left_out.index[order], -left_out.log_predictive[order])


@torch.no_grad()
def _covariance(q: FunctionPosterior | HasPosterior, x: Tensor, V: Tensor) -> Tensor:
    """All of the covariance of f(x), [n, C, C]: V and the residual, if there is one."""
    return q.predict_blocks(x)[1].double() if isinstance(q, Posterior) and q.basis.has_residual else V


def _without(q: Posterior[Basis], x: Tensor, sites: Sites, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [g, C], covariance [g, C, C] and hat value of a group under the posterior without it."""
    g, C = len(sites), q.basis.num_outputs or 1
    if g * C > q.basis.size:
        try:
            rest = q.remove(x, sites)
        except NotPositiveDefiniteError as error:
            raise NotPositiveDefiniteError(f"Without group {number} no Gaussian is left. {error}") from None
        mean, cov = rest.predict_blocks(x)
        left = torch.linalg.eigvalsh(q.chol_inv @ rest.precision @ q.chol_inv.mT)  # of P⁻¹P₋ = 1 − h
        return mean.double(), cov.double(), 1.0 - left.min()
    mean, V = q.function_blocks(x)
    cov = _covariance(q, x, V)
    lam, B = (t.to(mean) for t in as_matrices(sites))
    joint = V.new_zeros(g, C, g, C)
    joint[range(g), :, range(g)] = B
    alpha = lam - (B @ mean.unsqueeze(-1)).squeeze(-1)
    V = q.function_cross(x, x).reshape(g * C, g * C)
    shift = removal_shift(V, alpha.flatten(), joint.reshape(V.shape), max_hat=limit_of(q, None))
    if shift.capped:
        raise NotPositiveDefiniteError(
            f"Without group {number} no Gaussian is left: its hat value is {float(shift.hat):.6g}, and 1 is the limit. "
            "Its sites were not all in the posterior."
        )
    own = shift.cov.reshape(g, C, g, C).diagonal(dim1=0, dim2=2).movedim(-1, 0)  # [g, C, C]
    return mean + shift.mean.reshape(g, C), cov + own, shift.hat


@torch.no_grad()
def _scored(
    mean: Tensor, cov: Tensor, y: Tensor, sites: Sites, likelihood: Likelihood, params: dict[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean by output, covariance, log predictive and log likelihood of every datum."""
    var = cov.diagonal(dim1=-2, dim2=-1)
    if sites.coupled and isinstance(likelihood, SoftmaxLikelihood) and cov.shape[-1] > 1:
        C = cov.shape[-1]  # diag HVH · C/(C − 1)
        var = (var - 2.0 * cov.mean(-1) + cov.mean((-2, -1)).unsqueeze(-1)) * (C / (C - 1))
    mean, var = by_output(mean, sites), by_output(var, sites)
    predictive = log_predictive(likelihood, y, mean, var, **params)
    at_mean = expected_log_prob(likelihood, y, mean, torch.zeros_like(var), **params)
    n = len(mean)
    return mean, cov, predictive.reshape(n, -1).sum(-1), at_mean.reshape(n, -1).sum(-1)


def _targets(
    likelihood: Likelihood, y: Tensor, sites: Sites, params: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Targets and parameters per datum, checked; [n, 1] of a network with one output, for which [n] will do."""
    check_tensor("y", y)
    n, outputs, fixed = len(sites), tuple(sites.lam.shape[1:]), num_outputs_of(likelihood)
    if fixed is not None and outputs != (fixed,):
        raise InputError(f"{type(likelihood).__name__} has {fixed} outputs, but the sites have shape [N, *{outputs}].")
    if outputs == (1,) and y.shape == (n,):
        y, params = y.unsqueeze(-1), {name: value.unsqueeze(-1) for name, value in params.items()}
    expected = (n,) if isinstance(likelihood, SoftmaxLikelihood) else (n, *outputs)
    if tuple(y.shape) != expected:
        raise InputError(f"Targets must have shape {expected}, got {tuple(y.shape)}.")
    for name, value in params.items():
        if value.shape[:1] != (n,):
            raise InputError(f"{name} must have one value for each of {n} data, got shape {tuple(value.shape)}.")
    check_targets(likelihood, y)
    return y, params


def _check_group(group: Sequence[int] | Tensor, number: int, n: int) -> Tensor:
    index = torch.as_tensor(group, device="cpu")
    if index.ndim != 1 or not len(index):
        raise InputError(f"Group {number} must be a list of at least one index, got shape {tuple(index.shape)}.")
    if index.is_floating_point() or index.dtype == torch.bool:
        raise InputError(f"Group {number} must hold integer indices, got {index.dtype}; of a mask, take .nonzero().")
    if index.min() < 0 or index.max() >= n:
        raise InputError(f"Group {number} must index 0 … {n - 1}, got {int(index.min())} … {int(index.max())}.")
    if len(index.unique()) < len(index):
        raise InputError(f"Group {number} holds an index twice; a datum can be left out once.")
    return index.long()
