"""laplace-torch: from its posteriors over weights and back, with the same numbers.

| laplace-torch | here |
|---|---|
| FullLaplace, FullLLLaplace | `Posterior` on `JacobianBasis.of_weights` |
| KronLaplace, KronLLLaplace | `nets.StructuredPosterior`, `Structure("kronecker", separate_bias=True)` |
| DiagLaplace, DiagLLLaplace | `nets.StructuredPosterior`, `Structure("diagonal")` |

Their prior precision is τ beside a loss that is summed over data, as here. Their `H` is curvature in the weights, of a
loss without noise: B = H / (Tσ²) / τ on w = √τ(θ − θ*).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from gpytorch.constraints import Positive
from gpytorch.likelihoods import GaussianLikelihood, Likelihood, SoftmaxLikelihood
from torch import Tensor, nn

from dualgp.errors import InputError, UnsupportedError
from dualgp.fingerprints import Held
from dualgp.jacobian import JacobianBasis, Precision
from dualgp.kernels import NetworkJacobian
from dualgp.laplace import laplace_sites
from dualgp.linalg import first_tensor
from dualgp.nets.centre import Recentring
from dualgp.nets.data import Source, check_batch, rows_of
from dualgp.nets.factors import Curvature, Dense, Diagonal, Kronecker
from dualgp.nets.layerwise import Structure, StructuredSite
from dualgp.nets.posterior import NetworkPosterior
from dualgp.nets.structured import StructuredPosterior
from dualgp.posterior import Posterior
from dualgp.sites import Site


def from_laplace(la: Any, data: Any, *, y: Tensor | None = None) -> NetworkPosterior:
    """Return a fitted laplace-torch posterior as a `NetworkPosterior`: its mean, covariance and evidence.

    The curvature is copied, not computed anew, so its likelihood temperature stays in it; data that are added later
    have temperature 1. The mean is the network's output (`centre="network"`), as in its GLM predictions.

    Args:
        la: a fitted FullLaplace, KronLaplace or DiagLaplace, over all weights that require a gradient or the last
            layer, for classification or regression.
        data: what it was fitted to, as in `network_gp`: read once, for what laplace-torch does not keep (which data
            are held, and the stationarity report).
        y: targets, where `data` is X.

    Raises:
        UnsupportedError: for other kinds, a prior mean that is not 0, one prior precision for each parameter, or
            damping.
        InputError: if it is not fitted, its network was trained on since, or the data are not N in number.

    Source: Daxberger et al. 2021 (laplace-torch), checked with version 0.3.
    """
    laplace = _laplace()
    classes = (laplace.FullLaplace, laplace.KronLaplace, laplace.DiagLaplace)
    if not isinstance(la, classes) or isinstance(la, laplace.SubnetLaplace):
        raise UnsupportedError(
            f"{type(la).__name__} has no counterpart here: expected Full, Kron or Diag, over all weights or the last "
            "layer. For function space use network_gp(..., num_inducing=M), which keeps all data."
        )
    if not la.n_data:
        raise InputError(f"{type(la).__name__} is not fitted: call its fit(loader) first.")
    if bool((torch.as_tensor(la.prior_mean, device=first_tensor(la.prior_mean).device) != 0).any()):
        raise UnsupportedError("A prior mean other than 0 is not supported.")
    likelihood = _likelihood(la)
    source = Source(data, y, likelihood)
    network, names = _network_of(la)
    jacobian = NetworkJacobian(network, source.example(), params=names)
    if not torch.equal(jacobian.theta, la.mean.detach().to(jacobian.theta)):
        raise InputError("The network's weights are not those that laplace-torch was fitted at; fit it again.")
    basis = JacobianBasis.of_weights(jacobian, _precision(la, jacobian))
    posterior = _posterior(la, basis, source.example(), 1.0 / (float(la.sigma_noise) ** 2 * float(la.temperature)))
    pull, held, count = _data(jacobian, source, likelihood)
    if count != la.n_data:
        raise InputError(f"laplace-torch was fitted to {la.n_data} data, but {count} were given.")
    fit = float(la.log_likelihood)
    return NetworkPosterior(
        posterior, likelihood, "network", la.n_data, fit, pull, held, Recentring(basis.whiten(pull), 0.0)
    )


def to_laplace(q: NetworkPosterior) -> Any:
    """Return a fitted laplace-torch FullLaplace, KronLaplace or DiagLaplace with the same numbers.

    Its model is a copy of the network in which only the parameters of `q` require a gradient: a last layer is a subset
    of all weights there. Without log p of all data, its evidence is not a number.

    Raises:
        UnsupportedError: if the posterior is in function space, its mean is not the network's output, its Kronecker
            products are sums or join weight and bias, or its likelihood is neither softmax nor Gaussian.

    Source: Daxberger et al. 2021 (laplace-torch), checked with version 0.3.
    """
    laplace = _laplace()
    basis = q.basis
    if basis.has_residual or not basis.coupled:
        raise UnsupportedError(
            "laplace-torch has no such posterior in function space: convert a dense or structured one."
        )
    if bool(q.posterior.site.lam.any()):
        raise UnsupportedError(
            "The mean of laplace-torch is the network's output, and the mean here has left it: use centre='network', "
            "before data are added."
        )
    kind, sigma = _kind(q.likelihood)
    tau = torch.as_tensor(q.prior_precision, dtype=basis.dtype, device=basis.device)
    model = copy.deepcopy(basis.jacobian.network)
    options = {"prior_precision": tau, "sigma_noise": sigma}
    theta = basis.jacobian.theta
    scale = basis.whiten(torch.ones_like(theta)).reciprocal()  # √τ
    if isinstance(q.posterior, Posterior):
        la = laplace.FullLaplace(model, kind, **options)
        H = q.posterior.site.B * scale * scale.unsqueeze(-1)
        la.H = (sigma**2 * H).to(basis.dtype)
    elif q.posterior.structure.kind == "diagonal":
        la = laplace.DiagLaplace(model, kind, **options)
        la.H = (sigma**2 * q.posterior.eigenbasis.values * scale.square()).to(basis.dtype)
    else:
        la = laplace.KronLaplace(model, kind, **options)
        la.H_facs = laplace.utils.Kron(_kfacs(q.posterior, sigma**2))
        la.H = la.H_facs.decompose()
    fit = float("nan") if q.log_likelihood is None else q.log_likelihood
    la.mean, la.n_data, la.n_outputs, la.loss = theta, q.num_data, q.num_outputs, 0.0
    la.loss = (float(la.log_likelihood) - fit) * sigma**2
    model.output_size = q.num_outputs  # type: ignore[assignment]
    return la


def _laplace() -> Any:
    try:
        import laplace
    except ImportError as error:
        raise ImportError(
            "laplace-torch is not installed. `pip install laplace-torch` brings torchvision and may change your torch; "
            "with --no-deps, add curvlinops-for-pytorch, backpack-for-pytorch, asdfghjkl, torchmetrics and what they "
            "ask for."
        ) from error
    return laplace


def _likelihood(la: Any) -> Likelihood:
    if la.likelihood == "classification":
        return SoftmaxLikelihood(num_classes=la.n_outputs, mixing_weights=False).requires_grad_(False)
    if la.likelihood != "regression":
        raise UnsupportedError(f"Expected likelihood 'classification' or 'regression', got {la.likelihood!r}.")
    likelihood = GaussianLikelihood(noise_constraint=Positive()).double()
    likelihood.noise = float(la.sigma_noise) ** 2
    return likelihood.to(la.mean.device).requires_grad_(False)


def _kind(likelihood: Likelihood) -> tuple[str, float]:
    """Their name of a likelihood, and σ."""
    if type(likelihood) is SoftmaxLikelihood:
        return "classification", 1.0
    if type(likelihood) is GaussianLikelihood:
        return "regression", float(likelihood.noise) ** 0.5
    raise UnsupportedError(f"laplace-torch has no {type(likelihood).__name__}: softmax or one Gaussian noise.")


def _network_of(la: Any) -> tuple[nn.Module, list[str]]:
    """The user's network, without the hooks of laplace-torch, and the names of the parameters it is about."""
    extractor = hasattr(la.model, "last_layer")
    network = la.model.model if extractor else la.model
    wanted = {id(p) for p in (la.model.last_layer.parameters() if extractor else la.params)}
    names = [name for name, p in network.named_parameters() if id(p) in wanted]
    network = copy.deepcopy(network)
    for module in network.modules():
        for key, hook in list(module._forward_hooks.items()):
            if str(getattr(hook, "__module__", "")).split(".")[0] in ("laplace", "backpack"):
                del module._forward_hooks[key]
    return network, names


