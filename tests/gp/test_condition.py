"""`condition`: a value that is the dual GP whose Z takes in the new inputs, in batches, with gradients."""

import copy

import gpytorch
import pytest
import torch
from families import kernel, softmax
from gpytorch.distributions import MultitaskMultivariateNormal
from gpytorch.likelihoods import (
    BernoulliLikelihood,
    FixedNoiseGaussianLikelihood,
    MultitaskGaussianLikelihood,
    PoissonLikelihood,
    StudentTLikelihood,
)
from reference import numerical
from toys import F64, at, gap, gaussian, line, matern, waves

from dualgp import DualGP
from dualgp.basis import InducingBasis
from dualgp.gp import stream
from dualgp.gp.data import Data
from dualgp.gp.estep import EStep, Source, e_step
from dualgp.likelihoods import LogitBernoulliLikelihood, LogPoissonLikelihood
from dualgp.posterior import Posterior
from dualgp.sites import Sites

# A Matérn kernel of short lengthscale and inputs that stand apart: K at Z ∪ X is well conditioned without jitter, so
# that what is compared is the algebra.
JITTER = 1e-12
Z = line(-1.5, 1.5, 6)
X = line(-1.4, 1.3, 5)
T = line(-2, 2, 9)
APART = line(-1.95, 1.9, 12)

NON_GAUSSIAN = {
    "probit": (BernoulliLikelihood, lambda f: (f > 0).double()),
    "logit": (LogitBernoulliLikelihood, lambda f: (f > 0).double()),
    "poisson": (PoissonLikelihood, lambda f: f.exp().round()),
    "log poisson": (LogPoissonLikelihood, lambda f: f.exp().round()),
    "student-t": (StudentTLikelihood, lambda f: f),
}


def base(
    likelihood, y, x: torch.Tensor | None = None, mean=None, num_outputs=None, kernel=None, memory: int = 0, **weights
) -> DualGP:
    """A stream that forgets; with memory, one whose Z is at all data."""
    x = waves(30, 1)[0] if x is None else x
    gp = DualGP(
        kernel or matern(0.5, 1.5, nu=1.5),
        likelihood.double(),
        mean=mean,
        inducing_points=x if memory else Z,
        num_outputs=num_outputs,
        jitter=JITTER,
        memory=memory,
    )
    gp.update(x, y, learn_hyperparameters=False, tol=1e-10, **weights)
    return gp


def f_at(x: torch.Tensor) -> torch.Tensor:
    return (2 * x).sin().sum(-1) + 0.5 * x[..., 0]


def larger(gp: DualGP, x: torch.Tensor) -> Posterior:
    """The model's posterior, read on the basis that holds Z and x."""
    basis = gp.posterior.basis
    both = torch.cat([basis.inducing_points, x], -2)
    return gp.posterior.rebase(
        InducingBasis(gp.kernel, both, gp.mean, num_outputs=gp.num_outputs, jitter=JITTER),
    )


def textbook(gp: DualGP, x: torch.Tensor, y: torch.Tensor, **params: torch.Tensor) -> EStep:
    """The E-step at Z ∪ x, beside what the model knew: its posterior is what `condition` promises."""
    q = larger(gp, x)
    multi = gp.num_outputs is not None and y.ndim == x.ndim
    source = Source(q.basis, Data(x, y, multi, params))
    return e_step(source, gp.likelihood, base=q.site, tol=1e-13)


def agree(conditioned, q: Posterior, tol: float, x: torch.Tensor = T) -> None:
    for found, want in zip(conditioned.predict(x), q.predict(x), strict=True):
        assert found.shape == want.shape
        assert gap(found, want) < tol
    joint, want = conditioned.predict_joint(x), q.predict_joint(x)
    assert gap(joint.mean, want.mean) < tol
    assert gap(joint.covariance_matrix, want.covariance_matrix) < tol


# --- exact ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mean", [None, 0.7])
def test_a_gaussian_is_the_dual_gp_at_z_and_x(mean):
    m = None if mean is None else gpytorch.means.ConstantMean().double()
    if m is not None:
        m.constant = mean
    gp = base(gaussian(), f_at(waves(30, 1)[0]), mean=m)
    y = f_at(X) + at(0.3, -0.2, 0.1, 0.5, -0.4)
    noise = gp.likelihood.noise.item()
    q = larger(gp, X).add(X, Sites(y / noise, torch.full((5,), 1 / noise, dtype=F64)))
    agree(gp.condition(X, y), q, 1e-6)
    agree(gp.condition(X, y), textbook(gp, X, y).posterior, 1e-6)


