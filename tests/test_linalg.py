"""The products of the hot path against dense ones, and a Cholesky that reports its jitter."""

import pytest
import torch
from toys import F64, at, gap

from dualgp import errors
from dualgp.linalg import (
    GramSum,
    eigenpairs_above,
    first_tensor,
    logdet,
    mul_lower,
    precision_cholesky,
    psd_cholesky,
    psd_part,
    row_chunks,
    squared_norms,
    symmetrise,
    tri_inverse,
    whiten,
)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


@pytest.mark.parametrize("size", [1, 3, 119, 240, 500])  # one panel up to four
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_mul_lower_is_the_dense_product(size, transpose, batch):
    rows, lower = draw(5, size), draw(*batch, size, size, seed=1).tril()
    dense = rows @ (lower.mT if transpose else lower)
    assert gap(mul_lower(rows, lower, transpose=transpose), dense) < 1e-11 * size
    batched = rows.expand(*batch, 5, size).clone()
    assert gap(mul_lower(batched, lower, transpose=transpose), dense) < 1e-11 * size
    assert gap(mul_lower(rows, lower), rows @ lower) < 1e-11 * size
    assert mul_lower(rows.float(), lower).dtype == torch.float32


def test_mul_lower_does_not_look_above_the_diagonal_blocks():
    lower = draw(500, 500).tril()
    rows = draw(4, 500, seed=1)
    spoiled = lower.clone()
    spoiled[:100, 300:] = float("nan")
    assert torch.equal(mul_lower(rows, lower), mul_lower(rows, spoiled))


@pytest.mark.parametrize("size", [1, 4, 130, 500])
@pytest.mark.parametrize(
    ("phi_batch", "weight_batch"), [((), ()), ((), (3,)), ((3,), (3,)), ((2, 3), (2, 3)), ((), (2, 3))]
)
def test_gram_sum_is_the_dense_weighted_product_with_weights_of_any_sign(size, phi_batch, weight_batch):
    phi, weights = draw(*phi_batch, 23, size), draw(*weight_batch, 23, seed=1)
    total = GramSum(torch.Size(weight_batch), size, torch.device("cpu"))
    for rows in (slice(0, 9), slice(9, 10), slice(10, 23)):
        total.add(phi[..., rows, :], weights[..., rows])
    dense = phi.mT @ (weights.unsqueeze(-1) * phi)
    assert (weights < 0).any()
    total.add(phi[..., :0, :], weights[..., :0])
    assert gap(total.total(), dense) < 1e-12 * size
    assert torch.equal(total.total(), total.total().mT)


def test_gram_sum_is_differentiable():
    phi, weights = draw(5, 3).requires_grad_(), draw(5, seed=1)

    def summed(phi: torch.Tensor) -> torch.Tensor:
        total = GramSum(torch.Size(), 3, torch.device("cpu"))
        for rows in (slice(0, 2), slice(2, 5)):
            total.add(phi[rows], weights[rows])
        return total.total()

    assert gap(summed(phi).detach(), (phi.mT * weights @ phi).detach()) < 1e-14
    assert torch.autograd.gradcheck(summed, (phi,))


@pytest.mark.parametrize(("a", "b"), [((), ()), ((3,), ()), ((), (3,)), ((3,), (3,))])
def test_whitening_is_the_dense_product_and_spends_its_argument_where_it_can(a, b):
    lower = draw(*b, 130, 130, seed=1).tril()
    for n in (3, 200, 3000):
        cross = draw(*a, n, 130)
        dense = cross @ lower.mT
        learned = cross.clone().requires_grad_()
        assert gap(whiten(learned, lower).detach(), dense) < 1e-11
        assert torch.equal(learned, cross)
        with torch.no_grad():
            found = whiten(cross, lower)
        assert gap(found, dense) < 1e-11
        assert (found.data_ptr() == cross.data_ptr()) == (not a and not b)
    squares = (draw(*a, 4, 130) @ lower.mT).square().sum(-1)
    assert gap(squared_norms(draw(*a, 4, 130), lower), squares) < 1e-10


