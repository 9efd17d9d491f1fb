"""The waist: prior plus sites, against the textbook form that is not whitened."""

import pytest
import reference as ref
import torch
from gpytorch.means import ConstantMean
from toys import F64, at, gap, line, matern, random_sites, rbf, unchecked, waves

from dualgp import InducingBasis, Posterior, Site, Sites, errors

Z, X, TEST = line(-1, 1, 7), line(-1.5, 1.5, 40), line(-2, 2, 9)


def constant(value: float) -> ConstantMean:
    mean = ConstantMean().double()
    mean.constant.data = at(value).squeeze()
    return mean


def one(mean: float = 0.0, sites: Sites | None = None) -> Posterior:
    basis = InducingBasis(rbf(), Z, constant(mean), jitter=1e-8)
    return Posterior(basis).add(X, random_sites(40) if sites is None else sites)


def three(per_output: bool = False) -> Posterior:
    kernel = rbf()
    if per_output:
        kernel = rbf(at(0.4, 0.6, 0.9).reshape(3, 1, 1), at(1.0, 1.5, 2.0), batch_shape=torch.Size([3]))
    return Posterior(InducingBasis(kernel, Z, num_outputs=3)).add(X, random_sites(40, 3, multi=True))


def textbook(sites: Sites, mean: float) -> tuple[torch.Tensor, ...]:
    """K_zz and the textbook q(u) of centred u, whose sites act on f itself."""
    Kzz = ref.rbf(Z, Z, 0.5, 1.3) + 1.3e-8 * torch.eye(7, dtype=F64)
    m, S = ref.textbook_q(Kzz, ref.rbf(Z, X, 0.5, 1.3), sites.lam - sites.beta * mean, sites.beta)
    return Kzz, m, S


@pytest.mark.parametrize("mean", [0.0, 2.5])
def test_prediction_and_kl_are_those_of_the_textbook(mean):
    q, sites = one(mean), random_sites(40)
    Kzz, m, S = textbook(sites, mean)
    kss = torch.full((9,), 1.3, dtype=F64)
    expected = ref.textbook_marginals(Kzz, ref.rbf(Z, TEST, 0.5, 1.3), kss, m, S)
    found = q.predict(TEST)
    assert gap(found[0], expected[0] + mean) < 1e-7
    assert gap(found[1], expected[1]) < 1e-7
    assert gap(q.kl(), ref.textbook_kl(Kzz, m, S)) < 1e-6


def test_the_joint_is_that_of_the_textbook():
    Kzz, m, S = textbook(random_sites(40), 0.0)
    a = torch.linalg.solve(Kzz, ref.rbf(Z, TEST, 0.5, 1.3))
    expected = ref.rbf(TEST, TEST, 0.5, 1.3) - a.T @ (Kzz - S) @ a
    joint = one().predict_joint(TEST)
    assert gap(joint.mean, a.T @ m) < 1e-7
    assert gap(joint.covariance_matrix, expected) < 1e-7


def test_a_hand_made_posterior():
    # One inducing point at 0 under variance 1: w = f(0), P = 1 + β, mean = λ / P.
    basis = InducingBasis(rbf(1.0, 1.0), torch.zeros(1, 1, dtype=F64), jitter=0.0)
    q = Posterior(basis).add(torch.zeros(1, 1, dtype=F64), Sites(at(3.0), at(2.0)))
    mean, var = q.predict(torch.zeros(1, 1, dtype=F64))
    assert gap(mean, 1.0) < 1e-14
    assert gap(var, 1 / 3) < 1e-14
    assert gap(q.kl(), 0.5 * (1 / 3 - 1 + at(3.0).log() + 1.0)) < 1e-14


