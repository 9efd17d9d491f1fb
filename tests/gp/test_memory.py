"""Memory: which data a stream keeps, under which number, and that a rule gone wrong changes nothing."""

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from families import FAMILIES, softmax
from gpytorch.likelihoods import BernoulliLikelihood
from toys import F64, at, gap, gaussian, line, random_sites, rbf, unchecked, waves

from dualgp import DualGP, errors
from dualgp.gp.data import Data
from dualgp.gp.memory import Memory
from dualgp.gp.stream import read
from dualgp.selection import RULES, Candidates, choose

RULE_NAMES = ["leverage", "sensitivity", "random", "recency", "balanced"]


def candidates(n: int = 9, outputs: int | None = None, seed: int = 0, y: torch.Tensor | None = None) -> Candidates:
    g = torch.Generator().manual_seed(seed)
    shape = (n,) if outputs is None else (n, outputs)
    alpha, beta, var = (torch.randn(*shape, generator=g, dtype=F64) for _ in range(3))
    y = torch.randn(n, generator=g, dtype=F64) if y is None else y
    keys = torch.rand(n, generator=g, dtype=F64)
    ids = torch.arange(n) + 4
    moments = alpha, beta.abs() + 0.1, var.abs() + 0.1
    return Candidates(line(0, 1, n), y, ids, keys, outputs is not None, lambda: moments)


def stream(rule, capacity: int | None, n: int = 40, batch: int = 8, likelihood=None, **options) -> DualGP:
    """A stream at fixed hyperparameters; batches of the same data whatever the rule."""
    x, f, g = waves(n, 1, seed=2)
    noisy = f + 0.3 * torch.randn(n, generator=g, dtype=F64)
    y = noisy if likelihood is None else (noisy > 0).double()
    gp = DualGP(
        rbf(),
        likelihood or gaussian(),
        inducing_points=line(-1.5, 1.5, 6),
        memory=capacity,
        memory_rule=rule,
        **options,
    )
    for rows in torch.arange(n).split(batch):
        gp.update(x[rows], y[rows], learn_hyperparameters=False)
    return gp


# --- scores ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("outputs", [None, 1, 3])
def test_leverage_and_sensitivity_are_sums_over_outputs(outputs):
    c = candidates(outputs=outputs)
    for name, of in (("leverage", c.beta), ("sensitivity", c.alpha)):
        by_hand = []
        for i in range(len(c.ids)):
            if outputs is None:
                by_hand.append(abs(of[i].item()) * c.var[i].item())
            else:
                by_hand.append(sum(abs(of[i, k].item()) * c.var[i, k].item() for k in range(outputs)))
        assert gap(RULES[name](c), by_hand) < 1e-14


def test_scores_of_a_batch_of_processes_sum_over_the_batch():
    c = candidates()
    moments = torch.stack([c.alpha, -2 * c.alpha]), torch.stack([c.beta, 3 * c.beta]), c.var.expand(2, -1)
    two = replace(c, find_moments=lambda: moments)
    assert gap(RULES["leverage"](two), 4 * c.beta * c.var) < 1e-14
    assert gap(RULES["sensitivity"](two), 3 * c.alpha.abs() * c.var) < 1e-14


def test_a_negative_beta_lowers_leverage_and_a_negative_alpha_does_not_lower_sensitivity():
    moments = at(-2, 1, 0.5), at(-3, 1, 0.5), at(1, 1, 1)
    c = replace(candidates(3), find_moments=lambda: moments)
    assert choose(RULES["leverage"], c, 1).tolist() == [1]
    assert choose(RULES["sensitivity"], c, 1).tolist() == [0]


def test_what_a_stream_shows_to_a_rule_is_the_posterior_after_the_batch():
    """α, β and v of a Gaussian likelihood by hand: (y − m)/σ², 1/σ² and the variance of f."""
    seen: list[Candidates] = []

    def spy(c: Candidates) -> torch.Tensor:
        seen.append(c)
        return c.ids.double()

    gp = stream(spy, 4, n=24)
    last, noise = seen[-1], gp.likelihood.noise.item()
    mean, var = gp.predict(last.x)  # at fixed Z and θ what is forgotten stays in the posterior
    assert gap(last.var, var) < 1e-10
    assert gap(last.alpha, (last.y - mean) / noise) < 1e-8
    assert gap(last.beta, 1 / noise) < 1e-12
    assert last.ids.tolist() == [12, 13, 14, 15, *range(16, 24)]


