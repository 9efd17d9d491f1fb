"""Gaussian pre-activations: the law that defines φ_θ, by quadrature and by sampling; its derivative; its limits."""

import math

import pytest
import torch
from torch import nn
from toys import F64, at, gap

from dualgp import errors
from dualgp.nets.preactivations import (
    GaussianPreactivation,
    ks_normal,
    network_ks,
    preactivation_ks,
    symmetric_weibull_,
)

THETAS = (2.05, 2.5, 3.0, 4.0, 5.0, 7.0, 10.0)
PUBLISHED = {  # φ(.5), φ(1), φ(2), φ(3), odd
    2.05: (0.7854, 1.2362, 1.4650, 1.5091),
    2.5: (0.7002, 1.2079, 1.7333, 1.9916),
    3.0: (0.6509, 1.1821, 1.8760, 2.3043),
    4.0: (0.6008, 1.1425, 1.9994, 2.6399),
    5.0: (0.5754, 1.1159, 2.0447, 2.8038),
    7.0: (0.5499, 1.0836, 2.0695, 2.9468),
    10.0: (0.5330, 1.0586, 2.0687, 3.0155),
}


def normal_grid() -> tuple[torch.Tensor, torch.Tensor]:
    """Nodes and weights of the trapezoidal rule for N(0, 1): of full accuracy for what is smooth."""
    x = torch.linspace(-8.5, 8.5, 6001, dtype=F64)
    return x, (-0.5 * x.square()).exp() / math.sqrt(2 * math.pi) * (x[1] - x[0])


@pytest.mark.parametrize("kind", ["odd", "positive"])
@pytest.mark.parametrize("theta", THETAS)
def test_the_product_with_a_weibull_weight_is_standard_normal(theta, kind):
    """P(W φ(X) ≤ z) = ½ + ½ E(1 − exp(−|z/φ(X)|^θ)), z > 0, is Φ(z)."""
    x, w = normal_grid()
    y = GaussianPreactivation(theta, kind)(x).abs()
    assert gap((w * y.square()).sum() * math.gamma(1 + 2 / theta), 1.0) < 1e-8
    assert gap((w * y.pow(4)).sum() * math.gamma(1 + 4 / theta), 3.0) < 1e-7
    z = torch.linspace(0.05, 5, 40, dtype=F64).unsqueeze(-1)
    cdf = 1 - 0.5 * ((-(z / y.clamp_min(1e-300)).pow(theta)).exp() * w).sum(-1)
    # The integrand is steep near φ = 0 for small z, where the rule errs by 1e-7.
    assert gap(cdf, torch.special.ndtr(z.squeeze(-1))) < 2e-7


@pytest.mark.parametrize("theta", THETAS)
def test_values_are_the_published_ones(theta):
    """They come of a coarser table (second moment off by 2e-5), whose error is in the tail."""
    found = GaussianPreactivation(theta)(at(0.5, 1.0, 2.0, 3.0))
    assert gap(found[:2], at(*PUBLISHED[theta][:2])) < 1e-4
    assert gap(found[2:], at(*PUBLISHED[theta][2:])) < 2.1e-3


def test_limits_are_box_muller_and_the_identity():
    x = torch.linspace(-3, 3, 25, dtype=F64)
    assert gap(GaussianPreactivation(2.03)(x), math.sqrt(2) * (math.pi * (torch.special.ndtr(x) - 0.5)).sin()) < 0.06
    assert gap(GaussianPreactivation(50.0)(x), x) < 0.03
    assert gap(GaussianPreactivation(4.0)(at(1e-6)) / 1e-6, math.gamma(0.75)) < 1e-9  # φ′(0) = Γ(1 − 1/θ)


@pytest.mark.parametrize("kind", ["odd", "positive"])
@pytest.mark.parametrize("theta", [2.05, 4.0])
def test_the_derivative_is_exact_everywhere(theta, kind):
    phi = GaussianPreactivation(theta, kind)
    x = torch.cat([torch.linspace(-10, 10, 41, dtype=F64) + 0.0123, at(1e-3, 0.0)]).requires_grad_()
    # At 0 the odd one's derivative is continuous; gradcheck compares with differences of the same function.
    assert torch.autograd.gradcheck(phi, x, eps=1e-6, atol=1e-6)
    slope = torch.autograd.grad(phi(x).sum(), x)[0]
    assert (slope >= 0).all()
    assert phi(x).isfinite().all()
    if kind == "odd":
        assert gap(phi(-x), -phi(x)) == 0
    else:
        assert (phi(x) >= 0).all()


