"""Colours, and what the drawings share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.image import AxesImage
from torch import Tensor

from dualgp.checks import check_number, check_tensor
from dualgp.errors import InputError, check_count

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#F0E442", "#000000")
BLUE, VERMILION, GREEN, *_, BLACK = PALETTE
WORTH = LinearSegmentedColormap.from_list("dualgp worth", ["#FFFFFF", "#6BAED6", "#08306B"])
FIELD = LinearSegmentedColormap.from_list("dualgp", ["#F0A36B", "#FFFFFF", "#6BAED6"])


def plane(
    bounds: Sequence[float | int], resolution: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the two sides of a grid over (x₁ from, x₁ to, x₂ from, x₂ to), and its points, [R], [R] and [R², 2]."""
    check_count("resolution", resolution, 2)
    for side in bounds:
        check_number("a bound", side)
    if len(bounds) != 4 or not (bounds[0] < bounds[1] and bounds[2] < bounds[3]):
        raise InputError(f"bounds must be (x₁ from, x₁ to, x₂ from, x₂ to), each from less than to; got {bounds}.")
    sides = (bounds[:2], bounds[2:])
    a, b = (torch.linspace(low, high, resolution, dtype=dtype, device=device) for low, high in sides)
    return a, b, torch.cartesian_prod(a, b)


def draw_field(
    ax: Axes,
    values: Tensor,
    bounds: Sequence[float | int],
    cmap: Colormap,
    *,
    vmin: float | int | None = None,
    vmax: float | int | None = None,
) -> tuple[AxesImage, np.ndarray]:
    """Draw values at the points of a `plane`, its bounds as the axes' limits; return the image and values [x₂, x₁]."""
    side = round(len(values) ** 0.5)
    field = to_array(values).reshape(side, side).T
    x1, x2, y1, y2 = bounds
    image = ax.imshow(field, cmap, aspect="auto", origin="lower", interpolation="bilinear", vmin=vmin, vmax=vmax)
    image.set_extent((x1, x2, y1, y2))
    ax.set(xlim=(x1, x2), ylim=(y1, y2))
    return image, field


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
    if not isinstance(data, tuple | list) or len(data) != 2:
        raise InputError(f"Data to draw are a pair (X, y), got {type(data).__name__}.")
    X, y = data
    check_tensor("X", X)
    check_tensor("y", y)
    if X.ndim != 2 or X.shape[-1] != columns or y.shape != X.shape[:1]:
        raise InputError(
            f"Data to draw are a pair (X [n, {columns}], y [n]), got X {tuple(X.shape)} and y {tuple(y.shape)}."
        )
    return to_array(X), to_array(y)


def to_array(values: Tensor) -> np.ndarray:
    """Return a tensor's values, on the CPU; NumPy has no bfloat16."""
    values = values.detach().cpu()
    return (values.float() if values.dtype == torch.bfloat16 else values).numpy()
