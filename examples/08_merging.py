"""
Models fine-tuned apart are merged, and one is taken out again
==============================================================

A classifier of digits is trained on a little of everything; from there three copies are
fine-tuned on classes of their own. Each copy is the base times a *site*, and the merged
model is the base times all three. Claims, each asserted: the merge is nearer to training on
everything than averages are, with nothing to tune; the gradient mismatch, computed without
test data, says so beforehand; and a model taken out again leaves no trace.
"""

import copy
import os

import matplotlib.pyplot as plt
import numpy as np
import torch
from gpytorch.likelihoods import SoftmaxLikelihood
from sklearn.datasets import load_digits
from torch import nn

from dualgp import WeightLayout, WeightPosterior
from dualgp import transfer as tr
from dualgp.plotting import BLUE, VERMILION

STEPS = 100 if "SMOKE" in os.environ else 400
X, y = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
X = torch.cat([X / 16.0, torch.ones(len(X), 1)], 1)
order = torch.randperm(len(X), generator=torch.Generator().manual_seed(0))
X, y, rest = X[order], y[order], torch.arange(200, 1200)
tasks = [
    rest[torch.isin(y[rest], torch.tensor(classes))]
    for classes in ([0, 1, 2, 3], [4, 5, 6], [7, 8, 9])
]
likelihood = SoftmaxLikelihood(num_classes=10, mixing_weights=False)


def trained(loss, network=None):
    net = (
        nn.Linear(65, 10, bias=False).double()
        if network is None
        else copy.deepcopy(network)
    )
    optimizer = torch.optim.LBFGS(
        net.parameters(), max_iter=STEPS, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        (value := loss(net)).backward()
        return value

    optimizer.step(closure)
    return net


def model(rows, prior, network=None):  # the prior times one site
    net = trained(tr.replay(X[rows], y[rows], likelihood) + tr.quadratic(prior), network)
    curvature = tr.network_curvature(net, X[rows], y[rows], likelihood, "dense")
    return net, tr.fine_tuned(prior, layout.join(net.state_dict()), curvature)


# %%
# A base, and three models fine-tuned from it, each on a third of the classes.
layout = WeightLayout.of(nn.Linear(65, 10, bias=False))
prior = WeightPosterior(layout, prior_precision=torch.tensor(1.0).double())
network, base = model(slice(0, 200), prior)
merged = tr.merge(experts := [model(rows, base.as_prior(), network)[1] for rows in tasks])
joint = trained(
    tr.replay(X[rest], y[rest], likelihood) + tr.quadratic(base.as_prior())
)  # what a merge stands for

# %%
# How far each is from the joint optimum, by training gradients alone, and how good it is on
# test data.
losses = [tr.replay(X[rows], y[rows], likelihood) for rows in tasks]
means = {
    "base": base.mean,
    "average": tr.average(experts),
    "task arithmetic": tr.task_arithmetic(experts),
}
means |= {
    "Fisher average": tr.fisher_average(experts),
    "merge": merged.mean,
    "joint": layout.join(joint.state_dict()),
}
mismatch = {
    name: tr.gradient_mismatch(network, m, losses, experts).joint
    for name, m in means.items()
}
nll = {
    name: nn.functional.cross_entropy(X[1200:] @ m.view(10, 65).T, y[1200:]).item()
    for name, m in means.items()
}
print(
    "\n".join(
        f"{name:16} mismatch {mismatch[name]:6.1f}   test NLL {nll[name]:.3f}"
        for name in means
    )
)
for measure in (nll, mismatch):
    assert measure["merge"] == min(measure[name] for name in means if name != "joint")

# %%
# Take one model out again: what is left is the merge of the others.
torch.testing.assert_close(tr.forget(merged, experts[2]).mean, tr.merge(experts[:2]).mean)

# %%
# Left: each fine-tuned model knows its own classes, the merge knows all. Right: the
# mismatch tells beforehand.
fig, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
models = {
    f"fine-tuned {a}": q.mean for a, q in zip(("0–3", "4–6", "7–9"), experts, strict=True)
}
models = (
    {"base": base.mean}
    | models
    | {name: means[name] for name in ("average", "merge", "joint")}
)
predicted = torch.stack([(X[1200:] @ m.view(10, 65).T).argmax(-1) for m in models.values()])
right_ones = (predicted == y[1200:]).double()
accuracy = torch.stack(
    [right_ones[:, y[1200:] == c].mean(-1) for c in range(10)], -1
)  # [models, classes]
image = left.imshow(100 * accuracy, cmap="Blues", vmin=50, vmax=100, aspect="auto")
left.set(
    xticks=range(10),
    yticks=range(len(models)),
    yticklabels=list(models),
    xlabel="digit",
    title="test images of a digit that are told right (%)",
)
for (i, c), share in np.ndenumerate(100 * accuracy):
    left.text(
        c,
        i,
        f"{share:.0f}",
        ha="center",
        va="center",
        fontsize=8,
        color="white" if share > 80 else "black",
    )
right.scatter(
    mismatch.values(),
    nll.values(),
    color=[VERMILION if name == "merge" else BLUE for name in means],
)
for name in means:
    right.annotate(
        name,
        (mismatch[name], nll[name]),
        xytext=(6, -13 if name == "joint" else 5),
        textcoords="offset points",
    )
right.margins(0.15)  # for the names
right.set(
    xlabel="gradient mismatch, on training data",
    ylabel="test NLL (nats)",
    title="merged without data",
)
os.makedirs(folder := os.environ.get("FIGURES", "figures"), exist_ok=True)
fig.savefig(f"{folder}/08_merging.png", dpi=150)
