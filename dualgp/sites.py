"""Sites: the Gaussian factors whose sum, with the prior, is the posterior.

`Sites` are many, one per datum, each on its own function value; a `Site` is one factor on the coordinates w of a
basis. Both add, subtract and scale; pulling `Sites` back along the features of a basis gives its `Site`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dualgp.errors import BasisMismatchError, InputError


@dataclass(frozen=True, eq=False)
class Sites:
    """One Gaussian site per datum, tᵢ(fᵢ) = exp(λᵢ fᵢ − ½ βᵢ fᵢ²), in precision convention.

    λᵢ = αᵢ + βᵢ mᵢ with αᵢ = E_q[∂ log p(yᵢ|f)] and βᵢ = −E_q[∂² log p(yᵢ|f)]; (λ, β) add, α is derived. The site
    acts on f itself, prior mean included, so it keeps its meaning when the mean function changes.

    Args:
        lam: λ, shape [*batch, N], or [*batch, N, C] with `multi_output`.
        beta: β, the same shape; negative only where the likelihood is not log-concave.
        multi_output: whether the last dimension counts outputs rather than data.

    Raises:
        InputError: if the two shapes differ.

    Source: Adam et al. 2021 ("Dual parameterization of sparse variational Gaussian processes"), eq. 8 to 11; there
    λ⁽²⁾ is −½β.

    Example:
        >>> s = Sites(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))
        >>> (s + s - s)[1].lam
        tensor([2.])
    """

    lam: Tensor
    beta: Tensor
    multi_output: bool = False

    def __post_init__(self) -> None:
        if self.lam.shape != self.beta.shape:
            raise InputError(
                f"lam and beta must have one shape, got {tuple(self.lam.shape)} and {tuple(self.beta.shape)}."
            )
        if self.lam.ndim < 2 and self.multi_output:
            raise InputError(f"multi_output sites have shape [*batch, N, C], got {tuple(self.lam.shape)}.")

    def __len__(self) -> int:
        return self.lam.shape[-2] if self.multi_output else self.lam.shape[-1]

    def alpha(self, mean: Tensor) -> Tensor:
        """Return α = λ − β m at marginal means m of the same shape."""
        return self.lam - self.beta * mean

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> Sites:
        """Return the sites of some data (indexes the data dimension)."""
        index = [index] if isinstance(index, int) else index
        at = (..., index, slice(None)) if self.multi_output else (..., index)
        return Sites(self.lam[at], self.beta[at], self.multi_output)

    def __add__(self, other: Sites) -> Sites:
        self._check(other)
        return Sites(self.lam + other.lam, self.beta + other.beta, self.multi_output)

    def __sub__(self, other: Sites) -> Sites:
        return self + (-1.0) * other

    def __mul__(self, factor: float | int | Tensor) -> Sites:
        return Sites(self.lam * factor, self.beta * factor, self.multi_output)

    __rmul__ = __mul__

    def pull_back(self, features: Float[Tensor, "*b n m"], offset: Tensor | float = 0.0) -> Site:
        """Return the one site that these are on w, where f = offset + features · w.

        λ_w = Φᵀ(λ − β·offset), B = Φᵀ diag(β) Φ. Dense and obvious; `Posterior.project` does it in chunks.
        """
        lam, beta = self.by_latent()
        lam = lam - beta * offset
        return Site((features.mT @ lam.unsqueeze(-1)).squeeze(-1), (features.mT * beta.unsqueeze(-2)) @ features)

    def by_latent(self) -> tuple[Tensor, Tensor]:
        """Return (λ, β) with data last: [*batch, N], or [*batch, C, N] for several outputs."""
        return (self.lam.mT, self.beta.mT) if self.multi_output else (self.lam, self.beta)

    @classmethod
    def from_latent(cls, lam: Tensor, beta: Tensor, multi_output: bool) -> Sites:
        """Build sites from (λ, β) with data last."""
        return cls(lam.mT, beta.mT, True) if multi_output else cls(lam, beta)

    @classmethod
    def cat(cls, parts: Sequence[Sites]) -> Sites:
        """Join sites of different data, in order."""
        multi = parts[0].multi_output
        dim = -2 if multi else -1
        return cls(torch.cat([p.lam for p in parts], dim), torch.cat([p.beta for p in parts], dim), multi)

    def _check(self, other: Sites) -> None:
        if self.lam.shape != other.lam.shape or self.multi_output != other.multi_output:
            raise BasisMismatchError(
                f"Sites add datum by datum; got shapes {tuple(self.lam.shape)} and {tuple(other.lam.shape)}. "
                "To join sites of different data use Sites.cat."
            )


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
