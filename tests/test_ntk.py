"""The layered Jacobian of a network is the Jacobian: every product of it, for every kind of layer."""

import copy

import pytest
import torch
from networks import NETWORKS, Wired, draw, make, mlp, reference
from torch import Tensor, nn
from toys import F64, gap

from dualgp.errors import InputError
from dualgp.kernels import NetworkJacobian, contractions, layers
from dualgp.kernels.layers import ExplicitLayer, FactoredLayer, LookupLayer
from dualgp.kernels.taps import rows_by_func, rows_by_loop


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


@pytest.mark.parametrize("budget", [None, 1])
@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_kept_of_z_is_its_jacobian(name, budget):
    net, x = make(name)
    whole = NetworkJacobian(net, x)
    jacobian = whole if budget is None else NetworkJacobian(net, x, budget=2 * whole.row_bytes)  # two rows at a time
    kept, full = jacobian.kept(x), torch.einsum("ncp,mdp->ncmd", *2 * [reference(net, x, jacobian.names)])
    for rows in (whole.block(x), kept):
        assert gap(rows.gram(kept), full) < 1e-12
        assert gap(rows.gram_independent(kept), full.diagonal(dim1=1, dim2=3).movedim(-1, 0)) < 1e-12
    u = draw(jacobian.num_params, 2)
    assert gap(kept.matmul(u), whole.block(x).matmul(u)) < 1e-12


def test_a_convolution_of_few_weights_is_kept_without_its_patches():
    net = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 3)).double()
    block = NetworkJacobian(net, draw(4, 1, 8, 8)).kept(draw(4, 1, 8, 8))
    assert [type(layer) for layer in block.layers] == [ExplicitLayer, FactoredLayer]


@pytest.mark.parametrize("name", NETWORKS)
def test_tiles_make_no_difference(name, monkeypatch):
    for room in (contractions, layers):
        monkeypatch.setattr(room, "SCRATCH_BYTES", 1000)  # one or two rows a tile, and outputs one by one
    net, x = make(name)
    jacobian = NetworkJacobian(net, x)
    agrees_with(jacobian, x, reference(net, x, jacobian.names))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_same_numbers_in_float64(name):
    net, x = make(name)
    block = NetworkJacobian(net.float(), x.float() if x.is_floating_point() else x).block(x)
    double = block.double()
    J = double.dense()
    assert gap(J, block.dense().double()) < 1e-5 * J.abs().max()
    assert torch.equal(double.f, block.f.double())
    assert gap(double.gram(double), torch.einsum("ncp,mdp->ncmd", J, J)) < 1e-12 * (1 + J.square().sum(-1).max())
    mine, theirs = ([t.untyped_storage().nbytes() for layer in b.layers for t in layer.parts] for b in (block, double))
    assert sum(theirs) <= 2 * sum(mine)  # rows that are one row stay one


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


def test_buffers_may_be_infinite():
    net = Wired(lambda self, x: self.a(x + self.mask.exp()), a=nn.Linear(4, 2)).double()
    net.register_buffer("mask", torch.full((4,), -torch.inf, dtype=F64))
    agrees_with(NetworkJacobian(net, draw(6, 4)), draw(6, 4), reference(net, draw(6, 4), ["a.weight", "a.bias"]))


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


@pytest.mark.parametrize("name", ["tanh", "cnn", "transformer"])
def test_devices_run_the_same_code(name, device):
    net, x = make(name)
    here = NetworkJacobian(net, x).block(x)
    there = NetworkJacobian(net.to(device), x).block(x)  # inputs are brought along
    assert there.f.device.type == device.type
    assert gap(there.gram(there).cpu(), here.gram(here)) < 1e-10
    assert gap(there.diag().cpu(), here.diag()) < 1e-10


@pytest.mark.parametrize("how", ["for all", "for each"])
def test_the_users_choice_of_tensorfloat_is_left_out_and_left_alone(how):
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("torch before 2.9 cannot say what is in force")
    matmul, conv, seen = torch.backends.cuda.matmul, torch.backends.cudnn.conv, []

    class Recording(nn.Linear):
        def forward(self, x):
            seen.append((matmul.fp32_precision, conv.fp32_precision))
            return super().forward(x)

    before = matmul.fp32_precision, conv.fp32_precision
    if how == "for all":
        torch.set_float32_matmul_precision("medium")
    else:
        matmul.fp32_precision = conv.fp32_precision = "tf32"
    chosen = matmul.fp32_precision, conv.fp32_precision
    try:
        jacobian = NetworkJacobian(Recording(2, 1), torch.randn(3, 2))
        jacobian.block(torch.randn(4, 2)).gram(jacobian.block(torch.randn(2, 2)))
        jacobian(torch.randn(2, 2)), jacobian.vjp(torch.randn(2, 2), torch.randn(2, 1))
        assert set(seen) == {("ieee", "ieee")}
        assert (matmul.fp32_precision, conv.fp32_precision) == chosen
        assert how == "for each" or torch.get_float32_matmul_precision() == "medium"
    finally:
        if how == "for all":
            torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision, conv.fp32_precision = before


def test_rows_that_share_their_output_derivatives_are_rows_that_repeat_them():
    g = draw(1, 3, 1, 2).expand(5, 3, 1, 2)
    shared = FactoredLayer((0,), draw(5, 1, 4), g, bias=True)
    repeated = FactoredLayer((0,), shared.a, g.contiguous(), bias=True)
    full, full_of_repeated = torch.zeros(2, 5, 3, 5, 3, dtype=F64)
    shared.add_gram(full, shared), repeated.add_gram(full_of_repeated, repeated)
    assert gap(full, full_of_repeated) < 1e-14
    own, own_of_repeated = torch.zeros(2, 3, 5, 5, dtype=F64)
    shared.add_gram_independent(own, shared), repeated.add_gram_independent(own_of_repeated, repeated)
    assert gap(own, own_of_repeated) < 1e-14
    assert gap(shared.dense(), repeated.dense()) < 1e-14
