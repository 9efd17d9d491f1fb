"""One small problem for every kind of likelihood and output that `DualGP` promises, fitted once per session."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import gpytorch
import torch
from gpytorch.kernels import RBFKernel, ScaleKernel
from gpytorch.likelihoods import (
    BernoulliLikelihood,
    BetaLikelihood,
    FixedNoiseGaussianLikelihood,
    GaussianLikelihood,
    LaplaceLikelihood,
    MultitaskGaussianLikelihood,
    SoftmaxLikelihood,
    StudentTLikelihood,
)
from gpytorch.likelihoods.likelihood import _OneDimensionalLikelihood
from torch import Tensor
from torch.distributions import NegativeBinomial, StudentT
from toys import F64, waves

from dualgp import DualGP, FitResult, likelihoods

N, M = 60, 8


class CountLikelihood(_OneDimensionalLikelihood):
    """A likelihood that neither GPyTorch nor dualgp knows, with a parameter to learn: overdispersed counts."""

    def __init__(self) -> None:
        super().__init__()
        self.register_parameter("log_count", torch.nn.Parameter(torch.tensor(1.0)))

    def forward(self, f: Tensor) -> NegativeBinomial:
        return NegativeBinomial(total_count=self.log_count.exp().expand(f.shape), logits=f)


class Problem(NamedTuple):
    x: Tensor
    y: Tensor
    gp: DualGP
    params: dict[str, Tensor]


def kernel(*batch: int) -> ScaleKernel:
    shape = torch.Size(batch)
    return ScaleKernel(RBFKernel(batch_shape=shape), batch_shape=shape).double()


def softmax() -> SoftmaxLikelihood:
    return SoftmaxLikelihood(num_classes=3, mixing_weights=False)


def _latent() -> tuple[Tensor, Tensor, Tensor]:
    x, f, generator = waves(N, 1, seed=3)
    return x, f, torch.randn(N, generator=generator, dtype=F64)


def _problem(likelihood, target: Callable[[Tensor, Tensor, Tensor], Tensor], prior=None, **params: Tensor) -> Problem:
    x, f, noise = _latent()
    torch.manual_seed(4)  # for the discrete draws
    gp = DualGP(prior or kernel(), likelihood.double(), num_inducing=M)
    return Problem(x, target(x, f, noise), gp, params)


def _batch_of_gps() -> Problem:
    x, f, noise = _latent()
    y = torch.stack([f + 0.2 * noise, 2 * f.cos() + 0.3 * noise.flip(0)])
    return Problem(torch.stack([x, x + 0.1]), y, DualGP(kernel(2), GaussianLikelihood().double(), num_inducing=M), {})


def _noise_variance() -> Tensor:
    return 0.05 + 0.3 * _latent()[0][:, 0].abs()


FAMILIES: dict[str, Callable[[], Problem]] = {
    "gaussian": lambda: _problem(GaussianLikelihood(), lambda x, f, e: f + 0.2 * e),
    "fixed noise": lambda: _problem(
        FixedNoiseGaussianLikelihood(_noise_variance()),
        lambda x, f, e: f + _noise_variance().sqrt() * e,
        noise=_noise_variance(),
    ),
    "student-t": lambda: _problem(
        StudentTLikelihood(), lambda x, f, e: f + 0.2 * StudentT(torch.tensor(3.0, dtype=F64)).sample((N,))
    ),
    "probit": lambda: _problem(BernoulliLikelihood(), lambda x, f, e: (f + 0.5 * e > 0).double()),
    "logit": lambda: _problem(likelihoods.LogitBernoulliLikelihood(), lambda x, f, e: (f + 0.5 * e > 0).double()),
    "poisson": lambda: _problem(
        gpytorch.likelihoods.PoissonLikelihood(), lambda x, f, e: torch.poisson(torch.nn.functional.softplus(2 + 2 * f))
    ),
    "log poisson": lambda: _problem(likelihoods.LogPoissonLikelihood(), lambda x, f, e: torch.poisson(f.exp())),
    "softmax": lambda: _problem(softmax(), _classes),
    "softmax, kernel per class": lambda: _problem(softmax(), _classes, kernel(3)),
    "multitask": lambda: _problem(MultitaskGaussianLikelihood(num_tasks=2), _pair),
    "multitask, kernel per output": lambda: _problem(MultitaskGaussianLikelihood(num_tasks=2), _pair, kernel(2)),
    "batch of GPs": _batch_of_gps,
    "custom counts": lambda: _problem(CountLikelihood(), lambda x, f, e: NegativeBinomial(4.0, logits=f).sample()),
    "beta": lambda: _problem(BetaLikelihood(), lambda x, f, e: torch.special.expit(f + 0.3 * e)),
    "laplace": lambda: _problem(LaplaceLikelihood(), lambda x, f, e: f + 0.2 * e),
}


def _classes(x: Tensor, f: Tensor, e: Tensor) -> Tensor:
    noisy = f + 0.6 * e
    return (noisy > -0.5).long() + (noisy > 0.7).long()


def _pair(x: Tensor, f: Tensor, e: Tensor) -> Tensor:
    return torch.stack([f + 0.2 * e, -f + 0.3 * e.flip(0)], -1)


@functools.cache
def fitted(name: str) -> tuple[Problem, FitResult]:
    """The problem after `fit`; shared, so copy before changing it."""
    problem = FAMILIES[name]()
    return problem, problem.gp.fit(problem.x, problem.y, progress=False)
