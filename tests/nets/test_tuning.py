"""Other prior precisions from one spectrum are what they are from scratch, and the one chosen is the best."""

import copy
import dataclasses

import pytest
import torch
from netproblems import (
    F64,
    NET,
    REGRESSOR,
    SOFTMAX,
    TARGETS,
    TARGETS_TEST,
    TAU,
    TEST,
    X_NEW,
    Y_NEW,
    Y_TEST,
    X,
    Y,
    gap,
    gaussian,
    inputs,
)
from toys import unchecked

import dualgp
from dualgp import Posterior, Site, network_gp
from dualgp.nets.links import class_log_probs

GRID = torch.tensor([1e-3, 0.05, TAU, 4.0, 300.0], dtype=F64)
KINDS = [
    {},
    {"centre": "map"},
    {"num_inducing": 5},
    {"num_inducing": 5, "centre": "map"},
    {"num_inducing": 5, "outputs": "independent"},
    {"num_inducing": 5, "outputs": "independent", "centre": "map"},
    {"structure": "kronecker"},
    {"structure": "kronecker", "centre": "map"},
    {"structure": "diagonal"},
]


def convert(tau, options):
    return network_gp(NET, (X, Y), SOFTMAX, prior_precision=tau, **options)


@pytest.mark.parametrize("options", KINDS)
def test_another_prior_precision_is_a_conversion_at_it(options):
    q = convert(TAU, options)
    for tau in GRID.tolist():
        moved, fresh = q.with_prior_precision(tau), convert(tau, options)
        for a, b in zip(moved.predict_blocks(TEST), fresh.predict_blocks(TEST), strict=True):
            assert gap(a, b) < 1e-9 * (1 + b.abs().max())
        for value in (moved.log_marginal_likelihood(), q.log_marginal_likelihood(tau)):
            assert value == pytest.approx(fresh.log_marginal_likelihood(), rel=1e-9)
        assert moved.nlpd(TEST, Y_TEST) == pytest.approx(fresh.nlpd(TEST, Y_TEST), rel=1e-9)
        assert moved.stationarity.residual == pytest.approx(fresh.stationarity.residual, rel=1e-9)


@pytest.mark.filterwarnings("ignore:The removal")  # a Kronecker product does not contain the sites of its data
@pytest.mark.parametrize("options", KINDS)
def test_a_sweep_scores_each_as_it_scores_itself(options):
    q = convert(TAU, options)
    if options.get("structure") is None:
        q = q.condition(X_NEW, Y_NEW, grow=0)
    x, y = (X, Y) if options.get("structure") else (torch.cat([X, X_NEW]), torch.cat([Y, Y_NEW]))
    evidence = q.sweep(GRID)
    held_back = q.sweep(GRID, "validation", TEST, Y_TEST)
    left_out = q.sweep(GRID, "leave_one_out", [(x[:20], y[:20]), (x[20:], y[20:])])
    for i, tau in enumerate(GRID.tolist()):
        one = q.with_prior_precision(tau)
        assert float(evidence[i]) == pytest.approx(one.log_marginal_likelihood(), rel=1e-9)
        assert float(held_back[i]) == pytest.approx(-one.nlpd(TEST, Y_TEST), rel=1e-9)
        loo = one.leave_one_out(x, y)
        log_p = class_log_probs(loo.mean, loo.cov).gather(-1, y.unsqueeze(-1)).mean()
        assert float(left_out[i]) == pytest.approx(float(log_p), rel=1e-7)


@pytest.mark.parametrize("centre", ["network", "map"])
def test_a_regression_is_left_out_as_influence_says(centre):
    q = network_gp(REGRESSOR, (X, TARGETS), gaussian(), prior_precision=TAU, centre=centre)
    got = q.sweep(GRID, "leave_one_out", X, TARGETS)
    expected = [-q.with_prior_precision(tau).leave_one_out(X, TARGETS).nlpd for tau in GRID.tolist()]
    assert torch.allclose(got, torch.tensor(expected, dtype=F64), rtol=1e-9)
    i = 4
    rest = torch.arange(30) != i
    if centre == "map":
        without = network_gp(REGRESSOR, (X[rest], TARGETS[rest]), gaussian(), prior_precision=TAU, centre=centre)
        log_p = without.log_predictive(X[i : i + 1], TARGETS[i : i + 1])
        assert gap(q.leave_one_out(X, TARGETS).log_predictive[i : i + 1], log_p) < 1e-9


@pytest.mark.parametrize("method", ["evidence", "validation", "leave_one_out"])
def test_the_best_is_chosen_and_refined(method):
    data = {"evidence": (), "validation": (TEST, TARGETS_TEST), "leave_one_out": (X, TARGETS)}[method]
    q = network_gp(REGRESSOR, (X, TARGETS), gaussian(), prior_precision=TAU)
    best = q.tuned(method, *data)
    q = q.with_centre("map") if method == "leave_one_out" else q
    fine = torch.logspace(-6, 8, 2000, dtype=F64)
    values = q.sweep(fine, method, *data)
    assert float(q.sweep([best.prior_precision], method, *data)) > float(values.max()) - 1e-3 * abs(float(values.max()))
    assert isinstance(best.prior_precision, float)
    if method == "evidence":
        assert best.prior_precision == pytest.approx(float(fine[values.argmax()]), rel=0.03)
        twice = best.tuned()
        assert twice.prior_precision == pytest.approx(best.prior_precision, rel=0.03)


