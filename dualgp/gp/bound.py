"""The bound in form S and its gradient: sites per datum frozen, q moving through K(θ).

    L(θ, Z) = Σ_i E_q[log p(y_i|f_i)] − KL(q ‖ p) + log p(θ),       q(w) = N(P⁻¹c, P⁻¹),
    P = I + Σ β_i φ_iφ_iᵀ,   c = Σ φ_i(λ_i − β_i μ_i),   φ_i = L⁻¹k(Z, x_i)

The gradient is written out (the adjoint of φ is linear in φ), so that a pass over the data holds one block at a
time and only the kernel itself is differentiated by autograd. With a_i = ∂/∂m_i and b_i = −2 ∂/∂v_i of the first
sum, Â = Σ b_i φφᵀ, g = Σ a_i φ_i − w̄, h = P⁻¹g, U = I − P⁻¹, G = ½ P⁻¹(Â + I − P)P⁻¹ − sym(h w̄ᵀ):

    ∂L/∂φ_i = a_i w̄ + (λ_i − β_i μ_i) h + b_i U φ_i + 2 β_i G φ_i
    ∂L/∂K_zz = −½ L⁻ᵀ S L⁻¹,  S = Σ_i (∂L/∂φ_i) φ_iᵀ = w̄(Σ a φ)ᵀ + h cᵀ + U Â + 2 G A

G and h vanish where the sites have converged. For Gaussian noise the sites are y/σ² and 1/σ² at every θ, so G = h = 0
always and L is the collapsed bound of Titsias 2009. `hybrid.batch_bound` says the same by plain autograd.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dualgp.basis import Features, InducingBasis, SiteSum
from dualgp.distributed import ALONE, Ranks
from dualgp.duals import expected_log_prob
from dualgp.gp.data import CACHE_BYTES, Data, gaussian_sites
from dualgp.gp.hyper import Hyper
from dualgp.kernels import cross_covariance, kernel_diagonal, prior_covariance
from dualgp.linalg import GramSum, mul_lower, row_chunks, symmetrise
from dualgp.posterior import Posterior
from dualgp.sites import Site, Sites


class Bound(NamedTuple):
    """Value of the bound, its gradient in `hyper.trained()` order, q, and the duals that q asks for."""

    value: float
    gradient: list[Tensor]
    posterior: Posterior
    target: Sites


class Block(NamedTuple):
    """A block of rows: features for the algebra, and the tensors that carry the kernel's graph."""

    rows: slice
    features: Features
    cross: Tensor
    diag: Tensor
    mean: Tensor | None


class Marginals(NamedTuple):
    """Per-datum results of a pass, data last: a = ∂/∂m and b = −2 ∂/∂v of Σ E_q[log p], and the means m."""

    a: Tensor
    b: Tensor
    m: Tensor


def conjugate_sites(hyper: Hyper, data: Data) -> Sites | None:
    """Return the sites of a Gaussian likelihood at the present noise; None for others (see `gaussian_sites`)."""
    return gaussian_sites(hyper.likelihood, data)


def site_bound(hyper: Hyper, data: Data, sites: Sites | None, ranks: Ranks = ALONE) -> Bound:
    """Return the bound of form S with its gradient; `sites` None stands for the conjugate ones.

    Takes O(n M²) operations and O(block · M + M²) numbers beyond the data (and a constant cache). Of several `ranks`
    each has its own data and sites, and the bound is of all.

    Raises:
        NotPositiveDefiniteError: if K_zz cannot be factorised or frozen sites with β < 0 leave no Gaussian.
    """
    conjugate = sites is None
    sites = conjugate_sites(hyper, data) if sites is None else sites
    assert sites is not None
    basis = hyper.basis()
    lam, beta = sites.by_latent()
    blocks = _Blocks(hyper, basis, data)
    total = SiteSum(basis)
    for b in blocks:
        total.add(b.features, lam[..., b.rows], beta[..., b.rows])
    own = total.site()
    q = Posterior(basis, Site(*ranks.sum(own.lam, own.B)))
    adjoint = _Adjoint(hyper, q, len(data), ranks)
    if conjugate:
        adjoint.at_fixed_point()
        for b in blocks:
            adjoint.backward(b, data)
    else:
        adjoint.sweep(blocks, data)
        for b in blocks:
            adjoint.backward(b, data, lam[..., b.rows], beta[..., b.rows])
    value, gradient = adjoint.finish()
    a, beta_new, m = adjoint.marginals
    return Bound(value, gradient, q, Sites.from_latent(a + beta_new * m, beta_new, sites.multi_output))


