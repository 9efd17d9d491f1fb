"""A fit finds its way from lengthscales at which nothing can be learned, and leaves all others as they were given."""

import math

import gpytorch
import pytest
import torch
from gpytorch.kernels import RBFKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood
from gpytorch.means import ConstantMean, LinearMean
from toys import F64, gap, gaussian, rbf, waves

from dualgp import DualGP, ExactGP
from dualgp.errors import InputError, NumericalWarning
from dualgp.gp.data import Data
from dualgp.gp.start import centred_mean, in_units_of, workable_kernel


@pytest.mark.parametrize("factor", [1e-9, 1e-4, 1e4, 1e9])
def test_the_units_of_x_do_not_decide_whether_a_fit_works(factor):
    x, f, g = waves(300)
    y = f + 0.2 * torch.randn(300, generator=g, dtype=F64)
    nlpd = []
    for scale in (1.0, factor):
        gp = DualGP(ScaleKernel(RBFKernel()).double(), gaussian(0.5), num_inducing=25)
        if scale == 1.0:
            gp.fit(x, y)
        else:
            with pytest.warns(NumericalWarning, match="Standardise inputs"):
                gp.fit(scale * x, y)
        nlpd.append(gp.nlpd(scale * x, y))
    assert abs(nlpd[0] - nlpd[1]) < 0.01


