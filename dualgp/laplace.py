"""Sites at a point: the Laplace limit of the dual parameters, where q(f) shrinks to one function value.

    α = ∂ log p(y|f),        β = −∂² log p(y|f),        λ = α + βf

| likelihood | α | β |
|---|---|---|
| Gaussian, fixed noise, multitask Gaussian of rank 0 | (y − f)/σ² | 1/σ² |
| Bernoulli probit, s = 2y − 1, z = sf, r = φ(z)/Φ(z) | s r | r(r + z) |
| Bernoulli logit, p = 1/(1 + e^{−f}) | y − p | p(1 − p) |
| softmax, p = softmax(f) | e_y − p | diag(p) − ppᵀ, with root diag(√p)(I − √p√pᵀ) |
| Poisson with rate e^f | y − e^f | e^f |
| Student-t, Laplace, beta: not log-concave, or without curvature | autograd | Fisher information |
| any other one-dimensional GPyTorch likelihood | autograd | autograd, and 0 where that is negative |
"""

from __future__ import annotations

import torch
from gpytorch.likelihoods import (
    BernoulliLikelihood,
    BetaLikelihood,
    LaplaceLikelihood,
    Likelihood,
    SoftmaxLikelihood,
    StudentTLikelihood,
)
from gpytorch.likelihoods.likelihood import _OneDimensionalLikelihood
from torch import Tensor

from dualgp.checks import check_tensor
from dualgp.duals import (
    check_likelihood,
    check_targets,
    conditional_log_prob,
    gaussian_noise,
    num_outputs_of,
)
from dualgp.errors import InputError, UnsupportedError
from dualgp.likelihoods import LogitBernoulliLikelihood, LogPoissonLikelihood
from dualgp.sites import Sites

_SQRT_2_OVER_PI = 0.7978845608028654


@torch.no_grad()
def laplace_sites(likelihood: Likelihood, y: Tensor, f: Tensor, **params: Tensor) -> Sites:
    """Return the sites that expand log p(y_i|f) to second order at the function values f_i, in float64.

    λ = α + βf with the α and β of the table above. A softmax likelihood's are coupled, with their exact root; every
    other β is one number per output, so that B = Σ φᵢᵀβᵢφᵢ ⪰ 0 always.

    Where the likelihood is not log-concave, β is a surrogate that keeps this: for Student-t, Laplace and beta
    likelihoods the Fisher information E_p(y|f)[(∂ log p)²]; for others autograd's β, with 0 in place of a negative one.
    α is exact always, so a mode stays one.

    Args:
        likelihood: a Gaussian, softmax or one-dimensional GPyTorch likelihood.
        y: targets [N], or [N, C] for several outputs each with its own (softmax: classes [N]).
        f: function values [N] or [N, C]; [N, 1] with y [N] is one output.
        params: per-datum parameters (`noise=` for FixedNoiseGaussianLikelihood).

    Raises:
        UnsupportedError: if the likelihood has no conditional p(y_i|f_i) to expand.
        InputError: if shapes do not fit, f is not finite, or a target cannot be.

    Source: Khan et al. 2019 (DNN2GP), § 3; generalised Gauss–Newton in f.

    Example:
        >>> s = laplace_sites(LogitBernoulliLikelihood(), torch.ones(1), torch.zeros(1))
        >>> s.lam.item(), s.beta.item()
        (0.5, 0.25)
    """
    check_likelihood(likelihood)
    noise = gaussian_noise(likelihood, **params)
    softmax = type(likelihood) is SoftmaxLikelihood
    if noise is None and not softmax and not isinstance(likelihood, _OneDimensionalLikelihood):
        raise UnsupportedError(
            f"{type(likelihood).__name__} has no conditional p(y_i|f_i) of one function value to expand; derive it "
            "from gpytorch's _OneDimensionalLikelihood, or build dualgp.Sites from your own α and β."
        )
    if not softmax and f.ndim == y.ndim + 1 and f.shape[-1] == 1:  # one output with a dimension of its own
        y, params = y.unsqueeze(-1), {name: value.unsqueeze(-1) for name, value in params.items()}
        noise = gaussian_noise(likelihood, **params)
    _check(likelihood, y, f)
    f, y = f.detach().double(), y.detach()
    if softmax:
        return _softmax(y.long(), f)
    alpha, beta = _elementwise(likelihood, y.double(), f, noise, params)
    return Sites(alpha + beta * f, beta, multi_output=f.ndim == 2)


