"""What a datum would tell, against sums and integrals on fine grids."""

import pytest
import torch
from families import FAMILIES
from gpytorch.likelihoods import (
    BernoulliLikelihood,
    FixedNoiseGaussianLikelihood,
    PoissonLikelihood,
    SoftmaxLikelihood,
    StudentTLikelihood,
)
from gpytorch.likelihoods.likelihood import _OneDimensionalLikelihood
from reference import brute, brute_joint, numerical
from toys import F64, Exposed, at, gap, gaussian

from dualgp import errors
from dualgp.information import expected_beta, mutual_information, predictive_entropy
from dualgp.likelihoods import LogitBernoulliLikelihood, LogPoissonLikelihood
from dualgp.quadrature import softmax_entropies

# From certain to hardly known; probit sees a bump of width 1 under q of width 30.
M, V = at(0.3, -2.0, 1.0, 4.0, 0.0), at(0.2, 3.0, 50.0, 900.0, 0.0)
BINARY = {"probit": (BernoulliLikelihood, torch.special.ndtr), "logit": (LogitBernoulliLikelihood, torch.sigmoid)}


def entropy(p: torch.Tensor) -> torch.Tensor:
    return torch.special.entr(p) + torch.special.entr(1 - p)


@pytest.mark.parametrize("name", BINARY)
def test_a_label(name):
    kind, link = BINARY[name]
    total = entropy(brute(link, M, V, 40001))
    assert gap(predictive_entropy(kind(), M, V), total) < 1e-9
    assert gap(mutual_information(kind(), M, V), total - brute(lambda f: entropy(link(f)), M, V, 40001)) < 1e-9

    def information(f: torch.Tensor) -> torch.Tensor:
        slope = (-0.5 * f.square()).exp() / (2 * torch.pi) ** 0.5 if name == "probit" else link(f) * link(-f)
        # beyond, p(1 − p) is rounded away and nothing is told
        return torch.where(
            f.abs() < (7 if name == "probit" else 30), slope.square() / (link(f) * link(-f)).clamp_min(1e-30), 0.0
        )

    assert gap(expected_beta(kind(), M, V), brute(information, M, V, 40001)) < 1e-9


def test_a_label_far_away_tells_nothing():
    found = mutual_information(BernoulliLikelihood(), at(-60.0, 60.0), at(1.0, 1.0))
    assert gap(found, 0.0) < 1e-12
    assert gap(expected_beta(BernoulliLikelihood(), at(-60.0, 60.0), at(1.0, 1.0)), 0.0) < 1e-12


def test_a_value():
    v = at(0.5, 2.0)
    noise = at(0.1, 0.4)
    assert gap(mutual_information(gaussian(0.2), M[:2], v), 0.5 * (1 + v / 0.2).log()) < 1e-12
    fixed = FixedNoiseGaussianLikelihood(noise)
    assert gap(mutual_information(fixed, M[:2], v, noise=noise), 0.5 * (1 + v / noise).log()) < 1e-12
    assert gap(expected_beta(fixed, M[:2], v, noise=noise), 1 / noise) < 1e-12
    normal = torch.distributions.Normal(M[:2], (v + 0.2).sqrt())
    assert gap(predictive_entropy(gaussian(0.2), M[:2], v), normal.entropy()) < 1e-12


def test_a_class_whose_latents_are_wide():
    """Beyond variance 1000 the class is the argmax, whose entropy is that of a sign for two; datum by datum."""
    mean, var = at(0.0, 500.0, 0.0, -1.0).reshape(2, 2), at(1e6, 1e6, 0.3, 0.5).reshape(2, 2)
    found = softmax_entropies(mean, var)
    p = torch.special.ndtr(at(-500.0) / 2e6**0.5)
    assert gap(found.of_mean[0], torch.special.entr(p) + torch.special.entr(1 - p)) < 1e-4
    assert found.mean_of[0] < 0.05
    wider = softmax_entropies(1e4 * mean[:1], 1e8 * var[:1])  # by the rule itself a line of 10⁸ points
    assert gap(wider.of_mean, found.of_mean[:1]) < 1e-6
    alone = softmax_entropies(mean[1:], var[1:])
    assert gap(found.of_mean[1:], alone.of_mean) < 1e-7
    assert gap(found.mean_of[1:], alone.mean_of) < 1e-7


def test_a_class():
    likelihood = SoftmaxLikelihood(num_classes=3, mixing_weights=False)
    mean = 2 * torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    var = torch.rand(3, 3, generator=torch.Generator().manual_seed(1), dtype=F64) * at(0.1, 1.0, 3.0)
    for i in range(3):
        p = brute_joint(lambda f: f.softmax(-1), mean[i], var[i], 81)
        h = brute_joint(lambda f: torch.special.entr(f.softmax(-1)).sum(-1), mean[i], var[i], 81)
        b = brute_joint(lambda f: f.softmax(-1) * (1 - f.softmax(-1)), mean[i], var[i], 81)
        total = torch.special.entr(p).sum()
        assert gap(predictive_entropy(likelihood, mean[i], var[i]), total) < 1e-6
        assert gap(mutual_information(likelihood, mean[i], var[i]), total - h) < 1e-6
        assert gap(expected_beta(likelihood, mean[i], var[i]), b) < 1e-6


