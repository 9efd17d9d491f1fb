"""Structured posteriors of weights against dense ones: what each structure keeps, and that it keeps it exactly."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from gpytorch.likelihoods import SoftmaxLikelihood
from jacobians import engine, jacobian, mlp
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, kl_divergence
from toys import F64, unchecked

from dualgp import JacobianBasis, Posterior, Site, Sites, errors, laplace_sites
from dualgp.nets import Structure, StructuredPosterior

TAU = 0.7


class Mixed(nn.Module):
    """Convolution, normalisation, embedding and two dense layers, one without a bias."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(3, 2)
        self.conv = nn.Conv1d(2, 3, 2)
        self.norm = nn.LayerNorm(3)
        self.out = nn.Linear(3, 3, bias=False)

    def forward(self, x):
        tokens = (x.abs() * 2).long() % 3
        z = self.conv(self.embed(tokens).mT + x.unsqueeze(1))
        return self.out(self.norm(z.mT).tanh().mean(1))


def mixed() -> nn.Module:
    torch.manual_seed(3)
    return Mixed().to(F64)


NETS = {"mlp": (mlp, 2), "mixed": (mixed, 4)}
SOFTMAX = SoftmaxLikelihood(num_classes=3, mixing_weights=False)


class Case:
    """A network, two sets of data with their sites, and test inputs."""

    def __init__(self, name: str):
        make, d = NETS[name]
        self.net = make()
        g = torch.Generator().manual_seed(1)
        self.X, self.X2, self.T = (2 * torch.randn(n, d, generator=g, dtype=F64) for n in (20, 6, 5))
        self.jac = engine(self.net, self.X)
        self.S, self.S2 = (laplace_sites(SOFTMAX, torch.arange(len(x)) % 3, self.jac(x)) for x in (self.X, self.X2))
        self.names = list(self.jac.names)

    def prior(self, structure: str = "kronecker", tau: float | Tensor = TAU, **options) -> StructuredPosterior:
        return StructuredPosterior(JacobianBasis.of_weights(self.jac, tau), structure=Structure(structure, **options))

    def q(self, *args, **options) -> StructuredPosterior:
        return self.prior(*args, **options).add(self.X, self.S)

    def phi(self, x: Tensor, tau: float = TAU) -> Tensor:
        return jacobian(self.net, x) / tau**0.5


@pytest.fixture(params=NETS)
def case(request) -> Case:
    return Case(request.param)


def assembled(q: StructuredPosterior) -> Tensor:
    """B [P, P] of the site, dense."""
    B = torch.zeros(q.basis.size, q.basis.size, dtype=F64)
    for key, block in q.site.blocks.items():
        at = torch.cat([torch.arange(s.start, s.stop) for s in (q.basis.jacobian.slices[t] for t in key)])
        B[at.unsqueeze(-1), at] = block.to_dense()
    return B


def dense_ggn(case: Case, x: Tensor, sites: Sites) -> Tensor:
    phi = case.phi(x)
    return torch.einsum("ncp,ncd,ndq->pq", phi, sites.beta, phi)


def kfac_by_loop(case: Case, x: Tensor, sites: Sites) -> dict[str, tuple[Tensor, Tensor]]:
    """Σ_{i,s} g_sᵀβ_i g_s and the mean of a aᵀ over data and positions, one datum and position at a time."""
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    kept: dict[str, tuple[Tensor, Tensor]] = {}
    layers = {n: m for n, m in case.net.named_modules() if isinstance(m, (nn.Linear, nn.Conv1d))}
    hooks = [
        m.register_forward_hook(lambda m, a, z, name=name: kept.update({name: (a[0], z)})) for name, m in layers.items()
    ]
    for i in range(len(x)):
        f = case.net(x[i : i + 1])
        for name, m in layers.items():
            a, z = kept[name]
            g = torch.stack([torch.autograd.grad(f[0, c], z, retain_graph=True)[0][0] for c in range(3)])  # [C, O(, S)]
            if isinstance(m, nn.Conv1d):
                a = torch.stack([a[0, :, s : s + 2].flatten() for s in range(z.shape[-1])])
            g = g.unsqueeze(-1) if g.ndim == 2 else g
            for s in range(len(a)):
                G = g[:, :, s].T @ sites.beta[i] @ g[:, :, s]
                A = torch.outer(a[s].detach(), a[s].detach()) / (len(x) * len(a))
                G0, A0 = factors.get(name, (0, 0))
                factors[name] = (G0 + G, A0 + A)
    for hook in hooks:
        hook.remove()
    return factors


