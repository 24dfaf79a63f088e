"""The folder of one target run; standard library only, because `status` reads it.

results/<sweep>/target/<run>/
    run.json       all that the losses depend on; written once, before the first step
    curve.csv      step, tokens, loss, val_loss, lr, seconds
    status.json    the latest step, its loss and speed
    checkpoints/   step-N/: model.safetensors, optimizer-R-of-N.safetensors, state.json
    result.json    the end: the held-out loss, or that it diverged
    lock           held by whoever has launched it
    writer.lock    held by the rank that writes
"""

from __future__ import annotations

import csv
import io
import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from telescope.errors import ResumeError
from telescope.files import is_locked, lock_file, this_process, write_atomic, write_json
from telescope.losses import as_number

TARGETS = "target"
"""Folder of all target runs in a sweep's folder."""
RUN_FILE = "run.json"
CURVE_FILE = "curve.csv"
STATUS_FILE = "status.json"
RESULT_FILE = "result.json"
LOCK_FILE = "lock"
WRITER_FILE = "writer.lock"
WRITER_SECONDS = 30.0
"""Seconds to wait for an earlier start's writer, whose launcher was killed."""
CURVE_COLUMNS = ("step", "tokens", "loss", "val_loss", "lr", "seconds")


class RunFolder:
    """The files of one target run."""

    def __init__(self, path: Path) -> None:
        """Remember the path; nothing is created."""
        self.path = path

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    def read_run(self) -> dict[str, Any] | None:
        """Return the content of `run.json`; None before the first launch.

        Raises:
            ResumeError: it is damaged.
        """
        path = self.path / RUN_FILE
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(data, dict):
                raise ValueError("it is no table")
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise ResumeError(
                f"{path}: cannot be read: {error}; restore it, or launch under another --run"
            ) from error
        return data

    def write_run(self, data: Mapping[str, Any]) -> None:
        """Write `run.json`, once."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / RUN_FILE, data)

    def write_curve(self, rows: Iterable[tuple[Any, ...]]) -> None:
        """Replace the curve by these rows of `CURVE_COLUMNS`; None is an empty cell."""
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(CURVE_COLUMNS)
        table.writerows(rows)
        write_atomic(self.path / CURVE_FILE, text.getvalue(), durable=False)

    def write_status(self, status: Mapping[str, Any]) -> None:
        """Replace the latest progress."""
        write_json(self.path / STATUS_FILE, {**status, "time": time.time()}, durable=False)

    def read_status(self) -> dict[str, Any]:
        """Return the latest progress; empty before the first step."""
        return _read(self.path / STATUS_FILE)

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Write the end of the run."""
        write_json(self.path / RESULT_FILE, result)

    def read_result(self) -> dict[str, Any]:
        """Return the end of the run; empty before it."""
        return _read(self.path / RESULT_FILE)

    @property
    def state(self) -> str:
        """One of finished, diverged, running, interrupted, and prepared before the first start."""
        if result := self.read_result():
            return "diverged" if result.get("diverged") else "finished"
        if is_locked(self.path / LOCK_FILE):
            return "running"
        return "interrupted" if (self.path / STATUS_FILE).exists() else "prepared"

    @contextmanager
    def held(self) -> Iterator[None]:
        """Lock the folder for one launcher; the lock ends with the process.

        Raises:
            ResumeError: another process holds it.
        """
        with self._locked(LOCK_FILE, seconds=0.5):
            yield

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Lock the files for one writer.

        Raises:
            ResumeError: an earlier start's writer does not end.
        """
        with self._locked(WRITER_FILE, seconds=WRITER_SECONDS):
            yield

    @contextmanager
    def _locked(self, name: str, *, seconds: float) -> Iterator[None]:
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / name).open("a+") as lock:
            if not lock_file(lock, tries=int(seconds / 0.02)):
                lock.seek(0)
                holder = lock.read().strip() or "another process"
                raise ResumeError(
                    f"{self.path}: in use by {holder}; wait for it, or launch under another --run"
                )
            lock.truncate(0)
            lock.write(this_process())
            lock.flush()
            yield


def runs_of(sweep: Path) -> list[RunFolder]:
    """Return the target runs in a sweep's folder, sorted by name."""
    return [RunFolder(path.parent) for path in sorted(sweep.glob(f"{TARGETS}/*/{RUN_FILE}"))]


def ends_of(sweep: Path) -> list[dict[str, Any]]:
    """Return the ends of a sweep's target runs, sorted by name.

    Returns:
        The content of each `result.json`, with the run's name as "run"; "loss" is a finite number,
        or None of a run that diverged.

    Raises:
        ResumeError: a file is damaged.
    """
    return [_read_end(path) for path in sorted(sweep.glob(f"{TARGETS}/*/{RESULT_FILE}"))]


def _read_end(path: Path) -> dict[str, Any]:
    """Read the end of one run; another trainer may not tell its steps."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        width, steps, diverged = (data[key] for key in ("width", "steps", "diverged"))
        if type(width) is not int or type(steps) not in (int, type(None)):
            raise ValueError("width or steps is no integer")
        loss = None if diverged else as_number(data["loss"])
        if not diverged and (loss is None or not math.isfinite(loss)):
            raise ValueError(f"loss is {data['loss']!r}, must be a finite number")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ResumeError(
            f"{path}: cannot be read: {type(error).__name__}: {error}; restore it, or move its "
            "folder away"
        ) from error
    return {**data, "run": path.parent.name, "loss": loss}


def summary(run: RunFolder) -> dict[str, Any]:
    """Return a run in the keys of `status --json`; what is not known is None."""
    state, said = run.state, run.read_result() or run.read_status()
    record = _read(run.path / RUN_FILE)
    keys = ("step", "loss", "tokens_per_second", "mfu", "eta_seconds", "seconds")
    is_idle = state in ("interrupted", "prepared")
    return {
        "run": run.path.name,
        "state": state,
        "width": record.get("width"),
        "steps": record.get("steps"),
        **{key: said.get(key) for key in keys},
        **(dict.fromkeys(("tokens_per_second", "mfu", "eta_seconds")) if is_idle else {}),
    }


def describe_run(summary: Mapping[str, Any]) -> str:
    """Describe a run in one line."""
    line = f"target {summary['run']}: {summary['state']}"
    loss = "" if summary["loss"] is None else f", loss {summary['loss']:.4f}"
    if summary["state"] == "finished":
        after = f" after {summary['step']} steps" if summary["step"] else ""
        return f"{line}{loss} (held-out){after}"
    if summary["state"] == "diverged":
        return f"{line} at step {summary['step']} of {summary['steps']}"
    if summary["step"] is None:
        return f"{line}; `telescope launch` starts it"
    line += f", {describe_progress(summary)}"
    if summary["state"] == "interrupted":
        return f"{line}; the same `telescope launch` goes on"
    return line


def describe_progress(status: Mapping[str, Any]) -> str:
    """Describe step, loss, speed and time left; what is not known is left out."""
    text = f"step {status['step']}" + (f" of {status['steps']}" if status["steps"] else "")
    if status["loss"] is not None:
        text += f", loss {status['loss']:.4f}"
    if status.get("tokens_per_second"):
        text += f", {status['tokens_per_second']:,.0f} tokens/s"
    if status.get("mfu"):
        text += f", MFU {status['mfu']:.1%}"
    if status.get("eta_seconds") is not None:
        text += f", time left about {status['eta_seconds']:.0f} s"
    return text


def _read(path: Path) -> dict[str, Any]:
    """Return a table of JSON; empty if it is missing or damaged."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}
