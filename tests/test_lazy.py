"""Lazy products are the dense ones, in value and gradient, for every kernel; and no tile is more than a tile."""

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
    RQKernel,
    ScaleKernel,
)
from toys import F64, gap

from dualgp import LazyKernel, errors
from dualgp.kernels import tiles
from dualgp.kernels.forms import as_form

D = 4


class Twisted(Kernel):
    """A kernel of a user's own, with a parameter and a warp of the inputs."""

    has_lengthscale = True

    def __init__(self) -> None:
        super().__init__()
        self.register_parameter("twist", torch.nn.Parameter(torch.tensor([0.3])))

    def forward(self, x1, x2, diag=False, **params):
        a, b = (t + self.twist * t.flip(-1).tanh() for t in (x1, x2))
        return self.covar_dist(a / self.lengthscale, b / self.lengthscale, square_dist=True, diag=diag).neg().exp()


KERNELS = {
    "rbf": lambda: RBFKernel(),
    "rbf ard": lambda: RBFKernel(ard_num_dims=D),
    "rbf active": lambda: ScaleKernel(RBFKernel(active_dims=[2, 0], ard_num_dims=2)),
    "matern 1/2": lambda: ScaleKernel(MaternKernel(nu=0.5)),
    "matern 3/2": lambda: MaternKernel(nu=1.5, ard_num_dims=D),
    "matern 5/2": lambda: ScaleKernel(MaternKernel(nu=2.5, active_dims=[1, 3])),
    "rq": lambda: ScaleKernel(RQKernel(ard_num_dims=D)),
    "periodic": lambda: ScaleKernel(PeriodicKernel()),
    "periodic ard": lambda: PeriodicKernel(ard_num_dims=D),
    "linear": lambda: LinearKernel(),
    "linear ard": lambda: ScaleKernel(LinearKernel(ard_num_dims=2, active_dims=[0, 3])),
    "sum": lambda: ScaleKernel(RBFKernel()) + ScaleKernel(MaternKernel(nu=1.5)) + LinearKernel(),
    "product": lambda: ScaleKernel(RBFKernel(active_dims=[0, 1]) * PeriodicKernel(active_dims=[2]) * MaternKernel(1.5)),
    "sum in product": lambda: (RBFKernel() + RQKernel()) * ScaleKernel(LinearKernel()),
    "active in active": lambda: ScaleKernel(
        gpytorch.kernels.AdditiveKernel(RBFKernel(active_dims=[1]), MaternKernel(2.5, active_dims=[0, 2]))
    ),
    "user": lambda: ScaleKernel(Twisted()),
    "user in a sum": lambda: Twisted() + ScaleKernel(RBFKernel(ard_num_dims=D)),
    "constant first": lambda: ConstantKernel() + ScaleKernel(RBFKernel()),
    "constant factor": lambda: ConstantKernel() * RBFKernel(),
    "cosine and polynomial": lambda: CosineKernel() * PolynomialKernel(power=2),
}


