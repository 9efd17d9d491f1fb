"""A few of many data that stand for all: core sets and memories of a data set that is labelled already."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from dualgp.active.batch import Selection
from dualgp.active.field import Field, as_targets, check_candidates, is_coupled
from dualgp.duals import is_gaussian
from dualgp.errors import InputError, check_count
from dualgp.influence import leverage, sensitivity, validation_influence
from dualgp.influence.blocks import as_matrices, bare, check_sites
from dualgp.information import expected_beta
from dualgp.posterior import Posterior
from dualgp.sites import Sites

By = Literal["leverage", "sensitivity", "variance", "influence"]


@torch.no_grad()
def core_set(
    q: Any,
    x: Tensor,
    sites: Sites,
    count: int,
    by: By = "leverage",
    *,
    validation: tuple[Tensor, Tensor] | None = None,
    shortlist: int = 2000,
) -> Selection:
    """Return the data that matter most to a posterior, best first, with their scores.

    | by | score |
    |---|---|
    | "leverage" | tr B_iV_i: how much of its own prediction a datum decides |
    | "sensitivity" | Σ_c ∣B_i Δf_i∣: how far the prediction moves without it |
    | "variance" | ½ log∣I + B_i V_i∣ given the data chosen before it and no others: the information that each adds |
    | "influence" | by how much its weight lowers the loss on validation data |

    The first two rank data by themselves: those that a model of all data leans on, near a boundary above all, and like
    data that stand for each other all rank low. "variance" takes one of each kind, greedily the set of greatest
    ½ log∣I + V B∣, for a model of those alone: its sites will be found anew, so that for a `DualGP` B is what the prior
    expects (β of a label is small where all data made it certain). A network's sites are where they are.

    Args:
        q: a fitted `DualGP`, a `NetworkPosterior` or a `Posterior`, which holds the sites.
        x: inputs of the n data.
        sites: their sites.
        count: how many, k.
        by: the score.
        validation: (x, y), for "influence".
        shortlist: for "variance", how many of greatest leverage under the prior are considered together, at n² numbers.

    Raises:
        InputError: if more are asked for than there are, an unknown score, shapes that do not fit, or no validation
            data for "influence".

    Source: Nickl et al. 2023 (sensitivity); Chang et al. 2023 (leverage); Burt et al. 2020 (greedy variance).

    Example:
        >>> import gpytorch
        >>> from dualgp import DualGP
        >>> x = torch.cat([torch.zeros(20, 1), torch.ones(1, 1)])
        >>> gp = DualGP(gpytorch.kernels.RBFKernel(), gpytorch.likelihoods.GaussianLikelihood(), num_inducing=2)
        >>> result = gp.fit(x, x.squeeze(-1), learn_hyperparameters=False)
        >>> core_set(gp, x, gp.sites, 1).indices  # the one that has no like
        tensor([20])
    """
    check_candidates(x, "Data")
    check_sites(x, sites)
    check_count("count", count, 1)
    if count > len(x):
        raise InputError(f"Asked for {count} of {len(x)} data.")
    if by not in get_args(By):
        raise InputError(f"by must be one of {get_args(By)}, got {by!r}.")
    if by == "variance":
        return _greedy(q, x, sites, count, shortlist)
    if by == "influence":
        if not isinstance(validation, tuple | list) or len(validation) != 2:
            raise InputError('"influence" is on the loss of validation data: give validation=(x, y).')
        check_candidates(validation[0], "Validation inputs")
        scores = validation_influence(q, x, sites, *validation)
    else:
        scores = leverage(q, x, sites) if by == "leverage" else sensitivity(q, x, sites).score
    order = scores.argsort(descending=True, stable=True)[:count]
    return Selection(order, scores[order])


def _greedy(q: Any, x: Tensor, sites: Sites, count: int, shortlist: int) -> Selection:
    """The data whose sites say most together, under the prior of q's basis."""
    basis = bare(q).basis
    if not isinstance(bare(q), Posterior):
        raise InputError('"variance" needs a posterior in function space or dense weights, for its joint prior.')
    prior: Any = Posterior(basis)
    lever = leverage(prior, x, sites)
    rows = lever.argsort(descending=True, stable=True)[: max(count, shortlist)]
    mean, cov = prior.joint(x[rows])
    B = as_matrices(sites[rows])[1].double()  # [n, C, C]
    C, n = B.shape[-1], len(rows)
    likelihood = getattr(q, "likelihood", None)
    if is_coupled(q):
        found = Field(likelihood, mean.reshape(n, C), cov.unsqueeze(0), B.unsqueeze(1))
    else:
        mean, cov, beta = mean.reshape(C, n).mT, cov.reshape(C, n, n), B.diagonal(dim1=-2, dim2=-1)
        if likelihood is not None and not is_gaussian(likelihood):
            var = cov.diagonal(dim1=-2, dim2=-1).mT
            beta = expected_beta(likelihood, *as_targets(mean, var, likelihood)).reshape(n, C)
        found = Field(likelihood, mean, cov, beta[..., None, None])
    chosen: list[int] = []
    scores: list[Tensor] = []
    for _ in range(count):
        gain = found.gain()
        gain[chosen] = -torch.inf
        best = int(gain.argmax())
        chosen.append(best)
        scores.append(gain[best])
        found = found.given(best)
    return Selection(rows[chosen], torch.stack(scores))
