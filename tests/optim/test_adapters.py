"""Low-rank adapters, of our own: the optimiser learns A and B, and the weights under them are never touched."""

import math

import torch
from torch import nn

from dualgp.optim import IVON, prune


class LowRank(nn.Module):
    """x ↦ Wx + BAx with W frozen."""

    def __init__(self, under: nn.Linear, rank: int) -> None:
        super().__init__()
        self.under = under.requires_grad_(False)
        self.A = nn.Parameter(torch.randn(rank, under.in_features) / under.in_features**0.5)
        self.B = nn.Parameter(torch.zeros(under.out_features, rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.under(x) + x @ self.A.mT @ self.B.mT


def learned(steps: int = 800) -> tuple[nn.Sequential, IVON, torch.Tensor, torch.Tensor]:
    """A network whose truth differs from its frozen weights by one of rank 1."""
    torch.manual_seed(0)
    net = nn.Sequential(LowRank(nn.Linear(6, 5), 2))
    x = torch.randn(200, 6)
    with torch.no_grad():
        y = net(x) + (x @ torch.randn(6, 1)) @ torch.randn(1, 5) + 0.1 * torch.randn(200, 5)
    optimizer = IVON(
        [(n, p) for n, p in net.named_parameters() if p.requires_grad], 0.02, num_data=200, total_steps=steps,
        prior_precision=0.01, rescale_lr=False,
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        with optimizer.sampled_params():
            (0.5 * (net(x) - y).square().sum(-1).mean()).backward()
        optimizer.step()
        schedule.step()
    return net, optimizer, x, y


def test_adapters_learn_and_what_is_under_them_stays():
    torch.manual_seed(0)
    fresh = nn.Sequential(LowRank(nn.Linear(6, 5), 2))
    net, optimizer, x, y = learned()
    assert torch.equal(net[0].under.weight, fresh[0].under.weight)
    assert torch.equal(net[0].under.bias, fresh[0].under.bias)
    with torch.no_grad():
        assert (net(x) - y).square().mean() < 0.05 * (fresh(x) - y).square().mean()
    q = optimizer.posterior()
    assert dict(q.layout.shapes) == {"0.A": (2, 6), "0.B": (5, 2)}
    sampled = q.predict_samples(net, x, 32)
    assert math.sqrt(sampled.var(0).mean()) > 1e-3
    assert (sampled.mean(0) - net(x)).abs().mean() < sampled.std(0).mean()


def test_pruning_takes_the_weights_that_the_posterior_is_least_sure_to_need():
    net, optimizer, x, y = learned()
    q = optimizer.posterior()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    losses = {}
    for order in ("least", "most"):
        net.load_state_dict(state)
        if order == "least":
            assert prune(q, net, 0.25) == 5
        else:  # the same number of those with the largest ratio
            keep = torch.ones(22, dtype=torch.bool)
            keep[(q.mean.abs() / q.variance().sqrt()).topk(5).indices] = False
            with torch.no_grad():
                for name, mask in q.layout.split(keep).items():
                    net.get_parameter(name).mul_(mask)
        with torch.no_grad():
            losses[order] = float((net(x) - y).square().mean())
    assert losses["least"] < 0.5 * losses["most"]
