"""A `DualGP` as a stream: its state as buffers of the module, and one batch after the other."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from gpytorch.kernels import Kernel
from gpytorch.likelihoods import GaussianLikelihood, Likelihood
from gpytorch.means import Mean
from torch import Tensor

from dualgp.basis import InducingBasis
from dualgp.checks import check_number
from dualgp.draws import uniform
from dualgp.errors import InputError
from dualgp.gp import update
from dualgp.gp.data import Data
from dualgp.gp.fit import Outcome
from dualgp.gp.hybrid import Noise
from dualgp.gp.memory import Memory
from dualgp.gp.start import workable_start
from dualgp.gp.update import Settings, State
from dualgp.inducing import greedy_variance
from dualgp.posterior import Posterior
from dualgp.predictive import log_predictive
from dualgp.selection import choose
from dualgp.sites import Site, Sites

if TYPE_CHECKING:
    from dualgp.gp.fitted import FittedGP
    from dualgp.gp.model import DualGP

_MEMORY = ("x", "y", "noise", "weights", "lam", "beta", "ids", "keys")
_MEMORY_BUFFERS = tuple(f"memory_{name}" for name in _MEMORY)
BUFFERS = ("rest_lam", "rest_B", *_MEMORY_BUFFERS, "noise_statistics", "num_rest", "num_seen", "log_start")


@dataclass(frozen=True)
class UpdateResult:
    """How a stream stands after a batch; printed, it is one line.

    Attributes:
        num_seen: data that came by so far.
        num_inducing: M now.
        num_memory: data in memory.
        nlpd: of the batch before it was taken in, nats per datum: how well the stream foretold it.
        passes: of the last E-step.
        seconds: wall time.
    """

    num_seen: int
    num_inducing: int
    num_memory: int
    nlpd: float
    passes: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"seen {self.num_seen}  M {self.num_inducing}  memory {self.num_memory}  "
            f"NLPD before {self.nlpd:.4f}  {1e3 * self.seconds:.0f} ms"
        )


def read(model: FittedGP) -> State | None:
    """Return the state of a model, or None before any data; all that was fitted at once is `rest`."""
    if model.site_lam is None or model.site_B is None:
        return None
    q = model.posterior
    state = _as_rest(model, q)
    if model.rest_lam is not None and model.rest_B is not None:
        state = replace(state, rest=Site(model.rest_lam, model.rest_B))
    now = noise_of(model.likelihood)
    if now is None or state.noise is None or abs(now.variance / state.noise.variance - 1.0) < 1e-6:  # float32
        return state
    return _under_noise(state, now.variance)


def _under_noise(state: State, variance: float) -> State:
    """Read Gaussian sites under another noise variance, set by hand: each to the power σ₀²/σ²."""
    assert state.noise is not None
    power, noise = state.noise.variance / variance, state.noise.under(variance)
    memory = None if state.memory is None else replace(state.memory, sites=state.memory.sites * power)
    return _rebuilt(replace(state, rest=state.rest * power, noise=noise), memory)


def _as_rest(model: FittedGP, q: Posterior) -> State:
    memory, noise = None, None
    x, y, lam, beta = model.memory_x, model.memory_y, model.memory_lam, model.memory_beta
    ids, keys = model.memory_ids, model.memory_keys
    if not (x is None or y is None or lam is None or beta is None or ids is None or keys is None):
        params = {} if model.memory_noise is None else {"noise": model.memory_noise}
        data = Data(x, y, y.ndim == x.ndim, params, model.memory_weights)
        memory = Memory(data, Sites(lam, beta, model.num_outputs is not None), ids, keys)
    if model.noise_statistics is not None:
        noise = Noise(*model.noise_statistics.tolist())
    num_rest = float(model.num_rest) if model.num_rest is not None else 0.0
    return State(q, q.site, memory, noise, num_rest, int(model.num_seen or 0))


def write(model: FittedGP, state: State, *, owned: bool = False) -> None:
    """Put a state into the buffers of a model; its modules hold the hyperparameters already.

    `owned` says that nobody else changes the modules of the state's basis, so that it need not be built anew.
    """
    memory, noise = state.memory, state.noise
    model.inducing_points, model.jitter = state.basis.inducing_points.clone(), state.basis.requested_jitter
    model.site_lam, model.site_B = state.posterior.site.lam, state.posterior.site.B
    model.rest_lam, model.rest_B = state.rest.lam, state.rest.B
    model.lam = model.beta = None
    for name in _MEMORY_BUFFERS:
        setattr(model, name, None)
    if memory is not None:
        model.memory_x, model.memory_y = memory.data.x, memory.data.y
        model.memory_noise, model.memory_weights = memory.data.params.get("noise"), memory.data.weights
        model.memory_lam, model.memory_beta = memory.sites.lam, memory.sites.beta
        model.memory_ids, model.memory_keys = memory.ids, memory.keys
    set_noise(model, noise)
    model.num_rest = torch.tensor(state.num_rest, dtype=torch.float64, device=state.rest.lam.device)
    model.num_seen = torch.tensor(state.num_seen, device=state.rest.lam.device)
    model._posterior = state.posterior if owned else Posterior(model._basis(), state.posterior.site)


def set_noise(model: FittedGP, noise: Noise | None) -> None:
    """Put the noise statistics into their buffer."""
    assert model.site_lam is not None
    device = model.site_lam.device
    model.noise_statistics = None if noise is None else torch.tensor(noise, dtype=torch.float64, device=device)


def take(model: DualGP, data: Data, settings: Settings, learn_hyperparameters: bool) -> UpdateResult:
    """Take a checked batch into the model; unchanged if this raises."""
    start = time.perf_counter()
    if len(data) == 0:
        return _unchanged(read(model))
    state, kernel, mean, likelihood = read(model), model.kernel, model.mean, model.likelihood
    if state is None:
        if learn_hyperparameters:
            kernel, mean, likelihood = workable_start(kernel, mean, likelihood, data, model.num_outputs)
        state = _begin(model, kernel, mean, likelihood, data)
    _check_follows(state, data, settings)
    hyper = None
    if learn_hyperparameters:
        hyper = model._hyper(kernel, mean, likelihood, state.basis.inducing_points, False, True)
    if hyper is not None and not hyper.trained():
        hyper = None
    log_start = model.log_start if hyper is None else hyper.guard(model.log_start)
    outputs = () if model.num_outputs is None else (model.num_outputs,)
    zero = torch.zeros(*data.x.shape[:-1], *outputs, dtype=torch.float64, device=data.x.device)
    draw = model.generator.get_state()
    batch = _arrived(model, data, Sites(zero, zero, bool(outputs)), state.num_seen)
    try:
        with torch.no_grad():
            q = state.posterior.predict(data.x)
            foretold = -float(log_predictive(likelihood, data.y, *q, **data.params).mean())
        likelihood = likelihood if hyper is None else hyper.likelihood
        state, found = update.step(state, likelihood, hyper, batch, settings)
    except BaseException:
        model.generator.set_state(draw)
        raise
    if hyper is not None:
        model._take_hyperparameters(hyper)
    write(model, state, owned=hyper is None)
    model.log_start = log_start
    return UpdateResult(
        state.num_seen,
        state.basis.num_inducing,
        0 if state.memory is None else len(state.memory),
        foretold,
        found.passes,
        time.perf_counter() - start,
    )


def _unchanged(state: State | None) -> UpdateResult:
    """What a batch without data reports."""
    if state is None:
        return UpdateResult(0, 0, 0, float("nan"), 0, 0.0)
    held = 0 if state.memory is None else len(state.memory)
    return UpdateResult(state.num_seen, state.basis.num_inducing, held, float("nan"), 0, 0.0)


def _check_follows(state: State, data: Data, settings: Settings) -> None:
    """Raise InputError unless the batch is like those before it."""
    if data.x.dtype != state.basis.dtype or data.x.device != state.basis.device:
        raise InputError(
            f"The stream so far is {state.basis.dtype} on {state.basis.device}, this batch {data.x.dtype} on "
            f"{data.x.device}; use X.to(...)."
        )
    if data.x.shape[:-2] != state.basis.inducing_points.shape[:-2]:
        raise InputError(
            f"The stream so far has batch shape {tuple(state.basis.inducing_points.shape[:-2])}, this batch "
            f"{tuple(data.x.shape[:-2])}; keep to one."
        )
    unknown = data.params.keys() - {"noise"}
    if unknown and settings.capacity > 0:
        raise InputError(f"Memory keeps noise= per datum, not {sorted(unknown)}; build the model with memory=0.")
    if state.memory is not None and state.memory.data.params.keys() != data.params.keys():
        raise InputError(
            f"Data in memory came with {sorted(state.memory.data.params) or 'nothing'} per datum, this batch with "
            f"{sorted(data.params) or 'nothing'}; pass noise= with every batch, or with none."
        )


def _arrived(model: DualGP, data: Data, sites: Sites, first: int) -> Memory:
    """Number data as they arrive, and draw a key for each from the model's generator."""
    ids = torch.arange(first, first + len(data), device=data.x.device)
    return Memory(data, sites, ids, uniform((len(data),), data.x.device, model.generator))


