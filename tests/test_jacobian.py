"""Networks in the waist: the posterior in the Jacobian's coordinates against dense Laplace, in weights and in duals."""

import pytest
import reference as ref
import torch
from gpytorch.likelihoods import MultitaskGaussianLikelihood, SoftmaxLikelihood
from jacobians import engine, jacobian, mlp
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, kl_divergence
from toys import F64, at, gap, put, unchecked

from dualgp import JacobianBasis, Posterior, Sites, errors, laplace_sites

TAU = 0.7
SOFTMAX = SoftmaxLikelihood(num_classes=3, mixing_weights=False)


def inputs(n: int, seed: int = 1) -> Tensor:
    return 3 * torch.randn(n, 2, generator=torch.Generator().manual_seed(seed), dtype=F64)


X, TEST = inputs(30), inputs(7, 2)
NET = mlp()  # P = 27
JAC = engine(NET, X)
Y = torch.arange(30) % 3
S = laplace_sites(SOFTMAX, Y, JAC(X))
J, J_TEST = jacobian(NET, X), jacobian(NET, TEST)


def weights(tau: float | Tensor = TAU) -> Posterior[JacobianBasis]:
    return Posterior(JacobianBasis.of_weights(JAC, tau)).add(X, S)


def sparse(Z: Tensor, **options) -> Posterior[JacobianBasis]:
    return Posterior(JacobianBasis.at_inputs(JAC, Z, TAU, **options)).add(X, S)


def independent(Z: Tensor) -> Posterior[JacobianBasis]:
    return Posterior(JacobianBasis.at_inputs(JAC, Z, TAU, outputs="independent")).add(X, S.decoupled(JAC(X)))


QS = {
    "weights": weights,
    "few inputs": lambda: sparse(X[:5]),  # MC < P: by κ(x, Z)
    "many inputs": lambda: sparse(torch.cat([X[:4]] * 5)),  # MC > P, and singular: by JΦ
    "all inputs": lambda: sparse(X),
    "independent": lambda: independent(X[:9]),
}


def sites_of(q: Posterior, sites: Sites = S, x: Tensor = X) -> Sites:
    return sites if q.basis.coupled else sites.decoupled(JAC(x))


def joint_cov(q: Posterior) -> Tensor:
    return joint_cov_of(q).unflatten(-1, (-1, 3)).unflatten(0, (-1, 3))


def joint_cov_of(q: Posterior) -> Tensor:
    return q.joint(TEST)[1]


def test_weight_space_dual_space_and_features_give_one_covariance():
    expected = ref.glm_covariance(J, S.beta, TAU, J_TEST)
    assert gap(ref.dual_covariance(J, S.root, TAU, J_TEST), expected) < 1e-8
    assert gap(joint_cov(weights()), expected) < 1e-10
    assert gap(weights().function_cross(TEST, TEST), expected) < 1e-10
    assert gap(joint_cov(sparse(X, rank_tol=1e-10)), expected) < 1e-8


def test_the_mean_moves_by_what_the_sites_pull():
    pull = torch.einsum("ncp,nc->p", J, S.alpha(JAC(X)))
    G = torch.einsum("ncp,ncd,ndq->pq", J, S.beta, J) + TAU * torch.eye(27, dtype=F64)
    expected = JAC(TEST) + J_TEST @ torch.linalg.solve(G, pull)
    for q in (weights(), sparse(X, rank_tol=1e-10)):
        assert gap(q.predict(TEST)[0], expected) < 1e-8
        assert gap(q.function_blocks(TEST)[0], expected) < 1e-8


@pytest.mark.parametrize(
    "Z",
    [X[:5], X[:10], X[:20], X[:7].repeat(2, 1), X[:3].repeat(4, 1)],
    ids=["5", "10", "20", "14, each twice, more than the last layer has", "12, of three"],
)
def test_sparse_is_the_laplace_posterior_projected_on_what_Z_sees(Z):
    expected = ref.projected_covariance(J, S.beta, TAU, J_TEST, jacobian(NET, Z))
    q = sparse(Z)
    assert gap(joint_cov(q), expected) < 1e-8
    mean, blocks = q.predict_blocks(TEST)
    assert gap(blocks, torch.einsum("ncnd->ncd", expected)) < 1e-8
    assert gap(q.predict(TEST)[1], blocks.diagonal(dim1=-2, dim2=-1)) < 1e-12
    assert torch.equal(mean, q.predict(TEST)[0])


