"""`DualGP.fit` for every family: it ends where nothing more is to be gained, and the sites make the posterior."""

import copy

import gpytorch
import pytest
import reference as ref
import torch
from families import FAMILIES, M, N, Problem, fitted
from toys import F64, at, gap, hyper, rbf, solve

from dualgp import InducingBasis, Posterior, greedy_variance
from dualgp.gp.bound import conjugate_sites, site_bound
from dualgp.gp.data import Data
from dualgp.gp.estep import Source, e_step
from dualgp.gp.hybrid import batch_bound
from dualgp.gp.hyper import Hyper


def data_of(problem: Problem) -> Data:
    return Data(problem.x, problem.y, problem.gp.num_outputs is not None and problem.y.ndim > 1, problem.params)


def copy_of(problem: Problem, Z: torch.Tensor) -> Hyper:
    """A working copy of the model at its present hyperparameters."""
    gp = problem.gp
    return hyper(gp.kernel, gp.likelihood, Z, gp.mean, num_outputs=gp.num_outputs, jitter=gp.jitter)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_end_is_a_stationary_point(name):
    problem, result = fitted(name)
    assert result.converged
    model, data = copy_of(problem, problem.gp.inducing_points), data_of(problem)
    found = site_bound(model, data, problem.gp.sites)
    assert gap(found.value, result.elbo) < 1e-6 * abs(result.elbo)
    # In natural units (logarithms; multiples of the spread of Z) and per datum: a step of .05 would gain under 1e-3.
    gradient = model.vector_gradient(found.gradient) / problem.y.shape[: problem.x.ndim - 1].numel()
    assert abs(gradient).max() < 2e-2
    again = copy.deepcopy(problem.gp)
    gain = again.fit(problem.x, problem.y, progress=False).elbo - result.elbo
    assert abs(gain) / problem.x.shape[:-1].numel() < 5e-4  # tol is 1e-4 a round, and rounds contract


@pytest.mark.parametrize("name", FAMILIES)
def test_the_posterior_is_the_prior_plus_the_sites_and_scores_what_fit_said(name):
    problem, result = fitted(name)
    gp, x, y = problem.gp, problem.x, problem.y
    rebuilt = Posterior(gp.posterior.basis).add(x, gp.sites)
    for a, b in zip(rebuilt.predict(x), gp.predict(x), strict=True):
        assert gap(a, b) < 1e-9
    assert gap(gp.elbo(x, y, **problem.params), result.elbo) < 1e-6 * abs(result.elbo)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_sites_are_those_that_the_posterior_asks_for(name):
    problem, _ = fitted(name)
    gp = problem.gp
    asked, mean = gp.sites_at(problem.x, problem.y, **problem.params), gp.predict(problem.x)[0]
    assert gap(asked.alpha(mean), gp.sites.alpha(mean)) < 2e-3 * gp.sites.lam.abs().max().item()
    assert gap(asked.beta, gp.sites.beta) < 2e-3 * gp.sites.beta.abs().max().item()


def slow_fit(model: Hyper, data: Data, rounds: int) -> float:
    """The slow and obvious optimiser: E-steps to the end, then torch's L-BFGS on autograd of the dense bound."""
    basis = None
    for _ in range(rounds):
        sites = conjugate_sites(model, data)
        if sites is None:
            sites = e_step(Source(model.basis(), data), model.likelihood).sites
        lbfgs = torch.optim.LBFGS(model.trained(), max_iter=12, line_search_fn="strong_wolfe", tolerance_change=1e-12)

        def closure(sites=sites, lbfgs=lbfgs) -> torch.Tensor:
            lbfgs.zero_grad()
            free = conjugate_sites(model, data)
            loss = -batch_bound(model, data, sites if free is None else free)
            loss.backward()
            return loss

        lbfgs.step(closure)
        basis = model.basis()
    return e_step(Source(basis, data), model.likelihood).elbo


