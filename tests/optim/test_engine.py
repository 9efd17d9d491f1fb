"""What holds of every variational optimiser: weights come back, nothing else moves, runs go on where they stopped."""

import copy
import io
import math

import pytest
import torch
from torch import nn
from toys import F64, gap

from dualgp import WeightPosterior, errors
from dualgp.optim import BSAM, IVON, VOGN, AdditiveBLR, AffineBLR, MultiplicativeBLR, SampledOptimizer

X = torch.linspace(-1, 1, 16).unsqueeze(-1)
Y = (3 * X).sin()


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).to(dtype)


RULES = {
    "ivon": lambda p: IVON(p, lr=0.3, num_data=1600, total_steps=1000),
    "gradsq": lambda p: IVON(p, lr=0.3, num_data=1600, total_steps=1000, hess_approx="gradsq", batch_size=16),
    "bsam": lambda p: BSAM(p, lr=0.1, num_data=1600, prior_precision=0.1),
    "additive": lambda p: AdditiveBLR(p, lr=0.2, num_data=16, prior_precision=0.1),
    "affine": lambda p: AffineBLR(p, lr=1.0, num_data=1e4, prior_precision=0.1, scale_init=0.3),
    "multiplicative": lambda p: MultiplicativeBLR(p, lr=0.5, num_data=1e4, prior_precision=0.1),
}


@pytest.fixture(params=RULES)
def rule(request):
    return RULES[request.param]


def closure(net, optimizer=None, x=X, y=Y):
    def evaluate():
        loss = nn.functional.mse_loss(net(x.to(next(net.parameters()).dtype)), y.to(next(net.parameters()).dtype))
        loss.backward()
        return loss

    return evaluate


def train(net, optimizer, steps):
    return [float(optimizer.step(closure(net))) for _ in range(steps)]


def test_it_learns(rule):
    net = network()
    losses = train(net, rule(net.named_parameters()), 400)
    assert sum(losses[-50:]) < 0.8 * sum(losses[:50])


# --- weights come back ------------------------------------------------------------------------------


