"""What a step of the optimiser costs beside AdamW's, without the network: 10⁶ and 10⁷ parameters.

Claim: IVON in plain torch costs three to four times AdamW's step (foreach), where its authors' code costs 16 at 10⁷.

A step of IVON is entering and leaving `sampled_params()` and `step()`; gradients are at hand. CPU time on one thread,
interleaved: medians of times, and of the ratios within a repeat. `ivon-opt` is timed if it is installed.

With `--compile`, a bound on what `torch.compile` could bring: torch's noise, and draw and update compiled as one kernel
each over flat buffers, without the copies between buffers and parameters. It needs a C++ compiler.

    python benchmarks/optim_cost.py --compile
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from peers import SMOKE, table
from torch import Tensor, nn

from dualgp.optim import IVON


def stepper(
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], size: int, sampled: bool
) -> Callable[[], None]:
    params = [nn.Parameter(torch.randn(size // 10)) for _ in range(10)]
    gradients: list[Tensor] = [torch.randn_like(p) for p in params]
    optimizer = make(params)

    def give() -> None:
        for p, g in zip(params, gradients, strict=True):
            p.grad = g

    def step() -> None:
        if sampled:
            with optimizer.sampled_params(train=True):  # type: ignore[attr-defined]
                give()
        else:
            give()
        optimizer.step()

    return step


def compiled(size: int) -> dict[str, Callable[[], object]]:
    """The parts of a step that a compiler can do nothing about, or would fuse."""
    m, mom, g, sample, noise = (torch.randn(size) for _ in range(5))
    h, lam, d, rho, beta1, lr = torch.rand(size) + 0.5, 1e4, 1e-3, 1e-3, 0.9, 0.01

    @torch.compile(dynamic=False)
    def draw(m: Tensor, h: Tensor, noise: Tensor, sample: Tensor) -> None:
        sample.copy_(m + noise * torch.rsqrt(lam * (h + d)))

    @torch.compile(dynamic=False)
    def update(m: Tensor, mom: Tensor, h: Tensor, g: Tensor, sample: Tensor) -> None:
        n, hd, new = g * (sample - m), h + d, mom + (1.0 - beta1) * (g - mom)
        r = (rho * (lam * n - h / hd)).clamp(-2.0, 2.0)
        hd = hd * (1.0 + r + 0.5 * r * r)
        mom.copy_(new), h.copy_(hd - d), m.copy_(m - lr * (new + d * m) / hd)

    return {
        "noise, torch": noise.normal_,
        "draw, compiled": lambda: draw(m, h, noise, sample),
        "update, compiled": lambda: update(m, mom, h, g, sample),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10**4] if SMOKE else [10**6, 10**7])
    parser.add_argument("--repeats", type=int, default=2 if SMOKE else 9)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for size in args.sizes:
        steps: dict[str, Callable[[], object]] = {
            "AdamW, loop": stepper(lambda p: torch.optim.AdamW(p, foreach=False), size, False),
            "AdamW, foreach": stepper(lambda p: torch.optim.AdamW(p, foreach=True), size, False),
            "AdamW, fused": stepper(lambda p: torch.optim.AdamW(p, fused=True), size, False),
            "IVON, dualgp": stepper(lambda p: IVON(p, num_data=1000, total_steps=100), size, True),
        }
        try:
            import ivon

            steps["ivon-opt"] = stepper(lambda p: ivon.IVON(p, lr=0.1, ess=1000), size, True)
        except ImportError:
            pass
        if args.compile:
            steps |= compiled(size)
        times: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(args.repeats + 1):
            for name, step in steps.items():
                began = time.process_time()
                step()
                times[name].append(1e3 * (time.process_time() - began))
        for name, values in times.items():
            ratio = statistics.median(a / b for a, b in zip(values[1:], times["AdamW, foreach"][1:], strict=True))
            rows.append([f"{size:.0e}", name, f"{statistics.median(values[1:]):.1f}", f"{ratio:.2f}"])
    table(f"one step, CPU time, 1 thread, torch {torch.__version__}", ["params", "optimiser", "ms", "/ foreach"], rows)


if __name__ == "__main__":
    main()
