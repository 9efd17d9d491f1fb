"""The inducing basis: a Gaussian process seen through M inducing inputs, in whitened coordinates."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from gpytorch.kernels import Kernel
from gpytorch.means import Mean
from jaxtyping import Float
from torch import Tensor

from dualgp.errors import BasisMismatchError, InputError
from dualgp.kernels import cross_covariance, describe, frozen_copy, kernel_diagonal, prior_covariance
from dualgp.linalg import psd_cholesky, row_chunks, tri_inverse, whiten


@dataclass(frozen=True, eq=False)
class Features:
    """What a basis says of a block of inputs: φ [*b, n, M], prior variance k(x, x) [*b, n], prior mean μ [*b, n]."""

    phi: Tensor
    prior_var: Tensor
    prior_mean: Tensor

    @cached_property
    def residual(self) -> Tensor:
        """R = k − φᵀφ in float64; ≥ 0 on paper, and cut there where rounding takes it below."""
        return (self.prior_var - self.phi.square().sum(-1).double()).clamp_min(0.0)


class InducingBasis:
    """f(x) = μ(x) + φ(x)ᵀw + r(x), with φ(x) = L⁻¹k(Z, x), L = chol K_zz, w ~ N(0, I), r of variance k − φᵀφ.

    w are the whitened inducing values: u = f(Z) = μ(Z) + L w. The basis owns frozen float64 copies of the kernel and
    the mean and is factorised once, so it cannot go stale when the originals train on.

    Args:
        kernel: a GPyTorch kernel; its batch shape [*batch] (or [*batch, C], or [C]) gives one process each.
        inducing_points: Z, shape [*batch, M, D]; its dtype is the dtype of n × M work and of the answers.
        mean: a GPyTorch mean, or None for zero.
        num_outputs: C for several outputs per datum (the last batch dimension), None for one.
        jitter: relative to the mean of diag K_zz; what was used is in `.jitter`.

    Raises:
        InputError: if the inducing points are not a finite floating-point matrix.
        NotPositiveDefiniteError: if K_zz cannot be factorised.

    Source: Hensman et al. 2015 (whitening); Titsias 2009.

    Example:
        >>> from gpytorch.kernels import RBFKernel
        >>> basis = InducingBasis(RBFKernel(), torch.zeros(1, 1))
        >>> basis.features(torch.zeros(1, 1)).phi.shape
        torch.Size([1, 1])
    """

    def __init__(
        self,
        kernel: Kernel,
        inducing_points: Tensor,
        mean: Mean | None = None,
        *,
        num_outputs: int | None = None,
        jitter: float = 1e-6,
        _owned: bool = False,
    ) -> None:
        if inducing_points.ndim < 2 or not inducing_points.is_floating_point():
            raise InputError(
                "inducing_points must be floating point of shape [*batch, M, D], got "
                f"{inducing_points.dtype} {tuple(inducing_points.shape)}."
            )
        if not inducing_points.isfinite().all():
            raise InputError("inducing_points must be finite, but hold NaN or infinity.")
        self.kernel: Kernel = kernel if _owned else frozen_copy(kernel)
        self.mean: Mean | None = mean if _owned or mean is None else frozen_copy(mean)
        self.inducing_points = inducing_points.detach().clone()
        self.num_outputs = num_outputs
        self.requested_jitter = jitter
        with torch.no_grad():
            Z = self.expand(self.inducing_points)
            Kzz = self.prior_covariance(Z)
            self.L, self.jitter = psd_cholesky(Kzz, jitter)
            self.L_inv = tri_inverse(self.L)
        batch = torch.broadcast_shapes(Kzz.shape[:-2], self.prior_mean(Z).shape[:-1])
        if num_outputs is not None and (not batch or batch[-1] != num_outputs):
            if batch and batch[-1] != 1:
                raise InputError(
                    f"A model of {num_outputs} outputs needs a kernel and mean with batch shape [] (shared) or "
                    f"[..., {num_outputs}], got {tuple(batch)}."
                )
            batch = (*batch[:-1], num_outputs)
        self.batch_shape = torch.Size(batch)

    @classmethod
    def of_owned(cls, kernel: Kernel, inducing_points: Tensor, mean: Mean | None, **options: Any) -> InducingBasis:
        """Build a basis around modules that the caller will not change while it lives (saves the copies)."""
        return cls(kernel, inducing_points, mean, _owned=True, **options)

    def at(self, inducing_points: Tensor) -> InducingBasis:
        """Return the basis of the same process at another Z."""
        return InducingBasis.of_owned(
            self.kernel, inducing_points, self.mean, num_outputs=self.num_outputs, jitter=self.requested_jitter
        )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of n × M work and of predictions."""
        return self.inducing_points.dtype

    @property
    def device(self) -> torch.device:
        """Where the basis lives."""
        return self.inducing_points.device

    @property
    def num_inducing(self) -> int:
        """M."""
        return self.inducing_points.shape[-2]

    def is_of(self, kernel: Kernel, mean: Mean | None) -> bool:
        """Return whether the basis was built at the present values of these modules."""
        return _same_values(self.kernel, kernel) and _same_values(self.mean, mean)

    def expand(self, x: Tensor) -> Tensor:
        """Return x [*batch, n, D] with a dimension for the outputs, where there are both."""
        return x.unsqueeze(-3) if self.num_outputs is not None and x.ndim > 2 else x

    def prior_covariance(self, x: Tensor) -> Float[Tensor, "*b n n"]:
        """Return k(x, x) in float64, symmetric, with an exact diagonal."""
        return prior_covariance(self.kernel, x)

    def prior_mean(self, x: Tensor) -> Float[Tensor, "*b n"]:
        """Return μ(x) in float64."""
        if self.mean is None:
            return torch.zeros(x.shape[:-1], dtype=torch.float64, device=x.device)
        return self.mean(x.double())

    def features(self, x: Tensor) -> Features:
        """Return φ(x) in the dtype of the basis, with prior variance and mean in float64; differentiable."""
        x = self.expand(x)
        cross = cross_covariance(self.kernel, x, self.expand(self.inducing_points), self.dtype)
        phi = whiten(cross, self.L_inv)
        return Features(phi, kernel_diagonal(self.kernel, x), self.prior_mean(x))

    def blocks(self, x: Tensor) -> Iterator[tuple[slice, Features]]:
        """Yield (rows, features) of blocks of x that stay in cache."""
        for rows in row_chunks(x.shape[-2], self.num_inducing, self.dtype, self.device):
            yield rows, self.features(x[..., rows, :])

    def change_to(self, new: InducingBasis) -> tuple[Tensor, Tensor]:
        """Return (A, shift) with w_self = A w_new + shift: how sites on this basis are read on the new one.

        The same Z under other hyperparameters: u is the same variable, A = L⁻¹L_new (form U). Other Z under the same
        kernel: A = L_z⁻¹K_zz' L_z'⁻ᵀ, the conditional mean of w given w_new; lossless if Z' contains Z.

        Raises:
            BasisMismatchError: if both Z and the kernel or mean differ (change one at a time), or the batch shapes do.

        Source: Bui et al. 2017 (streaming); Chang et al. 2023, eq. 13.
        """
        if self.batch_shape != new.batch_shape or self.num_outputs != new.num_outputs:
            raise BasisMismatchError(f"Batch shapes differ: {tuple(self.batch_shape)} and {tuple(new.batch_shape)}.")
        Z, Z_new = self.inducing_points, new.inducing_points
        if Z.shape == Z_new.shape and bool((Z_new == Z).all()):
            A = self.L_inv @ new.L
            shift = new.prior_mean(self.expand(Z)) - self.prior_mean(self.expand(Z))
            return A, (self.L_inv @ shift.unsqueeze(-1)).squeeze(-1)
        if not new.is_of(self.kernel, self.mean):
            raise BasisMismatchError("Both Z and the hyperparameters differ: move one, then the other.")
        A = self.L_inv @ cross_covariance(self.kernel, self.expand(Z), self.expand(Z_new), torch.float64) @ new.L_inv.mT
        return A, torch.zeros(A.shape[:-1], dtype=A.dtype, device=A.device)


def _same_values(a: torch.nn.Module | None, b: torch.nn.Module | None) -> bool:
    if a is b or a is None or b is None:
        return a is b
    if describe(a) != describe(b):
        return False
    mine, theirs = a.state_dict(), b.state_dict()
    return mine.keys() == theirs.keys() and all(
        torch.equal(mine[k].double(), theirs[k].to(mine[k].device).double()) for k in mine
    )
