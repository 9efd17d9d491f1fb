"""An exact Bernoulli GP at N where no N × N matrix fits, against a sparse one.

Claim: `ExactGP` fits N = 10⁵ data without inducing inputs, in minutes on a CPU and seconds on a GPU, to a bound above
the sparse one's.

Labels are the sign of a smooth function at uniform inputs in the square, one in ten of them flipped; the kernel is a
Matérn-5/2 of fixed hyperparameters. "to 1 %" is the time until the bound is within 1 % of the best bound that any
method here has reached (of its distance from the prior's), all solves included, by the trace of the bound. DualGP has M
inducing inputs chosen by greedy variance. The Gaussian case (`--gaussian`) has GPyTorch's exact GP with its KeOps
kernel as peer: seconds of one evaluation of the marginal likelihood and its gradient, as each of its steps takes, and
of predictions, with RMSE and NLPD. Its tolerances are those of ours; its variances are those of fast_pred_var.

    python benchmarks/exact_bernoulli.py
    python benchmarks/exact_bernoulli.py --device cuda --points 1000000 --rank 1000
    python benchmarks/exact_bernoulli.py --gaussian --points 20000
"""

from __future__ import annotations

import argparse
import resource
import sys

import gpytorch
import torch
from gpytorch.kernels import MaternKernel, ScaleKernel
from gpytorch.likelihoods import BernoulliLikelihood, GaussianLikelihood
from peers import SMOKE, Clock, machine, machine_arguments, table, use
from torch import Tensor

from dualgp import DualGP, ExactGP
from dualgp.basis import InducingBasis
from dualgp.gp import ascent
from dualgp.gp.data import Data
from dualgp.gp.estep import Source, e_step
from dualgp.inducing import greedy_variance
from dualgp.predictive import log_predictive


def draw(n: int, gaussian: bool, seed: int, device: str) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    X = torch.rand(n, 2, generator=g)
    f = 2 * (9 * X[:, 0]).sin() * (7 * X[:, 1]).cos() + (25 * X[:, 0] * X[:, 1]).sin()
    flipped = (f > 0) ^ (torch.rand(n, generator=g) < 0.1)
    y = f + 0.3 * torch.randn(n, generator=g) if gaussian else flipped.float()
    return X.to(device), y.to(device)


def kernel(device: str, lengthscale: float, base: type = MaternKernel) -> ScaleKernel:
    made = ScaleKernel(base(nu=2.5)).to(device)
    made.outputscale, made.base_kernel.lengthscale = 2.0, lengthscale
    return made.requires_grad_(False)


class Trace:
    """The bound against time, noted whenever a search has taken new sites."""

    def __init__(self) -> None:
        self.start, self.points = Clock.now(), []

    def note(self, bound: float) -> None:
        self.points.append((Clock.now() - self.start, bound))
        print(f"    {self.points[-1][0]:.1f} s: {bound:.1f}", file=sys.stderr, flush=True)

    def until(self, level: float) -> str:
        reached = [t for t, bound in self.points if bound >= level]
        return f"{reached[0]:.1f}" if reached else "not reached"


def exact(args: argparse.Namespace, X: Tensor, y: Tensor) -> tuple[ExactGP, Trace]:
    likelihood = GaussianLikelihood() if args.gaussian else BernoulliLikelihood()
    if args.gaussian:
        likelihood.to(X.device).noise = 0.09
    gp = ExactGP(
        kernel(args.device, args.lengthscale), likelihood, rank=args.rank, num_probes=args.probes, tol=args.tol
    )
    trace, step = Trace(), ascent.Search._at

    def noted(self: ascent.Search, *sites: Tensor) -> None:
        step(self, *sites)
        trace.note(self.bound.value)

    ascent.Search._at = noted  # type: ignore[method-assign]
    try:
        gp.fit(X, y, learn_hyperparameters=False, tol=1e-4, progress=False)
    finally:
        ascent.Search._at = step  # type: ignore[method-assign]
    return gp, trace


def sparse(args: argparse.Namespace, X: Tensor, y: Tensor) -> tuple[DualGP, Trace]:
    """A DualGP whose Z is chosen from X; its trace is of E-steps of one pass, of two and so on, from the start each."""
    likelihood = BernoulliLikelihood()
    own, trace = kernel(args.device, args.lengthscale), Trace()
    Z = X[greedy_variance(own, X, args.inducing)]
    chosen = Clock.now() - trace.start
    for passes in range(1, 20):
        trace.start = Clock.now() - chosen
        found = e_step(Source(InducingBasis(own, Z), Data(X, y, False)), likelihood, max_passes=passes, tol=1e-5)
        trace.note(found.elbo)
        if found.converged:
            break
    gp = DualGP(own, likelihood, inducing_points=Z)
    gp.fit(X, y, learn_hyperparameters=False, learn_inducing=False, progress=False)
    return gp, trace


