"""Removal against posteriors that never saw the datum, on Gaussian processes and on networks."""

import pytest
import reference as ref
import torch
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood, MultitaskGaussianLikelihood, SoftmaxLikelihood
from gpytorch.means import ConstantMean
from jacobians import jacobian, mlp
from leaning import F64
from torch import Tensor
from toys import at, gap, gaussian, line, matern, random_sites, rbf, waves

from dualgp import DualGP, InducingBasis, Posterior, Sites, errors, log_predictive
from dualgp.influence import (
    DiagonalPosterior,
    leave_group_out,
    leave_one_out,
    leverage,
    leverage_by_class,
    mislabelled,
    perturb,
    preconditioner_variance,
    removal_shift,
    sensitivity,
    sum_by,
)
from dualgp.influence import blocks as blocks_module
from dualgp.jacobian import JacobianBasis
from dualgp.kernels import NetworkJacobian
from dualgp.laplace import laplace_sites
from dualgp.likelihoods import LogitBernoulliLikelihood

N = 24
X = line(-2, 2, N)
THREE = SoftmaxLikelihood(num_classes=3, mixing_weights=False)


def offset(value: float) -> ConstantMean:
    mean = ConstantMean().double()
    mean.constant.data = at(value).squeeze()
    return mean


def one() -> tuple[Posterior, Tensor, Sites]:
    """One output, seven inducing inputs, a mean, some β < 0."""
    sites = random_sites(N)
    sites = Sites(sites.lam, torch.where(torch.arange(N) % 5 == 0, -0.05, 1.0) * sites.beta)
    return Posterior(InducingBasis(rbf(), line(-2, 2, 7), offset(0.7))).add(X, sites), X, sites


def independent() -> tuple[Posterior, Tensor, Sites]:
    """Three outputs with a kernel each."""
    kernel = rbf(at(0.4, 0.6, 0.9).reshape(3, 1, 1), at(1.0, 1.5, 2.0), batch_shape=torch.Size([3]))
    sites = random_sites(N, 3, multi=True)
    return Posterior(InducingBasis(kernel, line(-2, 2, 7), num_outputs=3)).add(X, sites), X, sites


def network(Z: Tensor | None = None) -> tuple[Posterior, Tensor, Sites]:
    """Three coupled outputs, softmax sites; all 27 weights, or what Z sees and a residual."""
    net, x = mlp(), torch.randn(N, 2, generator=torch.Generator().manual_seed(1), dtype=F64)
    engine = NetworkJacobian(net, x[:2])
    sites = laplace_sites(THREE, torch.arange(N) % 3, engine(x))
    basis = JacobianBasis.of_weights(engine, 0.2) if Z is None else JacobianBasis.at_inputs(engine, x[:4], 0.2)
    return Posterior(basis).add(x, sites), x, sites


CASES = {"one": one, "independent": independent, "network": network, "sparse network": lambda: network(X)}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def never_saw(q: Posterior, x: Tensor, sites: Sites, index) -> Posterior:
    """The posterior built up from the sites of all other data."""
    keep = torch.ones(len(x), dtype=torch.bool)
    keep[index] = False
    return Posterior(q.basis).add(x[keep], sites[keep])


def targets(case) -> tuple[object, Tensor]:
    return (gaussian(0.3), random_sites(N).lam) if case is one else (THREE, torch.arange(N) % 3)


@cases
def test_removal_is_the_posterior_that_never_saw_the_datum(case):
    q, x, sites = case()
    likelihood, y = targets(case)
    left, s = leave_one_out(q, x, y, sites, likelihood), sensitivity(q, x, sites)
    mean, var = (t.reshape(N, -1) for t in q.predict(x))
    for i in range(N):
        m, cov = never_saw(q, x, sites, i).predict_blocks(x[i : i + 1])
        assert gap(left.mean[i], m[0]) < 1e-9
        assert gap(left.cov[i], cov[0]) < 1e-9
        assert gap(s.mean_shift[i], m[0] - mean[i]) < 1e-9
        assert gap(s.var_shift[i], cov[0].diagonal() - var[i]) < 1e-9
    assert left.num_capped == s.num_capped == 0


