"""Scores: of queries over the plane, and of data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from torch import Tensor

from dualgp.active import score
from dualgp.active.scores import Rule
from dualgp.checks import check_tensor
from dualgp.errors import InputError
from dualgp.gp.model import DualGP
from dualgp.influence import leverage
from dualgp.nets.posterior import NetworkPosterior
from dualgp.plotting.style import BLACK, BLUE, VERMILION, WORTH, areas, draw_field, plane, to_array
from dualgp.posterior import Posterior
from dualgp.sites import Sites


def plot_score_2d(
    ax: Axes,
    q: DualGP | NetworkPosterior,
    bounds: Sequence[float | int],
    rule: str | Rule = "bald",
    *,
    chosen: Tensor | None = None,
    resolution: int = 60,
    **options: Any,
) -> list[Artist]:
    """Draw what a label would be worth over the plane, darker where more; return the image and a number per query.

    Args:
        ax: where to draw; its limits become `bounds`.
        q: a model of two inputs.
        bounds: (x₁ from, x₁ to, x₂ from, x₂ to).
        rule: as in `dualgp.active.score`.
        chosen: inputs [k, 2] to mark by 1 … k, in the order they were chosen.
        resolution: points along each side of the grid.
        options: `targets` and `level`, as in `dualgp.active.score`.

    Raises:
        InputError: if what was chosen does not have two columns; and as `dualgp.active.score`.
        NotFittedError: if the model has not been fitted.

    Example:
        >>> import gpytorch, torch, matplotlib.pyplot as plt
        >>> X = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
        >>> gp = DualGP(gpytorch.kernels.RBFKernel(), gpytorch.likelihoods.BernoulliLikelihood())
        >>> result = gp.fit(X, torch.tensor([0, 0, 1, 1]), learn_hyperparameters=False, learn_inducing=False)
        >>> fig, ax = plt.subplots()
        >>> len(plot_score_2d(ax, gp, (-1, 2, -1, 2), chosen=X[:2], resolution=9))
        3
        >>> plt.close(fig)
    """
    if chosen is not None:
        check_tensor("chosen", chosen)
        if chosen.ndim != 2 or chosen.shape[-1] != 2:
            raise InputError(f"What was chosen must have shape [k, 2], got {tuple(chosen.shape)}.")
    basis, learner = q.posterior.basis, cast(Any, q)
    *_, grid = plane(bounds, resolution, basis.dtype, basis.device)
    image, _ = draw_field(ax, score(learner, grid, rule, **options), bounds, WORTH)
    artists: list[Artist] = [image]
    if chosen is not None:
        box = {"boxstyle": "circle", "facecolor": VERMILION, "edgecolor": "white", "pad": 0.2}
        for number, (a, b) in enumerate(chosen.tolist(), 1):
            artists.append(ax.text(a, b, str(number), ha="center", va="center", color="white", size=8, bbox=box))
    return artists


def plot_data_scores_2d(
    ax: Axes, x: Tensor, scores: Tensor, *, chosen: Tensor | None = None, label: str | None = None
) -> list[Artist]:
    """Draw data in the plane, larger with |score|; return one scatter per sign, and rings.

    Args:
        ax: where to draw.
        x: inputs [n, 2].
        scores: one for each; ≥ 0 as filled circles, < 0 as open diamonds.
        chosen: rows to ring, such as `Selection.indices`, or a mask [n].
        label: of the rings, in a legend.

    Raises:
        InputError: if shapes do not fit, or a chosen row is not there.

    Example:
        >>> import torch, matplotlib.pyplot as plt
        >>> fig, ax = plt.subplots()
        >>> scores = torch.tensor([1.0, -1.0, 2.0, 0.5])
        >>> len(plot_data_scores_2d(ax, torch.rand(4, 2), scores, chosen=torch.tensor([2])))
        3
        >>> plt.close(fig)
    """
    check_tensor("x", x)
    check_tensor("scores", scores)
    if x.ndim != 2 or x.shape[-1] != 2 or scores.shape != x.shape[:1]:
        raise InputError(f"Expected x [n, 2] and scores [n], got {tuple(x.shape)} and {tuple(scores.shape)}.")
    ringed = None if chosen is None else _rows(chosen, len(x))
    at, values = to_array(x), to_array(scores)
    area = areas(values)
    artists: list[Artist] = []
    for rows, marker, color in ((values >= 0, "o", BLUE), (values < 0, "D", VERMILION)):
        if rows.any():
            dots = ax.scatter(at[rows, 0], at[rows, 1], s=area[rows], marker=marker, edgecolors=color)
            dots.set_facecolor(color if marker == "o" else "none")
            artists.append(dots)
    if ringed is not None:
        x1, x2 = at[ringed].T
        artists.append(ax.scatter(x1, x2, s=90, facecolors="none", edgecolors=BLACK, linewidths=1.2, label=label))
    return artists


def _rows(chosen: Tensor, n: int) -> np.ndarray:
    """Return indices or a mask of rows as what picks them from an array of n."""
    check_tensor("chosen", chosen)
    if chosen.dtype == torch.bool:
        fits = chosen.shape == (n,)
    else:
        fits = not chosen.is_floating_point() and bool(((chosen >= 0) & (chosen < n)).all())
    if not fits:
        came = f"{chosen.dtype} {tuple(chosen.shape)}"
        raise InputError(f"chosen must hold rows from 0 to {n - 1}, or be a mask [{n}]; got {came}.")
    return to_array(chosen.reshape(-1))


def plot_leverage(
    ax: Axes, q: DualGP | Posterior | NetworkPosterior, x: Tensor, sites: Sites, *, label: str | None = None
) -> list[Artist]:
    """Draw the leverage tr(B_i V_i) of every datum where its input lies; return the artists.

    Over one input: a stem from zero and a dot for each datum. In the plane: dots that grow with leverage, as
    `plot_data_scores_2d` draws them. Between 0 and 1 for each output: how much of its own prediction a datum decides.

    Args:
        ax: where to draw.
        q: a posterior that holds the sites.
        x: inputs [n, 1] or [n, 2] of the data.
        sites: their sites.
        label: of the dots, in a legend; over one input only.

    Raises:
        InputError: if there are more inputs than two; and as `dualgp.leverage`.

    Example:
        >>> import gpytorch, torch, matplotlib.pyplot as plt
        >>> x = torch.linspace(0, 6, 20).unsqueeze(-1)
        >>> gp = DualGP(gpytorch.kernels.RBFKernel(), gpytorch.likelihoods.GaussianLikelihood(), num_inducing=6)
        >>> result = gp.fit(x, x.sin().squeeze(-1))
        >>> fig, ax = plt.subplots()
        >>> stems, dots = plot_leverage(ax, gp, x, gp.sites)
        >>> len(dots.get_offsets())
        20
        >>> plt.close(fig)
    """
    check_tensor("x", x)
    if x.ndim != 2 or x.shape[-1] not in (1, 2):
        raise InputError(f"Leverage is drawn over one input or two: expected x [n, 1] or [n, 2], got {tuple(x.shape)}.")
    values = leverage(q, x, sites)
    if x.shape[-1] == 2:
        return plot_data_scores_2d(ax, x, values)
    at, height = to_array(x[:, 0]), to_array(values)
    stems = ax.vlines(at, 0.0, height, color=BLUE, linewidth=0.8)
    return [stems, ax.scatter(at, height, s=areas(height), color=BLUE, label=label)]
