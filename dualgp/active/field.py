"""The function at candidates as a joint Gaussian that data yet to come can be conditioned on, before they are known."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from gpytorch.likelihoods import Likelihood, SoftmaxLikelihood
from torch import Tensor

from dualgp.checks import check_tensor
from dualgp.duals import check_param_names, check_variances
from dualgp.errors import InputError
from dualgp.influence.blocks import bare
from dualgp.information import expected_beta
from dualgp.posterior import Posterior
from dualgp.quadrature import expected_softmax


@runtime_checkable
class Learner(Protocol):
    """What is asked of a model: a fitted `DualGP` or a `NetworkPosterior`."""

    if TYPE_CHECKING:  # from Python 3.12 on isinstance does not see what a torch module registers
        likelihood: Likelihood

    @property
    def posterior(self) -> Any:
        """The posterior."""

    def predict(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance of f(x)."""


def check_candidates(x: Tensor, what: str = "Candidates") -> None:
    """Raise unless x is a tensor of finite rows, at least one.

    Raises:
        InputError: saying what came.
    """
    check_tensor(what, x)
    if x.ndim < 2 or not len(x):
        raise InputError(f"{what} must have at least one row, [n, D] or [n, *input_shape], got {tuple(x.shape)}.")
    bad = ~x.isfinite().flatten(1).all(1) if x.is_floating_point() else x.new_zeros(len(x), dtype=torch.bool)
    if bad.any():
        raise InputError(
            f"{what} must be finite; {int(bad.sum())} of {len(x)} rows hold NaN or infinity, the first being row "
            f"{int(bad.nonzero()[0])}."
        )


def check_learner(q: object) -> None:
    """Raise unless q is a model that can be asked.

    Raises:
        InputError: saying what came.
    """
    posterior = inspect.getattr_static(q, "posterior", None)
    if posterior is None or inspect.isfunction(posterior) or not isinstance(getattr(q, "likelihood", None), Likelihood):
        raise InputError(f"Expected a fitted DualGP or a NetworkPosterior, got {type(q).__name__}.")


def check_params(likelihood: Likelihood, params: dict[str, Tensor], n: int) -> None:
    """Raise unless the likelihood takes these parameters, and there is one finite value for each of n candidates.

    Raises:
        InputError: with the first that is not.
    """
    check_param_names(likelihood, params)
    for name, values in params.items():
        if not isinstance(values, Tensor) or values.ndim < 1 or len(values) != n or not bool(values.isfinite().all()):
            came = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise InputError(f"{name}= must be a torch.Tensor of one finite value per candidate, [{n}]; got {came}.")
        if name == "noise":
            check_variances(values)


def is_coupled(q: Learner) -> bool:
    """Return whether the outputs of a datum depend on each other."""
    return bool(bare(q).basis.coupled)


def num_outputs(q: Learner) -> int:
    """Return C, 1 for one output without a dimension of its own."""
    return int(bare(q).basis.num_outputs or 1)


