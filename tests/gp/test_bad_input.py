"""Bad input: an error that says what was expected and what came, and a model that is as it was."""

import copy
import pickle

import gpytorch
import pytest
import torch
from families import FAMILIES, fitted, kernel, softmax
from gpytorch.likelihoods import (
    BernoulliLikelihood,
    BetaLikelihood,
    FixedNoiseGaussianLikelihood,
    GaussianLikelihood,
    MultitaskGaussianLikelihood,
    PoissonLikelihood,
)
from safetensors.torch import save_file
from toys import F64, put, rbf, unchecked

from dualgp import DualGP, errors, likelihoods

X = torch.linspace(0, 1, 12, dtype=F64).reshape(6, 2)
Y = torch.linspace(-1, 1, 6, dtype=F64)
NAN, INF = float("nan"), float("inf")


def state(gp: DualGP) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in gp.state_dict().items()}


def refused(gp: DualGP, match: str, call, error=errors.InputError) -> None:
    """The call raises, and the model is as it was."""
    before, result, posterior = state(gp), gp.result, gp._posterior
    with pytest.raises(error, match=match) as caught, unchecked():
        call(gp)
    assert isinstance(caught.value, errors.DualGPError)
    after = gp.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(v, after[k]) for k, v in before.items())
    assert gp.result is result
    assert gp._posterior is posterior


def refused_by_a_new_model(match: str, call, likelihood=GaussianLikelihood, **options) -> None:
    refused(DualGP(rbf(), likelihood(), **{"num_inducing": 3} | options), match, call)


@pytest.mark.parametrize(
    ("x", "y", "match"),
    [
        (X[:, 0], Y, r"X must have shape .*got \(6,\).*unsqueeze"),
        (X, Y.unsqueeze(-1), r"y must have shape \(6,\).*got \(6, 1\).*squeeze"),
        (X, Y[:5], r"y must have shape \(6,\).*got \(5,\)"),
        (X, torch.stack([Y, Y]), r"y must have shape \(6,\).*got \(2, 6\)"),
        (X.expand(2, 6, 2), Y, r"y must have shape \(2, 6\).*got \(6,\)"),
        (X.long(), Y, "X must be float32 or float64, got torch.int64"),
        (X.half(), Y, "X must be float32 or float64, got torch.float16"),
        (X.to(torch.complex128), Y, "X must be float32 or float64, got torch.complex128"),
        (X, Y.to(torch.complex128), "y must hold real numbers.*complex128"),
        (X, Y > 0, "y must hold real numbers.*bool"),
        (put(X, (4, 1), NAN), Y, "X must be finite; 1 values.*row 4"),
        (put(X, (2, 0), INF), Y, "X must be finite; 1 values.*row 2"),
        (X, put(Y, 3, NAN), "y must be finite; 1 values"),
        (X, put(Y, slice(0, 2), -INF), "y must be finite; 2 values"),
        (put(X, (slice(None), 1), 0.5), Y, r"Columns \[1\] of X are constant.*drop"),
        (X[:2], Y[:2], "3 inducing points need at least as many data, got 2"),
        (X[:0], Y[:0], "3 inducing points need at least as many data, got 0"),
        (X.numpy(), Y, "X must be a torch.Tensor|A loader must give|loader"),
        (X, Y.tolist(), "y must be a torch.Tensor, got list"),
        (X, None, "needs the targets"),
    ],
)
def test_bad_training_data(x, y, match):
    call = lambda gp: gp.fit(x, y, progress=False)  # noqa: E731
    refused_by_a_new_model(match, call)
    if "inducing" not in match:  # a fitted model has its Z
        fitted_gp = DualGP(rbf(), GaussianLikelihood(), num_inducing=3)
        fitted_gp.fit(X, Y, learn_hyperparameters=False, learn_inducing=False, progress=False)
        refused(fitted_gp, match, call)


