"""Kernel matrices: the fused path is GPyTorch's own kernel, values and gradients; every other passes through."""

import gpytorch
import pytest
import torch
from gpytorch.kernels import (
    ConstantKernel,
    CosineKernel,
    Kernel,
    LinearKernel,
    MaternKernel,
    PeriodicKernel,
    PolynomialKernel,
    RBFKernel,
    RFFKernel,
    RQKernel,
    ScaleKernel,
)
from gpytorch.likelihoods import GaussianLikelihood
from gpytorch.means import LinearMean
from toys import F64, gap

from dualgp import DualGP, ExactGP, InducingBasis, errors
from dualgp.kernels import check_kernel, cross_covariance, frozen_copy, kernel_diagonal
from dualgp.kernels.stationary import as_stationary

BASES = {
    "rbf": RBFKernel,
    "matern 1/2": lambda **o: MaternKernel(nu=0.5, **o),
    "matern 3/2": lambda **o: MaternKernel(nu=1.5, **o),
    "matern 5/2": lambda **o: MaternKernel(nu=2.5, **o),
}
OPTIONS = {
    "isotropic": {},
    "ard": {"ard_num_dims": 3},
    "active dims": {"active_dims": [2, 0], "ard_num_dims": 2},
    "batch": {"batch_shape": torch.Size([2])},
    "batch of batches, ard": {"batch_shape": torch.Size([2, 3]), "ard_num_dims": 3},
}


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def randomised(kernel: gpytorch.kernels.Kernel) -> gpytorch.kernels.Kernel:
    kernel = kernel.double()
    for i, parameter in enumerate(kernel.parameters()):
        parameter.data = 0.5 * draw(*parameter.shape, seed=i + 10)
    return kernel


def make(base: str, options: str, scale: bool) -> gpytorch.kernels.Kernel:
    kernel = BASES[base](**OPTIONS[options])
    return randomised(ScaleKernel(kernel, batch_shape=kernel.batch_shape) if scale else kernel)


def theirs(kernel, x, z) -> torch.Tensor:
    with gpytorch.settings.lazily_evaluate_kernels(False):
        return kernel(x, z).to_dense()


FORMS = [(options, scale) for options in OPTIONS for scale in (True, False)]


@pytest.mark.parametrize(("options", "scale"), FORMS)
@pytest.mark.parametrize("base", BASES)
def test_the_fused_kernel_is_gpytorchs_in_value_and_gradient(base, options, scale):
    kernel = make(base, options, scale)
    assert as_stationary(kernel) is not None
    x, z = draw(6, 3, seed=1).requires_grad_(), draw(5, 3, seed=2).requires_grad_()
    weights = draw(6, 5, seed=3)
    wanted = [x, z, *kernel.parameters()]
    mine, other = cross_covariance(kernel, x, z), theirs(kernel, x, z)
    assert gap(mine.detach(), other.detach()) < 1e-12
    mine, other = ((K * weights).sum() for K in (mine, other))
    for a, b in zip(torch.autograd.grad(mine, wanted), torch.autograd.grad(other, wanted), strict=True):
        assert gap(a, b) < 1e-9
    assert gap(kernel_diagonal(kernel, x).detach(), kernel(x.detach(), diag=True).detach()) < 1e-15


@pytest.mark.parametrize("base", BASES)
def test_batches_of_inputs_meet_batches_of_kernels(base):
    kernel = make(base, "batch", True)
    x, z = draw(2, 6, 3, seed=1), draw(2, 5, 3, seed=2)
    assert gap(cross_covariance(kernel, x, z).detach(), theirs(kernel, x, z).detach()) < 1e-12
    plain = make(base, "ard", True)
    assert gap(cross_covariance(plain, x, z).detach(), theirs(plain, x, z).detach()) < 1e-12
    assert kernel_diagonal(plain, x).shape == (2, 6)


@pytest.mark.parametrize("base", ["rbf", "matern 3/2", "matern 5/2"])
def test_at_coinciding_points_value_and_gradient_are_exact(base):
    kernel = make(base, "ard", True)
    x = draw(4, 3, seed=1).requires_grad_()
    K = cross_covariance(kernel, x, x.detach())
    assert gap(K.diagonal().detach(), kernel.outputscale.detach()) < 1e-13
    # k has its maximum there: no slope in x, and none in the lengthscale.
    slope, in_lengthscale = torch.autograd.grad(K.diagonal().sum(), [x, kernel.base_kernel.raw_lengthscale])
    assert slope.abs().max() < 1e-12
    assert in_lengthscale.abs().max() < 1e-12


