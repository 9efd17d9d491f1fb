"""Conversion of a network of ResNet-18's size: time and memory, on a GPU or, at small sizes, on a CPU.

Claim: a trained network of 11 million parameters on N = 50,000 images becomes a sparse dual GP in minutes on one GPU.

The network is ResNet-18 for 32 × 32 images (stem of one 3 × 3 convolution, no pooling), with random weights and running
statistics set by one pass; images are noise and a shift by class, so that only time and memory are measured. Outputs
are independent: with M inputs the posterior is C matrices M × M. κ(x, z) costs, for one pair, 2Cp operations for each
layer of p parameters whose Jacobians are formed, or 2S²(I + CO) where the layer has few positions S.

Rows come as they are done; a row that would take longer than `--seconds` altogether is left out.

    python benchmarks/gpu_networks.py --points 2000 10000 50000 --inducing 128 1024
    python benchmarks/gpu_networks.py --device cpu --width 8 --points 64 --inducing 16
"""

from __future__ import annotations

import argparse
import time

import torch
from gpytorch.likelihoods import SoftmaxLikelihood
from peers import SMOKE, table
from torch import Tensor, nn

from dualgp import network_gp

CLASSES = 10
HEAD = ["N", "M", "params", "convert s", "rows/s", "TFLOP/s", "tune s", "predict 1000 s", "peak GB", "NLPD"]


class Block(nn.Module):
    """Two 3 × 3 convolutions and a way around them."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.one, self.two = (
            nn.Conv2d(before, after, 3, stride, 1, bias=False),
            nn.Conv2d(after, after, 3, 1, 1, bias=False),
        )
        self.norm_one, self.norm_two = nn.BatchNorm2d(after), nn.BatchNorm2d(after)
        around = [nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after)]
        self.around = nn.Sequential(*around) if stride > 1 or before != after else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm_two(self.two(self.norm_one(self.one(x)).relu()))
        return (inner + self.around(x)).relu()


def resnet18(width: int) -> nn.Module:
    """He et al. 2016, for 32 × 32 images; `width` channels in the first stage (64: 11.2 million parameters)."""
    stem = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    blocks, before = [], width
    for stage in range(4):
        after = width << stage
        blocks += [Block(before, after, 1 if stage == 0 else 2), Block(after, after, 1)]
        before = after
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, CLASSES))


def draw(n: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    y = torch.randint(CLASSES, (n,), generator=g)
    means = 0.5 * torch.randn(CLASSES, 3, 32, 32, generator=g)
    return torch.randn(n, 3, 32, 32, generator=g) + means[y], y


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def products(network: nn.Module, x: Tensor) -> float:
    """Multiplications and additions of κ(x, z) for one pair and all outputs: what no contraction can do without."""
    total = 0.0

    def count(module: nn.Module, args: tuple[Tensor, ...], z: Tensor) -> None:
        nonlocal total
        p = sum(t.numel() for t in module.parameters())
        if isinstance(module, nn.Conv2d):
            positions, inner = z[0, 0].numel(), module.weight[0].numel()
            total += 2 * min(CLASSES * p, positions**2 * (inner + CLASSES * module.out_channels))
        elif isinstance(module, nn.Linear):
            total += 2 * (module.in_features + CLASSES * module.out_features)

    hooks = [m.register_forward_hook(count) for m in network.modules()]
    with torch.no_grad():
        network(x)
    for hook in hooks:
        hook.remove()
    return total


def convert(network: nn.Module, params: object, n: int, m: int, device: torch.device, budget: int) -> list[str]:
    """One row of the table."""
    X, y = draw(n)
    batches = list(zip(X.split(2000), y.split(2000), strict=True))
    likelihood = SoftmaxLikelihood(num_classes=CLASSES, mixing_weights=False)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    began = now(device)
    q = network_gp(
        network, batches, likelihood, num_inducing=m, structure="sparse", outputs="independent", params=params,
        prior_precision=50.0, budget=budget, progress=False,
    )  # fmt: skip
    made = now(device)
    q = q.tuned("evidence")
    tuned = now(device)
    x, t = draw(1000)
    nlpd = q.nlpd(x, t)
    done = now(device)
    peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else float("nan")
    work = products(network, X[:1].to(device)) * n * m
    P = q.posterior.basis.jacobian.num_params
    cells = [f"{made - began:.1f}", f"{n / (made - began):.0f}", f"{work / (made - began) / 1e12:.1f}"]
    if params != "all":
        cells[-1] = ""
    return [
        str(n),
        str(m),
        f"{P:,}",
        *cells,
        f"{tuned - made:.1f}",
        f"{done - tuned:.1f}",
        f"{peak:.1f}",
        f"{nlpd:.3f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--width", type=int, default=4 if SMOKE else 64)
    parser.add_argument("--points", type=int, nargs="+", default=[16] if SMOKE else [2000, 50_000])
    parser.add_argument("--inducing", type=int, nargs="+", default=[4] if SMOKE else [128, 1024])
    parser.add_argument("--budget", type=float, default=0.25 if SMOKE else 16.0, help="GB of Jacobians at a time")
    parser.add_argument("--seconds", type=float, default=600.0, help="no row begins that would end later")
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.manual_seed(0)
    network = resnet18(args.width).to(device)
    network.train()(draw(64)[0].to(device))  # running statistics
    network.eval()
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    lines, began, rate = [], time.perf_counter(), 0.0
    for m in args.inducing:
        for n in args.points:
            for params in ("last_layer", "all"):
                used = time.perf_counter() - began
                if params == "all" and used + rate * n * m > args.seconds:
                    print(f"left out: N = {n}, M = {m}, which would take {rate * n * m:.0f} s", flush=True)
                    continue
                try:
                    line = convert(network, params, n, m, device, int(args.budget * 2**30))
                except torch.OutOfMemoryError:
                    print(f"left out: N = {n}, M = {m}, for which memory does not suffice", flush=True)
                    continue
                if params == "all":
                    rate = float(line[3]) / (n * m)
                print(" ".join(line), flush=True)
                lines.append(line)
    table(
        f"ResNet-18, width {args.width}, outputs independent, float32; {name}, torch {torch.__version__}", HEAD, lines
    )


if __name__ == "__main__":
    main()