def test_the_diagonal_structure_is_the_diagonal_of_the_dense_curvature(case):
    torch.testing.assert_close(
        assembled(case.q("diagonal")), dense_ggn(case, case.X, case.S).diag().diag(), rtol=1e-12, atol=1e-14
    )


def test_one_datum_of_one_dense_layer_is_exact_in_the_kronecker_structure():
    net = nn.Linear(2, 3).to(F64)
    x = torch.randn(1, 2, dtype=F64)
    jac = engine(net, torch.randn(3, 2, dtype=F64))
    sites = laplace_sites(SOFTMAX, torch.tensor([1]), jac(x))
    basis = JacobianBasis.of_weights(jac, TAU)
    q, dense = StructuredPosterior(basis).add(x, sites), Posterior(basis).add(x, sites)
    test = torch.randn(4, 2, dtype=F64)
    for mine, theirs in zip(q.function_blocks(test), dense.function_blocks(test), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(q.kl(), dense.kl(), rtol=1e-12, atol=1e-12)


def test_kronecker_factors_are_those_of_a_plain_loop(case):
    q = case.q(separate_bias=True)
    for name, (G, A) in kfac_by_loop(case, case.X, case.S).items():
        ((mine_G, mine_A),) = q.site.blocks[case.names.index(f"{name}.weight"),].terms
        torch.testing.assert_close(TAU * torch.kron(mine_G, mine_A), torch.kron(G, A), rtol=1e-11, atol=1e-13)
        if f"{name}.bias" in case.names:
            ((mine_G, mine_A),) = q.site.blocks[case.names.index(f"{name}.bias"),].terms
            torch.testing.assert_close(TAU * mine_G * mine_A, G, rtol=1e-11, atol=1e-13)


def test_bias_and_weight_share_a_layers_factors_unless_separated(case):
    q, apart = case.q(), case.q(separate_bias=True)
    B, B_apart = assembled(q), assembled(apart)
    torch.testing.assert_close(B.diagonal(), B_apart.diagonal(), rtol=1e-12, atol=1e-14)
    assert any(len(key) == 2 for key in q.site.blocks)
    assert all(len(key) == 1 for key in apart.site.blocks if "norm" not in case.names[key[0]])
    kept = B_apart != 0
    torch.testing.assert_close(B[kept], B_apart[kept], rtol=1e-12, atol=1e-14)


QS = {
    "diagonal": lambda case: case.q("diagonal"),
    "one term": lambda case: case.q(),
    "two terms": lambda case: case.q().add(case.X2, case.S2),
    "biases apart": lambda case: case.q(separate_bias=True).add(case.X2, case.S2),
    "prior": lambda case: case.prior(),
}


@pytest.fixture(params=QS)
def q(request, case) -> StructuredPosterior:
    return QS[request.param](case)


def test_predictions_are_those_of_the_assembled_precision(case, q):
    """In the mean, the covariance within and between data, the evidence and the divergence."""
    phi, phi_X = case.phi(case.T), case.phi(case.X)
    P = torch.eye(q.basis.size, dtype=F64) + assembled(q)
    V = torch.einsum("ncp,pq,mdq->ncmd", phi, P.inverse(), phi)
    w = torch.linalg.solve(P, q.site.lam)
    mean, cov = q.function_blocks(case.T)
    torch.testing.assert_close(mean, case.net(case.T).detach() + phi @ w, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(cov, torch.stack([V[i, :, i] for i in range(5)]), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(q.function_cross(case.T, case.T), V, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(q.predict(case.T)[1], cov.diagonal(dim1=1, dim2=2))
    torch.testing.assert_close(q.predict_joint(case.T).covariance_matrix, V.flatten(2).flatten(0, 1))
    torch.testing.assert_close(q.logdet(), P.logdet(), rtol=1e-11, atol=1e-11)
    kl = kl_divergence(MultivariateNormal(w, precision_matrix=P), MultivariateNormal(0 * w, torch.eye(len(w)).double()))
    torch.testing.assert_close(q.kl(), kl, rtol=1e-9, atol=1e-9)
    if q.site.blocks:
        pulled = torch.einsum("ncp,nc->p", phi_X, case.S.alpha(case.net(case.X).detach()))
        two = case.S2.alpha(case.net(case.X2).detach())
        also = torch.einsum("ncp,nc->p", case.phi(case.X2), two) if len(q.site.lam) and _has_two(q) else 0.0
        torch.testing.assert_close(q.site.lam, pulled + also, rtol=1e-10, atol=1e-12)


def _has_two(q: StructuredPosterior) -> bool:
    return any(len(getattr(block, "terms", ())) > 1 for block in q.site.blocks.values())


def test_samples_have_the_posterior_covariance(case, q):
    """Exactly: the map from noise to weights is a root of P⁻¹."""
    root = q.eigenbasis.back(torch.diag((1.0 + q.eigenbasis.values).rsqrt()))
    P = torch.eye(q.basis.size, dtype=F64) + assembled(q)
    torch.testing.assert_close(root @ root.T, P.inverse(), rtol=1e-10, atol=1e-11)
    f = q.sample(case.T, 4, generator=torch.Generator().manual_seed(0))
    w = q.sample_weights(4, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(4, q.basis.size, generator=torch.Generator().manual_seed(0), dtype=F64)
    torch.testing.assert_close(w, q.mean_w + noise @ root.T, rtol=1e-11, atol=1e-12)
    expected = case.net(case.T).detach() + torch.einsum("ncp,sp->snc", case.phi(case.T), w)
    torch.testing.assert_close(f, expected, rtol=1e-10, atol=1e-11)


def test_two_sets_of_data_add_to_the_sum_of_their_products_in_either_order(case):
    one, two = case.q(), case.prior().add(case.X2, case.S2)
    both, other = case.q().add(case.X2, case.S2), two.add(case.X, case.S)
    torch.testing.assert_close(assembled(both), assembled(one) + assembled(two), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(both.predict(case.T)[1], other.predict(case.T)[1], rtol=1e-11, atol=1e-12)
    factorwise = case.prior().add(torch.cat([case.X, case.X2]), Sites.cat([case.S, case.S2]))
    assert (assembled(both) - assembled(factorwise)).norm() > 1e-3 * assembled(both).norm()


def test_batches_of_one_set_are_one_term_whatever_their_order(case):
    prior = case.prior()
    batches = [(case.X[i : i + 7], case.S[i : i + 7]) for i in range(0, 20, 7)]
    for order in (batches, batches[::-1]):
        site = prior.project_batches(order)
        split = StructuredPosterior(prior.basis, site)
        torch.testing.assert_close(assembled(split), assembled(case.q()), rtol=1e-11, atol=1e-14)
        torch.testing.assert_close(site.lam, case.q().site.lam, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("structure", ["diagonal", "kronecker"])
def test_what_is_added_and_removed_leaves_nothing(case, structure):
    q = case.q(structure)
    back = q.add(case.X2, case.S2).remove(case.X2, case.S2)
    assert all(len(getattr(block, "terms", (0,))) == 1 for block in back.site.blocks.values())
    torch.testing.assert_close(assembled(back), assembled(q), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(back.site.lam, q.site.lam, rtol=1e-12, atol=1e-12)
    assert not q.remove(case.X, case.S).site.blocks or structure == "diagonal" or case.names[0] != "0.weight"


def test_any_prior_precision_is_a_recomputation(case, q):
    shapes = len(case.names)
    for tau in (5.0, torch.linspace(0.2, 3.0, shapes, dtype=F64)):
        moved = q.rebase(q.basis.with_prior_precision(tau))
        fresh = StructuredPosterior(JacobianBasis.of_weights(case.jac, tau), structure=q.structure)
        if q.site.blocks:
            fresh = fresh.add(case.X, case.S)
        if _has_two(q):
            fresh = fresh.add(case.X2, case.S2)
        torch.testing.assert_close(moved.site.lam, fresh.site.lam, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(assembled(moved), assembled(fresh), rtol=1e-10, atol=1e-13)
        for mine, theirs in zip(moved.function_blocks(case.T), fresh.function_blocks(case.T), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(q.logdet(tau), fresh.logdet(), rtol=1e-10, atol=1e-10)


def test_scaled_sites_and_a_shift_of_the_centre(case):
    q = case.q()
    torch.testing.assert_close(assembled(q.scale(0.3)), 0.3 * assembled(q))
    torch.testing.assert_close(assembled(q.temper(4.0)), 0.25 * assembled(q))
    at_network = q.with_site(replace(q.site, lam=0 * q.site.lam))
    mean, var = at_network.predict(case.T)
    torch.testing.assert_close(mean, case.net(case.T).detach(), rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(var, q.predict(case.T)[1])


def test_the_nearest_product_is_the_leading_term_of_a_singular_value_decomposition():
    case = Case("mlp")
    q = case.q().add(case.X2, case.S2)
    for block in q.site.blocks.values():
        terms = torch.stack([torch.outer(G.flatten(), A.flatten()) for G, A in block.terms]).sum(0)
        U, s, V = torch.linalg.svd(terms)
        ((G, A),) = block.nearest().terms
        torch.testing.assert_close(torch.outer(G.flatten(), A.flatten()), s[0] * torch.outer(U[:, 0], V[0]))
        assert torch.linalg.eigvalsh(G).min() > -1e-12
    assert all(len(block.terms) == 1 for block in q.nearest().site.blocks.values())


def test_a_layer_too_large_to_factorise_a_sum_says_so_and_keeps_it():
    case = Case("mlp")
    one = case.q(dense_limit=5)
    both = one.add(case.X2, case.S2)
    with pytest.raises(errors.UnsupportedError, match=r"0\.weight.*nearest\(\)"):
        both.predict(case.T)
    both.nearest().predict(case.T)
    back = both.remove(case.X2, case.S2)
    torch.testing.assert_close(back.predict(case.T)[1], one.predict(case.T)[1], rtol=1e-12, atol=1e-13)
    large = Case("mixed").q(dense_limit=5)
    assert {type(b).__name__ for b in large.site.blocks.values()} == {"Diagonal", "Kronecker"}


def test_independent_sites_and_those_without_a_root_give_the_same_curvature(case):
    plain = Sites(case.S.lam, case.S.beta, multi_output=True)
    apart = case.S.decoupled(case.jac(case.X))
    diagonal = Sites(apart.lam, torch.diag_embed(apart.beta), multi_output=True)
    for structure, (a, b) in product(["diagonal", "kronecker"], [(plain, case.S), (apart, diagonal)]):
        prior = case.prior(structure)
        torch.testing.assert_close(
            assembled(prior.add(case.X, a)), assembled(prior.add(case.X, b)), rtol=1e-10, atol=1e-12
        )


def test_float32_networks_keep_their_dtype_and_seven_digits():
    case = Case("mlp")
    jac = engine(mlp(dtype=torch.float32), case.X.float())
    q = StructuredPosterior(JacobianBasis.of_weights(jac, TAU)).add(case.X.float(), case.S)
    mean, var = q.predict(case.T.float())
    assert mean.dtype == var.dtype == torch.float32
    torch.testing.assert_close(var.double(), case.q().predict(case.T)[1], rtol=1e-4, atol=1e-5)


def test_bad_input():
    case = Case("mlp")
    basis = JacobianBasis.of_weights(case.jac, TAU)
    with pytest.raises(errors.InputError, match="of_weights"):
        StructuredPosterior(JacobianBasis.at_inputs(case.jac, case.X[:2], TAU))
    with unchecked(), pytest.raises(errors.InputError, match="'diagonal' or 'kronecker'"):
        StructuredPosterior(basis, structure="dense")
    with pytest.raises(errors.InputError, match="multi_output"):
        case.q().add(case.X[:3], case.S)
    with pytest.raises(errors.NotPositiveDefiniteError, match="smallest eigenvalue"):
        case.prior().remove(case.X, case.S)
    with pytest.raises(errors.BasisMismatchError, match="same structure"):
        case.q().with_site(case.q("diagonal").site + case.q().site)
    with pytest.raises(errors.BasisMismatchError, match="another network"):
        case.q().rebase(JacobianBasis.of_weights(engine(case.net, case.X), TAU))
    with pytest.raises(errors.BasisMismatchError, match="no layers of the structure"):
        StructuredPosterior(basis, case.q().site, Structure(separate_bias=True)).predict(case.T)
    with pytest.raises(errors.BasisMismatchError, match="coordinates"):
        StructuredPosterior(basis, Case("mixed").q().site)
    for bad in (lambda q: q.scale(-1.0), lambda q: q.temper(0.0), lambda q: q.predict(case.T[:, :1])):
        with pytest.raises(errors.InputError):
            bad(case.q())


def test_the_dense_posterior_has_the_same_coordinates():
    """λ is that of `Posterior` on the same basis, and where B is kept whole so is all else."""
    case = Case("mlp")
    dense = Posterior(JacobianBasis.of_weights(case.jac, TAU)).add(case.X, case.S)
    torch.testing.assert_close(case.q().site.lam, dense.site.lam, rtol=1e-11, atol=1e-12)
    kept = Posterior(dense.basis, Site(dense.site.lam, assembled(case.q())))
    for mine, theirs in zip(case.q().function_blocks(case.T), kept.function_blocks(case.T), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-11)
