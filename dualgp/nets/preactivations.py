"""Activations under which the pre-activations of a network are Gaussian at any width, and a test of whether they are.

With W from a symmetric Weibull law of shape θ > 2, P(|W| > t) = exp(−t^θ), and X ~ N(0, 1), the activation φ_θ is the
one for which W φ_θ(X) ~ N(0, 1): no width needs to go to infinity for it. By Mellin's transform, for Y = φ_θ(X),

    E|Y|^{it} = E|N|^{it} / E|W|^{it} = 2^{it/2} Γ((1 + it)/2) / (√π Γ(1 + it/θ))

is the characteristic function of log|Y|, and its Fourier inversion the law of |Y|. It decays as exp(−π|t|(¼ − 1/2θ)):
that is integrable for θ > 2, where such an activation exists, and not otherwise.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.interpolate import CubicHermiteSpline
from scipy.special import digamma, erfinv, log_ndtr, loggamma, ndtri_exp, polygamma
from torch import Tensor, nn

from dualgp.draws import source, uniform
from dualgp.errors import InputError, check_count
from dualgp.threads import ONE_AT_A_TIME

Kind: TypeAlias = Literal["odd", "positive"]

_KNOTS = 2048
_TAIL = 9.0  # beyond so many standard deviations of X the activation goes on by its last slope in log–log
KS_CRITICAL = 1.358  # √n D of a true null hypothesis exceeds it in 5 % of samples


class GaussianPreactivation(nn.Module):
    """The activation φ_θ for which W φ_θ(X) ~ N(0, 1), with W of `symmetric_weibull_` and X ~ N(0, 1).

    odd: φ(x) = sgn(x) F⁻¹(2Φ(|x|) − 1); positive: φ(x) = F⁻¹(Φ(x)), with F the distribution function of |Y|.

    For a layer z = n^{−1/2} Σⱼ Wⱼ φ(xⱼ) without bias. Differentiable once by autograd; float32 and float64, on any
    device. For θ → ∞ the odd one tends to the identity, for θ → 2 to √2 sin(π(Φ(x) − ½)).

    Args:
        theta: shape of the weights' law, > 2; between 2.02 and 50 here.
        kind: "odd", or "positive" as ReLU is.

    Raises:
        InputError: if θ is outside that range, or there is no such kind.

    Source: Wolinski & Arbel 2025, § 3. Deviation: the law of |Y| is inverted in closed form and tabulated, where the
    paper's code fits a density and then a formula to it by gradient descent, with errors up to 1 % (odd) and .8
    (positive).

    Example:
        >>> GaussianPreactivation(3.0)(torch.tensor([-1.0, 0.0, 1.0]))
        tensor([-1.1821,  0.0000,  1.1821])
    """

    table: Tensor

    def __init__(self, theta: float, kind: Kind = "odd") -> None:
        super().__init__()
        _check_theta(theta)
        if kind not in get_args(Kind):
            raise InputError(f'kind must be "odd" or "positive", got {kind!r}.')
        self.theta, self.kind = float(theta), kind
        knots = torch.from_numpy(_table(self.theta, kind))
        self.register_buffer("table", knots, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return φ_θ(x), elementwise."""
        return _Activation.apply(x, self.table, self.kind)  # type: ignore[no-any-return]

    def _apply(self, fn: Any, recurse: bool = True) -> GaussianPreactivation:
        table = self.table  # follows to a device; its dtype stays float64, whatever that of the network
        super()._apply(fn, recurse)
        self.table = table.to(self.table.device)
        return self

    def extra_repr(self) -> str:
        """Return θ and the kind."""
        return f"theta={self.theta}, kind={self.kind!r}"


