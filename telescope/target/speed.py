"""Speed of a run: tokens per second, time left, and the share of the device's peak that is used."""

from __future__ import annotations

import time
from collections import deque

import torch

PEAKS = {
    # part of the device's name, the most specific first: dense FLOP/s in bf16, and in fp32 without
    # TF32. Source: the makers' data sheets.
    "H100 PCIe": (756e12, 51e12),
    "H100 NVL": (835e12, 60e12),
    "H100": (989e12, 67e12),
    "H200": (989e12, 67e12),
    "B200": (2250e12, 80e12),
    "A100": (312e12, 19.5e12),
    "L40S": (362e12, 91.6e12),
    "RTX 4090": (165e12, 82.6e12),
}
"""Peak rates of devices; others, and CPUs, have no MFU."""
WINDOW = 20
"""Number of readings over which the present speed is measured."""


def device_name(device: str) -> str:
    """Return a device's name for people: that of the GPU, or "cpu"."""
    kind = torch.device(device)
    return torch.cuda.get_device_name(kind) if kind.type == "cuda" else kind.type


def peak_of(name: str, precision: str) -> float | None:
    """Return a device's peak in FLOP/s; None if it is not known.

    >>> peak_of("NVIDIA H100 80GB HBM3", "bf16"), peak_of("cpu", "fp32")
    (989000000000000.0, None)
    """
    known = next((peaks for part, peaks in PEAKS.items() if part in name), None)
    return known and known[0 if precision == "bf16" else 1]


class Speed:
    """Steps against time, without the first steps of a process, which compile and warm up."""

    def __init__(self, step: int, steps: int) -> None:
        """Begin at `step` of `steps`."""
        self._steps = steps
        self._start = step, time.perf_counter()
        self._warm: tuple[int, float] | None = None
        self._recent: deque[tuple[int, float]] = deque(maxlen=WINDOW)

    def note(self, step: int) -> None:
        """Note that `step` steps are done; of an accelerator, that it has done them."""
        now = step, time.perf_counter()
        self._warm = self._warm or now
        self._recent.append(now)

    @property
    def steps_per_second(self) -> float | None:
        """Steps per second lately; None before the second reading."""
        return _rate(self._recent[0], self._recent[-1]) if len(self._recent) > 1 else None

    @property
    def overall(self) -> float | None:
        """Steps per second since the warm-up, evaluations and checkpoints included."""
        if not self._recent:
            return None
        return _rate(self._warm or self._start, self._recent[-1]) or _rate(
            self._start, self._recent[-1]
        )

    @property
    def eta_seconds(self) -> float | None:
        """Seconds to the last step at the present speed; None if it is unknown."""
        rate = self.steps_per_second
        return (self._steps - self._recent[-1][0]) / rate if rate else None


def _rate(first: tuple[int, float], last: tuple[int, float]) -> float | None:
    """Return steps per second between two readings; None between two of one step."""
    steps, seconds = last[0] - first[0], last[1] - first[1]
    return steps / seconds if steps > 0 and seconds > 0 else None
