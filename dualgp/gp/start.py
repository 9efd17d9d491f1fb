"""A start from which hyperparameters can be learned.

Where data look independent, no lengthscale has a gradient; where targets are in other units than the amplitude, or far
from the mean, the way to theirs leads through hyperparameters that call all of them noise.
"""

from __future__ import annotations

import copy
import math
import warnings

import torch
from gpytorch.constraints import Interval
from gpytorch.kernels import AdditiveKernel, Kernel, ProductKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood, Likelihood
from gpytorch.means import ConstantMean, LinearMean, Mean
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
) -> tuple[Kernel, Mean | None, Likelihood]:
    """Return kernel, mean and likelihood, or copies from which `data` can be learned; see the functions below.

    Raises:
        InputError: if kernel or mean have another batch shape than a model of so many outputs.
    """
    InducingBasis(kernel, data.x[..., :1, :], mean, num_outputs=num_outputs)
    mean = centred_mean(kernel, mean, likelihood, data)
    kernel, likelihood = in_units_of(kernel, mean, likelihood, data, num_outputs)
    return workable_kernel(kernel, mean, likelihood, data, num_outputs), mean, likelihood


@torch.no_grad()
def centred_mean(kernel: Kernel, mean: Mean | None, likelihood: Likelihood, data: Data) -> Mean | None:
    """Return the mean, or a copy with its learned constant in the middle of the targets, where they are far from it.

    That is so under Gaussian noise where the offset is more than half of the targets' spread, and of what the prior
    says it is.
    """
    learned = _learned_constant(mean)
    if mean is None or learned is None or type(likelihood) is not GaussianLikelihood or len(data) < _FEWEST:
        return mean
    off = _off_mean(data, mean)
    shift = off.mean(-1, keepdim=True)
    spread = (off - shift).square().mean(-1, keepdim=True)
    if bool((shift.square() < 0.25 * torch.maximum(spread, _said(kernel, likelihood, data))).all()):
        return mean
    constant = getattr(mean, learned)
    if constant.numel() == 1:
        shift = shift.mean()
    elif constant.numel() != shift.numel():
        return mean
    mean = copy.deepcopy(mean)
    mean.initialize(**{learned: constant + shift.reshape(constant.shape).to(constant)})
    return mean


def _learned_constant(mean: Mean | None) -> str | None:
    """The name of what is added to all of the mean, if it is learned without limits."""
    if isinstance(mean, ConstantMean) and mean.raw_constant.requires_grad and not list(mean.constraints()):
        return "constant"
    if isinstance(mean, LinearMean) and mean.bias is not None and mean.bias.requires_grad:
        return "bias"
    return None


def _off_mean(data: Data, mean: Mean | None) -> Tensor:
    """Targets less the mean, data last."""
    y = data.y.double().mT if data.targets_multi else data.y.double()
    return y if mean is None else y - frozen_copy(mean)(data.x.double())


def _said(kernel: Kernel, likelihood: GaussianLikelihood, data: Data) -> Tensor:
    """The variance of a target, by the prior."""
    return kernel_diagonal(frozen_copy(kernel), data.x.double()).mean() + likelihood.noise.double().mean()


@torch.no_grad()
def in_units_of(
    kernel: Kernel, mean: Mean | None, likelihood: Likelihood, data: Data, num_outputs: int | None
) -> tuple[Kernel, Likelihood]:
    """Return kernel and Gaussian likelihood with amplitude and noise multiplied, where targets are in other units.

    That is so where their variance is e³ times what the prior says, or a part of that. What is not learned stays. Of
    the noise a part is taken where that raises the ELBO of a few hundred data: what is large may be an offset.
    """
    if type(likelihood) is not GaussianLikelihood or len(data) < _FEWEST:
        return kernel, likelihood
    off = _off_mean(data, mean)
    if mean is not None and any(p.requires_grad for p in mean.parameters()):
        off = off - off.mean(-1, keepdim=True)
    ratio = float(off.square().mean() / _said(kernel, likelihood, data))
    if ratio == 0.0 or abs(math.log(ratio)) < _OTHER_UNITS:
        return kernel, likelihood
    kernel = copy.deepcopy(kernel)
    _multiply(kernel, ratio)
    if not likelihood.raw_noise.requires_grad:
        return kernel, likelihood
    best = -math.inf, likelihood
    for part in (1.0, 1e-2, 1e-4):
        scaled = copy.deepcopy(likelihood)
        scaled.noise = _inside(scaled.noise_covar.raw_noise_constraint, scaled.noise * (part * ratio))
        elbo = _elbo(kernel, mean, scaled, data, num_outputs)
        if elbo > best[0] or part == 1.0:
            best = elbo, scaled
    return kernel, best[1]


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
        elbo = _elbo(scaled, mean, likelihood, some, num_outputs)
        if elbo > best[0]:
            best = elbo, scaled
    warnings.warn(
        "At the lengthscales given, data are all but uncorrelated or all but equal a priori: nothing can be learned "
        "from there, so the fit starts at others. Standardise inputs, or set lengthscales near their distances.",
        NumericalWarning,
        stacklevel=7,
    )
    return best[1]


def _elbo(kernel: Kernel, mean: Mean | None, likelihood: Likelihood, data: Data, num_outputs: int | None) -> float:
    """The ELBO of some of the data, at some of their inputs; −∞ where there is none."""
    some = data.rows(slice(0, _ROWS))
    try:
        basis = InducingBasis(kernel, some.x[..., :_INDUCING, :], mean, num_outputs=num_outputs)
        return e_step(Source(basis, some), likelihood, max_passes=8).elbo
    except NotPositiveDefiniteError:
        return -math.inf


def _is_flat(kernel: Kernel, data: Data) -> bool:
    K = prior_covariance(kernel, data.x)
    K = K.reshape(-1, *K.shape[-2:])[0]
    sd = K.diagonal().clamp_min(1e-300).sqrt()
    correlation = (K / sd / sd.unsqueeze(-1)).abs().fill_diagonal_(0.0)
    nearest = correlation.amax(-1).median()
    off = correlation.fill_diagonal_(1.0)
    return bool(nearest < _INDEPENDENT) or bool(off.min() > 1.0 - _EQUAL)
