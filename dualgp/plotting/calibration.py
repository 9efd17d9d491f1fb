"""Whether probabilities mean what they say, and how a setting was chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution

from dualgp.checks import check_tensor
from dualgp.errors import InputError, check_count
from dualgp.plotting.style import BLACK, BLUE, PALETTE, to_array

_LINES = (("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"))


def plot_reliability(
    ax: Axes, p_y: Distribution, y: Tensor, *, num_bins: int = 10, color: str = BLUE, label: str | None = None
) -> list[Artist]:
    """Draw how often what was predicted with some probability came true; return diagonal and line.

    Labels: over the confidence of the predicted class, in bins of equal numbers of data, the share that was right.
    Numbers: over the mass of central intervals, the share of data inside. On the diagonal the two agree; below it the
    model is too sure, above it too little.

    Args:
        ax: where to draw.
        p_y: what `predict_likelihood` returned for n data: Categorical, Bernoulli, or a distribution with a `cdf`.
        y: their targets [n].
        num_bins: of labels; fewer where there are fewer data. Of numbers, how many intervals.
        color: of the line.
        label: of the line, in a legend.

    Raises:
        InputError: if there are no data, shapes do not fit, or the distribution is of another kind.

    Source: DeGroot & Fienberg 1983; Niculescu-Mizil & Caruana 2005; of intervals, Gneiting et al. 2007.

    Example:
        >>> import matplotlib.pyplot as plt
        >>> fig, ax = plt.subplots()
        >>> p = torch.tensor([0.1, 0.2, 0.7, 0.9])
        >>> diagonal, line = plot_reliability(ax, Bernoulli(p), torch.tensor([0, 1, 1, 1]), num_bins=2)
        >>> [[round(float(v), 2) for v in axis] for axis in line.get_data()]  # confidence, and the share that was right
        [[0.75, 0.9], [0.5, 1.0]]
        >>> plt.close(fig)
    """
    check_tensor("y", y)
    if not isinstance(p_y, Distribution):
        raise InputError(f"p_y must be a torch Distribution, as predict_likelihood returns, got {type(p_y).__name__}.")
    if p_y.batch_shape != y.shape or y.ndim != 1 or not len(y):
        raise InputError(
            f"Expected one target for each of at least one prediction, got predictions {tuple(p_y.batch_shape)} and y "
            f"{tuple(y.shape)}."
        )
    check_count("num_bins", num_bins, 1)
    if isinstance(p_y, Bernoulli | Categorical):
        stated, found = _of_labels(p_y, y, num_bins)
    else:
        stated, found = _of_intervals(p_y, y, num_bins)
    (diagonal,) = ax.plot([0, 1], [0, 1], "--", color=BLACK, linewidth=0.8)
    (line,) = ax.plot(to_array(stated), to_array(found), "o-", color=color, label=label)
    return [diagonal, line]


def plot_sweep(
    ax: Axes, grid: Sequence[float] | Tensor, curves: Mapping[str, Sequence[float] | Tensor], *, best: str = "least"
) -> list[Artist]:
    """Draw scores over a logarithmic grid of settings, the best of each ringed; return a line and a ring for each.

    Args:
        ax: where to draw.
        grid: settings [k], positive: prior precisions, for instance.
        curves: scores [k] by name: leave-one-out, validation, evidence.
        best: "least" or "greatest".

    Raises:
        InputError: if the grid is not positive, a curve has another length or no finite value, or `best` is unknown.

    Example:
        >>> import matplotlib.pyplot as plt
        >>> fig, ax = plt.subplots()
        >>> line, ring = plot_sweep(ax, [0.1, 1.0, 10.0], {"leave-one-out": [0.5, 0.3, 0.4]})
        >>> ring.get_offsets().tolist()
        [[1.0, 0.3]]
        >>> plt.close(fig)
    """
    at = _numbers("grid", grid)
    if at.ndim != 1 or not len(at) or not (at > 0).all():
        raise InputError(f"grid must hold positive numbers [k], got {grid}.")
    if best not in ("least", "greatest"):
        raise InputError(f'best must be "least" or "greatest", got {best!r}.')
    if not isinstance(curves, Mapping):
        raise InputError(f"curves must be a mapping of names to scores, got {type(curves).__name__}.")
    scores = {name: _numbers(name, curve) for name, curve in curves.items()}
    for name, curve in scores.items():
        if curve.shape != at.shape or not curve.isfinite().any():
            raise InputError(f"{name} must be {len(at)} numbers, some of them finite; got shape {tuple(curve.shape)}.")
    artists: list[Artist] = []
    for i, (name, curve) in enumerate(scores.items()):
        style, marker = _LINES[i % len(_LINES)]
        color = PALETTE[i % len(PALETTE)]
        artists += ax.plot(to_array(at), to_array(curve), linestyle=style, marker=marker, color=color, label=name)
        cost = (curve if best == "least" else -curve).nan_to_num(nan=torch.inf)
        k = int(cost.argmin())
        artists.append(ax.scatter([float(at[k])], [float(curve[k])], s=120, facecolors="none", edgecolors=color))
    ax.set_xscale("log")
    return artists


def _numbers(name: str, values: Sequence[float] | Tensor) -> Tensor:
    if isinstance(values, Tensor):
        check_tensor(name, values)
    try:
        return torch.as_tensor(values, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} must be numbers or a tensor of them, got {type(values).__name__}.") from error


def _of_labels(p_y: Bernoulli | Categorical, y: Tensor, num_bins: int) -> tuple[Tensor, Tensor]:
    """Mean confidence and accuracy in bins of equal numbers of data, in order of confidence."""
    probs = torch.stack([1 - p_y.probs, p_y.probs], -1) if isinstance(p_y, Bernoulli) else p_y.probs
    confidence, predicted = probs.double().max(-1)
    order = confidence.argsort(stable=True)
    parts = zip(confidence[order].chunk(num_bins), (predicted == y)[order].double().chunk(num_bins), strict=True)
    stated, found = zip(*((c.mean(), r.mean()) for c, r in parts), strict=True)
    return torch.stack(stated), torch.stack(found)


def _of_intervals(p_y: Distribution, y: Tensor, num_bins: int) -> tuple[Tensor, Tensor]:
    """Masses of central intervals, and the share of data inside them."""
    try:
        u = p_y.cdf(y)
    except NotImplementedError as error:
        raise InputError(
            f"{type(p_y).__name__} has no cdf: expected Categorical, Bernoulli, or a distribution with one."
        ) from error
    mass = torch.linspace(0, 1, num_bins + 1, dtype=torch.float64, device=u.device)
    inside = (2 * (u.double() - 0.5).abs()).unsqueeze(-1) <= mass  # [n, k]
    return mass, inside.double().mean(0)
