"""
A trained network becomes a Gaussian process
============================================

A small network is trained in the usual way, on data with a gap. ``network_gp`` turns it
into a posterior: a site for every datum, in the basis of its Jacobian. Claims, each
asserted: it is sure where there were data and not in the gap; its prior precision comes
from the evidence, without a second training; data from the gap, added as sites, mend the
prediction there without retraining and cost nothing elsewhere; taken out again, they leave
no trace.
"""

import os

import matplotlib.pyplot as plt
import torch
from gpytorch.likelihoods import GaussianLikelihood
from torch import nn

from dualgp import network_gp
from dualgp.plotting import BLACK, BLUE, VERMILION, plot_posterior_1d

torch.set_num_threads(1)  # small matrices: a second thread costs more than it brings
torch.manual_seed(0)
STEPS = 300 if "SMOKE" in os.environ else 1000
NOISE = 0.1


def draw(low, high, n):
    x = torch.linspace(low, high, n).double().unsqueeze(-1)
    return x, (2 * x).sin() + 0.3 * x + NOISE * torch.randn_like(x)


X, y = (
    torch.cat(parts) for parts in zip(draw(-3.0, -1.0, 60), draw(1.0, 3.0, 60), strict=True)
)
X_new, y_new = draw(-0.8, 0.8, 12)
X_gap, y_gap = draw(-0.9, 0.9, 200)
X_old, y_old = (
    torch.cat(parts)
    for parts in zip(draw(-3.0, -1.0, 100), draw(1.0, 3.0, 100), strict=True)
)

# %%
# Train. Nothing here knows of what comes later. In float64, as the last claim is one of
# exactness.
net = nn.Sequential(
    nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)
).double()
optimizer = torch.optim.Adam(net.parameters(), lr=1e-2, weight_decay=1e-4)
for _ in range(STEPS):
    optimizer.zero_grad()
    nn.functional.mse_loss(net(X), y).backward()
    optimizer.step()

# %%
# Convert, and choose the prior precision by the evidence: one eigendecomposition serves all
# of its values.
likelihood = GaussianLikelihood()
likelihood.noise = NOISE**2
q = network_gp(net, (X, y), likelihood).tuned("evidence")
print(f"prior precision {float(q.prior_precision):.3g}; {q.stationarity}")
sd = {
    name: q.predict(x)[1].mean().sqrt().item() for name, x in (("data", X), ("gap", X_gap))
}
print(f"sd at the data {sd['data']:.3f}, in the gap {sd['gap']:.3f}")
assert sd["gap"] > 3 * sd["data"]

# %%
# Twelve data from the gap arrive. Their sites are added; the network is not trained again.
more = q.condition(X_new, y_new)
before, after = q.nlpd(X_gap, y_gap), more.nlpd(X_gap, y_gap)
elsewhere = more.nlpd(X_old, y_old) - q.nlpd(X_old, y_old)
print(
    f"NLPD in the gap: {before:.2f} before, {after:.2f} after; "
    f"where data were before: {elsewhere:+.3f}"
)
assert after < before - 0.3
assert elsewhere < 0.05
again = more.forget(X_new, y_new)
torch.testing.assert_close(again.predict(X_gap), q.predict(X_gap), rtol=0, atol=1e-8)

# %%
# The band is that of f, ±2 standard deviations.
grid = torch.linspace(-4.5, 4.5, 400).double().unsqueeze(-1)
fig, axes = plt.subplots(1, 2, figsize=(12, 4.5), sharey=True, layout="constrained")
plot_posterior_1d(axes[0], q, grid, data=(X, y.squeeze(-1)), color=BLUE)
plot_posterior_1d(axes[1], more, grid, data=(X, y.squeeze(-1)), color=BLUE)
axes[1].scatter(X_new, y_new, s=18, marker="D", color=VERMILION, label="new data", zorder=3)
for ax, title in zip(
    axes,
    ("the trained network, as a posterior", "given 12 new data, not retrained"),
    strict=True,
):
    ax.plot(grid, (2 * grid).sin() + 0.3 * grid, ":", color=BLACK, label="truth")
    ax.set(title=title, xlabel="input x", ylim=(-3.2, 3.2))
    ax.legend(loc="upper left", ncols=2)
axes[0].set_ylabel("output y")
os.makedirs(folder := os.environ.get("FIGURES", "figures"), exist_ok=True)
fig.savefig(f"{folder}/04_network_uncertainty.png", dpi=150)