class _Blocks:
    """Blocks with the kernel's graph; kept after the first pass if they fit the cache."""

    def __init__(self, hyper: Hyper, basis: InducingBasis, data: Data) -> None:
        self.hyper, self.basis, self.data = hyper, basis, data
        size = len(data) * basis.num_inducing * torch.finfo(basis.dtype).bits // 8
        per_kernel = max(1, len(basis.L.reshape(-1, *basis.L.shape[-2:])))
        self.cache: list[Block] | None = [] if 3 * size * per_kernel <= CACHE_BYTES else None

    def __iter__(self) -> Iterator[Block]:
        if self.cache:
            yield from self.cache
            return
        for rows in row_chunks(len(self.data), self.basis.num_inducing, self.basis.dtype, self.basis.device):
            block = self._block(rows)
            if self.cache is not None:
                self.cache.append(block)
            yield block

    def _block(self, rows: slice) -> Block:
        hyper, basis = self.hyper, self.basis
        x = basis.expand(self.data.x[..., rows, :])
        with torch.enable_grad():
            cross = cross_covariance(hyper.kernel, x, basis.expand(hyper.Z.to(basis.dtype)), basis.dtype)
            diag = kernel_diagonal(hyper.kernel, x)
            mean = None if hyper.mean is None else hyper.mean(x.double())
        phi = mul_lower(cross.detach(), basis.L_inv, transpose=True)
        mu = torch.zeros_like(diag) if mean is None else mean
        return Block(rows, Features(phi, diag.detach(), mu.detach()), cross, diag, mean)


