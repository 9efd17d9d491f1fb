"""
How sure is a network where it has seen nothing?
================================================

A network that separates two moons is as sure far away from them as among them. The same network as a posterior is not:
the variance of its logits grows away from the data, and its confidence falls. Claims, each asserted: on a circle far
away the network is sure almost everywhere, the posterior less than half as often; among the data both decide alike.
"""

import os

import matplotlib.pyplot as plt
import torch
from gpytorch.likelihoods import SoftmaxLikelihood
from sklearn.datasets import make_moons
from torch import nn

from dualgp import network_gp
from dualgp.plotting import BLUE, VERMILION

torch.set_num_threads(1)  # small matrices: a second thread costs more than it brings
torch.manual_seed(0)
STEPS = 300 if "SMOKE" in os.environ else 800
X, y = make_moons(300, noise=0.15, random_state=0)
X, y = torch.tensor(X).float(), torch.tensor(y)

# %%
# Train, and convert.
net = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2))
optimizer = torch.optim.Adam(net.parameters(), lr=1e-2, weight_decay=1e-3)
for _ in range(STEPS):
    optimizer.zero_grad()
    nn.functional.cross_entropy(net(X), y).backward()
    optimizer.step()
likelihood = SoftmaxLikelihood(num_classes=2, mixing_weights=False)
q = network_gp(net, (X, y), likelihood).tuned("evidence")
print(f"prior precision {float(q.prior_precision):.2g}")

# %%
# Where is each sure, by more than 97 %: among the data, and on a circle far from them?
angle = torch.linspace(0, 2 * torch.pi, 200)
far = torch.stack([0.5 + 8 * angle.cos(), 0.25 + 8 * angle.sin()], -1)
with torch.no_grad():
    for name, x in (("among the data", X), ("far away", far)):
        by_network, by_posterior = net(x).softmax(-1), q.predict_likelihood(x).probs
        sure = [(p.amax(-1) > 0.97).float().mean().item() for p in (by_network, by_posterior)]
        print(f"{name}: the network is sure of {sure[0]:.0%}, the posterior of {sure[1]:.0%}")
        if name == "far away":
            assert sure[0] > 0.8 > 2 * sure[1]
        else:
            assert (by_network.argmax(-1) == by_posterior.argmax(-1)).float().mean() > 0.99

# %%
# The field is p(class 1), the line the decision.
low, high = torch.tensor([-4.0, -3.5]), torch.tensor([5.0, 4.0])
axis = [torch.linspace(a, b, 120) for a, b in zip(low.tolist(), high.tolist(), strict=True)]
grid = torch.stack(torch.meshgrid(*axis, indexing="xy"), -1).reshape(-1, 2)
with torch.no_grad():
    fields = net(grid).softmax(-1)[:, 1], q.predict_likelihood(grid).probs[:, 1]
fig, axes = plt.subplots(1, 2, figsize=(12, 4.8), sharey=True, layout="constrained")
for ax, field, title in zip(axes, fields, ("the network", "the network as a posterior"), strict=True):
    image = ax.pcolormesh(*axis, field.reshape(120, 120), cmap="PuOr_r", vmin=0, vmax=1, rasterized=True)
    ax.contour(*axis, field.reshape(120, 120), levels=[0.5], colors="black", linewidths=1)
    for label, color, marker in ((0, BLUE, "o"), (1, VERMILION, "^")):
        ax.scatter(*X[y == label].T, s=8, color=color, marker=marker, label=f"class {label}")
    ax.set(title=title, xlabel="input 1")
axes[0].set_ylabel("input 2")
axes[0].legend(loc="lower left")
fig.colorbar(image, ax=axes, label="p(class 1)")
os.makedirs(folder := os.environ.get("FIGURES", "figures"), exist_ok=True)
fig.savefig(f"{folder}/06_network_confidence.png", dpi=150)
