"""The layered Jacobian of a network is the Jacobian: every product of it, for every kind of layer."""

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toys import F64, gap

from dualgp.errors import InputError, UnsupportedError
from dualgp.kernels import NetworkJacobian
from dualgp.kernels.layers import ExplicitLayer, FactoredLayer, LookupLayer
from dualgp.kernels.networks import frozen_network
from dualgp.kernels.taps import rows_by_func, rows_by_loop


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


@pytest.mark.parametrize("name", NETWORKS)
def test_every_product_is_that_of_the_jacobian(name):
    net, x = make(name)
    jacobian = NetworkJacobian(net, x)
    jac = reference(net, x, jacobian.names)
    trainable = [n for n, p in net.named_parameters() if p.requires_grad]
    assert list(jacobian.names) == trainable
    assert jacobian.num_params == jac.shape[-1]
    agrees_with(jacobian, x, jac)


def agrees_with(jacobian: NetworkJacobian, x: Tensor, jac: Tensor) -> None:
    block, part = jacobian.block(x), jacobian.block(x[1:4])
    (n, C), P = block.f.shape, jacobian.num_params
    few, many, v, d = draw(P, 1), draw(P, 40, seed=2), draw(n, C, 30, seed=3), draw(P, seed=4)
    full = torch.einsum("ncp,mdp->ncmd", jac, jac[1:4])
    assert gap(block.dense(), jac) < 1e-12
    assert gap(block.gram(part), full) < 1e-12
    assert gap(block.gram_independent(part), full.diagonal(dim1=1, dim2=3).movedim(-1, 0)) < 1e-12
    assert gap(block.diag(), jac @ jac.mT) < 1e-12
    assert gap(block.quad(d), (jac * d) @ jac.mT) < 1e-12
    for u in (few, many):
        assert gap(block.matmul(u), jac @ u) < 1e-12
    for w in (v[..., :1], v):
        assert gap(block.rmatmul(w), torch.einsum("ncp,ncr->pr", jac, w)) < 1e-12
    assert gap(jacobian.vjp(x, v[..., 0]), torch.einsum("ncp,nc->p", jac, v[..., 0])) < 1e-12
    assert gap(jacobian.jvp(x, d), jac @ d) < 1e-12


@pytest.mark.parametrize("name", ["tanh", "cnn", "transformer", "tied linears", "loose parameters"])
def test_scales_multiply_the_columns_of_each_tensor(name):
    net, x = make(name)
    plain = NetworkJacobian(net, x)
    scales = draw(len(plain.names), seed=7)
    twice = plain.scaled(scales).scaled(scales)
    columns = torch.cat([(s**2).expand(shape.numel()) for s, shape in zip(scales, plain.shapes, strict=True)])
    agrees_with(twice, x, reference(net, x, plain.names) * columns)
    assert gap(plain.block(x).dense(), reference(net, x, plain.names)) < 1e-12  # scaled() made a new one


