"""Pictures are those on record: `python tests/test_pictures.py` draws the record anew, to be looked at before a commit.

Text and ticks are left out, whose pixels differ from one release of Matplotlib to the next; what is compared is where
lines, bands, fields and markers lie.
"""

from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest
import torch
from gpytorch.kernels import RBFKernel, ScaleKernel
from gpytorch.likelihoods import BernoulliLikelihood, GaussianLikelihood
from matplotlib.testing.compare import compare_images
from matplotlib.testing.decorators import remove_ticks_and_titles
from torch.distributions import Bernoulli

from dualgp import DualGP, Sites
from dualgp import plotting as p

RECORD = Path(__file__).parent / "pictures"
TOLERANCE = 2.0  # root mean square of 0 … 255: a datum left out of a picture has 3 and more
F64 = torch.float64


def stream(binary: bool) -> tuple[DualGP, torch.Tensor, torch.Tensor]:
    """A stream on a fixed design, with memory, at fixed hyperparameters."""
    n = torch.arange(30, dtype=F64)
    x = torch.stack([(0.7549 * n) % 1, (0.5698 * n) % 1], -1) if binary else 6 * n[:, None] / 29
    f = torch.sin(6 * x[:, 0]) - x[:, -1] if binary else torch.sin(x[:, 0]) + 0.2 * torch.cos(11 * x[:, 0])
    likelihood = BernoulliLikelihood() if binary else GaussianLikelihood().double()
    if not binary:
        likelihood.noise = 0.05
    kernel = ScaleKernel(RBFKernel()).double()
    kernel.outputscale, kernel.base_kernel.lengthscale = 2.0, 0.3 if binary else 1.0
    gp, y = DualGP(kernel, likelihood, num_inducing=8, memory=9), (f > 0).to(F64) if binary else f
    for rows in torch.arange(30).split(10):
        gp.update(x[rows], y[rows], learn_hyperparameters=False)
    return gp, x, y


def posterior_1d(ax):
    gp, x, y = stream(False)
    p.plot_posterior_1d(ax, gp, torch.linspace(-1, 7, 60, dtype=F64).unsqueeze(-1), data=(x, y))


def stream_1d(ax):
    gp, x, y = stream(False)
    p.plot_stream_1d(ax, gp, torch.linspace(-1, 7, 60, dtype=F64).unsqueeze(-1), past=(x, y))


def decision_2d(ax):
    gp, x, y = stream(True)
    p.plot_decision_2d(ax, gp, (0, 1, 0, 1), data=(x, y), resolution=30)


def stream_2d(ax):
    gp, x, y = stream(True)
    p.plot_stream_2d(ax, gp, (0, 1, 0, 1), past=(x, y), resolution=30)


def score_2d(ax):
    gp, x, _ = stream(True)
    p.plot_score_2d(ax, gp, (-1, 2, -1, 2), "bald", chosen=x[:3], resolution=30)


def data_scores_2d(ax):
    _, x, _ = stream(True)
    p.plot_data_scores_2d(ax, x, torch.linspace(-1, 2, 30), chosen=torch.tensor([0, 29]))


def sites(ax):
    x = torch.linspace(0, 1, 12)
    p.plot_sites(ax, x, Sites(x, (7 * x).sin() + 0.3))


def reliability(ax):
    probs = torch.linspace(0.02, 0.98, 100)
    p.plot_reliability(ax, Bernoulli(probs), ((torch.arange(100) * 0.618) % 1 < probs).double(), num_bins=5)


def sweep(ax):
    grid = torch.logspace(-2, 2, 9)
    p.plot_sweep(ax, grid, {"one": grid.log().square(), "other": (grid.log() - 2).square() + 3})


def images(ax):
    tiles = ((torch.arange(5 * 16).reshape(5, 4, 4) * 7) % 5).float()
    p.plot_images(ax, tiles, labels="abcde", marked=torch.tensor([1, 0, 0, 1, 0]).bool(), columns=3)


def leverage_1d(ax):
    gp, x, y = stream(False)
    p.plot_leverage(ax, gp, gp.memory.data.x, gp.memory.sites)


def leverage_2d(ax):
    gp, *_ = stream(True)
    p.plot_leverage(ax, gp, gp.memory.data.x, gp.memory.sites)


def decision_of_a_function(ax):
    p.plot_decision_2d(ax, lambda x: (3 * x[:, 0] - x[:, 1].square()).sigmoid(), (-1, 1, -1, 1), resolution=30)


def sensitivity_images(ax):
    tiles = ((torch.arange(9 * 16).reshape(9, 4, 4) * 7) % 5).float()
    p.plot_sensitivity_images(ax, tiles, (torch.arange(9) * 0.618) % 1, columns=3)


DRAWINGS: dict[str, Callable] = {
    f.__name__: f
    for f in (
        posterior_1d, stream_1d, decision_2d, decision_of_a_function, stream_2d, score_2d, data_scores_2d, leverage_1d,
        leverage_2d, sites, reliability, sweep, images, sensitivity_images
    )
}  # fmt: skip


def draw(name: str, path: Path) -> None:
    fig, ax = plt.subplots(figsize=(3, 2.4), dpi=60)
    DRAWINGS[name](ax)
    for text in ax.texts:
        text.set_visible(False)
    remove_ticks_and_titles(fig)
    fig.savefig(path)
    plt.close(fig)


@pytest.mark.skipif(mpl.__version_info__ < (3, 11), reason="Matplotlib before 3.11 lays pictures out differently")
@pytest.mark.parametrize("name", DRAWINGS)
def test_a_picture_is_the_one_on_record(name, tmp_path):
    draw(name, tmp_path / "now.png")
    difference = compare_images(str(RECORD / f"{name}.png"), str(tmp_path / "now.png"), tol=TOLERANCE)
    assert difference is None, difference


if __name__ == "__main__":
    RECORD.mkdir(exist_ok=True)
    for each in DRAWINGS:
        draw(each, RECORD / f"{each}.png")
