"""Bad input to a stream: an error that says what was expected and what came, and a stream that is as it was."""

import copy
import functools

import pytest
import torch
from families import softmax
from gpytorch.likelihoods import (
    BernoulliLikelihood,
    FixedNoiseGaussianLikelihood,
    PoissonLikelihood,
    StudentTLikelihood,
)
from toys import F64, gaussian, line, put, rbf, unchecked, waves

from dualgp import DualGP, errors

X = waves(20, 2, seed=1)[0]
Y = X.sin().sum(-1)
NAN, INF = float("nan"), float("inf")
ONES = torch.ones(6, dtype=F64)


def refused(gp: DualGP, match: str, call, error=errors.InputError) -> None:
    """The call raises; the state, the posterior and the generator are as they were."""
    before, posterior, draw = copy.deepcopy(dict(gp.state_dict())), gp._posterior, gp.generator.get_state()
    with pytest.raises(error, match=match) as caught, unchecked():
        call(gp)
    assert isinstance(caught.value, errors.DualGPError)
    after = gp.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(v, after[k]) for k, v in before.items())
    assert gp._posterior is posterior
    assert torch.equal(draw, gp.generator.get_state())


@functools.cache
def _begun(likelihood, noisy: bool) -> DualGP:
    gp = DualGP(rbf(), likelihood(), num_inducing=4, memory=5, memory_rule="random")
    y = Y if likelihood in (gaussian, noise_per_datum) else (Y > 0).double()
    params = {"noise": torch.ones(20, dtype=F64)} if noisy else {}
    gp.update(X, y, learn_hyperparameters=False, **params)
    return gp


def noise_per_datum() -> FixedNoiseGaussianLikelihood:
    return FixedNoiseGaussianLikelihood(torch.ones(6))


def both(match: str, call, likelihood=gaussian, error=errors.InputError) -> None:
    """A new model and one that is under way refuse alike, state and generator unchanged."""
    for gp in (
        DualGP(rbf(), likelihood(), num_inducing=4, memory_rule="random"),
        _begun(likelihood, likelihood is noise_per_datum),
    ):
        refused(gp, match, call, error)


def under_way(match: str, call, likelihood=gaussian, error=errors.InputError) -> None:
    refused(_begun(likelihood, False), match, call, error)


# --- the constructor ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"memory": -1}, "memory must be at least 0, got -1"),
        ({"window": 0}, "window must be at least 1.*got 0"),
        ({"window": -3}, "window must be at least 1.*got -3"),
        ({"window": 5, "memory": 5}, "in place of memory; got 5 and 5"),
        ({"window": 5, "memory": 0}, "in place of memory; got 5 and 0"),
        ({"memory_rule": "newest"}, "memory_rule must be a function or one of .*leverage.*got 'newest'"),
        ({"memory_rule": "Leverage"}, "memory_rule must be .*got 'Leverage'"),
        ({"memory_rule": None}, "memory_rule must be .*got None"),
    ],
)
def test_arguments_of_a_stream_that_contradict(options, match):
    with pytest.raises(errors.InputError, match=match), unchecked():
        DualGP(rbf(), gaussian(), **options)


# --- update ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "y", "match"),
    [
        (X[:6, 0], Y[:6], r"X must have shape .*got \(6,\).*unsqueeze"),
        (X[:6], Y[:5], r"y must have shape \(6,\).*got \(5,\)"),
        (X[:6], Y[:6].unsqueeze(-1), r"y must have shape \(6,\).*got \(6, 1\).*squeeze"),
        (X[:6].long(), Y[:6], "X must be float32 or float64, got torch.int64"),
        (X[:6].half(), Y[:6], "X must be float32 or float64, got torch.float16"),
        (X[:6], Y[:6] > 0, "y must hold real numbers.*bool"),
        (put(X[:6], (4, 1), NAN), Y[:6], "X must be finite; 1 values.*row 4"),
        (put(X[:6], (2, 0), INF), Y[:6], "X must be finite; 1 values.*row 2"),
        (X[:6], put(Y[:6], 3, NAN), "y must be finite; 1 values"),
        (X[:6], put(Y[:6], slice(0, 2), -INF), "y must be finite; 2 values"),
        (X[:6].tolist(), Y[:6], "X must be a torch.Tensor, got list"),
        (X[:6], Y[:6].tolist(), "y must be a torch.Tensor, got list"),
        (X[:6], None, "y must be a torch.Tensor, got NoneType"),
        (X[:6], Y[:6].to("meta"), "X is on cpu and y on meta"),
    ],
)
def test_bad_batches(x, y, match):
    both(match, lambda gp: gp.update(x, y))


@pytest.mark.parametrize(
    ("likelihood", "y", "match"),
    [
        (BernoulliLikelihood, put(ONES, 0, -1.0), r"0 or 1.*\(y \+ 1\) / 2.*1 of 6.*-1"),
        (softmax, torch.arange(6), "0 … 2; 3 of 6.*being 3"),
        (softmax, put(ONES.long(), 1, -1), "0 … 2.*-1"),
        (PoissonLikelihood, put(ONES, 0, 0.5), "Poisson.*0.5"),
    ],
)
def test_targets_outside_the_support(likelihood, y, match):
    both(match, lambda gp: gp.update(X[:6], y), likelihood)


