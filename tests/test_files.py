"""Files: those of today stay readable, older ones migrate, and what is not whole is refused, nothing run or changed."""

import contextlib
import copy
import json
import math
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from gpytorch.kernels import RBFKernel, ScaleKernel
from gpytorch.likelihoods import BernoulliLikelihood, GaussianLikelihood, SoftmaxLikelihood
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from toys import F64, line, same_bits, unchecked

from dualgp import DualGP, ExactGP, NetworkPosterior, errors, files, network_gp

FOLDER = Path(__file__).parent / "files"
AT = line(0, 6, 4)
Modules = tuple[nn.Module, ...]


class Format(NamedTuple):
    make: Callable[[], object]
    modules: Callable[[], Modules]
    load: Callable[..., object]
    predict: Callable[[object], list[float]]


def stream() -> DualGP:
    gp = DualGP(*scaled(), num_inducing=5, memory=6)
    g = torch.Generator().manual_seed(0)
    for _ in range(4):
        x = 6 * torch.rand(10, 1, generator=g, dtype=F64)
        gp.update(x, x.sin()[:, 0] + 0.1 * torch.randn(10, generator=g, dtype=F64))
    return gp


def scaled() -> Modules:
    return ScaleKernel(RBFKernel()).double(), GaussianLikelihood().double()


def exact() -> ExactGP:
    gp = ExactGP(*labelled(), rank=6, num_probes=2)
    x = line(0, 6, 20)
    gp.fit(x, (x.sin() > 0).double()[:, 0], learn_hyperparameters=False)
    return gp


def labelled() -> Modules:
    return ScaleKernel(RBFKernel()).double(), BernoulliLikelihood()


def network() -> Modules:
    net = nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.linspace(-1, 1, p.numel(), dtype=F64).view_as(p))
    return net, SoftmaxLikelihood(num_classes=3, mixing_weights=False)


def sparse() -> NetworkPosterior:
    net, likelihood = network()
    x = line(0, 6, 20)
    return network_gp(net, (x, torch.arange(20) % 3), likelihood, prior_precision=2.0, num_inducing=4)


def kronecker() -> NetworkPosterior:
    net, likelihood = network()
    x = line(0, 6, 20)
    return network_gp(net, (x, torch.arange(20) % 3), likelihood, prior_precision=2.0, structure="kronecker")


def told(q) -> list[float]:
    return torch.cat([t.flatten() for t in q.predict(AT)]).tolist()


def load_network(path, net, likelihood) -> NetworkPosterior:
    return NetworkPosterior.load(path, net, likelihood, example=AT[:2])


FORMATS = {
    "dual_gp": Format(stream, scaled, DualGP.load, told),
    "exact_gp": Format(exact, labelled, ExactGP.load, told),
    "network": Format(sparse, network, load_network, told),
    "network_kronecker": Format(kronecker, network, load_network, told),
}
RECORDED = FOLDER / "predictions.json"  # by the version that wrote the files


def record() -> None:
    """Write the files and what they predict: once for each version of a format, never to make a test pass."""
    numbers = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    for name, of in FORMATS.items():
        made = of.make()
        made.save(FOLDER / f"{name}.part")
        with safe_open(FOLDER / f"{name}.part", "pt") as file:
            now = f"{name}_{file.metadata()['version']}"
        (FOLDER / f"{name}.part").rename(FOLDER / f"{now}.safetensors")
        numbers[now] = of.predict(made)
    RECORDED.write_text(json.dumps(numbers, indent=1) + "\n")


def kept() -> list[str]:
    return sorted(json.loads(RECORDED.read_text()))


@pytest.mark.parametrize("name", kept())
def test_a_file_that_an_older_version_wrote_predicts_what_it_predicted(name, tmp_path):
    of, expected = FORMATS[name.rpartition("_")[0]], json.loads(RECORDED.read_text())[name]
    loaded = of.load(FOLDER / f"{name}.safetensors", *of.modules())
    assert of.predict(loaded) == pytest.approx(expected, rel=1e-9, abs=1e-12)  # other machines round otherwise
    loaded.save(tmp_path / "anew")
    assert of.predict(of.load(tmp_path / "anew", *of.modules())) == of.predict(loaded)


@pytest.mark.parametrize("name", FORMATS)
def test_the_version_that_is_written_today_has_its_file(name, tmp_path):
    path = tmp_path / "now"
    FORMATS[name].make().save(path)
    with safe_open(path, "pt") as file:
        version = file.metadata()["version"]
    assert f"{name}_{version}" in kept(), "a new version of a format needs a file of it: see record()"


