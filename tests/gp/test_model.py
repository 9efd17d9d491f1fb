"""`DualGP` as a value to keep: prediction, saving, moving, copying, and calls that fail half way."""

import copy
import math

import gpytorch
import pytest
import torch
from families import FAMILIES, N, fitted, kernel
from gpytorch.likelihoods import BernoulliLikelihood, GaussianLikelihood, SoftmaxLikelihood
from toys import F64, at, gap, line, rbf, waves

from dualgp import DualGP, Posterior, errors
from dualgp.gp import fit as fit_module

SAVED = ["gaussian", "student-t", "multitask, kernel per output", "batch of GPs", "custom counts"]


def copied(name: str) -> DualGP:
    return copy.deepcopy(fitted(name)[0].gp)


def test_inputs(name: str) -> torch.Tensor:
    x = fitted(name)[0].x
    return x[..., ::7, :] + 0.01


test_inputs.__test__ = False  # a helper, not a test


def same_predictions(a: DualGP, b: DualGP, x: torch.Tensor) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.predict(x), b.predict(x), strict=True))


# --- prediction ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAVED)
def test_joint_samples_and_marginals_agree(name):
    gp, x = fitted(name)[0].gp, test_inputs(name)
    mean, var = gp.predict(x)
    joint = gp.predict_joint(x)
    assert gap(joint.mean, mean) < 1e-9
    assert gap(joint.variance, var) < 1e-9
    assert gap(gp(x).covariance_matrix, joint.covariance_matrix) == 0
    draws = gp.sample(x, 4000, generator=torch.Generator().manual_seed(0))
    assert draws.shape == (4000, *mean.shape)
    assert ((draws.mean(0) - mean).abs() < 5 * (var / 4000).sqrt() + 1e-6).all()
    assert ((draws.var(0) - var).abs() < 5 * var * (2 / 4000) ** 0.5 + 1e-6).all()


def test_scores_are_those_of_the_predictive_distribution():
    problem, _ = fitted("gaussian")
    gp, x, y = problem.gp, problem.x, problem.y
    mean, var = gp.predict(x)
    normal = torch.distributions.Normal(mean, (var + gp.likelihood.noise.detach()).sqrt())
    assert gap(gp.log_predictive(x, y), normal.log_prob(y)) < 1e-10
    assert gap(gp.nlpd(x, y), -normal.log_prob(y).mean()) < 1e-10
    assert gap(gp.predict_likelihood(x).log_prob(y), normal.log_prob(y)) < 1e-10


def test_an_empty_batch_predicts_nothing():
    for name in SAVED:
        gp = fitted(name)[0].gp
        x = fitted(name)[0].x[..., :0, :]
        mean, var = gp.predict(x)
        assert mean.numel() == var.numel() == 0
        assert mean.ndim == gp.predict(test_inputs(name))[0].ndim
        assert gp.log_predictive(x, fitted(name)[0].y.narrow(x.ndim - 2, 0, 0)).numel() == 0


def test_predictions_follow_the_gradient_in_x():
    gp = fitted("gaussian")[0].gp
    x = at(0.3).reshape(1, 1).requires_grad_()
    mean, var = gp.predict(x)
    slope = torch.autograd.grad(mean.sum() + var.sum(), x)[0].item()
    step = 1e-5
    up, down = (gp.predict(x.detach() + s) for s in (step, -step))
    assert slope == pytest.approx(sum((a - b).item() for a, b in zip(up, down, strict=True)) / (2 * step), rel=1e-6)


# --- saving, moving, copying --------------------------------------------------------------------


def new_like(name: str) -> tuple:
    fresh = FAMILIES[name]().gp
    return fresh.kernel, fresh.likelihood


