"""`network_gp` and its posterior against dense Laplace in weight space: predictions, evidence, new data, removal."""

import copy

import gpytorch
import pytest
import reference as ref
import torch
from jacobians import jacobian, mlp
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
    X,
    Y,
    evidence,
    gap,
    gaussian,
    ggn,
    inputs,
    log_lik,
    theta,
    trained,
)
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dualgp
from dualgp import from_weight_decay, network_gp

PROBLEMS = {
    "classification": (NET, SOFTMAX, X, Y),
    "regression": (REGRESSOR, gaussian(), X, TARGETS),
}
EXACT = [{}, {"structure": "dense"}, {"structure": "full"}, {"num_inducing": 30}]
KINDS = [
    *EXACT[:1],
    {"num_inducing": 5},
    {"num_inducing": 8, "outputs": "independent"},
    {"num_inducing": 5, "centre": "map"},
]


def covariance(net, likelihood, x, y, tau, at):
    """J(G + τI)⁻¹Jᵀ of each datum."""
    P = ggn(net, likelihood, x, y)[0] + tau * torch.eye(len(theta(net)), dtype=F64)
    J = jacobian(net, at)
    return torch.einsum("ncp,pq,ndq->ncd", J, torch.linalg.inv(P), J)


def update_of(net, likelihood, x, y, pull, tau, at):
    """f(x) + J(G + τI)⁻¹ pull."""
    P = ggn(net, likelihood, x, y)[0] + tau * torch.eye(len(theta(net)), dtype=F64)
    return net(at).detach() + jacobian(net, at) @ torch.linalg.solve(P, pull)


def refit(q, x, y):
    """The network converted with other data, in the same coordinates."""
    outputs = "coupled" if q.basis.coupled else "independent"
    where = {"inducing_inputs": q.basis.inducing_inputs} if q.basis.has_residual else {"structure": "dense"}
    return network_gp(NET, (x, y), SOFTMAX, prior_precision=TAU, outputs=outputs, centre=q.centre, **where)


@pytest.mark.parametrize("options", EXACT)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_it_is_laplace_with_the_evidence_of_laplace(problem, options):
    net, likelihood, x, y = PROBLEMS[problem]
    q = network_gp(net, (x, y), likelihood, prior_precision=TAU, **options)
    mean, cov = q.predict_blocks(TEST)
    assert gap(mean, net(TEST).detach()) == 0.0
    assert gap(cov, covariance(net, likelihood, x, y, TAU, TEST)) < 1e-8
    assert gap(q.predict(TEST)[1], cov.diagonal(dim1=-2, dim2=-1)) < 1e-12
    assert q.num_data == len(x)
    cut = 1e-4 if "num_inducing" in options else 1e-8  # directions of 1e-7 of the largest are left to the prior
    assert abs(q.log_marginal_likelihood() - evidence(net, likelihood, x, y, TAU)) < cut


@pytest.mark.parametrize("count", [3, 5, 8])
def test_sparse_is_laplace_on_what_Z_sees(count):
    q = network_gp(NET, (X, Y), SOFTMAX, prior_precision=TAU, num_inducing=count)
    Z = q.basis.inducing_inputs
    assert len(Z) == count
    assert all(any(torch.equal(z, x) for x in X) for z in Z)
    J = jacobian(NET, X)
    B = q.sites_at(X, Y).beta
    expected = ref.projected_covariance(J, B, TAU, jacobian(NET, TEST), jacobian(NET, Z))
    assert gap(q.predict_blocks(TEST)[1], torch.einsum("ncnd->ncd", expected)) < 1e-8
    given = network_gp(NET, (X, Y), SOFTMAX, prior_precision=TAU, inducing_inputs=Z)
    assert gap(given.predict_blocks(TEST)[1], q.predict_blocks(TEST)[1]) < 1e-12


