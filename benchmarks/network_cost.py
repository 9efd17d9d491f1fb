"""What converting a network costs, and predicting with it: dualgp beside laplace-torch, in seconds and megabytes.

Networks 2 × 50 and 2 × 200 (tanh, 20 inputs, 10 classes, float32, random labels), N = 2000; class probabilities of 1000
points by the probit link. One thread. Every method runs in a fork of one process that has everything imported: CPU
seconds (the least of up to three repetitions, the first after a warm-up on 64 data), and the peak of resident memory
above that of the process. laplace-torch predicts in batches of 100, as a DataLoader would give them; dualgp cuts its
own. Where laplace-torch is not installed its rows say so.

    OMP_NUM_THREADS=1 python benchmarks/network_cost.py [--widths 50 200] [--out results.csv]
"""

from __future__ import annotations

import argparse
import copy
import csv
import gc
import multiprocessing
import os
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
from gpytorch.likelihoods import SoftmaxLikelihood
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dualgp import network_gp

try:
    import laplace
    from laplace.curvature import BackPackGGN
except ImportError:
    laplace = None

SMOKE = os.environ.get("SMOKE", "") not in ("", "0")
N, T, M, D, C = (200, 100, 20, 20, 10) if SMOKE else (2000, 1000, 200, 20, 10)
LIKELIHOOD = SoftmaxLikelihood(num_classes=C, mixing_weights=False)
Fit = Callable[[nn.Module, Tensor, Tensor], Callable[[Tensor], Any]]


def ours(**options: Any) -> Fit:
    def fit(net: nn.Module, x: Tensor, y: Tensor) -> Callable[[Tensor], Any]:
        if "num_inducing" in options:
            options["num_inducing"] = min(M, len(x) // 2)
        q = network_gp(net, (x, y), LIKELIHOOD, progress=False, **options)
        return lambda x: q.predict_likelihood(x).probs

    return fit


def theirs(structure: str, **options: Any) -> Fit:
    def fit(net: nn.Module, x: Tensor, y: Tensor) -> Callable[[Tensor], Any]:
        extra = {"n_subset": min(M, len(x) // 2)} if structure == "gp" else {}
        la = laplace.Laplace(net, "classification", "all", structure, **options, **extra)
        la.fit(DataLoader(TensorDataset(x, y), batch_size=100))
        kind = "gp" if structure == "gp" else "glm"
        return lambda x: torch.cat([la(part, pred_type=kind, link_approx="probit") for part in x.split(100)])

    return fit


def methods(width: int) -> dict[str, Fit | None]:
    """The methods by name; None for what is not installed."""
    found: dict[str, Fit | None] = {
        "dualgp kronecker": ours(structure="kronecker"),
        "dualgp diagonal": ours(structure="diagonal"),
        "dualgp sparse": ours(num_inducing=M),
        "dualgp sparse, independent outputs": ours(num_inducing=M, outputs="independent"),
    }
    peers: dict[str, Fit | None] = dict.fromkeys(
        ["kron", "diag", "diag (BackPACK)", "functional", "functional, independent outputs"]
    )
    if laplace is not None:
        peers = {
            "kron": theirs("kron"),
            "diag": theirs("diag"),
            "diag (BackPACK)": theirs("diag", backend=BackPackGGN),
            "functional": theirs("gp", independent_outputs=False),
            "functional, independent outputs": theirs("gp", independent_outputs=True),
        }
    if width <= 50:
        found["dualgp dense"] = ours(structure="dense")
        peers["full"] = theirs("full") if laplace is not None else None
        peers["full (BackPACK)"] = theirs("full", backend=BackPackGGN) if laplace is not None else None
    return found | {f"laplace-torch {name}": fit for name, fit in peers.items()}


def network(width: int) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Linear(D, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, C)
    return nn.Sequential(*layers)


def peak(*, reset: bool = False) -> float:
    """The largest resident memory of this process, in MB, so far or since the last reset."""
    if reset:
        with open("/proc/self/clear_refs", "w") as refs:
            refs.write("5")
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """The least CPU time of three calls, of one that takes longer than two seconds."""
    times: list[float] = []
    while len(times) < 3 and sum(times) < 2.0:
        start = time.process_time()
        result = call()
        times.append(time.process_time() - start)
    return min(times), result


def measure(fit: Fit, width: int, to: Connection) -> None:
    warnings.filterwarnings("ignore")
    generator = torch.Generator().manual_seed(1)
    X, test = (torch.randn(n, D, generator=generator) for n in (N, T))
    y, net = torch.randint(C, (N,), generator=generator), network(width)
    fit(copy.deepcopy(net), X[:64], y[:64])(test[:64])
    gc.collect()
    base = peak(reset=True)
    nets = [copy.deepcopy(net) for _ in range(3)]
    fit_s, predict = timed(lambda: fit(nets.pop(), X, y))
    fit_mb = peak() - base
    predict_s, probs = timed(lambda: predict(test))
    assert bool((probs.sum(-1) - 1).abs().max() < 1e-4)
    to.send((fit_s, fit_mb, predict_s, peak() - base))


def forked(fit: Fit, width: int) -> tuple[float, ...] | None:
    """What `measure` finds in a fork of this process; None if it died."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(fit, width, there))
    process.start()
    there.close()
    try:
        return here.recv()
    except EOFError:
        return None
    finally:
        process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[8] if SMOKE else [50, 200])
    parser.add_argument("--only", nargs="+", default=[""], help="parts of the names of methods to run")
    parser.add_argument("--out", help="a CSV file for the table")
    args = parser.parse_args()
    torch.set_num_threads(1)
    names = ["network", "method", "fit s", "fit MB", "predict s", "peak MB"]
    print(f"N = {N}, {T} test points, M = {M}, {C} classes; torch {torch.__version__}, 1 thread, CPU seconds")
    print("{:<8} {:<46} {:>8} {:>8} {:>10} {:>8}".format(*names))
    rows: list[list[Any]] = []
    for width in args.widths:
        for name, fit in methods(width).items():
            if not any(part in name for part in args.only):
                continue
            found = forked(fit, width) if fit is not None else None
            if found is None:
                print(f"2x{width:<6} {name:<46} {'not installed' if fit is None else 'failed'}", flush=True)
                continue
            print("2x{:<6} {:<46} {:>8.3f} {:>8.0f} {:>10.3f} {:>8.0f}".format(width, name, *found), flush=True)
            rows.append([f"2x{width}", name, *(round(value, 4) for value in found)])
    if args.out:
        with open(args.out, "w", newline="") as file:
            csv.writer(file).writerows([names, *rows])


if __name__ == "__main__":
    main()