def test_the_prior_is_the_prior():
    q = Posterior(InducingBasis(rbf(), Z, constant(2.0)))
    mean, var = q.predict(TEST)
    assert gap(mean, torch.full((9,), 2.0)) < 1e-15
    assert gap(var, torch.full((9,), 1.3)) < 1e-7
    assert q.kl() == 0.0
    assert gap(q.predict_joint(TEST).covariance_matrix, ref.rbf(TEST, TEST, 0.5, 1.3)) < 1e-12


QS = {"one output": one, "mean": lambda: one(2.5), "shared": three, "per output": lambda: three(True)}


def test_nothing_is_predicted_at_no_inputs():
    for make in QS.values():
        q = make()
        shape = (0,) if q.basis.num_outputs is None else (0, 3)
        assert [t.shape for t in q.predict(TEST[:0])] == [shape, shape]
        assert q.sample(TEST[:0], 2).shape == (2, *shape)


def sites_for(q: Posterior, seed: int) -> Sites:
    multi = q.basis.num_outputs is not None
    return random_sites(*((40, 3) if multi else (40,)), seed=seed, multi=multi)


@pytest.mark.parametrize("name", QS)
def test_marginals_are_the_diagonal_of_the_joint(name):
    q = QS[name]()
    mean, var = q.predict(TEST)
    joint = q.predict_joint(TEST)
    assert gap(joint.mean, mean) < 1e-13
    assert gap(joint.variance, var) < 1e-12


@pytest.mark.parametrize("name", QS)
def test_adding_then_removing_is_the_identity(name):
    q = QS[name]()
    more = sites_for(q, 7)
    back = q.add(TEST[:5], more[slice(0, 5)]).remove(TEST[:5], more[slice(0, 5)])
    assert gap(back.site.lam, q.site.lam) < 1e-10
    assert gap(back.site.B, q.site.B) < 1e-10
    for a, b in zip(back.predict(TEST), q.predict(TEST), strict=True):
        assert gap(a, b) < 1e-11


@pytest.mark.parametrize("name", QS)
def test_a_stream_in_any_order_and_cut_is_the_batch(name):
    q = QS[name]()
    sites, prior = sites_for(q, 0), Posterior(q.basis)
    streamed = prior
    for rows in torch.randperm(40).split([1, 13, 20, 2, 4]):
        streamed = streamed.add(X[rows], sites[rows])
    whole = prior.add(X, sites)
    assert gap(streamed.kl(), whole.kl()) < 1e-10
    for a, b in zip(streamed.predict(TEST), whole.predict(TEST), strict=True):
        assert gap(a, b) < 1e-11


@pytest.mark.parametrize("name", QS)
def test_the_precision_is_no_less_than_the_priors_and_data_never_widen(name):
    q = QS[name]()
    assert torch.linalg.eigvalsh(q.precision).min() > 1 - 1e-12
    assert (q.predict(TEST)[1] <= Posterior(q.basis).predict(TEST)[1] + 1e-12).all()
    assert q.kl() > 0


@pytest.mark.parametrize("name", QS)
def test_chunks_do_not_change_anything(name, monkeypatch):
    q, x = QS[name](), line(-2, 2, 200)
    sites = random_sites(*((200, 3) if q.basis.num_outputs else (200,)), multi=q.basis.num_outputs is not None)
    whole = q.predict(x), q.project(x, sites), q.double_blocks(x)
    monkeypatch.setattr("dualgp.linalg._CHUNK_BYTES", 1)
    cut = q.predict(x), q.project(x, sites), q.double_blocks(x)
    assert gap(whole[0][0], cut[0][0]) < 1e-13
    assert gap(whole[0][1], cut[0][1]) < 1e-13
    assert gap(whole[1].B, cut[1].B) < 1e-10
    assert gap(whole[2][0], cut[2][0]) < 1e-13
    assert gap(whole[2][1], cut[2][1]) < 1e-13


