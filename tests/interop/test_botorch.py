"""BoTorch, where it is installed: its acquisition functions on a dual GP give the numbers that its own model gives."""

import gpytorch
import pytest
import torch
from families import fitted
from reference import numerical
from toys import F64, gap, gaussian, line, matern, unchecked, waves

from dualgp import DualGP, errors
from dualgp.information import mutual_information
from dualgp.likelihoods import LogPoissonLikelihood

botorch = pytest.importorskip("botorch", reason="BoTorch is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # of theirs

from botorch import acquisition as acq  # noqa: E402
from botorch.acquisition.objective import ScalarizedPosteriorTransform  # noqa: E402
from botorch.generation import MaxPosteriorSampling  # noqa: E402
from botorch.models import SingleTaskGP  # noqa: E402
from botorch.models.transforms import Log, Normalize, Standardize  # noqa: E402
from botorch.optim import optimize_acqf  # noqa: E402
from botorch.posteriors import TransformedPosterior  # noqa: E402
from botorch.sampling import SobolQMCNormalSampler  # noqa: E402

from dualgp.interop.botorch import BALD, DualGPModel  # noqa: E402

X, F, _ = waves(14, 2)
Y = (F + 0.2 * torch.randn(14, generator=torch.Generator().manual_seed(3), dtype=F64)).unsqueeze(-1)
T = torch.rand(4, 3, 2, generator=torch.Generator().manual_seed(1), dtype=F64) * 3 - 1.5  # b x q x d
CANDIDATES = torch.rand(60, 2, generator=torch.Generator().manual_seed(2), dtype=F64) * 3 - 1.5
BOUNDS = torch.tensor([[-1.5, -1.5], [1.5, 1.5]], dtype=F64)
# Z = X is exact but for a jitter of 1e-10, which the condition of K (1e4) makes 1e-6 at worst.
TOL = 1e-6


def theirs(Y: torch.Tensor = Y, **options) -> SingleTaskGP:
    model = SingleTaskGP(
        X, Y, covar_module=matern(0.7, 1.5), likelihood=gaussian(), **{"outcome_transform": None, **options}
    )
    model.mean_module.constant.data.fill_(0.3)
    return model.eval()


def dual(model: SingleTaskGP, x: torch.Tensor = X, y: torch.Tensor = Y) -> DualGP:
    gp = DualGP(model.covar_module, model.likelihood, mean=model.mean_module, inducing_points=x, jitter=1e-10)
    gp.fit(x, y.squeeze(-1), learn_hyperparameters=False, learn_inducing=False)
    return gp


def both(**options) -> tuple[DualGPModel, SingleTaskGP]:
    model = theirs(**options)
    return DualGPModel(dual(model)), model


def sampler(n: int) -> SobolQMCNormalSampler:
    return SobolQMCNormalSampler(torch.Size([n]), seed=7)


def seeded(make):
    def made(model):
        torch.manual_seed(5)  # of their maxima
        return make(model)

    return made


NOISY = {"X_baseline": X, "prune_baseline": False}
FUNCTIONS = {
    "LogEI": (1, lambda m: acq.LogExpectedImprovement(m, 0.5)),
    "UCB": (1, lambda m: acq.UpperConfidenceBound(m, 2.0)),
    "PosteriorStandardDeviation": (1, acq.PosteriorStandardDeviation),
    "qLogEI": (3, lambda m: acq.qLogExpectedImprovement(m, 0.5, sampler=sampler(64))),
    "qEI": (3, lambda m: acq.qExpectedImprovement(m, 0.5, sampler=sampler(64))),
    "qUCB": (3, lambda m: acq.qUpperConfidenceBound(m, 2.0, sampler=sampler(64))),
    "qNEI": (3, lambda m: acq.qNoisyExpectedImprovement(m, sampler=sampler(64), **NOISY)),
    "qLogNEI, root": (
        3,
        lambda m: acq.qLogNoisyExpectedImprovement(m, sampler=sampler(64), cache_root=True, **NOISY),
    ),
    "qLogNEI, no root": (
        3,
        lambda m: acq.qLogNoisyExpectedImprovement(m, sampler=sampler(64), cache_root=False, **NOISY),
    ),
    "qKG": (3, lambda m: acq.qKnowledgeGradient(m, num_fantasies=2, sampler=sampler(2))),
    "qMES": (1, seeded(lambda m: acq.qMaxValueEntropy(m, CANDIDATES, train_inputs=X))),
    "qMES, pending": (
        1,
        seeded(lambda m: acq.qMaxValueEntropy(m, CANDIDATES, train_inputs=X, num_fantasies=4, X_pending=T[0])),
    ),
    "GIBBON": (1, seeded(lambda m: acq.qLowerBoundMaxValueEntropy(m, CANDIDATES, train_inputs=X))),
    "GIBBON, pending": (
        1,
        seeded(lambda m: acq.qLowerBoundMaxValueEntropy(m, CANDIDATES, train_inputs=X, X_pending=T[0])),
    ),
    "qNIPV": (3, lambda m: acq.qNegIntegratedPosteriorVariance(m, CANDIDATES, sampler=sampler(1))),
}


# --- the Gaussian case ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", FUNCTIONS)
def test_acquisition_values_and_gradients_are_those_of_their_own_model(name):
    q, make = FUNCTIONS[name]
    values, gradients, models = [], [], both()
    for model in models:
        x = T[:, :q].clone().requires_grad_()
        value = make(model)(x)
        values.append(value.detach())
        gradients.append(torch.autograd.grad(value.sum(), x)[0])
    assert gap(*values) < TOL
    scale = max(1.0, float(gradients[1].abs().max()))  # a logarithm is steep in its tail
    if name == "qNIPV":  # theirs holds the fantasies' inputs fixed
        unit = torch.zeros_like(T)
        unit[1, 0, 1] = 1.0
        with torch.no_grad():
            want = numerical(lambda s: make(models[0])(T + s * unit).sum(), torch.zeros((), dtype=F64), step=1e-3)
        assert gap(gradients[0][1, 0, 1], want) < 10 * TOL
    else:
        assert gap(*gradients) < 10 * TOL * scale


@pytest.mark.parametrize("noise", [False, True, torch.full((3, 1), 0.4, dtype=F64)])
def test_the_posterior_is_that_of_their_own_model(noise):
    ours, model = both()
    found = ours.posterior(T, observation_noise=noise)
    if isinstance(noise, torch.Tensor):  # their homoskedastic model does not look at it
        want = model.posterior(T)
        cov = want.distribution.covariance_matrix + 0.4 * torch.eye(3, dtype=F64)
    else:
        want = model.posterior(T, observation_noise=noise)
        cov = want.distribution.covariance_matrix
    assert gap(found.mean, want.mean) < TOL
    assert found.mean.shape == want.mean.shape
    assert gap(found.distribution.covariance_matrix, cov) < TOL
    assert (ours.num_outputs, ours.batch_shape) == (1, torch.Size())


def test_maxima_are_drawn_alike():
    found = []
    for model in both():
        torch.manual_seed(3)
        found.append(MaxPosteriorSampling(model, replacement=False)(CANDIDATES, num_samples=5))
    assert torch.equal(*found)


def test_conditioning_is_that_of_their_own_model_in_batches_and_twice():
    ours, model = both()
    model.posterior(T)  # which fills their caches
    y = torch.randn(5, 4, 3, 1, generator=torch.Generator().manual_seed(4), dtype=F64)
    found, want = ours.condition_on_observations(T, y), model.condition_on_observations(T, y)
    assert found.batch_shape == want.batch_shape == (5, 4)
    for _ in range(2):
        a, b = found.posterior(CANDIDATES[:6]), want.posterior(CANDIDATES[:6])
        assert gap(a.mean, b.mean) < TOL
        assert gap(a.distribution.covariance_matrix, b.distribution.covariance_matrix) < TOL
        found = found.condition_on_observations(T + 0.1, y)
        want = want.condition_on_observations((T + 0.1).expand(5, 4, 3, 2), y)


def test_fixed_noise():
    noise = 0.05 + torch.rand(14, 1, generator=torch.Generator().manual_seed(4), dtype=F64)
    model = SingleTaskGP(X, Y, noise, covar_module=matern(0.7, 1.5), outcome_transform=None).eval()
    likelihood = gpytorch.likelihoods.FixedNoiseGaussianLikelihood(noise.squeeze(-1))
    gp = DualGP(model.covar_module, likelihood, mean=model.mean_module, inducing_points=X, jitter=1e-10)
    gp.fit(X, Y.squeeze(-1), learn_hyperparameters=False, learn_inducing=False)
    ours = DualGPModel(gp)
    x = T[:, :1]
    values = [acq.qKnowledgeGradient(m, num_fantasies=2, sampler=sampler(2))(T) for m in (ours, model)]
    assert gap(*values) < TOL
    for observation_noise in (False, True):
        a, b = (m.posterior(x, observation_noise=observation_noise) for m in (ours, model))
        assert gap(a.variance, b.variance) < TOL
    y, more = Y[:3].expand(4, 3, 1), noise[:3].expand(4, 3, 1)
    a, b = (m.condition_on_observations(T, y, noise=more).posterior(x) for m in (ours, model))
    assert gap(a.mean, b.mean) < TOL
    assert gap(a.variance, b.variance) < TOL
    with pytest.raises(errors.InputError, match="pass noise="):
        ours.condition_on_observations(T, y)


def test_transforms():
    model = theirs(5 + 3 * Y, input_transform=Normalize(d=2), outcome_transform=Standardize(m=1))
    options = {"input_transform": Normalize(d=2), "outcome_transform": Standardize(m=1)}
    gp = DualGP(model.covar_module, model.likelihood, mean=model.mean_module, num_inducing=14, jitter=1e-10)
    ours = DualGPModel.fitted(gp, X, 5 + 3 * Y, learn_hyperparameters=False, learn_inducing=False, **options)
    for name in ("qLogEI", "qLogNEI, root", "qKG"):
        q, make = FUNCTIONS[name]
        assert gap(make(ours)(T[:, :q]), make(model)(T[:, :q])) < 3 * TOL  # in units that are 3 times as large
    a, b = (m.condition_on_observations(T, 5 + T[..., :1]).posterior(T) for m in (ours, model))
    assert gap(a.mean, b.mean) < 3 * TOL
    assert options["input_transform"].training  # what was given is as it was


def test_an_outcome_transform_that_is_not_linear():
    gp = DualGP(matern(0.7, 1.5), gaussian(), inducing_points=X, jitter=1e-10)
    ours = DualGPModel.fitted(gp, X, Y.exp(), outcome_transform=Log(), learn_hyperparameters=False)
    found = ours.posterior(T)
    assert isinstance(found, TransformedPosterior)
    assert gap(found.rsample(torch.Size([2])).log().isfinite(), 1.0) == 0.0
    assert acq.qExpectedImprovement(ours, 1.0, sampler=sampler(16))(T).isfinite().all()


def test_several_outputs():
    pair = torch.cat([Y, -0.5 * Y + 0.1], -1)
    kernel = matern(
        torch.tensor([0.5, 0.9], dtype=F64).reshape(2, 1, 1),
        torch.tensor([1.0, 2.0], dtype=F64),
        batch_shape=torch.Size([2]),
    )
    model = SingleTaskGP(
        X,
        pair,
        covar_module=kernel,
        outcome_transform=None,
        mean_module=gpytorch.means.ZeroMean(batch_shape=torch.Size([2])),
    ).eval()
    likelihood = gpytorch.likelihoods.MultitaskGaussianLikelihood(num_tasks=2, has_global_noise=False).double()
    likelihood.task_noises = model.likelihood.noise.detach().squeeze(-1)
    gp = DualGP(kernel, likelihood, inducing_points=X, jitter=1e-10)
    gp.fit(X, pair, learn_hyperparameters=False, learn_inducing=False)
    ours, weights = DualGPModel(gp), ScalarizedPosteriorTransform(torch.tensor([0.3, 0.7], dtype=F64))
    for noise in (False, True):
        a, b = (m.posterior(T, observation_noise=noise) for m in (ours, model))
        assert a.mean.shape == b.mean.shape == (4, 3, 2)
        assert gap(a.mean, b.mean) < TOL
        assert gap(a.variance, b.variance) < TOL
    for chosen in ([1], [1, 0], [-1]):
        want = model.posterior(T).mean[..., chosen]
        assert gap(ours.posterior(T, output_indices=chosen).mean, want) < TOL
        subset = ours.subset_output(chosen)
        assert subset.num_outputs == len(chosen)
        assert gap(subset.posterior(T).mean, want) < TOL
    for root in (True, False):
        made = [
            acq.qLogNoisyExpectedImprovement(
                m, sampler=sampler(64), cache_root=root, **NOISY, objective=acq.LinearMCObjective(weights.weights)
            )
            for m in (ours, model)
        ]
        assert gap(*(f(T) for f in made)) < TOL
    made = [
        acq.qKnowledgeGradient(m, num_fantasies=2, sampler=sampler(2), posterior_transform=weights)
        for m in (ours, model)
    ]
    assert gap(*(f(T) for f in made)) < TOL
    with pytest.raises(errors.UnsupportedError, match="condition the whole"):
        ours.subset_output([0]).condition_on_observations(T, T)


# --- any likelihood -------------------------------------------------------------------------------


def binary(n: int = 40, num_inducing: int | None = None, memory: int | None = None) -> DualGP:
    x, f, g = waves(n, 2)
    y = (f + 0.5 * torch.randn(n, generator=g, dtype=F64) > 0).double()
    likelihood = gpytorch.likelihoods.BernoulliLikelihood()
    gp = DualGP(matern(1.0, 2.0), likelihood, num_inducing=num_inducing or n, memory=memory, jitter=1e-8)
    gp.fit(x, y, learn_hyperparameters=False, learn_inducing=False, tol=1e-10)
    return gp


def counts() -> DualGP:
    x, f, _ = waves(40, 2)
    gp = DualGP(matern(1.0, 1.0), LogPoissonLikelihood(), num_inducing=20, jitter=1e-8)
    gp.fit(x, torch.poisson((1 + f).exp()), learn_hyperparameters=False, learn_inducing=False)
    return gp


MODELS = {"labels": binary, "counts": counts}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", [*FUNCTIONS, "BALD"])
def test_all_of_them_run_on_labels_and_counts(kind, name):
    q, make = (1, BALD) if name == "BALD" else FUNCTIONS[name]
    if name == "qLogNEI, root" or name.startswith("qMES"):
        q = 1
    function = make(DualGPModel(MODELS[kind]()))
    x, value = optimize_acqf(function, BOUNDS, q=q, num_restarts=2, raw_samples=8, options={"maxiter": 3})
    assert x.shape[-1] == 2
    assert value.isfinite()


def test_maxima_of_any_likelihood_are_drawn():
    assert MaxPosteriorSampling(DualGPModel(binary()))(CANDIDATES, num_samples=3).shape == (3, 2)


def test_fantasies_of_labels_are_those_of_condition_and_repeat():
    gp = binary()
    model = DualGPModel(gp)
    state = torch.random.get_rng_state()
    found, again = (model.fantasize(T, sampler(6)) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert found.batch_shape == (6, 4)
    y = found._data.y
    assert torch.equal(y, again._data.y)
    assert set(y.unique().tolist()) == {0.0, 1.0}
    mean = found.posterior(CANDIDATES[:5]).mean
    for s, b in ((0, 0), (3, 2), (5, 1)):
        assert gap(mean[s, b, :, 0], gp.condition(T[b], y[s, b]).predict(CANDIDATES[:5])[0]) < 1e-8


def test_fantasies_are_drawn_from_the_predictive_distribution():
    """4096 draws: five standard errors of a frequency."""
    gp = binary()
    y = DualGPModel(gp).fantasize(T[:, :1], sampler(4096))._data.y
    assert gap(y.mean(0).squeeze(-1), gp.predict_likelihood(T[:, 0]).probs) < 5 * 0.5 / 64


def refits(gp: DualGP, count: int):
    """For every y at the first `count` of T[0]: y, and what a model of all data, with Z at them, says of candidates."""
    x, y = gp.memory.data.x, gp.memory.data.y
    both_x = torch.cat([x, T[0, :count]])
    refit = DualGP(gp.kernel, gp.likelihood, inducing_points=both_x, jitter=1e-8)
    for more in torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=F64)] * count).reshape(-1, count):
        refit.fit(both_x, torch.cat([y, more]), learn_hyperparameters=False, learn_inducing=False, tol=1e-10)
        yield more, refit.predict(CANDIDATES)