def test_a_network_trains_with_it_in_its_own_dtype():
    net = nn.Sequential(nn.Linear(3, 8), GaussianPreactivation(3.0), nn.Linear(8, 1))
    x = torch.randn(20, 3)
    before = net(x)
    assert before.dtype == torch.float32
    before.square().mean().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())
    assert "theta=3.0" in repr(net)
    assert not [name for name in net.state_dict() if "table" in name]
    double = net.double()
    assert gap(double(x.double()), before) < 1e-6
    assert net[1].half().table.dtype == F64  # the table keeps its accuracy


def test_weights_have_the_weibull_law():
    W = symmetric_weibull_(torch.empty(100_000, dtype=F64), 3.0, generator=torch.Generator().manual_seed(0))
    sd = 5 / 100_000**0.5
    for t in (-1.2, -0.5, 0.3, 1.0):
        truth = 0.5 + 0.5 * math.copysign(1.0, t) * (1 - math.exp(-(abs(t) ** 3)))
        assert abs(float((t >= W).double().mean()) - truth) < sd
    again = symmetric_weibull_(torch.empty(5), 3.0, generator=torch.Generator().manual_seed(1))
    assert torch.equal(again, symmetric_weibull_(torch.empty(5), 3.0, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("kind", ["odd", "positive"])
@pytest.mark.parametrize("theta", [2.05, 3.0, 10.0])
def test_one_layer_is_gaussian_at_any_width(theta, kind):
    """Of 2·10⁵ samples; 1.95/√n is exceeded in one case of a thousand, and nine are looked at."""
    phi = GaussianPreactivation(theta, kind)
    for width in (1, 5) if kind == "odd" else (1,):
        found = preactivation_ks(phi, theta, (width,), generator=torch.Generator().manual_seed(width))
        assert found.num_samples == 200_000
        assert found.statistic < 1.95 / 200_000**0.5


def test_usual_activations_are_not_gaussian_and_two_layers_are_nearly():
    g = torch.Generator().manual_seed(0)
    assert preactivation_ks(nn.ReLU(), None, (1,), num_samples=20_000, generator=g).statistic > 0.2
    assert preactivation_ks(nn.Tanh(), None, (1,), num_samples=20_000, generator=g).statistic > 0.09
    # Width 2: what is left is dependence between units (published .0101 and .0282), and none of it at width 10.
    phi = GaussianPreactivation(3.0)
    two = preactivation_ks(phi, 3.0, (2, 2), generator=g)
    assert abs(two.statistic - 0.0282) < 0.004
    assert preactivation_ks(phi, 3.0, (10, 10), num_samples=50_000, generator=g).statistic < 0.010


@pytest.mark.parametrize(("kind", "published"), [("odd", (0.464, 0.489, 0.500)), ("positive", (0.896, 0.857, 0.817))])
def test_the_correlation_map_is_the_published_one(kind, published):
    """E φ(X)φ(X′) E W² at correlation ½ of X, X′. The published values are of samples, to 4e-3."""
    x, w = normal_grid()
    x, w = x[::10], 10 * w[::10]
    for theta, value in zip((2.05, 3.0, 10.0), published, strict=True):
        phi = GaussianPreactivation(theta, kind)
        other = 0.5 * x.unsqueeze(-1) + math.sqrt(0.75) * x
        c = w @ (phi(x).unsqueeze(-1) * phi(other)) @ w * math.gamma(1 + 2 / theta)
        assert abs(float(c) - value) < 4e-3


def test_the_statistic_is_that_of_scipy():
    from scipy.stats import kstest

    z = torch.randn(500, dtype=F64) * 1.1
    assert gap(ks_normal(z).statistic, kstest(z.numpy(), "norm").statistic) < 1e-14
    assert ks_normal(torch.randn(10_000)).critical == 1.358 / 100


def test_a_network_is_measured_at_a_layer():
    net = nn.Sequential(nn.Linear(5, 400, bias=False), nn.ReLU(), nn.Linear(400, 1))
    nn.init.normal_(net[0].weight)
    assert network_ks(net, "0", torch.randn(50, 5)).statistic < 0.05
    assert network_ks(net, "1", torch.randn(50, 5)).statistic > 0.3
    with pytest.raises(errors.InputError, match="no layer '7'"):
        network_ks(net, "7", torch.randn(5, 5))


def test_what_does_not_exist_is_refused():
    for theta in (2.0, 1.0, 100.0, float("nan")):
        with pytest.raises(errors.InputError, match=r"between 2.02 and 50"):
            GaussianPreactivation(theta)
    with pytest.raises(errors.InputError, match="theta must be positive"):
        symmetric_weibull_(torch.empty(2), 0.0)
    with pytest.raises(errors.InputError, match="finite values"):
        ks_normal(torch.tensor([float("nan")]))
    with pytest.raises(errors.InputError, match="A width"):
        preactivation_ks(nn.ReLU(), None, (2, 0))
