"""The bound of form S and its hand-written gradient, against plain autograd and against finite differences."""

import gpytorch
import pytest
import reference as ref
import torch
from gpytorch.kernels import LinearKernel, RBFKernel, RQKernel, ScaleKernel
from gpytorch.likelihoods import (
    BernoulliLikelihood,
    FixedNoiseGaussianLikelihood,
    MultitaskGaussianLikelihood,
    SoftmaxLikelihood,
    StudentTLikelihood,
)
from gpytorch.means import ConstantMean, LinearMean
from gpytorch.priors import GammaPrior, NormalPrior
from toys import F64, at, gap, gaussian, hyper, matern, random_sites, rbf, waves

from dualgp import DualGP, InducingBasis, Posterior, Sites, expected_log_prob, likelihoods, linalg
from dualgp.gp import bound as bound_module
from dualgp.gp.bound import site_bound
from dualgp.gp.data import Data
from dualgp.gp.hybrid import Anchor, batch_bound
from dualgp.gp.hyper import Hyper

N, M, C = 40, 7, 3


def inputs(*batch: int) -> torch.Tensor:
    return torch.stack([waves(N, 2, seed=s)[0] for s in range(int(torch.Size(batch).numel()))]).reshape(*batch, N, 2)


def real(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5), dtype=F64)


def per_output(nu: float = 2.5, *batch: int) -> ScaleKernel:
    shape = torch.Size((*batch, C))
    lengthscale = torch.linspace(0.5, 1.5, shape.numel(), dtype=F64).reshape(*shape, 1, 1)
    variance = torch.linspace(0.8, 2.0, shape.numel(), dtype=F64).reshape(shape)
    return matern(lengthscale, variance, nu=nu, batch_shape=shape)


def linear_mean() -> LinearMean:
    mean = LinearMean(2).double()
    mean.weights.data, mean.bias.data = at(0.7, -0.4).unsqueeze(-1), at(1.1)
    return mean


def output_means() -> ConstantMean:
    mean = ConstantMean(batch_shape=torch.Size([C])).double()
    mean.constant.data = at(-1.0, 0.2, 0.9)
    return mean


def student() -> StudentTLikelihood:
    likelihood = StudentTLikelihood().double()
    likelihood.noise, likelihood.deg_free = at(0.1), at(3.0)
    return likelihood


def multitask() -> MultitaskGaussianLikelihood:
    likelihood = MultitaskGaussianLikelihood(num_tasks=C).double()
    likelihood.noise, likelihood.task_noises = at(0.1), at(0.05, 0.2, 0.4)
    return likelihood


def not_log_concave(*shape: int) -> Sites:
    sites = random_sites(*shape)
    return Sites(sites.lam, sites.beta - 0.4)  # a third of β < 0; the prior still outweighs them


def wild(kernel_class) -> gpytorch.kernels.Kernel:
    """A kernel that only the generic path knows, on one column of X."""
    return (ScaleKernel(kernel_class(active_dims=[1])) + ScaleKernel(LinearKernel(ard_num_dims=2))).double()


def case(kernel, likelihood, y, sites, *, mean=None, x=None, num_outputs=None, jitter=1e-4, **params):
    x = inputs() if x is None else x
    multi = num_outputs is not None and not isinstance(likelihood, SoftmaxLikelihood)
    model = hyper(kernel, likelihood, x[..., :M, :] + 0.05, mean, num_outputs=num_outputs, jitter=jitter)
    return model, Data(x, y, multi, params), sites


def labels(*shape: int) -> torch.Tensor:
    return (real(*shape) > 0).double()


def ard() -> ScaleKernel:
    kernel = ScaleKernel(RBFKernel(ard_num_dims=2)).double()
    kernel.base_kernel.lengthscale = at(0.6, 1.4)
    return kernel


def noisy_fixed() -> FixedNoiseGaussianLikelihood:
    return FixedNoiseGaussianLikelihood(0.1 + real(N).square(), learn_additional_noise=True).double()


