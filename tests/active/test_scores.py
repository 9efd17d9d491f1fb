"""What a label would be worth: against conditioning on it, and against draws of what the label may be."""

import pytest
import torch
from families import FAMILIES, fitted
from gpytorch.likelihoods import BernoulliLikelihood, FixedNoiseGaussianLikelihood
from netproblems import NET, REGRESSOR, SOFTMAX, TARGETS, TEST, X_NEW, Y
from netproblems import X as X_NET
from netproblems import gaussian as network_noise
from toys import F64, at, gap, gaussian, line, matern, unchecked, waves

from dualgp import DualGP, Sites, errors, network_gp
from dualgp.active import select
from dualgp.active.field import moments
from dualgp.active.scores import RULES, Prospects, score
from dualgp.information import expected_beta, mutual_information, predictive_entropy
from dualgp.quadrature import expected_softmax

POOL = torch.rand(12, 2, generator=torch.Generator().manual_seed(5), dtype=F64) * 4 - 2
TARGETS_2D = torch.rand(9, 2, generator=torch.Generator().manual_seed(6), dtype=F64) * 4 - 2


def values(noise: float = 0.09) -> DualGP:
    x, f, _ = waves(30, 2)
    gp = DualGP(matern(0.9, 2.0, nu=1.5), gaussian(noise), num_inducing=30, jitter=1e-12)
    gp.fit(x, f, learn_hyperparameters=False, learn_inducing=False)
    return gp


def labels() -> DualGP:
    x, f, _ = waves(30, 2)
    gp = DualGP(matern(0.9, 2.0, nu=1.5), BernoulliLikelihood(), num_inducing=30, jitter=1e-12)
    gp.fit(x, (f > 0).double(), learn_hyperparameters=False, learn_inducing=False)
    return gp


def classifier():
    return network_gp(NET, (X_NET, Y), SOFTMAX, prior_precision=0.7)


# --- one by one -----------------------------------------------------------------------------------


def test_scores_of_a_process_are_functions_of_its_marginals():
    gp = labels()
    m, v = gp.predict(POOL)
    beta = expected_beta(gp.likelihood, m, v)
    assert gap(score(gp, POOL, "bald"), mutual_information(gp.likelihood, m, v)) < 1e-12
    assert gap(score(gp, POOL, "entropy"), predictive_entropy(gp.likelihood, m, v)) < 1e-12
    assert gap(score(gp, POOL, "variance"), v) < 1e-12
    assert gap(score(gp, POOL, "leverage"), beta * v / (1 + beta * v)) < 1e-12
    assert gap(score(gp, POOL, "boundary", level=0.3), -(m - 0.3).abs() / v.sqrt()) < 1e-12


def test_leverage_is_that_of_the_datum_once_it_is_in():
    gp = values()
    after = gp.condition(POOL[:1], at(7.0)).predict(POOL[:1])[1]
    assert gap(score(gp, POOL[:1], "leverage"), after / gp.likelihood.noise) < 1e-7


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_scored(name):
    """By all rules but those that need one output, Gaussian or discrete targets."""
    problem, _ = fitted(name)
    if name == "batch of GPs":
        return
    for rule in ("bald", "variance", "leverage", "random"):
        params = {"noise": problem.params["noise"][:20]} if problem.params else {}
        found = score(problem.gp, problem.x[:20], rule, **params)
        assert found.shape == (20,)
        assert bool((found >= 0).all())
        chosen = select(problem.gp, problem.x[:20], 3, rule, **params).indices
        assert len(chosen.unique()) == 3


def test_a_softmax_network_is_scored_as_its_softmax_sees_it():
    """Against draws of f from the centred joint: to what taking the latents as independent costs, 0.03 nats here."""
    q = classifier()
    found = score(q, TEST, "bald"), score(q, TEST, "entropy")
    mean, cov = q.predict_blocks(TEST)
    H = torch.eye(3, dtype=F64) - 1 / 3
    values, vectors = torch.linalg.eigh(H @ cov @ H)
    root = vectors * values.clamp_min(0).sqrt().unsqueeze(-2)
    g = torch.Generator().manual_seed(1)
    for i in range(len(TEST)):
        p = (mean[i] + torch.randn(200_000, 3, generator=g, dtype=F64) @ root[i].T).softmax(-1)
        total = torch.special.entr(p.mean(0)).sum()
        assert abs(found[1][i] - total) < 0.03
        assert abs(found[0][i] - (total - torch.special.entr(p).sum(-1).mean())) < 0.03


def test_what_lies_along_one_is_not_seen():
    """HVH does not change when all logits of a datum move together."""
    m, v = moments(classifier(), TEST)
    assert gap(m.sum(-1), 0.0) < 1e-12
    cov = classifier().predict_blocks(TEST)[1]
    H = torch.eye(3, dtype=F64) - 1 / 3
    assert gap(v, (H @ (cov + 50.0) @ H).diagonal(dim1=-2, dim2=-1) * 1.5) < 1e-9


