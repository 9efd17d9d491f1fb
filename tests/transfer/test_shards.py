"""Merging from disk to disk is merging in memory, whatever the sharding; and what is wrong leaves nothing behind."""

import json

import pytest
import torch
from gpytorch.likelihoods import SoftmaxLikelihood
from safetensors.torch import load_file, save_file
from torch import nn
from toys import F64, gap

from dualgp import WeightLayout, WeightPosterior, errors
from dualgp.transfer import shards
from dualgp.transfer.curvature import kronecker_curvature
from dualgp.transfer.kronecker import KroneckerCurvature, KroneckerPosterior
from dualgp.transfer.merging import fine_tuned, merge
from dualgp.transfer.shards import merge_shards

SHAPES = {"a.weight": (7, 5), "a.bias": (7,), "scale": (), "b": (3, 2, 4)}


def state(seed: int, positive: bool = False, dtype: torch.dtype = F64) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    found = {n: torch.randn(s, generator=g, dtype=F64) for n, s in SHAPES.items()}
    return {n: (t.square() + 0.1 if positive else t).to(dtype) for n, t in found.items()}


def save(path, tensors, sharded: bool = False):
    """One file, or a folder of two shards with an index; an integer buffer besides."""
    if not sharded:
        save_file(tensors, path)
        return path
    path.mkdir()
    names = list(tensors)
    parts = {"m-00001.safetensors": names[::2], "m-00002.safetensors": names[1::2]}
    for file, inside in parts.items():
        save_file({n: tensors[n] for n in inside}, path / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": {n: f for f, inside in parts.items() for n in inside}}
    (path / "m.safetensors.index.json").write_text(json.dumps(index))
    return path


def load(path):
    if path.is_file():
        return load_file(path)
    return {k: v for file in sorted(path.glob("*.safetensors")) for k, v in load_file(file).items()}


def in_memory(base, models, curvatures, prior, weights) -> dict[str, torch.Tensor]:
    layout = WeightLayout({n: torch.Size(s) for n, s in SHAPES.items()})
    q0 = WeightPosterior(layout, prior_mean=layout.join(base), prior_precision=prior)
    experts = [fine_tuned(q0, layout.join(m), layout.join(c)) for m, c in zip(models, curvatures, strict=True)]
    return layout.split(merge(experts, weights).mean)


@pytest.mark.parametrize("piece", [4, 1 << 20])
@pytest.mark.parametrize("sharded", [False, True])
def test_from_disk_to_disk_is_in_memory(tmp_path, sharded, piece, monkeypatch):
    monkeypatch.setattr(shards, "_PIECE", piece)
    base, models, curvatures = state(0), [state(1), state(2)], [state(3, True), state(4, True)]
    truth = in_memory(base, models, [{n: 10 * t for n, t in curvatures[0].items()}, curvatures[1]], 2.0, (0.7, 1.3))
    for s in (base, *models):
        s["steps"] = torch.tensor([5, int(s is base)])
    out = tmp_path / "out"
    merge_shards(
        save(tmp_path / "base", base, sharded),
        [save(tmp_path / f"m{i}", m, sharded != (i == 1)) for i, m in enumerate(models)],  # each cut as it likes
        out,
        curvatures=[save(tmp_path / f"c{i}", c) for i, c in enumerate(curvatures)],
        weights=(0.7, 1.3),
        scales=(10, 1),
        base_precision=2.0,
    )
    found = load(out)
    assert found.keys() == base.keys()
    assert torch.equal(found.pop("steps"), base["steps"])
    for name, value in truth.items():
        assert gap(found[name], value) < 1e-12
        assert found[name].shape == base[name].shape
    assert sorted(f.name for f in tmp_path.iterdir() if f.name.startswith("out")) == ["out"]
    if sharded:
        assert len(shards.Shards(out).tensors) == len(base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_is_worked_on_in_float32(tmp_path, dtype):
    base, model, prior = state(0, dtype=dtype), state(1, dtype=dtype), state(2, True)
    merge_shards(
        save(tmp_path / "b", base), [save(tmp_path / "m", model)], tmp_path / "o", weights=[0.25],
        base_precision=save(tmp_path / "p", prior),
    )  # fmt: skip
    for name, value in load(tmp_path / "o").items():
        start, end = base[name].float(), model[name].float()
        assert value.dtype == dtype
        # S₀(θ_t − θ₀)/S₀ rounds once more than the difference alone: half a unit in the last place of float32.
        assert gap(value.float(), (start + 0.25 * (end - start)).to(dtype).float()) <= torch.finfo(dtype).eps * 4


def truncated(folder):
    file = folder / "m-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


def removed(folder):
    (folder / "m-00001.safetensors").unlink()


def garbage(folder):
    (folder / "m-00001.safetensors").write_bytes(b"\xff" * 30)


def no_index(folder):
    (folder / "m.safetensors.index.json").write_text("{")


def outside(folder):
    index = folder / "m.safetensors.index.json"
    index.write_text(index.read_text().replace("m-00001", "../m-00001"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncated, "m-00002.safetensors is no safetensors file, or is truncated"),
        (removed, "names 'm-00001.safetensors', which is not in the folder .*fetch it again"),
        (garbage, "m-00001.safetensors is no safetensors file"),
        (no_index, "index .* is damaged"),
        (outside, "which is not in the folder"),
    ],
)
def test_damaged_shards_are_named_and_nothing_is_written(tmp_path, damage, message):
    base, model = save(tmp_path / "b", state(0), True), save(tmp_path / "m", state(1), True)
    damage(model)
    with pytest.raises(errors.InputError, match=message):
        merge_shards(base, [model], tmp_path / "o")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "m"]


