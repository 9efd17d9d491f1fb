"""The loop over a pool: a value that gives the same again, wherever it was stopped."""

import copy
import functools

import pytest
import torch
from gpytorch.likelihoods import BernoulliLikelihood
from netproblems import NET, SOFTMAX, Y
from netproblems import X as X_NET
from toys import F64, gap, gaussian, line, matern, unchecked, waves

from dualgp import DualGP, errors, network_gp
from dualgp.active import PoolLoop, Stop, learn_more, select

X, F, _ = waves(60, 2)
LABELS = (F > 0).double()


def model(likelihood=None) -> DualGP:
    return DualGP(matern(0.9, 2.0), likelihood or BernoulliLikelihood(), num_inducing=20, memory=40)


def held(gp: DualGP, x: torch.Tensor, y: torch.Tensor) -> DualGP:
    """Learn sites only, which is quick."""
    gp = copy.deepcopy(gp)
    gp.update(x, y, learn_hyperparameters=False)
    return gp


def loop(rule="bald", learn=held, **options) -> PoolLoop:
    return PoolLoop(model(), X, rule, learn=learn, **options).tell(torch.arange(8), LABELS[:8])


def go(from_: PoolLoop, rounds: int, count: int = 3) -> PoolLoop:
    for _ in range(rounds):
        ids = from_.ask(count)
        from_ = from_.tell(ids, LABELS[ids])
    return from_


@pytest.mark.parametrize("rule", ["bald", "random", "entropy"])
def test_the_same_again_under_a_generator(rule):
    ends = [go(loop(rule, generator=torch.Generator().manual_seed(s)), 3) for s in (1, 1, 2)]
    assert torch.equal(ends[0].ids, ends[1].ids)
    assert torch.equal(ends[0].model.predict(X)[0], ends[1].model.predict(X)[0])
    if rule == "random":
        assert not torch.equal(ends[0].ids, ends[2].ids)


@pytest.mark.parametrize(("rule", "learn"), [("bald", learn_more), ("random", held)])
def test_a_loop_that_was_stopped_goes_on_to_the_same_last_bit(rule, learn, tmp_path):
    whole = go(loop(rule, learn, generator=torch.Generator().manual_seed(4)), 4)
    half = go(loop(rule, learn, generator=torch.Generator().manual_seed(4)), 2)
    torch.save(half.state_dict(), tmp_path / "loop.pt")
    state = torch.load(tmp_path / "loop.pt", weights_only=True)
    resumed = go(PoolLoop(model(), X, rule, learn=learn).load_state_dict(state), 2)
    assert torch.equal(resumed.ids, whole.ids)
    assert torch.equal(resumed.y, whole.y)
    assert torch.equal(resumed.best.nan_to_num(-1.0), whole.best.nan_to_num(-1.0))
    assert torch.equal(resumed.model.predict(X)[0], whole.model.predict(X)[0])


def test_each_round_of_a_fair_sample_is_drawn_anew():
    start = PoolLoop(model(), X, "random", learn=lambda gp, x, y: gp)
    positions = []
    for _ in range(4):
        ids = start.ask(5)
        positions.append(tuple(torch.searchsorted(start.left, ids).tolist()))
        start = start.tell(ids, LABELS[ids])
    assert len(set(positions)) == 4


def test_it_is_a_value():
    gp = model()
    start = PoolLoop(gp, X).tell(torch.arange(8), LABELS[:8])
    ids = start.ask(3)
    before = copy.deepcopy(start.model.predict(X))
    after = start.tell(ids, LABELS[ids])
    assert len(start.ids) == 8
    assert len(after.ids) == 11
    assert torch.equal(start.ask(3), ids)
    assert all(torch.equal(a, b) for a, b in zip(start.model.predict(X), before, strict=True))
    with pytest.raises(errors.NotFittedError):
        _ = gp.posterior