@cases
def test_first_order_is_the_derivative_of_the_perturbed_posterior(case):
    q, x, sites = case()
    s, step = sensitivity(q, x, sites, order="first"), 1e-5
    for i in (0, 7):
        eps = torch.zeros(N, dtype=F64)
        eps[i] = step
        (up, up_var), (down, down_var) = (perturb(q, x, sites, e).predict(x[i : i + 1]) for e in (eps, -eps))
        assert gap(s.mean_shift[i], (up - down)[0] / (2 * step)) < 1e-7
        assert gap(s.var_shift[i], (up_var - down_var)[0] / (2 * step)) < 1e-7


@cases
def test_perturbing_by_one_removes_and_by_minus_one_doubles(case):
    q, x, sites = case()
    for eps, expected in ((at(*[1.0] * 5), q.remove(x[:5], sites[:5])), (-1.0, q.add(x[:5], sites[:5]))):
        assert gap(perturb(q, x[:5], sites[:5], eps).precision, expected.precision) < 1e-12
        assert gap(perturb(q, x[:5], sites[:5], eps).mean_w, expected.mean_w) < 1e-12


@cases
def test_groups_are_predicted_by_the_posterior_that_never_saw_them(case):
    q, x, sites = case()
    likelihood, y = targets(case)
    groups = [[3], [0, 5, 1], list(range(2, 22)), torch.tensor([5, 20])]  # the third is larger than the basis
    left = leave_group_out(q, x, y, sites, likelihood, groups)
    assert left.index.tolist() == [i for group in groups for i in torch.as_tensor(group).tolist()]
    alone = leave_one_out(q, x, y, sites, likelihood)
    assert gap(left.log_predictive[0], alone.log_predictive[3]) < 1e-8
    for number, index in enumerate(groups):
        mean, cov = never_saw(q, x, sites, index).predict_blocks(x[index])
        mine = left.group == number
        assert gap(left.mean[mine].reshape(mean.shape), mean) < 1e-9
        assert gap(left.cov[mine], cov) < 1e-9
        size = mean.numel()
        V = q.function_cross(x[index], x[index]).reshape(size, size)
        B = torch.block_diag(*blocks_module.as_matrices(sites[index])[1])
        assert gap(left.hat[mine], torch.linalg.eigvals(B @ V).real.max()) < 1e-9


@cases
def test_leverages_sum_to_the_effective_number_of_parameters(case):
    q, x, sites = case()
    effective = (q.site.B @ torch.linalg.inv(q.precision)).diagonal(dim1=-2, dim2=-1).sum()
    assert gap(leverage(q, x, sites).sum(), effective) < 1e-10
    assert gap(leverage_by_class(q, x, sites).reshape(N, -1).sum(-1), leverage(q, x, sites)) < 1e-12


@pytest.mark.parametrize("noise", [0.09, 1e-5])
def test_a_process_left_out_is_the_process_refitted(noise):
    # Z = X, so that this is exact regression; with little noise hat values reach .9999, and are not capped.
    _, f, g = waves(30)
    x = torch.rand(30, 2, generator=g, dtype=F64) * 8
    y = f + 0.3 * torch.randn(30, generator=g, dtype=F64)
    q = Posterior(InducingBasis(matern(), x, offset(0.7), jitter=0.0))
    sites = Sites(y / noise, torch.full_like(y, 1 / noise))
    left = leave_one_out(q.add(x, sites), x, y, sites, gaussian(noise))
    K = ref.matern52(x, x, 0.8, 2.0)
    groups = [torch.arange(0, 9), torch.arange(9, 30)]
    grouped = leave_group_out(q.add(x, sites), x, y, sites, gaussian(noise), groups)
    for out, index, without in [(left, slice(i, i + 1), [i]) for i in range(30)] + [(grouped, g, g) for g in groups]:
        keep = torch.ones(30, dtype=torch.bool)
        keep[without] = False
        _, mean, var = ref.gpr(K[keep][:, keep], K[keep][:, index], K.diagonal()[index], y[keep] - 0.7, at(noise))
        assert gap(out.mean[index], mean + 0.7) < 1e-8
        assert gap(out.cov[index].flatten(), var) < 1e-8
        density = torch.distributions.Normal(mean + 0.7, (var + noise).sqrt())
        assert gap(out.log_predictive[index], density.log_prob(y[index])) < 1e-6
    assert (left.hat.max() > 0.9999) == (noise == 1e-5)
    assert left.nlpd == pytest.approx(-left.log_predictive.mean().item())