def test_with_z_at_all_data_it_is_exact_regression():
    """With Z = all inputs nothing is approximate: condition is the exact Gaussian process on all data."""
    x = line(-2, 2, 9)
    gp = DualGP(matern(0.5, 1.5, nu=1.5), gaussian(), inducing_points=x, jitter=JITTER, memory=0)
    gp.update(x, f_at(x), learn_hyperparameters=False)
    more = line(-1.8, 1.7, 4)
    y = torch.cat([f_at(x), f_at(more) + 0.2])
    both = torch.cat([x, more])
    with torch.no_grad():
        k = lambda a, b: gp.kernel(a, b).to_dense()  # noqa: E731
        weights = torch.linalg.solve(k(both, both) + gp.likelihood.noise * torch.eye(13, dtype=F64), k(both, T))
        mean, cov = weights.T @ y, k(T, T) - k(T, both) @ weights
    joint = gp.condition(more, y[9:]).predict_joint(T)
    assert gap(joint.mean, mean) < 1e-8
    assert gap(joint.covariance_matrix, cov) < 1e-8


@pytest.mark.parametrize("name", NON_GAUSSIAN)
def test_other_likelihoods_are_the_e_step_at_z_and_x(name):
    likelihood, target = NON_GAUSSIAN[name]
    gp = base(likelihood(), target(f_at(waves(30, 1)[0])))
    y = target(f_at(X) + at(0.3, -0.2, 0.1, 0.5, -0.4))
    found = gp.condition(X, y)
    step = textbook(gp, X, y)
    agree(found, step.posterior, 1e-6)
    assert gap(found.sites.beta, step.sites.beta) < 1e-5 * (1 + step.sites.beta.abs().max())


def test_softmax_is_the_e_step_at_z_and_x():
    gp = base(softmax(), (f_at(waves(30, 1)[0]) > 0).long())
    y = torch.tensor([2, 1, 2, 0, 1])
    agree(gp.condition(X, y), textbook(gp, X, y).posterior, 1e-6)


def test_an_outlier_under_student_t_is_the_e_step_too():
    likelihood = StudentTLikelihood().double()
    likelihood.noise = 0.05
    gp = base(likelihood, f_at(waves(30, 1)[0]))
    y = f_at(X) + at(0.0, 3.0, 0.0, 0.0, -0.1)
    agree(gp.condition(X, y), textbook(gp, X, y).posterior, 1e-6)


def test_noise_per_datum():
    g = torch.Generator().manual_seed(0)
    noise = 0.05 + torch.rand(5, generator=g, dtype=F64)
    gp = DualGP(matern(0.5, nu=1.5), FixedNoiseGaussianLikelihood(noise), inducing_points=Z, jitter=JITTER, memory=0)
    gp.update(line(-1, 1, 5), f_at(line(-1, 1, 5)), noise=noise, learn_hyperparameters=False)
    y = f_at(X) + 0.5
    q = larger(gp, X).add(X, Sites(y / noise, 1 / noise))
    agree(gp.condition(X, y, noise=noise), q, 1e-6)


def test_the_same_input_twice_and_an_inducing_input():
    """K(X, X) is singular, which no inverse of it minds."""
    gp = base(gaussian(), f_at(waves(30, 1)[0]))
    x, y, noise = torch.cat([X[:1], X[:1], Z[:1]]), at(0.5, 0.1, -0.3), gp.likelihood.noise.item()
    once = torch.cat([X[:1], Z[:1]])
    q = larger(gp, X[:1])
    q = q.add(once, Sites(at(0.6, -0.3) / noise, at(2.0, 1.0) / noise))
    agree(gp.condition(x, y), q, 1e-6)


