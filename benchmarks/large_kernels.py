"""Products with kernel matrices that do not fit, and selection out of many inputs.

Claim: on a CPU products in tiles are faster than the dense matrix, KeOps and GPyTorch's KeOps kernels, and hold a tile.

K·v with an RBF kernel of lengthscale √d at standard normal inputs, v [N, w]: `chunked` is `LazyKernel`, `dense` is
GPyTorch's matrix and one product (where N² numbers take at most --dense GB), `KeOps` is `LazyKernel(backend="keops")`,
`GPyTorch` is gpytorch.kernels.keops.RBFKernel. The rate counts 2d + 6 + 2w operations for each of N² entries (an
exponential as one), beside the rate of a float32 matrix product of this machine, measured in the same run; entries of
the upper triangle, which chunked products do not compute, count. Peak memory is the growth of the resident set in a
process of its own. Selection is `greedy_variance`, leverage and prediction are of a `Posterior` with M inducing inputs.

A method whose time at the smaller N says that it would take longer than --limit seconds is measured on the first rows
of the matrix, --block entries of it, and its time scaled to all of them: "~". (Of chunked products this forgoes what
symmetry saves, half of the time.) The dense matrix is then left out.

    python benchmarks/large_kernels.py
    python benchmarks/large_kernels.py --device cuda --limit 60
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys

import gpytorch
import torch
from gpytorch.kernels import RBFKernel
from peers import SMOKE, Clock, machine, machine_arguments, table, use

from dualgp import InducingBasis, LazyKernel, Posterior, Sites, greedy_variance, keops_status, leverage

METHODS = ["chunked", "dense", "KeOps", "GPyTorch"]


def rbf(d: int, kind: type = RBFKernel, device: str = "cpu") -> RBFKernel:
    kernel = kind().to(device)
    kernel.lengthscale = math.sqrt(d)
    return kernel.requires_grad_(False)


def inputs(n: int, d: int, device: str) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(0)).to(device)


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def peak(device: str) -> float:
    """MB: of this process, or of the GPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def product(method: str, n: int, d: int, w: int, device: str, some: int) -> tuple[float, float, float]:
    """Seconds (best of 3, or of 1 that takes long), growth of memory in MB, and relative error on 500 rows.

    Of the first `some` rows only, if that is not 0, with seconds scaled to all.
    """
    x, v = inputs(n, d, device), torch.randn(n, w, generator=torch.Generator().manual_seed(1)).to(device)
    kernel = rbf(d, device=device)
    if method == "GPyTorch":
        kernel = rbf(d, gpytorch.kernels.keops.RBFKernel, device)
    backend = "keops" if method == "KeOps" else "chunked"
    left, right = (x[:some], x) if some else (x, None)
    lazy = LazyKernel(rbf(d, device=device), left, right, backend=backend)

    def multiply() -> torch.Tensor:
        if method == "dense":
            with gpytorch.settings.lazily_evaluate_kernels(False):
                return kernel(x).to_dense() @ v
        if method == "GPyTorch":
            with gpytorch.settings.max_cholesky_size(1):
                return kernel(left, right) @ v
        return lazy @ v

    tiny = min(n, 2000)
    if method in ("KeOps", "GPyTorch"):  # compiles
        with gpytorch.settings.max_cholesky_size(1):
            _ = (
                kernel(x[:tiny]) @ v[:tiny]
                if method == "GPyTorch"
                else LazyKernel(kernel, x[:tiny], backend="keops") @ v[:tiny]
            )
    before, times = peak(device), []
    while not times or (len(times) < 3 and sum(times) < 5):
        wait(device)
        start = Clock.now()
        out = multiply()
        wait(device)
        times.append(Clock.now() - start)
    memory = peak(device) - before
    rows = torch.randperm(len(left), generator=torch.Generator().manual_seed(2))[:500].to(device)
    exact = LazyKernel(kernel.double(), x[rows].double(), x.double(), backend="chunked") @ v.double()
    error = float((out[rows].double() - exact).norm() / exact.norm())
    return min(times) * n / len(left), memory, error


def selection(n: int, d: int, m: int, device: str) -> list[str]:
    """CPU seconds and memory of selection, leverage scores and predictions at all n inputs."""
    x, kernel = inputs(n, d, device), rbf(d, device=device)
    cells, base = [], peak(device)
    start = Clock.now()
    rows = greedy_variance(kernel, x, m)
    wait(device)
    cells += [f"{Clock.now() - start:.2f}", f"{peak(device) - base:.0f}"]
    sites = Sites(torch.randn(n, dtype=torch.float64, device=device), torch.ones(n, dtype=torch.float64, device=device))
    q = Posterior(InducingBasis(kernel, x[rows])).add(x, sites)
    base = peak(device)
    for function in (lambda: leverage(q, x, sites), lambda: q.predict(x)):
        start = Clock.now()
        function()
        wait(device)
        cells.append(f"{Clock.now() - start:.2f}")
    return [*cells, f"{peak(device) - base:.0f}"]