def test_a_stream_of_version_2_goes_on_and_knows_how_many_data_it_forgot():
    gp = DualGP.load(FOLDER / "dual_gp_2.safetensors", *scaled())
    assert float(gp.num_rest) == 40 - 6
    x = line(0, 6, 10)
    assert gp.update(x, x.sin()[:, 0]).num_seen == 50


# --- versions -------------------------------------------------------------------------------------


def old_file(path: Path, version: int) -> Path:
    files.write(path, "Toy", version, {"length": 3}, {"a": torch.ones(2)})
    return path


STEPS = {
    1: lambda config, tensors: config.update(size=config.pop("length") * 2),
    2: lambda config, tensors: (config.update(size=config["size"] + 1), tensors.update(b=tensors.pop("a") * 5)),
}


@pytest.mark.parametrize(("version", "size"), [(1, 7), (2, None)])
def test_migrations_run_one_by_one_from_the_version_of_the_file(tmp_path, version, size):
    path = tmp_path / "toy"
    files.write(path, "Toy", version, {"length": 3} if size else {"size": 6}, {"a": torch.ones(2)})
    config, tensors = files.read(path, "Toy", 3, {"size": (int,)}, STEPS)
    assert config == {"size": 7}
    assert same_bits(tensors, {"b": torch.full((2,), 5.0)})


@pytest.mark.parametrize(("version", "match"), [(4, "Update dualgp"), (99, "Update dualgp"), (0, "dualgp that wrote")])
def test_a_version_that_is_not_read_says_who_wrote_it_and_what_is_read(tmp_path, version, match):
    path = old_file(tmp_path / "toy", version)
    match = (
        rf"format version {version} written by dualgp '[\d.]+'; this dualgp \([\d.]+\) reads versions 1 to 3.*{match}"
    )
    with pytest.raises(errors.InputError, match=match):
        files.read(path, "Toy", 3, {"size": (int,)}, STEPS)


def test_a_migration_that_meets_a_damaged_file_says_so(tmp_path):
    path = tmp_path / "toy"
    files.write(path, "Toy", 1, {"width": 3}, {})
    with pytest.raises(errors.InputError, match="damaged header"):
        files.read(path, "Toy", 3, {"size": (int,)}, STEPS)


def test_parts_that_killed_writers_left_are_removed_once_they_are_old(tmp_path):
    target, other = tmp_path / "a[b]", tmp_path / "a[b]2"
    parts = [p.with_name(f"{p.name}.{mark * 8}.part") for p in (target, other) for mark in "01"]
    for part in parts:
        part.write_bytes(b"cut off")
    for part in (parts[0], parts[2]):
        files.os.utime(part, (0, 0))
    old_file(target, 1)
    assert [part.exists() for part in parts] == [False, True, True, True]  # not what another may be writing


@pytest.mark.parametrize("path", [None, 3, b"name", ["a"]])
def test_what_is_no_path_is_said_to_be_none(path):
    for call in (files.write, files.read):
        with unchecked(), pytest.raises(errors.InputError, match="path must be a string"):
            call(path, "Toy", 1, {}, {})


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(errors.InputError, match="is a folder"):
        old_file(tmp_path, 1)
    assert list(tmp_path.iterdir()) == []


# --- damage ---------------------------------------------------------------------------------------


class Payload:
    ran = False

    def __reduce__(self):
        return (setattr, (Payload, "ran", True))


def refused(of: Format, path: Path, match: str | None = None) -> None:
    """The file is refused by name, what it holds is not run, and the modules given are as they were."""
    given = of.modules()
    before = [copy.deepcopy(m.state_dict()) for m in given]
    with pytest.raises((errors.InputError, errors.UnsupportedError), match=match):
        of.load(path, *given)
    assert same_bits([dict(m.state_dict()) for m in given], [dict(b) for b in before])
    assert not Payload.ran


@pytest.fixture(params=FORMATS)
def of(request) -> Format:
    return FORMATS[request.param]


@pytest.fixture
def good(of, request) -> bytes:
    name = request.node.callspec.params["of"]
    return (FOLDER / f"{next(k for k in reversed(kept()) if k.rpartition('_')[0] == name)}.safetensors").read_bytes()


def places(good: bytes, count: int) -> list[int]:
    header = 8 + int.from_bytes(good[:8], "little")
    rng = random.Random(0)
    return sorted({*range(12), header - 1, header, header + 1, len(good) - 1, *rng.sample(range(len(good)), count)})


def test_a_file_cut_off_anywhere_is_refused(of, good, tmp_path):
    path = tmp_path / "cut"
    for keep in places(good, 20):
        path.write_bytes(good[:keep])
        refused(of, path, "truncated")


