"""Dual parameters: derivatives of brute-force expectations (Bonnet, Price), expectations of derivatives."""

import math

import gpytorch
import pytest
import reference as ref
import torch
from gpytorch.likelihoods import (
    BernoulliLikelihood,
    BetaLikelihood,
    FixedNoiseGaussianLikelihood,
    GaussianLikelihood,
    LaplaceLikelihood,
    MultitaskGaussianLikelihood,
    PoissonLikelihood,
    SoftmaxLikelihood,
    StudentTLikelihood,
)
from gpytorch.likelihoods.gaussian_likelihood import _GaussianLikelihoodBase
from gpytorch.likelihoods.likelihood import _OneDimensionalLikelihood
from gpytorch.likelihoods.noise_models import HeteroskedasticNoise
from scipy.stats import norm
from torch import Tensor
from torch.distributions import NegativeBinomial
from toys import F64, at, gap, unchecked

from dualgp import dual_parameters, errors, expected_log_prob, likelihoods
from dualgp.duals import (
    check_likelihood,
    check_param_names,
    check_targets,
    check_variances,
    conditional_log_prob,
    differentiable_dual_parameters,
    gaussian_noise,
    has_batch_shape,
    num_outputs_of,
    training_params,
)

MEANS, VARS = at(-2.0, -0.5, 0.0, 0.4, 1.5), at(0.5, 0.05, 1.0, 0.3, 0.8)
HEAVY = at(-2.2, -0.4, 3.0, 0.5, 1.2)


class Counts(_OneDimensionalLikelihood):
    def forward(self, f: Tensor) -> NegativeBinomial:
        return NegativeBinomial(total_count=torch.full_like(f, 4.0), logits=f)


def gaussian() -> GaussianLikelihood:
    likelihood = GaussianLikelihood().double()
    likelihood.noise = at(0.3)
    return likelihood


def softmax() -> SoftmaxLikelihood:
    return SoftmaxLikelihood(num_classes=3, mixing_weights=False)


def student() -> StudentTLikelihood:
    likelihood = StudentTLikelihood().double()
    likelihood.noise, likelihood.deg_free = at(1.5), at(4.0)
    return likelihood


def beta() -> BetaLikelihood:
    likelihood = BetaLikelihood().double()
    likelihood.scale = at(5.0)
    return likelihood