def test_repeated_inputs_lower_the_rank_and_change_nothing():
    once, twice = sparse(X[:4]), sparse(X[:4].repeat(2, 1))
    assert once.basis.size == twice.basis.size == 12
    assert gap(joint_cov(once), joint_cov(twice)) < 1e-10


def test_inputs_that_see_all_weights_leave_no_residual():
    q = sparse(X, rank_tol=1e-10)
    assert q.basis.size == 27
    assert not q.basis.has_residual
    assert torch.equal(q.basis.inducing_inputs, X)


def test_sparse_errs_to_the_safe_side_less_with_more_inputs_and_not_above_exact_at_its_own():
    exact, error = weights(), []
    for M in (1, 2, 4, 8):
        q = sparse(X[:M])
        assert (q.predict(X[:M])[1] <= exact.predict(X[:M])[1] + 1e-7).all()
        error.append((q.predict(TEST)[1] - exact.predict(TEST)[1]).abs().mean())
    assert error == sorted(error, reverse=True)
    assert error[-1] < 0.1 * error[0]


@pytest.mark.parametrize("name", QS)
def test_marginals_blocks_and_joint_agree(name):
    q = QS[name]()
    mean, var = q.predict(TEST)
    joint, (_, blocks) = q.predict_joint(TEST), q.predict_blocks(TEST)
    cov = joint.covariance_matrix.unflatten(-1, (-1, 3)).unflatten(0, (-1, 3))
    assert gap(joint.mean, mean) < 1e-12
    assert gap(joint.variance, var) < 1e-10
    assert gap(torch.einsum("ncnd->ncd", cov), blocks) < 1e-10
    assert torch.linalg.eigvalsh(blocks).min() > -1e-12


@pytest.mark.parametrize("name", QS)
def test_function_space_is_the_part_that_sites_can_change(name):
    q = QS[name]()
    mean, V = q.function_blocks(TEST)
    cross = q.function_cross(TEST, X)
    assert gap(torch.einsum("ncnd->ncd", q.function_cross(TEST, TEST)), V) < 1e-12
    assert gap(q.function_cross(X, TEST).permute(2, 3, 0, 1), cross) < 1e-12
    # A linear site on one output of one datum moves every function value by its covariance with it.
    lam = put(torch.zeros_like(S.lam), (4, 1), 1.0)
    moved = q.add(X, Sites(lam, torch.zeros_like(lam), multi_output=True)).function_blocks(TEST)[0]
    assert gap(moved - mean, cross[:, :, 4, 1]) < 1e-10


@pytest.mark.parametrize("name", QS)
def test_an_update_is_the_refit_and_removal_undoes_it(name):
    q = QS[name]()
    sites = sites_of(q)
    old, new = slice(0, 18), slice(18, 30)
    first = Posterior(q.basis).add(X[old], sites[old])
    updated = first.add(X[new], sites[new])
    back = updated.remove(X[new], sites[new])
    for a, b in ((updated, q), (back, first)):
        assert gap(a.site.B, b.site.B) < 1e-10
        assert gap(a.kl(), b.kl()) < 1e-10
        for s, t in zip(a.predict_blocks(TEST), b.predict_blocks(TEST), strict=True):
            assert gap(s, t) < 1e-10


@pytest.mark.parametrize("name", QS)
def test_order_and_chunks_change_nothing_and_a_second_time_is_the_first(name, monkeypatch):
    q = QS[name]()
    sites, order = sites_of(q), torch.randperm(30)
    whole = q.project(X, sites), q.predict_blocks(X)
    again = q.project(X, sites), q.predict_blocks(X)
    assert torch.equal(whole[0].B, again[0].B)
    assert torch.equal(whole[1][1], again[1][1])
    monkeypatch.setattr(JAC, "budget", 1 << 30)
    other = q.project(X[order], sites[order]), q.predict_blocks(X)
    assert gap(whole[0].B, other[0].B) < 1e-10
    assert gap(whole[0].lam, other[0].lam) < 1e-10
    assert gap(whole[1][0], other[1][0]) < 1e-10
    assert gap(whole[1][1], other[1][1]) < 1e-10
    x = inputs(150)
    more = sites_of(q, laplace_sites(SOFTMAX, torch.arange(150) % 3, JAC(x)), x)
    uncut = q.predict(x), q.project(x, more)
    monkeypatch.setattr("dualgp.linalg._CHUNK_BYTES", 1)
    cut = q.predict(x), q.project(x, more)
    assert gap(uncut[0][1], cut[0][1]) < 1e-10
    assert gap(uncut[1].lam, cut[1].lam) < 1e-10
    assert gap(uncut[1].B, cut[1].B) < 1e-10