@pytest.mark.parametrize("problem", PROBLEMS)
def test_at_a_maximum_kernel_times_pull_is_the_network_and_both_centres_agree(problem):
    net, likelihood, x, y = PROBLEMS[problem]
    net = trained(copy.deepcopy(net), likelihood, x, y, TAU)
    J, f, t = jacobian(net, x), net(x).detach(), theta(net)
    alpha = dualgp.laplace_sites(likelihood, y, f).alpha(f)
    K_alpha = torch.einsum("ncp,mdp,md->nc", J, J, alpha) / TAU
    assert gap(K_alpha, J @ t) < 1e-5
    q = network_gp(net, (x, y), likelihood, prior_precision=TAU)
    m = network_gp(net, (x, y), likelihood, prior_precision=TAU, centre="map")
    assert q.stationarity.residual < 1e-6
    assert "maximises its posterior" in str(q.stationarity)
    assert gap(m.predict(TEST)[0], q.predict(TEST)[0]) < 1e-5
    assert abs(m.log_marginal_likelihood() - q.log_marginal_likelihood()) < 1e-6
    off = q.with_prior_precision(2 * TAU)
    assert off.stationarity.best_factor == pytest.approx(0.5, abs=1e-6)
    assert off.stationarity.best_residual < 1e-6
    assert "At 0.5 of this prior precision" in str(off.stationarity)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_centre_map_is_the_exact_mean_and_evidence_of_the_linearised_model(problem):
    net, likelihood, x, y = PROBLEMS[problem]
    q = network_gp(net, (x, y), likelihood, prior_precision=TAU, centre="map")
    G, pull = ggn(net, likelihood, x, y)
    t = theta(net)
    assert gap(q.predict(TEST)[0], update_of(net, likelihood, x, y, pull - TAU * t, TAU, TEST)) < 1e-9
    P = G + TAU * torch.eye(len(t), dtype=F64)
    gain = 0.5 * (pull - TAU * t) @ torch.linalg.solve(P, pull - TAU * t)
    assert abs(q.log_marginal_likelihood() - evidence(net, likelihood, x, y, TAU) - float(gain)) < 1e-8
    assert (
        gap(
            network_gp(net, (x, y), likelihood, prior_precision=TAU, centre="map", structure="full").predict(TEST)[0],
            q.predict(TEST)[0],
        )
        < 1e-8
    )


def test_the_evidence_of_a_regression_is_that_of_the_gaussian_process_of_its_pseudo_data():
    """DNN2GP: y − f + Jθ* is drawn from a process of mean 0 and covariance JJᵀ/τ + σ²."""
    q = network_gp(REGRESSOR, (X, TARGETS), gaussian(), prior_precision=TAU, centre="map")
    J, f = jacobian(REGRESSOR, X)[:, 0], REGRESSOR(X).detach()[:, 0]
    cov = J @ J.T / TAU + 0.09 * torch.eye(30, dtype=F64)
    expected = ref.log_normal(TARGETS - f + J @ theta(REGRESSOR), torch.zeros(30, dtype=F64), cov)
    assert abs(q.log_marginal_likelihood() - expected) < 1e-8


@pytest.mark.parametrize("options", KINDS)
def test_new_data_move_the_mean_by_what_they_pull_and_the_variance_as_if_they_had_been_there(options):
    q = network_gp(NET, (X, Y), SOFTMAX, prior_precision=TAU, **options)
    new = q.condition(X_NEW, Y_NEW, grow=0)
    union = (torch.cat([X, X_NEW]), torch.cat([Y, Y_NEW]))
    again = refit(q, *union)
    assert gap(new.predict_blocks(TEST)[1], again.predict_blocks(TEST)[1]) < 1e-10
    if q.centre == "map":
        assert gap(new.predict(TEST)[0], again.predict(TEST)[0]) < 1e-10
        assert abs(new.log_marginal_likelihood() - again.log_marginal_likelihood()) < 1e-8
    if not options:
        pull = ggn(NET, SOFTMAX, X_NEW, Y_NEW)[1]
        assert gap(new.predict(TEST)[0], update_of(NET, SOFTMAX, *union, pull, TAU, TEST)) < 1e-9
    assert new.num_data == 39
    assert gap(q.condition(X_NEW, Y_NEW, grow=0).predict(TEST)[0], new.predict(TEST)[0]) == 0.0
    by_sites = q.add(X_NEW, q.sites_at(X_NEW, Y_NEW))
    assert gap(by_sites.predict(TEST)[0], new.predict(TEST)[0]) < 1e-12


