"""Whatever comes in, a call succeeds with finite numbers or refuses by name, and a refusal has changed nothing."""

import copy

import hostile
import matplotlib.pyplot as plt
import pytest
import torch
from hostile import CLASSES, LABELS, SOFTMAX, X, Y
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import TensorDataset
from toys import F64, same_bits, unchecked

from dualgp import DualGP, WeightPosterior, WeightSite, active, leverage, merge, network_gp, plotting, transfer
from dualgp.errors import InputError

QUICK = settings(max_examples=120, derandomize=True, deadline=None)
SLOW = settings(max_examples=3000, derandomize=False, deadline=None)


@st.composite
def spoiled(draw) -> tuple[str, list[tuple[str, str]]]:
    """A call, and one or two of its arguments with the ways in which they are spoiled."""
    name = draw(st.sampled_from(sorted({name for name, *_ in hostile.everything()})))
    given = hostile.calls()[name].given
    args = draw(
        st.lists(st.sampled_from(sorted(arg for arg in given if hostile.ways(given[arg]))), min_size=1, max_size=2)
    )
    return name, [(arg, draw(st.sampled_from(sorted(hostile.ways(given[arg]))))) for arg in args]


@QUICK
@given(spoiled())
def test_hostile_arguments_are_refused_by_name_or_do_no_harm(case):
    name, ways = case
    assert hostile.obey(name, *ways) is None


@pytest.mark.slow
@SLOW
@given(spoiled())
def test_many_more_hostile_arguments(case):
    name, ways = case
    assert hostile.obey(name, *ways) is None


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", sorted(hostile.calls()))
def test_every_argument_spoiled_in_every_way(name):
    found = {(a, w): hostile.obey(name, (a, w)) for n, a, w in hostile.everything() if n == name}
    assert {case: wrong for case, wrong in found.items() if wrong} == {}


@pytest.mark.filterwarnings("ignore")  # some fits are short
def test_the_arguments_that_are_spoiled_are_right():
    assert {name: wrong for name in hostile.calls() if (wrong := hostile.obey(name))} == {}
    with unchecked():
        for call in hostile.calls().values():
            call.how(call.of(), **call.given)


@pytest.mark.filterwarnings("ignore")  # some fits are short
def test_what_is_made_is_where_the_data_are_whatever_the_default_device(device):
    """A tensor that named no device would not come through: "meta" has no values, and a GPU meets the CPU."""
    default = device if device.type == "cuda" else torch.device("meta")
    for call in hostile.calls().values():
        subject = call.of()
        with unchecked(), default:
            call.how(subject, **call.given)


# --- tensors that change after the call -----------------------------------------------------------


def _update(x, y):
    gp = hostile.new_gp()
    gp.update(x, y, learn_hyperparameters=False)
    return gp.predict


def _fit(x, y):
    gp = hostile.new_gp()
    gp.fit(x, y, learn_hyperparameters=False, learn_inducing=False, progress=False)
    return gp.predict


def _window(x, y):
    gp = hostile.window_gp()
    gp.update(x, y, learn_hyperparameters=False)

    def after(at):
        later = copy.deepcopy(gp)  # what memory holds shows in what comes next
        later.update(hostile.X + 0.1, hostile.Y, learn_hyperparameters=False)
        return later.predict(at)

    return after


def _inducing(x, y):
    gp = hostile.gp()
    gp.move_inducing(x)
    return gp.predict


def _exact(x, y):
    gp = hostile.exact()
    gp.fit(x, y, learn_hyperparameters=False, progress=False)
    return gp.predict


def _network(x, y):
    q = network_gp(hostile.net(), (x, (y > 0.5).long()), SOFTMAX, inducing_inputs=x)
    return q.predict


def _pool(x, y):
    loop = active.PoolLoop(hostile.gp(), x, "variance")
    loop.tell([0, 1], y[:2])
    return lambda at: (loop.left.clone(), loop.model.predict(at))


