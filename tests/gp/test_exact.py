"""The exact process by products is the dense one: to rounding under a full preconditioner, else within its errors."""

import pytest
import reference as ref
import torch
from exacts import N, mean, model, problem
from gpytorch.kernels import MaternKernel, RBFKernel, ScaleKernel
from gpytorch.likelihoods import (
    BernoulliLikelihood,
    FixedNoiseGaussianLikelihood,
    GaussianLikelihood,
    StudentTLikelihood,
)
from toys import F64, at, gap, gaussian, matern, waves

from dualgp import DualGP, ExactGP, LazyKernel, errors
from dualgp.duals import dual_parameters, expected_log_prob
from dualgp.gp import ascent

KINDS = ["gaussian", "fixed noise", "bernoulli", "counts", "softmax", "multitask"]


def dense(x, y, likelihood, outputs, prior=0.7, **params):
    """The exact variational posterior by n × n matrices: means, variances, λ, β, bound, and the covariances."""
    K, C = ref.matern52(x, x, 0.8, 2.0), outputs or 1
    eye = torch.eye(len(x), dtype=F64)
    shape = (len(x),) if outputs is None else (len(x), C)
    m, v = torch.full(shape, prior, dtype=F64), torch.full(shape, 2.0, dtype=F64)
    lam, beta = torch.zeros(shape, dtype=F64), torch.zeros(shape, dtype=F64)
    for _ in range(150 if outputs else 60):
        duals = dual_parameters(likelihood, y, m, v, **params)
        lam = 0.4 * lam + 0.6 * (duals.alpha + duals.beta * m)
        beta = 0.4 * beta + 0.6 * duals.beta
        kl, covariances, means = 0.0, [], []
        for lam_c, beta_c in zip(lam.reshape(-1, C).T, beta.reshape(-1, C).T, strict=True):
            G = torch.linalg.solve(eye + K * beta_c, K)  # (I + KB)⁻¹K = (K⁻¹ + B)⁻¹
            covariances.append(G)
            a = lam_c - beta_c * prior - beta_c * (G @ (lam_c - beta_c * prior))
            means.append(prior + K @ a)
            log_det = torch.logdet(eye + K * beta_c)
            kl = kl + 0.5 * (log_det - (beta_c * G.diagonal()).sum() + a @ K @ a)
        m = torch.stack(means, -1).reshape(shape)
        v = torch.stack([G.diagonal() for G in covariances], -1).reshape(shape)
    bound = expected_log_prob(likelihood, y, m, v, **params).sum() - kl
    return m, v, lam, beta, bound.item()


HELD = {"learn_hyperparameters": False, "tol": 1e-11}


def fit(kind: str, **options):
    x, y, likelihood, outputs = problem(kind)
    gp = model(likelihood, outputs, **options)
    return gp, gp.fit(x, y, **HELD), x, y, likelihood, outputs


def params_of(likelihood) -> dict:
    if isinstance(likelihood, FixedNoiseGaussianLikelihood):
        return {"noise": likelihood.noise_covar.noise}
    return {}


@pytest.mark.parametrize("kind", KINDS)
def test_under_a_full_preconditioner_it_is_the_dense_posterior(kind):
    x, y, likelihood, outputs = problem(kind)
    gp, tol = model(likelihood, outputs), 1e-8 if kind == "softmax" else 1e-11  # whose steps shrink by a third each
    result = gp.fit(x, y, learn_hyperparameters=False, tol=tol)
    m, v, lam, beta, bound = dense(x, y, likelihood, outputs, **params_of(likelihood))
    close = 3 * (tol * N) ** 0.5  # the bound is quadratic in what the iteration leaves
    assert gap(gp.sites.lam, lam) < close
    assert gap(gp.sites.beta, beta) < close
    assert gap(gp.marginals[0], m) < close
    assert gap(gp.marginals[1], v) < close
    assert abs(result.bound.value - bound) < 1e-6 + tol * N
    assert result.bound.standard_error < 1e-6
    found = gp.predict(x[:5])
    assert gap(found[0], m[:5]) < close
    assert gap(found[1], v[:5]) < close


@pytest.mark.parametrize("rank", [1, 12, N])
def test_regression_is_that_of_the_textbook_at_any_rank(rank):
    gp, result, x, y, *_ = fit("gaussian", rank=rank)
    test = waves(40, 2, seed=9)[0]
    K, Ks = ref.matern52(x, x, 0.8, 2.0), ref.matern52(x, test, 0.8, 2.0)
    evidence, m, v = ref.gpr(K, Ks, torch.full((40,), 2.0, dtype=F64), y - 0.7, at(0.09))
    found = gp.predict(test)
    assert gap(found[0], m + 0.7) < 1e-8
    assert gap(found[1], v) < 1e-8
    assert abs(result.bound.value - evidence) <= 5 * result.bound.standard_error + 1e-7
    assert gap(gp.predict_mean(test), found[0]) == 0.0


