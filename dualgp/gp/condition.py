"""A posterior given more data, as a value in function space: exact in those data, batched, differentiable in x."""

from __future__ import annotations

import torch
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from gpytorch.likelihoods import Likelihood, SoftmaxLikelihood
from linear_operator import to_linear_operator
from torch import Tensor

from dualgp.duals import differentiable_dual_parameters, dual_parameters
from dualgp.gp.data import Data, gaussian_sites
from dualgp.linalg import symmetrise
from dualgp.posterior import Posterior
from dualgp.sites import Sites

_MAX_PASSES = 100


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
        mean, cov = self._joint(x)
        var = cov.diagonal(dim1=-2, dim2=-1).clamp_min(0.0)
        mean, var = (self.base.by_output(t).to(self.base.basis.dtype) for t in (mean, var))
        return mean, var

    def predict_joint(self, x: Tensor) -> MultivariateNormal:
        """Return the joint Gaussian of f(x); multitask for C outputs."""
        dtype = self.base.basis.dtype
        mean, cov = self._joint(x)
        joint = MultivariateNormal(mean.to(dtype), to_linear_operator(symmetrise(cov).to(dtype)))
        return joint if self.base.basis.num_outputs is None else MultitaskMultivariateNormal.from_batch_mvn(joint)

    def _joint(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and covariance at x, in float64, data last."""
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

    With a gradient in X every step is differentiated; a softmax likelihood's sites are held fixed there.
    """
    sites = gaussian_sites(likelihood, data)
    if sites is not None:
        return Conditioned(base, data.x, sites)
    m, V = base.joint(data.x)
    lr = 2.0 / 3.0 if isinstance(likelihood, SoftmaxLikelihood) else 1.0
    lam, beta = torch.zeros_like(m), torch.zeros_like(m)
    multi = base.basis.num_outputs is not None
    graph = torch.is_grad_enabled() and m.requires_grad and not isinstance(likelihood, SoftmaxLikelihood)
    find = differentiable_dual_parameters if graph else dual_parameters
    for _ in range(_MAX_PASSES):
        mean, cov = _given(m, V, V, m, V, lam, beta)
        marginals = (base.by_output(t) for t in (mean, cov.diagonal(dim1=-2, dim2=-1).clamp_min(1e-12)))
        duals = find(likelihood, data.y, *marginals, **data.params)
        found = Sites(duals.alpha + duals.beta * base.by_output(mean), duals.beta, multi).by_latent()
        before = lam
        lam, beta = (1.0 - lr) * lam + lr * found[0], (1.0 - lr) * beta + lr * found[1]
        if float((lam - before).detach().abs().max()) < 1e-10 * (1.0 + float(lam.detach().abs().max())):
            break
    return Conditioned(base, data.x, Sites.from_latent(lam, beta, multi))
