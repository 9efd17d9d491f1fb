"""A loop over a pool, as a value: ask for labels, tell them, until there is no more to learn; stop and go on."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from dualgp.active.batch import Selection, select
from dualgp.active.field import check_candidates
from dualgp.active.scores import RULES, Rule, random
from dualgp.checks import check_tensor
from dualgp.draws import whole_number
from dualgp.errors import InputError, check_count
from dualgp.fingerprints import fingerprints
from dualgp.linalg import first_tensor
from dualgp.selection import check_rule

Learn = Callable[[Any, Tensor, Tensor], Any]
_VERSION = 1


@dataclass(frozen=True)
class Stop:
    """When a loop is done: when the pool is dry, and whichever of these comes first.

    Args:
        budget: that many labels.
        tol: the best score of a round was below it, `patience` rounds one after the other.
        patience: see `tol`.

    Raises:
        InputError: for a budget or patience below 1, or a tol that is no number.
    """

    budget: int | None = None
    tol: float | None = None
    patience: int = 3

    def __post_init__(self) -> None:
        check_count("patience", self.patience, 1)
        if self.tol is not None and not (isinstance(self.tol, float | int) and math.isfinite(self.tol)):
            raise InputError(f"tol must be a finite number, got {self.tol!r}.")
        if self.budget is not None:
            check_count("budget", self.budget, 1)


def learn_more(model: Any, x: Tensor, y: Tensor, *, growth: float | int = 1.25) -> Any:
    """Return the model given more data: `update` of a copy of a `DualGP`, `condition` of a `NetworkPosterior`.

    Hyperparameters of a `DualGP` are learned once its data have grown by a quarter since, so that n queries learn them
    O(log n) times: what costs most is what changes least.

    Args:
        model: either.
        x: new inputs.
        y: their labels.
        growth: the factor; 1 learns them every time.

    Raises:
        InputError: if growth is below 1; and as the model does.
    """
    if not growth >= 1:
        raise InputError(f"growth is a factor of at least 1, got {growth}.")
    if not hasattr(model, "update"):
        if not hasattr(model, "condition"):
            raise InputError(f"Expected a DualGP or a NetworkPosterior, got {type(model).__name__}: say learn=.")
        return model.condition(x, y)
    model = copy.deepcopy(model)
    seen = 0 if model.num_seen is None else int(model.num_seen)
    model.update(x, y, learn_hyperparameters=_step(seen + len(x), growth) > _step(seen, growth))
    return model


def _step(count: int, growth: float | int) -> int:
    """How many times so many data have grown by the factor."""
    return count if growth == 1 else math.floor(math.log(count, growth) + 1e-9) if count else -1


class PoolLoop:
    """Active learning on a pool: `ask` says which to label, `tell` takes the labels and returns the next loop.

    A value: the loop you had still is what it was, and the model you gave is untouched. What it would draw depends on
    how many rounds there were and on nothing else, so that a loop that was stopped goes on as if it had not been.

    Args:
        model: a `DualGP` (never fitted, if the first labels come by `tell`) or a `NetworkPosterior`; or anything that
            `learn` takes.
        pool: inputs without labels, [n, D] or [n, *input_shape].
        rule: as in `score`.
        stop: when it is done.
        learn: (model, x, y) ↦ the model given these data too; `learn_more` if None. To refit, have it return a model
            fitted to what it is given, with `all_data`.
        all_data: whether `learn` is given all labelled data of the pool rather than those of the round.
        diverse: as in `select`.
        shortlist: as in `select`.
        targets: as in `score`.
        level: as in `score`.
        duplicates: whether the pool may hold the same row twice.
        generator: source of its seed; seed 0 if None.

    Raises:
        InputError: for a pool that is not finite, empty or holds rows twice; or an unknown rule.

    Example:
        >>> import gpytorch
        >>> from dualgp import DualGP
        >>> x = torch.linspace(-3, 3, 61).unsqueeze(-1)
        >>> y = x.sin().squeeze(-1)
        >>> gp = DualGP(gpytorch.kernels.RBFKernel(), gpytorch.likelihoods.GaussianLikelihood(), num_inducing=12)
        >>> loop = PoolLoop(gp, x, stop=Stop(budget=13)).tell([0, 30, 60], y[[0, 30, 60]])
        >>> while not loop.done:
        ...     ids = loop.ask(2)
        ...     loop = loop.tell(ids, y[ids])
        >>> len(loop.ids), bool((loop.model.predict(x)[0] - y).abs().max() < 0.3), loop.why
        (13, True, 'the budget of 13 labels is spent')
    """

    def __init__(
        self,
        model: Any,
        pool: Tensor,
        rule: str | Rule = "bald",
        *,
        stop: Stop | None = None,
        learn: Learn | None = None,
        all_data: bool = False,
        diverse: bool = True,
        shortlist: int | None = None,
        targets: Tensor | None = None,
        level: float | None = None,
        duplicates: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        check_candidates(pool, "The pool")
        if not duplicates:
            _check_distinct(pool)
        self.pool, self.model, self.rule = pool, model, check_rule(rule, RULES)
        self.stop = Stop() if stop is None else stop
        self._learn, self._all_data = learn or learn_more, all_data
        self._options: dict[str, Any] = {"diverse": diverse, "shortlist": shortlist, "targets": targets, "level": level}
        self._start = model
        self._seed = 0 if generator is None else whole_number(1 << 62, generator)
        self._rounds: tuple[_Round, ...] = ()
        self._asked: Selection | None = None

    @property
    def ids(self) -> Int[Tensor, "k"]:
        """Which rows of the pool are labelled, in the order they were told."""
        return torch.cat([torch.zeros(0, dtype=torch.long, device="cpu"), *(r.ids for r in self._rounds)])

    @property
    def y(self) -> Tensor | None:
        """Their labels; None before the first."""
        return torch.cat([r.y for r in self._rounds]) if self._rounds else None

    @property
    def left(self) -> Int[Tensor, "m"]:
        """Which rows are not labelled, in ascending order."""
        free = torch.ones(len(self.pool), dtype=torch.bool, device="cpu")
        free[self.ids] = False
        return free.nonzero().squeeze(-1)

    @property
    def best(self) -> Float[Tensor, "r"]:
        """The best score of each round, when it was asked for; NaN where labels came unasked."""
        return torch.tensor([r.best for r in self._rounds], dtype=torch.float64, device="cpu")

    @property
    def why(self) -> str | None:
        """Why the loop is done; None if it is not."""
        stop, told = self.stop, len(self.ids)
        if told == len(self.pool):
            return f"the pool is dry: all {told} are labelled"
        if stop.budget is not None and told >= stop.budget:
            return f"the budget of {stop.budget} labels is spent"
        last = self.best[-stop.patience :]
        if stop.tol is not None and len(last) == stop.patience and bool((last < stop.tol).all()):
            return f"the best score was below {stop.tol:g} for {stop.patience} rounds"
        return None

    @property
    def done(self) -> bool:
        """Whether the pool is dry or the stopping rule is met."""
        return self.why is not None

    def ask(self, count: int = 1) -> Int[Tensor, "k"]:
        """Return the rows of the pool to label next; the same ones until they are told.

        Raises:
            InputError: if fewer are left.
            NotFittedError: if the model knows no datum yet, unless the rule is "random".
        """
        return self._select(count).indices

    def tell(self, ids: Int[Tensor, "k"] | Sequence[int], y: Tensor) -> PoolLoop:
        """Return the loop that knows these labels; they need not be those that were asked for.

        Raises:
            InputError: for a row that there is not, is labelled already or comes twice, or labels that do not fit.
        """
        ids = _as_rows(ids)
        self._check(ids, y)
        asked = self._asked
        told = asked is not None and torch.equal(asked.indices.cpu(), ids)
        best = float(asked.scores.max()) if asked is not None and told else float("nan")
        return self._with(_Round(ids, y, best))

    def run(self, label: Callable[[Tensor], Tensor], count: int = 1, *, progress: bool | None = None) -> PoolLoop:
        """Return the loop when it is done, labels given by a function of rows of the pool; with a progress bar.

        Args:
            label: rows [k] ↦ labels.
            count: how many are asked for in a round; the last one may have fewer.
            progress: whether to show a bar; None shows one if standard error is a terminal.

        Raises:
            InputError: as `ask` and `tell`. The loop so far is then lost: to keep it, write the `while` of the example.
        """
        check_count("count", count, 1)
        loop, limit = self, min(self.stop.budget or len(self.pool), len(self.pool))
        with tqdm(
            total=limit,
            initial=len(self.ids),
            desc="label",
            unit="label",
            disable=None if progress is None else not progress,
        ) as bar:
            while not loop.done:
                ids = loop.ask(min(count, limit - len(loop.ids)))
                loop = loop.tell(ids, label(ids))
                bar.set_postfix_str(f"best score {float(loop.best[-1]):.3g}", refresh=False)
                bar.update(len(ids))
        return loop

    def state_dict(self) -> dict[str, Any]:
        """Return what a loop needs to go on, tensors and numbers only: seed, rows, labels, rounds and scores."""
        return {
            "version": _VERSION,
            "size": len(self.pool),
            "pool": int(fingerprints(self.pool.reshape(1, -1))),
            "seed": self._seed,
            "ids": self.ids,
            "y": self.y,
            "rounds": [len(r.ids) for r in self._rounds],
            "best": self.best,
        }

    def load_state_dict(self, state: dict[str, Any]) -> PoolLoop:
        """Return the loop that was saved, of the same model, pool and settings as this new one: it learns anew.

        Raises:
            InputError: if the state is not of this pool or is damaged, or this loop has been told labels.
        """
        if self._rounds:
            raise InputError("This loop has been told labels already; load into a new one.")
        mine = self.state_dict()
        if not isinstance(state, dict) or state.keys() != mine.keys():
            raise InputError(f"Expected what state_dict returned, with {sorted(mine)}; got another thing.")
        if (state["version"], state["size"]) != (_VERSION, len(self.pool)):
            raise InputError(
                f"Expected the state of a loop over {len(self.pool)} rows (version {_VERSION}), got one over "
                f"{state['size']} (version {state['version']})."
            )
        if state["pool"] != mine["pool"]:
            raise InputError("The state is of a loop over another pool: give this one the rows of that one, in order.")
        loop, rounds = copy.copy(self), state["rounds"]
        loop._seed = state["seed"]
        told = 0 if state["y"] is None else len(state["y"])
        if not sum(rounds) == len(state["ids"]) == told or len(rounds) != len(state["best"]):
            raise InputError("The state is damaged: its rounds, rows, labels and scores do not go together.")
        if not rounds:
            return loop
        parts = zip(state["ids"].split(rounds), state["y"].split(rounds), state["best"], strict=True)
        for ids, y, best in parts:
            loop._check(ids, y)
            loop = loop._with(_Round(ids, y, float(best)))
        return loop

    def _select(self, count: int) -> Selection:
        left = self.left
        check_count("count", count, 1)
        if count > len(left):
            raise InputError(f"Asked for {count} labels, but {len(left)} of the pool's {len(self.pool)} rows are left.")
        if self._asked is not None and len(self._asked.indices) == count:
            return self._asked
        generator = torch.Generator("cpu").manual_seed((self._seed + len(self._rounds)) % (1 << 63))
        if self.rule is random:  # which asks nothing of the model
            order = torch.randperm(len(left), device="cpu", generator=generator)[:count]
            self._asked = Selection(left[order], torch.zeros(count, dtype=torch.float64, device="cpu"))
            return self._asked
        found = select(self.model, self.pool[left], count, self.rule, generator=generator, **self._options)
        self._asked = Selection(left[found.indices.cpu()], found.scores)
        return self._asked

    def _with(self, told: _Round) -> PoolLoop:
        loop = copy.copy(self)
        loop._rounds, loop._asked = (*self._rounds, told), None
        if self._all_data:
            told = _Round(loop.ids, torch.cat([r.y for r in loop._rounds]), told.best)
        loop.model = self._learn(self._start if self._all_data else self.model, self.pool[told.ids], told.y)
        return loop

    def _check(self, ids: Tensor, y: Tensor) -> None:
        if ids.ndim != 1 or not len(ids) or not isinstance(y, Tensor) or y.ndim < 1 or len(y) != len(ids):
            came = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise InputError(f"Expected rows [k] and their labels [k] or [k, C], got {tuple(ids.shape)} and {came}.")
        if bool(((ids < 0) | (ids >= len(self.pool))).any()):
            raise InputError(f"Rows of the pool are 0 … {len(self.pool) - 1}, got {int(ids.min())} … {int(ids.max())}.")
        known = torch.isin(ids, self.ids)
        if bool(known.any()) or len(ids.unique()) < len(ids):
            again = ids[known] if bool(known.any()) else ids
            raise InputError(f"Rows are labelled once; {again.tolist()[:10]} are labelled already, or come twice.")


@dataclass(frozen=True, eq=False)
class _Round:
    ids: Tensor
    y: Tensor
    best: float


def _as_rows(ids: Any) -> Tensor:
    try:
        rows = torch.as_tensor(ids, device=first_tensor(ids).device)
    except (TypeError, ValueError, RuntimeError) as e:
        raise InputError(f"Rows of the pool must be whole numbers, got {ids!r}.") from e
    if rows.numel() and (rows.is_floating_point() or rows.is_complex() or rows.dtype == torch.bool):
        raise InputError(f"Rows of the pool must be whole numbers, got {rows.dtype}.")
    check_tensor("Rows of the pool", rows)
    return rows.long().cpu()


def _check_distinct(pool: Tensor) -> None:
    if not pool[0].numel() or pool.is_complex():
        raise InputError(f"The pool must have real inputs, got {pool.dtype} {tuple(pool.shape)}.")
    rows, counts = pool.flatten(1).unique(dim=0, return_counts=True)
    if len(rows) < len(pool):
        twice = rows[counts > 1][0]
        same = (pool.flatten(1) == twice).all(1).nonzero().squeeze(-1).tolist()
        raise InputError(
            f"The pool holds {len(pool) - len(rows)} rows twice, the first being rows {same[:5]}. Drop them, or say "
            "duplicates=True: each is then a datum of its own."
        )