def test_matern_12_at_coinciding_points_is_finite_and_flat():
    kernel = make("matern 1/2", "ard", True)
    x = draw(40, 3, seed=1).requires_grad_()
    K = cross_covariance(kernel, x, x.detach())
    assert gap(K.diagonal().detach(), kernel.outputscale.detach()) < 1e-6
    slope, in_lengthscale = torch.autograd.grad(K.diagonal().sum(), [x, kernel.base_kernel.raw_lengthscale])
    assert slope.abs().max() < 1e-6
    assert in_lengthscale.abs().max() < 1e-6


@pytest.mark.parametrize("base", BASES)
def test_float32_rounds_once_even_far_from_the_origin(base):
    kernel = make(base, "ard", True)
    x, z = draw(20, 3, seed=1) + 1000.0, draw(15, 3, seed=2) + 1000.0
    x, z = x.float().double(), z.float().double()
    exact = cross_covariance(kernel, x, z)
    low = cross_covariance(kernel, x.float(), z.float())
    assert low.dtype == torch.float32
    assert gap(low.detach(), exact.detach()) < 3e-6
    assert cross_covariance(kernel, x.float(), z.float(), F64).dtype == F64
    assert gap(cross_covariance(kernel, x.float(), z.float(), F64).detach(), exact.detach()) < 1e-12


GENERIC = {
    "rq": lambda: ScaleKernel(RQKernel(ard_num_dims=3)),
    "periodic": lambda: ScaleKernel(PeriodicKernel()),
    "sum": lambda: ScaleKernel(RBFKernel()) + ScaleKernel(MaternKernel(nu=1.5)),
    "product": lambda: RBFKernel(active_dims=[0]) * PeriodicKernel(active_dims=[1]),
    "linear": lambda: ScaleKernel(LinearKernel(ard_num_dims=3)),
    "polynomial": lambda: PolynomialKernel(power=2),
    "cosine": lambda: ScaleKernel(CosineKernel()),
    "constant and matern": lambda: ConstantKernel() + ScaleKernel(MaternKernel(nu=2.5)),
    "scale of a scale": lambda: ScaleKernel(ScaleKernel(RBFKernel())),
    "batch of sums": lambda: ScaleKernel(RQKernel(batch_shape=torch.Size([2])), batch_shape=torch.Size([2])),
}


@pytest.mark.parametrize("name", GENERIC)
def test_every_other_kernel_is_evaluated_by_gpytorch(name):
    kernel = randomised(GENERIC[name]())
    check_kernel(kernel)
    x, z = draw(6, 3, seed=1), draw(5, 3, seed=2)
    assert gap(cross_covariance(kernel, x, z).detach(), theirs(kernel, x, z).detach()) < 1e-14
    K = theirs(kernel, x, x)
    assert gap(kernel_diagonal(kernel, x).detach(), K.diagonal(dim1=-2, dim2=-1).detach()) < 1e-12
    low = cross_covariance(kernel, x.float(), z.float())
    assert low.dtype == torch.float32
    assert gap(low.detach(), theirs(kernel, x, z).detach()) < 1e-4


def test_nested_active_dims_pick_columns_of_columns():
    inner = RBFKernel(active_dims=[1])
    kernel = randomised(ScaleKernel(inner, active_dims=[2, 0]))
    x, z = draw(6, 3, seed=1), draw(5, 3, seed=2)
    assert gap(cross_covariance(kernel, x, z).detach(), theirs(kernel, x, z).detach()) < 1e-12


def test_a_subclass_of_a_known_kernel_is_not_taken_for_it():
    class Doubled(RBFKernel):
        def forward(self, *args, **options):
            return 2 * super().forward(*args, **options)

    kernel, x = randomised(Doubled()), draw(4, 2)
    assert as_stationary(kernel) is None
    assert gap(cross_covariance(kernel, x, x).detach(), theirs(kernel, x, x).detach()) < 1e-14


