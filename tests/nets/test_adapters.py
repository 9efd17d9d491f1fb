"""Adapters of low rank (LoRA): a posterior over them alone, beside dense Laplace on their columns of J."""

import pytest
import reference as ref
import torch
from jacobians import jacobian
from netproblems import SOFTMAX, TAU, TEST, X_NEW, Y_NEW, X, Y, adapted, gap
from torch import nn

from dualgp import NetworkPosterior, network_gp


def is_adapter(name: str) -> bool:
    return "lora_" in name


def columns(net: nn.Module, x):
    """J by the parameters of the adapters alone, [n, C, p]."""
    sizes = [(is_adapter(name), p.numel()) for name, p in net.named_parameters()]
    mask = torch.cat([torch.full((size,), mine) for mine, size in sizes])
    return jacobian(net, x)[..., mask]


def covariance(net, q, x, y, at):
    cov = ref.glm_covariance(columns(net, x), q.sites_at(x, y).beta, TAU, columns(net, at))
    return torch.einsum("ncnd->ncd", cov)


def check(net, options, tmp_path):
    """Conversion, prediction, new data, removal and a file."""
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    q = network_gp(net, (X, Y), SOFTMAX, prior_precision=TAU, params=is_adapter, **options)
    p = sum(p.numel() for name, p in net.named_parameters() if is_adapter(name))
    assert q.basis.jacobian.num_params == p
    assert all(is_adapter(name) for name in q.basis.jacobian.names)
    assert gap(q.predict(TEST)[0], net(TEST).detach()) < 1e-12
    assert gap(q.predict_blocks(TEST)[1], covariance(net, q, X, Y, TEST)) < 1e-8
    more = q.condition(X_NEW, Y_NEW)
    union = torch.cat([X, X_NEW]), torch.cat([Y, Y_NEW])
    expected = covariance(net, q, *union, TEST)
    assert gap(more.predict_blocks(TEST)[1], expected) < 1e-8
    J, alpha = columns(net, X_NEW), q.sites_at(X_NEW, Y_NEW).alpha(net(X_NEW).detach())
    cross = ref.glm_covariance(columns(net, union[0]), q.sites_at(*union).beta, TAU, torch.cat([columns(net, TEST), J]))
    moved = torch.einsum("ncmd,md->nc", cross[: len(TEST), :, len(TEST) :], alpha)
    assert gap(more.predict(TEST)[0], net(TEST).detach() + moved) < 1e-8
    assert gap(more.forget(X_NEW, Y_NEW).predict_blocks(TEST)[1], q.predict_blocks(TEST)[1]) < 1e-8
    more.save(tmp_path / "q")
    loaded = NetworkPosterior.load(tmp_path / "q", net, SOFTMAX, example=X[:2])
    assert torch.equal(loaded.predict(TEST)[1], more.predict(TEST)[1])
    assert all(torch.equal(before[name], value) for name, value in net.named_parameters())
    return q


@pytest.mark.parametrize("modules", [True, False])
@pytest.mark.parametrize("options", [{"structure": "dense"}, {"structure": "full"}])
def test_adapters_are_converted_updated_and_forgotten(options, modules, tmp_path):
    net = adapted(modules=modules)
    q = check(net, options, tmp_path)
    trainable = network_gp(net, (X, Y), SOFTMAX, prior_precision=TAU, **options)  # what requires a gradient
    assert gap(trainable.predict(TEST)[1], q.predict(TEST)[1]) < 1e-10


@pytest.mark.parametrize("structure", ["kronecker", "diagonal"])
def test_adapters_in_a_structure_of_weight_space(structure):
    """Modules have factors of their own; a diagonal is that of the dense curvature either way."""
    by_module, by_tensor = (
        network_gp(adapted(modules=m), (X, Y), SOFTMAX, prior_precision=TAU, structure=structure) for m in (True, False)
    )
    assert gap(by_module.predict(TEST)[0], by_tensor.predict(TEST)[0]) < 1e-12
    if structure == "diagonal":
        J = columns(adapted(), X)
        d = torch.einsum("ncp,ncd,ndp->p", J, by_module.sites_at(X, Y).beta, J)
        at = columns(adapted(), TEST)
        expected = torch.einsum("ncp,p,ndp->ncd", at, 1.0 / (d + TAU), at)
        assert gap(by_module.predict_blocks(TEST)[1], expected) < 1e-10
        assert gap(by_tensor.predict_blocks(TEST)[1], expected) < 1e-10
    else:
        assert len(by_module.posterior.site.blocks) == 4  # A and B of two layers
    more = by_module.condition(X_NEW, Y_NEW)
    assert float(more.predict(TEST)[1].sum()) < float(by_module.predict(TEST)[1].sum())
    assert gap(more.forget(X_NEW, Y_NEW).predict(TEST)[1], by_module.predict(TEST)[1]) < 1e-9


def test_adapters_that_do_nothing_yet_have_the_variance_of_their_first_step():
    """B = 0 at the start: nothing depends on A, and J has nothing but the columns of B."""
    net = adapted()
    for module in (net[0], net[2]):
        module.lora_B.weight.data.zero_()
    q = network_gp(net, (X, Y), SOFTMAX, prior_precision=TAU, params=is_adapter, structure="full")
    assert gap(q.predict_blocks(TEST)[1], covariance(net, q, X, Y, TEST)) < 1e-8


def test_adapters_of_peft(tmp_path):
    peft = pytest.importorskip("peft", exc_type=ImportError)
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    config = peft.LoraConfig(target_modules=["0", "2"], r=2, init_lora_weights=False)
    net = peft.get_peft_model(base, config).double().eval()
    check(net, {"structure": "dense"}, tmp_path)
