"""The law of a fit by several processes: what one process makes of all data. And no rank is left hanging."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import ranks
import torch
from toys import F64

from dualgp import DualGP
from dualgp.distributed import ALONE
from dualgp.errors import ConvergenceWarning, InputError
from dualgp.gp.bound import site_bound
from dualgp.gp.data import Data
from dualgp.gp.minibatch import sample_rows
from dualgp.sites import Sites

KINDS = ["gaussian", "bernoulli", "softmax"]
Z = torch.tensor([[i, j] for i in (-2.5, -1.0, 0.5, 2.0) for j in (-2.0, 0.0, 2.0)], dtype=F64)
HELD = {"learn_hyperparameters": False, "learn_inducing": False}
EXACT = {**HELD, "tol": 1e-8}  # where what an iteration leaves is below what is compared


@pytest.fixture(scope="module")
def pairs() -> Iterator[list[ranks.Pair]]:
    """The pairs of processes started so far."""
    started: list[ranks.Pair] = []
    yield started
    for both in started:
        both.close()


@pytest.fixture
def pair(pairs: list[ranks.Pair]) -> ranks.Pair:
    """Two processes for all tests here: after an error, too, they go on, unless one is killed."""
    if not pairs or not pairs[-1].alive:
        pairs.append(ranks.Pair())
    return pairs[-1]


@pytest.fixture(scope="module")
def trio() -> Iterator[ranks.Pair]:
    """Three processes."""
    three = ranks.Pair(3)
    yield three
    three.close()


def assert_close(found: dict, expected: dict, tolerance: float) -> None:
    assert found["num_data"] == expected["num_data"] == 90
    assert abs(found["elbo"] - expected["elbo"]) <= tolerance * abs(expected["elbo"])
    assert found["state"].keys() == expected["state"].keys()
    for name, value in expected["state"].items():
        torch.testing.assert_close(found["state"][name], value, rtol=tolerance, atol=tolerance, msg=name)


def assert_same_on_all(answers: list[dict]) -> None:
    first, *others = (a["state"] for a in answers)
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_make_of_tensors_what_one_does(pair, kind):
    answers = pair(ranks.fit_tensors, kind, {"inducing_points": Z}, EXACT)
    alone = ranks.outcome(ranks.model(kind, inducing_points=Z), *map(ranks.in_order, ranks.problem(kind)), **EXACT)
    for found in answers:
        assert_close(found, alone, 1e-10)
    assert_same_on_all(answers)
    for of_ranks, of_one in zip(zip(*(a["sites"] for a in answers), strict=True), alone["sites"], strict=True):
        torch.testing.assert_close(torch.cat(of_ranks), of_one, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_three_processes_make_of_tensors_what_one_does(trio, kind):
    answers = trio(ranks.fit_tensors, kind, {"inducing_points": Z}, EXACT)
    data = (ranks.in_order(t, 3) for t in ranks.problem(kind))
    alone = ranks.outcome(ranks.model(kind, inducing_points=Z), *data, **EXACT)
    for found in answers:
        assert_close(found, alone, 1e-10)
    assert_same_on_all(answers)
    for of_ranks, of_one in zip(zip(*(a["sites"] for a in answers), strict=True), alone["sites"], strict=True):
        torch.testing.assert_close(torch.cat(of_ranks), of_one, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("about", "named"),
    [
        ("columns", "columns of X (rank 0: 2, rank 1: 1, rank 2: 2)"),
        ("kernel", "rank 1: ScaleKernel() base_kernel:MaternKernel("),
        ("hyperparameters", "kernel base_kernel.raw_lengthscale"),
    ],
)
def test_of_three_the_one_that_disagrees_is_named_on_each(trio, tmp_path, about, named):
    answers = trio(ranks.disagree, about, str(tmp_path / "checkpoint"))
    assert [error for error, _ in answers] == ["InputError"] * 3
    assert all(named in message for _, message in answers)
    assert not list(tmp_path.iterdir())


def test_of_three_the_two_that_are_left_are_told(trio, tmp_path):
    path = tmp_path / "checkpoint"
    first, own, third = trio(ranks.failing_loader, 3, False, str(path))
    assert own[:2] == ("OSError", "the disk is gone")
    for error, heard, same, written in (first, third):
        assert error == "DistributedError"
        assert "rank 1: OSError: the disk is gone" in heard
        assert same
        assert written


@pytest.mark.filterwarnings("ignore::dualgp.errors.ConvergenceWarning")
@pytest.mark.parametrize("kind", ["gaussian", "bernoulli"])
def test_a_rank_may_have_no_data(pair, kind):
    given, options = {"num_inducing": 12}, {"max_rounds": 1}
    answers = pair(ranks.fit_one_sided, kind, given, options)
    alone = ranks.outcome(ranks.model(kind, **given), *ranks.problem(kind), **options)
    for found in answers:
        assert_close(found, alone, 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_make_of_loaders_what_one_does(pair, kind):
    answers = pair(ranks.fit_loader, kind, {"inducing_points": Z}, EXACT)
    x, y = ranks.problem(kind)
    parts = [ranks.batches(ranks.share(x, rank), ranks.share(y, rank), 20) for rank in (0, 1)]
    alone = ranks.outcome(ranks.model(kind, inducing_points=Z), parts[0] + parts[1], **EXACT)
    for found in answers:
        assert_close(found, alone, 1e-10)
    assert_same_on_all(answers)


def test_a_distributed_sampler_shares_the_data_out(pair):
    answers = pair(ranks.fit_sampler, {"inducing_points": Z}, EXACT)
    loader = ranks.batches(*ranks.problem("bernoulli"), 40)
    alone = ranks.outcome(ranks.model("bernoulli", inducing_points=Z), loader, **EXACT)
    for found in answers:
        assert_close(found, alone, 1e-10)


@pytest.mark.parametrize("kind", ["gaussian", "bernoulli"])
def test_the_bound_and_its_gradient_are_those_of_all_data(pair, kind):
    x, y = ranks.problem(kind)
    g = torch.Generator().manual_seed(0)
    sites = None  # of Gaussian likelihoods; for others, sites far from the optimum, so that every term counts
    if kind == "bernoulli":
        sites = Sites(torch.randn(90, generator=g, dtype=F64), torch.rand(90, generator=g, dtype=F64))
    gp = ranks.model(kind)
    expected = site_bound(gp._hyper(gp.kernel, gp.mean, gp.likelihood, Z, True, True), Data(x, y, False), sites)
    for value, gradient in pair(ranks.bound, kind, Z, sites):
        assert abs(value - expected.value) < 1e-11 * abs(expected.value)
        for found, true in zip(gradient, expected.gradient, strict=True):
            torch.testing.assert_close(found, true, rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore::dualgp.errors.ConvergenceWarning")
@pytest.mark.parametrize("kind", ["gaussian", "bernoulli"])
def test_learned_in_memory_two_processes_end_where_one_does(pair, kind):
    given, options = {"num_inducing": 12}, {"max_rounds": 2}
    answers = pair(ranks.fit_tensors, kind, given, options)
    alone = ranks.outcome(ranks.model(kind, **given), *map(ranks.in_order, ranks.problem(kind)), **options)
    for found in answers:
        assert found["rounds"] == alone["rounds"]
        assert_close(found, alone, 1e-6)  # rounding, carried through some dozens of quasi-Newton steps
    assert_same_on_all(answers)


@pytest.mark.parametrize("kind", ["gaussian", "bernoulli"])
def test_batches_of_two_processes_are_one_batch(pair, kind):
    rows = torch.arange(90)
    parts = [[rows[:12], rows[12:30], rows[30:35]], [rows[35:70], rows[70:90]]]  # rank 1 is through first
    joined = [torch.cat([parts[0][i], *(p[i] for p in parts[1:] if i < len(p))]) for i in range(3)]
    expected, rounds = ranks.learn_on(kind, Z, joined, ALONE)
    for found, of_ranks in pair(ranks.learn, kind, Z, parts):
        assert of_ranks == rounds
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.filterwarnings("ignore::dualgp.errors.ConvergenceWarning")
def test_a_fit_by_batches_is_one_model(pair):
    answers = pair(ranks.fit_loader, "bernoulli", {"num_inducing": 10}, {"max_rounds": 1})
    assert_same_on_all(answers)
    assert answers[0]["num_data"] == 90


def test_the_sample_of_tensors_is_the_one_that_one_process_draws(pair):
    x, y = map(ranks.in_order, ranks.problem("gaussian"))
    expected, *_ = sample_rows(Data(x, y, False), 40, torch.Generator().manual_seed(3), ALONE)
    for all_x, _, n in pair(ranks.sample, True):
        assert n == 90
        assert torch.equal(all_x, expected.x)


def test_the_sample_of_loaders_is_drawn_without_replacement_and_shared_out(pair):
    answers = pair(ranks.sample, False)
    shares = torch.cat([share for _, share, _ in answers])
    assert all(torch.equal(all_x, shares) and n == 90 for all_x, _, n in answers)
    assert len(shares.unique(dim=0)) == len(shares) == 40
    x = ranks.problem("gaussian")[0]
    for rank, (_, share, _) in enumerate(answers):
        mine = ranks.share(x, rank)
        assert all((mine == row).all(-1).any() for row in share)
        assert abs(len(share) - 40 * len(mine) / 90) < 12  # about 4 standard deviations


@pytest.mark.parametrize(
    ("about", "named"),
    [
        ("columns", "columns of X (rank 0: 2, rank 1: 1)"),
        ("dtype", "dtype of X (rank 0: torch.float64, rank 1: torch.float32)"),
        ("kernel", "kernel (rank 0: ScaleKernel() base_kernel:RBFKernel()"),
        ("hyperparameters", "kernel base_kernel.raw_lengthscale"),
        ("M", "num_inducing (rank 0: 8, rank 1: 9)"),
        ("tol", "tol (rank 0: 0.0001, rank 1: 0.001)"),
        ("loader", "X given as (rank 0: tensors, rank 1: a loader)"),
        ("memory", "memory and window hold data of one process"),
    ],
)
def test_ranks_that_disagree_all_say_so(pair, tmp_path, about, named):
    for error, message in pair(ranks.disagree, about, str(tmp_path / "checkpoint")):
        assert error == "InputError"
        assert named in message
    assert not list(tmp_path.iterdir())


def test_bad_data_on_one_rank_end_the_fit_on_all(pair, tmp_path):
    (other, heard), (own, message) = pair(ranks.bad_data, str(tmp_path / "checkpoint"))
    assert own == "InputError"
    assert "y must be finite" in message
    assert other == "DistributedError"
    assert "rank 1: InputError: y must be finite" in heard
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("at", [1, 3])  # the sample; the second epoch
def test_a_rank_that_raises_ends_the_fit_on_all_and_nothing_is_changed(pair, tmp_path, at):
    path = tmp_path / "checkpoint"
    (other, heard, same, written), (own, message, same_own, _) = pair(ranks.failing_loader, at, False, str(path))
    assert (own, message) == ("OSError", "the disk is gone")
    assert other == "DistributedError"
    assert "rank 1: OSError: the disk is gone" in heard
    assert str(path) in heard
    assert same
    assert same_own
    assert written == (at == 3)


def test_a_wall_for_one_rank_is_one_for_all(pair):
    first, second = pair(ranks.one_wall)
    assert first == second == ["rank 1: no Gaussian on 1", "rank 0: no Gaussian on 0; rank 1: no Gaussian on 1", "2.0"]


@pytest.mark.parametrize("how", ["methods", "sizes", "ends"])
def test_ranks_that_go_different_ways_find_out(pair, how):
    for error, message in pair(ranks.different_ways, how):
        assert error == "DistributedError"
        assert "different ways" in message


def test_a_group_needs_to_be_initialised():
    x, y = ranks.problem("gaussian")
    with pytest.raises(InputError, match="init_process_group"):
        ranks.model("gaussian").fit(x, y, process_group=object())


def test_a_checkpoint_is_the_model_after_each_round(tmp_path):
    path = tmp_path / "checkpoint"
    x, y = ranks.problem("bernoulli")
    gp, fresh = (ranks.model("bernoulli", num_inducing=12) for _ in range(2))
    with pytest.warns(ConvergenceWarning):
        first = gp.fit(x, y, max_rounds=1, progress=False, checkpoint=path)
    kept = DualGP.load(path, fresh.kernel, fresh.likelihood)
    assert torch.equal(kept.inducing_points, gp.inducing_points)
    assert torch.equal(kept.kernel.base_kernel.lengthscale, gp.kernel.base_kernel.lengthscale)
    assert abs(kept.elbo(x, y) - 90 * max(point.bound for point in first.trace)) < 1e-8
    assert kept.num_seen == 90
    assert kept.fit(x, y, progress=False, tol=1e-3).elbo > first.elbo


def test_a_checkpoint_needs_its_folder(tmp_path):
    x, y = ranks.problem("gaussian")
    gp = ranks.model("gaussian", num_inducing=8)
    with pytest.raises(InputError, match="make it first"):
        gp.fit(x, y, checkpoint=Path(tmp_path) / "nowhere" / "checkpoint")
    assert gp.inducing_points is None


def test_a_killed_rank_ends_the_fit_and_the_checkpoint_goes_on(pair, tmp_path):
    path = tmp_path / "checkpoint"
    survivor, killed = pair(ranks.failing_loader, 3, True, str(path))
    assert killed is None
    error, message, same, written = survivor
    assert error == "DistributedError"
    assert "Rank 0 of 2 has lost another" in message
    assert str(path) in message
    assert same
    assert written
    fresh = ranks.model("bernoulli")
    again = DualGP.load(path, fresh.kernel, fresh.likelihood)
    before = again.inducing_points
    x, y = ranks.problem("bernoulli")
    found = again.elbo(x, y)
    result = again.fit(x, y, progress=False, **HELD)
    assert result.num_data == 90
    assert torch.equal(again.inducing_points, before)
    assert result.elbo > found
