"""Laws of a stream: posterior = prior + rest + sites of memory, whatever was done to it, and what equals what."""

import copy
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace

import gpytorch
import pytest
import torch
from families import FAMILIES, kernel, softmax
from gpytorch.likelihoods import BernoulliLikelihood
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset
from toys import F64, at, gap, gaussian, line, matern, rbf, unchecked, waves

from dualgp import DualGP, errors
from dualgp.gp import update as update_module
from dualgp.gp.data import Data, gaussian_sites
from dualgp.gp.hybrid import Anchor, stream_bound
from dualgp.gp.stream import read
from dualgp.posterior import Posterior
from dualgp.sites import Sites

Z = line(-1.5, 1.5, 6)
LIKELIHOODS = {"gaussian": gaussian, "bernoulli": BernoulliLikelihood, "softmax": softmax}
FIXED = {"learn_hyperparameters": False}


def problem(name: str, n: int = 40, seed: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    x, f, g = waves(n, 1, seed=seed)
    noisy = f + 0.3 * torch.randn(n, generator=g, dtype=F64)
    if name == "gaussian":
        return x, noisy
    return x, (noisy > 0).double() if name == "bernoulli" else (noisy > -0.5).long() + (noisy > 0.7).long()


def new(name: str = "gaussian", *, given: bool = True, **options) -> DualGP:
    z = {"inducing_points": Z} if given else {"num_inducing": 5}
    return DualGP(rbf(0.6), LIKELIHOODS[name]().double(), **z, **options)


def relative(a, b) -> float:
    """Largest difference of two sites, each part relative to the larger entry (or to the prior's 1)."""
    return max(gap(a.B, b.B) / (1.0 + b.B.abs().max().item()), gap(a.lam, b.lam) / (1.0 + b.lam.abs().max().item()))


def check_invariant(gp: DualGP, seen: int, tol: float = 1e-8) -> None:
    """Posterior = prior + rest + Σ sites of memory, a Gaussian, with books that agree."""
    state = read(gp)
    total, memory = state.rest, state.memory
    if memory is not None:
        total = total + state.posterior.project(memory.data.x, memory.sites)
        ids = memory.ids
        assert len(ids) == len(memory.keys) == len(memory.data) == len(memory.sites) > 0
        assert bool((ids.diff() > 0).all())
        assert 0 <= int(ids[0]) <= int(ids[-1]) < seen
    assert relative(state.posterior.site, total) < tol
    assert torch.linalg.eigvalsh(state.posterior.precision).min() > 0
    assert state.num_seen == int(gp.num_seen) == seen
    assert torch.equal(gp.inducing_points, state.basis.inducing_points)
    assert gp.posterior.basis.is_of(gp.kernel, gp.mean)
    mean, var = gp.predict(line(-2, 2, 7))
    assert bool(mean.isfinite().all())
    assert bool((var > -1e-9).all())


def snapshot(gp: DualGP) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    return copy.deepcopy(dict(gp.state_dict())), gp.generator.get_state()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) and v.dtype == b[k].dtype for k, v in a.items())


# --- whatever is done to it -----------------------------------------------------------------------

VERBS = st.one_of(
    st.tuples(st.just("update"), st.sampled_from([0, 1, 1, 2, 5, 9]), st.booleans()),
    st.tuples(st.just("update"), st.sampled_from([1, 4, 7]), st.booleans()),
    st.tuples(st.just("move"), st.integers(1, 7), st.booleans()),
    st.tuples(st.just("forget"), st.integers(1, 3), st.booleans()),
    st.tuples(st.just("fade"), st.sampled_from([1.0, 0.9, 0.3]), st.just(False)),
    st.tuples(st.just("reload"), st.just(0), st.just(False)),
    st.tuples(st.just("lengthscale"), st.floats(0.3, 1.5), st.just(False)),
    st.tuples(st.just("mean"), st.floats(-2, 2), st.just(False)),
)


@st.composite
def programmes(draw, learn: bool):
    name = draw(st.sampled_from(sorted(LIKELIHOODS)))
    options = draw(
        st.sampled_from(
            [{"memory": 4}, {"memory": 0}, {"memory": None}, {"memory": 3, "memory_rule": "random"}, {"window": 5}]
            + [{"memory": 6, "memory_rule": rule} for rule in ("sensitivity", "recency")]
        )
    )
    first = ("update", draw(st.sampled_from([1, 6])), False)
    verbs = draw(st.lists(VERBS, min_size=2, max_size=4 if learn else 8))
    return name, draw(st.booleans()), options, [first, *verbs], learn, draw(st.integers(0, 1000))


def run(programme, path) -> None:
    name, given_z, options, verbs, learn, seed = programme
    x, y = problem(name, 80, seed=seed)
    g = torch.Generator().manual_seed(seed)
    parts = lambda: (rbf(0.6), LIKELIHOODS[name]().double())  # noqa: E731
    mean = lambda: gpytorch.means.ConstantMean().double()  # noqa: E731
    place = {"inducing_points": Z} if given_z else {"num_inducing": 5}
    gp = DualGP(*parts(), mean=mean(), **place, **options)
    seen = 0
    for verb, number, flag in verbs:
        if verb == "update":
            rows = torch.arange(seen, seen + number)
            weights = 0.1 + 2 * torch.rand(number, generator=g, dtype=F64) if flag else None
            result = gp.update(x[rows], y[rows], weights=weights, learn_hyperparameters=learn)
            seen += number
            assert result.num_seen == seen
        elif verb == "move":
            old = gp.inducing_points
            add = 4 * torch.rand(number, 1, generator=g, dtype=F64) - 2
            gp.move_inducing(torch.cat([old, add]) if flag and len(old) < 8 else add)
        elif verb == "forget" and gp.memory is not None:
            ids = gp.memory.ids
            gone = ids[torch.randperm(len(ids), generator=g)[:number]]
            gp.forget(gone if flag else gone.flip(0))
            assert gp.memory is None or not torch.isin(gone, gp.memory.ids).any()
        elif verb == "fade":
            gp.fade(number)
        elif verb == "reload":
            gp.save(path)
            gp = DualGP.load(path, *parts(), mean=mean())
        elif verb == "lengthscale":
            gp.kernel.base_kernel.lengthscale = number
        elif verb == "mean":
            gp.mean.constant = number
        check_invariant(gp, seen)
        assert gp.window is None or gp.memory is None or len(gp.memory) <= gp.window


QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck)}
EVERYTHING = [("update", 6, False), ("lengthscale", 0.9, False), ("update", 4, True), ("move", 3, True)]
EVERYTHING += [("forget", 2, True), ("mean", 1.0, False), ("fade", 0.3, False), ("reload", 0, False)]
EVERYTHING += [
    ("forget", 3, False),
    ("update", 9, False),
    ("move", 1, False),
    ("update", 0, False),
    ("update", 1, True),
]


@settings(max_examples=10, **QUIET)
@given(programmes(learn=False))
@example(("gaussian", True, {"memory": 6}, EVERYTHING, False, 0))
@example(("bernoulli", False, {"memory": None}, EVERYTHING, False, 1))
@example(("softmax", False, {"memory": 4}, EVERYTHING, False, 2))
def test_posterior_is_prior_and_rest_and_memory_whatever_is_done(tmp_path_factory, programme):
    run(programme, tmp_path_factory.getbasetemp() / "programme")


@settings(max_examples=2, **QUIET)
@given(programmes(learn=True))
@example(("gaussian", False, {"memory": 4}, EVERYTHING, True, 0))
@example(("bernoulli", False, {"memory": 4}, EVERYTHING, True, 1))
def test_so_it_is_with_hyperparameters_learned(tmp_path_factory, programme):
    run(programme, tmp_path_factory.getbasetemp() / "programme")


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_at_hyperparameters_set_by_hand_rest_keeps_what_it_says_of_u_and_memory_what_it_says_of_f(name):
    """Dense, in u: rest has precision L⁻ᵀBL⁻¹ on u = f(Z) before and after; memory's sites stay on their f_i."""
    x, y = problem(name)
    gp = new(name, memory=7)
    gp.update(x, y, **FIXED)
    before = read(gp)

    def on_u(state):
        L_inv = state.basis.L_inv
        return L_inv.mT @ state.rest.B @ L_inv, (L_inv.mT @ state.rest.lam.unsqueeze(-1)).squeeze(-1)

    gp.kernel.base_kernel.lengthscale = torch.tensor(0.8, dtype=F64)
    after = read(gp)
    for was, now in zip(on_u(before), on_u(after), strict=True):
        assert gap(was, now) < 1e-7 * was.abs().max()
    assert torch.equal(before.memory.sites.lam, after.memory.sites.lam)
    assert torch.equal(before.memory.sites.beta, after.memory.sites.beta)
    check_invariant(gp, 40)


# --- what equals what -----------------------------------------------------------------------------


def by_hand(gp: DualGP, x: torch.Tensor, y: torch.Tensor, weights: torch.Tensor | None = None) -> Posterior:
    """Prior on the model's basis with the Gaussian sites of some data, all at once."""
    sites = gaussian_sites(gp.likelihood, Data(x, y, False, {}, weights))
    return Posterior(gp.posterior.basis).add(x, sites)


@pytest.mark.parametrize("sizes", [[40], [1] * 12 + [28], [13, 27], [5, 1, 30, 4]])
@pytest.mark.parametrize("rule", ["leverage", "random"])
def test_a_gaussian_stream_is_all_data_at_once(sizes, rule):
    x, y = problem("gaussian")
    gp = new(memory=6, memory_rule=rule)
    for rows in torch.arange(40).split(sizes):
        gp.update(x[rows], y[rows], **FIXED)
    assert relative(gp.posterior.site, by_hand(gp, x, y).site) < 1e-9


def test_the_order_of_gaussian_data_does_not_matter():
    x, y = problem("gaussian")
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    gp, other = new(memory=6), new(memory=6)
    for rows in torch.arange(40).split(8):
        gp.update(x[rows], y[rows], **FIXED)
        other.update(x[order[rows]], y[order[rows]], **FIXED)
    assert relative(gp.posterior.site, other.posterior.site) < 1e-9


@pytest.mark.parametrize("name", LIKELIHOODS)
@pytest.mark.parametrize("count", [1, 4, 7])
def test_to_forget_is_to_take_the_sites_out(name, count):
    x, y = problem(name)
    gp = new(name, memory=7)
    for rows in torch.arange(40).split(10):
        gp.update(x[rows], y[rows], **FIXED)
    q, memory = gp.posterior, gp.memory
    gone = memory.ids[torch.arange(count) * 3 % 7]
    gp.forget(gone)
    rows = memory.find(gone.sort().values)
    without = q.remove(memory.data.x[rows], memory.sites[rows])
    assert relative(gp.posterior.site, without.site) < 1e-9
    assert gp.memory is None if count == 7 else not torch.isin(gone, gp.memory.ids).any()
    check_invariant(gp, 40)


@pytest.mark.parametrize("count", [2, 8])
def test_when_memory_is_forgotten_each_datum_left_stands_for_as_many_as_before(count):
    x, y = problem("gaussian")
    gp = new(memory=8)
    for rows in torch.arange(30).split(10):
        gp.update(x[rows], y[rows], **FIXED)
    assert gp.num_rest == 22
    gp.forget(gp.memory.ids[:count])
    assert gp.num_rest == 22 * (8 - count) / 8
    gp.update(x[30:], y[30:], **FIXED)  # new data take the places of those that are gone
    assert gp.num_rest == 22 * (8 - count) / 8 + 10 - count


