"""Iterative solves are Cholesky's, what is stochastic is within its standard errors, what has failed says so."""

import math

import pytest
import reference as ref
import torch
from toys import F64, gap, waves

from dualgp import errors
from dualgp.solvers import (
    LowRankPreconditioner,
    conjugate_gradients,
    lanczos_logdet,
    mean_of,
    pivoted_cholesky,
    trace,
)

N = 150


def system(noise: float = 0.01) -> tuple[torch.Tensor, torch.Tensor]:
    """K and A = I + K/σ² of a smooth kernel: condition number about 10⁴."""
    x, *_ = waves(N, 2)
    K = ref.matern52(x, x, 0.8, 2.0)
    return K, torch.eye(N, dtype=F64) + K / noise


def preconditioner(K: torch.Tensor, rank: int, noise: float = 0.01) -> LowRankPreconditioner:
    return LowRankPreconditioner(pivoted_cholesky(K.diagonal(), lambda j: K[:, j], rank).factor / noise**0.5)


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


@pytest.mark.parametrize("rank", [0, 10, 60])
def test_conjugate_gradients_solve_as_cholesky_does(rank):
    K, A = system()
    b = torch.cat([draws(N, 3), A[:, :1], torch.zeros(N, 1, dtype=F64)], 1)
    P = preconditioner(K, rank)
    found = conjugate_gradients(lambda v: A @ v, b, precondition=P.solve, tol=1e-12)
    expected = torch.cholesky_solve(b, torch.linalg.cholesky(A))
    assert gap(found.x, expected) < 1e-8 * expected.abs().max()
    assert found.residual.max() <= 1e-12
    assert gap(found.residual, (b - A @ found.x).norm(dim=0) / b.norm(dim=0).clamp_min(1e-300)) < 1e-15


def test_a_better_preconditioner_takes_fewer_iterations_and_the_exact_one_takes_one():
    K, A = system()
    counts = []
    for rank in (0, 15, 60, N):
        P = preconditioner(K, rank)
        counts.append(conjugate_gradients(lambda v: A @ v, draws(N, 2), precondition=P.solve, tol=1e-8).iterations)
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > 2 * counts[2]
    assert counts[3] <= 2


def test_a_start_at_the_answer_takes_no_iteration():
    _, A = system()
    b = draws(N, 2)
    x = torch.linalg.solve(A, b)
    assert conjugate_gradients(lambda v: A @ v, b, start=x, tol=1e-8).iterations == 0


def test_a_start_whose_product_is_known_is_not_multiplied_again():
    K, A = system()
    b, x = draws(N, 2), draws(N, 2, seed=1)
    P, seen = preconditioner(K, 60), []

    def multiply(v: torch.Tensor) -> torch.Tensor:
        seen.append(v.clone())
        return A @ v

    known = conjugate_gradients(multiply, b, precondition=P.solve, start=x, start_product=A @ x, tol=1e-10)
    products = len(seen)
    again = conjugate_gradients(multiply, b, precondition=P.solve, start=x, tol=1e-10)
    assert gap(known.x, again.x) == 0.0
    assert len(seen) - products == products + 1
    assert not any(torch.equal(v, x) for v in seen[:products])


def test_the_pivots_are_those_of_the_naive_factorisation_and_the_factor_is_the_matrix():
    K, _ = system()
    found = pivoted_cholesky(K.diagonal(), lambda j: K[:, j], 30)
    assert found.pivots == ref.pivoted_cholesky(K, 30)
    left = K - found.factor.T @ found.factor
    assert gap(left.diagonal(), found.residual) < 1e-12
    assert torch.linalg.eigvalsh(left).min() > -1e-10
    more = pivoted_cholesky(K.diagonal(), lambda j: K[:, j], 10, given=found.factor[:20])
    assert more.pivots == found.pivots[20:]
    assert gap(more.factor, found.factor) < 1e-12


