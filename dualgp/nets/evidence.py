"""The evidence of a network at any prior precision, from one spectrum of what its data tell."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from dualgp.errors import UnsupportedError
from dualgp.jacobian import Precision
from dualgp.nets.centre import data_site
from dualgp.nets.spectrum import Spectrum, StructuredSpectrum
from dualgp.nets.stationarity import warn_unless_maximum
from dualgp.nets.structured import StructuredPosterior

if TYPE_CHECKING:
    from dualgp.nets.posterior import NetworkPosterior

_GAIN = 1e-3  # λᵀP⁻¹λ, in the evidence of a network that the data left leave as it is


def at_prior(q: NetworkPosterior, prior_precision: Precision | None) -> float:
    """Return log Z at a prior precision, the present one if None."""
    if prior_precision is None:
        return float(q.sweep_evidence(torch.ones(1, device="cpu")))
    q.basis.with_prior_precision(prior_precision)  # raises where it is no precision
    new, old = (torch.as_tensor(tau, dtype=torch.float64, device="cpu") for tau in (prior_precision, q.prior_precision))
    factor = (new / old).flatten()
    if bool((factor != factor[0]).any()):
        return q.with_prior_precision(prior_precision).log_marginal_likelihood()
    return float(q.sweep_evidence(factor[:1]))


def at_factors(q: NetworkPosterior, factors: Float[Tensor, "k"]) -> Float[Tensor, "k"]:
    """Return log Z at multiples of the prior precision; errors and warnings as in `NetworkPosterior.sweep_evidence`."""
    if q.log_likelihood is None:
        raise UnsupportedError(
            "The evidence needs log p(y|f) of all data, and sites without targets were added or removed: use "
            "condition(x, y) and forget(x, y)."
        )
    held = q.posterior
    if q.centre == "network" and q.has_forgotten and float((held.site.lam * held.mean_w).sum()) > _GAIN:
        warn_unless_maximum(q.stationarity)
    offset = q.recentring.offset if q.centre == "map" else 0.0
    return q.log_likelihood + offset + q.spectrum.log_evidence(factors.double())


def spectrum_of(q: NetworkPosterior) -> Spectrum | StructuredSpectrum:
    """Return the spectrum of the data's precision."""
    held, site = q.posterior, data_site(q)
    prior = site.lam - held.site.lam  # √τ Φᵀθ*, or nothing
    if isinstance(held, StructuredPosterior):
        return held.spectrum(site, prior)
    energy = (prior if q.centre == "map" else q.basis.whitened_theta).square().sum()
    return Spectrum.of(q.basis, site, prior, energy)