@pytest.mark.parametrize("memory", [12, 5])
@pytest.mark.parametrize("name", [*NON_GAUSSIAN, "softmax"])
def test_what_memory_holds_is_asked_again(name, memory):
    """The E-step at Z ∪ x on memory and new data, beside what is forgotten: with all data in memory, a refit."""
    likelihood, target = NON_GAUSSIAN.get(name, (softmax, lambda f: (f > 0).long()))
    gp = base(likelihood(), target(f_at(APART)), APART, memory=memory)
    y = target(f_at(X) + at(0.3, -2.0, 0.1, 0.5, 2.0))
    held, basis = gp.memory, larger(gp, X).basis
    rest = Posterior(gp.posterior.basis, stream.read(gp).rest).rebase(basis)
    source = Source(basis, Data(torch.cat([held.data.x, X]), torch.cat([held.data.y, y]), False))
    q = e_step(source, gp.likelihood, base=rest.site, tol=1e-13).posterior
    agree(gp.condition(X, y, recall=True), q, 1e-6)
    twice = gp.condition(torch.stack([X + 0.1, X]), torch.stack([y, y]), recall=True)
    for found, want in zip(twice.predict(T), q.predict(T), strict=True):
        assert gap(found[1], want) < 1e-6
    agree(gp.condition(X, y), textbook(gp, X, y).posterior, 1e-6)  # and is not, unless that is wanted


@pytest.mark.parametrize("name", ["probit", "log poisson"])
def test_a_datum_far_away_changes_no_site_of_memory(name):
    """Of memory that Z does not hold: sites are where the posterior has them, r included."""
    likelihood, target = NON_GAUSSIAN[name]
    x = waves(30, 1)[0]
    gp = DualGP(matern(0.5, 1.5, nu=1.5), likelihood().double(), inducing_points=Z, jitter=JITTER, memory=30)
    gp.update(x, target(f_at(x)), learn_hyperparameters=False, tol=1e-12)
    found = gp.condition(at(60.0).unsqueeze(-1), at(1.0), recall=True)
    for now, before in zip(found.predict(T), gp.predict(T), strict=True):
        assert gap(now, before) < 1e-5


def test_outputs_and_weights_in_memory_are_asked_again():
    target, weights = NON_GAUSSIAN["probit"][1], torch.linspace(0.0, 2.0, 12, dtype=F64)
    y = target(torch.stack([f_at(APART), 0.3 - f_at(APART)], -1))
    gp = base(BernoulliLikelihood(), y, APART, num_outputs=2, memory=12, weights=weights)
    more = target(torch.stack([f_at(X) - 1.0, f_at(-X)], -1))
    every = torch.cat([weights, torch.ones(5, dtype=F64)])
    source = Source(larger(gp, X).basis, Data(torch.cat([APART, X]), torch.cat([y, more]), True, {}, every))
    agree(gp.condition(X, more, recall=True), e_step(source, gp.likelihood, tol=1e-13).posterior, 1e-6)


def test_no_data_give_the_model_itself():
    gp = base(gaussian(), f_at(waves(30, 1)[0]))
    agree(gp.condition(X[:0], at()), gp.posterior, 1e-9)


@pytest.mark.parametrize("name", ["gaussian", "probit"])
def test_one_by_one_is_all_at_once_for_gaussians_and_the_order_never_matters(name):
    likelihood, target = (gaussian, lambda f: f) if name == "gaussian" else NON_GAUSSIAN[name]
    gp = base(likelihood(), target(f_at(waves(30, 1)[0])))
    y = target(f_at(X) + 0.2)
    mean, var = gp.condition(X, y).predict(T)
    flipped = gp.condition(X.flip(0), y.flip(0)).predict(T)
    assert gap(mean, flipped[0]) < 1e-8
    assert gap(var, flipped[1]) < 1e-8
    assert bool((var <= gp.predict(T)[1] + 1e-9).all())  # log-concave data never add variance


# --- a value --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gaussian", "probit"])
def test_the_model_is_untouched_and_the_value_outlives_its_changes(name):
    likelihood, target = (gaussian, lambda f: f) if name == "gaussian" else NON_GAUSSIAN[name]
    x, y = waves(30, 1)[0], target(f_at(waves(30, 1)[0]))
    gp = base(likelihood(), y)
    before, posterior, draw = copy.deepcopy(dict(gp.state_dict())), gp.posterior, gp.generator.get_state()
    found = gp.condition(X, target(f_at(X)))
    mean, var = found.predict(T)
    after = gp.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(v, after[k]) for k, v in before.items())
    assert gp.posterior is posterior
    assert torch.equal(gp.generator.get_state(), draw)
    gp.update(x + 0.1, y)
    gp.kernel.base_kernel.lengthscale = 2.0
    assert torch.equal(found.predict(T)[0], mean)
    assert torch.equal(found.predict(T)[1], var)