class _Activation(torch.autograd.Function):
    """Cubic Hermite interpolation between knots equally spaced in x, with its exact derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor, kind: str) -> Tensor:
        odd = kind == "odd"
        value, slope = _interpolate(x.double().abs() if odd else x.double(), table, odd)
        ctx.save_for_backward(slope.to(x.dtype))
        return (value * x.sign() if odd else value).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return grad * slope, None, None


def _interpolate(x: Tensor, table: Tensor, odd: bool) -> tuple[Tensor, Tensor]:
    """φ and φ′ at x; beyond the knots φ goes on in a straight line. Odd: φ(x)/x is tabulated, smooth through 0."""
    low = 0.0 if odd else -_TAIL
    step = (_TAIL - low) / (_KNOTS - 1)
    inside = x.clamp(low, _TAIL)
    at = ((inside - low) / step).floor().clamp(0, _KNOTS - 2).long()
    t = (inside - low) / step - at
    (a, b), (da, db) = (table[0][at], table[0][at + 1]), (table[1][at] * step, table[1][at + 1] * step)
    # H(t) = a + t·da + t²(3(b − a) − 2da − db) + t³(2(a − b) + da + db)
    c2, c3 = 3 * (b - a) - 2 * da - db, 2 * (a - b) + da + db
    value = a + t * (da + t * (c2 + t * c3))
    slope = (da + t * (2 * c2 + 3 * t * c3)) / step
    if odd:
        value, slope = inside * value, value + inside * slope
    return (value + slope * (x - inside)).clamp_min(0.0), slope


def symmetric_weibull_(tensor: Tensor, theta: float, *, generator: torch.Generator | None = None) -> Tensor:
    """Fill a tensor, in place, with draws of the symmetric Weibull law of shape θ and scale 1, and return it.

    W = ±(−log U)^{1/θ}, of distribution function ½ + ½ sgn(t)(1 − e^{−|t|^θ}). The layer divides by √n: either
    z = n^{−1/2} Σ Wφ, or these weights times n^{−1/2}.

    Raises:
        InputError: if θ is not positive.

    Source: Wolinski & Arbel 2025, eq. 11.

    Example:
        >>> w = symmetric_weibull_(torch.empty(1000), 3.0, generator=torch.Generator().manual_seed(0))
        >>> bool((w > 0).any() and (w < 0).any())
        True
    """
    if not (theta > 0 and math.isfinite(theta)):
        raise InputError(f"theta must be positive and finite, got {theta}.")
    with torch.no_grad():
        u = uniform(tensor.shape, tensor.device, generator)
        sign = torch.where(u < 0.5, -1.0, 1.0)
        u = torch.where(u < 0.5, 2 * u, 2 * u - 1)  # uniform again, and independent of the sign
        return tensor.copy_(sign * (-torch.log1p(-u)).pow(1.0 / theta))


class KSTest(NamedTuple):
    """A Kolmogorov–Smirnov test against N(0, 1)."""

    statistic: float  # D = sup |F_n − Φ|
    critical: float  # 1.358/√n: a true null hypothesis exceeds it in one case of twenty
    num_samples: int

    @property
    def gaussian(self) -> bool:
        """Whether the hypothesis of a standard normal law stands, at 5 %."""
        return self.statistic < self.critical


def ks_normal(values: Tensor) -> KSTest:
    """Return the Kolmogorov–Smirnov test of independent values against N(0, 1).

    Raises:
        InputError: if there are none, or one is not finite.

    Example:
        >>> ks_normal(torch.linspace(-1, 1, 1000)).gaussian  # uniform
        False
    """
    z = values.detach().double().flatten()
    n = len(z)
    if n == 0 or not bool(z.isfinite().all()):
        raise InputError(
            f"Expected finite values, and at least one; got {n}, {int((~z.isfinite()).sum())} of them not."
        )
    cdf = torch.special.ndtr(z.sort().values)
    step = torch.arange(n, dtype=torch.float64, device=z.device) / n
    statistic = torch.maximum((cdf - step).max(), (step + 1.0 / n - cdf).max())
    return KSTest(float(statistic), KS_CRITICAL / math.sqrt(n), n)


def preactivation_ks(
    activation: nn.Module,
    theta: float | None,
    widths: tuple[int, ...],
    *,
    num_samples: int = 200_000,
    generator: torch.Generator | None = None,
) -> KSTest:
    """Return the test of the last pre-activation of networks drawn anew for each sample, at one fixed input.

    z₁ ~ N(0, I) of width n₀; zₗ₊₁ = nₗ^{−1/2} W φ(zₗ), to one value at the end. Each sample has weights of its own, so
    that the samples are independent.

    Args:
        activation: φ.
        theta: shape of the weights' symmetric Weibull law; None for N(0, 1) weights.
        widths: n₀, n₁, …: of every layer that φ is applied to.
        num_samples: networks.
        generator: source of randomness; torch's default one otherwise.

    Raises:
        InputError: if a width or the number of samples is no whole number ≥ 1.

    Source: Wolinski & Arbel 2025, § 4.1.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> preactivation_ks(torch.nn.ReLU(), None, (1,), num_samples=2000, generator=g).gaussian
        False
    """
    check_count("num_samples", num_samples, 1)
    for width in widths or (0,):
        check_count("A width", width, 1)
    ends, device = [], source(torch.device("cpu"), generator)
    for count in _pieces(num_samples, max(a * b for a, b in zip(widths, (*widths[1:], 1), strict=True))):
        z = torch.randn(count, widths[0], dtype=torch.float64, device=device, generator=generator)
        for n, m in zip(widths, (*widths[1:], 1), strict=True):
            W = z.new_empty(count, m, n)
            if theta is None:
                W.normal_(generator=generator)
            else:
                symmetric_weibull_(W, theta, generator=generator)
            with torch.no_grad():
                z = (W @ activation(z).unsqueeze(-1)).squeeze(-1) / math.sqrt(n)
        ends.append(z.flatten())
    return ks_normal(torch.cat(ends))


@torch.no_grad()
def network_ks(network: nn.Module, layer: str, x: Float[Tensor, "n ..."]) -> KSTest:
    """Return the test of what a layer of a network gives for inputs x: all its units together, scaled to unit variance.

    Units of one network at one input share what came before, so values are not quite independent: it measures how
    Gaussian they are rather than deciding it.

    Raises:
        InputError: if the network has no such layer, or its values do not vary.

    Source: Wolinski & Arbel 2025, § 4.2.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 50), nn.Tanh(), nn.Linear(50, 3))
        >>> network_ks(net, "2", torch.randn(64, 4)).num_samples
        192
    """
    modules = dict(network.named_modules())
    if layer not in modules:
        raise InputError(f"The network has no layer {layer!r}; it has {[name for name in modules if name][:10]}.")
    seen: list[Tensor] = []
    with ONE_AT_A_TIME:
        hook = modules[layer].register_forward_hook(lambda _, __, out: seen.append(out.detach().double().flatten()))
        try:
            network(x)
        finally:
            hook.remove()
    z = torch.cat(seen) if seen else x.new_zeros(0)
    scale = z.square().mean().sqrt()
    if not len(z) or not float(scale) > 0:
        raise InputError(f"Layer {layer!r} gave nothing that varies: it is not called by the forward pass, or is zero.")
    return ks_normal(z / scale)


def _pieces(total: int, width: int) -> list[int]:
    size = max(1, (1 << 22) // width)
    return [min(size, total - start) for start in range(0, total, size)]


def _check_theta(theta: float) -> None:
    if not 2.02 <= theta <= 50.0:
        raise InputError(
            f"theta must be between 2.02 and 50, got {theta}: at 2 and below no activation makes pre-activations "
            "Gaussian, close to it the integral decays too slowly, and at 50 φ is the identity to a percent."
        )


@lru_cache(maxsize=32)
def _table(theta: float, kind: Kind) -> NDArray[np.float64]:
    """Values and slopes at equally spaced knots, [2, knots]: of φ(x)/x on [0, 9], or of positive φ(x) on [−9, 9]."""
    odd = kind == "odd"
    log_y, log_f, log_F, log_S = _law(theta)
    lower = np.isfinite(log_F)  # where F is known to relative accuracy; elsewhere 1 − F is
    half = math.log(2.0) if odd else 0.0
    with np.errstate(divide="ignore"):
        left = math.sqrt(2.0) * erfinv(np.exp(log_F)) if odd else ndtri_exp(log_F)
        x = np.where(lower, left, -ndtri_exp(log_S - half))
    slope = np.exp(log_y + half - 0.5 * x**2 - 0.5 * math.log(2 * math.pi) - log_f)  # dy/dx = y n(x)/f(log y)
    knots = np.linspace(0.0 if odd else -_TAIL, _TAIL, _KNOTS)
    spline = CubicHermiteSpline(x, np.exp(log_y), slope)
    inside = knots >= x[0]
    value, slope = (np.where(inside, spline(knots, k), 0.0) for k in (0, 1))
    if not odd:
        return np.stack([value, slope])
    at_zero = math.gamma(1.0 - 1.0 / theta)  # φ′(0): the density of |Y| at 0 is √(2/π)/Γ(1 − 1/θ)
    ratio, ratio_slope = np.full(_KNOTS, at_zero), np.zeros(_KNOTS)
    ratio[1:] = value[1:] / knots[1:]
    ratio_slope[1:] = (slope[1:] - ratio[1:]) / knots[1:]
    return np.stack([ratio, ratio_slope])


def _law(theta: float) -> tuple[NDArray[np.float64], ...]:
    """Log y, ascending; log density of log|Y| there; log F below the median region and −∞ above; log(1 − F) above.

    The line of inversion s = c + it goes through the saddle point, where M′(c)/M(c) = log y, so that both tails have
    relative accuracy; trapezoids on it converge exponentially. F is inverted left of the pole at 0, 1 − F right of it.
    """
    bottom, top = -20.0, _log_mean(0.0, theta)
    parts = [_inverted(np.linspace(bottom, top, 500, endpoint=False), -0.5, theta)]
    c, floor = 0.5, float(log_ndtr(-_TAIL - 0.2))
    while True:
        low, top = top, _log_mean(1.12 * c, theta)
        parts.append(_inverted(np.linspace(low, top, 24, endpoint=False), c, theta))
        if parts[-1][3].min() < floor:
            break
        c *= 1.25
    return tuple(np.concatenate(of) for of in zip(*parts, strict=True))


def _inverted(log_y: NDArray[np.float64], c: float, theta: float) -> tuple[NDArray[np.float64], ...]:
    """∫ M(s) y^{−s} ds/2πi and the same over s, s = c + it: the density of log|Y|, and 1 − F (c > 0) or −F (c < 0)."""
    rate = math.pi * (0.25 - 0.5 / theta)
    sd = math.sqrt(0.25 * polygamma(1, 0.5 * (1 + c)) - polygamma(1, 1 + c / theta) / theta**2)
    step = 2 * math.pi * abs(c) / 80.0  # the alias is e⁻⁸⁰ or, far out, ten standard deviations away
    t = np.arange(0.0, 36.0 / rate + 9.0 / sd, step)
    s = c + 1j * t
    at_c = _log_mellin(np.array([c + 0j]), theta)[0].real
    weights = np.exp(_log_mellin(s, theta) - at_c) * (step / math.pi)
    weights[0] *= 0.5
    both = np.stack([weights, weights / s], -1)
    sums = np.concatenate([(np.exp(-1j * np.outer(part, t)) @ both).real for part in np.array_split(log_y, 8)])
    scale = at_c - c * log_y
    with np.errstate(divide="ignore"):
        log_f, log_tail = np.log(np.abs(sums)).T + scale
    nothing = np.full_like(log_y, -np.inf)
    return (log_y, log_f, log_tail, nothing) if c < 0 else (log_y, log_f, nothing, log_tail)


def _log_mellin(s: NDArray[np.complexfloating], theta: float) -> NDArray[np.complexfloating]:
    """Log E|Y|^s = (s/2) log 2 + log Γ((1 + s)/2) − ½ log π − log Γ(1 + s/θ)."""
    return 0.5 * s * math.log(2.0) + loggamma(0.5 * (1.0 + s)) - 0.5 * math.log(math.pi) - loggamma(1.0 + s / theta)


def _log_mean(c: float, theta: float) -> float:
    """d/dc log E|Y|^c."""
    return float(0.5 * math.log(2.0) + 0.5 * digamma(0.5 * (1.0 + c)) - digamma(1.0 + c / theta) / theta)
