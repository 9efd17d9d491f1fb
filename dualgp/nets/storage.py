"""Saving and loading a `NetworkPosterior`: no data but Z, and nothing is executed."""

from __future__ import annotations

import copy
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from gpytorch.likelihoods import Likelihood
from torch import Tensor, nn

from dualgp import files
from dualgp.errors import InputError, UnsupportedError
from dualgp.fingerprints import Held
from dualgp.jacobian import JacobianBasis
from dualgp.kernels import NetworkJacobian, describe
from dualgp.nets.centre import Recentring
from dualgp.nets.data import check_outputs
from dualgp.nets.factors import Curvature, Dense, Diagonal, Kronecker
from dualgp.nets.layerwise import Structure, StructuredSite
from dualgp.nets.structured import StructuredPosterior
from dualgp.nets.terms import WeightPosterior
from dualgp.posterior import Posterior
from dualgp.sites import Site

if TYPE_CHECKING:
    from dualgp.nets.posterior import NetworkPosterior

KIND, VERSION = "NetworkPosterior", 1
_NUMBER = (int, float)
SCHEMA: files.Schema = {
    "likelihood": (str,),
    "params": (list,),
    "budget": (int,),
    "centre": (str,),
    "num_data": (int,),
    "log_likelihood": (*_NUMBER, files.NONE),
    "offset": _NUMBER,
    "has_forgotten": (bool,),
    "coupled": (bool,),
    "rank_tol": _NUMBER,
    "structure": (list, files.NONE),
}


def save(q: NetworkPosterior, path: str | PathLike[str]) -> None:
    """Write the posterior to `path`, atomically."""
    basis, site = q.basis, q.posterior.site
    span, tol = basis.span_state()
    config: dict[str, Any] = {
        "likelihood": describe(q.likelihood),
        "params": basis.jacobian.names,
        "budget": basis.jacobian.budget,
        "centre": q.centre,
        "num_data": q.num_data,
        "log_likelihood": q.log_likelihood,
        "offset": q.recentring.offset,
        "has_forgotten": q.has_forgotten,
        "coupled": basis.coupled,
        "rank_tol": tol,
        "structure": None,
    }
    tensors = {f"span.{name}": value for name, value in span.items()}
    tensors |= {f"network.{name}": value for name, value in basis.jacobian.state_dict().items()}
    tensors |= {f"likelihood.{name}": value for name, value in q.likelihood.state_dict().items()}
    tensors["prior_precision"] = torch.as_tensor(q.prior_precision, dtype=torch.float64, device="cpu")
    tensors |= {"pull": q.pull, "keys": q.held.keys, "sizes": q.held.sizes, "counts": q.held.counts}
    tensors |= {"lam": site.lam, "recentring": q.recentring.lam}
    if isinstance(q.posterior, StructuredPosterior):
        kept = q.posterior.structure
        blocks = [[key, _describe(block)] for key, block in q.posterior.site.blocks.items()]
        config["structure"] = [kept.kind, kept.separate_bias, kept.dense_limit, blocks]
        for i, block in enumerate(q.posterior.site.blocks.values()):
            tensors |= {f"block.{i}.{j}": part for j, part in enumerate(_parts(block))}
    else:
        tensors["B"] = q.posterior.site.B
    files.write(path, KIND, VERSION, config, tensors)


def load(
    cls: type[NetworkPosterior],
    path: str | PathLike[str],
    network: nn.Module,
    likelihood: Likelihood,
    example: Tensor | None,
) -> NetworkPosterior:
    """Read a posterior written by `save` into copies of the modules given."""
    config, tensors = files.read(path, KIND, VERSION, SCHEMA)
    if config["likelihood"] != describe(likelihood):
        raise InputError(f"{path} was saved with {config['likelihood']}, but {describe(likelihood)} was given.")
    with files.undamaged(path):
        return _build(cls, config, tensors, network, likelihood, example)