def test_the_preconditioner_is_woodburys():
    K, _ = system()
    P = preconditioner(K, 20)
    F = P.rows.T
    dense = torch.eye(N, dtype=F64) + F @ F.T
    assert gap(P.solve(draws(N, 3)), torch.linalg.solve(dense, draws(N, 3))) < 1e-10
    assert gap(P.diagonal_of_inverse(), torch.linalg.inv(dense).diagonal()) < 1e-10
    assert abs(P.logdet - torch.logdet(dense).item()) < 1e-8
    z = P.sample(40_000, torch.Generator().manual_seed(0))
    # Entries of a sample covariance have a standard deviation of √((c_ii c_jj + c_ij²)/S).
    d = dense.diagonal()
    assert ((z @ z.T / 40_000 - dense).abs() < 6 * ((d * d.unsqueeze(1) + dense.square()) / 40_000).sqrt()).all()


@pytest.mark.parametrize("rank", [0, 20, N])
def test_log_determinants_are_within_their_standard_errors(rank):
    K, A = system()
    P = preconditioner(K, rank)
    gaps = []
    for seed in range(20):
        z = P.sample(10, torch.Generator().manual_seed(seed))
        solved = conjugate_gradients(lambda v: A @ v, z, precondition=P.solve, tol=1e-8)
        found = lanczos_logdet(solved, (z * P.solve(z)).sum(0), P.logdet)
        gaps.append((found.value - torch.logdet(A).item()) / max(found.standard_error, 1e-7))
    if rank == N:
        assert max(map(abs, gaps)) < 100  # exact: 1e-5
        return
    # Twenty t-values of 9 degrees of freedom: mean 0 ± .25, mean square 9/7 ± .6.
    assert abs(sum(gaps) / 20) < 1.0
    assert sum(g * g for g in gaps) / 20 < 3.7


def test_traces_are_within_their_standard_errors():
    _, A = system()
    found = [trace(lambda v: A @ v, N, generator=torch.Generator().manual_seed(s)) for s in range(20)]
    gaps = [(e.value - A.trace().item()) / e.standard_error for e in found]
    assert abs(sum(gaps) / 20) < 1.0
    assert sum(g * g for g in gaps) / 20 < 3.7
    assert str(mean_of(torch.tensor([1.0, 3.0]))) == "2 ± 1"
    assert math.isinf(mean_of(torch.tensor([1.0])).standard_error)


def test_what_is_not_reached_raises_with_residual_iterations_and_remedy():
    _, A = system()
    with pytest.raises(errors.SolverError, match=r"relative residual .*e.*1.0e-10 was asked for, after 5 iterations"):
        conjugate_gradients(lambda v: A @ v, draws(N, 2), tol=1e-10, max_iterations=5)
    single = A.float()
    with pytest.raises(errors.SolverError, match="use float64 inputs"):
        conjugate_gradients(lambda v: (single @ v.float()).double(), draws(N, 2), tol=1e-12, max_iterations=10_000)
    with pytest.raises(errors.SolverError, match="negative curvature"):
        conjugate_gradients(lambda v: -v, draws(N, 2))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_input_is_refused(value):
    b = torch.full((3, 1), value, dtype=F64)
    with pytest.raises(errors.InputError, match="right-hand side must be finite"):
        conjugate_gradients(lambda v: v, b)
    with pytest.raises(errors.InputError, match="tol must be between 0 and 1"):
        conjugate_gradients(lambda v: v, torch.ones(3, 1, dtype=F64), tol=value)
    with pytest.raises(errors.InputError, match="max_iterations must be a whole number"):
        conjugate_gradients(lambda v: v, torch.ones(3, 1, dtype=F64), max_iterations=0)
    with pytest.raises(errors.InputError, match="A factor of 1000000 columns of 1000000 rows would take"):
        pivoted_cholesky(torch.ones(1, dtype=F64).expand(10**6), lambda j: torch.ones(1), 10**6)
