"""How Gaussian the pre-activations of networks are: Kolmogorov–Smirnov against N(0, 1), 2·10⁵ networks each.

Claim: with φ_θ and symmetric Weibull weights one layer is Gaussian at any width, below the 5 % critical value; two
layers are nearly so at width 10 already, where ReLU and tanh are far. Inputs are N(0, I), weights drawn anew for each
sample. ReLU and tanh have Gaussian weights, and are scaled so that one layer of them has unit variance.

    OMP_NUM_THREADS=1 python benchmarks/preactivations.py
"""

from __future__ import annotations

import math

import torch
from peers import SMOKE, table
from torch import nn

from dualgp.nets import GaussianPreactivation, preactivation_ks

SAMPLES = 2000 if SMOKE else 200_000
WIDTHS: list[tuple[int, ...]] = [(1,), (5,), (1, 1), (2, 2), (10, 10)]


class Scaled(nn.Module):
    """An activation times the factor that makes E φ(X)² = 1 for X ~ N(0, 1)."""

    def __init__(self, of: nn.Module) -> None:
        super().__init__()
        x = torch.linspace(-9, 9, 20_001, dtype=torch.float64)
        w = (-0.5 * x.square()).exp() / math.sqrt(2 * math.pi) * (x[1] - x[0])
        self.of, self.scale = of, float((w @ of(x).square()).rsqrt())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * self.of(x)


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    usual = [("ReLU", Scaled(nn.ReLU())), ("tanh", Scaled(nn.Tanh()))]
    kinds: list[tuple[str, nn.Module, float | None]] = [(name, of, None) for name, of in usual]
    for theta in (2.05, 3.0, 10.0):
        for kind in ("odd", "positive"):
            kinds.append((f"φ {kind}, θ = {theta}", GaussianPreactivation(theta, kind), theta))  # type: ignore[arg-type]
    for name, activation, theta in kinds:
        cells = []
        for widths in WIDTHS:
            g = torch.Generator().manual_seed(len(widths) * 100 + widths[0])
            found = preactivation_ks(activation, theta, widths, num_samples=SAMPLES, generator=g)
            cells.append(f"{found.statistic:.4f}{' *' if found.gaussian else '  '}")
        rows.append([name, *cells])
        print("#", *rows[-1], flush=True)
    critical = 1.358 / math.sqrt(SAMPLES)
    title = f"K-S statistics, n = {SAMPLES}; * below the 5 % critical value {critical:.5f}; torch {torch.__version__}"
    table(title, ["activation", *(" → ".join(map(str, w)) for w in WIDTHS)], rows)


if __name__ == "__main__":
    main()
