"""Uncertainty of trained classifiers: a network as a dual GP beside its MAP prediction and laplace-torch.

Claim: with M from 5 % of N on and the prior precision tuned by one call on the validation data, never worse than the
network alone by more than .01 NLL; and the best tuned Laplace matched or beaten at every M ≥ 20 %.

Networks and data as in classifiers.py. The prior precision is τ beside a summed loss: untuned, it is that of the
training, Nδ. "evidence" and "validation" choose it: ours by `tuned`, laplace-torch's on a grid of half decades (whole
ones for "full" and "functional", which are refactorised at each), and with its probit link. M = 100 % is all of the
function space, computed as the P weights where these are fewer than N·C (`structure=` "dense" or "full"; exact).
"last layer" is exact in it (`--percent 0`); laplace-torch's functional has M = 20 %. Validation data are those that
stopped the training.

    OMP_NUM_THREADS=1 python benchmarks/network_uncertainty.py digits cancer wine --cache DIR
"""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from classifiers import DELTA, LOADERS, Split, arguments, classifier, load, mean_se, scores
from gpytorch.likelihoods import SoftmaxLikelihood
from peers import SMOKE, table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dualgp import NetworkPosterior, from_weight_decay, network_gp

try:
    import laplace
    from laplace.curvature import BackPackGGN
except ImportError:
    laplace = None

HEADER = ["method", "τ by", "NLL", "± se", "accuracy", "± se", "ECE", "± se", "worst − MAP", "log₁₀ τ", "CPU s"]
PERCENT = (1, 5, 20, 100, 0)
PEERS = {
    "full": {"subset_of_weights": "all", "hessian_structure": "full"},
    "kron": {"subset_of_weights": "all", "hessian_structure": "kron"},
    "diag": {"subset_of_weights": "all", "hessian_structure": "diag"},
    "last layer": {"subset_of_weights": "last_layer", "hessian_structure": "full"},
    "functional": {"subset_of_weights": "all", "hessian_structure": "gp"},
}
Row = tuple[str, str, tuple[float, float, float], float, float]  # method, tuning, scores, τ, seconds


def log_p(q: NetworkPosterior, x: Tensor) -> Tensor:
    return q.predict_likelihood(x).logits.double()


def convert(net: nn.Module, split: Split, percent: int, tau: float, seed: int) -> NetworkPosterior:
    """Return the network as a GP with M of so many per cent; for 0, with its last layer alone, exactly."""
    likelihood = SoftmaxLikelihood(num_classes=split.num_classes, mixing_weights=False)
    options: dict[str, Any] = {"prior_precision": tau, "progress": False}
    if percent == 0:
        options |= {"structure": "dense", "params": "last_layer"}
    elif percent == 100:
        size = sum(p.numel() for p in net.parameters())
        options["structure"] = "dense" if size <= len(split.X) * split.num_classes else "full"
    else:
        options["num_inducing"] = max(1, round(percent / 100 * len(split.X)))
        options["generator"] = torch.Generator().manual_seed(seed)
    return network_gp(net, (split.X, split.y), likelihood, **options)


def ours(net: nn.Module, split: Split, tau: float, seed: int, percents: list[int]) -> Iterator[Row]:
    for percent in percents:
        start = time.process_time()
        q = convert(net, split, percent, tau, seed)
        seconds = time.process_time() - start
        name = f"dualgp M={percent}%" if percent else "dualgp last layer"
        yield name, "untuned", scores(log_p(q, split.X_test), split.y_test), tau, seconds
        data = {"evidence": (), "validation": (split.X_val, split.y_val), "leave_one_out": (split.X, split.y)}
        for method, given in data.items():
            start = time.process_time()
            tuned = q.tuned(method, *given, progress=False)
            seconds = time.process_time() - start
            found = scores(log_p(tuned, split.X_test), split.y_test)
            yield name, method.replace("_", " "), found, float(tuned.prior_precision), seconds


