"""Two processes or more with a gloo group between them, and what they are asked to do: each is given its rank first."""

import os
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from gpytorch.likelihoods import BernoulliLikelihood, Likelihood, SoftmaxLikelihood
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from toys import F64, gaussian, matern, rbf

from dualgp import DualGP
from dualgp.distributed import Ranks
from dualgp.errors import NotPositiveDefiniteError
from dualgp.gp import minibatch
from dualgp.gp.bound import site_bound
from dualgp.gp.data import Data
from dualgp.gp.minibatch import Batches, learn_by_batches, sample_rows
from dualgp.gp.progress import Progress
from dualgp.gp.stop import Stop
from dualgp.posterior import Posterior
from dualgp.sites import Sites

SIZE = 2
PATIENCE = 60  # seconds, after which a rank counts as left hanging
START = 300  # seconds that processes may take to import torch side by side


class Pair:
    """`pair(function, *arguments)` runs a function on all ranks and returns what each returned or raised."""

    def __init__(self, size: int = SIZE) -> None:
        context = torch.multiprocessing.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory()
        self.pipes, self.processes, self.alive = [], [], True
        for rank in range(size):
            mine, theirs = context.Pipe()
            args = (rank, size, f"{self.folder.name}/store", theirs)
            process = context.Process(target=_serve, args=args, daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(mine)
            self.processes.append(process)
        for rank, pipe in enumerate(self.pipes):
            assert pipe.poll(START), f"rank {rank} did not start"
            pipe.recv()

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((function, arguments))
        answers = []
        for rank, pipe in enumerate(self.pipes):
            assert pipe.poll(PATIENCE), f"rank {rank} is left hanging"
            try:
                answers.append(pipe.recv())
            except EOFError:
                answers.append(None)
                self.alive = False
        return answers

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.folder.cleanup()


def _serve(rank: int, size: int, store: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=PATIENCE)
    )
    pipe.send("started")
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        warnings.simplefilter("ignore")
        torch.manual_seed(rank)  # of their own: equal results do not come of equal seeds
        try:
            pipe.send(function(rank, *arguments))
        except Exception as error:  # the errors of this package cannot all be pickled with their causes
            pipe.send((type(error).__name__, str(error)))


def problem(kind: str, n: int = 90) -> tuple[Tensor, Tensor]:
    """Inputs [n, 2] and targets of a kind: gaussian, bernoulli or softmax."""
    generator = torch.Generator().manual_seed(7)
    x = 2 * torch.randn(n, 2, generator=generator, dtype=F64)
    f = (1.3 * x[:, 0]).sin() + 0.4 * x[:, 1] + 0.2 * torch.randn(n, generator=generator, dtype=F64)
    if kind == "gaussian":
        return x, f
    return (x, (f > 0.1).double()) if kind == "bernoulli" else (x, (f > -0.4).long() + (f > 0.5).long())


def model(kind: str, **options: Any) -> DualGP:
    likelihood: dict[str, Callable[[], Likelihood]] = {
        "gaussian": gaussian,
        "bernoulli": BernoulliLikelihood,
        "softmax": lambda: SoftmaxLikelihood(num_classes=3, mixing_weights=False),
    }
    return DualGP(rbf(1.1, 1.2), likelihood[kind](), **options)


