"""What copies and saved states hold, predicting in low precision, and gradients that cannot be read."""

import copy
import io
import pickle
from itertools import pairwise

import pytest
import torch
from torch import nn

from dualgp import errors
from dualgp.optim import BSAM, EVON, IVON, VOGN, AffineBLR

X = torch.linspace(-1, 1, 16).unsqueeze(-1)
Y = (3 * X).sin()
RULES = {
    "ivon": lambda p: IVON(p, lr=0.3, num_data=1600, total_steps=1000),
    "evon": lambda p: EVON(p, lr=0.3, num_data=1600, total_steps=1000),
    "bsam": lambda p: BSAM(p, lr=0.1, num_data=1600, prior_precision=0.1),
    "affine": lambda p: AffineBLR(p, num_data=1e4, prior_precision=0.1, scale_init=0.3),
}


@pytest.fixture(params=RULES)
def rule(request):
    return RULES[request.param]


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).to(dtype)


def backward(net, rows=slice(None)):
    dtype = net[0].weight.dtype
    loss = nn.functional.mse_loss(net(X[rows].to(dtype)), Y[rows].to(dtype))
    loss.backward()
    return loss


def gather(net, optimizer, rows, weight=1.0, halves=(True, True)):
    if halves[0]:
        with optimizer.sampled_params(weight=weight):
            backward(net, rows)
    if halves[1] and isinstance(optimizer, BSAM):
        with optimizer.perturbed_params():
            backward(net, rows)


def everything(net, optimizer):
    state = [v for s in optimizer.state.values() for v in s.values()]
    return [v.clone() for v in (*net.state_dict().values(), *state)]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def loaded(saved, rule, dtype):
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    net = network(dtype)
    optimizer = rule(net.named_parameters())
    optimizer.step(lambda: backward(net))
    net.load_state_dict(saved["net"])
    optimizer.load_state_dict(saved["opt"])
    return net, optimizer


# --- saved between a draw and the step --------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_samples_gathered_for_a_step_to_come_are_saved(rule, dtype):
    net = network(dtype)
    optimizer = rule(net.named_parameters())
    optimizer.step(lambda: backward(net))
    gather(net, optimizer, slice(0, 5), weight=5.0)
    gather(net, optimizer, slice(5, 9), weight=4.0)
    saved = copy.deepcopy({"net": net.state_dict(), "opt": optimizer.state_dict()})
    ends = []
    for again in ((net, optimizer), loaded(saved, rule, dtype)):
        gather(*again, slice(9, 16), weight=7.0)
        again[1].step()
        ends.append(everything(*again))
    assert same(*ends)


def test_bsam_is_saved_between_its_two_gradients():
    rule, net = RULES["bsam"], network()
    optimizer = rule(net.named_parameters())
    gather(net, optimizer, slice(0, 8))
    gather(net, optimizer, slice(8, 16), halves=(True, False))
    saved = copy.deepcopy({"net": net.state_dict(), "opt": optimizer.state_dict()})
    ends = []
    for again in ((net, optimizer), loaded(saved, rule, torch.float32)):
        gather(*again, slice(8, 16), halves=(False, True))
        again[1].step()
        ends.append(everything(*again))
    assert same(*ends)


def test_a_state_without_samples_has_none(rule):
    net = network()
    optimizer = rule(net.named_parameters())
    state = copy.deepcopy(optimizer.state_dict())
    gather(net, optimizer, slice(None))
    optimizer.load_state_dict(state)
    with pytest.raises(errors.CallOrderError, match="no gradient to step by"):
        optimizer.step()


def test_samples_of_other_shapes_are_refused_and_nothing_changes(rule):
    net = network()
    optimizer = rule(net.named_parameters())
    gather(net, optimizer, slice(None))
    state, before = copy.deepcopy(optimizer.state_dict()), everything(net, optimizer)
    state["param_groups"][0]["lr"] = 7.0
    state["gathered"]["averages"][0] = {}
    with pytest.raises(errors.InputError, match="another optimiser"):
        optimizer.load_state_dict(state)
    assert same(before, everything(net, optimizer))
    assert optimizer.param_groups[0]["lr"] != 7.0
    optimizer.step()  # what was gathered is still there


# --- copies -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_copy_goes_on_alone_as_the_original_would(rule, dtype):
    net = network(dtype)
    optimizer = rule(net.named_parameters())
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)  # which wraps `step`
    optimizer.step(lambda: backward(net))
    schedule.step()
    gather(net, optimizer, slice(0, 8))
    before = everything(net, optimizer)
    other = copy.deepcopy((net, optimizer))
    ends = []
    for each in (other, (net, optimizer)):
        for rows in (slice(8, 16), slice(0, 8)):
            gather(*each, rows)
            each[1].step()
        ends.append(everything(*each))
        if each is other:
            assert same(before, everything(net, optimizer))
    assert same(*ends)
    assert not same(before, ends[0])


