"""A worker that joins a running sweep by its database; the training is in a process of its own."""

from __future__ import annotations

import json
import os
import secrets
import socket
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from telescope.dispatch.joining.board import Announced
from telescope.dispatch.joining.worker import Joined, Trainee
from telescope.dispatch.packing import Packer
from telescope.dispatch.packs import Done
from telescope.dispatch.queue import THREAD_VARIABLES
from telescope.errors import ResumeError, SpecError
from telescope.files import this_machine
from telescope.report.live import describe_result
from telescope.store.board import Worker
from telescope.store.database import is_file, sqlite_url
from telescope.store.folder import Folder

LOOK_SECONDS = 1.0
"""Pause between two looks for a sweep that no driver has announced yet."""


def join(
    name: str,
    storage: str | None,
    results: Path,
    *,
    patience: float,
    note: Callable[[str], None],
) -> None:
    """Train a running sweep's trials until it ends.

    Args:
        name: the sweep's.
        storage: its database; None for the file in its results folder.
        results: the folder of all results, on this machine.
        patience: seconds to wait for a driver or a database that is away.
        note: shows a line.

    Raises:
        SpecError: no such sweep, or this machine would train something else.
        StoreError: the database cannot be reached.
        LostError: the driver stayed away too long.
        KeyboardInterrupt: as it came; what was not delivered is on offer again.
    """
    url = storage or sqlite_url(results / name)
    worker = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
    with closing(Worker(url, name, worker, patience=0.0)) as board:
        announced = _announced(board, name, patience, note)
        if announced.state == "ended":
            note(f"{name}: has ended; there is nothing to train")
            return
        record: dict[str, Any] = json.loads(announced.record)
        _check_machine(record, url, board.name)
        board.patience = patience
        with tempfile.TemporaryDirectory(prefix="telescope-worker-") as private:
            folder = _folder(record, results / name, Path(private), note)
            logs = folder.logs if record["worker_prints"] else Path(private)
            logs.mkdir(parents=True, exist_ok=True)
            # Numerical libraries read them once, when the training process loads them.
            os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(record["threads"])))
            joined = Joined(
                name,
                board,
                Trainee(partial(_packer, record, str(folder.path)), logs),
                lease=record["lease"],
                patience=patience,
                note=lambda line: note(f"{name}: {line}"),
                show=partial(_show, note),
            )
            note(f"{name}: joined as {worker}")
            joined.work()
        trials = "1 trial" if joined.trained == 1 else f"{joined.trained} trials"
        note(f"{name}: has ended; {trials} trained here")


def _packer(record: Mapping[str, Any], folder: str) -> Packer:
    """Build what trains, in the process that does; torch is loaded there alone."""
    from telescope.sweep.announcing import packer_here

    return packer_here(record, Folder(Path(folder)))


def _announced(board: Worker, name: str, patience: float, note: Callable[[str], None]) -> Announced:
    """Return the sweep, once a driver has announced it."""
    deadline, is_first = time.monotonic() + patience, True
    while (found := board.sweep()) is None:
        there = f"no sweep {name} in {board.name} (there: {', '.join(board.others()) or 'none'})"
        if time.monotonic() >= deadline:
            raise SpecError(
                f"{there}: start it: telescope run SPEC --dispatcher workers --storage URL"
            )
        if is_first:
            note(f"{there}: waiting up to {patience:g} s for its driver (--wait)")
            is_first = False
        time.sleep(LOOK_SECONDS)
    return found


def _check_machine(record: Mapping[str, Any], url: str, shown: str) -> None:
    """Refuse an SQLite file on another machine than the driver's, which share it by a network."""
    if is_file(url) and record["machine"] != this_machine():
        raise ResumeError(
            f"--storage {shown}: the driver is on another machine, and SQLite is safe for the "
            "processes of one machine only; use PostgreSQL"
        )


def _folder(
    record: Mapping[str, Any], here: Path, private: Path, note: Callable[[str], None]
) -> Folder:
    """Return where trials leave their files: the driver's folder if this machine shares it."""
    folder = Folder(here)
    if folder.exists and folder.read_spec()["fingerprint"] == record["fingerprint"]:
        return folder
    if record["model"] is None:  # another trainer's logs are worth keeping
        note(f"{here}: logs and files of the trials trained here; it is not the driver's folder")
        return folder
    if record["checkpoints"]:
        note(f"no checkpoints: {here} is not the driver's folder; --results names a shared one")
    return Folder(private)


def _show(note: Callable[[str], None], done: Done) -> None:
    """Show what was delivered."""
    for result in done.results:
        note(f"width {result.trial.width}, {describe_result(result)}")