# --- expected reduction ---------------------------------------------------------------------------


def test_reduction_of_variance_is_what_conditioning_does():
    gp = values()
    before = gp.predict(TARGETS_2D)[1]
    for i, found in enumerate(score(gp, POOL, "reduction", targets=TARGETS_2D)):
        after = gp.condition(POOL[i : i + 1], at(-3.0)).predict(TARGETS_2D)[1]
        assert gap(found, (before - after).mean()) < 1e-9


def test_reduction_in_chunks_is_the_same(monkeypatch):
    gp = labels()
    whole = score(gp, POOL, "reduction", targets=TARGETS_2D)
    monkeypatch.setattr("dualgp.active.scores._CHUNK", 5)
    assert gap(score(gp, POOL, "reduction", targets=TARGETS_2D), whole) < 1e-12


def test_reduction_of_a_network_is_what_conditioning_does():
    q = network_gp(REGRESSOR, (X_NET, TARGETS), network_noise(), prior_precision=0.7)
    before = q.predict(TEST)[1]
    found = score(q, X_NEW, "reduction", targets=TEST)
    for i in range(len(X_NEW)):
        after = q.condition(X_NEW[i : i + 1], torch.zeros(1, dtype=F64)).predict(TEST)[1]
        assert gap(found[i], (before - after).mean()) < 1e-9


def test_reduction_of_a_level_is_the_mean_over_what_may_be_observed():
    """Against Gauss–Hermite quadrature of the whole of conditioning, over y."""
    gp, level = values(0.3), 0.4
    m, v = gp.predict(TARGETS_2D)
    now = torch.special.ndtr((m - level) / v.sqrt())
    t = torch.linspace(-8, 8, 401, dtype=F64)
    w = (-0.5 * t.square()).exp()
    w = w / w.sum()
    for i, found in enumerate(score(gp, POOL[:4], "reduction", targets=TARGETS_2D, level=level)):
        mean, var = gp.predict(POOL[i : i + 1])
        y = mean + (var + gp.likelihood.noise).sqrt() * t
        after_m, after_v = gp.condition(POOL[i : i + 1].expand(401, 1, 2), y.detach().unsqueeze(-1)).predict(TARGETS_2D)
        p = torch.special.ndtr((after_m - level) / after_v.sqrt())
        want = (now * (1 - now) - w @ (p * (1 - p))).mean()
        assert gap(found, want) < 1e-8


# --- several at once ------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["bald", "variance", "reduction"])
def test_a_batch_is_chosen_one_by_one_each_given_those_before(rule):
    gp = values()
    options = {"targets": TARGETS_2D} if rule == "reduction" else {}
    found = select(gp, POOL, 5, rule, **options)
    chosen: list[int] = []
    for i, value in zip(found.indices.tolist(), found.scores.tolist(), strict=True):
        given = gp.condition(POOL[chosen], torch.zeros(len(chosen), dtype=F64))
        var = given.predict(POOL)[1]
        if rule == "bald":
            scores = 0.5 * (1 + var / gp.likelihood.noise.item()).log()
        elif rule == "variance":
            scores = var
        else:
            more = [gp.condition(POOL[[*chosen, j]], torch.zeros(len(chosen) + 1, dtype=F64)) for j in range(12)]
            scores = torch.stack([(given.predict(TARGETS_2D)[1] - m.predict(TARGETS_2D)[1]).mean() for m in more])
        scores[chosen] = -1.0
        assert i == int(scores.argmax())
        assert abs(value - float(scores[i])) < 1e-7
        chosen.append(i)


def test_a_batch_of_a_softmax_network_is_that_of_its_expected_sites():
    q = classifier()
    found = select(q, X_NEW, 3, "variance")
    m, v = moments(q, X_NEW)
    chosen: list[int] = []
    for i in found.indices.tolist():
        var = moments(q, X_NEW)[1].sum(-1)
        var[chosen] = -1.0
        assert i == int(var.argmax())
        p = expected_softmax(m[i : i + 1], v[i : i + 1])
        B = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
        q = q.add(X_NEW[i : i + 1], Sites(torch.zeros(1, 3, dtype=F64), B, True))
        chosen.append(i)


def test_the_information_of_a_batch_is_that_of_its_determinant():
    gp = values()
    found = select(gp, POOL, 4, "bald")
    V = gp.predict_joint(POOL[found.indices]).covariance_matrix
    want = 0.5 * torch.logdet(torch.eye(4, dtype=F64) + V / gp.likelihood.noise)
    assert gap(found.scores.sum(), want.detach()) < 1e-7


def test_twins_are_not_both_chosen_and_without_diversity_they_are():
    gp = values()
    twins = torch.cat([POOL[:1] + 5, POOL[:1] + 5.001, -POOL[1:4]])
    assert {0, 1} - set(select(gp, twins, 2, "variance").indices.tolist())
    assert set(select(gp, twins, 2, "variance", diverse=False).indices.tolist()) == {0, 1}