@torch.no_grad()
def moments(q: Learner, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance of f(x), [n, C], in float64; of a softmax network what its softmax sees (`seen`)."""
    if not is_coupled(q):
        mean, var = q.predict(x)
        return mean.double().reshape(len(x), -1), var.double().reshape(len(x), -1)
    mean, cov = bare(q).predict_blocks(x)
    return seen(q.likelihood, mean.double(), cov.double())


def seen(likelihood: Likelihood | None, mean: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return means [n, C] and variances [n, C] of coupled outputs, from their covariances [n, C, C].

    A softmax knows nothing of f along 1: its latents are taken as independent ones of the spread of HVH·C/(C − 1),
    H = I − 11ᵀ/C, as in `dualgp.leave_one_out`.
    """
    if isinstance(likelihood, SoftmaxLikelihood) and (C := mean.shape[-1]) > 1:
        mean = mean - mean.mean(-1, keepdim=True)
        blocks = blocks - blocks.mean(-1, keepdim=True)
        blocks = (blocks - blocks.mean(-2, keepdim=True)) * (C / (C - 1))
    return mean, blocks.diagonal(dim1=-2, dim2=-1).clamp_min(0.0)


@dataclass(frozen=True, eq=False)
class Field:
    """f at N inputs: means, and covariances of P independent processes with c rows for each input.

    P = C and c = 1 where outputs are independent, P = 1 and c = C where they are coupled.

    Attributes:
        likelihood: of the data.
        mean: [N, C], as `moments` has it.
        cov: [P, N·c, N·c], in float64, inputs first.
        precision: of the site that a datum at each input will have, expected before its y is known, [N, P, c, c].
    """

    likelihood: Likelihood | None
    mean: Tensor
    cov: Tensor
    precision: Tensor

    @property
    def width(self) -> int:
        """C, the rows of one input."""
        return self.precision.shape[-1]

    @property
    def var(self) -> Tensor:
        """Variances [N, C]; of coupled outputs as `seen`."""
        c, N = self.width, len(self.mean)
        if c == 1:
            return self.cov.diagonal(dim1=-2, dim2=-1).mT.clamp_min(0.0)
        blocks = self.cov.reshape(N, c, N, c).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        return seen(self.likelihood, self.mean, blocks)[1]

    def given(self, i: int) -> Field:
        """Return the field once input i has been observed: its covariance, which no y is needed for.

        V ← V − V_i R (I + RᵀV_iiR)⁻¹ RᵀV_iᵀ with RRᵀ the expected precision; the mean is where it is expected to be.
        """
        rows = slice(i * self.width, (i + 1) * self.width)
        half = self._half(self.cov[..., rows], self.cov[..., rows, rows], self.precision[i])
        return Field(self.likelihood, self.mean, self.cov - half @ half.mT, self.precision)

    def gain(self) -> Tensor:
        """Return ½ log|I + B_i V_ii|, the information that each input's site would add, [N]."""
        c, N = self.width, len(self.mean)
        own = self.cov.reshape(-1, N, c, N, c).diagonal(dim1=1, dim2=3).permute(3, 0, 1, 2)  # [N, P, c, c]
        root = _root(self.precision)
        inner = torch.eye(c, dtype=own.dtype, device=own.device) + root.mT @ own @ root
        return 0.5 * torch.logdet(inner).sum(-1)

    def explained(self, candidates: slice, targets: slice) -> Tensor:
        """Return by how much an observation at each candidate lowers the variance at each target, [n, T, P, c]."""
        c, N = self.width, len(self.mean)
        if c == 1:
            beta = self.precision[candidates, :, 0, 0].clamp_min(0.0)  # [n, P]
            share = beta / (1.0 + beta * self.var[candidates])
            return (self.cov[:, candidates, targets].square().movedim(0, -1) * share.unsqueeze(1)).unsqueeze(-1)
        V = self.cov.reshape(-1, N, c, N, c)
        own = V[:, candidates, :, candidates].diagonal(dim1=1, dim2=3).permute(3, 0, 1, 2)  # [n, P, c, c]
        across = V[:, targets][..., candidates, :].permute(3, 0, 1, 2, 4)  # [n, P, T, c, c]
        root = _root(self.precision[candidates])
        inner = torch.eye(c, dtype=V.dtype, device=V.device) + root.mT @ own @ root
        chol = torch.linalg.cholesky(inner)
        half = torch.linalg.solve_triangular(chol, (across @ root.unsqueeze(2)).flatten(2, 3).mT, upper=False)
        return half.square().sum(-2).unflatten(-1, (-1, c)).transpose(1, 2)

    def _half(self, columns: Tensor, own: Tensor, precision: Tensor) -> Tensor:
        root = _root(precision)
        inner = torch.eye(self.width, dtype=own.dtype, device=own.device) + root.mT @ own @ root
        return torch.linalg.solve_triangular(torch.linalg.cholesky(inner), (columns @ root).mT, upper=False).mT


@torch.no_grad()
def joint_field(q: Learner, x: Tensor, params: dict[str, Tensor]) -> Field:
    """Return the joint Gaussian of f(x), with the precisions that data there are expected to have."""
    posterior, likelihood, C = bare(q), q.likelihood, num_outputs(q)
    mean, var = moments(q, x)
    if not is_coupled(q):
        assert isinstance(posterior, Posterior)
        cov = posterior.joint(x)[1].reshape(C, len(x), len(x))
        beta = expected_beta(likelihood, *as_targets(mean, var, likelihood), **params)
        return Field(likelihood, mean, cov, beta.reshape(len(x), C, 1, 1))
    joint = posterior.predict_joint(x)
    cov = joint.covariance_matrix.double()
    if isinstance(likelihood, SoftmaxLikelihood):
        p = expected_softmax(mean, var)
        precision = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
    else:
        precision = torch.diag_embed(
            expected_beta(likelihood, *as_targets(mean, var, likelihood), **params).reshape(mean.shape)
        )
    return Field(likelihood, mean, cov.unsqueeze(0), precision.unsqueeze(1))


def as_targets(mean: Tensor, var: Tensor, likelihood: Likelihood) -> tuple[Tensor, Tensor]:
    """Return means and variances [n, C] in the shape that the likelihood's targets have: [n] for one output."""
    if mean.shape[-1] == 1 and not isinstance(likelihood, SoftmaxLikelihood):
        return mean.squeeze(-1), var.squeeze(-1)
    return mean, var


def _root(precision: Tensor) -> Tensor:
    """R with RRᵀ = B; a B that is no precision, of likelihoods that are not log-concave, counts as far as it is one."""
    if precision.shape[-1] == 1:
        return precision.clamp_min(0.0).sqrt()
    values, vectors = torch.linalg.eigh(precision)
    return vectors * values.clamp_min(0.0).sqrt().unsqueeze(-2)
