"""Bayesian neural networks by the methods of this library and others, on one small problem, with HMC as the reference.

Digits 0 to 7 in their first ten principal components, 600 to train, the others to test; digits 8 and 9 are out of
distribution. A network 10-16-8 (tanh, 312 weights) under the prior N(0, I) and the softmax likelihood: every method
approximates this one posterior, or is an ensemble of its modes. MAP by Adam and L-BFGS. Variational optimisers: 3000
steps in batches of 100; 500 draws, as for the sampled Laplace. HMC: NUTS of Pyro, which is not needed for the rest.
Scores: accuracy, NLL, expected calibration error (15 bins), Brier score (of all classes), AUROC of predictive entropy,
out of distribution against test; CPU seconds of training and posterior, of one thread.

    OMP_NUM_THREADS=1 python benchmarks/bnn_comparison.py
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from classifiers import auroc, brier, entropy, mean_se, scores
from gpytorch.likelihoods import SoftmaxLikelihood
from peers import SMOKE, table
from sklearn.datasets import load_digits
from torch import Tensor, nn

from dualgp import WeightLayout, WeightPosterior, network_gp
from dualgp.errors import NumericalWarning
from dualgp.optim import BSAM, IVON, SampledOptimizer
from dualgp.transfer import fine_tuned, network_curvature, quadratic, replay, temper

try:
    from pyro.infer import MCMC, NUTS
except ImportError:
    MCMC = None

F64, C, LIKELIHOOD = torch.float64, 8, SoftmaxLikelihood(num_classes=8, mixing_weights=False)
DRAWS, WARMUP = (5, 5) if SMOKE else (300, 200)
STEPS = 20 if SMOKE else 3000
VARIATIONAL = {  # the step sizes of the least training objective of those tried on seed 0
    "IVON (variational, diagonal)": partial(
        IVON, lr=1.0, num_data=600, prior_precision=1.0, init_std=0.1, max_std=math.inf, total_steps=STEPS
    ),
    "bSAM": partial(BSAM, lr=0.5, num_data=600, prior_precision=1.0, sam_radius=0.05),
}
HEADER = ["method", "accuracy", "NLL", "ECE", "Brier", "OOD AUROC", "CPU s"]
Data = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Predict = Callable[[Tensor], Tensor]  # inputs to class log-probabilities


def load(seed: int) -> Data:
    X, y = load_digits(return_X_y=True)
    inside = np.random.default_rng(seed).permutation(np.flatnonzero(y < C))
    train, test = inside[:600], inside[600:]
    centre = X[train].mean(0)
    axes = np.linalg.svd(X[train] - centre, full_matrices=False)[2][:10]
    Z = (X - centre) @ axes.T
    Z = torch.from_numpy(Z / Z[train].std(0))
    labels = torch.from_numpy(y)
    return Z[train], labels[train], Z[test], labels[test], Z[torch.from_numpy(y >= C)]


def network(seed: int, dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, C)).double()


def prior(net: nn.Module) -> WeightPosterior:
    return WeightPosterior(WeightLayout.of(net), prior_precision=torch.tensor(1.0, dtype=F64))


def trained(net: nn.Module, X: Tensor, y: Tensor, polish: bool = True) -> nn.Module:
    loss = replay(X, y, LIKELIHOOD) + quadratic(prior(net))
    adam = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(20 if SMOKE else 1500):
        adam.zero_grad()
        loss(net).backward()
        adam.step()
    if polish:
        optimizer = torch.optim.LBFGS(net.parameters(), max_iter=500, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = loss(net)
            value.backward()
            return value

        optimizer.step(closure)
    return net.eval()


@torch.no_grad()
def log_mean(outputs: Tensor) -> Tensor:
    """log of the mean over draws [S, n, C] of softmax."""
    return outputs.log_softmax(-1).logsumexp(0) - math.log(len(outputs))


def sampled(q: WeightPosterior, net: nn.Module) -> Predict:
    return lambda x: log_mean(q.predict_samples(net, x, 500, generator=torch.Generator().manual_seed(0)))


def mode(net: nn.Module) -> Predict:
    def predict(x: Tensor) -> Tensor:
        with torch.no_grad():
            return net(x).log_softmax(-1)

    return predict


def variational(
    net: nn.Module, X: Tensor, y: Tensor, make: Callable[..., SampledOptimizer], seed: int
) -> tuple[nn.Module, WeightPosterior]:
    """A network trained by a variational optimiser in batches of 100, its step decayed to 0 by a cosine."""
    optimizer = make(net.named_parameters(), generator=torch.Generator().manual_seed(seed))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    shuffle = torch.Generator().manual_seed(seed)
    batches = (rows for _ in range(STEPS) for rows in torch.randperm(len(X), generator=shuffle).split(100))
    for _, rows in zip(range(STEPS), batches, strict=False):

        def closure(rows: Tensor = rows) -> Tensor:
            loss = nn.functional.cross_entropy(net(X[rows]), y[rows])
            loss.backward()
            return loss

        optimizer.step(closure)
        schedule.step()
    return net, optimizer.posterior()


def hmc(X: Tensor, y: Tensor, net: nn.Module, seed: int) -> Predict:
    """NUTS in all weights, from the mode."""
    layout, q = WeightLayout.of(net), prior(net)

    def potential(params: dict[str, Tensor]) -> Tensor:
        w = params["w"]
        f = torch.func.functional_call(net, layout.split(w), (X,))
        return nn.functional.cross_entropy(f, y, reduction="sum") + 0.5 * w @ w

    torch.manual_seed(seed)
    kernel = NUTS(potential_fn=potential, max_tree_depth=7, target_accept_prob=0.8)
    start = {"w": layout.join(net.state_dict())}
    mcmc = MCMC(kernel, num_samples=DRAWS, warmup_steps=WARMUP, initial_params=start, disable_progbar=True)
    mcmc.run()
    draws = mcmc.get_samples()["w"]
    assert draws.shape[-1] == q.layout.size
    return lambda x: log_mean(torch.stack([torch.func.functional_call(net, layout.split(w), (x,)) for w in draws]))


def methods(data: Data, seed: int) -> Iterator[tuple[str, float, Predict]]:
    X, y, *_ = data
    clock = time.process_time
    start = clock()
    net = trained(network(seed), X, y)
    fit = clock() - start
    yield "MAP", fit, mode(net)
    for name, options in {
        "linearised Laplace, full (network_gp)": {"structure": "dense"},
        "linearised Laplace, Kronecker": {"structure": "kronecker"},
        "linearised Laplace, diagonal": {"structure": "diagonal"},
        "linearised Laplace, last layer": {"structure": "dense", "params": "last_layer"},
        "sparse function space, M = 40": {"num_inducing": 40},
    }.items():
        start = clock()
        q = network_gp(net, (X, y), LIKELIHOOD, prior_precision=1.0, progress=False, **options)
        yield name, fit + clock() - start, lambda x, q=q: q.predict_likelihood(x).probs.log()
    layout = WeightLayout.of(net)
    start = clock()
    q = fine_tuned(prior(net), layout.join(net.state_dict()), network_curvature(net, X, y, LIKELIHOOD, "dense"))
    spent = fit + clock() - start
    yield "sampled Laplace, full", spent, sampled(q, net)
    yield "sampled Laplace, full, cold T = 1/4", spent, sampled(temper(q, 0.25, "cold"), net)
    for name, make in VARIATIONAL.items():
        start = clock()
        net, q = variational(network(seed), X, y, make, seed)
        yield name, clock() - start, sampled(q, net)
    start = clock()
    members = [trained(network(100 * seed + i + 1), X, y) for i in range(5)]
    yield "deep ensemble of 5", clock() - start, ensemble(members)
    start = clock()
    dropped = trained(network(seed, 0.1), X, y, polish=False).train()
    yield "MC dropout, p = .1", clock() - start, dropout(dropped)
    if MCMC is not None:
        start = clock()
        predict = hmc(X, y, net, seed)
        yield "HMC (NUTS)", clock() - start, predict


def ensemble(members: list[nn.Module]) -> Predict:
    return lambda x: log_mean(torch.stack([m(x).detach() for m in members]))


def dropout(net: nn.Module) -> Predict:
    def predict(x: Tensor) -> Tensor:
        torch.manual_seed(0)
        return log_mean(torch.stack([net(x).detach() for _ in range(100)]))

    return predict


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0] if SMOKE else [0, 1, 2])
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "Weights are drawn", NumericalWarning)  # a small network trains at 0.1
    found: dict[str, list[tuple[float, ...]]] = {}
    for seed in args.seeds:
        data = load(seed)
        _, _, X_test, y_test, X_out = data
        for name, seconds, predict in methods(data, seed):
            log_p = predict(X_test)
            nll, accuracy, ece = scores(log_p, y_test)
            out = auroc(entropy(predict(X_out)), entropy(log_p))
            row = (100 * accuracy, nll, ece, brier(log_p, y_test), out, seconds)
            found.setdefault(name, []).append(row)
            print(f"# {seed} {name}: {[round(v, 4) for v in row]}", flush=True)
    rows = []
    for name, runs in found.items():
        columns = list(zip(*runs, strict=True))
        cells = [" ± ".join(mean_se(v, d)) for v, d in zip(columns[:-1], (2, 4, 4, 4, 4), strict=True)]
        rows.append([name, *cells, f"{np.mean(columns[-1]):.1f}"])
    table(f"digits 0–7, 312 weights, {len(args.seeds)} seeds; torch {torch.__version__}", HEADER, rows)


if __name__ == "__main__":
    main()
