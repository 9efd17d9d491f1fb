"""The exact process, Z = X, seen through products with its kernel matrix: solves, marginals, bound and gradient.

With sites (λ, β) on f(X), μ the prior mean and F = B^½ L of a greedy factor K ≈ LLᵀ,

    A = I + B^½ K B^½,   P = I + F Fᵀ = A to the rank of L,   a = c + B^½ A⁻¹(b − B^½ K c),   λ − βμ = B^½ b + c
    mean = μ + K a,   β_i v_i = 1 − [A⁻¹]_ii,   KL = ½ [log|A| − Σ β_i v_i + aᵀK a]

c being what data say whose β is next to nothing; elsewhere it is 0, for K times the λ of n data cancels in a.

Probes z ~ N(0, P) with u = A⁻¹z and w = P⁻¹z serve all that is stochastic, as a correction of what P says exactly:

    diag A⁻¹ = diag P⁻¹ + E[(u − w) ∘ w],    tr A⁻¹C = tr P⁻¹C + E[(u − w)ᵀ C w],    log|A|: `lanczos_logdet`

so that the noise goes with ‖A⁻¹ − P⁻¹‖. Where the sites have converged the bound is stationary in q, and its gradient
is that at q held: ½ aᵀK'a − ½ tr(B^½A⁻¹B^½ K') + aᵀμ' + ∂Σ E_q[log p]; errors of v drop out of the bound's value too.

Source: Khan et al. 2013 (one λ, β per datum), Gardner et al. 2018 (probes from N(0, P)), Wenger et al. 2022 (correction
of the preconditioner's value).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from gpytorch.kernels import Kernel
from gpytorch.means import Mean
from torch import Tensor

from dualgp.gp.data import Data
from dualgp.gp.hyper import Hyper
from dualgp.kernels import LazyKernel, prior_covariance
from dualgp.linalg import check_fits, psd_cholesky
from dualgp.solvers import (
    Estimate,
    LowRankPreconditioner,
    Solve,
    conjugate_gradients,
    lanczos_logdet,
    pivoted_cholesky,
)

_TOLD = 1e-4  # β k, beyond which a datum's site says more than rounding and probes
_BLOCK = 1 << 24  # numbers in k(X, x) of a block of test inputs


class Effort(NamedTuple):
    """What solves may take: rank of the preconditioner, probes, relative residual and iterations; and the backend."""

    rank: int
    num_probes: int
    tol: float
    max_iterations: int
    backend: str


class State(NamedTuple):
    """One latent process under its sites; vectors are float64 [n], probes [n, S].

    `shift` is K a, None where K has moved since.
    """

    lam: Tensor
    beta: Tensor
    a: Tensor
    shift: Tensor | None
    mean: Tensor
    var: Tensor
    kl: Estimate
    u: Tensor
    w: Tensor
    preconditioner: LowRankPreconditioner
    iterations: int


class Products:
    """The process at fixed hyperparameters and inputs.

    Args:
        kernel: without a batch shape.
        mean: or None for zero.
        x: all inputs, [n, D].
        effort: see `Effort`.
        noise: [n + rank, S] standard normal numbers that the probes are made of.
        pivots: of the preconditioner; chosen greedily if None.

    Raises:
        InputError: if the preconditioner and the vectors do not fit into memory.
    """

    def __init__(
        self,
        kernel: Kernel,
        mean: Mean | None,
        x: Tensor,
        effort: Effort,
        noise: Tensor,
        pivots: list[int] | None = None,
    ) -> None:
        self.kernel, self.mean, self.x, self.effort = kernel, mean, x, effort
        n = len(x)
        count = n * (3 * effort.rank + 10 * effort.num_probes)
        check_fits(
            count, x.dtype, x.device, f"an exact process of {n} data", "lower rank and num_probes, or use DualGP"
        )
        self.K = LazyKernel(kernel, x, backend=effort.backend)
        with torch.no_grad():
            self.diag = self.K.diagonal()
            self.mu = self.prior_mean(x).detach()
            single = x.dtype == torch.float32
            reader = self.K.column_reader()
            tol = 0.0 if pivots is not None else 1e-6 if single else 1e-13
            rank = min(effort.rank, n)
            low = pivoted_cholesky(self.diag, reader, rank, tol=tol, pivots=pivots, dtype=x.dtype)
        self.factor, self.pivots, self.unexplained = low
        self.noise = torch.cat([noise[:n], noise[n : n + len(self.factor)]])

    def prior_mean(self, x: Tensor) -> Tensor:
        """Return μ(x) in float64."""
        if self.mean is None:
            return torch.zeros(len(x), dtype=torch.float64, device=x.device)
        return self.mean(x.double()).double()

    def prior(self) -> State:
        """Return the state without sites."""
        zero, none = torch.zeros_like(self.mu), torch.zeros_like(self.noise[: len(self.mu)])
        P = LowRankPreconditioner(self.factor * 0.0)
        return State(zero, zero, zero, zero, self.mu, self.diag, Estimate(0.0, 0.0), none, none, P, 0)

    @torch.no_grad()
    def state(self, lam: Tensor, beta: Tensor, start: State | None = None) -> State:
        """Return the process under sites with β ≥ 0.

        Raises:
            SolverError: if conjugate gradients do not reach their tolerance.
        """
        root = beta.sqrt()
        P = self._preconditioner(root)
        z = self._probes(P)
        told, lam_tilde = beta * self.diag > _TOLD, lam - beta * self.mu
        safe = torch.where(told, root, 1.0)
        c = torch.where(told, 0.0, lam_tilde)
        Kc = self._times(c, ~told)
        b = torch.where(told, lam_tilde / safe, 0.0) - root * Kc
        first, product = self._first(start, told, root, z.shape[-1])
        solved = self.solve(root, P, torch.cat([b.unsqueeze(-1), z], 1), first, product)
        x, left = solved.x[:, 0], solved.remainder[:, 0]
        a = c + root * x
        # K a = K c + K B^½x needs no product of its own where b − r − x = B^½ K B^½ x says it.
        shift = Kc + (b - left - x) / safe
        if not bool(told.all()):
            shift[~told] = LazyKernel(self.kernel, self.x[~told], self.x, backend=self.effort.backend) @ a
        u, w = solved.x[:, 1:], P.solve(z)
        taken = self._taken(P, u, w)
        probes = solved._replace(tridiagonal=solved.tridiagonal[1:])
        log_det = lanczos_logdet(probes, (z * w).sum(0), P.logdet)
        kl = 0.5 * (log_det.value - float(taken.sum()) + float(a @ shift))
        var = self._variance(P, beta, taken)
        error = 0.5 * log_det.standard_error
        return State(lam, beta, a, shift, self.mu + shift, var, Estimate(kl, error), u, w, P, solved.iterations)

    @torch.no_grad()
    def restored(self, lam: Tensor, beta: Tensor, a: Tensor, shift: Tensor, u: Tensor, kl: Sequence[float]) -> State:
        """Return a state from what its solves have found, to the last bit."""
        P = self._preconditioner(beta.sqrt())
        w = P.solve(self._probes(P))
        var = self._variance(P, beta, self._taken(P, u, w))
        return State(lam, beta, a, shift, self.mu + shift, var, Estimate(*kl), u, w, P, 0)

    def _probes(self, P: LowRankPreconditioner) -> Tensor:
        """Z ~ N(0, P)."""
        n = len(self.mu)
        return self.noise[:n] + P.lift(self.noise[n:])

    def _first(
        self, start: State | None, told: Tensor, root: Tensor, probes: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """Where conjugate gradients start, and A times that, from what a state before has found; probes start at 0."""
        if start is None or start.shift is None or not bool(start.a.any()):
            return None, None
        first, product = root.new_zeros(2, len(root), 1 + probes)
        first[:, 0] = torch.where(told, start.a / torch.where(told, root, 1.0), 0.0)
        product[:, 0] = first[:, 0] + root * (start.shift - self._times(start.a, ~told))
        return first, product

    def _times(self, v: Tensor, rows: Tensor) -> Tensor:
        """K v for a v of which only some rows count."""
        rows = rows & (v != 0)
        if not bool(rows.any()):
            return torch.zeros_like(v)
        return LazyKernel(self.kernel, self.x, self.x[rows], backend=self.effort.backend) @ v[rows]

    def solve(
        self,
        root: Tensor,
        P: LowRankPreconditioner,
        b: Tensor,
        start: Tensor | None = None,
        start_product: Tensor | None = None,
        fine: LazyKernel | None = None,
    ) -> Solve:
        """Return A⁻¹b; to a hundredth of the tolerance with products of a `fine` kernel matrix."""
        K, root = fine or self.K, root.unsqueeze(-1)
        return conjugate_gradients(
            lambda v: v + root * (K @ (root * v)),
            b,
            precondition=P.solve,
            start=start,
            start_product=start_product,
            tol=self.effort.tol * (0.01 if fine else 1.0),
            max_iterations=self.effort.max_iterations,
        )

    def by_probes(self, state: State, probes: slice) -> State:
        """Return the state with the variances that some of the probes alone would give."""
        u, w, P = state.u[:, probes], state.w[:, probes], state.preconditioner
        return state._replace(u=u, w=w, var=self._variance(P, state.beta, self._taken(P, u, w)))

    @staticmethod
    def _taken(P: LowRankPreconditioner, u: Tensor, w: Tensor) -> Tensor:
        """βv = 1 − diag A⁻¹."""
        return (1.0 - P.diagonal_of_inverse() - ((u - w) * w).mean(-1)).clamp(0.0, 1.0)

    def _preconditioner(self, root: Tensor) -> LowRankPreconditioner:
        return LowRankPreconditioner(self.factor * root.to(self.factor.dtype))

    def _variance(self, P: LowRankPreconditioner, beta: Tensor, taken: Tensor) -> Tensor:
        """Return v from βv; where β says next to nothing, what the low rank says of it: k − |l|² + |C⁻¹l|²."""
        low = self.unexplained + torch.cat(
            [(P.inverse_root @ part.double()).square().sum(0) for part in self.factor.split(65536, dim=1)]
        )
        told = beta * self.diag > _TOLD
        var = torch.where(told, taken / torch.where(told, beta, 1.0), low)
        return torch.minimum(var.clamp_min(0.0), self.diag)

    @torch.no_grad()
    def predict_mean(self, x: Tensor, states: list[State]) -> Tensor:
        """Return μ(x) + k(x, X) a of every latent process, [C, T], never holding k(x, X)."""
        weights = torch.stack([s.a for s in states], -1)
        return (self.prior_mean(x).unsqueeze(-1) + LazyKernel(self.kernel, x, self.x) @ weights).mT

    @torch.no_grad()
    def predict_var(self, inputs: Tensor, states: list[State]) -> Tensor:
        """Return k(x, x) − cᵀB^½A⁻¹B^½c with c = k(X, x), [C, T], by solves for a block of inputs at a time.

        What n data take from the prior variance is nearly all of it: products are float64 here, and residuals smaller.
        """
        x, inputs = self.x.double(), inputs.double()
        fine = LazyKernel(self.kernel, x, backend=self.effort.backend)
        step = max(1, _BLOCK // max(1, len(self.x)))
        parts = []
        for rows in inputs.split(step):
            c = LazyKernel(self.kernel, x, rows).columns(torch.arange(len(rows), device=rows.device))
            prior = LazyKernel(self.kernel, rows).diagonal()
            found = []
            for s in states:
                root, P = s.beta.sqrt(), s.preconditioner
                b = root.unsqueeze(-1) * c
                y, r, *_ = self.solve(root, P, b, fine=fine)
                # bᵀA⁻¹b = yᵀb + yᵀr + rᵀA⁻¹r, with A ≈ P in what is of second order
                taken = (y * (b + r)).sum(0) + (r * P.solve(r)).sum(0)
                found.append((prior - taken).clamp_min(0.0))
            parts.append(torch.stack(found))
        return torch.cat(parts, -1) if parts else self.mu.new_zeros(len(states), 0)


class Fitted(NamedTuple):
    """What predictions are made of: hyperparameters of the fit, its data, and the sites."""

    hyper: Hyper
    data: Data
    process: Products
    states: list[State]


def objective(process: Products, states: list[State]) -> Tensor:
    """Return a scalar whose gradient in the hyperparameters of kernel and mean is that of the bound at q held.

        ½ aᵀKa + aᵀμ − ½ tr K_zz⁻¹(K_zx B K_xz − HHᵀ) − ½ E[(B^½u)ᵀ K (B^½w) − |L_z⁻¹ K_zx B^½w|²],   H = K_zx B^½U

    With P⁻¹ = I − UUᵀ and Q = K_xz K_zz⁻¹ K_zx at the pivots z of the preconditioner, tr P⁻¹B^½Q'B^½ is taken exactly,
    so that noise goes with K' − Q'.
    """
    z = process.x[torch.tensor(process.pivots, device=process.x.device)]
    K, K_xz = process.K, LazyKernel(process.kernel, process.x, z)
    L, _ = psd_cholesky(prior_covariance(process.kernel, z), 1e-10)
    mu = process.prior_mean(process.x)
    total = mu.new_zeros(())
    for s in states:
        root, P = s.beta.sqrt().unsqueeze(-1), s.preconditioner
        H = K_xz.rmatvec(root * P.lift(P.inverse_root.mT))
        known = torch.cholesky_solve(K_xz.gram(s.beta) - H @ H.mT, L).diagonal().sum()
        u, w = root * s.u, root * s.w
        half = torch.linalg.solve_triangular(L, K_xz.rmatvec(w), upper=False)
        joint = K @ torch.cat([s.a.unsqueeze(-1), w], 1)
        noisy = ((u * joint[:, 1:]).sum() - half.square().sum()) / u.shape[-1]
        total = total + 0.5 * s.a @ joint[:, 0] + s.a @ mu - 0.5 * (known + noisy)
    return total