def test_leverage_keeps_the_point_that_stands_alone():
    x = torch.cat([line(-0.1, 0.1, 12), at(4.0).reshape(1, 1)])
    Z = torch.cat([line(-0.1, 0.1, 2), at(4.0).reshape(1, 1)])
    gp = DualGP(rbf(), gaussian(), inducing_points=Z, memory=1, memory_rule="leverage")
    gp.update(x, x.sin().squeeze(-1), learn_hyperparameters=False)
    assert gp.memory.ids.tolist() == [12]


def test_sensitivity_keeps_the_outlier():
    x = line(-1, 1, 15)
    y = x.sin().squeeze(-1)
    y[6] += 5.0
    gp = DualGP(rbf(), gaussian(), inducing_points=line(-1, 1, 5), memory=1, memory_rule="sensitivity")
    gp.update(x, y, learn_hyperparameters=False)
    assert gp.memory.ids.tolist() == [6]


# --- the choice -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["random", "recency"])
def test_a_rule_that_asks_nothing_of_the_posterior_costs_nothing(rule):
    def fail():
        raise AssertionError("found α, β and v for a rule that does not look at them")

    assert len(choose(RULES[rule], replace(candidates(), find_moments=fail), 3)) == 3


def test_random_is_a_reservoir():
    """Over S seeds each of N data is kept S·k/N times, to five deviations of a binomial; k are kept, none twice."""
    total, capacity, seeds, likelihood = 30, 6, 60, gaussian()
    x = line(-1, 1, total)
    counts = torch.zeros(total, dtype=F64)
    for seed in range(seeds):
        gp = DualGP(
            rbf(),
            likelihood,
            inducing_points=x[:1],
            memory=capacity,
            memory_rule="random",
            generator=torch.Generator().manual_seed(seed),
        )
        for rows in torch.arange(total).split([1, 4, 15, 10]):
            gp.update(x[rows], x[rows, 0], learn_hyperparameters=False)
        ids = gp.memory.ids
        assert len(ids) == len(ids.unique()) == capacity
        counts[ids] += 1
    share = capacity / total
    assert gap(counts.mean(), seeds * share) < 1e-12
    assert gap(counts, seeds * share) < 5 * (seeds * share * (1 - share)) ** 0.5
    per_batch = torch.stack([c.sum() for c in counts.split([1, 4, 15, 10])]) / (seeds * capacity)
    assert gap(per_batch, at(1, 4, 15, 10) / total) < 5 * (0.25 / (seeds * capacity)) ** 0.5


def test_random_keeps_the_same_data_whatever_the_batches_and_others_with_another_seed():
    ids = [stream("random", 7, batch=b).memory.ids for b in (1, 8, 40)]
    assert torch.equal(ids[0], ids[1])
    assert torch.equal(ids[0], ids[2])
    other = stream("random", 7, generator=torch.Generator().manual_seed(1)).memory.ids
    assert not torch.equal(ids[0], other)


@pytest.mark.parametrize("batch", [1, 3, 40])
def test_recency_keeps_the_last(batch):
    assert stream("recency", 5, batch=batch).memory.ids.tolist() == [35, 36, 37, 38, 39]


@pytest.mark.parametrize("classes", [2, 3])
def test_balanced_keeps_equally_many_of_each_class(classes):
    n, capacity = 60, 4 * classes
    g = torch.Generator().manual_seed(5)
    x = torch.rand(n, 1, generator=g, dtype=F64) * 3
    y = (torch.rand(n, generator=g) < 0.25).long() * torch.randint(1, classes, (n,), generator=g)  # class 0 is common
    likelihood = BernoulliLikelihood() if classes == 2 else softmax()
    gp = DualGP(rbf(), likelihood, inducing_points=line(0, 3, 5), memory=capacity, memory_rule="balanced")
    for rows in torch.arange(n).split(12):
        gp.update(x[rows], y[rows], learn_hyperparameters=False)
        labels = gp.memory.data.y.long()
        counts, seen = labels.bincount(minlength=classes), y[: int(rows[-1]) + 1].bincount(minlength=classes)
        assert len(gp.memory) == min(capacity, int(rows[-1]) + 1)
        assert int(counts.max()) <= 4 or any(int(s) < 4 for s in seen)  # more than its share only where others lack
    assert counts.tolist() == [4] * classes