@pytest.mark.parametrize("name", SAVED)
def test_a_saved_model_loads_to_the_last_bit(name, tmp_path):
    gp = copied(name)
    path = tmp_path / "model.safetensors"
    gp.save(path)
    loaded = DualGP.load(path, *new_like(name))
    x = test_inputs(name)
    assert same_predictions(gp, loaded, x)
    assert torch.equal(gp.sites.lam, loaded.sites.lam)
    assert torch.equal(gp.sites.beta, loaded.sites.beta)
    assert loaded.num_outputs == gp.num_outputs
    assert loaded.elbo(*fitted(name)[0][:2]) == gp.elbo(*fitted(name)[0][:2])
    loaded.save(path)  # over the file it came from
    assert same_predictions(gp, DualGP.load(path, *new_like(name)), x)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_float32_model_with_a_mean_loads_to_the_last_bit(tmp_path):
    x, f, _ = waves(N, 2)
    gp = DualGP(rbf().float(), GaussianLikelihood(), mean=gpytorch.means.LinearMean(2), num_inducing=10)
    gp.fit(x.float(), f.float() + 1, progress=False)
    gp.save(tmp_path / "model")
    mean = gpytorch.means.LinearMean(2)
    loaded = DualGP.load(tmp_path / "model", rbf().float(), GaussianLikelihood(), mean=mean)
    assert same_predictions(gp, loaded, x.float())
    assert loaded.predict(x.float())[0].dtype == torch.float32


@pytest.mark.parametrize("name", SAVED)
def test_a_state_dict_goes_into_a_new_model(name):
    gp = copied(name)
    other = FAMILIES[name]().gp
    other.load_state_dict(gp.state_dict())
    assert same_predictions(gp, other, test_inputs(name))
    gp.load_state_dict(gp.state_dict())
    assert same_predictions(gp, other, test_inputs(name))


def test_a_state_dict_of_another_model_replaces_a_posterior_already_computed():
    gp, other = copied("gaussian"), copied("gaussian")
    problem = fitted("gaussian")[0]
    other.fit(problem.x, -problem.y, progress=False)
    gp.predict(problem.x)
    gp.load_state_dict(other.state_dict())
    assert same_predictions(gp, other, problem.x)


def test_an_unfitted_state_dict_forgets_the_posterior():
    gp = copied("gaussian")
    gp.load_state_dict(FAMILIES["gaussian"]().gp.state_dict())
    with pytest.raises(errors.NotFittedError):
        gp.predict(test_inputs("gaussian"))


@pytest.mark.parametrize("name", SAVED)
def test_a_deep_copy_shares_nothing(name):
    problem, x = fitted(name)[0], test_inputs(name)
    gp = copied(name)
    before = [p.clone() for p in problem.gp.predict(x)]
    assert same_predictions(gp, problem.gp, x)
    gp.fit(problem.x, problem.y.flip(problem.x.ndim - 2), progress=False, learn_hyperparameters=False)
    assert not torch.equal(gp.predict(x)[0], before[0])
    for a, b in zip(before, problem.gp.predict(x), strict=True):
        assert torch.equal(a, b)


def test_sites_stay_float64_when_the_model_is_float32():
    gp, x = copied("gaussian"), test_inputs("gaussian")
    mean, var = gp.predict(x)
    exact = {k: getattr(gp, k).clone() for k in ("site_lam", "site_B", "lam", "beta")}
    gp.to(torch.float32)
    for name, value in exact.items():
        assert torch.equal(getattr(gp, name), value)
    low_mean, low_var = gp.predict(x.float())
    assert low_mean.dtype == low_var.dtype == torch.float32
    assert gap(low_mean, mean) < 1e-3
    assert gap(low_var, var) < 1e-3
    gp.to(torch.float64)
    assert gp.predict(x)[0].dtype == F64
    assert gap(gp.predict(x)[0], mean) < 1e-3


def test_training_the_parameters_by_hand_does_not_change_the_posterior_in_silence():
    gp, x = copied("gaussian"), test_inputs("gaussian")
    before = gp.predict(x)
    q = gp.posterior
    with torch.no_grad():
        gp.kernel.raw_outputscale.add_(1.0)
    assert gap(q.predict(x)[0], before[0]) == 0
    assert isinstance(q, Posterior)


# --- calls that fail half way ---------------------------------------------------------------------


def state(gp: DualGP) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in gp.state_dict().items()}


def unchanged(before: dict[str, torch.Tensor], gp: DualGP) -> bool:
    after = gp.state_dict()
    return before.keys() == after.keys() and all(torch.equal(v, after[k]) for k, v in before.items())