def test_many_inputs_at_default_lengthscale_are_learned():
    """18 standardised columns are further apart than the default lengthscale sees: the fit used to call all noise."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(600, 18, generator=g, dtype=F64)
    y = (x[:, :3].sum(-1) / 2).sin() + 0.1 * torch.randn(600, generator=g, dtype=F64)
    for learn in ("fit", "update"):
        gp = DualGP(ScaleKernel(RBFKernel(ard_num_dims=18)).double(), gaussian(0.5), num_inducing=60)
        with pytest.warns(NumericalWarning, match="uncorrelated"):
            getattr(gp, learn)(x, y)
        assert gp.nlpd(x, y) < 0.6  # calling all noise is 1.1


@pytest.mark.parametrize("lengthscale", [0.1, 0.5, 3.0])
def test_a_kernel_that_can_learn_is_left_alone(lengthscale):
    x, y, _ = waves(100)
    kernel = rbf(lengthscale)
    assert workable_kernel(kernel, None, gaussian(), Data(x, y, False), None) is kernel


def test_a_frozen_lengthscale_is_left_alone():
    x, y, _ = waves(100)
    kernel = rbf(1e-5)
    kernel.base_kernel.raw_lengthscale.requires_grad_(False)
    assert workable_kernel(kernel, None, gaussian(), Data(x, y, False), None) is kernel
    gp = DualGP(rbf(1e-5), gpytorch.likelihoods.BernoulliLikelihood(), num_inducing=5)
    gp.fit(x, (y > 0).double(), learn_hyperparameters=False)  # no warning either
    assert gp.kernel.base_kernel.lengthscale.item() == pytest.approx(1e-5)


@pytest.mark.parametrize("unit", [0.1, 1000.0])
def test_a_stream_learns_the_same_whatever_units_its_targets_are_in(unit):
    g = torch.Generator().manual_seed(0)
    x = torch.rand(400, 2, generator=g, dtype=F64)
    y = (6 * x[:, 0]).sin() * (5 * x[:, 1]).cos() + 0.3 * torch.randn(400, generator=g, dtype=F64)

    def foretold(factor: float) -> float:
        """NLPD of the last hundred in units of y, after three batches."""
        gp = DualGP(ScaleKernel(RBFKernel()).double(), GaussianLikelihood().double(), num_inducing=20)
        for rows in torch.arange(300).chunk(3):
            gp.update(x[rows], factor * y[rows])
        return gp.nlpd(x[300:], factor * y[300:]) - math.log(factor)

    assert abs(foretold(unit) - foretold(1.0)) < 0.02


def test_only_what_is_learned_is_put_into_other_units():
    x, y, _ = waves(100)
    data = Data(x, 1000 * y, False)
    kernel, likelihood = ScaleKernel(RBFKernel()).double(), GaussianLikelihood().double()
    likelihood.raw_noise.requires_grad_(False)
    scaled, same = in_units_of(kernel, None, likelihood, data, None)
    assert same.noise.item() == likelihood.noise.item()
    assert scaled.outputscale.item() / kernel.outputscale.item() == pytest.approx(
        (data.y.square().mean() / (kernel.outputscale + likelihood.noise)).item()
    )
    assert in_units_of(kernel, None, likelihood, Data(x, 3 * y, False), None) == (kernel, likelihood)
    both = kernel + ScaleKernel(RBFKernel()).double() * ScaleKernel(RBFKernel()).double()
    scaled, _ = in_units_of(both, None, GaussianLikelihood().double(), data, None)
    factors = [a.outputscale.item() / kernel.outputscale.item() for a in scaled.modules() if isinstance(a, ScaleKernel)]
    assert factors[0] == pytest.approx(factors[1])
    assert factors[0] > 1e4
    assert factors[2] == 1


def test_an_offset_that_the_mean_learns_is_no_amplitude():
    x, y, _ = waves(100)
    kernel, likelihood, mean = ScaleKernel(RBFKernel()).double(), GaussianLikelihood().double(), ConstantMean().double()
    assert in_units_of(kernel, mean, likelihood, Data(x, y + 1000, False), None) == (kernel, likelihood)


def test_targets_in_other_units_stay_within_the_bounds_of_constraints():
    x, y, _ = waves(100)
    kernel = ScaleKernel(RBFKernel(), outputscale_constraint=gpytorch.constraints.Interval(0.1, 2.0)).double()
    noise = GaussianLikelihood(noise_constraint=gpytorch.constraints.Interval(1e-3, 5.0)).double()
    for factor in (1e3, 1e-3):
        scaled, likelihood = in_units_of(kernel, None, noise, Data(x, factor * y, False), None)
        assert 0.1 < scaled.outputscale.item() < 2.0
        assert 1e-3 < likelihood.noise.item() < 5.0
    gp = DualGP(kernel, noise, num_inducing=10)
    gp.update(x, 1e3 * y)
    assert 0.1 < gp.kernel.outputscale.item() < 2.0


@pytest.mark.parametrize(
    ("kind", "mean", "far"),
    [
        (DualGP, ConstantMean, -1e4),
        (DualGP, lambda: LinearMean(1), -1e4),
        (DualGP, lambda: None, -30.0),  # the amplitude does it, at a million times the jitter
        (ExactGP, ConstantMean, -1e4),
        (ExactGP, lambda: None, -30.0),
    ],
)
def test_targets_far_from_the_mean_are_learned_as_those_about_it(kind, mean, far):
    g = torch.Generator().manual_seed(0)
    x = 6 * torch.rand(60, 1, generator=g, dtype=F64)
    y = (2 * x[:, 0]).sin() + 0.1 * torch.randn(60, generator=g, dtype=F64)
    noise = []
    for offset in (0.0, far):
        given = mean()
        likelihood = GaussianLikelihood().double()
        size = {"num_inducing": 20} if kind is DualGP else {"rank": 40, "num_probes": 4}
        gp = kind(ScaleKernel(RBFKernel()).double(), likelihood, mean=given and given.double(), **size)
        gp.fit(x, y + offset)
        noise.append(likelihood.noise.item())
    assert noise == pytest.approx([noise[0]] * 2, rel=0.1)
    assert noise[0] < 0.02


def test_means_of_several_outputs_start_each_at_its_own_targets():
    x, f, g = waves(60, 1)
    y = torch.stack([f + 100, f - 50], -1) + 0.1 * torch.randn(60, 2, generator=g, dtype=F64)
    mean = ConstantMean(batch_shape=torch.Size([2])).double()
    started = centred_mean(kernel := ScaleKernel(RBFKernel()).double(), mean, gaussian(), Data(x, y, True))
    assert gap(started.constant, y.mean(0)) < 1e-9
    assert mean.constant.abs().max() == 0
    shared = centred_mean(kernel, ConstantMean().double(), gaussian(), Data(x, y, True))
    assert gap(shared.constant, y.mean()) < 1e-9


@pytest.mark.parametrize(
    "mean",
    [
        None,
        ConstantMean().double().requires_grad_(False),
        ConstantMean(constant_constraint=gpytorch.constraints.Interval(-1.0, 1.0)).double(),
        gpytorch.means.ZeroMean(),
    ],
)
def test_a_mean_that_is_not_free_stays_where_it_is(mean):
    x, f, _ = waves(60, 1)
    assert centred_mean(ScaleKernel(RBFKernel()).double(), mean, gaussian(), Data(x, f + 100, False)) is mean


def test_targets_near_the_mean_leave_it_where_it_is():
    x, f, _ = waves(60, 1)
    mean = ConstantMean().double()
    near = Data(x, f - f.mean() + 0.3 * f.std(), False)
    assert centred_mean(ScaleKernel(RBFKernel()).double(), mean, gaussian(), near) is mean
    few = Data(x[:5], f[:5] + 100, False)
    assert centred_mean(ScaleKernel(RBFKernel()).double(), mean, gaussian(), few) is mean


def test_a_mean_of_another_number_of_outputs_is_refused_before_anything_is_learned():
    x, f, _ = waves(60, 1)
    mean = ConstantMean(batch_shape=torch.Size([3])).double()
    gp = DualGP(ScaleKernel(RBFKernel()).double(), gaussian(), mean=mean, num_outputs=2, num_inducing=5)
    for call in (gp.fit, gp.update):
        with pytest.raises(InputError, match="A model of 2 outputs needs a kernel and mean with batch shape"):
            call(x, torch.stack([f, f], -1))
    assert gp.inducing_points is None
