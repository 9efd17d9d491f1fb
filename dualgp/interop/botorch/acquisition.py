"""Acquisition functions for any likelihood."""

from __future__ import annotations

from typing import Any

from botorch.acquisition.acquisition import AcquisitionFunction
from botorch.utils.transforms import t_batch_mode_transform
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood, SoftmaxLikelihood
from torch import Tensor

from dualgp.errors import InputError, UnsupportedError
from dualgp.information import mutual_information
from dualgp.interop.botorch.model import DualGPModel


class BALD(AcquisitionFunction):
    """How much the label, count or value at x would tell of f(x): I(y; f(x)) in nats, summed over outputs.

    H[E_q p(y|f)] − E_q H[p(y|f)], see `dualgp.information.mutual_information`; differentiable in x.

    Args:
        model: a `DualGPModel` of any likelihood but softmax; for that, choose from a pool with `dualgp.active`.

    Raises:
        InputError: for another model.
        UnsupportedError: for softmax.

    Source: Houlsby et al. 2011.
    """

    def __init__(self, model: DualGPModel) -> None:
        if not isinstance(model, DualGPModel):
            raise InputError(f"BALD needs a DualGPModel, got {type(model).__name__}.")
        super().__init__(model)
        if isinstance(model.likelihood, SoftmaxLikelihood):
            raise UnsupportedError("BALD of a softmax has no gradient here: choose from a pool with dualgp.active.")

    @t_batch_mode_transform(expected_q=1)  # type: ignore[arg-type]
    def forward(self, X: Tensor) -> Tensor:
        """Return the information at X, b x 1 x d, shape [b]."""
        found: Any = self.model.posterior(X)
        mean, var = found.mean.squeeze(-2), found.variance.squeeze(-2)  # [b, m]
        params = {}
        if isinstance(self.model.likelihood, FixedNoiseGaussianLikelihood):
            params["noise"] = self.model.likelihood.noise.mean()
        return mutual_information(self.model.likelihood, mean, var, **params).sum(-1)
