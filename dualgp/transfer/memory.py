"""Memory of earlier data: inputs that stand for them, chosen among them or made of their curvature."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from gpytorch.likelihoods import Likelihood, SoftmaxLikelihood
from torch import Tensor, nn

from dualgp.checks import check_generator, check_tensor
from dualgp.draws import uniform
from dualgp.errors import InputError, check_count
from dualgp.laplace import laplace_sites
from dualgp.selection import RULES, Candidates, Rule, check_rule, choose
from dualgp.threads import ONE_AT_A_TIME
from dualgp.transfer.terms import check_canonical
from dualgp.weights import evaluated


@dataclass(frozen=True, eq=False)
class MemorySet:
    """Inputs that stand for data, with what the network said of them.

    Attributes:
        x: inputs, [m, ...].
        f: outputs of the network w* there, [m, C] or [m].
        weights: how many data each stands for, [m].
        y: targets, if they are kept.
    """

    x: Tensor
    f: Tensor
    weights: Tensor
    y: Tensor | None = None

    def __post_init__(self) -> None:
        for name, value in (("x", self.x), ("f", self.f), ("weights", self.weights), ("y", self.y)):
            if name != "y" or value is not None:
                check_tensor(name, value)
            if value is not None and not value.ndim:
                raise InputError(f"{name} must have one row for each datum, got a number.")
        if not len(self.x) == len(self.f) == len(self.weights) or (self.y is not None and len(self.y) != len(self.x)):
            raise InputError(
                f"Inputs, outputs, weights and targets of as many data were expected, got {len(self.x)}, "
                f"{len(self.f)}, {len(self.weights)} and {None if self.y is None else len(self.y)}."
            )
        w = self.weights
        if w.ndim != 1 or not bool(self.f.isfinite().all() and ((w >= 0) & w.isfinite()).all()):
            raise InputError(
                f"A memory has finite outputs and weights ≥ 0 [m], got weights {tuple(w.shape)}: a network that has "
                "diverged is no memory."
            )

    def __len__(self) -> int:
        return len(self.x)

    @classmethod
    def of(cls, network: nn.Module, x: Tensor, y: Tensor | None = None, weights: Tensor | None = None) -> MemorySet:
        """Return the memory of inputs at a network; every weight is 1 unless given.

        Example:
            >>> net = nn.Linear(1, 1)
            >>> len(MemorySet.of(net, torch.zeros(3, 1)))
            3
        """
        with ONE_AT_A_TIME, torch.no_grad():  # in the mode it is in
            own = {name: b.clone() for name, b in network.named_buffers()}  # a batch norm that trains moves none
            f = evaluated(network, own, x)
        if weights is None:
            weights = torch.ones(len(x), dtype=f.dtype, device=f.device)
        check_tensor("weights", weights)
        if y is not None:
            check_tensor("y", y)
        return cls(x.clone(), f, weights.clone(), None if y is None else y.clone())  # the caller may change its own

    def join(self, other: MemorySet) -> MemorySet:
        """Return both together; targets are kept if both have them.

        Raises:
            InputError: if inputs or outputs have other shapes.
        """
        for mine, theirs in ((self.x, other.x), (self.f, other.f)):
            if mine.shape[1:] != theirs.shape[1:]:
                raise InputError(f"Memories of one network join, got {tuple(mine.shape)} and {tuple(theirs.shape)}.")
        y = None if self.y is None or other.y is None else torch.cat([self.y, other.y])
        x, f = torch.cat([self.x, other.x]), torch.cat([self.f, other.f])
        return MemorySet(x, f, torch.cat([self.weights, other.weights]), y)


def select_memory(
    f: Tensor,
    y: Tensor,
    likelihood: Likelihood,
    size: int,
    *,
    rule: str | Rule = "leverage",
    var: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the rows to keep, ascending, by a rule that streams of Gaussian processes use too.

    "leverage": Σ_c β_c v_c, which with v = 1 is the curvature Σ_c p_c(1 − p_c) that K-priors choose by; "sensitivity":
    Σ_c |α_c| v_c; "random"; "recency"; "balanced": equally many of every class, by leverage; or a function.

    Args:
        f: outputs of the network, [n, C] or [n].
        y: targets.
        likelihood: of the outputs.
        size: how many.
        rule: a name, or a function of `Candidates`.
        var: variances v of the outputs; 1 if None.
        generator: of the keys of "random"; torch's default one otherwise.

    Raises:
        InputError: if there is no such rule, size is no whole number ≥ 1, or data, targets and variances do not match.

    Source: Khan & Swaroop 2021, § 4 (leverage, v = 1); Chang et al. 2023, eq. 15 (with v).

    Example:
        >>> from dualgp.likelihoods import LogitBernoulliLikelihood
        >>> select_memory(torch.tensor([5.0, 0.1, -4.0]), torch.ones(3), LogitBernoulliLikelihood(), 1)
        tensor([1])
    """
    check_count("size", size, 1)
    check_generator(generator)
    check_tensor("f", f)
    if not f.ndim:
        raise InputError("f must have one row of outputs for each datum, got a number.")
    if var is not None and var.numel() != f.numel():
        raise InputError(f"Expected a variance for each of the outputs {tuple(f.shape)}, got {tuple(var.shape)}.")
    keys = uniform((len(f),), torch.device("cpu"), generator)

    def moments() -> tuple[Tensor, Tensor, Tensor]:
        sites = laplace_sites(likelihood, y, f)
        at = f.double().reshape(sites.lam.shape)
        beta = sites.beta.diagonal(dim1=-2, dim2=-1) if sites.coupled else sites.beta
        return sites.alpha(at), beta, torch.ones_like(at) if var is None else var.double().reshape(at.shape)

    multi = f.ndim == 2
    x, ids = torch.zeros(len(f), 0, dtype=torch.float64, device="cpu"), torch.arange(len(f), device="cpu")
    return choose(check_rule(rule, RULES), Candidates(x, y, ids, keys, multi, moments), size)


