"""What the posterior asks of a basis, and the inducing basis: a process seen through M inputs, whitened."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from gpytorch.kernels import Kernel
from gpytorch.means import Mean
from jaxtyping import Float
from torch import Tensor

from dualgp.checks import check_number, check_tensor
from dualgp.errors import BasisMismatchError, InputError, UnsupportedError
from dualgp.kernels import (
    check_columns,
    check_kernel,
    cross_covariance,
    describe,
    frozen_copy,
    kernel_diagonal,
    prior_covariance,
)
from dualgp.linalg import GramSum, psd_cholesky, psd_part, row_chunks, tri_inverse, whiten
from dualgp.sites import Site, Sites


@dataclass(frozen=True, eq=False)
class Features:
    """What a basis says of a block of inputs: φ [*b, n, M], prior variance k(x, x) [*b, n], prior mean μ [*b, n].

    A basis of coupled outputs has a row for each output of each datum, data first: n = data · C. Its `prior_block` are
    the prior covariances [data, C, C] between the outputs of a datum; None where nothing is left of them beside φφᵀ.
    """

    phi: Tensor
    prior_var: Tensor
    prior_mean: Tensor
    prior_block: Tensor | None = None

    @cached_property
    def residual(self) -> Tensor:
        """R = k − φᵀφ in float64; ≥ 0 on paper, and cut there where rounding takes it below."""
        return (self.prior_var - self.phi.square().sum(-1).double()).clamp_min(0.0)

    @property
    def residual_block(self) -> Tensor | None:
        """The residual covariances [data, C, C] of coupled outputs in float64, ⪰ 0; None where there are none."""
        if self.prior_block is None:
            return None
        phi = self.phi.double().unflatten(0, self.prior_block.shape[:2])
        return psd_part(self.prior_block - phi @ phi.mT)


class Basis(ABC):
    """Coordinates w ~ N(0, I) of f(x) = μ(x) + φ(x)ᵀw + r(x): what `Posterior` asks, of Gaussian process or network.

    Attributes:
        batch_shape: one process each; ends in C where outputs are processes of their own.
        num_outputs: C, or None for one output without a dimension of its own.
        coupled: whether the C outputs share w, each with features of its own, so that data couple them.
        has_residual: whether r(x) is not zero.
    """

    batch_shape: torch.Size
    num_outputs: int | None
    coupled: bool = False
    has_residual: bool = True

    @property
    @abstractmethod
    def size(self) -> int:
        """The number of coordinates."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype of n × M work and of predictions."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the basis lives."""

    @abstractmethod
    def check_inputs(self, x: Tensor) -> int:
        """Return how many data x holds; raise InputError if it cannot be predicted at."""

    @abstractmethod
    def features(self, x: Tensor) -> Features:
        """Return the features of all of x at once."""

    @abstractmethod
    def blocks(self, x: Tensor) -> Iterator[tuple[slice, Features]]:
        """Yield (data, features) of blocks of x of bounded memory."""

    @abstractmethod
    def residual_covariance(self, x: Tensor, phi: Tensor) -> Tensor:
        """Return k(x, x) − φφᵀ between all rows of the features, in float64."""

    @abstractmethod
    def carry(self, site: Site, new: Basis) -> Site:
        """Return a site on this basis as one on another; raise BasisMismatchError where it cannot cross."""


class SiteSum:
    """A running sum, block by block, of the sites that per-datum (λ, β) make on w: Σ (φᵢ(λᵢ − βᵢμᵢ), βᵢφᵢφᵢᵀ).

    Args:
        basis: of w.
        double: take products in float64, for a sum that will be read under wider priors: rounding in the dtype of the
            basis is small beside this one, and grows with them.
    """

    def __init__(self, basis: Basis, *, double: bool = False) -> None:
        self._lam = Site.zero(basis.batch_shape, basis.size, basis.device).lam
        self._gram = GramSum(basis.batch_shape, basis.size, basis.device)
        self._double = double

    def add(self, features: Features, lam: Tensor, beta: Tensor) -> None:
        """Add a block of data; λ and β have their data last."""
        phi = features.phi.double() if self._double else features.phi
        self._add(phi, lam - beta * features.prior_mean, phi, beta)

    def add_coupled(self, features: Features, sites: Sites) -> None:
        """Add a block of data of a basis of coupled outputs: B += Σ (Rᵢᵀφᵢ)ᵀ(Rᵢᵀφᵢ), with RᵢRᵢᵀ = βᵢ."""
        alpha = sites.alpha(features.prior_mean.reshape(sites.lam.shape)).flatten()
        phi = features.phi.double() if self._double else features.phi
        self._add(phi, alpha, *sites.rotate(phi.unflatten(0, sites.lam.shape)))

    def _add(self, phi: Tensor, alpha: Tensor, rows: Tensor, weights: Tensor) -> None:
        self._lam = self._lam + (phi.mT @ alpha.to(phi.dtype).unsqueeze(-1)).squeeze(-1)
        self._gram.add(rows, weights)

    def site(self) -> Site:
        """Return the sum so far."""
        return Site(self._lam.clone(), self._gram.total())


def jitter_for(dtype: torch.dtype) -> float:
    """Return the jitter that rounding asks for: that of K_xz, in the dtype of inputs, is divided by its root."""
    return 1e-8 if dtype == torch.float64 else 1e-6


class InducingBasis(Basis):
    """f(x) = μ(x) + φ(x)ᵀw + r(x), with φ(x) = L⁻¹k(Z, x), L = chol K_zz, w ~ N(0, I), r of variance k − φᵀφ.

    w are the whitened inducing values: u = f(Z) = μ(Z) + L w. The basis owns frozen float64 copies of the kernel and
    the mean and is factorised once, so it cannot go stale when the originals train on.

    Args:
        kernel: a GPyTorch kernel; its batch shape [*batch] (or [*batch, C], or [C]) gives one process each.
        inducing_points: Z, shape [*batch, M, D]; its dtype is the dtype of n × M work and of the answers.
        mean: a GPyTorch mean, or None for zero.
        num_outputs: C for several outputs per datum (the last batch dimension), None for one.
        jitter: relative to the mean of diag K_zz; 10⁻⁸ for float64 inputs and 10⁻⁶ for others if None. What was used is
            in `.jitter`.

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
        jitter: float | None = None,
        _owned: bool = False,
    ) -> None:
        if not _owned:
            check_kernel(kernel)
            if mean is not None and not isinstance(mean, Mean):
                raise UnsupportedError(f"mean must be a gpytorch.means.Mean or None, got {type(mean).__name__}.")
        check_tensor("inducing_points", inducing_points)
        if inducing_points.ndim < 2 or not inducing_points.is_floating_point():
            raise InputError(
                "inducing_points must be floating point of shape [*batch, M, D], got "
                f"{inducing_points.dtype} {tuple(inducing_points.shape)}."
            )
        if not inducing_points.isfinite().all():
            raise InputError("inducing_points must be finite, but hold NaN or infinity.")
        if not _owned:
            check_columns(kernel, inducing_points.shape[-1])
        self.kernel: Kernel = kernel if _owned else frozen_copy(kernel)
        self.mean: Mean | None = mean if _owned or mean is None else frozen_copy(mean)
        self.inducing_points = inducing_points.detach().clone()
        self.num_outputs = num_outputs
        self.requested_jitter = jitter = jitter_for(inducing_points.dtype) if jitter is None else jitter
        check_number("jitter", jitter, least=0)
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

    def __deepcopy__(self, memo: dict[int, Any]) -> InducingBasis:
        """Return itself: nothing of a basis changes, and copies of GPyTorch's modules take milliseconds."""
        return self

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

    @property
    def size(self) -> int:
        """The number of coordinates, M."""
        return self.num_inducing

    def check_inputs(self, x: Tensor) -> int:
        """Return how many data x [*batch, T, D] holds.

        Raises:
            InputError: if x has the wrong shape, dtype or device.
        """
        d = self.inducing_points.shape[-1]
        if not isinstance(x, Tensor) or x.device == self.device:
            check_tensor("x", x)
        if x.ndim < 2 or x.shape[-1] != d:
            raise InputError(f"Inputs must have shape [*batch, T, {d}], got {tuple(x.shape)}.")
        if x.dtype != self.dtype or x.device != self.device:
            raise InputError(
                f"Inputs must be {self.dtype} on {self.device}, got {x.dtype} on {x.device}; use x.to(...)."
            )
        if not bool(x.isfinite().all()):
            raise InputError("Inputs must be finite, but hold NaN or infinity.")
        return x.shape[-2]

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

    def residual_covariance(self, x: Tensor, phi: Tensor) -> Float[Tensor, "*b n n"]:
        """Return k(x, x) − φφᵀ in float64."""
        return self.prior_covariance(self.expand(x)) - phi @ phi.mT

    def carry(self, site: Site, new: Basis) -> Site:
        """Return the site on another inducing basis; see `change_to`, also for what it raises."""
        if not isinstance(new, InducingBasis):
            raise BasisMismatchError(f"A site on inducing values does not cross to a {type(new).__name__}.")
        return site.pull_back(*self.change_to(new))

    def change_to(self, new: InducingBasis) -> tuple[Tensor, Tensor]:
        """Return (A, shift) with w_self = A w_new + shift: how sites on this basis are read on the new one.

        The same Z under other hyperparameters: u is the same variable, A = L⁻¹L_new (form U). Other Z under the same
        kernel: A = L_z⁻¹K_zz' L_z'⁻ᵀ, the conditional mean of w given w_new; lossless if Z' contains Z. An input that
        both hold is one variable with one jitter: else each move would lose what jitter is worth.

        Raises:
            BasisMismatchError: if both Z and the kernel or mean differ (change one at a time), or the batch shapes do.

        Source: Bui et al. 2017 (streaming); Chang et al. 2023, eq. 13.
        """
        if self.batch_shape != new.batch_shape or self.num_outputs != new.num_outputs:
            raise BasisMismatchError(
                f"Batch shapes or outputs differ: {tuple(self.batch_shape)} with num_outputs={self.num_outputs}, and "
                f"{tuple(new.batch_shape)} with num_outputs={new.num_outputs}."
            )
        Z, Z_new = self.inducing_points, new.inducing_points
        if Z.shape == Z_new.shape and bool((Z_new == Z).all()):
            A = self.L_inv @ new.L
            shift = new.prior_mean(self.expand(Z)) - self.prior_mean(self.expand(Z))
            return A, (self.L_inv @ shift.unsqueeze(-1)).squeeze(-1)
        if not new.is_of(self.kernel, self.mean):
            raise BasisMismatchError("Both Z and the hyperparameters differ: move one, then the other.")
        cross = cross_covariance(self.kernel, self.expand(Z), self.expand(Z_new), torch.float64)
        A = self.L_inv @ (cross + self._shared_jitter(new)) @ new.L_inv.mT
        return A, torch.zeros(A.shape[:-1], dtype=A.dtype, device=A.device)

    def _shared_jitter(self, new: InducingBasis) -> Tensor:
        """Return the covariance of u and u_new that K_zz' leaves out, [*batch M M']."""
        Z, Z_new = self.expand(self.inducing_points), self.expand(new.inducing_points)
        scale = [b.jitter * kernel_diagonal(b.kernel, z).mean(-1) for b, z in ((self, Z), (new, Z_new))]
        return torch.minimum(*scale)[..., None, None] * _same_rows(Z, Z_new)


def _same_rows(x: Tensor, z: Tensor) -> Tensor:
    """Say which row of x is which row of z, [*b n m]; no row is paired twice."""
    same = (x.unsqueeze(-2) == z.unsqueeze(-3)).all(-1)
    return same & (same.cumsum(-1) == 1) & (same.cumsum(-2) == 1)


def _same_values(a: torch.nn.Module | None, b: torch.nn.Module | None) -> bool:
    if a is b or a is None or b is None:
        return a is b
    if describe(a) != describe(b):
        return False
    mine, theirs = a.state_dict(), b.state_dict()
    return mine.keys() == theirs.keys() and all(
        torch.equal(mine[k].double(), theirs[k].to(mine[k].device).double()) for k in mine
    )
