"""Where is the maximum of a function seen with noise? Branin and Hartmann-6, query by query.

Targets are standardised by the first data, with noise of standard deviation .1 in those units. 2 D + 2 random points,
then one query after the other, each the maximum of log expected improvement over the best posterior mean at the inputs
so far (BoTorch's `LogExpectedImprovement` and `optimize_acqf`: 4 restarts from 128 points, at most 40 iterations): the
same for every model. The score is the simple regret of the input with the best posterior mean after so many queries, in
units of the standard deviation of the function over its domain. "update" is what a model does with a new datum, "ask"
the maximisation of the acquisition function: the same for all but for what a posterior costs.

- dual: `dualgp.active.learn_more` (M = 100, so that Z holds all data) as a `DualGPModel`
- SingleTaskGP refit: the same kernel, fitted after every query
- OVC: an SVGP of the first data, then `get_fantasy_model`; hyperparameters stay
- random: random inputs, under "dual"

    OMP_NUM_THREADS=1 python benchmarks/bayes_opt.py
"""

from __future__ import annotations

import argparse
import time
import warnings

import gpytorch
import torch
from botorch.acquisition import LogExpectedImprovement
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from botorch.models.gpytorch import GPyTorchModel
from botorch.optim import optimize_acqf
from botorch.test_functions import Branin, Hartmann
from classifiers import mean_se
from gpytorch.kernels import MaternKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood
from gpytorch.means import ConstantMean
from peers import SMOKE, table
from stream_peers import OVC, exactly
from torch import Tensor

from dualgp import DualGP
from dualgp.active import learn_more
from dualgp.interop.botorch import DualGPModel

warnings.filterwarnings("ignore")
FUNCTIONS = {"Branin": (Branin, 30), "Hartmann-6": (Hartmann, 50)}
HEADER = ["function", "model", "at 10", "± se", "at 20", "± se", "at end", "± se", "ms/update", "ms/ask"]


def kernel(d: int) -> ScaleKernel:
    """ARD Matérn-5/2 from a lengthscale of .5 in the unit cube."""
    kernel = ScaleKernel(MaternKernel(nu=2.5, ard_num_dims=d)).double()
    kernel.base_kernel.lengthscale = 0.5
    return kernel


def likelihood() -> GaussianLikelihood:
    likelihood = GaussianLikelihood().double()
    likelihood.noise = 0.05
    return likelihood


class Dual:
    def __init__(self, d: int) -> None:
        self.gp = DualGP(kernel(d), likelihood(), mean=ConstantMean().double(), num_inducing=100, memory=200)

    def update(self, x: Tensor, y: Tensor, new: int) -> None:
        self.gp = learn_more(self.gp, x[-new:], y[-new:])
        self.model = DualGPModel(self.gp)


class SingleTask:
    def __init__(self, d: int) -> None:
        self.d = d

    def update(self, x: Tensor, y: Tensor, new: int) -> None:
        self.model = SingleTaskGP(
            x, y.unsqueeze(-1), covar_module=kernel(self.d), likelihood=likelihood(), outcome_transform=None
        )
        fit_gpytorch_mll(gpytorch.ExactMarginalLogLikelihood(self.model.likelihood, self.model))


class Wrapped(GPyTorchModel):
    """What `get_fantasy_model` returns, as a BoTorch model."""

    num_outputs = 1
    batch_shape = torch.Size()

    def __init__(self, gp: torch.nn.Module) -> None:
        super().__init__()
        self.gp = gp

    def forward(self, x: Tensor) -> gpytorch.distributions.MultivariateNormal:
        return self.gp(x)


class Online(OVC):
    def __init__(self, d: int) -> None:
        super().__init__(lambda m: DualGP(kernel(d), likelihood(), num_inducing=m), 2 * d + 2, learn=True)

    def update(self, x: Tensor, y: Tensor, new: int) -> None:
        super().update(x[-new:], y[-new:])
        self.model = Wrapped(self.gp)


MODELS = {"dual": Dual, "SingleTaskGP refit": SingleTask, "OVC": Online, "random": Dual}


def run(name: str, label: str, seed: int) -> tuple[list[float], float, float]:
    """Regret after each query, seconds per update of the model and per maximisation of the acquisition function."""
    make, queries = FUNCTIONS[name]
    queries = 4 if SMOKE else queries
    problem = make(negate=True).double()
    d, bounds = problem.dim, problem.bounds.double()
    g = torch.Generator().manual_seed(seed)
    spread = problem(
        bounds[0] + (bounds[1] - bounds[0]) * torch.rand(10_000, d, generator=g, dtype=torch.float64)
    ).std()
    unit = torch.stack([torch.zeros(d, dtype=torch.float64), torch.ones(d, dtype=torch.float64)])

    def observe(x: Tensor) -> Tensor:
        f = problem(bounds[0] + (bounds[1] - bounds[0]) * x)
        return f / spread + 0.1 * torch.randn(len(x), generator=g, dtype=torch.float64)

    x = torch.rand(2 * d + 2, d, generator=g, dtype=torch.float64)
    y = observe(x)
    offset = y.mean()
    learner = MODELS[label](d)
    learner.update(x, y - offset, len(x))
    regrets, updating, asking = [], 0.0, 0.0
    for q in range(queries + 1):
        with torch.no_grad(), exactly():
            at = learner.model.posterior(x).mean.squeeze(-1)
        best = bounds[0] + (bounds[1] - bounds[0]) * x[at.argmax()]
        regrets.append(float((problem.optimal_value - problem(best.unsqueeze(0))) / spread))
        if q == queries:
            break
        begin = time.process_time()
        if label == "random":
            new = torch.rand(1, d, generator=g, dtype=torch.float64)
        else:
            torch.manual_seed(1000 * seed + q)
            acquisition = LogExpectedImprovement(learner.model, best_f=float(at.max()))
            options = {"maxiter": 40}
            new, _ = optimize_acqf(acquisition, unit, q=1, num_restarts=4, raw_samples=128, options=options)
        asking += time.process_time() - begin
        x, y = torch.cat([x, new]), torch.cat([y, observe(new)])
        begin = time.process_time()
        learner.update(x, y - offset, 1)
        updating += time.process_time() - begin
    return regrets, updating / queries, asking / queries


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1 if SMOKE else 10)
    parser.add_argument("--functions", nargs="+", default=list(FUNCTIONS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines = []
    for name in args.functions:
        for label in MODELS:
            runs = [run(name, label, seed) for seed in range(args.seeds)]
            regret = torch.tensor([r[0] for r in runs])
            cells = []
            for at in (10, 20, -1):
                cells += mean_se(regret[:, min(at, regret.shape[1] - 1)].tolist(), 4)
            times = [f"{1e3 * sum(r[i] for r in runs) / len(runs):.0f}" for i in (1, 2)]
            lines.append([name, label, *cells, *times])
            print("#", *lines[-1], flush=True)
    table(f"simple regret: {args.seeds} seeds; CPU time; torch {torch.__version__}", HEADER, lines)


if __name__ == "__main__":
    main()
