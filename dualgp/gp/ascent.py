"""The fit of the exact process: sites by natural gradients, hyperparameters by Adam on the stochastic gradient."""

from __future__ import annotations

import itertools
import warnings

import torch
from gpytorch.likelihoods import SoftmaxLikelihood
from torch import Tensor, nn

from dualgp.basis import InducingBasis
from dualgp.duals import dual_parameters, expected_log_prob
from dualgp.errors import ConvergenceWarning, NotPositiveDefiniteError
from dualgp.gp.data import Data, gaussian_sites
from dualgp.gp.estep import Source, e_step
from dualgp.gp.hyper import Hyper
from dualgp.gp.products import Effort, Products, State, objective
from dualgp.gp.progress import Progress
from dualgp.sites import Sites
from dualgp.solvers import Estimate

_MIN_RHO = 2.0**-10
_SPARSE_TOL, _SPARSE_PASSES = 1e-3, 20  # of the sparse process that steps start from: it is wrong by more than that
_SHRINKS = 3  # of Adam's step before a fit ends
_WINDOW = 5  # steps over which a gain is judged, as each has an error of its own


class Search:
    """A fit under way: the sites at the hyperparameters of now."""

    def __init__(self, hyper: Hyper, data: Data, effort: Effort, noise: Tensor, tol: float) -> None:
        self.hyper, self.data, self.effort, self.noise, self.tol = hyper, data, effort, noise, tol
        self.states: list[State] = []
        self.iterations = self.clipped = 0

    @torch.no_grad()
    def find(self, max_passes: int = 200) -> None:
        """Find the sites at the present hyperparameters, from those of before.

            λ ← (1 − ρ) λ + ρ (α + βm),   β ← (1 − ρ) β + ρ β_q

        ρ is 1 (2/3 for softmax, ½ where β is clipped), and halved where the bound falls, as in `gp.estep`. Where β is
        clipped the bound is not what the steps climb: then means are followed until they stand still. The first step
        goes to what the sparse process on the preconditioner's pivots asks for: n·rank² operations for each of its
        passes, where a product with the kernel matrix takes n².
        """
        hyper = self.hyper
        self.process = Products(hyper.kernel, hyper.mean, self.data.x, self.effort, self.noise)
        conjugate = gaussian_sites(hyper.likelihood, self.data)
        if conjugate is not None:
            self._at(*latent(conjugate, hyper.num_outputs))
            return
        if self.states:
            self.states = [s._replace(shift=None) for s in self.states]
            self._at(*self._sites())
        else:
            self._begin()
        rho = 2.0 / 3.0 if isinstance(hyper.likelihood, SoftmaxLikelihood) else 1.0
        for _ in range(max_passes):
            wanted = self._wanted(self.states)
            rho = min(rho, 0.5) if self.clipped else rho
            gain = self._step(wanted, rho)
            if gain < 0 and not self.clipped:
                rho *= 0.5
            # (Probes stay, so that a gain is known better than the bound; but not much better.)
            if abs(gain) < max(0.1 * self.tol * len(self.data), 0.1 * self.bound.standard_error) or rho < _MIN_RHO:
                return
        warnings.warn(
            f"The sites still moved after {max_passes} passes: the bound is good to {abs(gain):.1e} nats.",
            ConvergenceWarning,
            stacklevel=3,
        )

    def _begin(self) -> None:
        """Start from the prior, and go to what the sparse process whose Z are the pivots asks for, if it has a q."""
        hyper, data, process = self.hyper, self.data, self.process
        self.states = [process.prior()] * (hyper.num_outputs or 1)
        self.bound = self._bound()
        Z = data.x[torch.tensor(process.pivots, device=data.x.device)]
        try:
            basis = InducingBasis(hyper.kernel, Z, hyper.mean, num_outputs=hyper.num_outputs)
            found = e_step(Source(basis, data), hyper.likelihood, tol=_SPARSE_TOL, max_passes=_SPARSE_PASSES)
        except NotPositiveDefiniteError:  # for sites that e_step does not clip
            return
        m, v = (t.double().reshape(len(data), -1).mT for t in found.posterior.predict(data.x))  # [C, n]
        sparse = [s._replace(mean=m_c, var=v_c) for s, m_c, v_c in zip(self.states, m, v, strict=True)]
        self._at(*self._wanted(sparse))

    def _step(self, wanted: tuple[Tensor, Tensor], rho: float) -> float:
        """Step towards the sites wanted, if that is no loss; return the gain in nats (where clipped, the way gone)."""
        before, bound, old = self.states, self.bound, self._sites()
        self._at(*((1 - rho) * was + rho * will for was, will in zip(old, wanted, strict=True)))
        if self.clipped:
            pairs = zip(self.states, before, strict=True)
            way = [(s.mean - t.mean).square() / t.var.clamp_min(1e-3 * t.var.max()) for s, t in pairs]
            return 0.5 * float(torch.stack(way).sum())
        gain = self.bound.value - bound.value
        if gain < 0:
            self.states, self.bound = before, bound
        return gain

    def _sites(self) -> list[Tensor]:
        return [torch.stack([getattr(s, name) for s in self.states]) for name in ("lam", "beta")]

    def _at(self, lam: Tensor, beta: Tensor) -> None:
        starts: list[State | None] = list(self.states) or [None] * len(lam)
        self.states = [
            self.process.state(row, precision, start) for row, precision, start in zip(lam, beta, starts, strict=True)
        ]
        self.iterations += sum(s.iterations for s in self.states)
        self.bound = self._bound()

    def _bound(self) -> Estimate:
        data = self.data
        mean, var = stacked(self.states, self.hyper.num_outputs)
        fit = data.weigh(expected_log_prob(self.hyper.likelihood, data.y, mean, var, **data.params)).sum()
        error = sum(s.kl.standard_error**2 for s in self.states) ** 0.5
        return Estimate(float(fit) - sum(s.kl.value for s in self.states), error)

    def _wanted(self, states: list[State]) -> tuple[Tensor, Tensor]:
        data = self.data
        mean, var = stacked(states, self.hyper.num_outputs)
        duals = dual_parameters(self.hyper.likelihood, data.y, mean, var, **data.params)
        beta = duals.beta.clamp_min(0.0)  # α is kept: λ = α + βm at the β that is
        self.clipped = int((duals.beta < 0).sum())
        found = Sites(duals.alpha + beta * mean, beta, self.hyper.num_outputs is not None)
        return latent(found, self.hyper.num_outputs)