def test_a_shortlist_holds_the_best():
    gp = values()
    best = set(score(gp, POOL, "bald").argsort(descending=True)[:6].tolist())
    assert set(select(gp, POOL, 4, "bald", shortlist=6).indices.tolist()) <= best


def test_a_rule_of_your_own():
    gp = labels()
    found = select(gp, POOL, 3, lambda c: c.var.sum(-1) + 0 * c.mean.sum(-1))
    assert torch.equal(found.indices, select(gp, POOL, 3, "variance").indices)
    with pytest.raises(errors.InputError, match=r"shape \(12,\)"):
        score(gp, POOL, lambda c: c.var)
    with pytest.raises(errors.InputError, match="NaN"):
        score(gp, POOL, lambda c: c.var.sum(-1) * torch.nan)


def test_a_fair_sample_has_a_generator():
    gp = labels()
    draws = [select(gp, POOL, 4, "random", generator=torch.Generator().manual_seed(s)).indices for s in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


# --- bad input ------------------------------------------------------------------------------------


def test_a_model_never_fitted():
    gp = DualGP(matern(), gaussian())
    with unchecked():
        for rule in RULES:
            with pytest.raises(errors.NotFittedError, match="fit"):
                score(gp, POOL, rule, targets=TARGETS_2D)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": POOL * torch.nan}, "12 of 12 rows hold NaN"),
        ({"x": POOL[:0]}, "at least one row"),
        ({"x": POOL[0]}, "at least one row"),
        ({"count": 13}, "Asked for 13 of 12"),
        ({"count": 0}, "count must be a whole number"),
        ({"rule": "nonsense"}, "one of .*bald"),
        ({"rule": "reduction"}, "needs targets="),
        ({"rule": "reduction", "targets": TARGETS_2D[:0]}, "Targets must have at least one row"),
        ({"rule": "reduction", "targets": TARGETS_2D[:, :1]}, "Targets must be like the candidates"),
        ({"rule": "reduction", "targets": TARGETS_2D.float()}, "Targets must be like the candidates"),
        ({"rule": "boundary", "level": float("nan")}, "level must be a finite number"),
        ({"rule": lambda c: torch.full((len(c.mean),), -torch.inf)}, "finite numbers; 12 of 12"),
        ({"noise": torch.ones(12, dtype=F64)}, "takes no noise="),
        ({"shortlist": 2}, "shortlist"),
    ],
)
def test_what_cannot_be_chosen_from(arguments, message):
    with pytest.raises(errors.InputError, match=message):
        select(labels(), **{"x": POOL, "count": 3, "rule": "bald", **arguments})


@pytest.mark.parametrize(
    ("noise", "message"),
    [
        (torch.ones(3, dtype=F64), r"one finite value per candidate, \[12\]; got \(3,\)"),
        (1.0, "got float"),
        (torch.full((12,), torch.nan, dtype=F64), "one finite value"),
        (-torch.ones(12, dtype=F64), "positive variances"),
    ],
)
def test_noise_that_is_none(noise, message):
    one = torch.ones(12, dtype=F64)
    gp = DualGP(matern(), FixedNoiseGaussianLikelihood(one), num_inducing=6)
    gp.update(POOL, one, noise=one, learn_hyperparameters=False)
    assert len(select(gp, POOL, 2, noise=one).indices) == 2
    with pytest.raises(errors.InputError, match=message), unchecked():
        select(gp, POOL, 2, noise=noise)


def test_what_is_no_model():
    gp = labels()
    for other in (None, torch.nn.Linear(2, 1), gp.posterior, gp.kernel):
        with unchecked(), pytest.raises(errors.InputError, match="Expected a fitted DualGP or a NetworkPosterior"):
            score(other, POOL)


def test_a_rule_keeps_what_it_returned():
    """A choice strikes out what is chosen: not in the rule's own tensor, nor in the prospects that it returned."""
    kept = torch.arange(12, dtype=F64)
    select(labels(), POOL, 3, lambda c: kept)
    assert torch.equal(kept, torch.arange(12, dtype=F64))
    found = select(labels(), POOL, 3, lambda c: c.mean[:, 0])
    assert found.scores.isfinite().all()


@pytest.mark.parametrize("rule", ["boundary", "reduction"])
def test_several_outputs_where_one_is_needed(rule):
    problem, _ = fitted("multitask")
    with pytest.raises(errors.InputError, match="for one output"):
        score(problem.gp, problem.x, rule, targets=line(-1, 1, 3), level=0.0)


def test_an_entropy_that_is_not_known_names_what_to_use():
    problem, _ = fitted("poisson")
    with pytest.raises(errors.UnsupportedError, match="BALD"):
        score(problem.gp, problem.x, "entropy")


def test_prospects_of_no_field_have_no_reduction():
    c = Prospects(gaussian(), torch.zeros(3, 1, dtype=F64), torch.ones(3, 1, dtype=F64))
    with pytest.raises(errors.InputError, match="targets="):
        RULES["reduction"](c)
