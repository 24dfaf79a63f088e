"""Messages to a tracker's process: the start and the end of a run, as JSON."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

Kind = Literal["trial", "summary", "target"]


class Row(NamedTuple):
    """Numbers of one step of a run."""

    step: int
    numbers: Mapping[str, float]


@dataclass(frozen=True)
class Run:
    """A run as every tracker shows it: a trial, the sweep's answer, or the target run."""

    id: str
    """16 hex digits, the same whenever the run goes on."""
    kind: Kind
    name: str
    """The name for people, unique in its stage, and fit for a file's name."""
    sweep: str
    stage: str
    """The group within the sweep: "width-32", "answer" or "target"."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Name → number or text: the point, width and seed of a trial."""


@dataclass(frozen=True)
class End:
    """The end of a run."""

    status: str
    """complete, diverged or failed; of a summary finished or stuck."""
    numbers: Mapping[str, float] = field(default_factory=dict)
    """Name → finite number; a run that has no loss has no number for it."""
    texts: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    """Name → path of a file to keep with the run."""
    rows: Sequence[Row] = ()
    curve: str | None = None
    """Path of a CSV file with the run's whole curve, instead of `rows`."""

    @property
    def digest(self) -> str:
        """Hash of what is said of the end; where it changes, the end is delivered again."""
        said = json.dumps([self.status, self.numbers, self.texts], sort_keys=True)
        return hashlib.sha256(said.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Started:
    """Message: a run has started, or goes on."""

    run: Run
    follow: tuple[str, ...] = ()
    """Paths of files that may hold its rows while it runs; see `telescope.log.rows`."""


@dataclass(frozen=True)
class Ended:
    """Message: a run has ended."""

    run: Run
    end: End


CLOSING = b"null\n"
"""The line after the last message."""


def as_line(message: Started | Ended) -> bytes:
    """Return a message as a line of JSON."""
    data = {"is": type(message).__name__, **asdict(message)}
    return json.dumps(data, allow_nan=False).encode() + b"\n"


def from_line(line: bytes) -> Started | Ended:
    """Rebuild a message from `as_line`."""
    data = json.loads(line)
    run = Run(**data["run"])
    if data["is"] == "Started":
        return Started(run, tuple(data["follow"]))
    rows = [Row(step, numbers) for step, numbers in data["end"].pop("rows")]
    return Ended(run, End(**data["end"], rows=rows))