def gemm_rate(device: str) -> float:
    """Operations per second of a float32 matrix product."""
    size = 256 if SMOKE else 8192 if device == "cuda" else 1500
    a, times = torch.randn(size, size, device=device), []
    for _ in range(5):
        wait(device)
        start = Clock.now()
        _ = a @ a
        wait(device)
        times.append(Clock.now() - start)
    return 2 * size**3 / min(times)


def alone(args: argparse.Namespace, *what: object) -> list:
    """Run one measurement in a process of its own, and return what it prints."""
    threads = ["--threads", str(args.threads)] if args.threads else []
    command = [
        sys.executable,
        __file__,
        "--device",
        args.device,
        "--clock",
        args.clock,
        *threads,
        "--only",
        json.dumps(what),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "KEOPS_VERBOSE": "0"}, check=False
    )
    if done.returncode:
        print(done.stderr[-500:], file=sys.stderr)
        return []
    return json.loads(done.stdout.splitlines()[-1])


def products(args: argparse.Namespace) -> None:
    rate, lines = gemm_rate(args.device), []
    for d in args.dims:
        for w in args.widths:
            before: dict[str, tuple[int, float]] = {}
            for n in args.points:
                cells, seconds = [str(d), str(w), f"{n}"], {}
                for method in METHODS:
                    long = method in before and before[method][1] * (n / before[method][0]) ** 2 > args.limit
                    big = method == "dense" and 3 * 4 * n * n > args.dense * 2**30
                    absent = method in ("KeOps", "GPyTorch") and not args.keops
                    some = max(1, args.block // n) if long else 0
                    left_out = absent or (method == "dense" and (long or big))
                    found = [] if left_out else alone(args, "product", method, n, d, w, args.device, some)
                    if found:
                        seconds[method], before[method] = found[0], (n, found[0])
                    about = "~" if some else ""
                    cells.append(f"{about}{found[0]:.3f} ({found[1]:.0f} MB, {found[2]:.0e})" if found else "–")
                    print("  ", method, cells[-1], file=sys.stderr, flush=True)
                base = seconds.get("chunked")
                done = n * n * (2 * d + 6 + 2 * w) / base / rate if base else 0.0
                ratios = [f"{seconds[m] / base:.1f}" if base and m in seconds else "–" for m in METHODS[1:]]
                lines.append([*cells, *ratios, f"{100 * done:.0f} %"])
    head = ["d", "w", "N", *[f"{m}: s (memory, error)" for m in METHODS], "dense/ch.", "KeOps/ch.", "GPyT./ch.", "rate"]
    table(f"K v, RBF, float32; GEMM {rate / 1e9:.0f} GF/s; {machine(torch.device(args.device))}", head, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, nargs="+", default=[1000, 2000] if SMOKE else [10**4, 10**5, 10**6])
    parser.add_argument("--candidates", type=int, nargs="*", default=[2000] if SMOKE else [10**4, 10**5, 10**6])
    parser.add_argument("--dims", type=int, nargs="+", default=[2] if SMOKE else [2, 8, 20])
    parser.add_argument("--widths", type=int, nargs="+", default=[1])
    parser.add_argument("--inducing", type=int, default=10 if SMOKE else 100)
    parser.add_argument("--limit", type=float, default=120.0, help="seconds beyond which rows are measured")
    parser.add_argument("--block", type=int, default=10**5 if SMOKE else 5 * 10**8, help="entries, beyond the limit")
    parser.add_argument("--dense", type=float, default=4.0, help="GB that the dense matrix and its scratch may take")
    parser.add_argument("--no-keops", dest="keops", action="store_false")
    parser.add_argument("--only", default=None, help=argparse.SUPPRESS)
    machine_arguments(parser)
    args = parser.parse_args()
    use(args)
    if args.only:
        name, *rest = json.loads(args.only)
        print(json.dumps({"product": product, "selection": selection}[name](*rest)))
        return
    if args.keops and not keops_status(args.device).available:
        print(keops_status(args.device))
        args.keops = False
    products(args)
    lines = [
        [str(d), str(n), *alone(args, "selection", n, d, args.inducing, args.device)]
        for d in args.dims
        for n in args.candidates
    ]
    if not lines:
        return
    head = ["d", "N", "selection s", "MB", "leverage s", "predict s", "MB"]
    table(f"M = {args.inducing} of N inputs, float32; {machine(torch.device(args.device))}", head, lines)


if __name__ == "__main__":
    main()
