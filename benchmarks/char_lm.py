"""A character language model trained by IVON and by AdamW at equal steps: perplexity at the mean and with 8 draws.

Claim: none yet. It prints what it finds, with the time of a step; on a GPU of its own for sizes that mean something.

A transformer with causal attention on the sources of Python's standard library, the last twentieth of which (by file)
tests. Each optimiser is run at every step size of one grid: AdamW's lr, and as IVON's the most that a weight moves in a
step, lr (h₀ + d) · clip. IVON's other settings are those published for GPT-2, with β₂ tied to the length of the run
(1 − β₂ = 1/steps): λ = 10¹⁰ and, warmer, 10⁸, σ₀ = 3·10⁻⁴ and a clip of 10⁻³.

    python benchmarks/char_lm.py --device cuda --width 384 --layers 6 --context 256 --batch 64 --steps 3000
"""

from __future__ import annotations

import argparse
import math
import sysconfig
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peers import SMOKE, sync, table
from torch import Tensor, nn

from dualgp.errors import NumericalWarning
from dualgp.optim import IVON

SAMPLES = 8


def text() -> tuple[Tensor, Tensor]:
    """Bytes of the standard library's sources: those that train, and those that test."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0)).tolist()
    cut = len(files) // 20
    parts = (b"".join(files[k].read_bytes() for k in rows) for rows in (order[cut:], order[:cut]))
    train, test = (torch.frombuffer(bytearray(part), dtype=torch.uint8).long().clamp_max(127) for part in parts)
    return train, test


class Model(nn.Module):
    """A transformer that predicts the next of 128 characters."""

    def __init__(self, width: int, layers: int, context: int) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(128, width), nn.Embedding(context, width)
        layer = nn.TransformerEncoderLayer(
            width, max(1, width // 64), 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.body = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 128)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(context))
        for p in (self.embed.weight, self.place.weight):
            nn.init.normal_(p, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x) + self.place(torch.arange(x.shape[-1], device=x.device))
        return self.head(self.norm(self.body(h, mask=self.mask, is_causal=True)))


def windows(data: Tensor, starts: Tensor, context: int) -> tuple[Tensor, Tensor]:
    at = starts.unsqueeze(-1) + torch.arange(context + 1)
    return data[at][:, :-1], data[at][:, 1:]


def train(net: Model, optimizer: Any, sampled: bool, data: Tensor, args: argparse.Namespace) -> float:
    """Train; return the median seconds of a step."""
    device = torch.device(args.device)
    warm = max(1, args.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min(1.0, (t + 1) / warm) * 0.5 * (1.0 + math.cos(math.pi * t / args.steps))
    )
    generator, times = torch.Generator().manual_seed(0), []

    def backward(x: Tensor, y: Tensor) -> None:
        nn.functional.cross_entropy(net(x).flatten(0, 1), y.flatten()).backward()

    for _ in range(args.steps):
        starts = torch.randint(len(data) - args.context - 1, (args.batch,), generator=generator)
        x, y = (t.to(device) for t in windows(data, starts, args.context))
        sync(device)
        began = time.perf_counter()
        optimizer.zero_grad()
        if sampled:
            with optimizer.sampled_params():
                backward(x, y)
        else:
            backward(x, y)
        optimizer.step()
        sync(device)
        times.append(time.perf_counter() - began)
        schedule.step()
    return sorted(times)[len(times) // 2]


@torch.no_grad()
def nll(net: Model, optimizer: Any, data: Tensor, args: argparse.Namespace, samples: int) -> float:
    """Nats per character on windows of the test text, of the average of the probabilities of all draws."""
    starts = torch.arange(0, len(data) - args.context - 1, args.context)[: args.test]
    total, count = 0.0, 0
    for part in starts.split(args.batch):
        x, y = (t.to(args.device) for t in windows(data, part, args.context))
        found = []
        for _ in range(max(1, samples)):
            if samples:
                with optimizer.sampled_params(train=False):
                    logits = net(x)
            else:
                logits = net(x)
            found.append(logits.log_softmax(-1).gather(-1, y.unsqueeze(-1)).squeeze(-1))
        total -= float((torch.stack(found).logsumexp(0) - math.log(len(found))).sum())
        count += y.numel()
    return total / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    for name, small, size in (
        ("width", 32, 128), ("layers", 1, 2), ("context", 32, 64), ("batch", 4, 32), ("steps", 5, 500),
        ("test", 8, 300),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=small if SMOKE else size)
    parser.add_argument("--grid", type=float, nargs="+", default=[3e-3] if SMOKE else [3e-4, 1e-3, 3e-3, 1e-2])
    args = parser.parse_args()
    warnings.simplefilter("ignore", NumericalWarning)
    data, test = text()
    std, clip = 3e-4, 1e-3
    optimizers: dict[str, tuple[Callable[[Model], Any], bool]] = {}
    for most in args.grid:
        optimizers[f"AdamW, {most:g}"] = (
            lambda m, most=most: torch.optim.AdamW(m.parameters(), most, weight_decay=0.1), False
        )  # fmt: skip
    for lam in (1e10, 1e8):
        for most in args.grid:
            optimizers[f"IVON, λ = {lam:.0e}, {most:g}"] = (
                lambda m, lam=lam, most=most: IVON(
                    m.named_parameters(), most / clip * lam * std**2, ess=lam, weight_decay=1e-6, init_std=std,
                    total_steps=args.steps, curvature_horizon=1.0, clip_radius=clip,
                ),
                True,
            )  # fmt: skip
    rows = []
    for name, (make, sampled) in optimizers.items():
        torch.manual_seed(0)
        print(name, flush=True)
        net = Model(args.width, args.layers, args.context).to(args.device)
        optimizer = make(net)
        seconds = train(net, optimizer, sampled, data, args)
        for samples in (0, SAMPLES) if sampled else (0,):
            value = nll(net, optimizer, test, args, samples)
            rows.append(
                [name, str(samples or "mean"), f"{value:.4f}", f"{math.exp(value):.3f}", f"{1e3 * seconds:.1f}"]
            )
    size = sum(p.numel() for p in net.parameters())
    title = f"{size / 1e6:.2f} million weights, {len(data) / 1e6:.1f} million characters, {args.steps} steps, "
    title += f"{args.device}, torch {torch.__version__}"
    table(title, ["method", "weights", "NLL", "perplexity", "ms a step"], rows)


if __name__ == "__main__":
    main()
