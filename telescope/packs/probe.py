"""Measure a pack's gain on this machine, and the memory that it needs, by a few real steps."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from telescope.config import TrialConfig
from telescope.packs.fused import Pack
from telescope.records import Point, Trial
from telescope.train.device import resolve_device
from telescope.train.loop import set_up
from telescope.train.probe import TIMED_STEPS, WARM_UP_STEPS, seconds_per_step

TAME_LR = 1e-6
"""A learning rate at which nothing diverges while a pack is timed."""


@dataclass(frozen=True)
class PackProbe:
    """The measurements of a pack."""

    size: int
    """Number of its trials."""
    alone_seconds: float
    """Time of one step of one trial."""
    pack_seconds: float
    """Time of one step of the pack."""
    bytes_used: int
    """Peak accelerator memory, with one trial's own model; 0 if unknown."""
    bytes_free: int
    """Free accelerator memory before; 0 if unknown."""
    bytes_total: int = 0
    """Accelerator memory of the device; 0 if unknown."""

    @property
    def gain(self) -> float:
        """Trials per second as a pack, over those one after the other."""
        return self.size * self.alone_seconds / self.pack_seconds

    def most(self, share: float) -> float:
        """Return the trials that fit the free memory, or a share of the device's if that is less.

        Args:
            share: share of the device, above 0 and at most 1; the rest belongs to other workers,
                even before they use it.
        """
        if not self.bytes_used:
            return math.inf
        return min(self.bytes_free, share * self.bytes_total) * self.size / self.bytes_used


def pack_probe(config: TrialConfig, trials: Sequence[Trial]) -> PackProbe:
    """Time a few steps of a pack and of one trial alone, at a learning rate that cannot diverge.

    Args:
        config: the sweep's training; no checkpoint is read or written.
        trials: trials of one width.

    Raises:
        torch.OutOfMemoryError: the pack does not fit.
    """
    steps = WARM_UP_STEPS + TIMED_STEPS
    train = replace(config.train, steps=max(steps + 1, config.train.steps), evals=1)
    probed = replace(config, train=train, checkpoint_folder=None)
    tame = [replace(trial, point=Point.of({**trial.point, "lr": TAME_LR})) for trial in trials]
    alone = seconds_per_step(set_up(probed, tame[0]), train)
    device = torch.device(resolve_device(config.device))
    before, free, total = _memory(device)
    pack, start = Pack(probed, tame), 0.0
    for step in range(steps):
        if step == WARM_UP_STEPS:
            start = time.perf_counter()
        pack.step()
    pack.read()
    seconds = (time.perf_counter() - start) / TIMED_STEPS
    used = torch.cuda.max_memory_allocated(device) - before if free else 0
    return PackProbe(len(trials), alone, seconds, used, free, total)


def _memory(device: torch.device) -> tuple[int, int, int]:
    """Reset a CUDA device's peak; return bytes in use, free and in total; 0 on others."""
    if device.type != "cuda":
        return 0, 0, 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device), *torch.cuda.mem_get_info(device)