# likelihood, targets, log p(y|f) written out independently (up to nothing), tolerance of 20 nodes
SMOOTH = {
    "gaussian": (gaussian, HEAVY, lambda y, f: -0.5 * ((y - f) ** 2 / 0.3 + math.log(2 * math.pi * 0.3)), 1e-10),
    "probit": (BernoulliLikelihood, at(0, 1, 1, 0, 0), lambda y, f: torch.special.log_ndtr((2 * y - 1) * f), 1e-6),
    "logit": (
        likelihoods.LogitBernoulliLikelihood,
        at(0, 1, 1, 0, 0),
        lambda y, f: -torch.log1p((-(2 * y - 1) * f).exp()),
        1e-6,
    ),
    "poisson": (
        PoissonLikelihood,
        at(0, 1, 3, 2, 7),
        lambda y, f: y * torch.nn.functional.softplus(f).log() - torch.nn.functional.softplus(f) - torch.lgamma(y + 1),
        1e-5,
    ),
    "log poisson": (
        likelihoods.LogPoissonLikelihood,
        at(0, 1, 3, 2, 7),
        lambda y, f: y * f - f.exp() - torch.lgamma(y + 1),
        1e-9,
    ),
    "student-t": (
        student,
        HEAVY,
        lambda y, f: (
            math.lgamma(2.5) - math.lgamma(2.0) - 0.5 * math.log(4 * math.pi * 1.5)
            - 2.5 * torch.log1p((y - f) ** 2 / (4 * 1.5))
        ),
        1e-5,
    ),
    "beta": (
        beta,
        at(0.2, 0.4, 0.5, 0.7, 0.9),
        lambda y, f: (
            math.lgamma(7.0)  # GPyTorch's: both concentrations are one more than their share of the scale
            - torch.lgamma(5 * torch.sigmoid(f) + 1) - torch.lgamma(5 * torch.sigmoid(-f) + 1)
            + 5 * torch.sigmoid(f) * y.log() + 5 * torch.sigmoid(-f) * (1 - y).log()
        ),
        2e-5,
    ),
    "negative binomial": (
        Counts,
        at(0, 1, 3, 2, 7),
        lambda y, f: (
            torch.lgamma(y + 4) - torch.lgamma(y + 1) - math.lgamma(4.0)
            + 4 * torch.nn.functional.logsigmoid(-f) + y * torch.nn.functional.logsigmoid(f)
        ),
        1e-6,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SMOOTH)
def test_the_expectation_is_the_brute_force_integral(name):
    make, y, log_prob, tolerance = SMOOTH[name]
    found = expected_log_prob(make(), y, MEANS, VARS)
    assert gap(found.detach(), ref.brute(lambda f: log_prob(y, f), MEANS, VARS)) < tolerance
    assert found.dtype == F64


@pytest.mark.parametrize("name", SMOOTH)
def test_duals_are_the_derivatives_of_the_brute_force_expectation(name):
    make, y, log_prob, tolerance = SMOOTH[name]
    duals = dual_parameters(make(), y, MEANS, VARS)
    in_mean = ref.numerical(lambda m: ref.brute(lambda f: log_prob(y, f), m, VARS), MEANS)
    in_var = ref.numerical(lambda v: ref.brute(lambda f: log_prob(y, f), MEANS, v), VARS, 1e-3)
    assert gap(duals.alpha, in_mean) < 10 * tolerance + 1e-9
    assert gap(duals.beta, -2 * in_var) < 100 * tolerance + 1e-9


@pytest.mark.parametrize("name", SMOOTH)
def test_duals_are_the_expectations_of_the_derivatives(name):
    make, y, log_prob, tolerance = SMOOTH[name]

    def derivative(f: Tensor, order: int) -> Tensor:
        f = f.clone().requires_grad_()
        out = log_prob(y, f)
        for _ in range(order):
            (out,) = torch.autograd.grad(out.sum(), f, create_graph=True)
        return out.detach()

    duals = dual_parameters(make(), y, MEANS, VARS)
    assert gap(duals.alpha, ref.brute(lambda f: derivative(f, 1), MEANS, VARS)) < 10 * tolerance
    assert gap(duals.beta, -ref.brute(lambda f: derivative(f, 2), MEANS, VARS)) < 100 * tolerance


def test_a_kink_is_integrated_exactly():
    # |y − f| has a corner: α is a Φ-weighted sign, β = 2 N(y; m, v) / s.
    likelihood = LaplaceLikelihood().double()
    likelihood.noise = at(0.5)
    scale = 0.5**0.5
    duals = dual_parameters(likelihood, HEAVY, MEANS, VARS)
    z = (HEAVY - MEANS) / VARS.sqrt()
    alpha = (2 * torch.special.ndtr(z) - 1) / scale
    beta = 2 * (-0.5 * z.square()).exp() / (2 * math.pi * VARS).sqrt() / scale
    assert gap(duals.alpha, alpha) < 1e-12
    assert gap(duals.beta, beta) < 1e-12
    log_prob = ref.brute(lambda f: -(HEAVY - f).abs() / scale - math.log(2 * scale), MEANS, VARS)
    assert gap(duals.expected_log_prob, log_prob) < 1e-4  # of the brute sum, which sees the corner as jagged


def test_a_student_t_that_is_narrow_beside_q():
    likelihood = StudentTLikelihood().double()
    likelihood.noise, likelihood.deg_free = at(0.1), at(3.0)
    one = torch.ones(5, dtype=F64)
    exact = ref.brute(lambda f: likelihood(f).log_prob(HEAVY), MEANS, one)
    assert gap(expected_log_prob(likelihood, HEAVY, MEANS, one), exact) < 1e-3


@pytest.mark.parametrize("f", [-5.0, -40.0, -300.0])
def test_log_phi_is_accurate_far_in_the_tail(f):
    found = expected_log_prob(BernoulliLikelihood(), at(1.0), at(f), at(0.0))
    assert found.item() == pytest.approx(norm.logcdf(f), rel=1e-10)
    duals = dual_parameters(BernoulliLikelihood(), at(1.0, 0.0), at(f, -f), at(1e-8, 1e-8))
    hazard = math.exp(norm.logpdf(f) - norm.logcdf(f))  # d/df log Φ
    assert duals.alpha[0].item() == pytest.approx(hazard, rel=1e-6)
    assert gap(duals.alpha[0], -duals.alpha[1]) < 1e-9 * abs(f)
    assert duals.beta[0].item() == pytest.approx(hazard * (hazard + f), rel=1e-4)
    deep = expected_log_prob(likelihoods.LogitBernoulliLikelihood(), at(1.0), at(f), at(0.0))
    assert deep.item() == pytest.approx(f - math.log1p(math.exp(f)), rel=1e-9)
    # The rate softplus(f) of a Poisson likelihood is e^f there, and 0 in numbers where f is −1000.
    for g in (f, -1000.0):
        count = conditional_log_prob(PoissonLikelihood(), at(3.0), at(g)).item()
        assert count == pytest.approx(3 * g - math.log(6), abs=0.02)
        assert conditional_log_prob(likelihoods.LogitBernoulliLikelihood(), at(1.0), at(g)).item() < 0.99 * g


def test_the_expected_rate_of_counts_is_exact_under_a_wide_latent():
    wide = 10 * torch.ones(5, dtype=F64)  # quadrature of e^f would be off by far
    y = at(0, 1, 3, 2, 7)
    found = expected_log_prob(likelihoods.LogPoissonLikelihood(), y, MEANS, wide)
    assert gap(found, y * MEANS - (MEANS + 5).exp() - torch.lgamma(y + 1)) < 1e-11


def test_log_concave_likelihoods_have_positive_beta_and_heavy_tails_do_not():
    m = torch.linspace(-8, 8, 41, dtype=F64)
    v = torch.full_like(m, 0.3)
    for name in ("gaussian", "probit", "logit", "log poisson", "negative binomial"):
        make, y, *_ = SMOOTH[name]
        assert (dual_parameters(make(), y[1].expand(41), m, v).beta > -1e-9).all(), name
    assert (dual_parameters(student(), torch.zeros(41, dtype=F64), m, v).beta < 0).any()


@pytest.mark.parametrize("name", SMOOTH)
def test_no_variance_is_the_likelihood_itself(name):
    make, y, log_prob, _ = SMOOTH[name]
    assert gap(expected_log_prob(make(), y, MEANS, torch.zeros(5, dtype=F64)).detach(), log_prob(y, MEANS)) < 1e-6


# --- Gaussian closed forms ----------------------------------------------------------------------------


def test_gaussian_sites_do_not_depend_on_q():
    for m, v in ((MEANS, VARS), (0 * MEANS, 9 * VARS)):
        d = dual_parameters(gaussian(), HEAVY, m, v)
        assert gap(d.alpha + d.beta * m, HEAVY / 0.3) < 1e-12
        assert gap(d.beta, torch.full((5,), 1 / 0.3)) < 1e-6


def test_fixed_noise_adds_the_learned_noise_to_that_of_each_datum():
    likelihood = FixedNoiseGaussianLikelihood(VARS, learn_additional_noise=True).double()
    likelihood.second_noise = at(0.25)
    d = dual_parameters(likelihood, HEAVY, MEANS, VARS, noise=VARS)
    assert gap(d.beta, 1 / (VARS + 0.25)) < 1e-12
    expected = ref.brute(lambda f: torch.distributions.Normal(f, (VARS + 0.25).sqrt()).log_prob(HEAVY), MEANS, VARS)
    assert gap(d.expected_log_prob, expected) < 1e-10
    assert torch.equal(training_params(likelihood, 5)["noise"], likelihood.noise_covar.noise)
    with pytest.raises(errors.InputError, match="noise for 5 data, but 4 were given"):
        training_params(likelihood, 4)
    with pytest.raises(errors.InputError, match="pass noise="):
        gaussian_noise(likelihood)


def test_multitask_noise_is_the_sum_of_what_is_there():
    full = MultitaskGaussianLikelihood(num_tasks=2).double()
    full.noise, full.task_noises = at(0.1), at(0.2, 0.5)
    y, m, v = (torch.stack([t, 2 * t], -1) for t in (HEAVY, MEANS, VARS))
    found = dual_parameters(full, y, m, v)
    expected = ref.brute(lambda f: torch.distributions.Normal(f, at(0.3, 0.6).sqrt()).log_prob(y), m, v)
    assert gap(found.expected_log_prob, expected) < 1e-10
    assert gap(found.beta, (1 / at(0.3, 0.6)).expand(5, 2)) < 1e-12
    theirs = full.expected_log_prob(
        y,
        gpytorch.distributions.MultitaskMultivariateNormal.from_batch_mvn(
            gpytorch.distributions.MultivariateNormal(m.T, torch.diag_embed(v.T))
        ),
    )
    assert gap(found.expected_log_prob.sum(), theirs.sum().detach()) < 1e-9


@pytest.mark.parametrize(
    ("without", "name", "noise"),
    [("has_task_noise", "noise", at(0.4)), ("has_global_noise", "task_noises", at(0.2, 0.5, 0.1))],
)
def test_multitask_noise_of_one_kind(without, name, noise):
    likelihood = MultitaskGaussianLikelihood(num_tasks=3, **{without: False}).double()
    setattr(likelihood, name, noise)
    m = torch.stack([MEANS] * 3, -1)
    assert gap(dual_parameters(likelihood, 2 * m, m, m.square()).beta, 1 / noise.expand(5, 3)) < 1e-12


# --- softmax ------------------------------------------------------------------------------------------

SOFTMAX = [
    (at(0.3, -1.0), at(0.5, 2.0)),
    (at(4.0, -4.0), at(0.01, 6.0)),
    (at(0.3, -1.0, 0.8), at(0.5, 2.0, 1.0)),
    (at(0.0, 0.0, 0.0), at(0.0, 9.0, 15.0)),
]


@pytest.mark.parametrize(("mean", "var"), SOFTMAX)
def test_softmax_duals_are_those_of_a_dense_integral(mean, var):
    classes, points = len(mean), 401 if len(mean) == 2 else 91
    likelihood = SoftmaxLikelihood(num_classes=classes, mixing_weights=False)
    probs = ref.brute_joint(lambda f: f.softmax(-1), mean, var, points)
    curvature = ref.brute_joint(lambda f: f.softmax(-1) * (1 - f.softmax(-1)), mean, var, points)
    total = ref.brute_joint(lambda f: f.logsumexp(-1), mean, var, points)
    for y in range(classes):
        d = dual_parameters(likelihood, torch.tensor([y]), mean.unsqueeze(0), var.unsqueeze(0))
        assert gap(d.expected_log_prob[0], mean[y] - total) < 1e-6
        assert gap(d.alpha[0], torch.eye(classes, dtype=F64)[y] - probs) < 1e-6
        assert gap(d.beta[0], curvature) < 1e-5
        assert gap(d.alpha.sum(), 0.0) < 1e-7  # probabilities sum to one


def test_a_batch_of_softmax_marginals_is_each_alone():
    g = torch.Generator().manual_seed(0)
    m, v = torch.randn(2, 5, 3, generator=g, dtype=F64), torch.rand(2, 5, 3, generator=g, dtype=F64)
    y = torch.randint(3, (2, 5), generator=g)
    d = dual_parameters(softmax(), y, m, v)
    for b in range(2):
        for found, alone in zip(d, dual_parameters(softmax(), y[b], m[b], v[b]), strict=True):
            assert gap(found[b], alone) < 1e-9


# --- derivatives and parameters per datum --------------------------------------------------------------


def test_duals_are_differentiable_where_that_is_asked_for():
    m, v = MEANS.clone().requires_grad_(), VARS.clone().requires_grad_()
    y = at(0, 1, 1, 0, 0)

    def all_three(m: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return tuple(differentiable_dual_parameters(BernoulliLikelihood(), y, m, v))

    assert all(t.requires_grad for t in all_three(m, v))
    assert torch.autograd.gradcheck(all_three, (m, v))
    assert not any(t.requires_grad for t in dual_parameters(BernoulliLikelihood(), y, m, v))


class Exposed(_OneDimensionalLikelihood):
    """Counts at the rate e^f times an exposure of each datum."""

    def forward(self, f: Tensor, exposure: Tensor | None = None) -> torch.distributions.Poisson:
        return torch.distributions.Poisson(f.exp() * (1.0 if exposure is None else exposure))


def test_parameters_of_each_datum_reach_the_likelihood():
    y, exposure = at(0, 1, 3, 2, 7), at(0.5, 1, 2, 3, 4)
    with torch.inference_mode():  # values that no graph could hold
        exposure = exposure + 0
    d = dual_parameters(Exposed(), y, MEANS, VARS, exposure=exposure)
    rate = exposure * (MEANS + VARS / 2).exp()
    assert gap(d.alpha, y - rate) < 1e-9
    assert gap(d.beta, rate) < 1e-8
    found = expected_log_prob(Exposed(), y, MEANS, VARS, exposure=exposure)
    assert gap(found, d.expected_log_prob) < 1e-12
    fixed = FixedNoiseGaussianLikelihood(VARS).double()
    closed = -0.5 * (((HEAVY - MEANS).square() + VARS) / VARS + (2 * math.pi * VARS).log())
    assert gap(expected_log_prob(fixed, HEAVY, MEANS, VARS, noise=VARS), closed) < 1e-12


# --- what is refused ----------------------------------------------------------------------------------


class Sampled(gpytorch.likelihoods.Likelihood):
    def forward(self, f: Tensor) -> torch.distributions.Normal:
        return torch.distributions.Normal(f.sum(-1), 1.0)


class Own(Sampled):
    """Two latents of which the sum is seen: its own expectation needs no sampling."""

    def expected_log_prob(
        self, y: Tensor, q: gpytorch.distributions.MultivariateNormal, weight: float | Tensor = 1.0
    ) -> Tensor:
        mean, var = q.mean.sum(-1), q.variance.sum(-1)
        return -0.5 * weight * ((y.sum(-1) / 2 - mean).square() + var + math.log(2 * math.pi))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: SoftmaxLikelihood(num_features=2, num_classes=3), "mixing_weights=False"),
        (lambda: MultitaskGaussianLikelihood(num_tasks=2, rank=1), "rank=0"),
        (Sampled, "Sampled is not supported: it would need Monte Carlo"),
        (lambda: gpytorch.likelihoods.DirichletClassificationLikelihood(torch.tensor([0, 1, 1])), "SoftmaxLikelihood"),
        (gpytorch.likelihoods.GaussianLikelihoodWithMissingObs, "drop the rows"),
        (lambda: gpytorch.likelihoods.HadamardGaussianLikelihood(num_tasks=2), "task index"),
        (lambda: _GaussianLikelihoodBase(HeteroskedasticNoise(None)), "use FixedNoiseGaussianLikelihood"),
        (lambda: 3.0, "float is not supported: expected a gpytorch"),
    ],
)
@pytest.mark.filterwarnings("ignore:GaussianLikelihoodWithMissingObs:DeprecationWarning")
def test_likelihoods_that_need_sampling_are_refused_by_name(make, match):
    with pytest.raises(errors.UnsupportedError, match=match):
        check_likelihood(make())


