"""What a model is given, in BoTorch's shapes: values as sites, other targets as data, after what was given before."""

from __future__ import annotations

import torch
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood, Likelihood
from torch import Tensor

from dualgp.duals import check_targets, check_variances, gaussian_noise
from dualgp.errors import InputError
from dualgp.gp.condition import Conditioned
from dualgp.gp.data import Data
from dualgp.posterior import Posterior
from dualgp.sites import Sites


def check_outcomes(Y: Tensor, X: Tensor, columns: int) -> None:
    """Raise unless Y is finite of shape [.., n, columns], to go with X [.., n, d].

    Raises:
        InputError: saying what came.
    """
    if not isinstance(Y, Tensor):
        raise InputError(f"Y must be a torch.Tensor, got {type(Y).__name__}; use torch.as_tensor.")
    if Y.ndim < 2 or Y.shape[-1] != columns or Y.shape[-2] != X.shape[-2]:
        raise InputError(
            f"Expected Y of shape [..., {X.shape[-2]}, {columns}] to go with X {tuple(X.shape)}, got {tuple(Y.shape)}."
        )
    if not bool(Y.isfinite().all()):
        raise InputError(f"Y must be finite; {int((~Y.isfinite()).sum())} values are NaN or infinite.")


def check_noise(noise: Tensor, n: int, m: int) -> None:
    """Raise unless noise holds positive variances, [.., n, m] or [.., 1, m].

    Raises:
        InputError: saying what came.
    """
    if not isinstance(noise, Tensor) or noise.ndim < 2 or noise.shape[-2] not in (1, n) or noise.shape[-1] != m:
        came = tuple(noise.shape) if isinstance(noise, Tensor) else type(noise).__name__
        raise InputError(f"Expected noise variances of shape [..., {n}, {m}] or [..., 1, {m}], got {came}.")
    check_variances(noise, "noise")


def with_gaussian(
    likelihood: Likelihood, before: Posterior | Conditioned, X: Tensor, Y: Tensor, noise: Tensor | None
) -> Conditioned:
    """Return `before` with λ = y/σ² and β = 1/σ² at X too, which may have fewer batch dimensions than Y.

    Raises:
        InputError: for noise that is missing or none, or batches that do not go together.
    """
    if noise is None:
        if isinstance(likelihood, FixedNoiseGaussianLikelihood):
            raise InputError("The noise of new data is not known: pass noise=, with the shape of Y.")
        noise = gaussian_noise(likelihood)
        assert noise is not None
    else:
        check_noise(noise, *Y.shape[-2:])
    base, given = (before.base, before) if isinstance(before, Conditioned) else (before, None)
    batch = _batch(X.shape[:-2], Y.shape[:-2], noise.shape[:-2])
    Y, beta = Y.expand(*batch, *Y.shape[-2:]), (1.0 / noise.double()).expand(*batch, *Y.shape[-2:])
    multi = base.basis.num_outputs is not None
    lam = Y.double() * beta
    new = Sites(lam, beta, True) if multi else Sites(lam.squeeze(-1), beta.squeeze(-1))
    if given is None:
        return Conditioned(base, X, new)
    X = torch.cat(_expanded([given.x, X], 2), -2)
    keep = 2 if multi else 1
    parts = zip(_expanded([given.sites.lam, new.lam], keep), _expanded([given.sites.beta, new.beta], keep), strict=True)
    return Conditioned(base, X, Sites.cat([Sites(lam, beta, multi) for lam, beta in parts]))


def joined(likelihood: Likelihood, before: Data | None, X: Tensor, Y: Tensor, *, multi: bool) -> Data:
    """Return labels or counts Y [.., n, m] at X with those given before, all with one batch shape.

    Args:
        likelihood: of the data.
        before: what was given before.
        X: new inputs.
        Y: their targets; m = 1 unless `multi`.
        multi: whether targets have a dimension of outputs.

    Raises:
        InputError: for targets that the likelihood does not allow, or batches that do not go together.
    """
    y = Y if multi else Y.squeeze(-1)
    if y.numel():
        check_targets(likelihood, y)
    width = 2 if multi else 1
    xs, ys = ([X], [y]) if before is None else ([before.x, X], [before.y, y])
    batch = _batch(*(x.shape[:-2] for x in xs), *(t.shape[: t.ndim - width] for t in ys))
    xs = [x.expand(*batch, *x.shape[-2:]) for x in xs]
    ys = [t.expand(*batch, *t.shape[t.ndim - width :]) for t in ys]
    return Data(torch.cat(xs, -2), torch.cat(ys, -width), multi)


def _batch(*shapes: torch.Size) -> torch.Size:
    try:
        return torch.broadcast_shapes(*shapes)
    except RuntimeError as e:
        came = sorted({tuple(shape) for shape in shapes})
        raise InputError(f"Batch shapes of X, Y, noise and what was given before must broadcast; got {came}.") from e


def _expanded(parts: list[Tensor], keep: int) -> list[Tensor]:
    """Tensors with one batch shape, up to the last `keep` dimensions."""
    batch = _batch(*(part.shape[:-keep] for part in parts))
    return [part.expand(*batch, *part.shape[-keep:]) for part in parts]
