"""New data where Z sees too little: Z takes in their inputs, and nothing is lost of the old ones."""

import pytest
import torch
from netproblems import F64, NET, REGRESSOR, SOFTMAX, TARGETS, TAU, TEST, X_NEW, Y_NEW, X, Y, gap, gaussian

from dualgp import JacobianBasis, Posterior, errors, leave_one_out, leverage, network_gp
from dualgp.kernels import NetworkJacobian

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


def test_leaving_out_data_that_z_sees_more_of_since_is_refused():
    q = network_gp(NET, (X, Y), SOFTMAX, prior_precision=TAU, num_inducing=2).condition(X_NEW * 3.0, Y_NEW)
    with pytest.raises(errors.UnsupportedError, match="before Z grew"):
        q.leave_one_out(X, Y)
    assert q.leave_one_out(X_NEW * 3.0, Y_NEW).nlpd > 0
    with pytest.raises(errors.UnsupportedError, match="before Z grew"):
        q.tuned("leave_one_out", X, Y)


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
