"""
What a network leans on
=======================

What the network would have said without a datum is a subtraction, for all data at once:
leave-one-out without training anew. Claims, each asserted: the prior precision it picks is
as good on held-out data as the best of the grid, where the training loss would pick the
roughest; of digits with a twentieth of the labels wrong, it finds most of the wrong ones.
"""

import os

import matplotlib.pyplot as plt
import torch
from gpytorch.likelihoods import SoftmaxLikelihood
from sklearn.datasets import load_digits
from torch import nn

from dualgp import mislabelled, network_gp
from dualgp.plotting import BLACK, plot_images, plot_sweep

torch.set_num_threads(1)  # small matrices: a second thread costs more than it brings
torch.manual_seed(0)
N, VALUES = (400, 4) if "SMOKE" in os.environ else (500, 7)
X, y = (torch.tensor(a) for a in load_digits(return_X_y=True))
(train_rows, test_rows) = torch.randperm(len(X)).split([N, len(X) - N])
X, y, X_test, y_test = (
    X[train_rows].float() / 16,
    y[train_rows],
    X[test_rows].float() / 16,
    y[test_rows],
)
wrong = torch.randperm(N)[: N // 20]  # these labels are another digit's
given = y.index_put((wrong,), (y[wrong] + torch.randint(1, 10, (len(wrong),))) % 10)

# %%
# Networks trained at several prior precisions τ, beside the summed loss, each to a maximum
# of its posterior.
likelihood = SoftmaxLikelihood(num_classes=10, mixing_weights=False)
net = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))


def train(tau):
    optimizer = torch.optim.LBFGS(
        net.parameters(), max_iter=500, line_search_fn="strong_wolfe"
    )

    def loss():
        optimizer.zero_grad()
        fit = nn.functional.cross_entropy(net(X), given, reduction="sum")
        (
            value := fit + 0.5 * tau * sum(p.square().sum() for p in net.parameters())
        ).backward()
        return value

    optimizer.step(loss)
    q = network_gp(net, (X, given), likelihood, prior_precision=tau, num_inducing=N // 5)
    losses = [
        nn.functional.cross_entropy(net(x), t).item()
        for x, t in ((X, given), (X_test, y_test))
    ]
    return q.leave_one_out(X, given), *losses


grid = torch.logspace(
    1, -1.5, VALUES
).tolist()  # from smooth to rough, each from where the last one ended
runs, training, held_out = zip(*(train(tau) for tau in grid), strict=True)
left_out = [run.nll for run in runs]
picked = min(range(len(grid)), key=left_out.__getitem__)
print(
    f"leave-one-out picks τ = {grid[picked]:.3g}: "
    f"held-out NLL {held_out[picked]:.3f}, best {min(held_out):.3f}"
)
assert held_out[picked] < min(held_out) + 0.05
assert training[-1] == min(training)  # the training loss would pick the roughest

# %%
# Who has the wrong label? Those to whom the network, without them, would have given another
# one.
ranking = mislabelled(runs[picked])
found = torch.isin(ranking.indices[: len(wrong)], wrong).double().mean()
assert found > 0.6, found
print(f"of the {len(wrong)} most surprising labels {found:.0%} are wrong, of all 5 %")

# %%
# Left, rings mark the best of each curve. Right, the twelve most surprising labels; the
# wrong ones in vermilion.
left, right = (fig := plt.figure(figsize=(13, 4.8), layout="constrained")).subfigures(
    1, 2, width_ratios=(1, 1.3)
)
curves = {"leave-one-out, labels as given": left_out, "held out, labels right": held_out}
plot_sweep(ax := left.subplots(), grid, curves)
ax.semilogx(grid, training, ":", color=BLACK, label="training, labels as given")
ax.set(
    xlabel="prior precision τ",
    ylabel="NLL (nats per datum)",
    title="no datum held back",
    ylim=(0, None),
)
ax.legend()
top = ranking.indices[:12]
labels, images = [f"“{t}”" for t in given[top].tolist()], X[top].reshape(-1, 8, 8)
plot_images(ax := right.subplots(), images, labels=labels, marked=torch.isin(top, wrong))
ax.set_title("most surprising labels")
os.makedirs(folder := os.environ.get("FIGURES", "figures"), exist_ok=True)
fig.savefig(f"{folder}/05_leave_one_out.png", dpi=150)