@pytest.mark.parametrize("options", KINDS)
def test_what_is_added_and_forgotten_leaves_nothing_and_order_is_no_matter(options):
    q = network_gp(NET, (X, Y), SOFTMAX, prior_precision=TAU, **options)
    new = q.condition(X_NEW, Y_NEW, grow=0)
    back = new.forget(X_NEW, Y_NEW)
    one_by_one = q
    for i in (3, 8, 0, 1, 7, 2, 6, 4, 5):
        one_by_one = one_by_one.condition(X_NEW[i : i + 1], Y_NEW[i : i + 1], grow=0)
    less = q.forget(X[20:], Y[20:])
    kept = refit(q, X[:20], Y[:20])
    for a, b in ((back, q), (one_by_one, new)):
        for mine, theirs in zip(a.predict_blocks(TEST), b.predict_blocks(TEST), strict=True):
            assert gap(mine, theirs) < 1e-10
        assert abs(a.log_marginal_likelihood() - b.log_marginal_likelihood()) < 1e-8
        assert a.num_data == b.num_data
    assert gap(less.predict_blocks(TEST)[1], kept.predict_blocks(TEST)[1]) < 1e-9
    assert gap(q.remove(X[20:], q.sites_at(X[20:], Y[20:])).predict(TEST)[0], less.predict(TEST)[0]) < 1e-12


def test_no_data_are_no_change():
    q = network_gp(NET, (X, Y), SOFTMAX, prior_precision=TAU, num_inducing=5)
    for same in (q.condition(X[:0], Y[:0]), q.forget(X[:0], Y[:0])):
        assert gap(same.predict(TEST)[1], q.predict(TEST)[1]) == 0.0
        assert same.num_data == 30


def test_forgetting_is_the_mean_without_the_data():
    q = network_gp(NET, (X, Y), SOFTMAX, prior_precision=TAU)
    pull = -ggn(NET, SOFTMAX, X[:4], Y[:4])[1]
    expected = update_of(NET, SOFTMAX, X[4:], Y[4:], pull, TAU, TEST)
    assert gap(q.forget(X[:4], Y[:4]).predict(TEST)[0], expected) < 1e-9


@pytest.mark.parametrize(
    "options", [{}, {"num_inducing": 5}, {"structure": "full"}, {"structure": "kronecker"}, {"structure": "diagonal"}]
)
def test_a_loader_in_any_order_is_the_tensors(options):
    q = network_gp(NET, (X, Y), SOFTMAX, prior_precision=TAU, **options)
    shuffled = torch.randperm(30)
    loaders = [
        DataLoader(TensorDataset(X, Y), batch_size=7, shuffle=True),
        [(X[i : i + 1], Y[i : i + 1]) for i in shuffled],
    ]
    for loader in loaders:
        other = network_gp(NET, loader, SOFTMAX, prior_precision=TAU, **options)
        for a, b in zip(q.predict_blocks(TEST), other.predict_blocks(TEST), strict=True):
            assert gap(a, b) < 1e-9
        assert abs(q.log_marginal_likelihood() - other.log_marginal_likelihood()) < 1e-8
        other.forget(X, Y)


def test_the_budget_changes_nothing():
    q = network_gp(NET, (X, Y), SOFTMAX, prior_precision=TAU, num_inducing=5)
    small = network_gp(NET, (X, Y), SOFTMAX, prior_precision=TAU, num_inducing=5, budget=q.basis.jacobian.row_bytes * 2)
    assert gap(q.predict_blocks(TEST)[1], small.predict_blocks(TEST)[1]) < 1e-10


