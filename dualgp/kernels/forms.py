"""Kernels reduced to an expression that a tile of the matrix can be computed from: features of rows, columns, numbers.

Every stationary kernel here is a profile of h(x, z) = −½|ψ(x) − ψ(z)|², ψ being the inputs over the lengthscale. So is
the periodic one: sin²(a − b) = ½(1 − cos 2a cos 2b − sin 2a sin 2b), hence

    exp(−2 Σ_d sin²(π(x_d − z_d)/p_d)/ℓ_d) = exp(h),      ψ_d(x) = (cos 2πx_d/p_d, sin 2πx_d/p_d) / √ℓ_d

and so are products of such exponentials, whose features are joined: one exponential instead of several.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import gpytorch
import torch
from gpytorch.kernels import (
    AdditiveKernel,
    Kernel,
    LinearKernel,
    MaternKernel,
    PeriodicKernel,
    ProductKernel,
    RBFKernel,
    RQKernel,
    ScaleKernel,
)
from linear_operator import to_dense
from torch import Tensor

from dualgp.errors import UnsupportedError
from dualgp.kernels.products import check_kernel, kernel_diagonal
from dualgp.kernels.stationary import profile
from dualgp.threads import ONE_AT_A_TIME

# The rounding of h in float32 is about 6e-8 |ψ|². Beyond this mean square it would show in a product as 1e-6.
_LARGEST_IN_SINGLE = 4.0


class Parts(NamedTuple):
    """What one tile is made of: features of its rows and columns as made by `prepare`, and the numbers."""

    rows: Iterator[Tensor]
    columns: Iterator[Tensor]
    numbers: Iterator[Tensor]
    on_diagonal: bool  # whether rows and columns are the same inputs


class Form(ABC):
    """An expression for k(x, z). Features and numbers are flat lists, read in one order by all its methods."""

    @abstractmethod
    def warp(self, x: Tensor) -> list[Tensor]:
        """Return ψ(x) in float64, [n, k] for each leaf; differentiable."""

    @abstractmethod
    def numbers(self) -> list[Tensor]:
        """Return the hyperparameters that the tile itself needs, as float64 scalars; differentiable."""

    @abstractmethod
    def leaves(self) -> list[Leaf]:
        """Return the leaves, one for each entry of `warp`."""

    @abstractmethod
    def tile(self, parts: Parts) -> Tensor:
        """Return a tile in float32 or float64, in place where no gradient is asked."""

    @property
    def closed(self) -> bool:
        """Whether no leaf falls back on GPyTorch's own evaluation."""
        return not any(isinstance(leaf, Opaque) for leaf in self.leaves())

    def prepare(self, x: Tensor, z: Tensor | None, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        """Return features of rows and columns, ready for products of tiles; z None means x itself."""
        psi_x = self.warp(x)
        psi_z = psi_x if z is None else self.warp(z)
        pairs = [leaf.features(a, b, dtype) for leaf, a, b in zip(self.leaves(), psi_x, psi_z, strict=True)]
        return [left for left, _ in pairs], [right for _, right in pairs]


class Leaf(Form):
    """A part of the expression with features of its own."""

    def __init__(self, kernel: Kernel, active_dims: Tensor | None) -> None:
        self.kernel, self.active_dims = kernel, active_dims
        self.dtype = torch.float64

    def leaves(self) -> list[Leaf]:
        """Return itself."""
        return [self]

    def select(self, x: Tensor) -> Tensor:
        """Return the columns of x that the kernel sees, in float64."""
        x = x.double()
        return x if self.active_dims is None else x[..., self.active_dims]

    def features(self, psi_x: Tensor, psi_z: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return what tiles multiply."""
        return psi_x.to(dtype), psi_z.to(dtype)


class Radial(Leaf):
    """g(h), h = −½|ψ(x) − ψ(z)|², for RBF, Matérn, rational quadratic and periodic kernels."""

    def __init__(self, kernel: Kernel, active_dims: Tensor | None) -> None:
        super().__init__(kernel, active_dims)
        self.periodic = type(kernel) is PeriodicKernel
        self.nu = float(kernel.nu) if type(kernel) is MaternKernel else math.inf
        self.rational = type(kernel) is RQKernel

    def __str__(self) -> str:
        return "rq(h)" if self.rational else "exp(h)" if math.isinf(self.nu) else f"matern{self.nu:g}(h)"

    @property
    def exponential(self) -> bool:
        """Whether g = exp."""
        return math.isinf(self.nu) and not self.rational

    def warp(self, x: Tensor) -> list[Tensor]:
        """ψ(x)."""
        return [self.psi(x)]

    def psi(self, x: Tensor) -> Tensor:
        """ψ(x) of this leaf."""
        x = self.select(x)
        lengthscale = self.kernel.lengthscale.double()
        if not self.periodic:
            return x / lengthscale
        angle = (2 * torch.pi) * x / self.kernel.period_length.double()
        scale = lengthscale.sqrt().expand(angle.shape)
        return torch.cat([angle.cos() / scale, angle.sin() / scale], -1)

    def numbers(self) -> list[Tensor]:
        """α of the rational quadratic kernel."""
        return [self.kernel.alpha.double().reshape(())] if self.rational else []

    def features(self, psi_x: Tensor, psi_z: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Augment, so that h = ψ(x)·ψ(z) − ½|ψ(x)|² − ½|ψ(z)|² is one product; centred, so that it cancels less."""
        centre = psi_z.detach().mean(-2, keepdim=True) if psi_z.shape[-2] else 0.0
        a, b = psi_x - centre, psi_z - centre
        self.dtype = dtype
        # e^{−r} has a kink at 0, where a rounding error of r² shows as its square root.
        size = max((float(t.detach().square().sum(-1).mean()) for t in (a, b) if t.shape[-2]), default=0.0)
        inside = torch.float64 if self.nu == 0.5 or size > _LARGEST_IN_SINGLE else dtype
        one_a, one_b = torch.ones_like(a[..., :1]), torch.ones_like(b[..., :1])
        left = torch.cat([a, -0.5 * a.square().sum(-1, keepdim=True), one_a], -1)
        right = torch.cat([b, one_b, -0.5 * b.square().sum(-1, keepdim=True)], -1)
        return left.to(inside), right.to(inside)

    def tile(self, parts: Parts) -> Tensor:
        """g(h)."""
        h = (next(parts.rows) @ next(parts.columns).mT).to(self.dtype)
        if parts.on_diagonal:
            h.fill_diagonal_(0.0)
        if self.rational:
            alpha = next(parts.numbers).to(self.dtype)
            return (-alpha * torch.log1p(-h.clamp_max(0) / alpha)).exp()  # (1 + r²/2α)^−α
        return profile(h, self.nu)


class Joined(Radial):
    """The product of exponentials exp(h₁) exp(h₂) … as one, of joined features."""

    def __init__(self, parts: Sequence[Radial]) -> None:
        super().__init__(parts[0].kernel, None)
        self.parts = parts

    def psi(self, x: Tensor) -> Tensor:
        """The features of all parts, side by side."""
        return torch.cat([part.psi(x) for part in self.parts], -1)


class Linear(Leaf):
    """σ² x·z."""

    def __str__(self) -> str:
        return "x·z"

    def warp(self, x: Tensor) -> list[Tensor]:
        """σ x."""
        x = self.select(x)
        return [x * self.kernel.variance.double().sqrt()]

    def numbers(self) -> list[Tensor]:
        """Return none."""
        return []

    def tile(self, parts: Parts) -> Tensor:
        """The product."""
        return next(parts.rows) @ next(parts.columns).mT


class Opaque(Leaf):
    """Any other kernel: GPyTorch evaluates each tile, in float64."""

    def __str__(self) -> str:
        return type(self.kernel).__name__

    def warp(self, x: Tensor) -> list[Tensor]:
        """The inputs."""
        return [self.select(x)]

    def numbers(self) -> list[Tensor]:
        """Return none: the tile reads them from the kernel itself."""
        return []

    def features(self, psi_x: Tensor, psi_z: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Inputs stay in float64."""
        self.dtype = dtype
        return psi_x, psi_z

    def tile(self, parts: Parts) -> Tensor:
        """k(x, z) by GPyTorch's own forward."""
        x, z = next(parts.rows), next(parts.columns)
        with ONE_AT_A_TIME, gpytorch.settings.lazily_evaluate_kernels(False):
            found = self.kernel.forward(x, z)
        return to_dense(found).to(self.dtype).contiguous()  # a ConstantKernel's is one number, expanded


class Scaled(Form):
    """s · k."""

    def __init__(self, kernel: ScaleKernel, inner: Form) -> None:
        self.kernel, self.inner = kernel, inner

    def __str__(self) -> str:
        return f"s·{self.inner}"

    def warp(self, x: Tensor) -> list[Tensor]:
        """Those of k."""
        return self.inner.warp(x)

    def leaves(self) -> list[Leaf]:
        """Those of k."""
        return self.inner.leaves()

    def numbers(self) -> list[Tensor]:
        """Those of k, and s."""
        return [self.kernel.outputscale.double().reshape(()), *self.inner.numbers()]

    def tile(self, parts: Parts) -> Tensor:
        """The tile of k, scaled."""
        scale = next(parts.numbers)
        inner = self.inner.tile(parts)
        if inner.requires_grad or scale.requires_grad:
            return inner * scale.to(inner.dtype)
        return inner.mul_(float(scale))


class Combined(Form):
    """A sum k₁ + k₂ + … or a product k₁ · k₂ · … of kernels."""

    def __init__(self, parts: Sequence[Form], *, product: bool) -> None:
        self.parts, self.product = parts, product

    def __str__(self) -> str:
        return "(" + (" · " if self.product else " + ").join(map(str, self.parts)) + ")"

    def warp(self, x: Tensor) -> list[Tensor]:
        """Those of all parts."""
        return [psi for part in self.parts for psi in part.warp(x)]

    def leaves(self) -> list[Leaf]:
        """Those of all parts."""
        return [leaf for part in self.parts for leaf in part.leaves()]

    def numbers(self) -> list[Tensor]:
        """Those of all parts."""
        return [number for part in self.parts for number in part.numbers()]

    def tile(self, parts: Parts) -> Tensor:
        """The sum or product of the tiles."""
        total = self.parts[0].tile(parts)
        for part in self.parts[1:]:
            other = part.tile(parts)
            if total.requires_grad or other.requires_grad:
                total = total * other if self.product else total + other
            else:
                total = total.mul_(other) if self.product else total.add_(other)
        return total


_RADIAL = (RBFKernel, MaternKernel, RQKernel, PeriodicKernel)


def as_form(kernel: Kernel) -> Form:
    """Return the expression of a kernel; parts that have no closed form are left to GPyTorch.

    Raises:
        UnsupportedError: for a kernel that `check_kernel` refuses, or one with a batch shape.
    """
    check_kernel(kernel)
    if kernel.batch_shape:
        raise UnsupportedError(
            f"{type(kernel).__name__} has batch shape {tuple(kernel.batch_shape)}: lazy products are of one kernel. "
            "Use one LazyKernel for each, or a kernel without a batch shape that all outputs share."
        )
    return _build(kernel, kernel.active_dims)


def _build(kernel: Kernel, active: Tensor | None) -> Form:
    """Build the form of a kernel that sees these columns of the inputs."""
    kind = type(kernel)
    if kind in _RADIAL:
        return Radial(kernel, active)
    if kind is LinearKernel:
        return Linear(kernel, active)
    if kind is ScaleKernel:  # GPyTorch's takes over the active_dims of its base, and applies them once
        return Scaled(kernel, _build(kernel.base_kernel, active))
    if kind in (AdditiveKernel, ProductKernel):
        parts = [_build(part, _within(active, part.active_dims)) for part in kernel.kernels]
        return _product(parts) if kind is ProductKernel else Combined(parts, product=False)
    return Opaque(kernel, active)


def _product(parts: list[Form]) -> Form:
    """Join the exponentials of a product into one."""
    smooth = [p for p in parts if isinstance(p, Radial) and p.exponential]
    others = [p for p in parts if not (isinstance(p, Radial) and p.exponential)]
    if len(smooth) > 1:
        parts = [Joined(smooth), *others]
    return parts[0] if len(parts) == 1 else Combined(parts, product=True)


def _within(outer: Tensor | None, inner: Tensor | None) -> Tensor | None:
    """Columns that an inner kernel sees of those that the outer one sees."""
    if outer is None or inner is None:
        return outer if inner is None else inner
    return outer[inner]


def form_diagonal(kernel: Kernel, x: Tensor) -> Tensor:
    """Return k(xᵢ, xᵢ) in float64, a block of rows at a time; differentiable."""
    return torch.cat([kernel_diagonal(kernel, rows) for rows in x.split(65536)]) if len(x) else x.new_zeros(0).double()