def test_one_factor_for_all_tensors():
    tau = torch.tensor([0.3, 2.0, 1.0, 5.0], dtype=F64)
    q = network_gp(NET, (X, Y), SOFTMAX, prior_precision=tau)
    best = q.tuned(grid=[0.1, 1.0, 10.0])
    ratio = best.prior_precision / tau
    assert gap(ratio, ratio[:1].expand(4)) < 1e-12
    assert best.log_marginal_likelihood() >= q.log_marginal_likelihood()


def test_a_posterior_with_sites_of_unknown_targets_has_no_evidence():
    q = convert(TAU, {})
    for other in (q.add(X_NEW, q.sites_at(X_NEW, Y_NEW)), q.remove(X[:3], q.sites_at(X[:3], Y[:3]))):
        with pytest.raises(dualgp.errors.UnsupportedError, match="condition"):
            other.log_marginal_likelihood()
        other.tuned("validation", TEST, Y_TEST)


def test_more_removed_than_added_is_no_gaussian_at_any_small_prior_precision():
    q = convert(1e4, {}).remove(TEST, dualgp.laplace_sites(SOFTMAX, Y_TEST, NET(TEST).detach()))
    with pytest.raises(dualgp.errors.NotPositiveDefiniteError, match="smallest eigenvalue"):
        q.sweep([1e-4], "validation", TEST, Y_TEST)


@pytest.mark.parametrize("options", [{}, {"params": "last_layer"}, {"num_inducing": 30}])
def test_in_float32_what_rounding_took_is_not_taken_for_removed_data(options):
    x, y = inputs(400), torch.arange(400) % 3
    q, exact = (network_gp(copy.deepcopy(NET).to(t), (x.to(t), y), SOFTMAX, **options) for t in (torch.float32, F64))
    assert q.tuned().prior_precision == pytest.approx(exact.tuned().prior_precision, rel=0.03)


def test_centred_at_zero_the_evidence_does_not_count_weights_that_no_datum_sees():
    x, y = X[:4], Y[:4]  # NC = 12 < P = 27
    dense, full = (
        network_gp(NET, (x, y), SOFTMAX, prior_precision=TAU, centre="map", structure=kind)
        for kind in ("dense", "full")
    )
    assert full.posterior.basis.size < dense.posterior.basis.size
    assert torch.allclose(full.sweep(GRID), dense.sweep(GRID), rtol=1e-8)


def test_rounding_of_a_null_space_in_single_precision_is_no_removal():
    net, x, y = copy.deepcopy(NET).float(), X[:6].float(), Y[:6]  # 12 directions of 27 are seen
    q = network_gp(net, (x, y), SOFTMAX, prior_precision=1e-3, structure="dense")
    B = q.posterior.site.B.float().double()  # as another library may have summed it
    assert float(torch.linalg.eigvalsh(B).min()) < -1e-10
    q = dataclasses.replace(q, posterior=Posterior(q.basis, Site(q.posterior.site.lam, B)))
    low = torch.tensor([1e-12, 1e-9, 1e-6], dtype=F64)
    assert bool(q.sweep(low).isfinite().all())
    assert float(q.spectrum.values.min()) == 0


@pytest.mark.parametrize("options", [*KINDS, {"structure": "dense"}])
def test_a_centre_is_what_it_is_from_scratch(options):
    other = {"network": "map", "map": "network"}[options.get("centre", "network")]
    q = convert(TAU, options)
    moved, fresh = q.with_centre(other), convert(TAU, options | {"centre": other})
    back = moved.with_centre(q.centre).predict(TEST)[0]
    assert gap(back, q.predict(TEST)[0]) < 1e-9 * (1 + back.abs().max())
    if options.get("structure") != "kronecker":
        moved, fresh = (p.condition(X_NEW, Y_NEW).with_prior_precision(4.0) for p in (moved, fresh))
    for a, b in zip(moved.predict_blocks(TEST), fresh.predict_blocks(TEST), strict=True):
        assert gap(a, b) < 1e-9 * (1 + b.abs().max())
    assert moved.log_marginal_likelihood() == pytest.approx(fresh.log_marginal_likelihood(), rel=1e-9)


def test_a_centre_has_a_name():
    q = convert(TAU, {})
    assert q.with_centre("network") is q
    with pytest.raises(dualgp.errors.InputError, match="centre must be"), unchecked():
        q.with_centre("prior")


def test_leaving_one_out_of_a_network_that_has_seen_all_does_not_choose_an_infinite_prior_precision():
    q = network_gp(REGRESSOR, (X, TARGETS), gaussian(), prior_precision=TAU)
    at_infinity = q.with_prior_precision(1e8)
    fit = at_infinity.sweep([1e8], "leave_one_out", X, TARGETS)
    assert float(fit) == pytest.approx(q.log_likelihood / 30, abs=1e-5)  # the network's fit: nothing is left out
    tuned, exact = (q.with_centre(c).tuned("leave_one_out", X, TARGETS) for c in ("network", "map"))
    assert tuned.centre == "network"
    assert tuned.prior_precision == pytest.approx(exact.prior_precision, rel=1e-6)
    assert tuned.prior_precision < 1e6


@pytest.mark.parametrize("options", [{"structure": "dense"}, {"num_inducing": 8}])
def test_what_was_removed_beyond_rounding_is_no_gaussian_in_single_precision_either(options):
    q = network_gp(copy.deepcopy(NET).float(), (X.float(), Y), SOFTMAX, prior_precision=1.0, **options)
    with pytest.raises(dualgp.errors.NotPositiveDefiniteError):
        q.remove(X.float(), 1.01 * q.sites_at(X.float(), Y)).with_prior_precision(1e-6)