class Awkward(nn.Module):
    """Frozen, unused, tied, 0-d and channels-last parameters."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(2))
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.first, self.tied = nn.Linear(3, 3), nn.Linear(3, 3)
        self.tied.weight = self.first.weight

    def forward(self, x):
        return self.tied(self.first(self.conv(x).mean((-2, -1)) * self.frozen)) * self.scale


def shape_of_memory(net):
    return [(p.data_ptr(), p.stride(), p.requires_grad) for p in net.parameters()]


def test_awkward_parameters(rule):
    net = Awkward()
    optimizer, x = rule(net.named_parameters()), torch.randn(4, 2, 5, 5)
    before, layout = {k: v.clone() for k, v in net.state_dict().items()}, shape_of_memory(net)
    for train_mode in (False, True):
        with optimizer.sampled_params(train=train_mode):
            assert not torch.equal(net.scale, before["scale"])
            assert torch.equal(net.frozen, before["frozen"])
            net(x).square().sum().backward()
        if not isinstance(optimizer, MultiplicativeBLR):  # whose mean is not what it starts from
            assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
        assert shape_of_memory(net) == layout
    if isinstance(optimizer, BSAM):
        with optimizer.perturbed_params():
            net(x).square().sum().backward()
    optimizer.step()
    assert shape_of_memory(net) == layout
    after = net.state_dict()
    for name, moved in (("frozen", False), ("unused", False), ("scale", True), ("first.weight", True)):
        assert torch.equal(after[name], before[name]) != moved, name
    if not isinstance(optimizer, MultiplicativeBLR):
        state = {name: optimizer.state[p] for name, p in net.named_parameters()}
        fresh = {name: rule(Awkward().named_parameters()) for name in ["x"]}["x"]
        for (_, mine), p in zip(state.items(), fresh.state, strict=False):
            if p.shape == net.unused.shape:
                assert all(torch.equal(mine[n], v) for n, v in fresh.state[p].items())


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_inside_leaves_the_mean_and_no_trace(rule, error):
    net = network()
    optimizer = rule(net.named_parameters())
    train(net, optimizer, 3)
    before = copy.deepcopy(net.state_dict())
    states = copy.deepcopy([dict(s) for s in optimizer.state.values()])
    with pytest.raises(error), optimizer.sampled_params():  # noqa: PT012 - the draw is what is left
        closure(net)()
        raise error
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(
        torch.equal(v, s[k]) for s, now in zip(states, optimizer.state.values(), strict=True) for k, v in now.items()
    )
    with pytest.raises(errors.CallOrderError, match="no gradient to step by"):
        optimizer.step()
    train(net, optimizer, 1)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_predicting_leaves_the_weights_trainable(rule, mode):
    net = network()
    optimizer = rule(net.named_parameters())
    train(net, optimizer, 1)
    before = copy.deepcopy(net.state_dict())
    with mode(), optimizer.sampled_params(train=False):
        first = net(X).clone()
    with mode(), optimizer.sampled_params(train=False):
        assert not torch.equal(net(X), first)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not any(p.is_inference() for p in net.parameters())
    train(net, optimizer, 1)


def test_steps_allocate_next_to_nothing():
    net = nn.Linear(1000, 1000, bias=False)
    optimizer = IVON(net.named_parameters(), num_data=100, total_steps=100)
    gradient = torch.randn(1000, 1000)

    def one():
        with optimizer.sampled_params():
            net.weight.grad = gradient
        optimizer.step()

    one()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        one()
    peak, held = 0, 0
    for event in sorted(profile.events(), key=lambda e: e.time_range.start):
        if event.name == "[memory]":
            held += event.cpu_memory_usage if hasattr(event, "cpu_memory_usage") else event.self_cpu_memory_usage
            peak = max(peak, held)
    assert peak <= 8 * 10**6  # bytes for 10⁶ weights


# --- statistics -------------------------------------------------------------------------------------


def test_two_draws_are_one_step_of_averaged_statistics():
    nets = [network(F64) for _ in range(2)]
    a, b = (IVON(n.named_parameters(), lr=0.5, num_data=16, total_steps=50, init_std=0.05) for n in nets)
    a._generators.clear(), b._generators.clear()
    for weight in (1.0, 3.0):
        with a.sampled_params(weight=weight):
            closure(nets[0])()
    gbar, nbar = [], []
    for _ in range(2):
        with b.sampled_params():
            closure(nets[1])()
        gbar.append(b._buckets[0]["gbar"].clone())
        nbar.append(b._buckets[0]["nbar"].clone())
        b._weight = 0.0
    b._buckets[0]["gbar"].copy_((gbar[0] + 3.0 * gbar[1]) / 4.0)
    b._buckets[0]["nbar"].copy_((nbar[0] + 3.0 * nbar[1]) / 4.0)
    b._weight = 1.0
    a.step(), b.step()
    for mine, theirs in zip(a._buckets[0].names, b._buckets[0].names, strict=True):
        assert gap(a._buckets[0][mine], b._buckets[0][theirs]) < 1e-12


def test_gradients_left_over_do_not_leak_into_the_next_draw():
    net = network()
    optimizer = RULES["ivon"](net.named_parameters())
    with optimizer.sampled_params():
        closure(net)()
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_sample_that_is_not_finite_is_dropped_and_counted(rule, bad):
    net = network()
    optimizer = rule(net.named_parameters())
    train(net, optimizer, 2)
    before = copy.deepcopy(optimizer.state_dict()["state"]), copy.deepcopy(net.state_dict())
    with optimizer.sampled_params():
        (nn.functional.mse_loss(net(X), Y) * bad).backward()
    if isinstance(optimizer, BSAM):
        with optimizer.perturbed_params():
            closure(net)()
    optimizer.step()
    assert optimizer.num_dropped >= 1
    for k, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(v, before[0][k][name]) for name, v in state.items())
    assert all(torch.equal(v, before[1][k]) for k, v in net.state_dict().items())
    train(net, optimizer, 1)


def test_a_scaler_that_skips_a_step_skips_ours():
    net = network()
    optimizer = RULES["ivon"](net.named_parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    for factor, moves in ((math.inf, False), (1.0, True)):
        before = copy.deepcopy(optimizer.state_dict()["state"])
        with optimizer.sampled_params():
            scaler.scale(factor * nn.functional.mse_loss(net(X), Y)).backward()
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        same = all(
            torch.equal(v, before[k][n]) for k, s in optimizer.state_dict()["state"].items() for n, v in s.items()
        )
        assert same != moves
    assert optimizer.state[net[0].weight]["momentum"].abs().max() < 10.0  # unscaled


# --- going on ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_goes_on_to_the_last_bit(rule, dtype):
    nets = [network(dtype) for _ in range(2)]
    whole = rule(nets[0].named_parameters())
    train(nets[0], whole, 10)
    part = rule(nets[1].named_parameters())
    train(nets[1], part, 5)
    file = io.BytesIO()
    torch.save({"net": nets[1].state_dict(), "opt": part.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    net = network(dtype)
    again = rule(net.named_parameters())
    train(net, again, 2)
    net.load_state_dict(saved["net"])
    again.load_state_dict(saved["opt"])
    train(net, again, 5)
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in nets[0].state_dict().items())
    for a, b in zip(whole.state.values(), again.state.values(), strict=True):
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert [g["step"] for g in again.param_groups] == [10]


def test_the_global_stream_is_left_alone_and_decides_by_its_seed(rule):
    ends = []
    for seed in (1, 1, 2):
        net = network()
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        train(net, rule(net.named_parameters()), 3)
        assert torch.equal(torch.get_rng_state(), state)
        ends.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


def test_noise_of_successive_steps_is_independent():
    net = nn.Linear(100, 100, bias=False)
    optimizer = IVON(net.named_parameters(), num_data=100, total_steps=100)
    draws = []
    for _ in range(2):
        with optimizer.sampled_params(train=False):
            draws.append(net.weight.detach().clone().flatten())
    corr = torch.corrcoef(torch.stack(draws) - net.weight.detach().flatten())[0, 1]
    assert abs(corr) < 3 / 100


def test_groups_have_settings_of_their_own_and_may_come_later():
    net = network()
    optimizer = IVON(
        [{"params": list(net[0].parameters()), "weight_decay": 0.5}], lr=0.5, num_data=16, total_steps=50, init_std=0.05
    )
    optimizer.step(lambda: closure(net)())
    frozen = net[2].weight.detach().clone()
    assert torch.equal(net[2].weight, frozen)
    net[2].weight.grad = net[2].bias.grad = None
    optimizer.add_param_group({"params": list(net[2].parameters()), "lr": 0.1})
    train(net, optimizer, 2)
    assert not torch.equal(net[2].weight, frozen)
    assert [g["lr"] for g in optimizer.param_groups] == [0.5, 0.1]
    q = optimizer.posterior(net)
    assert set(q.layout.shapes) == {name for name, _ in net.named_parameters()}
    assert gap(q.layout.split(q.mean)["2.weight"], net[2].weight.detach()) < 1e-7


def test_a_scheduler_drives_it():
    net = network()
    optimizer = RULES["ivon"](net.named_parameters())
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    for _ in range(10):
        train(net, optimizer, 1)
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-9)
    before = net[0].weight.detach().clone()
    train(net, optimizer, 1)
    assert torch.equal(net[0].weight, before)


# --- bad input --------------------------------------------------------------------------------------


def ivon(**settings):
    return lambda: IVON(network().named_parameters(), **{"num_data": 16, "total_steps": 50, **settings})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (ivon(num_data=None), "num_data= is needed"),
        (ivon(num_data=-1), "num_data must be positive"),
        (ivon(ess=10), "num_data and ess say the same"),
        (ivon(prior_precision=-1.0), "prior_precision must be ≥ 0 and finite"),
        (ivon(weight_decay=-1.0), "weight_decay must be ≥ 0 and finite"),
        (ivon(weight_decay=0.1, prior_precision=1.0), "say the same"),
        (ivon(init_std=0.1, hess_init=1.0), "say the same"),
        (ivon(init_std=1e3), "no smaller than what the prior allows"),
        (ivon(total_steps=None), "total_steps= is needed"),
        (ivon(beta2=1.5), r"beta2 must lie in \[0, 1\]"),
        (ivon(beta2=0.9, curvature_horizon=2.0), "say the same"),
        (ivon(beta1=1.0), "beta1"),
        (ivon(lr=-1.0), "lr must be"),
        (ivon(lr=math.nan), "lr must be"),
        (ivon(temperature=0.0), "temperature must be positive"),
        (ivon(num_data=None, ess=10, temperature=2.0), "goes with num_data"),
        (ivon(clip_radius=0.0), "clip_radius"),
        (ivon(max_std=0.0), "max_std"),
        (ivon(hess_approx="gradsq"), "batch_size"),
        (ivon(mc_samples=0), "mc_samples"),
        (
            lambda: IVON([torch.zeros(2, dtype=torch.complex64, requires_grad=True)], num_data=1, total_steps=9),
            "complex",
        ),
        (lambda: BSAM(network().parameters(), num_data=0), "num_data must be positive"),
        (lambda: BSAM(network().parameters(), num_data=1, damping=0.0), "damping"),
        (lambda: BSAM(network().parameters(), num_data=1, sam_radius=-1.0), "sam_radius"),
        (lambda: AdditiveBLR(network().parameters(), num_data=1, noise_std=0.0), "noise_std"),
        (lambda: AffineBLR(network().parameters(), num_data=1, temperature=0.0), "temperature"),
        (lambda: AffineBLR(network().parameters(), num_data=1, lr_scale=-1.0), "lr_scale"),
        (lambda: MultiplicativeBLR(network().parameters(), num_data=1, offset=0.0), "offset"),
        (lambda: VOGN(network(), nn.functional.mse_loss, num_data=0), "num_data"),
        (lambda: VOGN(network(), nn.functional.mse_loss, num_data=1, damping=-1.0), "damping"),
    ],
)
def test_settings_out_of_range(make, message):
    with pytest.raises(errors.InputError, match=message):
        make()


def test_a_memory_longer_than_the_run_is_warned_of():
    with pytest.warns(errors.NumericalWarning, match="mostly its initial value"):
        ivon(beta2=0.99999, total_steps=1000)()


def test_calls_at_the_wrong_time(rule):
    net = network()
    optimizer = rule(net.named_parameters())
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(errors.CallOrderError, match="no gradient to step by"):
        optimizer.step()
    with optimizer.sampled_params(train=False), pytest.raises(errors.CallOrderError, match="drawn already"):
        optimizer.sampled_params().__enter__()
    with optimizer.sampled_params(train=False):
        for call in (
            optimizer.step,
            lambda: optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]}),
            lambda: optimizer.load_state_dict(optimizer.state_dict()),
        ):
            with pytest.raises(errors.CallOrderError, match="inside sampled_params"):
                call()
    with pytest.raises(errors.CallOrderError, match=r"call loss\.backward\(\) inside"), optimizer.sampled_params():
        pass
    with pytest.raises(errors.InputError, match="weight of a sample"), optimizer.sampled_params(weight=0.0):
        pass
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    with pytest.raises(errors.InputError, match="groups of"):
        optimizer.load_state_dict(rule(network()[0].parameters()).state_dict())
    wrong = optimizer.state_dict()
    wrong["state"] = {k: {} for k in wrong["state"]}
    with pytest.raises(errors.InputError, match="another optimiser"):
        optimizer.load_state_dict(wrong)


def test_bsam_needs_its_draw_first():
    optimizer = RULES["bsam"](network().named_parameters())
    with pytest.raises(errors.CallOrderError, match=r"sampled_params\(\) first"), optimizer.perturbed_params():
        pass


def test_a_multiplicative_posterior_has_no_sites():
    with pytest.raises(errors.UnsupportedError, match="no sites"):
        RULES["multiplicative"](network().named_parameters()).posterior()


def test_priors_of_other_weights_are_refused():
    q = RULES["ivon"](network().named_parameters()).posterior()
    with pytest.raises(errors.BasisMismatchError, match="must agree"):
        IVON(nn.Linear(1, 1).named_parameters(), num_data=1, total_steps=9, prior=q)
    with pytest.raises(errors.InputError, match="leave prior_precision"):
        ivon(prior=q, prior_precision=1.0)()
    dense = WeightPosterior(q.layout, prior_precision=torch.eye(q.layout.size))
    with pytest.raises(errors.InputError, match="diagonal"):
        ivon(prior=dense)()


def test_the_base_class_is_no_rule():
    assert issubclass(IVON, SampledOptimizer)
