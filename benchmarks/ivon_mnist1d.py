"""IVON against AdamW and SGD on MNIST-1D: negative log-likelihood, accuracy and calibration.

Claim: noise in the weights at a high step size, with a curvature that is learned within the run, beats tuned SGD, and
needs no tuning for it.

MLP 40-200-200-10, 3000 training data, 1000 test data, 120 epochs of batches of 100, cosine schedules. The settings of
the peers are the best of a grid on validation NLL: AdamW of 14, SGD of 15, IVON with the β₂ of its authors' code of 15.
`ivon-opt` is that code, if it is installed. Data: the package `mnist1d`, whose generator needs no network.

    pip install mnist1d
    python benchmarks/ivon_mnist1d.py
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peers import SMOKE, table
from torch import Tensor, nn

from dualgp.errors import NumericalWarning
from dualgp.optim import IVON

SAMPLES, BINS = 64, 20


def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Train and test of MNIST-1D as its package splits it, with its default seed; standardised."""
    from mnist1d.data import get_dataset_args, make_dataset

    made = make_dataset(get_dataset_args())
    x, xt = (torch.as_tensor(made[k]).float() for k in ("x", "x_test"))
    y, yt = (torch.as_tensor(made[k]).long() for k in ("y", "y_test"))
    x, y = x[:3000], y[:3000]  # the rest chose the settings of the peers
    mean, std = x.mean(0), x.std(0)
    return (x - mean) / std, y, (xt - mean) / std, yt


def network(sizes: tuple[int, ...]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def train(net: nn.Module, optimizer: Any, x: Tensor, y: Tensor, epochs: int, batch: int, sampled: bool) -> None:
    steps = epochs * (len(x) // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(batch):
            if len(rows) < batch:
                continue
            optimizer.zero_grad()
            if sampled:
                with optimizer.sampled_params(train=True):
                    nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
            else:
                nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def probabilities(net: nn.Module, optimizer: Any, x: Tensor, samples: int) -> Tensor:
    """At the mean, or averaged over draws of the weights."""
    if not samples:
        return net(x).softmax(-1)
    total = 0.0
    for _ in range(samples):
        with optimizer.sampled_params(train=False):
            total = total + net(x).softmax(-1)
    return total / samples


def scores(p: Tensor, y: Tensor) -> tuple[float, float, float, float]:
    """Accuracy in percent, NLL in nats, ECE over 20 bins, Brier score."""
    confidence, label = p.max(-1)
    right = (label == y).float()
    bins = (confidence * BINS).long().clamp_max(BINS - 1)
    gap = torch.zeros(BINS).index_add(0, bins, right - confidence)
    nll = -p.gather(-1, y[:, None]).clamp_min(1e-12).log().mean()
    brier = (p - nn.functional.one_hot(y, p.shape[-1])).square().sum(-1).mean()
    return 100 * float(right.mean()), float(nll), float(gap.abs().sum() / len(y)), float(brier)


def mnist1d_methods(n: int, steps: int) -> dict[str, tuple[Callable[[nn.Module], Any], bool]]:
    """Name: (the optimiser of a network, whether weights are drawn)."""
    found: dict[str, tuple[Callable[[nn.Module], Any], bool]] = {
        "AdamW, usual (lr .001, wd .01)": (lambda m: torch.optim.AdamW(m.parameters(), 1e-3), False),
        "AdamW, best of 14": (lambda m: torch.optim.AdamW(m.parameters(), 1e-2, weight_decay=1.0), False),
        "SGD, best of 15": (lambda m: torch.optim.SGD(m.parameters(), 0.3, momentum=0.9, weight_decay=1e-3), False),
        "IVON, dualgp, tuned": (
            lambda m: IVON(m.named_parameters(), 1.5, ess=n, hess_init=2.0, beta2=0.999, weight_decay=1e-3),
            True,
        ),
        "IVON, dualgp, no tuning": (lambda m: IVON(m.named_parameters(), num_data=n, total_steps=steps), True),
    }
    try:
        import ivon
    except ImportError:
        return found
    found["ivon-opt, β₂ = .99999, best of 15"] = (
        lambda m: ivon.IVON(m.parameters(), lr=1.5, ess=n, hess_init=0.093, weight_decay=1e-3),
        True,
    )
    found["ivon-opt, as tuned above"] = (
        lambda m: ivon.IVON(m.parameters(), lr=1.5, ess=n, hess_init=2.0, beta2=0.999, weight_decay=1e-3),
        True,
    )
    return found


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """800 training and 597 test images of scikit-learn's digits."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = torch.as_tensor(x).float()[rows] / 16, torch.as_tensor(y).long()[rows]
    return x[:800], y[:800], x[1200:], y[1200:]


def digits_methods(n: int, steps: int) -> dict[str, tuple[Callable[[nn.Module], Any], bool]]:
    return {
        "AdamW, best of 6": (lambda m: torch.optim.AdamW(m.parameters(), 1e-2, weight_decay=1.0), False),
        "SGD, best of 12": (lambda m: torch.optim.SGD(m.parameters(), 0.3, momentum=0.9, weight_decay=1e-3), False),
        "IVON, dualgp, tuned": (
            lambda m: IVON(m.named_parameters(), 1.0, ess=n, hess_init=7.4, beta2=0.99625, weight_decay=1e-3),
            True,
        ),
        "IVON, dualgp, no tuning": (lambda m: IVON(m.named_parameters(), num_data=n, total_steps=steps), True),
    }


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and standard deviation over seeds."""
    sd = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.{digits}f} ± {sd:.{digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1 if SMOKE else 5)
    parser.add_argument("--epochs", type=int, default=2 if SMOKE else None)
    parser.add_argument("--data", nargs="+", default=["mnist1d", "digits"])
    args = parser.parse_args()
    warnings.simplefilter("ignore", NumericalWarning)
    torch.set_num_threads(1)
    for name in args.data:
        x, y, xt, yt = data() if name == "mnist1d" else digits()
        epochs, sizes = (120, (40, 200, 200, 10)) if name == "mnist1d" else (60, (64, 200, 200, 10))
        epochs, batch = args.epochs or epochs, 100 if name == "mnist1d" else 50
        steps = epochs * (len(x) // batch)
        rows = []
        for label, (make, sampled) in (mnist1d_methods if name == "mnist1d" else digits_methods)(len(x), steps).items():
            found: dict[int, list[tuple[float, ...]]] = {}
            began = time.process_time()
            for seed in range(args.seeds):
                torch.manual_seed(seed)
                net = network(sizes)
                optimizer = make(net)
                train(net, optimizer, x, y, epochs, batch, sampled)
                for samples in (0, SAMPLES) if sampled else (0,):
                    found.setdefault(samples, []).append(scores(probabilities(net, optimizer, xt, samples), yt))
            seconds = (time.process_time() - began) / args.seeds
            for samples, values in found.items():
                at = [] if samples else ["mean"]
                columns = [spread(c, d) for c, d in zip(zip(*values, strict=True), (1, 3, 3, 3), strict=True)]
                rows.append([label, at[0] if at else str(samples), *columns, f"{seconds:.0f}"])
        title = (
            f"{name}: n={len(x)}, {epochs} epochs of batches of {batch}, {args.seeds} seeds, torch {torch.__version__}"
        )
        table(title, ["method", "weights", "accuracy %", "NLL", "ECE", "Brier", "s a run"], rows)


if __name__ == "__main__":
    main()
