"""`DualGP`: a sparse variational Gaussian process in dual form, fitted in one call."""

from __future__ import annotations

import functools
from os import PathLike
from typing import Any

import torch
from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import Kernel
from gpytorch.likelihoods import Likelihood
from gpytorch.means import Mean
from torch import Tensor, nn
from torch.distributions import Distribution

from dualgp.basis import InducingBasis
from dualgp.duals import check_likelihood, dual_parameters, expected_log_prob, has_batch_shape, num_outputs_of
from dualgp.errors import InputError, NotFittedError, UnsupportedError
from dualgp.gp import storage
from dualgp.gp.data import Data, check_data, check_inputs, check_training_data
from dualgp.gp.fit import FitResult, fit_batches, fit_in_memory, initial_inducing_points
from dualgp.gp.hyper import Hyper
from dualgp.gp.minibatch import Batches, TensorBatches
from dualgp.gp.progress import Progress
from dualgp.gp.stop import Stop
from dualgp.kernels import check_kernel
from dualgp.posterior import Posterior
from dualgp.predictive import log_predictive, predictive_distribution
from dualgp.sites import Site, Sites

_SITE_BUFFERS = ("site_lam", "site_B", "lam", "beta")


class DualGP(nn.Module):
    """A sparse Gaussian process with any GPyTorch kernel, mean and likelihood: prior plus sites, on M inducing inputs.

    `fit` finds the sites by natural gradients, and the hyperparameters and inducing inputs Z by L-BFGS on the bound
    with the sites held (form S), until neither gains; nothing is there to tune. The kernel, mean and likelihood given
    are this module's own submodules and are updated by `fit`, as in GPyTorch; freeze a parameter with
    `requires_grad_(False)`.

    Args:
        kernel: a GPyTorch kernel. For C outputs: no batch shape (shared) or batch shape [C] (one each).
        likelihood: a GPyTorch likelihood (see `dualgp.duals` for which).
        mean: a GPyTorch mean; zero if None.
        num_inducing: M; the smaller of 100 and n if None. Z is then chosen from the data by conditional variance.
        inducing_points: Z itself, [M, D] or [*batch, M, D], in place of `num_inducing`.
        num_outputs: C for a one-dimensional likelihood with targets [n, C]; softmax and multitask likelihoods say it
            themselves.
        jitter: added to K_zz, relative to the mean of its diagonal.

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
        jitter: float = 1e-6,
    ) -> None:
        super().__init__()
        check_kernel(kernel)
        check_likelihood(likelihood)
        if mean is not None and not isinstance(mean, Mean):
            raise UnsupportedError(f"mean must be a gpytorch.means.Mean or None, got {type(mean).__name__}.")
        if num_inducing is not None and inducing_points is not None:
            raise InputError("Give num_inducing or inducing_points, not both.")
        if num_inducing is not None and num_inducing < 1:
            raise InputError(f"num_inducing must be at least 1, got {num_inducing}.")
        fixed = num_outputs_of(likelihood)
        if fixed is not None and num_outputs not in (None, fixed):
            raise InputError(f"{type(likelihood).__name__} has {fixed} outputs, but num_outputs={num_outputs}.")
        if num_outputs is not None and fixed is None and has_batch_shape(likelihood):
            raise UnsupportedError(
                f"{type(likelihood).__name__} with parameters per output or per datum is not supported for num_outputs="
                f"{num_outputs}: use MultitaskGaussianLikelihood(num_tasks={num_outputs}, rank=0), or one DualGP each."
            )
        if num_outputs is not None and num_outputs < 1:
            raise InputError(f"num_outputs must be at least 1 (or None for a single output), got {num_outputs}.")
        if not jitter >= 0:
            raise InputError(f"jitter must be ≥ 0, got {jitter}.")
        self.kernel, self.likelihood, self.mean = kernel, likelihood, mean
        self.num_inducing = num_inducing
        self.num_outputs = fixed if fixed is not None else num_outputs
        self.jitter = jitter
        self.result: FitResult | None = None
        self._Z_given = inducing_points is not None
        if inducing_points is not None:
            check_inputs(inducing_points, what="inducing_points")
            inducing_points = inducing_points.detach().clone()
        self.inducing_points: Tensor | None
        self.site_lam: Tensor | None
        self.site_B: Tensor | None
        self.lam: Tensor | None
        self.beta: Tensor | None
        self.register_buffer("inducing_points", inducing_points)
        for name in _SITE_BUFFERS:
            self.register_buffer(name, None)
        self._posterior: Posterior | None = None

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

        Raises:
            InputError: for data of the wrong shape, dtype, device or value, or too few for M.
            NotPositiveDefiniteError: if the kernel matrix of Z cannot be factorised.
        """
        data = None
        if isinstance(X, Tensor) or hasattr(X, "__array__"):
            if y is None:
                raise InputError("fit(X, y) needs the targets y; only a DataLoader goes without.")
            data = check_training_data(self.likelihood, X, y, self.num_outputs)
        elif y is not None:
            raise InputError("With a loader the targets come from it: call fit(loader).")
        if not (tol > 0 and max_rounds >= 1 and (batch_size is None or batch_size >= 1)):
            raise InputError(
                f"tol must be positive, max_rounds and batch_size at least 1; got {tol}, {max_rounds} and {batch_size}."
            )
        stop = Stop(tol, max_rounds)
        with Progress(progress) as bar:
            M = self.num_inducing or (100 if self.inducing_points is None else self.inducing_points.shape[-2])
            make = functools.partial(self._working_copy, learn_inducing, learn_hyperparameters)
            if data is not None and batch_size is None:
                outcome = fit_in_memory(make, data, M, stop, bar, generator)
            elif data is not None:
                outcome = fit_batches(make, TensorBatches(data, batch_size or 1, generator), M, stop, bar, generator)
            else:
                outcome = fit_batches(make, Batches(X, self._check_batch), M, stop, bar, generator)
        self._adopt(outcome.hyper, outcome.posterior, outcome.sites)
        self.result = outcome.result
        return outcome.result

    @property
    def posterior(self) -> Posterior:
        """The posterior: an immutable value, in the coordinates of the inducing basis.

        When hyperparameters of kernel or mean have been set by hand since, the data's site on u = f(Z) is read under
        the new prior (form U); the sites per datum are then dropped, since they no longer sum to it.

        Raises:
            NotFittedError: before `fit`.
        """
        if self._posterior is None:
            if self.site_lam is None or self.site_B is None:
                raise NotFittedError("This DualGP has no posterior yet: call fit(X, y) or load a fitted one.")
            with torch.inference_mode(False):  # it outlives the caller's context
                self._posterior = Posterior(self._basis(), Site(self.site_lam, self.site_B))
        elif not self._posterior.basis.is_of(self.kernel, self.mean):
            self._posterior = self._posterior.rebase(self._basis())
            self.site_lam, self.site_B = self._posterior.site.lam, self._posterior.site.B
            self.lam = self.beta = None
        return self._posterior

    @property
    def sites(self) -> Sites:
        """(λ, β) of every training datum, in the order given; posterior = prior + Σ sites.

        Raises:
            NotFittedError: before `fit`, or after a fit on a loader, which keeps no data: use `sites_at`.
        """
        if self.site_lam is not None:
            _ = self.posterior
        if self.lam is None or self.beta is None:
            raise NotFittedError(
                "No sites per datum are kept: the model is not fitted, was fitted on a loader, or its hyperparameters "
                "were set by hand since. Call fit(X, y) on tensors, or ask sites_at(X, y)."
            )
        return Sites(self.lam, self.beta, self.num_outputs is not None)

    def forward(self, x: Tensor) -> MultivariateNormal:
        """Return the joint Gaussian of f(x), as GPyTorch's models do (see `Posterior.predict_joint`)."""
        return self.predict_joint(x)

    def predict(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance of the latent f(x), each [*batch, T] or [*batch, T, C]."""
        return self.posterior.predict(self._inputs(x))

    def predict_joint(self, x: Tensor) -> MultivariateNormal:
        """Return the joint Gaussian of f(x); multitask for C outputs."""
        return self.posterior.predict_joint(self._inputs(x))

    def sample(self, x: Tensor, num_samples: int = 1, *, generator: torch.Generator | None = None) -> Tensor:
        """Return joint draws of f(x), [S, *batch, T] or [S, *batch, T, C]."""
        return self.posterior.sample(self._inputs(x), num_samples, generator=generator)

    def predict_likelihood(self, x: Tensor, **params: Tensor) -> Distribution:
        """Return p(y|x) as a torch Distribution, elementwise over data (see `predictive_distribution`)."""
        with torch.no_grad():
            return predictive_distribution(self.likelihood, *self.predict(x), **params)

    def log_predictive(self, x: Tensor, y: Tensor, **params: Tensor) -> Tensor:
        """Return log p(yᵢ|xᵢ) with the shape of y, in float64."""
        data = self._check(x, y, **params)
        with torch.no_grad():
            return log_predictive(self.likelihood, data.y, *self.predict(x), **data.params)

    def nlpd(self, x: Tensor, y: Tensor, **params: Tensor) -> float:
        """Return the mean negative log predictive density, in nats per datum (lower is better)."""
        return float(-self.log_predictive(x, y, **params).mean())

    def elbo(self, x: Tensor, y: Tensor, **params: Tensor) -> float:
        """Return Σᵢ E_q[log p(yᵢ|fᵢ)] − KL(q ‖ p) on given data, in nats."""
        data = self._check(x, y, **params)
        with torch.no_grad():
            elp = expected_log_prob(self.likelihood, data.y, *self.predict(x), **data.params)
        return float(elp.sum() - self.posterior.kl().sum())

    def sites_at(self, x: Tensor, y: Tensor, **params: Tensor) -> Sites:
        """Return the sites (λ = α + βm, β) that data would have at the present posterior; nothing is added."""
        data = self._check(x, y, **params)
        with torch.no_grad():
            m, v = (t.double() for t in self.predict(x))
        duals = dual_parameters(self.likelihood, data.y, m, v, **data.params)
        return Sites(duals.alpha + duals.beta * m, duals.beta, self.num_outputs is not None)

    def save(self, path: str | PathLike[str]) -> None:
        """Write posterior, sites and hyperparameters to a safetensors file, atomically.

        Raises:
            NotFittedError: before `fit`.
        """
        storage.save(self, path)

    @classmethod
    def load(
        cls, path: str | PathLike[str], kernel: Kernel, likelihood: Likelihood, *, mean: Mean | None = None
    ) -> DualGP:
        """Return the model saved at `path`; nothing in the file is executed.

        Args:
            path: written by `save`.
            kernel: of the kind that was saved; its parameters are overwritten, as are those of the others.
            likelihood: of the kind that was saved.
            mean: of the kind that was saved.

        Raises:
            InputError: if the file is not of this format or version, is truncated, or does not fit the modules.
        """
        return storage.load(cls, path, kernel, likelihood, mean)

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Take sites and Z of any size: they are made by `fit`, not by the constructor."""
        for name in ("inducing_points", *_SITE_BUFFERS):
            value = state.get(prefix + name)
            here = next((p.device for p in self.parameters()), torch.device("cpu"))
            setattr(self, name, None if value is None else value.to(here).clone())
        self._posterior = None
        super()._load_from_state_dict(state, prefix, *args)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the state, with the site brought up to hyperparameters set by hand."""
        if self.site_lam is not None:
            _ = self.posterior
        return super().state_dict(*args, **kwargs)

    def _basis(self) -> InducingBasis:
        assert self.inducing_points is not None
        return InducingBasis(
            self.kernel, self.inducing_points, self.mean, num_outputs=self.num_outputs, jitter=self.jitter
        )

    def _working_copy(self, learn_inducing: bool, learn_hyperparameters: bool, data: Data) -> Hyper:
        held = self._Z_given or not learn_inducing
        Z = initial_inducing_points(self.kernel, self.inducing_points, held, self.num_inducing, data)
        return Hyper(
            self.kernel,
            self.mean,
            self.likelihood,
            Z,
            dtype=data.x.dtype,
            num_outputs=self.num_outputs,
            jitter=self.jitter,
            learn_inducing=learn_inducing,
            learn_hyperparameters=learn_hyperparameters,
        )

    @torch.no_grad()
    def _adopt(self, hyper: Hyper, posterior: Posterior, sites: Sites | None) -> None:
        """Take over what was learned on the working copy."""
        for mine, learned in (
            (self.kernel, hyper.kernel),
            (self.mean, hyper.mean),
            (self.likelihood, hyper.likelihood),
        ):
            if mine is not None and learned is not None:
                mine.to(hyper.Z.device).load_state_dict(learned.state_dict())
        self.inducing_points = posterior.basis.inducing_points.clone()
        self.site_lam, self.site_B = posterior.site.lam, posterior.site.B
        self.lam = None if sites is None else sites.lam
        self.beta = None if sites is None else sites.beta
        self._posterior = Posterior(self._basis(), posterior.site)

    def _check(self, x: Tensor, y: Tensor, **params: Tensor) -> Data:
        return check_data(self.likelihood, x, y, self.num_outputs, params)

    def _check_batch(self, x: Tensor, y: Tensor, noise: Tensor | None = None) -> Data:
        return self._check(x, y, **({} if noise is None else {"noise": noise}))

    def _inputs(self, x: Tensor) -> Tensor:
        check_inputs(x, num_dims=self.posterior.basis.inducing_points.shape[-1], what="x")
        return x

    def _apply(self, fn: Any, recurse: bool = True) -> DualGP:
        """`.to()`, `.double()` and their kin. Sites stay float64; the posterior is rebuilt when next asked for."""
        if self.site_lam is not None:
            _ = self.posterior  # brings the site up to hyperparameters set by hand
        exact = {name: getattr(self, name) for name in _SITE_BUFFERS}
        self._posterior = None
        super()._apply(fn, recurse)
        for name, value in exact.items():
            if value is not None:
                setattr(self, name, value.to(getattr(self, name).device))
        return self
