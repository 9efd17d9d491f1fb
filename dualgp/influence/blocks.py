"""What the measures ask of a posterior, a block of data at a time: the function there, its covariance, the sites."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from dualgp.checks import check_number, check_tensor
from dualgp.errors import InputError, NumericalWarning
from dualgp.influence.formulas import Order, Shift, check_order, removal_shift
from dualgp.posterior import Posterior
from dualgp.sites import Sites, check_sites_are_finite

_NUMBERS = 1 << 22  # in the C × C blocks that are held at once


@runtime_checkable
class FunctionPosterior(Protocol):
    """Anything that knows q(f_i) at inputs x: a `Posterior` on any basis, a `DiagonalPosterior`."""

    def function_blocks(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean [n, C] and *parametric* covariance [n, C, C] of f(x): the part that sites can change."""


@runtime_checkable
class RemovesItsOwnWay(Protocol):
    """A posterior that holds less of a site than φᵀBφ, and says what changes at a datum when that goes."""

    def removal_shift(self, x: Tensor, lam: Tensor, B: Tensor, order: Order) -> Shift | None:
        """Return the change at each of x without its own site (λ [n, C], B [n, C, C]); None where φᵀBφ is held."""


@runtime_checkable
class HasPosterior(Protocol):
    """A model around such a posterior: a fitted `DualGP`, a `NetworkPosterior`."""

    @property
    def posterior(self) -> Any:
        """The posterior."""


@dataclass(frozen=True, eq=False)
class Block:
    """A run of data in float64: mean [n, C], V [n, C, C], and of the sites α [n, C] and B [n, C, C]."""

    rows: slice
    mean: Tensor
    V: Tensor
    alpha: Tensor
    B: Tensor
    own: Callable[[Order], Shift | None]

    def shift(self, order: Order, max_hat: float) -> Shift:
        """Return what changes at each datum when its site goes."""
        check_order(order)
        return self.own(order) or removal_shift(self.V, self.alpha, self.B, order=order, max_hat=max_hat)


@torch.no_grad()
def blocks_of(q: FunctionPosterior | HasPosterior, x: Tensor, sites: Sites) -> Iterator[Block]:
    """Yield the data a block at a time, so that no more than a few million numbers of C × C blocks are held.

    Raises:
        InputError: if sites and inputs are not of the same n ≥ 1 data of one process.
    """
    check_sites(x, sites)
    posterior: FunctionPosterior = bare(q)
    step = max(1, _NUMBERS // sites.lam.shape[-1] ** 2) if sites.multi_output else _NUMBERS
    for start in range(0, len(x), step):
        rows = slice(start, start + step)
        mean, V = posterior.function_blocks(x[rows])
        lam, B = (t.to(V) for t in as_matrices(sites[rows]))
        if B.shape != V.shape:
            raise InputError(f"The posterior has {V.shape[-1]} outputs, the sites {B.shape[-1]}.")
        own = functools.partial(_own_shift, posterior, x[rows], lam, B)
        yield Block(rows, mean, V, lam - (B @ mean.unsqueeze(-1)).squeeze(-1), B, own)


def _own_shift(q: FunctionPosterior, x: Tensor, lam: Tensor, B: Tensor, order: Order) -> Shift | None:
    return q.removal_shift(x, lam, B, order) if isinstance(q, RemovesItsOwnWay) else None


def bare(q: Any) -> Any:
    """Return the `Posterior` inside a model that has one (`DualGP`, `NetworkPosterior`), anything else as it is.

    Raises:
        InputError: for what is no posterior of a function.
    """
    found = getattr(q, "posterior", q)
    if not hasattr(found, "function_blocks"):
        hint = "; of an ExactGP, give its posterior()" if callable(found) and found is not q else ""
        raise InputError(f"Expected a Posterior, or a model that has one, got {type(q).__name__}{hint}.")
    return found


def as_matrices(sites: Sites) -> tuple[Tensor, Tensor]:
    """Return λ [n, C] and B [n, C, C], whether the outputs are one, independent or coupled."""
    if not sites.multi_output:
        return sites.lam.unsqueeze(-1), sites.beta[..., None, None]
    return sites.lam, sites.beta if sites.coupled else torch.diag_embed(sites.beta)


def check_sites(x: Tensor, sites: Sites) -> None:
    """Raise unless there is one site per input, of one process.

    Raises:
        InputError: saying what came.
    """
    check_tensor("x", x)
    check_sites_are_finite(sites)
    if sites.lam.ndim != 1 + sites.multi_output:
        raise InputError(
            "Influence is of one process at a time: expected sites of shape [N] or, with outputs, [N, C], got "
            f"{tuple(sites.lam.shape)}."
        )
    if not x.ndim or len(sites) != len(x) or not len(x):
        raise InputError(f"Every datum needs its site: got {len(x) if x.ndim else 0} inputs and {len(sites)} sites.")


def by_output(values: Tensor, sites: Sites) -> Tensor:
    """Return [n, C] as it is for several outputs, and [n] for one."""
    return values if sites.multi_output else values.squeeze(-1)


def limit_of(q: object, max_hat: float | None) -> float:
    """Return the hat value at which a removal is capped: by default what rounding allows, or .99 for an approximation.

    The precision of a `Posterior` contains its sites, so that hat < 1 and removal is exact however close to 1 it is.
    """
    if max_hat is not None:
        check_number("max_hat", max_hat)
        return max_hat
    q = bare(q)
    return 1.0 - torch.finfo(q.basis.dtype).eps ** 0.5 if isinstance(q, Posterior) else 0.99


def warn_capped(capped: Tensor, max_hat: float) -> None:
    """Warn if the removal of some data was capped, with their number and the first of them."""
    if capped.any():
        warnings.warn(
            f"The removal of {int(capped.sum())} of {len(capped)} data was capped, the first being datum "
            f"{int(capped.nonzero()[0])}: their hat values exceed {max_hat:.6g}, so the precision does not contain "
            'their sites. Use a posterior that does, or order="first".',
            NumericalWarning,
            stacklevel=3,
        )