def test_noise_may_differ_by_datum_and_by_output():
    x, noise = X, 0.1 + torch.rand(N, generator=torch.Generator().manual_seed(0), dtype=F64)
    y = x.sin().squeeze(-1)
    q, sites = Posterior(InducingBasis(rbf(), line(-2, 2, 7))), Sites(y / noise, 1 / noise)
    left = leave_one_out(q.add(x, sites), x, y, sites, FixedNoiseGaussianLikelihood(noise), noise=noise)
    mean, var = never_saw(q, x, sites, 4).predict(x[4:5])
    assert gap(left.log_predictive[4], torch.distributions.Normal(mean, (var + noise[4]).sqrt()).log_prob(y[4])) < 1e-9
    grouped = leave_group_out(
        q.add(x, sites), x, y, sites, FixedNoiseGaussianLikelihood(noise), [[9], [4]], noise=noise
    )
    assert gap(grouped.log_predictive, left.log_predictive[[9, 4]]) < 1e-9

    likelihood = MultitaskGaussianLikelihood(num_tasks=2, rank=0).double()
    noises = (likelihood.task_noises + likelihood.noise).detach()
    both = torch.stack([y, -y], -1)
    q, sites = q_of_two(), Sites(both / noises, (1 / noises).expand(N, 2), multi_output=True)
    left = leave_one_out(q.add(x, sites), x, both, sites, likelihood)
    mean, var = never_saw(q, x, sites, 4).predict(x[4:5])
    expected = torch.distributions.Normal(mean[0], (var[0] + noises).sqrt()).log_prob(both[4]).sum()
    assert gap(left.log_predictive[4], expected) < 1e-9
    assert left.mean.shape == (N, 2)


def test_a_network_with_one_output():
    net, x = mlp(outputs=1), torch.randn(N, 2, dtype=F64)
    engine, y = NetworkJacobian(net, x[:2]), (torch.arange(N) % 2).double()
    sites = laplace_sites(LogitBernoulliLikelihood(), y, engine(x))
    q = Posterior(JacobianBasis.of_weights(engine, 0.2)).add(x, sites)
    left = leave_one_out(q, x, y, sites, LogitBernoulliLikelihood())
    grouped = leave_group_out(q, x, y, sites, LogitBernoulliLikelihood(), [[i] for i in range(N)])
    mean, var = never_saw(q, x, sites, 3).predict(x[3:4])
    expected = log_predictive(LogitBernoulliLikelihood(), y[3:4], mean[0], var[0])
    assert gap(left.log_predictive[3], expected) < 1e-9
    assert gap(left.log_predictive, grouped.log_predictive) < 1e-9
    assert gap(-left.log_likelihood, torch.nn.functional.softplus((1 - 2 * y) * left.mean.squeeze(-1))) < 1e-6


def q_of_two() -> Posterior:
    return Posterior(InducingBasis(rbf(), line(-2, 2, 7), num_outputs=2))


def test_hat_values_are_those_of_the_symmetric_form():
    q, x, sites = network()
    V = q.function_blocks(x)[1]
    assert gap(sensitivity(q, x, sites).hat, torch.linalg.eigvalsh(sites.root.mT @ V @ sites.root)[:, -1]) < 1e-12


