"""One E-step against its floor: a GEMM pass of 2·n·M² operations at the rate this machine reaches on a square GEMM.

Claim: at n = 10⁵, M = 500 an E-step runs at 50 % of that floor or more, in float64 and float32, with peak memory above
the data of O(block · M + M²), not n · M. (It needs fewer operations than the floor counts, since half of a symmetric
or triangular product is never done; it has the kernel to evaluate besides.)

"Gaussian" is a whole E-step at Gaussian noise, exact in one pass, its basis included; "generic pass" is one pass of
any other likelihood at a given q (marginal variances and quadrature as well), features computed anew. GEMM and E-step
are measured in turn, and medians compared. Peak memory is measured in a fresh process, after a warm-up.

    python benchmarks/estep_floor.py [--n 100000 --inducing 100 500 --device cuda]
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from gpytorch.likelihoods import BernoulliLikelihood
from peers import SMOKE, Problem, machine, machine_arguments, on, regression, table, timed, use

from dualgp.basis import InducingBasis
from dualgp.gp.estep import Source, e_step
from dualgp.posterior import Posterior

HEADER = ["dtype", "M", "GEMM [GF/s]", "floor [s]", "Gaussian [s]", "of floor", "generic pass [s]", "of floor"]
HEADER += ["peak memory [MB]", "n·M [MB]"]


def binary(problem: Problem) -> Problem:
    return Problem(
        problem.name, problem.X, (problem.y > 0).to(problem.y), problem.X_test, problem.y_test, 4.0, 1.0, None
    )


def gaussian_step(problem: Problem, m: int) -> Posterior:
    basis = InducingBasis(problem.kernel(), problem.random_inducing(m))
    return e_step(Source(basis, problem.data()), problem.likelihood()).posterior


def measure(problem: Problem, m: int, repeats: int, size: int) -> list[float]:
    """Median GEMM rate, and median seconds of both kinds of pass, measured in turn."""
    device = problem.X.device
    left, right = (torch.randn(size, size, dtype=problem.X.dtype, device=device) for _ in range(2))
    labels = binary(problem)
    start = gaussian_step(problem, m)

    def generic() -> object:
        return e_step(Source(start.basis, labels.data()), BernoulliLikelihood(), (start, None), max_passes=1)

    kinds = (lambda: left @ right, lambda: gaussian_step(problem, m), generic)
    for work in kinds:
        work()
    times = [[timed(work, device, repeats=1, warm=False) for work in kinds] for _ in range(repeats)]
    gemm, gaussian, other = (statistics.median(t) for t in zip(*times, strict=True))
    return [2 * size**3 / gemm, gaussian, other]


def resident(key: str) -> int:
    """Bytes of resident memory now (VmRSS), or at its highest (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return 1024 * int(line.split()[1])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def peak(n: int, m: int, dtype: torch.dtype, device: str) -> int:
    """Bytes above the data that one Gaussian E-step takes; call it in a fresh process."""
    gaussian_step(on(regression(2000, num_test=1), device).to(dtype), min(m, 500))
    problem = on(regression(n, num_test=1), device).to(dtype)
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        gaussian_step(problem, m)
        return torch.cuda.max_memory_allocated() - before
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # give back what the warm-up freed, else it would hide a peak
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    gaussian_step(problem, m)
    return resident("VmHWM") - before


def peak_in_fresh_process(n: int, m: int, dtype: torch.dtype, args: argparse.Namespace) -> str:
    command = [sys.executable, __file__, "--peak-of", f"{n},{m},{str(dtype).removeprefix('torch.')}"]
    command += ["--device", args.device] + ([] if args.threads is None else ["--threads", str(args.threads)])
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    return f"{int(done.stdout.split()[-1]) / 1e6:.0f}" if done.returncode == 0 else "failed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=2000 if SMOKE else 100_000)
    parser.add_argument("--inducing", nargs="+", type=int, default=[50] if SMOKE else [100, 500], help="M")
    parser.add_argument("--repeats", type=int, default=2 if SMOKE else 5)
    parser.add_argument("--gemm", type=int, default=256 if SMOKE else 3072, help="size of the square GEMM")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    machine_arguments(parser)
    args = parser.parse_args()
    if args.peak_of:
        n, m, name = args.peak_of.split(",")
        if args.threads is not None:
            torch.set_num_threads(args.threads)
        print(peak(int(n), int(m), getattr(torch, name), args.device))
        return
    device = use(args)
    rows = []
    for m in args.inducing:
        for dtype in (torch.float64, torch.float32):
            problem = on(regression(args.n), args.device).to(dtype)
            rate, gaussian, generic = measure(problem, m, args.repeats, args.gemm)
            floor = 2 * args.n * m**2 / rate
            size = args.n * m * torch.finfo(dtype).bits / 8e6
            cells = [f"{rate / 1e9:.0f}", f"{floor:.4f}", f"{gaussian:.4f}", f"{floor / gaussian:.0%}"]
            cells += [f"{generic:.4f}", f"{floor / generic:.0%}", peak_in_fresh_process(args.n, m, dtype, args)]
            rows.append([str(dtype).removeprefix("torch."), str(m), *cells, f"{size:.0f}"])
    table(f"One E-step, n={args.n} d=8; {machine(device)}", HEADER, rows)


if __name__ == "__main__":
    main()
