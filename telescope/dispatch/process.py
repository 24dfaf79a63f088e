"""Care for a process that trains: keep its output, end it if it hangs or has lost its device."""

from __future__ import annotations

import faulthandler
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from telescope.dispatch.queue import LOG_TAIL_LINES
from telescope.errors import LostError
from telescope.records import Trial

HANG_GRACE = 10.0
"""Seconds after a trial's time limit until its process is ended, if it cannot be interrupted."""
HANG_TITLE = "Timeout ("
"""Beginning of faulthandler's output for a process that it ends."""


def end_lost(error: LostError) -> NoReturn:
    """End this process, which has lost its device; a new process can use it again.

    It ends at once, because cleaning up would call the device. The driver finds the reason in the
    log.
    """
    sys.stderr.write(f"{error}\n")
    sys.stderr.flush()
    os._exit(1)


@contextmanager
def logged(folder: Path, trial: Trial) -> Iterator[None]:
    """Send a trial's output to a file of its own, so that it is kept if the process is killed.

    Other machines than the driver's lack the folder; there the output is in Ray's own logs.
    """
    if not folder.is_dir():
        yield
        return
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    with (folder / f"{trial}.log").open("wb") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in enumerate(kept, 1):
            os.dup2(copy, number)
            os.close(copy)


@contextmanager
def ended_if_hung(timeout: float) -> Iterator[None]:
    """End this process if the code inside runs long after its time limit, as when it hangs in C."""
    if not timeout:
        yield
        return
    faulthandler.dump_traceback_later(timeout + HANG_GRACE, exit=True, file=2)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def log_tail(folder: Path, trial: Trial) -> list[str]:
    """Return the last lines of a trial's output; none if its log is on another machine."""
    try:
        text = (folder / f"{trial}.log").read_text(encoding="utf-8", errors="backslashreplace")
    except OSError:
        return []
    lines = text.strip().splitlines()
    threads = [number for number, line in enumerate(lines) if "most recent call first" in line]
    if threads and HANG_TITLE in text:  # the main thread comes last, its innermost call first
        title = next(line for line in lines if line.startswith(HANG_TITLE))
        return [title, *lines[threads[-1] :][:LOG_TAIL_LINES]]
    return lines[-LOG_TAIL_LINES:]
