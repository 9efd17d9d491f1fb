"""What a process says of targets, by its marginals: p(y|x), its logarithm, and the mean of that."""

from __future__ import annotations

import torch
from gpytorch.kernels import Kernel
from gpytorch.likelihoods import Likelihood
from gpytorch.means import Mean
from torch import Tensor, nn
from torch.distributions import Distribution

from dualgp.gp.data import Data, check_data, check_modules
from dualgp.predictive import log_predictive, mean_nlpd, predictive_distribution


class ScoredModel(nn.Module):
    """A process with a likelihood, scored by what it predicts."""

    kernel: Kernel
    likelihood: Likelihood
    mean: Mean | None
    num_outputs: int | None

    def predict(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance of the latent f(x), each [*batch, T] or [*batch, T, C]."""
        raise NotImplementedError

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
        """Return the mean negative log predictive density, in nats per datum (lower is better).

        Raises:
            InputError: as in `log_predictive`, and if there are no data, of which there is no mean.
        """
        return mean_nlpd(self.log_predictive(x, y, **params))

    def _check(self, x: Tensor, y: Tensor, **params: Tensor) -> Data:
        data = check_data(self.likelihood, x, y, self.num_outputs, params)
        check_modules(data.x, self.kernel, self.mean, self.likelihood)
        return data
