"""The algebra of sites: they add, and they pull back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from toys import F64, at, gap, random_sites

from dualgp import Site, Sites, errors

SIZES = st.integers(1, 6)
SEEDS = st.integers(0, 10_000)


def random_site(m: int, seed: int, *batch: int) -> Site:
    g = torch.Generator().manual_seed(seed)
    root = torch.randn(*batch, m, m, generator=g, dtype=F64)
    return Site(torch.randn(*batch, m, generator=g, dtype=F64), root @ root.mT)


def random_matrix(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=F64)


def log_factor(site: Site, w: torch.Tensor) -> torch.Tensor:
    """log t(w) = λᵀw − ½ wᵀBw, up to the constant that a pull-back with a shift drops."""
    return (site.lam * w).sum(-1) - 0.5 * (w * (site.B @ w.unsqueeze(-1)).squeeze(-1)).sum(-1)


@given(SIZES, SEEDS)
def test_adding_then_removing_is_the_identity(m, seed):
    a, b = random_site(m, seed), random_site(m, seed + 1)
    back = a + b - b
    assert gap(back.lam, a.lam) < 1e-12
    assert gap(back.B, a.B) < 1e-12


@given(SIZES, SEEDS, st.floats(0.0, 5.0))
def test_scaling_is_linear_and_adding_commutes(m, seed, factor):
    a, b = random_site(m, seed), random_site(m, seed + 1)
    left, right = factor * (a + b), b * factor + a * factor
    assert gap(left.lam, right.lam) < 1e-12
    assert gap(left.B, right.B) < 1e-12


@given(SIZES, SIZES, SIZES, SEEDS)
def test_pulling_back_twice_is_pulling_back_by_the_product(m, k, j, seed):
    site, A, A2 = random_site(m, seed), random_matrix(m, k, seed), random_matrix(k, j, seed + 1)
    s, s2 = random_matrix(m, 1, seed + 2)[:, 0], random_matrix(k, 1, seed + 3)[:, 0]
    twice = site.pull_back(A, s).pull_back(A2, s2)
    once = site.pull_back(A @ A2, A @ s2 + s)
    scale = 1 + once.lam.abs().max().item()
    assert gap(twice.lam, once.lam) < 1e-11 * scale
    assert gap(twice.B, once.B) < 1e-11 * scale


@given(SIZES, SIZES, SEEDS)
def test_a_site_pulled_back_is_the_same_factor_read_at_other_coordinates(m, k, seed):
    site, A, shift = random_site(m, seed), random_matrix(m, k, seed), random_matrix(m, 1, seed + 1)[:, 0]
    v = random_matrix(5, k, seed + 2)
    w = v @ A.T + shift
    pulled = site.pull_back(A, shift)
    difference = log_factor(site, w) - log_factor(pulled, v)
    assert gap(difference, difference[:1]) < 1e-9 * (1 + difference.abs().max().item())  # a constant


@given(SIZES, SIZES, SEEDS)
def test_pulling_back_keeps_positivity_and_distributes_over_sums(m, k, seed):
    a, b, A = random_site(m, seed), random_site(m, seed + 1), random_matrix(m, k, seed + 2)
    both = (a + b).pull_back(A)
    assert torch.linalg.eigvalsh(both.B).min() > -1e-10
    assert torch.equal(both.B, both.B.mT)
    assert gap(both.B, a.pull_back(A).B + b.pull_back(A).B) < 1e-10
    assert gap(both.lam, a.pull_back(A).lam + b.pull_back(A).lam) < 1e-10


def test_per_datum_sites_pull_back_to_the_product_of_their_factors():
    sites, phi, offset = random_sites(9), random_matrix(9, 4, 1), random_matrix(9, 1, 2)[:, 0]
    site = sites.pull_back(phi, offset)
    w = random_matrix(5, 4, 3)
    f = w @ phi.T + offset
    direct = (sites.lam * f - 0.5 * sites.beta * f.square()).sum(-1)
    difference = direct - log_factor(site, w)
    assert gap(difference, difference[:1]) < 1e-10


def test_several_outputs_pull_back_one_by_one():
    sites, phi = random_sites(9, 3, multi=True), random_matrix(9, 4, 1)
    site = sites.pull_back(phi)
    for c in range(3):
        alone = Sites(sites.lam[:, c], sites.beta[:, c]).pull_back(phi)
        assert gap(site.lam[c], alone.lam) < 1e-12
        assert gap(site.B[c], alone.B) < 1e-12


@pytest.mark.parametrize("multi", [False, True])
def test_any_order_and_any_cut_of_the_data_gives_the_same_sum(multi):
    sites, phi = random_sites(*((20, 3) if multi else (20,)), multi=multi), random_matrix(20, 4, 1)
    whole = sites.pull_back(phi)
    order = torch.randperm(20)
    total = Site.zero((3,) if multi else (), 4)
    for rows in order.split([1, 7, 4, 8]):
        total = total + sites[rows].pull_back(phi[rows])
    assert gap(total.lam, whole.lam) < 1e-12
    assert gap(total.B, whole.B) < 1e-12
    joined = Sites.cat([sites[slice(0, 5)], sites[slice(5, 20)]])
    assert torch.equal(joined.lam, sites.lam)
    assert joined.multi_output == multi
    assert len(joined) == 20


def test_alpha_is_derived_and_linear_sites_are_their_own():
    sites, mean = random_sites(6), random_matrix(6, 1, 0)[:, 0]
    assert gap(sites.alpha(mean) + sites.beta * mean, sites.lam) < 1e-15
    assert gap((sites - sites).lam, torch.zeros(6)) == 0
    assert gap((2.0 * sites - sites).beta, sites.beta) < 1e-15


def test_one_site_by_hand():
    site = Sites(at(3.0), at(2.0)).pull_back(at(1.0, -2.0).unsqueeze(0), 0.5)
    assert torch.equal(site.lam, at(2.0, -4.0))
    assert torch.equal(site.B, torch.tensor([[2.0, -4.0], [-4.0, 8.0]], dtype=F64))


def test_sites_that_do_not_belong_together_are_refused():
    with pytest.raises(errors.BasisMismatchError, match="Sites.cat"):
        random_sites(3) + random_sites(4)
    with pytest.raises(errors.BasisMismatchError):
        random_sites(3, 2) + random_sites(3, 2, multi=True)
    with pytest.raises(errors.BasisMismatchError, match="Pull one back"):
        random_site(3, 0) - random_site(4, 0)
    with pytest.raises(errors.InputError, match=r"\(3,\) and \(4,\)"):
        Sites(torch.zeros(3), torch.zeros(4))
    with pytest.raises(errors.InputError, match="multi_output"):
        Sites(torch.zeros(3), torch.zeros(3), multi_output=True)
    with pytest.raises(errors.InputError, match="M, M"):
        Site(torch.zeros(3), torch.zeros(3, 4))


def coupled(n: int, seed: int = 0, *, root: bool = True) -> Sites:
    g = torch.Generator().manual_seed(seed)
    R = torch.randn(n, 3, 3, generator=g, dtype=F64)
    R[:, :, 0] = 0.0  # singular
    return Sites(torch.randn(n, 3, generator=g, dtype=F64), R @ R.mT, True, R if root else None)


def log_factors(sites: Sites, f: Tensor) -> Tensor:
    return (sites.lam * f).sum((-2, -1)) - 0.5 * torch.einsum("snc,ncd,snd->s", f, sites.beta, f)


@pytest.mark.parametrize("root", [True, False])
def test_coupled_sites_pull_back_to_the_product_of_their_factors(root):
    sites, phi, offset = coupled(6, root=root), torch.randn(6, 3, 4, dtype=F64), torch.randn(6, 3, dtype=F64)
    w = torch.randn(5, 4, dtype=F64)
    site = sites.pull_back(phi, offset)
    difference = log_factors(sites, offset + torch.einsum("ncm,sm->snc", phi, w)) - log_factor(site, w)
    assert gap(difference, difference[:1]) < 1e-10


def test_an_offset_that_is_a_number_is_one_of_float64():
    sites, phi = coupled(6), torch.randn(6, 3, 4, dtype=F64)
    assert torch.equal(sites.pull_back(phi, 0.1).lam, sites.pull_back(phi, torch.full((6, 3), 0.1, dtype=F64)).lam)


def test_coupled_sites_that_are_not_positive_pull_back_too():
    a, b, phi = coupled(6), coupled(6, 1), torch.randn(6, 3, 4, dtype=F64)
    assert gap((a - b).pull_back(phi).B, a.pull_back(phi).B - b.pull_back(phi).B) < 1e-12
    assert torch.linalg.eigvalsh((a - b).pull_back(phi).B).min() < 0


def test_coupled_sites_of_a_diagonal_are_independent_ones():
    sites, f = random_sites(6, 3, multi=True), torch.randn(6, 3, dtype=F64)
    blocks = Sites(sites.lam, torch.diag_embed(sites.beta), multi_output=True)
    assert gap(blocks.alpha(f), sites.alpha(f)) < 1e-15
    for a in (blocks, sites):
        assert gap(a.decoupled(f).lam, sites.lam) < 1e-14
        assert gap(a.decoupled(f).beta, sites.beta) == 0


def test_a_root_stays_where_it_is_one():
    a = coupled(6)
    tensor = torch.rand(6, 1, dtype=F64)
    kept = [a[2], a[slice(1, 4)], a[torch.tensor([True] * 3 + [False] * 3)], a[[5, 0]]]
    kept += [Sites.cat([a[2], a]), 0.3 * a, a * tensor, 0.0 * a, a.to(torch.device("cpu"))]
    for sites in kept:
        assert sites.coupled
        assert gap(sites.root @ sites.root.mT, sites.beta) < 1e-14
    assert gap((a * tensor).beta, a.beta * tensor.unsqueeze(-1)) < 1e-15
    assert gap((a * tensor).lam, a.lam * tensor) < 1e-15
    for sites in (a + a, a - a, -1.0 * a, a * -tensor, Sites.cat([a, a + a])):
        assert sites.coupled
        assert sites.root is None
    assert gap(Sites.cat([a[slice(0, 2)], a[slice(2, 6)]]).beta, a.beta) == 0
    assert gap((a + a - a).beta, a.beta) < 1e-14
    assert torch.equal(Sites.cat([a]).root, a.root)


def test_coupled_sites_that_do_not_belong_together_are_refused():
    a = coupled(6)
    with pytest.raises(errors.InputError, match="C, C"):
        Sites(a.lam, a.beta)
    with pytest.raises(errors.InputError, match="root"):
        Sites(a.lam, a.lam, True, a.root)
    with pytest.raises(errors.InputError, match="root"):
        Sites(a.lam, a.beta, True, a.root[:3])
    with pytest.raises(errors.BasisMismatchError):
        a + random_sites(6, 3, multi=True)
    with pytest.raises(errors.BasisMismatchError, match="decoupled"):
        Sites.cat([a, random_sites(6, 3, multi=True)])
    with pytest.raises(errors.InputError, match="a number per datum"):
        a * torch.ones(3)


def test_an_offset_that_is_not_given_is_none():
    sites, features = Sites(at(1.0, 2.0), at(0.5, 0.25)), at(1.0, 3.0).unsqueeze(-1)
    assert gap(sites.pull_back(features).lam, at(7.0)) < 1e-15
    coupled = Sites(at(1.0, 2.0).unsqueeze(-1), at(0.5, 0.25).reshape(2, 1, 1), True)
    assert gap(coupled.pull_back(features.unsqueeze(1)).lam, at(7.0)) < 1e-15


def test_coupled_sites_of_several_processes_join_by_their_data():
    """With batch dimensions the data are neither the first dimension of λ nor that of the roots."""
    g = torch.Generator().manual_seed(0)
    root = torch.randn(2, 5, 3, 3, generator=g, dtype=F64)
    sites = Sites(torch.randn(2, 5, 3, generator=g, dtype=F64), root @ root.mT, True, root)
    parts = [
        Sites(sites.lam[:, a], sites.beta[:, a], True, root[:, a]) for a in (slice(0, 2), slice(2, 3), slice(3, 5))
    ]
    joined = Sites.cat(parts)
    assert torch.equal(joined.lam, sites.lam)
    assert torch.equal(joined.beta, sites.beta)
    assert torch.equal(joined.root, root)


def test_a_part_of_another_kind_is_refused_wherever_it_stands():
    one, several = Sites(at(1.0), at(1.0)), Sites(at(1.0).unsqueeze(-1), at(1.0).unsqueeze(-1), True)
    for parts in ([one, several], [one, one, several], [several, several, one]):
        with pytest.raises(errors.BasisMismatchError, match="^Coupled, independent and single-output sites"):
            Sites.cat(parts)
