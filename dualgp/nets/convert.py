"""`network_gp`: from a trained network and its data to a posterior, in one call."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from gpytorch.likelihoods import Likelihood
from torch import Tensor, nn
from tqdm.auto import tqdm

from dualgp.basis import SiteSum
from dualgp.duals import check_likelihood
from dualgp.errors import InputError
from dualgp.jacobian import JacobianBasis, Outputs, Precision
from dualgp.kernels import NetworkJacobian
from dualgp.kernels.networks import Selection
from dualgp.laplace import laplace_sites
from dualgp.nets import inducing
from dualgp.nets.data import Batch, Source, check_batch, check_outputs, rows_of
from dualgp.nets.fingerprints import Held
from dualgp.nets.links import log_prob
from dualgp.nets.posterior import Centre, NetworkPosterior, centred
from dualgp.posterior import Posterior
from dualgp.sites import Site

Structure = Literal["sparse", "full", "dense"]
_MAX_SIZE = 3000  # coordinates that are factorised without being asked: about ten seconds on one core
_FULL_TOL = 1e-10  # of the rank at Z = X, where the posterior is exact but for what is cut


def network_gp(
    network: nn.Module,
    data: Any,
    likelihood: Likelihood,
    *,
    y: Tensor | None = None,
    prior_precision: Precision = 1.0,
    num_inducing: int | None = None,
    inducing_inputs: Tensor | None = None,
    structure: Structure | None = None,
    outputs: Outputs = "coupled",
    params: Selection = "all",
    centre: Centre = "network",
    budget: int = 256 << 20,
    generator: torch.Generator | None = None,
    progress: bool | None = None,
) -> NetworkPosterior:
    """Return a trained network as a Gaussian process: its predictions, with their uncertainty, as a value.

        f(x) = f(x; θ*) + J(x)(θ − θ*),   θ ~ N(0, τ⁻¹I),   and a site (α_i + B_i f_i, B_i) at θ* for each datum

    Nothing is trained and nothing random happens to the network, which is copied. The data are read once or twice, in
    any order, in chunks; memory does not grow with their number.

    Args:
        network: trained; maps [n, *input_shape] to [n, C] or [n].
        data: a DataLoader of batches (x, y), or (x, y, noise); or tensors (X, y); or X, with `y`.
        likelihood: a GPyTorch likelihood of y given the network's outputs: GaussianLikelihood with the noise of the
            residuals, SoftmaxLikelihood(num_classes=C, mixing_weights=False), `dualgp.likelihoods`.
        y: targets, where `data` is X.
        prior_precision: τ, beside a loss that is *summed* over data; or one for each parameter tensor. From a weight
            decay: `from_weight_decay`. Or choose it by `tuned`.
        num_inducing: M, for "sparse": this many inputs of the data, spread by what the network's outputs there see of
            its weights.
        inducing_inputs: Z itself, [M, *input_shape].
        structure: "sparse": w spans what the outputs at Z see, the rest keeps its prior; "full": Z are all inputs,
            exact, with NC coordinates at most; "dense": all P weights, exact. None: "sparse" if M or Z is given;
            else the smaller of dense (P) and full (NC) up to 3000 coordinates; else sparse with M = 3000/C, 50 at
            least.
        outputs: "coupled", or "independent" to ignore covariances between outputs: C matrices M × M.
        params: "all" that require a gradient, "last_layer", names, or a predicate of a name (LoRA, for instance).
        centre: "network": the mean is the network's output, and data that are added later move it. "map": the mean of
            the linearised model, which is the network's only at a maximum of its posterior (see `stationarity`).
        budget: bytes that Jacobians may take at a time.
        generator: of the choice of Z among the data; a fixed seed if None.
        progress: whether to show a bar; None shows one on a terminal, after a second.

    Raises:
        InputError: for data that do not fit network or likelihood, no data, weights that are not finite, a budget too
            small for one row, or arguments that contradict each other.
        UnsupportedError: for a network or likelihood that cannot be used.

    Source: Khan et al. 2019 (DNN2GP); Immer et al. 2021 (GLM predictive); Scannell et al. 2024 (SFR). Here B_i is a
    full C × C block, and Z a rank-revealing projection in place of jitter.

    Example:
        >>> from gpytorch.likelihoods import GaussianLikelihood
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))
        >>> x = torch.linspace(-1, 1, 50).unsqueeze(-1)
        >>> q = network_gp(net, (x, net(x)), GaussianLikelihood(), prior_precision=0.1)
        >>> mean, var = q.predict(torch.tensor([[0.0], [4.0]]))
        >>> bool(var[0] < 0.1 * var[1])
        True
    """
    check_likelihood(likelihood)
    if centre not in get_args(Centre):
        raise InputError(f"centre must be one of {get_args(Centre)}, got {centre!r}.")
    source = Source(data, y, likelihood)
    jacobian = NetworkJacobian(network, source.example(), params=params, budget=budget)
    check_outputs(likelihood, jacobian.num_outputs)
    kind = _structure(structure, num_inducing, inducing_inputs, jacobian, source)
    if kind == "dense":
        if outputs != "coupled":
            raise InputError("Independent outputs need a structure in function space: 'sparse' or 'full'.")
        basis = JacobianBasis.of_weights(jacobian, prior_precision)
    else:
        if inducing_inputs is not None:
            Z, tol = inducing_inputs, 1e-7
        elif kind == "full":
            Z, tol = torch.cat([batch.x for batch in source]), _FULL_TOL
        else:
            M = num_inducing or max(50, _MAX_SIZE // jacobian.num_outputs)
            Z, tol = inducing.choose(jacobian, source, M, generator), 1e-7
        basis = JacobianBasis.at_inputs(jacobian, Z, prior_precision, outputs=outputs, rank_tol=tol)
    likelihood = copy.deepcopy(likelihood).to(jacobian.device).requires_grad_(False)
    return _accumulate(basis, source, likelihood, centre, progress)


def from_weight_decay(
    value: float, num_data: int, reduction: Literal["mean", "sum"] = "mean", *, loss_scale: float = 1.0
) -> float:
    """Return the prior precision τ that a weight decay stands for, beside a loss −log p summed over data.

        mean loss:  (1/N) Σ lᵢ + δ/2 |θ|²  has  τ = Nδ/s        sum loss:  τ = δ/s        where lᵢ = −s log p(yᵢ|fᵢ)

    Args:
        value: δ, the `weight_decay` of SGD or Adam; AdamW's is decoupled, and is that of no prior.
        num_data: N of the training.
        reduction: of the loss: "mean" or "sum".
        loss_scale: s. 1 for cross-entropy; 2σ² for `nn.MSELoss` beside a Gaussian likelihood of noise σ².

    Raises:
        InputError: if an argument is not positive or finite, or the reduction unknown.

    Example:
        >>> from_weight_decay(1e-3, 5000)
        5.0
    """
    if reduction not in ("mean", "sum"):
        raise InputError(f"reduction must be 'mean' or 'sum', got {reduction!r}.")
    if not (0 < value < float("inf") and num_data >= 1 and 0 < loss_scale < float("inf")):
        raise InputError(f"Expected positive numbers, got {value}, num_data={num_data}, loss_scale={loss_scale}.")
    return value * (num_data if reduction == "mean" else 1) / loss_scale


def _structure(
    structure: str | None, M: int | None, Z: Tensor | None, jacobian: NetworkJacobian, source: Source
) -> str:
    if M is not None and Z is not None:
        raise InputError("Give num_inducing or inducing_inputs, not both.")
    if M is not None and M < 1:
        raise InputError(f"num_inducing must be at least 1, got {M}.")
    given = M is not None or Z is not None
    if structure is None:
        size = jacobian.num_params
        full = _MAX_SIZE + 1 if given else jacobian.num_outputs * sum(len(batch.x) for batch in source)
        if given or min(size, full) > _MAX_SIZE:
            return "sparse"
        return "dense" if size <= full else "full"
    if structure not in get_args(Structure):
        raise InputError(f"structure must be one of {get_args(Structure)} or None, got {structure!r}.")
    if given and structure != "sparse":
        raise InputError(f"num_inducing and inducing_inputs are for structure='sparse', got {structure!r}.")
    return structure


@torch.no_grad()
def _accumulate(
    basis: JacobianBasis, source: Source, likelihood: Likelihood, centre: Centre, progress: bool | None
) -> NetworkPosterior:
    """Sum the sites of all data on w, and with them log p, Jᵀα and fingerprints."""
    jacobian = basis.jacobian
    total, fit, count, rows = SiteSum(basis), 0.0, 0, []
    pull = torch.zeros(jacobian.num_params, dtype=torch.float64, device=jacobian.device)
    for batch in _counted(source, progress):
        batch = check_batch(likelihood, batch, jacobian.num_outputs, basis.device)
        basis.check_inputs(batch.x)
        rows.append(rows_of(batch, basis.dtype))
        for block, features in basis.blocks(batch.x):
            f = features.prior_mean.reshape(-1, basis.num_outputs) if basis.coupled else features.prior_mean.mT
            y, params = batch.y[block], {name: value[block] for name, value in batch.params.items()}
            sites = laplace_sites(likelihood, y, f, **params)
            pull += jacobian.vjp(batch.x[block], sites.alpha(f)).double()
            fit += float(log_prob(likelihood, y, f, **params).sum())
            if basis.coupled:
                total.add_coupled(features, sites)
            else:
                total.add(features, *sites.decoupled(f).by_latent())
        count += len(batch.x)
    data = total.site()
    site = centred(basis, Site(torch.zeros_like(data.lam), data.B) if centre == "network" else data, centre)
    held = Held.of(torch.cat(rows))
    return NetworkPosterior(Posterior(basis, site), likelihood, centre, count, fit, pull, held)


def _counted(source: Source, progress: bool | None) -> Iterator[Batch]:
    with tqdm(
        desc="data", unit="row", leave=False, delay=1.0, disable=None if progress is None else not progress
    ) as bar:
        for batch in source:
            yield batch
            bar.update(len(batch.x))