def test_a_likelihood_with_an_expectation_of_its_own_is_used():
    likelihood = Own()
    check_likelihood(likelihood)
    y, m, v = (torch.stack([t, 2 * t], -1) for t in (HEAVY, MEANS, VARS))
    duals = dual_parameters(likelihood, y, m, v)
    residual = (y.sum(-1) / 2 - m.sum(-1)).unsqueeze(-1)
    assert gap(duals.alpha, residual.expand(5, 2)) < 1e-12
    assert gap(duals.beta, torch.ones(5, 2)) < 1e-12
    assert gap(dual_parameters(likelihood, y, m, v, weight=VARS).beta, VARS.unsqueeze(-1).expand(5, 2)) < 1e-12


@pytest.mark.parametrize("shape", [(5,), (2, 5)])
def test_the_expectation_that_a_likelihood_of_one_latent_has_is_given_the_moments_it_is_for(shape):
    class One(gpytorch.likelihoods.Likelihood):
        def forward(self, f: Tensor) -> torch.distributions.Normal:
            return torch.distributions.Normal(f, 1.0)

        def expected_log_prob(self, y: Tensor, q: gpytorch.distributions.MultivariateNormal, **_: Tensor) -> Tensor:
            assert q.event_shape == (torch.Size([5]) if len(shape) == 1 else torch.Size(shape))
            return -0.5 * ((y - q.mean).square() + q.variance)

    y, m, v = (t.expand(shape) for t in (HEAVY, MEANS, VARS))
    duals = dual_parameters(One(), y, m, v)
    assert gap(duals.alpha, y - m) < 1e-12
    assert gap(duals.beta, torch.ones(shape)) < 1e-12