def _begin(model: DualGP, kernel: Kernel, mean: Mean | None, likelihood: Likelihood, data: Data) -> State:
    """Return the prior, on the Z given or on one input, from which Z grows."""
    Z = model.inducing_points
    if Z is None:
        first = data.x.reshape(-1, *data.x.shape[-2:])[0]
        Z = data.x[..., greedy_variance(kernel, first, 1), :]
    elif Z.shape[-1] != data.x.shape[-1] or Z.device != data.x.device:
        raise InputError(
            f"inducing_points have {Z.shape[-1]} columns on {Z.device}, X has {data.x.shape[-1]} on {data.x.device}; "
            "they must agree (move the model with .to)."
        )
    Z = Z.to(data.x.dtype)
    q = Posterior(InducingBasis(kernel, Z, mean, num_outputs=model.num_outputs, jitter=model.jitter))
    return State(q, q.site, None, noise_of(likelihood), 0.0, 0)


def noise_of(likelihood: Likelihood, num_data: float = 0.0, power: float = 0.0) -> Noise | None:
    """Return the statistics that keep a learned noise variance learnable; None for other likelihoods."""
    if type(likelihood) is not GaussianLikelihood or likelihood.noise.numel() != 1:
        return None
    return Noise(float(likelihood.noise.detach()), num_data, power)


