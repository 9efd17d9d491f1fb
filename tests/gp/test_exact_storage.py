"""An exact process comes back from its file to the last bit, and goes on from there as it would have gone on."""

import copy

import exacts
import pytest
import torch
from gpytorch.kernels import RBFKernel
from gpytorch.likelihoods import BernoulliLikelihood, GaussianLikelihood
from safetensors.torch import load_file
from toys import gaussian, matern

from dualgp import DualGP, ExactGP, errors
from dualgp.gp import exact_storage
from dualgp.gp.storage import GENERATOR

N = exacts.N
KINDS = ["gaussian", "fixed noise", "bernoulli", "softmax", "multitask"]
OPTIONS = {"rank": 20, "num_probes": 4, "tol": 1e-6, "max_iterations": 500}


def made(kind: str, single: bool = False):
    """A fitted model, its data and modules like those it has."""
    x, y, likelihood, outputs = exacts.problem(kind)
    new = matern(), copy.deepcopy(likelihood), exacts.mean()
    gp = exacts.model(likelihood, outputs, **{**OPTIONS, "tol": 1e-4 if single else 1e-6})
    if single:
        x, y = x.float(), y.float()
    gp.fit(x, y, learn_hyperparameters=False, tol=1e-4)
    return gp, x, y, new


def load(path, new) -> ExactGP:
    kernel, likelihood, mean = new
    return ExactGP.load(path, kernel, likelihood, mean=mean)


def answers(gp: ExactGP, x: torch.Tensor) -> list[torch.Tensor]:
    q = gp.posterior(10)
    slopes = gp.bound_gradient()
    of_slopes = [t for part in slopes for t in part.values()]
    return [*gp.predict(x[:3]), *gp.marginals, gp.sites.lam, gp.sites.beta, *q.predict(x[:3]), *of_slopes]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(s, t) and s.dtype == t.dtype for s, t in zip(a, b, strict=True))


@pytest.mark.parametrize(("kind", "single"), [*[(k, False) for k in KINDS], ("bernoulli", True)])
def test_a_saved_process_loads_to_the_last_bit(kind, single, tmp_path):
    gp, x, _, new = made(kind, single)
    path = tmp_path / "exact.safetensors"
    gp.save(path)
    loaded = load(path, new)
    expected = answers(gp, x)
    assert equal(answers(loaded, x), expected)
    loaded.save(path)  # over the file that it came from
    assert equal(answers(load(path, new), x), expected)
    assert [p.name for p in tmp_path.iterdir()] == ["exact.safetensors"]
    held = [t.numel() for name, t in load_file(path).items() if name != GENERATOR]
    assert max(held) <= 4 * N * (gp.num_outputs or 1) + 4 * 20  # probes; nothing n × rank


def test_a_fit_goes_on_from_the_file_as_it_would_have_gone_on(tmp_path):
    gp, x, y, new = made("gaussian")
    gp.save(tmp_path / "model")
    loaded = load(tmp_path / "model", new)
    with pytest.warns(errors.ConvergenceWarning):
        ends = [model.fit(x, y, max_steps=2).bound for model in (gp, loaded)]
    assert ends[0] == ends[1]
    assert all(torch.equal(a, b) for a, b in zip(gp.parameters(), loaded.parameters(), strict=True))


def test_a_state_dict_goes_into_a_new_process_and_one_without_a_fit_takes_the_fit_away():
    gp, x, *_ = made("bernoulli")
    other = exacts.model(BernoulliLikelihood(), **OPTIONS)
    empty = copy.deepcopy(other.state_dict())
    other.load_state_dict(gp.state_dict())
    assert equal(answers(other, x), answers(gp, x))
    both = torch.nn.ModuleDict({"one": copy.deepcopy(gp), "two": other})
    again = torch.nn.ModuleDict({name: exacts.model(BernoulliLikelihood(), **OPTIONS) for name in both})
    again.load_state_dict(both.state_dict())
    assert equal(answers(again["two"], x), answers(gp, x))
    other.load_state_dict(empty)
    with pytest.raises(errors.NotFittedError, match="call fit"):
        other.predict(x)


def test_what_cannot_be_saved_or_loaded_says_so(tmp_path):
    path = tmp_path / "model"
    with pytest.raises(errors.NotFittedError, match="call fit"):
        exacts.model(gaussian()).save(path)
    gp, x, y, new = made("gaussian")
    gp.save(path)
    with pytest.raises(errors.InputError, match="was saved with kernel .*give one of that kind"):
        ExactGP.load(path, RBFKernel().double(), new[1], mean=new[2])
    with pytest.raises(errors.InputError, match="was saved with likelihood"):
        ExactGP.load(path, new[0], BernoulliLikelihood(), mean=new[2])
    with pytest.raises(errors.InputError, match="does not hold a DualGP"):
        DualGP.load(path, *new[:2], mean=new[2])
    with pytest.raises(errors.InputError, match="no file"):
        load(tmp_path / "nowhere", new)
    good = path.read_bytes()
    path.write_bytes(good[: len(good) // 2])
    with pytest.raises(errors.InputError, match="truncated"):
        load(path, new)
    gp.kernel.outputscale = 3.0
    with pytest.raises(errors.InputError, match="set by hand since the fit.*fit\\(X, y\\) again"):
        gp.save(path)
    assert path.read_bytes() == good[: len(good) // 2]
    for ask in (gp.predict, gp.predict_mean, lambda x: gp.sites, lambda x: gp.posterior()):
        with pytest.raises(errors.InputError, match="set by hand since the fit.*fit\\(X, y\\) again"):
            ask(x[:2])
    gp.fit(x, y, learn_hyperparameters=False)
    assert len(gp.predict(x[:2])[0]) == 2
    assert gp.kernel.outputscale.item() == pytest.approx(3.0)


@pytest.mark.parametrize("name", ["fit_x", "fit_u", "fit_noise", "fit_pivots", "fit_kl", "fit_lam"])
def test_a_file_whose_parts_do_not_go_together_is_refused(name, tmp_path, monkeypatch):
    gp, _, _, new = made("gaussian")
    pack = exact_storage.pack
    monkeypatch.setattr(exact_storage, "pack", lambda fitted: {**pack(fitted), name: pack(fitted)[name][:-1]})
    gp.save(tmp_path / "model")
    with pytest.raises(errors.InputError, match="is damaged"):
        load(tmp_path / "model", new)


def test_a_file_without_a_part_of_the_fit_is_refused(tmp_path, monkeypatch):
    gp, _, _, new = made("gaussian")
    monkeypatch.setattr(exact_storage, "pack", lambda _: {})
    gp.save(tmp_path / "model")
    with pytest.raises(errors.InputError, match="lacks .*fit_a"):
        load(tmp_path / "model", new)


def test_single_precision_modules_come_back_too(tmp_path):
    x = torch.linspace(0, 5, 40).unsqueeze(-1)
    gp = ExactGP(RBFKernel(), GaussianLikelihood(), rank=15)
    gp.fit(x, x.sin()[:, 0], learn_hyperparameters=False)
    gp.save(tmp_path / "model")
    loaded = ExactGP.load(tmp_path / "model", RBFKernel(), GaussianLikelihood())
    assert equal(list(gp.predict(x)), list(loaded.predict(x)))
