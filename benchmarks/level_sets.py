"""Where does a field exceed a level? Hotspots by binomial counts and level sets by binary labels, query by query.

A field is a draw of a Matérn-5/2 process (lengthscale .2, variance 4) on a grid of 20 × 20 in the unit square, so that
the truth is known. "counts": y of 10 trials with log odds f, level f = 1. "labels": y with p = Φ(f), level 0. Ten
random sites, then one query after the other among those not asked yet. The score is the part of the grid whose side of
the level is known rightly, after each query; the mean over seeds and its standard error.

All start from GPyTorch's default hyperparameters and learn them. "straddle" asks where 1.96 σ − |m − level| is greatest
(Bryan et al. 2005), for every model; "reduction" where misclassification of the whole grid is expected to fall most.

- dual: `dualgp.active.learn_more`: a stream (M = 100) that learns hyperparameters each time data grow by a quarter
- dual refit: the same model fitted from the start after every query
- SingleTaskGP refit: BoTorch's, Gaussian, to empirical log odds or labels ±1, fitted after every query
- SVGP refit: GPyTorch's variational process with the true likelihood, Z at all data, 100 steps of Adam (.05) per query
  from where it was
- OVC: an SVGP of the first ten, Gaussian on the same targets as SingleTaskGP, then `get_fantasy_model`

    OMP_NUM_THREADS=1 python benchmarks/level_sets.py
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable

import gpytorch
import torch
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from classifiers import mean_se
from gpytorch.kernels import MaternKernel, ScaleKernel
from gpytorch.likelihoods import BernoulliLikelihood, GaussianLikelihood, Likelihood
from gpytorch.likelihoods.likelihood import _OneDimensionalLikelihood
from peers import SMOKE, SVGP, table
from stream_peers import OVC
from torch import Tensor
from torch.distributions import Binomial

from dualgp import DualGP
from dualgp.active import learn_more
from dualgp.active.scores import score

warnings.filterwarnings("ignore")
SIDE, START, QUERIES, TRIALS = 20, 10, (5 if SMOKE else 60), 10
GRID = torch.cartesian_prod(*[torch.linspace(0, 1, SIDE, dtype=torch.float64)] * 2)
HEADER = ["task", "model", "asks by", "at 20", "± se", "at 40", "± se", "at 70", "± se", "mean", "± se", "ms/query"]


class BinomialLikelihood(_OneDimensionalLikelihood):
    """Counts of `TRIALS` trials with log odds f."""

    def forward(self, f: Tensor, *args: object, **kwargs: object) -> Binomial:
        return Binomial(TRIALS, logits=f)


def kernel() -> ScaleKernel:
    return ScaleKernel(MaternKernel(nu=2.5)).double()


def field(seed: int) -> tuple[Tensor, torch.Generator]:
    g = torch.Generator().manual_seed(seed)
    truth = kernel()
    truth.outputscale, truth.base_kernel.lengthscale = 4.0, 0.2
    with torch.no_grad():
        L = torch.linalg.cholesky(truth(GRID).to_dense() + 1e-8 * torch.eye(len(GRID), dtype=torch.float64))
    return L @ torch.randn(len(GRID), generator=g, dtype=torch.float64), g


class Task:
    """Targets at every site of the grid, drawn once, and what they are for a Gaussian model."""

    def __init__(self, name: str, seed: int) -> None:
        self.f, g = field(seed)
        self.level = 1.0 if name == "counts" else 0.0
        u = torch.rand(len(GRID), TRIALS, generator=g, dtype=torch.float64)
        if name == "counts":
            self.y = (u < torch.sigmoid(self.f).unsqueeze(-1)).double().sum(-1)
            self.real = ((self.y + 0.5) / (TRIALS - self.y + 0.5)).log()
            self.likelihood: Callable[[], Likelihood] = BinomialLikelihood
        else:
            self.y = (u[:, 0] < torch.special.ndtr(self.f)).double()
            self.real, self.likelihood = 2 * self.y - 1, BernoulliLikelihood
        self.start = torch.randperm(len(GRID), generator=g)[:START]
        self.generator = g


class Dual:
    real = False

    def __init__(self, task: Task, refit: bool = False) -> None:
        self.task, self.refit = task, refit
        self.gp = DualGP(kernel(), task.likelihood(), num_inducing=100, memory=200)

    def update(self, x: Tensor, y: Tensor, new: int) -> None:
        if self.refit:
            self.gp = DualGP(kernel(), self.task.likelihood())
            self.gp.fit(x, y, progress=False)
        else:
            self.gp = learn_more(self.gp, x[-new:], y[-new:])

    def predict(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.gp.predict(x)


class SingleTask:
    real = True

    def __init__(self, task: Task) -> None:
        pass

    def update(self, x: Tensor, y: Tensor, new: int) -> None:
        self.model = SingleTaskGP(x, y.unsqueeze(-1), covar_module=kernel(), likelihood=GaussianLikelihood().double())
        fit_gpytorch_mll(gpytorch.ExactMarginalLogLikelihood(self.model.likelihood, self.model))

    def predict(self, x: Tensor) -> tuple[Tensor, Tensor]:
        p = self.model.posterior(x)
        return p.mean.squeeze(-1), p.variance.squeeze(-1)


class Variational:
    real = False

    def __init__(self, task: Task) -> None:
        self.likelihood, self.kernel = task.likelihood(), kernel()

    def update(self, x: Tensor, y: Tensor, new: int) -> None:
        self.model = SVGP(self.kernel, x, natural=False, learn_inducing=False, jitter=1e-6).double()
        mll = gpytorch.mlls.VariationalELBO(self.likelihood, self.model, num_data=len(x))
        adam = torch.optim.Adam(self.model.parameters(), lr=0.05)
        for _ in range(100 if new == 1 else 500):
            adam.zero_grad()
            (-mll(self.model(x), y)).backward()
            adam.step()

    def predict(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found = self.model.eval()(x)
        return found.mean, found.variance


class Online(OVC):
    real = True

    def __init__(self, task: Task) -> None:
        super().__init__(lambda m: DualGP(kernel(), GaussianLikelihood().double(), num_inducing=m), START, learn=True)

    def update(self, x: Tensor, y: Tensor, new: int) -> None:
        super().update(x[-new:], y[-new:])


MODELS: dict[str, tuple[Callable[[Task], object], str]] = {
    "dual": (Dual, "straddle"),
    "dual ": (Dual, "reduction"),
    "dual  ": (Dual, "random"),
    "dual refit": (lambda t: Dual(t, True), "straddle"),
    "SingleTaskGP refit": (SingleTask, "straddle"),
    "SVGP refit": (Variational, "straddle"),
    "OVC": (Online, "straddle"),
}


def ask(model: object, rule: str, task: Task, left: Tensor) -> int:
    if rule == "random":
        return int(left[torch.randint(len(left), (), generator=task.generator)])
    if rule == "reduction":
        return int(left[score(model.gp, GRID[left], rule, targets=GRID, level=task.level).argmax()])
    with torch.no_grad():
        mean, var = model.predict(GRID[left])
    return int(left[(1.96 * var.clamp_min(0).sqrt() - (mean - task.level).abs()).argmax()])


def run(name: str, label: str, seed: int) -> tuple[list[float], float]:
    """Accuracy after the start and each query, and seconds per query."""
    task = Task(name, seed)
    make, rule = MODELS[label]
    model, rows = make(task), task.start
    y = task.real if model.real else task.y
    model.update(GRID[rows], y[rows], len(rows))
    scores, spent = [], 0.0
    for q in range(QUERIES + 1):
        with torch.no_grad():
            mean = model.predict(GRID)[0]
        scores.append(float(((mean > task.level) == (task.f > task.level)).double().mean()))
        if q == QUERIES:
            break
        begin = time.process_time()
        free = torch.ones(len(GRID), dtype=torch.bool)
        free[rows] = False
        rows = torch.cat([rows, torch.tensor([ask(model, rule, task, free.nonzero().squeeze(-1))])])
        model.update(GRID[rows], y[rows], 1)
        spent += time.process_time() - begin
    return scores, spent / QUERIES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1 if SMOKE else 10)
    parser.add_argument("--tasks", nargs="+", default=["counts", "labels"])
    parser.add_argument("--asks", nargs="+", default=["straddle", "reduction", "random"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines = []
    for name in args.tasks:
        for label, (_, rule) in MODELS.items():
            if rule not in args.asks:
                continue
            runs = [run(name, label, seed) for seed in range(args.seeds)]
            curves = torch.tensor([r[0] for r in runs])
            cells = []
            for at in (10, 30, 60):
                cells += mean_se(curves[:, min(at, QUERIES)].tolist(), 4)
            cells += mean_se(curves.mean(-1).tolist(), 4)
            lines.append([name, label.strip(), rule, *cells, f"{1e3 * sum(r[1] for r in runs) / len(runs):.0f}"])
            print("#", *lines[-1], flush=True)
    table(f"level sets: {args.seeds} seeds; CPU time; torch {torch.__version__}", HEADER, lines)


if __name__ == "__main__":
    main()
