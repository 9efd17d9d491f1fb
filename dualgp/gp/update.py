"""One step of a stream, on values: Z grows, sites are found, hyperparameters follow, Z shrinks, memory is chosen.

The state is prior + rest + Σ sites of memory. `rest` is all that is forgotten, one site on u (form U); the data of a
batch and of memory are sites per datum, expanded anew at every Z and θ (form S).

1. `grow`: Z takes in those of the batch's inputs that it explains least. Nothing is lost by that.
2. `learn`: sites of batch and memory, given `rest`; then hyperparameters on the hybrid bound; in turn.
3. `shrink`: Z gives up inputs, down to its limit, by what each costs the bound; sites are found again there.
4. `remember`: memory is chosen from batch and memory; the sites of the others go into `rest`.

Source: Chang et al. 2023, § 3, with the bound of `gp.hybrid`; Z by growing and shrinking is this package's own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from gpytorch.likelihoods import Likelihood
from torch import Tensor

from dualgp.basis import InducingBasis
from dualgp.duals import dual_parameters, is_gaussian
from dualgp.gp.bound import conjugate_sites
from dualgp.gp.data import Data, gaussian_spread
from dualgp.gp.estep import EStep, Source, e_step
from dualgp.gp.hybrid import Anchor, Noise, Sample, residuals, stream_bound
from dualgp.gp.hyper import Hyper
from dualgp.gp.memory import Memory
from dualgp.gp.mstep import m_step
from dualgp.inducing import cheapest_to_drop, greedy_rows
from dualgp.kernels import kernel_diagonal
from dualgp.posterior import Posterior
from dualgp.selection import Candidates, Rule, choose
from dualgp.sites import Site, Sites

M_ITERATIONS = 10
TRUST_RADIUS = 1.0  # of the logarithm of a positive hyperparameter, per batch


@dataclass(frozen=True, eq=False)
class State:
    """What a stream knows: posterior = prior + rest + sites of memory.

    Attributes:
        posterior: all of it.
        rest: the site on w of what is forgotten.
        memory: the data that are not; None before there were any.
        noise: of a Gaussian likelihood, what `rest` says of the noise.
        num_rest: how many of the data in `rest` memory is a fair sample of, each by its weight.
        num_seen: how many data came by.
    """

    posterior: Posterior
    rest: Site
    memory: Memory | None
    noise: Noise | None
    num_rest: float
    num_seen: int

    @property
    def basis(self) -> InducingBasis:
        """The coordinates of posterior and rest."""
        return self.posterior.basis

    @property
    def holds_all(self) -> bool:
        """Whether nothing is forgotten, so that `rest` is one and need not be carried anywhere."""
        return self.num_rest == 0 and not bool(self.rest.lam.any() or self.rest.B.any())


class Settings(NamedTuple):
    """How a stream goes on; see `DualGP` and `DualGP.update`."""

    max_inducing: int  # M
    capacity: int  # of memory
    rule: Rule
    fair: bool = True  # whether the rule keeps a fair sample of all data
    move_inducing: bool = True
    window: bool = False  # what leaves memory is taken out
    tol: float = 1e-4  # nats per datum
    tol_growth: float = 1e-3  # nats per datum


@torch.no_grad()
def step(
    state: State, likelihood: Likelihood, hyper: Hyper | None, batch: Memory, settings: Settings
) -> tuple[State, EStep]:
    """Return the state after a batch (its sites are ignored), and the last E-step.

    `hyper` is what is learned, changed in place; without it hyperparameters stay. `likelihood` is hyper's own then.
    """
    if settings.move_inducing:
        room = settings.max_inducing - state.basis.num_inducing + math.ceil(settings.max_inducing / 2)
        state = grow(state, likelihood, batch.data, room, settings.tol_growth)
    data, start = batch.data, None
    if state.memory is not None:
        data = Data.cat([state.memory.data, data])
        start = Sites.cat([state.memory.sites, batch.sites])
    found = find_sites(state, likelihood, data, start, 0.1 * settings.tol)
    assert found.sites is not None
    if hyper is not None:  # one round per batch: the stream itself is the iteration
        state = learn_hyperparameters(state, hyper, data, found.sites, settings)
        found = find_sites(state, likelihood, data, found.sites, 0.1 * settings.tol)
    assert found.sites is not None
    all_of_it = Memory(data, found.sites, *_joined(state.memory, batch))
    state = replace(state, posterior=found.posterior, memory=all_of_it, num_seen=state.num_seen + len(batch))
    if settings.move_inducing:
        smaller = shrink(state, settings.max_inducing)
        if smaller is not state:  # the data at hand make up for what Z lost
            found = find_sites(smaller, likelihood, data, found.sites, 0.1 * settings.tol)
            assert found.sites is not None
            all_of_it = replace(all_of_it, sites=found.sites)
            state = replace(smaller, posterior=found.posterior)
    return remember(state, all_of_it, likelihood, settings), found


def _joined(old: Memory | None, batch: Memory) -> tuple[Tensor, Tensor]:
    if old is None:
        return batch.ids, batch.keys
    return torch.cat([old.ids, batch.ids]), torch.cat([old.keys, batch.keys])


def move(state: State, basis: InducingBasis) -> State:
    """Return the state at another Z (same hyperparameters): rest pulled back, memory expanded anew."""
    if state.holds_all:
        rest = Site.zero(basis.batch_shape, basis.size, basis.device)
        return replace(state, posterior=assemble(basis, rest, state.memory), rest=rest)
    A, shift = state.basis.change_to(basis)
    rest = state.rest.pull_back(A, shift)
    noise = state.noise
    if noise is not None:  # what Z does not hold of u any more is spread that the data did not explain
        lost = (state.rest.B * (torch.eye(A.shape[-2], dtype=A.dtype, device=A.device) - A @ A.mT)).sum()
        noise = noise._replace(power=noise.power + float(lost))
    return replace(state, posterior=assemble(basis, rest, state.memory), rest=rest, noise=noise)


def grow(state: State, likelihood: Likelihood, data: Data, room: int, tol: float) -> State:
    """Return the state with up to `room` of the inputs taken into Z, those of greatest conditional variance r.

    Args:
        state: as it is.
        likelihood: says how much variance matters.
        data: where Z may go.
        room: how many, at most.
        tol: inputs that would cost less than this, ½ β r nats at the greatest β of the data, are not taken.
    """
    basis = state.basis
    room = min(room, len(data))
    if room < 1:
        return state
    m, v = state.posterior.predict(data.x)
    beta = dual_parameters(likelihood, data.y, m, v, **data.params).beta.max() * data.all_weights().max()
    largest = kernel_diagonal(basis.kernel, data.x).max()
    enough = max(1e-10, float(2.0 * tol / (beta * largest).clamp_min(1e-300)))
    rows = greedy_rows(basis.kernel, data.x, room, basis.inducing_points, enough)
    if not len(rows):
        return state
    return move(state, basis.at(torch.cat([basis.inducing_points, data.x[..., rows, :].to(basis.dtype)], -2)))


def shrink(state: State, size: int) -> State:
    """Return the state with Z cut down to `size` inputs at most, dropping those that cost the bound least."""
    basis = state.basis
    if basis.num_inducing <= size:
        return state
    keep = cheapest_to_drop(basis.L_inv, state.posterior.site.B, size)
    return move(state, basis.at(basis.inducing_points[..., keep, :]))


def find_sites(state: State, likelihood: Likelihood, data: Data, start: Sites | None, tol: float) -> EStep:
    """Return the E-step on `data`, beside what is forgotten; `start` are their sites so far."""
    begin = None
    if start is not None and not is_gaussian(likelihood):  # a Gaussian one is exact from anywhere
        begin = assembled(state.basis, state.rest, data.x, start), start
    return e_step(Source(state.basis, data), likelihood, begin, base=state.rest, tol=tol)


class _Evaluation(NamedTuple):
    value: float
    gradient: list[Tensor]


def learn_hyperparameters(state: State, hyper: Hyper, data: Data, sites: Sites, settings: Settings) -> State:
    """Move hyperparameters by an M-step on the hybrid bound; return the state there, with the sites as they were.

    `hyper` is changed in place, and takes the state's Z. A step is short, M_ITERATIONS of L-BFGS inside a trust region.
    """
    hyper.set_inducing(state.basis.inducing_points)
    anchor = None if state.holds_all else Anchor.of(state.basis, state.rest, state.noise)
    sample = fair_sample(state, hyper, sites) if settings.fair else None
    parameters = hyper.trained()

    def evaluate() -> _Evaluation:
        own = conjugate_sites(hyper, data)
        with torch.enable_grad():
            value = stream_bound(hyper, data, sites if own is None else own, anchor, sample)
            found = torch.autograd.grad(value, parameters, allow_unused=True)
        gradient = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
        return _Evaluation(float(value.detach()), gradient)

    m_step(hyper, evaluate, max(1, data.count), max_iter=M_ITERATIONS, tol=0.1 * settings.tol, radius=TRUST_RADIUS)
    hyper.round()
    basis, rest, noise = hyper.basis(), state.rest, state.noise
    if anchor is not None:
        T, shift = anchor.map_from(hyper, basis.expand(basis.inducing_points), basis.L)
        rest = anchor.along(hyper, T, shift)
        noise = None if noise is None else noise.shifted(state.rest, shift)
        if noise is not None and sample is not None and state.memory is not None:
            noise = noise._replace(power=noise.power + float(sample.change(residuals(hyper, state.memory.data.x))))
    if noise is not None:
        noise = noise.under(float(hyper.likelihood.noise.detach().sum()))
    return replace(state, posterior=assembled(basis, rest, data.x, sites), rest=rest, noise=noise)


def fair_sample(state: State, hyper: Hyper, sites: Sites) -> Sample | None:
    """Return memory as a sample of all that is forgotten; `sites` begin with its own. None where there is neither."""
    if state.memory is None or not state.num_rest > 0:
        return None
    data = state.memory.data
    beta = sites.by_latent()[1][..., : len(data)]
    scale = state.num_rest / float(data.all_weights().sum().clamp_min(1e-300))
    return Sample(beta, residuals(hyper, data.x), scale)


def remember(state: State, new: Memory, likelihood: Likelihood, settings: Settings) -> State:
    """Return the state with memory chosen from `new`; the others go into rest. The posterior holds all of both."""
    basis, q = state.basis, state.posterior
    keep = torch.arange(0, device=new.ids.device)
    if settings.capacity > 0:
        keep = choose(settings.rule, candidates(q, likelihood, new), settings.capacity)
    gone, memory = new.without(keep), new.rows(keep) if len(keep) else None
    rest, noise, num_rest = state.rest, state.noise, state.num_rest
    if settings.window:
        state = replace(state, memory=memory)
        return only_memory(state, likelihood, settings.tol) if len(gone) else state
    if len(gone):
        sites = without_negative(gone.sites, q, gone.data.x)
        rest = rest + q.project(gone.data.x, sites)
        num_rest += float(gone.data.all_weights().sum())
        if noise is not None:
            noise = forget_into(noise, basis, gone)
        if sites is not gone.sites:
            q = assemble(basis, rest, memory)
    return State(q, rest, memory, noise, num_rest, state.num_seen)


@torch.no_grad()
def only_memory(state: State, likelihood: Likelihood, tol: float) -> State:
    """Return the state of rest and memory alone, as if no data had been beside it when its sites were found."""
    memory = state.memory
    if memory is None or is_gaussian(likelihood):
        return replace(state, posterior=assemble(state.basis, state.rest, memory))
    start = without_negative(memory.sites, state.posterior, memory.data.x)  # alone, they must be a Gaussian
    found = find_sites(state, likelihood, memory.data, start, 0.1 * tol)
    assert found.sites is not None
    return replace(state, posterior=found.posterior, memory=replace(memory, sites=found.sites))


def without_negative(sites: Sites, q: Posterior, x: Tensor) -> Sites:
    """Return the sites with β = 0 and λ = α where β < 0, as may be of outliers: what is forgotten must stay a Gaussian.

    A negative β stands against the β of the data around it. In `rest` it would be read at other hyperparameters, at
    another Z, without those of them that are in memory, and could leave no Gaussian at all.
    """
    if not bool((sites.beta < 0).any()):
        return sites
    m = q.predict(x)[0].double()
    return Sites(torch.where(sites.beta < 0, sites.alpha(m), sites.lam), sites.beta.clamp_min(0.0), sites.multi_output)


def candidates(q: Posterior, likelihood: Likelihood, of: Memory) -> Candidates:
    """Return what a rule may look at: α, β and v at the present posterior."""
    data, multi = of.data, of.sites.multi_output

    def find_moments() -> tuple[Tensor, Tensor, Tensor]:
        m, v = q.predict(data.x)
        duals = dual_parameters(likelihood, data.y, m, v, **data.params)
        weights = data.all_weights().unsqueeze(-1) if multi else data.all_weights()
        return weights * duals.alpha, weights * duals.beta, v.double()

    return Candidates(data.x, data.y, of.ids, of.keys, multi, find_moments)


def forget_into(noise: Noise, basis: InducingBasis, gone: Memory) -> Noise:
    """Return the noise statistics with some data's added: Σ β((y − μ)² + r)."""
    lam, beta = gone.sites.by_latent()
    power = 0.0
    for rows, features in basis.blocks(gone.data.x):
        spread, _ = gaussian_spread(gone.data.rows(rows), lam[..., rows], beta[..., rows], features.prior_mean)
        power += float((spread + beta[..., rows] * features.residual).sum())
    num_data = float(gone.data.all_weights().sum()) * lam.numel() / max(1, len(gone))
    return Noise(noise.variance, noise.num_data + num_data, noise.power + power)


def assemble(basis: InducingBasis, rest: Site, memory: Memory | None) -> Posterior:
    """Return prior + rest + sites of memory."""
    return Posterior(basis, rest) if memory is None else assembled(basis, rest, memory.data.x, memory.sites)


def assembled(basis: InducingBasis, rest: Site, x: Tensor, sites: Sites) -> Posterior:
    """Return prior + rest + sites at x, which must be a Gaussian; rest alone need not be, where β < 0 is possible."""
    return Posterior(basis, rest + Posterior(basis).project(x, sites))