@pytest.mark.parametrize("count", [1, 3])
def test_fantasies_of_labels_are_nearly_a_refit(count):
    """A refit finds the sites of old data anew beside the fantasy; conditioning leaves them where they are.

    That is of second order in the mean: less than a fifth of what a fantasy changes there (measured: 14 % at most, of
    three labels that all are surprises). Of what it changes in the variance, a refit takes back up to a half (measured:
    38 %): where f moves, old labels say more or less than they did.
    """
    gp = binary(memory=40)
    model, before = DualGPModel(gp), gp.predict(CANDIDATES)
    for y, (mean, var) in refits(gp, count):
        found = model.condition_on_observations(T[0, :count], y.unsqueeze(-1)).posterior(CANDIDATES)
        moved = gap(mean, before[0])
        assert moved > 0.05
        assert gap(found.mean.squeeze(-1), mean) < 0.2 * moved
        assert gap(found.variance.squeeze(-1), var) < 0.5 * gap(before[1], var)


@pytest.mark.parametrize("count", [1, 3])
def test_fantasies_of_labels_that_recall_memory_are_a_refit(count):
    """To what a jitter of 1e-8 and the tolerance of the fit leave: 1e-6."""
    gp = binary(memory=40)
    model = DualGPModel(gp, recall=True)
    for y, (mean, var) in refits(gp, count):
        found = model.condition_on_observations(T[0, :count], y.unsqueeze(-1)).posterior(CANDIDATES)
        assert gap(found.mean.squeeze(-1), mean) < 1e-6
        assert gap(found.variance.squeeze(-1), var) < 1e-6
    fantasies = model.fantasize(T[:, :count], sampler(3))
    drawn = fantasies._data.y[2, 1]
    one = model.condition_on_observations(T[1, :count], drawn.unsqueeze(-1)).posterior(CANDIDATES)
    found = fantasies.posterior(CANDIDATES)
    assert gap(found.mean[2, 1], one.mean) < 1e-8
    assert gap(found.variance[2, 1], one.variance) < 1e-8


