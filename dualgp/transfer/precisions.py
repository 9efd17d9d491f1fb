"""The precision of one layer's weights, S = diag(d) + Σₖ Gₖ ⊗ Aₖ: solved, inverted on its diagonal, and drawn from.

| S | way | multiplied out |
|---|---|---|
| d all equal, one product | eigenvectors U of G, W of A: S = (U ⊗ W)(diag(g ⊗ a) + d)(U ⊗ W)ᵀ | never |
| up to 2048 weights | Cholesky | yes |
| more | conjugate gradients; a draw is S⁻¹ε with ε ~ N(0, S) drawn term by term | for variances only |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

from dualgp.draws import normal
from dualgp.errors import NotPositiveDefiniteError, SolverError, UnsupportedError
from dualgp.linalg import precision_cholesky, symmetrise
from dualgp.solvers import conjugate_gradients

Terms: TypeAlias = tuple[tuple[Tensor, Tensor], ...]
Map: TypeAlias = Callable[[Tensor], Tensor]
_DENSE = 2048  # weights of a layer up to which its precision is factorised densely
_DENSE_VARIANCE = 8192  # and up to which it is for marginal variances, which nothing else gives
_TOLERANCE, _STEPS = 1e-11, 2000
_ROUNDING = 1e-10  # relative; eigenvalues of a factor that are no more negative than this are 0


@runtime_checkable
class LayerPrecision(Protocol):
    """S of one layer, positive definite, in float64."""

    def solve(self, b: Float[Tensor, "p"]) -> Float[Tensor, "p"]:
        """Return S⁻¹b."""

    def variance(self) -> Float[Tensor, "p"]:
        """Return diag S⁻¹."""

    def draw(self, count: int, generator: torch.Generator | None) -> Float[Tensor, "s p"]:
        """Return draws from N(0, S⁻¹)."""


def layer_precision(layer: str, terms: Terms, diagonal: Float[Tensor, "p"]) -> LayerPrecision:
    """Return the precision of a layer in the way of the table above.

    Args:
        layer: its name, for messages.
        terms: (G [O, O], A [I, I]), whose products act on weights [O, I].
        diagonal: d, [O · I], float64.

    Raises:
        NotPositiveDefiniteError: if S is not positive definite.
    """
    terms = tuple((symmetrise(G.double()), symmetrise(A.double())) for G, A in terms if G.any() and A.any())
    if not terms:
        return Diagonal.of(diagonal)
    if len(terms) == 1 and bool((diagonal == diagonal[0]).all()):
        return Eigen.of(layer, *terms[0], diagonal[0])
    if len(diagonal) <= _DENSE:
        return Dense.of(terms, diagonal)
    return Iterative.of(layer, terms, diagonal)


@dataclass(frozen=True, eq=False)
class Eigen:
    """S = (U ⊗ W) diag(e) (U ⊗ W)ᵀ."""

    U: Float[Tensor, "o o"]
    W: Float[Tensor, "i i"]
    e: Float[Tensor, "o i"]

    @classmethod
    def of(cls, layer: str, G: Tensor, A: Tensor, d: Tensor) -> Eigen:
        """Factorise dI + G ⊗ A."""
        (g, U), (a, W) = torch.linalg.eigh(G), torch.linalg.eigh(A)
        e = torch.outer(g, a) + d
        if not bool((e > 0).all()):
            raise _indefinite(layer, float(e.min()))
        return cls(U, W, e)

    def solve(self, b: Float[Tensor, "*s p"]) -> Float[Tensor, "*s p"]:
        """Return S⁻¹b, of each row."""
        V = b.view(*b.shape[:-1], *self.e.shape)
        return (self.U @ ((self.U.mT @ V @ self.W) / self.e) @ self.W.mT).flatten(-2)

    def variance(self) -> Float[Tensor, "p"]:
        """Return diag S⁻¹ = (U² ⊗ W²) e⁻¹."""
        return (self.U.square() @ self.e.reciprocal() @ self.W.square().mT).flatten()

    def draw(self, count: int, generator: torch.Generator | None) -> Float[Tensor, "s p"]:
        """Return (U ⊗ W) e^{−½} ε."""
        noise = normal((count, *self.e.shape), self.e, generator)
        return (self.U @ (noise * self.e.rsqrt()) @ self.W.mT).flatten(1)


@dataclass(frozen=True, eq=False)
class Diagonal:
    """S = diag(d), of weights without factors."""

    d: Float[Tensor, "p"]

    @classmethod
    def of(cls, d: Float[Tensor, "p"]) -> Diagonal:
        """Check that d is positive."""
        if not bool((d > 0).all()):
            precision_cholesky(torch.diag(d.min().reshape(1)))  # raises, naming the smallest
        return cls(d)

    def solve(self, b: Float[Tensor, "p"]) -> Float[Tensor, "p"]:
        """Return b/d."""
        return b / self.d

    def variance(self) -> Float[Tensor, "p"]:
        """Return 1/d."""
        return self.d.reciprocal()

    def draw(self, count: int, generator: torch.Generator | None) -> Float[Tensor, "s p"]:
        """Return d^{−½} ε."""
        return normal((count, len(self.d)), self.d, generator) * self.d.rsqrt()


@dataclass(frozen=True, eq=False)
class Dense:
    """S = CCᵀ, multiplied out."""

    chol: Float[Tensor, "p p"]

    @classmethod
    def of(cls, terms: Terms, diagonal: Tensor) -> Dense:
        """Factorise diag(d) + Σ G ⊗ A."""
        S = torch.diag(diagonal)
        for G, A in terms:
            S += torch.kron(G, A)
        return cls(precision_cholesky(S))

    def solve(self, b: Float[Tensor, "p"]) -> Float[Tensor, "p"]:
        """Return S⁻¹b."""
        return torch.cholesky_solve(b.unsqueeze(-1), self.chol).squeeze(-1)

    def variance(self) -> Float[Tensor, "p"]:
        """Return diag S⁻¹."""
        return torch.cholesky_inverse(self.chol).diagonal()

    def draw(self, count: int, generator: torch.Generator | None) -> Float[Tensor, "s p"]:
        """Return εC⁻¹."""
        noise = normal((count, len(self.chol)), self.chol, generator)
        return torch.linalg.solve_triangular(self.chol, noise, upper=False, left=False)


@dataclass(frozen=True, eq=False)
class Iterative:
    """S as it is: products with it, and conjugate gradients to a relative residual of 1e-11.

    Source: Papandreou & Yuille 2010 (draws by perturbation).
    """

    layer: str
    terms: Terms
    diagonal: Float[Tensor, "p"]
    precondition: Map

    @classmethod
    def of(cls, layer: str, terms: Terms, diagonal: Tensor) -> Iterative:
        """Look at S first if something has been taken out of it."""
        S = cls(layer, terms, diagonal, _preconditioner(terms, diagonal))
        psd = all(float(G.trace()) >= 0 and float(A.trace()) >= 0 for G, A in terms)
        if not (psd and bool((diagonal > 0).all())):
            _check_positive(S.apply, len(diagonal), layer)
        return S

    def apply(self, v: Float[Tensor, "*s p"]) -> Float[Tensor, "*s p"]:
        """Return Sv, of each row."""
        out = self.diagonal * v
        for G, A in self.terms:
            out += (G @ v.view(*v.shape[:-1], len(G), len(A)) @ A).flatten(-2)
        return out

    def solve(self, b: Float[Tensor, "*s p"]) -> Float[Tensor, "*s p"]:
        """Return S⁻¹b, of each row.

        Raises:
            SolverError: if S is too badly conditioned.
        """
        rows = b.reshape(-1, len(self.diagonal))
        try:
            found = conjugate_gradients(
                lambda v: self.apply(v.mT.contiguous()).mT,
                rows.mT,
                precondition=lambda r: self.precondition(r.mT.contiguous()).mT,
                tol=_TOLERANCE,
                max_iterations=_STEPS,
            )
        except SolverError as error:
            raise SolverError(
                f"The precision of layer {self.layer} is too badly conditioned: raise the prior precision, or use a "
                f"diagonal. {error}"
            ) from error
        return found.x.mT.reshape(b.shape)

    def variance(self) -> Float[Tensor, "p"]:
        """Return diag S⁻¹, for which S is multiplied out.

        Raises:
            UnsupportedError: if it is too large for that.
        """
        return self._multiplied_out("their exact variances: draw samples, and take theirs").variance()

    def draw(self, count: int, generator: torch.Generator | None) -> Float[Tensor, "s p"]:
        """Return S⁻¹ε, with ε = √d ε₀ + Σ (√G ⊗ √A) εₖ of covariance S; densely where a term is not a square.

        Raises:
            UnsupportedError: if a term is negative, as after `forget`, and S too large to multiply out.
        """
        roots = [(RG, RA) for G, A in self.terms if (RG := _root(G)) is not None and (RA := _root(A)) is not None]
        if len(roots) < len(self.terms) or not bool((self.diagonal >= 0).all()):
            return self._multiplied_out("draws where something was taken out").draw(count, generator)
        eps = normal((count, len(self.diagonal)), self.diagonal, generator) * self.diagonal.sqrt()
        for RG, RA in roots:
            eps += (RG @ normal((count, len(RG), len(RA)), self.diagonal, generator) @ RA.mT).flatten(1)
        return self.solve(eps)

    def _multiplied_out(self, what: str) -> Dense:
        P = len(self.diagonal)
        if P > _DENSE_VARIANCE:
            raise UnsupportedError(
                f"Layer {self.layer} has {P} weights under {len(self.terms)} products, more than the {_DENSE_VARIANCE} "
                f"that are multiplied out for {what}. One product under a prior precision that is a number needs none."
            )
        return Dense.of(self.terms, self.diagonal)


def _root(M: Tensor) -> Tensor | None:
    """R with RRᵀ = M, or None if M is not positive semi-definite."""
    values, vectors = torch.linalg.eigh(M)
    if values[0] < -_ROUNDING * values.abs().max():
        return None
    return vectors * values.clamp_min(0.0).sqrt()


def _preconditioner(terms: Terms, diagonal: Tensor) -> Map:
    """V ↦ (G ⊗ A + d̄I)⁻¹ v with the factors' sums, which share the trace of Σ Gₖ ⊗ Aₖ."""
    scaled = [(G * A.trace(), A / A.trace()) for G, A in terms]
    G = torch.stack([G for G, _ in scaled]).sum(0)
    A = torch.stack([g.trace() * A for g, A in scaled]).sum(0) / G.trace()
    (g, U), (a, W) = torch.linalg.eigh(symmetrise(G)), torch.linalg.eigh(symmetrise(A))
    values = torch.outer(g, a).clamp_min(0.0) + diagonal.mean().clamp_min(1e-12 * float(g.abs().max() * a.abs().max()))
    return Eigen(U, W, values).solve


def _check_positive(apply: Map, size: int, layer: str) -> None:
    operator = LinearOperator((size, size), lambda v: apply(torch.from_numpy(np.array(v).ravel())).numpy(), dtype="f8")
    start = np.random.default_rng(0).standard_normal(size)
    smallest = float(eigsh(operator, k=1, which="SA", v0=start, tol=1e-4, return_eigenvectors=False)[0])
    if smallest <= 0:
        raise _indefinite(layer, smallest)


def _indefinite(layer: str, value: float) -> NotPositiveDefiniteError:
    return NotPositiveDefiniteError(
        f"No Gaussian is left in layer {layer}: its precision has an eigenvalue of {value:.3g} or less. More was taken "
        "out than had been put in, or the factors are of other data."
    )
