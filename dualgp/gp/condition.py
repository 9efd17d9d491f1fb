"""A posterior given more data, as a value in function space: exact in those data, batched, differentiable in x.

What data in memory say may be asked again beside the new ones. They act on φᵀw, as in the posterior, whose sites of
theirs change by (Δλ, Δβ); new data act on f itself. Latents are those of memory first, and then f(X).
"""

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
from dualgp.gp.memory import Memory
from dualgp.linalg import symmetrise
from dualgp.posterior import Posterior
from dualgp.sites import Sites

_MAX_PASSES = 500
_ADJOINT_PASSES = 100


class Recalled(NamedTuple):
    """Data in memory as the base has them: what they say, and φᵀw at their inputs, data last.

    Attributes:
        memory: k data with their sites.
        half: C⁻¹φ, [*b, k, M].
        mean: of f.
        residual: r = k − φᵀφ, that part of the variance of f which is not in w.
    """

    memory: Memory
    half: Tensor
    mean: Tensor
    residual: Tensor

    @classmethod
    def of(cls, base: Posterior, memory: Memory) -> Recalled:
        """Read memory at the base."""
        basis = base.basis
        features = basis.features(memory.data.x)
        half = base.halves(memory.data.x)
        shape = half.shape[:-1]
        return cls(memory, half, base.marginals(features)[0].expand(shape), features.residual.expand(shape))


def _latents(base: Posterior, x: Tensor, recalled: Recalled | None, extra: int = 0) -> tuple[Tensor, Tensor]:
    """Mean and covariance of what data act on, after `extra` rows of x that none do."""
    mean, cov = base.joint(x)
    if recalled is None:
        return mean, cov
    half, batch = base.halves(x), mean.shape[:-1]
    cross = (recalled.half @ half.mT).expand(*batch, -1, -1)  # [*b, k, T]
    own = (recalled.half @ recalled.half.mT).expand(*batch, -1, -1)
    first, last = slice(None, extra), slice(extra, None)
    rows = [
        [cov[..., first, first], cross[..., first].mT, cov[..., first, last]],
        [cross[..., first], own, cross[..., last]],
        [cov[..., last, first], cross[..., last].mT, cov[..., last, last]],
    ]
    means = [mean[..., first], recalled.mean.expand(*batch, -1), mean[..., last]]
    return torch.cat(means, -1), torch.cat([torch.cat(row, -1) for row in rows], -2)


class Conditioned:
    """q(f) ∝ base(f) Π tᵢ(fᵢ): a posterior with sites on f(X) itself, not on the features of X.

    With m, V the base's joint at X:  mean(x) = m(x) + K (I + ΛV)⁻¹(λ − Λm),  cov = k − K (I + ΛV)⁻¹ΛKᵀ,  K = cov(x, X):
    what a dual GP whose Z takes in X gives.

    Args:
        base: the posterior before.
        x: X [*b, n, D].
        sites: of the data, [*b, n] or [*b, n, C].
        recalled: data of the base whose sites have changed, and by what, as sites [*b, k] or [*b, k, C].

    Source: Maddox et al. 2021 (online variational conditioning), in dual form.
    """

    def __init__(
        self, base: Posterior, x: Tensor, sites: Sites, recalled: tuple[Recalled, Sites] | None = None
    ) -> None:
        self.base, self.x, self.sites, self.recalled = base, x, sites, recalled

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
        self.base.basis.check_inputs(x)
        n, t = self.x.shape[-2], x.shape[-2]
        batch = torch.broadcast_shapes(x.shape[:-2], self.x.shape[:-2])
        both = torch.cat([x.expand(*batch, t, -1), self.x.expand(*batch, n, -1)], -2)
        mean, cov = _latents(self.base, both, self.recalled and self.recalled[0], t)
        sites = self.sites if self.recalled is None else Sites.cat([self.recalled[1], self.sites])
        lam, beta = sites.by_latent()
        m, V, K = mean[..., t:], cov[..., t:, t:], cov[..., :t, t:]
        return _given(mean[..., :t], cov[..., :t, :t], K, m, V, lam, beta)


