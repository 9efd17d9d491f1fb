"""Leaving data out of a diagonal structure: what `forget` does, datum by datum."""

import pytest
from netproblems import NET, REGRESSOR, SOFTMAX, TARGETS, TAU, X, Y, gap, gaussian
from toys import unchecked

from dualgp import errors, leave_one_out, network_gp, sensitivity

PROBLEMS = {"classes": (NET, Y, SOFTMAX), "values": (REGRESSOR, TARGETS, gaussian())}


@pytest.mark.parametrize("centre", ["network", "map"])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_one_left_out_of_a_diagonal_is_one_forgotten(problem, centre):
    net, y, likelihood = PROBLEMS[problem]
    q = network_gp(net, (X, y), likelihood, prior_precision=TAU, structure="diagonal", centre=centre)
    out = q.leave_one_out(X, y)
    assert out.num_capped == 0
    for i in (0, 7, 19):
        mean, cov = q.forget(X[i : i + 1], y[i : i + 1]).predict_blocks(X[i : i + 1])
        assert gap(out.mean[i], mean[0]) < 1e-9 * (1 + mean.abs().max())
        assert gap(out.cov[i], cov[0]) < 1e-9 * (1 + cov.abs().max())


def test_tuning_by_leaving_out_of_a_diagonal_scores_what_forgetting_does():
    q = network_gp(NET, (X, Y), SOFTMAX, prior_precision=TAU, structure="diagonal")
    q = q.with_centre("map")  # by which `tuned` chooses
    found = q.sweep([0.5, 2.0], "leave_one_out", X, Y)
    for tau, score in zip((0.5, 2.0), found, strict=True):
        at = q.with_prior_precision(tau)
        each = [at.forget(X[i : i + 1], Y[i : i + 1]).nlpd(X[i : i + 1], Y[i : i + 1]) for i in range(len(X))]
        assert abs(float(score) + sum(each) / len(each)) < 1e-9


@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_measures_ask_the_structure_what_a_removal_is(problem):
    net, y, likelihood = PROBLEMS[problem]
    q = network_gp(net, (X, y), likelihood, prior_precision=TAU, structure="diagonal")
    sites = q.sites_at(X, y)
    out, moved = leave_one_out(q, X, y, sites, likelihood), sensitivity(q, X, sites)
    with unchecked(), pytest.raises(errors.InputError, match="order must be"):
        sensitivity(q, X, sites, order="second")
    small = 1e-5
    first = sensitivity(q, X, sites, order="first")
    for i in (0, 7, 19):
        at, site = X[i : i + 1], sites[i : i + 1]
        held, (mean, cov) = q.posterior.function_blocks(at), q.posterior.remove(at, site).function_blocks(at)
        assert gap(out.mean[i], mean[0]) < 1e-9 * (1 + mean.abs().max())
        assert gap(moved.mean_shift[i], (mean - held[0])[0]) < 1e-9 * (1 + mean.abs().max())
        assert gap(moved.var_shift[i], (cov - held[1])[0].diagonal()) < 1e-9 * (1 + cov.abs().max())
        less, more = (q.posterior.add(at, site * s).function_blocks(at) for s in (-small, small))
        assert gap(first.mean_shift[i], (less[0] - more[0])[0] / (2 * small)) < 1e-6 * (1 + mean.abs().max())
        assert gap(first.var_shift[i], (less[1] - more[1])[0].diagonal() / (2 * small)) < 1e-6 * (1 + cov.abs().max())
