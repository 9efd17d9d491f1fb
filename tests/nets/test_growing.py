"""New data where Z sees too little: Z takes in their inputs, and nothing is lost of the old ones."""

import copy

import gpytorch
import pytest
import torch
from netproblems import F64, NET, REGRESSOR, SOFTMAX, TARGETS, TAU, TEST, X_NEW, Y_NEW, X, Y, gap, gaussian

from dualgp import JacobianBasis, Posterior, errors, leave_one_out, leverage, network_gp
from dualgp.kernels import NetworkJacobian
from dualgp.nets.growth import news
from dualgp.nets.links import class_log_probs

OPTIONS = [
    {"num_inducing": 3},
    {"num_inducing": 3, "centre": "map"},
    {"num_inducing": 3, "outputs": "independent"},
    {"num_inducing": 20},  # 60 directions of 40-odd weights: by an orthonormal basis of them
]


def same(a, b, tol):
    return all(gap(s, t) < tol for s, t in zip(a, b, strict=True))


@pytest.mark.parametrize("options", [o for o in OPTIONS if "centre" not in o])  # for "map" see test_centres
def test_a_grown_basis_predicts_as_before(options):
    q = network_gp(NET, (X, Y), SOFTMAX, prior_precision=TAU, **options)
    basis = q.basis.grown(X_NEW)
    more = q.posterior.rebase(basis)
    assert basis.size > q.basis.size or not q.basis.has_residual
    assert same(more.predict_blocks(TEST), q.predict_blocks(TEST), 1e-9)
    assert basis.grown(X_NEW).size == basis.size  # what is seen already is not news


def test_a_subspace_of_weights_grows_too():
    params, Z = ["0.weight", "0.bias", "2.weight"], X[:40]
    jacobian = NetworkJacobian(NET, X[:2], params=params)
    few = JacobianBasis.at_inputs(jacobian, Z[:3].repeat(jacobian.num_params, 1), TAU)  # more rows than weights, rank 9
    q = Posterior(few).add(X, network_gp(NET, (X, Y), SOFTMAX).sites_at(X, Y))
    basis = few.grown(X_NEW)
    assert few.size < basis.size <= jacobian.num_params
    assert same(q.rebase(basis).predict_blocks(TEST), q.predict_blocks(TEST), 1e-8)
    assert torch.equal(basis.inducing_inputs, torch.cat([few.inducing_inputs, X_NEW]))
    first = basis.first(few.size)  # as it was before
    assert first.size == few.size
    assert gap(first.features(TEST).phi, few.features(TEST).phi) < 1e-14


def test_inputs_in_another_dtype_join_those_that_are_held():
    basis = network_gp(NET, (X, Y), SOFTMAX, prior_precision=TAU, num_inducing=3).basis
    assert basis.grown(X_NEW.float()).inducing_inputs.dtype == F64
    single = network_gp(copy.deepcopy(NET).float(), (X.float(), Y), SOFTMAX, num_inducing=3).basis
    grown = single.grown(X_NEW)
    assert grown.inducing_inputs.dtype == torch.float32
    assert grown.features(TEST).phi.dtype == single.features(TEST).phi.dtype


def test_what_is_rounding_is_told_by_the_greatest_row_of_all():
    """A row of 1e-7 of the others is of 1e-14 of the largest eigenvalue: its direction is no news."""
    net = torch.nn.Linear(3, 1, bias=False).double()
    rows = torch.eye(3, dtype=F64)
    few = JacobianBasis.at_inputs(NetworkJacobian(net, rows), rows[:1].repeat(4, 1), TAU)  # more rows than weights
    assert few.size == 1
    assert few.grown(rows[1:2]).size == 2
    assert few.grown(torch.stack([rows[1], 1e-7 * rows[2]])).size == 2
    assert few.grown(torch.stack([rows[1], 1e-4 * rows[2]])).size == 3