def test_a_gaussian_datum_forgotten_was_never_there():
    x, y = problem("gaussian")
    gp, never = new(memory=8), new(memory=8)
    for rows in torch.arange(40).split(10):
        gp.update(x[rows], y[rows], **FIXED)
    gone = gp.memory.ids[::2]
    left = torch.arange(40)[~torch.isin(torch.arange(40), gone)]
    gp.forget(gone)
    for rows in left.split(9):
        never.update(x[rows], y[rows], **FIXED)
    assert relative(gp.posterior.site, never.posterior.site) < 1e-9
    more = line(-1, 1, 5)
    gp.update(more, more[:, 0], **FIXED)
    never.update(more, more[:, 0], **FIXED)
    assert relative(gp.posterior.site, never.posterior.site) < 1e-9


@pytest.mark.parametrize("sizes", [[40], [1] * 15 + [25], [5] * 8, [3, 18, 12, 7]])
@pytest.mark.parametrize("window", [1, 12, 100])
def test_a_window_is_a_fit_to_the_last_data(sizes, window):
    x, y = problem("gaussian")
    gp, fit = new(window=window), new()
    for rows in torch.arange(40).split(sizes):
        gp.update(x[rows], y[rows], **FIXED)
    last = slice(max(0, 40 - window), None)
    fit.fit(x[last], y[last], learn_inducing=False, progress=False, **FIXED) if window > 1 else None
    batch = fit.posterior if window > 1 else by_hand(gp, x[last], y[last])
    assert relative(gp.posterior.site, batch.site) < 1e-9
    assert gp.memory.ids.tolist() == list(range(40))[last]


@pytest.mark.parametrize("name", ["bernoulli", "softmax"])
def test_outside_a_window_nothing_counts(name):
    """A window's posterior is its data's sites and the prior; a tighter E-step at them moves it by what left only."""
    x, y = problem(name)
    gp = new(name, window=30)
    for rows in torch.arange(40).split(5):
        gp.update(x[rows], y[rows], tol=1e-10, **FIXED)
    state = read(gp)
    assert state.rest.lam.abs().max() == state.rest.B.abs().max() == 0
    q = Posterior(state.basis).add(x[10:], state.memory.sites)
    assert relative(gp.posterior.site, q.site) < 1e-9


@pytest.mark.parametrize("sizes", [[40], [10] * 4, [3, 18, 12, 7], "fit"])
@pytest.mark.parametrize("name", ["bernoulli", "softmax"])
def test_sites_within_a_window_owe_nothing_to_what_left_it(name, sizes):
    x, y = problem(name)
    y = torch.cat([y[:28].flip(0), y[28:]])  # what left spoke otherwise
    gp, alone = new(name, window=12), new(name)
    if sizes == "fit":
        gp.fit(x, y, learn_inducing=False, progress=False, tol=1e-9, **FIXED)
        gp.update(x[:0], y[:0], **FIXED)
    else:
        for rows in torch.arange(40).split(sizes):
            gp.update(x[rows], y[rows], tol=1e-9, **FIXED)
    alone.update(x[28:], y[28:], tol=1e-9, **FIXED)
    assert gp.memory.ids.tolist() == list(range(28, 40))
    for found, expected in zip(gp.predict(x), alone.predict(x), strict=True):
        assert gap(found, expected) < (1e-3 if sizes == "fit" else 1e-5)


