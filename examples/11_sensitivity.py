"""
Which images did the network learn from?
========================================

How far would the network's answer to an image move, had it not been in the training data?
For all of them that is a few products of small matrices. Claims, each asserted, on digits:
networks trained again without an image move in the order foretold; and the images that
matter most are those of which the network is least sure.
"""

import copy
import os

import matplotlib.pyplot as plt
import torch
from gpytorch.likelihoods import SoftmaxLikelihood
from sklearn.datasets import load_digits
from torch import nn

from dualgp import network_gp
from dualgp.influence import sensitivity
from dualgp.plotting import BLACK, BLUE, plot_sensitivity_images

torch.set_num_threads(1)  # small matrices: a second thread costs more than it brings
torch.manual_seed(0)
N, AGAIN = (150, 6) if "SMOKE" in os.environ else (300, 25)
TAU = 1.0  # prior precision
X, y = (torch.tensor(a) for a in load_digits(return_X_y=True))
rows = torch.randperm(len(X))[:N]
X, y = X[rows].double() / 16, y[rows]


# %%
# Train to a maximum of the posterior: a summed loss, and the prior beside it.
def train(net, keep):
    net = copy.deepcopy(net)
    optimizer = torch.optim.LBFGS(
        net.parameters(), 1, 5000, None, 1e-6, 1e-14, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        fit = nn.functional.cross_entropy(net(X[keep]), y[keep], reduction="sum")
        (
            value := fit + 0.5 * TAU * sum(p.square().sum() for p in net.parameters())
        ).backward()
        return value

    optimizer.step(closure)
    return net


everything = torch.arange(N)
net = train(
    nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)).double(), everything
)

# %%
# All sensitivities at once: −Vᵢ(I − BᵢVᵢ)⁻¹αᵢ, the shift of the ten logits when site i is
# taken out.
likelihood = SoftmaxLikelihood(num_classes=10, mixing_weights=False)
q = network_gp(net, (X, y), likelihood, prior_precision=TAU, num_inducing=N // 3)
moves = sensitivity(q, X, q.sites_at(X, y))


def size(shift):  # of logits, less what a softmax does not see
    return (shift - shift.mean(-1, keepdim=True)).norm(dim=-1)


# %%
# Train again without one image, for a few from the most sensitive to the least.
order = size(moves.mean_shift).argsort(descending=True)
again = order[torch.linspace(0, N - 1, AGAIN).long()]
with torch.no_grad():
    found = torch.stack(
        [size(train(net, everything != i)(X[i]) - net(X[i])) for i in again]
    )
    sure = net(X).softmax(-1).gather(-1, y[:, None]).squeeze(-1)
foretold = size(moves.mean_shift)[again]
ranks = torch.stack([found, foretold]).argsort(-1).argsort(-1).double()
correlation = torch.corrcoef(ranks)[0, 1]
hard, easy = (sure[part].mean() for part in (order[: N // 10], order[-N // 10 :]))
print(
    f"rank correlation with retraining {correlation:.3f}; "
    f"p(label) of the most sensitive {hard:.2f}, least {easy:.2f}"
)
assert correlation > 0.8
assert hard < easy - 0.1

# %%
# Left: foretold and found, for images left out. Right: the most sensitive images (labels in
# vermilion), and the least.
fig, (left, right) = plt.subplots(
    1, 2, figsize=(13, 4.8), width_ratios=(1, 1.7), layout="constrained"
)
ends = torch.tensor([0.7 * foretold.min(), 1.4 * found.max()])
left.loglog(ends, ends, "--", color=BLACK, linewidth=0.8, label="equal")
left.loglog(foretold, found, "o", color=BLUE, label="an image left out")
left.set(
    xlabel="shift foretold (logits)",
    ylabel="shift after training again (logits)",
    title="without training again",
)
left.legend(loc="upper left")
labels = [f"“{label}”" for label in y.tolist()]
plot_sensitivity_images(
    right, X.reshape(-1, 8, 8), size(moves.mean_shift), labels=labels, columns=9, rows=4
)
right.set_title("what the network learned from, and what it could do without")
os.makedirs(folder := os.environ.get("FIGURES", "figures"), exist_ok=True)
fig.savefig(f"{folder}/11_sensitivity.png", dpi=150)
