"""`network_gp` in the structures of weight space: what it says is what `StructuredPosterior` says."""

import pytest
import torch
from gpytorch.likelihoods import GaussianLikelihood, SoftmaxLikelihood
from jacobians import mlp
from toys import F64

from dualgp import NetworkPosterior, leave_one_out, leverage, network_gp
from dualgp.nets import Structure
from dualgp.nets.factors import Kronecker

X, Y = torch.randn(30, 2, generator=torch.Generator().manual_seed(1), dtype=F64), torch.arange(30) % 3
T = torch.linspace(-2, 2, 10, dtype=F64).view(5, 2)
SOFTMAX = SoftmaxLikelihood(num_classes=3, mixing_weights=False)


def posterior(structure="kronecker", tau=0.7, **options) -> NetworkPosterior:
    return network_gp(mlp(), (X, Y), SOFTMAX, prior_precision=tau, structure=structure, **options)


def test_the_mean_is_the_networks_and_moves_with_new_data():
    net, q = mlp(), posterior()
    torch.testing.assert_close(q.predict(T)[0], net(T).detach(), rtol=1e-12, atol=1e-13)
    more = q.condition(T, torch.zeros(5, dtype=torch.long))
    sites = q.sites_at(T, torch.zeros(5, dtype=torch.long))
    torch.testing.assert_close(more.predict(T)[0], q.posterior.add(T, sites).predict(T)[0], rtol=1e-12, atol=1e-12)
    back = more.forget(T, torch.zeros(5, dtype=torch.long))
    for mine, theirs in zip(back.predict_blocks(T), q.predict_blocks(T), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("centre", ["network", "map"])
@pytest.mark.parametrize("structure", ["kronecker", "diagonal", Structure(separate_bias=True)])
def test_any_prior_precision_costs_no_second_conversion(structure, centre):
    """In predictions, the evidence, and what the sweep over them says."""
    q = posterior(structure, centre=centre)
    grid = torch.tensor([0.1, 3.0], dtype=F64)
    fresh = [posterior(structure, tau, centre=centre) for tau in grid.tolist()]
    for tau, other in zip(grid.tolist(), fresh, strict=True):
        for mine, theirs in zip(q.with_prior_precision(tau).predict_blocks(T), other.predict_blocks(T), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)
    logs = torch.tensor([other.log_marginal_likelihood() for other in fresh], dtype=F64)
    torch.testing.assert_close(q.sweep(grid), logs, rtol=1e-10, atol=1e-9)
    scores = torch.tensor([-other.nlpd(X, Y) for other in fresh], dtype=F64)
    torch.testing.assert_close(q.sweep(grid, "validation", (X, Y)), scores, rtol=1e-9, atol=1e-10)


def test_the_evidence_is_that_of_the_structures_precision():
    q = posterior("diagonal")
    theta = torch.cat([p.detach().flatten() for p in mlp().parameters()])
    fit = -torch.nn.functional.cross_entropy(mlp()(X), Y, reduction="sum").item()
    expected = fit - 0.5 * 0.7 * theta.square().sum() - 0.5 * q.posterior.logdet()
    assert abs(q.log_marginal_likelihood() - expected) < 1e-10


def test_one_output_and_influence():
    net = mlp(outputs=1)
    y = X[:, 0]
    q = network_gp(net, (X, y), GaussianLikelihood(), structure="diagonal", prior_precision=2.0)
    sites = q.sites_at(X, y)
    V = q.posterior.function_blocks(X)[1]
    torch.testing.assert_close(leverage(q.posterior, X, sites), (sites.beta * V[..., 0]).squeeze(-1))
    kronecker = network_gp(net, (X, y), GaussianLikelihood(), structure="kronecker", prior_precision=2.0)
    left = leave_one_out(kronecker.posterior, X, y.unsqueeze(-1), sites, q.likelihood)
    torch.testing.assert_close(left.mean, kronecker.leave_one_out(X, y).mean)  # of a diagonal: test_left_out_structures


def test_what_a_kronecker_product_of_all_data_keeps_of_a_part_that_was_forgotten():
    """[n/N · G_rest − (1 − n/N) · G_gone] ⊗ (A_gone − A_rest) of each layer; a whole set goes without a trace."""
    rest, gone = (X[:20], Y[:20]), (X[20:], Y[20:])
    less = posterior().forget(*gone).posterior.site
    sites = [network_gp(mlp(), data, SOFTMAX, prior_precision=0.7, structure="kronecker") for data in (rest, gone)]
    for key, block in less.blocks.items():
        (G_rest, A_rest), (G_gone, A_gone) = (q.posterior.site.blocks[key].terms[0] for q in sites)
        off = torch.kron(G_rest / 3 - 2 / 3 * G_gone, A_gone - A_rest)
        found = (block + sites[0].posterior.site.blocks[key] * -1.0).to_dense()
        order = Kronecker(((G_rest / 3 - 2 / 3 * G_gone, A_gone - A_rest),), True).to_dense()
        assert off.shape == order.shape
        torch.testing.assert_close(found, order, rtol=1e-9, atol=1e-10)
        assert float(order.abs().max()) > 1e-3
    whole = posterior().condition(T, Y[:5]).forget(X, Y)
    assert all(len(block.terms) == 1 for block in whole.posterior.site.blocks.values())
