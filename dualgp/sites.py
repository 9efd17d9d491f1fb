"""Sites: the Gaussian factors whose sum, with the prior, is the posterior.

`Sites` are many, one per datum, each on its own function value; a `Site` is one factor on the coordinates w of a
basis, a `WeightSite` one on the weights of a network. All add, subtract and scale; pulling `Sites` back along the
features of a basis gives its `Site`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dualgp.checks import check_tensor
from dualgp.errors import BasisMismatchError, InputError


@dataclass(frozen=True, eq=False)
class Sites:
    """One Gaussian site per datum, tᵢ(fᵢ) = exp(λᵢᵀfᵢ − ½ fᵢᵀβᵢfᵢ), in precision convention.

    λᵢ = αᵢ + βᵢ mᵢ with αᵢ = E_q[∂ log p(yᵢ|f)] and βᵢ = −E_q[∂² log p(yᵢ|f)]; (λ, β) add, α is derived. The site
    acts on f itself, prior mean included, so it keeps its meaning when the mean function changes.

    With several outputs fᵢ has C values. Independent sites have one β for each; coupled sites have a matrix.

    Args:
        lam: λ, shape [*batch, N], or [*batch, N, C] with `multi_output`.
        beta: β, the same shape, or [*batch, N, C, C] if coupled; negative only where the likelihood is not log-concave.
        multi_output: whether the last dimension of λ counts outputs rather than data.
        root: R with RRᵀ = β, of coupled sites for which it is known exactly. Kept by indexing, `cat` and factors ≥ 0.

    Raises:
        InputError: if the shapes do not fit together.

    Source: Adam et al. 2021 ("Dual parameterization of sparse variational Gaussian processes"), eq. 8 to 11; there
    λ⁽²⁾ is −½β.

    Example:
        >>> s = Sites(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))
        >>> (s + s - s)[1].lam
        tensor([2.])
        >>> Sites(torch.zeros(5, 2), torch.eye(2).expand(5, 2, 2), multi_output=True).coupled
        True
    """

    lam: Tensor
    beta: Tensor
    multi_output: bool = False
    root: Tensor | None = None

    def __post_init__(self) -> None:
        for name, value in (("lam", self.lam), ("beta", self.beta)):
            check_tensor(name, value)
        shape = tuple(self.lam.shape)
        block = (*shape, shape[-1]) if self.multi_output else shape
        if self.beta.shape not in (self.lam.shape, block):
            raise InputError(
                f"lam and beta must have one shape, or beta [*batch, N, C, C] with multi_output, got {shape} and "
                f"{tuple(self.beta.shape)}."
            )
        if self.lam.ndim < 2 and self.multi_output:
            raise InputError(f"multi_output sites have shape [*batch, N, C], got {shape}.")
        if self.root is not None and not (self.coupled and self.root.shape == self.beta.shape):
            raise InputError(f"A root needs beta of shape [*batch, N, C, C], got {tuple(self.beta.shape)}.")

    @property
    def coupled(self) -> bool:
        """Whether β is a matrix per datum, between its outputs."""
        return self.beta.ndim > self.lam.ndim

    def __len__(self) -> int:
        return self.lam.shape[-2] if self.multi_output else self.lam.shape[-1]

    def alpha(self, mean: Tensor) -> Tensor:
        """Return α = λ − β m at marginal means m of the same shape."""
        if self.coupled:
            return self.lam - (self.beta * mean.unsqueeze(-2)).sum(-1)
        return self.lam - self.beta * mean

    def decoupled(self, mean: Tensor) -> Sites:
        """Return independent sites, with the diagonal of each β and the same α at m: an approximation."""
        beta = self.beta.diagonal(dim1=-2, dim2=-1) if self.coupled else self.beta
        return Sites(self.alpha(mean) + beta * mean, beta, self.multi_output)

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> Sites:
        """Return the sites of some data (indexes the data dimension)."""
        index = [index] if isinstance(index, int) else index
        at = (..., index, slice(None)) if self.multi_output else (..., index)
        at_beta = (*at, slice(None)) if self.coupled else at
        return Sites(self.lam[at], self.beta[at_beta], self.multi_output, _each(self.root, lambda r: r[at_beta]))

    def __add__(self, other: Sites) -> Sites:
        self._check(other)
        return Sites(self.lam + other.lam, self.beta + other.beta, self.multi_output)

    def __sub__(self, other: Sites) -> Sites:
        return self + (-1.0) * other

    def __mul__(self, factor: float | int | Tensor) -> Sites:
        if not self.coupled:
            return Sites(self.lam * factor, self.beta * factor, self.multi_output)
        factor = torch.as_tensor(factor, dtype=self.lam.dtype, device=self.lam.device)
        if factor.ndim and factor.shape[-1] != 1:
            raise InputError(f"Coupled sites are scaled by a number per datum, [N, 1], got {tuple(factor.shape)}.")
        block = factor.unsqueeze(-1) if factor.ndim else factor
        root = None if bool((factor < 0).any()) else _each(self.root, lambda r: r * block.sqrt())
        return Sites(self.lam * factor, self.beta * block, True, root)

    __rmul__ = __mul__

    def pull_back(self, features: Float[Tensor, "*b n m"], offset: Tensor | float = 0.0) -> Site:
        """Return the one site that these are on w, where f = offset + features · w.

        λ_w = Φᵀ(λ − β·offset), B = Φᵀ diag(β) Φ, with features [*batch, N, M], or [N, C, M] if coupled. Dense and
        obvious; `Posterior.project` does it in chunks.
        """
        if self.coupled:
            mean = torch.as_tensor(offset, dtype=self.lam.dtype, device=self.lam.device)
            alpha = self.alpha(mean.expand(self.lam.shape))
            rows, weights = self.rotate(features)
            flat = features.flatten(-3, -2)
            return Site((flat.mT @ alpha.flatten(-2).unsqueeze(-1)).squeeze(-1), (rows.mT * weights) @ rows)
        lam, beta = self.by_latent()
        lam = lam - beta * offset
        return Site((features.mT @ lam.unsqueeze(-1)).squeeze(-1), (features.mT * beta.unsqueeze(-2)) @ features)

    def rotate(self, phi: Float[Tensor, "*n c m"]) -> tuple[Tensor, Tensor]:
        """Return ψ [NC, M] and weights [NC] with Σ φᵢᵀβᵢφᵢ = ψᵀ diag(weights) ψ, for features of coupled outputs.

        ψᵢ = Rᵢᵀφᵢ with weight 1 where the root is known, else Qᵢᵀφᵢ with the eigenvalues of βᵢ = QᵢEᵢQᵢᵀ.
        """
        if not self.coupled:
            return phi.flatten(0, -2), self.beta.flatten()
        if self.root is not None:
            return (self.root.mT.to(phi.dtype) @ phi).flatten(0, -2), torch.ones_like(self.lam).flatten()
        values, vectors = torch.linalg.eigh(self.beta)
        return (vectors.mT.to(phi.dtype) @ phi).flatten(0, -2), values.flatten()

    def to(self, device: torch.device) -> Sites:
        """Return the sites on a device."""
        root = _each(self.root, lambda r: r.to(device))
        return Sites(self.lam.to(device), self.beta.to(device), self.multi_output, root)

    def by_latent(self) -> tuple[Tensor, Tensor]:
        """Return (λ, β) of independent sites with data last: [*batch, N], or [*batch, C, N] for several outputs."""
        return (self.lam.mT, self.beta.mT) if self.multi_output else (self.lam, self.beta)

    @classmethod
    def from_latent(cls, lam: Tensor, beta: Tensor, multi_output: bool) -> Sites:
        """Build independent sites from (λ, β) with data last."""
        return cls(lam.mT, beta.mT, True) if multi_output else cls(lam, beta)

    @classmethod
    def cat(cls, parts: Sequence[Sites]) -> Sites:
        """Join sites of different data, in order."""
        for part in parts[1:]:
            if part.coupled != parts[0].coupled or part.multi_output != parts[0].multi_output:
                raise BasisMismatchError("Coupled, independent and single-output sites do not join; use `decoupled`.")
        multi = parts[0].multi_output
        dim = -2 if multi else -1
        beta_dim = dim - 1 if parts[0].coupled else dim
        roots = [p.root for p in parts if p.root is not None]
        root = torch.cat(roots, beta_dim) if len(roots) == len(parts) else None
        return cls(torch.cat([p.lam for p in parts], dim), torch.cat([p.beta for p in parts], beta_dim), multi, root)

    def _check(self, other: Sites) -> None:
        if self.beta.shape != other.beta.shape or self.multi_output != other.multi_output:
            raise BasisMismatchError(
                f"Sites add datum by datum; got shapes {tuple(self.beta.shape)} and {tuple(other.beta.shape)}. "
                "To join sites of different data use Sites.cat."
            )


def check_sites_are_finite(sites: object) -> None:
    """Raise InputError unless these are `Sites`, and finite."""
    if not isinstance(sites, Sites):
        raise InputError(f"sites must be dualgp.Sites, got {type(sites).__name__}; see sites_at.")
    if not bool(sites.lam.isfinite().all() and sites.beta.isfinite().all()):
        raise InputError("sites must be finite, but hold NaN or infinity.")


def _each(root: Tensor | None, change: Callable[[Tensor], Tensor]) -> Tensor | None:
    return None if root is None else change(root)


@dataclass(frozen=True, eq=False)
class Site:
    """One Gaussian factor on the coordinates of a basis, t(w) = exp(λᵀw − ½ wᵀBw).

    Args:
        lam: λ, shape [*batch, M] (for several outputs the batch ends in C).
        B: precision, shape [*batch, M, M], symmetric; positive semi-definite if the sites in it are log-concave.

    Raises:
        InputError: if the shapes do not fit together.
    """

    lam: Tensor
    B: Tensor

    def __post_init__(self) -> None:
        if self.B.shape != (*self.lam.shape, self.lam.shape[-1]):
            raise InputError(f"lam {tuple(self.lam.shape)} needs B of shape [..., M, M], got {tuple(self.B.shape)}.")

    def __add__(self, other: Site) -> Site:
        if self.lam.shape != other.lam.shape:
            raise BasisMismatchError(
                f"Sites of one basis add; got {tuple(self.lam.shape)} and {tuple(other.lam.shape)}. Pull one back."
            )
        return Site(self.lam + other.lam, self.B + other.B)

    def __sub__(self, other: Site) -> Site:
        return self + (-1.0) * other

    def __mul__(self, factor: float | int | Tensor) -> Site:
        return Site(self.lam * factor, self.B * factor)

    __rmul__ = __mul__

    def pull_back(self, A: Float[Tensor, "*b m k"], shift: Tensor | None = None) -> Site:
        """Return the site on v, where w = A v + shift: λ ← Aᵀ(λ − B·shift), B ← AᵀBA. Positivity is kept."""
        lam = self.lam if shift is None else self.lam - (self.B @ shift.unsqueeze(-1)).squeeze(-1)
        B = A.mT @ self.B @ A
        return Site((A.mT @ lam.unsqueeze(-1)).squeeze(-1), 0.5 * (B + B.mT))

    @classmethod
    def zero(cls, batch: Sequence[int], size: int, device: torch.device | str = "cpu") -> Site:
        """Return the site that says nothing (λ = 0, B = 0), in float64."""
        lam = torch.zeros(*batch, size, dtype=torch.float64, device=device)
        return cls(lam, lam.new_zeros(*batch, size, size))


@dataclass(frozen=True, eq=False)
class WeightSite:
    """One Gaussian factor on the weights, t(θ) = exp(λᵀθ − ½ θᵀBθ), with B diagonal or dense.

    Args:
        lam: λ, [P].
        B: precision, [P] if diagonal or [P, P].

    Raises:
        InputError: if the shapes do not fit together.

    Example:
        >>> site = WeightSite(torch.ones(2), torch.ones(2)) + WeightSite(torch.ones(2), torch.eye(2))
        >>> site.B
        tensor([[2., 0.],
                [0., 2.]])
    """

    lam: Tensor
    B: Tensor

    def __post_init__(self) -> None:
        for name, value in (("lam", self.lam), ("B", self.B)):
            check_tensor(name, value)
        P = len(self.lam) if self.lam.ndim else 0
        if self.lam.ndim != 1 or self.B.shape not in ((P,), (P, P)):
            raise InputError(
                f"Expected lam [P] and B [P] or [P, P], got {tuple(self.lam.shape)} and {tuple(self.B.shape)}."
            )

    def __add__(self, other: WeightSite) -> WeightSite:
        if self.lam.shape != other.lam.shape:
            raise BasisMismatchError(f"Sites of one network add; got {len(self.lam)} and {len(other.lam)} weights.")
        return WeightSite(self.lam + other.lam, add_precisions(self.B, other.B))

    def __sub__(self, other: WeightSite) -> WeightSite:
        return self + (-1.0) * other

    def __mul__(self, factor: float | int) -> WeightSite:
        return WeightSite(self.lam * factor, self.B * factor)

    __rmul__ = __mul__


def add_precisions(A: Tensor, B: Tensor) -> Tensor:
    """Return A + B of diagonals [P] and dense matrices [P, P]."""
    if A.ndim == B.ndim:
        return A + B
    dense, diagonal = (A, B) if A.ndim == 2 else (B, A)
    return dense + torch.diag(diagonal)


def apply_precision(A: Tensor, v: Float[Tensor, "P"]) -> Float[Tensor, "P"]:
    """Return Av of a diagonal [P] or dense [P, P]."""
    return A @ v if A.ndim == 2 else A * v