@pytest.mark.parametrize(
    ("weights", "match"),
    [
        (torch.ones(5), r"weights must be a torch.Tensor of shape \(6,\), one per datum; got \(5,\)"),
        (torch.ones(6, 1), r"weights .*shape \(6,\).*got \(6, 1\)"),
        (torch.tensor(1.0), r"weights .*shape \(6,\).*got \(\)"),
        ([1.0] * 6, r"weights must be a torch.Tensor.*got list"),
        (2.0, r"weights must be a torch.Tensor.*got float"),
        (put(ONES, 2, -0.5), "weights must be finite and ≥ 0; the smallest is -0.5"),
        (put(ONES, 2, NAN), "weights must be finite"),
        (put(ONES, 2, INF), "weights must be finite"),
    ],
)
def test_bad_weights(weights, match):
    both(match, lambda gp: gp.update(X[:6], Y[:6], weights=weights))


@pytest.mark.parametrize("tol", [0.0, -1.0, NAN])
def test_a_tolerance_that_is_not_positive(tol):
    both("tol must be positive, got", lambda gp: gp.update(X[:6], Y[:6], tol=tol))


@pytest.mark.parametrize(
    ("noise", "match"),
    [
        (torch.ones(5), r"noise= must hold one finite value per datum \(6\), got \(5,\)"),
        (torch.full((6,), NAN), "noise= must hold one finite value per datum"),
        (torch.zeros(6), "noise= must be positive variances; the smallest is 0"),
        (-torch.ones(6), "noise= must be positive variances; the smallest is -1"),
        ([1.0] * 6, "noise= must be a torch.Tensor.*got list"),
    ],
)
def test_bad_noise_per_datum(noise, match):
    both(match, lambda gp: gp.update(X[:6], Y[:6], noise=noise), noise_per_datum)
    refused(_begun(noise_per_datum, True), match, lambda gp: gp.condition(X[:6], Y[:6], noise=noise))


def test_noise_where_it_belongs():
    both("GaussianLikelihood takes no noise= per datum", lambda gp: gp.update(X[:6], Y[:6], noise=ONES))
    both("pass noise=", lambda gp: gp.update(X[:6], Y[:6]), noise_per_datum)
    refused(_begun(noise_per_datum, True), "pass noise=", lambda gp: gp.condition(X[:6], Y[:6]))


class OfItsAuthor(StudentTLikelihood):
    """Which may take what parameters it likes."""


@pytest.mark.parametrize("first", [True, False])
def test_noise_with_some_batches_only(first):
    gp = DualGP(rbf(), OfItsAuthor().double(), num_inducing=4)
    gp.update(X[:6], Y[:6], **({"noise": ONES} if first else {}))
    match = r"came with \['noise'\]" if first else r"this batch with \['noise'\]"
    refused(gp, match, lambda gp: gp.update(X[:6], Y[:6], **({} if first else {"noise": ONES})))


@pytest.mark.parametrize("move", [True, False])
def test_a_batch_that_is_no_part_of_the_stream(move):
    call = lambda x: lambda gp: gp.update(x, Y[:6], move_inducing=move)  # noqa: E731
    under_way(r"float64 on cpu, this batch torch.float32.*X\.to", call(X[:6].float()))
    under_way(r"2\D+got \(6, 3\)", call(torch.cat([X[:6], X[:6, :1]], -1)))
    under_way(r"2\D+got \(6, 1\)", call(X[:6, :1]))


def test_a_batch_that_does_not_fit_the_inducing_points_given():
    gp = DualGP(rbf(), gaussian(), inducing_points=line(0, 1, 3))
    refused(gp, "inducing_points have 1 columns on cpu, X has 2 on cpu", lambda gp: gp.update(X[:6], Y[:6]))


def test_targets_of_several_outputs():
    gp = DualGP(rbf(), gaussian(), num_inducing=4, num_outputs=2)
    refused(gp, r"y must have shape \(6, 2\).*got \(6,\)", lambda gp: gp.update(X[:6], Y[:6]))
    refused(gp, r"y must have shape \(6, 2\).*got \(2, 6\)", lambda gp: gp.update(X[:6], Y[:6].expand(2, 6)))


def test_balanced_memory_of_what_are_no_labels():
    gp = DualGP(rbf(), gaussian(), num_inducing=4, memory=5, memory_rule="balanced")
    refused(gp, "balanced.*label.*leverage", lambda gp: gp.update(X, Y))


def test_a_loader_without_a_batch():
    for batches in ([], iter(()), torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X[:0], Y[:0]))):
        both("no batch", lambda gp, batches=batches: gp.update_all(batches, progress=False))


@pytest.mark.parametrize("verb", ["fit", "update"])
def test_learning_in_inference_mode(verb):
    def learn(gp: DualGP) -> None:
        with torch.inference_mode():
            getattr(gp, verb)(X[:6], Y[:6])

    both(r"within torch.inference_mode\(\)", learn)


