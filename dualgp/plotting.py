"""Pictures of posteriors and of their sites: functions of (ax, …) that draw on the axes given and return artists.

Colours are Okabe and Ito's, told apart without colour vision; class, sign and role show in the marker too. Nothing here
sets a title, a label or a global parameter: those are the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.lines import Line2D
from torch import Tensor
from torch.distributions import Bernoulli

from dualgp.active import score
from dualgp.active.scores import Rule
from dualgp.basis import InducingBasis
from dualgp.errors import InputError
from dualgp.gp.memory import Memory
from dualgp.gp.model import DualGP
from dualgp.nets.posterior import NetworkPosterior
from dualgp.posterior import Posterior
from dualgp.sites import Sites

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#F0E442", "#000000")
BLUE, VERMILION, GREEN, *_, BLACK = PALETTE
_WORTH = LinearSegmentedColormap.from_list("dualgp worth", ["#FFFFFF", "#6BAED6", "#08306B"])
_FIELD = LinearSegmentedColormap.from_list("dualgp", ["#F0A36B", "#FFFFFF", "#6BAED6"])


def plot_posterior_1d(
    ax: Axes,
    model: DualGP | Posterior | NetworkPosterior,
    x: Tensor,
    *,
    data: tuple[Tensor, Tensor] | None = None,
    link: Callable[[Tensor], Tensor] | None = None,
    inducing: bool = True,
    color: str = BLUE,
    label: str | None = "mean ± 2 sd",
) -> list[Artist]:
    """Draw the mean of f and the band of ±2 standard deviations over x; return the line, the band, data and Z.

    Args:
        ax: where to draw.
        model: a fitted `DualGP`, a network's posterior or any `Posterior`, with one input and one output.
        x: inputs [T, 1], in increasing order.
        data: (X [n, 1], y [n]) to draw as dots.
        link: increasing function of f to draw instead, say `torch.exp` for a rate: its median and the same quantiles.
        inducing: whether to mark the inducing inputs as ticks at the foot of the axes.
        color: of line and band.
        label: of the line, in a legend.

    Raises:
        InputError: if the model has several outputs, the inputs several columns, or the data another shape.
        NotFittedError: if a `DualGP` has not been fitted.

    Example:
        >>> import gpytorch, matplotlib.pyplot as plt
        >>> x = torch.linspace(0, 6, 20).unsqueeze(-1)
        >>> gp = DualGP(gpytorch.kernels.RBFKernel(), gpytorch.likelihoods.GaussianLikelihood(), num_inducing=6)
        >>> result = gp.fit(x, x.sin().squeeze(-1))
        >>> fig, ax = plt.subplots()
        >>> len(plot_posterior_1d(ax, gp, x, data=(x, x.sin().squeeze(-1))))
        4
        >>> plt.close(fig)
    """
    q = model.posterior if isinstance(model, DualGP) else model
    several = q.basis.batch_shape or (q.basis.num_outputs or 1) > 1
    if x.ndim != 2 or x.shape[-1] != 1 or several:
        raise InputError(
            f"plot_posterior_1d draws one function of one input: expected x of shape [T, 1] and a model without batch "
            f"or outputs, got x {tuple(x.shape)}, batch shape {tuple(q.basis.batch_shape)} and {q.basis.num_outputs} "
            "outputs."
        )
    with torch.no_grad():
        mean, var = (t.reshape(-1) for t in q.predict(x))
    curves = (mean + side * var.sqrt() for side in (0.0, -2.0, 2.0))
    middle, low, high = (_array(c if link is None else link(c)) for c in curves)
    at = _array(x[:, 0])
    artists: list[Artist] = [
        *ax.plot(at, middle, color=color, label=label),
        ax.fill_between(at, low, high, color=color, alpha=0.2, linewidth=0),
    ]
    if data is not None:
        X, y = _data(data, 1)
        artists.append(ax.scatter(X[:, 0], y, s=9, color=BLACK, alpha=0.6, label="data"))
    if inducing and isinstance(q.basis, InducingBasis):
        Z = _array(q.basis.inducing_points[:, 0])
        ticks = Line2D(Z, np.full(len(Z), 0.02), linestyle="", marker="|", color=GREEN, label="inducing inputs Z")
        ticks.set_transform(ax.get_xaxis_transform())  # x in data, y in axes
        artists.append(ax.add_artist(ticks))  # no part in the limits: an idle Z may lie far from the data
    return artists


def plot_sites(
    ax: Axes, x: Tensor, sites: Sites, *, quantity: str = "beta", mean: Tensor | None = None
) -> list[Artist]:
    """Draw one dual parameter of every datum over x; return a line at zero and one scatter per sign of β.

    The area of a marker is |β|; a site with β ≥ 0 is a filled circle, one with β < 0 an open diamond.

    Args:
        ax: where to draw.
        x: where along the axis each datum goes, [N] or [N, 1].
        sites: of one output, [N].
        quantity: "beta", "lam" or "alpha".
        mean: marginal means [N] of q(f_i), from which α = λ − β m; needed for "alpha" only.

    Raises:
        InputError: if shapes do not fit, the quantity is unknown, or "alpha" is asked for without means.

    Example:
        >>> import matplotlib.pyplot as plt
        >>> fig, ax = plt.subplots()
        >>> sites = Sites(torch.tensor([1.0, 2.0]), torch.tensor([1.0, -0.1]))
        >>> len(plot_sites(ax, torch.arange(2.0), sites))
        3
        >>> plt.close(fig)
    """
    if sites.multi_output or x.reshape(-1).shape != sites.lam.shape:
        raise InputError(
            f"plot_sites draws one output: expected one x per site, got x {tuple(x.shape)} and sites "
            f"{tuple(sites.lam.shape)}. Of several outputs take one: Sites(s.lam[..., c], s.beta[..., c])."
        )
    if quantity not in ("beta", "lam", "alpha") or (quantity == "alpha" and mean is None):
        raise InputError(f'quantity must be "beta", "lam", or "alpha" with mean=, got {quantity!r}.')
    values = sites.alpha(mean) if quantity == "alpha" and mean is not None else getattr(sites, quantity)
    at, height, beta = _array(x.reshape(-1)), _array(values), _array(sites.beta)
    area = _area(beta)
    artists: list[Artist] = [ax.axhline(0.0, color=BLACK, linewidth=0.6)]
    for rows, marker, color, label in ((beta >= 0, "o", BLUE, "β ≥ 0"), (beta < 0, "D", VERMILION, "β < 0")):
        if rows.any():
            dots = ax.scatter(at[rows], height[rows], s=area[rows], marker=marker, edgecolors=color, label=label)
            dots.set_facecolor(color if marker == "o" else "none")
            artists.append(dots)
    return artists


def plot_decision_2d(
    ax: Axes,
    gp: DualGP,
    bounds: Sequence[float | int],
    *,
    data: tuple[Tensor, Tensor] | None = None,
    classes: tuple[str, str] = ("y = 0", "y = 1"),
    inducing: bool = True,
    resolution: int = 80,
) -> list[Artist]:
    """Draw the field p(y = 1 | x) of a binary model of two inputs; return the image, the p = ½ contour, data and Z.

    Args:
        ax: where to draw; its limits become `bounds`.
        gp: fitted with a Bernoulli likelihood.
        bounds: (x₁ from, x₁ to, x₂ from, x₂ to).
        data: (X [n, 2], y [n]) to draw: y = 1 as circles, y = 0 as triangles.
        classes: names of the two classes, in a legend.
        inducing: whether to mark the inducing inputs.
        resolution: points along each side of the grid.

    Raises:
        InputError: if the model does not have two inputs, its predictions are not Bernoulli, or the data have another
            shape.
        NotFittedError: if the model has not been fitted.

    Example:
        >>> import gpytorch, matplotlib.pyplot as plt
        >>> X = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
        >>> gp = DualGP(gpytorch.kernels.RBFKernel(), gpytorch.likelihoods.BernoulliLikelihood())
        >>> result = gp.fit(X, torch.tensor([0, 0, 1, 1]), learn_hyperparameters=False, learn_inducing=False)
        >>> fig, ax = plt.subplots()
        >>> len(plot_decision_2d(ax, gp, (-1, 2, -1, 2), resolution=9))
        3
        >>> plt.close(fig)
    """
    Z = gp.posterior.basis.inducing_points
    if Z.shape[-1] != 2:
        raise InputError(f"plot_decision_2d draws two inputs, the model has {Z.shape[-1]}.")
    sides = [torch.linspace(a, b, resolution).to(Z) for a, b in (bounds[:2], bounds[2:])]
    grid = torch.cartesian_prod(*sides)  # [R², 2]
    p = gp.predict_likelihood(grid)
    if not isinstance(p, Bernoulli):
        raise InputError(f"plot_decision_2d needs a binary model, with Bernoulli predictions; got {type(p).__name__}.")
    field = _array(p.probs).reshape(resolution, resolution).T
    a, b = (_array(s) for s in sides)
    edges = (a[0], a[-1], b[0], b[-1])
    artists: list[Artist] = [
        ax.imshow(field, _FIELD, aspect="auto", origin="lower", extent=edges, interpolation="bilinear", vmin=0, vmax=1),
        ax.contour(a, b, field, levels=[0.5], colors=BLACK),
    ]
    if data is not None:
        artists += _by_class(ax, *_data(data, 2), classes, s=22.0, edgecolors="white", linewidths=0.4)
    if inducing:
        artists += ax.plot(*_array(Z).T, "+", color=BLACK, markersize=7, label="inducing inputs Z")
    ax.set(xlim=bounds[:2], ylim=bounds[2:])
    return artists


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
        >>> import gpytorch, matplotlib.pyplot as plt
        >>> x = torch.linspace(0, 6, 60).unsqueeze(-1)
        >>> gp = DualGP(gpytorch.kernels.RBFKernel(), gpytorch.likelihoods.GaussianLikelihood(), num_inducing=6)
        >>> result = gp.update_all((b, b.sin().squeeze(-1)) for b in x.split(20))
        >>> fig, ax = plt.subplots()
        >>> *_, past, memory = plot_stream_1d(ax, gp, x, past=(x, x.sin().squeeze(-1)))
        >>> len(past.get_offsets()), len(memory.get_offsets())
        (60, 60)
        >>> plt.close(fig)
    """
    artists = plot_posterior_1d(ax, gp, x, link=link, label=label)
    if past is not None:
        X, y = _data(past, 1)
        artists.append(ax.scatter(X[:, 0], y, s=9, color=BLACK, alpha=0.2, linewidths=0, label="past"))
    if (memory := gp.memory) is not None:
        X, y = _data((memory.data.x, memory.data.y), 1)
        dots = ax.scatter(X[:, 0], y, s=_area(_leverage(gp, memory)), color=VERMILION, zorder=2.5, label="memory")
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
        >>> import gpytorch, matplotlib.pyplot as plt
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
    artists = plot_decision_2d(ax, gp, bounds, resolution=resolution)
    if past is not None:
        names = f"{classes[0]}, past", f"{classes[1]}, past"
        artists += _by_class(ax, *_data(past, 2), names, s=10.0, alpha=0.5, linewidths=0)
    if (memory := gp.memory) is not None:
        names = f"{classes[0]}, memory", f"{classes[1]}, memory"
        area = _area(_leverage(gp, memory))
        data = _data((memory.data.x, memory.data.y), 2)
        artists += _by_class(ax, *data, names, s=area, edgecolors=BLACK, linewidths=0.7)
    return artists


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
        >>> import gpytorch, matplotlib.pyplot as plt
        >>> X = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
        >>> gp = DualGP(gpytorch.kernels.RBFKernel(), gpytorch.likelihoods.BernoulliLikelihood())
        >>> result = gp.fit(X, torch.tensor([0, 0, 1, 1]), learn_hyperparameters=False, learn_inducing=False)
        >>> fig, ax = plt.subplots()
        >>> len(plot_score_2d(ax, gp, (-1, 2, -1, 2), chosen=X[:2], resolution=9))
        3
        >>> plt.close(fig)
    """
    dtype = q.posterior.basis.dtype
    sides = [torch.linspace(a, b, resolution, dtype=dtype) for a, b in (bounds[:2], bounds[2:])]
    learner: Any = q
    worth = _array(score(learner, torch.cartesian_prod(*sides), rule, **options)).reshape(resolution, resolution).T
    image = ax.imshow(worth, _WORTH, aspect="auto", origin="lower", interpolation="bilinear")
    image.set_extent((bounds[0], bounds[1], bounds[2], bounds[3]))
    artists: list[Artist] = [image]
    if chosen is not None:
        if chosen.ndim != 2 or chosen.shape[-1] != 2:
            raise InputError(f"What was chosen must have shape [k, 2], got {tuple(chosen.shape)}.")
        box = {"boxstyle": "circle", "facecolor": VERMILION, "edgecolor": "white", "pad": 0.2}
        for number, (a, b) in enumerate(chosen.tolist(), 1):
            artists.append(ax.text(a, b, str(number), ha="center", va="center", color="white", size=8, bbox=box))
    ax.set(xlim=bounds[:2], ylim=bounds[2:])
    return artists


def plot_data_scores_2d(
    ax: Axes, x: Tensor, scores: Tensor, *, chosen: Tensor | None = None, label: str | None = None
) -> list[Artist]:
    """Draw data in the plane, larger with |score|; return one scatter per sign, and rings.

    Args:
        ax: where to draw.
        x: inputs [n, 2].
        scores: one for each; ≥ 0 as filled circles, < 0 as open diamonds.
        chosen: rows to ring, such as `Selection.indices`.
        label: of the rings, in a legend.

    Raises:
        InputError: if shapes do not fit.

    Example:
        >>> import matplotlib.pyplot as plt
        >>> fig, ax = plt.subplots()
        >>> scores = torch.tensor([1.0, -1.0, 2.0, 0.5])
        >>> len(plot_data_scores_2d(ax, torch.rand(4, 2), scores, chosen=torch.tensor([2])))
        3
        >>> plt.close(fig)
    """
    if x.ndim != 2 or x.shape[-1] != 2 or scores.shape != x.shape[:1]:
        raise InputError(f"Expected x [n, 2] and scores [n], got {tuple(x.shape)} and {tuple(scores.shape)}.")
    at, values = _array(x), _array(scores)
    area = _area(values)
    artists: list[Artist] = []
    for rows, marker, color in ((values >= 0, "o", BLUE), (values < 0, "D", VERMILION)):
        if rows.any():
            dots = ax.scatter(at[rows, 0], at[rows, 1], s=area[rows], marker=marker, edgecolors=color)
            dots.set_facecolor(color if marker == "o" else "none")
            artists.append(dots)
    if chosen is not None:
        x1, x2 = at[_array(chosen)].T
        artists.append(ax.scatter(x1, x2, s=90, facecolors="none", edgecolors=BLACK, linewidths=1.2, label=label))
    return artists


def _by_class(
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


def _leverage(gp: DualGP, memory: Memory) -> np.ndarray:
    return _array(memory.sites.beta * gp.predict(memory.data.x)[1])


def _area(values: np.ndarray) -> np.ndarray:
    """Return areas of markers, from 4 to 40 square points, that grow with |values|."""
    size = np.abs(values)
    return 4.0 + 36.0 * size / max(size.max(initial=0.0), 1e-300)


def _data(data: tuple[Tensor, Tensor], columns: int) -> tuple[np.ndarray, np.ndarray]:
    X, y = data
    if X.ndim != 2 or X.shape[-1] != columns or y.shape != X.shape[:1]:
        raise InputError(
            f"Data to draw are a pair (X [n, {columns}], y [n]), got X {tuple(X.shape)} and y {tuple(y.shape)}."
        )
    return _array(X), _array(y)


def _array(values: Tensor) -> np.ndarray:
    return values.detach().cpu().numpy()
