"""Loaders and batches: the same fixed point as in memory, and a schedule that converges."""

from collections.abc import Iterator

import gpytorch
import pytest
import torch
from gpytorch.likelihoods import BernoulliLikelihood, FixedNoiseGaussianLikelihood
from torch.utils.data import DataLoader, TensorDataset
from toys import F64, at, gap, gaussian, hyper, rbf, unchecked, waves

from dualgp import DualGP, FitResult, errors
from dualgp.gp.data import Data
from dualgp.gp.minibatch import Batches, TensorBatches

N = 240
FIXED = {"learn_inducing": False, "learn_hyperparameters": False, "progress": False}


def regression(n: int = N) -> tuple[torch.Tensor, torch.Tensor]:
    x, f, generator = waves(n, 2, seed=3)
    return x, f + 0.3 * torch.randn(n, generator=generator, dtype=F64)


def classification(n: int = N) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = regression(n)
    return x, (y > 0).double()


def loader(*tensors: torch.Tensor, batch_size: int = 64, shuffle: bool = False) -> DataLoader:
    order = torch.Generator().manual_seed(1)
    return DataLoader(TensorDataset(*tensors), batch_size=batch_size, shuffle=shuffle, generator=order)


def model(likelihood=None, Z: torch.Tensor | None = None, **options) -> DualGP:
    size = {"num_inducing": 10} if Z is None else {"inducing_points": Z}
    return DualGP(rbf(0.8, 1.0), gaussian(0.1) if likelihood is None else likelihood, **size, **options)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("kind", ["gaussian", "probit"])
def test_a_loader_reaches_the_fixed_point_of_tensors_in_memory(kind, shuffle):
    x, y = regression() if kind == "gaussian" else classification()
    whole, parts = (model(None if kind == "gaussian" else BernoulliLikelihood(), x[:10]) for _ in range(2))
    a = whole.fit(x, y, **FIXED)
    b = parts.fit(loader(x, y, shuffle=shuffle), **FIXED)
    assert gap(a.elbo, b.elbo) < 1e-8
    assert a.num_data == b.num_data == N
    assert gap(whole.posterior.site.lam, parts.posterior.site.lam) < 1e-7 * whole.posterior.site.lam.abs().max().item()
    for p, q in zip(whole.predict(x), parts.predict(x), strict=True):
        assert gap(p, q) < 1e-8
    with pytest.raises(errors.NotFittedError, match="sites_at"):
        _ = parts.sites


def test_a_loader_of_noise_variances():
    x, y = regression()
    noise = 0.05 + 0.2 * x[:, 0].square()
    whole = model(FixedNoiseGaussianLikelihood(noise), x[:10])
    parts = model(FixedNoiseGaussianLikelihood(noise), x[:10])
    whole.fit(x, y, **FIXED)
    parts.fit(loader(x, y, noise), **FIXED)
    assert gap(whole.result.elbo, parts.result.elbo) < 1e-8
    assert gap(parts.elbo(x, y, noise=noise), parts.result.elbo) < 1e-8


def test_learning_from_a_loader_ends_close_to_learning_in_memory():
    x, y = classification()
    whole, parts = (model(BernoulliLikelihood()) for _ in range(2))
    best = whole.fit(x, y, progress=False).elbo / N
    found = parts.fit(loader(x, y, batch_size=60, shuffle=True), progress=False, generator=seeded())
    assert found.converged
    assert best - 0.01 < found.elbo / N < best + 0.01


