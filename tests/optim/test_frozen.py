"""What takes no part in training is no weight of the posterior; and settings and loops that would be ignored."""

import pytest
import torch
from torch import nn

from dualgp import WeightLayout, errors, optim

RULES = {
    "IVON": lambda p: optim.IVON(p, num_data=20, total_steps=10),
    "EVON": lambda p: optim.EVON(p, num_data=20, total_steps=10),
    "BSAM": lambda p: optim.BSAM(p, num_data=20),
    "AffineBLR": lambda p: optim.AffineBLR(p, num_data=20),
    "AdditiveBLR": lambda p: optim.AdditiveBLR(p, num_data=20),
}


def half_frozen() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    net[0].requires_grad_(False)
    return net


@pytest.mark.parametrize("rule", RULES)
def test_frozen_parameters_are_no_part_of_the_posterior(rule):
    net, x = half_frozen(), torch.randn(8, 3)
    frozen = [p.clone() for p in net[0].parameters()]
    optimizer = RULES[rule](net.named_parameters())
    for _ in range(3):
        optimizer.step(lambda: _backward(net(x).square().mean()))
    q = optimizer.posterior()
    assert q.layout.shapes == WeightLayout.of(net).shapes
    mean = torch.cat([p.detach().flatten() for p in net[2].parameters()])
    torch.testing.assert_close(q.mean, mean)
    optim.prune(q if q.structure == "diagonal" else optimizer.posterior(structure="diagonal"), net, 0.5)
    assert all(torch.equal(a, b) for a, b in zip(frozen, net[0].parameters(), strict=True))
    net.requires_grad_(False)  # what was learned stays in it
    assert optimizer.posterior().layout.shapes == q.layout.shapes


def _backward(loss):
    loss.backward()
    return loss


def test_a_prior_of_what_is_learned_alone():
    net, x = half_frozen(), torch.randn(8, 3)
    first = optim.IVON(net.named_parameters(), num_data=20, total_steps=10)
    first.step(lambda: _backward(net(x).square().mean()))
    q = first.posterior()
    again = optim.IVON(net.named_parameters(), num_data=20, total_steps=10, prior=q).posterior()
    torch.testing.assert_close(again.prior_precision, q.precision)
    torch.testing.assert_close(again.prior_mean, q.mean)


@pytest.mark.parametrize("rule", ["IVON", "EVON"])
@pytest.mark.parametrize("name", ["prior_precision", "init_std", "num_data", "temperature"])
def test_settings_of_the_run_are_not_taken_for_one_group(rule, name):
    groups = [{"params": [nn.Parameter(torch.ones(2))], name: 2.0}]
    with pytest.raises(errors.InputError, match=rf"^{name} cannot be given for one group .*weight_decay"):
        RULES[rule](groups)


def test_bsam_in_the_loop_of_the_others_is_told_what_it_lacks():
    p = nn.Parameter(torch.zeros(2))
    optimizer = optim.BSAM([("p", p)], num_data=20)
    with optimizer.sampled_params():
        (p - 1).square().sum().backward()
    with pytest.raises(errors.CallOrderError, match="perturbed_params"):
        optimizer.step()
    with optimizer.perturbed_params():
        (p - 1).square().sum().backward()
    optimizer.step()
    assert (p != 0).all()
    optimizer.step(lambda: _backward((p - 1).square().sum()))
    with optimizer.sampled_params():
        (p - 1).square().sum().backward()
    with pytest.raises(errors.CallOrderError, match="perturbed_params"):
        optimizer.step()
