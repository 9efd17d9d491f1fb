"""A network in float32: growing, forgetting, leaving out and any prior precision, to the rounding of its features.

The same network and data in float64 are the reference. A feature is κ(x, Z)W; a column of W is as long as λ^{-1/2} of a
direction that is kept, which is at least 10 eps of the largest, so that rounding eps of κ is √(eps/10) of a prior
standard deviation at most (dense features are J itself: eps). Ten of that is room for sums over a few rows.
"""

import copy

import pytest
import torch
from gpytorch.likelihoods import GaussianLikelihood
from netproblems import NET, SOFTMAX, TAU, TEST, X_NEW, Y_NEW, X, Y, gap
from torch import nn
from toys import F64

from dualgp import network_gp

EPS = torch.finfo(torch.float32).eps
SINGLE = copy.deepcopy(NET).float()
DOUBLE = copy.deepcopy(SINGLE).double()  # the same weights
AT = TEST.float()
FAR = 3.0 * X_NEW.float()
OPTIONS = [
    {"structure": "dense"},
    {"structure": "full"},
    {"inducing_inputs": X[:3].float()},
    {"inducing_inputs": X[:3].float(), "centre": "map"},
    {"inducing_inputs": X[:4].float(), "outputs": "independent"},
    {"structure": "dense", "centre": "map"},
]
GRID = [1e-6, 1e-3, 1.0, 1e3, 1e6]


def both(tau=TAU, **options):
    """The posterior in single precision, and in double."""
    x = X.float()
    single = network_gp(SINGLE, (x, Y), SOFTMAX, prior_precision=tau, **options)
    if "inducing_inputs" in options:
        options = options | {"inducing_inputs": options["inducing_inputs"].double()}
    return single, network_gp(DOUBLE, (x.double(), Y), SOFTMAX, prior_precision=tau, **options)


def agree(single, double):
    """Mean to the rounding of a prior standard deviation per unit of w, variance to that of a prior variance."""
    assert single.basis.size == double.basis.size
    tol = 10 * ((EPS / 10) ** 0.5 if single.basis.has_residual else EPS)
    prior = double.basis.features(AT.double()).prior_var.max()
    (mean, var), (mean_64, var_64) = single.predict(AT), double.predict(AT.double())
    w = 1.0 + double.posterior.mean_w.norm()
    assert gap(var.double(), var_64) < tol * prior
    assert gap(mean.double(), mean_64) < tol * prior.sqrt() * w + 10 * EPS * mean_64.abs().max()


@pytest.mark.parametrize("options", OPTIONS)
def test_joints_and_samples_are_in_single_precision_too(options):
    q = both(**options)[0].posterior
    joint = q.predict_joint(AT)
    found = joint.mean, joint.covariance_matrix, q.sample(AT, 2)
    assert {t.dtype for t in found} == {torch.float32}


@pytest.mark.parametrize("options", OPTIONS)
def test_growing_forgetting_and_leaving_out(options):
    pair = both(**options)
    agree(*pair)
    grown = [q.condition(x, Y_NEW, grow=4) for q, x in zip(pair, (FAR, FAR.double()), strict=True)]
    agree(*grown)
    old = [q.forget(x[:9], Y[:9]) for q, x in zip(grown, (X.float(), X.float().double()), strict=True)]
    agree(*old)
    back = [q.forget(x, Y_NEW) for q, x in zip(old, (FAR, FAR.double()), strict=True)]
    agree(*back)
    left = [q.leave_one_out(x[9:], Y[9:]) for q, x in zip(old, (X.float(), X.float().double()), strict=True)]
    assert abs(left[0].nlpd - left[1].nlpd) < 10 * (EPS / 10) ** 0.5
    assert left[0].num_capped == 0


@pytest.mark.parametrize("options", OPTIONS)
def test_any_prior_precision_from_any_other(options):
    """The null space of what data tell is kept at zero, so that it can be scaled up: by 10¹² here."""
    for start in (1e6, 1.0):
        single, double = both(start, **options)
        for tau in GRID:
            agree(single.with_prior_precision(tau), double.with_prior_precision(tau))
        evidence = [q.sweep(GRID) for q in (single, double)]
        tol = 10 * ((EPS / 10) ** 0.5 if single.basis.has_residual else 10 * EPS)
        assert gap(*evidence) < tol * (1 + evidence[1].abs().max())


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("method", ["evidence", "validation", "leave_one_out"])
def test_the_same_prior_precision_is_chosen(options, method):
    """The best is found to 2 % between neighbours of a grid, whose choice may be another where scores are as close."""
    pair = both(**options)
    data = {"evidence": (), "validation": (AT, Y[:7]), "leave_one_out": (X.float(), Y)}[method]
    doubled = [t.double() if t.is_floating_point() else t for t in data]
    chosen = [q.tuned(method, *d).prior_precision for q, d in zip(pair, (data, doubled), strict=True)]
    assert chosen[0] == pytest.approx(chosen[1], rel=0.04)


LINE = torch.linspace(-2, 2, 40).unsqueeze(-1)
GAP = torch.linspace(-0.45, 0.45, 10).unsqueeze(-1)


def on_a_line(structure, dtype, **options):
    """A network of one input: half of the eigenvalues that it keeps are below the rounding of products in float32."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 10), nn.Tanh(), nn.Linear(10, 1)).to(dtype)
    noise = GaussianLikelihood().to(dtype)
    noise.noise = 1e-3
    x = LINE[LINE.abs().squeeze(-1) > 0.5].to(dtype)
    return network_gp(net, (x, x.sin()), noise, prior_precision=0.01, **structure, **options)


@pytest.mark.parametrize("structure", [{"structure": "full"}, {"inducing_inputs": LINE[::2]}])
def test_directions_that_float32_products_do_not_tell_are_kept(structure):
    x = torch.linspace(-2, 2, 51).unsqueeze(-1)
    wide = {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in structure.items()}
    single, double = on_a_line(structure, torch.float32), on_a_line(wide, F64)
    if structure == {"structure": "full"}:  # a direction that is cut keeps its prior variance, 1e-11 of the largest
        dense = on_a_line({"structure": "dense"}, F64)
        largest = dense.basis.features(LINE.double()).prior_var.sum()
        for q in (single, double):
            assert gap(q.predict(x.to(q.basis.dtype))[1].double(), dense.predict(x.double())[1]) < 1e-11 * largest
    for _ in range(2):
        assert single.basis.size == double.basis.size
        sd = [q.predict(x.to(q.basis.dtype))[1].double().sqrt() for q in (single, double)]
        torch.testing.assert_close(*sd, rtol=1e-4, atol=0)
        single, double = (q.condition(GAP.to(q.basis.dtype), GAP.to(q.basis.dtype).sin()) for q in (single, double))


@pytest.mark.parametrize("outputs", ["coupled", "independent"])
def test_jacobians_that_take_more_than_the_budget_are_brought_to_float64_in_parts(outputs):
    structure = {"inducing_inputs": LINE[::2], "outputs": outputs}
    plenty, tight = on_a_line(structure, torch.float32), on_a_line(structure, torch.float32, budget=4000)
    assert plenty.basis.size == tight.basis.size
    assert tight.basis._span.at_Z.f.dtype == torch.float32
    assert plenty.basis._span.at_Z.f.dtype == F64
    torch.testing.assert_close(tight.predict(LINE)[1], plenty.predict(LINE)[1], rtol=1e-4, atol=0)
