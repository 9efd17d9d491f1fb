"""Leave-one-out over 16 prior precisions, against retraining without each datum, the test NLL and 10-fold validation.

Claim: the exact removal f_i − V_i (I − B_iV_i)⁻¹ α_i finds the prior precision that leaving out in truth finds, at the
cost of one prediction; the first-order f_i − V_i α_i, and worse its diagonal diag(V_i), as in released code, do not.

"logistic": breast cancer, standardised on all 569, with bias; 300 training data, all left out in truth. "mlp":
digits/16, 64-16-10 tanh, 300 training data, 30 left out in truth by retraining from the optimum. Both in float64,
trained at each prior precision δ to a gradient of 1e-6 (Newton; L-BFGS), full GGN. NLLs are of point predictions. Times
are CPU seconds over all 16: of the estimates from the trained networks, and of ten trainings at each δ more.

    OMP_NUM_THREADS=1 python benchmarks/leave_one_out.py logistic mlp --cache DIR
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from classifiers import arguments, kept, mlp
from gpytorch.likelihoods import Likelihood, SoftmaxLikelihood
from peers import SMOKE, table
from sklearn.datasets import load_breast_cancer, load_digits
from torch import Tensor, nn

from dualgp import NetworkPosterior, leave_one_out, network_gp
from dualgp.likelihoods import LogitBernoulliLikelihood

DELTAS = torch.logspace(-2, 3, 3 if SMOKE else 16, dtype=torch.float64).tolist()
FOLDS = 10
ESTIMATES = ["removal", "first order", "diag(V), released"]
CURVE = ["δ", "train", "left out in truth", *ESTIMATES, "10-fold", "test", "r removal", "r diag(V)"]
SUMMARY = ["curve", "argmin δ", "test NLL there", "corr. of logs with test", "max |· − truth|", "CPU s"]


class Problem(NamedTuple):
    X: Tensor
    y: Tensor
    X_test: Tensor
    y_test: Tensor
    left: Tensor  # which data are left out in truth
    likelihood: Likelihood
    network: Callable[[], nn.Module]


def logistic() -> Problem:
    X, y = load_breast_cancer(return_X_y=True)
    X = np.concatenate([(X - X.mean(0)) / X.std(0), np.ones((len(X), 1))], 1)
    rows = np.random.default_rng(0).permutation(len(X))
    X, y = torch.tensor(X[rows]), torch.tensor(y[rows]).double()

    def network() -> nn.Module:
        return nn.utils.skip_init(nn.Linear, 31, 1, bias=False, dtype=torch.float64).apply(zero)

    n = 40 if SMOKE else 300
    return Problem(X[:n], y[:n], X[300:], y[300:], torch.arange(n), LogitBernoulliLikelihood(), network)


def zero(module: nn.Module) -> None:
    nn.init.zeros_(module.weight)


def digits() -> Problem:
    X, y = load_digits(return_X_y=True)
    rows = np.random.default_rng(0).permutation(len(X))
    X, y = torch.tensor(X[rows] / 16.0), torch.tensor(y[rows])
    n = 60 if SMOKE else 300
    left = torch.randperm(n, generator=torch.Generator().manual_seed(0))[: 2 if SMOKE else 30]
    likelihood = SoftmaxLikelihood(num_classes=10, mixing_weights=False)
    return Problem(X[:n], y[:n], X[300:], y[300:], left, likelihood, lambda: mlp((64, 16, 10), 0).double())


def nll(f: Tensor, y: Tensor) -> Tensor:
    """−log p(y|f) of each datum: softmax, or logistic for one output."""
    if f.shape[-1] == 1:
        return nn.functional.binary_cross_entropy_with_logits(f.squeeze(-1), y, reduction="none")
    return nn.functional.cross_entropy(f, y, reduction="none")


def fit(net: nn.Module, X: Tensor, y: Tensor, delta: float) -> nn.Module:
    """Minimise Σ nll + δ/2 |θ|², in place: Newton for one layer, L-BFGS until it stands still otherwise."""
    if isinstance(net, nn.Linear):
        for _ in range(50):
            with torch.no_grad():
                p = net(X).squeeze(-1).sigmoid()
                H = (X.mT * (p * (1 - p))) @ X + delta * torch.eye(X.shape[-1], dtype=X.dtype)
                step = torch.linalg.solve(H, X.mT @ (p - y) + delta * net.weight[0])
                net.weight -= step
            if float(step.norm()) < 1e-9:
                break
        return net
    theta = list(net.parameters())
    options = {"tolerance_grad": 1e-6, "tolerance_change": 1e-13, "history_size": 50}
    optimiser = torch.optim.LBFGS(theta, max_iter=20 if SMOKE else 4000, line_search_fn="strong_wolfe", **options)

    def objective() -> Tensor:
        optimiser.zero_grad()
        value = nll(net(X), y).sum() + 0.5 * delta * sum(p.square().sum() for p in theta)
        value.backward()
        return value

    optimiser.step(objective)
    return net


def without(X: Tensor, rows: Tensor) -> Tensor:
    keep = torch.ones(len(X), dtype=torch.bool)
    keep[rows] = False
    return X[keep]


def truth(p: Problem, net: nn.Module, delta: float) -> Tensor:
    """The function at each datum of `left` of a network retrained without it, [m, C]."""
    found = []
    for i in p.left:
        apart = fit(copy.deepcopy(net), without(p.X, i), without(p.y, i), delta)
        found.append(apart(p.X[i : i + 1]).detach())
    return torch.cat(found)


def folds(p: Problem, delta: float) -> float:
    """The mean NLL of 10-fold cross-validation, each trained from the start."""
    total = 0.0
    for rows in torch.arange(len(p.X)).chunk(FOLDS):
        net = fit(p.network(), without(p.X, rows), without(p.y, rows), delta)
        total += float(nll(net(p.X[rows]), p.y[rows]).sum().detach())
    return total / len(p.X)


def remove(p: Problem, net: nn.Module, delta: float) -> tuple[NetworkPosterior, Tensor]:
    """The network as a GP, and by it the function at each datum without it, [n, C]."""
    q = network_gp(net, (p.X, p.y), p.likelihood, prior_precision=delta, structure="dense", progress=False)
    return q, q.leave_one_out(p.X, p.y).mean


def others(p: Problem, q: NetworkPosterior) -> dict[str, Tensor]:
    """The same by the first-order formulas."""
    sites, y = q.sites_at(p.X, p.y), p.y.reshape(-1, 1) if q.num_outputs == 1 else p.y
    first = leave_one_out(q.posterior, p.X, y, sites, p.likelihood, order="first").mean
    f, V = q.posterior.function_blocks(p.X)
    return {"first order": first, "diag(V), released": f - V.diagonal(dim1=-2, dim2=-1) * sites.alpha(f)}


def clocked(spent: dict[str, float], name: str, work: Callable[[], Any]) -> Any:
    start = time.process_time()
    result = work()
    spent[name] = spent.get(name, 0.0) + time.process_time() - start
    return result


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


def sweep(name: str, p: Problem, cache: Path | None) -> tuple[list[list[float]], dict[str, float]]:
    """Return a row of CURVE for each δ, and CPU seconds of each curve."""
    rows, spent = [], {}
    for delta in DELTAS:
        net = kept(cache, f"loo-{name}-{delta:.4g}", p.network(), lambda n, d=delta: str(fit(n, p.X, p.y, d))[:0])
        f = net(p.X).detach()
        true = clocked(spent, "left out in truth", lambda n=net, d=delta: truth(p, n, d))
        q, removed = clocked(spent, "removal", lambda n=net, d=delta: remove(p, n, d))
        found = {"removal": removed, **others(p, q)}
        cv = clocked(spent, "10-fold", lambda d=delta: folds(p, d))
        means = [float(nll(f, p.y).mean()), float(nll(true, p.y[p.left]).mean())]
        means += [float(nll(found[key], p.y).mean()) for key in ESTIMATES]
        shifts = [correlation(found[key][p.left] - f[p.left], true - f[p.left]) for key in ("removal", ESTIMATES[2])]
        on_left = [float(nll(found[key][p.left], p.y[p.left]).mean()) for key in ESTIMATES]
        test = float(nll(net(p.X_test), p.y_test).mean().detach())
        rows.append([delta, *means, cv, test, *shifts, *on_left])
        print(f"# {name} " + " ".join(f"{v:.4f}" for v in rows[-1]), flush=True)
    return rows, spent


def report(name: str, p: Problem, rows: list[list[float]], spent: dict[str, float]) -> None:
    lines = [[f"{row[0]:.3g}", *(f"{v:.4f}" for v in row[1 : len(CURVE)])] for row in rows]
    table(f"{name}: N={len(p.X)}, {len(p.left)} left out in truth; torch {torch.__version__}", CURVE, lines)
    columns = dict(zip(CURVE, torch.tensor(rows, dtype=torch.float64).mT, strict=False))
    on_left = dict(zip(ESTIMATES, torch.tensor(rows, dtype=torch.float64).mT[len(CURVE) :], strict=True))
    test, lines = columns["test"], []
    for curve in ("test", "left out in truth", *ESTIMATES, "10-fold"):
        best = int(columns[curve].argmin())
        error = "-"
        if curve in on_left:  # on the same data as the truth
            error = f"{float((on_left[curve] - columns['left out in truth']).abs().max()):.4f}"
        seconds = spent.get(curve, spent["removal"] if curve in ESTIMATES else 0.0)
        cells = [f"{DELTAS[best]:.3g}", f"{test[best]:.4f}", f"{correlation(columns[curve].log(), test.log()):.3f}"]
        lines.append([curve, *cells, error, f"{seconds:.1f}"])
    table(f"{name}: what each curve chooses", SUMMARY, lines)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("names", nargs="*", default=["logistic", "mlp"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    makers = {"logistic": logistic, "mlp": digits}
    for name in args.names:
        problem = makers[name]()
        report(name, problem, *sweep(name, problem, args.cache))


if __name__ == "__main__":
    main()
