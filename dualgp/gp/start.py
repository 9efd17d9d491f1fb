"""A start from which hyperparameters can be learned.

Where data look independent, no lengthscale has a gradient; where targets are in other units than the amplitude, the
way to theirs leads through hyperparameters that call all of them noise.
"""

from __future__ import annotations

import copy
import math
import warnings

import torch
from gpytorch.constraints import Interval
from gpytorch.kernels import AdditiveKernel, Kernel, ProductKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood, Likelihood
from gpytorch.means import Mean
from torch import Tensor

from dualgp.basis import InducingBasis
from dualgp.errors import NotPositiveDefiniteError, NumericalWarning
from dualgp.gp.data import Data
from dualgp.gp.estep import Source, e_step
from dualgp.kernels import frozen_copy, kernel_diagonal, prior_covariance

_FEWEST, _ROWS, _INDUCING = 20, 500, 50
_INDEPENDENT, _EQUAL = 0.3, 1e-4  # nearest neighbours correlated less than this, or all data more than 1 − this
_OTHER_UNITS = 3.0  # of the logarithm of the targets' variance, from what the prior says
_FACTORS = [2.0**k for k in range(-40, 42, 2)]  # to seconds since 1970, and from metres to atoms


def workable_start(
    kernel: Kernel, mean: Mean | None, likelihood: Likelihood, data: Data, num_outputs: int | None
) -> tuple[Kernel, Likelihood]:
    """Return kernel and likelihood, or copies from which `data` can be learned; see the two functions below."""
    kernel, likelihood = in_units_of(data, kernel, mean, likelihood)
    return workable_kernel(kernel, mean, likelihood, data, num_outputs), likelihood


@torch.no_grad()
def in_units_of(data: Data, kernel: Kernel, mean: Mean | None, likelihood: Likelihood) -> tuple[Kernel, Likelihood]:
    """Return kernel and Gaussian likelihood with amplitude and noise multiplied, where targets are in other units.

    That is so where their variance is e³ times what the prior says, or a part of that. What is not learned stays.
    """
    if type(likelihood) is not GaussianLikelihood or len(data) < _FEWEST:
        return kernel, likelihood
    off = data.y.double() if mean is None else data.y.double() - frozen_copy(mean)(data.x.double())
    if mean is not None and any(p.requires_grad for p in mean.parameters()):
        off = off - off.mean(-1, keepdim=True)
    said = kernel_diagonal(frozen_copy(kernel), data.x.double()).mean() + likelihood.noise.double().mean()
    ratio = float(off.square().mean() / said)
    if ratio == 0.0 or abs(math.log(ratio)) < _OTHER_UNITS:
        return kernel, likelihood
    kernel, likelihood = copy.deepcopy((kernel, likelihood))
    if likelihood.raw_noise.requires_grad:
        likelihood.noise = _inside(likelihood.noise_covar.raw_noise_constraint, likelihood.noise * ratio)
    _multiply(kernel, ratio)
    return kernel, likelihood


def _inside(constraint: Interval, value: Tensor) -> Tensor:
    """Return the nearest value that a constraint allows, a little off its bounds, where a gradient still is."""
    low, high = constraint.lower_bound.to(value), constraint.upper_bound.to(value)
    margin = torch.where(high.isfinite(), 0.01 * (high - low), 0.01 * low)
    return value.clamp(low + margin, high - margin)


def _multiply(kernel: Kernel, factor: float) -> None:
    """Multiply what the kernel is scaled by: of a sum each term, of a product one factor."""
    if isinstance(kernel, ScaleKernel):
        if kernel.raw_outputscale.requires_grad:
            kernel.outputscale = _inside(kernel.raw_outputscale_constraint, kernel.outputscale * factor)
    elif isinstance(kernel, (AdditiveKernel, ProductKernel)):
        for part in kernel.kernels[: None if isinstance(kernel, AdditiveKernel) else 1]:
            _multiply(part, factor)


@torch.no_grad()
def workable_kernel(
    kernel: Kernel, mean: Mean | None, likelihood: Likelihood, data: Data, num_outputs: int | None
) -> Kernel:
    """Return the kernel, or a copy with its learned lengthscales multiplied, if at those given nothing can be learned.

    That is so where nearest neighbours are all but uncorrelated, or all data all but equal, a priori: the bound is flat
    in the lengthscales, and the rest of the hyperparameters would explain everything as noise. The factor is the
    power of 4 of greatest ELBO on a few hundred data, among those from which something can be learned.
    """
    parts = [k for k in kernel.modules() if isinstance(k, Kernel) and k.has_lengthscale]
    if len(data) < _FEWEST or not parts or not all(k.raw_lengthscale.requires_grad for k in parts):
        return kernel
    some = data.rows(slice(0, _ROWS))
    if not _is_flat(kernel, some):
        return kernel
    best = -float("inf"), kernel
    for factor in _FACTORS:
        scaled = copy.deepcopy(kernel)
        for k in scaled.modules():
            if isinstance(k, Kernel) and k.has_lengthscale:
                k.lengthscale = _inside(k.raw_lengthscale_constraint, k.lengthscale * factor)
        if _is_flat(scaled, some):
            continue
        try:
            basis = InducingBasis(scaled, some.x[..., :_INDUCING, :], mean, num_outputs=num_outputs)
            elbo = e_step(Source(basis, some), likelihood, max_passes=8).elbo
        except NotPositiveDefiniteError:
            continue
        if elbo > best[0]:
            best = elbo, scaled
    warnings.warn(
        "At the lengthscales given, data are all but uncorrelated or all but equal a priori: nothing can be learned "
        "from there, so the fit starts at others. Standardise inputs, or set lengthscales near their distances.",
        NumericalWarning,
        stacklevel=7,
    )
    return best[1]


def _is_flat(kernel: Kernel, data: Data) -> bool:
    K = prior_covariance(kernel, data.x)
    K = K.reshape(-1, *K.shape[-2:])[0]
    sd = K.diagonal().clamp_min(1e-300).sqrt()
    correlation = (K / sd / sd.unsqueeze(-1)).abs().fill_diagonal_(0.0)
    nearest = correlation.amax(-1).median()
    off = correlation.fill_diagonal_(1.0)
    return bool(nearest < _INDEPENDENT) or bool(off.min() > 1.0 - _EQUAL)
