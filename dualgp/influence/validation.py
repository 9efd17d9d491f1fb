"""What each datum does for the loss on other data: the gradient of a validation loss in the weights of the sites."""

from __future__ import annotations

from typing import Any

import torch
from gpytorch.likelihoods import Likelihood, SoftmaxLikelihood
from jaxtyping import Float
from torch import Tensor

from dualgp.checks import check_tensor
from dualgp.duals import check_targets, num_outputs_of
from dualgp.errors import InputError
from dualgp.influence.blocks import as_matrices, bare, check_sites
from dualgp.predictive import log_predictive
from dualgp.quadrature import expected_logsumexp
from dualgp.sites import Sites

_NUMBERS = 1 << 22  # in the covariances that are held at once


def validation_influence(
    q: Any,
    x: Tensor,
    sites: Sites,
    x_val: Tensor,
    y_val: Tensor,
    likelihood: Likelihood | None = None,
    **params: Tensor,
) -> Float[Tensor, "n"]:
    """Return −∂L/∂s_i, the fall of a validation loss L per weight s_i of each datum: positive where it helps.

    With the site of datum i to the power s_i, at s = 1: ∂m(x)/∂s_i = C_i α_i, ∂V(x)/∂s_i = −C_i B_i C_iᵀ, with C_i the
    parametric covariance of f(x) and f(x_i). L is the sum over validation data of −log E_q[p(y|f)]; for softmax of
    −E_q[log p(y|f)], at independent latents.

    Args:
        q: a fitted `DualGP`, a `NetworkPosterior` or a `Posterior`.
        x: inputs of the n data, [n, D] or [n, *input_shape].
        sites: their sites.
        x_val: validation inputs.
        y_val: their targets.
        likelihood: of the validation data; that of q if None.
        params: its parameters for each validation datum, such as `noise`.

    Raises:
        InputError: if shapes do not fit, or targets the likelihood.

    Source: Koh & Liang 2017 (influence functions), with the posterior's mean and variance in place of weights.

    Example:
        >>> from dualgp import InducingBasis, Posterior; from gpytorch.kernels import RBFKernel
        >>> from gpytorch.likelihoods import GaussianLikelihood
        >>> x, sites = torch.tensor([[0.0], [0.1]]), Sites(torch.tensor([2.0, -2.0]), torch.tensor([1.0, 1.0]))
        >>> q = Posterior(InducingBasis(RBFKernel(), x)).add(x, sites)
        >>> found = validation_influence(q, x, sites, torch.zeros(1, 1), torch.tensor([2.0]), GaussianLikelihood())
        >>> found > 0  # the first agrees with the validation datum
        tensor([ True, False])
    """
    check_sites(x, sites)
    likelihood = q.likelihood if likelihood is None else likelihood
    posterior = bare(q)
    for name, value in (("x_val", x_val), ("y_val", y_val)):
        check_tensor(name, value)
    if not (x_val.ndim and y_val.ndim) or len(x_val) != len(y_val) or not len(x_val):
        raise InputError(
            f"Expected validation targets for each input, got {tuple(y_val.shape)} for {tuple(x_val.shape)}."
        )
    check_targets(likelihood, y_val)
    d_mean, d_var = _gradients(posterior, likelihood, x_val, y_val, params)  # [v, C]
    C = d_mean.shape[-1]
    step = max(1, _NUMBERS // (len(x_val) * C * C))
    parts = []
    for start in range(0, len(x), step):
        rows = slice(start, start + step)
        with torch.no_grad():
            mean = posterior.function_blocks(x[rows])[0]
            lam, B = (t.to(mean) for t in as_matrices(sites[rows]))
            alpha = lam - (B @ mean.unsqueeze(-1)).squeeze(-1)
            across = posterior.function_cross(x[rows], x_val)  # [n, C, v, C]
            pull = torch.einsum("ncvd,vd->nc", across, d_mean)
            inner = torch.einsum("ncvd,nck,nkvd->nvd", across, B, across)
            parts.append(-(pull * alpha).sum(-1) + torch.einsum("nvd,vd->n", inner, d_var))
    return torch.cat(parts)


def _gradients(
    posterior: Any, likelihood: Likelihood, x: Tensor, y: Tensor, params: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """∂L/∂m and ∂L/∂v at the validation data, [v, C]."""
    with torch.no_grad():
        mean, cov = posterior.predict_blocks(x)
    m = mean.double().requires_grad_()
    v = cov.double().diagonal(dim1=-2, dim2=-1).clone().requires_grad_()
    with torch.enable_grad():
        if isinstance(likelihood, SoftmaxLikelihood):
            loss = expected_logsumexp(m, v).sum() - m.gather(-1, y.long().unsqueeze(-1)).sum()
        else:
            several = num_outputs_of(likelihood) is not None or y.ndim > 1
            if (several and y.shape != m.shape) or (not several and m.shape[-1] != 1):
                raise InputError(f"Expected validation targets of {m.shape[-1]} outputs, got {tuple(y.shape)}.")
            at = (m, v) if several else (m.squeeze(-1), v.squeeze(-1))
            loss = -log_predictive(likelihood, y, *at, **params).sum()
    d_mean, d_var = torch.autograd.grad(loss, (m, v))
    return d_mean, d_var