@pytest.mark.parametrize("structure", ["full", "sparse"])
@pytest.mark.parametrize("centre", ["network", "map"])
def test_with_all_inputs_at_hand_new_data_elsewhere_are_exact(structure, centre):
    """Far from the old data nothing of f was in the span of Z: the sites of new data had nothing to act on."""
    x, y = X[:8] * 0.1, TARGETS[:8]
    far, targets = X_NEW * 3.0, torch.ones(len(X_NEW), 1, dtype=F64)
    options = {"structure": "full"} if structure == "full" else {"inducing_inputs": x}
    exact = network_gp(REGRESSOR, (x, y), gaussian(), prior_precision=TAU, structure="dense", centre=centre)
    q = network_gp(REGRESSOR, (x, y), gaussian(), prior_precision=TAU, centre=centre, **options)
    union = exact.condition(far, targets)
    grown, stuck = q.condition(far, targets), q.condition(far, targets, grow=0)
    assert same(grown.predict(far), union.predict(far), 2e-3)  # an input that is not taken in costs 1e-3 nats at most
    assert not same(stuck.predict(far), union.predict(far), 2e-2)
    assert len(grown.basis.inducing_inputs) <= 8 + len(far)
    back = grown.forget(far, targets)
    assert gap(back.predict(TEST)[1], q.predict(TEST)[1]) < 1e-8
    assert gap(back.predict(TEST)[0], q.predict(TEST)[0]) < 1e-8
    assert q.condition(x, y).basis is q.basis  # Z has them all


def test_growth_keeps_to_its_limit():
    q = network_gp(NET, (X, Y), SOFTMAX, prior_precision=TAU, num_inducing=3)
    sizes = [len(q.condition(X_NEW, Y_NEW, grow=k).basis.inducing_inputs) for k in (0, 1, 2)]
    assert sizes == [3, 4, 5]


def test_new_data_whose_inputs_bring_no_direction_above_the_tolerance_leave_z_as_it_is():
    likelihood = gaussian()
    likelihood.noise_covar.register_constraint("raw_noise", gpytorch.constraints.GreaterThan(0.0))
    likelihood.noise = 1e-12
    q = network_gp(REGRESSOR, (X, TARGETS), likelihood, prior_precision=TAU, inducing_inputs=X[:3])
    beside = X[:1] + 1e-6
    assert len(news(q.basis, beside, 1e12, 1))  # it would pay
    more = q.condition(beside, TARGETS[:1])
    assert more.basis is q.basis
    assert more.num_data == q.num_data + 1
    assert q.posterior.rebase(q.basis.grown(beside)).basis.size == q.basis.size


def test_a_site_does_not_cross_to_inputs_that_were_not_grown():
    q = network_gp(NET, (X, Y), SOFTMAX, prior_precision=TAU, num_inducing=3)
    other = network_gp(NET, (X, Y), SOFTMAX, prior_precision=TAU, num_inducing=4)
    with pytest.raises(errors.BasisMismatchError):
        q.posterior.rebase(other.basis)


@pytest.mark.parametrize("options", OPTIONS[:3])
def test_data_that_came_before_z_grew_are_forgotten_as_they_were_seen(options):
    """Their sites act on the coordinates that there were: more would take out what was never added."""
    q = network_gp(NET, (X, Y), SOFTMAX, prior_precision=TAU, **options)
    grown = q.condition(X_NEW * 3.0, Y_NEW)
    assert grown.basis.size > q.basis.size
    order = grown.forget(X[:12], Y[:12]), q.forget(X[:12], Y[:12]).condition(X_NEW * 3.0, Y_NEW, grow=0)
    narrow = order[0].forget(X_NEW * 3.0, Y_NEW)
    less = q.forget(X[:12], Y[:12])
    assert same(narrow.predict_blocks(TEST), less.predict_blocks(TEST), 1e-8)
    assert order[1].num_data == order[0].num_data
    everything = grown.forget(torch.cat([X_NEW * 3.0, X]), torch.cat([Y_NEW, Y]))
    assert float(everything.posterior.site.B.abs().max()) < 1e-9
    with pytest.raises(errors.InputError, match="not in the posterior"):
        narrow.forget(X[:1], Y[:1])


