"""What is drawn is where it is, as large as it should be, and nothing else is touched."""

import gpytorch
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from gpytorch.likelihoods import BernoulliLikelihood, StudentTLikelihood
from matplotlib.colors import to_rgba
from torch.distributions import Bernoulli, Categorical, Normal, Poisson
from toys import F64, gap, gaussian, line, matern, rbf, unchecked, waves

from dualgp import DualGP, Posterior, Sites, leverage, network_gp
from dualgp.active import score
from dualgp.errors import InputError, NotFittedError
from dualgp.plotting import (
    BLUE,
    VERMILION,
    plot_data_scores_2d,
    plot_decision_2d,
    plot_images,
    plot_leverage,
    plot_posterior_1d,
    plot_reliability,
    plot_score_2d,
    plot_sensitivity_images,
    plot_sites,
    plot_stream_1d,
    plot_stream_2d,
    plot_sweep,
)

FIXED = {"learn_hyperparameters": False}
BOUNDS = (-2.0, 1.0, -1.5, 2.5)


@pytest.fixture
def ax():
    """Axes that are not the current ones; nothing that pyplot holds may change."""
    fig, ax = plt.subplots()
    other, current = plt.subplots()
    before = dict(plt.rcParams), plt.get_fignums()
    yield ax
    assert (dict(plt.rcParams), plt.get_fignums()) == before
    assert plt.gca() is current
    assert not current.has_data()
    assert ax.get_title() == ax.get_xlabel() == ax.get_ylabel() == ""
    assert ax.get_legend() is None
    plt.close(fig)
    plt.close(other)


def regression(likelihood=None, **options) -> tuple[DualGP, torch.Tensor, torch.Tensor]:
    x = line(0, 6, 60)
    y = x.sin().squeeze(-1) + 0.2 * (11 * x).cos().squeeze(-1)
    gp = DualGP(matern(1.0, 1.0), gaussian() if likelihood is None else likelihood, num_inducing=7, **options)
    gp.update_all(((b, b.sin().squeeze(-1) + 0.2 * (11 * b).cos().squeeze(-1)) for b in x.split(20)), **FIXED)
    return gp, x, y


def classification(**options) -> tuple[DualGP, torch.Tensor, torch.Tensor]:
    x, f, _ = waves(60)
    y = (f > 0).double()
    gp = DualGP(matern(), BernoulliLikelihood(), num_inducing=9, **options)
    gp.update_all(zip(x.split(20), y.split(20), strict=True), **FIXED)
    return gp, x, y


def offsets(*artists) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([np.asarray(a.get_offsets()) for a in artists]))


def same_points(a: torch.Tensor, b: torch.Tensor) -> bool:
    return sorted(a.tolist()) == sorted(b.tolist())


def assert_areas(sizes: np.ndarray, leverage: torch.Tensor) -> None:
    """Areas grow with leverage: strictly, and in proportion above the least area."""
    share = (leverage / leverage.max()).numpy()
    np.testing.assert_allclose((sizes - 4.0) / 36.0, share, rtol=0, atol=1e-12)
    assert len(set(sizes.tolist())) > 1


# --- posteriors, sites, decisions ----------------------------------------------------------------


def test_the_posterior_is_drawn_where_it_is(ax):
    gp, x, y = regression()
    curve, band, data, Z = plot_posterior_1d(ax, gp, x, data=(x, y))
    mean, var = gp.predict(x)
    assert gap(curve.get_ydata(), mean) == 0
    edge = torch.from_numpy(band.get_paths()[0].vertices)
    for side in (-2, 2):
        wanted = torch.stack([x[:, 0], mean + side * var.sqrt()], -1)
        assert torch.cdist(wanted, edge).min(-1).values.max() < 1e-6
    assert gap(offsets(data), torch.stack([x[:, 0], y], -1)) == 0
    assert gap(Z.get_xdata(), gp.inducing_points[:, 0]) == 0


