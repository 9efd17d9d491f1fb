"""Core sets against determinants and refits; influence on a validation loss against finite differences."""

import itertools

import pytest
import torch
from families import fitted
from gpytorch.likelihoods import BernoulliLikelihood, MultitaskGaussianLikelihood, SoftmaxLikelihood
from netproblems import NET, SOFTMAX, TEST, Y_TEST, Y
from netproblems import X as X_NET
from toys import F64, gap, gaussian, line, matern, unchecked, waves

from dualgp import DualGP, errors, leverage, network_gp, perturb, sensitivity, validation_influence
from dualgp.active import core_set
from dualgp.information import expected_beta
from dualgp.posterior import Posterior
from dualgp.predictive import log_predictive
from dualgp.quadrature import expected_logsumexp

X_VAL = line(-1.2, 1.3, 7)


def process(kind: str) -> tuple[DualGP, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A fitted model, its inputs, and validation targets."""
    x, f, _ = waves(25, 1)
    g = 0.3 + X_VAL.squeeze(-1)
    likelihood, y, y_val = {
        "values": (gaussian(), f, g),
        "labels": (BernoulliLikelihood(), (f > 0).double(), (g > 0).double()),
        "classes": (SoftmaxLikelihood(num_classes=2, mixing_weights=False), (f > 0).long(), (g > 0).long()),
        "pairs": (MultitaskGaussianLikelihood(num_tasks=2).double(), torch.stack([f, -f], -1), torch.stack([g, g], -1)),
    }[kind]
    gp = DualGP(matern(0.6, 1.5), likelihood, num_inducing=9, jitter=1e-10)
    gp.fit(x, y, learn_hyperparameters=False, learn_inducing=False)
    return gp, x, y_val, y


def loss(q, likelihood, x_val: torch.Tensor, y_val: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        mean, cov = q.predict_blocks(x_val)
        var = cov.diagonal(dim1=-2, dim2=-1)
        if isinstance(likelihood, SoftmaxLikelihood):
            return expected_logsumexp(mean, var).sum() - mean.gather(-1, y_val.unsqueeze(-1)).sum()
        shape = y_val.shape
        return -log_predictive(likelihood, y_val, mean.reshape(shape), var.reshape(shape)).sum()


def check_influence(q, posterior, x, sites, x_val, y_val) -> None:
    """Central differences at ε = 1e-4: error about 1e-7 of the third derivative."""
    found = validation_influence(q, x, sites, x_val, y_val)
    for i in (0, 7, 19):
        eps = torch.zeros(len(x), dtype=F64)
        eps[i] = 1e-4
        ends = [loss(perturb(posterior, x, sites, s * eps), q.likelihood, x_val, y_val) for s in (1, -1)]
        assert gap(found[i], (ends[0] - ends[1]) / 2e-4) < 1e-5 * max(1.0, float(found.abs().max()))


@pytest.mark.parametrize("kind", ["values", "labels", "classes", "pairs"])
def test_influence_is_the_derivative_in_a_weight(kind):
    gp, x, y_val, _ = process(kind)
    check_influence(gp, gp.posterior, x, gp.sites, X_VAL, y_val)


def test_influence_in_a_network_is_the_derivative_in_a_weight():
    q = network_gp(NET, (X_NET, Y), SOFTMAX, prior_precision=0.7)
    check_influence(q, q.posterior, X_NET, q.sites_at(X_NET, Y), TEST, Y_TEST)


def test_influence_in_blocks_is_the_same(monkeypatch):
    gp, x, y_val, _ = process("values")
    whole = validation_influence(gp, x, gp.sites, X_VAL, y_val)
    monkeypatch.setattr("dualgp.influence.validation._NUMBERS", 50)
    assert gap(validation_influence(gp, x, gp.sites, X_VAL, y_val), whole) < 1e-12


def test_a_wrong_value_has_the_worst_influence():
    x, f, _ = waves(25, 1)
    y = f.clone()
    y[11] += 3.0
    gp = DualGP(matern(0.6, 1.5), gaussian(), num_inducing=15)
    gp.fit(x, y, learn_hyperparameters=False, learn_inducing=False)
    near = x + 0.02
    with torch.no_grad():
        found = validation_influence(gp, x, gp.sites, near, f)
    assert int(found.argmin()) == 11
    assert float(found[11]) < 0


def test_scores_are_those_of_influence():
    gp, x, y_val, _ = process("labels")
    for by, want in (
        ("leverage", leverage(gp, x, gp.sites)),
        ("sensitivity", sensitivity(gp, x, gp.sites).score),
        ("influence", validation_influence(gp, x, gp.sites, X_VAL, y_val)),
    ):
        found = core_set(gp, x, gp.sites, 5, by, validation=(X_VAL, y_val))
        assert torch.equal(found.indices, want.argsort(descending=True, stable=True)[:5])
        assert gap(found.scores, want[found.indices]) < 1e-12


@pytest.mark.parametrize("kind", ["values", "labels"])
def test_greedy_variance_is_the_determinant_one_by_one(kind):
    gp, x, _, _ = process(kind)
    found = core_set(gp, x, gp.sites, 5, "variance")
    K, B = Posterior(gp.posterior.basis).joint(x)[1], gp.sites.beta
    if kind == "labels":  # before anything is known of them
        B = expected_beta(gp.likelihood, torch.zeros(25, dtype=F64), K.diagonal())

    def information(rows: list[int]) -> float:
        root = B[rows].sqrt()
        return float(0.5 * torch.logdet(torch.eye(len(rows), dtype=F64) + root.unsqueeze(-1) * K[rows][:, rows] * root))

    chosen: list[int] = []
    for i in found.indices.tolist():
        gains = [information([*chosen, j]) if j not in chosen else -1.0 for j in range(25)]
        assert gains[i] > max(gains) - 1e-9
        chosen.append(i)
    assert abs(float(found.scores.sum()) - information(chosen)) < 1e-8
    best = max(information(list(rows)) for rows in itertools.combinations(range(25), 2))
    assert information(chosen[:2]) > (1 - 1 / torch.e) * best  # of any greedy choice of information


def test_greedy_variance_of_a_network_is_the_determinant():
    q = network_gp(NET, (X_NET, Y), SOFTMAX, prior_precision=0.7)
    sites = q.sites_at(X_NET, Y)
    found = core_set(q, X_NET, sites, 4, "variance")
    prior = Posterior(q.basis)
    rows = found.indices
    K, B = prior.joint(X_NET[rows])[1], torch.block_diag(*sites.beta[rows])
    sign, logdet = torch.linalg.slogdet(torch.eye(12, dtype=F64) + K @ B)
    assert abs(float(found.scores.sum()) - 0.5 * float(logdet)) < 1e-8


def test_a_refit_on_a_core_set_is_closer_than_on_as_many_at_random():
    """The law that it is for; the mean over ten random sets."""
    gp, x, _, y = process("values")
    T = line(-1.4, 1.4, 40)

    def error(rows: torch.Tensor) -> float:
        small = DualGP(gp.kernel, gp.likelihood, num_inducing=len(rows))
        small.fit(x[rows], y[rows], learn_hyperparameters=False, learn_inducing=False)
        with torch.no_grad():
            return float((small.predict(T)[0] - gp.predict(T)[0]).square().mean())

    g = torch.Generator().manual_seed(0)
    chance = sum(error(torch.randperm(25, generator=g)[:6]) for _ in range(10)) / 10
    assert error(core_set(gp, x, gp.sites, 6, "variance").indices) < 0.5 * chance


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 26}, "Asked for 26 of 25"),
        ({"count": 0}, "whole number"),
        ({"by": "nonsense"}, "one of"),
        ({"by": "influence"}, "validation="),
        ({"by": "influence", "validation": (X_VAL, X_VAL[:3, 0])}, "validation targets"),
        ({"by": "influence", "validation": (X_VAL, 2 + X_VAL[:, 0])}, "0 or 1"),
        ({"x": line(-1, 1, 3)}, "its site"),
        ({"x": line(-1, 1, 25) * torch.nan}, "NaN"),
    ],
)
def test_what_cannot_be_chosen(arguments, message):
    gp, x, _, _ = process("labels")
    with unchecked(), pytest.raises(errors.InputError, match=message):
        core_set(gp, **{"x": x, "sites": gp.sites, "count": 3, "by": "leverage", **arguments})


def test_validation_targets_of_another_number_of_outputs():
    problem, _ = fitted("multitask")
    with pytest.raises(errors.InputError, match="2 outputs"):
        validation_influence(problem.gp, problem.x, problem.gp.sites, X_VAL, X_VAL)
