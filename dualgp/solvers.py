"""Iterative linear algebra of large symmetric matrices, known by their products: solves, log-determinants, traces.

Vectors are float64; the matrix may be less precise, and then limits what residual can be reached.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from dualgp.draws import normal, uniform
from dualgp.errors import InputError, SolverError, check_count
from dualgp.linalg import check_fits, logdet, psd_cholesky, tri_inverse

Multiply = Callable[[Tensor], Tensor]
_CYCLES = 5
_STALL = 60  # iterations without a better residual, after which there will be none


class Estimate(NamedTuple):
    """A stochastic estimate with its standard error (0 where it is exact)."""

    value: float
    standard_error: float

    def __str__(self) -> str:
        return f"{self.value:.6g} ± {self.standard_error:.2g}"


class Solve(NamedTuple):
    """x with A x = b, r = b − A x, relative residuals |r| / |b| [w], iterations, and Lanczos' matrices T [w, k, k]."""

    x: Tensor
    remainder: Tensor
    residual: Tensor
    iterations: int
    tridiagonal: Tensor


class Pivoted(NamedTuple):
    """K ≈ L Lᵀ with L = factorᵀ: factor [k, n], its pivots, and what is left of the diagonal [n]."""

    factor: Tensor
    pivots: list[int]
    residual: Tensor


def pivoted_cholesky(
    diagonal: Float[Tensor, "n"],
    column: Callable[[int], Tensor],
    rank: int,
    *,
    tol: float = 0.0,
    given: Float[Tensor, "k n"] | None = None,
    pivots: list[int] | None = None,
    dtype: torch.dtype = torch.float64,
) -> Pivoted:
    """Return a pivoted Cholesky factor of a matrix known by its diagonal and columns: greedy, O(n k²), n·k numbers.

    Args:
        diagonal: of the matrix, in float64.
        column: j ↦ column j, [n].
        rank: k, at most.
        tol: stop when no diagonal entry has more than this share of the largest left.
        given: rows of a factor that is known already; the new rows follow them.
        pivots: to take in place of the greedy choice.
        dtype: of the factor.

    Raises:
        InputError: if the factor does not fit into memory.

    Source: Harbrecht, Peters & Schneider 2012; Fine & Scheinberg 2001.

    Example:
        >>> A = torch.tensor([[4.0, 2.0], [2.0, 3.0]], dtype=torch.float64)
        >>> pivoted_cholesky(A.diagonal(), lambda j: A[:, j], 2).factor
        tensor([[2.0000, 1.0000],
                [0.0000, 1.4142]], dtype=torch.float64)
    """
    n = len(diagonal)
    known = 0 if given is None else len(given)
    check_fits((known + rank) * n, dtype, diagonal.device, f"a factor of {rank} columns of {n} rows", "use fewer")
    residual = diagonal.double().clone()
    floor = tol * residual.max() if n else residual.sum()
    factor = diagonal.new_zeros(known + rank, n, dtype=dtype)
    if given is not None:
        factor[:known] = given
        residual = (residual - given.double().square().sum(0)).clamp_min_(0.0)
    chosen: list[int] = []
    for k in range(known, known + min(rank, n) if pivots is None else known + len(pivots)):
        pivot = int(residual.argmax()) if pivots is None else pivots[k - known]
        if residual[pivot] <= floor:
            break
        row = (column(pivot).to(dtype) - factor[:k, pivot] @ factor[:k]).div_(residual[pivot].sqrt().to(dtype))
        factor[k] = row
        residual.sub_(row.double().square()).clamp_min_(0.0)
        residual[pivot] = 0.0
        chosen.append(pivot)
    return Pivoted(factor[: known + len(chosen)], chosen, residual)