def _precision(la: Any, jacobian: NetworkJacobian) -> Precision:
    tau = torch.as_tensor(la.prior_precision, device="cpu").detach().double().flatten()
    if len(tau) == 1:
        return float(tau)
    if len(tau) == len(jacobian.shapes):
        return tau
    firsts = tau[[s.start for s in jacobian.slices]]
    if torch.equal(jacobian.by_weight(firsts), tau):
        return firsts
    raise UnsupportedError("One prior precision for each parameter is not supported: one, or one for each tensor.")


def _posterior(
    la: Any, basis: JacobianBasis, example: Tensor, factor: float
) -> Posterior[JacobianBasis] | StructuredPosterior:
    """The posterior of their curvature H: B = factor · H / τ."""
    laplace = _laplace()
    lam = torch.zeros(basis.size, dtype=torch.float64, device=basis.device)
    sd = basis.whiten(torch.ones_like(lam))
    if isinstance(la, laplace.FullLaplace):
        return Posterior(basis, Site(lam, factor * la.H.detach().double() * sd * sd.unsqueeze(-1)))
    diagonal = isinstance(la, laplace.DiagLaplace)
    if diagonal:
        d = (factor * la.H.detach().double() * sd.square()).split([s.stop - s.start for s in basis.jacobian.slices])
        parts: list[Curvature] = [Diagonal(part, (len(part),)) for part in d]
    else:
        parts = _kronecker_parts(la, basis.jacobian, factor * sd.square())
    structure = Structure("diagonal" if diagonal else "kronecker", separate_bias=True)
    keys = [layer.tensors for layer in structure.layers(basis.jacobian.block(example))]
    blocks = {key: parts[key[0]] if len(key) == 1 else _joined([parts[t] for t in key]) for key in keys}
    return StructuredPosterior(basis, StructuredSite(lam, blocks), structure)


