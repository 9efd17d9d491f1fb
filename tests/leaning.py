"""Posteriors to remove data from: linear models and networks at their optimum, and a slow obvious reference."""

import numpy as np
import torch
from gpytorch.kernels import LinearKernel
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits
from torch import Tensor, nn

from dualgp import InducingBasis, Posterior, Site, Sites
from dualgp.jacobian import JacobianBasis
from dualgp.kernels import NetworkJacobian

F64 = torch.float64


def linear(features: int, delta: float) -> Posterior:
    """The prior of f(x) = θᵀx, θ ~ N(0, I/δ): inducing inputs at the unit vectors make φ(x) = x/√δ exactly."""
    kernel = LinearKernel().double()
    kernel.variance = torch.tensor(1.0 / delta, dtype=F64)
    return Posterior(InducingBasis(kernel, torch.eye(features, dtype=F64), jitter=0.0))


def ridge(X: Tensor, y: Tensor, delta: float) -> tuple[Posterior, Sites]:
    """½|y − Xθ|² + ½δ|θ|²."""
    sites = Sites(y, torch.ones_like(y))
    return linear(X.shape[1], delta).add(X, sites), sites


def at_optimum(net: nn.Module, X: Tensor, sites: Sites, delta: float) -> Posterior:
    """The linearised Laplace posterior of a network, centred at the network itself: λ = 0."""
    prior = Posterior(JacobianBasis.of_weights(NetworkJacobian(net, X[:2]), delta))
    site = prior.project(X, sites)
    return Posterior(prior.basis, Site(torch.zeros_like(site.lam), site.B))


def standardised(X: np.ndarray) -> np.ndarray:
    """Columns of mean 0 and population sd 1, and a column of ones."""
    return np.c_[(X - X.mean(0)) / X.std(0), np.ones(len(X))]


def diabetes() -> tuple[Tensor, Tensor]:
    X, y = load_diabetes(return_X_y=True, scaled=False)
    return torch.from_numpy(standardised(X)), torch.from_numpy((y - y.mean()) / y.std())


def breast_cancer() -> tuple[Tensor, Tensor]:
    X, y = load_breast_cancer(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(X))
    return torch.from_numpy(standardised(X)[order]), torch.from_numpy(y[order]).double()


def digits() -> tuple[Tensor, Tensor, np.random.Generator]:
    """Pixels in [0, 1], labels, and the generator that has shuffled them."""
    X, y = load_digits(return_X_y=True)
    rng = np.random.default_rng(0)
    order = rng.permutation(len(X))
    return torch.from_numpy(X[order] / 16.0), torch.from_numpy(y[order]), rng


def correlation(a: Tensor, b: Tensor) -> float:
    return float(np.corrcoef(a.flatten(), b.flatten())[0, 1])


def relative(a: Tensor, b: Tensor) -> float:
    """|a − b| / |b|."""
    return float((a - b).norm() / b.norm())
