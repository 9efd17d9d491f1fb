"""Inputs of classes a network has never seen: do they look uncertain? AUROC of the predictive entropy.

Trained on the digits 0 to 4 (settings in classifiers.py), asked about test images of these and all images of the
digits 5 to 9. The score is the entropy of the class probabilities, which are softmaxed once. Rows: the network
alone, and as a dual GP with M inducing inputs; τ untuned (Nδ), by evidence, and by the validation data of digits 0-4.

    OMP_NUM_THREADS=1 python benchmarks/network_ood.py --cache DIR
"""

from __future__ import annotations

import argparse
import time

import torch
from classifiers import DELTA, arguments, auroc, classifier, entropy, load, mean_se, scores
from network_uncertainty import convert, log_p
from peers import SMOKE, table
from torch import Tensor

from dualgp import from_weight_decay

HEADER = ["method", "τ by", "AUROC", "± se", "entropy in", "entropy out", "NLL in", "± se", "log₁₀ τ", "CPU s"]
Row = tuple[float, float, float, float, float, float]  # AUROC, entropy in, out, NLL in, τ, seconds


def judge(inside: Tensor, outside: Tensor, y: Tensor, tau: float, seconds: float) -> Row:
    a, b = entropy(inside), entropy(outside)
    return auroc(b, a), float(a.mean()), float(b.mean()), scores(inside, y)[0], tau, seconds


def rows_of(seed: int, args: argparse.Namespace) -> dict[tuple[str, str], Row]:
    split, outside = load("digits", seed, range(5))
    delta = DELTA["digits"]
    net = classifier("digits", seed, split, delta, args.cache, "-0to4")
    tau = from_weight_decay(delta, len(split.X))
    with torch.no_grad():
        alone = [net(x).double().log_softmax(-1) for x in (split.X_test, outside)]
    found = {("MAP", ""): judge(*alone, split.y_test, tau, 0.0)}
    for percent in args.percent:
        start = time.process_time()
        q = convert(net, split, percent, tau, seed)
        name = f"dualgp M={percent}%"
        chosen = {
            "untuned": q,
            "evidence": q.tuned("evidence"),
            "validation": q.tuned("validation", (split.X_val, split.y_val), progress=False),
        }
        for method, tuned in chosen.items():
            pair = log_p(tuned, split.X_test), log_p(tuned, outside)
            seconds = time.process_time() - start
            found[name, method] = judge(*pair, split.y_test, float(tuned.prior_precision), seconds)
    return found


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--percent", type=int, nargs="*", default=[5] if SMOKE else [1, 5, 20, 100])
    args = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[tuple[str, str], list[Row]] = {}
    for seed in args.seeds:
        for key, row in rows_of(seed, args).items():
            found.setdefault(key, []).append(row)
            print(f"# {seed} {' '.join(key)}: " + " ".join(f"{v:.4f}" for v in row), flush=True)
    lines = []
    for key, rows in found.items():
        columns = list(zip(*rows, strict=True))
        mean = [sum(c) / len(c) for c in columns]
        cells = [*mean_se(columns[0], 4), f"{mean[1]:.3f}", f"{mean[2]:.3f}", *mean_se(columns[3], 4)]
        lines.append([*key, *cells, f"{torch.tensor(columns[4]).log10().mean():.1f}", f"{mean[5]:.1f}"])
    table(f"digits 0-4 in, 5-9 out, {len(args.seeds)} seeds; torch {torch.__version__}", HEADER, lines)


if __name__ == "__main__":
    main()
