"""Mistakes get an error that says what to do, and leave the network and the posterior as they were."""

import pytest
import torch
from gpytorch.likelihoods import SoftmaxLikelihood
from jacobians import mlp
from netproblems import F64, NET, REGRESSOR, SOFTMAX, TARGETS, TAU, TEST, X_NEW, Y_NEW, Y_TEST, X, Y, gaussian, inputs
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from toys import unchecked

import dualgp
from dualgp import NetworkPosterior, from_weight_decay, network_gp
from dualgp.errors import InputError, UnsupportedError

Q = network_gp(NET, (X, Y), SOFTMAX, prior_precision=TAU)
NAN = X.clone()
NAN[4, 1] = float("nan")
BROKEN = mlp()
BROKEN[0].weight.data[0, 0] = float("inf")


@pytest.mark.parametrize(
    ("data", "likelihood", "options", "message"),
    [
        ((X, Y + 1), SOFTMAX, {}, r"targets 0 … 2; 10 of 30 are not, the first being 3"),
        ((X, Y.double() + 0.5), SOFTMAX, {}, "targets 0 … 2"),
        (
            (X, Y),
            SoftmaxLikelihood(num_classes=4, mixing_weights=False),
            {},
            "needs 4 outputs of the network, which has 3",
        ),
        ((X, TARGETS), gaussian(), {}, r"targets of shape \(30, 3\), got \(30,\)"),
        ((X, Y[:20]), SOFTMAX, {}, "one row each per datum"),
        ((X[:0], Y[:0]), SOFTMAX, {}, "no rows"),
        ((X[:, :1], Y), SOFTMAX, {}, r"does not take inputs \[n, 1\]"),
        (((10 * X).long(), Y), SOFTMAX, {}, "of torch.int64"),
        ((X.numpy(), Y.numpy()), SOFTMAX, {}, "must be tensors, got ndarray"),
        ((X, Y.numpy()), SOFTMAX, {}, "must be tensors, got ndarray"),
        ((X, Y), SOFTMAX, {"num_inducing": 2.5}, "whole number"),
        ((X, Y), SOFTMAX, {"prior_precision": None}, "positive number, got None"),
        ((X, Y), SOFTMAX, {"prior_precision": "1"}, "positive number, got '1'"),
        (DataLoader(TensorDataset(X[:0], Y[:0])), SOFTMAX, {}, "loader yields nothing"),
        ([], SOFTMAX, {}, "loader yields nothing"),
        (TensorDataset(X, Y), SOFTMAX, {}, "wrap it in torch.utils.data.DataLoader"),
        (iter([(X, Y)]), SOFTMAX, {}, "read again and again"),
        (3, SOFTMAX, {}, "read again and again"),
        ([X[0], Y], SOFTMAX, {}, "one row each per datum"),
        ([({"x": X}, Y)], SOFTMAX, {}, "got .'dict', 'Tensor'.. A network of several inputs"),
        ([X], SOFTMAX, {}, "must be"),
        (X, SOFTMAX, {}, "Inputs need their targets"),
        ((X, Y), SOFTMAX, {"y": Y}, "leave out y="),
        ((NAN, Y), SOFTMAX, {}, "NaN"),
        ((X, Y), SOFTMAX, {"prior_precision": 0.0}, "positive and finite"),
        ((X, Y), SOFTMAX, {"prior_precision": torch.ones(3)}, "4 parameter tensors"),
        ((X, Y), SOFTMAX, {"num_inducing": 0}, "at least 1"),
        ((X, Y), SOFTMAX, {"num_inducing": 3, "inducing_inputs": X[:3]}, "not both"),
        ((X, Y), SOFTMAX, {"num_inducing": 3, "structure": "dense"}, "for structure='sparse'"),
        ((X, Y), SOFTMAX, {"inducing_inputs": X[:3, :1]}, "must have shape"),
        ((X, Y), SOFTMAX, {"outputs": "independent", "structure": "dense"}, "function space"),
        ((X, Y), SOFTMAX, {"outputs": "independent", "structure": "kronecker"}, "function space"),
        ((X, Y), SOFTMAX, {"outputs": "both"}, "outputs must be one of"),
        ((X, Y), SOFTMAX, {"structure": "lowrank"}, "structure must be one of"),
        ((X, Y), SOFTMAX, {"centre": "zero"}, "centre must be one of"),
        ((X, Y), SOFTMAX, {"budget": 10}, "Raise the budget"),
        ((X, Y), SOFTMAX, {"params": ["head"]}, "No parameters are named"),
        ([(X, Y), (X[:, :1], Y)], SOFTMAX, {"num_inducing": 3}, "one shape"),
    ],
)
def test_a_conversion_that_cannot_be(data, likelihood, options, message):
    with unchecked(), pytest.raises(InputError, match=message):
        network_gp(NET, data, likelihood, **options)


