"""The interface of a tracker, and the one that a name stands for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from telescope.log.records import End, Row, Run


class Tracker(Protocol):
    """One tracker's library, in a process of its own; every method may raise or take long.

    A run is opened before anything else is done with it, in this process.
    """

    destination: str
    """Name of where it writes; another one has a ledger of its own."""

    def holds(self, run: Run) -> bool:
        """Tell whether a run that was delivered is still there, as far as is easy to see."""
        ...

    def open(self, run: Run, after: int) -> None:
        """Start a run, or go on with it after a step; -1: from its beginning."""
        ...

    def add(self, run: Run, rows: Sequence[Row]) -> None:
        """Add rows, in rising order of their steps."""
        ...

    def end(self, run: Run, end: End, step: int) -> None:
        """Give a run its end, and return once that is delivered.

        Args:
            run: the run.
            end: its end; its rows have been added.
            step: its last step.
        """
        ...

    def leave(self, run: Run) -> None:
        """Leave a run that was interrupted and may go on later."""
        ...


def make_tracker(name: str, folder: Path, sweep: str) -> Tracker:
    """Import a tracker's library, and connect to it.

    Args:
        name: its name in ``[log] to``.
        folder: the sweep's results folder.
        sweep: the sweep's name.
    """
    if name == "tensorboard":
        from telescope.log.to_tensorboard import TensorBoard

        return TensorBoard(folder)
    if name == "wandb":
        from telescope.log.to_wandb import WandB

        return WandB(folder)
    if name == "mlflow":
        from telescope.log.to_mlflow import MLflow

        return MLflow(sweep)
    from telescope.log.to_trackio import Trackio

    return Trackio(sweep)
