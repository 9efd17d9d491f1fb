"""New data where Z sees too little: Z takes in their inputs, and nothing is lost of the old ones."""

import pytest
import torch
from netproblems import F64, NET, REGRESSOR, SOFTMAX, TARGETS, TAU, TEST, X_NEW, Y_NEW, X, Y, gap, gaussian

from dualgp import JacobianBasis, Posterior, errors, network_gp
from dualgp.kernels import NetworkJacobian

OPTIONS = [
    {"num_inducing": 3},
    {"num_inducing": 3, "centre": "map"},
    {"num_inducing": 3, "outputs": "independent"},
    {"num_inducing": 20},  # 60 directions of 40-odd weights: by an orthonormal basis of them
]


def same(a, b, tol):
    return all(gap(s, t) < tol for s, t in zip(a, b, strict=True))


@pytest.mark.parametrize("options", OPTIONS)
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
    if centre == "network":  # more of the prior's pull towards zero is seen than before
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