@pytest.mark.parametrize("factor", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("memory", [0, 5, 100])
def test_fading_before_each_update_weighs_by_age(factor, memory):
    x, y = problem("gaussian")
    gp = new(memory=memory)
    batches = torch.arange(40).split(8)
    for k, rows in enumerate(batches):
        if k:
            gp.fade(factor)
        gp.update(x[rows], y[rows], **FIXED)
    weights = torch.cat([torch.full((8,), factor**age, dtype=F64) for age in (4, 3, 2, 1, 0)])
    q = Posterior(gp.posterior.basis)
    noise = gp.likelihood.noise.item()
    for rows in batches:
        q = q.add(x[rows], Sites(weights[rows] * y[rows] / noise, weights[rows] / noise))
    assert relative(gp.posterior.site, q.site) < 1e-9


@pytest.mark.parametrize("name", LIKELIHOODS)
@pytest.mark.parametrize("memory", [0, 6])
def test_to_fade_is_to_scale_all_sites(name, memory):
    x, y = problem(name)
    gp = new(name, memory=memory)
    gp.update(x, y, **FIXED)
    q = gp.posterior
    gp.fade(0.4)
    gp.fade(0.5)
    assert relative(gp.posterior.site, q.scale(0.2).site) < 1e-12
    check_invariant(gp, 40)
    gp.fade(0.0)
    assert gp.posterior.site.B.abs().max() == 0
    assert gp.memory is None
    check_invariant(gp, 40)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_a_weight_of_two_is_the_datum_twice(name):
    """Both come to one fixed point: sites to the square root of the tolerance on the bound, or better."""
    x, y = problem(name, 20)
    gp, twice = new(name, memory=1000), new(name, memory=1000)
    for rows in torch.arange(20).split(10):
        gp.update(x[rows], y[rows], weights=torch.full((10,), 2.0), tol=1e-12, **FIXED)
        twice.update(x[rows].repeat(2, 1), y[rows].repeat(2), tol=1e-12, **FIXED)
    assert relative(gp.posterior.site, twice.posterior.site) < 1e-6
    assert gap(gp.memory.sites.beta[:10], 2 * twice.memory.sites.beta[:10]) < 1e-6 * gp.memory.sites.beta.max()


@pytest.mark.parametrize(
    ("name", "memory"), [("gaussian", 0), ("gaussian", 4), ("gaussian", 100), ("bernoulli", 100), ("softmax", 0)]
)
def test_a_weight_of_zero_is_no_datum(name, memory):
    x, y = problem(name, 30)
    gp, absent = new(name, memory=memory), new(name, memory=memory)
    counts = torch.arange(30) % 3 != 0
    for rows in torch.arange(30).split(15):
        gp.update(x[rows], y[rows], weights=counts[rows].double(), tol=1e-12, **FIXED)
        there = rows[counts[rows]]
        absent.update(x[there], y[there], tol=1e-12, **FIXED)
    assert relative(gp.posterior.site, absent.posterior.site) < (1e-9 if name == "gaussian" else 1e-6)
    check_invariant(gp, 30)


def test_weights_of_one_are_no_weights():
    x, y = problem("bernoulli")
    gp, plain = new("bernoulli", memory=5), new("bernoulli", memory=5)
    for k, rows in enumerate(torch.arange(40).split(10)):
        gp.update(x[rows], y[rows], weights=torch.ones(10) if k % 2 else None)
        plain.update(x[rows], y[rows])
    assert relative(gp.posterior.site, plain.posterior.site) < 1e-9
    assert gap(gp.kernel.base_kernel.lengthscale.detach(), plain.kernel.base_kernel.lengthscale.detach()) < 1e-9


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_to_move_to_a_larger_z_loses_nothing(name):
    x, y = problem(name)
    gp = DualGP(matern(), LIKELIHOODS[name]().double(), inducing_points=Z, memory=0, jitter=1e-12)
    gp.update(x, y, **FIXED)
    at_ = line(-2, 2, 30)
    mean, var = gp.predict(at_)
    gp.move_inducing(torch.cat([line(-1.4, 1.9, 4), Z]))
    for was, now in zip((mean, var), gp.predict(at_), strict=True):
        assert gap(was, now) < 1e-7
    gp.move_inducing(Z)  # and back: what was added had nothing of its own
    for was, now in zip((mean, var), gp.predict(at_), strict=True):
        assert gap(was, now) < 1e-7


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_a_stream_that_forgot_nothing_carries_nothing(name):
    """Its bound, with the gradient, and its sites at another Z are those with a `rest` that says nothing."""
    x, y = problem(name)
    gp = new(name, memory=100)
    gp.update(x, y, **FIXED)
    state = read(gp)
    assert state.holds_all
    hyper = gp._hyper(gp.kernel, gp.mean, gp.likelihood, state.basis.inducing_points, False, True)
    hyper.kernel.base_kernel.lengthscale = 0.5
    anchor, found = Anchor.of(state.basis, state.rest, state.noise), []
    for old in (anchor, None):
        value = stream_bound(hyper, state.memory.data, state.memory.sites, old)
        found.append([value, *torch.autograd.grad(value, hyper.trained())])
    for carried, plain in zip(*found, strict=True):
        assert gap(carried, plain) < 1e-10 * (1.0 + plain.abs().max().item())
    basis = state.basis.at(line(-1.4, 1.4, 9))
    moved = update_module.move(state, basis)
    assert relative(moved.posterior.site, moved.posterior.project(x, state.memory.sites)) < 1e-10
    gp.update(x[:1], y[:1], **FIXED)
    assert not replace(read(gp), num_rest=1.0).holds_all
    gp.memory_size = 5
    gp.update(x[:1], y[:1], **FIXED)
    assert not read(gp).holds_all


def test_a_deep_copy_goes_its_own_way():
    x, y = problem("gaussian")
    gp = new(given=False)
    gp.update(x[:20], y[:20])
    before, other = gp.predict(x), copy.deepcopy(gp)
    other.update(x[20:], y[20:])
    other.kernel.base_kernel.lengthscale = 3.0
    assert gap(other.predict(x)[0], before[0]) > 1e-3
    for now, then in zip(gp.predict(x), before, strict=True):
        assert torch.equal(now, then)


def test_outputs_of_a_stream_are_streams_of_their_own():
    x, y = problem("gaussian")
    targets = torch.stack([y, 0.5 - y.square()], -1)
    both = DualGP(rbf(0.6), gaussian(), inducing_points=Z, num_outputs=2, memory=6, memory_rule="recency")
    each = [new(memory=6, memory_rule="recency") for _ in range(2)]
    for rows in torch.arange(40).split(10):
        both.update(x[rows], targets[rows], **FIXED)
        for c, gp in enumerate(each):
            gp.update(x[rows], targets[rows, c], **FIXED)
    both.forget(both.memory.ids[:2])
    both.fade(0.7)
    check_invariant(both, 40)
    for c, gp in enumerate(each):
        gp.forget(gp.memory.ids[:2])
        gp.fade(0.7)
        assert gap(both.posterior.site.B[c], gp.posterior.site.B) < 1e-9 * gp.posterior.site.B.abs().max()
        assert gap(both.posterior.site.lam[c], gp.posterior.site.lam) < 1e-9 * gp.posterior.site.lam.abs().max()
        assert gap(both.memory.sites.lam[:, c], gp.memory.sites.lam) < 1e-9 * gp.memory.sites.lam.abs().max()


@pytest.mark.parametrize("memory", [None, 0, 5])
def test_a_batch_of_processes_is_a_stream_of_each(memory):
    x, y = problem("gaussian", 30)
    xs, ys = torch.stack([x, x + 0.1]), torch.stack([y, -2 * y])
    kernel_of_two = kernel(2)
    batch = DualGP(kernel_of_two, gaussian(), inducing_points=torch.stack([Z, Z + 0.1]), memory=memory)
    each = [DualGP(kernel(), gaussian(), inducing_points=Z + 0.1 * b, memory=memory) for b in range(2)]
    for rows in torch.arange(30).split(10):
        batch.update(xs[:, rows], ys[:, rows], **FIXED)
        for b, gp in enumerate(each):
            gp.update(xs[b, rows], ys[b, rows], **FIXED)
    assert (batch.memory is None) == (each[0].memory is None)
    for b, gp in enumerate(each):
        assert gap(batch.posterior.site.B[b], gp.posterior.site.B) < 1e-9 * gp.posterior.site.B.abs().max()
        assert gap(batch.posterior.site.lam[b], gp.posterior.site.lam) < 1e-9 * gp.posterior.site.lam.abs().max()


# --- what fails changes nothing -------------------------------------------------------------------


def nan_in(y: torch.Tensor) -> torch.Tensor:
    y = y.double().clone()
    y[1] = float("nan")
    return y


@pytest.mark.parametrize("name", LIKELIHOODS)
@pytest.mark.parametrize("begun", [False, True])
def test_a_refused_update_leaves_no_trace(name, begun):
    x, y = problem(name)
    gp = new(name, given=False, memory=5, memory_rule="random")
    if begun:
        gp.update(x[:20], y[:20])
    before, draw = snapshot(gp)
    bad = [
        lambda: gp.update(x[20:], nan_in(y[20:])),
        lambda: gp.update(nan_in(x[20:]), y[20:]),
        lambda: gp.update(x[20:], y[21:]),
        lambda: gp.update(x[20:], y[20:].unsqueeze(-1)),
        lambda: gp.update(x[20:, 0], y[20:]),
        lambda: gp.update(x[20:], y[20:], weights=-torch.ones(20)),
        lambda: gp.update(x[20:], y[20:], tol=0.0),
    ]
    for call in bad:
        with pytest.raises(errors.InputError), unchecked():
            call()
        after, now = snapshot(gp)
        assert same(before, after)
        assert torch.equal(draw, now)
        assert gp._posterior is None or begun


@pytest.mark.parametrize(
    ("name", "call", "error"),
    [
        ("gaussian", 1, KeyboardInterrupt),
        ("gaussian", 3, KeyboardInterrupt),
        ("bernoulli", 2, KeyboardInterrupt),
        ("softmax", 3, errors.NotPositiveDefiniteError),
    ],
)
def test_an_update_interrupted_leaves_no_trace(name, call, error, monkeypatch):
    x, y = problem(name)
    gp, never = (new(name, given=False, memory=5, memory_rule="random") for _ in range(2))
    for each in (gp, never):
        each.update(x[:20], y[:20])
    before, draw = snapshot(gp)
    honest, calls = update_module.e_step, []

    def breaks(*args, **options):
        calls.append(1)
        if len(calls) == call:
            raise error
        return honest(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(update_module, "e_step", breaks)
        with pytest.raises(error):
            gp.update(x[20:], y[20:])
    assert len(calls) == call
    after, now = snapshot(gp)
    assert same(before, after)
    assert torch.equal(draw, now)
    gp.update(x[20:], y[20:])  # and goes on as if nothing had happened
    never.update(x[20:], y[20:])
    assert same(snapshot(gp)[0], snapshot(never)[0])


def test_a_loader_that_breaks_half_way_leaves_what_came_before():
    x, y = problem("gaussian")

    def batches():
        yield x[:10], y[:10]
        yield x[10:20], y[10:20]
        yield x[20:], nan_in(y[20:])

    gp, two = new(given=False), new(given=False)
    with pytest.raises(errors.InputError, match="finite"):
        gp.update_all(batches(), progress=False)
    for rows in torch.arange(20).split(10):
        two.update(x[rows], y[rows])
    assert same(snapshot(gp)[0], snapshot(two)[0])


def test_to_forget_what_is_not_there_leaves_no_trace():
    x, y = problem("gaussian")
    gp = new(memory=5)
    gp.update(x, y)
    before, _ = snapshot(gp)
    out = torch.arange(40)[~torch.isin(torch.arange(40), gp.memory.ids)][:2]
    with pytest.raises(errors.InputError, match=rf"{out.tolist()}".replace("[", r"\[").replace("]", r"\]")):
        gp.forget(torch.cat([gp.memory.ids[:1], out]))
    assert same(before, snapshot(gp)[0])


# --- to stop and to go on -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        ("leverage", "gaussian"),
        ("sensitivity", "bernoulli"),
        ("random", "gaussian"),
        ("recency", "bernoulli"),
        ("balanced", "softmax"),
    ],
)
def test_a_stream_saved_and_loaded_at_every_batch_is_the_same_to_the_last_bit(rule, name, tmp_path):
    x, y = problem(name)
    make = lambda: new(name, given=False, memory=6, memory_rule=rule, generator=torch.Generator().manual_seed(9))  # noqa: E731
    through, stopped = make(), make()
    for rows in torch.arange(40).split([10, 1, 14, 15]):
        through.update(x[rows], y[rows])
        stopped.update(x[rows], y[rows])
        stopped.save(tmp_path / "stream")
        stopped = DualGP.load(tmp_path / "stream", rbf(), LIKELIHOODS[name]().double())
        assert same(snapshot(through)[0], snapshot(stopped)[0])
        assert torch.equal(through.generator.get_state(), stopped.generator.get_state())
    assert torch.equal(through.predict(x)[0], stopped.predict(x)[0])