def test_what_is_stochastic_is_within_its_errors():
    x, y, likelihood, _ = problem("bernoulli")
    m, v, _, _, bound = dense(x, y, likelihood, None)
    gaps, errors_of_v = [], []
    for seed in range(8):
        gp = model(likelihood, rank=15, tol=1e-8, generator=torch.Generator().manual_seed(seed))
        result = gp.fit(x, y, learn_hyperparameters=False, tol=1e-7)
        gaps.append((result.bound.value - bound) / result.bound.standard_error)
        errors_of_v.append(gp.marginals[1] - v)
        assert gap(gp.marginals[0], m) < 0.1
    # Eight t-values of 15 degrees of freedom: mean 0 ± .38, mean square 1.15 ± .65.
    assert abs(sum(gaps) / 8) < 1.5
    assert sum(g * g for g in gaps) / 8 < 4.0
    # t-values of 7 degrees of freedom, one for each datum: mean square 1.4. Neighbours go together.
    errors_of_v = torch.stack(errors_of_v)
    t = errors_of_v.mean(0) / (errors_of_v.std(0) / 8**0.5 + 1e-3)
    assert t.square().mean() < 4.0
    assert errors_of_v.square().mean().sqrt() < 0.5 * v.mean()


def counted(monkeypatch) -> list[int]:
    """The widths of all symmetric products with a kernel matrix from now on."""
    widths, multiply = [], LazyKernel._multiply

    def counting(self, v, op):
        if op.z is None:
            widths.append(1 if v.ndim == 1 else v.shape[-1])
        return multiply(self, v, op)

    monkeypatch.setattr(LazyKernel, "_multiply", counting)
    return widths


@pytest.mark.parametrize("kind", ["bernoulli", "softmax"])
def test_a_step_takes_no_product_beside_those_of_its_solve(kind, monkeypatch):
    """One for each iteration, and the one that checks the residual, from which K a follows."""
    widths = counted(monkeypatch)
    gp, result, *_ = fit(kind, rank=30, tol=1e-6)
    steps = len(widths) - result.iterations
    assert set(widths) == {1 + gp.effort.num_probes}
    assert steps <= 1.5 * result.iterations
    mean, K = gp.marginals[0].reshape(N, -1), ref.matern52(*2 * problem(kind)[:1], 0.8, 2.0)
    for c, state in enumerate(gp._fitted.states):
        assert gap(mean[:, c], 0.7 + K @ state.a) < 1e-12 * N


@pytest.mark.parametrize("rank", [30, N])
def test_a_sparse_start_ends_at_the_same_optimum_in_fewer_products(rank, monkeypatch):
    """The bound is concave in the sites, so there is one; both solve to the same tolerance."""
    ends, spent = [], []
    for sparse in (True, False):
        with monkeypatch.context() as patch:
            if not sparse:
                patch.setattr(ascent.Search, "_begin", from_the_prior)
            widths = counted(patch)
            ends.append(fit("bernoulli", rank=rank)[0])
            spent.append(len(widths))
    first, second = ends
    # Steps end where the error by probes hides what they gain; at full rank there is none, and 1e-11 nats are left.
    hidden = first.result.bound.standard_error + second.result.bound.standard_error
    left = 0.2 * hidden + 1e-9
    assert abs(first.result.bound.value - second.result.bound.value) < left
    # ½ (Δm)ᵀV⁻¹Δm nats, with V below 2, are what means still have to go.
    assert gap(first.marginals[0], second.marginals[0]) < 2 * left**0.5
    assert spent[0] < spent[1]


def from_the_prior(self) -> None:
    self.states = [self.process.prior()] * (self.hyper.num_outputs or 1)
    self.bound = self._bound()


def test_data_that_say_nothing_are_part_of_the_mean_all_the_same():
    """Rows with β next to nothing are not divided by √β: their share of the products is taken apart."""
    x, y, likelihood, _ = problem("bernoulli")
    gp, *_ = fit("bernoulli")
    process, K = gp._fitted.process, ref.matern52(x, x, 0.8, 2.0)
    lam, beta = gp.sites.lam.clone(), gp.sites.beta.clone()
    beta[::7] = torch.tensor([0.0, 1e-7, 1e-12], dtype=F64).repeat(3)
    start = process.state(gp.sites.lam, gp.sites.beta)
    for first in (None, start):
        found = process.state(lam, beta, first)
        G = torch.linalg.solve(torch.eye(N, dtype=F64) + K * beta, K)
        assert gap(found.mean, 0.7 + G @ (lam - 0.7 * beta)) < 1e-8
        assert gap(found.shift, K @ found.a) < 1e-8
    again = process.state(gp.sites.lam, gp.sites.beta, found)
    assert gap(again.mean, start.mean) < 1e-8