def test_independent_outputs_are_processes_of_their_own():
    sites, cov = S.decoupled(JAC(X)), joint_cov_of(independent(X[:9]))
    for c in range(3):
        J_c, at_c, Z_c = J[:, c : c + 1], J_TEST[:, c : c + 1], jacobian(NET, X[:9])[:, c : c + 1]
        beta = sites.beta[:, c, None, None]
        expected = ref.projected_covariance(J_c, beta, TAU, at_c, Z_c)[:, 0, :, 0]
        assert gap(cov[c], expected) < 1e-8


def test_outputs_of_different_rank_stand_side_by_side():
    net = mlp()
    net[2].weight.data[1] = 0.0  # this output does not see the first layer
    jac = engine(net, X)
    q = Posterior(JacobianBasis.at_inputs(jac, X[:9], TAU, outputs="independent")).add(X, S.decoupled(jac(X)))
    assert q.basis.size == 9
    kl = q.kl()
    J_Z, cov = jacobian(net, X[:9]), joint_cov_of(q)
    for c in (0, 1):
        found = ref.projected_covariance(
            jacobian(net, X)[:, c : c + 1],
            S.decoupled(jac(X)).beta[:, c, None, None],
            TAU,
            jacobian(net, TEST)[:, c : c + 1],
            J_Z[:, c : c + 1],
        )
        assert gap(cov[c], found[:, 0, :, 0]) < 1e-8
    assert kl.isfinite()


def test_dropping_the_coupling_keeps_the_pull():
    m = JAC(X)
    assert gap(S.decoupled(m).alpha(m), S.alpha(m)) < 1e-14
    assert gap(S.decoupled(m).beta, S.beta.diagonal(dim1=-2, dim2=-1)) == 0


def test_gaussian_sites_fit_coupled_outputs_with_and_without_their_matrix():
    likelihood = MultitaskGaussianLikelihood(num_tasks=3).double()
    likelihood.task_noises, likelihood.noise = at(0.1, 0.2, 0.3), at(0.05)
    sites = laplace_sites(likelihood, JAC(X) + 0.1, JAC(X))
    blocks = Sites(sites.lam, torch.diag_embed(sites.beta), multi_output=True)
    a, b = (Posterior(JacobianBasis.of_weights(JAC, TAU)).add(X, s) for s in (sites, blocks))
    assert gap(a.site.B, b.site.B) < 1e-10
    expected = ref.glm_covariance(J, torch.diag_embed(sites.beta), TAU, J_TEST)
    assert gap(joint_cov(a), expected) < 1e-10


def test_confident_softmax_sites_leave_the_precision_above_the_priors():
    f = put(300.0 * JAC(X), 0, at(1e4, -1e4, 0.0))
    q = Posterior(JacobianBasis.of_weights(JAC, 1e-6)).add(X, laplace_sites(SOFTMAX, Y, f))
    assert torch.linalg.eigvalsh(q.precision).min() > 1 - 1e-9  # beside eigenvalues of 1e6


@pytest.mark.parametrize("name", ["weights", "few inputs", "many inputs", "independent"])
@pytest.mark.parametrize("tau", [0.05, 30.0])
def test_another_prior_precision_is_a_refit(name, tau):
    q = QS[name]()
    basis = q.basis.with_prior_precision(tau)
    refit = Posterior(basis).add(X, sites_of(q))
    moved = q.rebase(basis)
    assert gap(moved.site.lam, refit.site.lam) < 1e-10 * (1 + refit.site.lam.abs().max())
    for a, b in zip(moved.predict_blocks(TEST), refit.predict_blocks(TEST), strict=True):
        assert gap(a, b) < 1e-9
    if name == "weights":
        assert gap(joint_cov(moved), ref.glm_covariance(J, S.beta, tau, J_TEST)) < 1e-10 / tau