def test_bad_training_data_of_several_outputs():
    two = lambda: MultitaskGaussianLikelihood(num_tasks=2)  # noqa: E731
    refused_by_a_new_model(r"y must have shape \(6, 2\).*got \(6,\)", lambda gp: gp.fit(X, Y, progress=False), two)
    refused_by_a_new_model(
        r"y must have shape \(6, 2\).*got \(6, 3\)", lambda gp: gp.fit(X, Y.expand(3, 6).T, progress=False), two
    )
    refused_by_a_new_model(
        r"y must have shape \(6, 2\).*got \(2, 6\)", lambda gp: gp.fit(X, Y.expand(2, 6), progress=False), two
    )
    refused_by_a_new_model(r"y must have shape \(6,\)", lambda gp: gp.fit(X, Y.expand(3, 6).T, progress=False), softmax)


@pytest.mark.parametrize(
    ("likelihood", "y", "match"),
    [
        (BernoulliLikelihood, put(torch.ones(6), 0, -1.0), r"0 or 1.*\(y \+ 1\) / 2.*1 of 6.*-1"),
        (BernoulliLikelihood, put(torch.ones(6), 0, 0.5), "0 or 1.*0.5"),
        (likelihoods.LogitBernoulliLikelihood, put(torch.ones(6), 2, 2.0), "LogitBernoulli.*0 or 1.*2"),
        (softmax, torch.arange(6), "0 … 2; 3 of 6.*being 3"),
        (softmax, put(torch.zeros(6), 1, 0.5), "0 … 2.*0.5"),
        (softmax, put(torch.zeros(6).long(), 1, -1), "0 … 2.*-1"),
        (PoissonLikelihood, put(torch.ones(6), 0, -1.0), "Poisson.*-1"),
        (PoissonLikelihood, put(torch.ones(6), 0, 0.5), "Poisson.*0.5"),
        (likelihoods.LogPoissonLikelihood, put(torch.ones(6), 0, 0.5), "Poisson.*0.5"),
        (BetaLikelihood, put(torch.full((6,), 0.5), 0, 1.5), "Beta.*1.5"),
        (BetaLikelihood, put(torch.full((6,), 0.5), 0, 0.0), "Beta.*being 0"),
        (BetaLikelihood, put(torch.full((6,), 0.5), 0, 1.0), "Beta.*being 1"),
    ],
)
def test_targets_outside_the_support_of_the_likelihood(likelihood, y, match):
    refused_by_a_new_model(match, lambda gp: gp.fit(X, y, progress=False), likelihood)


@pytest.mark.parametrize(
    ("likelihood", "y"), [(softmax, torch.arange(6) % 3), (BernoulliLikelihood, torch.arange(6) % 2)]
)
def test_integer_labels_are_welcome(likelihood, y):
    gp = DualGP(rbf(), likelihood(), num_inducing=3)
    gp.fit(X, y, progress=False, learn_hyperparameters=False, learn_inducing=False)
    with_floats = DualGP(rbf(), likelihood(), num_inducing=3)
    with_floats.fit(X, y.double(), progress=False, learn_hyperparameters=False, learn_inducing=False)
    assert gp.result.elbo == with_floats.result.elbo


def test_noise_that_does_not_fit_the_data():
    six = lambda: FixedNoiseGaussianLikelihood(torch.ones(5))  # noqa: E731
    refused_by_a_new_model("noise for 5 data, but 6 were given", lambda gp: gp.fit(X, Y, progress=False), six)
    gp = DualGP(rbf(), FixedNoiseGaussianLikelihood(torch.ones(6)), num_inducing=3)
    gp.fit(X, Y, learn_hyperparameters=False, learn_inducing=False, progress=False)
    refused(gp, "pass noise=", lambda gp: gp.elbo(X, Y))
    refused(gp, "pass noise=", lambda gp: gp.predict_likelihood(X))
    refused(gp, "noise= must hold one finite value per datum", lambda gp: gp.elbo(X, Y, noise=torch.ones(5)))
    refused(gp, "noise= must .*(finite|positive)", lambda gp: gp.elbo(X, Y, noise=torch.full((6,), NAN)))


def test_mixed_devices():
    refused_by_a_new_model("X is on cpu and y on meta", lambda gp: gp.fit(X, Y.to("meta"), progress=False))


