"""VOGN: the variational online Gauss–Newton method, from gradients of single data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from dualgp.checks import check_number, check_tensor
from dualgp.errors import CallOrderError, InputError
from dualgp.optim.engine import SampledOptimizer
from dualgp.optim.flat import Bucket
from dualgp.optim.readout import diagonal_posterior
from dualgp.optim.settings import decay_of
from dualgp.weights import WeightPosterior


class VOGN(SampledOptimizer):
    """Variational online Gauss–Newton: curvature from squared gradients of single data, F = mean of g_i².

        q = N(w, e^{2u}/N),    f = (s₀/N + γ + F) e^{2u} − T,    u ← u − ½ log(1 + (1 − β₂) f)
        mom ← β₁ mom + (1 − β₁)(g + s₀w/N),    w ← w − lr mom e^{2u_old}

    The network's gradients are taken datum by datum, so `step` gets the data, and no BatchNorm in training mode works.

    Args:
        network: whose parameters that take a gradient are learned.
        loss: of (output of one batch of one, target of one), a number.
        lr: step size.
        num_data: N.
        prior_precision: s₀ of a prior N(0, 1/s₀), absolute.
        temperature: T, of the posterior.
        beta1: of the momentum, in [0, 1), not corrected for its start.
        beta2: of the curvature; 1 − lr unless said.
        damping: γ ≥ 0.
        init_std: of the weights at the start: e^u/√N.
        mc_samples: draws for each step.
        generator: see `SampledOptimizer`.
        process_group: see `SampledOptimizer`.

    Raises:
        InputError: for settings out of range.

    Source: Osawa et al. 2019, "Practical deep learning with Bayesian principles"; the exponential form of the step in u
    keeps the variance positive.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> net, x = torch.nn.Linear(1, 1), torch.linspace(-1, 1, 20).unsqueeze(-1)
        >>> optimizer = VOGN(net, torch.nn.functional.mse_loss, lr=0.05, num_data=20, beta2=0.9, init_std=0.1)
        >>> losses = [optimizer.step(x, 2 * x).item() for _ in range(300)]
        >>> losses[-1] < 0.2 * losses[0]
        True
    """

    state_names = ("momentum", "log_std")
    average_names = ("gbar", "fbar")
    positive = ("num_data", "temperature", "init_std")
    at_least_0 = ("prior_precision", "damping")

    def __init__(
        self,
        network: nn.Module,
        loss: Callable[[Tensor, Tensor], Tensor],
        lr: float | int = 1e-3,
        *,
        num_data: float | int,
        prior_precision: float | int = 1.0,
        temperature: float | int = 1.0,
        beta1: float | int = 0.9,
        beta2: float | int | None = None,
        damping: float | int = 0.0,
        init_std: float | int | None = None,
        mc_samples: int = 1,
        generator: torch.Generator | None = None,
        process_group: Any = None,
    ) -> None:
        check_number("num_data", num_data, above=0)
        check_number("lr", lr, least=0)
        self.network, self.loss = network, loss
        defaults = {
            "lr": lr, "num_data": num_data, "prior_precision": prior_precision, "temperature": temperature,
            "beta1": beta1, "beta2": 1.0 - lr if beta2 is None else beta2, "damping": damping,
            "init_std": 1.0 / num_data**0.5 if init_std is None else init_std,
        }  # fmt: skip
        named = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
        super().__init__(named, defaults, mc_samples=mc_samples, generator=generator, process_group=process_group)

    def _start(self, bucket: Bucket) -> None:
        bucket["log_std"].fill_(bucket.group["init_std"] * bucket.group["num_data"] ** 0.5).log_()
        bucket.add("square")

    def step(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        """Move by the gradients of the loss of each datum, at `mc_samples` draws; return the mean loss there.

        Args:
            x: inputs of a batch, data first.
            y: their targets.

        Raises:
            CallOrderError: inside `sampled_params()`, or if no parameter takes part.
            InputError: if x and y do not have as many rows, or network and loss do not take them.
        """
        for name, value in (("x", x), ("y", y)):
            check_tensor(name, value)
        if x.ndim == 0 or y.ndim == 0 or not len(x) == len(y) > 0:
            raise InputError(f"x and y must have as many rows, got shapes {tuple(x.shape)} and {tuple(y.shape)}.")
        if self._inside:
            raise CallOrderError("step() was called inside sampled_params(): call it after.")
        losses = []
        for _ in range(self.mc_samples):
            with self.sampled_params():
                losses.append(self._one_by_one(x, y))
        super().step()
        return torch.stack(losses).mean()

    @torch.no_grad()
    def _one_by_one(self, x: Tensor, y: Tensor) -> Tensor:
        """Put the mean gradient into `p.grad` and that of its squares into `square`; return the mean loss."""
        params = {name: p.detach() for name, p in self.network.named_parameters()}
        wanted = {name for name, p in self.network.named_parameters() if p.requires_grad}
        fixed = {**{n: p for n, p in params.items() if n not in wanted}, **dict(self.network.named_buffers())}

        def of_one(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            output = functional_call(self.network, {**weights, **fixed}, (x.unsqueeze(0),))
            return self.loss(output, y.unsqueeze(0))

        weights = {name: params[name] for name in wanted}
        try:
            grads, losses = vmap(grad_and_value(of_one), (None, 0, 0), randomness="different")(weights, x, y)
        except (RuntimeError, ValueError, IndexError, TypeError, AssertionError) as error:
            raise InputError(
                f"The network and its loss, datum by datum, do not take x of {x.dtype} {tuple(x.shape)} and y of "
                f"{y.dtype} {tuple(y.shape)}: {error}"
            ) from error
        found = {id(p): grads[name] for name, p in self.network.named_parameters() if name in wanted}
        for bucket in self._buckets:
            for k, p in enumerate(bucket.params):
                p.grad = found[id(p)].mean(0)
                bucket.views["square"][k].copy_(found[id(p)].square().mean(0))
        return losses.mean()

    def _draw(self, bucket: Bucket) -> None:
        N = bucket.group["num_data"]
        for sample, w, u in bucket.chunks("sample", "mean", "log_std"):
            self._noise(sample).mul_(u.exp()).mul_(N**-0.5).add_(w)

    def _gather(self, bucket: Bucket, share: float) -> None:
        bucket.average("gbar", "grad", share)
        bucket.average("fbar", "square", share)

    def _update(self, bucket: Bucket, runs: list[slice]) -> None:
        group = bucket.group
        d, beta1, rho = decay_of(group), group["beta1"], 1.0 - group["beta2"]
        for w, mom, u, g, F in bucket.chunks("mean", "momentum", "log_std", "gbar", "fbar", runs=runs):
            var = (2.0 * u).exp_()  # of the old u: e^{2u}
            mom.lerp_(g, 1.0 - beta1).add_(w, alpha=(1.0 - beta1) * d)
            w.addcmul_(mom, var, value=-group["lr"])
            f = (F + (d + group["damping"])) * var - group["temperature"]
            u.sub_(torch.log1p(rho * f), alpha=0.5)

    def posterior(self) -> WeightPosterior:  # the network is known
        """Return N(w, e^{2u}/N) as the prior N(0, 1/s₀) times a site."""
        return diagonal_posterior(
            self, self.network, lambda b: b.group["num_data"] * (-2.0 * b["log_std"]).exp(),
            lambda b: b.group["prior_precision"],
        )  # fmt: skip