class LowRankPreconditioner:
    """P = I + F Fᵀ for F [n, k], with P⁻¹ = I − U Uᵀ: exact where A = I + F Fᵀ.

    Args:
        rows: F by columns, [k, n] (as `Pivoted.factor` has them).

    Source: Gardner et al. 2018, appendix; Woodbury.
    """

    def __init__(self, rows: Float[Tensor, "k n"]) -> None:
        self.rows = rows
        inner = torch.eye(len(rows), dtype=torch.float64, device=rows.device)
        for part in rows.split(65536, dim=1):
            inner = inner + (part @ part.mT if part.dtype == torch.float64 else part.double() @ part.double().mT)
        chol, _ = psd_cholesky(inner, 0.0)
        self.inverse_root = tri_inverse(chol)  # C⁻¹ with I + FᵀF = CCᵀ
        self.logdet = float(logdet(chol))

    def solve(self, b: Float[Tensor, "n w"]) -> Float[Tensor, "n w"]:
        """Return P⁻¹ b."""
        inside = self.inverse_root @ self.project(b)
        return b - self.lift(self.inverse_root.mT @ inside)

    def diagonal_of_inverse(self) -> Float[Tensor, "n"]:
        """Return diag P⁻¹ = 1 − |C⁻¹fᵢ|², in (0, 1]."""
        parts = [(self.inverse_root @ part.double()).square().sum(0) for part in self.rows.split(65536, dim=1)]
        return 1.0 - (torch.cat(parts) if parts else self.rows.new_zeros(0).double())

    def sample(self, count: int, generator: torch.Generator | None) -> Float[Tensor, "n s"]:
        """Return draws of N(0, P): ε + F ε'."""
        k, n = self.rows.shape
        noise = normal((n + k, count), self.rows.new_empty(0, dtype=torch.float64), generator)
        return noise[:n] + self.lift(noise[n:])

    def project(self, b: Float[Tensor, "n w"]) -> Float[Tensor, "k w"]:
        """Return Fᵀ b."""
        return (self.rows @ b.to(self.rows.dtype)).double()

    def lift(self, v: Float[Tensor, "k w"]) -> Float[Tensor, "n w"]:
        """Return F v."""
        return (self.rows.mT @ v.to(self.rows.dtype)).double()


@torch.no_grad()
def conjugate_gradients(
    multiply: Multiply,
    b: Float[Tensor, "n w"],
    *,
    precondition: Multiply | None = None,
    start: Float[Tensor, "n w"] | None = None,
    start_product: Float[Tensor, "n w"] | None = None,
    tol: float = 1e-6,
    max_iterations: int = 1000,
) -> Solve:
    """Return A⁻¹b of a symmetric positive definite A, for several right-hand sides at once.

    Args:
        multiply: v [n, w] ↦ A v.
        b: right-hand sides, float64.
        precondition: r ↦ P⁻¹r for a positive definite P near A.
        start: a first guess; 0 if None. (`tridiagonal` is that of the Krylov space of b − A·start.)
        start_product: A·start where it is known already, which saves a product.
        tol: |b − A x| ≤ tol · |b| for each, checked on b − A x itself at the end.
        max_iterations: products with A, at most.

    Raises:
        SolverError: if the tolerance is not reached: with residual, iterations and what to do.

    Source: Hestenes & Stiefel 1952; Saad 2003, alg. 9.1, and § 6.7.3 for T.

    Example:
        >>> A = torch.tensor([[4.0, 2.0], [2.0, 3.0]], dtype=torch.float64)
        >>> found = conjugate_gradients(lambda v: A @ v, torch.tensor([[8.0], [7.0]], dtype=torch.float64))
        >>> found.x.flatten(), found.iterations
        (tensor([1.2500, 1.5000], dtype=torch.float64), 2)
    """
    check_count("max_iterations", max_iterations, 1)
    if not 0 < tol < 1:
        raise InputError(f"tol must be between 0 and 1, got {tol}.")
    if not b.isfinite().all():
        raise InputError("The right-hand side must be finite; it holds NaN or infinity.")
    apply = (lambda r: r) if precondition is None else precondition
    scale = torch.linalg.vector_norm(b, dim=0).clamp_min(1e-300)
    x = torch.zeros_like(b) if start is None else start
    r = b if start is None else b - (multiply(x) if start_product is None else start_product)
    first: _Cycle | None = None
    taken = 0
    for _ in range(_CYCLES):  # the recurrence drifts from the true residual: go on from there
        found = _cycle(multiply, r, apply, scale, tol, max_iterations - taken)
        first, taken = first or found, taken + len(found.steps)
        if not found.steps:
            break
        x = x + found.x
        before, r = torch.linalg.vector_norm(r, dim=0), b - multiply(x)
        left = torch.linalg.vector_norm(r, dim=0)
        if bool((left <= tol * scale).all()) or taken == max_iterations or not bool((left < 0.5 * before).any()):
            break
    assert first is not None
    left = torch.linalg.vector_norm(r, dim=0) / scale
    if bool((left > tol).any()):
        raise SolverError(_message("stopped short of its tolerance", left, taken, tol))
    return Solve(x, r, left, taken, _lanczos(first.steps, first.ratios, b.shape[-1], b.device))


class _Cycle(NamedTuple):
    """A⁻¹r by the recurrence, and the numbers a and b of its steps."""

    x: Tensor
    steps: list[Tensor]
    ratios: list[Tensor]


