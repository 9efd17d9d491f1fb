"""Data of a network left out one by one, also those that were added before Z grew."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from gpytorch.likelihoods import SoftmaxLikelihood
from jaxtyping import Int
from torch import Tensor

from dualgp.influence import LeftOut, leave_one_out
from dualgp.influence.blocks import as_matrices, limit_of, warn_capped
from dualgp.influence.left_out import scored
from dualgp.nets.data import Batch, rows_of
from dualgp.sites import Sites

if TYPE_CHECKING:
    from dualgp.nets.posterior import NetworkPosterior


def one_by_one(q: NetworkPosterior, x: Tensor, y: Tensor, params: dict[str, Tensor]) -> LeftOut:
    """Return checked data predicted without themselves; errors as in `NetworkPosterior.leave_one_out`."""
    sizes = q.held.sizes_of(rows_of(Batch(x, y, params), q.basis.dtype))
    sites, options = q.sites_at(x, y, **params), dict[str, Any](params)
    if not isinstance(q.likelihood, SoftmaxLikelihood):
        shape = (len(x), q.num_outputs)
        y, options = y.reshape(shape), {name: value.reshape(shape) for name, value in params.items()}
    if bool((sizes == q.basis.size).all()):
        return leave_one_out(q.posterior, x, y, sites, q.likelihood, **options)
    return scored(*_without(q, x, sites, sizes), y, sites, q.likelihood, **options)


def _without(
    q: NetworkPosterior, x: Tensor, sites: Sites, sizes: Int[Tensor, "n"]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return mean, covariance, hat value and whether it was capped of each datum without its site.

    That is on the first so many coordinates, where the datum was added before Z grew.
    """
    lam, B = as_matrices(sites)
    limit, one = limit_of(q.posterior, None), torch.ones(1, dtype=torch.float64, device="cpu")
    order, parts = [], []
    for size in sizes.unique().tolist():
        of = (sizes == size).nonzero().flatten().to(lam.device)
        order.append(of)
        for at, sweep in q.spectrum.blocks(x[of.to(x.device)], one, size):
            mean, cov, shift = next(sweep).without(lam[of[at]], B[of[at]], limit)
            parts.append((mean, cov, shift.hat, shift.capped))
    back = torch.cat(order).argsort()
    mean, cov, hat, capped = (torch.cat(part)[back] for part in zip(*parts, strict=True))
    warn_capped(capped, limit)
    return mean, cov, hat, capped
