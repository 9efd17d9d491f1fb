"""Federated learning: every client is a site, and a round replaces the sites of the clients that answered.

The server holds prior · Π t_k. Client k is given the cavity q / t_k, fits its own data under it as a prior, with any
optimiser, and answers with its new site; the server damps it, t_k ← t_k^{1−ρ} · t_new^ρ, and adds up. At the fixed
point every site is the expansion of its client's loss at the joint solution, so that the mean is the joint one.

| method | a client's site | its fit | step ρ |
|---|---|---|---|
| "fedlap" | λ_k alone, B_k = 0 | MAP | 1/K; stable below 2/K |
| "fedlap-cov", diagonal | (λ_k, diag H_k) | MAP and curvature | ½ |
| "fedlap-cov", dense | (λ_k, H_k) | MAP and curvature | 1 |
| "bayes-admm" | q_k / cavity | a posterior: IVON, exact VI | 1 |

FedLap-Func is either of the first two with a `FunctionSite` beside a client's Gaussian one: what its network says at a
few inputs, so that (λ_k, B_k) stand for the rest of its loss alone. With all its data among them nothing is left to
expand, and one round is joint for a generalised linear model. The product is no Gaussian, and the server's mean is the
minimiser of `FederatedServer.term`, by any optimiser.

Means, curvatures and sites are those of sums over a client's data.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias, get_args

from torch import nn

from dualgp.checks import check_number
from dualgp.errors import BasisMismatchError, DivergenceError, InputError, NotPositiveDefiniteError
from dualgp.sites import WeightSite, apply_precision
from dualgp.transfer.clients import ClientTask, Reply, with_functions
from dualgp.transfer.functions import FunctionSite
from dualgp.transfer.terms import Term, quadratic
from dualgp.weights import Number, WeightPosterior

FederatedMethod: TypeAlias = Literal["fedlap", "fedlap-cov", "bayes-admm"]
_GROWN, _PATIENCE = 2.0, 5  # steps so many times the smallest one, for so many rounds, come of a schedule that diverges


@dataclass(frozen=True, eq=False)
class FederatedServer:
    """The state between rounds: a prior, the site of each client, and the number of the round.

    A value: `close` returns the next one, and a call that raises has changed nothing.

    Args:
        prior: of the joint model, with no site.
        sites: by client; None until it has answered once.
        method: "fedlap", "fedlap-cov" or "bayes-admm".
        rho: the step ρ in (0, 1]; the stable one of the table above if None.
        penalty: of ADMM, for "bayes-admm"; 1 is partitioned variational inference.
        structure: "diagonal" or "dense", of the curvature that clients send; it sets the default step.
        round: how many have been closed.
        stale: clients whose replies to the last `close` were of another round and not counted.
        absent: clients that the last round closed without.
        moves: |m_new − m|_S of the rounds so far, from the first in which every client has a site; of the Gaussian
            part.
        functions: the sites of functions, by client, of those who have sent any.

    Raises:
        InputError: if there are no clients, or an argument is out of range: ρ ≥ 2/K diverges for "fedlap".
        NotPositiveDefiniteError: if prior and sites are no Gaussian.

    Source: FedLap, FedLap-Cov and FedLap-Func (Swaroop, Khan & Doshi-Velez 2025); federated ADMM from Bayesian duality
    (ICLR 2026), with the server's rule replaced by the sum of sites; Ashman et al. 2022 (PVI). Deviation: curvature
    sites are (1 − ρ)B + ρH, positive semi-definite always; sites of functions are damped as Gaussian ones are.

    Example:
        >>> import torch
        >>> from dualgp import WeightLayout
        >>> prior = WeightPosterior(WeightLayout({"w": torch.Size([1])}), prior_precision=1.0)
        >>> server = FederatedServer.start(prior, ["a", "b"], "fedlap-cov", structure="dense")
        >>> def fit(task, y):  # a client with one datum, ½(y − w)²
        ...     S, m = task.cavity.precision, task.cavity.mean
        ...     return task.reply((S * m + y) / (S + 1.0), torch.ones(1))
        >>> server = server.close([fit(server.task("a"), 3.0), fit(server.task("b"), 6.0)])
        >>> server.posterior.mean  # (3 + 6) / 3: one round, since it is quadratic
        tensor([3.])
    """

    prior: WeightPosterior
    sites: Mapping[str, WeightSite | None]
    method: FederatedMethod
    rho: float
    penalty: float = 1.0
    round: int = 0
    stale: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    moves: tuple[float, ...] = field(default=(), repr=False)
    functions: Mapping[str, FunctionSite] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        K, rho, penalty = len(self.sites), self.rho, self.penalty
        if self.prior.site is not None:
            raise InputError("The prior has a site: say with prior.as_prior() that what it has seen counts as prior.")
        if self.method == "fedlap" and K > 1 and rho >= 2.0 / K:
            raise InputError(
                f'"fedlap" with {K} clients diverges from a step of 2/K = {2.0 / K:.3g} on, got ρ = {rho:g}; take '
                f'1/K = {1.0 / K:.3g}, or "fedlap-cov", which needs fewer rounds.'
            )
        if not 0 < rho <= 1 or not 0 < penalty < math.inf or (penalty != 1 and self.method != "bayes-admm"):
            raise InputError(
                f'Expected 0 < ρ ≤ 1, and a penalty > 0 for "bayes-admm" alone, got {rho:g} and {penalty:g}.'
            )

    @classmethod
    def start(
        cls,
        prior: WeightPosterior,
        clients: Iterable[str],
        method: FederatedMethod = "fedlap-cov",
        *,
        rho: Number | None = None,
        penalty: Number = 1.0,
        structure: Literal["diagonal", "dense"] = "diagonal",
    ) -> FederatedServer:
        """Return the server before its first round. Arguments and errors as of the class."""
        names = list(clients)
        if not names or len(set(names)) != len(names):
            raise InputError(f"Expected the names of one client or more, all different, got {names[:8]}.")
        if method not in get_args(FederatedMethod) or structure not in ("diagonal", "dense"):
            raise InputError(
                f'method is one of {get_args(FederatedMethod)} and structure "diagonal" or "dense", got {method!r} and '
                f"{structure!r}."
            )
        K = len(names)
        stable = {"fedlap": 1.0 / K, "fedlap-cov": 1.0 if structure == "dense" else 0.5, "bayes-admm": 1.0}
        step = stable[method] if rho is None else rho
        check_number("rho", step)
        check_number("penalty", penalty)
        return cls(prior, dict.fromkeys(names), method, float(step), float(penalty))

    @property
    def posterior(self) -> WeightPosterior:
        """The joint posterior so far, prior · Π t_k.

        Raises:
            InputError: if there are sites of functions: it is no Gaussian then (see `posterior_at`).
        """
        if self.functions:
            raise InputError(
                "With sites of functions there is no Gaussian posterior: minimise term(), and ask for "
                "posterior_at(network) there."
            )
        return self._gaussian

    def term(self) -> Term:
        """Return −log of prior · Π t_k with all sites of functions: its minimiser is the mean of this round."""
        return with_functions(quadratic(self._gaussian), self.functions.values())

    def posterior_at(self, network: nn.Module) -> WeightPosterior:
        """Return the joint posterior with the functions expanded at a network: centred there if it minimises `term`.

        Raises:
            InputError: if the network has not these weights.
        """
        q = self._gaussian
        structure: Literal["diagonal", "dense"] = "dense" if q.structure == "dense" else "diagonal"
        for functions in self.functions.values():
            q = q.add(functions.expanded(network, q.layout, structure))
        return q

    @property
    def _gaussian(self) -> WeightPosterior:
        total = None
        for site in self.sites.values():
            if site is not None:
                total = site if total is None else total + site
        return self.prior if total is None else self.prior.add(total)

    def task(self, client: str) -> ClientTask:
        """Return what a client is given in this round.

        Raises:
            InputError: if there is no such client.
            NotPositiveDefiniteError: if its cavity is no Gaussian: a penalty below 1 takes out more than its site.
        """
        self._check_client(client)
        site, q = self.sites[client], self._gaussian
        if site is None:
            cavity = q
        else:
            try:
                cavity = q.remove(site * (1.0 / self.penalty))
            except NotPositiveDefiniteError as error:
                raise NotPositiveDefiniteError(
                    f"Client {client!r} has no prior to fit under: with a penalty of {self.penalty:g} its cavity is no "
                    f"Gaussian ({error}) Use penalty=1."
                ) from error
        others = tuple(f for name, f in self.functions.items() if name != client)
        return ClientTask(client, self.round, cavity.as_prior(), self.method, self.penalty, others)

    def close(self, replies: Iterable[Reply]) -> FederatedServer:
        """Return the server after this round, with what arrived: other clients' sites are kept.

        Replies of another round are not counted, and named in `stale`; clients without a reply are in `absent`.

        Raises:
            InputError: for an unknown client, two replies of one, a site that is not finite, or functions at other
                inputs than that client's last ones while ρ < 1.
            BasisMismatchError: for a site over other weights.
            NotPositiveDefiniteError: if no Gaussian comes of it.
            DivergenceError: if the rounds move away from their fixed point.
        """
        sites, functions, stale, seen = dict(self.sites), dict(self.functions), [], set()
        for reply in replies:
            if not isinstance(reply, Reply):
                raise InputError(
                    f"Expected replies, got {type(reply).__name__}; leave out clients that did not answer."
                )
            self._check_client(reply.client)
            if reply.round != self.round:
                stale.append(reply.client)
                continue
            if reply.client in seen:
                raise InputError(f"Client {reply.client!r} has answered twice in round {self.round}.")
            seen.add(reply.client)
            sites[reply.client] = self._damped(reply)
            functions.pop(reply.client, None)
            if (damped := self._damped_functions(reply)) is not None:
                functions[reply.client] = damped
        absent = tuple(name for name in self.sites if name not in seen)
        then = replace(self, sites=sites, functions=functions, round=self.round + 1, stale=tuple(stale), absent=absent)
        return replace(then, moves=self._moved(then))

    def _damped(self, reply: Reply) -> WeightSite:
        """t_k ← t_k^{1−ρ} · t_new^ρ in natural parameters."""
        new, old = reply.site, self.sites[reply.client]
        if new.lam.shape != (self.prior.layout.size,):
            raise BasisMismatchError(
                f"The model has {self.prior.layout.size} weights, the site of {reply.client!r} {len(new.lam)}."
            )
        if self.method == "fedlap" and bool(new.B.any()):
            raise InputError(f'The site of {reply.client!r} has a curvature, and those of "fedlap" are linear.')
        if not bool(new.lam.isfinite().all() and new.B.isfinite().all()):
            raise InputError(f"The site of client {reply.client!r} is not finite: its fit has diverged.")
        damped = new * self.rho
        return damped if old is None else old * (1.0 - self.rho) + damped

    def _damped_functions(self, reply: Reply) -> FunctionSite | None:
        new, old, rho = reply.functions, self.functions.get(reply.client), self.rho
        if old is None or rho == 1:
            return new if new is None or rho == 1 else new * rho
        if new is None:
            return old * (1.0 - rho)
        if not old.same_inputs(new):
            raise InputError(
                f"The functions of client {reply.client!r} are at other inputs than before: with a step of {rho:g} "
                "both would have to be kept. Keep the inputs from round to round, or take ρ = 1."
            )
        return old * (1.0 - rho) + new * rho

    def _moved(self, then: FederatedServer) -> tuple[float, ...]:
        """|m_new − m|_S of each round since all clients have a site, the last one checked against those before."""
        q = then._gaussian
        if None in then.sites.values():
            return ()
        gap = q.mean - self._gaussian.mean
        move = float((gap @ apply_precision(q.precision, gap)).clamp_min(0.0).sqrt())
        last, least = (*self.moves, move)[-_PATIENCE:], min(self.moves, default=math.inf)
        if len(self.moves) > _PATIENCE and min(last) > _GROWN * least and move > self.moves[0]:
            raise DivergenceError(
                f"Round {self.round} would move the mean by {move:.3g}: more than the first, and for {_PATIENCE} "
                f"rounds more than {_GROWN:g} times the smallest step so far. The schedule diverges: lower the step, "
                f"now ρ = {self.rho:g}, or send dense curvatures."
            )
        return (*self.moves, move)

    def _check_client(self, client: str) -> None:
        if client not in self.sites:
            raise InputError(f"There is no client {client!r}; there are {list(self.sites)[:8]}.")
