"""Bayes-SAM: sharpness-aware minimisation whose perturbation and step are scaled by a learned precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dualgp.errors import CallOrderError
from dualgp.optim.engine import SampledOptimizer
from dualgp.optim.flat import Bucket, average_product
from dualgp.optim.readout import diagonal_posterior
from dualgp.optim.settings import decay_of
from dualgp.weights import WeightPosterior


class BSAM(SampledOptimizer):
    """Bayes-SAM: two gradients a step, one at a draw θ = w + ε/√(Ns), one at the mean moved by ρ g/s.

        q = √s |g(θ)|,    g' = g(w + ρ g(θ)/s),    mom ← β₁ mom + (1 − β₁)(g' + d w)
        w ← w − lr mom/s,    s ← β₂ s + (1 − β₂)(q + γ + d)

    `step(closure)` does all of it. By hand: a gradient inside `sampled_params()`, one inside `perturbed_params()`, once
    for each part of the batch ("m-sharpness"), then `step()`. Its variance 1/(Ns) is not that of variational
    inference: on a quadratic s → γ + d + a√(2/πN), where a + d would be exact.

    Args:
        params: parameters or groups, as for any torch optimiser.
        lr: step size; decay it to 0.
        num_data: N, the data that the mean loss is a mean over.
        prior_precision: of a prior N(0, 1/s₀), absolute; d = s₀/N.
        sam_radius: ρ, of the perturbation.
        beta1: of the momentum, in [0, 1).
        beta2: of the precision, in [0, 1].
        damping: γ > 0.
        precision_init: s at the start.
        generator: see `SampledOptimizer`.
        process_group: see `SampledOptimizer`.

    Raises:
        InputError: for settings out of range.

    Source: Möllenhoff & Khan 2023, "SAM as an optimal relaxation of Bayes", algorithm 1.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> net, x = torch.nn.Linear(1, 1), torch.linspace(-1, 1, 20).unsqueeze(-1)
        >>> optimizer = BSAM(net.named_parameters(), lr=0.1, num_data=2000, prior_precision=0.1)
        >>> def closure():
        ...     loss = torch.nn.functional.mse_loss(net(x), 2 * x)
        ...     loss.backward()
        ...     return loss
        >>> losses = [optimizer.step(closure).item() for _ in range(200)]
        >>> losses[-1] < 0.1 * losses[0]
        True
    """

    state_names = ("momentum", "precision")
    average_names = ("gbar", "qbar")
    positive = ("num_data", "damping", "precision_init")
    at_least_0 = ("prior_precision", "sam_radius")

    def __init__(
        self,
        params: Any,
        lr: float | int = 1.0,
        *,
        num_data: float | int,
        prior_precision: float | int = 25.0,
        sam_radius: float | int = 0.1,
        beta1: float | int = 0.9,
        beta2: float | int = 0.999,
        damping: float | int = 0.1,
        precision_init: float | int = 1.0,
        generator: torch.Generator | None = None,
        process_group: Any = None,
    ) -> None:
        defaults = {
            "lr": lr, "beta1": beta1, "beta2": beta2, "num_data": num_data, "prior_precision": prior_precision,
            "sam_radius": sam_radius, "damping": damping, "precision_init": precision_init,
        }  # fmt: skip
        self._perturbing = self._owed = False  # owed is the gradient at the weights that the draw just left leads to
        super().__init__(params, defaults, generator=generator, process_group=process_group)

    def _start(self, bucket: Bucket) -> None:
        bucket["precision"].fill_(bucket.group["precision_init"])

    def _draw(self, bucket: Bucket) -> None:
        N, radius = bucket.group["num_data"], bucket.group["sam_radius"]
        for sample, w, s, g in bucket.chunks("sample", "mean", "precision", "grad"):
            if self._perturbing:
                torch.addcdiv(w, g, s, value=radius, out=sample)  # w + ρ g/s
            else:
                self._noise(sample).mul_((N * s).rsqrt_()).add_(w)

    def _gather(self, bucket: Bucket, share: float) -> None:
        self._owed = not self._perturbing
        if self._perturbing:
            bucket.average("gbar", "grad", share)
            return
        for g, s, q in bucket.chunks("grad", "precision", "qbar"):
            average_product(q, s.sqrt(), g.abs(), share)

    def _gathered_names(self) -> tuple[str, ...]:
        return (*self.average_names, "grad")  # of the draw just left, along which the mean is moved next

    @contextmanager
    def perturbed_params(self) -> Iterator[None]:
        """Put the weights at w + ρ g/s, g the gradient of the draw just left, and count as much as that draw does.

        Raises:
            CallOrderError: if there is no such gradient.
        """
        if self._weight == 0.0 and not self._dropped_now:
            raise CallOrderError("perturbed_params() needs the gradient of a draw: enter sampled_params() first.")
        both, dropped, whole, self._perturbing = self._weight, self.num_dropped, False, True
        weight = both - self._before or 1.0  # of no matter where the draw was dropped
        self._weight = self._before
        try:
            with self.sampled_params(weight=weight):
                yield
            whole = self.num_dropped == dropped
        finally:
            # One sample is both of its gradients. Where one is lost the averages hold halves: none of them counts.
            self._perturbing, self._owed, self._weight = False, False, both if whole else 0.0

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Move by the samples since the last step; with a closure, after both gradients of one. See `SampledOptimizer`.

        Raises:
            CallOrderError: if nothing was sampled, or a draw was not followed by `perturbed_params()`.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                self.zero_grad()
                with self.sampled_params():
                    loss = closure()
                with self.perturbed_params():
                    closure()
        if self._owed:
            raise CallOrderError(
                "BSAM moves by the gradient at perturbed weights: after `with optimizer.sampled_params():` compute the "
                "loss and call backward() inside `with optimizer.perturbed_params():` too, or give step() a closure."
            )
        super().step()
        return loss.detach() if isinstance(loss, Tensor) else loss

    def _update(self, bucket: Bucket, runs: list[slice]) -> None:
        group = bucket.group
        lr, beta1, beta2, d = group["lr"], group["beta1"], group["beta2"], decay_of(group)
        for w, mom, s, g, q in bucket.chunks("mean", "momentum", "precision", "gbar", "qbar", runs=runs):
            mom.lerp_(g, 1.0 - beta1).add_(w, alpha=(1.0 - beta1) * d)
            w.addcdiv_(mom, s, value=-lr)
            s.lerp_(q, 1.0 - beta2).add_((1.0 - beta2) * (group["damping"] + d))

    def posterior(self, network: nn.Module | None = None) -> WeightPosterior:
        """Return N(w, 1/(Ns)) as the prior times a site, without the damping: precision N(s − γ).

        Args:
            network: names the parameters, if the optimiser was not given names.

        Raises:
            InputError: if a parameter is not the network's.
        """
        return diagonal_posterior(
            self, network, lambda b: (b.group["num_data"] * (b["precision"] - b.group["damping"])),
            lambda b: b.group["prior_precision"],
        )  # fmt: skip
