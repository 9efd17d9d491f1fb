"""Sites at a point, against autograd of log densities written here, and against their own limit."""

import gpytorch
import pytest
import torch
from families import CountLikelihood
from gpytorch.likelihoods import (
    BernoulliLikelihood,
    BetaLikelihood,
    FixedNoiseGaussianLikelihood,
    LaplaceLikelihood,
    MultitaskGaussianLikelihood,
    PoissonLikelihood,
    SoftmaxLikelihood,
    StudentTLikelihood,
)
from torch import Tensor
from toys import F64, at, gap, gaussian

from dualgp import Sites, dual_parameters, errors, laplace_sites
from dualgp.likelihoods import LogitBernoulliLikelihood, LogPoissonLikelihood

N = 12
F = 2 * torch.randn(N, generator=torch.Generator().manual_seed(0), dtype=F64)
F3 = 2 * torch.randn(N, 3, generator=torch.Generator().manual_seed(1), dtype=F64)
BINARY, COUNTS, CLASSES = (torch.arange(N) % 2).double(), (torch.arange(N) % 5).double(), torch.arange(N) % 3
SOFTMAX = SoftmaxLikelihood(num_classes=3, mixing_weights=False)
NOISE = 0.1 + torch.rand(N, generator=torch.Generator().manual_seed(2), dtype=F64)


def multitask() -> MultitaskGaussianLikelihood:
    likelihood = MultitaskGaussianLikelihood(num_tasks=3).double()
    likelihood.task_noises, likelihood.noise = at(0.1, 0.2, 0.3), at(0.05)
    return likelihood


def log_normal(y: Tensor, f: Tensor, noise: Tensor | float) -> Tensor:
    return -0.5 * (y - f).square() / noise


def log_probit(y: Tensor, f: Tensor) -> Tensor:
    return torch.special.log_ndtr((2 * y - 1) * f)


def log_counts(y: Tensor, f: Tensor) -> Tensor:
    r = CountLikelihood().log_count.exp().double().detach()
    return y * -torch.nn.functional.softplus(-f) - r * torch.nn.functional.softplus(f)


# likelihood, y, f, log p(y|f) up to a constant, parameters
CASES = {
    "gaussian": (gaussian(0.3), COUNTS, F, lambda y, f: log_normal(y, f, 0.3), {}),
    "fixed noise": (
        FixedNoiseGaussianLikelihood(torch.ones(3)),
        COUNTS,
        F,
        lambda y, f: log_normal(y, f, NOISE),
        {"noise": NOISE},
    ),
    "multitask": (multitask(), F3 + 0.5, F3, lambda y, f: log_normal(y, f, at(0.15, 0.25, 0.35)), {}),
    "probit": (BernoulliLikelihood(), BINARY, F, log_probit, {}),
    "logit": (
        LogitBernoulliLikelihood(),
        BINARY,
        F,
        lambda y, f: -torch.nn.functional.binary_cross_entropy_with_logits(f, y, reduction="none"),
        {},
    ),
    "softmax": (SOFTMAX, CLASSES, F3, lambda y, f: f.log_softmax(-1).gather(-1, y[:, None])[:, 0], {}),
    "log poisson": (LogPoissonLikelihood(), COUNTS, F, lambda y, f: y * f - f.exp(), {}),
    "poisson": (
        PoissonLikelihood(),
        COUNTS,
        F,
        lambda y, f: y * torch.nn.functional.softplus(f).log() - torch.nn.functional.softplus(f),
        {},
    ),
    "counts": (CountLikelihood(), COUNTS, F, log_counts, {}),
}