def test_gram_sum_of_float32_rows_adds_in_float64():
    phi, weights = draw(64, 6, dtype=torch.float32), torch.ones(64, dtype=torch.float32)
    total = GramSum(torch.Size(), 6, torch.device("cpu"))
    blocks = 400
    for _ in range(blocks):
        total.add(phi, weights)
    one = GramSum(torch.Size(), 6, torch.device("cpu"))
    one.add(phi, weights)
    assert total.total().dtype == F64
    assert gap(total.total(), blocks * one.total()) < 1e-9


def test_the_cholesky_takes_the_jitter_it_is_given_and_no_more():
    root = draw(6, 6)
    matrix = root @ root.mT
    factor = psd_cholesky(matrix, 1e-3)
    expected = matrix + 1e-3 * matrix.diagonal().mean() * torch.eye(6, dtype=F64)
    assert factor.jitter == 1e-3
    assert gap(factor.lower @ factor.lower.mT, expected) < 1e-12
    assert gap(psd_cholesky(5e4 * matrix, 1e-3).lower, 5e4**0.5 * factor.lower) < 1e-9  # relative: units do not matter
    assert gap(logdet(factor.lower), torch.logdet(expected)) < 1e-11
    assert gap(tri_inverse(factor.lower) @ factor.lower, torch.eye(6)) < 1e-11


def test_the_cholesky_raises_its_jitter_by_tens_and_says_so():
    matrix = torch.eye(4, dtype=F64)
    matrix[0, 0] = -3e-6
    with pytest.warns(errors.NumericalWarning, match="1e-05, not 1e-06"):
        factor = psd_cholesky(matrix, 1e-6)
    assert factor.jitter == pytest.approx(1e-5)
    expected = matrix + 1e-5 * matrix.diagonal().mean() * torch.eye(4, dtype=F64)
    assert gap(factor.lower @ factor.lower.mT, expected) < 1e-15


def test_the_jitter_is_relative_to_the_diagonal_of_each_matrix():
    matrix = torch.stack([torch.eye(3, dtype=F64), 1e6 * torch.eye(3, dtype=F64)])
    lower = psd_cholesky(matrix, 1e-3).lower
    assert gap(lower @ lower.mT / at(1.0, 1e6).reshape(2, 1, 1), 1.001 * matrix[0].expand(2, 3, 3)) < 1e-14


def test_what_is_no_kernel_matrix_is_refused():
    with pytest.raises(errors.NotPositiveDefiniteError, match="of size 3 is not positive definite"):
        psd_cholesky(-torch.eye(3, dtype=F64).expand(2, 2, 3, 3), 1e-6)
    with pytest.raises(errors.NotPositiveDefiniteError, match="finite"):
        psd_cholesky(torch.full((3, 3), float("nan"), dtype=F64), 1e-6)
    indefinite = torch.diag(torch.tensor([1.0, 2.0, -0.25], dtype=F64))
    with pytest.raises(errors.NotPositiveDefiniteError, match=r"-2\.500e-01"):
        precision_cholesky(indefinite)
    with pytest.raises(errors.NotPositiveDefiniteError, match="nan"):
        precision_cholesky(torch.full((2, 2), float("nan"), dtype=F64))


def test_chunks_are_of_4_mib_and_larger_on_a_gpu():
    on_cpu, elsewhere = (next(row_chunks(10**6, 500, F64, torch.device(name))) for name in ("cpu", "meta"))
    assert on_cpu.stop == (4 << 20) // (8 * 500)
    assert elsewhere.stop == 64 * (4 << 20) // (8 * 500)


@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 100_000])
@pytest.mark.parametrize("width", [1, 500, 10**9])
def test_chunks_cover_every_row_once(n, width):
    chunks = list(row_chunks(n, width, F64, torch.device("cpu")))
    assert [i for c in chunks[:3] for i in range(c.start, min(c.stop, c.start + 2))][:1] == ([0] if n else [])
    assert sum(c.stop - c.start for c in chunks) == n
    assert all(a.stop == b.start for a, b in zip(chunks, chunks[1:], strict=False))


