"""The ledger of what a tracker has been given, kept beside the results.

By it a run goes on where its tracker's record ends, in this process or a later one, and nothing is
logged twice. A line is written after its delivery: a kill between the two repeats the rows of one
look at most, under the same steps.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from telescope.files import write_atomic

SPARE = 10_000
"""Lines of the file beyond one per run after which it is written anew."""


class Ledger:
    """Run → the last step delivered, and the digest of its end if that has been delivered."""

    def __init__(self, folder: Path, name: str, destination: str) -> None:
        """Read the ledger of one tracker and destination, in the folder of all ledgers."""
        key = hashlib.sha256(destination.encode()).hexdigest()[:8]
        self._path = folder / f"{name}-{key}.jsonl"
        self._steps: dict[str, int] = {}
        self._ends: dict[str, str] = {}
        self._lines = 0
        with suppress(FileNotFoundError):
            for line in self._path.read_text(encoding="utf-8", errors="replace").splitlines():
                with suppress(ValueError, KeyError, TypeError, AttributeError):
                    self._take(json.loads(line))
        self._rewrite()

    def _take(self, entry: dict[str, Any]) -> None:
        run, step = str(entry["run"]), int(entry["step"])
        self._steps[run] = step
        self._ends.pop(run, None)
        if end := entry.get("end"):
            self._ends[run] = str(end)

    def knows(self, run: str) -> bool:
        """Tell whether anything of a run has been delivered."""
        return run in self._steps

    def step(self, run: str) -> int:
        """Return the last step delivered, -1 before the first."""
        return self._steps.get(run, -1)

    def end(self, run: str) -> str:
        """Return the digest of the end that has been delivered, or ""."""
        return self._ends.get(run, "")

    def forget(self, run: str) -> None:
        """Forget what has been delivered of a run: it is no longer at its destination."""
        self._steps.pop(run, None)
        self._ends.pop(run, None)

    def note(self, run: str, step: int, end: str = "") -> None:
        """Write down what has been delivered of a run."""
        entry = _entry(run, step, end)
        self._take(entry)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        self._lines += 1
        if self._lines > SPARE + len(self._steps):
            self._rewrite()

    def _rewrite(self) -> None:
        """Write the file with one line per run, which also mends a line that a kill has cut off."""
        entries = [_entry(run, step, self.end(run)) for run, step in self._steps.items()]
        write_atomic(self._path, "".join(json.dumps(entry) + "\n" for entry in entries))
        self._lines = len(entries)


def _entry(run: str, step: int, end: str) -> dict[str, Any]:
    return {"run": run, "step": step} | ({"end": end} if end else {})
