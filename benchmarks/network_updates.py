"""New data without retraining: a network trained on the first part of elevators, then given the second.

Claim: `condition` closes at least half of the NLPD gap between the network of the first part and one retrained on both,
and loses nothing on the first part.

D1 has 1200 data, D2 900, in random order or sorted by the first input; 200 and 150 more stop the trainings and give the
noise σ² (the mean squared error there); 1500 random ones test. MLP 2 × 48 (tanh), Adam 1e-3, loss ½(y − f)² averaged +
δ/2 |θ|² with δ = 1e-4. The prior precision is by evidence on D1, and stays; Z is of D1, before D2 comes. Data are
standardised with D1 alone.

    DUALGP_DATA=… OMP_NUM_THREADS=1 python benchmarks/network_updates.py --cache DIR
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from classifiers import arguments, kept, mean_se, mlp, train
from gpytorch.likelihoods import GaussianLikelihood
from peers import SMOKE, table
from torch import Tensor, nn

from dualgp import NetworkPosterior, from_weight_decay, network_gp

SIZES = (60, 10, 45, 10, 100) if SMOKE else (1200, 200, 900, 150, 1500)
DELTA = 1e-4
HEADER = ["order", "model", "NLPD", "± se", "MSE", "± se", "gap", "MSE gap", "NLPD D1", "D1 held out", "CPU s"]
Pair = tuple[Tensor, Tensor]
Row = tuple[float, float, float, float, float]  # NLPD, MSE, NLPD on D1, on held-out data of D1, seconds


class Stream(NamedTuple):
    D1: Pair
    val1: Pair
    D2: Pair
    val2: Pair
    test: Pair


def load(order: str, seed: int) -> Stream:
    rows = torch.from_numpy(np.loadtxt(Path(os.environ["DUALGP_DATA"]) / "elevators.csv.gz", delimiter=",", skiprows=1))
    g = torch.Generator().manual_seed(seed)
    rows = rows[torch.randperm(len(rows), generator=g)[: sum(SIZES)]]
    n1, v1, n2, v2, _ = SIZES
    stream, test = rows[: n1 + v1 + n2 + v2], rows[n1 + v1 + n2 + v2 :]
    if order == "sorted":
        stream = stream[stream[:, 0].argsort(stable=True)]
    first, second = stream[: n1 + v1], stream[n1 + v1 :]
    first, second = (part[torch.randperm(len(part), generator=g)] for part in (first, second))
    mean, sd = first[:n1].mean(0), first[:n1].std(0)
    sd = torch.where(sd > 0, sd, 1.0)
    parts = [((p - mean) / sd).float() for p in (first[:n1], first[n1:], second[:n2], second[n2:], test)]
    return Stream(*((p[:, :-1].contiguous(), p[:, -1].contiguous()) for p in parts))


def joined(a: Pair, b: Pair) -> Pair:
    return torch.cat([a[0], b[0]]), torch.cat([a[1], b[1]])


def network(name: str, data: Pair, validation: Pair, seed: int, cache: Path | None) -> tuple[nn.Module, float, float]:
    """Return a trained network, the noise its validation data have, and the seconds it took (0 from the cache)."""

    def half_mse(f: Tensor, y: Tensor) -> Tensor:
        return 0.5 * (f.squeeze(-1) - y).square().mean()

    def fit(net: nn.Module) -> int:
        options: dict[str, Any] = {"weight_decay": DELTA, "rate": 1e-3, "epochs": 5000, "patience": 200}
        return train(net, data, validation, loss=half_mse, seed=seed, **options)

    start = time.process_time()
    net = kept(cache, name, mlp((data[0].shape[-1], 48, 48, 1), seed), fit)
    seconds = time.process_time() - start
    with torch.no_grad():
        return net, 2.0 * float(half_mse(net(validation[0]), validation[1])), seconds


def convert(net: nn.Module, data: Pair, noise: float, args: argparse.Namespace, seed: int) -> NetworkPosterior:
    likelihood = GaussianLikelihood()
    likelihood.noise = noise
    tau = from_weight_decay(DELTA, len(data[0]), loss_scale=noise)
    generator = torch.Generator().manual_seed(seed)
    options: dict[str, Any] = {"num_inducing": args.inducing, "generator": generator, "progress": False}
    return network_gp(net, data, likelihood, prior_precision=tau, **options)


def judge(predict: Callable[[Tensor], Pair], stream: Stream, seconds: float) -> Row:
    def nlpd(data: Pair) -> float:
        mean, var = predict(data[0])
        return float(-torch.distributions.Normal(mean, var.sqrt()).log_prob(data[1]).mean())

    mse = float((predict(stream.test[0])[0] - stream.test[1]).square().mean())
    return nlpd(stream.test), mse, nlpd(stream.D1), nlpd(stream.val1), seconds


def alone(net: nn.Module, noise: float) -> Callable[[Tensor], Pair]:
    @torch.no_grad()
    def predict(x: Tensor) -> Pair:
        f = net(x).squeeze(-1)
        return f, torch.full_like(f, noise)

    return predict


def gp(q: NetworkPosterior) -> Callable[[Tensor], Pair]:
    def predict(x: Tensor) -> Pair:
        p = q.predict_likelihood(x)
        return p.mean, p.variance

    return predict


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.process_time()
    return work(), time.process_time() - start


def run(order: str, seed: int, args: argparse.Namespace) -> dict[str, Row]:
    s = load(order, seed)
    name = f"elevators-{order}-{seed}"
    net, noise, spent = network(f"{name}-first", s.D1, s.val1, seed, args.cache)
    found = {"network of D1": judge(alone(net, noise), s, spent)}
    before, spent = timed(lambda: convert(net, s.D1, noise, args, seed).tuned("evidence"))
    found["its GP: before"] = judge(gp(before), s, spent)
    after, spent = timed(lambda: before.condition(*s.D2))
    found["after condition(D2)"] = judge(gp(after), s, spent)
    tuned_again, spent = timed(lambda: after.tuned("evidence"))
    found["… and τ by evidence again"] = judge(gp(tuned_again), s, spent)
    both, held = joined(s.D1, s.D2), joined(s.val1, s.val2)
    net, noise, spent = network(f"{name}-both", both, held, seed, args.cache)
    found["network retrained"] = judge(alone(net, noise), s, spent)
    again, more = timed(lambda: convert(net, both, noise, args, seed).tuned("evidence"))
    found["its GP: retrained"] = judge(gp(again), s, spent + more)
    taus = [f"{float(q.prior_precision):.3g}" for q in (before, tuned_again, again)]
    print(f"# {order} {seed}: τ={taus} " + " ".join(f"{k}: {v[0]:.4f}" for k, v in found.items()), flush=True)
    return found


def closed(runs: list[dict[str, Row]], label: str, column: int) -> list[str]:
    """The part of the gap that a model closes: from its kind before to the same kind retrained, of means over seeds."""
    kind = "network" if label.startswith("network") else "its GP:"
    first, last = (
        ("network of D1", "network retrained") if kind == "network" else (f"{kind} before", f"{kind} retrained")
    )
    before, value, after = (sum(r[key][column] for r in runs) / len(runs) for key in (first, label, last))
    return [f"{(before - value) / (before - after):.2f}" if before > after else "no gap"]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--inducing", type=int, default=None, help="M; if left out, what network_gp takes (full)")
    parser.add_argument("--orders", nargs="+", default=["random", "sorted"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    if "DUALGP_DATA" not in os.environ:
        raise SystemExit("Name the folder of elevators.csv.gz in DUALGP_DATA.")
    lines = []
    for order in args.orders:
        runs = [run(order, seed, args) for seed in args.seeds]
        for label in runs[0]:
            columns = list(zip(*(r[label] for r in runs), strict=True))
            cells = [*mean_se(columns[0], 4), *mean_se(columns[1], 4), *closed(runs, label, 0), *closed(runs, label, 1)]
            rest = [f"{sum(columns[i]) / len(runs):.{2 if i == 4 else 4}f}" for i in (2, 3, 4)]
            lines.append([order, label, *cells, *rest])
    what = "Z = D1" if args.inducing is None else f"M={args.inducing}"
    title = f"elevators: N={SIZES[0]}+{SIZES[2]}, P=3313, {what}, {len(args.seeds)} seeds; torch {torch.__version__}"
    table(title, HEADER, lines)


if __name__ == "__main__":
    main()
