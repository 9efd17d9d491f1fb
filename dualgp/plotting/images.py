"""Data that are images, in rows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from torch import Tensor

from dualgp.checks import check_tensor
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
    check_tensor("images", images)
    k = len(images) if images.ndim else 0
    if images.ndim not in (3, 4) or not images.numel() or (images.ndim == 4 and images.shape[-1] != 3):
        came = tuple(images.shape)
        raise InputError(f"images must have shape [k, height, width] or [k, height, width, 3], got {came}.")
    if marked is not None:
        check_tensor("marked", marked)
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


def plot_sensitivity_images(
    ax: Axes, images: Tensor, scores: Tensor, *, labels: Sequence[str] | None = None, columns: int = 8, rows: int = 2
) -> list[Artist]:
    """Draw the images of greatest score, and under them those of least; return the images, then their labels.

    The first half of the rows has the greatest, in decreasing order and with labels in vermilion; the second half the
    least, in increasing order. All are drawn if there are no more than fit.

    Args:
        ax: where to draw; its frame is taken away.
        images: [n, height, width], or [n, height, width, 3] of colours in [0, 1].
        scores: one for each, [n]: `sensitivity(...).score` or a leverage.
        labels: n lines of text; the scores to two digits if None.
        columns: images in a row.
        rows: even.

    Raises:
        InputError: if there is no image, shapes do not fit, a score is not finite, or the rows are not even.

    Example:
        >>> import matplotlib.pyplot as plt, torch
        >>> fig, ax = plt.subplots()
        >>> artists = plot_sensitivity_images(ax, torch.rand(9, 8, 8), torch.arange(9.0), columns=3)
        >>> [text.get_text() for text in artists[6:]]
        ['8', '7', '6', '0', '1', '2']
        >>> plt.close(fig)
    """
    check_tensor("images", images)
    check_tensor("scores", scores)
    n = len(images) if images.ndim else 0
    if scores.shape != (n,) or not scores.isfinite().all():
        raise InputError(f"scores must be {n} finite numbers, one for each image; got {tuple(scores.shape)}.")
    if labels is not None and len(labels) != n:
        raise InputError(f"labels must be one for each of {n} images, got {len(labels)}.")
    check_count("columns", columns, 1)
    check_count("rows", rows, 2)
    if rows % 2:
        raise InputError(f"rows must be even, half for the greatest and half for the least; got {rows}.")
    order = scores.argsort(descending=True, stable=True).tolist()
    half = columns * rows // 2
    greatest = order if len(order) <= 2 * half else order[:half]
    shown = greatest + ([] if greatest is order else order[: -half - 1 : -1])
    texts = [f"{float(scores[i]):.2g}" if labels is None else labels[i] for i in shown]
    marked = torch.arange(len(shown), device="cpu") < (len(shown) + 1) // 2
    return plot_images(ax, images[shown], labels=texts, marked=marked, columns=columns)