def test_a_network_that_cannot_be():
    with pytest.raises(InputError, match="training has diverged"):
        network_gp(BROKEN, (X, Y), SOFTMAX)
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3, track_running_stats=False)).double()
    with pytest.raises(UnsupportedError, match="rows of the batch"):
        network_gp(net, (X, Y), SOFTMAX)
    with pytest.raises(UnsupportedError):
        network_gp(nn.Sequential(nn.Linear(2, 6), nn.Unflatten(1, (2, 3))).double(), (X, Y), SOFTMAX)
    with pytest.raises(UnsupportedError, match="mixing"):
        network_gp(NET, (X, Y), SoftmaxLikelihood(num_features=3, num_classes=3))


@pytest.mark.parametrize("verb", ["condition", "forget", "sites_at", "log_predictive", "leave_one_out"])
def test_data_that_do_not_fit(verb):
    before = Q.posterior.site.lam.clone()
    for x, y, message in (
        (X, Y + 1, "targets 0 … 2"),
        (X[:, :1], Y, "shape"),
        (X, Y[:4], "one row each"),
        (NAN, Y, "first row with NaN or infinity is 4"),
        (X, torch.zeros(30, 3), "targets of shape"),
    ):
        with pytest.raises(InputError, match=message):
            getattr(Q, verb)(x, y)
    assert torch.equal(before, Q.posterior.site.lam)


def test_a_datum_is_forgotten_once():
    q = Q.forget(X[:3], Y[:3])
    for again in (X[2:4], X[:1]):
        with pytest.raises(InputError, match="forgotten already. The first is row 0"):
            q.forget(again, Y[2 : 2 + len(again)] if len(again) == 2 else Y[:1])
    with pytest.raises(InputError, match="1 of 3 data are not in the posterior"):
        Q.forget(torch.cat([X[4:6], TEST[:1]]), torch.cat([Y[4:6], Y_TEST[:1]]))
    with pytest.raises(InputError, match="with these targets"):
        Q.forget(X[:1], (Y[:1] + 1) % 3)
    with pytest.raises(InputError, match="2 of 2"):
        Q.forget(X[:1].repeat(2, 1), Y[:1].repeat(2))
    Q.condition(X[:1], Y[:1]).forget(X[:1].repeat(2, 1), Y[:1].repeat(2))
    with pytest.raises(InputError, match="not in the posterior"):
        Q.leave_one_out(X_NEW, Y_NEW)
    with pytest.raises(InputError, match="not in the posterior"):
        Q.tuned("leave_one_out", X_NEW, Y_NEW)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("marginal",), {}, "method must be one of"),
        (("evidence", X, Y), {}, "takes no data"),
        (("validation",), {}, "held back"),
        (("leave_one_out",), {}, "those of the training"),
        ((), {"grid": [0.0, 1.0]}, "positive numbers"),
        ((), {"grid": []}, "positive numbers"),
        (("validation", X[:0], Y[:0]), {}, "no rows"),
    ],
)
def test_tuning_that_cannot_be(arguments, options, message):
    with unchecked(), pytest.raises(InputError, match=message):
        Q.tuned(*arguments, **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0, 5), "positive"),
        ((float("inf"), 5), "positive"),
        ((1.0, 0), "positive"),
        ((1.0, 5, "batchmean"), "reduction must be"),
    ],
)
def test_a_weight_decay_that_is_none(arguments, message):
    with unchecked(), pytest.raises(InputError, match=message):
        from_weight_decay(*arguments)