def test_one_block_and_many_agree(monkeypatch):
    q, x, sites = network()
    whole = sensitivity(q, x, sites)
    monkeypatch.setattr(blocks_module, "_NUMBERS", 45)  # five data at a time
    pieces = sensitivity(q, x, sites)
    assert gap(pieces.mean_shift, whole.mean_shift) < 1e-14
    assert gap(pieces.score, (sites.beta @ whole.mean_shift.unsqueeze(-1)).squeeze(-1).abs().sum(-1)) < 1e-14


def test_what_the_precision_does_not_contain_is_capped_counted_and_warned_of():
    q, x, sites = network()
    engine = q.basis.jacobian
    wide = DiagonalPosterior(engine, torch.full((engine.num_params,), 5.0, dtype=F64))
    with pytest.warns(errors.NumericalWarning, match=r"of 24 data was capped, the first being datum"):
        s = sensitivity(wide, x, sites)
    f, V = wide.function_blocks(x)
    hat = torch.linalg.eigvalsh(sites.root.mT @ V @ sites.root)
    assert s.num_capped == int((hat[:, -1] > 0.99).sum()) > 0
    assert gap(s.hat, hat[:, -1]) < 1e-12
    for i in s.capped.nonzero()[:2, 0]:  # h ← min(h, .99) in V^½ (I − V^½BV^½)⁻¹ V^½
        value, Q = torch.linalg.eigh(V[i])
        half = Q * value.clamp_min(0).sqrt() @ Q.T
        h, U = torch.linalg.eigh(half @ sites.beta[i] @ half)
        without = half @ U * (1 / (1 - h.clamp_max(0.99))) @ U.T @ half
        assert gap(s.mean_shift[i], -without @ sites.alpha(f)[i]) < 1e-8
    with pytest.warns(errors.NumericalWarning):
        assert leave_one_out(wide, x, torch.arange(N) % 3, sites, THREE).num_capped == s.num_capped
    first = sensitivity(wide, x, sites, order="first")
    assert first.num_capped == 0
    assert gap(first.var_shift, (V @ sites.beta @ V).diagonal(dim1=-2, dim2=-1)) < 1e-8


def test_a_group_that_was_never_there_cannot_be_left_out():
    q, x, sites = one()
    far = Sites(sites.lam, 50.0 * sites.beta.abs())
    for group in ([0, 1], list(range(20))):
        with pytest.raises(errors.NotPositiveDefiniteError, match="Without group 0 no Gaussian is left"):
            leave_group_out(q, x, sites.lam, far, gaussian(), [group])


def test_coupled_softmax_sees_no_common_shift():
    q, x, sites = network()
    y = torch.arange(N) % 3
    left = leave_one_out(q, x, y, sites, THREE)
    error = []
    for i in range(0, N, 6):
        L = torch.linalg.cholesky(left.cov[i])
        mean = left.mean[i]

        def probability(z: Tensor, mean: Tensor = mean, L: Tensor = L, label: int = int(y[i])) -> Tensor:
            return (mean + z @ L.T).softmax(-1)[:, label]

        exact = ref.brute_joint(probability, torch.zeros(3, dtype=F64), torch.ones(3, dtype=F64), 41).log()
        error.append(gap(left.log_predictive[i], exact))
    assert max(error) < 0.05


def test_a_fitted_classifier_knows_its_mislabelled_data():
    x, _, _ = waves(80)
    x = x + 0.5 * x.sign()  # four squares with a gap between them
    y = (x.prod(-1) > 0).double()
    wrong = torch.tensor([5, 33, 61])
    y[wrong] = 1 - y[wrong]
    gp = DualGP(rbf(), LogitBernoulliLikelihood(), num_inducing=20)
    gp.fit(x, y)
    left = leave_one_out(gp.posterior, x, y, gp.sites, gp.likelihood)
    found = mislabelled(left, count=3)
    assert sorted(found.indices.tolist()) == wrong.tolist()
    assert gap(found.surprise, -left.log_predictive[found.indices]) == 0
    assert gap(left.mean[5], gp.posterior.remove(x[5:6], gp.sites[5]).predict(x[5:6])[0]) < 1e-9
    assert left.nlpd > gp.nlpd(x, y)


