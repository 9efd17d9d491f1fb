"""Learning from batches that do not fit in memory together: form S for the batch, form U for everything else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from dualgp.basis import SiteSum
from dualgp.distributed import ALONE, Ranks
from dualgp.draws import source
from dualgp.duals import dual_parameters
from dualgp.errors import InputError
from dualgp.gp.data import Data, check_alike
from dualgp.gp.hybrid import Anchor, batch_bound
from dualgp.gp.hyper import Hyper
from dualgp.gp.progress import Progress
from dualgp.gp.stop import Stop
from dualgp.posterior import Posterior
from dualgp.sites import Site, Sites

LR = 0.02  # of Adam at the start
MIN_LR = 1e-3
LR_FACTOR = 0.4  # at each plateau
ROUND_STEPS = 50  # at least, in a round


class Batches:
    """Checked batches of (X, y) or (X, y, noise) out of a loader, or of tensors in memory in random order.

    Args:
        loader: anything that can be iterated again and again for tuples of tensors.
        check: turns one tuple into checked `Data`.
    """

    def __init__(self, loader: Iterable[tuple[Tensor, ...]], check: Callable[..., Data]) -> None:
        self.loader, self.check = loader, check

    def __iter__(self) -> Iterator[Data]:
        for batch in self.loader:
            if not isinstance(batch, list | tuple) or len(batch) not in (2, 3):
                raise InputError(
                    f"A loader must give (X, y), or (X, y, noise) for a FixedNoiseGaussianLikelihood; got "
                    f"{type(batch).__name__}{f' of {len(batch)}' if isinstance(batch, list | tuple) else ''}."
                )
            yield self.check(*batch)

    def whole(self) -> Batches:
        """Return what an E-step passes over."""
        return self

    def sample(self, size: int, generator: torch.Generator | None, ranks: Ranks = ALONE) -> tuple[Data, Data, int]:
        """Return `size` data drawn without replacement in one pass, what this rank has of them, and how many there are.

        Each datum draws a key, and the smallest are taken; of several ranks each draws its own.
        """
        if ranks.group is not None:
            generator = _own_generator(generator, ranks)
        kept, keys, n = [], [], 0
        for data in self:
            n += len(data)
            where = source(torch.device("cpu"), generator)
            key = torch.rand(len(data), generator=generator, device=where).cpu()
            kept.append(data)
            keys.append(key)
            if sum(len(d) for d in kept) > 2 * size:  # keep the smallest keys: a uniform sample
                kept, keys = _smallest(kept, keys, size)
        if n == 0:
            raise InputError("The loader gave no data.")
        kept, keys = _smallest(kept, keys, size)
        n = ranks.count(n)
        check_alike(kept[0], ranks)
        last = ranks.cat(keys[0], 0).sort().values[:size][-1]
        share = kept[0].rows((keys[0] <= last).to(kept[0].x.device))
        return gather(share, ranks), share, n


def _own_generator(generator: torch.Generator | None, ranks: Ranks) -> torch.Generator:
    """A generator of this rank's own, seeded by that of rank 0: ranks may all have been given the same seed."""
    where = source(torch.device("cpu"), generator)
    (seed,) = ranks.first(torch.randint(2**31, (), generator=generator, device=where))
    return torch.Generator("cpu").manual_seed(int(seed) + ranks.rank)


def gather(data: Data, ranks: Ranks) -> Data:
    """Return the data of all ranks, in their order; for samples."""
    if ranks.group is None:
        return data
    y = ranks.cat(data.y, -2 if data.targets_multi else -1)
    params = {name: ranks.cat(data.params[name], -1) for name in sorted(data.params)}
    return Data(ranks.cat(data.x, -2), y, data.targets_multi, params)


def _smallest(kept: list[Data], keys: list[Tensor], size: int) -> tuple[list[Data], list[Tensor]]:
    key = torch.cat(keys)
    order = key.argsort()[:size]
    joined = Data.cat(kept)
    return [joined.rows(order.to(joined.x.device))], [key[order]]


class TensorBatches:
    """Tensors in memory cut into batches, in a new random order on every pass."""

    def __init__(self, data: Data, batch_size: int, generator: torch.Generator | None) -> None:
        self.data, self.batch_size, self.generator = data, batch_size, generator

    def whole(self) -> Data:
        """Return what an E-step passes over."""
        return self.data

    def sample(self, size: int, generator: torch.Generator | None, ranks: Ranks = ALONE) -> tuple[Data, Data, int]:
        """Return `size` data drawn without replacement, what this rank has of them, and how many there are in all."""
        return sample_rows(self.data, size, generator, ranks)

    def __iter__(self) -> Iterator[Data]:
        order = self._order(self.generator)
        for start in range(0, len(self.data), self.batch_size):
            yield self.data.rows(order[start : start + self.batch_size])

    def _order(self, generator: torch.Generator | None) -> Tensor:
        return random_rows(len(self.data), len(self.data), generator, self.data.x.device)


def sample_rows(data: Data, size: int, generator: torch.Generator | None, ranks: Ranks) -> tuple[Data, Data, int]:
    """Return `size` data drawn without replacement, what this rank has of them, and how many there are in all.

    They are the data that one process would draw of all, and in its order.
    """
    ends = ranks.cat(torch.tensor([len(data)], device="cpu"), 0).cumsum(0)
    n, start = int(ends[-1]), int(ends[ranks.rank]) - len(data)
    rows = random_rows(n, size, generator, data.x.device)
    (rows,) = ranks.first(rows)
    share = data.rows(rows[(rows >= start) & (rows < start + len(data))] - start)
    if ranks.group is None:
        return share, share, n
    of_rank = torch.searchsorted(ends.to(rows.device), rows, right=True)
    return gather(share, ranks).rows(of_rank.argsort(stable=True).argsort()), share, n


