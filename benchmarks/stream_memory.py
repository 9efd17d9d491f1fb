"""Where memory pays: four streams that make forgotten sites stale, by rule of memory.

| stream | what makes it hard |
|---|---|
| drift | the function is another one from half way on; judged on the second (`window`, `fade`: the right tools there) |
| hyperparameters | the first batch is a corner where the function looks linear; then it is seen to vary a lot |
| Student-t | 3 degrees of freedom, scale .2: no log-concave likelihood, one datum in ten far off |
| classes | three spirals, one class after the other (softmax) |

All in batches of 20, hyperparameters learned, M = 30, memory of 60, mean ± se over seeds. "fit" is on all data (of the
second half where the function drifts), at the same M with Z held where greedy selection put it.

    python benchmarks/stream_memory.py
    python benchmarks/stream_memory.py drift --seeds 10 --batch 5
"""

from __future__ import annotations

import argparse
import statistics
import sys
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from gpytorch.kernels import MaternKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood, Likelihood, SoftmaxLikelihood, StudentTLikelihood
from peers import SMOKE, table
from torch import Tensor

from dualgp import DualGP
from dualgp.errors import ConvergenceWarning, NumericalWarning


class Task(NamedTuple):
    """A stream in its order, where the data that a fit may use begin, test data (f or labels), and a likelihood."""

    X: Tensor
    y: Tensor
    valid: int
    X_test: Tensor
    y_test: Tensor
    likelihood: Callable[[], Likelihood]


def gaussian() -> Likelihood:
    return GaussianLikelihood().double()


def uniform(n: int, d: int, g: torch.Generator) -> Tensor:
    return torch.rand(n, d, generator=g, dtype=torch.float64) * 4 - 2


def normal(n: int, g: torch.Generator) -> Tensor:
    return torch.randn(n, generator=g, dtype=torch.float64)


def surface(x: Tensor) -> Tensor:
    return (3 * x[:, 0]).sin() + (2 * x[:, 1]).cos()


def drift(n: int, g: torch.Generator) -> Task:
    X, X_test = uniform(n, 2, g), uniform(1000, 2, g)
    half = n // 2
    f = torch.cat([surface(X[:half]), surface(X[half:].flip(-1) + 0.7)])
    y_test = surface(X_test.flip(-1) + 0.7) + 0.2 * normal(1000, g)
    return Task(X, f + 0.2 * normal(n, g), half, X_test, y_test, gaussian)


def hyperparameters(n: int, g: torch.Generator) -> Task:
    X, X_test = uniform(n, 2, g), uniform(1000, 2, g)
    X[:20] = X[:20] * 0.1 + 1.5

    def rough(x: Tensor) -> Tensor:
        return (6 * x[:, 0]).sin() * (3 * x[:, 1]).cos()

    return Task(X, rough(X) + 0.2 * normal(n, g), 0, X_test, rough(X_test) + 0.2 * normal(1000, g), gaussian)


def student(n: int, g: torch.Generator) -> Task:
    def noise(k: int) -> Tensor:
        return 0.2 * normal(k, g) / (sum(normal(k, g).square() for _ in range(3)) / 3.0).sqrt()

    def likelihood() -> Likelihood:
        return StudentTLikelihood().double()

    X, X_test = uniform(n, 2, g), uniform(1000, 2, g)
    X = X[X[:, 0].argsort()]
    return Task(X, surface(X) + noise(n), 0, X_test, surface(X_test) + noise(1000), likelihood)


def classes(n: int, g: torch.Generator) -> Task:
    def spirals(k: int) -> tuple[Tensor, Tensor]:
        label = torch.arange(k) * 3 // k
        r = torch.rand(k, generator=g, dtype=torch.float64)
        angle = 3.0 * r + label * (2 * torch.pi / 3)
        x = 2 * r.unsqueeze(-1) * torch.stack([angle.cos(), angle.sin()], -1)
        return x + 0.15 * torch.randn(k, 2, generator=g, dtype=torch.float64), label

    def likelihood() -> Likelihood:
        return SoftmaxLikelihood(num_classes=3, mixing_weights=False)

    X, y = spirals(n)
    return Task(X, y, 0, *spirals(1000), likelihood)


