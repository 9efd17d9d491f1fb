"""Quadrature against dense integrals."""

import math

import pytest
import reference as ref
import torch
from toys import F64, at, gap

from dualgp import quadrature
from dualgp.quadrature import (
    expectation,
    expected_logsumexp,
    expected_softmax,
    gauss_hermite,
    gauss_legendre,
    hermite_points,
)

MEAN, VAR = at(-1.0, 0.0, 0.7, 3.0), at(0.3, 2.0, 1.0, 0.1)


def test_polynomials_are_integrated_exactly():
    # E f⁸ for f ~ N(0, v) is 105 v⁴; 20 nodes are exact to degree 39.
    assert gap(expectation(lambda f: f**8, torch.zeros(4, dtype=F64), VAR), 105 * VAR**4) < 1e-9
    absolute = 2**19.5 * math.gamma(20) / math.pi**0.5  # E|f|³⁹: the terms that cancel
    assert gap(expectation(lambda f: f**39, at(0.0), at(1.0), 20), 0.0) < 1e-15 * absolute
    assert gap(expectation(torch.ones_like, MEAN, VAR), torch.ones(4)) < 1e-14


@pytest.mark.parametrize("g", [torch.sin, torch.sigmoid, torch.special.log_ndtr, lambda f: f.exp()])
def test_smooth_functions_are_integrated_to_the_stated_error(g):
    assert gap(expectation(g, MEAN, VAR), ref.brute(g, MEAN, VAR)) < 2e-6


def test_the_stated_error_of_log_phi():
    exact = ref.brute(torch.special.log_ndtr, at(0.0), at(2.0), points=20001)
    assert gap(expectation(torch.special.log_ndtr, at(0.0), at(2.0)), exact) < 5e-8


def test_it_is_differentiable_in_mean_and_variance():
    inputs = MEAN.clone().requires_grad_(), VAR.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda m, v: expectation(torch.sin, m, v), inputs)


def test_no_variance_gives_the_value_and_a_finite_gradient():
    var = torch.zeros(4, dtype=F64, requires_grad=True)
    value = expectation(torch.sin, MEAN, var)
    assert gap(value.detach(), MEAN.sin()) < 1e-9
    assert torch.autograd.grad(value.sum(), var)[0].isfinite().all()


def test_nodes_follow_dtype_and_shape():
    x, w = gauss_hermite(5, torch.zeros(1, dtype=torch.float32))
    assert x.dtype == w.dtype == torch.float32
    x, w = gauss_legendre(5, torch.zeros(1, dtype=torch.float32))
    assert x.dtype == w.dtype == torch.float32
    assert gap((w * x.pow(9)).sum(), 0.1) < 1e-6  # ∫₀¹ x⁹ dx
    points, weights = hermite_points(MEAN.reshape(2, 2), VAR.reshape(2, 2), 7)
    assert points.shape == (7, 2, 2)
    assert gap((weights.reshape(7, 1, 1) * points).sum(0), MEAN.reshape(2, 2)) < 1e-13
    spread = (weights.reshape(7, 1, 1) * points.square()).sum(0) - MEAN.reshape(2, 2).square()
    assert gap(spread, VAR.reshape(2, 2)) < 1e-12


CASES = [
    (at(0.0, 0.0), at(0.0, 0.0)),
    (at(0.3, -1.0), at(0.5, 2.0)),
    (at(10.0, -10.0), at(4.0, 4.0)),
    (at(500.0, -500.0), at(1.0, 1.0)),
    (at(0.0, 1.0, 2.0), at(2.0, 0.1, 5.0)),
    (at(0.0, 1.0, -2.0), at(20.0, 0.1, 30.0)),
]


@pytest.mark.parametrize(("mean", "var"), CASES)
def test_logsumexp_and_softmax_are_those_of_a_dense_integral(mean, var):
    points = 401 if len(mean) == 2 else 121
    value = ref.brute_joint(lambda f: f.logsumexp(-1), mean, var, points)
    probs = ref.brute_joint(lambda f: f.softmax(-1), mean, var, points)
    assert gap(expected_logsumexp(mean.unsqueeze(0), var.unsqueeze(0))[0], value) < 1e-6
    assert gap(expected_softmax(mean.unsqueeze(0), var.unsqueeze(0))[0], probs) < 1e-6


def test_gradients_of_logsumexp_are_finite_differences():
    mean, var = at(0.3, -1.0, 0.8), at(0.5, 2.0, 1.0)
    m, v = mean.clone().requires_grad_(), var.clone().requires_grad_()
    in_mean, in_var = torch.autograd.grad(expected_logsumexp(m, v), (m, v))
    assert gap(in_mean, ref.gradient(lambda t: expected_logsumexp(t, var).item(), mean, 1e-3)) < 1e-7
    assert gap(in_var, ref.gradient(lambda t: expected_logsumexp(mean, t).item(), var, 1e-3)) < 1e-7
    assert gap(in_mean.sum(), 1.0) < 1e-7  # E[softmax] sums to one


def test_probabilities_sum_to_one_and_follow_a_shift_and_a_permutation():
    mean = torch.randn(50, 10, generator=torch.Generator().manual_seed(0), dtype=F64) * 3
    var = torch.rand(50, 10, generator=torch.Generator().manual_seed(1), dtype=F64) * 6
    probs = expected_softmax(mean, var)
    assert gap(probs.sum(-1), torch.ones(50)) < 1e-12
    assert (probs > 0).all()
    assert gap(expected_softmax(mean + 7.0, var), probs) < 1e-9
    assert gap(expected_softmax(mean.flip(-1), var.flip(-1)), probs.flip(-1)) < 1e-9
    shifted = expected_logsumexp(mean + 7.0, var) - expected_logsumexp(mean, var)
    assert gap(shifted, torch.full((50,), 7.0)) < 1e-9


