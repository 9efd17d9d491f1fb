"""Networks of every kind of layer, at values that are not those of a new network, and their Jacobian by autograd."""

import copy
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toys import F64


class Wired(nn.Module):
    """A network given as parts and a function of them."""

    def __init__(self, forward: Callable, **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self._function = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._function(self, x)


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(0, 9, shape, generator=torch.Generator().manual_seed(seed))


def mlp(activation: Callable[[], nn.Module] = nn.Tanh, out: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), activation(), nn.Linear(6, 5), activation(), nn.Linear(5, out))


def cnn() -> nn.Module:
    layers = [nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(4, 5, 2, bias=False), nn.BatchNorm2d(5), nn.SiLU(), nn.Flatten(), nn.Linear(20, 3)]
    return nn.Sequential(*layers)


def odd_convolutions() -> nn.Module:
    layers = [nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2), nn.ReLU(inplace=True)]
    layers += [nn.Conv2d(4, 4, 3, padding="same", padding_mode="circular"), nn.GroupNorm(2, 4), nn.Tanh()]
    layers += [nn.Conv2d(4, 4, 3, groups=4, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)]
    return nn.Sequential(*layers)


def pools(dim: int) -> nn.Module:
    conv, norm = {1: (nn.Conv1d, nn.InstanceNorm1d), 3: (nn.Conv3d, nn.InstanceNorm3d)}[dim]
    head = nn.Sequential(nn.Flatten(2), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(3, 2))
    return nn.Sequential(conv(2, 3, 2, padding=1), norm(3, affine=True), nn.Tanh(), conv(3, 3, 2, stride=2), head)


def transformer(batch_first: bool) -> nn.Module:
    def forward(self, x):
        h = self.embed(x) + self.positions
        h = self.body(h) if batch_first else self.body(h.transpose(0, 1)).transpose(0, 1)
        return self.head(self.norm(h).mean(1))

    body = nn.TransformerEncoderLayer(6, 2, 10, dropout=0.3, batch_first=batch_first)
    parts = {"embed": nn.Embedding(9, 6, padding_idx=2), "body": body, "positions": nn.Parameter(torch.randn(4, 6))}
    return Wired(forward, **parts, norm=nn.RMSNorm(6), head=nn.Linear(6, 3))


def tied_linears() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    net[2].weight = net[0].weight
    return net


def tied_embedding() -> nn.Module:
    net = Wired(lambda self, x: self.head(self.embed(x).tanh().mean(1)), embed=nn.Embedding(9, 5), head=nn.Linear(5, 9))
    net.head.weight = net.embed.weight
    return net


def frozen_in_part() -> nn.Module:
    net = mlp()
    net[0].weight.requires_grad_(False)
    net[4].bias.requires_grad_(False)
    return net


def loose_parameters() -> nn.Module:
    parts = {"gain": nn.Parameter(torch.tensor(1.3)), "matrix": nn.Parameter(torch.randn(3, 4))}
    body, unused = nn.Linear(4, 4), nn.Linear(2, 2)
    return Wired(
        lambda self, x: self.gain * F.linear(self.body(x).sin(), self.matrix), **parts, body=body, unused=unused
    )


def parametrised() -> nn.Module:
    first = nn.utils.parametrizations.weight_norm(nn.Linear(4, 5))
    return nn.Sequential(first, nn.Tanh(), nn.Linear(5, 2))


def folded() -> nn.Module:
    def forward(self, x):
        return self.b(self.a(x.reshape(-1, 2)).tanh().view(len(x), -1))

    return Wired(forward, a=nn.Linear(2, 3), b=nn.Linear(6, 2))


def recurrent() -> nn.Module:
    parts = {"a": nn.LSTM(3, 4, batch_first=True), "b": nn.Linear(4, 2)}
    return Wired(lambda self, x: self.b(self.a(x)[0][:, -1]), **parts)


class Doubled(nn.Linear):
    """Looks like a dense layer, and is another."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "tanh": (mlp, draw(6, 4)),
    "relu in place": (lambda: mlp(lambda: nn.ReLU(inplace=True)), draw(6, 4)),
    "gelu, one output": (lambda: mlp(nn.GELU, 1), draw(6, 4)),
    "outputs [n]": (lambda: nn.Sequential(mlp(nn.Softplus, 1), nn.Flatten(0)), draw(6, 4)),
    "outputs scaled": (lambda: Wired(lambda self, x: 2 * self.body(x), body=mlp()), draw(6, 4)),
    "cnn": (cnn, draw(5, 2, 6, 6)),
    "odd convolutions": (odd_convolutions, draw(4, 2, 6, 6)),
    "conv1d": (lambda: pools(1), draw(5, 2, 6)),
    "conv3d": (lambda: pools(3), draw(4, 2, 3, 3, 3)),
    "wide convolution": (lambda: nn.Sequential(nn.Conv1d(9, 2, 4), nn.Flatten(), nn.Linear(4, 2)), draw(5, 9, 5)),
    "transformer": (lambda: transformer(True), tokens(6, 4)),
    "transformer, sequence first": (lambda: transformer(False), tokens(6, 4)),
    "tied linears": (tied_linears, draw(6, 4)),
    "tied embedding": (tied_embedding, tokens(5, 3)),
    "few tokens": (
        lambda: nn.Sequential(nn.Embedding(50, 3), nn.Linear(3, 3), nn.Flatten(), nn.Linear(6, 2)),
        tokens(5, 2),
    ),
    "called twice": (
        lambda: Wired(lambda self, x: self.b(self.a(self.a(x).tanh()).tanh()), a=nn.Linear(4, 4), b=nn.Linear(4, 2)),
        draw(6, 4),
    ),
    "rows folded": (folded, draw(6, 4)),
    "transposed head": (
        lambda: Wired(lambda self, x: F.linear(self.a(x).tanh(), self.a.weight.mT), a=nn.Linear(4, 6)),
        draw(6, 4),
    ),
    "frozen in part": (frozen_in_part, draw(6, 4)),
    "loose parameters": (loose_parameters, draw(6, 4)),
    "parametrised": (parametrised, draw(6, 4)),
    "subclass": (lambda: nn.Sequential(Doubled(4, 4), nn.Tanh(), nn.Linear(4, 2)), draw(6, 4)),
    "bilinear": (lambda: Wired(lambda self, x: self.a(x, x).tanh(), a=nn.Bilinear(4, 4, 3)), draw(6, 4)),
    "recurrent": (recurrent, draw(5, 4, 3)),
}


def make(name: str) -> tuple[nn.Module, Tensor]:
    build, x = NETWORKS[name]
    net = build().double()
    for module in net.modules():  # statistics and gains that are not those of a new network
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
        if "Norm" in type(module).__name__ and getattr(module, "weight", None) is not None:
            nn.init.normal_(module.weight)
            if getattr(module, "bias", None) is not None:
                nn.init.normal_(module.bias)
    return net, x


def reference(net: nn.Module, x: Tensor, names: Sequence[str]) -> Tensor:
    """J [n, C, P], one backward pass of one row for each number of outputs."""
    net = copy.deepcopy(net).eval()
    parameters = [net.get_parameter(name).requires_grad_() for name in names]
    jac = []
    for row in x:
        f = net(row[None]).reshape(-1)
        for value in f:
            grads = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
            full = [torch.zeros_like(p) if g is None else g for g, p in zip(grads, parameters, strict=True)]
            jac.append(torch.cat([g.flatten() for g in full]))
    return torch.stack(jac).view(len(x), -1, len(jac[0]))