def _build(
    cls: type[NetworkPosterior],
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    network: nn.Module,
    likelihood: Likelihood,
    example: Tensor | None,
) -> NetworkPosterior:
    _check_tensors(tensors)
    likelihood = copy.deepcopy(likelihood).requires_grad_(False)
    likelihood.load_state_dict(_under(tensors, "likelihood."))
    span = _under(tensors, "span.")
    jacobian = _jacobian(config, _under(tensors, "network."), network, span.get("Z") if example is None else example)
    check_outputs(likelihood, jacobian.num_outputs)
    tau = tensors["prior_precision"]
    basis = JacobianBasis.from_span_state(
        jacobian, tau if tau.ndim else float(tau), span, float(config["rank_tol"]), coupled=bool(config["coupled"])
    )
    device = jacobian.device
    lam, held = tensors["lam"].to(device), Held(tensors["keys"], tensors["sizes"], tensors["counts"])
    recentring = Recentring(tensors["recentring"].to(device), float(config["offset"]))
    if recentring.lam.shape != lam.shape:
        raise InputError("The file's tensors have shapes that do not fit.")
    posterior: WeightPosterior
    if config["structure"] is None:
        basis = basis.with_zero_mean(config["centre"] == "map")
        posterior = Posterior(basis, Site(lam, tensors["B"].to(device)))
    else:
        kind, separate_bias, dense_limit, blocks = config["structure"]
        made = {tuple(key): _curvature(i, about, tensors, device) for i, (key, about) in enumerate(blocks)}
        structure = Structure(kind, bool(separate_bias), int(dense_limit))
        posterior = StructuredPosterior(basis, StructuredSite(lam, made), structure)
    if tensors["pull"].shape != (jacobian.num_params,) or not held.keys.shape == held.sizes.shape == held.counts.shape:
        raise InputError("The file's tensors have shapes that do not fit.")
    if config["centre"] not in ("network", "map"):
        raise InputError(f"The file's centre is {config['centre']!r}.")
    fit = config["log_likelihood"]
    return cls(
        posterior,
        likelihood.to(device),
        config["centre"],
        int(config["num_data"]),
        None if fit is None else float(fit),
        tensors["pull"].to(device),
        held,
        recentring,
        bool(config["has_forgotten"]),
    )


def _check_tensors(tensors: dict[str, Tensor]) -> None:
    """Raise InputError unless what is ours is finite and of the dtypes that are written."""
    network = {t.dtype for name, t in tensors.items() if name.startswith("network.") and t.is_floating_point()}
    for name, value in tensors.items():
        if name.startswith(("likelihood.", "network.")):  # constraints and masks may be infinite
            continue
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise InputError(f"The file's {name} holds NaN or infinity.")
        may = {torch.float32, torch.float64}
        if name in ("keys", "sizes", "counts"):
            may = {torch.int64}
        elif name in ("span.W", "span.Phi"):
            may = network | {torch.float64}
        elif name == "span.Z":  # inputs may be tokens
            continue
        if value.dtype not in may:
            raise InputError(f"The file's {name} is {value.dtype}.")


def _jacobian(
    config: dict[str, Any], state: dict[str, Tensor], network: nn.Module, example: Tensor | None
) -> NetworkJacobian:
    if example is None:
        raise InputError("The file holds no inputs: give example=, two rows of inputs of any values.")
    if not isinstance(network, nn.Module):
        raise UnsupportedError(f"Expected the torch.nn.Module that was saved, got {type(network).__name__}.")
    network = copy.deepcopy(getattr(network, "_orig_mod", network))
    for name, value in network.state_dict().items():
        if name in state and value.is_floating_point() != state[name].is_floating_point():
            raise InputError(f"The file's {name} is {state[name].dtype}, the network's {value.dtype}.")
    dtype = next(t.dtype for t in state.values() if t.is_floating_point())
    network.to(dtype).load_state_dict(state)
    names = set(config["params"])
    rows = example if len(example) > 1 else example.repeat(2, *[1] * (example.ndim - 1))
    jacobian = NetworkJacobian(network, rows, params=lambda name: name in names, budget=int(config["budget"]))
    if set(jacobian.names) != names:
        raise InputError(f"The file is of the parameters {sorted(names)}, the network has {list(jacobian.names)}.")
    return jacobian


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _describe(block: Curvature) -> tuple[str, Any]:
    """The kind of a block, and what it has besides tensors."""
    if isinstance(block, Kronecker):
        return "Kronecker", [block.bias, len(block.terms)]
    assert isinstance(block, Dense | Diagonal)
    return type(block).__name__, list(block.sizes)


def _parts(block: Curvature) -> list[Tensor]:
    if isinstance(block, Kronecker):
        return [factor for term in block.terms for factor in term]
    return [block.B if isinstance(block, Dense) else block.d]  # type: ignore[attr-defined]


def _curvature(i: int, about: Any, tensors: dict[str, Tensor], device: torch.device) -> Curvature:
    kind, settings = about
    if kind == "Kronecker":
        bias, count = settings
        factors = [tensors[f"block.{i}.{j}"].to(device) for j in range(2 * count)]
        return Kronecker(tuple(zip(factors[::2], factors[1::2], strict=True)), bool(bias))
    kinds: dict[str, Any] = {"Dense": Dense, "Diagonal": Diagonal}
    return kinds[kind](tensors[f"block.{i}.0"].to(device), tuple(settings))