def test_ten_classes_against_many_draws():
    g = torch.Generator().manual_seed(0)
    mean, var = torch.randn(10, generator=g, dtype=F64), torch.rand(10, generator=g, dtype=F64) * 3
    f = mean + var.sqrt() * torch.randn(200_000, 10, generator=g, dtype=F64)
    error = f.logsumexp(-1).std() / math.sqrt(200_000)
    assert (expected_logsumexp(mean, var) - f.logsumexp(-1).mean()).abs() < 5 * error
    assert ((expected_softmax(mean, var) - f.softmax(-1).mean(0)).abs() < 5 * f.softmax(-1).std(0) / 200_000**0.5).all()


def test_rows_in_blocks_are_those_of_the_whole(monkeypatch):
    mean = torch.randn(30, 4, generator=torch.Generator().manual_seed(0), dtype=F64)
    var = torch.full_like(mean, 0.7)
    whole = expected_logsumexp(mean, var)
    monkeypatch.setattr("dualgp.quadrature._BLOCK", 1)
    assert gap(expected_logsumexp(mean, var), whole) < 1e-12
    assert expected_logsumexp(mean[:0], var[:0]).shape == (0,)
    assert gap(expected_logsumexp(mean.reshape(5, 6, 4), var.reshape(5, 6, 4)).flatten(), whole) < 1e-12


def test_the_answer_is_in_the_dtype_of_the_mean():
    mean, var = torch.zeros(2, 3), torch.ones(2, 3)
    assert expected_logsumexp(mean, var).dtype == expected_softmax(mean, var).dtype == torch.float32
    assert gap(expected_logsumexp(mean, var).double(), expected_logsumexp(mean.double(), var.double())) < 1e-6


def test_softmax_of_huge_variance_stays_a_probability():
    mean, var = at(3.0, 0.0, -2.0).expand(4, 3), at(1000.0, 2000.0, 1e4, 1e8).unsqueeze(-1).expand(4, 3)
    probs = expected_softmax(mean, var)
    f = mean + var.sqrt() * torch.randn(100_000, 4, 3, dtype=F64)
    assert gap(probs.sum(-1), torch.ones(4)) < 1e-12
    assert gap(probs, f.softmax(-1).mean(0)) < 0.03


def test_softmax_far_from_all_data_takes_no_longer_and_is_the_argmax():
    """By the rule itself a line of 10⁸ points; with two classes the argmax is the sign of a Gaussian."""
    found = expected_softmax(at(0.0, 1e7).unsqueeze(0), at(1e14, 1e14).unsqueeze(0))
    assert gap(found[0, 1], torch.special.ndtr(at(0.5**0.5))) < 0.03


@pytest.mark.parametrize("top", [50.0, 99.0, 101.0, 1e3, 1e4, 1e5])
def test_logsumexp_of_two_classes_at_large_variances(top):
    # E[log(e^a + e^b)] = E[a] + E[softplus(b − a)], here with b − a ~ N(δ, s²), s² = 4/3 top
    mean, var = at(0.0, 3.0).requires_grad_(), at(top, top / 3.0).requires_grad_()
    s, mu = (4.0 / 3.0 * top) ** 0.5, 3.0
    x = torch.linspace(-40.0, 40.0, 400_000, dtype=F64)  # without the jump at 0
    density = (-0.5 * ((x - mu) / s).square()).exp() / (s * (2 * math.pi) ** 0.5)
    below = 0.5 * math.erfc(-mu / s / 2**0.5)  # P(d > 0)
    kink = mu * below + s / (2 * math.pi) ** 0.5 * math.exp(-0.5 * (mu / s) ** 2)  # E[max(d, 0)]
    soft = (-x.abs()).exp().log1p()  # softplus(d) − max(d, 0)
    value = kink + torch.trapezoid(soft * density, x)
    in_mean = below + torch.trapezoid(-x.sign() * torch.sigmoid(-x.abs()) * density, x)
    in_var = 0.5 * torch.trapezoid(torch.sigmoid(x) * torch.sigmoid(-x) * density, x)
    found = expected_logsumexp(mean, var)
    d_mean, d_var = torch.autograd.grad(found, (mean, var))
    assert gap(found.detach(), value) < 1e-7 * max(1.0, float(value))
    assert gap(d_mean, torch.stack([1.0 - in_mean, in_mean])) < 1e-6
    assert gap(d_var, in_var.expand(2)) < 1e-6


def test_logsumexp_holds_no_more_at_large_variances(monkeypatch):
    sizes, survival = [], quadrature._survival

    def watched(t, var, u):
        sizes.append(t.numel() * u.numel())
        return survival(t, var, u)

    monkeypatch.setattr(quadrature, "_survival", watched)
    g = torch.Generator().manual_seed(0)
    var = 2e3 * torch.rand(120, 5, generator=g, dtype=F64) ** 4
    assert expected_logsumexp(torch.zeros_like(var), var).isfinite().all()
    assert max(sizes) <= quadrature._BLOCK / 8
    # As the root of the variance, not as the variance:
    sizes.clear()
    expected_logsumexp(at(0.0, 0.0), at(1e6, 1.0))
    assert max(sizes) < 1e5


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_variance_that_is_not_finite_spoils_its_own_row_only(bad):
    found = expected_logsumexp(torch.zeros(2, 2, dtype=F64), torch.tensor([[bad, 1.0], [1.0, 1.0]], dtype=F64))
    assert found.isnan().tolist() == [True, False]
