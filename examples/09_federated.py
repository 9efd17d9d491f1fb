"""
Federated learning: every client is a site
==========================================

Three processes hold a strip of the plane each, which they do not share. Each is a *site* of
one model: it trains under the server's model without its own site, and its new site goes
back. Claims, each asserted: after six rounds, two of which a client missed, every process
has the model of all data, and no client alone is near it.
"""

import inspect
import os
import subprocess
import sys
import tempfile

import matplotlib.pyplot as plt
import torch
import torch.distributed as dist

from dualgp import WeightLayout, WeightPosterior
from dualgp import transfer as tr
from dualgp.likelihoods import LogitBernoulliLikelihood
from dualgp.plotting import BLACK, BLUE, PALETTE

CLIENTS, ROUNDS, AWAY, LIKELIHOOD = 3, 6, (2, 3), LogitBernoulliLikelihood()
PRIOR = WeightPosterior(
    WeightLayout({"weight": torch.Size([1, 3])}), prior_precision=torch.tensor(1.0).double()
)
g = torch.Generator().manual_seed(0)
X = torch.cat([torch.randn(300, 2, generator=g), torch.ones(300, 1)], 1).double()
X = X[X[:, 0].argsort()]
y = (X[:, :1] - X[:, 1:2] + torch.randn(300, 1, generator=g).double() > 0).double()
SHARES = list(zip(X.tensor_split(CLIENTS), y.tensor_split(CLIENTS), strict=True))


# %%
# What a client does in a round: train under the cavity with any optimiser, report its
# weights and their curvature.
def answer(task, x, y):
    net = torch.nn.Linear(3, 1, bias=False).double()
    optimizer = torch.optim.LBFGS(
        net.parameters(), 1, 200, None, 1e-10, 0.0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        (value := (tr.replay(x, y, LIKELIHOOD) + task.term())(net)).backward()
        return value

    optimizer.step(closure)
    return task.reply(
        PRIOR.layout.join(net.state_dict()),
        tr.network_curvature(net, x, y, LIKELIHOOD, "dense"),
    )


# %%
# Every process keeps a server of its own: sites are gathered, so that all see the same.
# Client 2 misses two rounds.
def process(rank, folder):
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=CLIENTS
    )
    server = tr.FederatedServer.start(
        PRIOR, map(str, range(CLIENTS)), "fedlap-cov", structure="dense"
    )
    means = [server.posterior.mean]
    for number in range(1, ROUNDS + 1):
        replies = [None] * CLIENTS
        away = rank == 2 and number in AWAY
        dist.all_gather_object(
            replies, None if away else answer(server.task(str(rank)), *SHARES[rank])
        )
        server = server.close([reply for reply in replies if reply is not None])
        means.append(server.posterior.mean)
    dist.destroy_process_group()
    torch.save((torch.stack(means), server.posterior.precision), f"{folder}/{rank}.pt")


torch.set_num_threads(1)
if (
    len(sys.argv) == 3 and sys.argv[1].isdigit()
):  # this file starts itself once for each client
    sys.exit(process(int(sys.argv[1]), sys.argv[2]))
with tempfile.TemporaryDirectory() as folder:
    me = [sys.executable, inspect.getsourcefile(process)]
    clients = [subprocess.Popen([*me, str(rank), folder]) for rank in range(CLIENTS)]
    assert not any(client.wait() for client in clients)
    results = [torch.load(f"{folder}/{rank}.pt") for rank in range(CLIENTS)]

# %%
# Beside them, models of all data and of one share alone.
start = tr.FederatedServer.start(PRIOR, ["one"], structure="dense").task("one")
whole, *alone = (PRIOR.add(answer(start, *data).site) for data in [(X, y), *SHARES])
means = results[0][0]  # [rounds, 3]
distance = (means - whole.mean).norm(dim=-1)
lonely = torch.stack([(q.mean - whole.mean).norm() for q in alone])
print(f"from the joint model: {distance[-1]:.1e}; clients alone {lonely.tolist()}")
assert distance[-1] < 1e-5 < 0.1 < lonely.min()
for mean, precision in results:
    torch.testing.assert_close(
        (mean[-1], precision), (whole.mean, whole.precision), rtol=1e-4, atol=1e-5
    )

# %%
# Left: where each model has p = ½; marks are data, by client, filled where y = 1. Right:
# all rounds.
fig, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
line = torch.linspace(-3, 3, 2).double()
for k, (x, t) in enumerate(SHARES):
    color, marker = PALETTE[k + 1], "os^"[k]
    left.scatter(
        x[:, 0],
        x[:, 1],
        s=14,
        marker=marker,
        edgecolors=color,
        c=[color if v else "white" for v in t],
    )
    a, b, c = alone[k].mean
    left.plot(
        line, -(a * line + c) / b, ":", color=color, linewidth=2, label=f"client {k} alone"
    )
for mean, style, color, label in (
    (means[-1], "-", BLUE, "after six rounds"),
    (whole.mean, "--", BLACK, "all data"),
):
    a, b, c = mean
    left.plot(
        line,
        -(a * line + c) / b,
        style,
        color=color,
        linewidth=3 - (style == "--"),
        label=label,
    )
left.set(
    xlim=(-3, 3),
    ylim=(-3, 3),
    xlabel="input 1",
    ylabel="input 2",
    title="three strips, one model",
)
left.legend(loc="lower right", fontsize="small")
right.semilogy(distance, "o-", color=BLUE, label="the server")
for k, value in enumerate(lonely):
    right.axhline(
        value, linestyle=":", color=PALETTE[k + 1], linewidth=2, label=f"client {k} alone"
    )
right.axvspan(
    AWAY[0] - 0.5,
    AWAY[-1] + 0.5,
    color=BLACK,
    alpha=0.1,
    linewidth=0,
    label="client 2 is away",
)
right.set(
    xlabel="round",
    ylabel="distance of the weights from all data's",
    title="the joint model, without sharing data",
)
right.legend(loc="lower left", fontsize="small")
os.makedirs(folder := os.environ.get("FIGURES", "figures"), exist_ok=True)
fig.savefig(f"{folder}/09_federated.png", dpi=150)
