"""The values that a trial of a foreign trainer gets."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from telescope.foreign.outcome import Prices
from telescope.records import Trial


@dataclass(frozen=True)
class Place:
    """The values and folders that a trial gets besides its own content."""

    base_width: int
    trial_folders: str
    """Folder with one folder per trial, which is created if the trial asks for it."""
    steps: int | None = None
    prices: Prices = field(default_factory=Prices)
    arguments: Mapping[str, object] = field(default_factory=dict)
    """Name → value of everything that is the same for all trials."""

    def values(self, trial: Trial) -> dict[str, object]:
        """Return name → value of everything that a trainer can be told about a trial."""
        steps = {} if self.steps is None else {"steps": self.steps}
        return {
            "width": trial.width,
            "seed": trial.seed,
            **trial.point,
            **self.arguments,
            "base_width": self.base_width,
            "trial_folder": str(Path(self.trial_folders, str(trial))),
            "python": sys.executable,
            **steps,
        }
