"""Predictive distributions against brute-force integrals: mean, variance and log density."""

import pytest
import reference as ref
import torch
from gpytorch.distributions import MultivariateNormal
from gpytorch.likelihoods import (
    BernoulliLikelihood,
    FixedNoiseGaussianLikelihood,
    LaplaceLikelihood,
    MultitaskGaussianLikelihood,
    SoftmaxLikelihood,
    StudentTLikelihood,
)
from test_duals import HEAVY, MEANS, SMOOTH, VARS, Own
from toys import F64, Exposed, at, gap, gaussian

from dualgp import errors, likelihoods, log_predictive, predictive, predictive_distribution, quadrature
from dualgp.duals import conditional_log_prob
from dualgp.likelihoods import LogPoissonLikelihood


def moments(make) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of y by integrating the conditional's."""
    likelihood = make()
    with torch.no_grad():
        mean = ref.brute(lambda f: likelihood.forward(f).mean, MEANS, VARS)
        second = ref.brute(lambda f: likelihood.forward(f).variance + likelihood.forward(f).mean.square(), MEANS, VARS)
    return mean, second - mean.square()


@pytest.mark.parametrize("name", SMOOTH)
def test_mean_and_variance_are_those_of_the_integral(name):
    make = SMOOTH[name][0]
    with torch.no_grad():
        found = predictive_distribution(make(), MEANS, VARS)
    mean, var = moments(make)
    assert gap(found.mean, mean) < 1e-5
    assert gap(found.variance, var) < 1e-4 * (1 + var.max().item())


@pytest.mark.parametrize("name", SMOOTH)
def test_the_log_density_is_the_log_of_the_integral(name):
    make, y, log_prob, _ = SMOOTH[name]
    exact = ref.brute(lambda f: log_prob(y, f).exp(), MEANS, VARS).log()
    with torch.no_grad():
        assert gap(log_predictive(make(), y, MEANS, VARS), exact) < 1e-6
        assert gap(predictive_distribution(make(), MEANS, VARS).log_prob(y), exact) < 1e-6


def student(noise: float, deg_free: float = 4.0) -> StudentTLikelihood:
    likelihood = StudentTLikelihood().double()
    likelihood.noise, likelihood.deg_free = at(noise), at(deg_free)
    return likelihood


@pytest.mark.parametrize(
    ("likelihood", "y", "mean", "var"),
    [
        (LogPoissonLikelihood(), 1000.0, 6.9, 1.0),
        (LogPoissonLikelihood(), 300.0, 4.0, 4.0),
        (LogPoissonLikelihood(), 1000.0, 0.0, 1.0),  # the integrand lies five deviations away
        (LogPoissonLikelihood(), 0.0, -3.0, 9.0),
        (likelihoods.LogitBernoulliLikelihood(), 1.0, 3.0, 400.0),
        (student(0.01), 0.5, 0.0, 4.0),
        (student(0.01), 6.0, 0.0, 4.0),
        *((student(1e-6), y, 0.0, 1.0) for y in (-1.7, -1.3, 1.0, 1.3, 1.7)),  # to each side of a first guess
        (student(1e-6), 10.0, 0.0, 4.0),  # five deviations away, and two peaks
        (student(0.01, 2.5), 10.0, 0.0, 4.0),  # … of which the lower holds half, as broad as q
        (student(0.01, 2.5), -10.0, 0.0, 4.0),
        (student(1.0), 30.0, 0.0, 1.0),
    ],
)
def test_the_log_density_of_a_latent_that_is_wide_beside_its_likelihood(likelihood, y, mean, var):
    f = torch.linspace(mean - 12 * var**0.5, mean + 12 * var**0.5, 1_000_001, dtype=F64)
    with torch.no_grad():
        log_h = conditional_log_prob(likelihood, at(y), f.unsqueeze(-1)).squeeze(-1)
        log_h += torch.distributions.Normal(mean, var**0.5).log_prob(f)
        exact = torch.logsumexp(log_h, 0) + (f[1] - f[0]).log()
        found = log_predictive(likelihood, at(y, y), at(mean, 0.0), at(var, 1e-3))[0]  # beside one that is narrow
        assert gap(found, exact) < 2e-6
        by_columns = log_predictive(likelihood, at(y, y).view(2, 1), at(mean, mean).view(2, 1), at(var, var).view(2, 1))
        assert gap(by_columns, exact) < 2e-6


