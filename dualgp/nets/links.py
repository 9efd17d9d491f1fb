"""From a Gaussian on logits to class probabilities: links that see only what a softmax sees.

softmax(f + s·1) = softmax(f), and sites of a softmax know nothing of f along 1, so that a posterior keeps its prior
variance there. What counts is Hf and HVH with H = I − 11ᵀ/C.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from gpytorch.likelihoods import Likelihood, SoftmaxLikelihood
from jaxtyping import Float
from torch import Tensor

from dualgp.draws import normal
from dualgp.duals import conditional_log_prob, gaussian_noise
from dualgp.errors import InputError, check_count

Link = Literal["probit", "mc", "bridge"]
_NUMBERS = 1 << 22  # in the draws that are held at once


def class_log_probs(
    mean: Float[Tensor, "n c"],
    cov: Float[Tensor, "n c c"],
    link: Link = "probit",
    *,
    num_samples: int = 1000,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "n c"]:
    """Return log E[softmax(f)] for f ~ N(mean, cov), approximately.

    "probit": softmax((Hm)_c / √(1 + π/8 · C/(C − 1) · [HVH]_cc)); for V = vI this is the usual multiclass probit.
    "mc": the average over draws of Hf, the same ones for every datum, in pairs ±ε.
    "bridge": the mean of the Dirichlet that the Laplace bridge makes of f | Σf = 0, as in laplace-torch.

    Args:
        mean: means of the logits.
        cov: covariances between the logits of a datum.
        link: "probit", "mc" or "bridge".
        num_samples: draws, for "mc".
        generator: of the draws; a fixed seed if None.

    Raises:
        InputError: if the link is unknown, or num_samples no whole number ≥ 1.

    Source: MacKay 1992, Gibbs 1997 (probit); Hobbhahn et al. 2022 (bridge). Centring is this package's own.

    Example:
        >>> certain, shifted = torch.zeros(1, 2, 2), 1e6 * torch.ones(1, 2, 2)
        >>> mean = torch.tensor([[1.0, 0.0]])
        >>> torch.equal(class_log_probs(mean, certain), class_log_probs(mean, shifted))
        True
    """
    if link not in get_args(Link):
        raise InputError(f"link must be one of {get_args(Link)}, got {link!r}.")
    check_count("num_samples", num_samples, 1)
    C = mean.shape[-1]
    if link == "bridge":
        return _bridge(mean, cov)
    mean = mean - mean.mean(-1, keepdim=True)
    cov = cov - cov.mean(-1, keepdim=True)  # HVH: rows, then columns
    cov = cov - cov.mean(-2, keepdim=True)
    if link == "probit":
        var = cov.diagonal(dim1=-2, dim2=-1).clamp_min(0.0) * (C / max(C - 1, 1))
        return (mean / (1.0 + torch.pi / 8.0 * var).sqrt()).log_softmax(-1)
    values, vectors = torch.linalg.eigh(cov)
    root = vectors * values.clamp_min(0.0).sqrt().unsqueeze(-2) @ vectors.mT  # symmetric: continuous in V
    generator = torch.Generator(mean.device).manual_seed(0) if generator is None else generator
    half = normal(((num_samples + 1) // 2, C), mean, generator)
    noise = torch.cat([half, -half])
    step = max(1, _NUMBERS // noise.numel())
    parts = [
        (m.unsqueeze(1) + noise @ r).log_softmax(-1).logsumexp(1) - math.log(len(noise))
        for m, r in zip(mean.split(step), root.split(step), strict=True)
    ]
    return torch.cat(parts) if parts else mean


def _bridge(mean: Tensor, cov: Tensor) -> Tensor:
    """α_c = (1 − 2/C + e^{f_c} Σ e^{−f} / C²) / V_cc of f given Σf = 0, normalised; in logarithms."""
    C = mean.shape[-1]
    row = cov.sum(-1)
    total = row.sum(-1, keepdim=True).clamp_min(torch.finfo(cov.dtype).tiny)
    mean = mean - row * mean.sum(-1, keepdim=True) / total
    var = cov.diagonal(dim1=-2, dim2=-1) - row.square() / total
    ratio = mean + torch.logsumexp(-mean, -1, keepdim=True) - 2.0 * math.log(C)
    alpha = torch.logaddexp(ratio, (torch.ones_like(ratio) * (1.0 - 2.0 / C)).log()) - var.clamp_min(1e-30).log()
    return alpha.log_softmax(-1)


def log_prob(likelihood: Likelihood, y: Tensor, f: Tensor, **params: Tensor) -> Tensor:
    """Return log p(y_i|f_i) in float64 with the shape of y, [n] or [n, C], for f [n, C]."""
    f = f.double()
    if isinstance(likelihood, SoftmaxLikelihood):
        return f.log_softmax(-1).gather(-1, y.long().unsqueeze(-1)).squeeze(-1)
    f = f.reshape(y.shape)
    noise = gaussian_noise(likelihood, **params)
    if noise is not None:
        return torch.distributions.Normal(f, noise.double().sqrt()).log_prob(y.double())
    return conditional_log_prob(likelihood, y.double(), f, **params)
