"""The fused path of the common stationary kernels: one augmented product, one profile of the distance.

k(x, z) = s · g(r²) with r² = |(x − z)/ℓ|². Derivatives are taken through r², where Matérn-3/2 and -5/2 are
smooth at r = 0, so gradients need no clamp there.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from gpytorch.kernels import Kernel, MaternKernel, RBFKernel, ScaleKernel
from torch import Tensor


class Stationary(NamedTuple):
    """What the fused path needs of a kernel: outputscale s [*b] or None, lengthscale ℓ [*b, 1, d], profile ν."""

    outputscale: Tensor | None
    lengthscale: Tensor
    nu: float  # inf for the RBF kernel
    active_dims: Tensor | None


def as_stationary(kernel: Kernel) -> Stationary | None:
    """Return the stationary form of `kernel`, or None where the generic path must serve."""
    outputscale, active = None, kernel.active_dims
    if type(kernel) is ScaleKernel:
        # GPyTorch's ScaleKernel takes over the active_dims of its base, and applies them once.
        outputscale, kernel = kernel.outputscale, kernel.base_kernel
    if type(kernel) is RBFKernel:
        nu = math.inf
    elif type(kernel) is MaternKernel:
        nu = float(kernel.nu)
    else:
        return None
    return Stationary(outputscale, kernel.lengthscale, nu, active)


def fused_cross(form: Stationary, x: Tensor, z: Tensor, dtype: torch.dtype) -> Tensor:
    """Return k(x, z) [*b, n, m] in `dtype`; inputs are scaled in the dtype they came in, then rounded once."""
    if form.active_dims is not None:
        x, z = x[..., form.active_dims], z[..., form.active_dims]
    out_dtype = dtype
    if form.nu == 0.5:  # e^{−r} has a kink at 0: there a rounding error of r² shows as its square root
        dtype = torch.float64
    centre = z.detach().mean(-2, keepdim=True)  # the augmented product cancels less when centred
    xs = ((x - centre) / form.lengthscale).to(dtype)
    zs = ((z - centre) / form.lengthscale).to(dtype)
    # −½ r² = x·z − ½|x|² − ½|z|², as one product of augmented rows
    one_x, one_z = torch.ones_like(xs[..., :1]), torch.ones_like(zs[..., :1])
    left = torch.cat([xs, -0.5 * xs.square().sum(-1, keepdim=True), one_x], -1)
    right = torch.cat([zs, one_z, -0.5 * zs.square().sum(-1, keepdim=True)], -1)
    h = left @ right.mT
    scale = None if form.outputscale is None else form.outputscale.to(dtype)[..., None, None]
    if math.isinf(form.nu) and not h.requires_grad:
        out = h.clamp_max_(0).exp_()  # h is ours: no copies of n × M numbers
        if scale is not None and not scale.requires_grad and scale.ndim <= out.ndim:
            return out.mul_(scale).to(out_dtype)
    else:
        out = _PROFILES[form.nu](h)
    return (out if scale is None else out * scale).to(out_dtype)


class _RBF(torch.autograd.Function):
    """k = exp(h) with h = −½ r²."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        out = h.clamp_max(0).exp_()
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (out,) = ctx.saved_tensors
        return grad * out


class _Matern(torch.autograd.Function):
    """k = p(a) e^{−a} with a = √(2ν) r; dk/dh is smooth at 0 for ν > ½."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, nu: float) -> Tensor:
        a = h.mul(-4.0 * nu).clamp_min_(0).sqrt_()  # a² = 2ν r² = −4ν h
        decay = a.neg().exp_()
        # dk/dh = −4ν dk/da² = −2ν k'(a) / a
        if nu == 0.5:
            out = decay
            # Infinite at r = 0, where the distance has no gradient: rounding errors of r² must not meet it.
            slope = torch.where(a > 1e-6, decay / a, 0.0)
        elif nu == 1.5:
            out = (1 + a).mul_(decay)
            slope = 3.0 * decay
        else:
            slope = (1 + a).mul_(decay)
            out = a.square_().div_(3.0).mul_(decay).add_(slope)
            slope.mul_(5.0 / 3.0)
        if h.requires_grad:
            ctx.save_for_backward(slope)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (slope,) = ctx.saved_tensors
        return grad * slope, None


def profile(h: Tensor, nu: float) -> Tensor:
    """Return k at h = −½ r² for unit outputscale; without a graph it takes the memory of h, which is then spent."""
    if h.requires_grad:
        return _PROFILES[nu](h)
    if math.isinf(nu):
        return h.clamp_max_(0).exp_()
    a = h.mul_(-4.0 * nu).clamp_min_(0).sqrt_()  # a² = 2ν r² = −4ν h
    decay = a.neg().exp_()
    if nu == 0.5:
        return decay
    if nu == 1.5:
        return a.add_(1.0).mul_(decay)
    # 1 + a + a²/3
    return torch.addcmul(a, a, a, value=1 / 3).add_(1.0).mul_(decay)


_PROFILES = {
    math.inf: _RBF.apply,
    0.5: lambda h: _Matern.apply(h, 0.5),
    1.5: lambda h: _Matern.apply(h, 1.5),
    2.5: lambda h: _Matern.apply(h, 2.5),
}