def share(tensor: Tensor, rank: int, size: int | None = None) -> Tensor:
    """Shares of different sizes, as 1 to 2 (to 3): every third datum, and two of three."""
    size = size or (dist.get_world_size() if dist.is_initialized() else SIZE)
    turn = torch.arange(len(tensor)) % (size * (size + 1) // 2)
    return tensor[(turn >= rank * (rank + 1) // 2) & (turn <= rank * (rank + 3) // 2)]


def in_order(tensor: Tensor, size: int = SIZE) -> Tensor:
    """All data in the order of ranks, as one process has them."""
    return torch.cat([share(tensor, rank, size) for rank in range(size)])


def batches(x: Tensor, y: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(size), y.split(size), strict=True))


def outcome(gp: DualGP, X: Any, y: Tensor | None = None, **options: Any) -> dict[str, Any]:
    """Fit and return what came of it."""
    result = gp.fit(X, y, progress=False, **options)
    state = {name: value for name, value in gp.state_dict().items() if name not in ("lam", "beta")}
    sites = None if gp.lam is None else (gp.lam, gp.beta)
    return {"elbo": result.elbo, "num_data": result.num_data, "rounds": result.rounds, "state": state, "sites": sites}


def fit_tensors(rank: int, kind: str, given: dict[str, Any], options: dict[str, Any], n: int = 90) -> dict[str, Any]:
    x, y = (share(t, rank) for t in problem(kind, n))
    return outcome(model(kind, **given), x, y, process_group=dist.group.WORLD, **options)


def fit_one_sided(rank: int, kind: str, given: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Fit with all data on rank 0."""
    x, y = (t[: 0 if rank else len(t)] for t in problem(kind))
    return outcome(model(kind, **given), x, y, process_group=dist.group.WORLD, **options)


def fit_loader(rank: int, kind: str, given: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    x, y = (share(t, rank) for t in problem(kind))
    return outcome(model(kind, **given), batches(x, y, 20), process_group=dist.group.WORLD, **options)


def fit_sampler(rank: int, given: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    data = TensorDataset(*problem("bernoulli"))
    loader = DataLoader(data, batch_size=20, sampler=DistributedSampler(data, seed=3))
    return outcome(model("bernoulli", **given), loader, process_group=dist.group.WORLD, **options)


def bound(rank: int, kind: str, Z: Tensor, sites: Sites | None) -> tuple[float, list[Tensor]]:
    """`site_bound` of all data at sites that no E-step left."""
    x, y = (share(t, rank) for t in problem(kind))
    hyper = model(kind)._hyper(*(lambda m: (m.kernel, m.mean, m.likelihood))(model(kind)), Z, True, True)
    mine = None if sites is None else Sites(share(sites.lam, rank), share(sites.beta, rank))
    found = site_bound(hyper, Data(x, y, False), mine, Ranks(dist.group.WORLD))
    return found.value, found.gradient


def learn(rank: int, kind: str, Z: Tensor, parts: list[list[Tensor]]) -> tuple[Tensor, int]:
    """Hyperparameters after some epochs, each of the batches in rows that `parts` names for this rank."""
    return learn_on(kind, Z, parts[rank], Ranks(dist.group.WORLD))


def learn_on(kind: str, Z: Tensor, rows: list[Tensor], ranks: Ranks) -> tuple[Tensor, int]:
    data = Data(*problem(kind), False)
    gp = model(kind)
    hyper = gp._hyper(gp.kernel, gp.mean, gp.likelihood, Z, True, True)
    mine = [data.rows(r) for r in rows]
    none = data.rows(slice(0, 0))
    start = Posterior(hyper.basis())
    with mock.patch.object(minibatch, "ROUND_STEPS", 6):
        rounds, _ = learn_by_batches(hyper, mine, start, 10, 90, Stop(1e-4, 2), Progress(False), none, ranks)
    return torch.from_numpy(hyper.vector()), rounds


def sample(rank: int, of_tensors: bool) -> tuple[Tensor, Tensor, int]:
    x, y = (share(t, rank) for t in problem("gaussian"))
    generator = torch.Generator().manual_seed(3)
    ranks = Ranks(dist.group.WORLD)
    if of_tensors:
        found = sample_rows(Data(x, y, False), 40, generator, ranks)
    else:
        loader = Batches(batches(x, y, 7), lambda x, y: Data(x, y, False))
        found = loader.sample(40, generator, ranks)
    return found[0].x, found[1].x, found[2]


def disagree(rank: int, about: str, path: str) -> None:
    """Fit with one thing that rank 1 has otherwise."""
    odd = rank == 1
    x, y = (share(t, rank) for t in problem("gaussian"))
    gp, options = model("gaussian", num_inducing=8), {}
    if about == "columns":
        x = x[:, :1] if odd else x
    elif about == "dtype":
        x = x.float() if odd else x
    elif about == "kernel":
        gp = DualGP(matern() if odd else rbf(), gaussian(), num_inducing=8)
    elif about == "hyperparameters":
        gp = DualGP(rbf(1.0 if odd else 2.0), gaussian(), num_inducing=8)
    elif about == "M":
        gp = model("gaussian", num_inducing=9 if odd else 8)
    elif about == "tol":
        options["tol"] = 1e-3 if odd else 1e-4
    elif about == "memory":
        gp = model("gaussian", num_inducing=8, memory=10)
    elif about == "loader":
        x, y = (batches(x, y, 20), None) if odd else (x, y)
    gp.fit(x, y, process_group=dist.group.WORLD, checkpoint=path, progress=False, **options)


def bad_data(rank: int, path: str) -> None:
    x, y = (share(t, rank) for t in problem("gaussian"))
    if rank == 1:
        y[3] = torch.nan
    model("gaussian", num_inducing=8).fit(x, y, process_group=dist.group.WORLD, checkpoint=path, progress=False)


class Failing:
    """A loader whose rank 1 fails in a pass: it raises, or its process is killed."""

    def __init__(self, rank: int, at: int, kill: bool) -> None:
        self.rank, self.at, self.kill, self.passes = rank, at, kill, 0
        self.data = batches(*(share(t, rank) for t in problem("bernoulli")), 20)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.passes += 1
        for i, batch in enumerate(self.data):
            if self.rank == 1 and self.passes == self.at and i == 1:
                if self.kill:
                    os.kill(os.getpid(), signal.SIGKILL)
                raise OSError("the disk is gone")
            yield batch


def failing_loader(rank: int, at: int, kill: bool, path: str) -> tuple[str, str, bool, bool]:
    """Fit on a loader that fails; return the error, and whether the model is as before."""
    gp = model("bernoulli", num_inducing=8)
    before = {name: value.clone() for name, value in gp.state_dict().items()}
    try:
        gp.fit(Failing(rank, at, kill), process_group=dist.group.WORLD, checkpoint=path, progress=False)
    except Exception as error:
        after = gp.state_dict()
        same = before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
        return type(error).__name__, str(error), same, Path(path).exists()
    raise AssertionError("the fit should have failed")


def one_wall(rank: int) -> list[str]:
    """Not positive definite on one rank, then on both, then on none."""
    ranks, heard = Ranks(dist.group.WORLD), []
    for odd in ([1], [0, 1], []):
        try:
            with ranks.guard():
                if rank in odd:
                    raise NotPositiveDefiniteError(f"no Gaussian on {rank}")
                heard.append(str(float(ranks.sum(torch.ones(()))[0])))
        except NotPositiveDefiniteError as error:
            heard.append(str(error))
    return heard


def different_ways(rank: int, how: str) -> None:
    ranks = Ranks(dist.group.WORLD)
    if how == "methods":
        _ = ranks.count(1) if rank else ranks.sum(torch.ones(2))
    elif how == "sizes":
        ranks.sum(torch.ones(2 + rank))
    else:
        with ranks:
            if rank:
                ranks.sum(torch.ones(2))


def train_ivon(rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Five steps, each rank on its half of a batch: curvature and mean, which all share, and the last draw."""
    from dualgp.optim import IVON

    X = torch.stack([torch.ones(6, dtype=F64), torch.arange(-1.0, 5.0, dtype=F64)], -1)
    y = torch.tensor([0.1, 0.9, 2.2, 2.8, 4.1, 5.2], dtype=F64)
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.zeros(2, dtype=F64))
    settings: dict[str, Any] = {"lr": 0.1, "ess": 6, "weight_decay": 1 / 6, "hess_init": 1.0, "beta2": 0.99}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the noise is wide
        optimizer = IVON([("w", p)], **settings, process_group=dist.group.WORLD)
    rows = slice(3 * rank, 3 * rank + 3)
    draw = p.detach().clone()
    for _ in range(5):
        with optimizer.sampled_params():
            draw = p.detach().clone()
            ((y - X @ p)[rows].square().mean() / 0.5).backward()
        optimizer.step()
    return optimizer.state[p]["hess"].clone(), p.detach().clone(), draw
