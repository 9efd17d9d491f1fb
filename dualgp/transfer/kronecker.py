"""Posteriors over weights whose precision is a sum of Kronecker products, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn

from dualgp.errors import BasisMismatchError, InputError, NotPositiveDefiniteError
from dualgp.linalg import precision_cholesky, symmetrise
from dualgp.sites import WeightSite
from dualgp.weights import Number, WeightLayout, WeightPosterior

Names: TypeAlias = tuple[str, ...]
Terms: TypeAlias = tuple[tuple[Tensor, Tensor], ...]
Map: TypeAlias = Callable[[Tensor], Tensor]
_DENSE = 2048  # weights of a layer up to which its block is factorised densely
_TOLERANCE, _STEPS = 1e-12, 2000


@dataclass(frozen=True, eq=False)
class KroneckerCurvature:
    """B = ⊕ layers Σₖ Gₖ ⊗ Aₖ + diag(rest): a sum of sums, since Kronecker products are not closed under addition.

    Args:
        layout: of all weights.
        terms: for the names of a layer, (weight,) or (weight, bias), its products (G [O, O], A [I, I]); the weight is
            [O, ...] with I numbers in a row, and the bias, if named, is one more column.
        rest: a diagonal besides, [P]: for weights without factors.

    Raises:
        InputError: if factors do not fit the shapes of the layout.
    """

    layout: WeightLayout
    terms: Mapping[Names, Terms]
    rest: Tensor

    def __post_init__(self) -> None:
        for names, terms in self.terms.items():
            n_out, n_in = self._sides(names)
            for G, A in terms:
                if G.shape != (n_out, n_out) or A.shape != (n_in, n_in):
                    raise InputError(
                        f"Layer {names} needs factors of sides {n_out} and {n_in}, got {tuple(G.shape)} and "
                        f"{tuple(A.shape)}."
                    )
        if self.rest.shape != (self.layout.size,):
            raise InputError(f"Expected a diagonal of {self.layout.size}, got {tuple(self.rest.shape)}.")

    def _sides(self, names: Names) -> tuple[int, int]:
        unknown = [n for n in names if n not in self.layout.shapes]
        if unknown or len(names) not in (1, 2) or len(self.layout.shapes[names[0]]) < 1:
            raise InputError(f"A layer is (weight,) or (weight, bias) of the layout, got {names}.")
        shape = self.layout.shapes[names[0]]
        return shape[0], shape.numel() // shape[0] + (len(names) == 2)

    def __add__(self, other: KroneckerCurvature) -> KroneckerCurvature:
        if list(self.layout.shapes.items()) != list(other.layout.shapes.items()):
            raise BasisMismatchError("Curvatures of one network add; these are over other weights.")
        layers = list(dict.fromkeys([*self.terms, *other.terms]))
        terms = {names: (*self.terms.get(names, ()), *other.terms.get(names, ())) for names in layers}
        return KroneckerCurvature(self.layout, terms, self.rest + other.rest)

    def __mul__(self, factor: Number) -> KroneckerCurvature:
        terms = {names: tuple((G * factor, A) for G, A in of) for names, of in self.terms.items()}
        return KroneckerCurvature(self.layout, terms, self.rest * factor)

    __rmul__ = __mul__

    def __matmul__(self, v: Float[Tensor, "P"]) -> Float[Tensor, "P"]:
        """Return Bv."""
        out = self.rest * v
        for names, where, terms in self.layers():
            out[where] += self.apply(names, terms, v[where])
        return out

    def layers(self) -> Iterator[tuple[Names, Tensor, Terms]]:
        """Yield names, the positions of a layer's weights among the P in the order [O, I], and terms."""
        starts, stop = {}, 0
        for name, shape in self.layout.shapes.items():
            starts[name], stop = stop, stop + shape.numel()
        for names, terms in self.terms.items():
            n_out, n_in = self._sides(names)
            columns = n_in - (len(names) == 2)
            where = torch.arange(n_out * columns, device=self.rest.device).view(n_out, columns) + starts[names[0]]
            if len(names) == 2:
                bias = torch.arange(n_out, device=self.rest.device) + starts[names[1]]
                where = torch.cat([where, bias.unsqueeze(1)], 1)
            yield names, where.flatten(), terms

    def apply(self, names: Names, terms: Terms, v: Tensor) -> Tensor:
        """Return Σₖ Gₖ V Aₖᵀ of one layer, flat."""
        V = v.view(self._sides(names))
        out = torch.zeros_like(V)
        for G, A in terms:
            out += G.to(V) @ V @ A.to(V).mT
        return out.flatten()

    def to_dense(self) -> Float[Tensor, "P P"]:
        """Return B itself, in float64."""
        B = torch.diag(self.rest.double())
        for _, where, terms in self.layers():
            B[where.unsqueeze(1), where] += torch.stack([torch.kron(G.double(), A.double()) for G, A in terms]).sum(0)
        return B


