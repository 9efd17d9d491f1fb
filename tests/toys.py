"""Small problems and shorthands that many tests share."""

import contextlib
from collections.abc import Iterator

import gpytorch
import jaxtyping
import numpy as np
import torch
from gpytorch.kernels import MaternKernel, RBFKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood
from torch import Tensor

from dualgp.basis import InducingBasis
from dualgp.gp.data import Data
from dualgp.gp.estep import EStep, Source, e_step
from dualgp.gp.hyper import Hyper
from dualgp.likelihoods import LogPoissonLikelihood
from dualgp.sites import Sites

F64 = torch.float64
BANANA_Z = [0, 250, 233, 31, 231, 339, 11, 81, 96, 181, 282, 56, 309, 137, 164, 394, 165, 116, 285, 153]
BANANA_Z += [131, 139, 367, 283, 161]


def scaled(base: gpytorch.kernels.Kernel, lengthscale: float | Tensor, variance: float | Tensor) -> ScaleKernel:
    kernel = ScaleKernel(base, batch_shape=base.batch_shape).double()
    kernel.outputscale = torch.as_tensor(variance, dtype=F64)
    kernel.base_kernel.lengthscale = torch.as_tensor(lengthscale, dtype=F64)
    return kernel


def rbf(lengthscale: float | Tensor = 0.5, variance: float | Tensor = 1.3, **options) -> ScaleKernel:
    return scaled(RBFKernel(**options), lengthscale, variance)


def matern(
    lengthscale: float | Tensor = 0.8, variance: float | Tensor = 2.0, nu: float = 2.5, **options
) -> ScaleKernel:
    return scaled(MaternKernel(nu=nu, **options), lengthscale, variance)


def gaussian(noise: float = 0.09) -> GaussianLikelihood:
    likelihood = GaussianLikelihood(noise_constraint=gpytorch.constraints.GreaterThan(1e-6)).double()
    likelihood.noise = torch.tensor(noise, dtype=F64)  # a Python float would be rounded to float32 on its way
    return likelihood


def line(low: float, high: float, n: int) -> Tensor:
    return torch.linspace(low, high, n, dtype=F64).unsqueeze(-1)


def sines() -> tuple[Tensor, Tensor]:
    """The regression problem of A1: 50 points, y = sin 3x + .3 cos 9x."""
    x = line(-2, 2, 50)
    return x, ((3 * x).sin() + 0.3 * (9 * x).cos()).squeeze(-1)


def waves(n: int = 60, d: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, torch.Generator]:
    """Random inputs [n, d], a smooth latent function there [n], and the generator to draw noise with."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, d, generator=generator, dtype=F64) * 3 - 1.5
    return x, (2 * x).sin().sum(-1) + 0.5 * x[:, 0], generator


def solve(basis: InducingBasis, likelihood, x: Tensor, y: Tensor, multi: bool = False, **options) -> EStep:
    """The E-step to convergence."""
    return e_step(Source(basis, Data(x, y, multi)), likelihood, **options)


def hyper(kernel, likelihood, Z: Tensor, mean=None, *, dtype=F64, num_outputs=None, jitter=None, **options) -> Hyper:
    return Hyper(kernel, mean, likelihood, Z, dtype=dtype, num_outputs=num_outputs, jitter=jitter, **options)


def random_sites(*shape: int, seed: int = 0, multi: bool = False) -> Sites:
    """Sites that no E-step has seen, β > 0."""
    g = torch.Generator().manual_seed(seed)
    return Sites(torch.randn(*shape, generator=g, dtype=F64), 0.2 + torch.rand(*shape, generator=g, dtype=F64), multi)


def put(tensor: torch.Tensor, index, value) -> torch.Tensor:
    """A copy with some values replaced."""
    tensor = tensor.clone()
    tensor[index] = value
    return tensor


def at(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)


def gap(a: Tensor | float | np.ndarray, b: Tensor | float | np.ndarray | list) -> float:
    """Largest absolute difference."""
    return (torch.as_tensor(a, dtype=F64) - torch.as_tensor(b, dtype=F64)).abs().max().item()


def same_bits(a: object, b: object) -> bool:
    """Whether two values, nested or not, are equal to the last bit: NaN is NaN."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.dtype != b.dtype or a.shape != b.shape:
            return False
        both = (t.detach().cpu().flatten().clone(memory_format=torch.contiguous_format) for t in (a, b))
        return torch.equal(*(t.view(torch.uint8) if t.numel() else t for t in both))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same_bits(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(same_bits(s, t) for s, t in zip(a, b, strict=True))
    return a == b or (a != a and b != b)


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """Without the type checks that only tests have: what a user meets."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)


class Exposed(LogPoissonLikelihood):
    """Counts of rate exposure · e^f."""

    def forward(self, function_samples, *args, exposure=1.0, **kwargs):
        return torch.distributions.Poisson(exposure * function_samples.exp())
