"""Rows of a running trial, read from the files that it writes.

rows/TRIAL.jsonl            of the built-in trainer: one JSON object per row
logs/TRIAL.out, TRIAL.log   output of another trainer, whose JSON lines with a step are rows
curve.csv                   of a target run, replaced as a whole
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from telescope.foreign.outcome import curve_point, parse_line
from telescope.log.records import Row

MOST_BYTES = 1 << 18
"""Bytes of a file read at one look."""
MOST_BEHIND = 1 << 22
"""Bytes of a file beyond which a look skips to its end: the whole curve comes with the result."""
MOST_ROWS = 100
"""Most rows of a run taken from one look, evenly spaced."""
RENAMED = {"loss": "train_loss", "val_loss": "held_out_loss"}
"""Columns of a target run's curve → their names in a trial's."""


class Follower:
    """Reads the new rows of one run from the first of its files that exists.

    The newest row is held back until another one follows: it may be the trial's last word, which
    only the result interprets, or lack a number that its trainer still measures.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        """Remember the files; none need exist."""
        self._paths = [Path(path) for path in paths]
        self._offset = 0
        self._last: Row | None = None
        self._table: tuple[int, int] | None = None  # time and size of a table that was read

    def look(self, after: int) -> list[Row]:
        """Return new rows beyond a step, in rising order."""
        with suppress(OSError):
            path = next((path for path in self._paths if path.is_file()), None)
            if path is None:
                return []
            rows = self._of_table(path) if path.suffix == ".csv" else self._of_lines(path)
            return _thinned(rising(rows, after))
        return []

    def _of_table(self, path: Path) -> list[Row]:
        now = path.stat()
        stamp = now.st_mtime_ns, now.st_size
        if stamp == self._table:
            return []
        self._table = stamp
        return read_curve(path)[:-1]

    def _of_lines(self, path: Path) -> list[Row]:
        with path.open("rb") as file:
            size = file.seek(0, io.SEEK_END)
            if size < self._offset:  # begun again
                self._offset, self._last = 0, None
            start = self._offset if size - self._offset <= MOST_BEHIND else size - MOST_BYTES
            file.seek(start)
            text = file.read(MOST_BYTES)
        whole = max(text.rfind(b"\n"), text.rfind(b"\r")) + 1
        if not whole and len(text) == MOST_BYTES:  # a line that is too long to be a row
            whole = len(text)
        self._offset = start + whole
        read = _own_row if path.suffix == ".jsonl" else _foreign_row
        found = [row for line in re.split(rb"[\r\n]+", text[:whole]) if (row := read(line))]
        held = [self._last] if self._last and found else []
        self._last = found[-1] if found else self._last
        return [*held, *found[:-1]]


def _own_row(line: bytes) -> Row | None:
    """Return a row that the built-in trainer has written."""
    try:
        said = json.loads(line)
        return Row(said.pop("step"), _numbers(said))
    except (ValueError, KeyError, AttributeError):  # cut off by a kill
        return None


def _foreign_row(line: bytes) -> Row | None:
    """Return a row that another trainer has printed."""
    said = parse_line(line)
    row = curve_point(said) if said else None
    if row is None:
        return None
    losses = {"train_loss": row.train_loss, "held_out_loss": row.held_out_loss}
    return Row(row.step, _numbers(losses))


def _numbers(said: Mapping[str, Any]) -> dict[str, float]:
    """Return the finite numbers of a mapping."""
    return {
        str(name): float(value)
        for name, value in said.items()
        if isinstance(value, (int, float)) and math.isfinite(value)
    }


def rising(rows: Iterable[Row], after: int) -> list[Row]:
    """Return the rows beyond a step and beyond every row before; rows without numbers are none."""
    found = []
    for row in rows:
        if row.step > after and row.numbers:
            found.append(row)
            after = row.step
    return found


def _thinned(rows: list[Row]) -> list[Row]:
    """Return at most `MOST_ROWS` rows, evenly spaced, the last one among them."""
    every = -(-len(rows) // MOST_ROWS) or 1
    return rows[::-1][::every][::-1]


def read_curve(path: Path) -> list[Row]:
    """Return the rows of a curve's file, a trial's or a target run's; none if it is unreadable.

    Of a target run, with the tokens per second since the row before.
    """
    try:
        lines = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))
        rows = [
            Row(int(line.pop("step")), {RENAMED.get(n, n): float(v) for n, v in line.items() if v})
            for line in lines
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, csv.Error):
        return []
    return _with_speed(rows) if "tokens" in next((row.numbers for row in rows), {}) else rows


def _with_speed(rows: list[Row]) -> list[Row]:
    """Add the tokens per second since the row before; a start from a checkpoint goes on in time."""
    found, before = [], {"tokens": 0.0, "seconds": 0.0}
    for row in rows:
        now = dict(row.numbers)
        took = now.get("seconds", 0.0) - before.get("seconds", 0.0)
        if took > 0:
            now["tokens_per_second"] = (now["tokens"] - before["tokens"]) / took
        found.append(Row(row.step, now))
        before = now
    return found