def evidence(kernel, noise, constant, x, y) -> torch.Tensor:
    """The log marginal likelihood, differentiable."""
    K = ref.smooth_matern52(x, x, kernel.base_kernel.lengthscale, kernel.outputscale)
    cov = K + noise * torch.eye(len(x), dtype=F64)
    return torch.distributions.MultivariateNormal(constant.expand(len(x)), cov).log_prob(y)


@pytest.mark.parametrize("rank", [20, N])
def test_the_gradient_is_that_of_the_evidence(rank):
    gp, _, x, y, likelihood, _ = fit("gaussian", rank=rank)
    found = gp.bound_gradient()
    kernel, m = gp.kernel, gp.mean
    wanted = {
        "kernel.raw_outputscale": kernel.raw_outputscale,
        "kernel.base_kernel.raw_lengthscale": kernel.base_kernel.raw_lengthscale,
        "mean.raw_constant": m.raw_constant,
        "likelihood.noise_covar.raw_noise": likelihood.noise_covar.raw_noise,
    }
    assert found.values.keys() == wanted.keys()
    expected = torch.autograd.grad(evidence(kernel, likelihood.noise, m.constant, x, y), list(wanted.values()))
    for name, g in zip(wanted, expected, strict=True):
        error = found.standard_errors[name]
        # Under the full preconditioner nothing is stochastic; K_zz⁻¹ there has a jitter of 1e-10.
        assert gap(found.values[name], g) <= 6 * error.max() + 1e-5 * g.abs().max()
        if rank == N:
            assert error.max() <= 1e-5 * g.abs().max()


def test_the_gradient_of_a_likelihood_that_is_not_gaussian_is_the_difference_of_refits():
    x, y, likelihood, _ = problem("counts")
    gp = model(likelihood)
    gp.fit(x, y, **HELD)
    found = gp.bound_gradient().values

    def refitted(parameter: torch.Tensor, step: float) -> float:
        again = model(likelihood)
        target = dict(again.named_parameters())[parameter]
        before = target.data.clone()
        target.data = before + step
        value = again.fit(x, y, **HELD).bound.value
        target.data = before
        return value

    for name in ("kernel.raw_outputscale", "kernel.base_kernel.raw_lengthscale", "likelihood.log_count"):
        slope = (refitted(name, 1e-3) - refitted(name, -1e-3)) / 2e-3
        assert abs(found[name].sum().item() - slope) < 1e-3 * max(1.0, abs(slope))


@pytest.mark.slow
def test_hyperparameters_rise_to_those_of_the_dense_evidence():
    x, y, likelihood, _ = problem("gaussian")
    gp = model(likelihood, rank=40, tol=1e-6)
    start = gp.fit(x, y, learn_hyperparameters=False).bound.value
    result = gp.fit(x, y, max_steps=150, tol=1e-5)
    assert result.converged
    assert result.bound.value > start
    dense_gp = DualGP(matern(), gaussian(), mean=mean(), inducing_points=x)
    best = dense_gp.fit(x, y, learn_inducing=False, tol=1e-6, progress=False).elbo
    assert abs(result.bound.value - best) < 0.01 * N + 3 * result.bound.standard_error
    assert abs(gp.kernel.outputscale.item() - 2.0) > 1e-3  # the user's own modules have learned


def test_single_precision_agrees_with_double():
    x, y, likelihood, _ = problem("bernoulli")
    double, single = model(likelihood, tol=1e-4), model(likelihood, tol=1e-4)
    double.fit(x, y, learn_hyperparameters=False)
    result = single.fit(x.float(), y.float(), learn_hyperparameters=False)
    assert abs(result.bound.value - double.result.bound.value) < 1e-3
    for a, b in zip(single.predict(x[:7].float()), double.predict(x[:7]), strict=True):
        assert a.dtype == torch.float32
        assert gap(a, b) < 2e-3  # both to what solves to 1e-4 and steps of 1e-4 nats leave


