"""Influence while a network trains: the optimiser's own preconditioner as a diagonal covariance of the parameters."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from dualgp.errors import InputError, UnsupportedError
from dualgp.kernels import NetworkJacobian


@dataclass(frozen=True, eq=False)
class DiagonalPosterior:
    """A function linearised in parameters of independent variances: V_i = J_i diag(s) J_iᵀ.

    It has what `leverage`, `sensitivity` and `leave_one_out` ask for. Its precision does not contain the sites of the
    data, so a removal may not exist; take `order="first"`.

    Args:
        jacobian: the network's function and Jacobian.
        variance: s, [P], in the order of the Jacobian's parameters.

    Raises:
        InputError: unless there is one variance per parameter, finite and at least 0.

    Source: Nickl et al. 2023, table 1.

    Example:
        >>> net = torch.nn.Linear(1, 1, bias=False)
        >>> q = DiagonalPosterior(NetworkJacobian(net, torch.zeros(2, 1)), torch.tensor([0.5]))
        >>> q.function_blocks(torch.tensor([[1.0], [2.0]]))[1].flatten()  # x² s
        tensor([0.5000, 2.0000], dtype=torch.float64)
    """

    jacobian: NetworkJacobian
    variance: Tensor

    def __post_init__(self) -> None:
        s, P = self.variance, self.jacobian.num_params
        if s.shape != (P,) or not (s.isfinite().all() and (s >= 0).all()):
            raise InputError(f"Expected {P} variances, finite and at least 0; got shape {tuple(s.shape)}.")

    @torch.no_grad()
    def function_blocks(self, x: Tensor) -> tuple[Float[Tensor, "n c"], Float[Tensor, "n c c"]]:
        """Return f(x) and V in float64; there is no residual."""
        parts = [(block.f.double(), block.quad(self.variance).double()) for _, block in self.jacobian.blocks(x)]
        f, V = (torch.cat(part) for part in zip(*parts, strict=True))
        return f, V


def preconditioner_variance(
    optimizer: Optimizer, params: Iterable[Tensor], *, num_data: int, prior_precision: float
) -> Float[Tensor, "p"]:
    """Return the variance that an optimiser's preconditioner amounts to, 1/(N√v + δ) per parameter, flat, in float64.

    v is the running mean of squared gradients that Adam, AdamW (bias-corrected) or RMSprop divides by the root of. SGD
    knows no curvature: its variance is that of the prior, 1/δ.

    Args:
        optimizer: `torch.optim` Adam, AdamW, RMSprop or SGD, after at least one step on the *mean* loss of batches.
        params: parameters in the order wanted, such as `network.parameters()`.
        num_data: N, the data behind the mean loss.
        prior_precision: δ on the *sum* loss; N times a weight decay on the mean loss.

    Raises:
        UnsupportedError: for another optimiser.
        InputError: for a parameter that the optimiser does not hold or has not stepped yet, or N or δ not positive.

    Source: Nickl et al. 2023, table 1, and their code for the scale. Deviations: v is corrected for its start at zero,
    as in the step itself, and SGD's identity is scaled by 1/δ.

    Example:
        >>> p = torch.nn.Parameter(torch.ones(2)); opt = torch.optim.RMSprop([p], alpha=0.0)
        >>> p.grad = torch.tensor([0.5, 0.0]); opt.step()
        >>> preconditioner_variance(opt, [p], num_data=10, prior_precision=1.0)  # 1/(10·0.5 + 1), 1/1
        tensor([0.1667, 1.0000], dtype=torch.float64)
    """
    if not (num_data > 0 and prior_precision > 0):
        raise InputError(f"num_data and prior_precision must be positive, got {num_data} and {prior_precision}.")
    if not isinstance(optimizer, Adam | AdamW | RMSprop | SGD):
        raise UnsupportedError(
            f"The preconditioner of {type(optimizer).__name__} is not known here: use Adam, AdamW, RMSprop or SGD, or "
            "give DiagonalPosterior a variance of your own."
        )
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    parts = []
    for number, p in enumerate(params):
        if id(p) not in groups:
            raise InputError(f"Parameter {number}, of shape {tuple(p.shape)}, is not one that the optimiser holds.")
        if isinstance(optimizer, SGD):
            scale = torch.zeros_like(p, dtype=torch.float64)
        elif not optimizer.state.get(p):
            raise InputError(f"The optimiser has taken no step on parameter {number}, of shape {tuple(p.shape)}.")
        else:
            scale = _second_moment(optimizer, optimizer.state[p], groups[id(p)]).sqrt()
        parts.append(1.0 / (num_data * scale.flatten() + prior_precision))
    if not parts:
        raise InputError("There are no parameters; an iterator may have been spent: pass list(network.parameters()).")
    return torch.cat(parts)


def _second_moment(optimizer: Optimizer, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    if isinstance(optimizer, RMSprop):
        v = state["square_avg"].double()
        return (v - state["grad_avg"].double().square()).clamp_min(0.0) if group["centered"] else v
    v = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"].double()
    return v / (1.0 - float(group["betas"][1]) ** float(state["step"]))
