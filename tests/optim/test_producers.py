"""One posterior type: sites of every optimiser merge, and say what a datum does, as worked by hand.

Regression with known noise (variance ¼, prior precision 1), of which the posterior is known: dense, with precision
[[25, 36], [36, 125]] and the mean below, or the diagonal of that. Each optimiser's state is set to it.
"""

import pytest
import torch
from gpytorch.likelihoods import GaussianLikelihood
from torch import nn
from toys import F64, at, gap

from dualgp import Sites, WeightPosterior, WeightSite, leave_one_out, network_gp, sensitivity
from dualgp.influence import DiagonalPosterior
from dualgp.kernels import NetworkJacobian
from dualgp.optim import BSAM, EVON, IVON, VOGN, AdditiveBLR, AffineBLR

pytestmark = pytest.mark.filterwarnings("ignore::dualgp.errors.NumericalWarning")  # the noise is wide, on purpose

X = torch.stack([torch.ones(6, dtype=F64), torch.arange(-1.0, 5.0, dtype=F64)], -1)
Y = at(0.1, 0.9, 2.2, 2.8, 4.1, 5.2)
BETA = 4.0  # 1/noise variance
FULL = BETA * X.mT @ X + torch.eye(2, dtype=F64)
MEAN = torch.linalg.solve(FULL, BETA * X.mT @ Y)


def linear(mean: torch.Tensor) -> nn.Linear:
    net = nn.Linear(2, 1, bias=False).double()
    with torch.no_grad():
        net.weight.copy_(mean)
    return net


def ivon(net, N, S):
    optimizer = IVON(net.named_parameters(), ess=N, weight_decay=1 / N, hess_init=1.0, beta2=0.9)
    optimizer.state[net.weight]["hess"].copy_((S - 1.0) / N)  # S = N(h + d)
    return optimizer


def bsam(net, N, S):
    optimizer = BSAM(net.named_parameters(), num_data=N, prior_precision=1.0)
    optimizer.state[net.weight]["precision"].copy_(S / N + 0.1)  # the damping is not of the posterior
    return optimizer


def vogn(net, N, S):
    optimizer = VOGN(net, nn.functional.mse_loss, num_data=N, prior_precision=1.0)
    optimizer.state[net.weight]["log_std"].copy_(-0.5 * (S / N).log())
    return optimizer


def affine(net, N, S):
    optimizer = AffineBLR(net.named_parameters(), num_data=N, prior_precision=1.0)
    optimizer.state[net.weight]["scale"].copy_(S.rsqrt())
    return optimizer


def evon(net, N, S):
    """S is dense."""
    optimizer = EVON(net.named_parameters(), ess=N, weight_decay=1 / N, hess_init=1.0, beta2=0.9)
    values, Q = torch.linalg.eigh(S)
    optimizer.state[net.weight]["q_right"].copy_(Q)
    optimizer.state[net.weight]["hess"].copy_((values - 1.0) / N)
    return optimizer


DIAGONAL = {"ivon": ivon, "bsam": bsam, "vogn": vogn, "affine": affine}


@pytest.fixture(params=DIAGONAL)
def make(request):
    return DIAGONAL[request.param]


def sites() -> Sites:
    return Sites(BETA * Y, torch.full((6,), BETA, dtype=F64))


def shifts(q: WeightPosterior) -> torch.Tensor:
    """What the removal of each datum does to the function there, to first order, by the public measures."""
    net = linear(q.mean)
    diagonal = DiagonalPosterior(NetworkJacobian(net, X), q.variance())
    found = sensitivity(diagonal, X, sites(), order="first").mean_shift
    left = leave_one_out(diagonal, X, Y, sites(), noise(), order="first")
    assert gap(left.mean - X @ q.mean, found) < 1e-12
    return found


def noise() -> GaussianLikelihood:
    likelihood = GaussianLikelihood().double()
    likelihood.noise = 1.0 / BETA
    return likelihood


# --- one datum --------------------------------------------------------------------------------------


def test_sensitivities_of_every_diagonal_posterior(make):
    q = make(linear(MEAN), 6, FULL.diagonal()).posterior()
    assert gap(q.mean, at(0.970366, 1.026135)) < 1e-6
    assert gap(shifts(q)[[0, 5]], at(-0.029907, -0.084064)) < 1e-6


def test_sensitivities_where_the_spread_was_chosen():
    optimizer = AdditiveBLR(linear(MEAN).named_parameters(), num_data=6, prior_precision=1.0, noise_std=0.2)
    q = optimizer.posterior()
    assert gap(q.variance(), at(0.04, 0.04)) < 1e-12
    assert gap(shifts(q), -X.square().sum(-1) / 25 * BETA * (Y - X @ MEAN)) < 1e-12


def test_removals_from_a_dense_posterior_are_exact():
    """Datum 0: −V e/σ² = −.075627 to first order, −.146995 by removal, which is a refit without it."""
    net = linear(MEAN)
    q = evon(net, 6, FULL).posterior()
    assert gap(q.precision, FULL) < 1e-9
    for i, first, exact in ((0, -0.075627, -0.146995), (5, -0.064839, -0.134609)):
        x, e = X[i], (Y - X @ MEAN)[i]
        assert abs(-x @ q.solve(x) * BETA * e - first) < 1e-6
        without = q.remove(WeightSite(BETA * Y[i] * x, BETA * torch.outer(x, x)))
        assert abs(x @ (without.mean - q.mean) - exact) < 1e-6
        rest = torch.arange(6) != i
        refit = torch.linalg.solve(FULL - BETA * torch.outer(x, x), BETA * X[rest].mT @ Y[rest])
        assert gap(without.mean, refit) < 1e-9


def test_a_network_says_the_same():
    left = network_gp(linear(MEAN), X, noise(), y=Y, prior_precision=1.0).leave_one_out(X, Y)
    assert gap((left.mean.flatten() - X @ MEAN)[[0, 5]], at(-0.146995, -0.134609)) < 1e-6


# --- halves -----------------------------------------------------------------------------------------


def halves(make, dense: bool = False) -> list[WeightPosterior]:
    found = []
    for rows in (slice(0, 3), slice(3, 6)):
        S = BETA * X[rows].mT @ X[rows] + torch.eye(2, dtype=F64)
        mean = torch.linalg.solve(S, BETA * X[rows].mT @ Y[rows])
        found.append(make(linear(mean), 3, S if dense else S.diagonal()).posterior())
    return found


def test_diagonal_halves_merge(make):
    a, b = halves(make)
    assert gap(a.precision, at(13.0, 9.0)) < 1e-9
    assert gap(b.mean, at(0.4, 1.2)) < 1e-6
    both = a.add(b.site)
    assert gap(both.mean, at(0.72, 1.1904)) < 1e-6
    assert gap(both.precision, at(25.0, 125.0)) < 1e-9


def test_dense_halves_merge_to_the_posterior_of_all():
    a, b = halves(evon, dense=True)
    both = a.add(b.site)
    assert gap(both.mean, MEAN) < 1e-9
    assert gap(both.precision, FULL) < 1e-9