@pytest.mark.parametrize("kind", ["values", *MODELS, "labels, recalled"])
def test_gradients_through_fantasies(kind):
    """By central differences of fourth order at step 1e-3; targets that are drawn stay as they are drawn."""
    if kind == "labels, recalled":
        model = DualGPModel(binary(memory=40), recall=True)
    else:
        model = both()[0] if kind == "values" else DualGPModel(MODELS[kind]())
    drawn = None if kind == "values" else model.fantasize(T, sampler(3))._data.y.unsqueeze(-1)

    def value(x: torch.Tensor) -> torch.Tensor:
        given = model.fantasize(x, sampler(3)) if drawn is None else model.condition_on_observations(x, drawn)
        found = given.posterior(CANDIDATES[:4])
        return (found.mean.sin() + found.variance).sum()

    x = T.clone().requires_grad_()
    found = torch.autograd.grad(value(x), x)[0]
    with torch.no_grad():
        for b, i, d in ((0, 0, 0), (1, 2, 1), (3, 1, 0)):
            unit = torch.zeros_like(T)
            unit[b, i, d] = 1.0
            want = numerical(lambda s: value(T + s * unit), torch.zeros((), dtype=F64), step=1e-3)  # noqa: B023
            assert gap(found[b, i, d], want) < 1e-5 * max(1.0, float(found.abs().max()))