@pytest.mark.parametrize("name", ["gaussian", "fixed noise", "student-t", "probit", "log poisson", "custom counts"])
def test_the_elbo_is_that_of_a_slow_optimiser(name):
    problem, result = fitted(name)
    fresh = FAMILIES[name]()
    rows = greedy_variance(fresh.gp.kernel, fresh.x, M)
    slow = slow_fit(copy_of(fresh, fresh.x[rows]), data_of(fresh), rounds=8)
    assert result.elbo > slow - 0.005 * N


def test_the_elbo_is_no_worse_than_gpytorch_with_adam():
    problem, result = fitted("gaussian")
    x, y = problem.x, problem.y

    class Peer(gpytorch.models.ApproximateGP):
        def __init__(self, Z: torch.Tensor) -> None:
            q = gpytorch.variational.CholeskyVariationalDistribution(len(Z))
            super().__init__(gpytorch.variational.VariationalStrategy(self, Z, q))
            self.covar_module = rbf(0.7, 0.7)

        def forward(self, inputs: torch.Tensor) -> gpytorch.distributions.MultivariateNormal:
            zeros = torch.zeros(inputs.shape[:-1], dtype=F64)
            return gpytorch.distributions.MultivariateNormal(zeros, self.covar_module(inputs))

    fresh = FAMILIES["gaussian"]()
    peer, likelihood = Peer(x[greedy_variance(fresh.gp.kernel, x, M)]).double(), fresh.gp.likelihood
    mll = gpytorch.mlls.VariationalELBO(likelihood, peer, num_data=N)
    adam = torch.optim.Adam([*peer.parameters(), *likelihood.parameters()], lr=0.05)
    for _ in range(250):
        adam.zero_grad()
        loss = -mll(peer(x), y)
        loss.backward()
        adam.step()
    assert result.elbo > -loss.item() * N


def test_a_gaussian_fit_ends_at_the_sgpr_bound_of_its_own_parameters():
    problem, result = fitted("gaussian")
    gp = problem.gp
    lengthscale, variance = gp.kernel.base_kernel.lengthscale.item(), gp.kernel.outputscale.item()
    Z, x = gp.inducing_points, problem.x
    Kzz = ref.rbf(Z, Z, lengthscale, variance) + gp.jitter * variance * torch.eye(M)
    kxx = torch.full((N,), variance, dtype=F64)
    bound = ref.sgpr_bound(Kzz, ref.rbf(Z, x, lengthscale, variance), kxx, problem.y, gp.likelihood.noise.detach())
    assert gap(result.elbo, bound) < 1e-7


def test_a_batch_of_gps_is_each_alone():
    problem, result = fitted("batch of GPs")
    gp = problem.gp
    total = 0.0
    for b in range(2):
        kernel = rbf(gp.kernel.base_kernel.lengthscale[b], gp.kernel.outputscale[b])
        basis = InducingBasis(kernel, gp.inducing_points[b], jitter=gp.jitter)
        alone = solve(basis, gp.likelihood, problem.x[b], problem.y[b])
        mean, var = alone.posterior.predict(problem.x[b])
        assert gap(gp.predict(problem.x)[0][b], mean) < 1e-9
        assert gap(gp.predict(problem.x)[1][b], var) < 1e-9
        total += alone.elbo
    assert gap(total, result.elbo) < 1e-7


# --- what is learned and what is not ------------------------------------------------------------


def fresh_gaussian(**options) -> tuple[Problem, torch.Tensor]:
    problem = FAMILIES["gaussian"]()
    problem.gp.fit(problem.x, problem.y, progress=False, **options)
    return problem, problem.gp.inducing_points


