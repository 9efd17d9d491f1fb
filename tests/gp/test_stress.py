"""A16: what used to break: many data under a large variance, float32, duplicates, single points, heavy tails."""

import math
import warnings

import pytest
import reference as ref
import torch
from gpytorch.kernels import RBFKernel, ScaleKernel
from gpytorch.likelihoods import BernoulliLikelihood, GaussianLikelihood, StudentTLikelihood
from toys import F64, at, gap, gaussian, line, matern, rbf, solve, waves

from dualgp import DualGP, InducingBasis, Posterior, Sites, errors
from dualgp.gp.data import Data
from dualgp.gp.estep import Source, e_step


def eigenvalues_from_one(q: Posterior, rounding: float = 1e-14) -> bool:
    """Whether P = I + B has no eigenvalue under 1, up to `rounding` relative to the largest."""
    values = torch.linalg.eigvalsh(q.precision)
    return values.min().item() > 1 - rounding * values.max().item()


@pytest.mark.parametrize("variance", [10.0, 1e4])
@pytest.mark.parametrize("lengthscale", [0.5, 1.0, 2.0])
def test_a16_precise_data_under_a_large_variance(lengthscale, variance):
    # Here chol(K + B_u) fails, and L⁻¹B_uL⁻ᵀ has eigenvalues down to −4.8.
    x = line(-1, 1, 2000)
    y = (3 * x).sin().squeeze(-1)
    sites = Sites(100 * y, torch.full_like(y, 100.0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", errors.NumericalWarning)  # variance 1e4 may raise the jitter
        q = Posterior(InducingBasis(rbf(lengthscale, variance), line(-1, 1, 50), jitter=1e-8)).add(x, sites)
    assert eigenvalues_from_one(q)
    var = q.predict(x)[1]
    assert (var > 0).all()
    assert (var < 0.01).all()  # the noise of one datum
    assert q.kl() > 0


def test_a16_predictions_there_are_those_of_exact_regression():
    x = line(-1, 1, 300)
    y = (3 * x).sin().squeeze(-1)
    q = solve(InducingBasis(rbf(1.0, 10.0), line(-1, 1, 50), jitter=1e-8), gaussian(0.01), x, y).posterior
    K = ref.rbf(x, x, 1.0, 10.0)
    _, mean, var = ref.gpr(K, K, K.diagonal(), y, at(0.01))
    assert gap(q.predict(x)[0], mean) < 1e-4
    assert gap(q.predict(x)[1], var) < 1e-5


@pytest.mark.parametrize("base", ["rbf", "matern"])
@pytest.mark.parametrize("variance", [0.01, 10.0, 1e4])
def test_a16_float32_never_fails_a_factorisation_and_agrees_with_float64(base, variance):
    kernel = (rbf if base == "rbf" else matern)(1.0, variance)
    x = line(-1, 1, 2000)
    y = variance**0.5 * (3 * x).sin().squeeze(-1)
    Z = line(-1, 1, 40)
    noise = 0.01 * variance
    exact = solve(InducingBasis(kernel, Z, jitter=1e-4), gaussian(noise), x, y)
    low = solve(InducingBasis(kernel, Z.float(), jitter=1e-4), gaussian(noise), x.float(), y.float())
    assert eigenvalues_from_one(low.posterior, 1e-7)
    scale = variance**0.5
    assert gap(low.posterior.predict(x.float())[0], exact.posterior.predict(x)[0]) < 2e-3 * scale
    assert gap(low.posterior.predict(x.float())[1], exact.posterior.predict(x)[1]) < 1e-4 * variance
    assert abs(low.elbo - exact.elbo) < 1e-3 * 2000


@pytest.mark.parametrize(("n", "noise"), [(2000, 1e-5), (20000, 1e-4)])
def test_a16_float32_does_not_fail_where_data_are_many_and_precise(n, noise):
    x = line(-1, 1, n).float()
    y = (3 * x).sin().squeeze(-1)
    found = solve(InducingBasis(rbf(1.0, 1.0), line(-1, 1, 100).float()), gaussian(noise), x, y)
    assert gap(found.posterior.predict(x)[0], y) < 0.05


@pytest.mark.parametrize("kind", ["gaussian", "probit"])
def test_a16_float32_fits_by_default_like_float64(kind):
    x, f, generator = waves(300, 2)
    noisy = f + 0.3 * torch.randn(300, generator=generator, dtype=F64)
    likelihood, y = (
        (GaussianLikelihood(), noisy) if kind == "gaussian" else (BernoulliLikelihood(), (noisy > 0).double())
    )
    results = []
    for dtype in (torch.float32, torch.float64):
        gp = DualGP(ScaleKernel(RBFKernel()).to(dtype), type(likelihood)().to(dtype), num_inducing=30)
        results.append(gp.fit(x.to(dtype), y.to(dtype), progress=False).elbo / 300)
        assert gp.predict(x.to(dtype))[0].dtype == dtype
    assert abs(results[0] - results[1]) < 5e-3


def test_a16_duplicated_inducing_points_need_no_more_than_the_jitter():
    x, f, _ = waves(100, 2)
    Z = torch.cat([x[:10], x[:10]])
    once = solve(InducingBasis(rbf(), x[:10], jitter=1e-8), gaussian(), x, f)
    twice = solve(InducingBasis(rbf(), Z, jitter=1e-8), gaussian(), x, f)
    assert gap(once.posterior.predict(x)[0], twice.posterior.predict(x)[0]) < 1e-5
    assert gap(once.posterior.predict(x)[1], twice.posterior.predict(x)[1]) < 1e-5
    assert eigenvalues_from_one(twice.posterior)


def test_a16_jitter_that_had_to_be_raised_is_reported():
    Z = torch.zeros(30, 1, dtype=F64)
    with pytest.warns(errors.NumericalWarning, match="jitter of"):
        basis = InducingBasis(rbf(), Z, jitter=0.0)
    assert basis.jitter > basis.requested_jitter == 0.0


def test_a16_duplicated_rows_weigh_double():
    x, f, _ = waves(60, 1)
    twice = solve(InducingBasis(rbf(), x[:8]), gaussian(0.1), torch.cat([x, x]), torch.cat([f, f]))
    once = solve(InducingBasis(rbf(), x[:8]), gaussian(0.05), x, f)
    assert gap(once.posterior.predict(x)[0], twice.posterior.predict(x)[0]) < 1e-10
    assert gap(once.posterior.predict(x)[1], twice.posterior.predict(x)[1]) < 1e-10


def test_a16_a_fit_of_duplicated_rows_takes_each_once_as_inducing_point():
    x, f, generator = waves(30, 1)
    x, y = x.repeat(4, 1), f.repeat(4) + 0.1 * torch.randn(120, generator=generator, dtype=F64)
    gp = DualGP(matern(), gaussian(0.1), num_inducing=40)
    with pytest.warns(errors.NumericalWarning, match="Only 30 .* 40"):
        result = gp.fit(x, y, progress=False)
    assert result.converged
    assert len(gp.inducing_points) == len(gp.inducing_points.unique(dim=0)) == 30


@pytest.mark.parametrize("likelihood", [gaussian, BernoulliLikelihood])
def test_a16_one_point(likelihood):
    x, y = torch.zeros(1, 2, dtype=F64), torch.ones(1, dtype=F64)
    gp = DualGP(rbf(), likelihood())
    gp.fit(x, y, learn_hyperparameters=False, progress=False)
    mean, var = gp.predict(x)
    if likelihood is gaussian:
        assert gap(mean, 1.3 / (1.3 + 0.09)) < 1e-5
        assert gap(var, 1.3 * 0.09 / (1.3 + 0.09)) < 1e-5
    assert mean > 0
    assert 0 < var < 1.3


def test_a16_one_point_with_everything_learned():
    x, y = torch.zeros(1, 2, dtype=F64), torch.ones(1, dtype=F64)
    gp = DualGP(rbf(), gaussian())
    result = gp.fit(x, y, progress=False)
    assert result.elbo >= ref.log_normal(y, 0 * y, at(1.39).reshape(1, 1)) - 1e-6
    assert gp.predict(x)[0].isfinite().all()


def test_a16_an_e_step_on_no_data_is_the_prior():
    basis = InducingBasis(rbf(), line(-1, 1, 5))
    empty = Data(torch.zeros(0, 1, dtype=F64), torch.zeros(0, dtype=F64), False)
    for likelihood in (gaussian(), BernoulliLikelihood()):
        found = e_step(Source(basis, empty), likelihood)
        assert found.elbo == 0.0
        assert found.posterior.kl() == 0.0


def outliers() -> tuple[torch.Tensor, torch.Tensor]:
    x, f, generator = waves(80, 1)
    y = f + 0.1 * torch.randn(80, generator=generator, dtype=F64)
    return x, torch.where(torch.arange(80) % 8 == 0, y + 5, y)


@pytest.mark.parametrize("start", [None, "far"])
def test_a16_heavy_tails_climb_to_a_stationary_point_without_clipping(start):
    x, y = outliers()
    likelihood = StudentTLikelihood().double()
    likelihood.noise, likelihood.deg_free = at(0.05), at(2.5)
    source = Source(InducingBasis(rbf(0.8, 2.0), line(-1.5, 1.5, 12)), Data(x, y, False))
    begin = None
    if start:  # q at the outliers: half the sites ask for β < 0
        off = Sites(100 * (y + 4), torch.full_like(y, 100.0))
        begin = Posterior(source.basis).add(x, off), off
    found = e_step(source, likelihood, begin, tol=1e-11)
    assert found.converged
    assert (found.sites.beta < -1e-3).any()
    elbos = [e_step(source, likelihood, begin, tol=0.0, max_passes=k).elbo for k in range(1, 12)]
    assert all(b >= a - 1e-9 for a, b in zip(elbos, elbos[1:], strict=False))
    # Stationary: prior plus the sites that q itself asks for is q.
    again = e_step(source, likelihood, (found.posterior, found.sites), max_passes=2, tol=0.0)
    assert gap(again.posterior.predict(x)[0], found.posterior.predict(x)[0]) < 1e-4
    assert abs(again.elbo - found.elbo) < 1e-7


def test_a16_a_student_t_fit_shrugs_off_outliers():
    x, y = outliers()
    clean = torch.arange(80) % 8 != 0
    robust = DualGP(rbf(0.8, 2.0), StudentTLikelihood().double(), num_inducing=12)
    result = robust.fit(x, y, progress=False)
    plain = DualGP(rbf(0.8, 2.0), gaussian(0.1), num_inducing=12)
    plain.fit(x, y, progress=False)
    assert result.converged
    error = (robust.predict(x)[0] - y)[clean].square().mean().sqrt()
    assert error < 0.2
    assert error < 0.5 * (plain.predict(x)[0] - y)[clean].square().mean().sqrt()


def test_a16_a_far_too_short_and_a_far_too_long_start_recover():
    x, f, generator = waves(100, 1)
    y = f + 0.2 * torch.randn(100, generator=generator, dtype=F64)
    best = DualGP(matern(0.8, 1.0), gaussian(0.1), num_inducing=15).fit(x, y, progress=False).elbo
    for lengthscale, variance in ((0.05, 1.0), (20.0, 1.0), (0.8, 1e-3), (0.8, 1e3)):
        gp = DualGP(matern(lengthscale, variance), gaussian(0.1), num_inducing=15)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", errors.NumericalWarning)
            found = gp.fit(x, y, progress=False).elbo
        assert found > best - 0.05 * 100, (lengthscale, variance)


def test_a16_units_of_y_and_x_do_not_matter():
    x, f, generator = waves(80, 1)
    y = f + 0.2 * torch.randn(80, generator=generator, dtype=F64)
    a = DualGP(rbf(0.8, 1.0), gaussian(0.1), num_inducing=10)
    b = DualGP(rbf(0.8e3, 1e4), gaussian(0.1e4), num_inducing=10)
    elbo = a.fit(x, y, progress=False).elbo
    scaled = b.fit(1e3 * x, 100 * y, progress=False).elbo
    assert abs(scaled + 80 * math.log(100.0) - elbo) < 1e-3 * 80