def test_balanced_takes_within_a_class_those_of_greatest_leverage():
    c = candidates(8, y=at(0, 0, 0, 0, 1, 1, 1, 1))
    lev = c.beta * c.var
    best = [*lev[:4].argsort(descending=True)[:2].tolist(), *(4 + lev[4:].argsort(descending=True)[:2]).tolist()]
    assert choose(RULES["balanced"], c, 4).tolist() == sorted(best)
    odd = choose(RULES["balanced"], c, 3).tolist()  # the odd one: the greater leverage of the two seconds
    seconds = [lev[:4].argsort(descending=True)[1].item(), 4 + lev[4:].argsort(descending=True)[1].item()]
    assert max(seconds, key=lambda i: lev[i]) in odd
    assert min(seconds, key=lambda i: lev[i]) not in odd


@pytest.mark.parametrize("y", [at(0.5, 1, 2, 3), torch.zeros(4, 2, dtype=F64)])
def test_balanced_needs_labels(y):
    with pytest.raises(errors.InputError, match="balanced.*label.*leverage"):
        choose(RULES["balanced"], candidates(4, y=y), 2)


@pytest.mark.parametrize("capacity", range(6))
def test_ties_keep_the_later_in_order_of_arrival(capacity):
    c = candidates(5)
    assert choose(lambda c: torch.zeros(5), c, capacity).tolist() == list(range(5 - capacity, 5))
    assert choose(lambda c: at(1, 0, 1, 0, 1), c, 3).tolist() == [0, 2, 4]
    assert choose(lambda c: at(1, 0, 1, 0, 1), c, 2).tolist() == [2, 4]
    assert choose(lambda c: at(1, 0, 1, 0, 1), c, 4).tolist() == [0, 2, 3, 4]


@pytest.mark.parametrize("seed", range(5))
def test_what_is_chosen_scores_no_less_than_what_is_not(seed):
    c = candidates(20, seed=seed)
    for name in ("leverage", "sensitivity", "random", "recency"):
        score, keep = RULES[name](c), choose(RULES[name], c, 7)
        left = torch.ones(20, dtype=torch.bool)
        left[keep] = False
        assert len(keep) == 7
        assert bool((keep.diff() > 0).all())
        assert score[keep].min() >= score[left].max()


def test_integer_and_single_precision_scores_are_scores():
    c = candidates(6)
    assert choose(lambda c: torch.tensor([3, 1, 2, 0, 5, 4]), c, 2).tolist() == [4, 5]
    assert choose(lambda c: torch.tensor([3.0, 1, 2, 0, 5, 4]), c, 2).tolist() == [4, 5]


# --- a user's rule --------------------------------------------------------------------------------


def test_a_users_function_decides():
    gp = stream(lambda c: -c.x[:, 0], 5)
    x = waves(40, 1, seed=2)[0][:, 0]
    assert sorted(gp.memory.ids.tolist()) == sorted(x.argsort()[:5].tolist())


def test_a_users_function_gets_outputs_last():
    shapes = []

    def rule(c: Candidates) -> torch.Tensor:
        shapes.append((c.beta.shape[-1], c.multi_output))
        return c.per_datum(c.beta)

    gp = DualGP(rbf(), softmax(), inducing_points=line(-1, 1, 4), memory=3, memory_rule=rule)
    gp.update(line(-1, 1, 9), torch.arange(9) % 3, learn_hyperparameters=False)
    assert shapes == [(3, True)]


def _raises(c: Candidates) -> torch.Tensor:
    raise ZeroDivisionError("mine")