@pytest.mark.parametrize(
    ("make", "y", "match"),
    [
        (softmax, [0.0, 2.0, 3.0, 4.0], r"SoftmaxLikelihood expects targets 0 … 2; 2 of 4 are not, the first being 3"),
        (softmax, [0.0, -1.0, 2.0], "1 of 3 are not, the first being -1"),
        (softmax, [0.5, 1.0], "1 of 2 are not, the first being 0.5"),
        (BernoulliLikelihood, [[0.0, 1.0], [2.0, -1.0]], "expects targets 0 or 1.*2 of 4 are not, the first being 2"),
        (PoissonLikelihood, [0.0, 3.0, 1.5], "in the support of Poisson: .*1 of 3 are not, the first being 1.5"),
        (beta, [0.5, 0.0], "in the support of Beta: .*1 of 2 are not, the first being 0"),  # its density there is 0
    ],
)
def test_targets_that_a_likelihood_cannot_produce(make, y, match):
    for dtype in (torch.float32, F64):
        with pytest.raises(errors.InputError, match=match):
            check_targets(make(), torch.tensor(y, dtype=dtype))
    check_targets(softmax(), torch.tensor([0, 1, 2]))
    check_targets(PoissonLikelihood(), torch.tensor([0, 3, 20]))


@pytest.mark.parametrize(
    ("y", "match"),
    [
        (torch.tensor([True, False]), "^y must hold real numbers or integer labels, got torch.bool; use y.long"),
        (at(1.0, math.nan, math.inf), "^y must be finite; 2 values are NaN or infinite"),
        ([1.0], "^y must be a torch.Tensor, got list"),
    ],
)
def test_targets_that_are_no_numbers(y, match):
    with unchecked(), pytest.raises(errors.InputError, match=match):
        check_targets(gaussian(), y)


