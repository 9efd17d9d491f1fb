"""A fit finds its way from lengthscales at which nothing can be learned, and leaves all others as they were given."""

import gpytorch
import pytest
import torch
from gpytorch.kernels import RBFKernel, ScaleKernel
from toys import F64, gaussian, rbf, waves

from dualgp import DualGP
from dualgp.errors import NumericalWarning
from dualgp.gp.data import Data
from dualgp.gp.start import workable_kernel


@pytest.mark.parametrize("factor", [1e-4, 1e4])
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