def test_a_link_bends_the_curves_and_an_idle_inducing_input_does_not_widen_the_axes(ax):
    gp, x, _ = regression()
    gp.move_inducing(torch.cat([gp.inducing_points, torch.tensor([[500.0]], dtype=F64)]))
    curve, band, Z = plot_posterior_1d(ax, gp, x, link=torch.exp)
    mean, var = gp.predict(x)
    assert gap(curve.get_ydata(), mean.exp()) < 1e-12
    assert gap(band.get_paths()[0].vertices[:, 1].max(), (mean + 2 * var.sqrt()).exp().max()) < 1e-6
    assert ax.get_xlim()[1] < 10
    assert Z.get_xdata().max() == 500


def test_a_site_with_negative_precision_is_an_open_diamond_below_zero(ax):
    sites = Sites(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, -0.5, 1.0]))
    _, filled, hollow = plot_sites(ax, torch.tensor([0.0, 1.0, 2.0]), sites)
    assert offsets(filled).tolist() == [[0, 2], [2, 1]]
    assert offsets(hollow).tolist() == [[1, -0.5]]
    assert filled.get_sizes().tolist() == [40, 22]
    assert hollow.get_sizes().tolist() == [13]
    assert len(hollow.get_facecolor()) == 0  # "none"
    assert (filled.get_facecolor() == to_rgba(BLUE)).all()


def test_alpha_is_drawn_at_the_means_given(ax):
    sites = Sites(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0]))
    _, dots = plot_sites(ax, torch.arange(2.0), sites, quantity="alpha", mean=torch.tensor([1.0, 3.0]))
    assert offsets(dots)[:, 1].tolist() == [-1, -1]


def test_the_field_is_the_probability_of_class_one_with_x1_to_the_right(ax):
    gp, x, y = classification()
    image, contour, ones, zeros, Z = plot_decision_2d(ax, gp, BOUNDS, data=(x, y), resolution=5)
    a, b = torch.linspace(-2, 1, 5, dtype=F64), torch.linspace(-1.5, 2.5, 5, dtype=F64)
    for row, column in ((0, 4), (3, 1)):
        p = gp.predict_likelihood(torch.stack([a[column], b[row]]).unsqueeze(0)).probs
        assert abs(image.get_array()[row, column] - p.item()) < 1e-6
    assert tuple(image.get_extent()) == BOUNDS
    assert contour.levels.tolist() == [0.5]
    assert same_points(offsets(ones), x[y == 1])
    assert same_points(offsets(zeros), x[y == 0])
    assert gap(np.stack(Z.get_data(), -1), gp.inducing_points) == 0
    assert (*ax.get_xlim(), *ax.get_ylim()) == BOUNDS


# --- streams ---------------------------------------------------------------------------------------


def test_a_stream_shows_memory_at_its_data_as_large_as_its_leverage(ax):
    gp, x, y = regression(memory=8)
    *_, Z, past, memory = plot_stream_1d(ax, gp, x, past=(x, y))
    ids = gp.memory.ids
    assert len(ids) == 8
    assert gap(offsets(memory), torch.stack([x[ids, 0], y[ids]], -1)) == 0
    assert_areas(memory.get_sizes(), gp.predict(x[ids])[1] / 0.09)
    assert gap(offsets(past), torch.stack([x[:, 0], y], -1)) == 0
    assert gap(Z.get_xdata(), gp.inducing_points[:, 0]) == 0
    assert past.get_alpha() < 0.5
    assert past.get_zorder() < memory.get_zorder()


def test_a_stream_is_its_posterior_under_the_link_given(ax):
    gp, x, _ = regression()
    curve, *_ = plot_stream_1d(ax, gp, x, link=torch.exp, label="rate")
    assert gap(curve.get_ydata(), gp.predict(x)[0].exp()) < 1e-12
    assert curve.get_label() == "rate"