def test_a_weight_decay_of_a_mean_loss_is_N_times_one_of_a_sum():
    a = network_gp(NET, (X, Y), SOFTMAX, prior_precision=from_weight_decay(0.01, 30))
    b = network_gp(NET, (X, Y), SOFTMAX, prior_precision=from_weight_decay(0.3, 30, "sum"))
    assert a.prior_precision == b.prior_precision == 0.3
    assert torch.equal(a.predict(TEST)[1], b.predict(TEST)[1])
    net = mlp(outputs=1, seed=4)
    opt = torch.optim.LBFGS(
        net.parameters(), max_iter=2000, tolerance_grad=1e-10, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        opt.zero_grad()
        loss = nn.functional.mse_loss(net(X).squeeze(-1), TARGETS)
        (loss + 0.01 / 2 * sum(p.square().sum() for p in net.parameters())).backward()
        return loss + 0.01 / 2 * sum(p.square().sum() for p in net.parameters())

    opt.step(closure)
    tau = from_weight_decay(0.01, 30, loss_scale=2 * 0.09)
    assert network_gp(net, (X, TARGETS), gaussian(0.09), prior_precision=tau).stationarity.residual < 1e-4


def test_the_network_the_data_and_the_random_state_are_untouched():
    net = (
        nn.Sequential(nn.Linear(2, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3)).double().train()
    )
    net[0].weight.requires_grad_(False)
    calls = []
    net.register_forward_hook(lambda *_: calls.append(1))
    before, x, y = copy.deepcopy(net.state_dict()), X.clone(), Y.clone()
    state = torch.random.get_rng_state()
    q = network_gp(net, DataLoader(TensorDataset(X, Y), batch_size=8, shuffle=True), SOFTMAX, num_inducing=4)
    q.condition(X_NEW, Y_NEW).tuned("validation", X, Y).predict_likelihood(TEST, link="mc")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert net.training
    assert all(m.training for m in net.modules())
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert not net[0].weight.requires_grad
    assert all(p.grad is None for p in net.parameters())
    assert torch.equal(X, x)
    assert torch.equal(Y, y)
    assert len(net._forward_hooks) == 1
    frozen = copy.deepcopy(net).eval()
    assert gap(q.predict(TEST)[0], frozen(TEST).detach()) < 1e-12  # dropout off, running statistics


def test_single_precision_is_double_to_its_rounding():
    q = network_gp(NET, (X, Y), SOFTMAX, prior_precision=TAU)
    single = network_gp(copy.deepcopy(NET).float(), (X.float(), Y), SOFTMAX, prior_precision=TAU, num_inducing=30)
    exact = q.predict_blocks(TEST)[1]
    assert gap(single.predict_blocks(TEST.float())[1].double(), exact) < 1e-5 * exact.abs().max()
    assert abs(single.log_marginal_likelihood() - q.log_marginal_likelihood()) < 1e-3


def test_half_precision_tied_and_selected_parameters():
    half = mlp(dtype=torch.float32).to(torch.bfloat16)
    q = network_gp(half, (X.to(torch.bfloat16), Y), SOFTMAX, prior_precision=TAU)
    assert half[0].weight.dtype == torch.bfloat16
    assert q.predict(TEST)[0].dtype == torch.float32
    last = network_gp(NET, (X, Y), SOFTMAX, prior_precision=TAU, params="last_layer")
    assert last.basis.jacobian.num_params == 15
    J = jacobian(NET, X)[..., -15:]
    cov = ref.glm_covariance(J, last.sites_at(X, Y).beta, TAU, jacobian(NET, TEST)[..., -15:])
    assert gap(last.predict_blocks(TEST)[1], torch.einsum("ncnd->ncd", cov)) < 1e-10
    tied = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2), nn.Linear(2, 3)).double()
    tied[2].weight = tied[0].weight
    q = network_gp(tied, (X, Y), SOFTMAX, prior_precision=TAU)
    assert q.basis.size == sum(p.numel() for p in tied.parameters())


def test_a_prior_precision_for_each_tensor():
    tau = torch.tensor([0.3, 2.0, 1.0, 5.0], dtype=F64)
    each = tau.repeat_interleave(torch.tensor([p.numel() for p in NET.parameters()]))
    q = network_gp(NET, (X, Y), SOFTMAX, prior_precision=tau)
    G, pull = ggn(NET, SOFTMAX, X, Y)
    t = theta(NET)
    logdet = torch.logdet(G + each.diag()) - each.log().sum()
    expected = log_lik(NET, SOFTMAX, X, Y) - 0.5 * float(logdet + (each * t.square()).sum())
    assert abs(q.log_marginal_likelihood() - expected) < 1e-8
    from_one = network_gp(NET, (X, Y), SOFTMAX, prior_precision=TAU)
    assert abs(from_one.log_marginal_likelihood(tau) - expected) < 1e-8
    assert abs(q.log_marginal_likelihood(TAU) - evidence(NET, SOFTMAX, X, Y, TAU)) < 1e-8
    assert q.stationarity.residual == pytest.approx(
        float(((pull - each * t) / each.sqrt()).norm() / (each.sqrt() * t).norm())
    )


