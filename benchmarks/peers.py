"""What the benchmarks share: data, GPyTorch's SVGP as peer, an accurate full-data ELBO, and tables.

Everyone is judged alike: the ELBO on all data and the NLPD on a test set are computed in float64, with dualgp's
accurate expectations (GPyTorch's log Φ is off by up to 2e-3), and never inside the time that is measured. Peers read
their minibatches from memory, without a DataLoader, and are evaluated after each of the first steps and then whenever
their training time has grown by a tenth; between two evaluations the time is interpolated.

On a machine shared with others use one thread and CPU time (`--threads 1 --clock cpu`): waiting for a thread whose core
is taken can cost a small problem ten times its work, and that is nobody's merit.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import gpytorch
import torch
from gpytorch.kernels import RBFKernel, ScaleKernel
from gpytorch.likelihoods import BernoulliLikelihood, GaussianLikelihood, Likelihood
from gpytorch.variational import CholeskyVariationalDistribution, NaturalVariationalDistribution, VariationalStrategy
from linear_operator.utils.errors import NanError, NotPSDError
from torch import Tensor

from dualgp.duals import expected_log_prob
from dualgp.gp.data import Data
from dualgp.inducing import greedy_variance
from dualgp.posterior import Posterior
from dualgp.predictive import log_predictive

SMOKE = os.environ.get("SMOKE", "") not in ("", "0")
Predict = Callable[[Tensor], tuple[Tensor, Tensor]]

warnings.filterwarnings("ignore", category=DeprecationWarning)
warnings.filterwarnings("ignore", message=".*jitter.*")


@dataclass
class Problem:
    """Training and test data with the hyperparameters that made them (or were learned on them once)."""

    name: str
    X: Tensor
    y: Tensor
    X_test: Tensor
    y_test: Tensor
    lengthscale: float
    outputscale: float
    noise: float | None  # None: binary labels

    def kernel(self, known: bool = True) -> ScaleKernel:
        """A float64 kernel at the known hyperparameters, or at GPyTorch's defaults."""
        kernel = ScaleKernel(RBFKernel(ard_num_dims=self.X.shape[-1])).to(self.X.device, torch.float64)
        if known:
            kernel.outputscale, kernel.base_kernel.lengthscale = self.outputscale, self.lengthscale
        return kernel

    def likelihood(self, known: bool = True) -> Likelihood:
        if self.noise is None:
            return BernoulliLikelihood()
        likelihood = GaussianLikelihood().to(self.X.device, torch.float64)
        if known:
            likelihood.noise = self.noise
        return likelihood

    def data(self) -> Data:
        return Data(self.X, self.y, False)

    def to(self, dtype: torch.dtype) -> Problem:
        moved = copy.copy(self)
        moved.X, moved.y, moved.X_test, moved.y_test = (t.to(dtype) for t in (self.X, self.y, self.X_test, self.y_test))
        return moved

    def random_inducing(self, m: int, seed: int = 0) -> Tensor:
        rows = torch.randperm(len(self.X), generator=torch.Generator().manual_seed(seed))[:m]
        return self.X[rows.to(self.X.device)]

    def greedy_inducing(self, m: int, known: bool = True) -> Tensor:
        return self.X[greedy_variance(self.kernel(known), self.X, m)]


def regression(
    n: int, d: int = 8, *, num_test: int = 2000, lengthscale: float = 4.0, noise: float = 0.04, seed: int = 0
) -> Problem:
    """A draw of a unit-variance RBF Gaussian process (2000 random Fourier features) at standard normal inputs."""
    g = torch.Generator().manual_seed(seed)
    num_features = 2000
    omega = torch.randn(d, num_features, generator=g, dtype=torch.float64) / lengthscale
    phase = 2 * torch.pi * torch.rand(num_features, generator=g, dtype=torch.float64)
    weight = torch.randn(num_features, generator=g, dtype=torch.float64) * (2 / num_features) ** 0.5
    X = torch.randn(n + num_test, d, generator=g, dtype=torch.float64)
    f = torch.cat([(x @ omega + phase).cos() @ weight for x in X.split(4096)])
    y = f + noise**0.5 * torch.randn(len(f), generator=g, dtype=torch.float64)
    return Problem(f"regression n={n} d={d}", X[:n], y[:n], X[n:], y[n:], lengthscale, 1.0, noise)


def banana(n: int = 4770, *, num_test: int = 530, seed: int = 0) -> Problem:
    """Two interleaved crescents in the plane that overlap (Bayes error about a tenth), standardised."""
    g = torch.Generator().manual_seed(seed)
    total = n + num_test
    y = (torch.rand(total, generator=g, dtype=torch.float64) < 0.45).double()
    angle = torch.pi * (torch.rand(total, generator=g, dtype=torch.float64) * 1.3 - 0.15)
    x0 = torch.where(y > 0, 1.0 - angle.cos(), angle.cos())
    x1 = torch.where(y > 0, 0.45 - angle.sin(), angle.sin())
    X = torch.stack([x0, x1], -1) + 0.33 * torch.randn(total, 2, generator=g, dtype=torch.float64)
    X = (X - X.mean(0)) / X.std(0)
    return Problem(f"banana n={n} d=2", X[:n], y[:n], X[n:], y[n:], 1.0, 3.0, None)