def _kronecker_parts(la: Any, jacobian: NetworkJacobian, scale: Tensor) -> list[Curvature]:
    """Their factors, for each parameter tensor."""
    if la.damping:
        raise UnsupportedError("KronLaplace with damping=True is not the posterior of a prior and sites.")
    kfacs = la.H_facs.kfacs
    if len(kfacs) != len(jacobian.shapes):
        raise UnsupportedError(f"Expected factors of {list(jacobian.names)}, got {len(kfacs)} sets of factors.")
    parts: list[Curvature] = []
    for name, at, (G, *rest) in zip(jacobian.names, jacobian.slices, kfacs, strict=True):
        A = rest[0] if rest else G.new_ones(1, 1)
        if min(G.ndim, A.ndim) < 2 or len(G) * len(A) != at.stop - at.start:
            raise UnsupportedError(f"The factors {tuple(G.shape)} and {tuple(A.shape)} are not of {name}.")
        parts.append(Kronecker(((G.detach().double() * scale[at.start], A.detach().double()),), False))
    return parts


def _joined(parts: list[Curvature]) -> Curvature:
    """One block of the blocks of several tensors, which their layer has in common."""
    sizes = tuple(len(part.to_dense()) for part in parts)
    if all(isinstance(part, Diagonal) for part in parts):
        return Diagonal(torch.cat([part.to_dense().diagonal() for part in parts]), sizes)
    return Dense(torch.block_diag(*[part.to_dense() for part in parts]), sizes)


def _kfacs(posterior: StructuredPosterior, scale: float) -> list[list[Tensor]]:
    """Their factors [G, A] of each parameter tensor, or [B] of one with one dimension."""
    basis, kfacs = posterior.basis, []
    jacobian, root = basis.jacobian, basis.whiten(torch.ones(basis.size, device=basis.device)).reciprocal()
    for t, (name, shape, at) in enumerate(zip(jacobian.names, jacobian.shapes, jacobian.slices, strict=True)):
        block = posterior.site.blocks.get((t,))
        if block is None or (isinstance(block, Kronecker) and len(block.terms) > 1):
            raise UnsupportedError(
                f"laplace-torch has one Kronecker product for {name} alone; this posterior has a sum of several, or "
                "none of its own. Convert with nets.Structure('kronecker', separate_bias=True)."
            )
        tau = float(root[at.start]) ** 2
        if isinstance(block, Kronecker) and len(shape) > 1 and at.stop - at.start > 1:
            ((G, A),) = block.terms
            factors = [tau * scale * G, A]
        else:
            factors = [tau * scale * block.to_dense()]
        kfacs.append([F.to(basis.dtype) for F in factors])
    return kfacs


@torch.no_grad()
def _data(jacobian: NetworkJacobian, source: Source, likelihood: Likelihood) -> tuple[Tensor, Held, int]:
    """Jᵀα of the data, their fingerprints, and their number."""
    pull, rows = torch.zeros(jacobian.num_params, dtype=torch.float64, device=jacobian.device), []
    for batch in source:
        batch = check_batch(likelihood, batch, jacobian.num_outputs, jacobian.device)
        f = jacobian(batch.x).double()
        alpha = laplace_sites(likelihood, batch.y, f).alpha(f)
        pull += jacobian.vjp(batch.x, alpha).double()
        rows.append(rows_of(batch, jacobian.dtype))
    return pull, Held.of(torch.cat(rows), jacobian.num_params), sum(map(len, rows))
