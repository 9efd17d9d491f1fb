"""Linear and softmax models solved to rounding, and the digits in three tasks: what transfer is tested on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from gpytorch.likelihoods import SoftmaxLikelihood
from leaning import digits
from sklearn.datasets import load_breast_cancer, load_digits
from torch import Tensor, nn

from dualgp import WeightLayout, WeightPosterior
from dualgp.sites import add_precisions, apply_precision
from dualgp.transfer.curvature import network_curvature

F64 = torch.float64
Client = tuple[Tensor, Tensor]


def flat(size: int) -> WeightLayout:
    return WeightLayout({"w": torch.Size([size])})


def prior_of(size: int, delta: float = 1.0) -> WeightPosterior:
    return WeightPosterior(flat(size), prior_precision=torch.tensor(delta, dtype=F64))


def ridge(X: Tensor, y: Tensor, base: WeightPosterior) -> tuple[Tensor, Tensor]:
    """The minimiser of ½|y − Xθ|² + ½(θ − θ₀)ᵀS₀(θ − θ₀), and XᵀX."""
    H = X.T @ X
    S = add_precisions(base.precision, H)
    return torch.linalg.solve(S, X.T @ y + apply_precision(base.precision, base.mean)), H


def logistic(X: Tensor, y: Tensor, base: WeightPosterior) -> tuple[Tensor, Tensor]:
    """The minimiser of −Σ log p(y|σ(Xθ)) + ½(θ − θ₀)ᵀS₀(θ − θ₀), and the Hessian of the sum."""
    theta = weighted_logistic([(X, y, 1.0)], base)
    p = (X @ theta).sigmoid()
    return theta, (X.T * (p * (1 - p))) @ X


class Softmax(NamedTuple):
    """A linear softmax model with bias, its loss, gradient and Hessian in closed form; θ is flat [10, 65]."""

    X: Tensor  # with a column of ones
    y: Tensor

    def log_p(self, theta: Tensor) -> Tensor:
        return (self.X @ theta.view(10, -1).T).log_softmax(-1)

    def loss(self, theta: Tensor) -> Tensor:
        return -self.log_p(theta).gather(-1, self.y.unsqueeze(-1)).sum()

    def gradient(self, theta: Tensor) -> Tensor:
        e = self.log_p(theta).exp() - nn.functional.one_hot(self.y, 10)
        return (e.T @ self.X).flatten()

    def hessian(self, theta: Tensor) -> Tensor:
        p = self.log_p(theta).exp()
        H = torch.zeros(10, 65, 10, 65, dtype=F64)
        for c in range(10):
            for d in range(c, 10):
                block = (self.X.T * (p[:, c] * (float(c == d) - p[:, d]))) @ self.X
                H[c, :, d] = block
                H[d, :, c] = block
        return H.view(650, 650)

    def fit(self, base: WeightPosterior, steps: int = 100) -> Tensor:
        """The minimiser of loss + ½(θ − θ₀)ᵀS₀(θ − θ₀), by Newton's method with halved steps, to |g| < 1e-9."""
        theta, S0 = base.mean.clone(), base.precision

        def objective(t: Tensor) -> Tensor:
            gap = t - base.mean
            return self.loss(t) + 0.5 * gap @ apply_precision(S0, gap)

        for _ in range(steps):
            g = self.gradient(theta) + apply_precision(S0, theta - base.mean)
            if g.norm() < 1e-9:
                break
            step = torch.linalg.solve(add_precisions(S0, self.hessian(theta)), g)
            scale, now = 1.0, objective(theta)
            while objective(theta - scale * step) > now + 1e-9 and scale > 1e-4:
                scale /= 2
            theta = theta - scale * step
        return theta

    def accuracy(self, theta: Tensor) -> float:
        return float((self.log_p(theta).argmax(-1) == self.y).double().mean())

    def nll(self, theta: Tensor) -> float:
        return float(self.loss(theta)) / len(self.y)


class DigitTasks(NamedTuple):
    train: Softmax
    test: Softmax
    base_data: Softmax
    tasks: list[Softmax]


def digit_tasks() -> DigitTasks:
    """Digits with a bias column: 1200 to train and 597 to test, a base of the first 200, the rest in three tasks."""
    X, y, _ = digits()
    X = torch.cat([X, torch.ones(len(X), 1, dtype=F64)], 1)
    train, test = Softmax(X[:1200], y[:1200]), Softmax(X[1200:], y[1200:])
    base, rest = Softmax(X[:200], y[:200]), Softmax(X[200:1200], y[200:1200])
    groups = [(0, 3), (4, 6), (7, 9)]
    tasks = [Softmax(*(t[(rest.y >= a) & (rest.y <= b)] for t in rest)) for a, b in groups]
    return DigitTasks(train, test, base, tasks)