SITES = random_sites(N)
MULTI = random_sites(N, C, multi=True)
CASES = {
    "gaussian, conjugate": lambda: case(rbf(), gaussian(), real(N), None),
    "gaussian, frozen": lambda: case(ard(), gaussian(), real(N), SITES, mean=linear_mean()),
    "fixed noise": lambda: case(
        matern(nu=1.5), noisy_fixed(), real(N), None, mean=linear_mean(), noise=0.1 + real(N).square()
    ),
    "bernoulli": lambda: case(matern(), BernoulliLikelihood(), labels(N), SITES, mean=linear_mean()),
    "logit, rough": lambda: case(matern(nu=0.5), likelihoods.LogitBernoulliLikelihood(), labels(N), SITES),
    "student-t, β < 0": lambda: case(rbf(0.8), student(), real(N), not_log_concave(N), mean=linear_mean()),
    "generic kernel": lambda: case(wild(RQKernel), likelihoods.LogPoissonLikelihood(), labels(N) * 3, SITES),
    "softmax, shared": lambda: case(
        rbf(), SoftmaxLikelihood(num_classes=C, mixing_weights=False), torch.arange(N) % C, MULTI, num_outputs=C
    ),
    "softmax, per output": lambda: case(
        per_output(),
        SoftmaxLikelihood(num_classes=C, mixing_weights=False),
        torch.arange(N) % C,
        MULTI,
        num_outputs=C,
        mean=output_means(),
    ),
    "multitask, shared, conjugate": lambda: case(rbf(), multitask(), real(N, C), None, num_outputs=C),
    "multitask, per output, conjugate": lambda: case(
        per_output(), multitask(), real(N, C), None, num_outputs=C, mean=output_means()
    ),
    "multitask, per output, frozen": lambda: case(per_output(1.5), multitask(), real(N, C), MULTI, num_outputs=C),
    "batch of 2, one kernel": lambda: case(
        rbf(), BernoulliLikelihood(), labels(2, N), random_sites(2, N), x=inputs(2), mean=linear_mean()
    ),
    "batch of 2, a kernel each": lambda: case(
        rbf(at(0.4, 0.9).reshape(2, 1, 1), at(1.0, 2.0), batch_shape=torch.Size([2])),
        gaussian(),
        real(2, N),
        None,
        x=inputs(2),
    ),
    "batch of 2 with 3 outputs": lambda: case(
        per_output(2.5, 2), multitask(), real(2, N, C), random_sites(2, N, C, multi=True), x=inputs(2), num_outputs=C
    ),
    "batch of 2 with 3 outputs, shared kernel": lambda: case(
        rbf(),
        SoftmaxLikelihood(num_classes=C, mixing_weights=False),
        torch.arange(2 * N).reshape(2, N) % C,
        random_sites(2, N, C, multi=True),
        x=inputs(2),
        num_outputs=C,
    ),
}


def autograd_bound(model: Hyper, data: Data, sites: Sites | None) -> tuple[float, list[torch.Tensor]]:
    if sites is None:  # conjugate sites follow the noise
        noise = data.params.get("noise", 0.0) + model.likelihood.noise if not data.targets_multi else None
        if isinstance(model.likelihood, FixedNoiseGaussianLikelihood):
            noise = data.params["noise"] + model.likelihood.second_noise
        if data.targets_multi:
            noise = model.likelihood.noise + model.likelihood.task_noises
        beta = (1 / noise).expand(data.y.shape)
        sites = Sites(data.y * beta, beta, data.targets_multi)
    value = batch_bound(model, data, sites)
    gradient = torch.autograd.grad(value, model.trained(), allow_unused=True)
    return value.item(), [
        torch.zeros_like(p) if g is None else g for p, g in zip(model.trained(), gradient, strict=True)
    ]


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_are_those_of_autograd(name):
    model, data, sites = CASES[name]()
    found = site_bound(model, data, sites)
    value, gradient = autograd_bound(model, data, sites)
    assert gap(found.value, value) < 1e-9 * max(1, abs(value))
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert "Z" in names
    for parameter, mine, theirs in zip(names, found.gradient, gradient, strict=True):
        assert gap(mine, theirs) < 1e-7 * (1 + theirs.abs().max().item()), parameter
        assert parameter.endswith("mean.bias") or theirs.abs().max() > 0, parameter


@pytest.mark.parametrize("name", CASES)
def test_gradient_in_hyperparameters_and_z_is_the_finite_difference(name):
    model, data, sites = CASES[name]()
    start = model.vector()
    exact = torch.from_numpy(model.vector_gradient(site_bound(model, data, sites).gradient))

    def value(vector: torch.Tensor) -> float:
        model.set_vector(vector.numpy())
        return site_bound(model, data, sites).value

    # Every hyperparameter, and three coordinates of Z: they are last in `parameters()` or first, so probe both ends.
    direction = torch.zeros(len(start), 6, dtype=F64)
    picks = torch.linspace(0, len(start) - 1, 6).long()
    direction[picks, torch.arange(6)] = 1.0
    for i in range(6):
        along = ref.gradient(lambda t, i=i: value(torch.from_numpy(start) + t * direction[:, i]), at(0.0), 1e-4)
        assert gap(along, direction[:, i] @ exact) < 3e-6 * (1 + exact.abs().max().item()), f"entry {picks[i]}"