# --- forget, fade, move_inducing ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "match"),
    [
        (torch.tensor([20]), r"Data \[20\] are not in memory.*holds 5 data.*memory\.ids"),
        (torch.tensor([-1, 1000]), r"Data \[-1, 1000\] are not in memory"),
        (torch.tensor(77), r"Data \[77\] are not in memory"),
        (torch.tensor([[50], [51]], dtype=torch.int32), r"Data \[50, 51\] are not in memory"),
        (torch.tensor([1.0]), "ids must be integers, as in memory.ids; got torch.float32"),
        (torch.tensor([True]), "ids must be integers, as in memory.ids; got torch.bool"),
        ("first", "ids must be integers, as in memory.ids; got 'first'"),
        (None, "ids must be integers, as in memory.ids; got None"),
    ],
)
def test_ids_that_are_not_in_memory(ids, match):
    under_way(match, lambda gp: gp.forget(ids))


def test_to_forget_without_a_memory():
    gp = DualGP(rbf(), gaussian(), num_inducing=4, memory=0)
    gp.update(X, Y, learn_hyperparameters=False)
    refused(gp, "Memory is empty", lambda gp: gp.forget(torch.tensor([3])))
    fit = DualGP(rbf(), gaussian(), num_inducing=4)
    fit.fit(X, Y, learn_hyperparameters=False, learn_inducing=False, progress=False)
    refused(fit, "Memory is empty", lambda gp: gp.forget(torch.tensor([3])))


@pytest.mark.parametrize("factor", [-0.1, 1.1, NAN, INF, -INF])
def test_a_factor_that_is_no_part(factor):
    under_way(rf"factor must lie in \[0, 1\], got {factor}.*keeps all.*forgets all", lambda gp: gp.fade(factor))


@pytest.mark.parametrize(
    ("points", "match"),
    [
        (X[:3, 0], r"inducing_points must have shape .*got \(3,\)"),
        (X[:3, :1], "inducing_points must have 2 columns.*got 1"),
        (put(X[:3], (1, 1), NAN), "inducing_points must be finite.*row 1"),
        (X[:3].long(), "inducing_points must be float32 or float64, got torch.int64"),
        (X[:3].tolist(), "inducing_points must be a torch.Tensor, got list"),
    ],
)
def test_inducing_points_that_cannot_be(points, match):
    under_way(match, lambda gp: gp.move_inducing(points))


@pytest.mark.parametrize(
    "use",
    [
        lambda gp: gp.forget(torch.tensor([0])),
        lambda gp: gp.fade(0.5),
        lambda gp: gp.move_inducing(X[:3]),
        lambda gp: gp.condition(X[:3], Y[:3]),
        lambda gp: gp.save("nowhere"),
    ],
)
def test_use_before_the_first_batch(use):
    gp = DualGP(rbf(), gaussian(), num_inducing=4)
    refused(gp, "no posterior|call fit", use, errors.NotFittedError)
    assert gp.memory is None


# --- condition ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "y", "match"),
    [
        (X[:6, 0], Y[:6], r"X must have shape .*got \(6,\)"),
        (X[:6], Y[:5], r"y must have shape \(6,\).*got \(5,\)"),
        (X[:6].expand(3, 6, 2), Y[:6], r"y must have shape \(3, 6\).*got \(6,\)"),
        (put(X[:6], (0, 0), NAN), Y[:6], "X must be finite"),
        (X[:6], put(Y[:6], 0, INF), "y must be finite"),
        (X[:6].long(), Y[:6], "int64"),
    ],
)
def test_bad_data_to_condition_on(x, y, match):
    under_way(match, lambda gp: gp.condition(x, y))


def test_data_to_condition_on_of_another_kind_than_the_stream():
    labels = (Y[:6] > 0).double()
    under_way("float64.*got torch.float32", lambda gp: gp.condition(X[:6].float(), labels), BernoulliLikelihood)
    under_way(r"2\].*got \(6, 1\)", lambda gp: gp.condition(X[:6, :1], labels), BernoulliLikelihood)
    under_way("0 or 1", lambda gp: gp.condition(X[:6], labels - 1), BernoulliLikelihood)


# --- files ----------------------------------------------------------------------------------------


def test_a_rule_of_ones_own_has_to_be_given_again(tmp_path):
    rule = lambda c: c.keys  # noqa: E731
    gp = DualGP(rbf(), gaussian(), num_inducing=4, memory=3, memory_rule=rule)
    gp.update(X, Y, learn_hyperparameters=False)
    gp.save(tmp_path / "stream")
    with pytest.raises(errors.InputError, match="memory rule of your own.*memory_rule="):
        DualGP.load(tmp_path / "stream", rbf(), gaussian())
    with pytest.raises(errors.InputError, match="memory_rule must be .*got 'mine'"):
        DualGP.load(tmp_path / "stream", rbf(), gaussian(), memory_rule="mine")
    loaded = DualGP.load(tmp_path / "stream", rbf(), gaussian(), memory_rule=rule)
    assert torch.equal(loaded.memory.ids, gp.memory.ids)
