"""A dual Gaussian process as a BoTorch model."""

from __future__ import annotations

import copy
from typing import Any

import torch
from botorch.models.gpytorch import GPyTorchModel
from botorch.models.model import FantasizeMixin
from botorch.models.transforms.input import InputTransform
from botorch.models.transforms.outcome import OutcomeTransform
from botorch.posteriors.gpytorch import GPyTorchPosterior
from botorch.posteriors.transformed import TransformedPosterior
from botorch.sampling.base import MCSampler
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood, Likelihood, SoftmaxLikelihood
from linear_operator import to_linear_operator
from linear_operator.operators import BlockDiagLinearOperator
from torch import Tensor

from dualgp.duals import gaussian_noise, is_gaussian
from dualgp.errors import InputError, UnsupportedError
from dualgp.gp.condition import Conditioned, condition
from dualgp.gp.data import Data, check_inputs, has_multi_targets
from dualgp.gp.memory import Memory
from dualgp.gp.model import DualGP
from dualgp.information import expected_beta
from dualgp.interop.botorch.given import check_noise, check_outcomes, joined, with_gaussian
from dualgp.kernels import frozen_copy
from dualgp.linalg import symmetrise
from dualgp.posterior import Posterior

_LEAST_BETA = 1e-10  # where no datum tells anything of f, its noise ends