def test_bald_is_mutual_information_with_its_gradient():
    gp = binary()
    x = T[:, :1].clone().requires_grad_()
    found = BALD(DualGPModel(gp))(x)
    assert gap(found, mutual_information(gp.likelihood, *gp.predict(T[:, 0]))) < 1e-9
    gradient = torch.autograd.grad(found.sum(), x)[0].squeeze(1)
    for d in range(2):
        unit = torch.eye(2, dtype=F64)[d]
        want = numerical(
            lambda s: mutual_information(gp.likelihood, *gp.predict(T[:, 0] + s.unsqueeze(-1) * unit)),  # noqa: B023
            torch.zeros(4, dtype=F64),
            step=1e-3,
        )
        assert gap(gradient[:, d], want.detach()) < 1e-6


def test_softmax():
    problem, _ = fitted("softmax")
    model = DualGPModel(problem.gp)
    x = line(-1, 1, 3)
    given = model.fantasize(x, sampler(4))
    assert given.batch_shape == (4,)
    assert given.posterior(x).mean.shape == (4, 3, 3)
    labels = torch.tensor([[0], [2], [1]])
    found = model.condition_on_observations(x, labels).posterior(x)
    assert gap(found.mean, problem.gp.condition(x, labels.squeeze(-1)).predict(x)[0]) < 1e-8
    with pytest.raises(errors.UnsupportedError, match="no Gaussian observation"):
        model.posterior(x, observation_noise=True)
    with pytest.raises(errors.UnsupportedError, match=r"dualgp\.active"):
        BALD(model)


