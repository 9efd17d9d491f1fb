"""Posteriors over one input or two, and their sites."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from torch import Tensor
from torch.distributions import Bernoulli, Categorical

from dualgp.basis import InducingBasis
from dualgp.checks import check_tensor
from dualgp.errors import InputError
from dualgp.gp.exact import ExactGP
from dualgp.gp.model import DualGP
from dualgp.nets.posterior import NetworkPosterior
from dualgp.plotting.style import (
    BLACK,
    BLUE,
    FIELD,
    GREEN,
    VERMILION,
    areas,
    by_class,
    checked_data,
    draw_field,
    plane,
    to_array,
)
from dualgp.posterior import Posterior
from dualgp.sites import Sites


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
    check_tensor("x", x)
    if not hasattr(q, "basis"):
        hint = "; of an ExactGP, its posterior()" if isinstance(model, ExactGP) else ""
        raise InputError(
            f"plot_posterior_1d draws a DualGP, a NetworkPosterior or a Posterior, got {type(model).__name__}{hint}."
        )
    points = None if data is None else checked_data(data, 1)
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
    middle, low, high = (to_array(c if link is None else link(c)) for c in curves)
    at = to_array(x[:, 0])
    artists: list[Artist] = [
        *ax.plot(at, middle, color=color, label=label),
        ax.fill_between(at, low, high, color=color, alpha=0.2, linewidth=0),
    ]
    if points is not None:
        X, y = points
        artists.append(ax.scatter(X[:, 0], y, s=9, color=BLACK, alpha=0.6, label="data"))
    if inducing and isinstance(q.basis, InducingBasis):
        Z = to_array(q.basis.inducing_points[:, 0])
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
    check_tensor("x", x)
    if sites.multi_output or x.reshape(-1).shape != sites.lam.shape:
        raise InputError(
            f"plot_sites draws one output: expected one x per site, got x {tuple(x.shape)} and sites "
            f"{tuple(sites.lam.shape)}. Of several outputs take one: Sites(s.lam[..., c], s.beta[..., c])."
        )
    if quantity not in ("beta", "lam", "alpha") or (quantity == "alpha" and mean is None):
        raise InputError(f'quantity must be "beta", "lam", or "alpha" with mean=, got {quantity!r}.')
    values = sites.alpha(mean) if quantity == "alpha" and mean is not None else getattr(sites, quantity)
    at, height, beta = to_array(x.reshape(-1)), to_array(values), to_array(sites.beta)
    area = areas(beta)
    artists: list[Artist] = [ax.axhline(0.0, color=BLACK, linewidth=0.6)]
    for rows, marker, color, label in ((beta >= 0, "o", BLUE, "β ≥ 0"), (beta < 0, "D", VERMILION, "β < 0")):
        if rows.any():
            dots = ax.scatter(at[rows], height[rows], s=area[rows], marker=marker, edgecolors=color, label=label)
            dots.set_facecolor(color if marker == "o" else "none")
            artists.append(dots)
    return artists


def plot_decision_2d(
    ax: Axes,
    model: DualGP | NetworkPosterior | Callable[[Tensor], Tensor],
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
        model: a `DualGP` fitted with a Bernoulli likelihood; a network's posterior with one, or with a softmax of two
            classes; or a function from inputs [T, 2], of torch's default dtype, to p(y = 1) [T].
        bounds: (x₁ from, x₁ to, x₂ from, x₂ to).
        data: (X [n, 2], y [n]) to draw: y = 1 as circles, y = 0 as triangles.
        classes: names of the two classes, in a legend.
        inducing: whether to mark the inducing inputs.
        resolution: points along each side of the grid.

    Raises:
        InputError: if a `DualGP` does not have two inputs, predictions are not of two classes, or the data have another
            shape.
        NotFittedError: if a `DualGP` has not been fitted.

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
    points = None if data is None else checked_data(data, 2)
    Z, dtype, device = None, torch.get_default_dtype(), torch.device("cpu")
    if isinstance(model, DualGP):
        Z = model.posterior.basis.inducing_points
        dtype, device = Z.dtype, Z.device
        if Z.shape[-1] != 2:
            raise InputError(f"plot_decision_2d draws two inputs, the model has {Z.shape[-1]}.")
    elif isinstance(model, NetworkPosterior):
        dtype, device = model.basis.dtype, model.basis.device
    a, b, grid = plane(bounds, resolution, dtype, device)
    image, field = draw_field(ax, _probability_of_one(model, grid), bounds, FIELD, vmin=0, vmax=1)
    artists: list[Artist] = [image, ax.contour(to_array(a), to_array(b), field, levels=[0.5], colors=BLACK)]
    if points is not None:
        artists += by_class(ax, *points, classes, s=22.0, edgecolors="white", linewidths=0.4)
    if inducing and Z is not None:
        artists += ax.plot(*to_array(Z).T, "+", color=BLACK, markersize=7, label="inducing inputs Z")
    return artists


def _probability_of_one(model: DualGP | NetworkPosterior | Callable[[Tensor], Tensor], grid: Tensor) -> Tensor:
    if not isinstance(model, DualGP | NetworkPosterior):
        with torch.no_grad():
            probs = model(grid)
        if probs.shape != grid.shape[:1]:
            raise InputError(f"The function must return p(y = 1) of shape {tuple(grid.shape[:1])}, got {probs.shape}.")
        return probs
    p = model.predict_likelihood(grid)
    if isinstance(p, Categorical) and p.probs.shape[-1] == 2:
        return p.probs[..., 1]
    if not isinstance(p, Bernoulli):
        raise InputError(
            "plot_decision_2d needs a binary model, with predictions that are Bernoulli, or Categorical over two "
            f"classes; got {type(p).__name__}."
        )
    return p.probs.reshape(-1)
