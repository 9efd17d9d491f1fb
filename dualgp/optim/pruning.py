"""Pruning by signal to noise."""

from __future__ import annotations

import torch
from torch import nn

from dualgp.checks import check_number
from dualgp.weights import WeightPosterior


@torch.no_grad()
def prune(q: WeightPosterior, network: nn.Module, fraction: float | int) -> int:
    """Set to zero, in place, the weights of least |m|/σ; return how many.

    Args:
        q: posterior over weights of the network, such as `optimizer.posterior()`.
        network: whose weights are set; those that q does not speak of stay.
        fraction: of q's weights, in [0, 1].

    Raises:
        InputError: if the fraction is out of range, or the network has not these weights; it is unchanged then.

    Source: Graves 2011, "Practical variational inference for neural networks", § 6; Cong et al. 2025 for adapters.

    Example:
        >>> net = torch.nn.Linear(4, 1, bias=False)
        >>> _ = torch.nn.init.constant_(net.weight, 1.0)
        >>> from dualgp import WeightLayout
        >>> precision = torch.tensor([1.0, 9.0, 4.0, 2.0])
        >>> q = WeightPosterior(WeightLayout.of(net), prior_mean=1.0, prior_precision=precision)
        >>> prune(q, net, 0.5), net.weight.tolist()
        (2, [[0.0, 1.0, 1.0, 0.0]])
    """
    check_number("fraction", fraction, least=0, most=1)
    parameters = q.parameters_of(network)
    number = int(fraction * q.layout.size)
    ratio = q.mean.abs() / q.variance().sqrt()
    keep = torch.ones_like(ratio, dtype=torch.bool)
    keep[ratio.topk(number, largest=False).indices] = False
    for p, mask in zip(parameters, q.layout.split(keep).values(), strict=True):
        p.mul_(mask)
    return number
