"""Colours, and what the drawings share."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from torch import Tensor

from dualgp.errors import InputError

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#F0E442", "#000000")
BLUE, VERMILION, GREEN, *_, BLACK = PALETTE
WORTH = LinearSegmentedColormap.from_list("dualgp worth", ["#FFFFFF", "#6BAED6", "#08306B"])
FIELD = LinearSegmentedColormap.from_list("dualgp", ["#F0A36B", "#FFFFFF", "#6BAED6"])


def by_class(
    ax: Axes, X: np.ndarray, y: np.ndarray, classes: tuple[str, str], *, s: float | np.ndarray, **style: Any
) -> list[Artist]:
    """Return a scatter of y = 1 and one of y = 0, with marker areas s."""
    area = np.broadcast_to(s, y.shape)
    dots: list[Artist] = []
    for label, marker, color in ((1, "o", BLUE), (0, "^", VERMILION)):
        at = y == label
        dots.append(
            ax.scatter(X[at, 0], X[at, 1], s=area[at], marker=marker, color=color, label=classes[label], **style)
        )
    return dots


def areas(values: np.ndarray) -> np.ndarray:
    """Return areas of markers, from 4 to 40 square points, that grow with |values|."""
    size = np.abs(values)
    return 4.0 + 36.0 * size / max(size.max(initial=0.0), 1e-300)


def checked_data(data: tuple[Tensor, Tensor], columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a pair (X, y) to draw, of so many columns."""
    X, y = data
    if X.ndim != 2 or X.shape[-1] != columns or y.shape != X.shape[:1]:
        raise InputError(
            f"Data to draw are a pair (X [n, {columns}], y [n]), got X {tuple(X.shape)} and y {tuple(y.shape)}."
        )
    return to_array(X), to_array(y)


def to_array(values: Tensor) -> np.ndarray:
    """Return a tensor's values, on the CPU."""
    return values.detach().cpu().numpy()
