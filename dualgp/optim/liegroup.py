"""The Bayesian learning rule on Lie groups: noise is added to weights, multiplied to them, or both.

The loss is the mean over data; ½ d|θ|² is added by the rule, d = prior precision/N, and the temperature τ = T/N weighs
the entropy.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from dualgp.errors import UnsupportedError
from dualgp.optim.engine import SampledOptimizer
from dualgp.optim.flat import Bucket, average_product
from dualgp.optim.readout import diagonal_posterior
from dualgp.optim.settings import decay_of
from dualgp.weights import WeightPosterior

_SERIES = 1e-6  # below which (e^{−a u} − 1)/u is taken as its series


class AdditiveBLR(SampledOptimizer):
    """Additive group: θ = w + ξ with noise of a fixed standard deviation; w ← w − lr mom. Smoothing, not an estimate.

    Args:
        params: parameters or groups, as for any torch optimiser.
        lr: step size.
        num_data: N.
        prior_precision: of a prior N(0, 1/s₀), absolute.
        noise_std: of the noise, > 0.
        beta1: of the momentum, in [0, 1), not corrected for its start.
        mc_samples: draws that `step(closure)` takes.
        generator: see `SampledOptimizer`.
        process_group: see `SampledOptimizer`.

    Raises:
        InputError: for settings out of range.

    Source: Kiral, Möllenhoff & Khan 2023, "The Lie-group Bayesian learning rule", § 4.
    """

    state_names = ("momentum",)
    positive = ("num_data", "noise_std")
    at_least_0 = ("prior_precision",)

    def __init__(
        self,
        params: Any,
        lr: float | int = 0.5,
        *,
        num_data: float | int,
        prior_precision: float | int = 25.0,
        noise_std: float | int = 0.005,
        beta1: float | int = 0.8,
        mc_samples: int = 1,
        generator: torch.Generator | None = None,
        process_group: Any = None,
    ) -> None:
        defaults = {
            "lr": lr, "num_data": num_data, "prior_precision": prior_precision, "noise_std": noise_std,
            "beta1": beta1,
        }  # fmt: skip
        super().__init__(params, defaults, mc_samples=mc_samples, generator=generator, process_group=process_group)

    def _draw(self, bucket: Bucket) -> None:
        for sample, w in bucket.chunks("sample", "mean"):
            self._noise(sample).mul_(bucket.group["noise_std"]).add_(w)

    def _gather(self, bucket: Bucket, share: float) -> None:
        d = decay_of(bucket.group)
        for g, sample in bucket.chunks("grad", "sample"):
            g.add_(sample, alpha=d)
        bucket.average("gbar", "grad", share)

    def _update(self, bucket: Bucket, runs: list[slice]) -> None:
        lr, beta1 = bucket.group["lr"], bucket.group["beta1"]
        for w, mom, g in bucket.chunks("mean", "momentum", "gbar", runs=runs):
            mom.lerp_(g, 1.0 - beta1)
            w.sub_(mom, alpha=lr)

    def posterior(self, network: nn.Module | None = None) -> WeightPosterior:
        """Return N(w, noise_std²): what is drawn from, whose variance was chosen and not learned.

        Args:
            network: names the parameters, if the optimiser was not given names.
        """
        return diagonal_posterior(
            self, network, lambda b: torch.full_like(b["mean"], b.group["noise_std"] ** -2),
            lambda b: b.group["prior_precision"],
        )  # fmt: skip


class AffineBLR(SampledOptimizer):
    """Affine group, diagonal: θ = b + A ε with ε ~ N(0, 1); both are learned, and A stays positive.

        U = mean(A ε g) − τ,    V = mean(A g),    averaged to MU, MV by β₂
        b ← b + A MV (e^{−lr MU} − 1)/MU,    A ← A e^{−lr_scale MU}

    Its fixed point is mean-field variational inference at the temperature τN.

    Args:
        params: parameters or groups, as for any torch optimiser.
        lr: step size of b.
        num_data: N.
        prior_precision: of a prior N(0, 1/s₀), absolute.
        temperature: T, of the posterior.
        lr_scale: step size of log A.
        scale_init: A at the start: the standard deviation of the weights.
        beta1: of MV, in [0, 1).
        beta2: of MU, in [0, 1].
        mc_samples: draws that `step(closure)` takes.
        generator: see `SampledOptimizer`.
        process_group: see `SampledOptimizer`.

    Raises:
        InputError: for settings out of range.

    Source: Kiral, Möllenhoff & Khan 2023, § 5. Deviation: fresh noise at every step (their code repeats the noise of
    the first), and small A at the start in place of 1.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> p = torch.nn.Parameter(torch.zeros(1))
        >>> optimizer = AffineBLR([("w", p)], num_data=10, prior_precision=1.0, lr_scale=0.1, scale_init=0.3)
        >>> def closure():
        ...     loss = (p - 1.0).square().sum()
        ...     loss.backward()
        ...     return loss
        >>> _ = [optimizer.step(closure) for _ in range(500)]
        >>> 0.1 < optimizer.posterior().variance().sqrt().item() < 0.4  # 1/√(10(2 + .1)) = .22
        True
    """

    state_names = ("scale", "mu", "mv")
    average_names = ("ubar", "vbar")
    positive = ("num_data", "temperature", "scale_init")
    at_least_0 = ("prior_precision", "lr_scale")

    def __init__(
        self,
        params: Any,
        lr: float | int = 1.0,
        *,
        num_data: float | int,
        prior_precision: float | int = 25.0,
        temperature: float | int = 1.0,
        lr_scale: float | int = 0.05,
        scale_init: float | int = 0.01,
        beta1: float | int = 0.8,
        beta2: float | int = 0.999,
        mc_samples: int = 1,
        generator: torch.Generator | None = None,
        process_group: Any = None,
    ) -> None:
        defaults = {
            "lr": lr, "num_data": num_data, "prior_precision": prior_precision, "temperature": temperature,
            "lr_scale": lr_scale, "scale_init": scale_init, "beta1": beta1, "beta2": beta2,
        }  # fmt: skip
        super().__init__(params, defaults, mc_samples=mc_samples, generator=generator, process_group=process_group)

    def _start(self, bucket: Bucket) -> None:
        bucket["scale"].fill_(bucket.group["scale_init"])

    def _draw(self, bucket: Bucket) -> None:
        for sample, b, A in bucket.chunks("sample", "mean", "scale"):
            self._noise(sample).mul_(A).add_(b)

    def _gather(self, bucket: Bucket, share: float) -> None:
        d = decay_of(bucket.group)
        for g, sample, b, A, ubar, vbar in bucket.chunks("grad", "sample", "mean", "scale", "ubar", "vbar"):
            g.add_(sample, alpha=d)
            average_product(ubar, sample - b, g, share)  # Aε g
            average_product(vbar, A, g, share)

    def _update(self, bucket: Bucket, runs: list[slice]) -> None:
        group = bucket.group
        lr, lr_scale, beta1, beta2 = group["lr"], group["lr_scale"], group["beta1"], group["beta2"]
        tau = group["temperature"] / group["num_data"]
        for b, A, mu, mv, u, v in bucket.chunks("mean", "scale", "mu", "mv", "ubar", "vbar", runs=runs):
            mu.lerp_(u, 1.0 - beta2).sub_((1.0 - beta2) * tau)
            mv.lerp_(v, 1.0 - beta1)
            small = mu.abs() < _SERIES
            safe = torch.where(small, torch.ones_like(mu), mu)
            ratio = torch.where(small, -lr + 0.5 * lr**2 * mu, torch.expm1(-lr * safe) / safe)
            b.addcmul_(A, mv * ratio)
            A.mul_(torch.exp(-lr_scale * mu))

    def posterior(self, network: nn.Module | None = None) -> WeightPosterior:
        """Return N(b, A²) as the prior N(0, 1/s₀) times a site.

        Args:
            network: names the parameters, if the optimiser was not given names.
        """
        return diagonal_posterior(
            self, network, lambda b: b["scale"].square().reciprocal(), lambda b: b.group["prior_precision"]
        )


class MultiplicativeBLR(SampledOptimizer):
    """Multiplicative group: θ = g₊r₊ − g₋r₋ with r ~ Rayleigh(1) and g₊, g₋ > 0, excitatory and inhibitory.

        V± = mean(±g θ±) − τ, averaged by β₁,    g± ← g± e^{−lr V±}

    No Gaussian and no site: `sample_params` draws, `mean` is √(π/2)(g₊ − g₋), and `posterior` refuses.

    Args:
        params: parameters or groups, as for any torch optimiser; they start at g± = max(±p, 0) + offset.
        lr: step size of log g.
        num_data: N.
        prior_precision: of a prior N(0, 1/s₀), absolute.
        temperature: T, of the posterior.
        beta1: of V±, in [0, 1).
        offset: least g at the start, > 0.
        mc_samples: draws that `step(closure)` takes.
        generator: see `SampledOptimizer`.
        process_group: see `SampledOptimizer`.

    Raises:
        InputError: for settings out of range.

    Source: Kiral, Möllenhoff & Khan 2023, § 5. Deviations: fresh noise at every step; outside `sampled_params` the
    weights are the mean, √(π/2) times theirs.
    """

    state_names = ("plus", "minus", "v_plus", "v_minus")
    average_names = ("plus_bar", "minus_bar")
    positive = ("num_data", "temperature", "offset")
    at_least_0 = ("prior_precision",)

    def __init__(
        self,
        params: Any,
        lr: float | int = 1.0,
        *,
        num_data: float | int,
        prior_precision: float | int = 25.0,
        temperature: float | int = 1.0,
        beta1: float | int = 0.9,
        offset: float | int = 1e-5,
        mc_samples: int = 1,
        generator: torch.Generator | None = None,
        process_group: Any = None,
    ) -> None:
        defaults = {
            "lr": lr, "num_data": num_data, "prior_precision": prior_precision, "temperature": temperature,
            "beta1": beta1, "offset": offset,
        }  # fmt: skip
        super().__init__(params, defaults, mc_samples=mc_samples, generator=generator, process_group=process_group)

    @torch.no_grad()
    def _start(self, bucket: Bucket) -> None:
        mean, offset = bucket["mean"], bucket.group["offset"]
        bucket["plus"].copy_(mean.clamp_min(0.0) + offset)
        bucket["minus"].copy_((-mean).clamp_min(0.0) + offset)
        for name in ("r_plus", "r_minus"):
            bucket.add(name)

    def _draw(self, bucket: Bucket) -> None:
        for sample, plus, minus, r, s in bucket.chunks("sample", "plus", "minus", "r_plus", "r_minus"):
            self._rayleigh(r), self._rayleigh(s)
            torch.mul(plus, r, out=sample).addcmul_(minus, s, value=-1.0)

    def _rayleigh(self, out: Tensor) -> Tensor:
        """Fill with the length of a standard normal vector in the plane: √(2 · Exp(1))."""
        return out.exponential_(generator=self.generator_on(out.device)).mul_(2.0).sqrt_()

    def _gather(self, bucket: Bucket, share: float) -> None:
        d = decay_of(bucket.group)
        names = ("grad", "sample", "plus", "minus", "r_plus", "r_minus", "plus_bar", "minus_bar")
        for g, sample, plus, minus, r, s, up, down in bucket.chunks(*names):
            g.add_(sample, alpha=d)
            average_product(up, g, plus * r, share)
            average_product(down, g, -minus * s, share)

    def _update(self, bucket: Bucket, runs: list[slice]) -> None:
        group = bucket.group
        lr, beta1, tau = group["lr"], group["beta1"], group["temperature"] / group["num_data"]
        for sign in ("plus", "minus"):
            for g, v, at in bucket.chunks(sign, f"v_{sign}", f"{sign}_bar", runs=runs):
                v.lerp_(at, 1.0 - beta1).sub_((1.0 - beta1) * tau)
                g.mul_(torch.exp(-lr * v))
        for mean, plus, minus in bucket.chunks("mean", "plus", "minus", runs=runs):
            torch.sub(plus, minus, out=mean).mul_(math.sqrt(math.pi / 2))

    def posterior(self, network: nn.Module | None = None) -> WeightPosterior:
        """Raise: weights that are products of signs and Rayleigh variables have no Gaussian site.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(
            "A multiplicative posterior is not Gaussian and has no sites: predict inside sampled_params(train=False). "
            "For a posterior to merge or to go on from use IVON or AffineBLR."
        )