@pytest.mark.parametrize("stop", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("first", [True, False], ids=["first fit", "refit"])
@pytest.mark.parametrize("where", ["e_step", "m_step", "_finish"])
def test_an_interrupted_fit_changes_nothing(monkeypatch, stop, first, where):
    problem = fitted("probit")[0]
    gp = FAMILIES["probit"]().gp if first else copied("probit")
    before, result, flags = state(gp), gp.result, [p.requires_grad for p in gp.parameters()]
    original = getattr(fit_module, where)

    def interrupted(*args, **options):
        original(*args, **options)
        raise stop

    monkeypatch.setattr(fit_module, where, interrupted)
    with pytest.raises(stop):
        gp.fit(problem.x, 1 - problem.y, progress=False)
    assert unchanged(before, gp)
    assert gp.result is result
    assert flags == [p.requires_grad for p in gp.parameters()]
    assert all(p.grad is None for p in gp.parameters())
    if not first:
        assert same_predictions(gp, problem.gp, problem.x)


def test_fit_leaves_train_mode_dtype_and_the_given_tensors_alone():
    x, f, _ = waves(N, 1)
    gp = DualGP(rbf().float(), GaussianLikelihood(), num_inducing=6)
    gp.train()
    given = x.float(), f.float()
    copies = [t.clone() for t in given]
    gp.fit(*given, progress=False)
    assert gp.training
    assert gp.kernel.training
    assert {p.dtype for p in gp.parameters()} == {torch.float32}
    assert all(torch.equal(a, b) for a, b in zip(given, copies, strict=True))
    assert gp.inducing_points.dtype == torch.float32


def test_a_failed_save_leaves_the_file_that_was_there(tmp_path, monkeypatch):
    gp, path = copied("gaussian"), tmp_path / "model.safetensors"
    gp.save(path)
    good = path.read_bytes()

    def full_disk(*args, **options):
        raise OSError("no space left")

    monkeypatch.setattr("dualgp.files.os.fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        gp.save(path)
    assert path.read_bytes() == good
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


# --- what cannot be used says so ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: SoftmaxLikelihood(num_features=3, num_classes=3), "SoftmaxLikelihood.*mixing"),
        (lambda: gpytorch.likelihoods.MultitaskGaussianLikelihood(num_tasks=2, rank=1), "rank=0"),
        (lambda: gpytorch.likelihoods.DirichletClassificationLikelihood(torch.tensor([0, 1, 1])), "Dirichlet"),
        (lambda: gpytorch.likelihoods.LikelihoodList(GaussianLikelihood()), "LikelihoodList"),
    ],
)
def test_likelihoods_that_cannot_be_used_are_named_at_construction(make, match):
    with pytest.raises(errors.UnsupportedError, match=match):
        DualGP(kernel(), make(), num_inducing=3)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: gpytorch.kernels.MultitaskKernel(gpytorch.kernels.RBFKernel(), 2), "MultitaskKernel"),
        (lambda: gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernelGrad()), "RBFKernelGrad"),
        (lambda: gpytorch.kernels.GridInterpolationKernel(gpytorch.kernels.RBFKernel(), 9, 1), "base kernel"),
        (
            lambda: gpytorch.kernels.InducingPointKernel(
                gpytorch.kernels.RBFKernel(), line(0, 1, 3), GaussianLikelihood()
            ),
            "InducingPointKernel",
        ),
    ],
)
def test_kernels_that_cannot_be_used_are_named_at_construction(make, match):
    with pytest.raises(errors.UnsupportedError, match=match):
        DualGP(make(), BernoulliLikelihood(), num_inducing=3)


def test_a_result_says_how_it_went():
    problem, result = fitted("gaussian")
    assert result is problem.gp.result
    assert result.converged
    assert result.num_data == N
    assert result.rounds >= 1
    assert all(math.isfinite(number) for entry in result.trace for number in entry)
    with pytest.warns(errors.ConvergenceWarning, match="max_rounds"):
        other = FAMILIES["student-t"]()
        short = other.gp.fit(other.x, other.y, max_rounds=1, tol=1e-12, progress=False)
    assert not short.converged
