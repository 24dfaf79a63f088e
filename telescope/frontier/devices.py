"""The time to a loss on a number of devices, data parallel, from step times or a stated device.

One device's share of a batch of B sequences on n devices is B/n, at least one sequence. Its time is
what a step of that batch takes on one device; Newton–Schulz is divided over the devices as ZeRO-1
does, whole matrices at a time; the exchange of gradients and parameters comes on top.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from telescope.frontier.arms import Arm
from telescope.frontier.reach import Reached

BYTES = 4
"""Bytes of a gradient or a parameter on its way: fp32."""
MUON_EXCHANGE = 1.25
"""Most that Muon exchanges, in multiples of AdamW. Source: arXiv 2502.16982, ZeRO-1."""


@dataclass(frozen=True)
class Step:
    """The cost of one step of an arm."""

    seconds: float | None
    """Seconds of a trial that trains alone, on one worker; None where they are not known."""
    model: float | None = None
    """FLOPs of forward and backward of the whole batch; None where they are not known."""
    optimizer: float | None = None
    """FLOPs of Newton–Schulz; None where they are not known."""
    parameters: float | None = None
    matrices: int | None = None
    """Hidden matrices, over which Newton–Schulz can be divided."""


@dataclass(frozen=True)
class Devices:
    """A model of the devices."""

    counts: tuple[int, ...]
    flops_per_second: float | None = None
    """FLOP/s that one device reaches; None: the step times measured."""
    bandwidth: float | None = None
    """Bytes per second of a device's link; None: the exchange takes no time."""

    @property
    def basis(self) -> str:
        """The model in words."""
        compute = (
            "step times measured here, of one trial by itself"
            if self.flops_per_second is None
            else f"{self.flops_per_second:.3g} FLOP/s per device (frontier.devices)"
        )
        exchange = (
            "the exchange of gradients not counted"
            if self.bandwidth is None
            else f"the exchange at {self.bandwidth:.3g} bytes per second"
        )
        return f"{compute}; {exchange}"


@dataclass(frozen=True)
class Placed:
    """The fastest way to a loss on so many devices."""

    optimizer: str
    loss: float
    devices: int
    batch_size: int
    """Sequences per step of the fastest arm."""
    seconds: float
    interval: tuple[float | None, float | None]


class NotKnownError(ValueError):
    """A device model needs numbers that are not known of these runs."""


def place(devices: Devices, steps: Mapping[Arm, Step], found: Sequence[Reached]) -> list[Placed]:
    """Return the fastest arm for every number of devices, of one optimizer to one loss.

    A number of devices beyond the largest batch in sequences is left out. Without a stated rate and
    without enough step times there is none.

    Args:
        devices: the model.
        steps: of the optimizer's arms.
        found: of the same arms, to one loss.

    Raises:
        NotKnownError: the model needs FLOPs or parameters, and they are not known.
    """
    if devices.flops_per_second is None and not is_timed(steps):
        return []
    fixed, rate = _measured(steps) if devices.flops_per_second is None else (0.0, 0.0)
    placed = []
    for count in devices.counts:
        times = []
        for arm in found:
            if arm.tokens is None or arm.interval is None or count > arm.arm.batch_size:
                continue
            share = arm.arm.batch_size / count
            if devices.flops_per_second is None:
                compute = fixed + rate * share
            else:
                compute = _stated(devices.flops_per_second, steps[arm.arm], count)
            each = compute + _exchange(devices, steps[arm.arm], arm.arm.optimizer, count)
            per_token = each / arm.arm.batch_tokens
            times.append((arm.tokens * per_token, per_token, arm))
        if times:
            seconds, per_token, best = min(times, key=lambda time: (time[0], time[2].arm))
            low, high = best.interval or (None, None)
            interval = (low and low * per_token, high and high * per_token)
            name, size = best.arm.optimizer, best.arm.batch_size
            placed.append(Placed(name, best.loss, count, size, seconds, interval))
    return placed


def is_timed(steps: Mapping[Arm, Step]) -> bool:
    """Tell whether enough step times of an optimizer's arms are known: of two arms, or of all."""
    return sum(step.seconds is not None for step in steps.values()) >= min(2, len(steps))


def _measured(steps: Mapping[Arm, Step]) -> tuple[float, float]:
    """Fit seconds per step as a fixed part and one per sequence, equally well at all batches."""
    known = {arm: step.seconds for arm, step in steps.items() if step.seconds is not None}
    sizes = np.array([arm.batch_size for arm in known], dtype=float)
    seconds = np.array(list(known.values()))
    columns = np.stack([np.ones(len(sizes)), sizes], axis=1) / seconds[:, None]
    (fixed, rate), _ = nnls(columns, np.ones(len(sizes)))
    return float(fixed), float(rate)


def _stated(rate: float, step: Step, count: int) -> float:
    if step.model is None or step.optimizer is None or step.matrices is None:
        raise NotKnownError(
            "frontier.devices.flops_per_second: the FLOPs of a step are not known of another "
            "trainer; leave it out, and the step times measured count"
        )
    owners = max(1, min(count, step.matrices))
    return (step.model / count + step.optimizer / owners) / rate


def _exchange(devices: Devices, step: Step, optimizer: str, count: int) -> float:
    """Seconds of the exchange: every device sends and receives (n − 1)/n of everything twice."""
    if devices.bandwidth is None or count == 1:
        return 0.0
    if step.parameters is None:
        raise NotKnownError(
            "frontier.devices.bandwidth: the number of parameters is not known; give it in [cost]"
        )
    factor = MUON_EXCHANGE if optimizer == "muon" else 1.0
    return factor * 2 * BYTES * step.parameters * (count - 1) / count / devices.bandwidth