def _given(
    mean: Tensor, cov: Tensor, K: Tensor, m: Tensor, V: Tensor, lam: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor]:
    inner = torch.eye(m.shape[-1], dtype=m.dtype, device=m.device) + beta.unsqueeze(-1) * V  # I + ΛV
    right = torch.cat([(lam - beta * m).unsqueeze(-1), beta.unsqueeze(-1) * K.mT], -1)
    solved = torch.linalg.solve(inner, right)
    return mean + (K @ solved[..., :1]).squeeze(-1), cov - K @ solved[..., 1:]


def condition(base: Posterior, likelihood: Likelihood, data: Data, memory: Memory | None = None) -> Conditioned:
    """Return `base` given data, their sites found by natural gradients (one step for Gaussian likelihoods).

    Steps are halved, for each process by itself, where the bound would fall. A gradient in X is that of the optimum, by
    the implicit function theorem; a softmax likelihood's sites are held fixed there.

    Args:
        base: the posterior before.
        likelihood: of the data.
        data: the new ones.
        memory: data whose sites are in `base`, to be found anew beside the new ones; all others stay as they are.
    """
    sites = gaussian_sites(likelihood, data)
    if sites is not None:
        return Conditioned(base, data.x, sites)
    multi = base.basis.num_outputs is not None
    if not len(data):
        mean = base.joint(data.x)[0]
        return Conditioned(base, data.x, Sites.from_latent(mean, mean, multi))
    recalled = None if memory is None else Recalled.of(base, memory)
    at = _At.of(base, likelihood, data, recalled)
    with torch.no_grad():
        lam, beta, lr = at.optimum()
    if torch.is_grad_enabled() and at.m.requires_grad and not isinstance(likelihood, SoftmaxLikelihood):
        lam, beta = at.differentiable(lam, beta, lr)
    sites = Sites.from_latent(lam, beta, multi)
    if recalled is None:
        return Conditioned(base, data.x, sites)
    k = len(recalled.memory)
    return Conditioned(base, data.x, sites[k:], (recalled, sites[:k]))


class _Duals(NamedTuple):
    """What q asks for, data last, and the bound there, one number per process."""

    lam: Tensor
    beta: Tensor
    elbo: Tensor


