"""
How sure is a network where it has seen nothing?
================================================

A network of ReLUs that separates two moons is the surer the further away it is asked: its
logits grow without end (Hein et al. 2019). As a posterior it is not, since their standard
deviation grows along with them (Kristiadi et al. 2020). Claims, each asserted: on a circle
far away the network is sure almost everywhere, the posterior next to nowhere; among the
data both decide alike, though the posterior, whose prior precision is the evidence's, is
less sure there too.
"""

import os

import matplotlib.pyplot as plt
import torch
from gpytorch.likelihoods import SoftmaxLikelihood
from sklearn.datasets import make_moons
from torch import nn

from dualgp import network_gp
from dualgp.plotting import plot_decision_2d

torch.set_num_threads(1)  # small matrices: a second thread costs more than it brings
torch.manual_seed(0)
STEPS = 300 if "SMOKE" in os.environ else 800
X, y = make_moons(300, noise=0.15, random_state=0)
X, y = torch.tensor(X).float(), torch.tensor(y)

# %%
# Train, and convert.
net = nn.Sequential(
    nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2)
)
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
        sure = [
            (p.amax(-1) > 0.97).float().mean().item() for p in (by_network, by_posterior)
        ]
        print(
            f"{name}: the network is sure of {sure[0]:.0%}, the posterior of {sure[1]:.0%}"
        )
        if name == "far away":
            assert sure[0] > 0.8
            assert sure[1] < 0.2
        else:
            assert (by_network.argmax(-1) == by_posterior.argmax(-1)).float().mean() > 0.99

# %%
# The field is p(class 1), the line the decision.
fig, axes = plt.subplots(1, 2, figsize=(12, 4.8), sharey=True, layout="constrained")
models = {
    "the network": lambda x: net(x).softmax(-1)[:, 1],
    "the network as a posterior": q,
}
for ax, (title, model) in zip(axes, models.items(), strict=True):
    classes = "class 0", "class 1"
    image, *_ = plot_decision_2d(
        ax, model, (-4, 5, -3.5, 4), data=(X, y), classes=classes, resolution=200
    )
    ax.set(title=title, xlabel="input 1")
axes[0].set_ylabel("input 2")
axes[0].legend(loc="lower left")
fig.colorbar(image, ax=axes, label="p(class 1)")
os.makedirs(folder := os.environ.get("FIGURES", "figures"), exist_ok=True)
fig.savefig(f"{folder}/06_network_confidence.png", dpi=150)