@dataclass(frozen=True, eq=False)
class KroneckerSite:
    """One Gaussian factor on the weights, exp(λᵀθ − ½ θᵀBθ), with B a `KroneckerCurvature`."""

    lam: Tensor
    B: KroneckerCurvature

    def __add__(self, other: KroneckerSite) -> KroneckerSite:
        return KroneckerSite(self.lam + other.lam, self.B + other.B)

    def __sub__(self, other: KroneckerSite) -> KroneckerSite:
        return self + (-1.0) * other

    def __mul__(self, factor: Number) -> KroneckerSite:
        return KroneckerSite(self.lam * factor, self.B * factor)

    __rmul__ = __mul__


class KroneckerPosterior:
    """q(θ) = N(m, S⁻¹) with S = diag(S₀) + B: a diagonal prior times a site whose curvature is in Kronecker products.

    What `merge` and `forget` need of a posterior. The mean is solved layer by layer: densely up to 2048 weights, beyond
    by conjugate gradients to a relative residual of 1e-12.

    Args:
        layout: names and shapes of the weights.
        site: the site; the prior itself if None.
        prior_mean: m₀, a number or [P].
        prior_precision: S₀, a number or [P].

    Raises:
        InputError: if shapes do not fit.
        NotPositiveDefiniteError: if S is not positive definite.

    Example:
        >>> layout = WeightLayout({"w": torch.Size([1, 2])})
        >>> B = KroneckerCurvature(layout, {("w",): ((torch.ones(1, 1), torch.eye(2)),)}, torch.zeros(2))
        >>> q = KroneckerPosterior(layout, KroneckerSite(torch.tensor([2.0, 4.0]), B), prior_precision=1.0)
        >>> q.mean
        tensor([1., 2.])
    """

    def __init__(
        self,
        layout: WeightLayout,
        site: KroneckerSite | None = None,
        *,
        prior_mean: Tensor | Number = 0.0,
        prior_precision: Tensor | Number,
    ) -> None:
        given = (v for v in (prior_mean, prior_precision) if isinstance(v, Tensor))
        like = site.lam if site is not None else next(given, torch.zeros(()))
        self.layout, self.site = layout, site
        parts = [torch.as_tensor(v, dtype=like.dtype, device=like.device) for v in (prior_mean, prior_precision)]
        if any(part.shape not in ((), (layout.size,)) for part in parts):
            raise InputError(
                f"For {layout.size} weights prior_mean and prior_precision are numbers or [{layout.size}]; got "
                f"{[tuple(part.shape) for part in parts]}."
            )
        self.prior_mean, self.prior_precision = (part.expand(layout.size) for part in parts)
        if site is not None and site.lam.shape != (layout.size,):
            raise BasisMismatchError(f"The layout has {layout.size} weights, the site {tuple(site.lam.shape)}.")
        self.mean = self.prior_mean
        if site is not None:  # S(m − m₀) = λ − Bm₀
            self.mean = self.prior_mean + self.solve(site.lam - site.B @ self.prior_mean)

    @classmethod
    def fine_tuned(
        cls, base: WeightPosterior, mean: Float[Tensor, "P"], curvature: KroneckerCurvature
    ) -> KroneckerPosterior:
        """Return a model trained from a diagonal base, as `dualgp.transfer.fine_tuned` does for diagonals and dense.

        Raises:
            InputError: if the base is dense.
        """
        if base.structure != "diagonal":
            raise InputError("A Kronecker posterior has a diagonal base; with a dense one use fine_tuned and to_dense.")
        lam = base.precision * (mean - base.mean) + curvature @ mean
        prior = {"prior_mean": base.mean, "prior_precision": base.precision}
        return cls(base.layout, KroneckerSite(lam, curvature), **prior)

    def with_site(self, site: KroneckerSite | None) -> KroneckerPosterior:
        """Return the posterior of another site under the same prior."""
        return KroneckerPosterior(self.layout, site, prior_mean=self.prior_mean, prior_precision=self.prior_precision)

    def to_dense(self) -> WeightPosterior:
        """Return the same Gaussian with its precision written out, [P, P] in float64."""
        prior = {"prior_mean": self.prior_mean.double(), "prior_precision": self.prior_precision.double()}
        site = None if self.site is None else WeightSite(self.site.lam.double(), self.site.B.to_dense())
        return WeightPosterior(self.layout, site, **prior)

    def load_mean_into(self, network: nn.Module) -> None:
        """Copy the mean into the network's parameters, in place. Errors as in `WeightPosterior.load_mean_into`."""
        WeightPosterior(self.layout, prior_mean=self.mean, prior_precision=self.prior_precision).load_mean_into(network)

    def solve(self, v: Float[Tensor, "P"]) -> Float[Tensor, "P"]:
        """Return S⁻¹v.

        Raises:
            NotPositiveDefiniteError: if S is not positive definite.
        """
        if self.site is None:
            return v / self.prior_precision
        B, b = self.site.B, v.double()
        diagonal = self.prior_precision.double() + B.rest.double()
        in_layers = torch.zeros_like(diagonal, dtype=torch.bool)
        out = torch.empty_like(b)
        for names, where, terms in B.layers():
            in_layers[where] = True
            out[where] = _solve_layer(B, names, terms, diagonal[where], b[where])
        free = diagonal[~in_layers]
        if not bool((free > 0).all()):
            precision_cholesky(torch.diag(free.min().reshape(1)))  # raises, naming the smallest
        out[~in_layers] = b[~in_layers] / free
        return out.to(v.dtype)


