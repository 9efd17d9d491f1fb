"""The engine of every variational optimiser here: draw weights, gather statistics of gradients there, move."""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.optim import Optimizer

from dualgp.errors import CallOrderError, InputError, UnsupportedError, check_count
from dualgp.optim.flat import Bucket, buckets_of
from dualgp.optim.settings import check_group
from dualgp.optim.state import by_parameter, check_tensors, layout_of, numbers_of
from dualgp.weights import WeightLayout

_RANK_STRIDE = 1_000_003  # between the seeds of ranks


class SampledOptimizer(Optimizer):
    """A `torch.optim.Optimizer` that takes its gradients at draws of the weights; see `IVON` for how it is used.

    A rule says how weights are drawn, what is gathered of a gradient, and how buffers move; all on flat buffers.

    Args:
        params: as for any torch optimiser; `named_parameters()` keeps names.
        defaults: settings of groups.
        state_names: buffers that last from step to step.
        average_names: buffers that gather averages over the samples of one step.
        positive: settings that must be positive, and
        at_least_0: those that must not be negative.
        mc_samples: how many draws `step(closure)` takes.
        generator: source of noise, on the device of the weights; else one of its own with torch's present seed, so that
            `torch.manual_seed` decides and the global stream is left alone. With a process_group its seed counts only.
        process_group: of `torch.distributed`; statistics are averaged over its ranks, whose noise differs.
    """

    state_names: tuple[str, ...] = ()
    average_names: tuple[str, ...] = ("gbar",)
    positive: tuple[str, ...] = ()
    at_least_0: tuple[str, ...] = ()

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        mc_samples: int = 1,
        generator: torch.Generator | None = None,
        process_group: Any = None,
    ) -> None:
        check_count("mc_samples", mc_samples, 1)
        self.mc_samples, self.process_group = mc_samples, process_group
        self.num_dropped = 0
        self._given = generator
        self._generators: dict[torch.device, torch.Generator] = {}
        self._buckets: list[Bucket] = []
        self._weight = self._before = 0.0  # of the samples gathered for the next step, and of all but the last
        self._dropped_now = False
        self._inside = False
        super().__init__(params, {**defaults, "step": 0})

    # --- what a rule is ---------------------------------------------------------------------------

    def _start(self, bucket: Bucket) -> None:
        """Fill the buffers of a new bucket."""

    def _draw(self, bucket: Bucket) -> None:
        """Put a draw of the weights into `sample`."""
        raise NotImplementedError

    def _gather(self, bucket: Bucket, share: float) -> None:
        """Let what `grad`, taken at `sample`, says have that share of the averages: all of it for a first sample."""
        raise NotImplementedError

    def _update(self, bucket: Bucket, runs: list[slice]) -> None:
        """Move mean and state by the averages."""
        raise NotImplementedError

    # --- use --------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with settings of its own where they are given.

        Raises:
            InputError: for settings out of range, or parameters that cannot be learned.
            CallOrderError: inside `sampled_params()`.
        """
        if getattr(self, "_inside", False):
            raise CallOrderError("Parameters cannot be added inside sampled_params(): do it before.")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
            new = buckets_of(group, self.state_names)
            for bucket in new:
                self._start(bucket)
                for name in self.average_names:
                    bucket.add(name)
        except BaseException:
            self.param_groups.pop()
            raise
        for bucket in new:
            self._expose(bucket)
        self._buckets += new

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raise InputError unless the settings of a group are in range."""
        check_group(group, self.positive, self.at_least_0)

    def _expose(self, bucket: Bucket) -> None:
        """Let `state[p]` show the buffers, as torch's tools expect; of full-precision weights the mean is p itself."""
        names = bucket.names if bucket.low_precision else bucket.names[1:]
        for k, p in enumerate(bucket.params):
            self.state[p] = {name: bucket.views[name][k] for name in names}

    @contextmanager
    def sampled_params(self, train: bool = True, *, weight: float | int = 1.0) -> Iterator[None]:
        """Draw the weights; put the mean back at the end, whatever happens.

        Gradients of the *mean* loss taken inside are the sample's: call backward once or several times, unscale and
        clip there. They are set to None at the start, and read and set to None at the end. Several draws before one
        `step()` are averaged.

        Args:
            train: whether gradients are read; False to predict, under `no_grad()` or `inference_mode()` too.
            weight: of this sample among those of a step: the size of its micro-batch, if sizes differ.

        Raises:
            CallOrderError: inside another `sampled_params()`, or if nothing has a gradient at the end.
            InputError: if the weight is not positive, or a gradient is sparse.
        """
        if self._inside:
            raise CallOrderError(
                "The weights are drawn already: leave sampled_params() before it is entered again. step(closure) draws "
                "by itself, so its closure must not."
            )
        if not (weight > 0 and math.isfinite(weight)):
            raise InputError(f"The weight of a sample must be positive and finite, got {weight}.")
        wanted = [[p.requires_grad for p in bucket.params] for bucket in self._buckets]
        with torch.no_grad():  # of all, before any is drawn: an exception puts all back
            for bucket in self._buckets:
                bucket.keep()
        self._inside = True
        try:
            with torch.no_grad():
                for bucket, want in zip(self._buckets, wanted, strict=True):
                    if train:  # a gradient taken elsewhere, or left by an exception, is not this draw's
                        bucket.drop_gradients()
                    self._draw(bucket)
                    bucket.write("sample", want)
            yield
            if train:
                with torch.no_grad():
                    self._take(wanted, weight)
        finally:
            with torch.no_grad():
                for bucket, want in zip(self._buckets, wanted, strict=True):
                    bucket.restore(want)
            self._inside = False

    def _take(self, wanted: list[list[bool]], weight: float) -> None:
        """Read the gradients of a sample; drop it, and count it, if any of them is not finite."""
        if sparse := [p for b in self._buckets for p in b.params if p.grad is not None and p.grad.layout != p.layout]:
            raise InputError(
                f"The gradient of a parameter of shape {tuple(sparse[0].shape)} is {sparse[0].grad.layout}, as of an "  # type: ignore[union-attr]
                "embedding with sparse=True; gradients must be dense here. The sample was not taken."
            )
        have = [
            [want and p.grad is not None for p, want in zip(b.params, w, strict=True)] for b, w in self._each(wanted)
        ]
        if not any(any(h) for h in have):
            raise CallOrderError(
                "No parameter has a gradient at the end of sampled_params(): call loss.backward() inside, and "
                "zero_grad() before. To predict use sampled_params(train=False)."
            )
        for bucket, want in self._each(wanted):
            bucket.read_gradients(want)
        if not all(_finite(bucket["grad"]) for bucket in self._buckets):
            self.num_dropped += 1
            self._dropped_now = True
            return
        first, self._before, self._weight = self._weight == 0.0, self._weight, self._weight + weight
        for bucket, h in self._each(have):
            bucket.seen = h if first else [a or b for a, b in zip(bucket.seen, h, strict=True)]
            self._gather(bucket, weight / self._weight)  # exactly 1 for the first, which overwrites what was there

    def _each(self, values: list[Any]) -> Iterator[tuple[Bucket, Any]]:
        return zip(self._buckets, values, strict=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Move the mean and the variance by the samples since the last step; return the mean of the closure's losses.

        Args:
            closure: computes the loss, calls backward and returns the loss; called at `mc_samples` draws.

        Raises:
            CallOrderError: if nothing was sampled, or inside `sampled_params()`.
        """
        if self._inside:
            raise CallOrderError("step() was called inside sampled_params(): call it after.")
        loss = None
        if closure is not None:
            for _ in range(self.mc_samples):
                with torch.enable_grad():
                    self.zero_grad()
                    with self.sampled_params():
                        value = closure()
                value = value.detach() if isinstance(value, Tensor) else value
                loss = value if loss is None else loss + value
            loss = loss if loss is None else loss / self.mc_samples
        self._synchronise()
        if self._weight == 0.0:
            if not self._dropped_now:
                raise CallOrderError(
                    "There is no gradient to step by: compute the loss and call backward() inside "
                    "`with optimizer.sampled_params():` first."
                )
            self._dropped_now = False  # all samples were dropped: nothing moves
            return loss
        for group in self.param_groups:
            group["step"] += 1
        for bucket in self._buckets:
            runs = bucket.runs(bucket.seen)
            if runs:
                self._update(bucket, runs)
            bucket.write("mean", bucket.seen)
        self._weight, self._dropped_now = 0.0, False
        return loss

    def _synchronise(self) -> None:
        """Average over all ranks: a rank's weight counts, so shares of a batch may differ in size."""
        if self.process_group is None:
            return
        mine, device = self._weight, self._buckets[0]["mean"].device
        weight = torch.tensor([self._weight, float(self._dropped_now)], dtype=torch.float64, device=device)
        torch.distributed.all_reduce(weight, group=self.process_group)
        total = float(weight[0])
        for bucket in self._buckets:
            seen = torch.tensor([mine > 0 and s for s in bucket.seen], dtype=torch.float32, device=device)
            torch.distributed.all_reduce(seen, group=self.process_group)
            for name in self.average_names:
                if mine == 0.0:
                    bucket[name].zero_()
                elif mine != total:
                    bucket[name].mul_(mine / total)
                torch.distributed.all_reduce(bucket[name], group=self.process_group)
            bucket.seen = [s > 0 for s in seen.tolist()]
        self._weight, self._dropped_now = total, bool(weight[1] > 0)

    # --- noise ------------------------------------------------------------------------------------

    def generator_on(self, device: torch.device) -> torch.Generator:
        """Return the source of noise for weights on a device."""
        alone = self.process_group is None
        if self._given is not None and alone and self._given.device.type == device.type:
            return self._given
        if device not in self._generators:
            # Generators of one seed on every rank would draw one noise on all of them.
            seed = torch.initial_seed() if self._given is None or alone else self._given.initial_seed()
            self._generators[device] = self._seeded(device, seed)
        return self._generators[device]

    def _rank(self) -> int:
        return 0 if self.process_group is None else torch.distributed.get_rank(self.process_group)

    def _seeded(self, device: torch.device, seed: int) -> torch.Generator:
        return torch.Generator(device).manual_seed((seed + _RANK_STRIDE * self._rank()) % (1 << 63))

    def _noise(self, out: Tensor) -> Tensor:
        """Fill with standard normal noise."""
        return out.normal_(generator=self.generator_on(out.device))

    def _uniform(self, out: Tensor) -> Tensor:
        """Fill with uniform noise."""
        return out.uniform_(generator=self.generator_on(out.device))

    # --- state ------------------------------------------------------------------------------------

    def _gathered_names(self) -> tuple[str, ...]:
        """Buffers that samples leave for the step that is to come."""
        return self.average_names

    def state_dict(self) -> dict[str, Any]:
        """Return the state: buffers by parameter, settings, steps, random numbers, samples not stepped by yet."""
        state = super().state_dict()
        devices = {bucket["mean"].device for bucket in self._buckets}
        state["generators"] = {str(device): self.generator_on(device).get_state() for device in devices}
        state["num_dropped"], state["rank"] = self.num_dropped, self._rank()
        if self._weight > 0.0 or self._dropped_now:
            numbers = numbers_of(self.param_groups, state["param_groups"])
            averages = by_parameter(self._buckets, self._gathered_names())
            state["gathered"] = {
                "averages": {numbers[p]: {n: v.clone() for n, v in views.items()} for p, views in averages.items()},
                "seen": {numbers[p]: seen for b in self._buckets for p, seen in zip(b.params, b.seen, strict=True)},
                "weights": [self._weight, self._before, float(self._dropped_now)],
            }
        return state

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state; unchanged if it does not fit.

        Raises:
            InputError: if it is of other parameters or of another optimiser.
            CallOrderError: inside `sampled_params()`.
        """
        if self._inside:
            raise CallOrderError("A state cannot be loaded inside sampled_params(): do it before.")
        groups, state = state_dict["param_groups"], state_dict["state"]
        numbers, own = numbers_of(self.param_groups, groups), state_dict.get("rank", 0) == self._rank()
        gathered = state_dict.get("gathered") if own else None  # the samples of another rank are not ours
        averages = by_parameter(self._buckets, self._gathered_names())
        check_tensors(numbers, self.state, state)
        if gathered is not None:
            check_tensors(numbers, averages, gathered["averages"])
        for mine, theirs in zip(self.param_groups, groups, strict=True):
            mine.update({k: v for k, v in theirs.items() if k not in ("params", "param_names")})
        for bucket in self._buckets:
            for p in bucket.params:
                for name, value in self.state[p].items():
                    value.copy_(state[numbers[p]][name])
            bucket.read_versions()
        for name, value in state_dict.get("generators", {}).items():
            device = torch.device(name)
            if own:
                self.generator_on(device).set_state(value.cpu())
            else:  # the state of another rank, as where one saves for all: noise that follows from it, and is our own
                self._generators[device] = self._seeded(device, zlib.crc32(bytes(value.tolist())))
        self.num_dropped = state_dict.get("num_dropped", 0)
        self._weight, self._before, self._dropped_now = 0.0, 0.0, False
        if gathered is not None:
            for p, views in averages.items():
                for name, value in views.items():
                    value.copy_(gathered["averages"][numbers[p]][name])
            for bucket in self._buckets:
                bucket.seen = [gathered["seen"][numbers[p]] for p in bucket.params]
            self._weight, self._before, dropped = gathered["weights"]
            self._dropped_now = bool(dropped)

    def __deepcopy__(self, memo: dict[int, Any]) -> SampledOptimizer:
        """Return an optimiser of its own parameters: those of a network's copy, where both are copied in one call."""
        if self._inside:
            raise CallOrderError("An optimiser cannot be copied inside sampled_params(): do it before.")
        new = memo[id(self)] = type(self).__new__(type(self))
        memo[id(self.process_group)] = self.process_group
        # A scheduler wraps `step` in a function that holds on to the optimiser: the copy's would move the original.
        new.__dict__ = copy.deepcopy({name: value for name, value in self.__dict__.items() if name != "step"}, memo)
        for bucket, old in zip(new._buckets, self._buckets, strict=True):
            bucket.read_versions(as_of=old)
        return new

    def __reduce__(self) -> Any:
        raise UnsupportedError(
            "Optimisers are not pickled: save optimizer.state_dict(), or copy.deepcopy((network, optimizer))."
        )

    # --- reading out ------------------------------------------------------------------------------

    def _layout(self, network: nn.Module | None) -> WeightLayout:
        """Names and shapes of all parameters that are not frozen, in the order of buckets."""
        learned = [p for b in self._buckets for p, is_learned in zip(b.params, b.learned(), strict=True) if is_learned]
        return layout_of(learned, self.param_groups, network)

    def _read_mean(self) -> Tensor:
        """Return the mean of all parameters that are not frozen, in the order of buckets."""
        if self._inside:
            raise CallOrderError("posterior() was called inside sampled_params(): call it after.")
        with torch.no_grad():
            for bucket in self._buckets:
                bucket.read_mean()
            return torch.cat([bucket.of_learned(bucket["mean"]) for bucket in self._buckets])


def _finite(values: Tensor) -> bool:
    """Whether all are finite: by their sum, and one by one only where that is not."""
    return bool(values.sum().isfinite()) or bool(values.isfinite().all())