@pytest.mark.parametrize(
    "name", ["gaussian, conjugate", "student-t, β < 0", "softmax, per output", "multitask, shared, conjugate"]
)
def test_chunks_and_cache_do_not_change_the_bound(name, monkeypatch):
    model, data, sites = CASES[name]()
    whole = site_bound(model, data, sites)
    monkeypatch.setattr(linalg, "_CHUNK_BYTES", 1)  # 64 rows at least: too many here, so cut further
    monkeypatch.setattr(bound_module, "CACHE_BYTES", -1)
    monkeypatch.setattr(bound_module, "row_chunks", lambda n, *_: (slice(i, min(i + 9, n)) for i in range(0, n, 9)))
    cut = site_bound(model, data, sites)
    tolerance = 1e-6 if "softmax" in name else 1e-10  # its rule is cut to each block's largest variance
    assert gap(whole.value, cut.value) < tolerance
    assert gap(whole.target.lam, cut.target.lam) < tolerance
    assert gap(whole.target.beta, cut.target.beta) < tolerance
    for a, b in zip(whole.gradient, cut.gradient, strict=True):
        assert gap(a, b) < 10 * tolerance * (1 + a.abs().max().item())


def test_the_bound_is_the_elbo_of_the_q_it_returns_and_its_target_the_sites_q_asks_for():
    model, data, sites = CASES["student-t, β < 0"]()
    model.likelihood.noise = at(1.0)  # wide enough for 20 nodes
    found = site_bound(model, data, sites)
    mean, var = found.posterior.predict(data.x)
    elp = expected_log_prob(model.likelihood, data.y, mean, var).sum().item()
    assert gap(found.value, elp - found.posterior.kl()) < 1e-9
    mean, var = mean.detach(), var.detach()
    slope = ref.numerical(lambda m: ref.brute(lambda f: model.likelihood(f).log_prob(data.y), m, var), mean)
    assert gap(found.target.alpha(mean), slope) < 1e-5  # 20 nodes against a fine grid


def test_priors_enter_the_value_and_the_gradient():
    model, data, sites = CASES["student-t, β < 0"]()
    plain = site_bound(model, data, sites)
    model.kernel.base_kernel.register_prior("lengthscale_prior", GammaPrior(3.0, 6.0), "lengthscale")
    model.likelihood.register_prior("noise_prior", NormalPrior(0.3, 0.1), "noise")
    model.double()
    found = site_bound(model, data, sites)
    lengthscale, noise = model.kernel.base_kernel.lengthscale.item(), model.likelihood.noise.item()
    expected = torch.distributions.Gamma(3.0, 6.0).log_prob(at(lengthscale))
    expected = expected + torch.distributions.Normal(0.3, 0.1).log_prob(at(noise))
    assert gap(found.value - plain.value, expected) < 1e-6
    value, gradient = autograd_bound(model, data, sites)
    assert gap(found.value, value) < 1e-9
    assert max(gap(a, b) for a, b in zip(found.gradient, gradient, strict=True)) < 1e-7


# --- what is not in the batch, in form U ------------------------------------------------------


def start_of(name: str) -> tuple[Hyper, Data, Sites, Posterior]:
    model, data, sites = CASES[name]()
    if sites is None:
        sites = random_sites(*data.y.shape, multi=data.targets_multi)
    live = site_bound(model, data, sites).posterior  # its basis is the model's own: copy, so that it can stay behind
    options = {"num_outputs": model.num_outputs, "jitter": model.jitter}
    return (
        model,
        data,
        sites,
        Posterior(InducingBasis(model.kernel, model.Z.detach(), model.mean, **options), live.site),
    )


@pytest.mark.parametrize("name", ["bernoulli", "softmax, per output", "batch of 2, one kernel"])
def test_an_anchored_half_of_the_data_is_exact_where_nothing_moved(name):
    model, data, sites, q = start_of(name)
    kept, rest = torch.arange(0, N, 2), torch.arange(1, N, 2)
    old = Anchor.of(q.basis, q.project(data.x[..., rest, :], sites[rest]))
    both = batch_bound(model, data.rows(kept), sites[kept], old)
    m, v = q.predict(data.x[..., kept, :])
    elp = expected_log_prob(model.likelihood, data.rows(kept).y, m, v).sum()
    assert gap(both.detach(), elp.detach() - q.kl().sum()) < 1e-9