# --- bad input ------------------------------------------------------------------------------------


def test_a_model_never_fitted():
    with pytest.raises(errors.NotFittedError, match="fit"):
        DualGPModel(DualGP(matern(), gaussian()))


@pytest.mark.parametrize("other", [None, torch.nn.Linear(1, 1)])
def test_what_is_no_model_of_ours(other):
    for make in (DualGPModel, BALD):
        with unchecked(), pytest.raises(errors.InputError, match="DualGP"):
            make(other)


def test_inputs_that_are_not_finite():
    with pytest.raises(errors.InputError, match="Inputs must be finite"):
        both()[0].posterior(T * torch.nan)


@pytest.mark.parametrize(
    ("noise", "message"),
    [
        (0.4, "True, False or a tensor"),
        (torch.ones(7, 1, dtype=F64), r"\[..., 3, 1\] or \[..., 1, 1\], got \(7, 1\)"),
        (torch.ones(3, 2, dtype=F64), "noise variances of shape"),
        (-torch.ones(3, 1, dtype=F64), "positive variances"),
        (torch.full((3, 1), torch.nan, dtype=F64), "positive variances"),
    ],
)
def test_noise_that_is_none(noise, message):
    model = both()[0]
    with unchecked(), pytest.raises(errors.InputError, match=message):
        model.posterior(T, observation_noise=noise)
    if isinstance(noise, torch.Tensor):
        with pytest.raises(errors.InputError, match="noise"):
            model.condition_on_observations(T, T[..., :1], noise=noise)