def test_hyperparameters_set_by_hand_are_those_that_count():
    gp = base(gaussian(), f_at(waves(30, 1)[0]))
    gp.kernel.base_kernel.lengthscale = torch.tensor(0.7, dtype=F64)
    y, noise = f_at(X) + 0.3, gp.likelihood.noise.item()
    found = gp.condition(X, y)
    agree(found, larger(gp, X).add(X, Sites(y / noise, torch.full((5,), 1 / noise, dtype=F64))), 1e-6)


# --- batches and outputs --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gaussian", "probit", "softmax"])
@pytest.mark.parametrize("batch", [(3,), (2, 3), (1,)])
def test_a_batch_is_a_loop(name, batch):
    tol = 1e-6 if name == "softmax" else 1e-8  # its integrals share a grid over the batch, and converge linearly
    g = torch.Generator().manual_seed(2)
    x = torch.rand(*batch, 4, 1, generator=g, dtype=F64) * 3 - 1.5
    if name == "softmax":
        gp = base(softmax(), (f_at(waves(30, 1)[0]) > 0).long())
        y = torch.randint(0, 3, (*batch, 4), generator=g)
    else:
        likelihood, target = (gaussian, lambda f: f) if name == "gaussian" else NON_GAUSSIAN[name]
        gp = base(likelihood(), target(f_at(waves(30, 1)[0])))
        y = target(f_at(x) + 0.2 * torch.randn(*batch, 4, generator=g, dtype=F64))
    mean, var = gp.condition(x, y).predict(T)
    joint = gp.condition(x, y).predict_joint(T)
    own = torch.rand(*batch, 6, 1, generator=g, dtype=F64)
    own_mean, own_var = gp.condition(x, y).predict(own)
    for index in torch.cartesian_prod(*[torch.arange(b) for b in batch]).reshape(-1, len(batch)).tolist():
        i = tuple(index)
        one = gp.condition(x[i], y[i])
        for found, want in zip((mean[i], var[i]), one.predict(T), strict=True):
            assert gap(found, want) < tol
        for found, want in zip((own_mean[i], own_var[i]), one.predict(own[i]), strict=True):
            assert gap(found, want) < tol
        assert gap(joint.covariance_matrix[i], one.predict_joint(T).covariance_matrix) < tol


@pytest.mark.parametrize("name", ["gaussian", "probit"])
@pytest.mark.parametrize("shared", [True, False])
def test_outputs_are_conditioned_each_on_its_own(name, shared):
    likelihood, target = (gaussian, lambda f: f) if name == "gaussian" else NON_GAUSSIAN[name]
    x = waves(30, 1)[0]
    k = kernel() if shared else kernel(2)
    if not shared:
        k.base_kernel.lengthscale = at(0.4, 0.8).reshape(2, 1, 1)
        k.outputscale = at(1.0, 2.0)
    both = base(likelihood(), target(torch.stack([f_at(x), 0.3 - f_at(x)], -1)), num_outputs=2, kernel=k)
    y = target(torch.stack([f_at(X) + 0.3, f_at(-X)], -1))
    found = both.condition(X, y)
    mean, var = found.predict(T)
    joint = found.predict_joint(T)
    assert isinstance(joint, MultitaskMultivariateNormal)
    assert gap(joint.mean, mean) < 1e-9
    assert gap(joint.variance, var) < 1e-9
    for c in range(2):
        one = kernel()
        if not shared:
            one.base_kernel.lengthscale = at(0.4, 0.8)[c]
            one.outputscale = at(1.0, 2.0)[c]
        gp = base(likelihood(), target(f_at(x) if c == 0 else 0.3 - f_at(x)), kernel=one)
        for of_both, alone in zip((mean[..., c], var[..., c]), gp.condition(X, y[:, c]).predict(T), strict=True):
            assert gap(of_both, alone) < 1e-6


