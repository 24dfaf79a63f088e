"""Repositories of a test with a `train` function, called as a sweep calls it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conftest import attempt

from telescope.foreign.function import FunctionTrainer
from telescope.foreign.place import Place
from telescope.records import Point, Result, Trial

TRIAL = Trial(32, Point.of(lr=0.1, weight_decay=0.25), 3)


def place(folder: Path, **known: Any) -> Place:
    """Return a trial's `Place`, with the trials' folders under `folder`."""
    return Place(base_width=16, trial_folders=str(folder / "trials"), **known)


def repository(folder: Path, files: Mapping[str, str], **changed: str) -> str:
    """Write files, by their paths in the folder; returns the folder."""
    for name, text in {**files, **changed}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return str(folder)


def function(folder: Path, text: str, trial: Trial = TRIAL) -> Result:
    """Train one trial with the function `train` of this text."""
    repository(folder, {"training.py": text})
    return attempt(FunctionTrainer("training:train", (str(folder),), place(folder)), trial)