def choose_of_fit(model: DualGP, outcome: Outcome, data: Data, settings: Settings) -> Memory:
    """Choose memory from the data of a fit, whose sites per datum are known; the model is not touched yet."""
    assert outcome.sites is not None
    everything = _arrived(model, data, outcome.sites, 0)
    with torch.no_grad():
        scored = update.candidates(outcome.posterior, outcome.hyper.likelihood, everything)
        return everything.rows(choose(settings.rule, scored, settings.capacity))


def remember_fit(model: DualGP, memory: Memory, settings: Settings) -> None:
    """Make some data of a fit the model's memory; with a window, forget all others."""
    state = _state(model)
    sites, noise = (model.lam, model.beta), state.noise
    if settings.window:
        state = replace(state, rest=state.rest * 0.0, noise=noise_of(model.likelihood), num_rest=0.0, memory=memory)
        write(model, update.only_memory(state, model.likelihood, settings.tol))
        return
    with torch.no_grad():
        rest = state.rest - state.posterior.project(memory.data.x, memory.sites)
    if noise is not None:
        own = update.forget_into(Noise(noise.variance, 0.0, 0.0), state.basis, memory)
        noise = noise._replace(num_data=noise.num_data - own.num_data, power=noise.power - own.power)
    num_rest = float(state.num_seen - len(memory))
    write(model, replace(state, rest=rest, memory=memory, noise=noise, num_rest=num_rest))
    model.lam, model.beta = sites


