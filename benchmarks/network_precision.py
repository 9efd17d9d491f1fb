"""What a cut of small eigenvalues costs in function space: standard deviations beside those of all weights, exact.

A network of one input, in float32, on data with a gap: the eigenvalues of its kernel fall by a decade a direction.
Claim: cut at what network_gp takes (1e-11), Z = X gives the exact standard deviations to 3e-3 at any prior precision;
cut at what products in float32 tell (1e-6), they are too large by a multiple.

    OMP_NUM_THREADS=1 python benchmarks/network_precision.py
"""

from __future__ import annotations

import copy

import torch
from gpytorch.likelihoods import GaussianLikelihood
from peers import SMOKE, table
from torch import Tensor, nn

from dualgp import JacobianBasis, NetworkPosterior, Posterior, laplace_sites, network_gp
from dualgp.kernels import NetworkJacobian

NOISE = 0.01
TOLERANCES = (1.2e-6, 1e-9, 1e-11)  # what products in float32 tell, and what network_gp takes


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([torch.linspace(-3, -1, 60), torch.linspace(1, 3, 60)]).double().unsqueeze(-1)
    noise = NOISE**0.5 * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    return x, (2 * x).sin() + 0.3 * x + noise


def trained(x: Tensor, y: Tensor) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)).double()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2, weight_decay=1e-4)
    for _ in range(20 if SMOKE else 1000):
        optimizer.zero_grad()
        nn.functional.mse_loss(net(x), y).backward()
        optimizer.step()
    return net


def sd(q: Posterior | NetworkPosterior, x: Tensor) -> Tensor:
    return q.predict(x.to(q.basis.dtype))[1].double().sqrt()


def main() -> None:
    x, y = data()
    net, likelihood = trained(x, y), GaussianLikelihood()
    likelihood.noise = NOISE
    places = {"at the data": x, "in the gap": torch.linspace(-0.9, 0.9, 50).double().unsqueeze(-1)}
    single = NetworkJacobian(copy.deepcopy(net).float(), x.float())
    sites = laplace_sites(likelihood.float(), y.float(), single(x.float()))
    rows = []
    for tau in (1e-4, 1e-2, 1.0):
        exact = network_gp(net, (x, y), likelihood.double(), prior_precision=tau, structure="dense")
        for M in (30, 60, 120):
            Z = x[:: len(x) // M].float()
            for tol in TOLERANCES:
                q = Posterior(JacobianBasis.at_inputs(single, Z, tau, rank_tol=tol)).add(x.float(), sites)
                worst = [float((sd(q, at) / sd(exact, at) - 1).abs().max()) for at in places.values()]
                rows.append([f"{tau:g}", str(M), f"{tol:g}", str(q.basis.size), *(f"{value:.1e}" for value in worst)])
    title = "greatest relative error of the standard deviation, float32 beside exact (dense, float64)"
    table(title, ["τ", "M", "cut below", "rank", *places], rows)


if __name__ == "__main__":
    main()