@pytest.mark.parametrize("name", ["tanh", "cnn", "transformer", "recurrent"])
def test_chunks_make_no_difference(name):
    net, x = make(name)
    one = NetworkJacobian(net, x)
    many = NetworkJacobian(net, x, budget=2 * one.row_bytes)
    chunks = list(many.blocks(x))
    assert [rows.stop - rows.start for rows, _ in chunks] == [2] * (len(x) // 2) + [1] * (len(x) % 2)
    other = one.block(x)
    assert gap(torch.cat([b.gram(other) for _, b in chunks]), other.gram(other)) < 1e-12
    assert gap(torch.cat([b.f for _, b in chunks]), one(x)) < 1e-12
    assert gap(many(x), one(x)) < 1e-12
    u, v = draw(len(x), one.num_outputs), draw(one.num_params)
    assert gap(many.vjp(x, u), one.vjp(x, u)) < 1e-12
    assert gap(many.jvp(x, v), one.jvp(x, v)) < 1e-12
    assert gap(other[1:3].dense(), other.dense()[1:3]) < 1e-15


ATTENTION = ["in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"]
BY_ROWS = {
    "conv1d": ["1.weight", "1.bias"],
    "conv3d": ["1.weight", "1.bias"],
    "transformer": ["positions", *(f"body.self_attn.{p}" for p in ATTENTION)],
    "transformer, sequence first": ["positions", *(f"body.self_attn.{p}" for p in ATTENTION)],
    "tied embedding": ["embed.weight"],
    "transposed head": ["a.weight"],
    "loose parameters": ["gain", "matrix"],
    "parametrised": [f"0.parametrizations.weight.original{i}" for i in (0, 1)],
    "subclass": ["0.weight", "0.bias"],
    "bilinear": ["a.weight", "a.bias"],
    "recurrent": [f"a.{p}_l0" for p in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")],
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_known_layers_are_read_in_factors_and_the_others_are_not(name):
    """The networks above must exercise the ways they are meant to."""
    net, x = make(name)
    jacobian = NetworkJacobian(net, x)
    layers = jacobian.block(x).layers
    explicit = jacobian._reader.explicit
    assert {jacobian.names[t] for t in explicit} == set(BY_ROWS.get(name, []))
    for layer in layers:
        for tensor in set(layer.tensors) - set(explicit):
            owner, _, kind = jacobian.names[tensor].rpartition(".")
            module = net.get_submodule(owner)
            dense = (
                isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) and getattr(module, "groups", 1) == 1
            )
            factors = FactoredLayer if dense else LookupLayer if isinstance(module, nn.Embedding) else ExplicitLayer
            assert kind == "bias" or type(layer) is factors


def test_layers_give_the_factors_of_a_kronecker_product():
    net, x = make("cnn")
    jacobian = NetworkJacobian(net, x)
    layer = next(layer for layer in jacobian.block(x).layers if jacobian.names[layer.tensors[0]] == "0.weight")
    assert layer.a.shape == (5, 36, 2 * 9 + 1)
    assert layer.g.shape == (5, 3, 36, 4)
    weight, bias = reference(net, x, ["0.weight"]), reference(net, x, ["0.bias"])
    product = torch.einsum("ncso,nsi->ncoi", layer.g, layer.a)
    assert gap(product[..., :-1].flatten(2), weight) < 1e-12
    assert gap(product[..., -1], bias) < 1e-12


@pytest.mark.parametrize("name", ["cnn", "transformer", "transformer, sequence first"])
def test_single_precision_rounds(name):
    net, x = make(name)
    exact, low = NetworkJacobian(net, x).block(x), NetworkJacobian(net.float(), x).block(x)
    assert low.f.dtype == torch.float32
    assert gap(low.gram(low).double(), exact.gram(exact)) < 1e-5
    assert gap(low.diag().double(), exact.diag()) < 1e-5


def test_half_precision_is_raised_in_the_copy():
    net = mlp().bfloat16()
    jacobian = NetworkJacobian(net, draw(4, 4).bfloat16())
    assert jacobian.dtype == torch.float32
    assert jacobian.theta.dtype == torch.float32
    assert next(net.parameters()).dtype == torch.bfloat16
    assert gap(jacobian(draw(4, 4)), copy.deepcopy(net).float()(draw(4, 4).float()).detach()) < 1e-6


def test_the_network_of_the_user_is_left_alone():
    net, x = make("cnn")
    net.insert(7, nn.Dropout(0.5))
    net.train()
    net(x).sum().backward()
    seen = []
    net[0].register_full_backward_hook(lambda *_: seen.append("backward"))
    state, grads = copy.deepcopy(net.state_dict()), [p.grad.clone() for p in net.parameters()]
    asked, rng = [p.requires_grad for p in net.parameters()], torch.get_rng_state()
    jacobian = NetworkJacobian(net, x)
    block = jacobian.block(x)
    jacobian(x), jacobian.vjp(x, block.f), block.gram(block)
    assert torch.equal(torch.get_rng_state(), rng)
    assert not seen
    assert all(module.training for module in net.modules())
    assert all(torch.equal(state[k], v) for k, v in net.state_dict().items())
    assert all(torch.equal(a, p.grad) for a, p in zip(grads, net.parameters(), strict=True))
    assert [p.requires_grad for p in net.parameters()] == asked
    assert not net[0]._forward_hooks
    net[0]._backward_hooks.clear()
    assert gap(block.dense(), reference(net, x, jacobian.names)) < 1e-12  # as in eval mode
    net[0].weight.data.zero_()
    assert torch.equal(jacobian(x), block.f)


def test_theta_is_flat_in_the_order_of_the_names():
    net, x = make("tanh")
    jacobian = NetworkJacobian(net, x)
    assert torch.equal(jacobian.theta, nn.utils.parameters_to_vector(net.parameters()).detach())
    assert [s.stop - s.start for s in jacobian.slices] == [shape.numel() for shape in jacobian.shapes]


@pytest.mark.parametrize(
    ("name", "params", "names"),
    [
        ("tanh", "last_layer", ["4.weight", "4.bias"]),
        ("outputs scaled", "last_layer", ["body.4.weight", "body.4.bias"]),
        ("transformer", "last_layer", ["head.weight", "head.bias"]),
        ("called twice", "last_layer", ["b.weight", "b.bias"]),
        ("frozen in part", "last_layer", ["4.weight", "4.bias"]),
        ("frozen in part", ["0"], ["0.weight", "0.bias"]),
        ("tanh", ["2", "0.bias"], ["0.bias", "2.weight", "2.bias"]),
        ("tanh", lambda name: "bias" in name, ["0.bias", "2.bias", "4.bias"]),
        ("tied embedding", ["head"], ["embed.weight", "head.bias"]),
        ("transformer", ["body.linear1"], ["body.linear1.weight", "body.linear1.bias"]),
        ("transformer", ["body.self_attn.in_proj_weight"], ["body.self_attn.in_proj_weight"]),
    ],
)
def test_parameters_are_selected(name, params, names):
    net, x = make(name)
    jacobian = NetworkJacobian(net, x, params=params)
    assert list(jacobian.names) == names
    agrees_with(jacobian, x, reference(net, x, names))


def test_the_last_layer_needs_no_gradient_of_the_network():
    net, x = make("tanh")
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(InputError, match="requires_grad=False"):
        NetworkJacobian(net, x)
    agrees_with(NetworkJacobian(net, x, params="last_layer"), x, reference(net, x, ["4.weight", "4.bias"]))


@pytest.mark.parametrize("name", ["loose parameters", "transformer"])
def test_rows_one_by_one_are_rows_mapped(name):
    net, x = make(name)
    reader = NetworkJacobian(net, x)._reader
    names = [reader.names[i] for i in reader.explicit]
    assert reader.rows_of is rows_by_func
    for a, b in zip(rows_by_func(reader.network, names, x), rows_by_loop(reader.network, names, x), strict=True):
        assert gap(a, b) < 1e-12


class Rounded(torch.autograd.Function):
    """x², with a derivative that cannot be batched."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2 * torch.from_numpy(ctx.saved_tensors[0].detach().numpy())


def test_an_operation_that_cannot_be_batched_is_taken_one_output_at_a_time():
    net = Wired(lambda self, x: self.b(Rounded.apply(self.a(x))), a=nn.Linear(4, 3), b=nn.Linear(3, 2)).double()
    agrees_with(
        NetworkJacobian(net, draw(5, 4)),
        draw(5, 4),
        reference(net, draw(5, 4), ["a.weight", "a.bias", "b.weight", "b.bias"]),
    )


def linear(forward: Callable) -> nn.Module:
    return Wired(forward, a=nn.Linear(4, 2)).double()


def weights(value: float) -> nn.Module:
    net = mlp().double()
    net[2].weight.data[0, 0] = value
    return net


@pytest.mark.parametrize(
    ("net", "error", "match"),
    [
        (lambda: linear(lambda self, x: self.a(x)[:, None]), UnsupportedError, r"\[n, C\].*returned shape \(3, 1, 2\)"),
        (lambda: linear(lambda self, x: (self.a(x), x)), UnsupportedError, r"returned tuple.*Wrap it"),
        (lambda: linear(lambda self, x: self.a(x).sum()), UnsupportedError, r"returned shape \(\)"),
        (lambda: linear(lambda self, x: self.a(x).argmax(1)), UnsupportedError, r"returned torch.int64"),
        (lambda: linear(lambda self, x: self.a(x - x.mean(0))), UnsupportedError, "change with the other rows"),
        (lambda: linear(lambda self, x: F.dropout(self.a(x), 0.5)), UnsupportedError, "or from call to call"),
        (
            lambda: nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2, track_running_stats=False)).double().eval(),
            UnsupportedError,
            "Batch normalisation without running statistics",
        ),
        (lambda: linear(lambda self, x: self.a(x).detach()), UnsupportedError, "no derivative"),
        (lambda: linear(lambda self, x: x), UnsupportedError, "no derivative"),
        (lambda: linear(lambda self, x: self.a(x) / 0), InputError, "outputs hold NaN or infinity"),
        (lambda: weights(float("nan")), InputError, "2.weight holds NaN or infinity"),
        (lambda: nn.Sequential(nn.LazyLinear(2)), UnsupportedError, "lazy layers"),
        (lambda: nn.Linear(4, 2, dtype=torch.complex128), UnsupportedError, "Complex parameters"),
        (nn.Tanh, InputError, "no parameters"),
    ],
)
def test_networks_that_will_not_do_are_refused(net, error, match):
    with pytest.raises(error, match=match):
        NetworkJacobian(net(), draw(3, 4))


def test_a_function_is_no_network():
    with pytest.raises(UnsupportedError, match="Expected a torch.nn.Module, got builtin"):
        frozen_network(torch.tanh)


def test_an_in_place_operation_that_autograd_refuses_is_refused():
    def forward(self, x):
        h = self.a(x)
        z = self.b(h)
        h.mul_(0.5)
        return z + h

    net = Wired(forward, a=nn.Linear(4, 2), b=nn.Linear(2, 2)).double()
    with pytest.raises(UnsupportedError, match="autograd.*in-?place"):
        NetworkJacobian(net, draw(3, 4))


def test_derivatives_that_are_not_finite_are_refused():
    net = linear(lambda self, x: self.a(x).abs().sqrt())
    jacobian = NetworkJacobian(net, draw(3, 4))
    with torch.no_grad():
        null = -torch.linalg.lstsq(net.a.weight, net.a.bias[:, None]).solution.mT
        null = null - 0.0 * draw(1, 4)
    jacobian._network.a.bias.data.copy_(-(jacobian._network.a.weight @ null[0]).data)
    with pytest.raises(InputError, match="Jacobian of .*a.weight.* hold NaN or infinity"):
        jacobian.block(null)


def test_bad_arguments_are_refused():
    net, x = make("tanh")
    jacobian = NetworkJacobian(net, x)
    with pytest.raises(InputError, match=r"params must be 'all'.*got 'everything'"):
        NetworkJacobian(net, x, params="everything")
    with pytest.raises(InputError, match=r"No parameters are named \['5'\]"):
        NetworkJacobian(net, x, params=["0", "5"])
    with pytest.raises(InputError, match="selects no parameters"):
        NetworkJacobian(net, x, params=lambda name: "lora" in name)
    with pytest.raises(InputError, match="two rows"):
        NetworkJacobian(net, x[:1])
    with pytest.raises(InputError, match=r"takes [\d,]+ bytes, more than the budget of 100"):
        NetworkJacobian(net, x, budget=100)
    with pytest.raises(InputError, match=r"Expected x of shape \[n, 4\], got \(6, 3\)"):
        jacobian(x[:, :3])
    with pytest.raises(InputError, match="no rows"):
        jacobian.block(x[:0])
    with pytest.raises(InputError, match="Expected 6 finite scales"):
        jacobian.scaled(torch.ones(5, dtype=F64))
    with pytest.raises(InputError, match="different networks or parameters"):
        jacobian.block(x).gram(NetworkJacobian(net, x, params="last_layer").block(x))


def test_no_rows_give_no_outputs():
    net, x = make("tanh")
    jacobian = NetworkJacobian(net, x)
    assert jacobian(x[:0]).shape == (0, 3)
    assert list(jacobian.blocks(x[:0])) == []
    assert jacobian.jvp(x[:0], jacobian.theta).shape == (0, 3)
    assert not jacobian.vjp(x[:0], draw(0, 3)).any()


def test_old_weight_norm_is_refused_with_its_remedy():
    with pytest.warns(FutureWarning, match="weight_norm"):
        net = nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 2)))
    net(draw(3, 4).float())
    with pytest.raises(UnsupportedError, match="weight_norm is a common cause"):
        NetworkJacobian(net, draw(3, 4))


@pytest.mark.parametrize("name", ["tanh", "cnn", "transformer"])
def test_devices_run_the_same_code(name, device):
    net, x = make(name)
    here = NetworkJacobian(net, x).block(x)
    there = NetworkJacobian(net.to(device), x).block(x)  # inputs are brought along
    assert there.f.device.type == device.type
    assert gap(there.gram(there).cpu(), here.gram(here)) < 1e-10
    assert gap(there.diag().cpu(), here.diag()) < 1e-10
