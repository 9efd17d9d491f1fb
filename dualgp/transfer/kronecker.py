"""Posteriors over weights whose precision is a sum of Kronecker products, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dualgp.errors import BasisMismatchError, InputError, check_count
from dualgp.linalg import first_tensor
from dualgp.sites import WeightSite
from dualgp.transfer.precisions import Diagonal, LayerPrecision, Terms, layer_precision
from dualgp.weights import Number, WeightLayout, WeightPosterior, network_at

Names: TypeAlias = tuple[str, ...]


@dataclass(frozen=True, eq=False)
class KroneckerCurvature:
    """B = ⊕ layers Σₖ Gₖ ⊗ Aₖ + diag(rest): a sum of sums, since Kronecker products are not closed under addition.

    Args:
        layout: of all weights.
        terms: for the names of a layer, (weight,) or (weight, bias), its products (G [O, O], A [I, I]); the weight is
            [O, ...] with I numbers in a row, and the bias, if named, is one more column.
        rest: a diagonal besides, [P]: for weights without factors.

    Raises:
        InputError: if factors do not fit the shapes of the layout, a weight is in two layers, or a value is not finite.
    """

    layout: WeightLayout
    terms: Mapping[Names, Terms]
    rest: Tensor

    def __post_init__(self) -> None:
        flat = [name for names in self.terms for name in names]
        if len(set(flat)) < len(flat):
            raise InputError(
                f"A weight is of one layer, got {sorted(n for n in set(flat) if flat.count(n) > 1)} in two."
            )
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
        values = [self.rest, *(factor for terms in self.terms.values() for term in terms for factor in term)]
        if not all(bool(value.isfinite().all()) for value in values):
            raise InputError("A curvature is not finite: look for a diverged run or a bad file.")

    def _sides(self, names: Names) -> tuple[int, int]:
        unknown = [n for n in names if n not in self.layout.shapes]
        if not unknown and len(names) == 2 and self.layout.shapes[names[1]] != self.layout.shapes[names[0]][:1]:
            raise InputError(f"{names[1]!r} is no bias of {names[0]!r}: it has {self.layout.shapes[names[1]]} numbers.")
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

    def to_tensors(self) -> dict[str, Tensor]:
        """Return tensors by name to save: "x.weight.G" and "x.weight.A" of a layer, and diagonals of other weights.

        As `merge_shards` reads them, of curvatures of one set of data.

        Raises:
            InputError: if a layer has several products, weights with factors a diagonal besides, or a bias not the name
                of its weight.
        """
        rest = self.layout.split(self.rest)
        found: dict[str, Tensor] = {}
        for names, terms in self.terms.items():
            named = len(names) == 1 or names[1] == names[0].removesuffix("weight") + "bias"
            if len(terms) != 1 or not named or any(bool(rest.pop(name).any()) for name in names):
                raise InputError(f"Layer {names} is not one product G ⊗ A for an x.weight, with x.bias or without.")
            found |= {f"{names[0]}.{side}": factor.contiguous() for side, factor in zip("GA", terms[0], strict=True)}
        return found | {name: values.clone() for name, values in rest.items()}

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
        if not isinstance(other, KroneckerSite):
            raise BasisMismatchError("Kronecker sites add to their like; use to_dense() of their curvature.")
        return KroneckerSite(self.lam + other.lam, self.B + other.B)

    def __sub__(self, other: KroneckerSite) -> KroneckerSite:
        return self + (-1.0) * other

    def __mul__(self, factor: Number) -> KroneckerSite:
        return KroneckerSite(self.lam * factor, self.B * factor)

    __rmul__ = __mul__


class KroneckerPosterior:
    """q(θ) = N(m, S⁻¹) with S = diag(S₀) + B: a diagonal prior times a site whose curvature is in Kronecker products.

    A posterior to merge, forget from, and draw from. Layers are solved one by one: by the eigenvectors of their factors
    if they have one product and one prior precision, else densely up to 2048 weights, beyond by conjugate gradients.

    Args:
        layout: names and shapes of the weights.
        site: the site; the prior itself if None.
        prior_mean: m₀, a number or [P].
        prior_precision: S₀, a number or [P].

    Raises:
        InputError: if shapes do not fit, or a value is not finite.
        BasisMismatchError: if the site is over other weights.
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
        _owned: bool = False,
    ) -> None:
        like = site.lam if site is not None else first_tensor(prior_mean, prior_precision)
        self.layout, self.site = layout, site
        parts = [torch.as_tensor(v, device=like.device).to(like) for v in (prior_mean, prior_precision)]
        if not _owned:  # the caller may change its own
            parts = [part.clone() for part in parts]
        if any(part.shape not in ((), (layout.size,)) for part in parts):
            raise InputError(
                f"For {layout.size} weights prior_mean and prior_precision are numbers or [{layout.size}]; got "
                f"{[tuple(part.shape) for part in parts]}."
            )
        self.prior_mean, self.prior_precision = (part.expand(layout.size) for part in parts)
        if site is not None and site.lam.shape != (layout.size,):
            raise BasisMismatchError(f"The layout has {layout.size} weights, the site {tuple(site.lam.shape)}.")
        if site is not None and list(site.B.layout.shapes.items()) != list(layout.shapes.items()):
            raise BasisMismatchError("The curvature is of another network than the layout.")
        given = (self.prior_mean, self.prior_precision, *(() if site is None else (site.lam,)))
        if not all(bool(part.isfinite().all()) for part in given):
            raise InputError("A prior or a site of the weights is not finite: look for a diverged run or a bad file.")
        self.mean = self.prior_mean
        if site is None:
            Diagonal.of(self.prior_precision.double())  # raises unless it is positive
        else:  # S(m − m₀) = λ − Bm₀
            self.mean = self.prior_mean + self.solve(site.lam - site.B @ self.prior_mean)

    @classmethod
    def fine_tuned(
        cls, base: WeightPosterior, mean: Float[Tensor, "P"], curvature: KroneckerCurvature
    ) -> KroneckerPosterior:
        """Return a model trained from a diagonal base, as `dualgp.transfer.fine_tuned` does for diagonals and dense.

        Raises:
            InputError: if the base is dense.
            BasisMismatchError: if there are not as many weights.
        """
        if base.structure != "diagonal":
            raise InputError("A Kronecker posterior has a diagonal base; with a dense one use fine_tuned and to_dense.")
        if mean.shape != (base.layout.size,) or curvature.layout.size != base.layout.size:
            raise BasisMismatchError(
                f"The base has {base.layout.size} weights, the model {tuple(mean.shape)} and its curvature "
                f"{curvature.layout.size}."
            )
        lam = base.precision * (mean - base.mean) + curvature @ mean
        site = KroneckerSite(lam, curvature)
        return cls(base.layout, site, prior_mean=base.mean, prior_precision=base.precision, _owned=True)

    def with_site(self, site: KroneckerSite | None) -> KroneckerPosterior:
        """Return the posterior of another site under the same prior."""
        prior = {"prior_mean": self.prior_mean, "prior_precision": self.prior_precision}
        return KroneckerPosterior(self.layout, site, **prior, _owned=True)

    def to_dense(self) -> WeightPosterior:
        """Return the same Gaussian with its precision written out, [P, P] in float64."""
        mean, precision = self.prior_mean.double(), self.prior_precision.double()
        site = None if self.site is None else WeightSite(self.site.lam.double(), self.site.B.to_dense())
        return WeightPosterior(self.layout, site, prior_mean=mean, prior_precision=precision)

    def load_mean_into(self, network: nn.Module) -> None:
        """Copy the mean into the network's parameters, in place. Errors as in `WeightPosterior.load_mean_into`."""
        WeightPosterior(self.layout, prior_mean=self.mean, prior_precision=self.prior_precision).load_mean_into(network)

    def solve(self, v: Float[Tensor, "P"]) -> Float[Tensor, "P"]:
        """Return S⁻¹v.

        Raises:
            NotPositiveDefiniteError: if S is not positive definite.
        """
        out = torch.empty(len(v), dtype=torch.float64, device=v.device)
        for where, S in self._layers():
            out[where] = S.solve(v.double()[where])
        return out.to(v.dtype)

    def variance(self) -> Float[Tensor, "P"]:
        """Return the marginal variance of each weight, diag S⁻¹.

        Layers of one product under a prior precision that is a number are not multiplied out, others are.

        Raises:
            UnsupportedError: if a layer that has to be multiplied out has more than 8192 weights.
        """
        out = torch.empty_like(self.mean, dtype=torch.float64)
        for where, S in self._layers():
            out[where] = S.variance()
        return out.to(self.mean.dtype)

    def sample(self, num_samples: int, *, generator: torch.Generator | None = None) -> Float[Tensor, "S P"]:
        """Return draws of all the weights, flat, layer by layer; `layout.split` names them.

        Raises:
            InputError: if num_samples is no whole number ≥ 1.
            UnsupportedError: if a layer of more than 8192 weights has had a product taken out.
        """
        check_count("num_samples", num_samples, 1)
        out = self.mean.double().repeat(num_samples, 1)
        for where, S in self._layers():
            out[:, where] += S.draw(num_samples, generator)
        return out.to(self.mean.dtype)

    def predict_samples(
        self, network: nn.Module, x: Tensor, num_samples: int, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return what the network says of x at draws of its weights, [S, T, ...]. As `WeightPosterior`'s."""
        draws = self.sample(num_samples, generator=generator)
        return torch.stack([network_at(self.layout, network, theta, x) for theta in draws])

    def _layers(self) -> Iterator[tuple[Tensor, LayerPrecision]]:
        """Yield the positions of each layer's weights and S there; last, those without factors."""
        diagonal = self.prior_precision.double()
        free = torch.ones_like(diagonal, dtype=torch.bool)
        if self.site is not None:
            diagonal = diagonal + self.site.B.rest.double()
            for names, where, terms in self.site.B.layers():
                free[where] = False
                yield where, layer_precision(str(names), terms, diagonal[where])
        where = free.nonzero().flatten()
        if len(where):
            yield where, Diagonal.of(diagonal[where])