@pytest.mark.parametrize("side", [-1.0, 1.0])
def test_the_log_density_of_a_step_far_from_a_very_wide_latent(side):
    """Half of the mass is q's own, on panels about its mean."""
    f = torch.linspace(-500, 400, 2_000_001, dtype=F64)
    log_h = torch.distributions.Normal(-50.0, 1000.0**0.5).log_prob(f) - f.exp()  # no count at rate e^f …
    exact = torch.logsumexp(log_h, 0) + (f[1] - f[0]).log()

    class Mirrored(LogPoissonLikelihood):
        def forward(self, function_samples, *args, **kwargs):
            return super().forward(side * function_samples)  # … or at e^{−f}

    assert gap(log_predictive(Mirrored(), at(0.0), at(-50.0 * side), at(1000.0)), exact) < 5e-5


def test_panels_are_for_latents_that_are_wide(monkeypatch):
    """Where nodes have settled they are the answer: panels cost fifty times as much."""
    likelihood, y, mean, var = LogPoissonLikelihood(), at(0.0, 2.0, 1.0), at(-0.3, 0.2, 0.0), at(0.1, 0.05, 0.2)
    exact = ref.brute(lambda f: torch.distributions.Poisson(f.exp()).log_prob(y).exp(), mean, var).log()
    asked = []
    whole = predictive.log_expectation
    monkeypatch.setattr(predictive, "log_expectation", lambda g, m, v: asked.append(m) or whole(g, m, v))
    assert gap(log_predictive(likelihood, y, mean, var), exact) < 1e-6
    assert asked == []
    log_predictive(likelihood, at(1.0, 1000.0, 1.0), at(0.0, 6.9, 0.0), at(0.1, 1.0, 0.1))
    assert [m.tolist() for m in asked] == [[6.9]]  # of that datum alone


def test_the_log_density_of_a_wide_latent_has_the_gradient_of_the_integral():
    y, mean, var = at(300.0), at(4.0).requires_grad_(), at(4.0).requires_grad_()
    found = torch.autograd.grad(log_predictive(LogPoissonLikelihood(), y, mean, var).sum(), (mean, var))

    def value(m: float, v: float) -> float:
        return log_predictive(LogPoissonLikelihood(), y, at(m), at(v)).item()

    assert found[0].item() == pytest.approx((value(4.001, 4.0) - value(3.999, 4.0)) / 2e-3, rel=1e-5)
    assert found[1].item() == pytest.approx((value(4.0, 4.001) - value(4.0, 3.999)) / 2e-3, rel=1e-5)


def test_numbers_of_each_datum_and_parameters_of_each_output_stay_with_wide_latents():
    exposure = at(1.0, 1000.0, 3.0)
    found = log_predictive(Exposed(), at(2.0, 2000.0, 5.0), at(0.0, 0.0, 0.0), at(1.0, 4.0, 1.0), exposure=exposure)
    one = log_predictive(Exposed(), at(2000.0), at(0.0), at(4.0), exposure=at(1000.0))
    assert gap(found[1], one) < 1e-12
    several = StudentTLikelihood(batch_shape=torch.Size([2, 1])).double()
    several.noise = at(0.01, 1.0).view(2, 1, 1)
    several.deg_free = at(4.0, 4.0).view(2, 1, 1)
    y, m, v = at(0.5, 6.0).expand(2, 1, 2), torch.zeros(2, 1, 2, dtype=F64), torch.full((2, 1, 2), 4.0, dtype=F64)
    for row, noise in enumerate((0.01, 1.0)):
        alone = log_predictive(student(noise), y[row], m[row], v[row])
        assert gap(log_predictive(several, y, m, v)[row], alone) < 1e-9


def test_the_kink_of_laplace_is_integrated():
    likelihood = LaplaceLikelihood().double()
    likelihood.noise = at(0.5)
    with torch.no_grad():
        exact = ref.brute(lambda f: likelihood(f).log_prob(HEAVY).exp(), MEANS, VARS).log()
        assert (
            gap(log_predictive(likelihood, HEAVY, MEANS, VARS), exact) < 2e-5
        )  # whose own steps of 1e-3 meet the kink
        found = predictive_distribution(likelihood, MEANS, VARS)
        assert gap(found.mean, MEANS) < 1e-12
        assert gap(found.variance, VARS + likelihood(MEANS).variance) < 1e-9


@pytest.mark.parametrize("n", [3, quadrature.NUM_NODES])  # as many data as nodes, too
def test_a_number_of_each_datum_stays_with_its_datum(n):
    mean, var, exposure = torch.linspace(-1, 1, n).double(), torch.full((n,), 0.3).double(), torch.arange(1.0, n + 1)
    found = predictive_distribution(Exposed(), mean, var, exposure=exposure.double())
    assert gap(found.mean, exposure * (mean + 0.5 * var).exp()) < 1e-9
    y = torch.ones(n).double()
    exact = ref.brute(lambda f: torch.distributions.Poisson(exposure * f.exp()).log_prob(y).exp(), mean, var).log()
    assert gap(log_predictive(Exposed(), y, mean, var, exposure=exposure.double()), exact) < 1e-6
    assert gap(found.log_prob(y), exact) < 1e-6