def test_symmetrise_is_the_symmetric_part():
    matrix = draw(2, 4, 4)
    assert torch.equal(symmetrise(matrix), symmetrise(matrix).mT)
    assert gap(symmetrise(matrix) * 2 - matrix, matrix.mT) < 1e-15


def test_eigenpairs_are_kept_relative_to_the_largest():
    Q = torch.linalg.qr(torch.randn(2, 5, 5, dtype=F64)).Q
    spectrum = torch.tensor([[1.0, 1e-3, 1e-5, 1e-9, 0.0], [2.0, 1.0, 1e-9, 1e-9, 0.0]], dtype=F64)
    matrix = (Q * spectrum.unsqueeze(-2)) @ Q.mT
    for scale in (1.0, 1e-12, 1e12):
        values, vectors = eigenpairs_above(scale * matrix, 1e-7)
        assert values.shape == (2, 3)
        assert gap((vectors * values.unsqueeze(-2)) @ vectors.mT / scale, matrix) < 1e-8
        assert gap(vectors[0].mT @ vectors[0], torch.eye(3)) < 1e-12
        assert gap(vectors[1, :, 0], torch.zeros(5)) == 0  # of lower rank than the other


def test_eigenpairs_are_kept_relative_to_what_is_given():
    matrix = torch.diag(at(1.0, 1e-3, 1e-5))
    assert eigenpairs_above(matrix, 1e-2, at(0.01))[0].tolist() == [1e-3, 1.0]
    assert eigenpairs_above(matrix, 1e-2, at(100.0))[0].shape == (0,)  # not above: equal
    batch = torch.stack([matrix, torch.diag(at(1.0, 0.5, 0.25))])
    values, vectors = eigenpairs_above(batch, 1e-2)
    assert values.shape == (2, 3)
    assert values[0].tolist() == [1.0, 1.0, 1.0]  # two of them with the vector 0
    assert vectors[0].abs().sum(-2).tolist() == [0.0, 0.0, 1.0]


@pytest.mark.parametrize(("scale", "exact"), [(1.0, True), (1e-4, False)])
def test_a_sum_whose_rounding_would_reach_the_identity_is_one_of_float64(scale, exact):
    phi, weights = draw(400, 6, dtype=torch.float32), torch.full((400,), 1e6 * scale)
    total = GramSum(torch.Size(), 6, torch.device("cpu"))
    total.add(phi, weights)
    error = gap(total.total(), (phi.double().mT * weights.double()) @ phi.double())
    assert (error < 1e-5) == exact
    assert error < 0.05  # in any case far below 1


def test_it_is_one_of_float64_from_a_tenth_on():
    for size in (0.5, 2.0):  # of 0.1 / eps
        phi = torch.full((4, 1), 3.0).div(7).repeat(1, 4)  # no number of few bits
        trace = float((phi.norm() ** 2).double())
        weights = torch.full((4,), size * 0.1 / torch.finfo(torch.float32).eps / trace)
        total = GramSum(torch.Size(), 4, torch.device("cpu"))
        total.add(phi, weights)
        exact = (phi.double().mT * weights.double()) @ phi.double()
        assert (gap(total.total(), exact) < 1e-14 * exact.max()) == (size > 1)


def test_the_positive_part_leaves_what_is_positive_and_cuts_the_rest():
    Q = torch.linalg.qr(torch.randn(4, 3, 3, dtype=F64)).Q
    matrix = (Q * torch.tensor([2.0, 1.0, -1e-3], dtype=F64)) @ Q.mT
    assert gap(psd_part(matrix), (Q[..., :2] * torch.tensor([2.0, 1.0], dtype=F64)) @ Q[..., :2].mT) < 1e-14
    assert gap(psd_part(matrix @ matrix.mT), matrix @ matrix.mT) < 1e-14


def test_the_first_tensor_is_that_of_the_cpu_if_there_is_none():
    one = torch.ones(2, dtype=F64)
    assert first_tensor(None, 3.0, one, torch.zeros(1)) is one
    with torch.device("meta"):
        assert first_tensor(None).device.type == "cpu"
