"""The results folder of one sweep: its files, its lock, and the driver's heartbeat.

It uses only the standard library, because `status` and `ls` read it and must start at once.

    results/<name>/
        spec.json      the resolved spec, its fingerprint, versions
        model.py       the model file as it was run
        trials.db      every result (Optuna on SQLite), unless --storage names another place
        trials.csv     the same as a table
        curves/        one CSV per trial
        scaling/       the runs of `telescope scaling`, and its answer: scaling.json, scaling.png
        frontier/      the arms of `telescope frontier`, and its answer: answer.json, frontier.png
        packs.jsonl    the packs (trials trained as one model), if any, and how they were decided
        unstored.json  results of a pack, while they are stored one by one
        logs/          the output of each trial of a foreign trainer
        trials/        a folder per trial, where a foreign trainer asks for it
        checkpoints/   checkpoints of running trials, where the spec asks for them
        rows/          rows of running trials' curves, where the spec names trackers
        trackers/      log and ledger of each tracker
        tensorboard/   TensorBoard's event files
        wandb/         wandb's own files
        loss.png       optimum against width, and excess loss per width with the fit
        report.html    the page that `telescope report` writes
        coordcheck.json, coordcheck.png    the verdict of the coordinate check, and its figure
        status.json    the driver's heartbeat
        fits.json      cached decisions of the fits, by their content; can be deleted
        lock           held by the running driver
"""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import NoneType
from typing import Any, TextIO

from telescope.dispatch.packs import Timing, timing
from telescope.errors import ResumeError
from telescope.files import (
    is_locked,
    lock_file,
    remove_unfinished,
    this_process,
    write_atomic,
    write_json,
)
from telescope.records import CURVE_COLUMNS, CurvePoint, Result, Trial
from telescope.spec.catalog import KEPT_MODEL_FILE, SPEC_FILE

FORMAT = 1
"""Version of the results folder's format; a higher one was written by a newer telescope."""
RECORD: dict[str, Any] = {
    "spec": dict,
    "fingerprint": str,
    "comparable_if_equal": dict,
    "storage": (str, NoneType),
    "target_flops": (int, float),
}
"""Required keys of `spec.json`, with their types."""
DATABASE_FILE = "trials.db"
MEMORY_FILE = "fits.json"
CHECK_FILE = "coordcheck.json"
CHECK_FIGURE_FILE = "coordcheck.png"
STATUS_FILE = "status.json"
PACKS_FILE = "packs.jsonl"
UNSTORED_FILE = "unstored.json"
LOCK_FILE = "lock"
TRIES = 25
"""Number of tries to lock a folder that other drivers remove meanwhile."""


