"""A long stream: 10⁶ data at fixed hyperparameters, Gaussian noise.

Claim: an update costs in the last tenth of the stream what it cost in the first (ratio ≤ 1.1), resident memory is flat,
and the posterior is that of all data at once: to rounding where Z is held, nearly so where it moves (`--move`).

Inputs are drawn one block after the other, uniformly in the unit square or, with `--sorted`, along its first axis. The
batch posterior has the stream's own Z at the end. Times are medians of the CPU time per update within each tenth
(`--clock wall` otherwise): a median, as a garbage collection or a neighbour on the machine is no property of a stream.

    python benchmarks/stream_long.py --points 1000000 --batch 100
    python benchmarks/stream_long.py --points 100000 --batch 1 --move
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import time
from pathlib import Path

import torch
from gpytorch.kernels import MaternKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood
from peers import SMOKE, table
from torch import Tensor

from dualgp import DualGP

TENTHS = 10


def resident() -> float:
    """Resident memory in MB; where /proc does not say, its greatest value so far."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
        return float(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024**2 if sys.platform == "darwin" else 1024)


def draw(n: int, in_order: bool) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    X = torch.rand(n, 2, generator=g, dtype=torch.float64)
    X = X[X[:, 0].argsort()] if in_order else X
    f = (6 * X[:, 0]).sin() * (5 * X[:, 1]).cos()
    return X, f + 0.3 * torch.randn(n, generator=g, dtype=torch.float64)


def model(m: int, Z: Tensor | None, memory: int | None) -> DualGP:
    kernel, likelihood = ScaleKernel(MaternKernel()).double(), GaussianLikelihood().double()
    kernel.outputscale, kernel.base_kernel.lengthscale, likelihood.noise = 1.0, 0.4, 0.09
    place = {"num_inducing": m} if Z is None else {"inducing_points": Z}
    return DualGP(kernel, likelihood, memory=memory, **place)


def stream(gp: DualGP, X: Tensor, y: Tensor, size: int, clock: str) -> tuple[list[float], list[float]]:
    """Median ms per update within each tenth, and resident MB at its end."""
    now = time.process_time if clock == "cpu" else time.perf_counter
    medians, memory = [], []
    for part in torch.arange(len(X)).chunk(TENTHS):
        times = []
        for rows in part.split(size):
            some, targets = X[rows], y[rows]
            began = now()
            gp.update(some, targets, learn_hyperparameters=False)
            times.append(1e3 * (now() - began))
        medians.append(statistics.median(times))
        memory.append(resident())
        print(f"  {gp.num_seen} data, {medians[-1]:.2f} ms, {memory[-1]:.0f} MB", file=sys.stderr, flush=True)
    return medians, memory


def against_batch(gp: DualGP, X: Tensor, y: Tensor, memory: int | None) -> tuple[float, float, float]:
    """Greatest |Δ mean| and |Δ variance|, in posterior standard deviations and variances, and the mean KL."""
    batch = model(0, gp.inducing_points, memory)
    batch.fit(X, y, learn_hyperparameters=False, learn_inducing=False, progress=False)
    x = draw(2000, False)[0]
    with torch.no_grad():
        (m, v), (mb, vb) = gp.predict(x), batch.predict(x)
    kl = 0.5 * (v / vb + (m - mb).square() / vb - 1 + (vb / v).log())
    return float(((m - mb).abs() / vb.sqrt()).max()), float((v / vb - 1).abs().max()), float(kl.mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=2000 if SMOKE else 1_000_000)
    parser.add_argument("--batch", type=int, nargs="+", default=[100, 10] if SMOKE else [100])
    parser.add_argument("--inducing", type=int, default=20 if SMOKE else 100)
    parser.add_argument("--memory", type=int, default=None)
    parser.add_argument("--move", action="store_true", help="Z moves, from nothing; else it is held")
    parser.add_argument("--sorted", action="store_true")
    parser.add_argument("--clock", choices=["cpu", "wall"], default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)
    X, y = draw(args.points, args.sorted)
    lines = []
    for size in args.batch:
        Z = None if args.move else torch.rand(args.inducing, 2, generator=torch.Generator().manual_seed(1)).double()
        gp = model(args.inducing, Z, args.memory)
        gp.update(X[:0], y[:0])  # nothing: what the first call imports and compiles is no part of the stream
        ms, mb = stream(gp, X, y, size, args.clock)
        mean, var, kl = against_batch(gp, X, y, args.memory)
        cells = [f"{ms[0]:.2f}", f"{ms[-1]:.2f}", f"{ms[-1] / ms[0]:.3f}", f"{mb[0]:.0f}", f"{mb[-1]:.0f}"]
        lines.append([str(size), *cells, f"{mean:.1e}", f"{var:.1e}", f"{kl:.1e}"])
    head = ["batch", "ms first tenth", "last", "ratio", "MB first tenth", "last", "max Δmean/sd", "max Δvar/var", "KL"]
    how = f"Z {'moves' if args.move else 'held'}, {'sorted' if args.sorted else 'shuffled'}"
    title = f"{args.points} data, d=2, M={args.inducing}, {how}; {args.clock} time, torch {torch.__version__}"
    table(title, head, lines)


if __name__ == "__main__":
    main()
