"""
One batch after the other
=========================

A stream of labels sorted by its first input, a hard order: each batch comes from where no
other was. After each ``update`` the batch is let go; what stays is a posterior on at most M
inducing inputs, and a few data in memory. Claims, each asserted: at its end the stream
predicts held-out data as well as a fit on all data at once; saved half-way and loaded, it
goes on to the same last bit; to forget a datum of memory is to subtract its site.
"""

import copy
import os
import tempfile

import matplotlib.pyplot as plt
import torch
from gpytorch.kernels import MaternKernel, ScaleKernel
from gpytorch.likelihoods import BernoulliLikelihood
from sklearn.datasets import make_moons

from dualgp import DualGP
from dualgp.plotting import BLACK, BLUE, plot_stream_2d

torch.set_num_threads(1)  # small matrices: a second thread costs more than it brings
M, BATCHES, n = 20, 8, 240 if "SMOKE" in os.environ else 600
X, y = (torch.tensor(a).double() for a in make_moons(n, noise=0.2, random_state=0))
X_test, y_test = (
    torch.tensor(a).double() for a in make_moons(1000, noise=0.2, random_state=1)
)
X, y = (a[X[:, 0].argsort()] for a in (X, y))


def modules():
    return ScaleKernel(MaternKernel(ard_num_dims=2)), BernoulliLikelihood()


# %%
# The stream. Half-way the model is written to a file.
gp = DualGP(*modules(), num_inducing=M, memory=M, memory_rule="leverage")
seen, nlpd, snapshots = [], [], []
with tempfile.TemporaryDirectory() as folder:
    for k, (x, t) in enumerate(
        zip(X.chunk(BATCHES), y.chunk(BATCHES), strict=True), start=1
    ):
        print(result := gp.update(x, t))
        seen.append(result.num_seen)
        nlpd.append(gp.nlpd(X_test, y_test))
        assert max(result.num_inducing, result.num_memory) <= M
        snapshots.append(copy.deepcopy(gp))
        if k == BATCHES // 2:
            gp.save(f"{folder}/stream.safetensors")
    resumed = DualGP.load(f"{folder}/stream.safetensors", *modules())
resumed.update_all(
    zip(X.chunk(BATCHES)[BATCHES // 2 :], y.chunk(BATCHES)[BATCHES // 2 :], strict=True)
)
assert torch.equal(resumed.predict(X_test)[0], gp.predict(X_test)[0])

# %%
# All data at once, with as many inducing inputs.
batch = DualGP(*modules(), num_inducing=M)
batch.fit(X, y)
once = batch.nlpd(X_test, y_test)
print(f"test NLPD: stream {nlpd[-1]:.4f}, all at once {once:.4f} nats per datum")
assert abs(nlpd[-1] - once) < 0.01

# %%
# Forget the datum of greatest leverage β·v: the posterior less its site, and no fit.
memory = gp.memory
top = (memory.sites.beta * gp.predict(memory.data.x)[1]).argmax().reshape(1)
less = gp.posterior.remove(memory.data.x[top], memory.sites[top])
gp.forget(memory.ids[top])
torch.testing.assert_close(gp.predict(X_test), less.predict(X_test), rtol=0, atol=1e-8)

# %%
# Z follows the data; memory (edged, larger with leverage β·v) gathers where the classes
# meet.
fig, axes = plt.subplots(2, 3, figsize=(13, 8), layout="constrained")
for ax, k in zip(axes.flat, (0, 2, 4, 6, 7), strict=False):
    image, *_ = plot_stream_2d(
        ax, snapshots[k], (-1.8, 2.8, -1.3, 1.8), past=(X[: seen[k]], y[: seen[k]])
    )
    ax.set(title=f"after {seen[k]} data", xlabel="input 1", ylabel="input 2")
axes[1, 2].plot(seen, nlpd, "o-", color=BLUE, label="stream")
axes[1, 2].axhline(once, linestyle="--", color=BLACK, label="all data at once")
axes[1, 2].set(
    title="1000 held-out data",
    xlabel="data seen",
    ylabel="NLPD (nats per datum)",
    ylim=(0, None),
)
axes[1, 2].legend()
fig.colorbar(image, ax=axes[0, 2], label="p(y = 1)")
fig.legend(*axes[1, 1].get_legend_handles_labels(), loc="outside lower center", ncols=5)
os.makedirs(folder := os.environ.get("FIGURES", "figures"), exist_ok=True)
fig.savefig(f"{folder}/03_streaming.png", dpi=150)