@pytest.mark.parametrize("name", QS)
def test_verbs_leave_the_posterior_as_it_was(name):
    q = QS[name]()
    before = [t.clone() for t in (*q.predict(TEST), q.site.lam, q.site.B, q.kl())]
    more = sites_for(q, 3)
    q.add(X, more).remove(X, more)
    q.scale(0.3)
    q.temper(2.0)
    for a, b in zip(before, (*q.predict(TEST), q.site.lam, q.site.B, q.kl()), strict=True):
        assert torch.equal(a, b)


def test_scaling_and_tempering_are_those_of_every_site():
    sites = random_sites(40)
    scaled = one(2.5, 0.25 * sites)
    for other in (one(2.5, sites).scale(0.25), one(2.5, sites).temper(4.0), one(2.5, sites).temper(0.5).scale(0.125)):
        for a, b in zip(other.predict(TEST), scaled.predict(TEST), strict=True):
            assert gap(a, b) < 1e-12
    assert gap(one(2.5).scale(0.0).predict(TEST)[0], Posterior(one(2.5).basis).predict(TEST)[0]) == 0


def test_outputs_are_independent_and_their_kl_adds():
    for per_output in (False, True):
        q, sites = three(per_output), random_sites(40, 3, multi=True)
        kernels = zip((0.4, 0.6, 0.9), (1.0, 1.5, 2.0), strict=True) if per_output else [(0.5, 1.3)] * 3
        total = 0.0
        for c, (lengthscale, variance) in enumerate(kernels):
            basis = InducingBasis(rbf(lengthscale, variance), Z)
            alone = Posterior(basis).add(X, Sites(sites.lam[:, c], sites.beta[:, c]))
            assert gap(q.predict(TEST)[0][:, c], alone.predict(TEST)[0]) < 1e-12
            assert gap(q.predict(TEST)[1][:, c], alone.predict(TEST)[1]) < 1e-12
            total = total + alone.kl()
        assert gap(q.kl(), total) < 1e-10


def test_a_batch_is_each_alone():
    x = torch.stack([X, X + 0.1])
    sites = random_sites(2, 40)
    q = Posterior(InducingBasis(rbf(), torch.stack([Z, Z * 0.9]))).add(x, sites)
    assert q.kl().shape == (2,)
    for b, scale in enumerate((1.0, 0.9)):
        alone = Posterior(InducingBasis(rbf(), Z * scale)).add(x[b], Sites(sites.lam[b], sites.beta[b]))
        assert gap(q.kl()[b], alone.kl()) < 1e-12
        assert gap(q.predict(torch.stack([TEST, TEST]))[1][b], alone.predict(TEST)[1]) < 1e-12


def test_a_batch_of_processes_of_several_outputs_is_each_alone(monkeypatch):
    monkeypatch.setattr("dualgp.linalg._CHUNK_BYTES", 1)
    x, at_test = torch.stack([X, X + 0.1]), torch.linspace(-2, 2, 150, dtype=F64).unsqueeze(-1)
    sites = random_sites(2, 40, 3, multi=True)
    q = Posterior(InducingBasis(rbf(), torch.stack([Z, Z * 0.9]), num_outputs=3)).add(x, sites)
    draws = q.sample(TEST, 20_000, generator=torch.Generator().manual_seed(0))
    for b, scale in enumerate((1.0, 0.9)):
        own = Sites(sites.lam[b], sites.beta[b], multi_output=True)
        alone = Posterior(InducingBasis(rbf(), Z * scale, num_outputs=3)).add(x[b], own)
        assert gap(q.kl()[b], alone.kl()) < 1e-12
        for found, expected in zip(q.predict_blocks(at_test), alone.predict_blocks(at_test), strict=True):
            assert gap(found[b], expected) < 1e-12
        assert gap(q.predict_joint(TEST).covariance_matrix[b], alone.predict_joint(TEST).covariance_matrix) < 1e-12
        mean, var = alone.predict(TEST)
        assert ((draws[:, b].mean(0) - mean).abs() < 5 * (var / 20_000).sqrt()).all()
        assert ((draws[:, b].var(0) / var - 1).abs() < 0.06).all()