def random_rows(n: int, size: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Return `size` of n row numbers, without replacement."""
    return torch.randperm(n, generator=generator, device=source(device, generator))[:size].to(device)


def learn_by_batches(
    hyper: Hyper,
    batches: Iterable[Data],
    start: Posterior,
    seen: int,
    n: int,
    stop: Stop,
    progress: Progress,
    none: Data,
    ranks: Ranks = ALONE,
) -> tuple[int, bool]:
    """Learn hyperparameters and Z by stochastic gradients; leave `hyper` at the last point.

    In each step the site of what is not in the batch is read on u at the new θ (form U), the batch's sites are found at
    the present q and enter with weight ρ n/b, unbiased, and Adam takes a step on n/b Σ E log p − KL. ρ counts data: a
    running mean over the data seen until an epoch is full, then a window of one epoch. A plateau of the epoch's mean
    bound cuts Adam's rate, and the third such cut ends it. Sites with β < 0 are cut at 0 here, to keep each step a
    Gaussian; the E-step that follows takes them whole.

    Args:
        hyper: changed in place.
        batches: iterated once per epoch.
        start: the posterior of `seen` data drawn at random.
        seen: how many.
        n: all data.
        stop: the stopping rule; an epoch that gains less than its tolerance is a plateau.
        progress: told of every round.
        none: a batch without data, for a rank that is through before the others.
        ranks: the processes that have batches each; a step takes one of every rank, as one batch.

    Returns:
        Rounds taken, and whether the rule was met.
    """
    if not hyper.trained():
        return 0, True
    vector = torch.nn.Parameter(torch.from_numpy(hyper.vector()))  # in natural units, as for L-BFGS
    optimizer = torch.optim.Adam([vector], lr=LR)
    anchor = Anchor.of(start.basis, start.site * (n / seen))
    best, total = -float("inf"), seen
    for done in range(1, stop.max_rounds + 1):
        values, weight, steps = 0.0, 0, 0
        while steps < ROUND_STEPS:  # an epoch, or as many as make a mean worth comparing
            before = steps
            for batch, b in ranks.turns(batches, none):
                total += b
                value, anchor = _step(hyper, vector, optimizer, batch, anchor, max(b / total, b / n), b, n, ranks)
                values, weight, steps = values + b * value, weight + b, steps + 1
            if steps == before:
                raise InputError(
                    "The loader gave no data when read again; give one that can be iterated many times, such as a "
                    "torch DataLoader, not a generator."
                )
        mean = values / weight
        progress.bound(mean, n)
        progress.round(f"batches of {n}")
        if progress.checkpoint is not None:
            progress.checkpoint(hyper, _read(anchor, hyper), n)
        if mean < best + stop.tol * n:
            for group in optimizer.param_groups:
                group["lr"] *= LR_FACTOR
            if optimizer.param_groups[0]["lr"] < MIN_LR:
                return done, True
        best = max(best, mean)
    return stop.max_rounds, False


@torch.no_grad()
def _read(anchor: Anchor, hyper: Hyper) -> Posterior:
    """The posterior at the present hyperparameters and Z."""
    basis = hyper.basis()
    return Posterior(basis, anchor.carry(hyper, basis.expand(hyper.Z.to(hyper.dtype)), basis.L))


def _step(
    hyper: Hyper,
    vector: torch.nn.Parameter,
    optimizer: torch.optim.Optimizer,
    batch: Data,
    anchor: Anchor,
    rho: float,
    b: int,
    n: int,
    ranks: Ranks,
) -> tuple[float, Anchor]:
    """One stochastic E- and M-step; return the batch's estimate of the bound and the new anchor.

    Of a batch of b out of n data, `batch` is what this rank has.
    """
    scale = n / b
    with torch.no_grad():
        basis = hyper.basis()
        Z = basis.expand(hyper.Z.to(hyper.dtype))
        site = anchor.carry(hyper, Z, basis.L)
        q = Posterior(basis, site)
        features = basis.features(batch.x)
        m, v = (q.by_output(t) for t in q.marginals(features))
        duals = dual_parameters(hyper.likelihood, batch.y, m, v, **batch.params)
        beta = duals.beta.clamp_min(0.0)
        sites = Sites(duals.alpha + beta * m, beta, basis.num_outputs is not None) * (rho * scale)
        rest = Anchor.of(basis, site * (1.0 - rho))
        fresh = SiteSum(basis)
        fresh.add(features, *sites.by_latent())
        own = fresh.site()
        after = Anchor.of(basis, rest.site + Site(*ranks.sum(own.lam, own.B)))
    parameters = hyper.trained()
    with torch.enable_grad():
        bound = batch_bound(hyper, batch, sites, rest, scale, ranks)
        found = torch.autograd.grad(bound, parameters, allow_unused=True)
    gradient = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
    value, *gradient = ranks.sum(bound.detach(), *gradient)
    vector.grad = torch.from_numpy(-hyper.vector_gradient(gradient) / n)
    optimizer.step()
    hyper.set_vector(vector.detach().numpy())
    return float(value), after