@pytest.mark.parametrize("name", ["bernoulli", "softmax, per output", "batch of 2, one kernel"])
def test_an_anchor_follows_hyperparameters_as_u_does(name):
    model, data, _, q = start_of(name)
    old = Anchor.of(q.basis, q.site)
    nothing = random_sites(*data.y.shape[:-1], 0)
    if q.basis.num_outputs is not None:
        nothing = random_sites(0, C, multi=True)
    hypers = [p for p in model.trained() if p is not model.Z]
    with torch.no_grad():
        for p in hypers:
            p.add_(0.2)
    empty = data.rows(slice(0, 0))
    carried = batch_bound(model, empty, nothing, old)
    rebased = q.rebase(model.basis())
    assert gap(carried.detach(), -rebased.kl().sum()) < 1e-8


def test_the_carried_site_has_the_gradient_of_its_finite_difference():
    model, data, sites, q = start_of("bernoulli")
    old = Anchor.of(q.basis, 0.5 * q.site)
    batch, own = data.rows(slice(0, 11)), sites[slice(0, 11)]
    start = torch.from_numpy(model.vector())
    value = batch_bound(model, batch, own, old, scale=N / 11)
    exact = torch.from_numpy(model.vector_gradient(list(torch.autograd.grad(value, model.trained()))))

    def moved(vector: torch.Tensor) -> float:
        model.set_vector(vector.numpy())
        return batch_bound(model, batch, own, old, scale=N / 11).item()

    assert gap(ref.gradient(moved, start, 1e-4), exact) < 1e-5 * (1 + exact.abs().max().item())


def test_an_anchor_stays_behind_when_its_basis_trains_on():
    model, data, sites = CASES["bernoulli"]()
    model.mean = ConstantMean().double()
    basis = model.basis()
    anchor = Anchor.of(basis, site_bound(model, data, sites).posterior.site)
    before = [t.clone() for t in (anchor.Z, anchor.mean, anchor.L_inv, anchor.site.lam, anchor.site.B)]
    with torch.no_grad():
        for p in model.trained():
            p.add_(0.1)  # what an optimiser does
    for old, now in zip(before, (anchor.Z, anchor.mean, anchor.L_inv, anchor.site.lam, anchor.site.B), strict=True):
        assert torch.equal(old, now)


def test_a_moved_z_carries_the_site_by_the_conditional_mean():
    model, data, _, q = start_of("bernoulli")
    old = Anchor.of(q.basis, q.site)
    with torch.no_grad():
        model.Z.add_(0.1)
    Z, moved = q.basis.inducing_points, model.Z.detach()
    jitter = q.basis.jitter * 2.0  # relative to the variance of this kernel
    Kzz, Knn = (ref.matern52(a, a, 0.8, 2.0) + jitter * torch.eye(M) for a in (Z, moved))
    Kzn = ref.matern52(Z, moved, 0.8, 2.0) + jitter * torch.eye(M)  # each u takes its jitter along
    A = torch.linalg.inv(torch.linalg.cholesky(Kzz)) @ Kzn @ torch.linalg.inv(torch.linalg.cholesky(Knn)).T
    # u_old has the prior mean of where it was, whatever the mean is where Z went
    basis = model.basis()
    carried = old.carry(model, basis.inducing_points, basis.L)
    assert gap(carried.B, A.T @ q.site.B @ A) < 1e-8
    assert gap(carried.lam, A.T @ q.site.lam) < 1e-8
    assert data.x.shape[-2] == N


def test_the_bound_of_processes_with_kernels_of_their_own_on_the_same_data():
    """A kernel with a batch shape and data without: as many processes, each of all the data."""
    x, f, g = waves(40, 1)
    y = f + 0.1 * torch.randn(40, generator=g, dtype=F64)
    lengthscales = at(0.3, 0.6, 1.2)
    kernel = rbf(lengthscales.reshape(3, 1, 1), batch_shape=torch.Size([3]))
    gp = DualGP(kernel, gaussian(), inducing_points=x[::4].clone())
    result = gp.fit(x, y, learn_hyperparameters=False, learn_inducing=False)
    alone = 0.0
    for lengthscale in lengthscales:
        one = DualGP(rbf(lengthscale.item()), gaussian(), inducing_points=x[::4].clone())
        alone += one.fit(x, y, learn_hyperparameters=False, learn_inducing=False).elbo
    assert result.elbo == pytest.approx(alone, abs=1e-8)
    assert result.elbo == pytest.approx(gp.elbo(x, y), abs=1e-8)
