"""Small networks, their Jacobian by jacrev, and the engine in small blocks."""

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from dualgp.kernels import NetworkJacobian


def mlp(inputs: int = 2, width: int = 4, outputs: int = 3, *, seed: int = 0, dtype: torch.dtype = torch.float64):
    """A tanh network with random weights."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, outputs)).to(dtype)


def jacobian(net: nn.Module, x: Tensor) -> Tensor:
    """J [n, C, P], dense and obvious."""
    params = {name: p.detach() for name, p in net.named_parameters()}

    def f(params: dict[str, Tensor], one: Tensor) -> Tensor:
        return functional_call(net, params, (one.unsqueeze(0),)).squeeze(0)

    parts = vmap(jacrev(f), (None, 0))(params, x)
    return torch.cat([p.flatten(2) for p in parts.values()], -1).detach()


def engine(net: nn.Module, x: Tensor) -> NetworkJacobian:
    """A Jacobian that takes three rows at a time, so that no test passes on whole batches alone."""
    found = NetworkJacobian(net, x[:2])
    found.budget = 3 * found.row_bytes
    return found
