"""PAC-Bayes bounds on the risk of a posterior, and certificates that cannot be formed with a prior that saw the data.

With r the empirical Gibbs risk of a loss in [0, 1] on n data, K = KL(q ‖ p), and probability 1 − δ over those data:

| bound | on the risk R |
|---|---|
| McAllester–Maurer | R ≤ r + √((K + log(2√n/δ)) / 2n) |
| Seeger | kl(r ‖ R) ≤ (K + log(2√n/δ)) / n |
| Catoni, β > 0 | R ≤ (1 − exp(−βr − (K + log 1/δ)/n)) / (1 − e^{−β}) |
| Alquier, λ > 0 | R ≤ r + (K + log 1/δ)/λ + λ/8n |

The first two hold for all posteriors at once. β and λ must not depend on the data: of a grid the best may be taken, at
the price of δ split among its values (log |grid| beside K).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from dualgp.checks import check_number, check_tensor
from dualgp.errors import InputError
from dualgp.fingerprints import fingerprints
from dualgp.linalg import first_tensor
from dualgp.weights import Number, WeightPosterior

BoundName: TypeAlias = Literal["mcallester", "seeger", "catoni", "alquier"]
Value: TypeAlias = Tensor | Number


def mcallester(risk: Value, kl: Value, n: int, *, delta: float = 0.05) -> Tensor:
    """Return the McAllester–Maurer bound, r + √((K + log(2√n/δ)) / 2n), in float64.

    A certificate only under the conditions that `certify` checks.

    Raises:
        InputError: if the risk is not in [0, 1], or K, n or δ is out of range.

    Source: McAllester 1999; Maurer 2004.

    Example:
        >>> mcallester(0.1, 5.0, 1000)
        tensor(0.1779, dtype=torch.float64)
    """
    r, K = _checked(risk, kl, n, delta)
    return r + ((K + math.log(2.0 * math.sqrt(n) / delta)) / (2.0 * n)).sqrt()


def seeger(risk: Value, kl: Value, n: int, *, delta: float = 0.05) -> Tensor:
    """Return the Seeger bound: the largest R with kl(r ‖ R) ≤ (K + log(2√n/δ)) / n, in float64.

    Raises:
        InputError: as `mcallester`.

    Source: Seeger 2002; Maurer 2004 for the constant.

    Example:
        >>> seeger(0.1, 5.0, 1000)
        tensor(0.1531, dtype=torch.float64)
    """
    r, K = _checked(risk, kl, n, delta)
    return kl_inverse(r, (K + math.log(2.0 * math.sqrt(n) / delta)) / n)


def catoni(risk: Value, kl: Value, n: int, *, delta: float = 0.05, beta: Value | None = None) -> Tensor:
    """Return the Catoni bound at β, or the best of a grid of β that has paid δ/|grid| for each, in float64.

    Args:
        risk: r, of a loss in [0, 1].
        kl: K.
        n: number of data.
        delta: probability that the bound fails.
        beta: β > 0, a number or a grid [G], chosen before the data were seen; 32 values from 1/20 to 20 if None.

    Raises:
        InputError: as `mcallester`, or unless β > 0.

    Source: Catoni 2007, theorem 1.2.1.

    Example:
        >>> catoni(0.1, 5.0, 1000, beta=1.0)
        tensor(0.1619, dtype=torch.float64)
    """
    r, K = _checked(risk, kl, n, delta)
    b, price = _grid("beta", _logspace(0.05, 20.0) if beta is None else beta, r)
    r, K = r.unsqueeze(-1), K.unsqueeze(-1)
    log = -b * r - (K + math.log(1.0 / delta) + price) / n
    return (torch.expm1(log) / torch.expm1(-b)).amin(-1)


def alquier(risk: Value, kl: Value, n: int, *, delta: float = 0.05, lam: Value | None = None) -> Tensor:
    """Return the Alquier bound at λ, or the best of a grid of λ that has paid δ/|grid| for each, in float64.

    Args:
        risk: r, of a loss in [0, 1].
        kl: K.
        n: number of data.
        delta: probability that the bound fails.
        lam: λ > 0, a number or a grid [G] chosen before the data were seen; 32 values from √n to 8n if None.

    Raises:
        InputError: as `mcallester`, or unless λ > 0.

    Source: Alquier, Ridgway & Chopin 2016, theorem 4.1, with Hoeffding's λ²/8n.

    Example:
        >>> alquier(0.1, 5.0, 1000, lam=1000.0)
        tensor(0.2330, dtype=torch.float64)
    """
    r, K = _checked(risk, kl, n, delta)
    t, price = _grid("lam", _logspace(math.sqrt(n), 8.0 * n) if lam is None else lam, r)
    r, K = r.unsqueeze(-1), K.unsqueeze(-1)
    return (r + (K + math.log(1.0 / delta) + price) / t + t / (8.0 * n)).amin(-1)


def kl_inverse(risk: Value, c: Value) -> Tensor:
    """Return the largest R in [r, 1] with kl(r ‖ R) = r log(r/R) + (1 − r) log((1 − r)/(1 − R)) ≤ c, by bisection.

    Example:
        >>> kl_inverse(0.0, 0.1)  # 1 − e^{−c}
        tensor(0.0952, dtype=torch.float64)
    """
    r, c = _float64(risk, c)
    low, high = r.clone(), torch.ones_like(r)
    for _ in range(60):  # halves to less than a rounding error
        middle = 0.5 * (low + high)
        inside = _bernoulli_kl(r, middle) <= c
        low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
    return high


def _bernoulli_kl(r: Tensor, R: Tensor) -> Tensor:
    return torch.xlogy(r, r) - torch.xlogy(r, R) + torch.xlogy(1.0 - r, 1.0 - r) - torch.xlogy(1.0 - r, 1.0 - R)


BOUNDS: dict[str, Callable[..., Tensor]] = {f.__name__: f for f in (mcallester, seeger, catoni, alquier)}


def gibbs_risk(losses: Float[Tensor, "S n"]) -> Tensor:
    """Return the Gibbs risk: the mean loss of networks drawn one for each prediction, E_q of the mean of ℓ(θ, zᵢ).

    Args:
        losses: one row for each draw of the weights, one column for each datum.

    Raises:
        InputError: if there are none.

    Example:
        >>> gibbs_risk(torch.tensor([[0.0, 1.0], [1.0, 1.0]]))
        tensor(0.7500, dtype=torch.float64)
    """
    check_tensor("losses", losses)
    if not bool(losses.isfinite().all()):
        raise InputError("losses must be finite, but hold NaN or infinity.")
    if not losses.numel():
        raise InputError(f"Expected losses of one draw and one datum at least, got {tuple(losses.shape)}.")
    return losses.double().mean()


def bma_risk(log_prob: Float[Tensor, "S n C"], y: Tensor) -> Tensor:
    """Return the 0–1 risk of the Bayesian model average: how often the most probable class of the mean is not y.

    No PAC-Bayes bound here is on this risk; twice the bound on the Gibbs risk is.

    Args:
        log_prob: log-probabilities of the classes at each draw of the weights.
        y: labels [n].

    Raises:
        InputError: if they are not of as many data, or a value is NaN.

    Example:
        >>> p = torch.tensor([[[0.9, 0.1]], [[0.4, 0.6]]])
        >>> bma_risk(p.log(), torch.tensor([0]))
        tensor(0., dtype=torch.float64)
    """
    for name, value in (("log_prob", log_prob), ("y", y)):
        check_tensor(name, value)
    if not y.ndim or not log_prob.numel():
        raise InputError(f"Expected log_prob [S, n, C] and y [n], got {tuple(log_prob.shape)} and {tuple(y.shape)}.")
    if log_prob.ndim != 3 or len(y) != log_prob.shape[1] or bool(log_prob.isnan().any()):
        raise InputError(f"Expected log-probabilities [S, {len(y)}, C], none NaN, got {tuple(log_prob.shape)}.")
    mean = log_prob.double().logsumexp(0)
    return (mean.argmax(-1) != y).double().mean()


@dataclass(frozen=True, eq=False)
class PriorWithData:
    """A prior and the fingerprints of all data that have had a part in it, so that a bound can be refused.

    Make it with `without_data` or `from_data`. Fingerprints prove that no row (x, y) was used; that a choice was not
    made after a look at the data otherwise is for the user to answer for; so is that the bound's rows are independent
    draws, and none oversampled or augmented from another.

    Attributes:
        posterior: the prior, as a Gaussian over weights.
        seen: fingerprints of its data, [u], ascending.
    """

    posterior: WeightPosterior
    seen: Tensor

    def __post_init__(self) -> None:
        if self.posterior.site is not None:
            raise InputError(
                "A prior is a Gaussian without a site: PriorWithData.from_data(posterior, x, y) makes one."
            )

    @classmethod
    def without_data(cls, prior: WeightPosterior) -> PriorWithData:
        """Return a prior that no datum had a part in.

        Raises:
            InputError: if it has a site: sites come of data.
        """
        if prior.site is not None:
            raise InputError(
                "A prior without data has no site, and this one has: name its data with PriorWithData.from_data."
            )
        return cls(prior, torch.zeros(0, dtype=torch.int64, device="cpu"))

    @classmethod
    def from_data(cls, posterior: WeightPosterior, x: Tensor, y: Tensor) -> PriorWithData:
        """Return a posterior of data (x, y) as a prior for others, with every row's fingerprint.

        Raises:
            InputError: if x and y are not of the same length.
        """
        return cls(posterior.as_prior(), _rows(x, y).unique())


@dataclass(frozen=True)
class Certificate:
    """A bound on the Gibbs risk that holds with probability 1 − δ over the data it was formed on.

    Attributes:
        bound: what the risk is at most.
        empirical_risk: r, with the price of its Monte Carlo error if it was sampled.
        kl: KL(q ‖ prior) in nats.
        num_data: n.
        delta: the whole probability of failure.
        name: which bound.
    """

    bound: float
    empirical_risk: float
    kl: float
    num_data: int
    delta: float
    name: str


def certify(
    q: WeightPosterior,
    prior: PriorWithData,
    x: Tensor,
    y: Tensor,
    losses: Float[Tensor, "S n"],
    *,
    bound: BoundName = "seeger",
    delta: float = 0.05,
    exact: bool = False,
    parameter: Value | None = None,
) -> Certificate:
    """Return a bound on the Gibbs risk of q, if the prior has provably not seen the data (x, y).

    The mean over S draws is not the expectation: δ/5 of δ pays for that, r ≤ kl⁻¹(r̂, log(5/δ)/S).

    Args:
        q: the posterior.
        prior: with the fingerprints of its data.
        x: inputs of the bound's data, [n, ...].
        y: targets, [n, ...].
        losses: ℓ(θ_s, zᵢ) in [0, 1] at S draws of q: 0–1 losses, or others that are bounded.
        bound: which.
        delta: the whole probability of failure.
        exact: the rows of losses are exact expectations under q, and no price is paid.
        parameter: β or λ (or a grid of them) of the Catoni and Alquier bounds, chosen before the data were seen.

    Raises:
        InputError: if a datum has had a part in the prior, a loss is outside [0, 1], shapes do not fit, or there is no
            such bound or δ.
        BasisMismatchError: if q and the prior are over other weights.

    Source: Dziugaite & Roy 2017, § 3 (the price of sampling, after Langford & Caruana 2001); Ambroladze,
    Parrado-Hernández & Shawe-Taylor 2007 (priors from a part of the data).

    Example:
        >>> from dualgp import WeightLayout
        >>> p = WeightPosterior(WeightLayout({"w": torch.Size([1])}), prior_precision=1.0)
        >>> x, y = torch.randn(200, 1), torch.zeros(200)
        >>> found = certify(p, PriorWithData.without_data(p), x, y, torch.zeros(1, 200), exact=True)
        >>> round(found.bound, 4)  # no loss and no KL: 1 − (δ/2√n)^{1/n}
        0.0312
    """
    if bound not in BOUNDS or not isinstance(prior, PriorWithData):
        raise InputError(
            f"Expected a bound of {sorted(BOUNDS)} and a PriorWithData, which knows its data; got {bound!r} and a "
            f"{type(prior).__name__}."
        )
    if not 0 < delta < 1:
        raise InputError(f"δ is a probability between 0 and 1, got {delta}.")
    rows = _rows(x, y)
    if (
        losses.ndim != 2
        or not len(losses)
        or losses.shape[-1] != len(rows)
        or not bool(((losses >= 0) & (losses <= 1)).all())
    ):
        raise InputError(
            f"Expected losses in [0, 1] of {len(rows)} data at S draws, [S, {len(rows)}]; got {_described(losses)}. A "
            "bound needs a bounded loss: clip it, or take 0–1."
        )
    shared = torch.isin(rows, prior.seen.to(rows.device))
    if bool(shared.any()):
        raise InputError(
            f"{int(shared.sum())} of the {len(rows)} data of the bound have had a part in the prior (the first is row "
            f"{int(shared.nonzero()[0])}), so that it bounds nothing. Split the data: one part for the prior, another "
            "for the bound."
        )
    if parameter is not None and bound not in ("catoni", "alquier"):
        raise InputError(f"The {bound} bound has no parameter; leave it out.")
    r, kl, left = gibbs_risk(losses), q.kl(prior.posterior), delta
    if not exact:
        left = 0.8 * delta
        r = kl_inverse(r, math.log(5.0 / delta) / len(losses))
    named = {} if parameter is None else {"beta" if bound == "catoni" else "lam": parameter}
    value = BOUNDS[bound](r, kl, len(rows), delta=left, **named)
    return Certificate(float(value.clamp_max(1.0)), float(r), float(kl), len(rows), delta, bound)


def _described(losses: Tensor) -> str:
    inside = f" between {float(losses.min()):.3g} and {float(losses.max()):.3g}" if losses.numel() else ""
    return f"{tuple(losses.shape)}{inside}"


def _rows(x: Tensor, y: Tensor) -> Tensor:
    if len(x) != len(y) or len(x) == 0:
        raise InputError(f"Expected inputs and targets of as many data, and at least one; got {len(x)} and {len(y)}.")
    return fingerprints(x, y)


def _checked(risk: Value, kl: Value, n: int, delta: float) -> tuple[Tensor, Tensor]:
    check_number("n", n)
    check_number("delta", delta)
    for name, value in (("risk", risk), ("kl", kl)):
        if isinstance(value, Tensor):
            check_tensor(name, value)
        elif not isinstance(value, float | int):
            raise InputError(f"{name} must be a number or a tensor, got {type(value).__name__}.")
    r, K = _float64(risk, kl)
    if not (bool(((r >= 0) & (r <= 1)).all()) and bool((K >= 0).all()) and n >= 1 and 0 < delta < 1):
        raise InputError(
            f"Expected a risk in [0, 1], KL ≥ 0, n ≥ 1 and 0 < δ < 1, got {risk}, {kl}, {n} and {delta}. The loss must "
            "be bounded: scale or clip it to [0, 1]."
        )
    return r, K


def _float64(*values: Value) -> tuple[Tensor, ...]:
    """Numbers and tensors, broadcast, on the device of the first tensor."""
    device = first_tensor(*values).device
    return torch.broadcast_tensors(*(torch.as_tensor(v, dtype=torch.float64, device=device) for v in values))


def _logspace(low: float, high: float) -> Tensor:
    return torch.logspace(math.log10(low), math.log10(high), 32, dtype=torch.float64, device="cpu")


def _grid(name: str, values: Value, like: Tensor) -> tuple[Tensor, float]:
    """The values [G], and log G: each is a bound of its own that fails with probability δ/G."""
    grid = torch.as_tensor(values, dtype=torch.float64, device=like.device).reshape(-1)
    if not len(grid) or not bool(((grid > 0) & grid.isfinite()).all()):
        raise InputError(f"{name} must be positive and finite, a number or a grid [G]; got {values}.")
    return grid, math.log(len(grid))
