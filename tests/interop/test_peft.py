"""What `adapter_parameters` finds, and what it refuses."""

import pytest
import torch
from torch import nn

from dualgp import errors
from dualgp.interop.peft import adapter_parameters
from dualgp.optim import IVON

peft = pytest.importorskip("peft")


def adapted():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
    net.requires_grad_(False)
    return peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["0", "2"]), net)


def test_only_adapters_are_learned():
    model = adapted()
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = IVON(adapter_parameters(model), num_data=64, total_steps=20)
    x, y = torch.randn(16, 3), torch.randint(0, 2, (16,))
    before = model(x)
    for _ in range(20):
        with optimizer.sampled_params():
            nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in frozen.items())
    assert not torch.equal(model(x), before)
    q = optimizer.posterior()
    assert set(q.layout.shapes) == set(now) - set(frozen)
    assert q.predict_samples(model, x, 4).std(0).min() > 0


def test_a_head_counts():
    model = nn.ModuleDict({"body": adapted(), "head": nn.Linear(2, 2)})
    assert [n for n, _ in adapter_parameters(model) if "lora" not in n] == ["head.weight", "head.bias"]


def test_what_is_no_adapted_model():
    with pytest.raises(errors.InputError, match="no adapter of peft"):
        adapter_parameters(nn.Linear(2, 2))
    model = adapted()
    model[0].get_base_layer().weight.requires_grad_(True)
    with pytest.raises(errors.InputError, match=r"freeze them"):
        adapter_parameters(model)
    with pytest.raises(errors.InputError, match="is_trainable"):
        adapter_parameters(adapted().requires_grad_(False))
