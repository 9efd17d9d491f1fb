"""What a posterior leans on: leverage, sensitivity, and the posterior under other weights of the data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dualgp.basis import Basis
from dualgp.checks import check_tensor, check_value
from dualgp.errors import InputError, check_count
from dualgp.influence.blocks import (
    FunctionPosterior,
    HasPosterior,
    blocks_of,
    by_output,
    check_sites,
    limit_of,
    warn_capped,
)
from dualgp.influence.formulas import Order
from dualgp.posterior import Posterior
from dualgp.sites import Sites

AnyBasis = TypeVar("AnyBasis", bound=Basis)


def leverage(q: FunctionPosterior | HasPosterior, x: Tensor, sites: Sites) -> Float[Tensor, "n"]:
    """Return tr(B_i V_i) of every datum in float64: how many degrees of freedom it takes.

    The sum over all data is the effective number of parameters, tr(B P⁻¹). If the site is in the posterior and
    log-concave, a leverage lies in [0, 1) for one output, in [0, C) for several.

    Args:
        q: a fitted `DualGP`, a `NetworkPosterior`, a `Posterior` or a `DiagonalPosterior`.
        x: inputs, [n, D] of a Gaussian process, [n, *input_shape] of a network.
        sites: the sites of the n data.

    Raises:
        InputError: if inputs and sites do not fit each other or the posterior.

    Source: Nickl et al. 2023, v_i of eq. 2 for a ridge; its generalisation to C outputs and any curvature.

    Example:
        >>> from dualgp import InducingBasis; from gpytorch.kernels import RBFKernel
        >>> x, sites = torch.zeros(1, 1), Sites(torch.tensor([2.0]), torch.tensor([3.0]))
        >>> q = Posterior(InducingBasis(RBFKernel(), x, jitter=0.0)).add(x, sites)
        >>> leverage(q, x, sites)  # β / (1 + β)
        tensor([0.7500], dtype=torch.float64)
    """
    terms = leverage_by_class(q, x, sites)
    return terms.sum(-1) if sites.multi_output else terms


def leverage_by_class(q: FunctionPosterior | HasPosterior, x: Tensor, sites: Sites) -> Tensor:
    """Return diag(B_i V_i) of every datum, [n, C] ([n] for one output): the terms whose sum over C is the leverage.

    A term can be negative where outputs are coupled; for log-concave likelihoods the sum cannot. Arguments and errors
    as in `leverage`.
    """
    terms = [(block.B * block.V).sum(-1) for block in blocks_of(q, x, sites)]  # both are symmetric
    return by_output(torch.cat(terms), sites)


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """What the removal of each datum does to the function at that datum, in float64.

    Args:
        mean_shift: Δf_i = f_{−i} − f_i, [n], or [n, C] with outputs.
        var_shift: the same of the variances; ≥ 0 for a log-concave likelihood.
        output_shift: B_i Δf_i: to first order the shift of the predicted probabilities (softmax, logit), or of f/σ².
        hat: the largest eigenvalue of B_i V_i, [n].
        capped: whose removal was capped, [n].
    """

    mean_shift: Tensor
    var_shift: Tensor
    output_shift: Tensor
    hat: Float[Tensor, "n"]
    capped: Bool[Tensor, "n"]

    @property
    def score(self) -> Float[Tensor, "n"]:
        """One number per datum, Σ_c |B_i Δf_i|_c."""
        return self.output_shift.abs().reshape(len(self.hat), -1).sum(-1)

    @property
    def num_capped(self) -> int:
        """How many removals were capped; 0 if the precision contains the sites."""
        return int(self.capped.sum())


def sensitivity(
    q: FunctionPosterior | HasPosterior,
    x: Tensor,
    sites: Sites,
    *,
    order: Order = "removal",
    max_hat: float | None = None,
) -> Sensitivity:
    """Return how the mean and variance of f_i shift when datum i is removed.

    removal: Δf_i = −V_i (I − B_i V_i)⁻¹ α_i,  first order: Δf_i = −V_i α_i,  with α_i = λ_i − B_i m_i and V_i the
    *parametric* covariance φᵀP⁻¹φ. Removal is what `Posterior.remove` gives: under Gaussian noise, a refit without the
    datum at the same hyperparameters.

    Args:
        q: a fitted `DualGP`, a `NetworkPosterior`, a `Posterior` or a `DiagonalPosterior`.
        x: inputs, [n, D] or [n, *input_shape].
        sites: the sites of the n data.
        order: "first" where q's precision does not contain the sites, as with an optimiser's preconditioner.
        max_hat: hat values above it are capped there, counted and warned of. None: .99, but 1 − √ε for a `Posterior`,
            which contains its sites.

    Raises:
        InputError: if inputs and sites do not fit each other or the posterior.

    Warns:
        NumericalWarning: if removals were capped.

    Source: Nickl et al. 2023, eq. 12 and 13, are order "first"; removal has the exact Ŝ of their eq. 10.

    Example:
        >>> from dualgp import InducingBasis; from gpytorch.kernels import RBFKernel
        >>> x, sites = torch.zeros(1, 1), Sites(torch.tensor([2.0]), torch.tensor([3.0]))
        >>> q = Posterior(InducingBasis(RBFKernel(), x, jitter=0.0)).add(x, sites)
        >>> s = sensitivity(q, x, sites)
        >>> s.mean_shift.item(), s.var_shift.item()  # from N(0.5, 0.25) back to N(0, 1)
        (-0.5, 0.75)
    """
    limit = limit_of(q, max_hat)
    parts = []
    for block in blocks_of(q, x, sites):
        shift = block.shift(order, limit)
        output = (block.B @ shift.mean.unsqueeze(-1)).squeeze(-1)
        parts.append((shift.mean, shift.cov.diagonal(dim1=-2, dim2=-1), output, shift.hat, shift.capped))
    mean, var, output, hat, capped = (torch.cat(part) for part in zip(*parts, strict=True))
    warn_capped(capped, limit)
    return Sensitivity(by_output(mean, sites), by_output(var, sites), by_output(output, sites), hat, capped)


def perturb(q: Posterior[AnyBasis], x: Tensor, sites: Sites, eps: Tensor | float) -> Posterior[AnyBasis]:
    """Return the posterior with the site of each datum scaled by 1 − ε_i.

    ε = 1 removes a datum, ε = −1 counts it twice, and the derivative at ε = 0 is the sensitivity of first order.

    Args:
        q: a posterior that holds the sites.
        x: inputs, [n, D] or [n, *input_shape].
        sites: the sites of the n data.
        eps: ε, one number or [n].

    Raises:
        InputError: if the shapes do not fit.
        NotPositiveDefiniteError: if no Gaussian is left.

    Source: Nickl et al. 2023, eq. 6 with ρ = 1.

    Example:
        >>> from dualgp import InducingBasis; from gpytorch.kernels import RBFKernel
        >>> x, sites = torch.zeros(1, 1), Sites(torch.tensor([2.0]), torch.tensor([3.0]))
        >>> q = Posterior(InducingBasis(RBFKernel(), x, jitter=0.0)).add(x, sites)
        >>> perturb(q, x, sites, 2 / 3).predict(x)  # β = 1 is left of it
        (tensor([0.3333]), tensor([0.5000]))
    """
    check_sites(x, sites)
    check_value("eps", eps)
    eps = torch.as_tensor(eps, dtype=sites.lam.dtype, device=sites.lam.device)
    if eps.shape not in ((), (len(sites),)):
        raise InputError(f"eps must be a number or have shape [{len(sites)}], got {tuple(eps.shape)}.")
    return q.remove(x, sites * (eps.unsqueeze(-1) if eps.ndim and sites.multi_output else eps))


def sum_by(values: Float[Tensor, "n *c"], labels: Int[Tensor, "n"], num_labels: int | None = None) -> Tensor:
    """Return the sums of values over the data of each label, [G, ...]: a memory map by class or by group.

    Args:
        values: per-datum values, such as `Sensitivity.mean_shift` or `Sensitivity.score`.
        labels: 0 … G − 1, a class or group per datum.
        num_labels: G; the largest label plus one if None.

    Raises:
        InputError: if a label is out of range, or there is not one per datum.

    Source: Nickl et al. 2023, eq. 14 without its cross-terms. For a group's joint removal use `leave_group_out`.

    Example:
        >>> sum_by(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 1, 0]))
        tensor([5., 2.])
    """
    for name, value in (("values", values), ("labels", labels)):
        check_tensor(name, value)
    if labels.ndim != 1 or not values.ndim:
        raise InputError(
            f"labels must have shape [n] and values [n, ...], got {tuple(labels.shape)} and {tuple(values.shape)}."
        )
    if len(labels) != len(values) or not len(labels):
        raise InputError(f"Expected one label per value, got {len(labels)} and {len(values)}.")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise InputError(f"labels must be whole numbers, got {labels.dtype}; use labels.long().")
    if num_labels is not None:
        check_count("num_labels", num_labels, 1)
    count = int(labels.max()) + 1 if num_labels is None else num_labels
    if labels.min() < 0 or labels.max() >= count:
        raise InputError(f"Labels must lie in 0 … {count - 1}, got {int(labels.min())} … {int(labels.max())}.")
    return values.new_zeros(count, *values.shape[1:]).index_add_(0, labels.long().to(values.device), values)