@pytest.mark.parametrize("verb", ["update a new model", "update", "loaded"])
@pytest.mark.parametrize(
    ("rule", "error", "match"),
    [
        (lambda c: c.ids[:-1].double(), errors.InputError, r"shape \(\d+,\); got \(\d+,\)"),
        (lambda c: torch.zeros(len(c.ids), 1), errors.InputError, r"shape \(\d+,\); got \(\d+, 1\)"),
        (lambda c: torch.zeros(()), errors.InputError, r"shape \(\d+,\); got \(\)"),
        (lambda c: [0.0] * len(c.ids), errors.InputError, "finite score per datum.*got list"),
        (lambda c: None, errors.InputError, "finite score per datum.*got NoneType"),
        (lambda c: c.keys * float("nan"), errors.InputError, "finite score per datum"),
        (lambda c: c.keys / 0, errors.InputError, "finite score per datum"),
        (_raises, ZeroDivisionError, "mine"),
    ],
)
def test_a_rule_that_goes_wrong_leaves_the_model_as_it_was(rule, error, match, verb, tmp_path):
    good: list[Callable] = [lambda c: c.ids.double()]

    def of_user(c: Candidates) -> torch.Tensor:
        return good[0](c)

    x, y = line(-1, 1, 9), line(-1, 1, 9).squeeze(-1).sin()
    gp = DualGP(rbf(), gaussian(), num_inducing=4, memory=3, memory_rule=of_user)
    if verb != "update a new model":
        gp.update(x, y)
    if verb == "loaded":
        gp.save(tmp_path / "gp")
        gp = DualGP.load(tmp_path / "gp", rbf(), gaussian(), memory_rule=of_user)
    before, draw = copy.deepcopy(gp.state_dict()), gp.generator.get_state()
    good[0] = rule
    with pytest.raises(error, match=match), unchecked():
        gp.update(x + 0.1, y)
    after = gp.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(v, after[k]) for k, v in before.items())
    assert torch.equal(gp.generator.get_state(), draw)


def test_an_unknown_rule_is_refused_with_the_names_of_those_there_are():
    with pytest.raises(errors.InputError, match="balanced.*leverage.*random.*recency.*sensitivity.*got 'oldest'"):
        DualGP(rbf(), gaussian(), memory_rule="oldest")


# --- capacity -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULE_NAMES)
def test_capacity_zero_keeps_nothing_and_forgets_no_site(rule):
    none, all_of_it = stream(rule, 0, likelihood=None), stream("recency", 1000)
    assert none.memory is None
    assert none.update(line(0, 1, 3), at(0, 0, 0), learn_hyperparameters=False).num_memory == 0
    all_of_it.update(line(0, 1, 3), at(0, 0, 0), learn_hyperparameters=False)
    assert gap(none.posterior.site.B, all_of_it.posterior.site.B) < 1e-9 * none.posterior.site.B.abs().max()
    assert gap(none.posterior.site.lam, all_of_it.posterior.site.lam) < 1e-9 * none.posterior.site.lam.abs().max()


@pytest.mark.parametrize("rule", ["leverage", "sensitivity", "random", "recency"])
def test_a_capacity_beyond_the_data_keeps_all_and_the_rest_is_nothing(rule):
    gp = stream(rule, 1000)
    state = read(gp)
    assert gp.memory.ids.tolist() == list(range(40))
    assert state.rest.lam.abs().max() == 0
    assert state.rest.B.abs().max() == 0


def test_memory_holds_twice_as_many_as_inducing_inputs_and_a_hundred_at_least_if_not_told():
    x = line(-1, 1, 150)
    for options, held in (({"num_inducing": 7}, 100), ({"inducing_points": line(-1, 1, 60)}, 120)):
        gp = DualGP(rbf(), gaussian(), **options)
        gp.update(x, x[:, 0], learn_hyperparameters=False)
        assert len(gp.memory) == held


def test_fit_fills_memory_only_if_it_is_given():
    x = line(-1, 1, 30)
    for options, held in (({}, None), ({"memory": 0}, None), ({"memory": 6}, 6), ({"window": 4}, 4)):
        gp = DualGP(rbf(), gaussian(), num_inducing=5, **options)
        gp.fit(x, x[:, 0].sin(), learn_hyperparameters=False, progress=False)
        assert (None if gp.memory is None else len(gp.memory)) == held
    assert gp.memory.ids.tolist() == [26, 27, 28, 29]


