"""Posteriors over a network's weights themselves: a Gaussian prior plus sites on θ, with no linearisation.

    q(θ) = N(m, S⁻¹),    S = S₀ + B,    S m = S₀m₀ + λ

What variational optimisers learn, and what merging, federated and continual learning add up. The precision is a
diagonal [P] or a dense matrix [P, P]; sites of both kinds add.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.func import functional_call

from dualgp.checks import check_generator, check_number, check_tensor, check_value
from dualgp.draws import normal
from dualgp.errors import BasisMismatchError, InputError, check_count
from dualgp.linalg import first_tensor, logdet, precision_cholesky
from dualgp.sites import WeightSite, add_precisions, apply_precision
from dualgp.threads import ONE_AT_A_TIME

Number: TypeAlias = float | int
_ASYMMETRY = 1e-3  # relative: beyond what rounding in half precision leaves


@dataclass(frozen=True)
class WeightLayout:
    """Where each parameter of a network lies in one flat vector of all: names and shapes, in order.

    Args:
        shapes: shape of each parameter, by its name in the network.

    Example:
        >>> layout = WeightLayout.of(torch.nn.Linear(2, 1))
        >>> layout.size, list(layout.split(torch.arange(3.0)))
        (3, ['weight', 'bias'])
    """

    shapes: Mapping[str, torch.Size]

    @classmethod
    def of(cls, network: nn.Module, names: Iterable[str] | None = None) -> WeightLayout:
        """Return the layout of a network's parameters: those named, or else all that take a gradient.

        Raises:
            InputError: if a name is none of the network's, or no parameter is left.
        """
        found = {n: p.shape for n, p in network.named_parameters() if p.requires_grad or names is not None}
        names = list(found) if names is None else list(names)
        unknown = sorted(set(names) - set(found))
        if unknown or not names:
            raise InputError(
                f"Expected names of parameters of the network, {sorted(found)[:8]}…; got {unknown[:8] or 'none'}. See "
                "network.named_parameters()."
            )
        return cls({name: found[name] for name in names})

    @property
    def size(self) -> int:
        """P, the number of weights."""
        return sum(shape.numel() for shape in self.shapes.values())

    def parameters_of(self, network: nn.Module) -> list[nn.Parameter]:
        """Return the network's parameters that this is of, in order.

        Raises:
            InputError: if the network has not these weights.
        """
        found = dict(network.named_parameters())
        wrong = [n for n, shape in self.shapes.items() if n not in found or found[n].shape != shape]
        if wrong:
            raise InputError(
                f"The posterior is over weights that the network has not, or not of that shape: {wrong[:8]}. Give the "
                "network that the layout is of."
            )
        return [found[name] for name in self.shapes]

    def split(self, flat: Shaped[Tensor, "*b P"]) -> dict[str, Tensor]:
        """Return views of a flat vector by name, each [*b, *shape]."""
        parts = flat.split([shape.numel() for shape in self.shapes.values()], -1)
        return {
            n: p.unflatten(-1, s) if s else p.squeeze(-1) for (n, s), p in zip(self.shapes.items(), parts, strict=True)
        }

    def join(self, tensors: Mapping[str, Tensor]) -> Float[Tensor, "P"]:
        """Return tensors by name, such as a `state_dict`, as one flat vector; names beyond the layout's are left out.

        Raises:
            InputError: if a name is missing or a shape is another.
        """
        wrong = {n: tuple(s) for n, s in self.shapes.items() if n not in tensors or tensors[n].shape != s}
        if wrong:
            name, shape = next(iter(wrong.items()))
            got = tuple(tensors[name].shape) if name in tensors else "nothing of that name"
            raise InputError(
                f"Expected {name!r} of shape {shape}, got {got} ({len(wrong)} of {len(self.shapes)} differ)."
            )
        return torch.cat([tensors[name].detach().flatten() for name in self.shapes])


class WeightPosterior:
    """q(θ) = N(m, S⁻¹): the prior N(m₀, S₀⁻¹) of a network's weights times a site (λ, B) on them.

    A value: every verb returns a new posterior. Dense precisions are worked on in float64, diagonals in their dtype.

    Args:
        layout: names and shapes of the weights.
        site: the sum of the data's sites; the prior itself if None.
        prior_mean: m₀, a number or [P].
        prior_precision: S₀, absolute, on losses that are sums over data: a number, [P], or a dense [P, P].

    Raises:
        InputError: if shapes do not fit, a value is not finite, or a dense precision is not symmetric.
        NotPositiveDefiniteError: if S is not positive definite; the message has the smallest eigenvalue.

    Source: Khan & Rue 2023 (the Bayesian learning rule), § 1.3. Coordinates are the weights themselves and not
    whitened, since a prior may be improper (S₀ = 0 with enough data).

    Example:
        >>> layout = WeightLayout.of(torch.nn.Linear(1, 1, bias=False))
        >>> q = WeightPosterior(layout, prior_precision=1.0).add(WeightSite(torch.tensor([6.0]), torch.tensor([3.0])))
        >>> q.mean, q.variance()
        (tensor([1.5000]), tensor([0.2500]))
    """

    def __init__(
        self,
        layout: WeightLayout,
        site: WeightSite | None = None,
        *,
        prior_mean: Tensor | Number = 0.0,
        prior_precision: Tensor | Number,
        _owned: bool = False,
    ) -> None:
        check_value("prior_mean", prior_mean)
        check_value("prior_precision", prior_precision)
        like = site.lam if site is not None else first_tensor(prior_mean, prior_precision)
        P = layout.size
        prior_mean = torch.as_tensor(prior_mean, dtype=like.dtype, device=like.device)
        prior_precision = torch.as_tensor(prior_precision, dtype=like.dtype, device=like.device)
        if prior_mean.shape not in ((), (P,)) or prior_precision.shape not in ((), (P,), (P, P)):
            raise InputError(
                f"For {P} weights prior_mean is a number or [{P}] and prior_precision a number, [{P}] or [{P}, {P}]; "
                f"got {tuple(prior_mean.shape)} and {tuple(prior_precision.shape)}."
            )
        if site is not None and len(site.lam) != P:
            raise BasisMismatchError(f"The layout has {P} weights, the site {len(site.lam)}.")
        self.layout, self.site = layout, site
        if not _owned:  # the caller may change its own
            prior_mean, prior_precision = prior_mean.clone(), prior_precision.clone()
        self.prior_mean = prior_mean.expand(P)
        self.prior_precision = prior_precision.expand(P) if prior_precision.ndim < 2 else prior_precision
        parts = [self.prior_mean, self.prior_precision, *(() if site is None else (site.lam, site.B))]
        if not all(bool(part.isfinite().all()) for part in parts):
            raise InputError("A prior or a site of the weights is not finite: look for a diverged run or a bad file.")
        S = self.prior_precision if site is None else add_precisions(self.prior_precision, site.B)
        if S.ndim == 2 and bool((S - S.mT).abs().max() > _ASYMMETRY * S.abs().max()):
            raise InputError(
                f"A dense precision must be symmetric; this one is off by {float((S - S.mT).abs().max()):.3g}."
            )
        self.precision = S  # [P] or [P, P]
        self._chol = precision_cholesky(S.double()) if S.ndim == 2 else None
        if S.ndim == 1 and not bool((S > 0).all()):
            precision_cholesky(torch.diag(S.min().double().reshape(1)))  # raises, naming the smallest
        m = self.prior_mean
        if site is not None:  # S(m − m₀) = λ − Bm₀: exact where the site is nothing
            m = m + self.solve(site.lam - apply_precision(site.B, m))
        self.mean = m

    @property
    def structure(self) -> str:
        """What the precision is: "diagonal" or "dense"."""
        return "diagonal" if self._chol is None else "dense"

    def solve(self, v: Float[Tensor, "P"]) -> Float[Tensor, "P"]:
        """Return S⁻¹v."""
        if self._chol is None:
            return v / self.precision
        return torch.cholesky_solve(v.double().unsqueeze(-1), self._chol).squeeze(-1).to(v.dtype)

    def variance(self) -> Float[Tensor, "P"]:
        """Return the marginal variance of each weight, diag S⁻¹."""
        if self._chol is None:
            return 1.0 / self.precision
        return torch.cholesky_inverse(self._chol).diagonal().to(self.mean.dtype)

    def sample(self, num_samples: int, *, generator: torch.Generator | None = None) -> Float[Tensor, "S P"]:
        """Return draws of all the weights, flat; `layout.split` names them.

        Raises:
            InputError: if num_samples is no whole number ≥ 1.
        """
        check_count("num_samples", num_samples, 1)
        check_generator(generator)
        dtype = self.mean.dtype if self._chol is None else torch.float64
        shape = (num_samples, self.layout.size)
        noise = normal(shape, self.mean.new_empty(0, dtype=dtype), generator)
        if self._chol is None:
            return noise.mul_(self.precision.rsqrt()).add_(self.mean)
        half = torch.linalg.solve_triangular(self._chol, noise, upper=False, left=False)  # εC⁻¹, of covariance S⁻¹
        return self.mean + half.to(self.mean.dtype)

    @torch.no_grad()
    def predict_samples(
        self, network: nn.Module, x: Tensor, num_samples: int, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return what the network says of x at draws of its weights, [S, T, ...], one draw in memory at a time.

        The network, its buffers and its mode stay as they are; it is used in the mode it is in, so call `eval()` first
        if it has dropout or batch statistics.

        Raises:
            InputError: if num_samples is no whole number ≥ 1, or the network has not these weights.
        """
        check_count("num_samples", num_samples, 1)
        draws = (self.sample(1, generator=generator)[0] for _ in range(num_samples))
        return torch.stack([network_at(self.layout, network, theta, x) for theta in draws])

    @torch.no_grad()
    def load_mean_into(self, network: nn.Module) -> None:
        """Copy the mean into the network's parameters, in place: the one verb that changes something.

        Raises:
            InputError: if the network has not these weights; it is unchanged then.
        """
        for p, value in zip(self.parameters_of(network), self.layout.split(self.mean).values(), strict=True):
            p.copy_(value)

    def add(self, site: WeightSite) -> WeightPosterior:
        """Return the posterior with a site added."""
        return self.with_site(site if self.site is None else self.site + site)

    def remove(self, site: WeightSite) -> WeightPosterior:
        """Return the posterior with a site taken out.

        Raises:
            NotPositiveDefiniteError: if no Gaussian is left; the message has the smallest eigenvalue.
        """
        return self.with_site(-1.0 * site if self.site is None else self.site - site)

    def scale(self, factor: Number) -> WeightPosterior:
        """Return the posterior with the site scaled, prior · tᶠ: forgetting for factor < 1.

        Raises:
            InputError: if the factor is negative or not finite.
        """
        check_number("The factor by which sites are scaled", factor, least=0)
        return self.with_site(None if self.site is None else self.site * factor)

    def temper(self, temperature: Number) -> WeightPosterior:
        """Return prior · t^{1/T}: the likelihood at temperature T > 0."""
        check_number("The temperature", temperature, above=0)
        return self.scale(1.0 / temperature)

    def with_site(self, site: WeightSite | None) -> WeightPosterior:
        """Return the posterior of another site under the same prior."""
        mean, precision = self.prior_mean, self.prior_precision
        return WeightPosterior(self.layout, site, prior_mean=mean, prior_precision=precision, _owned=True)

    def as_prior(self) -> WeightPosterior:
        """Return this Gaussian as a prior that has seen nothing: yesterday's posterior is today's prior."""
        return WeightPosterior(self.layout, prior_mean=self.mean, prior_precision=self.precision, _owned=True)

    def kl(self, other: WeightPosterior | None = None) -> Float[Tensor, ""]:
        """Return KL(q ‖ other) in nats, in float64; of the prior if no other is given.

        ½ [tr(S₀S⁻¹) − P + log|S| − log|S₀| + (m − m₀)ᵀS₀(m − m₀)]

        Raises:
            BasisMismatchError: if the other is over other weights.
        """
        if other is None:
            other = self.with_site(None)
        check_layouts([self, other])
        S0, gap = other.precision.double(), self.mean.double() - other.mean.double()
        if self._chol is None and S0.ndim == 1:
            trace = (S0 / self.precision.double()).sum()
        else:
            covariance = (
                torch.diag(1.0 / self.precision.double()) if self._chol is None else torch.cholesky_inverse(self._chol)
            )
            trace = (S0 * covariance).sum() if S0.ndim == 2 else (S0 * covariance.diagonal()).sum()
        return 0.5 * (trace - len(gap) + self.logdet() - other.logdet() + gap @ apply_precision(S0, gap))

    def logdet(self) -> Float[Tensor, ""]:
        """Return log|S| in float64."""
        return self.precision.double().log().sum() if self._chol is None else logdet(self._chol)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> WeightPosterior:
        """Return the posterior on a device, or in a dtype."""
        s = self.site
        site = None if s is None else WeightSite(s.lam.to(device, dtype), s.B.to(device, dtype))
        mean, precision = self.prior_mean.to(device, dtype), self.prior_precision.to(device, dtype)
        return WeightPosterior(self.layout, site, prior_mean=mean, prior_precision=precision)

    def parameters_of(self, network: nn.Module) -> list[nn.Parameter]:
        """Return the network's parameters that this is over. Errors as in `WeightLayout.parameters_of`."""
        return self.layout.parameters_of(network)