def test_a_window_with_a_mean_and_a_state_dict_resumes_to_the_last_bit(tmp_path):
    x, y = problem("gaussian", 24)
    mean = lambda: gpytorch.means.ConstantMean().double()  # noqa: E731
    make = lambda: DualGP(rbf(), gaussian(), mean=mean(), num_inducing=5, window=10)  # noqa: E731
    through, stopped, copied = make(), make(), make()
    for rows in torch.arange(24).split(8):
        for gp in (through, stopped, copied):
            gp.update(x[rows], y[rows])
        stopped.save(tmp_path / "stream")
        stopped = DualGP.load(tmp_path / "stream", rbf(), gaussian(), mean=mean())
        assert stopped.window == 10
        fresh = make()
        fresh.load_state_dict(copied.state_dict())
        fresh.generator.set_state(copied.generator.get_state())
        copied = fresh
        assert same(snapshot(through)[0], snapshot(stopped)[0])
        assert same(snapshot(through)[0], snapshot(copied)[0])


SCRIPT = """
    import os, signal, sys
    sys.path[:0] = [{tests!r}, {gp!r}]
    import torch
    torch.set_num_threads(1)
    import test_stream_laws as laws
    x, y = laws.problem("bernoulli")
    gp = laws.new("bernoulli", given=False, memory=6, memory_rule="random")
    honest, calls = laws.update_module.e_step, []
    def killed(*args, **options):
        calls.append(1)
        if int(gp.num_seen or 0) == 20 and len(calls) > 5:  # inside the third batch
            os.kill(os.getpid(), signal.SIGKILL)
        return honest(*args, **options)
    laws.update_module.e_step = killed
    for rows in torch.arange(40).split(10):
        gp.update(x[rows], y[rows])
        gp.save({path!r})
    raise SystemExit("was not killed")
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_a_stream_killed_goes_on_from_its_file_to_the_last_bit(tmp_path):
    here = os.path.dirname(__file__)
    path = tmp_path / "stream"
    script = textwrap.dedent(SCRIPT).format(tests=os.path.dirname(here), gp=here, path=str(path))
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["stream"]
    x, y = problem("bernoulli")
    resumed = DualGP.load(path, rbf(), BernoulliLikelihood().double())
    through = new("bernoulli", given=False, memory=6, memory_rule="random")
    for k, rows in enumerate(torch.arange(40).split(10)):
        through.update(x[rows], y[rows])
        if k >= 2:
            resumed.update(x[rows], y[rows])
        if k == 1:
            assert int(resumed.num_seen) == 20
            assert same(snapshot(through)[0], snapshot(resumed)[0])
    assert same(snapshot(through)[0], snapshot(resumed)[0])


# --- over time ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [("gaussian", {"window": 6}), ("bernoulli", {"memory": 5}), ("gaussian", {"memory": 5, "memory_rule": "random"})],
)
def test_the_state_does_not_grow(options, name):
    x, y = problem(name, 240)
    gp = new(name, given=False, **options)
    sizes = []
    for k, rows in enumerate(torch.arange(240).split(4)):
        gp.update(x[rows], y[rows], learn_hyperparameters=k in (5, 20))
        sizes.append(sum(v.numel() for v in gp.state_dict().values()))
    assert len(sizes) == 60
    assert set(sizes[10:]) == {max(sizes)}
    assert gp.inducing_points.shape == (5, 1)
    check_invariant(gp, 240)


def test_new_classes_may_appear_at_any_time():
    """Classes 0, 1, 2 live left, middle and right; each comes in its own batches, and is told from the others."""
    x = line(-1.5, 1.5, 60)
    y = torch.arange(3).repeat_interleave(20)
    gp = DualGP(kernel(), softmax(), num_inducing=8, memory=12, memory_rule="balanced")
    for k, rows in enumerate(torch.arange(60).split(10)):
        gp.update(x[rows], y[rows])
        assert sorted(gp.memory.data.y.unique().tolist()) == list(range(k // 2 + 1))
        check_invariant(gp, 10 * (k + 1))
    probabilities = gp.predict_likelihood(at(-1.0, 0.0, 1.0).unsqueeze(-1)).probs
    assert probabilities.argmax(-1).tolist() == [0, 1, 2]
    assert probabilities.max(-1).values.min() > 0.5


# --- fit, then update -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", LIKELIHOODS)
@pytest.mark.parametrize("options", [{}, {"memory": 0}, {"memory": 6}, {"memory": 100}, {"window": 9}])
def test_a_stream_goes_on_from_a_fit(name, options):
    x, y = problem(name)
    gp = new(name, given=False, **options)
    gp.fit(x[:25], y[:25], progress=False, learn_inducing=False, **FIXED)
    kept = gp.predict(x)
    check_invariant(gp, 25)
    if "window" not in options:  # memory is chosen from the fit's own sites: nothing moves
        plain = new(name, given=False)
        plain.fit(x[:25], y[:25], progress=False, learn_inducing=False, **FIXED)
        for a, b in zip(kept, plain.predict(x), strict=True):
            assert gap(a, b) < 1e-9
        assert gap(gp.sites.beta, plain.sites.beta) < 1e-12
    for rows in torch.arange(25, 40).split(5):
        result = gp.update(x[rows], y[rows], learn_hyperparameters=int(rows[-1]) == 39)
        check_invariant(gp, int(rows[-1]) + 1)
        assert result.num_seen == int(rows[-1]) + 1
    with pytest.raises(errors.NotFittedError):
        _ = gp.sites


def test_a_gaussian_fit_then_updates_are_all_data_at_once():
    x, y = problem("gaussian")
    for options in ({}, {"memory": 7}, {"memory": 0}):
        gp = new(**options)
        gp.fit(x[:25], y[:25], progress=False, learn_inducing=False, **FIXED)
        for rows in torch.arange(25, 40).split(5):
            gp.update(x[rows], y[rows], **FIXED)
        assert relative(gp.posterior.site, by_hand(gp, x, y).site) < 1e-9


def test_a_fit_after_a_stream_starts_anew():
    x, y = problem("gaussian")
    gp, fresh = (new(memory=5, memory_rule="leverage") for _ in range(2))  # nothing drawn
    gp.update(x[:20] + 0.1, -y[:20], **FIXED)
    for each in (gp, fresh):
        each.fit(x[20:], y[20:], progress=False, learn_inducing=False, **FIXED)
        each.update(x[:5], y[:5], **FIXED)
        check_invariant(each, 25)
    assert relative(gp.posterior.site, fresh.posterior.site) == 0


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_a_stream_goes_on_from_a_fit_by_a_loader(name):
    x, y = problem(name)
    gp = new(name, memory=5)
    loader = DataLoader(TensorDataset(x[:30], y[:30]), batch_size=10)
    gp.fit(loader, progress=False, learn_inducing=False, **FIXED)
    check_invariant(gp, 30)
    assert gp.memory is None
    for rows in torch.arange(30, 40).split(5):
        gp.update(x[rows], y[rows], **FIXED)
        check_invariant(gp, int(rows[-1]) + 1)
        assert len(gp.memory) == 5
        assert int(gp.memory.ids[0]) >= 30
    if name == "gaussian":
        assert relative(gp.posterior.site, by_hand(gp, x, y).site) < 1e-9


def test_a_loader_of_updates_is_updates():
    x, y = problem("bernoulli")
    gp, one_by_one = new("bernoulli", given=False), new("bernoulli", given=False)
    gp.update_all(DataLoader(TensorDataset(x, y), batch_size=16), progress=False, **FIXED)
    for rows in torch.arange(40).split(16):
        one_by_one.update(x[rows], y[rows], **FIXED)
    assert same(snapshot(gp)[0], snapshot(one_by_one)[0])
    problem_ = FAMILIES["fixed noise"]()
    data = TensorDataset(problem_.x, problem_.y, problem_.params["noise"])
    noisy = DualGP(problem_.gp.kernel, problem_.gp.likelihood, num_inducing=6)
    assert noisy.update_all(DataLoader(data, batch_size=20), progress=False).num_seen == 60
    check_invariant(noisy, 60)


# --- odd batches ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_an_empty_batch_is_no_batch(name):
    x, y = problem(name)
    gp = new(name, given=False, memory=5, memory_rule="random")
    before, draw = snapshot(gp)
    assert gp.update(x[:0], y[:0]).num_seen == 0
    assert same(before, snapshot(gp)[0])
    gp.update(x, y)
    before, draw = snapshot(gp)
    posterior = gp.posterior
    result = gp.update(x[:0], y[:0], weights=torch.ones(0))
    assert (result.num_seen, result.num_inducing, result.num_memory) == (40, 5, 5)
    assert same(before, snapshot(gp)[0])
    assert torch.equal(draw, gp.generator.get_state())
    assert gp.posterior is posterior


def test_inputs_of_another_dtype_are_refused():
    x, y = problem("gaussian")
    gp = new(given=False)
    gp.update(x[:20], y[:20])
    before, draw = snapshot(gp)
    with pytest.raises(errors.InputError, match=r"float64 .*float32.*X\.to"):
        gp.update(x[20:].float(), y[20:])
    assert same(before, snapshot(gp)[0])
    assert torch.equal(draw, gp.generator.get_state())
    single = DualGP(rbf().float(), gaussian().float(), num_inducing=5)
    single.update(x[:20].float(), y[:20].float(), **FIXED)
    assert single.predict(x[:3].float())[0].dtype == torch.float32
    with pytest.raises(errors.InputError, match=r"float32 .*float64"):
        single.update(x[20:], y[20:])
    check = read(single)
    assert check.rest.B.dtype == torch.float64


def test_what_the_user_does_to_his_tensors_later_does_not_matter():
    x, y = (t.clone() for t in problem("gaussian"))
    weights = torch.ones(40, dtype=F64)
    gp = new(memory=100)
    gp.update(x, y, weights=weights, **FIXED)
    before, _ = snapshot(gp)
    for t in (x, y, weights):
        t.zero_()
    assert same(before, snapshot(gp)[0])


def test_inputs_with_a_gradient_leave_no_graph_behind():
    x, y = problem("gaussian")
    gp = new(memory=100)
    gp.update(x.clone().requires_grad_(), y, **FIXED)
    assert not any(v.requires_grad for k, v in gp.named_buffers())
    check_invariant(gp, 40)


# --- what once went wrong ---------------------------------------------------------------------------


def noisy_waves() -> tuple[torch.Tensor, torch.Tensor]:
    x, f, g = waves(40, 1)
    return x, f + 0.3 * torch.randn(40, generator=g, dtype=F64)


def test_a_weight_of_zero_leaves_hyperparameters_learnable():
    x, y = noisy_waves()
    gp = DualGP(rbf(), gaussian(), num_inducing=6, memory=0)
    w = torch.ones(10, dtype=F64)
    w[0] = 0.0
    for rows in torch.arange(40).split(10):
        gp.update(x[rows], y[rows], weights=w)
    assert gp.noise_statistics.isfinite().all()
    assert gp.noise_statistics[1] == 36


def test_noise_set_by_hand_means_the_same_whether_or_not_the_kernel_was_touched():
    x, y = noisy_waves()

    def run(nudge: float) -> torch.Tensor:
        gp = DualGP(rbf(0.6), gaussian(0.09), inducing_points=line(-1.5, 1.5, 6), memory=0)
        gp.update(x[:30], y[:30], learn_hyperparameters=False)
        gp.likelihood.noise = torch.tensor(0.9, dtype=F64)
        gp.kernel.base_kernel.lengthscale = gp.kernel.base_kernel.lengthscale.detach() * (1 + nudge)
        gp.update(x[30:], y[30:], learn_hyperparameters=False)
        return torch.cat(gp.predict(x))

    whole = DualGP(rbf(0.6), gaussian(0.9), inducing_points=line(-1.5, 1.5, 6), memory=0)
    whole.update(x, y, learn_hyperparameters=False)
    assert gap(run(0.0), torch.cat(whole.predict(x))) < 1e-9
    assert gap(run(1e-10), run(0.0)) < 1e-6


def test_a_fit_whose_memory_rule_fails_leaves_the_model_as_it_was():
    x, y = noisy_waves()
    gp = DualGP(rbf(), gaussian(), num_inducing=6, memory=5, memory_rule="balanced")
    draw = gp.generator.get_state()
    with pytest.raises(errors.InputError, match="label"):
        gp.fit(x, y)
    assert gp.site_lam is None
    assert torch.equal(draw, gp.generator.get_state())


def test_data_that_hardly_count_do_not_keep_their_places_in_memory():
    x, y = noisy_waves()
    gp = DualGP(rbf(), gaussian(), num_inducing=10, memory=10, memory_rule="leverage")
    w = torch.ones(40, dtype=F64)
    w[:20] = 1e-6
    gp.update(x, y, weights=w, learn_hyperparameters=False)
    assert gp.memory.ids.min() >= 20


# --- the noise statistics follow the mean -----------------------------------------------------------


def with_mean(mean: gpytorch.means.Mean, memory: int = 0) -> tuple[DualGP, torch.Tensor, torch.Tensor]:
    """A stream whose Z holds all inputs, so that what is forgotten can be read at any mean, exactly."""
    x, f, g = waves(30, 1, seed=3)
    y = f + 2.0 + 1.5 * x[:, 0] + 0.3 * torch.randn(30, generator=g, dtype=F64)
    gp = DualGP(rbf(0.6), gaussian(), mean=mean.double(), inducing_points=x, memory=memory, jitter=1e-10)
    return gp, x, y


def power(gp: DualGP, x: torch.Tensor, y: torch.Tensor) -> float:
    """Σ β((y − μ)² + r) of data, from the definition; r = 0 where Z holds them."""
    return float(((y - gp.mean(x)).square().sum() / gp.likelihood.noise).detach())


@pytest.mark.parametrize("memory", [0, 8])
@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("mean", [gpytorch.means.ConstantMean, lambda: gpytorch.means.LinearMean(1)])
def test_what_is_forgotten_says_of_the_noise_what_its_data_would(mean, by_hand, memory):
    gp, x, y = with_mean(mean(), memory)
    torch.nn.init.constant_(next(gp.mean.parameters()), 0.0)
    for rows in torch.arange(30).split(10):
        gp.update(x[rows], y[rows], learn_hyperparameters=not by_hand, move_inducing=False)
    if by_hand:
        with torch.no_grad():
            for p in gp.mean.parameters():
                p.add_(0.7)
    state = read(gp)
    held = torch.arange(0) if state.memory is None else state.memory.ids
    gone = torch.tensor([i for i in range(30) if i not in held.tolist()])
    assert gp.posterior.site.lam.isfinite().all()  # the posterior is read under the mean that is set
    state = read(gp)
    assert state.noise.num_data == len(gone)
    assert abs(state.noise.power / power(gp, x[gone], y[gone]) - 1.0) < 1e-3


@pytest.mark.parametrize("mean", [gpytorch.means.ConstantMean, lambda: gpytorch.means.LinearMean(1)])
def test_a_stream_with_a_learned_mean_learns_what_a_fit_learns(mean):
    g = torch.Generator().manual_seed(0)
    x = torch.rand(200, 1, generator=g, dtype=F64) * 4 - 2
    y = (3 * x[:, 0]).sin() + 0.5 * x[:, 0] + 1.0 + 0.1 * torch.randn(200, generator=g, dtype=F64)
    models = [DualGP(rbf(), gaussian(), mean=mean().double(), num_inducing=20, memory=20) for _ in range(2)]
    models[0].update_all(zip(x.split(20), y.split(20), strict=True), progress=False)
    models[1].fit(x, y, progress=False)
    stream, fit = (gp.likelihood.noise.item() for gp in models)
    assert abs(stream / fit - 1.0) < 0.05  # 200 data say the noise variance to a tenth
    assert abs(models[0].nlpd(x, y) - models[1].nlpd(x, y)) < 0.02


# --- hyperparameters on little data -----------------------------------------------------------------


def test_a_stream_sorted_by_label_still_learns_its_lengthscale():
    """Data of one class leave the lengthscale free to grow, to where the other class finds a poor optimum (.6 here)."""
    g = torch.Generator().manual_seed(0)
    x = torch.rand(200, 1, generator=g, dtype=F64) * 4 - 2
    y = ((3 * x[:, 0]).sin() + 0.1 * torch.randn(200, generator=g, dtype=F64) > 0).double()
    gp = DualGP(gpytorch.kernels.ScaleKernel(rbf()).double(), BernoulliLikelihood(), num_inducing=20, memory=20)
    for rows in y.argsort(stable=True).split(20):
        gp.update(x[rows], y[rows])
    assert gp.nlpd(x, y) < 0.2


def test_the_guard_is_a_normal_prior_about_the_start(tmp_path):
    x, y = problem("gaussian")
    gp = new(given=False)
    gp.update(x[:20], y[:20])
    assert gp.log_start is not None
    hyper = gp._hyper(gp.kernel, gp.mean, gp.likelihood, gp.inducing_points, False, True)
    without = hyper.log_prior()
    start = gp.log_start.clone()
    assert torch.equal(hyper.guard(start), start)
    logs = torch.cat([torch.nn.functional.softplus(p).flatten() for p in hyper.trained()]).log()
    assert logs.shape == start.shape == (3,)  # noise, amplitude, lengthscale
    assert gap(hyper.log_prior() - without, -0.5 * ((logs - start) / 2.0).square().sum()) < 1e-12
    assert not torch.equal(logs, start)
    gp.update(x[20:], y[20:])
    assert torch.equal(gp.log_start, start)
    gp.save(tmp_path / "gp.safetensors")
    loaded = DualGP.load(tmp_path / "gp.safetensors", rbf(), gaussian())
    assert torch.equal(loaded.log_start, start)
    with torch.no_grad():
        gp.kernel.outputscale = 3.0  # set by hand: a start of its own
    assert gp.posterior is not None
    assert gp.log_start is None