def test_negative_precision_in_memory_has_an_area_too(ax):
    gp, x, y = regression(StudentTLikelihood().double(), memory=61)
    gp.update(x[:1], y[:1] + 30.0, **FIXED)  # far out
    leverage = gp.memory.sites.beta * gp.predict(gp.memory.data.x)[1]
    assert leverage.min() < 0
    assert_areas(plot_stream_1d(ax, gp, x)[-1].get_sizes(), leverage.abs())


def test_a_binary_stream_shows_memory_by_class(ax):
    gp, x, y = classification(memory=12)
    *_, Z, past_ones, past_zeros, ones, zeros = plot_stream_2d(ax, gp, BOUNDS, past=(x, y), classes=("no", "yes"))
    ids = gp.memory.ids
    here, label = x[ids], y[ids]
    leverage = gp.memory.sites.beta * gp.predict(here)[1]
    for dots, of_past, k, color in ((ones, past_ones, 1, BLUE), (zeros, past_zeros, 0, VERMILION)):
        assert gap(offsets(dots), here[label == k]) == 0
        assert gap(offsets(of_past), x[y == k]) == 0
        assert (dots.get_facecolor() == to_rgba(color)).all()
    sizes = np.empty(12)
    sizes[label.numpy() == 1], sizes[label.numpy() == 0] = ones.get_sizes(), zeros.get_sizes()
    assert_areas(sizes, leverage)
    assert [d.get_label() for d in (past_ones, past_zeros, ones, zeros)] == [
        "yes, past",
        "no, past",
        "yes, memory",
        "no, memory",
    ]
    assert gap(np.stack(Z.get_data(), -1), gp.inducing_points) == 0
    assert (*ax.get_xlim(), *ax.get_ylim()) == BOUNDS


def test_without_memory_none_is_drawn(ax):
    gp, x, _ = regression(memory=0)
    assert len(plot_stream_1d(ax, gp, x)) == 3
    gp, *_ = classification(memory=0)
    assert len(plot_stream_2d(ax, gp, BOUNDS, resolution=5)) == 3


def test_drawing_changes_no_model(ax):
    gp, x, y = regression(memory=8)
    before = {name: value.clone() for name, value in gp.state_dict().items()}
    plot_stream_1d(ax, gp, x, past=(x, y))
    assert all(torch.equal(value, before[name]) for name, value in gp.state_dict().items())


# --- what raises -------------------------------------------------------------------------------------


def test_what_cannot_be_drawn_raises_and_says_why(ax):
    gp, x, y = regression(memory=4)
    two, x2, y2 = classification(memory=4)
    with unchecked():
        for call, message in (
            (lambda: plot_posterior_1d(ax, gp, x[:, 0]), r"shape \[T, 1\]"),
            (lambda: plot_posterior_1d(ax, gp, x, data=(x, x)), r"y \[n\]"),
            (lambda: plot_stream_1d(ax, gp, x2), r"shape \[T, 1\]"),
            (lambda: plot_stream_1d(ax, gp, x, past=(x[:, 0], y)), r"X \[n, 1\]"),
            (lambda: plot_stream_1d(ax, gp, x, past=(x, y[:3])), r"y \[n\]"),
            (lambda: plot_stream_2d(ax, gp, BOUNDS), "two inputs"),
            (lambda: plot_stream_2d(ax, two, BOUNDS, past=(x, y), resolution=5), r"X \[n, 2\]"),
            (lambda: plot_decision_2d(ax, two, BOUNDS, data=(x2, x2), resolution=5), r"y \[n\]"),
            (lambda: plot_sites(ax, x[:3], Sites(y, y)), "one x per site"),
            (lambda: plot_sites(ax, x, Sites(y, y), quantity="alpha"), "mean="),
            (lambda: plot_sites(ax, x, Sites(y, y), quantity="gamma"), "gamma"),
        ):
            with pytest.raises(InputError, match=message):
                call()