def test_a_prior_precision_per_tensor():
    tau = at(0.3, 5.0, 1.0, 20.0)
    each = tau.repeat_interleave(torch.tensor([p.numel() for p in NET.parameters()]))
    expected = ref.glm_covariance(J, S.beta, each, J_TEST)
    assert gap(joint_cov(weights(tau)), expected) < 1e-10
    assert gap(joint_cov(weights().rebase(weights().basis.with_prior_precision(tau))), expected) < 1e-10
    full = JacobianBasis.at_inputs(JAC, X[:5], TAU, rank_tol=1e-12).with_prior_precision(tau)
    scaled = each.rsqrt()
    projected = ref.projected_covariance(J * scaled, S.beta, 1.0, J_TEST * scaled, jacobian(NET, X[:5]) * scaled)
    assert gap(joint_cov(Posterior(full).add(X, S)), projected) < 1e-8
    doubled = full.with_prior_precision(2 * tau)
    assert doubled.size == full.size
    q = Posterior(full).add(X, S).rebase(doubled)
    assert gap(joint_cov(q), joint_cov(Posterior(doubled).add(X, S))) < 1e-9


def test_a_site_does_not_cross_to_other_directions():
    q = sparse(X[:5])
    for basis in (
        q.basis.with_prior_precision(at(0.3, 5.0, 1.0, 20.0)),
        JacobianBasis.at_inputs(JAC, X[5:10], TAU),
        JacobianBasis.of_weights(JAC, TAU),
        JacobianBasis.at_inputs(engine(mlp(seed=1), X), X[:5], TAU),
        independent(X[:9]).basis,
    ):
        with pytest.raises(errors.BasisMismatchError, match="project the data anew"):
            q.rebase(basis)


@pytest.mark.parametrize("name", ["weights", "few inputs", "independent"])
def test_samples_have_the_mean_and_covariance_of_the_joint(name):
    q, count = QS[name](), 20_000
    draws = q.sample(TEST, count, generator=torch.Generator().manual_seed(0))
    assert draws.shape == (count, 7, 3)
    joint = q.predict_joint(TEST)
    cov, draws = joint.covariance_matrix, draws.flatten(1)
    sd = cov.diagonal().sqrt()
    assert ((draws.mean(0) - joint.mean.flatten()).abs() < 5 * sd / count**0.5).all()
    assert (draws.T.cov() - cov).abs().max() < 6 * sd.max() ** 2 / count**0.5


def test_a_draw_is_one_function_however_x_is_cut():
    q = weights()
    a = q.sample(X, 3, generator=torch.Generator().manual_seed(1))
    b = [q.sample(x, 3, generator=torch.Generator().manual_seed(1)) for x in X.split(11)]
    assert gap(a, torch.cat(b, 1)) < 1e-12


def test_kl_and_expected_site_are_those_of_the_weights():
    q = weights()
    w = MultivariateNormal(q.mean_w, precision_matrix=q.precision)
    assert (
        gap(q.kl(), kl_divergence(w, MultivariateNormal(torch.zeros(27, dtype=F64), torch.eye(27, dtype=F64)))) < 1e-9
    )
    second = w.covariance_matrix + torch.outer(q.mean_w, q.mean_w)
    assert gap(q.expected_log(q.site), q.site.lam @ q.mean_w - 0.5 * (q.site.B * second).sum()) < 1e-9


class WithShift(nn.Module):
    """A network with one more weight, that adds to every output alike and starts at 0."""

    def __init__(self, net: nn.Module, size: float) -> None:
        super().__init__()
        self.net, self.size, self.shift = net, size, nn.Parameter(torch.zeros(1, dtype=F64))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + self.size * self.shift


def test_a_prior_on_a_shift_of_all_logits_changes_no_probability():
    jac = engine(WithShift(mlp(), 4.0), X)
    more = Posterior(JacobianBasis.of_weights(jac, TAU)).add(X, S)
    (mean, cov), (mean_2, cov_2) = weights().predict_blocks(TEST), more.predict_blocks(TEST)
    shift = 4.0 / TAU**0.5
    assert gap(mean, mean_2) < 1e-12
    assert gap(cov_2, cov + shift**2) < 1e-11  # data say nothing of it: the prior's variance stays, and only there
    noise, common = torch.randn(50, 7, 3, 1, dtype=F64), torch.randn(50, 7, 1, dtype=F64)
    draws = mean + (torch.linalg.cholesky(cov) @ noise).squeeze(-1)
    draws_2 = mean_2 + (torch.linalg.cholesky(cov_2 - shift**2) @ noise).squeeze(-1) + shift * common
    assert gap(draws.softmax(-1).mean(0), draws_2.softmax(-1).mean(0)) < 1e-12


