"""Odd and even digits in five tasks, with K inputs remembered: how near to training on all data at once.

Claim: K vectors made of the curvature come nearer than as many data, and than a quadratic of all weights.

Logistic regression on X/16 and a bias, 1200 to train in the pairs 01, 23, …, 597 to test, δ = 1, five shuffles. "Carry"
keeps the posterior of the tasks so far, of dense or diagonal curvature. Replay and K-priors remember K data of all so
far, each with weight N/K, drawn anew after each task from all of them: on a stream a reservoir would do for "random",
and "leverage" would have less to choose from. Compact memory is made of itself and each task's data. Distance:
|w − w_batch| / |w_batch|.

    OMP_NUM_THREADS=1 python benchmarks/continual.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import torch
from classifiers import mean_se, scores
from peers import SMOKE, table
from sklearn.datasets import load_digits
from torch import Tensor, nn

from dualgp import WeightLayout, WeightPosterior
from dualgp.likelihoods import LogitBernoulliLikelihood
from dualgp.sites import add_precisions
from dualgp.transfer import (
    MemorySet,
    Term,
    compact_memory,
    network_curvature,
    quadratic,
    replay,
    select_memory,
    soft_labels,
)

F64, LIKELIHOOD = torch.float64, LogitBernoulliLikelihood()
SIZES = (10,) if SMOKE else (10, 20, 40, 65)
Pair = tuple[Tensor, Tensor]


def linear(theta: Tensor | None = None) -> nn.Linear:
    net = nn.Linear(65, 1, bias=False).double()
    with torch.no_grad():
        net.weight.copy_(torch.zeros(1, 65) if theta is None else theta.view(1, -1))
    return net


LAYOUT = WeightLayout.of(linear())
PRIOR = WeightPosterior(LAYOUT, prior_precision=torch.tensor(1.0, dtype=F64))


def load(seed: int) -> tuple[list[Pair], Pair]:
    X, y = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(X))
    X, y = torch.from_numpy(np.c_[X / 16.0, np.ones(len(X))][order]), torch.from_numpy(y[order])
    label = (y % 2).double().unsqueeze(-1)
    tasks = [(y[:1200] // 2 == t).nonzero().flatten() for t in range(5)]
    return [(X[rows], label[rows]) for rows in tasks], (X[1200:], label[1200:])


def fit(net: nn.Linear, loss: Callable[[nn.Module], Tensor]) -> nn.Linear:
    net = linear(net.weight.detach())
    options = {"max_iter": 1000, "tolerance_grad": 1e-7, "tolerance_change": 0.0, "history_size": 50}
    optimizer = torch.optim.LBFGS(net.parameters(), line_search_fn="strong_wolfe", **options)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(net)
        value.backward()
        return value

    optimizer.step(closure)
    return net


def weights(net: nn.Linear) -> Tensor:
    return net.weight.detach().flatten()


def around(net: nn.Linear, precision: float) -> Term:
    prior = WeightPosterior(LAYOUT, prior_mean=weights(net), prior_precision=torch.tensor(precision, dtype=F64))
    return quadratic(prior)


def carry(tasks: list[Pair], structure: str) -> nn.Linear:
    net, q = linear(), PRIOR
    for x, y in tasks:
        net = fit(net, replay(x, y, LIKELIHOOD) + quadratic(q))
        S = add_precisions(q.precision, network_curvature(net, x, y, LIKELIHOOD, structure))
        q = WeightPosterior(LAYOUT, prior_mean=weights(net), prior_precision=S)
    return net


def remembered(tasks: list[Pair], size: int, rule: str, functions: bool, generator: torch.Generator) -> nn.Linear:
    """Replay, or a K-prior, on data chosen from all so far."""
    net, memory = linear(), None
    for t, (x, y) in enumerate(tasks):
        loss = replay(x, y, LIKELIHOOD)
        if memory is None:
            loss = loss + quadratic(PRIOR)
        elif functions:
            loss = loss + soft_labels(memory, LIKELIHOOD) + around(net, 1.0)
        else:
            loss = loss + replay(memory.x, memory.y, LIKELIHOOD, memory.weights) + quadratic(PRIOR)
        net = fit(net, loss)
        X, Y = (torch.cat(of) for of in zip(*tasks[: t + 1], strict=True))
        with torch.no_grad():
            rows = select_memory(net(X), Y, LIKELIHOOD, size, rule=rule, generator=generator)
        memory = MemorySet.of(net, X[rows], Y[rows], torch.full((len(rows),), len(X) / len(rows), dtype=F64))
    return net


def compact(tasks: list[Pair], size: int, keep_residual: bool) -> nn.Linear:
    net, memory, extra = linear(), None, 0.0
    for x, y in tasks:
        loss = replay(x, y, LIKELIHOOD)
        loss = loss + (
            quadratic(PRIOR) if memory is None else soft_labels(memory, LIKELIHOOD) + around(net, 1.0 + extra)
        )
        net = fit(net, loss)
        new = MemorySet.of(net, x)
        if memory is not None:
            new = MemorySet.of(net, memory.x, weights=memory.weights).join(new)
        found = compact_memory(net, new, LIKELIHOOD, size)
        memory, extra = found.memory, extra + found.residual * keep_residual
    return net


def run(seed: int) -> dict[str, tuple[float, float]]:
    tasks, test = load(seed)
    batch = fit(linear(), replay(*(torch.cat(t) for t in zip(*tasks, strict=True)), LIKELIHOOD) + quadratic(PRIOR))
    nets = {"batch": batch, "carry, dense": carry(tasks, "dense"), "carry, diagonal": carry(tasks, "diagonal")}
    generator = torch.Generator().manual_seed(seed)
    for size in SIZES:
        nets[f"replay, {size}"] = remembered(tasks, size, "random", False, generator)
        nets[f"K-prior, random {size}"] = remembered(tasks, size, "random", True, generator)
        nets[f"K-prior, leverage {size}"] = remembered(tasks, size, "leverage", True, generator)
        nets[f"compact, {size}"] = compact(tasks, size, False)
        nets[f"compact and residual, {size}"] = compact(tasks, size, True)
    found = {}
    for name, net in nets.items():
        with torch.no_grad():
            f = net(test[0])
            _, accuracy, _ = scores(nn.functional.logsigmoid(torch.cat([-f, f], -1)), test[1].long().flatten())
        gap = (weights(net) - weights(batch)).norm() / weights(batch).norm()
        found[name] = (100 * accuracy, float(gap))
    print(f"# {seed}: {found}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0] if SMOKE else [0, 1, 2, 3, 4])
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs = [run(seed) for seed in args.seeds]
    rows = []
    for name in runs[0]:
        accuracy, gap = zip(*(r[name] for r in runs), strict=True)
        rows.append([name, *mean_se(accuracy, 2), *mean_se(gap, 3)])
    header = ["what is kept", "accuracy", "± se", "distance", "± se"]
    table(f"odd/even digits, five tasks, {len(runs)} seeds; torch {torch.__version__}", header, rows)


if __name__ == "__main__":
    main()
