"""What a fitted model is and answers: sites as buffers of a module, the posterior they make, and predictions."""

from __future__ import annotations

from typing import Any

import torch
from gpytorch.distributions import MultivariateNormal
from torch import Tensor

from dualgp.basis import InducingBasis
from dualgp.duals import dual_parameters, expected_log_prob
from dualgp.errors import NotFittedError
from dualgp.gp import stream
from dualgp.gp.data import check_inputs
from dualgp.gp.scoring import ScoredModel
from dualgp.posterior import Posterior
from dualgp.sites import Site, Sites
from dualgp.threads import ONE_AT_A_TIME

_SITE_BUFFERS = ("site_lam", "site_B", "lam", "beta", *stream.BUFFERS)
_LIKE_INPUTS = ("memory_x",)  # in the dtype of the user; all else in the buffers stays as it is


class FittedGP(ScoredModel):
    """The part of `DualGP` that holds and reads: a torch module whose state is sites and Z, of any size."""

    jitter: float | None
    inducing_points: Tensor | None
    site_lam: Tensor | None
    site_B: Tensor | None
    lam: Tensor | None
    beta: Tensor | None
    rest_lam: Tensor | None
    rest_B: Tensor | None
    memory_x: Tensor | None
    memory_y: Tensor | None
    memory_noise: Tensor | None
    memory_weights: Tensor | None
    memory_lam: Tensor | None
    memory_beta: Tensor | None
    memory_ids: Tensor | None
    memory_keys: Tensor | None
    noise_statistics: Tensor | None
    num_rest: Tensor | None
    num_seen: Tensor | None
    log_start: Tensor | None
    _posterior: Posterior | None

    def _register(self, inducing_points: Tensor | None) -> None:
        """Make the buffers, all empty but Z."""
        self.register_buffer("inducing_points", inducing_points)
        for name in _SITE_BUFFERS:
            self.register_buffer(name, None)
        self._posterior = None

    @property
    def posterior(self) -> Posterior:
        """The posterior: an immutable value, in the coordinates of the inducing basis.

        When hyperparameters of kernel or mean have been set by hand since, the data's site on u = f(Z) is read under
        the new prior (form U); the sites per datum are then dropped, since they no longer sum to it.

        Raises:
            NotFittedError: before `fit`.
        """
        found = self._posterior
        if found is not None and found.basis.is_of(self.kernel, self.mean):
            return found
        with ONE_AT_A_TIME, torch.inference_mode(False):  # it outlives the caller's context
            if self._posterior is None:
                if self.site_lam is None or self.site_B is None:
                    raise NotFittedError("This DualGP has no posterior yet: call fit(X, y) or load a fitted one.")
                self._posterior = Posterior(self._basis(), Site(self.site_lam, self.site_B))
            elif not self._posterior.basis.is_of(self.kernel, self.mean):
                stream.rebase(self, self._posterior, self._basis())
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
                "No sites per datum are kept: the model is not fitted, was fitted on a loader, is a stream (see "
                "memory.sites), or its hyperparameters were set by hand since. Call fit(X, y) on tensors, or ask "
                "sites_at(X, y)."
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
        """The basis at the model's own hyperparameters and Z."""
        Z = self.inducing_points
        assert Z is not None
        return InducingBasis(self.kernel, Z, self.mean, num_outputs=self.num_outputs, jitter=self.jitter)

    def _inputs(self, x: Tensor) -> Tensor:
        check_inputs(x, num_dims=self.posterior.basis.inducing_points.shape[-1], what="x")
        return x

    def _apply(self, fn: Any, recurse: bool = True) -> FittedGP:
        """`.to()`, `.double()` and their kin. Sites stay float64; the posterior is rebuilt when next asked for."""
        if self.site_lam is not None:
            _ = self.posterior  # brings the site up to hyperparameters set by hand
        exact = {name: getattr(self, name) for name in _SITE_BUFFERS}
        self._posterior = None
        super()._apply(fn, recurse)
        for name, value in exact.items():
            if value is not None and name not in _LIKE_INPUTS:
                setattr(self, name, value.to(getattr(self, name).device))
        return self