def _check(likelihood: Likelihood, y: Tensor, f: Tensor) -> None:
    check_tensor("y", y)
    check_tensor("f", f)
    outputs = num_outputs_of(likelihood)
    want = f.shape[:-1] if type(likelihood) is SoftmaxLikelihood else f.shape
    if f.ndim not in (1, 2) or y.shape != want or (outputs is not None and f.shape[-1:] != (outputs,)):
        expected = "[N] or [N, C]" if outputs is None else f"[N, {outputs}]"
        raise InputError(
            f"{type(likelihood).__name__} expects f {expected} and y to match, got f {tuple(f.shape)} and y "
            f"{tuple(y.shape)}."
        )
    if not bool(f.isfinite().all()):
        raise InputError("Function values must be finite, but f holds NaN or infinity.")
    check_targets(likelihood, y)


def _softmax(y: Tensor, f: Tensor) -> Sites:
    """B = diag(p) − ppᵀ = RRᵀ with R = diag(√p)(I − √p√pᵀ), since |√p| = 1."""
    p = f.softmax(-1)
    alpha = torch.nn.functional.one_hot(y, f.shape[-1]) - p
    s = p.sqrt()
    eye = torch.eye(f.shape[-1], dtype=f.dtype, device=f.device)
    root = s.unsqueeze(-1) * (eye - s.unsqueeze(-1) * s.unsqueeze(-2))
    beta = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
    return Sites(alpha + (beta @ f.unsqueeze(-1)).squeeze(-1), beta, multi_output=True, root=root)


def _elementwise(
    likelihood: Likelihood, y: Tensor, f: Tensor, noise: Tensor | None, params: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """α and β of the shape of f."""
    if noise is not None:
        beta = (1.0 / noise.double()).expand(f.shape)
        return (y - f) * beta, beta
    kind = type(likelihood)
    if kind is BernoulliLikelihood:
        s = 2.0 * y - 1.0
        z = s * f
        r = _SQRT_2_OVER_PI / torch.special.erfcx(-z / 2**0.5)  # φ(z)/Φ(z), to rounding in both tails
        return s * r, (r * (r + z)).clamp(0.0, 1.0)
    if kind is LogitBernoulliLikelihood:
        return y - f.sigmoid(), f.sigmoid() * (-f).sigmoid()
    if kind is LogPoissonLikelihood:
        return y - f.exp(), f.exp()
    alpha, beta = _derivatives(likelihood, y, f, params)
    fisher = _fisher(likelihood, f)
    return alpha, beta.clamp_min(0.0) if fisher is None else fisher.expand(f.shape)


@torch.enable_grad()
def _derivatives(likelihood: Likelihood, y: Tensor, f: Tensor, params: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """∂ log p and −∂² log p, elementwise, by autograd."""
    f = f.clone().requires_grad_()
    log_p = conditional_log_prob(likelihood, y, f, **params)
    (alpha,) = torch.autograd.grad(log_p.sum(), f, create_graph=True)
    if not alpha.requires_grad:  # piecewise linear
        return alpha.detach(), torch.zeros_like(alpha)
    (second,) = torch.autograd.grad(alpha.sum(), f)
    return alpha.detach(), -second


def _fisher(likelihood: Likelihood, f: Tensor) -> Tensor | None:
    """E_p(y|f)[(∂ log p)²] of the likelihoods for which −∂² log p will not do; None for others."""
    if isinstance(likelihood, StudentTLikelihood):
        nu = likelihood.deg_free.double()
        return (nu + 1.0) / ((nu + 3.0) * likelihood.noise.double())
    if isinstance(likelihood, LaplaceLikelihood):  # p = exp(−|y − f|/b) / 2b with b² = noise
        return 1.0 / likelihood.noise.double()
    if isinstance(likelihood, BetaLikelihood):  # Beta(ms + 1, (1 − m)s + 1) with m = 1/(1 + e^{−f})
        m, s = f.sigmoid(), likelihood.scale.double()
        trigamma = torch.polygamma(1, m * s + 1.0) + torch.polygamma(1, (1.0 - m) * s + 1.0)
        return s.square() * trigamma * (m * (1.0 - m)).square()
    return None