def test_a_frozen_copy_shares_nothing():
    kernel = ScaleKernel(RBFKernel())
    copy = frozen_copy(kernel)
    assert {p.dtype for p in copy.parameters()} == {F64}
    assert not any(p.requires_grad for p in copy.parameters())
    before = copy.outputscale.clone()
    kernel.outputscale = 7.0
    assert torch.equal(before, copy.outputscale)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in kernel.parameters())


@pytest.mark.parametrize(
    ("kernel", "match"),
    [
        (gpytorch.kernels.MultitaskKernel(RBFKernel(), 2), "MultitaskKernel is not supported.*batch_shape"),
        (ScaleKernel(gpytorch.kernels.RBFKernelGrad()), "RBFKernelGrad is not supported"),
        (gpytorch.kernels.LCMKernel([RBFKernel()], 2), "LCMKernel is not supported"),
        ("rbf", "Expected a gpytorch.kernels.Kernel, got str"),
    ],
)
def test_kernels_of_several_outputs_are_refused_by_name(kernel, match):
    with pytest.raises(errors.UnsupportedError, match=match):
        check_kernel(kernel)


def test_a_constant_kernel_is_learned_wherever_it_stands():
    x, y = draw(30, 2), draw(30, seed=3)
    for kernel in (ConstantKernel() + RBFKernel(), ConstantKernel() * RBFKernel(), ConstantKernel()):
        gp = DualGP(kernel.double(), GaussianLikelihood().double(), num_inducing=8)
        gp.fit(x, y)
        gp.update(x, y)
        assert bool(gp.predict(x)[0].isfinite().all())


@pytest.mark.parametrize(
    ("kernel", "match"),
    [
        (RBFKernel(ard_num_dims=3), r"RBFKernel has ard_num_dims=3, but takes 2 columns"),
        (ScaleKernel(RBFKernel(active_dims=[5])), r"ScaleKernel takes column 5 \(active_dims\), but there are 2"),
        (RBFKernel() + MaternKernel(ard_num_dims=3), r"MaternKernel has ard_num_dims=3"),
        (RBFKernel(active_dims=[1], ard_num_dims=2), r"ard_num_dims=2, but takes 1 col"),
    ],
)
def test_kernels_for_other_columns_are_refused_by_name(kernel, match):
    x, y = draw(30, 2), draw(30, seed=3)
    gp = DualGP(kernel.double(), GaussianLikelihood().double(), num_inducing=8)
    for call in (gp.fit, gp.update, ExactGP(kernel, GaussianLikelihood().double()).fit):
        with pytest.raises(errors.InputError, match=match):
            call(x, y)
    assert gp.inducing_points is None
    with pytest.raises(errors.InputError, match=match):
        InducingBasis(kernel, x)


def test_one_lengthscale_for_all_columns_is_no_other_number_of_them():
    InducingBasis(RBFKernel(ard_num_dims=1).double(), draw(3, 2))
    InducingBasis(ScaleKernel(RBFKernel(active_dims=[2, 0], ard_num_dims=2)).double(), draw(3, 3))


class Embedded(Kernel):
    """A kernel of three coordinates that it makes of any number of columns."""

    def __init__(self):
        super().__init__()
        self.base = RBFKernel(ard_num_dims=3)

    def forward(self, x1, x2, diag=False, **params):
        a, b = (torch.stack([x.sum(-1), x.prod(-1), x.square().sum(-1)], -1) for x in (x1, x2))
        return self.base(a, b, diag=diag, **params)


def test_a_kernel_of_ones_own_may_put_inputs_into_other_coordinates():
    gp = DualGP(ScaleKernel(Embedded()).double(), GaussianLikelihood().double(), num_inducing=8)
    gp.fit(draw(30, 2), draw(30, seed=3))


def test_a_linear_mean_of_other_columns_is_refused_by_name():
    gp = DualGP(RBFKernel(), GaussianLikelihood(), mean=LinearMean(3), num_inducing=8)
    with pytest.raises(errors.InputError, match="LinearMean takes 3 columns, X has 2"):
        gp.fit(draw(30, 2).float(), draw(30).float())


def test_a_kernel_of_random_features_has_drawn_them_before():
    with pytest.raises(errors.UnsupportedError, match="give num_dims="):
        check_kernel(RFFKernel(num_samples=5))
    check_kernel(RFFKernel(num_samples=5, num_dims=2))
