"""Centre "map" is the mean and evidence of the linearised model under N(0, τ⁻¹I), also where w does not span θ."""

import copy

import pytest
import reference as ref
import torch
from jacobians import jacobian
from netproblems import F64, NET, SOFTMAX, TAU, TEST, X_NEW, Y_NEW, X, Y, gap, log_lik, theta, trained

from dualgp import network_gp
from dualgp.errors import NumericalWarning

FAR = torch.cat([TEST, 4.0 * TEST])
GRID = torch.tensor([0.05, TAU, 40.0], dtype=F64)
SPARSE = [{"num_inducing": 2}, {"num_inducing": 5}, {"num_inducing": 4, "outputs": "independent"}]


def convert(x=X, y=Y, tau=TAU, centre="map", **options):
    return network_gp(NET, (x, y), SOFTMAX, prior_precision=tau, centre=centre, **options)


def expected(q, x, y, tau=TAU, at=FAR):
    """Mean [n, C] and log Z by `reference.projected_map`; outputs that are independent are models of their own."""
    J, J_at, J_Z, t = jacobian(NET, x), jacobian(NET, at), jacobian(NET, q.basis.inducing_inputs), theta(NET)
    sites = q.sites_at(x, y)
    alpha = sites.alpha(NET(x).detach())
    outputs = [slice(None)] if sites.coupled else [slice(c, c + 1) for c in range(3)]
    beta = sites.beta if sites.coupled else torch.diag_embed(sites.beta)
    parts = [ref.projected_map(J[:, c], beta[:, c, c], alpha[:, c], t, tau, J_at[:, c], J_Z[:, c]) for c in outputs]
    shift, gain = (list(part) for part in zip(*parts, strict=True))
    return NET(at).detach() + torch.cat(shift, -1), log_lik(NET, SOFTMAX, x, y) + sum(gain)


@pytest.mark.parametrize("options", SPARSE)
def test_few_inducing_inputs_are_the_projected_model(options):
    q = convert(**options)
    for tau in GRID.tolist():
        mean, log_z = expected(q, X, Y, tau)
        for p in (convert(tau=tau, **options), q.with_prior_precision(tau)):
            assert gap(p.predict(FAR)[0], mean) < 1e-8 * (1 + mean.abs().max())
            assert p.log_marginal_likelihood() == pytest.approx(log_z, rel=1e-9)
        assert float(q.sweep([tau])) == pytest.approx(log_z, rel=1e-9)


@pytest.mark.parametrize("count", [4, 30])
@pytest.mark.parametrize("options", [{"structure": "full"}, {}])
def test_all_inputs_are_the_dense_model_everywhere(count, options):
    """4 data: NC = 12 < P = 27, so that most of θ* is outside of the span."""
    x, y = X[:count], Y[:count]
    dense = convert(x, y, structure="dense")
    q = convert(x, y, **(options or {"inducing_inputs": x}))
    assert q.basis.has_residual == (count == 4) or "structure" not in options
    tol = 1e-8 if options else 1e-5  # directions of 1e-7 of the largest are left to the prior
    for tau in GRID.tolist():
        a, b = q.with_prior_precision(tau), dense.with_prior_precision(tau)
        for mine, theirs in zip(a.predict_blocks(FAR), b.predict_blocks(FAR), strict=True):
            assert gap(mine, theirs) < tol * (1 + theirs.abs().max())
        assert a.log_marginal_likelihood() == pytest.approx(b.log_marginal_likelihood(), rel=tol)


def test_a_prediction_that_no_datum_tells_of_is_the_linear_model_at_zero():
    """f(x) − J(x)θ*, not the network: what the prior mean 0 of the weights says."""
    q = convert(num_inducing=2).forget(X, Y)
    prior = NET(FAR).detach() - jacobian(NET, FAR) @ theta(NET)
    assert gap(q.predict(FAR)[0], prior) < 1e-8
    assert q.log_marginal_likelihood() == pytest.approx(0.0, abs=1e-8)