@pytest.mark.parametrize("centre", ["network", "map"])
@pytest.mark.parametrize("options", [{"num_inducing": 2}, {"num_inducing": 3, "outputs": "independent"}])
def test_data_that_came_before_z_grew_are_left_out_as_they_are_forgotten(options, centre):
    """Their sites act on the coordinates that there were: what is left is the posterior without exactly those."""
    far, x = X_NEW * 3.0, torch.cat([X[:6], X_NEW[:4] * 3.0, X[6:9]])
    y = torch.cat([Y[:6], Y_NEW[:4], Y[6:9]])
    q = network_gp(NET, (X, Y), SOFTMAX, prior_precision=TAU, centre=centre, **options).condition(far, Y_NEW)
    q = q.condition(X[:1] * 5.0, Y[:1])  # three sizes
    assert not q.held.all_through(q.basis.size)
    left = q.leave_one_out(x, y)
    for i in range(len(x)):
        mean, cov = q.forget(x[i : i + 1], y[i : i + 1]).predict_blocks(x[i : i + 1])
        assert gap(left.mean[i : i + 1], mean) < 1e-8 * (1 + mean.abs().max())
        assert gap(left.cov[i : i + 1], cov) < 1e-8 * (1 + cov.abs().max())
    assert left.num_capped == 0
    assert float(left.hat.max()) < 1
    whole = leave_one_out(q, x, y, q.sites_at(x, y), SOFTMAX)  # as if their sites were on all coordinates
    assert gap(whole.mean, left.mean) > 1e-3


@pytest.mark.parametrize("options", [{}, {"outputs": "independent"}])
def test_tuning_by_leaving_out_knows_what_was_seen_before_z_grew(options):
    q = network_gp(NET, (X, Y), SOFTMAX, prior_precision=TAU, num_inducing=2, **options).condition(X_NEW * 3.0, Y_NEW)
    x, y = torch.cat([X, X_NEW * 3.0]), torch.cat([Y, Y_NEW])
    grid = torch.tensor([0.1, TAU, 9.0], dtype=F64)
    got = q.with_centre("map").sweep(grid, "leave_one_out", [(x[:20], y[:20]), (x[20:], y[20:])])
    for tau, value in zip(grid.tolist(), got.tolist(), strict=True):
        left = q.with_centre("map").with_prior_precision(tau).leave_one_out(x, y)
        expected = class_log_probs(left.mean, left.cov).gather(-1, y.unsqueeze(-1)).mean()
        assert value == pytest.approx(float(expected), rel=1e-8)
    best = q.tuned("leave_one_out", x, y)
    assert float(q.with_centre("map").sweep([best.prior_precision], "leave_one_out", x, y)) >= float(got.max()) - 1e-9


def test_a_datum_held_through_several_sizes_is_forgotten_from_the_last():
    q = network_gp(NET, (X, Y), SOFTMAX, prior_precision=TAU, num_inducing=3)
    twice = q.condition(X_NEW[:1] * 3.0, Y_NEW[:1], grow=0).condition(X_NEW[:1] * 3.0, Y_NEW[:1])
    once = twice.forget(X_NEW[:1] * 3.0, Y_NEW[:1])
    assert same(once.predict_blocks(TEST), q.condition(X_NEW[:1] * 3.0, Y_NEW[:1], grow=0).predict_blocks(TEST), 1e-8)
    both = twice.forget(X_NEW[:1].repeat(2, 1) * 3.0, Y_NEW[:1].repeat(2))
    assert same(both.predict_blocks(TEST), q.predict_blocks(TEST), 1e-8)


def test_measures_take_the_model_itself():
    q = network_gp(NET, (X, Y), SOFTMAX, prior_precision=TAU)
    assert torch.equal(leverage(q, X, q.sites_at(X, Y)), leverage(q.posterior, X, q.sites_at(X, Y)))
    assert float(leave_one_out(q, X, Y, q.sites_at(X, Y), SOFTMAX).nll) > 0
    with pytest.raises(errors.InputError, match="takes no noise="):
        q.condition(X_NEW, Y_NEW, noise=torch.ones(len(Y_NEW)))