# --- bookkeeping ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["leverage", "sensitivity", "random", "recency", "balanced"])
def test_ids_name_the_data_and_keys_stay_with_them(rule):
    """Whatever is kept is found under its number of arrival: x, y, weight and the key drawn for it."""
    n = 45
    x, f, g = waves(n, 1, seed=7)
    y, weights = (f > 0).double(), torch.rand(n, generator=g, dtype=F64)
    keys = torch.rand(n, generator=torch.Generator().manual_seed(11), dtype=F64)  # what the stream will draw, in order
    gp = DualGP(
        rbf(),
        BernoulliLikelihood(),
        num_inducing=5,
        memory=6,
        memory_rule=rule,
        generator=torch.Generator().manual_seed(11),
    )
    for rows in torch.arange(n).split([1, 9, 15, 0, 20]):
        gp.update(x[rows], y[rows], weights=weights[rows], learn_hyperparameters=False)
        m = gp.memory
        assert bool((m.ids.diff() > 0).all())
        assert m.ids.dtype == torch.int64
        assert torch.equal(m.data.x, x[m.ids])
        assert torch.equal(m.data.y, y[m.ids])
        assert torch.equal(m.data.weights, weights[m.ids])
        assert torch.equal(m.keys, keys[m.ids])


def test_fixed_noise_stays_with_its_datum():
    problem = FAMILIES["fixed noise"]()
    x, y, noise = problem.x, problem.y, problem.params["noise"]
    gp = DualGP(problem.gp.kernel, problem.gp.likelihood, num_inducing=6, memory=9)
    for rows in torch.arange(60).split(20):
        gp.update(x[rows], y[rows], noise=noise[rows], learn_hyperparameters=False)
    m = gp.memory
    assert torch.equal(m.data.params["noise"], noise[m.ids])
    assert gap(m.sites.beta, 1 / noise[m.ids]) < 1e-9 * (1 / noise).max()
    assert gap(m.sites.lam, y[m.ids] / noise[m.ids]) < 1e-9 * (y / noise).abs().max()


def a_memory() -> Memory:
    n = 6
    data = Data(line(0, 1, n), line(0, 1, n)[:, 0], False)
    return Memory(data, random_sites(n), torch.tensor([2, 3, 5, 8, 13, 21]), torch.rand(n, dtype=F64))


def test_find_gives_the_rows_of_ids():
    memory = a_memory()
    assert memory.find(torch.tensor([21, 2, 8])).tolist() == [5, 0, 3]
    assert memory.find(torch.tensor([], dtype=torch.int64)).tolist() == []


@pytest.mark.parametrize("missing", [[4], [-1], [22], [0, 4, 1000], [1, 6, 7, 9]])
def test_find_names_the_ids_that_are_not_there(missing):
    with pytest.raises(errors.InputError, match="not in memory") as caught:
        a_memory().find(torch.tensor([2, 21, *missing]).sort().values)
    assert f"Data {sorted(missing)} are not" in str(caught.value)
    assert "holds 6 data" in str(caught.value)


def test_find_in_an_empty_memory_names_all():
    nothing = a_memory().rows(torch.arange(0))
    with pytest.raises(errors.InputError, match=r"Data \[2, 3\] are not in memory"):
        nothing.find(torch.tensor([2, 3]))


def test_rows_and_without_share_out_the_data():
    memory = a_memory()
    rows = torch.tensor([0, 2, 5])
    taken, left = memory.rows(rows), memory.without(rows)
    assert taken.ids.tolist() == [2, 5, 21]
    assert left.ids.tolist() == [3, 8, 13]
    for of in (taken, left):
        at_ = memory.find(of.ids)
        assert torch.equal(of.data.x, memory.data.x[at_])
        assert torch.equal(of.sites.lam, memory.sites.lam[at_])
        assert torch.equal(of.keys, memory.keys[at_])