def make(name: str) -> Kernel:
    """A kernel whose hyperparameters are no defaults, at lengthscales about 1."""
    kernel = KERNELS[name]().double()
    generator = torch.Generator().manual_seed(5)
    for parameter in kernel.parameters():
        parameter.data = 0.7 + 0.5 * torch.rand(parameter.shape, generator=generator, dtype=F64)
    return kernel


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def obvious(kernel: Kernel, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """k(x, z) from the differences of all pairs, in float64; kernels of no formula here are GPyTorch's business."""
    kind = type(kernel)
    if kind in (gpytorch.kernels.AdditiveKernel, gpytorch.kernels.ProductKernel):
        if kernel.active_dims is not None:
            x, z = x[:, kernel.active_dims], z[:, kernel.active_dims]
        parts = torch.stack([obvious(part, x, z) for part in kernel.kernels])
        return parts.sum(0) if kind is gpytorch.kernels.AdditiveKernel else parts.prod(0)
    if kind is ScaleKernel:
        return kernel.outputscale * obvious(kernel.base_kernel, x, z)
    if kind not in (RBFKernel, MaternKernel, RQKernel, PeriodicKernel, LinearKernel):
        with gpytorch.settings.lazily_evaluate_kernels(False):
            return kernel(x, z).to_dense()
    if kernel.active_dims is not None:
        x, z = x[:, kernel.active_dims], z[:, kernel.active_dims]
    if kind is LinearKernel:
        return (x * kernel.variance) @ z.T
    difference = x.unsqueeze(1) - z
    if kind is PeriodicKernel:
        return (-2 * ((torch.pi * difference / kernel.period_length).sin().square() / kernel.lengthscale).sum(-1)).exp()
    square = (difference / kernel.lengthscale).square().sum(-1)
    if kind is RBFKernel:
        return (-0.5 * square).exp()
    if kind is RQKernel:
        return (1 + square / (2 * kernel.alpha)).pow(-kernel.alpha)
    apart = square > 0
    a = (2 * kernel.nu) ** 0.5 * torch.where(apart, torch.where(apart, square, 1.0).sqrt(), 0.0)
    return {0.5: 1.0, 1.5: 1 + a, 2.5: 1 + a + a.square() / 3}[kernel.nu] * (-a).exp()


def dense(kernel: Kernel, x: torch.Tensor, z: torch.Tensor | None) -> torch.Tensor:
    return obvious(kernel, x.double(), (x if z is None else z).double())


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.detach().double() - expected.detach()).norm() / expected.detach().norm()).item()


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Many tiles, of several shapes, in a small matrix."""
    monkeypatch.setitem(tiles._TILE, "cpu", 64 * 64 * 2)
    monkeypatch.setitem(tiles._ROWS, "cpu", 48)


@pytest.mark.parametrize("name", KERNELS)
def test_the_formulas_here_are_gpytorchs(name):
    kernel, x, z = make(name), draw(20, D), draw(15, D, seed=1)
    with gpytorch.settings.lazily_evaluate_kernels(False):
        assert gap(obvious(kernel, x, z), kernel(x, z).to_dense()) < 1e-12


TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


@pytest.mark.parametrize("square", [True, False], ids=["square", "rectangular"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "float64"])
@pytest.mark.parametrize("name", KERNELS)
def test_products_and_their_gradients_are_the_dense_ones(name, dtype, square):
    kernel = make(name)
    x = draw(230, D, seed=1).to(dtype).requires_grad_()
    z = None if square else draw(170, D, seed=2).to(dtype).requires_grad_()
    v = draw(230 if square else 170, 3, seed=3).to(dtype).requires_grad_()
    g = draw(230, 3, seed=4).to(dtype)
    wanted = [t for t in (x, z, v, *kernel.parameters()) if t is not None]
    found, expected = LazyKernel(kernel, x, z) @ v, dense(kernel, x, z) @ v.double()
    assert found.dtype == dtype
    assert relative(found, expected) < TOLERANCE[dtype]
    mine = torch.autograd.grad((found * g).sum(), wanted)
    theirs = torch.autograd.grad((expected * g).sum(), wanted)
    for a, b in zip(mine, theirs, strict=True):
        assert relative(a, b.double()) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "float64"])
@pytest.mark.parametrize("name", ["rbf ard", "matern 1/2", "periodic", "sum", "user in a sum"])
def test_gram_quadratic_columns_and_diagonal_are_the_dense_ones(name, dtype):
    kernel = make(name)
    x, z = draw(130, D, seed=1).to(dtype).requires_grad_(), draw(9, D, seed=2).to(dtype).requires_grad_()
    beta = (0.1 + draw(130, seed=3).square()).requires_grad_()
    A = draw(9, 9, seed=4).requires_grad_()
    lazy, K = LazyKernel(kernel, x, z), dense(kernel, x, z)
    pairs = [
        (lazy.gram(beta), (K.T * beta) @ K, [x, z, beta]),
        (lazy.quad_diag(A), ((K @ A) * K).sum(-1), [x, z, A]),
        (lazy.columns(torch.tensor([7, 2])), K[:, [7, 2]], [x, z]),
        (lazy.rmatvec(beta), K.T @ beta, [x, z, beta]),
    ]
    for found, expected, inputs in pairs:
        assert relative(found, expected) < TOLERANCE[dtype]
        wanted = [*inputs, *kernel.parameters()]
        weights = draw(*expected.shape, seed=6).to(found.dtype)
        mine = torch.autograd.grad((found * weights).sum(), wanted)
        theirs = torch.autograd.grad((expected * weights).sum(), wanted, retain_graph=True)
        # Columns are a dense block, of which autograd in the dtype of the block takes the gradient.
        tolerance = 2e-5 if expected.shape == (130, 2) and dtype == torch.float32 else TOLERANCE[dtype]
        for a, b in zip(mine, theirs, strict=True):
            assert relative(a, b.double()) < tolerance
    assert relative(LazyKernel(kernel, x).diagonal(), dense(kernel, x, None).diagonal()) < 1e-14


@pytest.mark.parametrize("lengthscale", [0.05, 0.3, 3.0])
def test_single_precision_holds_at_short_and_long_lengthscales_and_far_from_the_origin(lengthscale):
    kernel = MaternKernel(nu=1.5).double()
    kernel.lengthscale = lengthscale
    x, v = (draw(300, 20) + 30.0).float(), draw(300, 2, seed=1).float()
    assert relative(LazyKernel(kernel, x) @ v, dense(kernel, x, None) @ v.double()) < 1e-6


def test_products_of_exponentials_are_one_exponential_and_forms_say_what_they_are():
    kernel = ScaleKernel(RBFKernel(active_dims=[0, 1]) * PeriodicKernel(active_dims=[2]) * MaternKernel(1.5))
    assert str(as_form(kernel)) == "s·(exp(h) · matern1.5(h))"
    assert str(as_form(Twisted() + RBFKernel())) == "(Twisted + exp(h))"
    assert not as_form(Twisted() + RBFKernel()).closed


def test_no_more_than_a_tile_is_held(monkeypatch):
    """The largest tensor that a product and its gradient make has the size of a tile or of the inputs."""
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor))
            return out

    kernel, x, v = make("sum"), draw(1500, D).requires_grad_(), draw(1500, 2)
    with Watch():
        (LazyKernel(kernel, x) @ v).sum().backward()
    assert max(sizes) <= max(2 * 64 * 64 * 2, 1500 * (D + 2))


def test_a_product_reads_the_kernel_as_it_is_and_refuses_gradients_of_what_has_moved():
    kernel, x = make("rbf"), draw(20, D)
    K = LazyKernel(kernel, x)
    out = K @ torch.ones(20, dtype=F64)
    with torch.no_grad():
        kernel.raw_lengthscale += 1.0
    assert relative(K @ torch.ones(20, dtype=F64), dense(kernel, x, None).sum(-1)) < 1e-12
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_nothing_and_one_are_sizes_too():
    kernel = make("rbf")
    assert (LazyKernel(kernel, draw(0, D)) @ draw(0, 2)).shape == (0, 2)
    assert (LazyKernel(kernel, draw(3, D), draw(0, D)) @ draw(0)).tolist() == [0.0, 0.0, 0.0]
    assert gap((LazyKernel(kernel, draw(1, D)) @ draw(1)).detach(), draw(1)) < 1e-15


def test_what_has_no_lazy_form_is_refused_by_name():
    x = draw(5, D)
    with pytest.raises(errors.UnsupportedError, match="MultitaskKernel is not supported: it has outputs that share"):
        LazyKernel(gpytorch.kernels.MultitaskKernel(RBFKernel(), num_tasks=2), x)
    with pytest.raises(errors.UnsupportedError, match=r"RBFKernel has batch shape \(3,\)"):
        LazyKernel(RBFKernel(batch_shape=torch.Size([3])), x)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: LazyKernel(RBFKernel(), x[0]), r"x must be float32 or float64 \[n, D\], got torch.float64 \(4,\)"),
        (lambda x: LazyKernel(RBFKernel(), x, x[:, :2]), "x and z must agree in columns"),
        (lambda x: LazyKernel(RBFKernel(), x, x.float()), "x and z must agree"),
        (lambda x: LazyKernel(RBFKernel(), x, backend="magic"), '"auto", "chunked" or "keops", got \'magic\''),
        (lambda x: LazyKernel(RBFKernel(), x) @ x[:3], r"needs \[5\] or \[5, w\] there, got torch.float64 \(3, 4\)"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(errors.InputError, match=message):
        call(draw(5, D))


def test_what_cannot_fit_is_refused_before_it_is_tried():
    K = LazyKernel(RBFKernel(), torch.zeros(1, 1).expand(10**8, 1))
    with pytest.raises(errors.InputError, match="Columns of a kernel matrix would take .* GiB, and cpu has"):
        K.columns(torch.zeros(10**5, dtype=torch.int64))
    with pytest.raises(errors.InputError, match="Gram matrix of the columns would take"):
        K.gram(torch.ones(1))
