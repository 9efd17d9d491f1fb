"""A posterior given more data, as a value in function space: exact in those data, batched, differentiable in x."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from gpytorch.likelihoods import Likelihood, SoftmaxLikelihood
from linear_operator import to_linear_operator
from torch import Tensor

from dualgp.duals import DualParameters, differentiable_dual_parameters, dual_parameters
from dualgp.errors import ConvergenceWarning
from dualgp.gp.data import Data, gaussian_sites
from dualgp.linalg import symmetrise
from dualgp.posterior import Posterior
from dualgp.sites import Sites

_MAX_PASSES = 500
_UNROLLED = 30


class Conditioned:
    """q(f) ∝ base(f) Π tᵢ(fᵢ): a posterior with sites on f(X) itself, not on the features of X.

    With m, V the base's joint at X:  mean(x) = m(x) + K (I + ΛV)⁻¹(λ − Λm),  cov = k − K (I + ΛV)⁻¹ΛKᵀ,  K = cov(x, X):
    what a dual GP whose Z takes in X gives.

    Args:
        base: the posterior before.
        x: X [*b, n, D].
        sites: of the data, [*b, n] or [*b, n, C].

    Source: Maddox et al. 2021 (online variational conditioning), in dual form.
    """

    def __init__(self, base: Posterior, x: Tensor, sites: Sites) -> None:
        self.base, self.x, self.sites = base, x, sites

    def predict(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance of f(x), each [*b, T] or [*b, T, C]; differentiable in x and in X."""
        mean, cov = self.joint(x)
        var = cov.diagonal(dim1=-2, dim2=-1).clamp_min(0.0)
        mean, var = (self.base.by_output(t).to(self.base.basis.dtype) for t in (mean, var))
        return mean, var

    def predict_joint(self, x: Tensor) -> MultivariateNormal:
        """Return the joint Gaussian of f(x); multitask for C outputs."""
        dtype = self.base.basis.dtype
        mean, cov = self.joint(x)
        joint = MultivariateNormal(mean.to(dtype), to_linear_operator(symmetrise(cov).to(dtype)))
        return joint if self.base.basis.num_outputs is None else MultitaskMultivariateNormal.from_batch_mvn(joint)

    def joint(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean [*b, T] and covariance [*b, T, T] of f(x) in float64, outputs (if any) before the data."""
        n, t = self.x.shape[-2], x.shape[-2]
        batch = torch.broadcast_shapes(x.shape[:-2], self.x.shape[:-2])
        both = torch.cat([x.expand(*batch, t, -1), self.x.expand(*batch, n, -1)], -2)
        mean, cov = self.base.joint(both)
        lam, beta = self.sites.by_latent()
        m, V, K = mean[..., t:], cov[..., t:, t:], cov[..., :t, t:]
        return _given(mean[..., :t], cov[..., :t, :t], K, m, V, lam, beta)


def _given(
    mean: Tensor, cov: Tensor, K: Tensor, m: Tensor, V: Tensor, lam: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor]:
    inner = torch.eye(m.shape[-1], dtype=m.dtype, device=m.device) + beta.unsqueeze(-1) * V  # I + ΛV
    right = torch.cat([(lam - beta * m).unsqueeze(-1), beta.unsqueeze(-1) * K.mT], -1)
    solved = torch.linalg.solve(inner, right)
    return mean + (K @ solved[..., :1]).squeeze(-1), cov - K @ solved[..., 1:]


def condition(base: Posterior, likelihood: Likelihood, data: Data) -> Conditioned:
    """Return `base` given data, their sites found by natural gradients (one step for Gaussian likelihoods).

    Steps are halved, for each process by itself, where the bound would fall. With a gradient in X, steps from the
    optimum are differentiated until they change nothing; a softmax likelihood's sites are held fixed there.
    """
    sites = gaussian_sites(likelihood, data)
    if sites is not None:
        return Conditioned(base, data.x, sites)
    at = _At(base, likelihood, data, *base.joint(data.x))
    multi = base.basis.num_outputs is not None
    if not len(data):
        return Conditioned(base, data.x, Sites.from_latent(at.m, at.m, multi))
    with torch.no_grad():
        lam, beta, lr = at.optimum()
    if torch.is_grad_enabled() and at.m.requires_grad and not isinstance(likelihood, SoftmaxLikelihood):
        for _ in range(_UNROLLED):
            found = at.duals(lam, beta, differentiable_dual_parameters)
            lam, beta = lam + lr * (found.lam - lam), beta + lr * (found.beta - beta)
    return Conditioned(base, data.x, Sites.from_latent(lam, beta, multi))


class _Duals(NamedTuple):
    """What q(f(X)) asks for, data last, and the bound there, one number per process."""

    lam: Tensor
    beta: Tensor
    elbo: Tensor


class _At(NamedTuple):
    """The base at X: mean m and covariance V, data last, and what is observed there."""

    base: Posterior
    likelihood: Likelihood
    data: Data
    m: Tensor
    V: Tensor

    def duals(self, lam: Tensor, beta: Tensor, find: Callable[..., DualParameters]) -> _Duals:
        """Duals at base · sites, and E_q[log p] − KL(q ‖ base) = E_q[log p] − E_q[log t] + log ∫ base · t."""
        m, V = self.m, self.V
        mean, cov = _given(m, V, V, m, V, lam, beta)
        var = cov.diagonal(dim1=-2, dim2=-1)
        by_output, multi = self.base.by_output, self.base.basis.num_outputs is not None
        found = find(self.likelihood, self.data.y, by_output(mean), by_output(var.clamp_min(1e-12)), **self.data.params)
        sites = Sites(found.alpha + found.beta * by_output(mean), found.beta, multi).by_latent()
        eye = torch.eye(m.shape[-1], dtype=m.dtype, device=m.device)
        sign, logdet = torch.linalg.slogdet(eye + beta.unsqueeze(-1) * V)
        gain = ((lam - beta * m) * (mean - m)).sum(-1) - logdet  # 2 log ∫ base · t, but for terms linear in m
        log_z = (lam * m - 0.5 * beta * m.square()).sum(-1) + 0.5 * gain
        log_t = (lam * mean - 0.5 * beta * (mean.square() + var)).sum(-1)
        kl = log_t - log_z
        elp = found.expected_log_prob
        elp = elp.sum(-1) if elp.ndim == self.data.x.ndim - 1 else elp.sum((-2, -1))
        elbo = elp - (kl.sum(-1) if multi else kl)
        gaussian = (sign > 0) & (var > 0).all(-1)
        return _Duals(*sites, torch.where(gaussian.all(-1) if multi else gaussian, elbo, -torch.inf))

    def optimum(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the sites of greatest bound and the step size that leads there."""
        longest = 2.0 / 3.0 if isinstance(self.likelihood, SoftmaxLikelihood) else 1.0
        multi = self.base.basis.num_outputs is not None
        lam, beta = torch.zeros_like(self.m), torch.zeros_like(self.m)
        best = self.duals(lam, beta, dual_parameters)
        lr = torch.full(best.elbo.shape, longest, dtype=self.m.dtype, device=self.m.device)

        def wide(values: Tensor) -> Tensor:
            return values[..., None, None] if multi else values[..., None]

        for _ in range(_MAX_PASSES):
            step = wide(lr) * (best.lam - lam), wide(lr) * (best.beta - beta)
            if _small(step[0], best.lam) and _small(step[1], best.beta):
                break
            new = self.duals(lam + step[0], beta + step[1], dual_parameters)
            rises = new.elbo >= best.elbo - 1e-10 * (1.0 + best.elbo.abs())
            lam = torch.where(wide(rises), lam + step[0], lam)
            beta = torch.where(wide(rises), beta + step[1], beta)
            best = _Duals(
                torch.where(wide(rises), new.lam, best.lam),
                torch.where(wide(rises), new.beta, best.beta),
                torch.where(rises, new.elbo, best.elbo),
            )
            lr = torch.where(rises, (2.0 * lr).clamp_max(longest), 0.5 * lr)
        else:
            warnings.warn("The sites of new data have not converged.", ConvergenceWarning, stacklevel=4)
        return lam, beta, wide(lr)


def _small(step: Tensor, of: Tensor) -> bool:
    return float(step.abs().max()) <= 1e-11 * (1.0 + float(of.abs().max()))
