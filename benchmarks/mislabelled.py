"""Which labels are wrong? Digits with 5 % of the labels flipped to another class at random.

A network 64-50-50-10 (tanh, Adam 1e-3, weight decay 1e-4, 200 epochs at batches of 128, no early stopping: nothing is
held out) on all 1797 digits. Every datum is ranked; precision at k = the number of flipped labels, at k = 20, and the
area under the ROC curve. Seconds are CPU time beyond the one network.

- mislabelled: `network_gp` (structure "kronecker"; prior precision 1 beside the summed loss, and by evidence),
  `leave_one_out`, `mislabelled`
- GP: a `DualGP` (Matérn-5/2, M = 300, hyperparameters learned on 400 of the data) in place of the network
- loss: the training loss of the network
- loss, early: the same after 20 epochs
- confident learning: out-of-sample probabilities by 5 folds (five networks more), ranked by the normalised margin
  p(label) − max p(other), those that confident learning's joint counts as wrong first (Northcutt et al. 2021)

    OMP_NUM_THREADS=1 python benchmarks/mislabelled.py
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable

import torch
from classifiers import auroc, mean_se, mlp
from gpytorch.kernels import MaternKernel, ScaleKernel
from gpytorch.likelihoods import SoftmaxLikelihood
from peers import SMOKE, table
from sklearn.datasets import load_digits
from stream_peers import varied
from torch import Tensor, nn

from dualgp import DualGP, leave_one_out, mislabelled, network_gp

warnings.filterwarnings("ignore")
FLIPPED, EPOCHS, EARLY, FOLDS = 0.05, (20 if SMOKE else 200), (5 if SMOKE else 20), 5
HEADER = ["ranking", "precision at k", "± se", "at 20", "± se", "AUROC", "± se", "CPU s"]


def load(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, labels of which some are wrong, and which."""
    X, y = (torch.as_tensor(t) for t in load_digits(return_X_y=True))
    g = torch.Generator().manual_seed(seed)
    wrong = torch.zeros(len(y), dtype=torch.bool)
    wrong[torch.randperm(len(y), generator=g)[: round(FLIPPED * len(y))]] = True
    shift = torch.randint(1, 10, y.shape, generator=g)
    X = ((X - X.mean(0)) / X.std(0).clamp_min(1e-6)).float()
    return X, torch.where(wrong, (y + shift) % 10, y), wrong


def train(X: Tensor, y: Tensor, seed: int, at: Callable[[int, nn.Module], None] = lambda epoch, net: None) -> nn.Module:
    net = mlp((64, 50, 50, 10), seed)
    adam = torch.optim.Adam(net.parameters(), lr=1e-3, weight_decay=1e-4)
    g = torch.Generator().manual_seed(seed)
    for epoch in range(1, EPOCHS + 1):
        for rows in torch.randperm(len(X), generator=g).split(128):
            adam.zero_grad()
            nn.functional.cross_entropy(net(X[rows]), y[rows]).backward()
            adam.step()
        at(epoch, net)
    return net.eval()


@torch.no_grad()
def loss(net: nn.Module, X: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(net(X), y, reduction="none")


def of_network(X: Tensor, y: Tensor, net: nn.Module, tune: bool) -> Tensor:
    likelihood = SoftmaxLikelihood(num_classes=10, mixing_weights=False)
    q = network_gp(net, (X, y), likelihood, prior_precision=1.0, structure="kronecker")
    q = q.tuned("evidence") if tune else q
    return surprise(leave_one_out(q, X, y, q.sites_at(X, y), likelihood))


def of_process(X: Tensor, y: Tensor, seed: int) -> Tensor:
    kernel = ScaleKernel(MaternKernel(nu=2.5))
    kernel.outputscale, kernel.base_kernel.lengthscale = 4.0, 8.0
    gp = DualGP(kernel, SoftmaxLikelihood(num_classes=10, mixing_weights=False), num_inducing=300)
    X = X[:, X.std(0) > 0.5]  # some pixels hardly vary
    some = torch.randperm(len(X), generator=torch.Generator().manual_seed(seed))[:400]
    small = DualGP(gp.kernel, gp.likelihood, num_inducing=100)
    small.fit(varied(X[some]), y[some], learn_inducing=False, max_rounds=3, progress=False)
    gp.fit(X, y, learn_inducing=False, learn_hyperparameters=False, progress=False)
    return surprise(leave_one_out(gp, X, y, gp.sites, gp.likelihood))


def surprise(left_out: object) -> Tensor:
    """The ranking of `mislabelled`, back in the order of the data."""
    ranking = mislabelled(left_out)
    return torch.empty_like(ranking.surprise).scatter_(0, ranking.indices, ranking.surprise)


def confident(X: Tensor, y: Tensor, seed: int) -> Tensor:
    """Out of sample: the margin, and first the data whose other class is above the mean confidence of that class."""
    p = torch.zeros(len(X), 10)
    for fold in torch.randperm(len(X), generator=torch.Generator().manual_seed(seed)).chunk(FOLDS):
        inside = torch.ones(len(X), dtype=torch.bool)
        inside[fold] = False
        net = train(X[inside], y[inside], seed)
        with torch.no_grad():
            p[fold] = net(X[fold]).softmax(-1)
    own = p.gather(1, y.unsqueeze(-1)).squeeze(-1)
    others = p.scatter(1, y.unsqueeze(-1), 0.0)
    threshold = torch.stack([p[y == c, c].mean() for c in range(10)])
    off_diagonal = (others >= threshold).any(1)
    return others.amax(1) - own + 2.0 * off_diagonal


def run(seed: int) -> dict[str, tuple[float, float, float, float]]:
    X, y, wrong = load(seed)
    early: list[Tensor] = []
    net = train(X, y, seed, lambda epoch, net: early.append(loss(net, X, y)) if epoch == EARLY else None)
    ways: dict[str, Callable[[], Tensor]] = {
        "mislabelled": lambda: of_network(X, y, net, False),
        "mislabelled, evidence": lambda: of_network(X, y, net, True),
        "mislabelled, GP": lambda: of_process(X, y, seed),
        "loss": lambda: loss(net, X, y),
        "loss, early": lambda: early[0],
        "confident learning": lambda: confident(X, y, seed),
    }
    found = {}
    for name, way in ways.items():
        begin = time.process_time()
        rank = way().double()
        spent = time.process_time() - begin
        order = rank.argsort(descending=True)
        k = int(wrong.sum())
        at = [float(wrong[order[:count]].double().mean()) for count in (k, 20)]
        found[name] = (*at, auroc(rank[wrong], rank[~wrong]), spent)
    print(f"# {seed}:", {k: [round(x, 3) for x in v] for k, v in found.items()}, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1 if SMOKE else 5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs = [run(seed) for seed in range(args.seeds)]
    lines = []
    for name in runs[0]:
        columns = list(zip(*(r[name] for r in runs), strict=True))
        cells = [cell for column in columns[:3] for cell in mean_se(column, 4)]
        lines.append([name, *cells, f"{sum(columns[3]) / len(runs):.1f}"])
    table(f"digits, {FLIPPED:.0%} flipped: {args.seeds} seeds; torch {torch.__version__}", HEADER, lines)


if __name__ == "__main__":
    main()
