"""What must not leak: gradients into another draw, noise into another rank, a prior into oblivion, half a sample."""

import copy
import math
from collections.abc import Iterator

import pytest
import rank_noise
import ranks
import torch
from torch import nn

from dualgp import errors
from dualgp.optim import BSAM, IVON

X = torch.linspace(-1, 1, 16).unsqueeze(-1)
Y = (3 * X).sin()


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))


def ivon(net, **options):
    return IVON(net.named_parameters(), lr=0.3, num_data=1600, total_steps=1000, **options)


def backward(net, factor=1.0):
    (factor * nn.functional.mse_loss(net(X), Y)).backward()


def outside(net, optimizer):
    backward(net)


def interrupted(net, optimizer):
    state = optimizer.generator_on(net[0].weight.device).get_state()
    with pytest.raises(KeyboardInterrupt), optimizer.sampled_params():  # noqa: PT012 - the draw is what is left
        backward(net)
        raise KeyboardInterrupt
    optimizer.generator_on(net[0].weight.device).set_state(state)  # so that the next draw is that of the other run


@pytest.mark.parametrize("before", [outside, interrupted])
def test_gradients_taken_elsewhere_are_not_those_of_a_draw(before):
    nets = [network(), network()]
    optimizers = [ivon(net) for net in nets]
    before(nets[0], optimizers[0])
    for net, optimizer in zip(nets, optimizers, strict=True):
        with optimizer.sampled_params():
            backward(net)
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(*(net.state_dict().values() for net in nets), strict=True))


def test_the_prior_is_part_of_the_state():
    net = network()
    q = ivon(net).posterior().as_prior()
    first, again = ivon(net, prior=q), ivon(network(), prior=q.scale(0.5))
    state = first.state_dict()
    with pytest.raises(errors.InputError, match="with prior="):
        ivon(network()).load_state_dict(state)
    again.load_state_dict(state)
    assert torch.equal(again.posterior().prior_precision, first.posterior().prior_precision)
    with pytest.raises(errors.InputError, match="another optimiser"):
        first.load_state_dict(ivon(network()).state_dict())


def test_parameters_that_the_prior_does_not_know_are_refused():
    net, extra = network(), nn.Parameter(torch.ones(3))
    optimizer = ivon(net, prior=ivon(net).posterior())
    with pytest.raises(errors.InputError, match="says nothing of those in a new group"):
        optimizer.add_param_group({"params": [("extra", extra)]})
    assert len(optimizer.param_groups) == 1
    optimizer.step(lambda: backward(net))


def test_bsam_does_not_move_by_half_a_sample():
    net = network()
    optimizer = BSAM(net.named_parameters(), lr=0.1, num_data=1600, prior_precision=0.1)
    before = copy.deepcopy(optimizer.state_dict()["state"]), copy.deepcopy(net.state_dict())
    with optimizer.sampled_params():
        backward(net)
    with optimizer.perturbed_params():
        backward(net, math.inf)
    optimizer.step()
    assert optimizer.num_dropped == 1
    for k, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(v, before[0][k][name]) for name, v in state.items())
    assert all(torch.equal(v, before[1][k]) for k, v in net.state_dict().items())


@pytest.fixture(scope="module")
def pair() -> Iterator[ranks.Pair]:
    both = ranks.Pair()
    yield both
    both.close()


def test_one_seed_on_every_rank_is_not_one_noise(pair):
    a, b = pair(rank_noise.draw_with_one_seed)
    assert (a != b).all()


def test_a_state_that_one_rank_saved_for_all_is_not_one_noise(pair):
    states = pair(rank_noise.save)
    a, b = pair(rank_noise.draw_after_loading, states[0])
    assert (a != b).all()
    again = pair(rank_noise.draw_after_loading, states[0])
    assert all(torch.equal(x, y) for x, y in zip((a, b), again, strict=True))  # a function of the state