def rebase(model: FittedGP, q: Posterior, basis: InducingBasis) -> None:
    """Read the model under hyperparameters set by hand: rest by form U, memory by form S."""
    state = _as_rest(model, q)
    if model.rest_lam is not None and model.rest_B is not None:
        state = replace(state, rest=Site(model.rest_lam, model.rest_B))
    A, shift = q.basis.change_to(basis)
    rest = state.rest.pull_back(A, shift)
    noise = None if state.noise is None else state.noise.shifted(state.rest, shift)
    state = replace(state, posterior=Posterior(basis, rest), rest=rest, noise=noise)
    write(model, _rebuilt(state, state.memory))
    model.log_start = None  # hyperparameters set by hand are a start of their own


def forget(model: FittedGP, ids: Tensor) -> None:
    """Take data of memory out of the model, exactly."""
    state = _state(model)
    if state.memory is None:
        raise InputError("Memory is empty: no datum's site is known one by one, so none can be taken out.")
    try:
        wanted = torch.as_tensor(ids, device=state.rest.lam.device).reshape(-1).unique()
    except (TypeError, ValueError, RuntimeError) as e:
        raise InputError(f"ids must be integers, as in memory.ids; got {ids!r}.") from e
    if not len(wanted):
        return
    if wanted.dtype not in (torch.int64, torch.int32):
        raise InputError(f"ids must be integers, as in memory.ids; got {wanted.dtype}.")
    memory = state.memory.without(state.memory.find(wanted))
    # New data take the places left free whatever their keys: each datum left stands for as many in `rest` as before.
    held, left = (float(m.data.all_weights().sum()) for m in (state.memory, memory))
    state = replace(state, num_rest=state.num_rest * left / max(held, 1e-300))
    write(model, _rebuilt(state, memory if len(memory) else None))


def fade(model: FittedGP, factor: float) -> None:
    """Scale all sites: the likelihood of everything seen so far to the power `factor`."""
    check_number("factor", factor, least=0, most=1, why=": 1 keeps all, 0 forgets all")
    state = _state(model)
    memory, noise = state.memory, state.noise
    if memory is not None:
        data = replace(memory.data, weights=memory.data.all_weights() * factor)
        memory = replace(memory, data=data, sites=memory.sites * factor)
    if noise is not None:
        noise = noise._replace(num_data=noise.num_data * factor, power=noise.power * factor)
    state = replace(state, rest=state.rest * factor, noise=noise, num_rest=state.num_rest * factor)
    write(model, _rebuilt(state, memory if factor > 0 else None))


def move_inducing(model: FittedGP, inducing_points: Tensor) -> None:
    """Put Z elsewhere: `rest` is pulled back, memory expanded anew."""
    state = _state(model)
    if inducing_points.shape[:-2] != state.basis.inducing_points.shape[:-2] or not inducing_points.shape[-2]:
        raise InputError(
            f"inducing_points must have shape [M, D] with M ≥ 1 after the batch shape "
            f"{tuple(state.basis.inducing_points.shape[:-2])} of the model, got {tuple(inducing_points.shape)}."
        )
    with torch.no_grad():
        write(model, update.move(state, state.basis.at(inducing_points.to(state.basis.inducing_points))))


def _rebuilt(state: State, memory: Memory | None) -> State:
    return replace(state, memory=memory, posterior=update.assemble(state.basis, state.rest, memory))


def _state(model: FittedGP) -> State:
    _ = model.posterior  # raises where there is none
    state = read(model)
    assert state is not None
    return state
