"""What the benchmarks of networks share: scikit-learn's data sets, trained classifiers kept on disk, and scores.

Networks D-50-50-C (tanh, softmax also for two classes), trained as in Scannell et al. 2024: Adam 1e-4, batches of 128,
mean cross-entropy + δ/2 |θ|², at most 10,000 epochs; the weights of the best validation loss, looked at every second
epoch, and an end when it has not fallen for 1000. Stratified 70/15/15 %, inputs standardised on the training data.
Training is the expensive part, so that each network is trained once and read from `--cache` from then on.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from peers import SMOKE
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_breast_cancer, load_digits, load_wine
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

SEEDS = (68, 117, 36, 187, 17)
DELTA = {"digits": 1e-4, "cancer": 1e-4, "wine": 1e-4}  # published for the first two; wine takes the same
LOADERS = {"digits": load_digits, "cancer": load_breast_cancer, "wine": load_wine}


class Split(NamedTuple):
    """Training, validation and test data, float32."""

    X: Tensor
    y: Tensor
    X_val: Tensor
    y_val: Tensor
    X_test: Tensor
    y_test: Tensor

    @property
    def num_classes(self) -> int:
        return int(self.y.max()) + 1


def arguments(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=None, help="a folder for trained networks; trained anew if None")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS[:1] if SMOKE else SEEDS))
    return parser


def load(name: str, seed: int, classes: range | None = None) -> tuple[Split, Tensor]:
    """Return the split of a seed, of these classes only, and the standardised inputs of all other classes."""
    X, y = LOADERS[name](return_X_y=True)
    inside = [c in classes for c in y] if classes is not None else [True] * len(y)
    outside = X[[not i for i in inside]]
    X, y = X[inside], y[inside]
    X, X_rest, y, y_rest = train_test_split(X, y, test_size=0.3, stratify=y, random_state=seed)
    X_val, X_test, y_val, y_test = train_test_split(X_rest, y_rest, test_size=0.5, stratify=y_rest, random_state=seed)
    mean, sd = X.mean(0), X.std(0)
    sd[sd == 0] = 1.0  # as StandardScaler
    inputs = [torch.tensor((x - mean) / sd, dtype=torch.float32) for x in (X, X_val, X_test, outside)]
    targets = [torch.tensor(t) for t in (y, y_val, y_test)]
    return Split(inputs[0], targets[0], inputs[1], targets[1], inputs[2], targets[2]), inputs[3]


def mlp(sizes: Sequence[int], seed: int) -> nn.Sequential:
    """A tanh network of these widths, initialised as torch does."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def train(
    net: nn.Module,
    data: tuple[Tensor, Tensor],
    validation: tuple[Tensor, Tensor],
    *,
    loss: Callable[[Tensor, Tensor], Tensor],
    weight_decay: float,
    rate: float,
    seed: int,
    epochs: int = 10_000,
    patience: int = 1000,
) -> int:
    """Train with early stopping, in place; return the epoch whose weights were kept."""
    X, y = data
    adam = torch.optim.Adam(net.parameters(), lr=rate, weight_decay=weight_decay, fused=True)
    generator = torch.Generator().manual_seed(seed)
    best, best_epoch, kept = math.inf, 0, copy.deepcopy(net.state_dict())
    for epoch in range(min(epochs, 20) if SMOKE else epochs):
        for rows in torch.randperm(len(X), generator=generator).split(128):
            adam.zero_grad()
            loss(net(X[rows]), y[rows]).backward()
            adam.step()
        if epoch % 2 == 0:
            with torch.no_grad():
                now = float(loss(net(validation[0]), validation[1]))
            if now < best:
                best, best_epoch, kept = now, epoch, copy.deepcopy(net.state_dict())
            elif epoch - best_epoch >= patience:
                break
    net.load_state_dict(kept)
    return best_epoch


def kept(cache: Path | None, name: str, net: nn.Module, fit: Callable[[nn.Module], object]) -> nn.Module:
    """Return the network of this name from the cache, or trained and put there."""
    path = None if cache is None or SMOKE else cache / f"{name}.safetensors"
    if path is not None and path.exists():
        net.load_state_dict(load_file(path))
        return net.eval()
    start = time.process_time()
    done = fit(net)
    print(f"# {name}: trained in {time.process_time() - start:.0f} CPU s, best epoch {done}", flush=True)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(net.state_dict(), path)
    return net.eval()


def classifier(name: str, seed: int, split: Split, delta: float, cache: Path | None, tag: str = "") -> nn.Module:
    """Return the trained network of a data set and seed."""
    net = mlp((split.X.shape[-1], 50, 50, split.num_classes), seed)
    options = {"loss": nn.functional.cross_entropy, "weight_decay": delta, "rate": 1e-4, "seed": seed}
    data, validation = (split.X, split.y), (split.X_val, split.y_val)
    return kept(cache, f"{name}{tag}-{seed}", net, lambda net: train(net, data, validation, **options))


def scores(log_p: Tensor, y: Tensor) -> tuple[float, float, float]:
    """Return NLL, accuracy and expected calibration error (15 bins of confidence) of class log-probabilities [n, C]."""
    log_p = log_p.double()
    confidence, label = log_p.exp().max(-1)
    right = (label == y).double()
    bins = (confidence.nan_to_num() * 15).long().clamp(max=14)
    gaps = torch.zeros(15, dtype=torch.float64).scatter_add_(0, bins, right - confidence)
    nll = -log_p.gather(-1, y.unsqueeze(-1)).mean()
    return float(nll), float(right.mean()), float(gaps.abs().sum() / len(y))


def brier(log_p: Tensor, y: Tensor) -> float:
    """Return the Brier score, the mean over data of Σ_c (p_c − [c = y])²."""
    gap = log_p.double().exp() - nn.functional.one_hot(y, log_p.shape[-1])
    return float(gap.square().sum(-1).mean())


def entropy(log_p: Tensor) -> Tensor:
    """Return the entropy [n] of class log-probabilities [n, C]."""
    return -(log_p.exp() * log_p).nan_to_num(nan=0.0).sum(-1)


def auroc(outside: Tensor, inside: Tensor) -> float:
    """Return the probability that a score outside is above one inside, ties halved."""
    above, ties = outside.unsqueeze(-1) > inside, outside.unsqueeze(-1) == inside
    return float((above.double() + 0.5 * ties.double()).mean())


def mean_se(values: Sequence[float], digits: int = 3) -> list[str]:
    """Return the mean over seeds and its standard error, as cells."""
    v = torch.tensor(values, dtype=torch.float64)
    se = v.std() / len(v) ** 0.5 if len(v) > 1 else math.nan
    return [f"{v.mean():.{digits}f}", f"{se:.{digits}f}"]