@torch.no_grad()
def network_at(layout: WeightLayout, network: nn.Module, theta: Float[Tensor, "P"], x: Tensor) -> Tensor:
    """Return what a network says of x at weights θ; its own weights and buffers stay as they are.

    Raises:
        InputError: if the network has not these weights.
    """
    with ONE_AT_A_TIME:  # another thread would find these weights in the network
        parameters = layout.parameters_of(network)
        state = {n: w.to(p.dtype) for (n, w), p in zip(layout.split(theta).items(), parameters, strict=True)}
        state |= {name: buffer.clone() for name, buffer in network.named_buffers()}
        return evaluated(network, state, x)


def evaluated(network: nn.Module, state: dict[str, Tensor], x: Tensor) -> Tensor:
    """Return what a network says of x with these weights and buffers.

    Raises:
        InputError: if x is no tensor with values, or the network cannot be called with it.
    """
    check_tensor("x", x)
    try:
        return functional_call(network, state, (x,))
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"The network cannot be called with x {x.dtype} {tuple(x.shape)}: {error}") from error


@runtime_checkable
class HasLayout(Protocol):
    """Anything over the weights of a network."""

    @property
    def layout(self) -> WeightLayout:
        """Names and shapes of the weights."""


def check_layouts(posteriors: Iterable[HasLayout]) -> None:
    """Raise BasisMismatchError unless all are over the same weights.

    Raises:
        BasisMismatchError: naming a weight that differs.
    """
    first, *others = posteriors
    for other in others:
        mine, theirs = dict(first.layout.shapes), dict(other.layout.shapes)
        if list(mine.items()) != list(theirs.items()):
            differ = [n for n in {**mine, **theirs} if mine.get(n) != theirs.get(n)] or list(theirs)
            raise BasisMismatchError(
                f"Posteriors over the same weights were expected; {differ[:4]} differ in name, shape or order. They "
                "may come from other networks, or from layouts of other subsets."
            )