@pytest.mark.parametrize(
    ("make", "y", "mean", "var", "match"),
    [
        (gaussian, HEAVY, [1.0], VARS, "^mean must be a torch.Tensor"),
        (gaussian, HEAVY, MEANS, 1.0, "^var must be a torch.Tensor"),
        (gaussian, HEAVY, MEANS, VARS[:4], r"^mean and var must have one shape, got \(5,\) and \(4,\)"),
        (gaussian, [1.0], MEANS, VARS, "^y must be a torch.Tensor"),
        (gaussian, HEAVY[:4], MEANS, VARS, r"^y must have shape \(5,\), as the marginals have, got \(4,\)"),
        (gaussian, HEAVY[:2], MEANS, VARS, r"got \(2,\)"),
        (gaussian, HEAVY.unsqueeze(-1), MEANS, VARS, r"must have shape \(5,\), .* got \(5, 1\)"),
        (softmax, torch.zeros(5), MEANS.expand(3, 5), VARS.expand(3, 5), r"must have shape \(3,\), .* got \(5,\)"),
        (softmax, torch.zeros(3, 5), MEANS.expand(3, 5), VARS.expand(3, 5), r"must have shape \(3,\), .* got \(3, 5\)"),
    ],
)
def test_marginals_and_targets_of_other_shapes(make, y, mean, var, match):
    for of in (dual_parameters, expected_log_prob):
        with unchecked(), pytest.raises(errors.InputError, match=match):
            of(make(), y, mean, var)


