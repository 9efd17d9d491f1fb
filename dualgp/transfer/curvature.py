"""The curvature of a network's loss at its weights: what a site needs beside the weights themselves."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from gpytorch.likelihoods import Likelihood
from torch import Tensor, nn

from dualgp.errors import InputError
from dualgp.kernels import NetworkJacobian
from dualgp.kernels.layers import FactoredLayer, Layer
from dualgp.kernels.ntk import JacobianBlock
from dualgp.laplace import laplace_sites
from dualgp.linalg import symmetrise
from dualgp.sites import Sites
from dualgp.transfer.kronecker import KroneckerCurvature
from dualgp.weights import WeightLayout

CurvatureKind: TypeAlias = Literal["ggn", "empirical"]
_NUMBERS = 1 << 24  # of an explicit Jacobian that is held at once


def network_curvature(
    network: nn.Module,
    x: Tensor,
    y: Tensor,
    likelihood: Likelihood,
    structure: Literal["diagonal", "dense"] = "diagonal",
    *,
    kind: CurvatureKind = "ggn",
    weights: Tensor | None = None,
) -> Tensor:
    """Return the curvature of −Σ log p(yᵢ|f(xᵢ; θ)) at the network's weights, [P] or [P, P], in float64.

    "ggn": Σ JᵢᵀβᵢJᵢ, the generalised Gauss–Newton matrix; for canonical links it is the Fisher matrix, with labels of
    the model and no sampling. "empirical": Σ gᵢgᵢᵀ with gᵢ the gradient of one datum at its own label, as optimisers
    keep it; it vanishes where the data are fitted. Both are sums over data, of the scale of a precision.

    Args:
        network: a trained network; not touched.
        x: inputs, [n, *input_shape].
        y: targets.
        likelihood: a GPyTorch likelihood, as for `laplace_sites`.
        structure: "diagonal" or "dense".
        kind: "ggn" or "empirical".
        weights: how many data each datum stands for, [n]; 1 if None.

    Raises:
        InputError: if an argument is unknown, or data do not fit.

    Source: Martens 2020, § 8 and § 11 (empirical Fisher).

    Example:
        >>> from gpytorch.likelihoods import GaussianLikelihood
        >>> lik = GaussianLikelihood(); lik.noise = 1.0
        >>> x = torch.tensor([[1.0], [2.0]])
        >>> network_curvature(nn.Linear(1, 1), x, torch.zeros(2), lik, "dense")
        tensor([[5., 3.],
                [3., 2.]], dtype=torch.float64)
    """
    if structure not in ("diagonal", "dense") or kind not in ("ggn", "empirical"):
        raise InputError(f'Expected "diagonal" or "dense" and "ggn" or "empirical", got {structure!r} and {kind!r}.')
    if weights is not None and not (weights.shape == (len(x),) and bool(((weights >= 0) & weights.isfinite()).all())):
        raise InputError(f"Expected a weight for each of {len(x)} data, finite and ≥ 0, got {tuple(weights.shape)}.")
    jacobian = _jacobian(network, x, y)
    P = jacobian.num_params
    total = torch.zeros((P,) if structure == "diagonal" else (P, P), dtype=torch.float64, device=jacobian.device)
    step = max(1, _NUMBERS // (P * jacobian.num_outputs))
    for rows, whole in jacobian.blocks(x):
        for start in range(0, len(whole), step):
            block = whole[start : start + step]
            sites = laplace_sites(likelihood, y[rows][start : start + step], block.f)
            jac = block.dense().double()  # [n, C, P]
            if kind == "empirical":
                vectors = torch.einsum("ncp,nc->np", jac, _alpha(sites, block))
                scale = vectors.new_ones(len(vectors))
            else:
                vectors, scale = _rotated(jac, sites)
            if weights is not None:
                w = weights[rows][start : start + step].to(scale)
                scale = scale * w.repeat_interleave(len(scale) // len(w))
            weighted = vectors * scale.unsqueeze(-1)
            total += (weighted * vectors).sum(0) if structure == "diagonal" else weighted.mT @ vectors
    return total if structure == "diagonal" else symmetrise(total)


def kronecker_curvature(network: nn.Module, x: Tensor, y: Tensor, likelihood: Likelihood) -> KroneckerCurvature:
    """Return the Gauss–Newton curvature of each layer as one Kronecker product (KFAC), or a diagonal without factors.

    B of a layer = (Σᵢ gᵢᵀβᵢgᵢ) ⊗ (mean of aaᵀ), with inputs a and derivatives g of the outputs.

    Raises:
        InputError: if data do not fit.

    Source: Martens & Grosse 2015; Grosse & Martens 2016 for convolutions.

    Example:
        >>> from gpytorch.likelihoods import GaussianLikelihood
        >>> lik = GaussianLikelihood(); lik.noise = 1.0
        >>> x = torch.tensor([[1.0], [2.0]])
        >>> kronecker_curvature(nn.Linear(1, 1), x, torch.zeros(2), lik).to_dense()  # one layer: exact
        tensor([[5., 3.],
                [3., 2.]], dtype=torch.float64)
    """
    jacobian = _jacobian(network, x, y)
    layout = WeightLayout(dict(zip(jacobian.names, jacobian.shapes, strict=True)))
    sums: dict[tuple[str, ...], list[Tensor]] = {}
    counts: dict[tuple[str, ...], int] = {}
    rest = torch.zeros(layout.size, dtype=torch.float64, device=jacobian.device)
    for rows, block in jacobian.blocks(x):
        sites = laplace_sites(likelihood, y[rows], block.f)
        for layer in block.layers:
            names = tuple(jacobian.names[t] for t in layer.tensors)
            if isinstance(layer, FactoredLayer):
                new = _factors(layer, sites)
                sums[names] = [a + b for a, b in zip(sums[names], new, strict=True)] if names in sums else new
                counts[names] = counts.get(names, 0) + layer.a.shape[0] * layer.a.shape[1]
            else:
                _add_diagonal(rest, layer, sites, jacobian)
    terms = {n: ((symmetrise(G), symmetrise(A) / counts[n]),) for n, (G, A) in sums.items()}
    return KroneckerCurvature(layout, terms, rest)


def _factors(layer: FactoredLayer, sites: Sites) -> list[Tensor]:
    a, S = layer.a.flatten(0, 1).double(), layer.a.shape[1]
    flat, weights = _rotated(layer.g.flatten(2).double(), sites)  # Rᵢᵀgᵢ [nC, S · O]
    g = flat.unflatten(-1, (S, -1))
    return [(g * weights[:, None, None]).flatten(0, 1).mT @ g.flatten(0, 1), a.mT @ a]


def _add_diagonal(rest: Tensor, layer: Layer, sites: Sites, jacobian: NetworkJacobian) -> None:
    vectors, weights = _rotated(layer.dense().double(), sites)
    slices = [jacobian.slices[t] for t in layer.tensors]
    at = torch.cat([torch.arange(s.start, s.stop, device=rest.device) for s in slices])
    rest[at] += weights @ vectors.square()


def _rotated(phi: Tensor, sites: Sites) -> tuple[Tensor, Tensor]:
    """ψ and weights with Σ φᵢᵀβᵢφᵢ = ψᵀ diag(weights) ψ."""
    return sites.rotate(phi) if sites.coupled else (phi.flatten(0, -2), sites.beta.flatten())


def _alpha(sites: Sites, block: JacobianBlock) -> Tensor:
    f = block.f.double()
    return sites.alpha(f.reshape(sites.lam.shape)).reshape(f.shape)


def _jacobian(network: nn.Module, x: Tensor, y: Tensor) -> NetworkJacobian:
    if len(x) != len(y):
        raise InputError(f"Expected a target for each of {len(x)} data, got {len(y)}.")
    if len(x) < 2:
        raise InputError(f"Expected two data or more, got {len(x)}.")
    return NetworkJacobian(network, x[:3])