def test_multitask_noise_per_output():
    x = waves(30, 1)[0]
    likelihood = MultitaskGaussianLikelihood(num_tasks=2).double()
    likelihood.task_noises = at(0.05, 0.4)
    gp = base(likelihood, torch.stack([f_at(x), -f_at(x)], -1))
    y = torch.stack([f_at(X) + 0.3, f_at(-X)], -1)
    noise = (likelihood.task_noises + likelihood.noise).detach()
    q = larger(gp, X).add(X, Sites(y / noise, (1 / noise).expand(5, 2), True))
    agree(gp.condition(X, y), q, 1e-6)


# --- gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("recall", [False, True])
@pytest.mark.parametrize("name", ["gaussian", "probit", "logit", "poisson"])
def test_gradients_with_respect_to_the_conditioning_inputs(name, recall):
    """Central differences of fourth order at step 1e-3: error about 1e-9, and that of the E-step's own tolerance."""
    likelihood, target = (gaussian, lambda f: f) if name == "gaussian" else NON_GAUSSIAN[name]
    data = APART if recall else waves(30, 1)[0]
    gp = base(likelihood(), target(f_at(data)), data, kernel=kernel(), memory=8 if recall else 0)
    y = target(f_at(X) + 0.3)
    weigh = torch.linspace(-1, 1, 18, dtype=F64)

    def value(x: torch.Tensor) -> torch.Tensor:
        mean, var = gp.condition(x, y, recall=recall).predict(T)
        return (weigh[:9] * mean).sum() + (weigh[9:] * var).sum()

    x = X.clone().requires_grad_()
    found = torch.autograd.grad(value(x), x)[0]
    with torch.no_grad():
        for i in range(5):
            moved = lambda s, i=i: value(torch.cat([X[:i], X[i : i + 1] + s, X[i + 1 :]]))  # noqa: E731
            want = numerical(moved, at(0.0).reshape(1, 1), step=1e-3)
            assert gap(found[i], want) < 1e-6 * max(1.0, float(found.abs().max()))


def test_gradients_of_a_batch_of_fantasies_are_those_of_each():
    gp = base(BernoulliLikelihood(), (f_at(waves(30, 1)[0]) > 0).double(), kernel=kernel())
    x = torch.stack([X[:3], X[2:] + 0.1]).requires_grad_()
    y = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]], dtype=F64)
    batch = torch.autograd.grad(gp.condition(x, y).predict(T)[1].sum(), x)[0]
    for b in range(2):
        one = x[b].detach().requires_grad_()
        alone = torch.autograd.grad(gp.condition(one, y[b]).predict(T)[1].sum(), one)[0]
        assert gap(batch[b], alone) < 1e-7


def test_gradients_with_respect_to_the_inputs_of_the_prediction():
    gp = base(gaussian(), f_at(waves(30, 1)[0]), kernel=kernel())
    conditioned = gp.condition(X, f_at(X) + 0.5)
    x = T.clone().requires_grad_()
    mean, var = conditioned.predict(x)
    found = torch.autograd.grad(mean.sum() + var.sum(), x)[0]
    with torch.no_grad():
        want = numerical(lambda t: sum(conditioned.predict(t)).unsqueeze(-1), T, step=1e-3)
    assert gap(found, want) < 1e-7


@pytest.mark.parametrize("likelihood", [gaussian, BernoulliLikelihood])
def test_in_inference_mode(likelihood):
    """What tells about data works there, and what takes them in works on tensors that were made there."""
    with torch.inference_mode():
        y = (X.squeeze(-1) > 0).double()
        new, t = X + 0.05, T.clone()
    gp = base(likelihood(), (waves(30, 1)[1] > 0).double())
    outside = gp.condition(X + 0.05, y.clone())
    with torch.inference_mode():
        within = gp.condition(new, y)
        assert torch.equal(within.predict(t)[0], outside.predict(T)[0])
        assert torch.equal(gp.sites_at(new, y).lam, gp.sites_at(X + 0.05, y.clone()).lam)
    before = gp.predict(T)[0]
    gp.update(new, y)
    assert not torch.equal(gp.predict(T)[0], before)