def test_a_model_of_two_inputs_must_be_binary(ax):
    x, f, _ = waves(20)
    gp = DualGP(rbf(), gaussian(), num_inducing=5)
    gp.update(x, f, **FIXED)
    with pytest.raises(InputError, match="Bernoulli"):
        plot_stream_2d(ax, gp, BOUNDS, resolution=3)


def test_before_the_first_batch_there_is_nothing_to_draw(ax):
    gp = DualGP(rbf(), gpytorch.likelihoods.BernoulliLikelihood())
    with pytest.raises(NotFittedError):
        plot_stream_1d(ax, gp, line(0, 1, 3))
    with pytest.raises(NotFittedError):
        plot_stream_2d(ax, gp, BOUNDS)


def test_a_bare_posterior_is_drawn_too(ax):
    gp, x, _ = regression()
    curve, *_ = plot_posterior_1d(ax, Posterior(gp.posterior.basis, gp.posterior.site), x, inducing=False)
    assert gap(curve.get_ydata(), gp.predict(x)[0]) == 0


def test_scores_over_the_plane(ax):
    gp, *_ = classification()
    image, *numbers = plot_score_2d(ax, gp, (-2, 2, -1, 1), "variance", chosen=torch.zeros(2, 2), resolution=5)
    field = image.get_array()
    assert field.shape == (5, 5)
    at = torch.tensor([[2.0, -1.0]], dtype=gp.posterior.basis.dtype)  # last in x₁, first in x₂
    assert gap(torch.as_tensor(field[0, -1]), score(gp, at, "variance")) < 1e-6
    assert [n.get_text() for n in numbers] == ["1", "2"]
    assert tuple(image.get_extent()) == (-2, 2, -1, 1)
    with pytest.raises(InputError, match=r"\[k, 2\]"):
        plot_score_2d(ax, gp, (-2, 2, -1, 1), chosen=torch.zeros(2, 3), resolution=5)


def test_data_by_what_they_matter(ax):
    x, values = torch.rand(4, 2), torch.tensor([1.0, -2.0, 0.5, 0.0])
    positive, negative, rings = plot_data_scores_2d(ax, x, values, chosen=torch.tensor([1, 2]))
    assert gap(torch.as_tensor(positive.get_offsets()), x[[0, 2, 3]]) < 1e-6
    assert gap(torch.as_tensor(negative.get_offsets()), x[[1]]) < 1e-6
    assert gap(torch.as_tensor(rings.get_offsets()), x[[1, 2]]) < 1e-6
    assert list(positive.get_sizes()) == sorted(positive.get_sizes(), reverse=True)
    assert max(negative.get_sizes()) > max(positive.get_sizes())
    with pytest.raises(InputError, match="scores"):
        plot_data_scores_2d(ax, x, values[:2])


# --- calibration, sweeps, images -------------------------------------------------------------------


def test_reliability_of_labels_is_accuracy_over_confidence(ax):
    logits = torch.tensor([[3.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 2.0], [0.5, 0.0, 0.0]], dtype=F64)
    y = torch.tensor([0, 1, 0, 0])
    diagonal, points = plot_reliability(ax, Categorical(logits=logits), y, num_bins=2, label="net")
    confidence = logits.softmax(-1).max(-1).values  # in order: rows 3, 1 | 2, 0, of which row 2 is wrong
    assert gap(points.get_xdata(), torch.stack([confidence[[3, 1]].mean(), confidence[[2, 0]].mean()])) < 1e-12
    assert points.get_ydata().tolist() == [1.0, 0.5]
    assert [list(v) for v in diagonal.get_data()] == [[0, 1], [0, 1]]
    assert points.get_label() == "net"


