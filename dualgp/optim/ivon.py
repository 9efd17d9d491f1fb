"""IVON: variational learning of a diagonal Gaussian over the weights, at the cost of Adam."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dualgp.errors import BasisMismatchError, InputError
from dualgp.optim.engine import SampledOptimizer
from dualgp.optim.flat import Bucket, average_product
from dualgp.optim.settings import check_units, first_std, settings, warn_if_wide
from dualgp.sites import WeightSite
from dualgp.weights import WeightPosterior

WIDEST = 10.0  # of σ₀: where the loss is flat, curvature decays, noise grows, and what it finds is flatter still
_MOST = 2.0  # of ρ(ĥ − h)/(h + d) in one step: a curvature grows fivefold at most, and nothing overflows


class IVON(SampledOptimizer):
    """The improved variational online Newton method: AdamW's place in four lines, and a posterior at the end.

    It minimises λ E_q[mean loss] + KL(q ‖ prior) over q = N(m, 1/(λ(h + d))), diagonal. A step, from gradients g at
    draws θ = m + σε, with ĥ = λ(h + d) · mean of g(θ − m):

        mom ← β₁ mom + (1 − β₁) g,    h ← h + ρ(ĥ − h) + ½ρ²(ĥ − h)²/(h + d)
        m ← m − lr (mom/(1 − β₁ᵗ) + d(m − m₀))/(h + d)

    so that h + d never falls by more than half in a step. Parameters that get no gradient stay as they are.

    Args:
        params: parameters or groups, as for any torch optimiser; from `named_parameters()` names are kept.
        lr: step size, relative to 1/(h₀ + d) (the first step is that of SGD) unless `rescale_lr` is off. Warm up and
            decay it to 0 by a torch scheduler; large values, 0.1 to 2, work.
        num_data: N, the data that the mean loss is a mean over; with `temperature` T, λ = N/T.
        prior_precision: s₀ of a prior N(0, 1/s₀), absolute; 10⁻³ N, and 1 at least, unless said.
        prior: a Gaussian of your own, such as the posterior of a run before (`optimizer.posterior()`): its mean and
            diagonal precision are the prior.
        temperature: T of the likelihood; the prior stays.
        init_std: σ₀, standard deviation of the weights at the start, 0.018 unless said.
        total_steps: how long the run will be; the curvature's memory follows.
        curvature_horizon: c in 1 − β₂ = c/total_steps, 3.6 unless said.
        ess: λ itself; the published settings are `ess`, `weight_decay`, `hess_init` and `beta2`.
        weight_decay: d, in place of `prior_precision`: s₀ = λd.
        hess_init: h₀, in place of `init_std`.
        beta1: of the momentum, in [0, 1).
        beta2: of the curvature, in place of `total_steps`.
        mc_samples: draws that `step(closure)` takes.
        clip_radius: largest change of a weight before `lr`, in size.
        hess_approx: "price", from g(θ − m), or "gradsq", from g² times `batch_size`, which is no curvature but cheap.
        batch_size: data in a gradient's batch, for "gradsq".
        rescale_lr: see `lr`.
        debias: whether the momentum is corrected for its start at 0.
        max_std: a bound on the standard deviation of each weight, 10 σ₀ unless said; `math.inf` for none.
        stochastic_rounding: whether weights in half precision are rounded at random from the float32 mean.
        generator: see `SampledOptimizer`.
        process_group: see `SampledOptimizer`.

    Raises:
        InputError: for settings out of range or given twice, and a prior of other weights.

    Source: Shen et al. 2024, "Variational learning is effective for large deep networks", algorithm 1. Deviations: a
    general Gaussian prior; one ĥ per step over all draws; its relative change is bounded by 2; "gradsq" is scaled by
    the batch size, not λ; λ, not h, carries temperature.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> net, x = torch.nn.Linear(1, 1), torch.linspace(-1, 1, 20).unsqueeze(-1)
        >>> optimizer = IVON(net.named_parameters(), num_data=20, total_steps=100, init_std=0.1)
        >>> for _ in range(100):
        ...     with optimizer.sampled_params():
        ...         torch.nn.functional.mse_loss(net(x), 2 * x).backward()
        ...     optimizer.step()
        >>> q = optimizer.posterior()
        >>> list(q.layout.shapes), bool((q.variance() > 0).all())
        (['weight', 'bias'], True)
    """

    state_names = ("momentum", "hess")
    average_names = ("gbar", "nbar")
    positive = ("ess", "hess_init", "clip_radius")
    at_least_0 = ("weight_decay",)

    def __init__(
        self,
        params: Any,
        lr: float | int = 1.0,
        *,
        num_data: float | int | None = None,
        prior_precision: float | int | None = None,
        prior: WeightPosterior | None = None,
        temperature: float | int = 1.0,
        init_std: float | int | None = None,
        total_steps: int | None = None,
        curvature_horizon: float | int | None = None,
        ess: float | int | None = None,
        weight_decay: float | int | None = None,
        hess_init: float | int | None = None,
        beta1: float | int = 0.9,
        beta2: float | int | None = None,
        mc_samples: int = 1,
        clip_radius: float | int = math.inf,
        hess_approx: Literal["price", "gradsq"] = "price",
        batch_size: int | None = None,
        rescale_lr: bool = True,
        debias: bool = True,
        max_std: float | int | None = None,
        stochastic_rounding: bool = False,
        generator: torch.Generator | None = None,
        process_group: Any = None,
    ) -> None:
        found = settings(
            num_data=num_data, ess=ess, temperature=temperature, prior_precision=prior_precision,
            weight_decay=weight_decay, init_std=init_std, hess_init=hess_init, total_steps=total_steps,
            curvature_horizon=curvature_horizon, beta2=beta2, has_prior=prior is not None,
        )  # fmt: skip
        if hess_approx not in ("price", "gradsq") or (hess_approx == "gradsq") != (batch_size is not None):
            raise InputError(
                f"hess_approx is 'price', or 'gradsq' with batch_size=; got {hess_approx!r}, batch_size={batch_size}."
            )
        if max_std is not None and not max_std > 0:
            raise InputError(f"max_std must be positive, got {max_std}.")
        std = first_std(found)
        self.batch_size, self.debias, self.rescale_lr = batch_size, debias, rescale_lr
        self.max_std = WIDEST * std if max_std is None else max_std
        self.stochastic_rounding, self._has_prior = stochastic_rounding, False
        defaults = {"lr": lr, "beta1": beta1, "clip_radius": clip_radius, **found}
        super().__init__(params, defaults, mc_samples=mc_samples, generator=generator, process_group=process_group)
        if prior is not None:
            self._set_prior(prior)
        warn_if_wide(std)

    def _check_group(self, group: dict[str, Any]) -> None:
        check_units(group)
        super()._check_group(group)

    def _start(self, bucket: Bucket) -> None:
        if self._has_prior:
            raise InputError(
                "prior= is of the parameters given at the start, and says nothing of those in a new group: build "
                "another IVON, with a prior of all of them (dualgp.WeightPosterior)."
            )
        bucket["hess"].fill_(bucket.group["hess_init"])
        bucket.uniform = self._uniform if self.stochastic_rounding else None

    def _set_prior(self, prior: WeightPosterior) -> None:
        """Make mean and precision of a Gaussian the prior of all parameters."""
        if prior.structure != "diagonal":
            raise InputError("IVON's prior is diagonal; WeightPosterior(..., prior_precision=q.precision.diagonal()).")
        mine, theirs = dict(self._layout(None).shapes), dict(prior.layout.shapes)
        named = mine.keys() == theirs.keys()
        if (mine != theirs) if named else (list(mine.values()) != list(theirs.values())):
            raise BasisMismatchError(
                f"The prior is of weights {list(theirs.items())[:3]}…, the optimiser of {list(mine.items())[:3]}…: "
                "names, or at least shapes in order, must agree."
            )
        means, precisions = prior.layout.split(prior.mean), prior.layout.split(prior.precision)
        names = iter(mine if named else theirs)
        for bucket in self._buckets:
            bucket.add("prior_mean"), bucket.add("decay")
            for k, is_learned in enumerate(bucket.learned()):
                if not is_learned:
                    continue
                name = next(names)
                bucket.views["prior_mean"][k].copy_(means[name])
                bucket.views["decay"][k].copy_(precisions[name] / bucket.group["ess"])
            bucket.names += ("prior_mean", "decay")  # saved with the state: without them the objective is another
            self._expose(bucket)
        self._has_prior = True

    def _draw(self, bucket: Bucket) -> None:
        lam = bucket.group["ess"]
        if math.isinf(lam):
            bucket["sample"].copy_(bucket["mean"])
            return
        for sample, m, h, d in _with_decay(bucket, "sample", "mean", "hess"):
            sigma = (h + d).rsqrt_()
            torch.addcmul(m, self._noise(sample), sigma, value=lam**-0.5, out=sample)  # θ = m + ε/√(λ(h + d))

    def _gather(self, bucket: Bucket, share: float) -> None:
        for g, sample, m, n in bucket.chunks("grad", "sample", "mean", "nbar"):
            average_product(n, g, g if self.batch_size is not None else sample - m, share)
        bucket.average("gbar", "grad", share)

    def _update(self, bucket: Bucket, runs: list[slice]) -> None:
        group = bucket.group
        lam, lr, beta1 = group["ess"], group["lr"], group["beta1"]
        rho = 0.0 if math.isinf(lam) else 1.0 - group["beta2"]
        debias = 1.0 - beta1 ** group["step"] if self.debias else 1.0
        if self.rescale_lr:
            lr = lr * (group["hess_init"] + group["weight_decay"])
        floor = 1.0 / (lam * self.max_std**2) if self.max_std > 0 else 0.0
        radius, prior = group["clip_radius"], "prior_mean" if "prior_mean" in bucket.buffers else "mean"
        names = ("mean", "momentum", "hess", "gbar", "nbar", prior)
        for m, mom, h, g, n, m0, d in _with_decay(bucket, *names, runs=runs):
            mom.lerp_(g, 1.0 - beta1)
            hd = h + d
            if rho > 0.0:
                # u = (h − ĥ)/(h + d), where ĥ = λ(h + d)n̄
                u = (h / hd).sub_(n, alpha=lam) if self.batch_size is None else h.sub(n, alpha=self.batch_size).div_(hd)
                torch.sub(move_precision(hd, u, rho, floor), d, out=h)
            # b(mom/b + d(m − m₀))/(h + d), b what corrects the momentum
            if isinstance(d, Tensor):
                step = torch.addcmul(mom, m - m0 if prior == "prior_mean" else m, d, value=debias)
            else:
                step = torch.add(mom, m, alpha=debias * d)
            if math.isfinite(radius):
                step = step.div_(hd).clamp_(-radius * debias, radius * debias)
                m.sub_(step, alpha=lr / debias)
            else:
                m.addcdiv_(step, hd, value=-lr / debias)

    def posterior(self, network: nn.Module | None = None) -> WeightPosterior:
        """Return q as a value: the prior times a site, S = s₀ + λh and S m = s₀m₀ + λ_site, so that the mean is m.

        Frozen parameters are constants, and not in it.

        Args:
            network: names the parameters, if the optimiser was not given names.

        Raises:
            InputError: if a parameter is not the network's.
        """
        layout, mean, parts = self._layout(network), self._read_mean(), []
        with torch.no_grad():
            for bucket in self._buckets:
                lam = bucket.group["ess"]
                d = bucket.buffers.get("decay", torch.full_like(bucket["mean"], bucket.group["weight_decay"]))
                m0 = bucket.buffers.get("prior_mean", torch.zeros_like(bucket["mean"]))
                parts.append([bucket.of_learned(t) for t in (m0, lam * d, lam * bucket["hess"])])
            m0, s0, B = (torch.cat(p) for p in zip(*parts, strict=True))
        site = WeightSite(B * mean + s0 * (mean - m0), B)
        return WeightPosterior(layout, site, prior_mean=m0, prior_precision=s0)


def move_precision(hd: Tensor, u: Tensor, rho: float, floor: float) -> Tensor:
    """Move h + d in place by (h + d)(1 + r + ½r²), r = −ρu, of a bounded r; u is used up."""
    u.clamp_(-_MOST / rho, _MOST / rho)
    return hd.addcmul_(hd, u.addcmul_(u, u, value=-0.5 * rho), value=-rho).clamp_min_(floor)


def _with_decay(bucket: Bucket, *names: str, runs: list[slice] | None = None) -> Any:
    """Yield pieces of buffers with d last: a number, or the piece of its buffer where the prior has one for each."""
    if "decay" in bucket.buffers:
        yield from bucket.chunks(*names, "decay", runs=runs)
        return
    d = bucket.group["weight_decay"]
    for parts in bucket.chunks(*names, runs=runs):
        yield (*parts, d)