def on(problem: Problem, device: str) -> Problem:
    moved = copy.copy(problem)
    moved.X, moved.y, moved.X_test, moved.y_test = (
        t.to(device) for t in (problem.X, problem.y, problem.X_test, problem.y_test)
    )
    return moved


class Clock:
    """Wall time, or CPU time of this process."""

    kind = "wall"

    @classmethod
    def now(cls) -> float:
        return time.process_time() if cls.kind == "cpu" else time.perf_counter()


def machine_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=None, help="of the CPU; torch's default if left out")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: with --threads 1 only")


def use(args: argparse.Namespace) -> torch.device:
    """Apply `machine_arguments` and warm up."""
    if args.clock == "cpu" and (args.threads != 1 or args.device != "cpu"):
        raise SystemExit("--clock cpu measures one thread of a CPU: add --threads 1.")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    Clock.kind = args.clock
    warm_up(torch.device(args.device))
    return torch.device(args.device)


def sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(work: Callable[[], object], device: torch.device, repeats: int = 5, warm: bool = True) -> float:
    """Median seconds of `work`, after one call that is not counted if `warm`."""
    times = []
    for _ in range(repeats + warm):
        sync(device)
        start = Clock.now()
        work()
        sync(device)
        times.append(Clock.now() - start)
    return statistics.median(times[warm:])


@torch.no_grad()
def score(predict: Predict, kl: float, likelihood: Likelihood, problem: Problem) -> tuple[float, float]:
    """ELBO/n on all training data and NLPD on the test set, in float64, from a float64 `predict`."""
    elp = 0.0
    for x, y in zip(problem.X.double().split(8192), problem.y.double().split(8192), strict=True):
        elp += float(expected_log_prob(likelihood, y, *predict(x)).sum())
    nlpd = -log_predictive(likelihood, problem.y_test.double(), *predict(problem.X_test.double())).mean()
    return (elp - kl) / len(problem.X), float(nlpd)


def score_posterior(q: Posterior, likelihood: Likelihood, problem: Problem) -> tuple[float, float]:
    """`score` of a dualgp posterior, its site read on a float64 basis."""
    from dualgp.basis import InducingBasis

    b = q.basis
    basis = InducingBasis(b.kernel, b.inducing_points.double(), b.mean, jitter=b.requested_jitter)
    exact = Posterior(basis, q.site)
    return score(exact.predict, float(exact.kl()), likelihood, problem)


@dataclass
class Trace:
    """(training seconds, ELBO/n, NLPD) after some of the steps; epochs and seconds in all."""

    points: list[tuple[float, float, float]] = field(default_factory=list)
    epochs: float = 0.0
    seconds: float = 0.0
    failure: str = ""

    @property
    def best(self) -> float:
        return max((p[1] for p in self.points), default=-float("inf"))

    @property
    def last_nlpd(self) -> float:
        """NLPD at the best ELBO."""
        return max(self.points, key=lambda p: p[1])[2] if self.points else float("nan")

    def reach(self, target: float) -> tuple[float, float]:
        """(seconds, NLPD) when ELBO/n first is at least `target`; (inf, nan) if never."""
        before: tuple[float, float, float] | None = None
        for point in self.points:
            if point[1] >= target:
                if before is None or not before[1] > -1e6 or point[1] <= before[1]:
                    return point[0], point[2]
                part = (target - before[1]) / (point[1] - before[1])
                return before[0] + part * (point[0] - before[0]), point[2]
            before = point
        return float("inf"), float("nan")


class SVGP(gpytorch.models.ApproximateGP):
    """GPyTorch's whitened SVGP."""

    def __init__(self, kernel: ScaleKernel, Z: Tensor, *, natural: bool, learn_inducing: bool, jitter: float) -> None:
        family = NaturalVariationalDistribution if natural else CholeskyVariationalDistribution
        strategy = VariationalStrategy(
            self, Z.clone(), family(Z.shape[-2]), learn_inducing_locations=learn_inducing, jitter_val=jitter
        )
        super().__init__(strategy)
        self.mean_module = gpytorch.means.ZeroMean()
        self.covar_module = kernel

    def forward(self, x: Tensor) -> gpytorch.distributions.MultivariateNormal:
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))


