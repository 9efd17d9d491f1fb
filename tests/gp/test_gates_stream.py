"""Acceptance values of streams: A2, A8, A9, A15, A17; and the laws of the hybrid bound and of Z as it moves."""

import copy
import warnings

import gpytorch
import numpy as np
import pytest
import reference as ref
import torch
from gpytorch.kernels import ScaleKernel
from gpytorch.likelihoods import BernoulliLikelihood, SoftmaxLikelihood
from scipy.stats import spearmanr
from toys import BANANA_Z, F64, at, gap, gaussian, hyper, line, matern, rbf, sines, solve, waves

from dualgp import DualGP, InducingBasis, Posterior, Sites
from dualgp.errors import ConvergenceWarning
from dualgp.gp import stream, update
from dualgp.gp.bound import conjugate_sites
from dualgp.gp.data import Data
from dualgp.gp.estep import Source, e_step
from dualgp.gp.hybrid import Anchor, Noise, Sample, batch_bound, residuals, stream_bound
from dualgp.gp.memory import Memory
from dualgp.inducing import cheapest_to_drop, greedy_variance
from dualgp.selection import RULES

FIXED = {"learn_hyperparameters": False}


def kl(q: tuple[torch.Tensor, torch.Tensor], p: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Mean KL between marginals."""
    (m, v), (mp, vp) = q, p
    return (0.5 * (v / vp + (m - mp).square() / vp - 1 + (vp / v).log())).mean().item()


# --- A2: a stream is a batch ------------------------------------------------------------------


@pytest.mark.parametrize("order", ["sorted", "shuffled"])
@pytest.mark.parametrize(
    ("memory", "rule"), [(0, "leverage"), (7, "leverage"), (7, "random"), (7, "recency"), (50, "sensitivity")]
)
def test_a2_gaussian_stream_is_the_batch(gate, order, memory, rule):
    x, y = sines()
    Z = line(-2, 2, 12)
    batch = solve(InducingBasis(rbf(), Z, jitter=1e-8 / 1.3), gaussian(), x, y).posterior
    rows = torch.arange(50) if order == "sorted" else torch.randperm(50, generator=torch.Generator().manual_seed(3))
    gp = DualGP(rbf(), gaussian(), inducing_points=Z, jitter=1e-8 / 1.3, memory=memory, memory_rule=rule)
    for part in rows.split([3, 11, 1, 20, 2, 9, 4]):
        gp.update(x[part], y[part], **FIXED)
    xs = line(-2.5, 2.5, 41)
    error = max(gap(a, b) for a, b in zip(gp.predict(xs), batch.predict(xs), strict=True))
    gate(f"A2 {order}, memory {memory} {rule}", error, 1e-9)
    assert int(gp.num_seen) == 50


def test_a2_damped_steps_that_stop_early_are_not_the_batch():
    x, y = sines()
    basis = InducingBasis(rbf(), line(-2, 2, 12), jitter=1e-8 / 1.3)
    batch = solve(basis, gaussian(), x, y).posterior
    short = Posterior(basis, 0.99 * batch.site)  # what two steps of .9 leave
    assert gap(short.predict(x)[0], batch.predict(x)[0]) > 1e-4


def test_a2_with_the_noise_and_a_mean_learned_the_evidence_of_all_data_is_the_bound():
    """Forgotten data still say what they know of the noise: the hybrid bound is the collapsed bound, at every noise."""
    x, y = sines()
    model = hyper(rbf(), gaussian(0.2), line(-2, 2, 12), gpytorch.means.ConstantMean().double())
    basis = InducingBasis(model.kernel, model.Z.detach(), model.mean)
    data = Data(x, y, False)
    old, new = data.rows(slice(0, 30)), data.rows(slice(30, 50))
    sites = conjugate_sites(model, old)
    nothing = torch.zeros(30, dtype=F64)
    gone = Memory(old, sites, torch.arange(30), nothing)
    noise = update.forget_into(Noise(0.2, 0.0, 0.0), basis, gone)
    anchor = Anchor.of(basis, Posterior(basis).project(old.x, sites), noise)
    for now in (0.2, 0.05, 1.0):
        model.likelihood.noise = at(now)
        bound = stream_bound(model, new, conjugate_sites(model, new), anchor)
        whole = e_step(Source(model.basis(), data), model.likelihood).elbo
        assert gap(bound.detach(), whole) < 1e-8 * abs(whole)


def test_a2_with_the_amplitude_learned_a_fair_sample_makes_the_evidence_of_all_data_the_bound():
    """Under a change of amplitude form U is form S but for the residuals r, which a sample that is all data has."""
    x, y = sines()
    model = hyper(rbf(), gaussian(0.2), line(-2, 2, 6))
    basis = InducingBasis(model.kernel, model.Z.detach())
    data = Data(x, y, False, weights=torch.cat([torch.zeros(30), torch.ones(20)]).double())
    old = Data(x[:30], y[:30], False)
    sites = conjugate_sites(model, old)
    gone = Memory(old, sites, torch.arange(30), torch.zeros(30, dtype=F64))
    noise = update.forget_into(Noise(0.2, 0.0, 0.0), basis, gone)
    anchor = Anchor.of(basis, Posterior(basis).project(old.x, sites), noise)
    sample = Sample(sites.beta[::3], residuals(model, x[:30:3]), 3.0)  # of a third, each for three …
    everything = Sample(sites.beta, residuals(model, x[:30]), 1.0)  # … and of all
    for amplitude in (1.3, 0.4, 5.0):
        model.kernel.outputscale = at(amplitude)
        whole = e_step(Source(model.basis(), Data(x, y, False)), model.likelihood).elbo
        own = conjugate_sites(model, data)
        assert gap(stream_bound(model, data, own, anchor, everything).detach(), whole) < 1e-8 * abs(whole)
        if amplitude != 1.3:
            without = gap(stream_bound(model, data, own, anchor).detach(), whole)
            third = data.rows(torch.cat([torch.arange(0, 30, 3), torch.arange(30, 50)]))
            value = stream_bound(model, third, conjugate_sites(model, third), anchor, sample)
            assert gap(value.detach(), whole) < 0.5 * without


# --- A8: leverage -----------------------------------------------------------------------------


def scores(basis: InducingBasis, likelihood, x: torch.Tensor, y: torch.Tensor, found) -> torch.Tensor:
    n = len(x)
    everything = Memory(Data(x, y, False), found.sites, torch.arange(n), torch.zeros(n, dtype=F64))
    return RULES["leverage"](update.candidates(found.posterior, likelihood, everything))


def test_a8_leverage_of_regression_is_the_hat_matrix(gate, load_shared):
    x, y = load_shared("mcycle")
    y = y / y.std()
    Z = x.unique(dim=0)
    basis, likelihood = InducingBasis(matern(10.0, 1.0), Z, jitter=1e-10), gaussian(0.25)
    h = scores(basis, likelihood, x, y, solve(basis, likelihood, x, y))
    K = ref.matern52(x, x, 10.0, 1.0)
    hat = K @ torch.linalg.inv(K + 0.25 * torch.eye(len(x)))
    gate("A8 Σ h, stored", gap(h.sum(), 9.71853), 1e-5)
    gate("A8 h, reference", gap(h, hat.diagonal()), 1e-6)


def test_a8_leverage_of_banana(gate, banana):
    x, y, *_ = banana
    basis = InducingBasis(matern(0.8, 2.0), x[BANANA_Z], jitter=1e-6 / 2)
    found = solve(basis, BernoulliLikelihood(), x, y, tol=1e-13)
    h = scores(basis, BernoulliLikelihood(), x, y, found)
    gate("A8 Σ h", gap(h.sum(), 47.7018), 1e-4)
    gate("A8 min h", gap(h.min(), 0.00279), 1e-5)
    gate("A8 max h", gap(h.max(), 0.43817), 1e-5)
    assert h.argsort(descending=True)[:5].tolist() == [63, 38, 200, 385, 349]
    variance = found.posterior.predict(x)[1]
    gate("A8 rank correlation with v", gap(spearmanr(h.numpy(), variance.numpy())[0], 0.17), 5e-3)


def test_a8_leverage_of_several_classes_is_the_sum_over_classes():
    x, *_ = waves(40)
    y = torch.randint(3, (40,), generator=torch.Generator().manual_seed(0))
    likelihood = SoftmaxLikelihood(num_classes=3, mixing_weights=False)
    basis = InducingBasis(matern(), x[:8], num_outputs=3)
    found = solve(basis, likelihood, x, y)
    h = scores(basis, likelihood, x, y, found)
    mean, var = found.posterior.predict(x)
    for i in range(40):
        draws = np.random.default_rng(i).standard_normal((200_000, 3)) * var[i].sqrt().numpy() + mean[i].numpy()
        p = np.exp(draws - draws.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        by_hand = float(((p * (1 - p)).mean(0) * var[i].numpy()).sum())
        assert abs(h[i].item() - by_hand) < 2e-2 * by_hand + 1e-3
        if i == 5:
            break


# --- A9: a Bernoulli stream at fixed hyperparameters ------------------------------------------


@pytest.fixture(scope="module")
def a9(banana):
    x, y, x_test, y_test = banana
    order = x[:, 0].argsort(stable=True)
    basis = InducingBasis(matern(0.8, 2.0), x[BANANA_Z], jitter=1e-6 / 2)
    return x[order], y[order], x[BANANA_Z], x_test, y_test, solve(basis, BernoulliLikelihood(), x, y, tol=1e-13)


def streamed(a9, memory: int) -> DualGP:
    x, y, Z, *_ = a9
    gp = DualGP(matern(0.8, 2.0), BernoulliLikelihood(), inducing_points=Z, jitter=1e-6 / 2, memory=memory)
    for part in torch.arange(400).split(100):
        gp.update(x[part], y[part], tol=1e-10, **FIXED)
    return gp


def test_a9_without_memory(gate, a9):
    *_, x_test, y_test, batch = a9
    gp = streamed(a9, 0)
    gate("A9 NLPD", gap(gp.nlpd(x_test, y_test), 0.26287), 2e-4)
    gate("A9 KL to the batch", kl(gp.predict(x_test), batch.posterior.predict(x_test)), 0.0017)


def test_a9_with_all_of_the_past_in_memory_it_is_the_batch(gate, a9):
    *_, x_test, _, batch = a9
    gp = streamed(a9, 400)
    gate("A9 mean, all in memory", gap(gp.predict(x_test)[0], batch.posterior.predict(x_test)[0]), 0.003)
    gate("A9 KL, all in memory", kl(gp.predict(x_test), batch.posterior.predict(x_test)), 1e-5)


# --- A15: Z takes in the new inputs: online variational conditioning ---------------------------


def test_a15_growing_z_by_the_new_inputs_is_the_exact_gp_on_pseudo_data(gate):
    """D = K B_u⁻¹K and target K B_u⁻¹α_u at Z, then an exact GP on Z and the new data."""
    x, y = sines()
    Z = line(-2, 2, 6)
    gp = DualGP(rbf(), gaussian(), inducing_points=Z, jitter=1e-12, memory=0)
    gp.update(x[::2], y[::2], **FIXED)
    q = gp.posterior
    L, B = q.basis.L, q.site.B
    noise = L @ torch.linalg.solve(B, L.mT)  # on u: precision L⁻ᵀBL⁻¹
    target = L @ torch.linalg.solve(B, q.site.lam)
    new, t = x[1:14:2], y[1:14:2]
    at_all = torch.cat([Z, new])
    K = ref.rbf(at_all, at_all, 0.5, 1.3)
    D = torch.block_diag(noise, 0.09 * torch.eye(len(new)))
    xs = line(-2.2, 2.2, 30)
    Ks = ref.rbf(xs, at_all, 0.5, 1.3)
    solved = torch.linalg.solve(K + D, torch.cat([torch.cat([target, t]).unsqueeze(-1), Ks.mT], -1))
    mean, var = Ks @ solved[:, 0], 1.3 - (Ks * solved[:, 1:].mT).sum(-1)
    moved = copy.deepcopy(gp)
    moved.move_inducing(at_all)
    moved.update(new, t, move_inducing=False, **FIXED)
    gate("A15 mean", gap(moved.predict(xs)[0], mean), 1e-6)
    gate("A15 variance", gap(moved.predict(xs)[1], var), 1e-6)
    conditioned = gp.condition(new, t)
    gate("A15 mean, condition", gap(conditioned.predict(xs)[0], mean), 1e-6)
    gate("A15 variance, condition", gap(conditioned.predict(xs)[1], var), 1e-6)


# --- A17: the state does not grow ---------------------------------------------------------------


def test_a17_the_state_is_flat_in_the_number_of_data():
    gp = DualGP(matern(0.6, 1.0), gaussian(), num_inducing=12, memory=9)
    g = torch.Generator().manual_seed(0)
    sizes = []
    for _ in range(30):
        x = 4 * torch.rand(10, 1, generator=g, dtype=F64)
        gp.update(x, x.sin().squeeze(-1) + 0.3 * torch.randn(10, generator=g, dtype=F64), **FIXED)
        sizes.append(sum(v.numel() for v in gp.state_dict().values()))
    assert len(set(sizes[5:])) == 1
    assert gp.inducing_points.shape[-2] <= 12


# --- the hybrid bound ---------------------------------------------------------------------------


def halves(likelihood, mean=None):
    x, f, g = waves(40)
    y = (f + 0.3 * torch.randn(40, generator=g, dtype=F64) > 0).double()
    if isinstance(likelihood, gpytorch.likelihoods.GaussianLikelihood):
        y = f
    model = hyper(matern(0.8, 2.0), likelihood, x[:9], mean, learn_inducing=False)
    basis = InducingBasis(model.kernel, model.Z.detach(), model.mean)
    data = Data(x, y, False)
    found = e_step(Source(basis, data), model.likelihood)
    old, new = torch.arange(0, 40, 2), torch.arange(1, 40, 2)
    gone = Memory(data.rows(old), found.sites[old], old, torch.zeros(20, dtype=F64))
    noise = stream_noise(model, basis, gone)
    anchor = Anchor.of(basis, found.posterior.project(x[old], found.sites[old]), noise)
    return model, data.rows(new), found.sites[new], anchor


def stream_noise(model, basis, gone):
    if not isinstance(model.likelihood, gpytorch.likelihoods.GaussianLikelihood):
        return None
    return update.forget_into(Noise(model.likelihood.noise.item(), 0.0, 0.0), basis, gone)


@pytest.mark.parametrize("likelihood", [BernoulliLikelihood(), gaussian(0.2)], ids=["bernoulli", "gaussian"])
@pytest.mark.parametrize("moved", [False, True], ids=["Z still", "Z moved"])
def test_the_bound_of_a_stream_has_the_gradient_of_its_finite_difference(likelihood, moved):
    mean = gpytorch.means.LinearMean(2).double()
    model, data, sites, anchor = halves(likelihood, mean)
    if moved:
        model.set_inducing(model.Z.detach()[:7] + 0.05)
    sample = Sample(sites.beta[:5], residuals(model, data.x[:5]), 7.0)
    start = torch.from_numpy(model.vector())
    value = stream_bound(model, data, sites, anchor, sample)
    exact = torch.from_numpy(model.vector_gradient(list(torch.autograd.grad(value, model.trained()))))

    def at_vector(vector: torch.Tensor) -> float:
        model.set_vector(vector.numpy())
        return stream_bound(model, data, sites, anchor, sample).item()

    assert gap(ref.gradient(at_vector, start, 1e-4), exact) < 1e-5 * (1 + exact.abs().max().item())


def test_the_expected_log_of_the_old_site_is_that_of_samples():
    """E_q[log t_old], with Z moved: u_old given u by the prior, sampled."""
    model, data, sites, anchor = halves(BernoulliLikelihood())
    model.set_inducing(model.Z.detach()[:5] + 0.1)
    bound = stream_bound(model, data, sites, anchor) - batch_bound(model, data, sites, anchor)
    basis = model.basis()
    q = Posterior(
        basis, sites.pull_back(basis.features(data.x).phi) + anchor.carry(model, basis.inducing_points, basis.L)
    )
    draws = q.sample(anchor.Z, 400_000, generator=torch.Generator().manual_seed(0))
    w = draws @ anchor.L_inv.mT
    log_t = w @ anchor.site.lam - 0.5 * ((w @ anchor.site.B) * w).sum(-1)
    assert gap(bound.detach(), log_t.mean()) < 5 * log_t.std().item() / len(w) ** 0.5


# --- Z grows and shrinks --------------------------------------------------------------------------


def test_what_is_dropped_costs_the_bound_least():
    x, *_ = waves(60)
    g = torch.Generator().manual_seed(0)
    basis = InducingBasis(matern(0.8, 2.0), x[:10], jitter=1e-12)
    site = Posterior(basis).project(
        x, Sites(torch.randn(60, generator=g).double(), torch.rand(60, generator=g).double())
    )
    left, present = list(range(10)), Posterior(basis, site)
    for size in range(9, 3, -1):
        best = None
        for j in left:
            rows = [i for i in left if i != j]
            smaller = present.basis.at(x[rows])
            A, _ = present.basis.change_to(smaller)
            cost = 0.5 * (present.site.B * (torch.eye(len(left)) - A @ A.mT)).sum().item()
            if best is None or cost < best[0]:
                best = cost, rows, present.rebase(smaller)
        _, left, present = best
        assert cheapest_to_drop(basis.L_inv, site.B, size).tolist() == left


def test_dropping_sums_the_costs_of_a_batch_of_processes():
    x, *_ = waves(60)
    basis = InducingBasis(matern(0.8, 2.0), x[:10])
    g = torch.Generator().manual_seed(1)
    B = torch.stack([Posterior(basis).project(x, Sites(b, b)).B for b in torch.rand(2, 60, generator=g, dtype=F64)])
    alone = cheapest_to_drop(basis.L_inv, B.sum(0), 6)
    assert cheapest_to_drop(basis.L_inv, B, 6).tolist() == alone.tolist()


def test_greedy_choice_given_what_is_known_goes_on_where_it_stopped():
    x, *_ = waves(60)
    rows = greedy_variance(matern(), x, 20)
    assert greedy_variance(matern(), x, 10, given=x[rows[:10]]).tolist() == rows[10:].tolist()


def test_growing_is_lossless_and_stops_where_it_pays_no_more():
    x, y = sines()
    gp = DualGP(rbf(), gaussian(), inducing_points=line(-2, 2, 5), memory=4, jitter=1e-10)
    gp.update(x[:20], y[:20], **FIXED)
    state = stream.read(gp)
    grown = update.grow(state, gp.likelihood, Data(x, y, False), 50, 1e-3)
    xs = line(-3, 3, 50)
    bare = update.move(
        state.__class__(Posterior(state.basis, state.rest), state.rest, None, state.noise, 0.0, 20), grown.basis
    )
    for a, b in zip(bare.posterior.predict(xs), Posterior(state.basis, state.rest).predict(xs), strict=True):
        assert gap(a, b) < 1e-6
    assert 5 < grown.basis.num_inducing < 30
    assert (0.5 / 0.09 * grown.basis.features(x).residual).max() < 1e-3


def test_a_gaussian_stream_learns_the_noise_of_data_long_forgotten():
    g = torch.Generator().manual_seed(0)
    x = 6 * torch.rand(600, 1, generator=g, dtype=F64)
    y = x.sin().squeeze(-1) + 0.3 * torch.randn(600, generator=g, dtype=F64)
    gp = DualGP(ScaleKernel(gpytorch.kernels.RBFKernel()).double(), gaussian(1.0), num_inducing=15, memory=0)
    gp.update_all(zip(x.split(10), y.split(10), strict=True), progress=False)
    offline = DualGP(ScaleKernel(gpytorch.kernels.RBFKernel()).double(), gaussian(1.0), num_inducing=15)
    offline.fit(x, y)
    assert abs(gp.likelihood.noise.item() / offline.likelihood.noise.item() - 1) < 0.05
    assert abs(gp.nlpd(x, y) - offline.nlpd(x, y)) < 0.02


def test_sorted_and_shuffled_streams_agree(gate, banana):
    x, y, x_test, y_test = banana
    found = []
    for order in (x[:, 0].argsort(stable=True), torch.randperm(400, generator=torch.Generator().manual_seed(0))):
        gp = DualGP(ScaleKernel(gpytorch.kernels.MaternKernel()).double(), BernoulliLikelihood(), num_inducing=50)
        gp.update_all([(x[part], y[part]) for part in order.split(50)], progress=False)
        found.append(gp.nlpd(x_test, y_test))
    gate("sorted − shuffled NLPD", abs(found[0] - found[1]), 0.02)
    gate("NLPD of the sorted stream", found[0], 0.2475)
    gate("NLPD of the shuffled stream", found[1], 0.2475)


def test_a_stream_of_outliers_stays_a_gaussian_while_hyperparameters_are_learned():
    """Student-t: β < 0 far off. What is forgotten keeps none of it, so that it can be read at any θ and Z."""
    g = torch.Generator().manual_seed(2)
    x = torch.rand(240, 1, generator=g, dtype=F64) * 10
    y = (2 * x[:, 0]).sin() + 0.1 * torch.randn(240, generator=g, dtype=F64)
    y[::7] += 6.0 * torch.randn(len(y[::7]), generator=g, dtype=F64)
    likelihood = gpytorch.likelihoods.StudentTLikelihood().double()
    likelihood.deg_free, likelihood.noise = 3.0, 0.04
    gp = DualGP(matern(), likelihood, num_inducing=15, memory=30, memory_rule="leverage")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for part in torch.arange(240).split(20):
            gp.update(x[part], y[part])
    state = stream.read(gp)
    assert torch.linalg.eigvalsh(state.rest.B).min() > -1e-9
    assert gp.sites_at(x, y).beta.min() < 0
    q = Posterior(state.basis, state.rest)
    sites = Sites(at(1.0, 2.0), at(-1.0, 3.0))
    kept = update.without_negative(sites, q, x[:2])
    assert torch.equal(kept.beta, at(0.0, 3.0))
    assert gap(kept.lam, torch.stack([sites.alpha(q.predict(x[:2])[0])[0], at(2.0).squeeze()])) < 1e-12
