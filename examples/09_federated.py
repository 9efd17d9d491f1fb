"""
Federated learning: every client is a site
==========================================

Three processes hold data that they do not share, and each is a *site* of one model. A client trains under the server's
model without its own site, and its new site goes back.
Claims, each asserted: after a few rounds, some of which a client missed, every process has the model of all data.
"""

import inspect
import subprocess
import sys
import tempfile

import torch
import torch.distributed as dist

from dualgp import WeightLayout, WeightPosterior
from dualgp import transfer as tr
from dualgp.likelihoods import LogitBernoulliLikelihood

CLIENTS, ROUNDS, LIKELIHOOD = 3, 6, LogitBernoulliLikelihood()
LAYOUT = WeightLayout({"weight": torch.Size([1, 3])})
PRIOR = WeightPosterior(LAYOUT, prior_precision=torch.tensor(1.0).double())


def all_data():
    g = torch.Generator().manual_seed(0)
    x = torch.cat([torch.randn(300, 2, generator=g), torch.ones(300, 1)], 1).double()
    y = (x[:, :1] - x[:, 1:2] + torch.randn(300, 1, generator=g).double() > 0).double()
    return x[x[:, 0].argsort()], y[x[:, 0].argsort()]  # clients, who hold thirds, hardly share a class


# %%
# What a client does in a round: train under the cavity with any optimiser, report its weights and their curvature.
def trained(loss):
    net = torch.nn.Linear(3, 1, bias=False).double()
    optimizer = torch.optim.LBFGS(net.parameters(), 1, 200, None, 1e-10, 0.0, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        (value := loss(net)).backward()
        return value

    optimizer.step(closure)
    return net


def answer(task, x, y):
    net = trained(tr.replay(x, y, LIKELIHOOD) + task.term())
    return task.reply(LAYOUT.join(net.state_dict()), tr.network_curvature(net, x, y, LIKELIHOOD, "dense"))


# %%
# Every process keeps a server of its own: sites are gathered, so that all see the same. Client 2 misses two rounds.
def process(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=CLIENTS)
    x, y = (share.tensor_split(CLIENTS)[rank] for share in all_data())
    server = tr.FederatedServer.start(PRIOR, map(str, range(CLIENTS)), "fedlap-cov", structure="dense")
    for number in range(ROUNDS):
        away, replies = rank == 2 and number in (1, 2), [None] * CLIENTS
        dist.all_gather_object(replies, None if away else answer(server.task(str(rank)), x, y))
        server = server.close([reply for reply in replies if reply is not None])
    dist.destroy_process_group()
    torch.save((server.posterior.mean, server.posterior.precision), f"{folder}/{rank}.pt")


# This file starts itself once for each client, and compares with one model of all data.
if len(sys.argv) == 3 and sys.argv[1].isdigit():
    process(int(sys.argv[1]), sys.argv[2])
else:
    with tempfile.TemporaryDirectory() as folder:
        me = [sys.executable, inspect.getsourcefile(process)]
        clients = [subprocess.Popen([*me, str(rank), folder]) for rank in range(CLIENTS)]
        assert not any(client.wait() for client in clients)
        results = [torch.load(f"{folder}/{rank}.pt") for rank in range(CLIENTS)]
    task = tr.FederatedServer.start(PRIOR, ["all"], structure="dense").task("all")
    whole = PRIOR.add(answer(task, *all_data()).site)
    print([f"{(mean - whole.mean).norm():.1e} from the joint model" for mean, _ in results])
    torch.testing.assert_close(results, [(whole.mean, whole.precision)] * CLIENTS, rtol=1e-4, atol=1e-5)