def test_inducing_points_that_do_not_fit():
    refused_by_a_new_model(
        "inducing_points have 3 columns",
        lambda gp: gp.fit(X, Y, progress=False),
        num_inducing=None,
        inducing_points=X.new_ones(2, 3),
    )
    for bad, match in (
        (X[0], "inducing_points must have shape"),
        (put(X, (0, 0), NAN), "inducing_points must be finite"),
        (X.long(), "inducing_points must be float32 or float64"),
    ):
        with pytest.raises(errors.InputError, match=match):
            DualGP(rbf(), GaussianLikelihood(), inducing_points=bad)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_inducing": 3, "inducing_points": X}, "not both"),
        ({"num_inducing": 0}, "at least 1, got 0"),
        ({"jitter": -1e-6}, "jitter must be ≥ 0"),
        ({"jitter": NAN}, "jitter must be ≥ 0"),
        ({"num_outputs": 0}, "num_outputs"),
    ],
)
def test_arguments_that_contradict(options, match):
    with pytest.raises(errors.InputError, match=match):
        DualGP(rbf(), GaussianLikelihood(), **options)


def test_outputs_that_contradict_the_likelihood_or_the_kernel():
    with pytest.raises(errors.InputError, match="has 3 outputs, but num_outputs=2"):
        DualGP(rbf(), softmax(), num_outputs=2)
    refused(
        DualGP(kernel(2), softmax(), num_inducing=3),
        r"3 outputs needs a kernel and mean with batch shape",
        lambda gp: gp.fit(X, torch.arange(6) % 3, progress=False),
    )


@pytest.mark.parametrize("wrong", [3.0, torch.nn.Linear(1, 1), GaussianLikelihood])
def test_what_is_no_kernel_mean_or_likelihood_is_named(wrong):
    name = type(wrong).__name__
    with unchecked():
        with pytest.raises(errors.UnsupportedError, match=f"Kernel.*{name}"):
            DualGP(wrong, GaussianLikelihood())
        with pytest.raises(errors.UnsupportedError, match=f"{name}.*not supported.*Likelihood"):
            DualGP(rbf(), wrong)
        with pytest.raises(errors.UnsupportedError, match=f"mean must be .*{name}"):
            DualGP(rbf(), GaussianLikelihood(), mean=wrong)


@pytest.mark.parametrize("options", [{"tol": 0.0}, {"tol": NAN}, {"max_rounds": 0}, {"batch_size": 0}])
def test_bad_stopping_rules(options):
    refused_by_a_new_model("tol|max_rounds|batch_size", lambda gp: gp.fit(X, Y, progress=False, **options))


@pytest.mark.parametrize(
    "use",
    [
        lambda gp: gp.predict(X),
        lambda gp: gp.predict_joint(X),
        lambda gp: gp(X),
        lambda gp: gp.sample(X, 2),
        lambda gp: gp.predict_likelihood(X),
        lambda gp: gp.nlpd(X, Y),
        lambda gp: gp.elbo(X, Y),
        lambda gp: gp.sites_at(X, Y),
        lambda gp: gp.posterior,
        lambda gp: gp.sites,
        lambda gp: gp.save("nowhere"),
    ],
)
def test_use_before_fit(use):
    gp = DualGP(rbf(), GaussianLikelihood(), num_inducing=3)
    refused(gp, "fit", use, errors.NotFittedError)


@pytest.mark.parametrize(
    "verb", ["predict", "predict_joint", "sample", "predict_likelihood", "elbo", "nlpd", "sites_at"]
)
@pytest.mark.parametrize(
    ("x", "match"),
    [
        (torch.zeros(4, 3, dtype=F64), "1 columns|got 3|4, 3"),
        (torch.zeros(4, dtype=F64), r"shape.*got \(4,\)"),
        (torch.full((4, 1), NAN, dtype=F64), "finite"),
        (torch.zeros(4, 1), "float64"),
        (torch.zeros(4, 1).long(), "int64"),
        ([[0.0]], "Tensor, got list"),
    ],
)
def test_bad_inputs_to_a_fitted_model(verb, x, match):
    gp = copy.deepcopy(fitted("gaussian")[0].gp)
    y = () if verb.startswith(("predict", "sample")) else (torch.zeros(4, dtype=F64),)
    refused(gp, match, lambda gp: getattr(gp, verb)(x, *y))