def peer(args: argparse.Namespace, X: Tensor, y: Tensor, X_test: Tensor, y_test: Tensor) -> list[str]:
    """GPyTorch's exact GP with its KeOps kernel, compiled on a few data."""

    class Model(gpytorch.models.ExactGP):
        def __init__(self, x: Tensor, y: Tensor, likelihood: GaussianLikelihood) -> None:
            super().__init__(x, y, likelihood)
            self.mean_module = gpytorch.means.ZeroMean()
            base = gpytorch.kernels.keops.MaternKernel
            self.covar_module = kernel(args.device, args.lengthscale, base).requires_grad_(True)

        def forward(self, x: Tensor) -> gpytorch.distributions.MultivariateNormal:
            return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))

    def run(n: int) -> tuple[list[float], float, tuple[Tensor, Tensor]]:
        likelihood = GaussianLikelihood().to(X.device)
        likelihood.noise = 0.09
        model = Model(X[:n], y[:n], likelihood).to(X.device)
        mll, times = gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, model), [Clock.now()]
        value = mll(model(X[:n]), y[:n])
        value.backward()
        times.append(Clock.now())
        model.eval()
        with torch.no_grad():
            q = model(X_test)
            mean = q.mean
            try:
                var = q.variance
            except TypeError:  # GPyTorch 1.15 asks KeOps's symbolic matrix for its entries
                var = torch.full_like(mean, float("nan"))
        times.append(Clock.now())
        return times, float(value.detach()) * n, (mean, var)

    settings = gpytorch.settings
    with (
        settings.max_preconditioner_size(0),  # pivoted Cholesky asks for a diagonal: TypeError in GPyTorch 1.15
        settings.cg_tolerance(args.tol),
        settings.eval_cg_tolerance(args.tol),
        settings.max_cholesky_size(1),
        settings.fast_pred_var(),
    ):
        run(min(len(X), 1000))
        times, value, found = run(len(X))
    return row("GPyTorch, KeOps", times, value, y_test, *found)


def ours(args: argparse.Namespace, X: Tensor, y: Tensor, X_test: Tensor, y_test: Tensor) -> list[str]:
    """The same of `ExactGP`."""
    times = [Clock.now()]
    gp, _ = exact(args, X, y)
    gp.bound_gradient()
    times.append(Clock.now())
    found = gp.predict(X_test)
    times.append(Clock.now())
    assert gp.result is not None
    return row("ExactGP", times, gp.result.bound.value, y_test, *found)


def row(name: str, times: list[float], value: float, y: Tensor, mean: Tensor, var: Tensor) -> list[str]:
    """Seconds of a marginal likelihood with its gradient, its value, seconds of predictions, and how good they are."""
    likelihood = GaussianLikelihood().to(y.device)
    likelihood.noise = 0.09
    rmse = float((mean - y).square().mean().sqrt())
    nlpd = float(-log_predictive(likelihood, y, mean, var).detach().mean())
    cells = [f"{times[1] - times[0]:.1f}", f"{value:.1f}", f"{times[2] - times[1]:.1f}", f"{rmse:.4f}", f"{nlpd:.4f}"]
    return [name, *cells]


def peak() -> float:
    """GB of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=1000 if SMOKE else 100_000)
    parser.add_argument("--inducing", type=int, default=50 if SMOKE else 1000)
    parser.add_argument("--test", type=int, default=100 if SMOKE else 160)
    parser.add_argument("--rank", type=int, default=50 if SMOKE else 500)
    parser.add_argument("--probes", type=int, default=8)
    parser.add_argument("--tol", type=float, default=1e-3, help="relative residual of the solves")
    parser.add_argument("--lengthscale", type=float, default=0.2)
    parser.add_argument("--gaussian", action="store_true")
    machine_arguments(parser)
    args = parser.parse_args()
    device = use(args)
    X, y = draw(args.points, args.gaussian, 0, args.device)
    X_test, y_test = draw(args.test, args.gaussian, 1, args.device)
    if args.gaussian:
        lines = [f(args, X, y, X_test, y_test) for f in (ours, peer)]
        head = ["", "s: likelihood, gradient", "value", f"s: {len(X_test)} predictions", "RMSE", "NLPD"]
        table(f"Gaussian, N={args.points}, d=2, float32; {machine(device)}; peak {peak():.1f} GB", head, lines)
        return
    methods = {f"ExactGP, rank {args.rank}": exact(args, X, y), f"DualGP, M={args.inducing}": sparse(args, X, y)}
    prior = -len(y) * 0.6931472
    best = max(bound for _, trace in methods.values() for _, bound in trace.points)
    level = best - 0.01 * (best - prior)
    what = f"Bernoulli, N={args.points}, d=2, float32; {machine(device)}"
    fits, lines = [], []
    for name, (gp, trace) in methods.items():
        error = f" ± {gp.result.bound.standard_error:.1f}" if isinstance(gp, ExactGP) else ""
        products = str(gp.result.iterations) if isinstance(gp, ExactGP) else ""
        last, bound = trace.points[-1]
        fits.append([name, trace.until(level), f"{last:.1f}", f"{bound:.1f}{error}", products])
    table(f"Fit: {what}; peak {peak():.1f} GB", ["", "s to 1 %", "s in all", "bound", "iterations"], fits)
    for name, (gp, _) in methods.items():
        start = Clock.now()
        mean, var = gp.predict(X_test)
        seconds = Clock.now() - start
        nlpd = float(-log_predictive(gp.likelihood, y_test, mean, var).detach().mean())
        lines.append([name, f"{nlpd:.4f}", f"{seconds:.1f}"])
    table(f"Predictions: {what}; peak {peak():.1f} GB", ["", "NLPD", f"s for {len(X_test)} predictions"], lines)


if __name__ == "__main__":
    main()