def test_reliability_of_two_classes_is_that_of_either_form(ax):
    probs, y = torch.tensor([0.9, 0.2, 0.6, 0.45], dtype=F64), torch.tensor([1, 1, 0, 0])
    one = plot_reliability(ax, Bernoulli(probs), y.double(), num_bins=3)[1]
    two = plot_reliability(ax, Categorical(torch.stack([1 - probs, probs], -1)), y, num_bins=3)[1]
    assert gap(one.get_xdata(), torch.from_numpy(two.get_xdata())) < 1e-12
    assert gap(one.get_ydata(), torch.from_numpy(two.get_ydata())) == 0


def test_reliability_of_numbers_is_coverage(ax):
    y = Normal(0.0, 1.0).icdf((torch.arange(4000, dtype=F64) + 0.5) / 4000)
    honest = plot_reliability(ax, Normal(torch.zeros(4000), 1.0), y, num_bins=20)[1]
    assert gap(honest.get_xdata(), torch.from_numpy(honest.get_ydata())) < 1e-3
    sure = plot_reliability(ax, Normal(torch.zeros(4000), 0.5), y, num_bins=20)[1]
    assert (sure.get_ydata()[1:-1] < sure.get_xdata()[1:-1]).all()


def test_a_sweep_rings_the_best_of_each(ax):
    grid = [0.1, 1.0, 10.0]
    nan = float("nan")
    curves = {"a": [3.0, 1.0, 2.0], "b": torch.tensor([nan, 5.0, 4.0])}
    a, ring_a, b, ring_b = plot_sweep(ax, grid, curves)
    assert ring_a.get_offsets().tolist() == [[1.0, 1.0]]
    assert ring_b.get_offsets().tolist() == [[10.0, 4.0]]
    assert (a.get_label(), b.get_label(), ax.get_xscale()) == ("a", "b", "log")
    assert plot_sweep(ax, grid, {"a": [3.0, 1.0, 2.0]}, best="greatest")[1].get_offsets().tolist() == [[0.1, 3.0]]


def test_images_lie_in_rows_and_do_not_overlap(ax):
    pictures = torch.rand(5, 4, 2)
    *drawn, a, b, c, d, e = plot_images(ax, pictures, labels="abcde", marked=torch.arange(5) == 3, columns=2)
    boxes = [image.get_extent() for image in drawn]
    sizes = [(right - left, top - bottom) for left, right, bottom, top in boxes]
    assert sizes == [pytest.approx((1, 2))] * 5  # twice as tall as wide
    for i, one in enumerate(boxes):
        for other in boxes[:i]:
            assert one[0] > other[1] or other[0] > one[1] or one[2] > other[3] or other[2] > one[3]
    assert [boxes[k][0] < boxes[k + 1][0] for k in (0, 2)] == [True, True]
    assert boxes[0][2] > boxes[2][2] > boxes[4][2]
    assert gap(drawn[3].get_array(), pictures[3]) < 1e-7
    assert [t.get_text() for t in (a, b, c, d, e)] == list("abcde")
    assert [t.get_color() == VERMILION for t in (a, b, c, d, e)] == [False, False, False, True, False]


def test_images_of_greatest_score_stand_above_those_of_least(ax):
    pictures, scores = torch.rand(7, 2, 2), torch.tensor([3.0, 0.0, 5.0, 1.0, 4.0, 2.0, 6.0])
    artists = plot_sensitivity_images(ax, pictures, scores, labels="abcdefg", columns=2)
    drawn, texts = artists[:4], artists[4:]
    assert [t.get_text() for t in texts] == ["g", "c", "b", "d"]
    assert [t.get_color() == VERMILION for t in texts] == [True, True, False, False]
    assert drawn[0].get_extent()[2] > drawn[2].get_extent()[3]
    assert gap(drawn[2].get_array(), pictures[1]) < 1e-7
    texts = plot_sensitivity_images(ax, pictures[:3], scores[:3], columns=2)[3:]
    assert [t.get_text() for t in texts] == ["5", "3", "0"]  # there are no more: each once