def test_what_is_asked_is_what_select_says_of_the_rest():
    start = loop()
    found = select(start.model, X[8:], 3, "bald")
    assert torch.equal(start.ask(3), found.indices + 8)
    after = start.tell(start.ask(3), LABELS[start.ask(3)])
    assert gap(after.best[-1], found.scores.max()) < 1e-12
    assert bool(after.best[0].isnan())


def test_the_model_is_that_of_a_stream():
    """Of which hyperparameters are learned at 8 and at 10 data, not at 9 and 11: the steps are powers of 1.25."""
    end = go(loop(learn=None), 3, count=1)
    gp = model()
    for start, stop, learn in ((0, 8, True), (8, 9, False), (9, 10, True), (10, 11, False)):
        ids = end.ids[start:stop]
        gp.update(X[ids], LABELS[ids], learn_hyperparameters=learn)
    assert torch.equal(end.model.predict(X)[0], gp.predict(X)[0])


def test_hyperparameters_every_time():
    every = functools.partial(learn_more, growth=1)
    end = go(loop(learn=every), 2, count=1)
    gp = model()
    for ids in (end.ids[:8], end.ids[8:9], end.ids[9:]):
        gp.update(X[ids], LABELS[ids])
    assert torch.equal(end.model.predict(X)[0], gp.predict(X)[0])
    with pytest.raises(errors.InputError, match="at least 1"):
        learn_more(gp, X, LABELS, growth=0.5)


def test_a_refit_is_given_all_data():
    seen = []

    def refit(given: DualGP, x: torch.Tensor, y: torch.Tensor) -> DualGP:
        seen.append(len(x))
        gp = copy.deepcopy(given)
        gp.fit(x, y, learn_hyperparameters=False)
        return gp

    gp = DualGP(matern(0.9, 2.0), BernoulliLikelihood())
    end = go(PoolLoop(gp, X, learn=refit, all_data=True).tell(torch.arange(8), LABELS[:8]), 2)
    assert seen == [8, 11, 14]
    whole = DualGP(matern(0.9, 2.0), BernoulliLikelihood())
    whole.fit(X[end.ids], LABELS[end.ids], learn_hyperparameters=False)
    assert gap(end.model.predict(X)[0], whole.predict(X)[0]) < 1e-9


def test_a_network():
    q = network_gp(NET, (X_NET[:10], Y[:10]), SOFTMAX, prior_precision=0.7)
    pool = X_NET[10:]
    end = PoolLoop(q, pool, "entropy", stop=Stop(budget=8)).run(lambda ids: Y[10:][ids], 3)
    assert len(end.ids) == 8
    assert end.model.num_data == 18
    assert q.num_data == 10
    want = q.condition(pool[end.ids], Y[10:][end.ids])
    assert gap(end.model.predict(pool)[1], want.predict(pool)[1]) < 1e-8


# --- the end --------------------------------------------------------------------------------------


def test_the_budget(capsys):
    end = loop(stop=Stop(budget=15)).run(lambda ids: LABELS[ids], 4, progress=True)
    assert len(end.ids) == 15
    assert end.done
    assert "budget of 15" in end.why
    assert "15/15" in capsys.readouterr().err


def test_a_pool_that_runs_dry():
    end = loop("random").run(lambda ids: LABELS[ids], 25)
    assert sorted(end.ids.tolist()) == list(range(60))
    assert "dry" in end.why
    assert len(end.left) == 0
    with pytest.raises(errors.InputError, match="0 of the pool's 60 rows are left"):
        end.ask()


def test_nothing_more_to_learn():
    gp = DualGP(matern(0.9, 2.0), gaussian(), num_inducing=30, memory=0)
    x = line(-1, 1, 300)
    end = PoolLoop(
        gp, x, "variance", learn=held, stop=Stop(tol=0.05, patience=2), generator=torch.Generator().manual_seed(0)
    )
    end = end.tell([0, 299], x[[0, 299], 0]).run(lambda ids: x[ids, 0])
    assert "below 0.05 for 2 rounds" in end.why
    assert len(end.ids) < 60
    assert bool((end.best[-2:] < 0.05).all())
    assert float(end.best[-3]) >= 0.05


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pool", "message"),
    [
        (X[:0], "at least one row"),
        (torch.cat([X, X[:2] * torch.nan]), "2 of 62 rows hold NaN"),
        (torch.cat([X, X[3:5]]), r"2 rows twice, the first being rows \["),
    ],
)
def test_a_pool_that_is_none(pool, message):
    with pytest.raises(errors.InputError, match=message):
        PoolLoop(model(), pool)


