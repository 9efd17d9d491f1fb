"""A posterior on disk: the same to the last bit, without the data, and files that are not it are refused."""

import json

import pytest
import torch
from gpytorch.likelihoods import SoftmaxLikelihood
from jacobians import mlp
from netproblems import F64, NET, REGRESSOR, SOFTMAX, TARGETS, TAU, TEST, X_NEW, Y_NEW, X, Y, gaussian
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from toys import unchecked

from dualgp import NetworkPosterior, network_gp
from dualgp.errors import InputError, UnsupportedError

KINDS = [
    {},
    {"structure": "full"},
    {"num_inducing": 5, "centre": "map"},
    {"num_inducing": 20, "prior_precision": torch.tensor([0.3, 2.0, 1.0, 5.0], dtype=F64)},
    {"num_inducing": 8, "outputs": "independent"},
    {"structure": "kronecker"},
    {"structure": "diagonal"},
    {"params": "last_layer"},
]


@pytest.mark.parametrize("options", KINDS)
def test_a_round_trip_keeps_every_bit_and_goes_on(options, tmp_path):
    q = network_gp(NET, (X, Y), SOFTMAX, **{"prior_precision": TAU, **options}).condition(X_NEW, Y_NEW)
    q.save(tmp_path / "q.safetensors")
    other = mlp(seed=3)
    before = {k: v.clone() for k, v in other.state_dict().items()}
    p = NetworkPosterior.load(tmp_path / "q.safetensors", other, SOFTMAX, example=X[:2])
    for a, b in zip(q.predict_blocks(TEST), p.predict_blocks(TEST), strict=True):
        assert torch.equal(a, b)
    assert p.log_marginal_likelihood() == q.log_marginal_likelihood()
    assert p.stationarity == q.stationarity
    assert (p.centre, p.num_data) == (q.centre, 39)
    for a, b in zip(
        q.forget(X_NEW, Y_NEW).predict_blocks(TEST), p.forget(X_NEW, Y_NEW).predict_blocks(TEST), strict=True
    ):
        assert torch.equal(a, b)
    assert all(torch.equal(before[k], v) for k, v in other.state_dict().items())
    p.save(tmp_path / "p.safetensors")
    mine, theirs = (load_file(tmp_path / f"{name}.safetensors") for name in "qp")
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_file_holds_no_data_but_Z_and_the_noise_of_the_likelihood(tmp_path):
    q = network_gp(REGRESSOR, (X, TARGETS), gaussian(0.2), num_inducing=4)
    q.save(tmp_path / "q.safetensors")
    with safe_open(tmp_path / "q.safetensors", "pt") as file:
        held = torch.cat([file.get_tensor(name).double().flatten() for name in file.keys()])  # noqa: SIM118
    Z = q.basis.inducing_inputs
    kept = [bool((X[i] == Z).all(1).any()) for i in range(30)]
    for i in range(30):
        assert bool((held == X[i, 0]).any()) == kept[i]
        assert not bool((held == TARGETS[i]).any())
    p = NetworkPosterior.load(tmp_path / "q.safetensors", mlp(outputs=1, seed=2), gaussian(0.7))
    assert torch.equal(p.likelihood.noise, q.likelihood.noise)


def test_a_network_that_is_raised_and_tied(tmp_path):
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Tanh(), nn.Linear(2, 2), nn.Linear(2, 3)).to(
        torch.float16
    )
    net[3].weight = net[0].weight
    q = network_gp(net, (X, Y), SOFTMAX, num_inducing=6)
    q.save(tmp_path / "q")
    p = NetworkPosterior.load(tmp_path / "q", net, SOFTMAX)
    assert torch.equal(p.predict(TEST)[1], q.predict(TEST)[1])
    assert net[0].weight.dtype == torch.float16


def corrupted(path, change, config=None):
    """Rewrite a file with other tensors or another header."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(tensors)
    header = json.loads(metadata["config"])
    header.update(config or {})
    save_file(tensors, path, metadata=metadata | {"config": json.dumps(header)})


@pytest.mark.parametrize(
    ("change", "config"),
    [
        (lambda t: t.pop("lam"), None),
        (lambda t: t.pop("span.Z"), None),
        (lambda t: t.update(B=t["B"][:-1]), None),
        (lambda t: t.update(B=torch.full_like(t["B"], float("nan"))), None),
        (lambda t: t.update(B=-t["B"]), None),
        (lambda t: t.update({"span.W": t["span.W"][:-1]}), None),
        (lambda t: t.update(pull=t["pull"][:-1]), None),
        (lambda t: t.update(counts=t["counts"][:-1]), None),
        (lambda t: t.update(prior_precision=torch.tensor(-1.0)), None),
        (lambda t: t.update({"network.0.weight": t["network.0.weight"][:-1]}), None),
        (lambda t: None, {"params": ["head"]}),
        (lambda t: None, {"centre": "elsewhere"}),
        (lambda t: None, {"budget": "much"}),
        (lambda t: None, {"structure": ["kronecker", False, 3000, [[[0, 1], ["Evil", []]]]]}),
        (lambda t: None, {"structure": 7}),
    ],
)
def test_a_damaged_file_is_refused(change, config, tmp_path):
    path = tmp_path / "q"
    network_gp(NET, (X, Y), SOFTMAX, num_inducing=4).save(path)
    corrupted(path, change, config)
    with pytest.raises((InputError, ArithmeticError)):
        NetworkPosterior.load(path, NET, SOFTMAX)


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "q"
    with pytest.raises(InputError, match="no file"):
        NetworkPosterior.load(path, NET, SOFTMAX)
    path.write_bytes(b"\x80\x04c__builtin__\neval\n")
    with pytest.raises(InputError, match="not a safetensors file"):
        NetworkPosterior.load(path, NET, SOFTMAX)
    save_file({"a": torch.zeros(1)}, path, metadata={"format": "dualgp.DualGP", "version": "1"})
    with pytest.raises(InputError, match="does not hold a NetworkPosterior"):
        NetworkPosterior.load(path, NET, SOFTMAX)
    network_gp(NET, (X, Y), SOFTMAX).save(path)
    with pytest.raises(InputError, match="example="):
        NetworkPosterior.load(path, NET, SOFTMAX)
    with pytest.raises(InputError, match="was saved with"):
        NetworkPosterior.load(path, NET, gaussian(), example=X[:2])
    with pytest.raises(InputError, match="needs 5 outputs"):
        NetworkPosterior.load(path, NET, SoftmaxLikelihood(num_classes=5, mixing_weights=False), example=X[:2])
    with pytest.raises(InputError, match="does not fit the modules given"):
        NetworkPosterior.load(path, mlp(width=7), SOFTMAX, example=X[:2])
    with unchecked(), pytest.raises(UnsupportedError, match="Module"):
        NetworkPosterior.load(path, nn.Linear, SOFTMAX, example=X[:2])
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="truncated"):
        NetworkPosterior.load(path, NET, SOFTMAX, example=X[:2])


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "q"
    q = network_gp(NET, (X, Y), SOFTMAX)
    q.save(path)
    before = path.read_bytes()
    with pytest.raises(InputError, match="no folder"):
        q.save(tmp_path / "elsewhere" / "q")

    def full_disk(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr("dualgp.files.os.fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        q.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    assert SoftmaxLikelihood is type(q.likelihood)
