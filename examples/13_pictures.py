"""
One call, one picture
=====================

Every function of ``dualgp.plotting`` draws on the axes it is given, and sets no title,
label or global parameter. Claims, each asserted: nothing global changes, and no picture is
blank.
"""

import os

import matplotlib.pyplot as plt
import torch
from gpytorch.kernels import RBFKernel, ScaleKernel
from gpytorch.likelihoods import BernoulliLikelihood, GaussianLikelihood
from sklearn.datasets import load_digits, make_moons

from dualgp import DualGP, leave_one_out
from dualgp import plotting as dp

torch.set_num_threads(1)  # small matrices: a second thread costs more than it brings
before = dict(plt.rcParams)
g = torch.Generator().manual_seed(0)
X = (6 * torch.rand(60, 1, generator=g)).double()
y = (2 * X[:, 0]).sin() + 0.2 * torch.randn(60, generator=g)
line = torch.linspace(-1, 7, 200).double().unsqueeze(-1)
gp = DualGP(ScaleKernel(RBFKernel()), GaussianLikelihood(), num_inducing=12)
gp.fit(X, y)
X2, y2 = (torch.tensor(a).double() for a in make_moons(150, noise=0.2, random_state=0))
stream = DualGP(
    ScaleKernel(RBFKernel()),
    BernoulliLikelihood(),
    num_inducing=15,
    memory=20,
    memory_rule="leverage",
)
stream.update_all(zip(X2.split(50), y2.split(50), strict=True))
BOUNDS = (-1.8, 2.8, -1.3, 1.8)


def axes(**labels):
    ax = plt.figure(figsize=(5, 3.4), layout="constrained").add_subplot()
    ax.set(**labels)
    return ax


# %%
# Mean and band, data, and the inducing inputs as ticks at the foot.
dp.plot_posterior_1d(axes(xlabel="x", ylabel="f"), gp, line, data=(X, y))
# %%
# Two numbers of every datum: here the pull α.
dp.plot_sites(
    axes(xlabel="x", ylabel="α"), X, gp.sites, quantity="alpha", mean=gp.predict(X)[0]
)
# %%
# Leverage: how much of its own prediction a datum decides.
dp.plot_leverage(axes(xlabel="x", ylabel="leverage"), gp, X, gp.sites)
# %%
# The field p(y = 1), its boundary, data and Z; of a process, a network's posterior or a
# function.
dp.plot_decision_2d(axes(xlabel="input 1", ylabel="input 2"), stream, BOUNDS, data=(X2, y2))
# %%
# A stream as it stands: past (faint), memory (edged, larger with leverage) and Z. In one
# dimension ``plot_stream_1d``.
dp.plot_stream_2d(axes(xlabel="input 1", ylabel="input 2"), stream, BOUNDS, past=(X2, y2))
# %%
# What a label would be worth, darker where more, and queries in their order.
dp.plot_score_2d(
    axes(xlabel="input 1", ylabel="input 2"), stream, BOUNDS, "bald", chosen=X2[:3]
)
# %%
# Scores of data in the plane, some of them ringed.
memory = stream.memory
dp.plot_data_scores_2d(
    axes(xlabel="input 1", ylabel="input 2"), X2, y2 - 0.4, chosen=memory.ids
)
# %%
# Whether probabilities mean what they say.
labels = {"xlabel": "confidence", "ylabel": "share that was right"}
dp.plot_reliability(axes(**labels), stream.predict_likelihood(X2), y2, num_bins=5)
# %%
# A leave-one-out curve over a setting, its best ringed.
outputscales = torch.logspace(-2, 2, 9)
curve = []
for value in outputscales:
    gp.kernel.outputscale = value
    gp.fit(X, y, learn_hyperparameters=False, learn_inducing=False)
    curve.append(leave_one_out(gp, X, y, gp.sites, gp.likelihood).nlpd)
dp.plot_sweep(
    axes(xlabel="outputscale", ylabel="nats per datum"),
    outputscales,
    {"leave-one-out": curve},
)
# %%
# Images by a score: the greatest in the first rows, the least in the last.
images = torch.tensor(load_digits().images[:40])
dp.plot_sensitivity_images(axes(), images, images.mean((1, 2)), columns=6)

# %%
# Nothing global has changed, and every figure has something on it.
assert dict(plt.rcParams) == before
os.makedirs(folder := os.environ.get("FIGURES", "figures"), exist_ok=True)
for number in plt.get_fignums():
    assert plt.figure(number).axes[0].has_data()
    plt.figure(number).savefig(f"{folder}/13_pictures_{number:02}.png", dpi=100)