def test_batches_of_data_each_with_a_number_of_its_own():
    mean, var = torch.linspace(-1, 1, 6).double().view(2, 3), torch.full((2, 3), 0.3).double()
    exposure = torch.arange(1.0, 7.0).double().view(2, 3)
    found = predictive_distribution(Exposed(), mean, var, exposure=exposure)
    assert gap(found.mean, exposure * (mean + 0.5 * var).exp()) < 1e-9


def test_the_rule_is_finer_where_the_conditional_is_narrow_or_has_a_kink():
    assert predictive_distribution(LaplaceLikelihood(), MEANS, VARS).mixture_distribution.probs.shape[-1] == 64
    assert predictive_distribution(LogPoissonLikelihood(), MEANS, VARS).mixture_distribution.probs.shape[-1] == 20


def test_the_dtype_is_that_of_the_marginals():
    found = predictive_distribution(gaussian(0.3), MEANS.float(), VARS.float())
    assert found.mean.dtype == found.stddev.dtype == torch.float32


@pytest.mark.parametrize("bad", [torch.tensor([True, False, True, True]), at(0.0, 1.0, float("nan"), 1.0)])
def test_targets_that_are_no_numbers_are_refused(bad):
    y = bad[: len(MEANS)]
    with pytest.raises(errors.InputError, match=rf"^y must hold finite numbers or integer labels, got {y.dtype}"):
        log_predictive(BernoulliLikelihood(), y, MEANS[: len(y)], VARS[: len(y)])


@pytest.mark.parametrize(
    ("mean", "var"),
    [(float("nan"), 1.0), (float("inf"), 1.0), (0.0, float("inf")), (0.0, float("nan")), (0.0, -1.0), (0.0, -0.25)],
)
def test_marginals_that_are_none_are_refused(mean, var):
    noise = FixedNoiseGaussianLikelihood(torch.ones(2)).double()
    with pytest.raises(errors.InputError, match=r"^mean and var must be finite and var ≥ 0, but hold NaN, infinity or"):
        predictive_distribution(noise, at(0.0, mean), at(1.0, var), noise=at(0.25, 0.25))


def test_fixed_noise_takes_the_noise_of_each_test_datum():
    likelihood = FixedNoiseGaussianLikelihood(torch.ones(3), learn_additional_noise=True).double()
    likelihood.second_noise = at(0.25)
    found = predictive_distribution(likelihood, MEANS, VARS, noise=VARS)
    assert gap(found.variance.detach(), 2 * VARS + 0.25) < 1e-12
    exact = torch.distributions.Normal(MEANS, (2 * VARS + 0.25).sqrt()).log_prob(HEAVY)
    assert gap(log_predictive(likelihood, HEAVY, MEANS, VARS, noise=VARS).detach(), exact) < 1e-10
    with pytest.raises(errors.InputError, match="pass noise="):
        predictive_distribution(likelihood, MEANS, VARS)


def test_outputs_of_a_multitask_gaussian():
    likelihood = MultitaskGaussianLikelihood(num_tasks=2).double()
    likelihood.noise, likelihood.task_noises = at(0.1), at(0.2, 0.5)
    m, v = torch.stack([MEANS, -MEANS], -1), torch.stack([VARS, 2 * VARS], -1)
    found = predictive_distribution(likelihood, m, v)
    assert gap(found.variance.detach(), v + at(0.3, 0.6)) < 1e-12


@pytest.mark.parametrize(
    ("mean", "var"),
    [(at(0.3, -1.0), at(0.5, 2.0)), (at(0.3, -1.0, 0.8), at(0.5, 2.0, 4.0)), (at(9, -9, 0), at(1, 1, 1))],
)
def test_class_probabilities_are_those_of_a_dense_integral(mean, var):
    likelihood = SoftmaxLikelihood(num_classes=len(mean), mixing_weights=False)
    probs = ref.brute_joint(lambda f: f.softmax(-1), mean, var, 401 if len(mean) == 2 else 91)
    found = predictive_distribution(likelihood, mean.unsqueeze(0), var.unsqueeze(0))
    assert gap(found.probs[0], probs) < 1e-6
    assert gap(found.probs.sum(), 1.0) < 1e-12
    for y in range(len(mean)):
        log_p = log_predictive(likelihood, torch.tensor([y]), mean.unsqueeze(0), var.unsqueeze(0))
        assert log_p.item() == pytest.approx(probs[y].log().item(), rel=1e-3, abs=1e-6)


