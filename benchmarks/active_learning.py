"""How many labels does it take to be nearly as good as with all of them? Digits and bank.

Digits: 600 in the pool and 1197 to test, 20 principal components of the pool, softmax; the score is accuracy. Bank:
1500 and 3021, 16 inputs, probit; nine in ten are of one class, so that accuracy says nothing and the score is the area
under the ROC curve. 20 labels at random, then ten at a time, until the score is 95 % of that of the same model fitted
to the whole pool, or 300 are spent. Matérn-5/2, one lengthscale; M = 150.

- dual: `dualgp.active.PoolLoop` with `learn_more`, asking by "bald", "entropy" or at random, batches diverse
- refit: the model fitted from the start to all labels after every batch, M = all of them, asking for the ten labels of
  greatest entropy

    DUALGP_DATA=… OMP_NUM_THREADS=1 python benchmarks/active_learning.py
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from classifiers import auroc, mean_se
from gpytorch.kernels import MaternKernel, ScaleKernel
from gpytorch.likelihoods import BernoulliLikelihood, SoftmaxLikelihood
from peers import SMOKE, table
from sklearn.datasets import load_digits
from stream_peers import varied
from torch import Tensor

from dualgp import DualGP
from dualgp.active import PoolLoop, Stop

warnings.filterwarnings("ignore")
START, BATCH, CAP, PART = 20, 10, (40 if SMOKE else 300), 0.95
WAYS = {
    "dual, bald": ("bald", False),
    "dual, entropy": ("entropy", False),
    "dual, random": ("random", False),
    "refit, entropy": ("entropy", True),
}
HEADER = ["data", "model", "labels", "± se", "not reached", "score at 60", "± se", "s/batch", "of all data"]


class Split:
    """A pool and test data of a seed."""

    def __init__(self, name: str, seed: int) -> None:
        if name == "digits":
            X, y = (torch.as_tensor(t) for t in load_digits(return_X_y=True))
            size = 600
        else:
            rows = np.loadtxt(Path(os.environ["DUALGP_DATA"]) / "bank.csv", delimiter=",", skiprows=1)
            X, y, size = torch.from_numpy(rows[:, :-1]), torch.from_numpy(rows[:, -1]), 1500
        order = torch.randperm(len(X), generator=torch.Generator().manual_seed(seed))
        X, y = X[order].double(), y[order]
        if name == "digits":
            X = X - X[:size].mean(0)
            X = X @ torch.linalg.svd(X[:size], full_matrices=False)[2][:20].T
            X = X / X[:size].std()
        self.name, self.d = name, X.shape[-1]
        self.X, self.y, self.T, self.t = X[:size], y[:size], X[size:], y[size:]

    def model(self, m: int = 150, **options: object) -> DualGP:
        kernel = ScaleKernel(MaternKernel(nu=2.5)).double()
        kernel.outputscale, kernel.base_kernel.lengthscale = 4.0, self.d**0.5
        classes = SoftmaxLikelihood(num_classes=10, mixing_weights=False)
        likelihood = classes if self.name == "digits" else BernoulliLikelihood()
        return DualGP(kernel, likelihood, num_inducing=m, **options)

    def score(self, gp: DualGP) -> float:
        with torch.no_grad():
            mean, var = gp.predict(self.T)
        if self.name == "digits":
            return float((mean.argmax(-1) == self.t).double().mean())
        p = mean / (1 + var).sqrt()
        return auroc(p[self.t == 1], p[self.t == 0])

    def refit(self, gp: DualGP, x: Tensor, y: Tensor) -> DualGP:
        new = self.model(len(x))
        new.fit(varied(x), y, learn_inducing=False, progress=False)
        return new


def full(split: Split) -> float:
    gp = split.model(150)
    gp.fit(split.X, split.y, learn_inducing=False, max_rounds=2, progress=False)
    return split.score(gp)


def run(split: Split, label: str, target: float, seed: int) -> tuple[int, float, float]:
    """Labels needed (above CAP if too few), score at 60, seconds per batch."""
    rule, refit = WAYS[label]
    generator = torch.Generator().manual_seed(seed)
    options = {"learn": split.refit, "all_data": True, "diverse": False} if refit else {"shortlist": 300}
    model = split.model(memory=300)
    loop = PoolLoop(model, split.X, rule, stop=Stop(CAP), generator=generator, duplicates=True, **options)
    first = torch.randperm(len(split.X), generator=torch.Generator().manual_seed(seed))[:START]
    loop = loop.tell(first, split.y[first])
    spent, batches, at_60, needed = 0.0, 0, float("nan"), 0
    while True:
        score = split.score(loop.model)
        if len(loop.ids) == 60:
            at_60 = score
        if not needed and score >= target:
            needed = len(loop.ids)
        if loop.done or (needed and len(loop.ids) >= 60):
            return needed or CAP + BATCH, at_60, spent / max(batches, 1)
        begin = time.process_time()
        ids = loop.ask(BATCH)
        loop = loop.tell(ids, split.y[ids])
        spent, batches = spent + time.process_time() - begin, batches + 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1 if SMOKE else 10)
    parser.add_argument("--data", nargs="+", default=["digits", "bank"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines = []
    for name in args.data:
        splits = [Split(name, seed) for seed in range(args.seeds)]
        best = [full(split) for split in splits]
        print(f"# {name}: all data {best}", flush=True)
        for label in WAYS:
            runs = [run(s, label, PART * b, seed) for seed, (s, b) in enumerate(zip(splits, best, strict=True))]
            needed, at_60, spent = zip(*runs, strict=True)
            failed = sum(n > CAP for n in needed)
            cells = [*mean_se(needed, 0), str(failed), *mean_se(at_60, 4)]
            lines.append([name, label, *cells, f"{sum(spent) / len(spent):.2f}", f"{sum(best) / len(best):.4f}"])
            print("#", *lines[-1], flush=True)
    table(f"labels to {PART:.0%}: {args.seeds} seeds; CPU time; torch {torch.__version__}", HEADER, lines)


if __name__ == "__main__":
    main()
