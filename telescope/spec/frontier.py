"""The table ``[frontier]``: optimizers and batch sizes to compare, and how long each trains."""

from __future__ import annotations

from typing import Annotated, Self

import pydantic
from pydantic import Field

from telescope.config import all_faults, require
from telescope.spec.optimizers import ComparedTable
from telescope.spec.tables import Amount, Count, Table, Width


class DevicesTable(Table):
    """Table ``[frontier.devices]``: a model of the devices on which the large run trains."""

    counts: tuple[Count, ...] = (1, 2, 4, 8, 16, 32, 64, 128)
    """Numbers of devices to give the time for."""
    flops_per_second: Amount | None = None
    """FLOP/s that one device reaches; left out, the step times measured here count."""
    bandwidth: Amount | None = None
    """Bytes per second of each device's link, for the exchange of gradients and parameters; left
    out, the exchange takes no time."""

    @pydantic.model_validator(mode="after")
    @all_faults()
    def _check(self) -> Self:
        rising = self.counts == tuple(sorted(set(self.counts))) and bool(self.counts)
        require(rising, "counts", list(self.counts), "rising numbers of devices, each once")
        return self


class FrontierTable(ComparedTable):
    """Table ``[frontier]``: what `telescope frontier` compares."""

    batch_sizes: tuple[Count, ...]
    """Sequences per step, one arm for each with every optimizer."""
    tokens: Count
    """Tokens of a run at a small batch. A batch of B tokens trains for tokens + steps · B, as on a
    curve of equal loss."""
    steps: Count
    """Steps of a run at a huge batch."""
    sequence_length: Count | None = None
    """With [trainer] only: tokens of a sequence, which else [train] says."""
    width: Width | None = None
    """Width of all models; by default the ladder's first."""
    evals: Annotated[int, Field(ge=2, le=1000)] = 20
    """Measurements of the held-out loss in a run, evenly spaced; the last one is at the end."""
    trials: Annotated[int, Field(ge=1, le=1000)] = 12
    """Most trials that tune one arm, the same for every optimizer."""
    repeats: Annotated[int, Field(ge=1, le=100)] = 3
    """Seeds with which each arm's chosen point is trained."""
    losses: tuple[Amount, ...] = ()
    """Held-out losses to reach, nats per token; by default the lowest that all arms reach, and two
    above it."""
    devices: DevicesTable | None = None
    """The devices of the large run; left out, as fast as this machine."""

    @pydantic.model_validator(mode="after")
    @all_faults()
    def _check(self) -> Self:
        for key in ("batch_sizes", "optimizers", "losses"):
            values = getattr(self, key)
            require(len(set(values)) == len(values), key, list(values), "each once")
        for key in ("batch_sizes", "optimizers"):
            require(bool(getattr(self, key)), key, list(getattr(self, key)), "one or more")
        return self
