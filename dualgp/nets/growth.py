"""Room for new data: which of their inputs Z takes in, and the posterior with them, which says what it said before."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dualgp.jacobian import JacobianBasis
from dualgp.nets.centre import centred, data_site
from dualgp.nets.structured import StructuredPosterior
from dualgp.posterior import Posterior

if TYPE_CHECKING:
    from dualgp.nets.posterior import NetworkPosterior

_NEWS = 1e-3  # nats; what an input that Z does not take in may cost
_CANDIDATES = 2000


@torch.no_grad()
def news(basis: JacobianBasis, x: Tensor, beta: float, limit: int) -> Tensor:
    """Return the rows of x that Z should take in: by greatest residual given those taken, each worth 1e-3 nats or more.

    A site of precision β at x loses ½ tr β r(x), r the residual: the prior variance that w does not see. Pivoted
    Cholesky on the trace of the residual covariance; of more than 2000 inputs, of so many evenly spaced.

    Args:
        basis: at the present Z.
        x: new inputs.
        beta: the greatest precision of their sites.
        limit: how many, at most.
    """
    some = torch.linspace(0, len(x) - 1, min(len(x), _CANDIDATES), device=x.device).round().long()
    phi = basis.features(x[some]).phi.double()
    R = basis.residual_covariance(x[some], phi)
    if basis.coupled:
        C = basis.num_outputs
        R = R.unflatten(0, (-1, C)).unflatten(-1, (-1, C)).diagonal(dim1=1, dim2=3).movedim(-1, 0)  # [C, n, n]
    R, rows = R.sum(0), list[int]()
    left = R.diagonal().clone()
    columns = R.new_zeros(0, len(R))
    while len(rows) < min(limit, len(some)) and 0.5 * beta * float(left.max()) > _NEWS:
        pivot = int(left.argmax())
        column = (R[pivot] - columns[:, pivot] @ columns) / left[pivot].sqrt()
        left = (left - column.square()).clamp_min(0.0)
        left[pivot] = 0.0
        columns = torch.cat([columns, column.unsqueeze(0)])
        rows.append(pivot)
    return some[rows].to(x.device)


def with_room(q: NetworkPosterior, x: Tensor, beta: float, limit: int | None) -> NetworkPosterior:
    """Return the posterior with room for new data whose sites have precision β at most: at Z and some of their inputs.

    Args:
        q: the posterior.
        x: new inputs.
        beta: the greatest precision of their sites.
        limit: how many Z may take in; None: half as many as it has and 50 at least.
    """
    basis, Z = q.basis, q.basis.inducing_inputs
    if isinstance(q.posterior, StructuredPosterior) or Z is None or not basis.has_residual:
        return q
    rows = news(basis, x, beta, max(50, len(Z) // 2) if limit is None else limit)
    if not len(rows):
        return q
    grown = basis.grown(x[rows])
    if grown.size == basis.size:  # what they see besides is rounding
        return q
    moved = Posterior(grown, centred(grown, basis.carry(data_site(q), grown), q.centre))
    return dataclasses.replace(q, posterior=moved, recentring=q.recentring.padded(grown.size))