def test_targets_may_broadcast_to_the_marginals():
    several = expected_log_prob(gaussian(), HEAVY, MEANS.expand(2, 5), VARS.expand(2, 5))
    assert gap(several, expected_log_prob(gaussian(), HEAVY, MEANS, VARS).expand(2, 5)) == 0
    one = expected_log_prob(gaussian(), HEAVY[:1], MEANS, VARS)
    assert gap(one, expected_log_prob(gaussian(), HEAVY[:1].expand(5), MEANS, VARS)) == 0
    each = expected_log_prob(gaussian(), HEAVY.expand(2, 5), MEANS, VARS)
    assert gap(each, expected_log_prob(gaussian(), HEAVY, MEANS, VARS).expand(2, 5)) == 0


@pytest.mark.parametrize("name", SMOOTH)
def test_every_supported_likelihood_is_accepted_and_so_are_its_targets(name):
    make, y, *_ = SMOOTH[name]
    check_likelihood(make())
    check_targets(make(), y)
    assert num_outputs_of(make()) is None


def test_outputs_that_a_likelihood_fixes():
    softmax = SoftmaxLikelihood(num_classes=3, mixing_weights=False)
    check_likelihood(softmax)
    assert num_outputs_of(softmax) == 3
    assert num_outputs_of(MultitaskGaussianLikelihood(num_tasks=4)) == 4
    check_likelihood(MultitaskGaussianLikelihood(num_tasks=4))


def test_parameters_per_datum_are_those_that_a_likelihood_has():
    noise = FixedNoiseGaussianLikelihood(torch.ones(2))
    check_param_names(noise, ["noise"])
    for likelihood in (GaussianLikelihood(), StudentTLikelihood(), likelihoods.LogPoissonLikelihood()):
        check_param_names(likelihood, [])
        with pytest.raises(errors.InputError, match=f"{type(likelihood).__name__} takes no noise= per datum"):
            check_param_names(likelihood, ["noise"])
    with pytest.raises(errors.InputError, match="takes no scale="):
        check_param_names(noise, ["noise", "scale"])

    class Mine(GaussianLikelihood):
        """Whose parameters only its author knows."""

    check_param_names(Mine(), ["exposure"])


def test_what_holds_parameters_for_several_processes_or_data():
    assert has_batch_shape(FixedNoiseGaussianLikelihood(VARS))
    assert has_batch_shape(GaussianLikelihood(batch_shape=torch.Size([2])))
    assert not has_batch_shape(GaussianLikelihood())


def test_noise_must_be_positive():
    check_variances(VARS)
    with pytest.raises(errors.InputError, match="^noise= must be positive variances; the smallest is 0"):
        check_variances(at(1.0, 0.0))