class _Adjoint:
    """The M × M quantities of the gradient, and its accumulation over blocks (letters as in the module docstring)."""

    def __init__(self, hyper: Hyper, q: Posterior, n: int, ranks: Ranks) -> None:
        self.hyper, self.q, self.ranks = hyper, q, ranks
        # One allocation for all data: small tensors kept from block to block would pin the heap.
        self.marginals = Marginals(*(q.site.lam.new_empty(*q.basis.batch_shape, n) for _ in range(3)))
        self.parameters = hyper.trained()
        own = {id(p) for p in hyper.likelihood.parameters()}
        self.of_likelihood = [i for i, p in enumerate(self.parameters) if id(p) in own]
        self.gradient = [torch.zeros_like(p) for p in self.parameters]
        self.value = torch.zeros((), dtype=torch.float64, device=q.basis.device)
        self.P_inv = symmetrise(q.chol_inv.mT @ q.chol_inv)
        self.U = torch.eye(q.basis.num_inducing, dtype=torch.float64, device=q.basis.device) - self.P_inv
        self.h: Tensor | None = None

    def at_fixed_point(self) -> None:
        """Conjugate sites: Â = A and Σ aφ = c − A w̄ = w̄; the terms in G and h vanish."""
        w = self.q.mean_w
        self.S = _outer(w, w) + self.U @ self.q.site.B

    def sweep(self, blocks: _Blocks, data: Data) -> None:
        """One pass for the marginals: a, b, Â and Σ aφ, and from them G, h and S."""
        q, A, w = self.q, self.q.site.B, self.q.mean_w
        a_phi, b_phi = torch.zeros_like(w), GramSum(w.shape[:-1], w.shape[-1], w.device)  # Σ aφ, Â
        for block in blocks:
            phi = block.features.phi
            a, b = self._likelihood(block.rows, data, *q.marginals(block.features))
            a_phi += _apply(phi.mT, a)
            b_phi.add(phi, b)
        a_phi, A_hat = self.ranks.sum(a_phi, b_phi.total())
        self.h = h = _apply(self.P_inv, a_phi - w)  # P⁻¹g
        self.G = 0.5 * self.P_inv @ (A_hat - A) @ self.P_inv - symmetrise(_outer(h, w))
        self.S = _outer(w, a_phi) + _outer(h, q.site.lam) + self.U @ A_hat + 2.0 * self.G @ A

    def backward(self, block: Block, data: Data, lam: Tensor | None = None, beta: Tensor | None = None) -> None:
        """Add the gradient of one block through its kernel rows, its kernel diagonal and its prior mean."""
        phi, mu = block.features.phi, block.features.prior_mean
        w = self.q.mean_w
        phi_U = phi @ self.U.to(phi.dtype)
        if self.h is None:  # v = k − φᵀUφ comes with the product that the gradient needs
            v = block.diag.detach() - (phi * phi_U).sum(-1).double()
            a, b = self._likelihood(block.rows, data, mu + _apply(phi, w), v.clamp_min(0.0))
        else:
            a, b = (t[..., block.rows] for t in self.marginals[:2])
        d_phi = _outer(a, w, phi.dtype) + b.unsqueeze(-1).to(phi.dtype) * phi_U
        d_mu = a
        if self.h is not None and lam is not None and beta is not None:
            d_phi = d_phi + _outer(lam - beta * mu, self.h, phi.dtype)
            d_phi = d_phi + 2.0 * beta.unsqueeze(-1).to(phi.dtype) * (phi @ self.G.to(phi.dtype))
            d_mu = a - beta * _apply(phi, self.h)
        d_cross = mul_lower(d_phi.sum_to_size(phi.shape), self.q.basis.L_inv)  # φ = k L⁻ᵀ by rows
        self._pull([(block.cross, d_cross), (block.diag, -0.5 * b), (block.mean, d_mu)])

    def finish(self) -> tuple[float, list[Tensor]]:
        """Sum over ranks, add what comes through K_zz, the KL and the priors; return the value and the gradient."""
        basis, hyper = self.q.basis, self.hyper
        self.value, *self.gradient = self.ranks.sum(self.value, *self.gradient)
        d_Kzz = -0.5 * basis.L_inv.mT @ symmetrise(self.S) @ basis.L_inv
        eye = torch.eye(basis.num_inducing, dtype=torch.float64, device=basis.device)
        trace = d_Kzz.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
        d_Kzz = d_Kzz + basis.jitter * trace * eye  # the jitter is relative to the mean of the diagonal
        with torch.enable_grad():
            Z = basis.expand(hyper.Z.to(basis.dtype))
            Kzz = prior_covariance(hyper.kernel, Z)
            log_prior = hyper.log_prior()
        self._pull([(Kzz, d_Kzz), (log_prior, torch.ones_like(log_prior))])
        value = self.value - self.q.kl().sum() + log_prior.detach()
        value, *gradient = self.ranks.first(value, *self.gradient)  # which all decide by, to the last bit
        return float(value), gradient

    def _likelihood(self, rows: slice, data: Data, m: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Value, a and b of Σ E[log p] on some rows, and its gradient in the likelihood's own parameters."""
        data = data.rows(rows)
        multi = self.q.basis.num_outputs is not None
        m, v = m.detach(), v.detach()
        own = [self.parameters[i] for i in self.of_likelihood]
        with torch.enable_grad():
            m, v = m.requires_grad_(), v.requires_grad_()
            of_output = (m.mT, v.mT) if multi else (m, v)
            elp = expected_log_prob(self.hyper.likelihood, data.y, *of_output, **data.params).sum()
            a, d_v, *d_own = torch.autograd.grad(elp, [m, v, *own], allow_unused=True)
        self.value += elp.detach()
        for i, d in zip(self.of_likelihood, d_own, strict=True):
            if d is not None:
                self.gradient[i] += d
        found = a, -2.0 * d_v, m.detach()
        for store, values in zip(self.marginals, found, strict=True):
            store[..., rows] = values
        return found[:2]

    def _pull(self, pairs: list[tuple[Tensor | None, Tensor]]) -> None:
        """Add Σ ⟨adjoint, ∂tensor/∂θ⟩ to the gradient."""
        live = [(t, d) for t, d in pairs if t is not None and t.requires_grad]
        if not live:
            return
        tensors = [t for t, _ in live]
        adjoints = [d.to(t.dtype).sum_to_size(t.shape) for t, d in live]
        grads = torch.autograd.grad(tensors, self.parameters, adjoints, allow_unused=True, retain_graph=True)
        for total, g in zip(self.gradient, grads, strict=True):
            if g is not None:
                total += g


def _apply(matrix: Tensor, vector: Tensor) -> Tensor:
    """Matrix times vector, in the matrix's dtype, batched."""
    return (matrix @ vector.to(matrix.dtype).unsqueeze(-1)).squeeze(-1)


def _outer(left: Tensor, right: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return left.to(dtype).unsqueeze(-1) * right.to(dtype).unsqueeze(-2)