@dataclass(frozen=True, eq=False)
class CompactMemory:
    """Inputs that no datum has had, whose curvature is that of all data; and what they leave out.

    Attributes:
        memory: k unit vectors u with weights w, so that Σ wₖ h′(uₖᵀθ*) uₖuₖᵀ is the curvature of the data in k
            directions.
        residual: the trace of the curvature left out, per direction: a precision to add to δ, or to leave.
    """

    memory: MemorySet
    residual: float


def compact_memory(
    network: nn.Module,
    memory: MemorySet,
    likelihood: Likelihood,
    size: int,
) -> CompactMemory:
    """Return k vectors that stand for all data of a generalised linear model, by the eigenvectors of their curvature.

    Σ_d w_d tr Λ_d φ_dφ_dᵀ = Σ e_j u_ju_jᵀ; the k largest are kept, with weight e_j / tr Λ(u_j), at least 10⁻⁴ below.
    Exact for regression as soon as k is the rank; Hessian-matched at θ* otherwise.

    Args:
        network: linear in its inputs and without bias (a column of ones in its place): f = θᵀφ.
        memory: all data, or new data joined to the memory so far (`MemorySet.join`), at this network.
        likelihood: with a canonical link.
        size: k.

    Raises:
        InputError: if inputs are not vectors, the network is not linear, or size is no whole number ≥ 1.

    Source: compact memory for continual learning (NeurIPS 2025), eq. 9, solved by an eigendecomposition: its EM finds
    the same subspace, up to a rotation and scale that Hessian matching leaves free and a non-linear loss does not.

    Example:
        >>> from gpytorch.likelihoods import GaussianLikelihood
        >>> lik = GaussianLikelihood(); lik.noise = 1.0
        >>> net, x = nn.Linear(3, 1, bias=False), torch.randn(50, 3)
        >>> found = compact_memory(net, MemorySet.of(net, x), lik, 3).memory
        >>> bool(((found.x.mT * found.weights) @ found.x - x.mT @ x).abs().max() < 1e-3)
        True
    """
    check_count("size", size, 1)
    x = memory.x
    if x.ndim != 2:
        raise InputError(f"Compact memory is made of vectors [n, D], got {tuple(x.shape)}: pass features.")
    with torch.no_grad():
        probe = network(x[:2].sum(0, keepdim=True)) - network(x[:2]).sum(0, keepdim=True)
        if float(probe.abs().max()) > 1e-4 * (1.0 + float(network(x[:2]).abs().max())):
            raise InputError(
                "Compact memory needs a network linear in its inputs, without bias: give the last layer alone, with "
                "its features and a column of ones as inputs."
            )
        scale = memory.weights.double() * _trace_curvature(likelihood, memory.f)
        values, vectors = torch.linalg.eigh((x.double().mT * scale) @ x.double())  # ascending
        kept = vectors[:, -size:].mT.to(x)
        f = network(kept)
        weights = values[-size:].clamp_min(0.0) / _trace_curvature(likelihood, f).clamp_min(1e-4)
    residual = float(values[:-size].clamp_min(0.0).sum()) / x.shape[1]
    return CompactMemory(MemorySet(kept, f, weights.to(x)), residual)


def _trace_curvature(likelihood: Likelihood, f: Tensor) -> Tensor:
    """Tr Λ = Σ_c −∂² log p, [n], float64; of a canonical link it sees no labels."""
    check_canonical(likelihood)
    f = f.detach().double()
    if type(likelihood) is SoftmaxLikelihood:
        p = f.softmax(-1)
        return (p * (1.0 - p)).sum(-1)
    beta = laplace_sites(likelihood, torch.zeros_like(f), f).beta
    return beta.flatten(1).sum(-1) if beta.ndim > 1 else beta
