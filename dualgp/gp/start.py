"""A start from which hyperparameters can be learned: where data look independent, no lengthscale has a gradient."""

from __future__ import annotations

import copy
import warnings

import torch
from gpytorch.kernels import Kernel
from gpytorch.likelihoods import Likelihood
from gpytorch.means import Mean

from dualgp.basis import InducingBasis
from dualgp.errors import NotPositiveDefiniteError, NumericalWarning
from dualgp.gp.data import Data
from dualgp.gp.estep import Source, e_step
from dualgp.kernels import prior_covariance

_FEWEST, _ROWS, _INDUCING = 20, 500, 50
_INDEPENDENT, _EQUAL = 0.3, 1e-4  # nearest neighbours correlated less than this, or all data more than 1 − this
_FACTORS = [2.0**k for k in range(-12, 14, 2)]


@torch.no_grad()
def workable_kernel(
    kernel: Kernel, mean: Mean | None, likelihood: Likelihood, data: Data, num_outputs: int | None
) -> Kernel:
    """Return the kernel, or a copy with its learned lengthscales multiplied, if at those given nothing can be learned.

    That is so where nearest neighbours are all but uncorrelated, or all data all but equal, a priori: the bound is flat
    in the lengthscales, and the rest of the hyperparameters would explain everything as noise. The factor is the
    power of 4 of greatest ELBO on a few hundred data.
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
                k.lengthscale = k.lengthscale * factor
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
        stacklevel=6,
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