TASKS = {"drift": drift, "hyperparameters": hyperparameters, "student": student, "classes": classes}


def contenders(name: str, memory: int) -> dict[str, tuple[dict[str, object], float]]:
    """Options of the model and the factor by which it fades before every batch."""
    found: dict[str, tuple[dict[str, object], float]] = {"none": ({"memory": 0}, 1.0)}
    for rule in ("random", "leverage", *(["recency"] if name == "drift" else [])):
        found[rule] = {"memory": memory, "memory_rule": rule}, 1.0
    if name == "classes":
        found["balanced"] = {"memory": memory, "memory_rule": "balanced"}, 1.0
    if name == "drift":
        found["window"] = {"window": memory}, 1.0
        found["fade .8"] = {"memory": 0}, 0.8
    return found


def build(task: Task, m: int, **options: object) -> DualGP:
    return DualGP(ScaleKernel(MaternKernel()).double(), task.likelihood(), num_inducing=m, **options)


@torch.no_grad()
def judge(gp: DualGP, task: Task) -> tuple[float, float]:
    """NLPD, and RMSE or accuracy."""
    mean, _ = gp.predict(task.X_test)
    nlpd = gp.nlpd(task.X_test, task.y_test)
    if mean.ndim > 1:
        return nlpd, float((mean.argmax(-1) == task.y_test).double().mean())
    return nlpd, float((mean - task.y_test).square().mean().sqrt())


def measure(name: str, args: argparse.Namespace) -> list[list[str]]:
    found: dict[str, list[tuple[float, float]]] = {}
    for seed in range(args.seeds):
        task = TASKS[name](args.points, torch.Generator().manual_seed(seed))
        fitted = build(task, args.inducing)
        fitted.fit(task.X[task.valid :], task.y[task.valid :], learn_inducing=False, progress=False)
        found.setdefault("fit", []).append(judge(fitted, task))
        for label, (options, fade) in contenders(name, args.memory).items():
            gp = build(task, args.inducing, **options)
            for k in range(0, len(task.X), args.batch):
                if k and fade < 1.0:
                    gp.fade(fade)
                gp.update(task.X[k : k + args.batch], task.y[k : k + args.batch])
            found.setdefault(label, []).append(judge(gp, task))
        print(
            f"  {name} seed {seed}", {k: tuple(round(x, 4) for x in v[-1]) for k, v in found.items()}, file=sys.stderr
        )
    return [[name, label, *cells(rows)] for label, rows in found.items()]


def cells(rows: list[tuple[float, float]]) -> list[str]:
    out = []
    for values in zip(*rows, strict=True):
        se = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
        out += [f"{statistics.mean(values):.4f}", f"{se:.4f}"]
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=["drift", "hyperparameters", "student"] if SMOKE else [*TASKS])
    parser.add_argument("--points", type=int, default=80 if SMOKE else 400)
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--inducing", type=int, default=10 if SMOKE else 30)
    parser.add_argument("--memory", type=int, default=20 if SMOKE else 60)
    parser.add_argument("--seeds", type=int, default=1 if SMOKE else 5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", NumericalWarning)
    warnings.simplefilter("ignore", ConvergenceWarning)
    lines = [line for name in args.names for line in measure(name, args)]
    sizes = f"n={args.points} batches of {args.batch}, M={args.inducing}, memory={args.memory}, {args.seeds} seeds"
    table(f"{sizes}; torch {torch.__version__}", ["stream", "memory", "NLPD", "± se", "RMSE or acc.", "± se"], lines)


if __name__ == "__main__":
    main()
