"""`network_gp`: from a trained network and its data to a posterior, in one call."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from gpytorch.likelihoods import Likelihood
from torch import Tensor, nn
from tqdm.auto import tqdm

from dualgp.checks import check_number
from dualgp.duals import check_likelihood
from dualgp.errors import InputError, check_count
from dualgp.fingerprints import Held
from dualgp.jacobian import JacobianBasis, Outputs, Precision
from dualgp.kernels import NetworkJacobian
from dualgp.kernels.networks import Selection
from dualgp.laplace import laplace_sites
from dualgp.nets.centre import Centre, Recentring, centred
from dualgp.nets.data import Batch, Source, check_batch, check_outputs, rows_of
from dualgp.nets.inducing import sample_inputs
from dualgp.nets.layerwise import Structure
from dualgp.nets.links import log_prob
from dualgp.nets.posterior import NetworkPosterior
from dualgp.nets.structured import StructuredPosterior
from dualgp.nets.terms import TermSum, with_site
from dualgp.posterior import Posterior
from dualgp.sites import Sites

Kind = Literal["sparse", "full", "dense", "diagonal", "kronecker"]
_MAX_SIZE = 3000  # coordinates that are factorised without being asked: about ten seconds on one core


def network_gp(
    network: nn.Module,
    data: Any,
    likelihood: Likelihood,
    *,
    y: Tensor | None = None,
    prior_precision: Precision = 1.0,
    num_inducing: int | None = None,
    inducing_inputs: Tensor | None = None,
    structure: Kind | Structure | None = None,
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
        num_inducing: M, for "sparse": a random sample of this many distinct inputs, whatever the order of the data.
        inducing_inputs: Z itself, [M, *input_shape].
        structure: "sparse": w spans what the outputs at Z see, the rest keeps its prior; "full": Z are all inputs,
            exact, with NC coordinates at most; "dense": all P weights, exact. None: "sparse" if M or Z is given;
            else the smaller of dense (P; not for independent outputs) and full (NC) up to 3000 coordinates; else sparse
            with M = 3000/C, 50 at least.
        outputs: "coupled", or "independent" to ignore covariances between outputs: C matrices M × M.
        params: "all" that require a gradient, "last_layer", names, or a predicate of a name (LoRA, for instance).
        centre: "network": the mean is the network's output, and data that are added later move it. "map": the mean of
            the linearised model under θ ~ N(0, τ⁻¹I), which is the network's only at a maximum of its posterior (see
            `stationarity`), and f(x) − J(x)θ* away from all data.
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
    if outputs not in get_args(Outputs):
        raise InputError(f"outputs must be one of {get_args(Outputs)}, got {outputs!r}.")
    source = Source(data, y, likelihood)
    jacobian = NetworkJacobian(network, source.example(), params=params, budget=budget)
    check_outputs(likelihood, jacobian.num_outputs)
    kind = _kind(structure, num_inducing, inducing_inputs, outputs, jacobian, source)
    prior: JacobianBasis | StructuredPosterior
    if kind in ("sparse", "full"):
        if inducing_inputs is not None:
            Z = inducing_inputs
        elif kind == "full":
            Z = torch.cat([batch.x for batch in source])
        else:
            M = num_inducing or max(50, _MAX_SIZE // jacobian.num_outputs)
            Z = sample_inputs(source, M, jacobian.dtype, generator)
        prior = JacobianBasis.at_inputs(jacobian, Z, prior_precision, outputs=outputs)
    else:
        if outputs != "coupled":
            raise InputError("Independent outputs need a structure in function space: 'sparse' or 'full'.")
        prior = JacobianBasis.of_weights(jacobian, prior_precision)
        prior = prior if kind == "dense" else StructuredPosterior(prior, structure=kind)
    likelihood = copy.deepcopy(likelihood).to(jacobian.device).requires_grad_(False)
    return _accumulate(prior, source, likelihood, centre, progress)


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
    check_number("value", value, above=0)
    check_number("num_data", num_data, above=0)
    check_number("loss_scale", loss_scale, above=0)
    return value * (num_data if reduction == "mean" else 1) / loss_scale


def _kind(
    structure: str | Structure | None,
    M: int | None,
    Z: Tensor | None,
    outputs: Outputs,
    jacobian: NetworkJacobian,
    source: Source,
) -> str | Structure:
    if M is not None and Z is not None:
        raise InputError("Give num_inducing or inducing_inputs, not both.")
    if M is not None:
        check_count("num_inducing", M, 1)
    given = M is not None or Z is not None
    if structure is None:
        full = jacobian.num_outputs * (0 if given else sum(len(batch.x) for batch in source))
        weights = jacobian.num_params if outputs == "coupled" else full
        if given or min(weights, full) > _MAX_SIZE:
            return "sparse"
        return "dense" if outputs == "coupled" and weights <= full else "full"
    if not isinstance(structure, Structure) and structure not in get_args(Kind):
        raise InputError(f"structure must be one of {get_args(Kind)} or None, got {structure!r}.")
    if given and structure != "sparse":
        raise InputError(f"num_inducing and inducing_inputs are for structure='sparse', got {structure!r}.")
    return structure


@torch.no_grad()
def _accumulate(
    prior: JacobianBasis | StructuredPosterior,
    source: Source,
    likelihood: Likelihood,
    centre: Centre,
    progress: bool | None,
) -> NetworkPosterior:
    """Sum the sites of all data on w, and with them log p, Jᵀα and fingerprints."""
    structured = prior if isinstance(prior, StructuredPosterior) else None
    basis = prior if isinstance(prior, JacobianBasis) else prior.basis
    total, jacobian = TermSum(basis, structured), basis.jacobian
    pull = torch.zeros(jacobian.num_params, dtype=torch.float64, device=jacobian.device)
    fit, seen = 0.0, []
    for batch in _counted(source, progress):
        batch = check_batch(likelihood, batch, jacobian.num_outputs, basis.device)
        basis.check_inputs(batch.x)
        seen.append(rows_of(batch, basis.dtype))

        def sites_at(rows: slice, f: Tensor, batch: Batch = batch) -> Sites:
            nonlocal fit, pull
            y, params = batch.y[rows], {name: value[rows] for name, value in batch.params.items()}
            sites = laplace_sites(likelihood, y, f, **params)
            pull = pull + jacobian.vjp(batch.x[rows], sites.alpha(f)).double()
            fit += float(log_prob(likelihood, y, f, **params).sum())
            return sites

        total.add(batch.x, sites_at)
    terms = total.total()
    data = terms.site if centre == "map" else dataclasses.replace(terms.site, lam=torch.zeros_like(terms.pull))
    q = with_site(structured or Posterior(basis.with_zero_mean(centre == "map")), centred(basis, data, centre))
    recentring = Recentring(terms.site.lam, terms.offset)
    held = Held.of(torch.cat(seen), basis.size)
    return NetworkPosterior(q, likelihood, centre, int(held.counts.sum()), fit, pull, held, recentring)


def _counted(source: Source, progress: bool | None) -> Iterator[Batch]:
    disable = None if progress is None else not progress
    with tqdm(desc="data", unit="row", leave=False, delay=1.0, disable=disable) as bar:
        for batch in source:
            yield batch
            bar.update(len(batch.x))