def _solve_layer(B: KroneckerCurvature, names: Names, terms: Terms, diagonal: Tensor, b: Tensor) -> Tensor:
    """(diag(d) + Σ G ⊗ A)⁻¹ b."""
    if len(b) <= _DENSE:
        dense = torch.diag(diagonal)
        for G, A in terms:
            dense += torch.kron(G.double(), A.double())
        return torch.cholesky_solve(b.unsqueeze(-1), precision_cholesky(symmetrise(dense))).squeeze(-1)

    def apply(v: Tensor) -> Tensor:
        return diagonal * v + B.apply(names, terms, v)

    psd = all(float(G.diagonal().sum()) >= 0 and float(A.diagonal().sum()) >= 0 for G, A in terms)
    if not (psd and bool((diagonal > 0).all())):  # something was taken out: look before solving
        _check_positive(apply, len(b), names)
    return _conjugate_gradients(apply, _preconditioner(terms, diagonal), b, names)


def _preconditioner(terms: Terms, diagonal: Tensor) -> Map:
    """V ↦ (G ⊗ A + d̄I)⁻¹ v with the factors' sums, which share the trace of Σ Gₖ ⊗ Aₖ."""
    scaled = [(G.double() * A.double().trace(), A.double() / A.double().trace()) for G, A in terms]
    G = torch.stack([G for G, _ in scaled]).sum(0)
    A = torch.stack([g.trace() * A for g, A in scaled]).sum(0) / G.trace()
    (g, U), (a, W) = torch.linalg.eigh(symmetrise(G)), torch.linalg.eigh(symmetrise(A))
    values = torch.outer(g, a).clamp_min(0.0) + diagonal.mean().clamp_min(1e-12 * float(g.abs().max() * a.abs().max()))

    def apply(v: Tensor) -> Tensor:
        V = v.view(len(g), len(a))
        return (U @ ((U.mT @ V @ W) / values) @ W.mT).flatten()

    return apply


def _conjugate_gradients(apply: Map, precondition: Map, b: Tensor, names: Names) -> Tensor:
    x, r = torch.zeros_like(b), b.clone()
    z = precondition(r)
    p, rz = z.clone(), r @ z
    for _ in range(_STEPS):
        if r.norm() <= _TOLERANCE * b.norm():
            return x
        Ap = apply(p)
        curvature = p @ Ap
        if not float(curvature) > 0:
            raise _indefinite(names, float(curvature / (p @ p)))
        step = rz / curvature
        x, r = x + step * p, r - step * Ap
        z = precondition(r)
        rz, before = r @ z, rz
        p = z + (rz / before) * p
    if r.norm() <= 1e-6 * b.norm():
        return x
    raise NotPositiveDefiniteError(
        f"Conjugate gradients left {float(r.norm() / b.norm()):.1e} of the right-hand side of layer {names} after "
        f"{_STEPS} steps: its precision is too badly conditioned. Raise the prior precision, or use a diagonal."
    )


def _check_positive(apply: Map, size: int, names: Names) -> None:
    operator = LinearOperator((size, size), lambda v: apply(torch.from_numpy(np.array(v).ravel())).numpy(), dtype="f8")
    start = np.random.default_rng(0).standard_normal(size)
    smallest = float(eigsh(operator, k=1, which="SA", v0=start, tol=1e-4, return_eigenvectors=False)[0])
    if smallest <= 0:
        raise _indefinite(names, smallest)


def _indefinite(names: Names, value: float) -> NotPositiveDefiniteError:
    return NotPositiveDefiniteError(
        f"No Gaussian is left in layer {names}: its precision has an eigenvalue of {value:.3g} or less. More was taken "
        "out than had been put in, or the factors are of other data."
    )
