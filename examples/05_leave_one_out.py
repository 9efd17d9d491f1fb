"""
What a network leans on
=======================

Each site says what its datum contributed, so what the network would have said without it is a subtraction, for all
data at once: leave-one-out without training anew. Claims, each asserted: the prior precision that leave-one-out picks
is as good on held-out data as the best of the grid, where the training loss would pick the worst; of handwritten digits
with a twentieth of the labels wrong, most of those that surprise the network without them are the wrong ones.
"""

import os

import matplotlib.pyplot as plt
import torch
from gpytorch.likelihoods import SoftmaxLikelihood
from sklearn.datasets import load_digits
from torch import nn

from dualgp import mislabelled, network_gp
from dualgp.plotting import BLACK, BLUE, VERMILION

torch.set_num_threads(1)  # small matrices: a second thread costs more than it brings
torch.manual_seed(0)
N, VALUES = (400, 4) if "SMOKE" in os.environ else (500, 7)
digits = load_digits()
X, y = torch.tensor(digits.data / 16.0).float(), torch.tensor(digits.target)
order = torch.randperm(len(X))
X, y, X_test, y_test = X[order[:N]], y[order[:N]], X[order[N:]], y[order[N:]]
wrong = torch.randperm(N)[: N // 20]  # these labels are another digit's
given = y.clone()
given[wrong] = (y[wrong] + torch.randint(1, 10, (len(wrong),))) % 10

# %%
# Networks trained at several prior precisions τ, beside the summed loss, each to a maximum of its posterior.
likelihood = SoftmaxLikelihood(num_classes=10, mixing_weights=False)
net = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))


def train(tau):
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=500, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(net(X), given, reduction="sum")
        value = value + 0.5 * tau * sum(p.square().sum() for p in net.parameters())
        value.backward()
        return value

    optimizer.step(loss)
    q = network_gp(net, (X, given), likelihood, prior_precision=tau, num_inducing=N // 5)
    with torch.no_grad():
        losses = [float(nn.functional.cross_entropy(net(x), t)) for x, t in ((X, given), (X_test, y_test))]
    return q, q.leave_one_out(X, given), *losses


grid = torch.logspace(1, -1.5, VALUES).tolist()  # from smooth to rough, each from where the last one ended
runs = [train(tau) for tau in grid]
left_out, training, held_out = ([run.nll for _, run, *_ in runs], *zip(*(run[2:] for run in runs), strict=True))
picked = min(range(len(grid)), key=left_out.__getitem__)
print(f"leave-one-out picks τ = {grid[picked]:.3g}: held-out NLL {held_out[picked]:.3f}, best {min(held_out):.3f}")
assert held_out[picked] < min(held_out) + 0.05
assert min(range(len(grid)), key=training.__getitem__) == len(grid) - 1  # the training loss would pick the roughest

# %%
# Who has the wrong label? Those to whom the network, without them, would have given another one.
ranking = mislabelled(runs[picked][1])
found = torch.isin(ranking.indices[: len(wrong)], wrong).double().mean()
print(f"of the {len(wrong)} most surprising labels {found:.0%} are wrong, of all 5 %")
assert found > 0.6

# %%
# The twelve most surprising labels, above each image; the wrong ones in vermilion.
fig = plt.figure(figsize=(13, 4.8), layout="constrained")
left, right = fig.subfigures(1, 2, width_ratios=(1, 1.3))
ax = left.subplots()
ax.semilogx(grid, left_out, "o-", color=BLUE, label="leave-one-out, labels as given")
ax.semilogx(grid, training, ":", color=BLUE, label="training, labels as given")
ax.semilogx(grid, held_out, "s--", color=BLACK, label="held out, labels right")
ax.set(xlabel="prior precision τ", ylabel="NLL (nats per datum)", title="no datum held back", ylim=(0, None))
ax.legend()
right.suptitle("most surprising labels")
for ax, i in zip(right.subplots(2, 6).flat, ranking.indices[:12].tolist(), strict=True):
    ax.imshow(X[i].reshape(8, 8), cmap="gray_r")
    ax.set_title(f"“{given[i]}”", color=VERMILION if i in wrong else BLACK)
    ax.axis("off")
os.makedirs(folder := os.environ.get("FIGURES", "figures"), exist_ok=True)
fig.savefig(f"{folder}/05_leave_one_out.png", dpi=150)
