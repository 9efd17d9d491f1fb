"""The Jacobian engine, dense and obvious, by jacrev; and small trained-like networks. Imports nothing of dualgp."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap


@dataclass(frozen=True, eq=False)
class DenseRows:
    f: Tensor  # [n, C]
    J: Tensor  # [n, C, P]

    def dense(self) -> Tensor:
        return self.J

    def matmul(self, U: Tensor) -> Tensor:
        return self.J @ U

    def diag(self) -> Tensor:
        return self.J @ self.J.mT

    def gram(self, other: "DenseRows") -> Tensor:
        return torch.einsum("ncp,mdp->ncmd", self.J, other.J)

    def gram_independent(self, other: "DenseRows") -> Tensor:
        return torch.einsum("ncp,mcp->cnm", self.J, other.J)


class DenseJacobian:
    """Chunks of three data unless told, so that no test passes on whole batches alone."""

    def __init__(self, net: nn.Module, example: Tensor, scales: Tensor | None = None, chunk: int = 3) -> None:
        self.net, self.example, self.chunk = net, example, chunk
        self.params = {name: p.detach() for name, p in net.named_parameters()}
        self.shapes = [p.shape for p in self.params.values()]
        self.sizes = torch.tensor([p.numel() for p in self.params.values()])
        self.num_params = int(self.sizes.sum())
        self.num_outputs = int(net(example).shape[-1])
        self.input_shape = example.shape[1:]
        self.dtype, self.device = next(iter(self.params.values())).dtype, torch.device("cpu")
        self.scales = torch.ones(len(self.sizes)) if scales is None else scales

    def __call__(self, x: Tensor) -> Tensor:
        return self.net(x).detach()

    def block(self, x: Tensor) -> DenseRows:
        def f(params: dict[str, Tensor], one: Tensor) -> Tensor:
            return functional_call(self.net, params, (one.unsqueeze(0),)).squeeze(0)

        parts = vmap(jacrev(f), (None, 0))(self.params, x)
        J = torch.cat([p.flatten(2) for p in parts.values()], -1).detach()  # [n, C, P]
        return DenseRows(self(x), J * self.scales.repeat_interleave(self.sizes).to(J))

    def blocks(self, x: Tensor) -> Iterator[tuple[slice, DenseRows]]:
        for start in range(0, len(x), self.chunk):
            rows = slice(start, min(start + self.chunk, len(x)))
            yield rows, self.block(x[rows])

    def scaled(self, scales: Tensor) -> "DenseJacobian":
        return DenseJacobian(self.net, self.example, self.scales * scales, self.chunk)


def mlp(inputs: int = 2, width: int = 4, outputs: int = 3, *, seed: int = 0, dtype: torch.dtype = torch.float64):
    """A tanh network with random weights."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, outputs)).to(dtype)


def dense_of(net: nn.Module, inputs: int = 2) -> DenseJacobian:
    dtype = next(net.parameters()).dtype
    return DenseJacobian(net, torch.zeros(1, inputs, dtype=dtype))
