"""A stand-in for the package wandb, copied under that name; it writes down each call.

FAKE_DOES says what `init` does besides: "fail", "hang", "exit", "once" (fails the first time),
"slow" (takes a tenth of a second).
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

CALLS = Path(os.environ.get("FAKE_CALLS", "/dev/null"))


def _note(call: str, run: str, **given: Any) -> None:
    with CALLS.open("a") as file:
        file.write(json.dumps({"call": call, "run": run, "time": time.time(), **given}) + "\n")


class Run:
    """A run."""

    def __init__(self, id: str) -> None:
        """Begin."""
        self.id = id
        self.summary: dict[str, Any] = {}

    def log(self, data: dict[str, Any], step: int) -> None:
        """Write down a row; pictures by name."""
        plain = {k: v if isinstance(v, float) else str(v) for k, v in data.items()}
        _note("log", self.id, step=step, data=plain)

    def log_artifact(self, artifact: Artifact) -> None:
        """Write down the files."""
        _note("artifact", self.id, name=artifact.name, files=artifact.files)

    def mark_preempting(self) -> None:
        """Write it down."""
        _note("preempting", self.id)

    def finish(self, exit_code: int = 0) -> None:
        """Write down the summary."""
        _note("finish", self.id, code=exit_code, summary=self.summary)


class Artifact:
    """An artifact."""

    def __init__(self, name: str, type: str) -> None:
        """Begin without files."""
        self.name, self.type = name, type
        self.files: list[str] = []

    def add_file(self, path: str) -> None:
        """Add one."""
        assert Path(path).is_file()
        self.files.append(Path(path).name)


class Settings:
    """Settings."""

    def __init__(self, **given: Any) -> None:
        """Take any."""
        self.mode, self.base_url, self.entity = "online", "https://example.org", "us"
        self.project = None


def setup(settings: Settings) -> SimpleNamespace:
    """Return the settings."""
    return SimpleNamespace(settings=settings)


def Image(path: str) -> str:
    """Return a picture's name."""
    return Path(path).name


def init(*, id: str, **given: Any) -> Run:
    """Start a run, or do what FAKE_DOES says."""
    does = os.environ.get("FAKE_DOES", "")
    first = not CALLS.exists()
    _note("init", id, **{k: v for k, v in given.items() if k not in ("settings", "dir")})
    if does == "fail" or (does == "once" and first):
        raise OSError("no route to host")
    if does == "hang":
        time.sleep(3600)
    if does == "exit":
        os._exit(3)
    if does == "slow":
        time.sleep(0.1)
    return Run(id)