def test_targets_at_prediction_are_checked_too():
    gp = copy.deepcopy(fitted("probit")[0].gp)
    x = torch.zeros(4, 1, dtype=F64)
    for y, match in ((-torch.ones(4), "0 or 1"), (torch.ones(3), "shape"), (torch.ones(4, 1), "squeeze")):
        refused(gp, match, lambda gp, y=y: gp.nlpd(x, y))
        refused(gp, match, lambda gp, y=y: gp.elbo(x, y))
        refused(gp, match, lambda gp, y=y: gp.sites_at(x, y))
    refused(gp, "no rows", lambda gp: gp.nlpd(x[:0], torch.ones(0, dtype=F64)))


# --- files ----------------------------------------------------------------------------------------


def saved(tmp_path):
    path = tmp_path / "model.safetensors"
    fitted("gaussian")[0].gp.save(path)
    return path


def load(path, *modules, **options) -> DualGP:
    return DualGP.load(path, *(modules or (kernel(), GaussianLikelihood().double())), **options)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file(tmp_path, keep):
    path = saved(tmp_path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(errors.InputError, match="truncated"):
        load(path)


class Payload:
    ran = False

    def __reduce__(self):
        return (setattr, (Payload, "ran", True))


def test_a_pickle_is_refused_and_not_run(tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(pickle.dumps(Payload()))
    with pytest.raises(errors.InputError, match="safetensors"):
        load(path)
    torch.save({"a": torch.ones(1)}, path)
    with pytest.raises(errors.InputError, match="safetensors"):
        load(path)
    assert not Payload.ran


def test_foreign_files(tmp_path):
    path = tmp_path / "other.safetensors"
    with pytest.raises(errors.InputError, match="no file"):
        load(path)
    with pytest.raises(errors.InputError, match="no file"):
        load(tmp_path)
    save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(errors.InputError, match="does not hold a DualGP"):
        load(path)
    save_file({"weight": torch.ones(2)}, path, metadata={"format": "dualgp.DualGP", "version": "99", "config": "{}"})
    with pytest.raises(errors.InputError, match="version 99"):
        load(path)


@pytest.mark.parametrize("config", ["{}", "not json", "[]"])
def test_a_file_with_a_damaged_header(tmp_path, config):
    path = tmp_path / "other.safetensors"
    save_file({"a": torch.ones(2)}, path, metadata={"format": "dualgp.DualGP", "version": "1", "config": config})
    with pytest.raises(errors.InputError):
        load(path)


def test_modules_of_another_kind_or_shape_than_was_saved(tmp_path):
    path = saved(tmp_path)
    with pytest.raises(errors.InputError, match="likelihood GaussianLikelihood.*, but BernoulliLikelihood"):
        load(path, kernel(), BernoulliLikelihood())
    with pytest.raises(errors.InputError, match="kernel ScaleKernel.*, but RBFKernel"):
        load(path, gpytorch.kernels.RBFKernel(), GaussianLikelihood())
    with pytest.raises(errors.InputError, match="mean None, but ConstantMean"):
        load(path, kernel(), GaussianLikelihood(), mean=gpytorch.means.ConstantMean())
    with pytest.raises(errors.InputError, match="saved with kernel"):
        load(path, gpytorch.kernels.ScaleKernel(gpytorch.kernels.RQKernel()), GaussianLikelihood())
    with pytest.raises(errors.InputError, match="shape"):
        load(path, kernel(2), GaussianLikelihood())


def test_a_refused_load_leaves_the_given_modules_alone(tmp_path):
    path = saved(tmp_path)
    mine, likelihood = kernel(2), GaussianLikelihood().double()
    before = [p.clone() for p in (*mine.parameters(), *likelihood.parameters())]
    with pytest.raises(errors.InputError):
        load(path, mine, likelihood)
    assert all(torch.equal(a, b) for a, b in zip(before, (*mine.parameters(), *likelihood.parameters()), strict=True))


def test_a_kernel_with_other_settings_of_the_same_kind_is_refused(tmp_path):
    problem = FAMILIES["gaussian"]()
    matern = gpytorch.kernels.ScaleKernel(gpytorch.kernels.MaternKernel(nu=2.5)).double()
    gp = DualGP(matern, GaussianLikelihood().double(), num_inducing=4)
    gp.fit(problem.x, problem.y, progress=False)
    gp.save(tmp_path / "model")
    with pytest.raises(errors.InputError, match="ScaleKernel|Matern|RBF"):
        load(tmp_path / "model")  # a scaled RBF kernel, with parameters of the same names and shapes