def test_float32_networks_are_close_to_float64_ones():
    jac = engine(mlp(dtype=torch.float32), X.float())
    for basis, exact in (
        (JacobianBasis.of_weights(jac, TAU), weights()),
        (JacobianBasis.at_inputs(jac, X[:5].float(), TAU), sparse(X[:5])),
    ):
        q = Posterior(basis).add(X.float(), S)
        mean, cov = q.predict_blocks(TEST.float())
        assert mean.dtype == cov.dtype == torch.float32
        assert gap(mean, exact.predict(TEST)[0]) < 1e-4
        assert gap(cov, exact.predict_blocks(TEST)[1]) < 1e-4


def test_images_through_convolutions():
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(3 * 16, 3)).double()
    x = torch.randn(8, 1, 6, 6, dtype=F64)
    jac = engine(net, x)
    sites = laplace_sites(SOFTMAX, Y[:8], jac(x))
    q = Posterior(JacobianBasis.at_inputs(jac, x, TAU)).add(x, sites)
    J = jacobian(net, x)
    assert gap(q.predict_blocks(x)[1], torch.einsum("ncnd->ncd", ref.glm_covariance(J, sites.beta, TAU, J))) < 1e-8


def test_one_output_and_no_data():
    net = mlp(outputs=1)
    q = Posterior(JacobianBasis.at_inputs(engine(net, X), X[:4], TAU))
    assert q.predict(TEST)[0].shape == (7, 1)
    assert gap(q.predict(TEST)[0], net(TEST)) < 1e-14
    for name, build in QS.items():
        q = build()
        mean, var = q.predict(X[:0])
        assert mean.shape == var.shape == (0, 3), name
        assert q.predict_blocks(X[:0])[1].shape == (0, 3, 3)
        assert q.function_cross(X[:0], TEST).shape == (0, 3, 7, 3)
        assert gap(q.add(X[:0], sites_of(q)[slice(0, 0)]).site.B, q.site.B) == 0
    assert weights().sample(X[:0], 2).shape == (2, 0, 3)


def test_networks_of_tokens_take_integers():
    net = nn.Sequential(nn.Embedding(5, 2), nn.Flatten(), nn.Linear(6, 3)).double()
    tokens = torch.randint(5, (20, 3))
    jac = engine(net, tokens)
    q = Posterior(JacobianBasis.at_inputs(jac, tokens[:4], TAU)).add(
        tokens, laplace_sites(SOFTMAX, Y[:20], jac(tokens))
    )
    assert gap(q.predict(tokens)[1], q.predict_blocks(tokens)[1].diagonal(dim1=-2, dim2=-1)) < 1e-12


@pytest.mark.parametrize("tau", [0.0, -1.0, float("nan"), float("inf"), at(1.0, 1.0, 0.0, 1.0)])
def test_prior_precisions_are_positive(tau):
    for build in (
        lambda: JacobianBasis.of_weights(JAC, tau),
        lambda: JacobianBasis.at_inputs(JAC, X, tau),
        lambda: weights().basis.with_prior_precision(tau),
    ):
        with pytest.raises(errors.InputError, match="positive and finite"):
            build()


def test_what_does_not_fit_is_refused():
    with pytest.raises(errors.InputError, match="each of the 4 parameter tensors"):
        JacobianBasis.of_weights(JAC, torch.ones(3))
    with pytest.raises(errors.InputError, match=r"\('T', 2\), got \(4, 3\)"):
        JacobianBasis.at_inputs(JAC, torch.zeros(4, 3, dtype=F64), TAU)
    with pytest.raises(errors.InputError, match="at least one"):
        JacobianBasis.at_inputs(JAC, X[:0], TAU)
    with unchecked(), pytest.raises(errors.InputError, match="'coupled' or 'independent'"):
        JacobianBasis.at_inputs(JAC, X, TAU, outputs="both")
    with pytest.raises(errors.InputError, match=r"got \(2,\)"):
        weights().predict_blocks(X[0])
    with pytest.raises(errors.InputError, match="30 inputs"):
        weights().add(X, S[slice(0, 4)])
    with pytest.raises(errors.InputError, match="num_outputs=3"):
        weights().add(X, Sites(S.lam[:, :2], S.beta[:, :2, :2], multi_output=True))
    with pytest.raises(errors.InputError, match="decoupled"):
        independent(X[:5]).add(X, S)
    dead = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2, bias=False)).double()
    for p in dead.parameters():
        p.data.fill_(-1.0)
    with pytest.raises(errors.InputError, match="does not depend on its parameters"):
        JacobianBasis.at_inputs(engine(dead, X), X[:3].abs(), TAU)