def _cycle(multiply: Multiply, r: Tensor, apply: Multiply, scale: Tensor, tol: float, limit: int) -> _Cycle:
    """Conjugate gradients until the recurrence's residuals are within 0.9 tol · scale, or fall no more."""
    x, z = torch.zeros_like(r), apply(r)
    p, rz = z, (r * z).sum(0)
    steps: list[Tensor] = []
    ratios: list[Tensor] = []
    best, since = torch.full_like(scale, torch.inf), 0
    while len(steps) < limit and since <= _STALL:
        left = torch.linalg.vector_norm(r, dim=0) / scale
        live = left > 0.9 * tol
        if not live.any():
            break
        since = 0 if bool((left < 0.99 * best)[live].any()) else since + 1
        best = torch.minimum(best, left)
        Ap = multiply(p)
        curve = (p * Ap).sum(0)
        if not bool((curve[live] > 0).all()):
            raise SolverError(_message("met a direction of negative curvature", left, len(steps), tol))
        step = torch.where(live, rz / curve, 0.0)
        x, r = x + step * p, r - step * Ap
        z = apply(r)
        new = (r * z).sum(0)
        ratio = torch.where(live, new / rz, 0.0)
        p, rz = z + ratio * p, torch.where(live, new, rz)
        steps.append(step)
        ratios.append(ratio)
    return _Cycle(x, steps, ratios)


def _message(what: str, left: Tensor, iterations: int, tol: float) -> str:
    worst = left.max().item()
    return (
        f"Conjugate gradients {what}: relative residual {worst:.1e}, where {tol:.1e} was asked for, after {iterations} "
        "iterations. Give the preconditioner a higher rank, allow more iterations, use float64 inputs (rounding in "
        "float32 leaves a residual of about 1e-8 of the largest eigenvalue), or a larger noise or tol."
    )


def _lanczos(steps: list[Tensor], ratios: list[Tensor], width: int, device: torch.device) -> Tensor:
    """T of each right-hand side: t_jj = 1/a_j + b_{j−1}/a_{j−1}, t_{j,j+1} = √b_j/a_j; identity where it had ended."""
    k = len(steps)
    T = torch.eye(k, dtype=torch.float64, device=device).repeat(width, 1, 1)
    if not k:
        return T
    a, b = torch.stack(steps, -1), torch.stack(ratios, -1)  # [w, k]
    live = a > 0
    inverse = torch.where(live, 1.0 / torch.where(live, a, 1.0), 0.0)
    diagonal = inverse.clone()
    diagonal[:, 1:] += (b * inverse)[:, :-1]
    T.diagonal(dim1=-2, dim2=-1).copy_(torch.where(live, diagonal, 1.0))
    off = torch.where(live[:, 1:], b[:, :-1].clamp_min(0.0).sqrt() * inverse[:, :-1], 0.0)
    T.diagonal(1, -2, -1).copy_(off)
    T.diagonal(-1, -2, -1).copy_(off)
    return T


def lanczos_logdet(solve: Solve, weights: Float[Tensor, "w"], known: float) -> Estimate:
    """Return log|A| from the solves of A x = z at probes z ~ N(0, P), with its standard error over the probes.

        log|A| = log|P| + E[εᵀ log(P^{−½} A P^{−½}) ε],   εᵀ log(·) ε ≈ |ε|² e₁ᵀ log(T) e₁,   |ε|² = zᵀP⁻¹z

    Args:
        solve: of the probes, from the start 0.
        weights: zᵀP⁻¹z of each.
        known: log|P|.

    Source: Ubaru, Chen & Saad 2017 (stochastic Lanczos quadrature); Gardner et al. 2018 for P.
    """
    if not solve.iterations:
        return Estimate(known, 0.0)
    values, vectors = torch.linalg.eigh(solve.tridiagonal)
    terms = weights * (vectors[:, 0, :].square() * values.clamp_min(1e-300).log()).sum(-1)
    return mean_of(terms, known)


def mean_of(terms: Float[Tensor, "s"], offset: float = 0.0) -> Estimate:
    """Return the mean of independent terms, plus a number, with the standard error; infinite for one term."""
    error = float(terms.std()) / math.sqrt(len(terms)) if len(terms) > 1 else math.inf
    return Estimate(offset + float(terms.mean()), error)


def trace(multiply: Multiply, n: int, *, num_probes: int = 16, generator: torch.Generator | None = None) -> Estimate:
    """Return tr A of a matrix known by its products, with the standard error over Rademacher probes.

    Source: Hutchinson 1990.

    Example:
        >>> trace(lambda v: 2.0 * v, 5)  # exact for a diagonal matrix
        Estimate(value=10.0, standard_error=0.0)
    """
    check_count("num_probes", num_probes, 2)
    z = (uniform((n, num_probes), torch.device("cpu"), generator) < 0.5).double() * 2 - 1
    return mean_of((z * multiply(z)).sum(0))
