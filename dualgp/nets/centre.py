"""Where the prior of the weights is centred: at the network, which data that come later move, or at zero.

    "network":  θ ~ N(θ*, τ⁻¹I), and converted data that pull nothing: as at a maximum, where Jᵀα = τθ*
    "map":      θ ~ N(0, τ⁻¹I): w has the site (−Φᵀ√τθ*, 0), and what w does not span moves f(x) by −u(x),
                u(x) = J(x)θ* − φ(x)Φᵀ√τθ*, of which data are told too: their λ is Σφᵀ(α + B u) in place of Σφᵀα,
                and log Z has −Σ(αᵀu + ½uᵀBu) besides

u does not depend on the scale of τ, nor on the basis growing: sites act on the coordinates that they were seen through.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from torch import Tensor
from torch.nn.functional import pad

from dualgp.errors import InputError
from dualgp.jacobian import JacobianBasis
from dualgp.nets.structured import StructuredPosterior
from dualgp.posterior import Posterior

if TYPE_CHECKING:
    from dualgp.nets.posterior import NetworkPosterior

Centre = Literal["network", "map"]


@dataclass(frozen=True, eq=False)
class Recentring:
    """What the data that a posterior holds have more under centre "map" than under "network".

    Args:
        lam: of λ on w, [*batch, r], the pull of the prior left out: Σφᵀα of converted data, and Σφᵀ(B u) of all.
        offset: of log Z, −Σ(αᵀu + ½uᵀBu), in nats.
    """

    lam: Tensor
    offset: float

    def __add__(self, other: Recentring) -> Recentring:
        return Recentring(self.lam + other.lam, self.offset + other.offset)

    def __mul__(self, factor: float | int) -> Recentring:
        return Recentring(factor * self.lam, factor * self.offset)

    def padded(self, size: int) -> Recentring:
        """Return it in a basis that has grown to so many coordinates."""
        return Recentring(pad(self.lam, (0, size - self.lam.shape[-1])), self.offset)


def centred(basis: JacobianBasis, site: Any, centre: Centre, sign: float = 1.0) -> Any:
    """Return a site on w with the pull of the prior: for "map" the linear site −√τ Φᵀθ*, else nothing."""
    if centre == "network":
        return site
    return dataclasses.replace(site, lam=site.lam - sign * basis.coordinates(basis.whitened_theta))


def data_site(q: NetworkPosterior) -> Any:
    """Return the site of the data, without the pull of a prior centred at zero."""
    return centred(q.basis, q.posterior.site, q.centre, sign=-1.0)


def recentred(q: NetworkPosterior, centre: Centre) -> NetworkPosterior:
    """Return the posterior with the mean of a centre, as if converted with it.

    Raises:
        InputError: if it is none.
    """
    if centre not in get_args(Centre):
        raise InputError(f"centre must be one of {get_args(Centre)}, got {centre!r}.")
    if centre == q.centre:
        return q
    more, site = q.recentring.lam if centre == "map" else -q.recentring.lam, data_site(q)
    site = centred(q.basis, dataclasses.replace(site, lam=site.lam + more), centre)
    if isinstance(q.posterior, StructuredPosterior):
        return dataclasses.replace(q, posterior=q.posterior.with_site(site), centre=centre)
    basis = q.basis.with_zero_mean(centre == "map")
    return dataclasses.replace(q, posterior=Posterior(basis, site), centre=centre)