class Binomial(_OneDimensionalLikelihood):
    def forward(self, f, *args, **kwargs):
        return torch.distributions.Binomial(20, logits=f)


@pytest.mark.parametrize("kind", [PoissonLikelihood, LogPoissonLikelihood, Binomial])
@pytest.mark.parametrize("v", [0.01, 0.1, 1.0])
def test_a_count(kind, v):
    """Against sums over all counts. The formula is exact for v → 0 and v → ∞; 3 % is the worst between."""
    for m in (-2.0, 0.0, 2.0):
        t = torch.linspace(-7, 7, 1001, dtype=F64)
        w = (-0.5 * t.square()).exp()
        w = w / w.sum()
        y_given = kind().forward(m + v**0.5 * t)
        top = 20 if kind is Binomial else int((y_given.mean + 12 * y_given.stddev).max()) + 30
        conditional, total = torch.zeros_like(t), 0.0
        for y in torch.arange(top + 1, dtype=F64).split(300):
            log_p = y_given.log_prob(y.unsqueeze(-1))
            total += float(torch.special.entr(log_p.exp() @ w).sum())
            conditional -= (log_p.exp() * log_p).nan_to_num(0.0).sum(0)
        want = total - float(conditional @ w)
        assert abs(float(mutual_information(kind(), at(m), at(v))) / want - 1) < 0.03
        if kind is LogPoissonLikelihood:  # E_q[e^f]
            assert gap(expected_beta(kind(), at(m), at(v)), at(m + v / 2).exp()) < 1e-9


def test_student_t_is_a_lower_bound_of_its_fisher_information():
    likelihood = StudentTLikelihood().double()
    nu, scale = likelihood.deg_free.item(), likelihood.noise.item()
    found = float(expected_beta(likelihood, at(0.3), at(1.0)))
    assert abs(found - (nu - 2) / nu / scale) < 1e-9
    assert found < (nu + 1) / (nu + 3) / scale


@pytest.mark.parametrize("kind", [BernoulliLikelihood, LogitBernoulliLikelihood, LogPoissonLikelihood, gaussian])
@pytest.mark.parametrize("of", [mutual_information, expected_beta])
def test_gradients(kind, of):
    mean, var = at(0.3, -1.0), at(0.4, 2.0)
    m, v = mean.clone().requires_grad_(), var.clone().requires_grad_()
    value = of(kind(), m, v)
    if not value.requires_grad:  # 1/σ²
        return
    found = torch.autograd.grad(value.sum(), (m, v), allow_unused=True)
    assert gap(found[1], numerical(lambda v: of(kind(), mean, v).detach(), var)) < 1e-7
    if found[0] is not None:
        assert gap(found[0], numerical(lambda m: of(kind(), m, var).detach(), mean)) < 1e-7


@pytest.mark.parametrize("name", ["poisson", "student-t", "beta"])
def test_an_entropy_that_is_not_known(name):
    with pytest.raises(errors.UnsupportedError, match="BALD"):
        predictive_entropy(FAMILIES[name]().gp.likelihood, at(0.0), at(1.0))


class Sharper(LogitBernoulliLikelihood):
    """Labels whose logit is a multiple of f, of each datum its own."""

    def forward(self, function_samples, *args, slope=1.0, **kwargs):
        return torch.distributions.Bernoulli(logits=slope * function_samples)


def test_numbers_of_each_datum_go_into_what_it_would_tell():
    mean, var, number = at(-0.3, 0.4), at(0.5, 0.2), at(0.5, 3.0)
    rate = number * (mean + 0.5 * var).exp()
    assert gap(expected_beta(Exposed(), mean, var, exposure=number), rate) < 1e-9
    known = brute(lambda f: (var * number * f.exp()).log1p() / 2, mean, var)
    assert gap(mutual_information(Exposed(), mean, var, exposure=number), known) < 1e-6
    # A logit of slope · f at f ~ N(m, v) is one of f at N(slope · m, slope² · v).
    wide = number * mean, number.square() * var
    likelihood, plain = Sharper(), LogitBernoulliLikelihood()
    for of in (predictive_entropy, mutual_information):
        assert gap(of(likelihood, mean, var, slope=number), of(plain, *wide)) < 1e-6
    beta = expected_beta(likelihood, mean, var, slope=number)
    assert gap(beta, number.square() * expected_beta(plain, *wide)) < 1e-6


def test_the_noise_of_each_datum_goes_into_its_entropy():
    likelihood, noise = FixedNoiseGaussianLikelihood(torch.ones(2)).double(), at(0.5, 2.0)
    found = predictive_entropy(likelihood, at(0.0, 1.0), at(1.0, 3.0), noise=noise)
    assert gap(found, torch.distributions.Normal(at(0.0, 1.0), (at(1.0, 3.0) + noise).sqrt()).entropy()) < 1e-12