def test_noise_per_datum_must_be_given_and_positive():
    from gpytorch.likelihoods import FixedNoiseGaussianLikelihood

    noise = torch.full((30,), 0.1, dtype=F64)
    q = network_gp(REGRESSOR, (X, TARGETS), FixedNoiseGaussianLikelihood(noise))
    with pytest.raises(InputError, match="pass noise="):
        q.condition(X_NEW, Y_NEW.double())
    with pytest.raises(InputError, match="positive"):
        q.condition(X_NEW, Y_NEW.double(), noise=torch.zeros(9))
    loader = [(X[:20], TARGETS[:20], noise[:20]), (X[20:], TARGETS[20:], noise[20:])]
    by_loader = network_gp(REGRESSOR, loader, FixedNoiseGaussianLikelihood(noise))
    assert torch.allclose(by_loader.predict(TEST)[1], q.predict(TEST)[1], rtol=1e-9)


def test_a_progress_bar_is_shown_when_asked_for(capsys):
    network_gp(NET, (X, Y), SOFTMAX, progress=True)
    network_gp(NET, (inputs(5), Y[:5]), SOFTMAX, progress=False)
    assert isinstance(Q, NetworkPosterior)
    assert dualgp.network_gp is network_gp


def test_what_is_no_tensor_is_said_to_be_none():
    with unchecked(), pytest.raises(InputError, match="Inputs must be a torch.Tensor, got list"):
        Q.predict(TEST.tolist())
    with unchecked(), pytest.raises(InputError, match="Inputs must be a torch.Tensor, got ndarray"):
        Q.condition(X_NEW.numpy(), Y_NEW)
    with unchecked(), pytest.raises(InputError, match="Targets must be a tensor, got list"):
        Q.condition(X_NEW, Y_NEW.tolist())


def test_prior_precisions_by_tensor_are_the_callers_to_write_to_or_may_be_a_list():
    tau = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=F64)
    q = network_gp(NET, (X, Y), SOFTMAX, prior_precision=tau)
    before = q.tuned()
    with unchecked():
        of_list = network_gp(NET, (X, Y), SOFTMAX, prior_precision=tau.tolist()).tuned()
    assert torch.allclose(of_list.prior_precision.double(), before.prior_precision)
    tau *= 100.0
    assert torch.equal(q.tuned().prior_precision, before.prior_precision)


STRUCTURES = [
    {},
    {"num_inducing": 4},
    {"num_inducing": 4, "outputs": "independent"},
    {"structure": "full"},
    {"structure": "kronecker"},
]


@pytest.mark.parametrize("options", STRUCTURES)
def test_no_inputs_are_predicted_as_nothing_and_have_no_mean_score(options):
    q = network_gp(NET, (X, Y), SOFTMAX, **options)
    x, y = X[:0], Y[:0]
    assert [t.shape for t in q.predict(x)] == [(0, 3), (0, 3)]
    assert [t.shape for t in q.predict_blocks(x)] == [(0, 3), (0, 3, 3)]
    assert q.predict_joint(x).event_shape == (0, 3)
    assert q.sample(x, 2).shape == (2, 0, 3)
    for link in ("probit", "mc", "bridge"):
        assert q.predict_likelihood(x, link=link).probs.shape == (0, 3)
    assert q.log_predictive(x, y).shape == (0,)
    assert q.add(x, q.sites_at(x, y)).num_data == 30
    with pytest.raises(InputError, match="no data to score"):
        q.nlpd(x, y)
    with pytest.raises(InputError, match="0 inputs"):
        q.leave_one_out(x, y)


@pytest.mark.parametrize("options", STRUCTURES)
def test_counts_are_whole_numbers(options):
    q = network_gp(NET, (X, Y), SOFTMAX, **options)
    with unchecked():
        for bad in (-3, 2.5, True, "a"):
            with pytest.raises(InputError, match="grow must be a whole number and at least 0, got"):
                q.condition(X_NEW, Y_NEW, grow=bad)
        for bad in (-1, 0, 2.5):
            with pytest.raises(InputError, match="num_samples must be a whole number and at least 1, got"):
                q.sample(TEST, bad)
            with pytest.raises(InputError, match="num_samples must be a whole number"):
                q.predict_likelihood(TEST, link="mc", num_samples=bad)


def test_independent_outputs_choose_a_structure_in_function_space():
    q = network_gp(NET, (X, Y), SOFTMAX, outputs="independent")  # NC = 90 > P = 27
    full = network_gp(NET, (X, Y), SOFTMAX, outputs="independent", structure="full")
    assert torch.equal(q.predict(TEST)[1], full.predict(TEST)[1])
