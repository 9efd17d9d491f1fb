"""Streams: `DualGP.update` with and without memory, against its peers and a fit on all data.

Claim: hyperparameters learned in the stream, from GPyTorch's defaults: banana in 4, 8, 40 and 400 batches, sorted or
shuffled, NLPD ≤ .2475 with M = 50; the other data within .03 nat (bank .005) and 2 % of RMSE of the fit on all data.

Data are those of `stream_data`, peers those of `stream_peers`. "fit on all data" holds Z where greedy selection put it
(a stream too chooses Z among its data); "refit" is that fit on all data so far, done five times along the stream.

NLPD and accuracy or RMSE are those of the test data (real targets in units of their standard deviation). "KL to fit" is
the mean KL of the marginals at test inputs to those of the fit on all data; "KL own θ, Z" to the posterior of all data
at the stream's own hyperparameters and Z: what the stream lost of sites alone. Times are per update, median over seeds
of the mean along the stream, of CPU time (`--clock wall` otherwise). "state" is what is kept between batches.

    DUALGP_DATA=… python benchmarks/streams.py banana --batches 4 8 40 400 --inducing 50
    DUALGP_DATA=… python benchmarks/streams.py bank elevators airfoil --batches 50 --inducing 100
    python benchmarks/streams.py keel-banana flights --batches 100 --inducing 100
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from peers import SMOKE, table
from stream_data import BINARY, ORDERS, SOFTMAX, Split, batches, load
from stream_peers import OVC, StreamingSVGP, model, state_bytes, varied
from torch import Tensor

from dualgp import DualGP, log_predictive
from dualgp.errors import ConvergenceWarning, NumericalWarning

HEADER = ["order", "batches", "method", "NLPD", "± se", "score", "± se", "KL to fit", "KL own θ, Z", "ms", "state"]
METHODS = ["dualgp", "leverage", "none", "svgp", "ovc", "refit"]
REFITS = 5


class Row(NamedTuple):
    nlpd: float
    score: float
    kl: float
    own: float
    ms: float
    bytes: float


class Clock:
    cpu = True


def now() -> float:
    return time.process_time() if Clock.cpu else time.perf_counter()


def kl(p: tuple[Tensor, Tensor], q: tuple[Tensor, Tensor]) -> float:
    """Mean over data of the KL of marginals, summed over outputs."""
    (m, v), (mq, vq) = p, q
    each = 0.5 * (v / vq + (m - mq).square() / vq - 1 + (vq / v).log())
    return float((each.sum(-1) if each.ndim > 1 else each).mean())


@torch.no_grad()
def judge(learner: object, split: Split) -> tuple[float, float]:
    """NLPD, and RMSE or accuracy."""
    mean, var = learner.predict(split.X_test)
    nlpd = -float(log_predictive(learner.likelihood, split.y_test, mean, var).mean())
    if split.num_classes == 0:
        return nlpd, float((mean - split.y_test).square().mean().sqrt())
    said = mean.argmax(-1) if split.num_classes > 1 else mean > 0
    return nlpd, float((said == split.y_test).double().mean())


def own_kl(gp: DualGP, split: Split) -> float:
    """KL to the posterior of all data at the hyperparameters and Z that the stream ended with."""
    twin = DualGP(
        copy.deepcopy(gp.kernel), copy.deepcopy(gp.likelihood), inducing_points=gp.inducing_points, jitter=gp.jitter
    )
    twin.fit(varied(split.X), split.y, learn_hyperparameters=False, learn_inducing=False, progress=False)
    with torch.no_grad():
        return kl(gp.predict(split.X_test), twin.predict(split.X_test))


def at(fitted: DualGP, **options: object) -> DualGP:
    """A new model at fitted hyperparameters."""
    return DualGP(copy.deepcopy(fitted.kernel), copy.deepcopy(fitted.likelihood), **options)


def learners(split: Split, fitted: DualGP, args: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """Who takes part, by label; each makes one that has seen nothing."""
    M, memory = args.inducing, args.memory
    every: dict[str, Callable[[], object]] = {
        "dualgp": lambda: model(split, M, memory=memory),
        "leverage": lambda: model(split, M, memory=memory, memory_rule="leverage"),
        "balanced": lambda: model(split, M, memory=memory, memory_rule="balanced"),
        "none": lambda: model(split, M, memory=0),
        "svgp": lambda: StreamingSVGP(model(split, M)),
        "svgp-held": lambda: StreamingSVGP(model(split, M), learn_inducing=False),
        "theta": lambda: at(fitted, num_inducing=M, memory=memory),
    }
    if split.num_classes == 0:
        every["ovc"] = lambda: OVC(lambda m: model(split, m), M, learn=True, cap=args.cap)
        every["ovc-theta"] = lambda: OVC(lambda m: at(fitted, num_inducing=m), M, learn=False, cap=args.cap)
    wanted = [m for name in args.methods for m in ([name, "ovc-theta"] if name == "ovc" else [name])]
    return {LABELS[name]: every[name] for name in wanted if name in every}


LABELS = {
    "dualgp": "dualgp",
    "leverage": "dualgp, leverage",
    "balanced": "dualgp, balanced",
    "none": "dualgp, no memory",
    "svgp": "streaming SVGP",
    "svgp-held": "streaming SVGP, Z at random",
    "theta": "dualgp, θ of the fit",
    "ovc": "OVC, θ of first batch",
    "ovc-theta": "OVC, θ of the fit",
}


def run(
    make: Callable[[], object], parts: list[Tensor], split: Split, target: tuple[Tensor, Tensor], fixed: bool
) -> Row:
    """One learner along one stream."""
    learner = make()
    began = now()
    for part in parts:
        if fixed and isinstance(learner, DualGP):
            learner.update(split.X[part], split.y[part], learn_hyperparameters=False)
        else:
            learner.update(split.X[part], split.y[part])
    ms = 1e3 * (now() - began) / len(parts)
    gp = learner.gp if isinstance(learner, StreamingSVGP) else learner
    own = own_kl(gp, split) if isinstance(gp, DualGP) else float("nan")
    with torch.no_grad():
        distance = kl(learner.predict(split.X_test), target)
    if isinstance(learner, OVC) and learner.stopped:
        print(f"    OVC {learner.stopped} of {len(split.X)} data", file=sys.stderr)
    return Row(*judge(learner, split), distance, own, ms, state_bytes(learner))


def fit(split: Split, args: argparse.Namespace, seed: int, *, learn_inducing: bool = False) -> tuple[DualGP, Row]:
    gp = model(split, min(args.inducing, len(split.X)))
    began = now()
    size = args.fit_batch if len(split.X) > 50_000 else None
    generator = torch.Generator().manual_seed(seed)
    X = varied(split.X)
    gp.fit(X, split.y, learn_inducing=learn_inducing, batch_size=size, generator=generator, progress=False)
    ms = 1e3 * (now() - began)
    kept = 8 * split.X.numel() + 8 * split.y.numel()
    return gp, Row(*judge(gp, split), 0.0, 0.0, ms, state_bytes(gp) + kept)


def refit(split: Split, order: str, args: argparse.Namespace, fitted: tuple[DualGP, Row], seed: int) -> Row:
    """Fits on a fifth, two fifths … of a stream: the median time; the last is the fit on all data."""
    rows = torch.cat(batches(split, order, REFITS, seed))
    times = [fitted[1].ms]
    for k in range(1, REFITS):
        some = rows[: len(rows) * k // REFITS]
        times.append(fit(split._replace(X=split.X[some], y=split.y[some]), args, seed)[1].ms)
    return fitted[1]._replace(ms=statistics.median(times))


Found = dict[tuple[str, str, str], list[Row]]


def note(found: Found, key: tuple[str, str, str], row: Row, seed: int) -> None:
    found.setdefault(key, []).append(row)
    print(f"  seed {seed} {' '.join(key):45s} " + " ".join(f"{v:.4f}" for v in row), file=sys.stderr, flush=True)


def compare(name: str, args: argparse.Namespace) -> None:
    found: Found = {}
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        split = load(name, seed)
        split = split.head(200, 100) if SMOKE else split
        fitted = fit(split, args, seed)
        note(found, ("all", "1", "fit on all data"), fitted[1], seed)
        if args.learn_inducing:
            gp, row = fit(split, args, seed, learn_inducing=True)
            distance = kl(gp.predict(split.X_test), fitted[0].predict(split.X_test))
            note(found, ("all", "1", "fit, Z learned"), row._replace(kl=distance), seed)
        for order in args.orders or ORDERS.get(name, ["sorted", "shuffled"]):
            if order == "sorted" and name == "banana" and seed > 0:
                continue  # its training data are fixed: sorted there is but one stream
            along(found, split, order, fitted, args, seed)
    report(name, split, found, args)


def along(
    found: Found, split: Split, order: str, fitted: tuple[DualGP, Row], args: argparse.Namespace, seed: int
) -> None:
    with torch.no_grad():
        target = fitted[0].predict(split.X_test)
    if "refit" in args.methods and seed == args.first_seed:
        note(found, (order, str(REFITS), "refit"), refit(split, order, args, fitted, seed), seed)
    for count in args.batches:
        parts = batches(split, order, count, seed)
        for label, make in learners(split, fitted[0], args).items():
            row = run(make, parts, split, target, label == LABELS["theta"])
            note(found, (order, str(count), label), row, seed)


def report(name: str, split: Split, found: Found, args: argparse.Namespace) -> None:
    lines = []
    for key, rows in found.items():
        columns = Row(*(list(c) for c in zip(*rows, strict=True)))

        def cells(values: list[float]) -> list[str]:
            se = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
            return [f"{statistics.mean(values):.4f}", f"{se:.4f}"]

        size = statistics.mean(columns.bytes)
        state = f"{size / 1e6:.1f} MB" if size > 1e6 else f"{size / 1e3:.0f} kB"
        ms = statistics.median(columns.ms)
        distances = [f"{statistics.mean(c):.4f}" for c in (columns.kl, columns.own)]
        lines.append([*key, *cells(columns.nlpd), *cells(columns.score), *distances, f"{ms:.0f}", state])
    n, d = split.X.shape
    score = "accuracy" if name in BINARY or name in SOFTMAX else "RMSE"
    memory = "" if args.memory is None else f" memory={args.memory}"
    title = f"{name}: n={n} d={d} M={args.inducing}{memory}, {args.seeds} seeds; score is {score}; ms of "
    table(title + f"{'CPU' if Clock.cpu else 'wall'} time, torch {torch.__version__}", HEADER, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=["breast-cancer"])
    parser.add_argument("--batches", nargs="+", type=int, default=[5] if SMOKE else [5, 50])
    parser.add_argument("--inducing", type=int, default=10 if SMOKE else 50)
    parser.add_argument("--memory", type=int, default=None, help="capacity; dualgp's default if left out")
    parser.add_argument("--seeds", type=int, default=1 if SMOKE else 5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--orders", nargs="+", help="sorted, shuffled, given or tasks; those of the data if left out")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=[*METHODS, "balanced", "svgp-held", "theta"])
    parser.add_argument("--learn-inducing", action="store_true", help="also a fit on all data that learns Z")
    parser.add_argument("--cap", type=int, default=200 if SMOKE else 2000, help="data that OVC takes in, at most")
    parser.add_argument("--fit-batch", type=int, default=2000, help="batch size of fits on more than 50,000 data")
    parser.add_argument("--clock", choices=["cpu", "wall"], default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)
    Clock.cpu = args.clock == "cpu"
    warnings.simplefilter("ignore", NumericalWarning)
    warnings.simplefilter("ignore", ConvergenceWarning)
    for name in args.names:
        compare(name, args)


if __name__ == "__main__":
    main()
