"""Streams as they stand: posterior, inducing inputs, past and memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from torch import Tensor

from dualgp.gp.memory import Memory
from dualgp.gp.model import DualGP
from dualgp.plotting.posteriors import plot_decision_2d, plot_posterior_1d
from dualgp.plotting.style import BLACK, VERMILION, areas, by_class, checked_data, to_array


def plot_stream_1d(
    ax: Axes,
    gp: DualGP,
    x: Tensor,
    *,
    past: tuple[Tensor, Tensor] | None = None,
    link: Callable[[Tensor], Tensor] | None = None,
    label: str | None = "mean ± 2 sd",
) -> list[Artist]:
    """Draw how a stream stands, over x; return the line, the band and Z as `plot_posterior_1d`, then past and memory.

    The area of a datum of memory grows with its leverage |β|·v, relative to the greatest.

    Args:
        ax: where to draw.
        gp: a stream with one input and one output.
        x: inputs [T, 1], in increasing order.
        past: (X [n, 1], y [n]) that came by, to draw faintly beneath the memory.
        link: increasing function of f to draw instead, as in `plot_posterior_1d`.
        label: of the line, in a legend.

    Raises:
        InputError: if the model has several outputs, the inputs several columns, or the past another shape.
        NotFittedError: before the first batch.

    Example:
        >>> import gpytorch, torch, matplotlib.pyplot as plt
        >>> x = torch.linspace(0, 6, 60).unsqueeze(-1)
        >>> gp = DualGP(gpytorch.kernels.RBFKernel(), gpytorch.likelihoods.GaussianLikelihood(), num_inducing=6)
        >>> result = gp.update_all((b, b.sin().squeeze(-1)) for b in x.split(20))
        >>> fig, ax = plt.subplots()
        >>> *_, past, memory = plot_stream_1d(ax, gp, x, past=(x, x.sin().squeeze(-1)))
        >>> len(past.get_offsets()), len(memory.get_offsets())
        (60, 60)
        >>> plt.close(fig)
    """
    passed = None if past is None else checked_data(past, 1)
    artists = plot_posterior_1d(ax, gp, x, link=link, label=label)
    if passed is not None:
        X, y = passed
        artists.append(ax.scatter(X[:, 0], y, s=9, color=BLACK, alpha=0.2, linewidths=0, label="past"))
    if (memory := gp.memory) is not None:
        X, y = checked_data((memory.data.x, memory.data.y), 1)
        dots = ax.scatter(X[:, 0], y, s=areas(_leverage(gp, memory)), color=VERMILION, zorder=2.5, label="memory")
        dots.set(edgecolor=BLACK, linewidth=0.5)
        artists.append(dots)
    return artists


def plot_stream_2d(
    ax: Axes,
    gp: DualGP,
    bounds: Sequence[float | int],
    *,
    past: tuple[Tensor, Tensor] | None = None,
    classes: tuple[str, str] = ("y = 0", "y = 1"),
    resolution: int = 80,
) -> list[Artist]:
    """Draw how a binary stream of two inputs stands; return what `plot_decision_2d` does, then past and memory.

    Past and memory are two scatters each: y = 1 as circles, then y = 0 as triangles. The area of a datum of memory
    grows with its leverage |β|·v, relative to the greatest.

    Args:
        ax: where to draw; its limits become `bounds`.
        gp: a stream with a Bernoulli likelihood.
        bounds: (x₁ from, x₁ to, x₂ from, x₂ to).
        past: (X [n, 2], y [n]) that came by, to draw faintly beneath the memory.
        classes: names of the two classes, in a legend.
        resolution: points along each side of the grid.

    Raises:
        InputError: if the model does not have two inputs, its predictions are not Bernoulli, or the past has another
            shape.
        NotFittedError: before the first batch.

    Example:
        >>> import gpytorch, torch, matplotlib.pyplot as plt
        >>> X = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
        >>> y = torch.tensor([0, 0, 1, 1])
        >>> gp = DualGP(gpytorch.kernels.RBFKernel(), gpytorch.likelihoods.BernoulliLikelihood(), memory=3)
        >>> result = gp.update(X, y, learn_hyperparameters=False)
        >>> fig, ax = plt.subplots()
        >>> *_, ones, zeros = plot_stream_2d(ax, gp, (-1, 2, -1, 2), resolution=9)
        >>> len(ones.get_offsets()) + len(zeros.get_offsets())
        3
        >>> plt.close(fig)
    """
    passed = None if past is None else checked_data(past, 2)
    artists = plot_decision_2d(ax, gp, bounds, resolution=resolution)
    if passed is not None:
        names = f"{classes[0]}, past", f"{classes[1]}, past"
        artists += by_class(ax, *passed, names, s=10.0, alpha=0.5, linewidths=0)
    if (memory := gp.memory) is not None:
        names = f"{classes[0]}, memory", f"{classes[1]}, memory"
        area = areas(_leverage(gp, memory))
        data = checked_data((memory.data.x, memory.data.y), 2)
        artists += by_class(ax, *data, names, s=area, edgecolors=BLACK, linewidths=0.7)
    return artists


def _leverage(gp: DualGP, memory: Memory) -> np.ndarray:
    return to_array(memory.sites.beta * gp.predict(memory.data.x)[1])