def worst_schedule(x: torch.Tensor, y: torch.Tensor) -> float:
    """What never converged: one E-step, then ten noisy steps of Adam at .1 with the sites held, again and again."""
    from dualgp.gp.bound import conjugate_sites
    from dualgp.gp.estep import Source, e_step
    from dualgp.gp.hybrid import Anchor, batch_bound

    parameters = hyper(rbf(0.8, 1.0), gaussian(0.1), x[:10])
    adam, generator = torch.optim.Adam(parameters.trained(), lr=0.1), seeded()
    whole = Data(x, y, False)
    for _ in range(30):
        q = e_step(Source(parameters.basis(), whole), parameters.likelihood).posterior
        anchor = Anchor.of(q.basis, q.site * 0.9)
        for _ in range(10):
            batch = whole.rows(torch.randperm(len(x), generator=generator)[: len(x) // 10])
            sites = conjugate_sites(parameters, batch)
            adam.zero_grad()
            (-batch_bound(parameters, batch, sites, anchor, 10.0) / len(x)).backward()
            adam.step()
    return e_step(Source(parameters.basis(), whole), parameters.likelihood).elbo


def test_the_schedule_converges_where_many_steps_at_stale_sites_do_not():
    x, y = regression()
    best = model().fit(x, y, progress=False).elbo / N
    found = model().fit(x, y, batch_size=N // 10, progress=False, generator=seeded())
    assert found.converged
    assert found.elbo / N > best - 0.01
    assert worst_schedule(x, y) / N < found.elbo / N - 0.01


def test_one_step_estimates_the_bound_without_bias():
    x, y = classification()
    parameters = hyper(rbf(0.8, 1.0), BernoulliLikelihood(), x[:10])
    data = Data(x, y, False)
    from dualgp.gp.estep import Source, e_step
    from dualgp.gp.hybrid import Anchor, batch_bound

    found = e_step(Source(parameters.basis(), data), parameters.likelihood)
    q, b = found.posterior, 40
    values = []
    for start in range(0, N, b):  # every datum once: the mean over batches is exact
        rows = slice(start, start + b)
        with torch.no_grad():
            rest = Anchor.of(q.basis, q.site - q.project(x[rows], found.sites[rows]))
            values.append(batch_bound(parameters, data.rows(rows), found.sites[rows], rest, N / b).item())
    assert gap(sum(values) / len(values), found.elbo) < 1e-7


def trajectory(seed: int | None, **options) -> tuple[FitResult, DualGP]:
    x, y = classification()
    gp = model(BernoulliLikelihood())
    generator = None if seed is None else seeded(seed)
    return gp.fit(x, y, progress=False, generator=generator, max_rounds=2, **options), gp


@pytest.mark.filterwarnings("ignore::dualgp.errors.ConvergenceWarning")
def test_a_generator_decides_everything_and_the_global_state_is_left_alone():
    before = torch.get_rng_state()
    (a, first), (b, second), (c, _) = (trajectory(seed, batch_size=48) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert a.elbo == b.elbo
    assert all(torch.equal(v, second.state_dict()[k]) for k, v in first.state_dict().items())
    assert a.elbo != c.elbo


@pytest.mark.filterwarnings("ignore::dualgp.errors.ConvergenceWarning")
def test_the_first_stage_on_a_subset_uses_the_generator_too():
    x, y = regression(4200)  # more than four times the thousand of the first stage
    before = torch.get_rng_state()
    fits = [model() for _ in range(2)]
    elbos = [gp.fit(x, y, progress=False, generator=seeded(), max_rounds=2).elbo for gp in fits]
    assert torch.equal(before, torch.get_rng_state())
    assert elbos[0] == elbos[1]
    assert all(torch.equal(v, fits[1].state_dict()[k]) for k, v in fits[0].state_dict().items())


def test_a_sample_of_a_loader_is_uniform_and_without_replacement():
    x = torch.arange(90, dtype=F64).unsqueeze(-1)
    batches = Batches(loader(x, x.squeeze(-1), batch_size=7), lambda x, y: Data(x, y, False))
    counts = torch.zeros(90)
    for seed in range(300):
        drawn, share, n = batches.sample(20, seeded(seed))
        assert torch.equal(share.x, drawn.x)
        rows = drawn.y.long()
        assert n == 90
        assert len(rows.unique()) == 20
        assert torch.equal(drawn.x.squeeze(-1), drawn.y)
        counts[rows] += 1
    assert (counts - 300 * 20 / 90).abs().max() < 5 * (300 * (2 / 9) * (7 / 9)) ** 0.5


def test_batches_of_tensors_cover_every_datum_once_in_each_pass():
    x = torch.arange(23, dtype=F64).unsqueeze(-1)
    batches = TensorBatches(Data(x, x.squeeze(-1), False), 5, seeded())
    passes = [torch.cat([b.y for b in batches]) for _ in range(2)]
    assert all(torch.equal(p.sort().values, x.squeeze(-1)) for p in passes)
    assert not torch.equal(*passes)


@pytest.mark.filterwarnings("ignore::dualgp.errors.ConvergenceWarning")
def test_sites_with_negative_beta_do_not_break_the_steps():
    x, y = regression()
    y = torch.where(torch.arange(N) % 20 == 0, y + 8, y)
    likelihood = gpytorch.likelihoods.StudentTLikelihood().double()
    likelihood.noise = at(0.1)
    gp = model(likelihood)
    result = gp.fit(x, y, batch_size=60, max_rounds=3, progress=False, generator=seeded())
    whole = model(likelihood.__class__().double())
    assert result.elbo / N > whole.fit(x, y, progress=False).elbo / N - 0.05
    assert (gp.sites.beta < 0).any()


class OneShot:
    """A loader that can be passed over once only, as a generator or an open file."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        self.batches = iter([tensors])

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        return self.batches


@pytest.mark.timeout(20)
def test_a_loader_that_can_be_read_only_once_is_refused():
    x, y = regression(50)
    with pytest.raises(errors.InputError, match="again"):
        model().fit(OneShot(x, y), progress=False)


@pytest.mark.parametrize(
    ("batches", "match"),
    [
        ([], "no data"),
        ([torch.zeros(3, 2)], r"must give \(X, y\)"),
        ([(torch.zeros(3, 2),)], r"must give \(X, y\)"),
        ([{"x": torch.zeros(3, 2)}], r"must give \(X, y\)"),
        ([(torch.zeros(3, 2), torch.zeros(3, 1))], "shape"),
        ([(torch.zeros(3, 2), torch.full((3,), float("nan")))], "finite"),
        ([(torch.zeros(3), torch.zeros(3))], "shape"),
    ],
)
def test_misused_loaders_are_refused_and_leave_the_model_alone(batches, match):
    gp = model()
    before = {k: v.clone() for k, v in gp.state_dict().items()}
    with pytest.raises(errors.InputError, match=match), unchecked():
        gp.fit(batches, progress=False)
    assert all(torch.equal(before[k], v) for k, v in gp.state_dict().items())
    assert gp.result is None