@pytest.mark.parametrize("options", SPARSE)
def test_updates_are_conversions_with_other_data(options):
    q, union = convert(**options), (torch.cat([X, X_NEW]), torch.cat([Y, Y_NEW]))
    more, less = q.condition(X_NEW, Y_NEW, grow=0), q.forget(X[20:], Y[20:])
    for p, data in ((more, union), (less, (X[:20], Y[:20]))):
        mean, log_z = expected(p, *data)
        assert gap(p.predict(FAR)[0], mean) < 1e-8 * (1 + mean.abs().max())
        assert p.log_marginal_likelihood() == pytest.approx(log_z, rel=1e-9)


@pytest.mark.parametrize("options", SPARSE)
def test_growth_alone_changes_nothing(options):
    q = convert(**options)
    grown = q.condition(X_NEW * 3.0, Y_NEW).forget(X_NEW * 3.0, Y_NEW)
    assert grown.basis.size > q.basis.size
    for mine, theirs in zip(grown.predict_blocks(FAR), q.predict_blocks(FAR), strict=True):
        assert gap(mine, theirs) < 1e-8 * (1 + theirs.abs().max())
    assert grown.log_marginal_likelihood() == pytest.approx(q.log_marginal_likelihood(), rel=1e-9)
    both = grown.condition(X_NEW, Y_NEW, grow=0).forget(X[:9], Y[:9]), q.forget(X[:9], Y[:9])
    assert gap(both[0].forget(X_NEW, Y_NEW).predict(FAR)[0], both[1].predict(FAR)[0]) < 1e-8


@pytest.mark.parametrize("options", [*SPARSE, {"structure": "full"}, {"structure": "diagonal"}, {}])
@pytest.mark.parametrize("centre", ["network", "map"])
def test_a_change_of_centre_is_a_conversion_with_the_other(options, centre):
    """After growth, new data, removal and another prior precision as before them."""

    def later(q):
        q = q.condition(X_NEW * 3.0, Y_NEW).forget(X[20:], Y[20:]).with_prior_precision(3.0)
        return q.add(TEST, q.sites_at(TEST, Y_NEW[:7])).condition(X_NEW[:2], Y_NEW[:2])

    other = {"network": "map", "map": "network"}[centre]
    q, fresh = convert(centre=centre, **options), convert(centre=other, **options)
    for a, b in ((q.with_centre(other), fresh), (later(q).with_centre(other), later(fresh))):
        for mine, theirs in zip(a.predict_blocks(FAR), b.predict_blocks(FAR), strict=True):
            assert gap(mine, theirs) < 1e-8 * (1 + theirs.abs().max())
    back = q.with_centre(other).with_centre(centre)
    assert back.log_marginal_likelihood() == pytest.approx(q.log_marginal_likelihood(), rel=1e-9)
    a, b = (p.condition(X_NEW * 3.0, Y_NEW) for p in (q, fresh))
    assert a.with_centre(other).log_marginal_likelihood() == pytest.approx(b.log_marginal_likelihood(), rel=1e-9)


def test_the_evidence_after_forgetting_is_that_of_a_maximum_or_warns():
    """With none left log Z is 0, and is found at a maximum alone; elsewhere it is off by what θ* is from one."""
    net = trained(copy.deepcopy(NET), SOFTMAX, X, Y, TAU)
    at_maximum = network_gp(net, (X, Y), SOFTMAX, prior_precision=TAU).forget(X, Y)
    assert at_maximum.log_marginal_likelihood() == pytest.approx(0.0, abs=1e-5)
    q = convert(centre="network")
    with_new = q.condition(X_NEW, Y_NEW)
    assert with_new.log_marginal_likelihood() < q.log_marginal_likelihood()  # no warning: nothing was forgotten
    with_new.forget(X_NEW, Y_NEW).with_centre("map").log_marginal_likelihood()
    less = q.forget(X, Y)
    with pytest.warns(NumericalWarning, match="no maximum of its posterior.*with_centre"):
        assert abs(less.log_marginal_likelihood()) > 1.0
    assert less.with_centre("map").log_marginal_likelihood() == pytest.approx(0.0, abs=1e-8)
    with pytest.warns(NumericalWarning, match="no evidence"):
        less.tuned()
