"""`DualGP`: a sparse variational Gaussian process in dual form, fitted in one call."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from os import PathLike
from typing import Any

import torch
from gpytorch.kernels import Kernel
from gpytorch.likelihoods import Likelihood
from gpytorch.means import Mean
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from dualgp.checks import check_number
from dualgp.distributed import Ranks
from dualgp.duals import num_outputs_of
from dualgp.errors import InputError
from dualgp.gp import storage, stream
from dualgp.gp.arguments import check_arguments, check_fit, check_memory, check_mode, check_same
from dualgp.gp.condition import Conditioned, condition
from dualgp.gp.data import Data, check_inputs, check_modules, check_training_data, check_weights
from dualgp.gp.fit import FitResult, Outcome, fit_batches, fit_in_memory, initial_inducing_points
from dualgp.gp.fitted import FittedGP
from dualgp.gp.hyper import Hyper
from dualgp.gp.memory import Memory
from dualgp.gp.minibatch import Batches, TensorBatches
from dualgp.gp.progress import Progress
from dualgp.gp.start import workable_start
from dualgp.gp.stop import Stop
from dualgp.gp.stream import UpdateResult
from dualgp.gp.update import Settings
from dualgp.posterior import Posterior
from dualgp.selection import RULES, Rule, check_rule


class DualGP(FittedGP):
    """A sparse Gaussian process with any GPyTorch kernel, mean and likelihood: prior plus sites, on M inducing inputs.

    `fit` finds the sites by natural gradients, and the hyperparameters and inducing inputs Z by L-BFGS on the bound
    with the sites held (form S), until neither gains; nothing is there to tune. The kernel, mean and likelihood given
    are this module's own submodules and are updated by `fit`, as in GPyTorch; freeze a parameter with
    `requires_grad_(False)`.

    `update` takes one batch after the other, for ever: the state is O(M² + memory), the cost of a batch does not grow.

    Args:
        kernel: a GPyTorch kernel. For C outputs: no batch shape (shared) or batch shape [C] (one each).
        likelihood: a GPyTorch likelihood (see `dualgp.duals` for which).
        mean: a GPyTorch mean; zero if None.
        num_inducing: M; the smaller of 100 and n if None. Z is then chosen from the data by conditional variance.
        inducing_points: Z itself, [M, D] or [*batch, M, D], in place of `num_inducing`.
        num_outputs: C for a one-dimensional likelihood with targets [n, C]; softmax and multitask likelihoods say it
            themselves.
        jitter: added to K_zz, relative to the mean of its diagonal; 10⁻⁸ for float64 inputs and 10⁻⁶ for float32 if
            None.
        memory: how many past data a stream keeps, with their sites, to find them anew; twice as many as inducing
            inputs, 40 for each output and 100 at least if None, none if 0. `fit` fills it only if it is given.
        memory_rule: which data those are: "random" (a fair sample of the stream: nothing pulls the hyperparameters),
            "leverage" (β·v), "sensitivity" (|α|·v), "recency", "balanced" (by class), or a function of
            `dualgp.Candidates` that returns one score per datum.
        window: a sliding window: exactly the last `window` data count; when some leave, the sites of the others are
            found anew. In place of `memory`.
        generator: source of randomness of the stream (for "random" memory); its own, seeded with 0, if None.

    Raises:
        UnsupportedError: if the kernel or likelihood cannot be used, by name and with what to use instead.
        InputError: if the arguments contradict each other.

    Source: Adam, Chang, Khan & Solin 2021, "Dual parameterization of sparse variational Gaussian processes"; Chang et
    al. 2023, "Memory-based dual Gaussian processes for sequential learning". Deviation: sites per datum are kept and
    re-expanded at every θ (form S), where their code keeps sums in k-space.

    Example:
        >>> import gpytorch
        >>> x = torch.linspace(0, 6, 40).unsqueeze(-1)
        >>> kernel = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel())
        >>> gp = DualGP(kernel, gpytorch.likelihoods.GaussianLikelihood(), num_inducing=12)
        >>> result = gp.fit(x, x.sin().squeeze(-1))
        >>> mean, var = gp.predict(torch.tensor([[1.5]]))
        >>> round(mean.item(), 1)
        1.0
    """

    def __init__(
        self,
        kernel: Kernel,
        likelihood: Likelihood,
        *,
        mean: Mean | None = None,
        num_inducing: int | None = None,
        inducing_points: Tensor | None = None,
        num_outputs: int | None = None,
        jitter: float | None = None,
        memory: int | None = None,
        memory_rule: str | Rule = "random",
        window: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_arguments(kernel, likelihood, mean, num_inducing, inducing_points, num_outputs, jitter)
        check_memory(memory, memory_rule, window)
        self.memory_size, self.memory_rule, self.window = memory, memory_rule, window
        self.generator = torch.Generator("cpu").manual_seed(0) if generator is None else generator
        self.kernel, self.likelihood, self.mean = kernel, likelihood, mean
        self.num_inducing = num_inducing
        fixed = num_outputs_of(likelihood)
        self.num_outputs = num_outputs if fixed is None else fixed
        self.jitter = jitter
        self.result: FitResult | None = None
        self._Z_given = inducing_points is not None
        if inducing_points is not None:
            check_inputs(inducing_points, what="inducing_points")
            inducing_points = inducing_points.detach().clone()
        self._register(inducing_points)

    def fit(
        self,
        X: Any,
        y: Tensor | None = None,
        *,
        batch_size: int | None = None,
        learn_inducing: bool = True,
        learn_hyperparameters: bool = True,
        tol: float = 1e-4,
        max_rounds: int = 50,
        generator: torch.Generator | None = None,
        progress: bool | None = None,
        process_group: Any = None,
        checkpoint: str | PathLike[str] | None = None,
    ) -> FitResult:
        """Fit sites, hyperparameters and Z; return how it went. The model is unchanged if this raises.

        Args:
            X: inputs [*batch, n, D] in float32 or float64; or a DataLoader (anything that can be iterated again and
                again) of (X, y), or (X, y, noise) for fixed noise. With a loader, no more than a batch and a sample
                of max(10 M, 1000) data are held.
            y: targets [*batch, n], or [*batch, n, C] for several outputs; labels 0 … C − 1 for softmax. None with a
                loader.
            batch_size: learn hyperparameters by batches of this size even though the data are in memory.
            learn_inducing: whether Z moves; else it stays where it was given, or first chosen.
            learn_hyperparameters: whether parameters of kernel, mean and likelihood move; else only sites are found.
            tol: the round (or epoch) that gains less, in nats per datum, is the last.
            max_rounds: limit on rounds (epochs, with batches).
            generator: for the choice of subsets and batches; torch's default one otherwise.
            progress: whether to show a bar; None shows one if standard error is a terminal and the fit takes over a
                second.
            process_group: of `torch.distributed`, `torch.distributed.group.WORLD` for all processes: each calls `fit`
                with its own share of the data, and all hold the same model of all data afterwards. `sites` are then
                those of the share; `batch_size` and the batches of a loader are per process.
            checkpoint: a file that is written anew after each round, for `load` and another `fit` from there, should
                this one not end; by rank 0, if there are several.

        Raises:
            InputError: for data of the wrong shape, dtype, device or value, or too few for M; on every rank, if they
                disagree on model, arguments or shapes.
            NotPositiveDefiniteError: if the kernel matrix of Z cannot be factorised.
            DistributedError: if another rank has raised, has ended or does not answer.
        """
        with Ranks(process_group, _remedy(checkpoint)) as ranks:
            check_mode()
            check_fit(tol, max_rounds, batch_size)
            what = {"X given as": "tensors" if _is_array(X) else "a loader", "in batches": batch_size is not None}
            learn = {"learn_inducing": learn_inducing, "learn_hyperparameters": learn_hyperparameters}
            check_same(self, ranks, {**what, **learn, "tol": tol, "max_rounds": max_rounds})
            source = self._source(X, y, batch_size, generator, ranks)
            first = ranks.rank == 0
            write = None if checkpoint is None or not first else storage.checkpoint(self, checkpoint)
            with Progress(progress if first else False, write) as bar:
                M = self.num_inducing or (100 if self.inducing_points is None else self.inducing_points.shape[-2])
                make = functools.partial(self._working_copy, learn_inducing, learn_hyperparameters)
                how = M, Stop(tol, max_rounds), bar, generator, ranks
                if isinstance(source, Data):
                    outcome = fit_in_memory(make, source, *how)
                else:
                    outcome = fit_batches(make, source, *how)
        data = source if isinstance(source, Data) else source.whole()
        memory = None
        if isinstance(data, Data) and (self.memory_size or self.window):
            draw = self.generator.get_state()
            try:
                memory = stream.choose_of_fit(self, outcome, data, self._settings(True))
            except BaseException:
                self.generator.set_state(draw)
                raise
        self._adopt(outcome)
        if memory is not None:
            stream.remember_fit(self, memory, self._settings(True))
        self.result = outcome.result
        return outcome.result

    def update(
        self,
        X: Tensor,
        y: Tensor,
        *,
        weights: Tensor | None = None,
        learn_hyperparameters: bool = True,
        move_inducing: bool | None = None,
        tol: float = 1e-4,
        **params: Tensor,
    ) -> UpdateResult:
        """Take in a batch of any size, one datum included; old data are not needed. Unchanged if this raises.

        Z takes in inputs of the batch; the sites of batch and memory are found, given all that is forgotten;
        hyperparameters follow on the bound on everything seen; memory is chosen anew; Z gives up what costs least. Each
        step is a function of `dualgp.gp.update`. Positive hyperparameters are held by log θ ~ N(log θ₀, 2²) about where
        the stream began, which a thousand data overrule and a few of one class do not. At fixed hyperparameters and Z,
        Gaussian likelihoods give what all data at once would give.

        Args:
            X: inputs [n, D], in one dtype throughout.
            y: targets [n], or [n, C] for several outputs; a softmax model says its number of classes at the start, and
                new ones may appear at any time.
            weights: powers to which the likelihoods are raised, [n], ≥ 0; 1 if None.
            learn_hyperparameters: whether kernel, mean and likelihood move.
            move_inducing: whether Z does; None: unless it was given as `inducing_points`.
            tol: nats per datum to which sites and hyperparameters are found.
            params: per-datum parameters, such as `noise` [n].

        Raises:
            InputError: for data of the wrong shape, dtype, device or value.
            NotPositiveDefiniteError: if no Gaussian is left.

        Source: Chang et al. 2023; the bound and the choice of Z are this package's own (see `dualgp.gp.update`).

        Example:
            >>> import gpytorch
            >>> gp = DualGP(gpytorch.kernels.RBFKernel(), gpytorch.likelihoods.GaussianLikelihood(), num_inducing=10)
            >>> x = torch.linspace(0, 6, 60).unsqueeze(-1)
            >>> for batch in x.split(12):
            ...     result = gp.update(batch, batch.sin().squeeze(-1))
            >>> result.num_seen, round(gp.predict(torch.tensor([[1.5]]))[0].item(), 1)
            (60, 1.0)
        """
        check_mode()
        check_number("tol", tol, above=0)
        data = self._check(X, y, **params)
        if weights is not None:
            data = dataclasses.replace(data, weights=check_weights(weights, data))
        move = not self._Z_given if move_inducing is None else move_inducing
        return stream.take(self, data, self._settings(move, tol), learn_hyperparameters)

    def update_all(
        self, batches: Iterable[tuple[Tensor, ...]], *, progress: bool | None = None, **options: Any
    ) -> UpdateResult:
        """Call `update` for every batch (X, y) or (X, y, noise), with a progress bar; return how the stream stands.

        Args:
            batches: anything that can be iterated over, a torch DataLoader for instance; never more than one is held.
            progress: as in `fit`.
            options: as in `update`.

        Raises:
            InputError: as in `update`, or if there was no batch; what came before the bad batch is kept.
        """
        result = None
        with tqdm(batches, desc="update", unit="batch", disable=None if progress is None else not progress) as bar:
            for X, y, *noise in bar:
                result = self.update(X, y, **({"noise": noise[0]} if noise else {}), **options)
                bar.set_postfix_str(str(result), refresh=False)
        if result is None:
            raise InputError("There was no batch.")
        return result

    @property
    def memory(self) -> Memory | None:
        """The data that a stream keeps, with their sites and ids (numbers of arrival); None if there are none."""
        state = stream.read(self)
        return None if state is None else state.memory

    def forget(self, ids: Tensor) -> None:
        """Take data of memory out of the posterior, exactly: it is as if their sites had never been added.

        Args:
            ids: numbers of arrival, as in `memory.ids`.

        Raises:
            InputError: if one is not in memory: what is forgotten is one site, which cannot be taken apart.
            NotPositiveDefiniteError: if no Gaussian is left; the model is unchanged.
        """
        stream.forget(self, ids)

    def fade(self, factor: float) -> None:
        """Forget by a factor: the likelihood of everything seen so far is raised to this power, in [0, 1].

        Called after every update it makes old data count less and less (exponential forgetting).
        """
        stream.fade(self, factor)

    def move_inducing(self, inducing_points: Tensor) -> None:
        """Put Z elsewhere, [M', D]: lossless if the new Z contains the old; memory is expanded anew there.

        Raises:
            InputError: if the points are not finite or of another dimension.
        """
        check_inputs(inducing_points, num_dims=self.posterior.basis.inducing_points.shape[-1], what="inducing_points")
        stream.move_inducing(self, inducing_points)

    def condition(self, X: Tensor, y: Tensor, *, recall: bool = False, **params: Tensor) -> Conditioned:
        """Return the model given more data, as a value, at these hyperparameters; this one is untouched.

        Exact in the new data (as if Z took in X), for any likelihood; X may have batch dimensions [*b, n, D] (with y
        [*b, n]), and the result is differentiable in X: fantasies, for Bayesian optimisation.

        Args:
            X: new inputs.
            y: their targets.
            recall: whether the sites of what memory holds are found anew too, at (memory + n)² numbers for each of the
                batch: a refit at Z ∪ X, if memory and Z hold all data. Else old sites stay where they are, which for
                labels and counts is an approximation of the variance; Gaussian sites never change.
            params: per-datum parameters, such as `noise`.

        Raises:
            InputError: for data of the wrong shape, dtype, device or value.
        """
        data = self._check(X, y, **params)
        self.posterior.basis.check_inputs(X)
        data = dataclasses.replace(data, x=data.x.clone(), y=data.y.clone())  # kept: the caller may change its own
        return condition(self.posterior, self.likelihood, data, self.memory if recall else None)

    def save(self, path: str | PathLike[str]) -> None:
        """Write everything to a safetensors file, atomically: a stream goes on from it to the same last bit.

        Raises:
            NotFittedError: before `fit`.
        """
        storage.save(self, path)

    @classmethod
    def load(
        cls,
        path: str | PathLike[str],
        kernel: Kernel,
        likelihood: Likelihood,
        *,
        mean: Mean | None = None,
        memory_rule: str | Rule | None = None,
    ) -> DualGP:
        """Return the model saved at `path`, a stream with all it needs to go on; nothing in the file is executed.

        Args:
            path: written by `save`.
            kernel: of the kind that was saved; its parameters are overwritten, as are those of the others.
            likelihood: of the kind that was saved.
            mean: of the kind that was saved.
            memory_rule: needed if it was a function.

        Raises:
            InputError: if the file is not of this format or version, is truncated, or does not fit the modules.
        """
        return storage.load(cls, path, kernel, likelihood, mean, memory_rule)

    def _hyper(
        self,
        kernel: Kernel,
        mean: Mean | None,
        likelihood: Likelihood,
        Z: Tensor,
        learn_inducing: bool,
        learn_hyperparameters: bool,
    ) -> Hyper:
        return Hyper(
            kernel,
            mean,
            likelihood,
            Z,
            dtype=Z.dtype,
            num_outputs=self.num_outputs,
            jitter=self.jitter,
            learn_inducing=learn_inducing,
            learn_hyperparameters=learn_hyperparameters,
        )

    def _settings(self, move_inducing: bool, tol: float = 1e-4) -> Settings:
        if self._Z_given and self.inducing_points is not None:
            limit = self.inducing_points.shape[-2]
        else:
            limit = self.num_inducing or 100
        capacity = self.window or self.memory_size
        if capacity is None:
            capacity = max(100, 2 * limit, 40 * (self.num_outputs or 1))
        rule = check_rule("recency" if self.window else self.memory_rule, RULES, "memory_rule")
        fair = rule is RULES["random"]
        return Settings(limit, capacity, rule, fair, move_inducing, self.window is not None, tol)

    def _working_copy(self, learn_inducing: bool, learn_hyperparameters: bool, data: Data) -> Hyper:
        held = self._Z_given or not learn_inducing
        kernel, mean, likelihood = self.kernel, self.mean, self.likelihood
        if learn_hyperparameters:
            kernel, mean, likelihood = workable_start(kernel, mean, likelihood, data, self.num_outputs)
        Z = initial_inducing_points(kernel, self.inducing_points, held, self.num_inducing, data)
        return self._hyper(kernel, mean, likelihood, Z, learn_inducing, learn_hyperparameters)

    def _source(
        self, X: Any, y: Tensor | None, batch_size: int | None, generator: torch.Generator | None, ranks: Ranks
    ) -> Data | TensorBatches | Batches:
        """What `fit` was given, checked as far as it can be before it is read."""
        if isinstance(X, Dataset):
            raise InputError(f"A {type(X).__name__} has no batches: give DataLoader(dataset, batch_size=...).")
        if not _is_array(X):
            if y is not None:
                raise InputError(
                    f"With targets y X must be a torch.Tensor, got {type(X).__name__}; a loader gives both."
                )
            return Batches(X, self._check_batch)
        if y is None:
            raise InputError("fit(X, y) needs the targets y; only a DataLoader goes without.")
        data = check_training_data(self.likelihood, X, y, self.num_outputs, ranks)
        check_modules(data.x, self.kernel, self.mean, self.likelihood)
        return data if batch_size is None else TensorBatches(data, batch_size, generator)

    def _adopt(self, outcome: Outcome) -> None:
        """Take over what was learned on the working copy."""
        self._hold(outcome.hyper, outcome.posterior, outcome.num_rows)
        sites = outcome.sites
        self.lam = None if sites is None else sites.lam
        self.beta = None if sites is None else sites.beta
        if outcome.power is not None:
            stream.set_noise(self, stream.noise_of(self.likelihood, float(outcome.result.num_data), outcome.power))

    def _hold(self, hyper: Hyper, posterior: Posterior, num_rows: int) -> None:
        """Take over hyperparameters, Z and q, and nothing of single data."""
        self._take_hyperparameters(hyper)
        self.inducing_points, self.jitter = posterior.basis.inducing_points.clone(), posterior.basis.requested_jitter
        for name in (*stream.BUFFERS, "lam", "beta"):
            setattr(self, name, None)
        self.site_lam, self.site_B = posterior.site.lam, posterior.site.B
        self.num_seen = torch.tensor(num_rows, device=posterior.site.lam.device)
        self._posterior = Posterior(self._basis(), posterior.site)

    @torch.no_grad()
    def _take_hyperparameters(self, hyper: Hyper) -> None:
        for mine, learned in (
            (self.kernel, hyper.kernel),
            (self.mean, hyper.mean),
            (self.likelihood, hyper.likelihood),
        ):
            if mine is not None and learned is not None:
                mine.to(hyper.Z.device).load_state_dict(learned.state_dict())

    def _check_batch(self, x: Tensor, y: Tensor, noise: Tensor | None = None) -> Data:
        return self._check(x, y, **({} if noise is None else {"noise": noise}))


def _is_array(X: Any) -> bool:
    return isinstance(X, Tensor) or hasattr(X, "__array__")


def _remedy(checkpoint: str | PathLike[str] | None) -> str:
    """What to do when another process of a fit is lost."""
    if checkpoint is None:
        return "The model is unchanged; a fit with checkpoint= can be taken up again."
    return f"The model is unchanged; load {checkpoint}, if a round had ended, and fit again to go on from there."
