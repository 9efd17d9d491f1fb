"""What is learned beside the sites: hyperparameters and inducing inputs, as one flat vector."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import gpytorch
import numpy as np
import torch
from gpytorch.kernels import Kernel
from gpytorch.likelihoods import Likelihood
from gpytorch.means import Mean
from torch import Tensor, nn

from dualgp.basis import InducingBasis, jitter_for

GUARD = 2.0  # standard deviation of log θ about the start of a stream: a factor of seven


class Hyper(gpytorch.Module):
    """A float64 working copy of kernel, mean, likelihood and Z; training changes this, never the model itself.

    Args:
        kernel: the model's; copied.
        mean: the model's, or None; copied.
        likelihood: the model's; copied.
        inducing_points: Z [*batch, M, D].
        dtype: dtype of n × M work.
        num_outputs: see `InducingBasis`.
        jitter: see `InducingBasis`.
        learn_inducing: whether Z is learned.
        learn_hyperparameters: whether the parameters of kernel, mean and likelihood are, where they require a gradient.
    """

    def __init__(
        self,
        kernel: Kernel,
        mean: Mean | None,
        likelihood: Likelihood,
        inducing_points: Tensor,
        *,
        dtype: torch.dtype,
        num_outputs: int | None,
        jitter: float | None,
        learn_inducing: bool = True,
        learn_hyperparameters: bool = True,
    ) -> None:
        super().__init__()
        device = inducing_points.device
        self.kernel, self.mean, self.likelihood = copy.deepcopy((kernel, mean, likelihood))
        self._stored_as = [(p, p.dtype) for p in self.parameters()]
        self.double().to(device)
        if not learn_hyperparameters:
            self.requires_grad_(False)
        self.dtype, self.num_outputs = dtype, num_outputs
        self.jitter = jitter_for(dtype) if jitter is None else jitter
        self.start: Tensor | None = None
        self.set_inducing(inducing_points, learn=learn_inducing)

    def set_inducing(self, inducing_points: Tensor, *, learn: bool = False) -> None:
        """Put Z elsewhere; `learn` says whether it is learned from there."""
        self.Z = nn.Parameter(inducing_points.detach().double().clone(), requires_grad=learn)
        spread = inducing_points.reshape(-1, inducing_points.shape[-1]).std(0, correction=0)
        # One of M inducing inputs bends the bound about 1/M as much as a lengthscale does.
        unit = 0.4 * inducing_points.shape[-2] ** 0.5
        self.scale = unit * torch.where(spread > 0, spread, torch.ones_like(spread))

    def basis(self) -> InducingBasis:
        """Return the basis at the present values; it lives only until they change."""
        return InducingBasis.of_owned(
            self.kernel, self.Z.to(self.dtype), self.mean, num_outputs=self.num_outputs, jitter=self.jitter
        )

    def trained(self) -> list[nn.Parameter]:
        """Return the parameters that are learned (a user freezes one by requires_grad_(False))."""
        return [p for p in self.parameters() if p.requires_grad]

    def vector(self) -> np.ndarray:
        """Return what is learned as one float64 vector in natural units (see `_Coordinate`)."""
        parts = [c.read().reshape(-1).cpu().numpy() for c in self._coordinates()]
        return np.concatenate(parts) if parts else np.zeros(0)

    @torch.no_grad()
    def set_vector(self, values: np.ndarray) -> None:
        """Set what is learned from a vector in natural units."""
        start = 0
        for c in self._coordinates():
            stop = start + c.parameter.numel()
            c.write(torch.from_numpy(values[start:stop]).to(c.parameter).reshape(c.parameter.shape))
            start = stop

    def vector_gradient(self, gradient: list[Tensor]) -> np.ndarray:
        """Turn a gradient in `trained()` order into one in natural units."""
        pairs = zip(self._coordinates(), gradient, strict=True)
        return np.concatenate([(c.slope() * g).reshape(-1).cpu().numpy() for c, g in pairs])

    def trust_box(self, radius: float) -> list[tuple[float | None, float | None]]:
        """Return bounds for each number of the vector: logarithms within `radius` of where they are, others free."""
        bounds: list[tuple[float | None, float | None]] = []
        for c in self._coordinates():
            for value in c.read().reshape(-1).tolist():
                bounds.append((value - radius, value + radius) if c.is_log else (None, None))
        return bounds

    def _coordinates(self) -> list[_Coordinate]:
        log_bounds = {}
        for _, module, name, constraint in _constraints(self):
            transform = constraint._transform  # softplus for Positive and GreaterThan, unless the user chose another
            if isinstance(transform, nn.Softplus) or transform is torch.nn.functional.softplus:
                log_bounds[id(getattr(module, name))] = constraint
        return [_Coordinate(p, log_bounds.get(id(p)), self.scale if p is self.Z else None) for p in self.trained()]

    @torch.no_grad()
    def round(self) -> None:
        """Round every value to the dtype it is stored in, so that what is kept is what the sites are found for."""
        for p, dtype in self._stored_as:
            p.copy_(p.to(dtype))
        self.Z.copy_(self.Z.to(self.dtype))

    def guard(self, start: Tensor | None) -> Tensor:
        """Hold positive hyperparameters near where a stream began, log θ ~ N(log θ₀, GUARD²); return log θ₀.

        Few data, or data of one class, leave θ free to go where nothing of what comes later can be learned. Against a
        thousand data the guard weighs nothing.

        Args:
            start: log θ₀; the present values if it is None, or of other parameters than are learned now.
        """
        now = self._log_values().detach()
        self.start = now if start is None or start.shape != now.shape else start.to(now)
        return self.start

    def _log_values(self) -> Tensor:
        values = [torch.nn.functional.softplus(c.parameter).flatten() for c in self._coordinates() if c.is_log]
        return torch.cat([self.Z.new_zeros(0), *values]).clamp_min(1e-300).log()

    def log_prior(self) -> Tensor:
        """Return Σ log p(θ) over priors registered on kernel, mean and likelihood, and the guard; differentiable."""
        total = torch.zeros((), dtype=torch.float64, device=self.Z.device)
        if self.start is not None:
            total = total - 0.5 * ((self._log_values() - self.start) / GUARD).square().sum()
        for term in self._prior_terms():
            total = total + term
        return total

    def _prior_terms(self) -> Iterator[Tensor]:
        for _, module, prior, closure, _ in self.named_priors():
            yield prior.log_prob(closure(module)).sum()


class _Coordinate:
    """The unit in which a parameter is learned.

    log(value − lower bound) where GPyTorch holds it above a bound by softplus, so that a step is a ratio at any scale;
    multiples of 0.4 √M times the spread of Z for Z; itself otherwise.
    """

    def __init__(self, parameter: nn.Parameter, constraint: Any, scale: Tensor | None) -> None:
        self.parameter, self.scale = parameter, scale
        self.is_log = constraint is not None

    def read(self) -> Tensor:
        p = self.parameter.detach()
        if self.is_log:
            return torch.nn.functional.softplus(p).clamp_min(1e-300).log()
        return p if self.scale is None else p / self.scale

    def write(self, value: Tensor) -> None:
        if self.is_log:  # inverse softplus of e^t, without overflow: t' = e^t + log(1 − e^{−e^t})
            e = value.clamp(-300.0, 300.0).exp()
            value = e + torch.log(-torch.expm1(-e))
        elif self.scale is not None:
            value = value * self.scale
        self.parameter.copy_(value)

    def slope(self) -> Tensor | float:
        """D parameter / d coordinate."""
        p = self.parameter.detach()
        if self.is_log:
            return torch.nn.functional.softplus(p) / torch.sigmoid(p).clamp_min(1e-300)
        return 1.0 if self.scale is None else self.scale


def _constraints(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, Any]]:
    for prefix, part in module.named_modules():
        for name, constraint in getattr(part, "_constraints", {}).items():
            yield prefix, part, name.removesuffix("_constraint"), constraint
