"""The built-in trainer with packs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from telescope.packs.fused import obstacle, train_pack
from telescope.packs.probe import PackProbe, pack_probe
from telescope.records import Result, Trial
from telescope.train.device import resolve_device
from telescope.train.loop import TelescopeTrainer


@dataclass(frozen=True)
class PackedTrainer(TelescopeTrainer):
    """Trains trials one by one, or those of one width as one stacked model. Picklable."""

    def train_pack(self, trials: Sequence[Trial]) -> Iterator[Result]:
        """Train trials of one width as one; see `fused.train_pack`."""
        return train_pack(self.config, trials)

    def obstacle(self, trial: Trial) -> str:
        """Say why trials like this one cannot train as one; see `fused.obstacle`."""
        return obstacle(self.config, trial)

    def probe_pack(self, trials: Sequence[Trial]) -> PackProbe | None:
        """Measure a pack, see `probe.pack_probe`; None on a CPU, where packs gain little."""
        if torch.device(resolve_device(self.config.device)).type == "cpu":
            return None
        return pack_probe(self.config, trials)