def test_many_data_in_single_precision_at_the_tolerance_that_is_set_agree_with_cholesky():
    """What n data say adds up, and must not cancel in what is solved for."""
    x, f, generator = waves(700, 2)
    y = f + 0.1 * torch.randn(700, generator=generator, dtype=F64)
    gp = ExactGP(matern(), gaussian(0.01), rank=60)
    gp.fit(x.float(), y.float(), learn_hyperparameters=False)
    test = waves(30, 2, seed=9)[0]
    K, Ks = ref.matern52(x, x, 0.8, 2.0), ref.matern52(x, test, 0.8, 2.0)
    evidence, m, v = ref.gpr(K, Ks, torch.full((30,), 2.0, dtype=F64), y, at(0.01))
    found = gp.predict(test.float())
    assert gap(found[0], m) < 1e-2  # of a signal of size 2; residuals are 1e-3 of |y|/σ
    assert gap(found[1] / v, torch.ones(30)) < 2e-2
    assert abs(gp.result.bound.value - evidence) < 5 * gp.result.bound.standard_error


def test_a_sparse_stand_in_of_all_pivots_is_the_process_itself():
    gp, _, x, *_ = fit("bernoulli")
    q = gp.posterior()
    test = waves(30, 2, seed=9)[0]
    for a, b in zip(q.predict(test), gp.predict(test), strict=True):
        assert gap(a, b) < 1e-4  # the jitter of K_zz, 1e-6
    assert gp.posterior(10).basis.size == 10


def test_likelihoods_that_are_not_log_concave_keep_the_precision_positive():
    x, f, generator = waves(N, 2)
    y = f + 0.1 * torch.randn(N, generator=generator, dtype=F64)
    y[::9] += 4.0
    gp = model(StudentTLikelihood().double())
    result = gp.fit(x, y, **HELD)
    assert result.clipped > 0
    assert gp.sites.beta.min() == 0.0
    m = gp.marginals[0]
    K = ref.matern52(x, x, 0.8, 2.0)
    # The mean is stationary: m = μ + Kα.
    duals = dual_parameters(gp.likelihood, y, *gp.marginals)
    assert gap(m, 0.7 + K @ duals.alpha) < 1e-3


def test_probes_come_from_the_generator_and_fits_are_repeatable():
    state = torch.get_rng_state()
    first, second = fit("bernoulli", rank=30)[1], fit("bernoulli", rank=30)[1]
    assert first.bound == second.bound
    assert torch.equal(state, torch.get_rng_state())


def test_data_made_in_inference_mode_are_learned_from_as_others():
    x, y, likelihood, _ = problem("bernoulli")
    with torch.inference_mode():
        made = x.clone(), y.clone()
    gps = [model(likelihood), model(likelihood)]
    for gp, data in zip(gps, [(x, y), made], strict=True):
        with pytest.warns(errors.ConvergenceWarning):
            gp.fit(*data, max_steps=1)
    assert torch.equal(gps[0].marginals[0], gps[1].marginals[0])


def test_a_solve_that_falls_short_raises_and_leaves_the_model_as_it_was():
    x, y, likelihood, _ = problem("gaussian")
    gp = model(likelihood, rank=2, tol=1e-10, max_iterations=3)
    before = {k: v.clone() for k, v in gp.state_dict().items()}
    with pytest.raises(errors.SolverError, match="relative residual .* after 3 iterations. Give the preconditioner"):
        gp.fit(x, y)
    assert all(torch.equal(before[k], v) for k, v in gp.state_dict().items())
    with pytest.raises(errors.NotFittedError, match="call fit"):
        gp.predict(x)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: ExactGP(RBFKernel(batch_shape=torch.Size([2])), GaussianLikelihood()),
            errors.UnsupportedError,
            "batch",
        ),
        (lambda: ExactGP(RBFKernel(), GaussianLikelihood(), rank=0), errors.InputError, "rank must be a whole number"),
        (lambda: ExactGP(RBFKernel(), GaussianLikelihood(), num_probes=1), errors.InputError, "num_probes must be"),
        (
            lambda: ExactGP(RBFKernel(), GaussianLikelihood()).fit(torch.rand(2, 5, 1), torch.rand(2, 5)),
            errors.InputError,
            "one ExactGP each",
        ),
        (
            lambda: ExactGP(RBFKernel(), BernoulliLikelihood()).fit(torch.rand(5, 1), torch.rand(5)),
            errors.InputError,
            "expects targets 0 or 1",
        ),
        (
            lambda: ExactGP(RBFKernel(), GaussianLikelihood()).fit(torch.rand(5, 1), torch.rand(5), lr=0.0),
            errors.InputError,
            "lr must be positive",
        ),
    ],
)
def test_bad_input_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_what_cannot_fit_is_refused_before_it_is_tried():
    gp = ExactGP(ScaleKernel(MaternKernel()), GaussianLikelihood(), rank=10**6)
    x = torch.arange(10.0**6).unsqueeze(-1)
    with pytest.raises(errors.InputError, match="exact process of 1000000 data would take .* lower rank"):
        gp.fit(x, x[:, 0])