@pytest.mark.parametrize("name", QS)
def test_samples_have_the_mean_and_covariance_of_the_joint(name):
    q, count = QS[name](), 20_000
    draws = q.sample(TEST, count, generator=torch.Generator().manual_seed(0)).flatten(1)
    joint = q.predict_joint(TEST)
    cov = joint.covariance_matrix
    sd = cov.diagonal().sqrt()
    assert ((draws.mean(0) - joint.mean.flatten()).abs() < 5 * sd / count**0.5).all()
    assert (draws.T.cov() - cov).abs().max() < 6 * sd.max() ** 2 / count**0.5


def test_samples_and_predictions_have_the_dtype_of_the_basis():
    basis = InducingBasis(rbf().float(), Z.float(), jitter=1e-5)
    q = Posterior(basis).add(X.float(), random_sites(40))
    joint = q.predict_joint(TEST.float())
    found = q.sample(TEST.float(), 2), joint.mean, joint.covariance_matrix, *q.predict(TEST.float())
    assert {t.dtype for t in found} == {torch.float32}
    several = Posterior(InducingBasis(rbf().float(), Z.float(), num_outputs=3, jitter=1e-5)).predict_joint(TEST.float())
    assert {several.mean.dtype, several.covariance_matrix.dtype} == {torch.float32}


