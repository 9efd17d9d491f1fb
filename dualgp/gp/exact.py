"""`ExactGP`: a Gaussian process without inducing inputs, of any likelihood, by products with its kernel matrix."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import Any, NamedTuple

import torch
from gpytorch.kernels import Kernel
from gpytorch.likelihoods import Likelihood
from gpytorch.means import Mean
from torch import Tensor

from dualgp.basis import InducingBasis
from dualgp.checks import check_number
from dualgp.draws import normal
from dualgp.duals import num_outputs_of
from dualgp.errors import ConvergenceWarning, InputError, NotFittedError, check_count
from dualgp.gp import exact_storage
from dualgp.gp.arguments import check_arguments
from dualgp.gp.ascent import Search, ascend, gradient, stacked
from dualgp.gp.data import check_inputs, check_modules, check_training_data
from dualgp.gp.hyper import Hyper
from dualgp.gp.products import Effort, Fitted
from dualgp.gp.progress import Progress, TracePoint
from dualgp.gp.scoring import ScoredModel
from dualgp.gp.start import workable_start
from dualgp.kernels.forms import as_form
from dualgp.posterior import Posterior
from dualgp.sites import Sites
from dualgp.solvers import Estimate
from dualgp.threads import ONE_AT_A_TIME

_GROUPS = 4  # of probes, whose spread is the standard error of a gradient


@dataclass
class ExactResult:
    """How a fit went.

    Attributes:
        bound: the evidence lower bound in nats with its standard error over the probes; of Gaussian likelihoods, the
            log marginal likelihood.
        num_data: n.
        steps: on hyperparameters.
        converged: whether the stopping rule was met before `max_steps`.
        iterations: products with the kernel matrix in all solves together.
        clipped: how many sites had β < 0, and were given β = 0 with α kept.
        seconds: wall time.
        trace: the bound after each step.
    """

    bound: Estimate
    num_data: int
    steps: int
    converged: bool
    iterations: int
    clipped: int
    seconds: float
    trace: list[TracePoint] = field(repr=False)


class BoundGradient(NamedTuple):
    """Gradients of the bound in the raw parameters, by name, and their standard errors over groups of probes."""

    values: dict[str, Tensor]
    standard_errors: dict[str, Tensor]


class ExactGP(ScoredModel):
    """A Gaussian process with Z = X, for n at which no n × n matrix fits: sites per datum, found by iterative solves.

    Nothing larger than n × rank is held. Natural-gradient steps on the sites are solves with I + B^½KB^½ by conjugate
    gradients under a greedy pivoted-Cholesky preconditioner; marginal variances, the log-determinant of the bound and
    its gradient are the preconditioner's own, corrected by probes, with standard errors: the higher the rank, the
    smaller. (With rank n all are exact.) Hyperparameters follow that gradient by Adam.

    Args:
        kernel: a GPyTorch kernel without a batch shape; all outputs share it.
        likelihood: a GPyTorch likelihood (see `dualgp.duals` for which). Where one is not log-concave, sites with β < 0
            are given β = 0 with α kept, so that the precision stays positive: means are then stationary, variances not
            quite (`result.clipped` counts them).
        mean: a GPyTorch mean; zero if None.
        num_outputs: C for a one-dimensional likelihood with targets [n, C].
        rank: of the preconditioner.
        num_probes: S ≥ 2.
        tol: relative residual of all solves; 1e-4 for float64 inputs and 1e-3 for float32 if None. The rounding of
            float32 products leaves about 1e-8 of the largest eigenvalue of I + B^½KB^½.
        max_iterations: of one solve.
        backend: of products with the kernel matrix (see `LazyKernel`).
        generator: of the probes, drawn once for a fit; seeded with 0 if None.

    Raises:
        UnsupportedError: if the kernel or likelihood cannot be used.
        InputError: if the arguments contradict each other.

    Source: Khan et al. 2013; Adam et al. 2021 (the steps); Gardner et al. 2018 and Wenger et al. 2022 (the solves).

    Example:
        >>> import gpytorch
        >>> x = torch.linspace(0, 6, 50).unsqueeze(-1)
        >>> gp = ExactGP(gpytorch.kernels.RBFKernel(), gpytorch.likelihoods.BernoulliLikelihood(), rank=20)
        >>> result = gp.fit(x, (x.sin() > 0).squeeze(-1).double(), learn_hyperparameters=False)
        >>> bool(gp.predict(torch.tensor([[1.5]]))[0] > 1)
        True
    """

    def __init__(
        self,
        kernel: Kernel,
        likelihood: Likelihood,
        *,
        mean: Mean | None = None,
        num_outputs: int | None = None,
        rank: int = 100,
        num_probes: int = 16,
        tol: float | None = None,
        max_iterations: int = 1000,
        backend: str = "auto",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_arguments(kernel, likelihood, mean, None, None, num_outputs, 0.0)
        as_form(kernel)
        check_count("rank", rank, 1)
        check_count("num_probes", num_probes, 2)
        check_count("max_iterations", max_iterations, 1)
        if not (tol is None or (isinstance(tol, int | float) and 0 < tol < 1)):
            raise InputError(f"tol must be a number between 0 and 1, or None, got {tol!r}.")
        self.kernel, self.likelihood, self.mean = kernel, likelihood, mean
        fixed = num_outputs_of(likelihood)
        self.num_outputs = num_outputs if fixed is None else fixed
        self.tol, self.effort = tol, Effort(rank, num_probes, 1e-4, max_iterations, backend)
        self.generator = torch.Generator("cpu").manual_seed(0) if generator is None else generator
        self.result: ExactResult | None = None
        self._fitted: Fitted | None = None
        self._stored: dict[str, Tensor] = {}  # a fit that was loaded, until it is asked for

    def fit(
        self,
        X: Tensor,
        y: Tensor,
        *,
        learn_hyperparameters: bool = True,
        lr: float = 0.1,
        max_steps: int = 100,
        tol: float = 1e-4,
        progress: bool | None = None,
    ) -> ExactResult:
        """Fit sites and hyperparameters; return how it went. The model is unchanged if this raises.

        Args:
            X: inputs [n, D] in float32 or float64, which is the dtype of products with the kernel matrix.
            y: targets [n], or [n, C].
            learn_hyperparameters: whether parameters of kernel, mean and likelihood move; else only sites are found.
            lr: step of Adam in the raw parameters.
            max_steps: limit on steps of Adam.
            tol: nats per datum that one of five steps must gain, and a pass over the sites.
            progress: as in `DualGP.fit`.

        Raises:
            InputError: for data of the wrong shape, dtype, device or value, or too many for the memory.
            SolverError: if a solve does not reach its tolerance: with residual, iterations and what to do.
        """
        check_count("max_steps", max_steps, 1)
        check_number("tol", tol, above=0)
        check_number("lr", lr, above=0)
        if isinstance(X, Tensor) and X.ndim != 2:
            raise InputError(f"X must have shape [n, D], got {tuple(X.shape)}; use one ExactGP each.")
        data = check_training_data(self.likelihood, X, y, self.num_outputs)
        check_modules(data.x, self.kernel, self.mean, self.likelihood)
        data = replace(data, x=data.x.clone(), y=data.y.clone())  # kept: the caller may change its own
        shape = len(data) + min(self.effort.rank, len(data)), self.effort.num_probes
        noise = normal(shape, X.new_empty(0, dtype=torch.float64), self.generator)
        start = self.kernel, self.mean, self.likelihood
        if learn_hyperparameters:
            start = workable_start(*start, data, self.num_outputs)
        hyper = Hyper(
            *start, data.x[:1], dtype=X.dtype,
            num_outputs=self.num_outputs, jitter=0.0, learn_inducing=False, learn_hyperparameters=learn_hyperparameters,
        )  # fmt: skip
        work = Search(hyper, data, self.effort_in(X.dtype), noise, tol)
        with Progress(progress) as bar:
            converged, steps = ascend(work, lr, max_steps, tol, bar)
            hyper.round()
            work.find()
            bar.bound(work.bound.value, len(data))
        fitted = Fitted(hyper, data, work.process, work.states)
        if not converged:
            warnings.warn(
                f"The bound still rose after {steps} steps on the hyperparameters: raise max_steps or lr.",
                ConvergenceWarning,
                stacklevel=2,
            )
        self._take(hyper)
        self._fitted, self._stored = fitted, {}
        self.result = ExactResult(
            work.bound, len(data), steps, converged, work.iterations, work.clipped, bar.seconds, bar.trace
        )
        return self.result

    @property
    def sites(self) -> Sites:
        """(λ, β) of every training datum, in the order given; posterior = prior + Σ sites."""
        states = self._ready().states
        lam, beta = (torch.stack([getattr(s, name) for s in states]) for name in ("lam", "beta"))
        multi = self.num_outputs is not None
        return Sites.from_latent(lam, beta, True) if multi else Sites(lam[0], beta[0])

    @property
    def marginals(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of f at the training inputs, [n] or [n, C], in float64; variances have errors by probes."""
        return stacked(self._ready().states, self.num_outputs)

    def predict(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance of f(x), each [T] or [T, C], by solves for a block of x at a time: no probes.

        Costs a solve in float64 for each block of 2²⁴/n inputs; for means alone `predict_mean` is one product, and for
        many inputs `posterior` is a sparse stand-in.

        Raises:
            SolverError: if a solve does not reach its tolerance.
            InputError: for inputs of the wrong shape or values, or if hyperparameters were set by hand since the fit.
        """
        fitted = self._ready()
        mean = self.predict_mean(x)
        return mean, self._present(fitted.process.predict_var(x, fitted.states), x)

    def predict_mean(self, x: Tensor) -> Tensor:
        """Return the mean of f(x), [T] or [T, C], in one product."""
        fitted = self._ready()
        check_inputs(x, num_dims=fitted.data.x.shape[-1], what="x")
        return self._present(fitted.process.predict_mean(x.to(fitted.data.x.dtype), fitted.states), x)

    def posterior(self, num_inducing: int | None = None) -> Posterior[InducingBasis]:
        """Return prior + Σ sites in the basis of the preconditioner's pivots: predictions at any number of inputs.

        The sites are those found with Z = X, the posterior is that of a sparse model with them.

        Args:
            num_inducing: how many of the pivots; all if None.
        """
        fitted = self._ready()
        if num_inducing is not None:
            check_count("num_inducing", num_inducing, 1)
        rows = torch.tensor(fitted.process.pivots[:num_inducing], device=fitted.data.x.device)
        hyper = fitted.hyper
        basis = InducingBasis(hyper.kernel, fitted.data.x[rows], hyper.mean, num_outputs=self.num_outputs)
        return Posterior(basis).add(fitted.data.x, self.sites)

    def bound_gradient(self) -> BoundGradient:
        """Return the gradient of the bound (and log prior) in the raw parameters at the fit, with standard errors.

        Exact in the limit of converged sites, up to the probes.
        """
        fitted = self._ready()
        hyper = copy.deepcopy(fitted.hyper).requires_grad_(True)
        hyper.Z.requires_grad_(False)
        process = copy.copy(fitted.process)
        process.kernel, process.mean = hyper.kernel, hyper.mean
        process.K = process.K.of(hyper.kernel)
        names = [name for name, p in hyper.named_parameters() if p.requires_grad]
        means, errors = gradient(hyper, fitted.data, process, fitted.states, groups=_GROUPS)
        return BoundGradient(dict(zip(names, means, strict=True)), dict(zip(names, errors, strict=True)))

    def save(self, path: str | PathLike[str]) -> None:
        """Write everything to a safetensors file, atomically, the training data included (`result` is not).

        Raises:
            NotFittedError: before `fit`.
            InputError: if hyperparameters have been set by hand since.
        """
        exact_storage.save(self, path)

    @classmethod
    def load(
        cls, path: str | PathLike[str], kernel: Kernel, likelihood: Likelihood, *, mean: Mean | None = None
    ) -> ExactGP:
        """Return the model saved at `path`: on an equal machine it goes on to the last bit. Nothing is executed.

        The preconditioner, n × rank, is not in the file and is made anew, in less than the time of a product.

        Args:
            path: written by `save`.
            kernel: of the kind that was saved; its parameters are overwritten, as are those of the others.
            likelihood: of the kind that was saved.
            mean: of the kind that was saved.

        Raises:
            InputError: if the file is not of this format or version, is truncated, or does not fit the modules.
        """
        return exact_storage.load(cls, path, kernel, likelihood, mean)

    def effort_in(self, dtype: torch.dtype) -> Effort:
        """Return what solves may take for inputs of a dtype."""
        tol = 1e-4 if dtype == torch.float64 else 1e-3
        return self.effort._replace(tol=tol if self.tol is None else self.tol)

    @property
    def fitted(self) -> bool:
        """Whether there are sites, by `fit` or by loading."""
        return self._fitted is not None or bool(self._stored)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.fitted:
            held = exact_storage.pack(self._ready())
            destination.update({prefix + name: values for name, values in held.items()})

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *args: Any) -> None:
        mine = {name: t for name, t in state.items() if name.startswith(prefix + exact_storage.FIT)}
        self._fitted = self.result = None
        self._stored = {name.removeprefix(prefix): t.detach().clone() for name, t in mine.items()}
        rest = {name: t for name, t in state.items() if name not in mine}
        super()._load_from_state_dict(rest, prefix, *args)

    def _present(self, values: Tensor, like: Tensor) -> Tensor:
        return (values.mT if self.num_outputs is not None else values[0]).to(like.dtype)

    def _ready(self) -> Fitted:
        """What a fit left; raises NotFittedError before one, and InputError after hyperparameters were set by hand."""
        fitted = self._fitted or self._unpacked()
        if not all(torch.equal(new.to(old), old) for old, new in self._pairs(fitted.hyper)):
            raise InputError(
                "Hyperparameters have been set by hand since the fit, and sites belong to those of the fit: call "
                "fit(X, y) again, with learn_hyperparameters=False to keep them."
            )
        return fitted

    def _unpacked(self) -> Fitted:
        with ONE_AT_A_TIME, torch.inference_mode(False):  # it outlives the caller's context
            if self._fitted is None:
                if not self._stored:
                    raise NotFittedError("The model has no sites yet: call fit(X, y).")
                here = next((p.device for p in self.parameters()), torch.device("cpu"))
                stored = {name: t.to(here) for name, t in self._stored.items()}
                self._fitted, self._stored = exact_storage.unpack(self, stored), {}
            return self._fitted

    @torch.no_grad()
    def _take(self, hyper: Hyper) -> None:
        """Take over what was learned on the working copy."""
        for old, new in self._pairs(hyper):
            old.copy_(new)

    def _pairs(self, hyper: Hyper) -> Iterator[tuple[Tensor, Tensor]]:
        """Every parameter of the model and what the working copy has for it."""
        for mine, learned in (
            (self.kernel, hyper.kernel),
            (self.likelihood, hyper.likelihood),
            (self.mean, hyper.mean),
        ):
            if mine is not None and learned is not None:
                yield from zip(mine.parameters(), learned.parameters(), strict=True)