class Folder:
    """One sweep's results folder."""

    def __init__(self, path: Path) -> None:
        """Remember the path; nothing is created before `create`."""
        self.path = path

    @property
    def exists(self) -> bool:
        """True if a sweep has been started here."""
        return (self.path / SPEC_FILE).is_file()

    def create(self) -> None:
        """Create the folder and its parents.

        Raises:
            ResumeError: it cannot be created.
        """
        try:
            (self.path / "curves").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ResumeError(f"--results {self.path}: cannot be made: {error.strerror}") from error

    def read_spec(self) -> dict[str, Any]:
        """Return the record written by `write_spec`.

        Raises:
            ResumeError: the file is missing or damaged.
        """
        try:
            data: dict[str, Any] = json.loads((self.path / SPEC_FILE).read_text(encoding="utf-8"))
            for key, types in RECORD.items():
                if key not in data or not isinstance(data[key], types):
                    raise ValueError(f"{key} is missing or of another type")
            _check_format(data, self.path / SPEC_FILE)
            return data
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise ResumeError(
                f"{self.path / SPEC_FILE}: cannot be read: {error}; restore the file, or run the "
                "sweep under another --name"
            ) from error

    def write_spec(self, data: Mapping[str, Any], model_text: str | None) -> None:
        """Write the sweep's resolved spec, and its model file if it has one."""
        if model_text is not None:
            write_atomic(self.path / KEPT_MODEL_FILE, model_text)
        write_json(self.path / SPEC_FILE, {"format": FORMAT, **data})

    @property
    def memory_file(self) -> Path:
        """The file with cached decisions of this sweep's fits, so that no command repeats them."""
        return self.path / MEMORY_FILE

    @property
    def logs(self) -> Path:
        """The folder with the output of a foreign trainer's trials."""
        return self.path / "logs"

    @property
    def rows(self) -> Path:
        """The folder with the rows of running trials; there only while trackers follow them."""
        return self.path / "rows"

    @property
    def trial_folders(self) -> Path:
        """The folder with one folder per foreign trial that asks for it; never removed."""
        return self.path / "trials"

    @property
    def checkpoints(self) -> Path:
        """The folder with the checkpoints of running trials, each in a folder of its name."""
        return self.path / "checkpoints"

    def remove_checkpoints(self, trial: Trial) -> None:
        """Remove the checkpoints of a trial that has ended."""
        shutil.rmtree(self.checkpoints / str(trial), ignore_errors=True)

    def tidy(self, ended: Iterable[Trial]) -> None:
        """Remove half-written files and checkpoints of ended trials that a killed driver left.

        Only the driver that holds the folder may call this.
        """
        remove_unfinished(self.path)
        remove_unfinished(self.path / "curves")
        for trial in ended:
            self.remove_checkpoints(trial)
        with suppress(OSError):  # not empty while trials have not ended
            self.checkpoints.rmdir()

    def write_check(self, check: Mapping[str, Any]) -> None:
        """Write the verdict of the coordinate check; a null verdict has the reason with it."""
        write_json(self.path / CHECK_FILE, check)

    def read_check(self) -> dict[str, Any] | None:
        """Return the record written by `write_check`; None if there was no check."""
        return _read_json(self.path / CHECK_FILE, "verdict")

    def write_curve(self, result: Result) -> None:
        """Write one trial's training curve as a CSV file."""
        text = io.StringIO()
        names = list(dict.fromkeys(name for row in result.curve for name in row.diagnostics))
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow((*CURVE_COLUMNS, *names))
        rows.writerows(
            (row.step, row.train_loss, row.held_out_loss, *map(row.diagnostics.get, names))
            for row in result.curve
        )
        write_atomic(self.path / "curves" / f"{result.trial}.csv", text.getvalue(), durable=False)

    def read_curve(self, trial: Trial) -> tuple[CurvePoint, ...]:
        """Return the curve that `write_curve` wrote for a trial; empty if it cannot be read."""
        path = self.path / "curves" / f"{trial}.csv"
        try:
            rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))
            return tuple(
                CurvePoint(
                    int(row["step"]),
                    _number(row["train_loss"]),
                    _number(row["held_out_loss"]),
                    {n: float(v) for n, v in row.items() if n not in CURVE_COLUMNS and v},
                )
                for row in rows
            )
        except (OSError, ValueError, KeyError, TypeError, csv.Error):
            return ()

    def note_pack(self, line: Mapping[str, Any]) -> None:
        """Append a decision about packs to the log, before it is carried out."""
        data = json.dumps(line).encode()
        with (self.path / PACKS_FILE).open("ab+") as file:
            if size := file.tell():
                file.seek(size - 1)
                if file.read() != b"\n":  # a kill has cut off the line before
                    data = b"\n" + data
            file.write(data + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def packs(self) -> list[dict[str, Any]]:
        """Return the decisions about packs, in order, without lines that were cut off."""
        try:
            text = (self.path / PACKS_FILE).read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return []
        found = []
        for line in text.splitlines():
            with suppress(ValueError):
                found.append(json.loads(line))
        return [line for line in found if isinstance(line, dict)]

    def timing(self) -> Timing:
        """Return the trials that ended in packs, and the step times of single trials in probes."""
        return timing(self.packs())

    def write_unstored(self, results: Iterable[Result]) -> None:
        """Write the results of a pack to a file while they are stored one by one."""
        write_json(self.path / UNSTORED_FILE, [result.as_dict() for result in results])

    def unstored(self) -> list[Result]:
        """Return all results of a pack whose storing was interrupted, stored or not.

        Raises:
            ResumeError: the file is damaged.
        """
        path = self.path / UNSTORED_FILE
        try:
            return [Result.from_dict(row) for row in json.loads(path.read_text(encoding="utf-8"))]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise ResumeError(
                f"{path}: cannot be read: {error}; remove it, and its trials are trained again"
            ) from error

    def remove_unstored(self) -> None:
        """Remove the file of `write_unstored`, once all results are stored."""
        (self.path / UNSTORED_FILE).unlink(missing_ok=True)

    def write_status(self, heartbeat: Mapping[str, Any]) -> None:
        """Write the sweep's progress, for `status` in another process."""
        write_json(self.path / STATUS_FILE, heartbeat, durable=False)

    def read_status(self) -> dict[str, Any] | None:
        """Return the last heartbeat, "interrupted" if its driver is gone; None before the first."""
        heartbeat = _read_json(self.path / STATUS_FILE, "state")
        if heartbeat and heartbeat["state"] == "running" and not is_locked(self.path / LOCK_FILE):
            heartbeat |= {"state": "interrupted", "running": 0, "eta_seconds": None}
        return heartbeat

    @contextmanager
    def held(self) -> Iterator[None]:
        """Create the folder and lock it for one driver; the lock ends with the process.

        A folder in which no sweep has been started by the end is removed again.

        Raises:
            ResumeError: another process holds it, or it cannot be created.
        """
        with self._open_lock() as lock:
            lock.truncate(0)
            lock.write(this_process())
            lock.flush()
            try:
                yield
            finally:
                if not self.exists:
                    self._remove_if_empty()

    def _open_lock(self) -> TextIO:
        """Create the folder and take its lock; closing the file releases it.

        A driver that ends removes an empty folder with its lock file. A process that was waiting
        then has locked a deleted file; it must begin again, or two could hold the folder.
        """
        for _ in range(TRIES):
            self.create()
            try:
                lock = (self.path / LOCK_FILE).open("a+")
            except FileNotFoundError:  # removed in the meantime
                continue
            if not lock_file(lock):
                with lock:
                    lock.seek(0)
                    holder = lock.read().strip() or "another process"
                raise ResumeError(
                    f"{self.path}: in use by {holder}; wait for it, or use --name for another sweep"
                )
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock.fileno()), (self.path / LOCK_FILE).stat()):
                    self.create()  # folders that the driver before removed
                    return lock
            lock.close()
        raise ResumeError(f"{self.path}: other drivers keep creating and removing it; try again")

    def _remove_if_empty(self) -> None:
        """Remove what `_open_lock` created, and nothing else.

        The lock goes last, because without it another driver may take the folder.
        """
        with suppress(OSError):
            (self.path / "curves").rmdir()
        (self.path / LOCK_FILE).unlink(missing_ok=True)
        with suppress(OSError):
            self.path.rmdir()


def _check_format(record: Mapping[str, Any], path: Path) -> None:
    """Refuse a folder written by a newer version, whose meaning this one cannot know."""
    found = record.get("format", FORMAT)
    if not isinstance(found, int) or found > FORMAT:
        raise ResumeError(
            f"{path}: format {found!r}, this version of telescope reads up to {FORMAT}; use the "
            "version that wrote it"
        )


def _number(cell: str) -> float | None:
    """Convert a cell of a curve; None if it is empty."""
    return float(cell) if cell else None


def _read_json(path: Path, key: str) -> dict[str, Any] | None:
    """Read a small JSON file with a table that has `key`; None if it is missing or damaged."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) and key in data else None