def test_duplicates_are_data_of_their_own_if_you_say_so():
    assert len(PoolLoop(model(), torch.cat([X, X]), duplicates=True).left) == 120


@pytest.mark.parametrize(
    ("ids", "y", "message"),
    [
        ([3], LABELS[:1], "labelled already"),
        ([20, 20], LABELS[:2], "come twice"),
        ([60], LABELS[:1], r"0 … 59"),
        ([-1], LABELS[:1], r"0 … 59"),
        ([20, 21], LABELS[:1], "rows .k. and their labels"),
        ([], LABELS[:0], "rows .k. and their labels"),
        ([20], 2 + LABELS[:1], "0 or 1"),
        ([20], LABELS[:1] * torch.nan, "finite"),
    ],
)
def test_labels_that_do_not_fit_change_nothing(ids, y, message):
    start = loop()
    before = start.model.predict(X)[0]
    with pytest.raises(errors.InputError, match=message):
        start.tell(ids, y)
    assert torch.equal(start.model.predict(X)[0], before)
    assert len(start.ids) == 8


def test_more_asked_than_there_are():
    with pytest.raises(errors.InputError, match="Asked for 53 labels, but 52"):
        loop().ask(53)
    with pytest.raises(errors.InputError, match="whole number"):
        loop().ask(0)


def test_a_model_that_knows_nothing():
    with unchecked(), pytest.raises(errors.NotFittedError, match="fit"):
        PoolLoop(model(), X).ask()
    assert len(PoolLoop(model(), X, "random").ask(5)) == 5


@pytest.mark.parametrize("ids", [[1.7], torch.tensor([True, False]), "ab"])
def test_rows_that_are_no_numbers(ids):
    with unchecked(), pytest.raises(errors.InputError, match="must be whole numbers"):
        loop().tell(ids, torch.ones(len(ids), dtype=F64))


def test_what_learns_nothing():
    with unchecked(), pytest.raises(errors.InputError, match="say learn="):
        learn_more(torch.nn.Linear(1, 1), X, X[:, 0])
    with unchecked(), pytest.raises(errors.InputError, match="got NoneType"):
        loop(learn=lambda model, x, y: None).ask()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: None, "what state_dict returned"),
        (lambda s: {k: v for k, v in s.items() if k != "y"}, "what state_dict returned"),
        (lambda s: {**s, "rounds": [1]}, "damaged"),
        (lambda s: {**s, "best": s["best"][:0]}, "damaged"),
        (lambda s: {**s, "y": None}, "damaged"),
        (lambda s: {**s, "ids": s["ids"] * 0}, "come twice"),
    ],
)
def test_a_state_that_is_damaged(change, message):
    with unchecked(), pytest.raises(errors.InputError, match=message):
        PoolLoop(model(), X).load_state_dict(change(loop().state_dict()))


def test_a_state_of_another_pool_of_the_same_size():
    state = loop().state_dict()
    for other in (X + 1e-9, X.flip(0)):
        with pytest.raises(errors.InputError, match="another pool"):
            PoolLoop(model(), other).load_state_dict(state)


def test_a_state_of_another_loop():
    state = loop().state_dict()
    with pytest.raises(errors.InputError, match="a loop over 50 rows"):
        PoolLoop(model(), X[:50]).load_state_dict(state)
    with pytest.raises(errors.InputError, match="told labels already"):
        loop().load_state_dict(state)


@pytest.mark.parametrize("stop", [{"budget": 0}, {"patience": 0}, {"tol": float("nan")}])
def test_a_stopping_rule_that_is_none(stop):
    with pytest.raises(errors.InputError, match="at least 1|a finite number"):
        Stop(**stop)
