"""What the removal of a site does to the function there: one formula on arrays, for data and for groups of them.

V [.., C, C] is the parametric covariance of f_i, B the precision of its site, α = ∂ log p(y_i|f_i) its pull. A group of
g data is one such block of size gC, with the cross-covariances in V and a block-diagonal B.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dualgp.errors import InputError
from dualgp.linalg import symmetrise

Order = Literal["removal", "first"]


class Shift(NamedTuple):
    """What changes in q(f_i) when its site goes: Δf, ΔV; the hat value, and whether it was capped."""

    mean: Float[Tensor, "*n c"]
    cov: Float[Tensor, "*n c c"]
    hat: Float[Tensor, "*n"]
    capped: Bool[Tensor, "*n"]


def check_order(order: str) -> None:
    """Raise InputError unless this names an order."""
    if order not in get_args(Order):
        raise InputError(f'order must be "removal" or "first", got {order!r}.')


def removal_shift(
    V: Float[Tensor, "*n c c"],
    alpha: Float[Tensor, "*n c"],
    B: Float[Tensor, "*n c c"],
    *,
    order: Order = "removal",
    max_hat: float = 0.99,
    cross: Float[Tensor, "*n c c"] | None = None,
) -> Shift:
    """Return f_{−i} − f_i and V_{−i} − V_i: how mean and covariance of f_i move when its site is taken out.

        removal:  V_{−i} = V (I − BV)⁻¹,  Δf = −V_{−i} α        first:  ΔV = VBV,  Δf = −Vα

    With a root V = TTᵀ and the symmetric TᵀBT = U diag(h) Uᵀ, V (I − BV)⁻¹ = TU diag(1/(1 − h)) (TU)ᵀ: no inverse of B
    or V, both of which may be singular (softmax), and B may have negative eigenvalues. h are the eigenvalues of BV;
    the largest is the hat value, less than 1 whenever the precision behind V contains the site.

    Where the site acts on another function g_i (f_i seen through fewer coordinates), V is that of g_i, and f_i moves
    with it through their covariance X:  Δf = −X (I − BV)⁻¹ α,  ΔV = X (I − BV)⁻¹ B Xᵀ.

    Args:
        V: parametric covariances of what the sites act on, positive semi-definite.
        alpha: α, the pull of the datum: minus the gradient of its loss.
        B: precisions of the sites, symmetric.
        order: "removal", exact for Gaussian sites, or "first", the derivative in the weight of the datum.
        max_hat: h above it is capped there in a removal.
        cross: X, the parametric covariance of f_i, by rows, with what its site acts on; None: that is f_i itself.

    Raises:
        InputError: if shapes do not fit, the order is unknown, or max_hat is not below 1.

    Source: Nickl et al. 2023 ("The memory perturbation equation"), eq. 2 (ridge), 10 and 12 to 14. They set Ŝ ≈ S "for
    computational ease", which is order "first"; the C × C system costs nothing beside V and is exact.

    Example:
        >>> v, alpha, beta = torch.tensor([[[0.6]]]), torch.tensor([[0.6]]), torch.ones(1, 1, 1)
        >>> shift = removal_shift(v, alpha, beta)
        >>> round(shift.mean.item(), 4), round(shift.cov.item(), 4)  # −v/(1 − v)·α, v/(1 − v) − v
        (-0.9, 0.9)
    """
    if V.shape != B.shape or alpha.shape != V.shape[:-1] or V.shape[-1:] != V.shape[-2:-1]:
        raise InputError(
            "Expected V and B of shape [..., C, C] and alpha [..., C], got "
            f"{tuple(V.shape)}, {tuple(B.shape)} and {tuple(alpha.shape)}."
        )
    check_order(order)
    if not max_hat < 1:
        raise InputError(f"max_hat must be below 1, got {max_hat}.")
    values, vectors = torch.linalg.eigh(symmetrise(V))
    T = vectors * values.clamp_min(0.0).sqrt().unsqueeze(-2)
    h, U = torch.linalg.eigh(symmetrise(T.mT @ B @ T))
    TU = T @ U
    hat, removal = h[..., -1], order == "removal"
    kept, capped = h.clamp_max(max_hat), (hat > max_hat) & removal
    if cross is not None:  # (I − BV)⁻¹ = I + BTU diag(1/(1 − h)) (TU)ᵀ
        BTU = B @ TU
        inner = BTU / (1.0 - kept).unsqueeze(-2) if removal else torch.zeros_like(BTU)
        push = cross @ (alpha.unsqueeze(-1) + inner @ (TU.mT @ alpha.unsqueeze(-1)))
        return Shift(-push.squeeze(-1), cross @ (B + inner @ BTU.mT) @ cross.mT, hat, capped)
    gain = kept / (1.0 - kept) if removal else h
    cov = (TU * gain.unsqueeze(-2)) @ TU.mT  # V (I − BV)⁻¹ − V, or VBV
    pull = V + cov if removal else V
    return Shift(-(pull @ alpha.unsqueeze(-1)).squeeze(-1), cov, hat, capped)
