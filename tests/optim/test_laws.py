"""Laws of the rules: limits, stationary values, exact posteriors, and what two processes make of one batch."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import ranks
import torch
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from torch import nn
from toys import F64, at, gap

from dualgp import WeightLayout, WeightPosterior, WeightSite
from dualgp.optim import BSAM, IVON, VOGN, AffineBLR, MultiplicativeBLR

# noise is wide in toys, on purpose
pytestmark = pytest.mark.filterwarnings("ignore::dualgp.errors.NumericalWarning")

# Regression with known noise: mean-field posterior N((.970366, 1.026135), diag(.2, .0894427)²), evidence known.
REGRESSION_X = torch.stack([torch.ones(6, dtype=F64), torch.arange(-1.0, 5.0, dtype=F64)], -1)
REGRESSION_Y = at(0.1, 0.9, 2.2, 2.8, 4.1, 5.2)
LOGISTIC_X = at(1, 2, 2, 1, 1.5, 0.5, 0.5, 1, -0.5, 0.3, -1, -1.5, -2, -0.5, -0.3, -1, 0.4, -0.6, 0.2, 0.1).reshape(
    10, 2
)
LOGISTIC_Y = at(1, 1, 1, 1, 1, 0, 0, 0, 1, 0)


def vector(*start: float) -> nn.Parameter:
    return nn.Parameter(at(*start))


# --- limits -----------------------------------------------------------------------------------------


def test_precision_never_falls_by_more_than_half_and_never_overflows():
    g = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.zeros(10**6))
    optimizer = IVON([("w", p)], num_data=100, total_steps=10, max_std=math.inf)
    bucket = optimizer._buckets[0]
    optimizer.param_groups[0]["step"] = 1
    for size in (1.0, 1e3, 1e30):
        for rho in (1e-5, 0.1, 1.0):
            optimizer.param_groups[0]["beta2"] = 1.0 - rho
            h = torch.rand(10**6, generator=g) * 10.0 ** torch.randint(-6, 6, (10**6,), generator=g)
            bucket["hess"].copy_(h)
            bucket["nbar"].copy_(size * torch.randn(10**6, generator=g))
            bucket["gbar"].zero_()
            optimizer._update(bucket, [slice(0, 10**6)])
            d = optimizer.param_groups[0]["weight_decay"]
            assert bucket["hess"].isfinite().all()
            assert bool((bucket["hess"] + d >= (0.5 - 1e-5) * (h + d)).all())
    assert p.isfinite().all()


def test_without_noise_it_is_sgd_with_momentum():
    p = vector(0.5, -2.0)
    optimizer = IVON([("w", p)], lr=0.2, ess=1e30, weight_decay=0.1, hess_init=1.0, beta2=1.0)
    m, mom = at(0.5, -2.0), at(0.0, 0.0)
    for step in range(1, 21):
        with optimizer.sampled_params():
            (p - at(1.0, 3.0)).square().sum().backward()
        optimizer.step()
        mom = 0.9 * mom + 0.1 * 2 * (m - at(1.0, 3.0))
        m = m - 0.2 * 1.1 * (mom / (1 - 0.9**step) + 0.1 * m) / 1.1
        assert gap(p.detach(), m) < 1e-12


def test_infinitely_many_data_have_no_noise():
    p = vector(0.5)
    optimizer = IVON([("w", p)], lr=0.2, ess=math.inf, weight_decay=0.1, hess_init=1.0, beta2=0.9)
    with optimizer.sampled_params(train=False):
        assert p.item() == 0.5
    for _ in range(200):
        optimizer.step(lambda: _backward((p - 1.0).square().sum()))
    assert abs(p.item() - 2.0 / 2.1) < 1e-4


def _backward(loss: torch.Tensor) -> torch.Tensor:
    loss.backward()
    return loss


# --- stationary values ------------------------------------------------------------------------------


def chains(rule, steps: int, keep: int, start: float = 0.95, **settings):
    """Last steps of 1000 chains, each on ½a(θ − b)² of its own, a = 2, b = 1; small steps, which the laws are for."""
    p = nn.Parameter(torch.full((1000,), start, dtype=F64))
    optimizer = rule([("w", p)], **settings)
    history = []
    for step in range(steps):
        optimizer.step(lambda: _backward((p - 1.0).square().sum()))
        if step >= steps - keep:
            history.append([v.clone() for v in (p.detach(), *optimizer.state[p].values())])
    return [torch.stack(series) for series in zip(*history, strict=True)], optimizer


def test_ivon_finds_the_curvature():
    """E[h] − a = ½ρ Var(ĥ)(1 + ρ/(1 + β₂))/(a + d), and sd(h) = √(Var(ĥ) ρ/(1 + β₂)): 2.0196 and .203 at β₂ = .99."""
    (_, _, h), _ = chains(IVON, 1500, 1000, lr=0.01, ess=10, weight_decay=0.1, hess_init=2.0, beta2=0.99)
    assert abs(h.mean().item() - 2.019) < 0.003
    assert abs(h.std().item() - 0.206) < 0.005


@pytest.mark.slow
def test_bsam_finds_its_own_variance():
    """s = γ + d + a√(2/πN) and a little, not a + d."""
    (_, _, s), _ = chains(
        BSAM,
        1500,
        500,
        lr=0.002,
        num_data=10,
        prior_precision=1.0,
        sam_radius=0.05,
        damping=0.1,
        beta2=0.99,
        precision_init=0.7,
    )
    assert abs(s.mean().item() - 0.7079) < 0.002


@pytest.mark.slow
def test_the_affine_rule_finds_the_posterior():
    (_, A, *_), _ = chains(
        AffineBLR, 2500, 1000, lr=0.005, lr_scale=0.02, num_data=10, prior_precision=1.0, scale_init=0.22, beta2=0.9
    )
    assert abs(A.mean().item() - 0.2182) < 0.0005


@pytest.mark.slow
def test_the_multiplicative_rule_finds_its_fixed_point():
    """(g₊, g₋) solves E[g θ₊] = τ and E[−g θ₋] = τ, τ = .1."""
    (_, plus, minus, *_), _ = chains(
        MultiplicativeBLR, 2500, 1000, start=0.6, lr=0.003, num_data=10, prior_precision=1.0, offset=0.15
    )
    assert abs(plus.mean().item() - 0.745) < 0.002
    assert abs(minus.mean().item() - 0.148) < 0.002


def test_price_is_unbiased():
    """ĥ = λ(h + d)·mean of g(θ − m): 3 on ½·3(θ − .7)² with standard deviation 14.06 (one draw)."""
    p = nn.Parameter(torch.full((200_000,), 0.2, dtype=F64))
    optimizer = IVON([("w", p)], ess=50, weight_decay=0.1, hess_init=1.5, beta2=0.999)
    with optimizer.sampled_params():
        (1.5 * (p - 0.7).square()).sum().backward()
    estimates = 50 * 1.6 * optimizer._buckets[0]["nbar"]
    assert abs(estimates.mean().item() - 3.0) < 4 * 14.06 / 200_000**0.5
    assert abs(estimates.std().item() / 14.06 - 1.0) < 0.02


@pytest.mark.parametrize("batch", [1, 10, 100])
def test_gradsq_does_not_depend_on_the_batch(batch):
    """Gradients of unit variance per datum: h = 1 whatever the batch."""
    p = nn.Parameter(torch.zeros(1000, dtype=F64))
    optimizer = IVON(
        [("w", p)],
        lr=0.0,
        ess=1000,
        weight_decay=0.1,
        hess_init=1.0,
        beta2=0.98,
        hess_approx="gradsq",
        batch_size=batch,
    )
    total = 0.0
    for step in range(400):
        with optimizer.sampled_params():
            p.grad = torch.randn(1000, dtype=F64) / batch**0.5
        optimizer.step()
        total += optimizer.state[p]["hess"].mean().item() if step >= 200 else 0.0
    assert abs(total / 200 - 1.0) < 0.05


def test_half_precision_weights_keep_their_curvature():
    """5Σp² at ρ = 10⁻⁵: h goes from 1 to 1 + 9(1 − e^{−.02}) in 2000 steps; in bfloat16 it would stand still."""
    for dtype in (torch.bfloat16, torch.float32):
        p = nn.Parameter(torch.zeros(1000, dtype=dtype))
        optimizer = IVON([("w", p)], lr=0.01, ess=1e4, weight_decay=1e-4, hess_init=1.0, beta2=1.0 - 1e-5)
        for _ in range(2000):
            with optimizer.sampled_params():
                (5 * p.float().square()).sum().backward()
            optimizer.step()
        assert abs(optimizer.state[p]["hess"].mean().item() - 1.1777) < 0.002


def test_stochastic_rounding_is_right_on_average():
    p = nn.Parameter(torch.ones(100_000, dtype=torch.bfloat16))
    optimizer = IVON([("w", p)], num_data=10, total_steps=10, stochastic_rounding=True)
    optimizer._buckets[0]["mean"].fill_(1.001)  # between 1 and 1 + 2⁻⁷
    state = torch.get_rng_state()
    with torch.no_grad():
        optimizer._buckets[0].write("mean", [True])
    assert torch.equal(torch.get_rng_state(), state)  # the global stream is left alone
    assert set(p.unique().tolist()) == {1.0, 1.0 + 2.0**-7}
    assert abs(p.float().mean().item() - 1.001) < 5 * 0.004 / 100_000**0.5


# --- exact posteriors -------------------------------------------------------------------------------


def negative_elbo(q: WeightPosterior) -> float:
    """−E_q[log p(y|X, θ)] + KL for the regression, noise variance ¼."""
    residual = (REGRESSION_Y - REGRESSION_X @ q.mean).square() + REGRESSION_X.square() @ q.variance()
    return float(0.5 * (residual / 0.25 + math.log(2 * math.pi * 0.25)).sum() + q.kl())


def test_regression_reaches_the_mean_field_optimum():
    p = vector(0.0, 0.0)
    optimizer = IVON([("w", p)], lr=0.1, ess=6, weight_decay=1 / 6, hess_init=1.0, beta2=0.999)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8000)
    for _ in range(8000):
        optimizer.step(lambda: _backward((REGRESSION_Y - REGRESSION_X @ p).square().mean() / 0.5))
        schedule.step()
    q = optimizer.posterior()
    assert gap(q.mean, at(0.970366, 1.026135)) < 0.005
    assert gap(q.variance().sqrt() / at(0.2, 0.0894427), torch.ones(2, dtype=F64)) < 0.03
    assert -negative_elbo(q) >= -6.66  # the optimum is −6.652558


def logistic_loss(p: torch.Tensor, X: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return nn.functional.binary_cross_entropy_with_logits(X @ p, y)


def logistic_bound(q: WeightPosterior, X: torch.Tensor, y: torch.Tensor) -> float:
    """−ELBO by Gauss–Hermite quadrature, 64 nodes."""
    nodes, weights = (torch.as_tensor(v) for v in np.polynomial.hermite_e.hermegauss(64))
    f = (X @ q.mean).unsqueeze(-1) + (X.square() @ q.variance()).sqrt().unsqueeze(-1) * nodes
    nll = nn.functional.binary_cross_entropy_with_logits(f, y.unsqueeze(-1).expand(f.shape), reduction="none")
    return float((nll @ (weights / weights.sum())).sum() + q.kl())


@pytest.mark.slow
def test_logistic_regression_reaches_the_variational_optimum():
    p = vector(0.0, 0.0)
    optimizer = IVON([("w", p)], lr=0.05, ess=10, weight_decay=0.1, hess_init=0.5, beta2=0.999)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20_000)
    for _ in range(20_000):
        optimizer.step(lambda: _backward(logistic_loss(p, LOGISTIC_X, LOGISTIC_Y)))
        schedule.step()
    assert logistic_bound(optimizer.posterior(), LOGISTIC_X, LOGISTIC_Y) <= 4.9875  # optimum 4.985773


def cancer() -> tuple[torch.Tensor, torch.Tensor]:
    """400 training data of breast cancer, standardised, with a column of ones."""
    X, y = load_breast_cancer(return_X_y=True)
    X, _, y, _ = train_test_split(X, y, train_size=400, random_state=0, stratify=y)
    X = torch.as_tensor((X - X.mean(0)) / X.std(0))
    return torch.cat([X, torch.ones(400, 1, dtype=F64)], -1), torch.as_tensor(y).double()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::dualgp.errors.NumericalWarning")  # the noise is wide, as the posterior is
@pytest.mark.parametrize(("steps", "power_law", "bound"), [(20_000, False, 50.45), (4000, True, 50.47)])
def test_breast_cancer_reaches_the_variational_optimum(steps, power_law, bound):
    """The optimum is 50.411726. On a convex loss a memory of (t + 20)^−0.8 needs a fifth of the steps."""
    X, y = cancer()
    p = nn.Parameter(torch.zeros(31, dtype=F64))
    optimizer = IVON([("w", p)], lr=0.1, ess=400, weight_decay=1 / 400, hess_init=0.1, beta2=0.999)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for t in range(steps):
        if power_law:
            optimizer.param_groups[0]["beta2"] = 1.0 - (t + 20) ** -0.8
        optimizer.step(lambda: _backward(logistic_loss(p, X, y)))
        schedule.step()
    assert logistic_bound(optimizer.posterior(), X, y) <= bound


@pytest.mark.slow
def test_vogn_finds_the_gauss_newton_posterior_of_its_own():
    """Squared residuals stand for the noise variance: standard deviations (.2605, .0998), not (.2, .0894)."""
    net = nn.Linear(2, 1, bias=False).double()
    optimizer = VOGN(
        net, lambda f, y: (f - y).square().sum() / 0.5, lr=0.01, num_data=6, prior_precision=1.0, beta2=0.998,
        init_std=0.3,
    )  # fmt: skip
    for step in range(8000):
        if step == 4000:
            optimizer.param_groups[0].update(lr=0.001, beta2=0.9995)
        optimizer.step(REGRESSION_X, REGRESSION_Y.unsqueeze(-1))
    assert gap(optimizer.posterior().variance().sqrt(), at(0.2605, 0.0998)) < 0.01


# --- sites ------------------------------------------------------------------------------------------


def exact_site(X: torch.Tensor, y: torch.Tensor) -> WeightSite:
    """The diagonal site of regression data at the mean-field optimum, λ = BmΔ with the mean of the data alone."""
    B = X.square().sum(0) / 0.25
    full = torch.linalg.solve(X.T @ X / 0.25 + torch.eye(2, dtype=F64), X.T @ y / 0.25)
    return WeightSite((B + 1.0) * full, B)


def test_sites_of_two_halves_merge_as_worked_by_hand():
    layout = WeightLayout({"w": torch.Size([2])})
    halves = [exact_site(REGRESSION_X[rows], REGRESSION_Y[rows]) for rows in (slice(0, 3), slice(3, 6))]
    q = WeightPosterior(layout, halves[0] + halves[1], prior_precision=1.0)
    assert gap(q.mean, at(0.72, 1.1904)) < 1e-6
    assert gap(q.precision, at(25.0, 125.0)) < 1e-12


def half(rows: slice, prior: WeightPosterior | None, steps: int = 6000) -> WeightPosterior:
    p = vector(0.0, 0.0)
    X, y = REGRESSION_X[rows], REGRESSION_Y[rows]
    settings = {"weight_decay": 1 / 3} if prior is None else {"prior": prior}
    optimizer = IVON([("w", p)], lr=0.1, ess=3, hess_init=1.0, beta2=0.998, **settings)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.step(lambda: _backward((y - X @ p).square().mean() / 0.5))
        schedule.step()
    return optimizer.posterior()


@pytest.mark.slow
def test_a_posterior_is_the_prior_of_the_next_run():
    """A then B ends at the diagonal posterior of both: (.970366, 1.026135), worked by hand."""
    q = half(slice(3, 6), half(slice(0, 3), None).as_prior())
    assert gap(q.mean, at(0.970366, 1.026135)) < 0.02
    assert gap(q.precision / at(25.0, 125.0), torch.ones(2, dtype=F64)) < 0.08


def test_the_read_out_is_prior_plus_site():
    p = vector(0.3, -0.2)
    q0 = WeightPosterior(WeightLayout({"w": torch.Size([2])}), prior_mean=at(0.1, 0.2), prior_precision=at(2.0, 3.0))
    optimizer = IVON([("w", p)], lr=0.1, ess=6, hess_init=1.0, beta2=0.99, prior=q0)
    for _ in range(5):
        optimizer.step(lambda: _backward((REGRESSION_Y - REGRESSION_X @ p).square().mean() / 0.5))
    q, h = optimizer.posterior(), optimizer.state[p]["hess"]
    assert gap(q.mean, p.detach()) < 1e-12
    assert gap(q.precision, at(2.0, 3.0) + 6 * h) < 1e-12
    assert gap(q.remove(q.site).mean, at(0.1, 0.2)) < 1e-12
    with optimizer.sampled_params(train=False):
        assert p.detach().ne(q.mean).all()


# --- several processes ------------------------------------------------------------------------------


@pytest.fixture
def pair() -> Iterator[ranks.Pair]:
    both = ranks.Pair()
    yield both
    both.close()


def test_two_processes_share_statistics_and_not_noise(pair):
    answers = pair(ranks.train_ivon)
    (h0, m0, draw0), (h1, m1, draw1) = answers
    assert torch.equal(h0, h1)
    assert torch.equal(m0, m1)
    assert not torch.equal(draw0, draw1)
    # one process with both draws of each step, and both halves of the batch
    p = vector(0.0, 0.0)
    optimizer = IVON([("w", p)], lr=0.1, ess=6, weight_decay=1 / 6, hess_init=1.0, beta2=0.99)
    generators = [torch.Generator().manual_seed(s) for s in (0, 1_000_003)]
    for _ in range(5):
        for rank, generator in enumerate(generators):
            optimizer._given = generator
            rows = slice(3 * rank, 3 * rank + 3)
            with optimizer.sampled_params():
                ((REGRESSION_Y - REGRESSION_X @ p)[rows].square().mean() / 0.5).backward()
        optimizer.step()
    assert gap(p.detach(), m0) < 1e-12
    assert gap(optimizer.state[p]["hess"], h0) < 1e-12