def test_a_batch_of_processes():
    with pytest.raises(errors.UnsupportedError, match="ModelList"):
        DualGPModel(fitted("batch of GPs")[0].gp)


def test_an_outcome_transform_of_labels():
    with pytest.raises(errors.UnsupportedError, match="real targets"):
        DualGPModel(binary(), outcome_transform=Standardize(m=1))


def test_data_that_do_not_fit():
    model, labels = both()[0], DualGPModel(binary())
    with pytest.raises(errors.InputError, match=r"\[\.\.\., 3, 1\]"):
        model.condition_on_observations(T, T)
    with pytest.raises(errors.InputError, match="finite"):
        model.condition_on_observations(T, T[..., :1] * torch.nan)
    with pytest.raises(errors.InputError, match="must broadcast"):
        model.condition_on_observations(T, Y[:3].expand(5, 3, 1))
    with pytest.raises(errors.InputError, match="must broadcast"):
        labels.condition_on_observations(T, (Y[:3] > 0).double().expand(5, 3, 1))
    with unchecked(), pytest.raises(errors.InputError, match=r"torch\.Tensor"):
        model.condition_on_observations(T, Y.numpy())
    with pytest.raises(errors.InputError, match="finite"):
        model.condition_on_observations(T * torch.nan, T[..., :1])
    with pytest.raises(errors.InputError, match="float64"):
        model.posterior(T.float())
    with pytest.raises(errors.InputError, match="0 or 1"):
        labels.condition_on_observations(T, 2 + 0 * T[..., :1])
    with pytest.raises(errors.InputError, match="no noise"):
        labels.fantasize(T, sampler(2), observation_noise=T[..., :1].exp())
    with pytest.raises(errors.InputError, match="output_indices"):
        model.posterior(T, output_indices=[1])


def test_the_value_outlives_changes_of_the_model():
    gp = binary()
    model = DualGPModel(gp)
    before = model.posterior(T).mean
    gp.kernel.outputscale = 9.0
    gp.update(CANDIDATES[:5], torch.ones(5, dtype=F64))
    assert torch.equal(model.posterior(T).mean, before)