def peer(name: str, net: nn.Module, split: Split, tau: float) -> Iterator[Row]:
    """Rows of one method of laplace-torch, which may break down at some τ; these are not chosen, then."""
    options: dict[str, Any] = {"prior_precision": tau, **PEERS[name]}
    if name == "functional":
        options |= {"n_subset": max(1, len(split.X) // 5), "independent_outputs": False}
    elif name == "full":
        options["backend"] = BackPackGGN
    start = time.process_time()
    la = laplace.Laplace(copy.deepcopy(net), "classification", **options)
    la.fit(DataLoader(TensorDataset(split.X, split.y), batch_size=100))
    kind = "gp" if name == "functional" else "glm"

    @torch.no_grad()
    def predict(x: Tensor) -> Tensor:
        parts = [la(part, pred_type=kind, link_approx="probit") for part in x.split(300)]
        return torch.cat(parts).double().clamp_min(1e-300).log()

    label, seconds = f"laplace-torch {name}", time.process_time() - start
    yield label, "untuned", scores(predict(split.X_test), split.y_test), tau, seconds
    steps = 4 if SMOKE else 9 if name in ("full", "functional") else 21
    grid = torch.logspace(-3, 5, steps) if steps == 9 else torch.logspace(-4, 6, steps)
    start = time.process_time()
    value: dict[str, list[float]] = {"evidence": [], "validation": []}
    for one in grid:
        la.prior_precision = one
        try:
            value["validation"].append(-scores(predict(split.X_val), split.y_val)[0])
            value["evidence"].append(float(la.log_marginal_likelihood()))
        except torch.linalg.LinAlgError as error:
            print(f"# {label} at τ={float(one):.3g}: {error}", flush=True)
            for found in value.values():
                found[len(found) :] = [math.nan] * (len(grid[grid <= one]) - len(found))
    seconds = (time.process_time() - start) / 2
    for method, found in value.items():
        la.prior_precision = grid[int(torch.tensor(found).nan_to_num(nan=-float("inf")).argmax())]
        yield label, method, scores(predict(split.X_test), split.y_test), float(la.prior_precision), seconds


def rows_of(name: str, seed: int, percents: list[int], peers: list[str], cache: Path | None) -> Iterator[Row]:
    split, _ = load(name, seed)
    delta = DELTA[name]
    net = classifier(name, seed, split, delta, cache)
    tau = from_weight_decay(delta, len(split.X))
    with torch.no_grad():
        yield "MAP", "", scores(net(split.X_test).log_softmax(-1), split.y_test), tau, 0.0
    yield from ours(net, split, tau, seed, percents)
    for which in peers if laplace is not None else []:
        yield from peer(which, net, split, tau)


def compare(name: str, seeds: list[int], rows: Callable[[int], Iterator[Row]], missing: list[str]) -> None:
    """Print the table of a data set, and which goals hold."""
    found: dict[tuple[str, str], list[Row]] = {}
    for seed in seeds:
        for row in rows(seed):
            found.setdefault(row[:2], []).append(row)
            print(f"# {name} {seed} {row[0]} {row[1]}: {row[2]} τ={row[3]:.4g} {row[4]:.1f}s", flush=True)
    map_nll = [row[2][0] for row in found["MAP", ""]]
    lines = []
    for key, of in found.items():
        columns = list(zip(*(row[2] for row in of), strict=True))
        worst = max(a - b for a, b in zip(columns[0], map_nll[: len(of)], strict=True))
        tau = torch.tensor([row[3] for row in of]).log10().mean()
        cells = [cell for column in columns for cell in mean_se(column, 4)]
        lines.append([*key, *cells, f"{worst:+.4f}", f"{tau:.1f}", f"{sum(row[4] for row in of) / len(of):.1f}"])
    lines += [[f"laplace-torch {which}", "not installed", *["-"] * (len(HEADER) - 2)] for which in missing]
    split, _ = load(name, seeds[0])
    sizes = f"N={len(split.X)} D={split.X.shape[1]} C={split.num_classes} δ={DELTA[name]}"
    table(f"{name}: {sizes}, {len(seeds)} seeds; torch {torch.__version__}", HEADER, lines)
    goals({key: [row[2][0] for row in of] for key, of in found.items()})


def goals(nll: dict[tuple[str, str], list[float]]) -> None:
    """Print the differences to what each goal names, over seeds."""

    def gap(a: list[float], b: list[float]) -> tuple[float, str]:
        mean, se = mean_se([x - y for x, y in zip(a, b, strict=True)], 4)
        return float(mean), f"{float(mean):+.4f} ± {se}"

    own = {int(k[0][9:-1]): v for k, v in nll.items() if k[0].startswith("dualgp M=") and k[1] == "validation"}
    tuned = {k: v for k, v in nll.items() if k[0].startswith("laplace") and k[1] != "untuned"}
    best = min(tuned, key=lambda k: sum(tuned[k])) if tuned else None
    for percent, value in own.items():
        mean, cell = gap(value, nll["MAP", ""])
        if percent >= 5:
            print(f"M={percent}% by validation − MAP: {cell} (goal ≤ .01: {'held' if mean <= 0.01 else 'MISSED'})")
        if percent >= 20 and best is not None:
            print(f"M={percent}% by validation − {' by '.join(best)}, the best: {gap(value, tuned[best])[1]}")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("names", nargs="*", default=["wine"] if SMOKE else list(LOADERS))
    parser.add_argument("--percent", type=int, nargs="*", default=[5, 20, 0] if SMOKE else list(PERCENT))
    parser.add_argument("--peers", nargs="*", default=list(PEERS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="(laplace|backpack|curvlinops|torch).*")
    for name in args.names:
        missing = args.peers if laplace is None else []
        compare(name, args.seeds, lambda s, name=name: rows_of(name, s, args.percent, args.peers, args.cache), missing)


if __name__ == "__main__":
    main()