def test_binary_probabilities_are_accurate_in_the_tails():
    mean, var = at(-60.0, 60.0), at(0.5, 0.5)
    z = -60 / 1.5**0.5
    expected = torch.special.log_ndtr(at(z, z))
    assert gap(log_predictive(BernoulliLikelihood(), at(1.0, 0.0), mean, var), expected) < 1e-9 * 1200
    logit = log_predictive(likelihoods.LogitBernoulliLikelihood(), at(1.0, 0.0), mean, var)
    assert gap(logit, at(-59.75, -59.75)) < 1e-6  # E e^f = e^{m + v/2}


def test_binary_probabilities_of_wide_latents_are_exact():
    mean, var = at(-30.0, 3.0, 200.0), at(1e3, 1e4, 1e6)
    found = predictive_distribution(BernoulliLikelihood(), mean, var).probs
    assert gap(found, torch.special.ndtr(mean / (1 + var).sqrt())) < 1e-14


def test_sure_labels_are_probabilities():
    """The weights of a rule in float32 add up to more than 1."""
    mean, var = at(-800.0, 50.0, 800.0).float(), torch.ones(3)
    found = predictive_distribution(likelihoods.LogitBernoulliLikelihood(), mean, var)
    assert ((found.probs >= 0) & (found.probs <= 1)).all()


def test_both_labels_sum_to_one():
    for likelihood in (BernoulliLikelihood(), likelihoods.LogitBernoulliLikelihood()):
        one, zero = (log_predictive(likelihood, torch.full((5,), y, dtype=F64), MEANS, VARS) for y in (1.0, 0.0))
        assert gap(one.exp() + zero.exp(), torch.ones(5)) < 1e-12


def test_a_mixture_draws_what_its_moments_say():
    make = SMOOTH["student-t"][0]
    with torch.no_grad():
        found = predictive_distribution(make(), MEANS, VARS)
        draws = found.sample((40_000,))
    error = (found.variance / 40_000).sqrt()
    assert ((draws.mean(0) - found.mean).abs() < 6 * error).all()


def test_what_has_no_elementwise_conditional_says_so():
    m, v = torch.stack([MEANS, MEANS], -1), torch.stack([VARS, VARS], -1)
    with pytest.raises(errors.UnsupportedError, match="Own .*sampling"):
        predictive_distribution(Own(), m, v)
    with pytest.raises(errors.UnsupportedError, match="Own .*sampling"):
        log_predictive(Own(), m, m, v)


def test_a_logit_likelihood_called_as_gpytorch_calls_it_is_no_probit():
    likelihood = likelihoods.LogitBernoulliLikelihood()
    q = MultivariateNormal(MEANS, torch.diag(VARS))
    y = at(0.0, 1.0, 1.0, 0.0, 1.0)
    assert gap(likelihood(q).probs, ref.brute(torch.sigmoid, MEANS, VARS)) < 1e-6
    expected = ref.brute(lambda f: torch.nn.functional.logsigmoid((2 * y - 1) * f), MEANS, VARS)
    assert gap(likelihood.expected_log_prob(y, q), expected) < 1e-6
    log_p = ref.brute(lambda f: torch.sigmoid((2 * y - 1) * f), MEANS, VARS).log()
    assert gap(likelihood.log_marginal(y, q), log_p) < 1e-6


def test_a_distribution_has_a_density_at_any_values_that_go_with_its_shape():
    found = predictive_distribution(LogPoissonLikelihood(), MEANS.float(), VARS.float())
    counts = torch.arange(400.0)
    log_p = found.log_prob(counts.unsqueeze(-1))
    assert log_p.shape == (400, len(MEANS))
    assert log_p.dtype == torch.float32
    assert gap(log_p.exp().sum(0), torch.ones(len(MEANS))) < 1e-4
    assert gap(found.log_prob(torch.tensor(3.0)), log_p[3]) < 1e-6
    wider = found.expand(torch.Size([2, len(MEANS)]))  # the mixture's own
    assert wider.log_prob(counts[3]).shape == (2, len(MEANS))


def test_rates_that_overflow_are_no_part_of_the_integral():
    """E[Poisson(2 | e^f)] under a q so wide that it is flat: ∫ e^{2f − e^f} df / 2! = Γ(2) / 2 of its density."""
    found = log_predictive(LogPoissonLikelihood(), at(2.0), at(0.0), at(1e6))
    assert gap(found, at(0.5 / (2 * torch.pi * 1e6) ** 0.5).log()) < 1e-4
