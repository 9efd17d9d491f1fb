"""Likelihoods with the canonical link that GPyTorch lacks: logit Bernoulli and log Poisson."""

from __future__ import annotations

from typing import Any

from gpytorch.distributions import MultivariateNormal
from gpytorch.likelihoods import BernoulliLikelihood, PoissonLikelihood
from gpytorch.likelihoods.likelihood import _OneDimensionalLikelihood
from torch import Tensor
from torch.distributions import Bernoulli, Poisson


class LogitBernoulliLikelihood(BernoulliLikelihood):
    """Binary labels y in {0, 1} with p(y = 1 | f) = 1 / (1 + e^{−f}); GPyTorch's own is the probit link.

    Example:
        >>> import torch
        >>> LogitBernoulliLikelihood()(torch.zeros(2)).probs
        tensor([0.5000, 0.5000])
    """

    def forward(self, function_samples: Tensor, *args: Any, **kwargs: Any) -> Bernoulli:
        """Return p(y | f)."""
        return Bernoulli(logits=function_samples)

    def marginal(self, function_dist: MultivariateNormal, *args: Any, **kwargs: Any) -> Bernoulli:
        """Return E[p(y | f)], by quadrature; GPyTorch's own is the probit's."""
        probs = self.quadrature(lambda f: self.forward(f, *args, **kwargs).probs, function_dist)
        return Bernoulli(probs=probs.clamp(0.0, 1.0))

    def expected_log_prob(
        self, observations: Tensor, function_dist: MultivariateNormal, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Return E[log p(y | f)], elementwise."""
        return _OneDimensionalLikelihood.expected_log_prob(self, observations, function_dist, *args, **kwargs)


class LogPoissonLikelihood(PoissonLikelihood):
    """Counts y = 0, 1, 2, … with rate e^f, the log-Gaussian Cox link; GPyTorch's own has rate softplus(f).

    Example:
        >>> import torch
        >>> LogPoissonLikelihood()(torch.zeros(2)).rate
        tensor([1., 1.])
    """

    def forward(self, function_samples: Tensor, *args: Any, **kwargs: Any) -> Poisson:
        """Return p(y | f)."""
        return Poisson(function_samples.exp())