def autograd(log_p, y: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
    """α [N(, C)] and the block β [N, C, C] (C = 1 for one output), datum by datum."""
    alpha = torch.func.grad(lambda f: log_p(y, f).sum())(f)
    hessian = torch.func.hessian(lambda f: log_p(y, f).sum())(f)
    if f.ndim == 1:
        return alpha, -hessian.diagonal()
    return alpha, -torch.einsum("ncnd->ncd", hessian)


@pytest.mark.parametrize("name", CASES)
def test_sites_are_the_second_order_expansion_of_the_log_density(name):
    likelihood, y, f, log_p, params = CASES[name]
    sites = laplace_sites(likelihood, y, f, **params)
    alpha, beta = autograd(log_p, y, f)
    found = torch.diag_embed(sites.beta) if f.ndim == 2 and not sites.coupled else sites.beta
    assert gap(sites.alpha(f), alpha) < 1e-10
    assert gap(found, beta) < 1e-10
    assert sites.coupled == (name == "softmax")
    assert sites.multi_output == (f.ndim == 2)


@pytest.mark.parametrize("scale", [1.0, 30.0, 1000.0])
def test_the_root_of_a_softmax_block_is_exact(scale):
    sites = laplace_sites(SOFTMAX, CLASSES, scale * F3)
    assert gap(sites.root @ sites.root.mT, sites.beta) < 1e-14
    assert gap(sites.beta.sum(-1), torch.zeros(N, 3)) < 1e-15  # a shift of all logits says nothing


def test_probit_sites_are_exact_in_both_tails():
    f = at(-1e6, -1e3, -40.0, 0.0, 8.0, 40.0)
    sites = laplace_sites(BernoulliLikelihood(), torch.ones(6), f)
    # φ(z)/Φ(z) = t + 1/t − 2/t³ + …, t = −z
    t = -f[:3]
    assert gap(sites.alpha(f)[:3] / (t + 1 / t - 2 / t**3 + 10 / t**5), torch.ones(3)) < 1e-8
    assert gap(sites.beta[:3], 1 - 1 / t**2 + 6 / t**4) < 1e-5
    assert gap(sites.beta[3], 2 / torch.pi) < 1e-15
    assert (sites.beta >= 0).all()
    assert sites.beta[5] == 0


def test_dual_parameters_of_a_narrow_q_tend_to_the_sites():
    for name in ("probit", "logit", "log poisson", "counts"):
        likelihood, y, f, *_ = CASES[name]
        sites, duals = laplace_sites(likelihood, y, f), dual_parameters(likelihood, y, f, torch.full_like(f, 1e-8))
        assert gap(sites.alpha(f), duals.alpha) < 1e-5
        assert gap(sites.beta, duals.beta) < 1e-5


SURROGATES = {
    "student-t": (StudentTLikelihood(), F + 1.0),
    "laplace": (LaplaceLikelihood(), F + 1.0),
    "beta": (BetaLikelihood(), torch.linspace(0.02, 0.98, N, dtype=F64)),
}


@pytest.mark.parametrize("name", SURROGATES)
def test_likelihoods_that_are_not_log_concave_have_their_fisher_information(name):
    likelihood, y = SURROGATES[name]
    likelihood.double()
    sites = laplace_sites(likelihood, y, F)

    def log_p(y: Tensor, f: Tensor) -> Tensor:
        return likelihood(f).log_prob(y)

    assert gap(sites.alpha(F), torch.func.grad(lambda f: log_p(y, f).sum())(F)) < 1e-10
    # E[score²] by the midpoint rule on quantiles would need a quantile function; on a grid of y it does not.
    if name == "beta":
        grid = (torch.arange(20_000, dtype=F64) + 0.5) / 20_000
    else:
        u = (torch.arange(200_000, dtype=F64) + 0.5) / 200_000
        grid = torch.tan(torch.pi * (u - 0.5))
    for i in (0, 5, 9):
        f = F[i].expand(len(grid)).clone()
        at_y = grid if name == "beta" else grid + F[i]
        score = torch.func.grad(lambda f, at_y=at_y: log_p(at_y, f).sum())(f)
        density = log_p(at_y, f).exp() * (1.0 if name == "beta" else torch.pi * (1 + grid.square()))
        assert gap(sites.beta[i], (density * score.square()).mean()) < 1e-4


class Bimodal(gpytorch.likelihoods.likelihood._OneDimensionalLikelihood):
    """Not log-concave, and unknown to the library."""

    def forward(self, f: Tensor) -> torch.distributions.Cauchy:
        return torch.distributions.Cauchy(f, torch.ones_like(f))


def test_a_negative_curvature_that_nobody_knows_counts_as_none():
    y = F + torch.linspace(-3, 3, N, dtype=F64)
    sites = laplace_sites(Bimodal(), y, F)
    gap_ = y - F
    curvature = 2 * (1 - gap_.square()) / (1 + gap_.square()).square()
    assert gap(sites.beta, curvature.clamp_min(0)) < 1e-12
    assert gap(sites.alpha(F), 2 * gap_ / (1 + gap_.square())) < 1e-12


def test_one_output_may_have_a_dimension_of_its_own():
    for name in ("probit", "fixed noise", "gaussian"):
        likelihood, y, f, _, params = CASES[name]
        flat, wide = laplace_sites(likelihood, y, f, **params), laplace_sites(likelihood, y, f[:, None], **params)
        assert wide.multi_output
        assert torch.equal(wide.lam[:, 0], flat.lam)
        assert torch.equal(wide.beta[:, 0], flat.beta)


def test_several_labels_of_one_kind_are_independent_outputs():
    y = torch.stack([BINARY, 1 - BINARY], -1)
    sites = laplace_sites(LogitBernoulliLikelihood(), y, F3[:, :2])
    for c in range(2):
        alone = laplace_sites(LogitBernoulliLikelihood(), y[:, c], F3[:, c])
        assert torch.equal(sites.lam[:, c], alone.lam)


def test_float32_values_are_expanded_in_float64_and_nothing_is_tracked():
    f = F3.float().requires_grad_()
    sites = laplace_sites(SOFTMAX, CLASSES, f)
    assert sites.lam.dtype == sites.beta.dtype == F64
    assert not sites.lam.requires_grad
    assert isinstance(laplace_sites(PoissonLikelihood(), COUNTS, F.float()), Sites)


def test_what_cannot_be_expanded_is_refused():
    with pytest.raises(errors.InputError, match=r"\[N, 3\]"):
        laplace_sites(SOFTMAX, CLASSES, F3[:, :2])
    with pytest.raises(errors.InputError, match="to match"):
        laplace_sites(SOFTMAX, CLASSES[:4], F3)
    with pytest.raises(errors.InputError, match="to match"):
        laplace_sites(gaussian(), F, F3)
    with pytest.raises(errors.InputError, match="0 … 2"):
        laplace_sites(SOFTMAX, CLASSES + 1, F3)
    with pytest.raises(errors.InputError, match="0 or 1"):
        laplace_sites(BernoulliLikelihood(), 2 * BINARY - 1, F)
    with pytest.raises(errors.InputError, match="finite"):
        laplace_sites(BernoulliLikelihood(), BINARY, F * float("inf"))
    with pytest.raises(errors.UnsupportedError, match="mixing"):
        laplace_sites(SoftmaxLikelihood(num_features=3, num_classes=3), CLASSES, F3)
    with pytest.raises(errors.InputError, match="pass noise="):
        laplace_sites(FixedNoiseGaussianLikelihood(torch.ones(3)), F, F)


class Joint(gpytorch.likelihoods.Likelihood):
    def expected_log_prob(self, y, q):
        return q.mean

    def forward(self, f):
        return torch.distributions.Normal(f, 1.0)


def test_a_likelihood_without_a_pointwise_conditional_is_refused():
    with pytest.raises(errors.UnsupportedError, match="no conditional"):
        laplace_sites(Joint(), F, F)
