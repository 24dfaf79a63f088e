"""What a trial of another trainer is told."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from telescope.foreign.outcome import Prices
from telescope.records import Trial


@dataclass(frozen=True)
class Place:
    """What a trial is told besides its own content, and where it may write."""

    base_width: int
    trial_folders: str
    """Where each trial has a folder of its own, made when it is asked for."""
    steps: int | None = None
    prices: Prices = field(default_factory=Prices)

    def values(self, trial: Trial) -> dict[str, object]:
        """Name → value of all that can be said of a trial."""
        steps = {} if self.steps is None else {"steps": self.steps}
        return {
            "width": trial.width,
            "seed": trial.seed,
            **trial.point,
            "base_width": self.base_width,
            "trial_folder": str(Path(self.trial_folders, str(trial))),
            "python": sys.executable,
            **steps,
        }
