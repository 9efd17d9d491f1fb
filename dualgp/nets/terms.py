"""What data add to a posterior over a network's weights, block by block: their site on w, whichever the centre."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial, reduce
from operator import add
from typing import Any, TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.functional import pad

from dualgp.basis import Features, SiteSum
from dualgp.jacobian import JacobianBasis
from dualgp.kernels import JacobianBlock
from dualgp.nets.centre import Centre, Recentring
from dualgp.nets.layerwise import StructuredSite, StructuredSum
from dualgp.nets.structured import StructuredPosterior
from dualgp.posterior import Posterior
from dualgp.sites import Site, Sites

WeightPosterior: TypeAlias = Posterior[JacobianBasis] | StructuredPosterior


@dataclass(frozen=True, eq=False)
class Terms:
    """A sum over data of what they add to a posterior; see `dualgp.nets.centre`.

    Args:
        site: on w under centre "map", λ = Σφᵀ(α + B u).
        pull: λ under centre "network", Σφᵀα.
        offset: of log Z under centre "map", −Σ(αᵀu + ½uᵀBu).
    """

    site: Site | StructuredSite
    pull: Tensor
    offset: float

    def __add__(self, other: Terms) -> Terms:
        site: Any = self.site
        return Terms(site + other.site, self.pull + other.pull, self.offset + other.offset)

    def at(self, centre: Centre) -> Any:
        """Return the site on w under a centre."""
        return self.site if centre == "map" else dataclasses.replace(self.site, lam=self.pull)

    @property
    def recentring(self) -> Recentring:
        """What they have more under centre "map" than under "network"."""
        return Recentring(self.site.lam - self.pull, self.offset)

    def padded(self, size: int) -> Terms:
        """Return them in a basis that has grown to so many coordinates."""
        more = size - self.pull.shape[-1]
        if not more or isinstance(self.site, StructuredSite):
            return self
        site = Site(pad(self.site.lam, (0, more)), pad(self.site.B, (0, more, 0, more)))
        return Terms(site, pad(self.pull, (0, more)), self.offset)


class TermSum:
    """A running sum of `Terms`, block by block, in any order.

    Args:
        basis: of w.
        structured: for its structure and blocks, where B is block-diagonal over layers.
    """

    def __init__(self, basis: JacobianBasis, structured: StructuredPosterior | None = None) -> None:
        self._basis, self._structured = basis.with_zero_mean(True), structured
        self._sum: Any = (
            SiteSum(basis, double=True) if structured is None else StructuredSum(basis, structured.structure)
        )
        self._pull = torch.zeros(*basis.batch_shape, basis.size, dtype=torch.float64, device=basis.device)
        self._offset = 0.0

    def add(self, x: Tensor, sites_at: Callable[[slice, Tensor], Sites]) -> None:
        """Add data x, with `sites_at` the sites of rows of them given f(x; θ*) there, [n, C]."""
        for rows, f, take in self._blocks(x):
            take(sites_at(rows, f), f)

    def total(self) -> Terms:
        """Return the sum so far."""
        site = self._sum.site()
        return Terms(site, self._pull.clone() if self._structured is None else site.lam, self._offset)

    def _blocks(self, x: Tensor) -> Iterator[tuple[slice, Tensor, Callable[[Sites, Tensor], None]]]:
        if self._structured is not None:
            for rows, phi in self._structured.blocks(x):
                yield rows, phi.f.double(), partial(self._add_structured, phi)
            return
        for rows, features in self._basis.blocks(x):
            mean = self._by_output(features)
            f = self._basis.jacobian(x[rows]).double() if self._basis.has_residual else mean
            yield rows, f, partial(self._add, features, mean)

    def _add_structured(self, phi: JacobianBlock, sites: Sites, f: Tensor) -> None:
        self._sum.add(phi, sites)

    def _add(self, features: Features, mean: Tensor, sites: Sites, f: Tensor) -> None:
        phi = features.phi.double()
        if self._basis.coupled:
            alpha = sites.alpha(f).flatten()
            self._sum.add_coupled(features, sites)
        else:
            sites = sites.decoupled(f)
            alpha = sites.alpha(f).mT
            self._sum.add(features, *sites.by_latent())
        self._pull += (phi.mT @ alpha.unsqueeze(-1)).squeeze(-1)
        if self._basis.has_residual:
            minus_u = mean - f
            self._offset += float((0.5 * (sites.alpha(f) + sites.alpha(mean)) * minus_u).sum())

    def _by_output(self, features: Features) -> Tensor:
        mean = features.prior_mean
        return mean.reshape(-1, self._basis.num_outputs) if self._basis.coupled else mean.mT


def terms_of(q: WeightPosterior, x: Tensor, sites: Sites, size: int | None = None) -> Terms:
    """Return what data with these sites add to a posterior, seen through its first coordinates only if `size` is given.

    Raises:
        InputError: if x and the sites do not fit the basis or each other.
    """
    basis = q.basis
    q.check_sites(basis.check_inputs(x), sites)
    sites = sites.to(basis.device)
    seen = basis if size is None or size == basis.size else basis.first(size)
    total = TermSum(seen, q if isinstance(q, StructuredPosterior) else None)
    with torch.no_grad():
        total.add(x, lambda rows, _: sites[rows])
    return total.total().padded(basis.size)


def terms_through(q: WeightPosterior, x: Tensor, sites: Sites, sizes: Int[Tensor, "n"]) -> Terms:
    """Return the terms of n ≥ 1 data, each seen through so many of the first coordinates: as it was when it came."""
    parts = []
    for size in sizes.unique().tolist():
        of = (sizes == size).nonzero().flatten()
        parts.append(terms_of(q, x[of.to(x.device)], sites[of.to(sites.lam.device)], size))
    return reduce(add, parts)


def with_site(q: WeightPosterior, site: Any) -> WeightPosterior:
    """Return the posterior of another site in the same basis."""
    return q.with_site(site) if isinstance(q, StructuredPosterior) else Posterior(q.basis, site)
