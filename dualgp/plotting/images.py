"""Data that are images, in rows."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from torch import Tensor

from dualgp.errors import InputError, check_count
from dualgp.plotting.style import BLACK, VERMILION, to_array

_GAP = 0.45  # between images, in widths of one: room for a line of text


def plot_images(
    ax: Axes,
    images: Tensor,
    *,
    labels: Sequence[str] | None = None,
    marked: Tensor | None = None,
    columns: int = 6,
    cmap: str = "gray_r",
) -> list[Artist]:
    """Draw images in rows on one pair of axes, say the most surprising data; return the images, then their labels.

    Args:
        ax: where to draw; its frame is taken away.
        images: [k, height, width], or [k, height, width, 3] of colours in [0, 1].
        labels: k lines of text, each above its image.
        marked: mask [k] of images whose labels are drawn in vermilion and bold.
        columns: images in a row.
        cmap: of images without colours; each image has its own least and greatest value.

    Raises:
        InputError: if there is no image, or shapes do not fit.

    Example:
        >>> import matplotlib.pyplot as plt, torch
        >>> fig, ax = plt.subplots()
        >>> len(plot_images(ax, torch.rand(5, 8, 8), labels="abcde", columns=3))
        10
        >>> plt.close(fig)
    """
    k = len(images)
    if images.ndim not in (3, 4) or not k or (images.ndim == 4 and images.shape[-1] != 3):
        raise InputError(f"images must have shape [k, height, width] or [k, height, width, 3], got {images.shape}.")
    if (labels is not None and len(labels) != k) or (marked is not None and marked.shape != (k,)):
        raise InputError(f"labels and marked must be one for each of {k} images.")
    check_count("columns", columns, 1)
    tall = images.shape[1] / images.shape[2]  # height of an image whose width is 1
    artists: list[Artist] = []
    texts: list[Artist] = []
    for i, image in enumerate(to_array(images)):
        row, column = divmod(i, columns)
        left, top = column * (1 + _GAP), -row * (tall + _GAP)
        extent = (left, left + 1, top - tall, top)
        artists.append(ax.imshow(image, cmap=cmap, extent=extent, interpolation="nearest"))
        if labels is not None:
            loud = marked is not None and bool(marked[i])
            color, weight = (VERMILION, "bold") if loud else (BLACK, "normal")
            place = (left + 0.5, top + 0.04)
            texts.append(ax.text(*place, labels[i], color=color, weight=weight, ha="center", va="bottom"))
    rows, across = math.ceil(k / columns), min(k, columns)
    ax.set(xlim=(-0.1, across * (1 + _GAP) - _GAP + 0.1), ylim=(-rows * (tall + _GAP) + _GAP - 0.1, _GAP))
    ax.set_aspect("equal")
    ax.set_axis_off()
    return artists + texts