def test_frozen_parameters_stay_and_the_others_move():
    problem = FAMILIES["gaussian"]()
    problem.gp.kernel.raw_outputscale.requires_grad_(False)
    before = {k: v.clone() for k, v in problem.gp.named_parameters()}
    problem.gp.fit(problem.x, problem.y, progress=False)
    after = dict(problem.gp.named_parameters())
    assert torch.equal(before["kernel.raw_outputscale"], after["kernel.raw_outputscale"])
    assert not after["kernel.raw_outputscale"].requires_grad
    assert gap(before["kernel.base_kernel.raw_lengthscale"], after["kernel.base_kernel.raw_lengthscale"].detach()) > 0.1
    assert after["kernel.base_kernel.raw_lengthscale"].requires_grad


def test_fixed_inducing_points_stay_where_they_were_given():
    x, y = FAMILIES["gaussian"]()[:2]
    Z = x[:M].clone()
    problem = FAMILIES["gaussian"]()
    problem.gp.inducing_points = Z.clone()
    moved = copy.deepcopy(problem.gp)
    held = problem.gp.fit(x, y, learn_inducing=False, progress=False).elbo
    assert torch.equal(problem.gp.inducing_points, Z)
    assert moved.fit(x, y, progress=False).elbo > held
    assert not torch.equal(moved.inducing_points, Z)


def test_fixed_hyperparameters_stay_and_the_sites_are_those_of_one_e_step():
    problem = FAMILIES["gaussian"]()
    before = {k: v.clone() for k, v in problem.gp.named_parameters()}
    problem.gp.fit(problem.x, problem.y, learn_inducing=False, learn_hyperparameters=False, progress=False)
    assert all(torch.equal(before[k], v) for k, v in problem.gp.named_parameters())
    x, y = problem.x, problem.y
    rows = greedy_variance(problem.gp.kernel, x, M)
    assert torch.equal(problem.gp.inducing_points, x[rows])
    expected = solve(InducingBasis(problem.gp.kernel, x[rows]), problem.gp.likelihood, x, y)
    assert gap(problem.gp.result.elbo, expected.elbo) < 1e-10


@pytest.mark.parametrize("likelihood", ["gaussian", "probit"])
def test_a_constant_mean_makes_a_shift_of_the_data_harmless(likelihood):
    problem = FAMILIES[likelihood]()
    gp = problem.gp
    gp.mean = gpytorch.means.ConstantMean().double()
    if likelihood == "gaussian":
        shifted = copy.deepcopy(gp)
        shifted.mean.constant.data += 100.0
        plain = gp.fit(problem.x, problem.y, progress=False).elbo
        assert gap(shifted.fit(problem.x, problem.y + 100.0, progress=False).elbo, plain) < 1e-3 * N
        assert gap(shifted.mean.constant.detach() - gp.mean.constant.detach(), 100.0) < 0.5
    else:
        without = fitted("probit")[1].elbo
        assert gp.fit(problem.x, problem.y, progress=False).elbo > without - 1e-3 * N
        assert gp.mean.constant.item() != 0.0


def test_a_refit_starts_from_where_the_last_one_ended():
    problem, Z = fresh_gaussian()
    first = problem.gp.result
    second = problem.gp.fit(problem.x, problem.y, max_rounds=2, progress=False)
    assert second.elbo > first.elbo - 1e-6 * N
    assert gap(problem.gp.inducing_points, Z) < 0.2


def test_priors_of_hyperparameters_pull():
    x, y = FAMILIES["gaussian"]()[:2]
    lengthscales = []
    for strength in (0.0, 1.0):
        problem = FAMILIES["gaussian"]()
        if strength:
            prior = gpytorch.priors.NormalPrior(at(3.0), at(0.01)).double()
            problem.gp.kernel.base_kernel.register_prior("lengthscale_prior", prior, "lengthscale")
        problem.gp.fit(x, y, progress=False)
        lengthscales.append(problem.gp.kernel.base_kernel.lengthscale.item())
        assert gap(problem.gp.elbo(x, y), problem.gp.result.elbo) < 1e-7  # the log prior is not in the ELBO
    assert abs(lengthscales[1] - 3.0) < 0.1 < abs(lengthscales[0] - 3.0)