def svgp(
    problem: Problem,
    Z: Tensor,
    *,
    adam: float | None = None,
    ngd: float | None = None,
    batch_size: int = 1024,
    learn_hyperparameters: bool = False,
    learn_inducing: bool = False,
    cap: float = 60.0,
    stop: float = float("inf"),
    seed: int = 0,
) -> Trace:
    """Train SVGP in the dtype of the problem: Adam on everything, or NGD on q(u) and Adam on the rest.

    Args:
        problem: data and hyperparameters (known ones unless they are learned).
        Z: inducing inputs at the start.
        adam: learning rate of Adam; with `ngd`, for hyperparameters and Z only.
        ngd: learning rate of the natural gradient; None: Adam does it all.
        batch_size: all data if it is at least n.
        learn_hyperparameters: from GPyTorch's defaults.
        learn_inducing: whether Z moves.
        cap: seconds of training, at most.
        stop: stop early at this ELBO/n.
        seed: of the batches.
    """
    dtype, device, n = problem.X.dtype, problem.X.device, len(problem.X)
    torch.manual_seed(seed)

    def build(dtype: torch.dtype) -> tuple[SVGP, Likelihood]:
        jitter = 1e-4 if problem.X.dtype == torch.float32 else 1e-6  # GPyTorch's defaults, the same for the judge
        kernel, likelihood = (f(known=not learn_hyperparameters) for f in (problem.kernel, problem.likelihood))
        model = SVGP(kernel, Z, natural=ngd is not None, learn_inducing=learn_inducing, jitter=jitter)
        return model.to(device, dtype).train(), likelihood.to(device, dtype).train()

    judge, judge_likelihood = build(torch.float64)
    model, likelihood = build(dtype)
    objective = gpytorch.mlls.VariationalELBO(likelihood, model, num_data=n)
    hyper = [*model.hyperparameters(), *likelihood.parameters()]
    if not learn_hyperparameters:
        fixed = {id(p) for p in [*model.covar_module.parameters(), *likelihood.parameters()]}
        for p in [*model.covar_module.parameters(), *likelihood.parameters()]:
            p.requires_grad_(False)
        hyper = [p for p in hyper if id(p) not in fixed]
    optimisers: list[torch.optim.Optimizer] = []
    if ngd is not None:
        optimisers.append(gpytorch.optim.NGD(list(model.variational_parameters()), num_data=n, lr=ngd))
    else:
        hyper = [*model.variational_parameters(), *hyper]
    if hyper:
        assert adam is not None
        optimisers.append(torch.optim.Adam(hyper, lr=adam))

    def predict(x: Tensor) -> tuple[Tensor, Tensor]:
        f = judge(x)
        return f.mean, f.variance

    def evaluate() -> tuple[float, float]:
        judge.load_state_dict(model.state_dict())
        judge_likelihood.load_state_dict(likelihood.state_dict())
        with torch.no_grad():
            predict(problem.X[:2].double())
            return score(predict, float(judge.variational_strategy.kl_divergence()), judge_likelihood, problem)

    trace = Trace()
    order, at, steps, clock, due = torch.arange(n, device=device), n, 0, 0.0, 0.0
    sync(device)
    start = Clock.now()
    try:
        while clock < cap:
            if batch_size >= n:
                x, y = problem.X, problem.y
            else:
                if at >= n:
                    order, at = torch.randperm(n, device=device), 0
                rows = order[at : at + batch_size]
                at += batch_size
                x, y = problem.X[rows], problem.y[rows]
            for optimiser in optimisers:
                optimiser.zero_grad()
            loss = -objective(model(x), y)
            loss.backward()
            for optimiser in optimisers:
                optimiser.step()
            steps += 1
            trace.epochs += len(y) / n
            if steps <= 10 or clock + Clock.now() - start >= due:
                sync(device)
                clock += Clock.now() - start
                due = 1.1 * clock
                trace.points.append((clock, *evaluate()))
                if trace.points[-1][1] >= stop:
                    break
                sync(device)
                start = Clock.now()
    except (NotPSDError, NanError, RuntimeError, ValueError) as error:
        trace.failure = type(error).__name__
    trace.seconds = clock
    return trace


def warm_up(device: torch.device, dtype: torch.dtype = torch.float64) -> None:
    """Run everything once on next to nothing, so that no contender pays for start-up."""
    from dualgp import DualGP

    tiny = on(regression(300, 2, num_test=20), str(device)).to(dtype)
    Z = tiny.random_inducing(20)
    for adam, ngd in ((0.01, None), (None, 0.1)):
        svgp(tiny, Z, adam=adam, ngd=ngd, batch_size=100, cap=0.1)
    DualGP(tiny.kernel(False), tiny.likelihood(False), num_inducing=20).fit(tiny.X, tiny.y)


def seconds(value: float, cap: float) -> str:
    return f">{cap:.3g}" if value == float("inf") else f"{value:.4f}" if value < 0.1 else f"{value:.3g}"


def table(title: str, header: list[str], rows: list[list[str]]) -> None:
    """Print one aligned table."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    print(f"\n{title}")
    for row in [header, ["-" * w for w in widths], *rows]:
        padded = [cell.rjust(w) for cell, w in zip(row, widths, strict=True)]
        print("  ".join([row[0].ljust(widths[0]), *padded[1:]]), flush=True)


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return f"torch {torch.__version__}, {torch.cuda.get_device_name(device)}"
    return f"torch {torch.__version__}, {torch.get_num_threads()} CPU thread(s), {Clock.kind} time"
