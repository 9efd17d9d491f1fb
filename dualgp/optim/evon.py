"""EVON: IVON in the eigenbasis of each weight matrix's gradients, where curvature is near diagonal."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dualgp.errors import InputError, UnsupportedError, check_count
from dualgp.optim.engine import SampledOptimizer
from dualgp.optim.flat import Bucket, average_product
from dualgp.optim.ivon import IVON, WIDEST, move_precision
from dualgp.optim.settings import check_units, first_std, settings, warn_if_wide
from dualgp.sites import WeightSite
from dualgp.weights import WeightPosterior

_DENSE = 4096  # weights, beyond which a dense precision is not formed


class EVON(SampledOptimizer):
    """IVON whose covariance has a direction: q = N(M, Q diag(1/(λ(h + d))) Qᵀ) with Q = Q_L ⊗ Q_R of each matrix.

        L ← γL + (1 − γ) GGᵀ,    R ← γR + (1 − γ) GᵀG,    Q_L, Q_R their eigenvectors
        Θ = M + Q_L (σ ∘ Z) Q_Rᵀ,    Ĥ = λ(h + d) ∘ mean of Q_LᵀGQ_R ∘ Q_Lᵀ(Θ − M)Q_R
        mom ← β₁ mom + (1 − β₁) G,    h ← h + ρ(Ĥ − h) + ½ρ²(Ĥ − h)²/(h + d)
        M ← M − lr Q_L [Q_Lᵀ(mom/(1 − β₁ᵗ) + dM) Q_R / (h + d)] Q_Rᵀ

    Tensors of more than two dimensions are matrices of their first and all others. A side longer than `max_side`, and
    all sides of vectors and numbers unless `vectors`, keep the axes they have: such parameters are as in `IVON`.

    Args:
        params: parameters or groups, as for any torch optimiser.
        lr: step size, relative to 1/(h₀ + d); see `IVON`.
        num_data: N; λ = N/T with `temperature` T.
        prior_precision: s₀ of a prior N(0, 1/s₀), absolute; 10⁻³ N, and 1 at least, unless said.
        temperature: T of the likelihood.
        init_std: standard deviation of the weights at the start, 0.018 unless said.
        total_steps: how long the run will be; the curvature's memory follows.
        curvature_horizon: c in 1 − β₂ = c/total_steps, 3.6 unless said.
        ess: λ, and
        weight_decay: d, and
        hess_init: h₀, and
        beta2: β₂, in place of the settings above.
        beta1: of the momentum, in [0, 1).
        basis_beta: γ; β₂ unless said.
        basis_every: steps between two moves of Q.
        max_side: the longest side that is turned.
        vectors: whether parameters of one dimension are turned, as matrices of one row.
        mc_samples: draws that `step(closure)` takes.
        clip_radius: largest change in a direction before `lr`, in size.
        generator: see `SampledOptimizer`.
        process_group: see `SampledOptimizer`.

    Raises:
        InputError: for settings out of range or given twice.

    Source: from the equations of EVON (2026) and Vyas et al. 2024, "SOAP". Deviations: no whitening of the update;
    momentum is kept unturned; the first step moves.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> net, x = torch.nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 0.9], [0.9, 1.0], [1.0, 1.0]])
        >>> optimizer = EVON(net.named_parameters(), num_data=3, total_steps=300, init_std=0.1)
        >>> for _ in range(300):
        ...     with optimizer.sampled_params():
        ...         torch.nn.functional.mse_loss(net(x), x.sum(-1, keepdim=True)).backward()
        ...     optimizer.step()
        >>> S = optimizer.posterior().precision  # what the data fix is the sum of the weights
        >>> bool(S[0, 1] > 0)
        True
    """

    state_names = ("momentum", "hess")
    average_names = ("gbar", "nbar")
    positive = IVON.positive
    at_least_0 = IVON.at_least_0

    def __init__(
        self,
        params: Any,
        lr: float | int = 1.0,
        *,
        num_data: float | int | None = None,
        prior_precision: float | int | None = None,
        temperature: float | int = 1.0,
        init_std: float | int | None = None,
        total_steps: int | None = None,
        curvature_horizon: float | int | None = None,
        ess: float | int | None = None,
        weight_decay: float | int | None = None,
        hess_init: float | int | None = None,
        beta1: float | int = 0.9,
        beta2: float | int | None = None,
        basis_beta: float | int | None = None,
        basis_every: int = 10,
        max_side: int = 2048,
        vectors: bool = False,
        mc_samples: int = 1,
        clip_radius: float | int = math.inf,
        generator: torch.Generator | None = None,
        process_group: Any = None,
    ) -> None:
        found = settings(
            num_data=num_data, ess=ess, temperature=temperature, prior_precision=prior_precision,
            weight_decay=weight_decay, init_std=init_std, hess_init=hess_init, total_steps=total_steps,
            curvature_horizon=curvature_horizon, beta2=beta2,
        )  # fmt: skip
        check_count("basis_every", basis_every, 1)
        check_count("max_side", max_side, 1)
        self.basis_every, self.max_side, self.vectors = basis_every, max_side, vectors
        defaults = {
            "lr": lr, "beta1": beta1, "clip_radius": clip_radius, **found,
            "basis_beta": found["beta2"] if basis_beta is None else basis_beta,
        }  # fmt: skip
        super().__init__(params, defaults, mc_samples=mc_samples, generator=generator, process_group=process_group)
        warn_if_wide(first_std(found))

    def _check_group(self, group: dict[str, Any]) -> None:
        check_units(group)
        super()._check_group(group)
        if not 0 <= group["basis_beta"] < 1:
            raise InputError(f"basis_beta must lie in [0, 1), got {group['basis_beta']}.")
        if math.isinf(group["ess"]):
            raise InputError(f"ess must be positive and finite, got {group['ess']}.")

    def _start(self, bucket: Bucket) -> None:
        bucket["hess"].fill_(bucket.group["hess_init"])
        bucket.add("turned")

    def _expose(self, bucket: Bucket) -> None:
        super()._expose(bucket)
        for p, mean in zip(bucket.params, bucket.views["mean"], strict=True):
            rows, columns = _matrix(mean).shape
            for name, side in (("left", rows), ("right", columns)):
                if 1 < side <= self.max_side and (p.ndim > 1 or self.vectors):
                    like = mean.new_zeros(side, side)
                    self.state[p][name] = like  # L or R
                    self.state[p][f"q_{name}"] = torch.eye(side, dtype=like.dtype, device=like.device)

    # --- the rule ---------------------------------------------------------------------------------

    def _draw(self, bucket: Bucket) -> None:
        lam, d = bucket.group["ess"], bucket.group["weight_decay"]
        for sample, h in bucket.chunks("sample", "hess"):
            self._noise(sample).mul_((h + d).mul_(lam).rsqrt_())  # σ ∘ Z
        for p, sample in zip(bucket.params, bucket.views["sample"], strict=True):
            self._turn(p, sample, back=True)
        bucket["sample"].add_(bucket["mean"])

    def _gather(self, bucket: Bucket, share: float) -> None:
        bucket["gbar"].lerp_(bucket["grad"], share) if share < 1.0 else bucket["gbar"].copy_(bucket["grad"])
        turned = bucket["turned"].copy_(bucket["sample"]).sub_(bucket["mean"])
        for p, g, e in zip(bucket.params, bucket.views["grad"], bucket.views["turned"], strict=True):
            self._turn(p, g)
            self._turn(p, e)
        average_product(bucket["nbar"], turned, bucket["grad"], share)

    def _update(self, bucket: Bucket, runs: list[slice]) -> None:
        group = bucket.group
        lam, d, beta1, rho = group["ess"], group["weight_decay"], group["beta1"], 1.0 - group["beta2"]
        debias, rescale = 1.0 - beta1 ** group["step"], group["hess_init"] + d
        for m, mom, g, step in bucket.chunks("mean", "momentum", "gbar", "turned", runs=runs):
            mom.lerp_(g, 1.0 - beta1)
            torch.add(mom / debias, m, alpha=d, out=step)
        seen = list(zip(bucket.params, bucket.seen, bucket.views["turned"], bucket.views["gbar"], strict=True))
        for p, was, step, _ in seen:
            if was:
                self._turn(p, step)
        floor = rescale / WIDEST**2
        for h, n, step in bucket.chunks("hess", "nbar", "turned", runs=runs):
            hd = h + d
            if rho > 0.0:
                u = (h / hd).sub_(n, alpha=lam)  # (h − Ĥ)/(h + d)
                torch.sub(move_precision(hd, u, rho, floor), d, out=h)
            step.div_(hd).clamp_(-group["clip_radius"], group["clip_radius"])
        for p, was, step, g in seen:
            if was:
                self._turn(p, step, back=True)
                self._move_basis(p, g, group)
        for m, step in bucket.chunks("mean", "turned", runs=runs):
            m.sub_(step, alpha=group["lr"] * rescale)

    def _turn(self, p: nn.Parameter, values: Tensor, *, back: bool = False) -> None:
        """Q_LᵀXQ_R, or back again Q_LXQ_Rᵀ, in place."""
        state, X = self.state[p], _matrix(values)
        left, right = state.get("q_left"), state.get("q_right")
        if left is not None:
            X = (left if back else left.mT) @ X
        if right is not None:
            X = X @ (right.mT if back else right)
        if left is not None or right is not None:
            values.copy_(X.view_as(values))

    def _move_basis(self, p: nn.Parameter, g: Tensor, group: dict[str, Any]) -> None:
        """Let L and R follow the gradient; every so often turn Q: by eigenvectors first, by one power step after."""
        gamma, step, G = group["basis_beta"], group["step"], _matrix(g)
        for name, outer in (("left", lambda: G @ G.mT), ("right", lambda: G.mT @ G)):
            if name not in self.state[p]:
                continue
            A, Q = self.state[p][name], self.state[p][f"q_{name}"]
            A.mul_(gamma).add_(outer(), alpha=1.0 - gamma)
            if step == 1:
                Q.copy_(torch.linalg.eigh(A.double())[1].flip(-1))
            elif step % self.basis_every == 0:
                Q.copy_(torch.linalg.qr(A.double() @ Q.double())[0])

    # --- reading out ------------------------------------------------------------------------------

    @torch.no_grad()
    def posterior(
        self, network: nn.Module | None = None, *, structure: Literal["dense", "diagonal"] = "dense"
    ) -> WeightPosterior:
        """Return q as a value: the prior N(0, 1/s₀) times a site.

        Args:
            network: names the parameters, if the optimiser was not given names.
            structure: "dense", S = Q diag(λ(h + d)) Qᵀ exactly, or "diagonal", with the marginal variances of q:
                sums of sites and removals are then of that approximation.

        Raises:
            InputError: if a parameter is not the network's.
            UnsupportedError: for a dense precision of more than 4096 weights.
        """
        layout = self._layout(network)
        if structure not in ("dense", "diagonal"):
            raise InputError(f'structure is "dense" or "diagonal", got {structure!r}.')
        if structure == "dense" and layout.size > _DENSE:
            raise UnsupportedError(
                f"A dense precision of {layout.size} weights is not formed (limit {_DENSE}): draw by sampled_params(), "
                'or take structure="diagonal".'
            )
        blocks, decays = [], []
        for bucket in self._buckets:
            lam, d = bucket.group["ess"], bucket.group["weight_decay"]
            decays.append(torch.full_like(bucket.of_learned(bucket["mean"]), lam * d))
            for p, h, is_learned in zip(bucket.params, bucket.views["hess"], bucket.learned(), strict=True):
                if is_learned:
                    blocks.append(self._precision(p, _matrix(lam * (h + d)), structure))
        mean, s0 = self._read_mean(), torch.cat(decays)
        if structure == "dense":
            S = torch.block_diag(*blocks)
            site = WeightSite(S @ mean, S - torch.diag(s0))
        else:
            s = torch.cat(blocks)
            site = WeightSite(s * mean, s - s0)
        return WeightPosterior(layout, site, prior_precision=s0)

    def _precision(self, p: nn.Parameter, s: Tensor, structure: str) -> Tensor:
        """The precision of one parameter from that along its axes: a block, or one over the marginal variances."""
        eyes = (torch.eye(side, dtype=s.dtype, device=s.device) for side in s.shape)
        QL, QR = (self.state[p].get(f"q_{name}", eye) for name, eye in zip(("left", "right"), eyes, strict=True))
        if structure == "dense":
            Q = torch.kron(QL, QR)
            return (Q * s.flatten()) @ Q.mT
        return 1.0 / (QL.square() @ (1.0 / s) @ QR.square().mT).flatten()


def _matrix(values: Tensor) -> Tensor:
    """A parameter as a matrix: its first dimension by all others; vectors are one row."""
    return values.reshape(1, -1) if values.ndim < 2 else values.flatten(1)