def _weights(x, y):
    q = WeightPosterior(
        hostile.layout(),
        WeightSite(x.flatten()[:21], y.repeat(2)[:21].abs() + 1),
        prior_mean=y.repeat(2)[:21],
        prior_precision=1.0,
    )
    return lambda at: (q.mean, q.precision, q.prior_mean)


KEEP = {
    "update": _update,
    "fit": _fit,
    "window": _window,
    "move_inducing": _inducing,
    "exact": _exact,
    "network": _network,
    "condition": lambda x, y: hostile.gp().condition(x, y).predict,
    "posterior": lambda x, y: hostile.posterior().add(x, hostile.Sites(y, y.abs())).predict,
    "pool": _pool,
    "weights": _weights,
    "memory set": lambda x, y: (lambda m: lambda at: (m.x, m.y, m.f))(transfer.MemorySet.of(hostile.net(), x, y)),
}


@pytest.mark.parametrize("kind", KEEP)
def test_tensors_that_change_after_the_call_change_nothing(kind):
    x, y = X.clone(), Y.clone()
    ask = KEEP[kind](x, y)
    before = copy.deepcopy(ask(hostile.AT))
    x.fill_(7.0)
    y.fill_(-3.0)
    assert same_bits(ask(hostile.AT), before)


@pytest.mark.parametrize("name", sorted(n for n, c in hostile.calls().items() if "generator" in c.given))
def test_equal_seeds_give_equal_results(name):
    call = hostile.calls()[name]
    results = []
    for seed in (3, 3):
        torch.manual_seed(len(results))  # the global state has no say
        subject = call.of()
        result = call.how(subject, **{**call.given, "generator": hostile.seeded(seed)})
        shown = result if isinstance(result, torch.Tensor) else hostile.state(result)
        if isinstance(subject, DualGP):
            shown = (shown, hostile.state(subject)) if isinstance(result, torch.Tensor) else hostile.state(subject)
        results.append(shown)
    assert same_bits(*results)


def test_a_stream_of_a_seed_is_one_stream():
    ends = []
    for _ in range(2):
        torch.manual_seed(len(ends))
        gp = DualGP(
            hostile.kernel(), hostile.BernoulliLikelihood(), num_inducing=4, memory=5, generator=hostile.seeded(9)
        )
        for rows in range(0, 12, 4):
            gp.update(X[rows : rows + 4], LABELS[rows : rows + 4])
        ends.append(hostile.state(gp))
    assert same_bits(*ends)


def test_classes_of_another_device_are_refused_by_name():
    for name, arg in (
        ("update", "y"),
        ("update", "X"),
        ("predict", "x"),
        ("Posterior.predict", "x"),
        ("network.nlpd", "y"),
    ):
        assert hostile.obey(name, (arg, "meta")) is None
    assert CLASSES.dtype == torch.int64
    assert X.dtype == F64


def test_what_is_no_posterior_of_the_kind_that_is_asked_for_is_refused_by_name():
    exact, gp = hostile.exact(), hostile.gp()
    fig, ax = plt.subplots()
    for match, call in (
        ("as posteriors over weights, got Posterior", lambda: merge([gp.posterior, gp.posterior])),
        (r"ExactGP; of an ExactGP, give its posterior\(\)", lambda: leverage(exact, X, exact.sites)),
        ("a model that has one, got dict", lambda: leverage({}, X, exact.sites)),
        (r"got ExactGP; of an ExactGP, its posterior\(\)", lambda: plotting.plot_posterior_1d(ax, exact, X[:, :1])),
        ("got Conditioned", lambda: plotting.plot_posterior_1d(ax, gp.condition(X[:2], Y[:2]), X[:, :1])),
        ("must be a torch.Tensor, got list; a loader gives both", lambda: gp.fit(X.tolist(), Y)),
        (r"TensorDataset has no batches: give DataLoader\(dataset", lambda: gp.fit(TensorDataset(X, Y))),
    ):
        with unchecked(), pytest.raises(InputError, match=match):
            call()
    assert not ax.lines
    plt.close(fig)
