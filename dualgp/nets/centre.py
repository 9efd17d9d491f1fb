"""Where the prior of the weights is centred: at the network, which data that come later move, or at zero.

    "network":  θ ~ N(θ*, τ⁻¹I), and converted data that pull nothing: as at a maximum, where Jᵀα = τθ*
    "map":      θ ~ N(0, τ⁻¹I): w has the site (−Φᵀ√τθ*, 0), and what w does not span moves f(x) by −u(x),
                u(x) = J(x)θ* − φ(x)Φᵀ√τθ*, of which data are told too: their λ is Σφᵀ(α + Bu) in place of Σφᵀα,
                and log Z has −Σ(αᵀu + ½uᵀBu) besides

u does not depend on the scale of τ, nor on the basis growing: sites act on the coordinates that they were seen through.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor
from torch.nn.functional import pad

from dualgp.jacobian import JacobianBasis

Centre = Literal["network", "map"]


@dataclass(frozen=True, eq=False)
class Recentring:
    """What the data that a posterior holds have more under centre "map" than under "network".

    Args:
        lam: of λ on w, [*batch, r], the pull of the prior left out: Σφᵀα of converted data, and Σφᵀ(Bu) of all.
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
