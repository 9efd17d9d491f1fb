"""The same data under another prior precision: coordinates √(τ/τ') w, and sites with them."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch

from dualgp.errors import NotPositiveDefiniteError
from dualgp.jacobian import JacobianBasis, Precision
from dualgp.linalg import psd_part, symmetrise
from dualgp.nets.centre import centred, data_site
from dualgp.nets.structured import StructuredPosterior
from dualgp.nets.terms import WeightPosterior
from dualgp.posterior import Posterior
from dualgp.sites import Site

if TYPE_CHECKING:
    from dualgp.nets.posterior import NetworkPosterior


def under_prior(q: NetworkPosterior, prior_precision: Precision) -> NetworkPosterior:
    """Return the posterior of the same data under another prior. Errors as in `with_prior_precision`."""
    basis, held, site = q.basis.with_prior_precision(prior_precision), q.posterior, data_site(q)
    beside = dataclasses.replace(site, lam=q.recentring.lam)
    moved: WeightPosterior
    if isinstance(held, StructuredPosterior):
        moved, beside = held.with_site(site).rebase(basis), held.with_site(beside).rebase(basis).site
        moved = moved.with_site(centred(basis, moved.site, q.centre))
    else:
        site, beside = (q.basis.carry(one, basis) for one in (site, beside))
        moved = _gaussian(basis, centred(basis, site, q.centre))
    return dataclasses.replace(q, posterior=moved, recentring=dataclasses.replace(q.recentring, lam=beside.lam))


def _gaussian(basis: JacobianBasis, site: Site) -> Posterior[JacobianBasis]:
    """The posterior of a site that was scaled up, and with it the rounding of its null space: taken for zero."""
    try:
        return Posterior(basis, site)
    except NotPositiveDefiniteError:
        values = torch.linalg.eigvalsh(site.B)
        if values.min() < -basis.size * torch.finfo(basis.dtype).eps * values.max():
            raise
        return Posterior(basis, Site(site.lam, symmetrise(psd_part(site.B))))