def test_variance_of_each_preconditioner():
    weights = [torch.nn.Parameter(at(1.0, 2.0)), torch.nn.Parameter(at(3.0))]
    grads = [[at(0.5, -1.0), at(2.0)], [at(0.1, 3.0), at(-1.0)]]

    def run(opt: torch.optim.Optimizer, params: list) -> Tensor:
        for grad in grads:
            for p, value in zip(weights, grad, strict=True):
                p.grad = value.clone()
            opt.step()
        return preconditioner_variance(opt, params, num_data=50, prior_precision=2.0)

    def adam(kind: type = torch.optim.Adam, **options) -> torch.optim.Optimizer:
        groups = [{"params": [weights[1]], "betas": (0.9, 0.5)}, {"params": [weights[0]], "betas": (0.9, 0.8)}]
        return kind(groups, lr=0.0, **options)

    flat = torch.stack([torch.cat(grad) for grad in grads])
    beta2 = at(0.8, 0.8, 0.5)
    steps = torch.stack([(1 - beta2) * flat[0].square(), (1 - beta2) * (beta2 * flat[0].square() + flat[1].square())])
    steps = steps / (1 - beta2.square())
    expected, largest = 1 / (50 * steps[1].sqrt() + 2), 1 / (50 * steps.max(0).values.sqrt() + 2)
    assert gap(run(adam(), weights), expected) < 1e-12
    assert gap(run(adam(torch.optim.AdamW), weights), expected) < 1e-12
    assert gap(run(adam(amsgrad=True), weights[::-1]), largest[[2, 0, 1]]) < 1e-12
    square, mean = 0.5 * (0.5 * flat[0].square() + flat[1].square()), 0.5 * (0.5 * flat[0] + flat[1])
    rms = torch.optim.RMSprop(weights, lr=0.0, alpha=0.5, centered=True)
    assert gap(run(rms, weights), 1 / (50 * (square - mean.square()).sqrt() + 2)) < 1e-12
    assert gap(run(torch.optim.SGD(weights, lr=0.0), weights), torch.full((3,), 0.5)) == 0


def test_a_diagonal_posterior_of_a_network():
    q, x, sites = network()
    engine, s = q.basis.jacobian, torch.rand(27, dtype=F64)
    J = jacobian(mlp(), x)
    f, V = DiagonalPosterior(engine, s).function_blocks(x)
    assert gap(V, J * s @ J.mT) < 1e-12
    assert gap(f, mlp()(x).detach()) < 1e-12


def test_sums_by_label():
    values, labels = torch.arange(12.0).reshape(4, 3), torch.tensor([2, 0, 2, 0])
    sums = sum_by(values, labels, num_labels=4)
    assert gap(sums, torch.stack([values[[1, 3]].sum(0), values[0] * 0, values[[0, 2]].sum(0), values[0] * 0])) == 0


def test_a_batch_of_groups_and_one_group_agree():
    g = torch.Generator().manual_seed(0)
    half = torch.randn(2, 5, 4, 4, generator=g, dtype=F64)
    V, B = (0.1 * h @ h.mT for h in half)
    alpha = torch.randn(5, 4, generator=g, dtype=F64)
    shift = removal_shift(V, alpha, B)
    eye = torch.eye(4, dtype=F64)
    without = V @ torch.linalg.inv(eye - B @ V)
    ok = ~shift.capped
    assert ok.sum() >= 3
    assert gap(shift.mean[ok], -(without @ alpha.unsqueeze(-1)).squeeze(-1)[ok]) < 1e-10
    assert gap(shift.cov[ok], (without - V)[ok]) < 1e-10
    assert gap(removal_shift(V[2], alpha[2], B[2]).mean, shift.mean[2]) < 1e-14