@pytest.mark.parametrize("centre", ["network", "map"])
@pytest.mark.parametrize("likelihood", ["probit", "logit", "poisson", "outputs", "fixed"])
def test_other_likelihoods(likelihood, centre):
    binary = (TARGETS > 0).double()
    cases = {
        "probit": (gpytorch.likelihoods.BernoulliLikelihood(), REGRESSOR, binary, {}),
        "logit": (dualgp.likelihoods.LogitBernoulliLikelihood(), REGRESSOR, binary, {}),
        "poisson": (dualgp.likelihoods.LogPoissonLikelihood(), REGRESSOR, binary, {}),
        "outputs": (gaussian(), NET, torch.stack([TARGETS] * 3, -1), {}),
        "fixed": (dualgp.likelihoods, REGRESSOR, TARGETS, {}),
    }
    lik, net, y, params = cases[likelihood]
    if likelihood == "fixed":
        from gpytorch.likelihoods import FixedNoiseGaussianLikelihood

        noise = 0.1 + X[:, 0].abs()
        lik, params = FixedNoiseGaussianLikelihood(noise), {"noise": noise}
    q = network_gp(net, (X, y), lik, prior_precision=TAU, centre=centre)
    J, f = jacobian(net, X), net(X).detach()
    sites = dualgp.laplace_sites(lik, y, f, **params)
    cov = ref.glm_covariance(J, torch.diag_embed(sites.beta), TAU, jacobian(net, TEST))
    assert gap(q.predict_blocks(TEST)[1], torch.einsum("ncnd->ncd", cov)) < 1e-9
    here = {k: v[:7] for k, v in params.items()}
    log_p = q.log_predictive(X[:7], y[:7], **here)
    assert log_p.shape == y[:7].shape
    at = q.predict_likelihood(X[:7], **here)
    assert gap(at.log_prob(y[:7]), log_p) < 1e-6
    assert q.leave_one_out(X, y, **params).mean.shape == (30, net[-1].out_features)
    assert q.forget(X, y, **params).num_data == 0


def test_it_draws_functions():
    q = network_gp(NET, (X, Y), SOFTMAX, prior_precision=TAU, num_inducing=5)
    draws = q.sample(TEST, 20_000, generator=torch.Generator().manual_seed(0)).flatten(1)
    joint = q.predict_joint(TEST)
    sd = joint.covariance_matrix.diagonal().sqrt()
    assert ((draws.mean(0) - joint.mean.flatten()).abs() < 5 * sd / 20_000**0.5).all()
    assert (draws.T.cov() - joint.covariance_matrix).abs().max() < 6 * sd.max() ** 2 / 20_000**0.5


def test_the_structure_follows_the_size(monkeypatch):
    """P = 27, NC = 18 or 90: dense, full, or the inputs that are not too many."""
    assert network_gp(NET, (X, Y), SOFTMAX).basis.inducing_inputs is None
    assert torch.equal(network_gp(NET, (X[:6], Y[:6]), SOFTMAX).basis.inducing_inputs, X[:6])
    monkeypatch.setattr("dualgp.nets.convert._MAX_SIZE", 20)
    assert len(network_gp(NET, (inputs(60), torch.arange(60) % 3), SOFTMAX).basis.inducing_inputs) == 50


def test_repeated_rows_are_one_inducing_input():
    x, y = X[:5].repeat(4, 1), Y[:5].repeat(4)
    q = network_gp(NET, (x, y), SOFTMAX, num_inducing=20)
    assert len(q.basis.inducing_inputs) == 5
    assert q.num_data == 20
    assert TARGETS_TEST.shape == (7,)


def test_a_posterior_prints_as_one_line():
    n, weights = len(X), sum(p.numel() for p in NET.parameters())
    q = network_gp(NET, (X, Y), SOFTMAX, num_inducing=5, prior_precision=TAU)
    outputs = q.num_outputs
    assert repr(q) == (
        f"NetworkPosterior({n} data, {outputs} outputs, {q.basis.size} coordinates at 5 inputs, "
        f"prior_precision={TAU:.4g}, centre='network')"
    )
    for kind in ("dense", "kronecker"):
        assert f"{kind} over {weights} weights" in repr(network_gp(NET, (X, Y), SOFTMAX, structure=kind))
    each = torch.ones(len(list(NET.parameters())))
    assert "one for each parameter tensor" in repr(network_gp(NET, (X, Y), SOFTMAX, prior_precision=each))