class DualGPModel(GPyTorchModel, FantasizeMixin):
    """A fitted `DualGP` as a BoTorch model: a value, which the model's later updates leave as it is.

    Every acquisition function that asks for a posterior, for conditioning or for fantasies runs on it, whatever the
    likelihood; what it maximises is then a statement on the latent f. Data that were conditioned on are kept, and found
    anew together with those that come: conditioning twice is conditioning once on all.

    Gradients in X through fantasies of labels and counts hold the drawn targets fixed.

    Args:
        gp: fitted, in float64, without batch dimensions; on inputs and targets as the transforms give them.
        input_transform: BoTorch's, trained; X is given to the model as it was before.
        outcome_transform: BoTorch's, trained; for Gaussian likelihoods.
        recall: whether what memory holds of labels and counts is asked again by each fantasy, as `DualGP.condition`
            has it: a refit, if memory and Z hold all data, at (memory + n)² numbers for each. Without it a fantasy of
            labels is off by up to a seventh of what it changes in the mean, and by up to a half in the variance.

    Raises:
        InputError: for what is no `DualGP`.
        NotFittedError: if the model was never fitted.
        UnsupportedError: for a batch of processes, or an outcome transform of targets that are not Gaussian.

    Source: Balandat et al. 2020 (BoTorch); Maddox et al. 2021 (fantasies of sparse models), here in dual form.

    Example:
        >>> import gpytorch
        >>> from botorch.acquisition import LogExpectedImprovement
        >>> x = torch.linspace(0, 6, 20, dtype=torch.float64).unsqueeze(-1)
        >>> kernel, likelihood = gpytorch.kernels.RBFKernel(), gpytorch.likelihoods.GaussianLikelihood()
        >>> gp = DualGP(kernel.double(), likelihood.double(), num_inducing=10)
        >>> result = gp.fit(x, x.sin().squeeze(-1))
        >>> better = LogExpectedImprovement(DualGPModel(gp), best_f=0.5)
        >>> bool(better(x[5:6].unsqueeze(0)) > better(x[15:16].unsqueeze(0)))  # near the top of the sine
        True
    """

    def __init__(
        self,
        gp: DualGP,
        *,
        input_transform: InputTransform | None = None,
        outcome_transform: OutcomeTransform | None = None,
        recall: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(gp, DualGP):
            raise InputError(f"DualGPModel wraps a fitted DualGP, got {type(gp).__name__}.")
        base = gp.posterior
        C = base.basis.num_outputs
        if len(base.basis.batch_shape) != (C is not None):
            raise UnsupportedError(
                f"DualGPModel wraps one process, with outputs or without; this one has batch shape "
                f"{tuple(base.basis.batch_shape)}. Wrap each, in botorch.models.ModelList."
            )
        if outcome_transform is not None and not is_gaussian(gp.likelihood):
            raise UnsupportedError(
                f"An outcome transform needs real targets; those of {type(gp.likelihood).__name__} are what they are."
            )
        self.likelihood: Likelihood = frozen_copy(gp.likelihood)
        self._base: Posterior = base
        self._memory: Memory | None = gp.memory if recall else None
        self._given: Conditioned | None = None
        self._data: Data | None = None
        self._outputs: list[int] | None = None
        if input_transform is not None:
            self.input_transform = copy.deepcopy(input_transform)
        if outcome_transform is not None:
            self.outcome_transform = copy.deepcopy(outcome_transform)
        self.eval()

    @classmethod
    def fitted(
        cls,
        gp: DualGP,
        X: Tensor,
        Y: Tensor,
        *,
        input_transform: InputTransform | None = None,
        outcome_transform: OutcomeTransform | None = None,
        recall: bool = False,
        **options: Any,
    ) -> DualGPModel:
        """Train the transforms on the data, fit `gp` to what they give, and return it as a BoTorch model.

        Args:
            gp: is fitted, in place.
            X: [n, d].
            Y: [n, m].
            input_transform: a copy is trained.
            outcome_transform: a copy is trained.
            recall: as of the model.
            options: of `DualGP.fit`.

        Raises:
            InputError: for data of the wrong shape or value.
        """
        input_transform, outcome_transform = copy.deepcopy(input_transform), copy.deepcopy(outcome_transform)
        if Y.ndim != 2 or X.ndim != 2 or len(X) != len(Y):
            raise InputError(f"Expected X [n, d] and Y [n, m], got {tuple(X.shape)} and {tuple(Y.shape)}.")
        x, y = X, Y
        if input_transform is not None:
            x = input_transform.train()(X)
            input_transform.eval()
        if outcome_transform is not None:
            y, _ = outcome_transform.train()(Y)
            outcome_transform.eval()
        gp.fit(x, y if has_multi_targets(gp.likelihood, gp.num_outputs) else y.squeeze(-1), **options)
        return cls(gp, input_transform=input_transform, outcome_transform=outcome_transform, recall=recall)

    @property
    def num_outputs(self) -> int:
        """m, the number of latent functions: C for softmax."""
        return len(self._outputs) if self._outputs is not None else (self._base.basis.num_outputs or 1)

    @property
    def batch_shape(self) -> torch.Size:
        """That of the data which were conditioned on; none before."""
        if self._given is None:
            return torch.Size()
        sites = self._given.sites
        return sites.lam.shape[: -2 if sites.multi_output else -1]

    def posterior(  # type: ignore[override]  # the order of arguments is that of Model
        self,
        X: Tensor,
        output_indices: list[int] | None = None,
        observation_noise: bool | Tensor = False,
        posterior_transform: Any = None,
    ) -> GPyTorchPosterior | TransformedPosterior:
        """Return the joint Gaussian of f(X), or of f(X) and noise, as BoTorch has it; differentiable in X.

        Args:
            X: b x q x d, float64.
            output_indices: which outputs; all if None.
            observation_noise: True adds the likelihood's noise, the mean of it where it is fixed per datum. Other
                likelihoods add 1/β̄ (see `dualgp.information.expected_beta`), the noise of the Gaussian site that a
                datum at X would have. A Tensor (.. x q x m or .. x 1 x m) is the noise itself, of transformed outcomes.
            posterior_transform: BoTorch's.

        Raises:
            InputError: for X of the wrong shape, dtype or value, or noise that is none.
            UnsupportedError: for the noise of a softmax likelihood, which couples the outputs.
        """
        self.eval()
        X = self.transform_inputs(X)
        self._base.basis.check_inputs(X)
        check_inputs(X)
        mean, cov = (self._given or self._base).joint(X)  # [*b, q] or [*b, C, q]
        if observation_noise is not False:
            cov = cov + torch.diag_embed(self._noise(mean, cov, observation_noise))
        found: Any = GPyTorchPosterior(self._normal(mean, cov, output_indices))
        if hasattr(self, "outcome_transform"):
            transform = self.outcome_transform
            chosen = self._chosen(output_indices)
            if chosen is not None:
                transform = transform.subset_output(idcs=chosen)
            found = transform.untransform_posterior(found, X=X)
        return found if posterior_transform is None else posterior_transform(posterior=found, X=X)

    def forward(self, X: Tensor) -> MultivariateNormal:
        """Return the joint Gaussian of f(X), of transformed outcomes."""
        return self._normal(*(self._given or self._base).joint(self.transform_inputs(X)), None)

    def condition_on_observations(
        self, X: Tensor, Y: Tensor, noise: Tensor | None = None, **kwargs: Any
    ) -> DualGPModel:
        """Return the model given more data; exact, batched, and differentiable in X and in real Y.

        Args:
            X: batch x n x d.
            Y: batch' x n x m, whose batch' broadcasts with that of X; labels x 1 for softmax.
            noise: variances with the shape of Y, of transformed outcomes, for Gaussian likelihoods; the likelihood's
                own if None, and needed where that is fixed per datum.
            kwargs: ignored, as other models of BoTorch have more of them.

        Raises:
            InputError: for data of the wrong shape or value, or noise that is missing.
            UnsupportedError: for a model of some of the outputs.
        """
        if self._outputs is not None:
            raise UnsupportedError("A subset of the outputs cannot be conditioned on: condition the whole model.")
        X = self.transform_inputs(X)
        self._base.basis.check_inputs(X)
        check_inputs(X)
        columns = 1 if isinstance(self.likelihood, SoftmaxLikelihood) else self.num_outputs
        check_outcomes(Y, X, columns)
        if hasattr(self, "outcome_transform"):
            Y, _ = self.outcome_transform(Y, X=X)
        if is_gaussian(self.likelihood):
            return self._holding(with_gaussian(self.likelihood, self._given or self._base, X, Y, noise), None)
        if noise is not None:
            raise InputError(f"{type(self.likelihood).__name__} has no noise to be given: leave it out.")
        multi = has_multi_targets(self.likelihood, self._base.basis.num_outputs)
        data = joined(self.likelihood, self._data, X, Y, multi=multi)
        return self._holding(condition(self._base, self.likelihood, data, self._memory), data)

    def fantasize(
        self, X: Tensor, sampler: MCSampler, observation_noise: Tensor | None = None, **kwargs: Any
    ) -> DualGPModel:
        """Return the model given targets drawn at X, one model per draw: batch shape samples x b.

        Real targets are BoTorch's own f + noise, differentiable in X. Labels and counts are drawn from p(y|f) at the
        sampler's f, the same ones at every call.

        Args:
            X: b x n x d.
            sampler: of f.
            observation_noise: as in BoTorch, for Gaussian likelihoods.
            kwargs: of `condition_on_observations`.

        Raises:
            InputError: as `condition_on_observations`, or for noise where the likelihood has none.
        """
        if is_gaussian(self.likelihood) or X.shape[-2] == 0:
            model: DualGPModel = super().fantasize(X, sampler, observation_noise, **kwargs)
            return model
        if observation_noise is not None:
            raise InputError(f"{type(self.likelihood).__name__} has no noise to be given: leave it out.")
        f = sampler(self.posterior(X)).detach()  # [S, *b, n, C]
        softmax = isinstance(self.likelihood, SoftmaxLikelihood)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(sampler.seed)
            y = torch.distributions.Categorical(logits=f) if softmax else self.likelihood.forward(f)
            Y = y.sample()
        return self.condition_on_observations(X, Y.unsqueeze(-1) if softmax else Y)

    def subset_output(self, idcs: list[int]) -> DualGPModel:
        """Return the model of some of the outputs; it predicts, and is not to be conditioned on.

        Raises:
            InputError: for an output that there is not.
        """
        model = copy.copy(self)
        model._modules = dict(self._modules)
        model._outputs = self._chosen(idcs)
        if hasattr(self, "outcome_transform"):
            model._modules["outcome_transform"] = self.outcome_transform.subset_output(idcs=list(idcs))
        return model

    def _chosen(self, indices: list[int] | None) -> list[int] | None:
        """Which outputs of the whole model: those asked for, of those there are."""
        if indices is None:
            return self._outputs
        m = self.num_outputs
        if any(not -m <= i < m for i in indices):
            raise InputError(f"The model has {m} outputs, got output_indices {list(indices)}.")
        have = list(range(m)) if self._outputs is None else self._outputs
        return [have[i] for i in indices]

    def _normal(self, mean: Tensor, cov: Tensor, indices: list[int] | None) -> MultivariateNormal:
        chosen = self._chosen(indices)
        if self._base.basis.num_outputs is None:
            return MultivariateNormal(mean, to_linear_operator(symmetrise(cov)))
        if chosen is not None:
            mean, cov = mean[..., chosen, :], cov[..., chosen, :, :]
        blocks = to_linear_operator(symmetrise(cov))
        if mean.shape[-2] == 1:
            return MultivariateNormal(mean.squeeze(-2), blocks.squeeze(-3))
        return MultitaskMultivariateNormal(mean.mT, BlockDiagLinearOperator(blocks), interleaved=False)

    def _noise(self, mean: Tensor, cov: Tensor, given: bool | Tensor) -> Tensor:
        """Noise variances, data last, that broadcast with the means."""
        if isinstance(given, Tensor):
            check_noise(given, mean.shape[-1], self._base.basis.num_outputs or 1)
            return self._data_last(given).expand(mean.shape)
        if not isinstance(given, bool):
            raise InputError(f"observation_noise must be True, False or a tensor of variances, got {given!r}.")
        fixed = isinstance(self.likelihood, FixedNoiseGaussianLikelihood)
        noise = self.likelihood.noise.mean() if fixed else gaussian_noise(self.likelihood)
        if noise is not None:
            several = self._base.basis.num_outputs is not None
            return (noise.double().unsqueeze(-1) if several else noise.double()).expand(mean.shape)
        if isinstance(self.likelihood, SoftmaxLikelihood):
            raise UnsupportedError("A class label is no Gaussian observation of each output: observation_noise=False.")
        var = cov.diagonal(dim1=-2, dim2=-1).clamp_min(0.0)
        return 1.0 / expected_beta(self.likelihood, mean, var).clamp_min(_LEAST_BETA)

    def _data_last(self, values: Tensor) -> Tensor:
        """[.., n, m] to [.., n], or to [.., m, n] for several outputs."""
        return values.mT if self._base.basis.num_outputs is not None else values.squeeze(-1)

    def _holding(self, given: Conditioned, data: Data | None) -> DualGPModel:
        model = copy.copy(self)
        model._given, model._data = given, data
        return model

    def _set_transformed_inputs(self) -> None:
        """Nothing: the data are in the posterior, and no longer here."""

    def _revert_to_original_inputs(self) -> None:
        """Nothing, as above."""