def test_a_file_with_a_byte_changed_anywhere_is_refused_or_reads_the_same(of, good, tmp_path):
    path = tmp_path / "flipped"
    path.write_bytes(good)
    expected = of.predict(of.load(path, *of.modules()))
    for i in places(good, 20):
        path.write_bytes(good[:i] + bytes([good[i] ^ (1 << (i % 8))]) + good[i + 1 :])
        try:
            loaded = of.load(path, *of.modules())
        except errors.InputError:
            refused(of, path)
        else:  # in padding, or in the name of the checksum
            assert of.predict(loaded) == expected


def test_a_pickle_is_refused_and_not_run(of, good, tmp_path):
    path = tmp_path / "pickle"
    for hostile in (pickle.dumps(Payload()), pickle.dumps(Payload()) + good, good[:8] + pickle.dumps(Payload())):
        path.write_bytes(hostile)
        refused(of, path, "not a safetensors file")
    torch.save({"a": Payload()}, path)
    refused(of, path, "not a safetensors file")


def rewritten(good: bytes, path: Path, change: Callable[[dict, dict[str, Tensor]], None], **about: str) -> Path:
    """The file after a change of header and tensors, its checksum left out."""
    path.write_bytes(good)
    with safe_open(path, "pt") as file:
        told = file.metadata()
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    config = json.loads(told["config"])
    change(config, tensors)
    del told["sha256"]
    path.unlink()
    save_file(tensors, path, metadata={**told, "config": json.dumps(config), **about})
    return path


HOSTILE = [None, True, -1, 10**400, 1e308, "os.system('true')", "", [], [[]], {}, {"__reduce__": "os.system"}]


def test_hostile_headers_are_refused(of, good, tmp_path):
    path = tmp_path / "header"
    for text in (
        "", "[]", "3", "null", "{", "\\ud800", "NaN", '{"kernel": NaN}', "[" * 100_000, '{"a":' * 50_000, "9" * 10_000
    ):  # fmt: skip
        rewritten(good, path, lambda *_: None, config=text)
        refused(of, path, "damaged header")
    for version in ("", "-1", "1.0", "one", "٣", "9" * 400, " 3"):
        rewritten(good, path, lambda *_: None, version=version)
        refused(of, path, "version")


ALL = pytest.mark.parametrize("step", [6, pytest.param(1, marks=pytest.mark.slow)])  # every sixth, or each


@ALL
def test_hostile_values_in_a_header_are_refused_or_do_no_harm(of, good, step, tmp_path):
    path = tmp_path / "header"
    rewritten(good, path, lambda *_: None)
    expected = of.predict(of.load(path, *of.modules()))
    with safe_open(path, "pt") as file:
        names = json.loads(file.metadata()["config"])
    for i, name in enumerate(names):
        for value in HOSTILE[i % step :: step]:
            rewritten(good, path, lambda config, _, name=name, value=value: config.update({name: value}))
            try:
                loaded = of.load(path, *of.modules())
            except errors.DualGPError:
                refused(of, path)
            else:
                assert len(of.predict(loaded)) == len(expected)
        rewritten(good, path, lambda config, _, name=name: config.pop(name))
        refused(of, path, "lacks")


CHANGES = {
    "gone": None,
    "longer": lambda t: torch.cat([t, t]) if t.ndim else torch.stack([t, t]),
    "empty": lambda t: t[:0] if t.ndim else t.new_zeros(0),
    "deeper": lambda t: t.unsqueeze(0),
    "whole": lambda t: t.to(torch.int8),
    "complex": lambda t: t.to(torch.complex64),
    "nan": lambda t: torch.full_like(t, float("nan")) if t.is_floating_point() else t - 7,
    "huge": lambda t: torch.full_like(t, 1e30) if t.is_floating_point() else t * 0 + 250,
}


@ALL
def test_hostile_tensors_are_refused_or_do_no_harm(of, good, step, tmp_path):
    path = tmp_path / "tensors"
    with safe_open(rewritten(good, path, lambda *_: None), "pt") as file:
        names = list(file.keys())
    for i, name in enumerate(names):
        for change in [*CHANGES][i % step :: step]:

            def alter(_, tensors, name=name, how=CHANGES[change]):
                value = tensors.pop(name)
                tensors.update({} if how is None else {name: how(value)})

            rewritten(good, path, alter)
            try:
                loaded = of.load(path, *of.modules())
            except errors.DualGPError:
                refused(of, path)
                continue
            with contextlib.suppress(errors.DualGPError):
                assert all(map(math.isfinite, of.predict(loaded))), (name, change)


if __name__ == "__main__":
    record()
