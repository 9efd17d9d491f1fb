"""What a step of the optimiser costs beside AdamW's, without the network: 10⁶ and 10⁷ parameters.

Claim: IVON in plain torch costs about four times AdamW's step (foreach), where its authors' code costs 16 at 10⁷.

A step of IVON is entering and leaving `sampled_params()` and `step()`; gradients are at hand. Medians of interleaved
repeats, CPU time on one thread. `ivon-opt` is timed if it is installed.

    python benchmarks/optim_cost.py
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10**4] if SMOKE else [10**6, 10**7])
    parser.add_argument("--repeats", type=int, default=2 if SMOKE else 9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for size in args.sizes:
        steps = {
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
        times: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(args.repeats + 1):
            for name, step in steps.items():
                began = time.process_time()
                step()
                times[name].append(1e3 * (time.process_time() - began))
        medians = {name: statistics.median(values[1:]) for name, values in times.items()}
        for name, value in medians.items():
            rows.append([f"{size:.0e}", name, f"{value:.1f}", f"{value / medians['AdamW, foreach']:.2f}"])
    table(f"one step, CPU time, 1 thread, torch {torch.__version__}", ["params", "optimiser", "ms", "/ foreach"], rows)


if __name__ == "__main__":
    main()