def test_a_copy_without_its_network_has_parameters_of_its_own(rule):
    net = network()
    optimizer = copy.deepcopy(rule(net.named_parameters()))
    before = copy.deepcopy(net.state_dict())
    mine = optimizer.param_groups[0]["params"]
    with optimizer.sampled_params():
        sum(p.square().sum() for p in mine).backward()
    if isinstance(optimizer, BSAM):
        with optimizer.perturbed_params():
            sum(p.square().sum() for p in mine).backward()
    optimizer.step()
    assert same(before.values(), net.state_dict().values())
    assert not same(before.values(), [p.detach() for p in mine])


def test_a_copy_of_vogn_is_of_its_own_network():
    net = network()
    optimizer = VOGN(net, nn.functional.mse_loss, 0.01, num_data=16)
    before = copy.deepcopy(net.state_dict())
    other = copy.deepcopy(optimizer)
    other.step(X, Y)
    assert same(before.values(), net.state_dict().values())
    optimizer.step(X, Y)
    assert same(other.network.state_dict().values(), net.state_dict().values())


def test_copies_inside_a_draw_and_pickles_are_refused(rule):
    optimizer = rule(network().named_parameters())
    with optimizer.sampled_params(train=False), pytest.raises(errors.CallOrderError, match="cannot be copied inside"):
        copy.deepcopy(optimizer)
    with pytest.raises(errors.UnsupportedError, match=r"state_dict\(\)"):
        pickle.dumps(optimizer)


# --- predicting -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", [True, False])
def test_low_precision_weights_are_rounded_by_steps_only(rounding):
    net = network(torch.bfloat16)
    optimizer = IVON(net.named_parameters(), num_data=1600, total_steps=50, stochastic_rounding=rounding)
    for _ in range(3):
        optimizer.step(lambda: backward(net))
    bits = [p.detach().clone().view(torch.int16) for p in net.parameters()]
    means = [s["mean"].clone() for s in optimizer.state.values()]
    for train in (False, True) * 5:
        with optimizer.sampled_params(train=train):
            assert not same(bits, [p.detach().view(torch.int16) for p in net.parameters()])
            backward(net)
        assert same(bits, [p.detach().view(torch.int16) for p in net.parameters()])
    assert same(means, [s["mean"] for s in optimizer.state.values()])  # which have more digits than the weights
    optimizer.step()
    assert not same(bits, [p.detach().view(torch.int16) for p in net.parameters()])


class Interrupted(IVON):
    def _draw(self, bucket):
        raise KeyboardInterrupt


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_exception_while_weights_are_drawn_leaves_all_as_they_were(dtype):
    net = network(dtype)
    groups = [{"params": list(net[0].parameters())}, {"params": list(net[2].parameters())}]
    optimizer, before = Interrupted(groups, num_data=1600, total_steps=50), copy.deepcopy(net.state_dict())
    with pytest.raises(KeyboardInterrupt), optimizer.sampled_params():
        pass
    assert same(before.values(), net.state_dict().values())


def test_a_posterior_is_not_read_at_a_draw(rule):
    net = network()
    optimizer = rule(net.named_parameters())
    before = everything(net, optimizer)
    with optimizer.sampled_params(train=False), pytest.raises(errors.CallOrderError, match="posterior"):
        optimizer.posterior()
    assert same(before, everything(net, optimizer))


# --- gradients --------------------------------------------------------------------------------------


def test_sparse_gradients_are_refused_and_nothing_changes(rule):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(4, 3, sparse=True), nn.Linear(3, 1))
    optimizer = rule(net.named_parameters())
    before = everything(net, optimizer)
    with pytest.raises(errors.InputError, match="sparse=True"), optimizer.sampled_params():
        net(torch.tensor([0, 2])).sum().backward()
    assert same(before, everything(net, optimizer))
    with pytest.raises(errors.CallOrderError, match="no gradient to step by"):
        optimizer.step()
    net[0].sparse = False
    for context in (optimizer.sampled_params, getattr(optimizer, "perturbed_params", None)):
        if context is not None:
            with context():
                net(torch.tensor([0, 2])).sum().backward()
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in list(zip(before, everything(net, optimizer), strict=True))[1:3])


def test_draws_follow_each_other_where_one_was_refused(rule):
    net = network()
    optimizer, draws = rule(net.named_parameters()), []
    for _ in range(3):
        with pytest.raises(errors.CallOrderError), optimizer.sampled_params():
            draws.append(net[0].weight.detach().clone())
    assert not any(torch.equal(a, b) for a, b in pairwise(draws))
