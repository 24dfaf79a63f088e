"""TensorBoard: event files in ``tensorboard/STAGE/RUN`` of the results folder."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tensorboardX import SummaryWriter

from telescope.log.records import End, Row, Run

FOLDER = "tensorboard"
"""Folder of the event files in a results folder; `tensorboard --logdir` takes it."""


class TensorBoard:
    """Writes event files with tensorboardX."""

    def __init__(self, folder: Path) -> None:
        """Remember the folder; it is made with the first run."""
        self.destination = FOLDER  # moves with the results
        self._folder = folder / FOLDER
        self._writers: dict[str, SummaryWriter] = {}
        self._opened = 0

    def _path(self, run: Run) -> Path:
        return self._folder / run.stage / run.name

    def holds(self, run: Run) -> bool:
        """Tell whether there is an event file of the run."""
        return any(self._path(run).glob("events.*"))

    def open(self, run: Run, after: int) -> None:
        """Open another event file, which hides earlier rows beyond `after`."""
        purge = after + 1 if after >= 0 else None
        # Without a suffix, two writers of one second would share, and spoil, one file.
        self._opened += 1
        writer = SummaryWriter(
            str(self._path(run)),
            purge_step=purge,
            filename_suffix=f".{os.getpid()}.{self._opened}",
        )
        self._writers[run.id] = writer
        if after < 0:
            config = "\n".join(f"| {key} | {value} |" for key, value in run.config.items())
            writer.add_text("config", f"| key | value |\n|---|---|\n{config}", 0)
            writer.flush()

    def add(self, run: Run, rows: Sequence[Row]) -> None:
        """Add one scalar per number."""
        writer = self._writers[run.id]
        for row in rows:
            for name, value in row.numbers.items():
                writer.add_scalar(name, value, row.step)
        writer.flush()

    def end(self, run: Run, end: End, step: int) -> None:
        """Add numbers, status as text, files, and the row of the table of hyperparameters."""
        writer = self._writers.pop(run.id)
        for name, text in {"status": end.status, **end.texts}.items():
            writer.add_text(name, text, step)
        for name, path in end.files.items():
            if path.endswith(".png"):
                picture = np.asarray(Image.open(path).convert("RGB"))
                writer.add_image(name, picture, step, dataformats="HWC")
            else:
                text = json.dumps(json.loads(Path(path).read_text()), indent=2)
                writer.add_text(name, "".join(f"    {line}\n" for line in text.splitlines()), step)
        plain = {k: v if isinstance(v, (int, float)) else str(v) for k, v in run.config.items()}
        # Named "." the session lies in the run's own folder, and is no run beside it.
        writer.add_hparams({**plain, "status": end.status}, dict(end.numbers), ".", step)
        writer.close()

    def leave(self, run: Run) -> None:
        """Close the event file."""
        self._writers.pop(run.id).close()