def latent(sites: Sites, num_outputs: int | None) -> tuple[Tensor, Tensor]:
    """(λ, β) as [C, n], with C = 1 for one output."""
    lam, beta = sites.by_latent()
    return (lam, beta) if num_outputs is not None else (lam.unsqueeze(0), beta.unsqueeze(0))


def stacked(states: list[State], num_outputs: int | None) -> tuple[Tensor, Tensor]:
    """Means and variances, [n] or [n, C]."""
    if num_outputs is None:
        return states[0].mean, states[0].var
    return torch.stack([s.mean for s in states], -1), torch.stack([s.var for s in states], -1)


def ascend(work: Search, lr: float, max_steps: int, tol: float, bar: Progress) -> tuple[bool, int]:
    """Take steps of Adam on the hyperparameters, with the sites found anew before each; say whether they ended.

    Where steps no longer gain, Adam starts again from the best point, with a third of the step.
    """
    parameters = work.hyper.trained()
    if not parameters:
        return True, 0
    optimiser = torch.optim.Adam(parameters, lr=lr, maximize=True)
    best, kept, since, shrinks = -float("inf"), [p.detach().clone() for p in parameters], 0, 0
    for step in range(1, max_steps + 1):
        work.find()
        value = work.bound.value
        bar.bound(value, len(work.data))
        since = 0 if value > best + tol * len(work.data) else since + 1
        if value > best:
            best, kept = value, [p.detach().clone() for p in parameters]
        if since >= _WINDOW:
            since, shrinks = 0, shrinks + 1
            _restore(parameters, kept)
            if shrinks > _SHRINKS:
                return True, step - 1
            optimiser = torch.optim.Adam(parameters, lr=lr * 0.3**shrinks, maximize=True)
            work.find()
        slopes, _ = gradient(work.hyper, work.data, work.process, work.states, groups=1)
        for p, g in zip(parameters, slopes, strict=True):
            p.grad = g
        optimiser.step()
        bar.round(f"step {step}")
    _restore(parameters, kept)
    return False, max_steps


@torch.no_grad()
def _restore(parameters: list[nn.Parameter], values: list[Tensor]) -> None:
    for p, value in zip(parameters, values, strict=True):
        p.copy_(value)


def gradient(
    hyper: Hyper, data: Data, process: Products, states: list[State], *, groups: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the gradient of the bound and the log prior, and its standard errors over groups of probes."""
    parameters = hyper.trained()
    probes = states[0].u.shape[-1]
    cuts = torch.linspace(0, probes, min(groups, probes) + 1, device="cpu").round().int().tolist()
    several = []
    with torch.enable_grad():
        for first, last in itertools.pairwise(cuts):
            some = [process.by_probes(s, slice(first, last)) for s in states]
            mean, var = stacked(some, hyper.num_outputs)
            own = expected_log_prob(hyper.likelihood, data.y, mean, var, **data.params).sum() + hyper.log_prior()
            several.append(_grads(objective(process, some) + own, parameters))
    terms = [torch.stack(t) for t in zip(*several, strict=True)]
    if len(several) == 1:
        return several[0], [torch.full_like(g, torch.inf) for g in several[0]]
    return [t.mean(0) for t in terms], [t.std(0) / len(t) ** 0.5 for t in terms]


def _grads(value: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    if not value.requires_grad:
        return [torch.zeros_like(p) for p in parameters]
    found = torch.autograd.grad(value, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