def test_models_that_differ_are_refused(tmp_path):
    base = save(tmp_path / "b", state(0))
    fewer = state(1)
    del fewer["scale"]
    cases = {
        r"lacks \['scale'\]": fewer,
        r"has \['c'\]": state(1) | {"c": torch.ones(1)},
        r"'b' is \(3, 2, 4\) .* and \(24,\)": state(1) | {"b": torch.ones(24, dtype=F64)},
        "of torch.float64 in .* of torch.float32": state(1, dtype=torch.float32),
        "'b' in .* not finite": state(1) | {"b": torch.full((3, 2, 4), torch.nan, dtype=F64)},
    }
    for i, (message, tensors) in enumerate(cases.items()):
        with pytest.raises(errors.InputError, match=message):
            merge_shards(base, [save(tmp_path / f"m{i}", tensors)], tmp_path / "o")
    good = save(tmp_path / "m", state(1))
    with pytest.raises(errors.NotPositiveDefiniteError, match="merged precision of 'a.bias' has an element -"):
        merge_shards(base, [good], tmp_path / "o", curvatures=[save(tmp_path / "c", state(3, True))], weights=[-50.0])
    with pytest.raises(errors.InputError, match="exists; merge into a new place"):
        merge_shards(base, [good], good)
    with pytest.raises(errors.InputError, match="no file or folder"):
        merge_shards(base, [tmp_path / "nothing"], tmp_path / "o")
    with pytest.raises(errors.InputError, match="one model or more"):
        merge_shards(base, [], tmp_path / "o")
    with pytest.raises(errors.InputError, match="a curvature for each of 1"):
        merge_shards(base, [good], tmp_path / "o", curvatures=[])
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("o")]


def fitted_network(seed: int) -> tuple[nn.Sequential, KroneckerCurvature]:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Tanh(), nn.Linear(3, 5, bias=False)).double()
    lik = SoftmaxLikelihood(num_classes=5, mixing_weights=False)
    return net, kronecker_curvature(net, torch.randn(20, 4, dtype=F64), torch.randint(5, (20,)), lik)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("dense", [2048, 1])
def test_layers_with_factors_merge_as_in_memory(tmp_path, sharded, dense, monkeypatch):
    """A weight and its bias lie in different shards, where there are two."""
    monkeypatch.setattr("dualgp.transfer.precisions._DENSE", dense)
    base, fits = fitted_network(0)[0], [fitted_network(seed) for seed in (1, 2, 3)]
    layout, scales, weights = WeightLayout.of(base), (1.0, 10.0, 2.0), (0.7, 1.3, -0.01)
    q0 = WeightPosterior(layout, prior_mean=layout.join(base.state_dict()), prior_precision=torch.tensor(2.0).double())
    experts = [
        KroneckerPosterior.fine_tuned(q0, layout.join(net.state_dict()), B * scale)
        for (net, B), scale in zip(fits, scales, strict=True)
    ]
    merge_shards(
        save(tmp_path / "base", base.state_dict(), sharded),
        [save(tmp_path / f"m{i}", net.state_dict(), sharded) for i, (net, _) in enumerate(fits)],
        tmp_path / "out",
        curvatures=[save(tmp_path / f"c{i}", B.to_tensors()) for i, (_, B) in enumerate(fits)],
        weights=weights,
        scales=scales,
        base_precision=2.0,
    )
    truth = layout.split(merge(experts, weights).mean)
    found = load(tmp_path / "out")
    assert found.keys() == truth.keys()
    assert all(gap(found[name], value) < 1e-10 for name, value in truth.items())


def test_factors_that_do_not_fit_are_refused(tmp_path):
    (net, B), (other, _) = fitted_network(0), fitted_network(1)
    base, model, good = save(tmp_path / "b", net.state_dict()), save(tmp_path / "m", other.state_dict()), B.to_tensors()
    diagonal = {name: torch.ones_like(value) for name, value in net.state_dict().items()}
    cases = {
        r"needs factors '0.weight.G' and .* got \(3, 3\) and None": {
            n: t for n, t in good.items() if n != "0.weight.A"
        },
        r"needs factors .* got \(3, 3\) and \(7, 7\)": good | {"0.weight.A": torch.eye(7, dtype=F64)},
        r"needs factors .* got \(2, 2\) and \(5, 5\)": good | {"0.weight.G": torch.eye(2, dtype=F64)},
        r"needs factors .* got \(3, 3\) and \(3, 5\)": good | {"0.weight.A": torch.ones(3, 5, dtype=F64)},
        r"lacks \['1.bias'\]": {n: t for n, t in good.items() if n != "1.bias"},
        r"has \['4.weight.G'\]": good | {"4.weight.G": torch.eye(2)},
        "'3.weight.A' in .* not finite": good | {"3.weight.A": torch.full((3, 3), torch.inf, dtype=F64)},
    }
    for i, (message, tensors) in enumerate(cases.items()):
        with pytest.raises(errors.InputError, match=message):
            merge_shards(base, [model], tmp_path / "o", curvatures=[save(tmp_path / f"c{i}", tensors)])
    curvatures = [save(tmp_path / "cg", good), save(tmp_path / "cd", diagonal)]
    with pytest.raises(errors.InputError, match="have factors for different tensors, such as '0.bias'"):
        merge_shards(base, [model, model], tmp_path / "o", curvatures=curvatures)
    with pytest.raises(errors.NotPositiveDefiniteError, match=r"No Gaussian is left in layer 0.weight"):
        merge_shards(base, [model], tmp_path / "o", curvatures=curvatures[:1], weights=[-50.0])
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("o")]
    with pytest.raises(errors.InputError, match="is not one product"):
        (B + B).to_tensors()