def as_network(theta: Tensor) -> nn.Linear:
    """The softmax model as a network with the weights [10, 65] and no bias of its own."""
    net = nn.Linear(65, 10, bias=False).double()
    with torch.no_grad():
        net.weight.copy_(theta.view(10, 65))
    return net


def softmax_likelihood() -> SoftmaxLikelihood:
    return SoftmaxLikelihood(num_classes=10, mixing_weights=False)


def curvature_of(data: Softmax, theta: Tensor, structure: str) -> Tensor:
    return network_curvature(as_network(theta), data.X, data.y, softmax_likelihood(), structure)


class Objective(nn.Module):
    """A loss as the output of a module, so that its weights can be given by `functional_call`."""

    def __init__(self, network: nn.Module, loss: Callable[[nn.Module], Tensor]) -> None:
        super().__init__()
        self.network, self.loss = network, loss

    def forward(self) -> Tensor:
        return self.loss(self.network)


def minimise(network: nn.Module, loss: Callable[[nn.Module], Tensor], steps: int = 50) -> nn.Module:
    """A copy of the network at the minimum of a convex loss, by Newton's method with halved steps, to |g| < 1e-8."""
    network = copy.deepcopy(network)
    layout, objective = WeightLayout.of(network), Objective(network, loss)

    def value(theta: Tensor) -> Tensor:
        given = {f"network.{name}": w for name, w in layout.split(theta).items()}
        return torch.func.functional_call(objective, given, ())

    theta = layout.join(network.state_dict())
    for _ in range(steps):
        g = torch.func.grad(value)(theta)
        if g.norm() < 1e-8:
            break
        step, scale, now = torch.linalg.solve(torch.func.hessian(value)(theta), g), 1.0, value(theta)
        while value(theta - scale * step) > now + 1e-9 and scale > 1e-4:
            scale /= 2
        theta = theta - scale * step
    network.load_state_dict(layout.split(theta))
    return network


def gradient(network: nn.Module, loss: Callable[[nn.Module], Tensor]) -> Tensor:
    grads = torch.autograd.grad(loss(network), list(network.parameters()))
    return torch.cat([g.flatten() for g in grads])


def odd_even(seed: int) -> tuple[list[tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]:
    """Digits with a bias column, labelled odd or even, shuffled: 1200 to train in pairs 01, 23, …, 597 to test."""
    X, y = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(X))
    X = torch.from_numpy(np.c_[X / 16.0, np.ones(len(X))][order])
    y = torch.from_numpy(y[order])
    label = (y % 2).double().unsqueeze(-1)
    tasks = [(y[:1200] // 2 == t).nonzero().flatten() for t in range(5)]
    return [(X[rows], label[rows]) for rows in tasks], (X[1200:], label[1200:])


def weighted_logistic(parts: list[tuple[Tensor, Tensor, Tensor | float]], q: WeightPosterior) -> Tensor:
    """The minimiser of Σ over parts (X, soft labels, weights) of weighted cross-entropies, plus −log q, by Newton."""
    X = torch.cat([x for x, *_ in parts])
    target = torch.cat([t.flatten() for _, t, _ in parts])
    weight = torch.cat([torch.as_tensor(w, dtype=F64).expand(len(x)) for x, _, w in parts])
    theta = q.mean.clone()

    def loss(theta: Tensor) -> Tensor:
        f, gap = X @ theta, theta - q.mean
        return weight @ (nn.functional.softplus(f) - target * f) + 0.5 * gap @ apply_precision(q.precision, gap)

    for _ in range(100):
        p = (X @ theta).sigmoid()
        g = X.T @ (weight * (p - target)) + apply_precision(q.precision, theta - q.mean)
        H = add_precisions((X.T * (weight * p * (1 - p))) @ X, q.precision)
        step, scale, now = torch.linalg.solve(H, g), 1.0, loss(theta)
        while loss(theta - scale * step) > now + 1e-9 and scale > 1e-4:
            scale /= 2
        theta = theta - scale * step
        if step.norm() < 1e-14 * theta.norm():
            break
    return theta


def clients() -> list[Client]:
    """Breast cancer, ten features and a bias, sorted by radius into five: the classes are 98 % to 1 % benign."""
    X, y = load_breast_cancer(return_X_y=True)
    X = X[:, :10]
    X = np.c_[(X - X.mean(0)) / X.std(0), np.ones(len(X))]
    order = np.argsort(X[:, 0])
    rows = np.array_split(order, 5)
    return [(torch.from_numpy(X[r]), torch.from_numpy(y[r]).double()) for r in rows]


def joint(parts: list[Client]) -> tuple[Tensor, Tensor]:
    X, y = (torch.cat(t) for t in zip(*parts, strict=True))
    return logistic(X, y, prior_of(X.shape[1]))