def test_leverage_is_drawn_where_the_data_are(ax):
    gp, x, _ = regression(memory=5)
    memory = gp.memory
    stems, dots = plot_leverage(ax, gp, memory.data.x, memory.sites, label="leverage")
    at = torch.cat([memory.data.x.double(), leverage(gp, memory.data.x, memory.sites)[:, None]], -1)
    assert gap(dots.get_offsets(), at) < 1e-7
    assert [segment[0][1] for segment in stems.get_segments()] == [0.0] * 5
    two, *_ = classification(memory=4)
    (dots,) = plot_leverage(ax, two, two.memory.data.x, two.memory.sites)
    assert gap(dots.get_offsets(), two.memory.data.x) < 1e-7
    with unchecked(), pytest.raises(InputError, match="one input or two"):
        plot_leverage(ax, gp, torch.zeros(5, 3), memory.sites)


def test_the_field_of_a_function_or_a_network_is_its_probability(ax):
    image, *_ = plot_decision_2d(ax, lambda x: x[:, 0].sigmoid(), (-1, 1, 0, 2), resolution=3)
    assert gap(image.get_array()[2], torch.tensor([-1.0, 0.0, 1.0]).sigmoid()) < 1e-7
    x, y = torch.randn(12, 2, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 2
    net = torch.nn.Linear(2, 2)
    q = network_gp(net, (x, y), gpytorch.likelihoods.SoftmaxLikelihood(num_classes=2, mixing_weights=False))
    image, *_ = plot_decision_2d(ax, q, (-1, 1, 0, 2), resolution=3)
    corner = q.predict_likelihood(torch.tensor([[1.0, 0.0]])).probs[0, 1]
    assert gap(image.get_array()[0, -1], corner) < 1e-6
    with pytest.raises(InputError, match=r"shape \(9,\)"):
        plot_decision_2d(ax, lambda x: x, (-1, 1, 0, 2), resolution=3)


def test_what_has_no_calibration_sweep_or_image_raises(ax):
    y = torch.zeros(3)
    for call, message in (
        (lambda: plot_reliability(ax, Bernoulli(torch.rand(4)), y), "one target for each"),
        (lambda: plot_reliability(ax, Bernoulli(torch.rand(0)), y[:0]), "at least one"),
        (lambda: plot_reliability(ax, Poisson(torch.ones(3)), y), "Poisson has no cdf"),
        (lambda: plot_reliability(ax, Bernoulli(torch.rand(3)), y, num_bins=0), "num_bins"),
        (lambda: plot_sweep(ax, [1.0, -1.0], {}), "positive"),
        (lambda: plot_sweep(ax, [1.0, 2.0], {"loo": [1.0]}), "loo must be 2 numbers"),
        (lambda: plot_sweep(ax, [1.0], {"loo": [float("nan")]}), "finite"),
        (lambda: plot_sweep(ax, [1.0], {}, best="most"), "least"),
        (lambda: plot_images(ax, torch.rand(0, 2, 2)), "height, width"),
        (lambda: plot_images(ax, torch.rand(2, 2, 2, 4)), "height, width"),
        (lambda: plot_images(ax, torch.rand(2, 2, 2), labels="a"), "each of 2"),
        (lambda: plot_images(ax, torch.rand(2, 2, 2), columns=0), "columns"),
        (lambda: plot_sensitivity_images(ax, torch.rand(3, 2, 2), y[:2]), "3 finite numbers"),
        (lambda: plot_sensitivity_images(ax, torch.rand(3, 2, 2), y / 0), "3 finite numbers"),
        (lambda: plot_sensitivity_images(ax, torch.rand(3, 2, 2), y, labels="ab"), "each of 3"),
        (lambda: plot_sensitivity_images(ax, torch.rand(3, 2, 2), y, rows=3), "even"),
    ):
        with pytest.raises(InputError, match=message):
            call()
