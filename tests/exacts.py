"""Small data of every kind of likelihood, and exact processes for them."""

import gpytorch
import torch
from families import CountLikelihood
from gpytorch.likelihoods import (
    BernoulliLikelihood,
    FixedNoiseGaussianLikelihood,
    MultitaskGaussianLikelihood,
    SoftmaxLikelihood,
)
from gpytorch.means import ConstantMean
from toys import F64, at, gaussian, matern, waves

from dualgp import ExactGP

N = 60


def mean(value: float = 0.7) -> ConstantMean:
    made = ConstantMean().double()
    made.constant.data = at(value).squeeze()
    return made


def problem(kind: str) -> tuple[torch.Tensor, torch.Tensor, gpytorch.likelihoods.Likelihood, int | None]:
    x, f, generator = waves(N, 2)
    noise = torch.randn(N, generator=generator, dtype=F64)
    if kind == "gaussian":
        return x, f + 0.3 * noise, gaussian(), None
    if kind == "fixed noise":
        return x, f + 0.3 * noise, FixedNoiseGaussianLikelihood(0.05 + 0.2 * x[:, 0].abs()), None
    if kind == "bernoulli":
        return x, (f + 0.5 * noise > 0).double(), BernoulliLikelihood(), None
    if kind == "counts":
        counts = torch.poisson(torch.nn.functional.softplus(f), generator=generator)
        return x, counts, CountLikelihood().double(), None
    if kind == "softmax":
        labels = (f + 0.5 * noise > -0.5).long() + (f + 0.5 * noise > 0.7).long()
        return x, labels, SoftmaxLikelihood(num_classes=3, mixing_weights=False), 3
    y = torch.stack([f + 0.2 * noise, -f + 0.3 * noise.flip(0)], -1)
    return x, y, MultitaskGaussianLikelihood(num_tasks=2, rank=0).double(), 2


def model(likelihood, outputs=None, **options) -> ExactGP:
    options = {"rank": N, "tol": 1e-11, **options}
    return ExactGP(matern(), likelihood, mean=mean(), num_outputs=outputs, **options)