class _At(NamedTuple):
    """What data act on under the base: mean m and covariance V, data last, and what is observed there.

    Attributes:
        base: the posterior before.
        likelihood: of the data.
        y: targets, those in memory first.
        params: per-datum parameters of the likelihood.
        m: [*b, k + n], or [*b, C, k + n].
        V: [*b, k + n, k + n], or with C.
        residual: variance of f beside that of the latent: r in memory, 0 for new data, like m.
        old: sites (λ, β) that are in the base, like m.
        weights: of the data, [k + n].
    """

    base: Posterior
    likelihood: Likelihood
    y: Tensor
    params: dict[str, Tensor]
    m: Tensor
    V: Tensor
    residual: Tensor
    old: tuple[Tensor, Tensor]
    weights: Tensor

    @classmethod
    def of(cls, base: Posterior, likelihood: Likelihood, data: Data, recalled: Recalled | None) -> _At:
        m, V = _latents(base, data.x, recalled)
        none = torch.zeros_like(m[..., m.shape[-1] - len(data) :])
        if recalled is None:
            return cls(base, likelihood, data.y, data.params, m, V, none, (none, none), data.all_weights())
        memory, of_data = recalled.memory, -2 if data.targets_multi else -1
        told = memory.data.y.to(data.y)
        y = torch.cat([told.expand(*data.y.shape[:of_data], *told.shape[of_data:]), data.y], of_data)
        parts = [
            torch.cat([t.expand(*m.shape[:-1], -1), none], -1) for t in (recalled.residual, *memory.sites.by_latent())
        ]
        weights = torch.cat([memory.data.all_weights(), data.all_weights()])
        return cls(base, likelihood, y, {}, m, V, parts[0], (parts[1], parts[2]), weights)

    def duals(self, lam: Tensor, beta: Tensor, find: Callable[..., DualParameters]) -> _Duals:
        """Changes of sites that base · Δ asks for, and the bound there.

        E_q[log p] − E_q[log t_old] − KL(q ‖ base),  KL = E_q[log Δ] − log ∫ base · Δ.
        """
        m, V = self.m, self.V
        mean, cov = _given(m, V, V, m, V, lam, beta)
        var = cov.diagonal(dim1=-2, dim2=-1)
        by_output, multi = self.base.by_output, self.base.basis.num_outputs is not None
        f_var = (var + self.residual).clamp_min(1e-12)
        found = find(self.likelihood, self.y, by_output(mean), by_output(f_var), **self.params)
        asked = Sites(found.alpha + found.beta * by_output(mean), found.beta, multi).by_latent()
        eye = torch.eye(m.shape[-1], dtype=m.dtype, device=m.device)
        sign, logdet = torch.linalg.slogdet(eye + beta.unsqueeze(-1) * V)
        gain = ((lam - beta * m) * (mean - m)).sum(-1) - logdet  # 2 log ∫ base · Δ, but for terms linear in m
        log_z = (lam * m - 0.5 * beta * m.square()).sum(-1) + 0.5 * gain
        # log t_old and log Δ under q, of all that was and of all that has changed
        lam_all, beta_all = lam + self.old[0], beta + self.old[1]
        log_t = (lam_all * mean - 0.5 * beta_all * (mean.square() + var)).sum(-1)
        elp = found.expected_log_prob
        elp = self.weights * (elp if elp.ndim == mean.ndim - multi else elp.sum(-1))
        kl = log_t - log_z
        elbo = elp.sum(-1) - (kl.sum(-1) if multi else kl)
        gaussian = (sign > 0) & (var > 0).all(-1)
        lam, beta = (self.weights * a - old for a, old in zip(asked, self.old, strict=True))
        return _Duals(lam, beta, torch.where(gaussian.all(-1) if multi else gaussian, elbo, -torch.inf))

    def optimum(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the changes of greatest bound and the step size that leads there."""
        longest = 2.0 / 3.0 if isinstance(self.likelihood, SoftmaxLikelihood) else 1.0
        lam, beta = torch.zeros_like(self.m), torch.zeros_like(self.m)
        best = self.duals(lam, beta, dual_parameters)
        lr = torch.full(best.elbo.shape, longest, dtype=self.m.dtype, device=self.m.device)
        for _ in range(_MAX_PASSES):
            step = self._wide(lr) * (best.lam - lam), self._wide(lr) * (best.beta - beta)
            if _small(step[0], best.lam) and _small(step[1], best.beta):
                break
            new = self.duals(lam + step[0], beta + step[1], dual_parameters)
            rises = new.elbo >= best.elbo - 1e-10 * (1.0 + best.elbo.abs())
            wide = self._wide(rises)
            lam, beta = torch.where(wide, lam + step[0], lam), torch.where(wide, beta + step[1], beta)
            best = _Duals(
                torch.where(wide, new.lam, best.lam),
                torch.where(wide, new.beta, best.beta),
                torch.where(rises, new.elbo, best.elbo),
            )
            lr = torch.where(rises, (2.0 * lr).clamp_max(longest), 0.5 * lr)
        else:
            warnings.warn("The sites of new data have not converged.", ConvergenceWarning, stacklevel=4)
        return lam, beta, self._wide(lr)

    def differentiable(self, lam: Tensor, beta: Tensor, lr: Tensor) -> tuple[Tensor, Tensor]:
        """Return the optimum s = F(s, X) with its gradient, ∂s/∂X = (1 − ∂F/∂s)⁻¹ ∂F/∂X, F a step of size `lr`.

        Backwards that is u = g + (∂F/∂s)ᵀu, iterated: products with one step's graph, not the graphs of many.
        """
        optimum = torch.stack([lam, beta])
        held = optimum.clone().requires_grad_()
        image = self._replace(m=self.m.detach(), V=self.V.detach())._step(held, lr)

        def adjoint(g: Tensor) -> Tensor:
            u = g
            for _ in range(_ADJOINT_PASSES):
                change = g + torch.autograd.grad(image, held, u, retain_graph=True)[0] - u
                u = u + change
                if _small(change, u):
                    break
            return u

        found = self._step(optimum, lr)
        found.register_hook(adjoint)
        return found[0], found[1]

    def _step(self, s: Tensor, lr: Tensor) -> Tensor:
        found = self.duals(s[0], s[1], differentiable_dual_parameters)
        return s + lr * (torch.stack([found.lam, found.beta]) - s)

    def _wide(self, values: Tensor) -> Tensor:
        return values[..., None, None] if self.base.basis.num_outputs is not None else values[..., None]


def _small(step: Tensor, of: Tensor) -> bool:
    return float(step.abs().max()) <= 1e-11 * (1.0 + float(of.abs().max()))
