"""A small classifier and a small regressor with their data, and what laws compare: dense Laplace in weight space."""

import math

import gpytorch
import torch
from gpytorch.likelihoods import SoftmaxLikelihood
from jacobians import jacobian, mlp
from torch import Tensor, nn

from dualgp import laplace_sites

F64 = torch.float64
TAU = 0.7
SOFTMAX = SoftmaxLikelihood(num_classes=3, mixing_weights=False)


def inputs(n: int, seed: int = 1, d: int = 2) -> Tensor:
    return 3 * torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=F64)


def gaussian(noise: float = 0.09) -> gpytorch.likelihoods.GaussianLikelihood:
    likelihood = gpytorch.likelihoods.GaussianLikelihood().double()
    likelihood.noise = torch.tensor(noise, dtype=F64)
    return likelihood


X, X_NEW, TEST = inputs(30), inputs(9, 5), inputs(7, 2)
Y, Y_NEW, Y_TEST = (torch.arange(n) % 3 for n in (30, 9, 7))
NET = mlp()  # P = 27
TARGETS, TARGETS_TEST = X.sin().sum(-1), TEST.sin().sum(-1)
REGRESSOR = mlp(outputs=1)


def gap(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max())


def theta(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def ggn(net: nn.Module, likelihood, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """G = Σ JᵢᵀBᵢJᵢ and Jᵀα, dense."""
    J, f = jacobian(net, x), net(x).detach()
    sites = laplace_sites(likelihood, y, f)
    B = sites.beta if sites.coupled else torch.diag_embed(sites.beta)
    return torch.einsum("ncp,ncd,ndq->pq", J, B, J), torch.einsum("ncp,nc->p", J, sites.alpha(f))


def log_lik(net: nn.Module, likelihood, x: Tensor, y: Tensor) -> float:
    f = net(x).detach()
    if isinstance(likelihood, SoftmaxLikelihood):
        return -float(nn.functional.cross_entropy(f, y, reduction="sum"))
    return float(torch.distributions.Normal(f.squeeze(-1), likelihood.noise.detach().sqrt()).log_prob(y).sum())


def evidence(net: nn.Module, likelihood, x: Tensor, y: Tensor, tau: float) -> float:
    """Laplace at θ*: log p(y|θ*) + log N(θ* | 0, 1/τ) + ½P log 2π − ½ log|G + τI|."""
    G, t = ggn(net, likelihood, x, y)[0], theta(net)
    P = len(t)
    prior = 0.5 * P * math.log(tau / (2 * math.pi)) - 0.5 * tau * t @ t
    gauss = 0.5 * P * math.log(2 * math.pi) - 0.5 * torch.logdet(G + tau * torch.eye(P, dtype=F64))
    return log_lik(net, likelihood, x, y) + float(prior + gauss)


def trained(net: nn.Module, likelihood, x: Tensor, y: Tensor, tau: float, steps: int = 60) -> nn.Module:
    """The maximum of Σ log p − τ|θ|²/2, by L-BFGS."""
    opt = torch.optim.LBFGS(
        net.parameters(), max_iter=100, tolerance_grad=1e-10, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        opt.zero_grad()
        f = net(x)
        if isinstance(likelihood, SoftmaxLikelihood):
            loss = nn.functional.cross_entropy(f, y, reduction="sum")
        else:
            loss = (f.squeeze(-1) - y).square().sum() / (2 * likelihood.noise.detach())
        loss = loss + 0.5 * tau * sum(p.square().sum() for p in net.parameters())
        loss.backward()
        return loss

    for _ in range(steps):
        opt.step(closure)
        if max(float(p.grad.abs().max()) for p in net.parameters()) < 1e-7:
            break
    return net


WIDE = mlp(width=64)  # P = 387, of which the outputs at 6 inputs see 18 directions
X_FEW, Y_FEW = X[:6], Y[:6]


class LowRank(nn.Module):
    """A linear layer that stays, and a product of rank r beside it that is trained: f(x) = Wx + b + BAx."""

    def __init__(self, base: nn.Linear, rank: int = 2, *, modules: bool = True) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        A, B = 0.5 * inputs(rank, 5, base.in_features), 0.5 * inputs(base.out_features, 6, rank)
        self.modules_of_its_own = modules
        if modules:  # as peft has them
            self.lora_A = nn.Linear(base.in_features, rank, bias=False, dtype=F64)
            self.lora_B = nn.Linear(rank, base.out_features, bias=False, dtype=F64)
            self.lora_A.weight.data, self.lora_B.weight.data = A, B
        else:
            self.lora_A, self.lora_B = nn.Parameter(A), nn.Parameter(B)

    def forward(self, x: Tensor) -> Tensor:
        if self.modules_of_its_own:
            return self.base(x) + self.lora_B(self.lora_A(x))
        return self.base(x) + x @ self.lora_A.T @ self.lora_B.T


def adapted(*, modules: bool = True) -> nn.Sequential:
    """NET with an adapter of rank 2 beside each of its layers."""
    net = mlp()
    return nn.Sequential(LowRank(net[0], modules=modules), nn.Tanh(), LowRank(net[2], modules=modules))
