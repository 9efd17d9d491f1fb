"""
Which label next, and which data to keep?
=========================================

A label is worth what it tells. Claims, each asserted, of two moons: a model that asks for
the labels that say most about f is better after 28 of them than after 28 at random, on the
mean over seeds; and of 200 data, the 20 of a core set leave f nowhere as uncertain as 20 at
random do. Each score has its picture.
"""

import os

import matplotlib.pyplot as plt
import torch
from gpytorch.kernels import RBFKernel, ScaleKernel
from gpytorch.likelihoods import BernoulliLikelihood
from sklearn.datasets import make_moons

from dualgp import DualGP
from dualgp.active import PoolLoop, Stop, core_set, select
from dualgp.plotting import BLUE, VERMILION, plot_data_scores_2d, plot_score_2d

torch.set_num_threads(1)  # small matrices: a second thread costs more than it brings
SEEDS = 3 if "SMOKE" in os.environ else 10
X, y = (torch.tensor(a) for a in make_moons(600, noise=0.2, random_state=0))
X, y, T, t = X[:200], y[:200], X[200:], y[200:]
BOUNDS = (-1.8, 2.8, -1.4, 1.9)


def given(x, y):
    """A model of these data, at hyperparameters that are known."""
    kernel = ScaleKernel(RBFKernel()).double()
    kernel.outputscale, kernel.base_kernel.lengthscale = 9.0, 0.6
    gp = DualGP(kernel, BernoulliLikelihood(), num_inducing=min(len(x), 60))
    gp.fit(x, y, learn_hyperparameters=False, learn_inducing=False, progress=False)
    return gp


def most_uncertain(rows):
    """The greatest variance of f at new inputs, of a model of some of the data."""
    return given(X[rows], y[rows]).predict(T)[1].max().item()


# %%
# Active learning: eight labels at random, then four at a time.
curves = {}
for rule in ("bald", "random"):
    runs = []
    for seed in range(SEEDS):
        generator, scores = torch.Generator().manual_seed(seed), []
        first = torch.randperm(200, generator=generator)[:8]
        options = {
            "learn": lambda _, x, y: given(x, y),
            "all_data": True,
            "generator": generator,
        }
        loop = PoolLoop(None, X, rule, stop=Stop(budget=48), **options).tell(
            first, y[first]
        )
        while not loop.done:
            loop = loop.tell(ids := loop.ask(4), y[ids])
            scores.append(loop.model.nlpd(T, t))
        runs.append(scores)
    curves[rule] = torch.tensor(runs).mean(0)
print({rule: f"{curve[4]:.3f} nats at 28 labels" for rule, curve in curves.items()})
assert curves["bald"][4] < curves["random"][4]

# %%
# What each rule would ask for after twelve labels, six at once: no two say the same. Then,
# which 20 of 200 to keep.
rules = {
    "entropy": {},
    "bald": {},
    "variance": {},
    "leverage": {},
    "boundary": {},
    "reduction": {"targets": T[:100]},
}
fig, axes = plt.subplots(2, 6, figsize=(18, 6), layout="constrained")
for ax, (rule, options) in zip(axes[0], rules.items(), strict=True):
    picked = select(gp := given(X[:12], y[:12]), X[12:], 6, rule, **options).indices + 12
    plot_score_2d(ax, gp, BOUNDS, rule, chosen=X[picked], **options)
    ax.set(title=f"ask by {rule}", xticks=[], yticks=[])
left = {"random": sum(most_uncertain(rows) for rows in torch.arange(200).split(20)) / 10}
whole = given(X, y)
for ax, by in zip(
    axes[1], ("leverage", "sensitivity", "variance", "influence"), strict=False
):
    indices, scores = core_set(whole, X, whole.sites, 200, by, validation=(T, t))
    left[by] = most_uncertain(indices[:20])
    plot_data_scores_2d(ax, X[indices], scores, chosen=torch.arange(20))
    ax.set(title=f"keep by {by}", xticks=[], yticks=[], xlim=BOUNDS[:2], ylim=BOUNDS[2:])
print({by: f"variance up to {variance:.2f}" for by, variance in left.items()})
assert left["variance"] < 0.85 * left["random"]
axes[1, 4].barh(list(left), list(left.values()), color=BLUE)
axes[1, 4].set_title("greatest variance of f, given 20")
for rule, color in (("random", VERMILION), ("bald", BLUE)):
    axes[1, 5].plot(
        range(12, 49, 4), curves[rule], "o-", color=color, label=f"ask by {rule}"
    )
axes[1, 5].set(xlabel="labels", title="held-out NLPD (nats)", ylim=(0, None))
axes[1, 5].legend()
os.makedirs(folder := os.environ.get("FIGURES", "figures"), exist_ok=True)
fig.savefig(f"{folder}/10_active_learning.png", dpi=100)