def test_samples_come_from_the_generator_and_survive_singular_covariances():
    q = one()
    state = torch.get_rng_state()
    a, b = (q.sample(TEST, 3, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(a, b)
    assert torch.equal(state, torch.get_rng_state())
    twins = q.sample(torch.cat([TEST, TEST]), 4)
    assert gap(twins[:, :9], twins[:, 9:]) < 1e-6


def test_a_move_and_a_change_compose():
    # Z and hyperparameters one after the other is pulling back twice; back again is the identity where nothing is lost.
    x, *_ = waves(40, 2)
    a, b = InducingBasis(matern(), x[:6], jitter=1e-10), InducingBasis(matern(), x[:14], jitter=1e-10)
    q = Posterior(a).add(x, random_sites(40))
    there = q.rebase(b)
    assert gap(there.predict(x)[0], q.predict(x)[0]) < 1e-7
    assert gap(there.rebase(a).predict(x)[1], q.predict(x)[1]) < 1e-7
    c = InducingBasis(matern(1.1, 3.0), x[:14], jitter=1e-10)
    A, s = b.change_to(c)
    B, t = a.change_to(b)
    once = Posterior(c, q.site.pull_back(B @ A, B @ s + t))
    assert gap(there.rebase(c).predict(x)[0], once.predict(x)[0]) < 1e-10


def test_what_leaves_no_gaussian_is_refused():
    sites = random_sites(40)
    with pytest.raises(errors.NotPositiveDefiniteError, match="smallest eigenvalue -"):
        one(sites=sites).remove(X, 2.0 * sites)
    with pytest.raises(errors.BasisMismatchError, match="pull_back"):
        Posterior(one().basis, Site.zero((), 6))


@pytest.mark.parametrize("factor", [-0.1, float("nan"), float("inf")])
def test_bad_factors_and_temperatures_are_refused(factor):
    with pytest.raises(errors.InputError, match="^The factor by which sites are scaled must be"):
        one().scale(factor)
    with pytest.raises(errors.InputError, match="^The temperature must be"):
        one().temper(min(factor, 0.0))


def test_samples_of_no_number_or_of_no_generator_are_refused():
    with pytest.raises(errors.InputError, match="num_samples"):
        one().sample(TEST, 0)
    with unchecked(), pytest.raises(errors.InputError, match=r"generator must be a torch\.Generator"):
        one().sample(TEST, 1, generator=0)


@pytest.mark.parametrize(
    ("x", "match"),
    [
        (torch.zeros(3, 2, dtype=F64), r"\[\*batch, T, 1\], got \(3, 2\)"),
        (torch.zeros(3, dtype=F64), r"got \(3,\)"),
        (torch.zeros(3, 1), "float64 on cpu, got torch.float32"),
        (torch.zeros(3, 1, dtype=F64, device="meta"), "on cpu, got .* on meta"),
    ],
)
def test_inputs_that_do_not_fit_the_basis_are_refused(x, match):
    for verb in (
        one().predict,
        one().predict_joint,
        lambda x: one().sample(x, 1),
        lambda x: one().project(x, random_sites(3)),
    ):
        with pytest.raises(errors.InputError, match=match):
            verb(x)


def test_sites_that_do_not_fit_the_inputs_are_refused():
    with pytest.raises(errors.InputError, match="40 inputs"):
        one().add(X, random_sites(39))
    with pytest.raises(errors.InputError, match="multi_output=True"):
        one().add(X, random_sites(40, 3, multi=True))
    with pytest.raises(errors.InputError, match="num_outputs=3"):
        three().add(X, random_sites(40))
    with pytest.raises(errors.InputError, match=r"x has shape \(2, 40, 1\), the posterior no more than"):
        one().add(torch.stack([X, X]), random_sites(2, 40))


def test_adding_sites_is_differentiable_in_the_inputs():
    q = one()
    x = waves(3, q.basis.inducing_points.shape[-1])[0].clone()
    sites = random_sites(3)
    at = q.basis.inducing_points[:2]
    assert torch.autograd.gradcheck(lambda x: q.add(x, sites).predict(at), x.requires_grad_())


@pytest.mark.parametrize("name", QS)
def test_blocks_and_cross_are_cut_from_the_joint(name):
    q = QS[name]()
    C = q.basis.num_outputs or 1
    (mean, var), (same, V), cross = q.predict(TEST), q.function_blocks(TEST), q.function_cross(TEST, X)
    assert mean.reshape(9, C).shape == same.shape
    assert cross.shape == (9, C, 40, C)
    assert gap(same, mean.reshape(9, C)) < 1e-13
    residual = torch.stack([f.residual.expand(*q.basis.batch_shape, 9) for _, f in q.basis.blocks(TEST)])
    assert gap(V.diagonal(dim1=-2, dim2=-1) + residual.reshape(C, 9).T, var.reshape(9, C)) < 1e-13
    assert gap(q.predict_blocks(TEST)[1], torch.diag_embed(var.reshape(9, C))) < 1e-13
    assert gap(torch.einsum("ncnd->ncd", q.function_cross(TEST, TEST)), V) < 1e-13
    # A linear site on one function value moves every other by its covariance with it.
    lam = torch.zeros(40, C, dtype=F64)
    lam[4, C - 1] = 1.0
    lam = lam if q.basis.num_outputs else lam[:, 0]
    moved = q.add(X, Sites(lam, 0 * lam, q.basis.num_outputs is not None)).function_blocks(TEST)[0]
    assert gap(moved - same, cross[:, :, 4, C - 1]) < 1e-12


def test_blocks_of_a_batch_have_its_shape():
    q = Posterior(InducingBasis(rbf(), torch.stack([Z, Z * 0.9])))
    mean, V = q.function_blocks(torch.stack([TEST, TEST]))
    assert mean.shape == (2, 9, 1)
    assert V.shape == (2, 9, 1, 1)
    assert q.function_cross(TEST, X).shape == (2, 9, 1, 40, 1)
    assert q.predict_blocks(torch.stack([TEST, TEST])[:, :0])[1].shape == (2, 0, 1, 1)


def test_processes_take_no_coupled_sites():
    sites = Sites(torch.zeros(40, 3, dtype=F64), torch.eye(3, dtype=F64).expand(40, 3, 3), multi_output=True)
    with pytest.raises(errors.InputError, match="decoupled"):
        three().add(X, sites)
