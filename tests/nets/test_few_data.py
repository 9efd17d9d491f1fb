"""Many more weights than outputs of the data, P ≫ NC: function space, exact beside dense Laplace in weight space."""

import pytest
import reference as ref
import torch
from jacobians import jacobian
from netproblems import SOFTMAX, TAU, TEST, WIDE, X_FEW, X_NEW, Y_FEW, Y_NEW, evidence, gap, ggn, theta

from dualgp import network_gp


def convert(x=X_FEW, y=Y_FEW, **options):
    return network_gp(WIDE, (x, y), SOFTMAX, prior_precision=TAU, **options)


def dense(q, x, y, at):
    """Mean and covariance of each datum of q's centre by P × P matrices."""
    G, pull = ggn(WIDE, SOFTMAX, x, y)
    t = theta(WIDE)
    J = jacobian(WIDE, at)
    P = G + TAU * torch.eye(len(t), dtype=G.dtype)
    move = torch.linalg.solve(P, pull - TAU * t) if q.centre == "map" else torch.zeros_like(t)
    return WIDE(at).detach() + J @ move, torch.einsum("ncp,pq,ndq->ncd", J, torch.linalg.inv(P), J)


@pytest.mark.parametrize("centre", ["network", "map"])
def test_it_is_full_and_exact_by_itself(centre):
    q = convert(centre=centre)
    assert (q.basis.size, q.basis.jacobian.num_params) == (18, 387)
    assert q.basis.has_residual
    for mine, theirs in zip(q.predict_blocks(TEST), dense(q, X_FEW, Y_FEW, TEST), strict=True):
        assert gap(mine, theirs) < 1e-9
    if centre == "network":
        assert q.log_marginal_likelihood() == pytest.approx(evidence(WIDE, SOFTMAX, X_FEW, Y_FEW, TAU), rel=1e-10)
    residual = q.basis.features(TEST).residual_block
    assert float(residual.diagonal(dim1=-2, dim2=-1).mean()) > 0.1  # most of what the prior says, data do not see


def test_new_data_grow_it_as_if_converted_with_all():
    q = convert(centre="map")
    more, union = q.condition(X_NEW, Y_NEW), (torch.cat([X_FEW, X_NEW]), torch.cat([Y_FEW, Y_NEW]))
    assert more.basis.size > 18
    expected = dense(q, *union, TEST)
    for mine, theirs in zip(more.predict_blocks(TEST), expected, strict=True):
        assert gap(mine, theirs) < 5e-3  # an input that is not taken in costs 1e-3 nats at most
    back = more.forget(X_NEW, Y_NEW)
    for mine, theirs in zip(back.predict_blocks(TEST), dense(q, X_FEW, Y_FEW, TEST), strict=True):
        assert gap(mine, theirs) < 1e-8
    left = more.leave_one_out(*union)
    for i in (0, 10):
        rest = torch.arange(len(union[0])) != i
        mean, cov = dense(q, union[0][rest], union[1][rest], union[0][i : i + 1])
        assert gap(left.mean[i : i + 1], mean) < 5e-3
        assert gap(left.cov[i : i + 1], cov) < 5e-3


def test_sparser_than_the_data():
    q = convert(inducing_inputs=X_FEW[:2], centre="map")
    J, J_at, J_Z = (jacobian(WIDE, x) for x in (X_FEW, TEST, X_FEW[:2]))
    sites = q.sites_at(X_FEW, Y_FEW)
    cov = ref.projected_covariance(J, sites.beta, TAU, J_at, J_Z)
    assert gap(q.predict_blocks(TEST)[1], torch.einsum("ncnd->ncd", cov)) < 1e-9
    shift, _ = ref.projected_map(J, sites.beta, sites.alpha(WIDE(X_FEW).detach()), theta(WIDE), TAU, J_at, J_Z)
    assert gap(q.predict(TEST)[0], WIDE(TEST).detach() + shift) < 1e-9
