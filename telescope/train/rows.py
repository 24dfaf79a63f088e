"""The curve of a running trial, written for whoever follows it; the result has the whole curve."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from telescope.config import TrialConfig
from telescope.records import CurvePoint, Trial


class Rows:
    """A file with one JSON object per row: step, train_loss, held_out_loss, diagnostics."""

    def __init__(self, path: Path | None) -> None:
        """Begin the file with the first row; with no path, nothing is written."""
        self._path = path
        self._written = 0

    def update(self, curve: Sequence[CurvePoint]) -> None:
        """Write the rows that a curve has gained.

        A disk that is full ends the file, not the trial.
        """
        if self._path is None or len(curve) == self._written:
            return
        lines = [_line(row) for row in curve[self._written :]]
        try:
            with self._path.open("a" if self._written else "w", encoding="utf-8") as file:
                file.write("".join(lines))
        except OSError:
            self._path = None
        self._written = len(curve)


def _line(row: CurvePoint) -> str:
    losses = {"train_loss": row.train_loss, "held_out_loss": row.held_out_loss}
    return json.dumps({"step": row.step, **losses, **row.diagnostics}) + "\n"


def rows_of(config: TrialConfig, trial: Trial) -> Rows:
    """Return the file of a trial's rows, which is none where its folder is not.

    The folder is there while somebody follows the trials, on machines that see the results.
    """
    folder = config.row_folder and Path(config.row_folder)
    return Rows(folder / f"{trial}.jsonl" if folder and folder.is_dir() else None)
