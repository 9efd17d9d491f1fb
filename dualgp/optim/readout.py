"""What a run has learned, as a posterior on the weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dualgp.optim.engine import SampledOptimizer
from dualgp.optim.flat import Bucket
from dualgp.sites import WeightSite
from dualgp.weights import WeightPosterior


def diagonal_posterior(
    optimizer: SampledOptimizer,
    network: nn.Module | None,
    precision: Callable[[Bucket], Tensor],
    prior_precision: Callable[[Bucket], float],
) -> WeightPosterior:
    """Return N(mean, 1/S) with S as given for each bucket, as a prior N(0, 1/s₀) times a site.

    Frozen parameters are constants, and not in it.
    """
    layout, m, parts = optimizer._layout(network), optimizer._read_mean(), []
    with torch.no_grad():
        for bucket in optimizer._buckets:
            S = bucket.of_learned(precision(bucket))
            parts.append((S, torch.full_like(S, prior_precision(bucket))))
        S, s0 = (torch.cat(p) for p in zip(*parts, strict=True))
    return WeightPosterior(layout, WeightSite(S * m, S - s0), prior_precision=s0)
