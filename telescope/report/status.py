"""The text of `status` and `ls`, from heartbeat files; standard library only, to start at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from telescope.spec.catalog import find_result
from telescope.store.folder import Folder
from telescope.target.folder import describe_run, runs_of, summary

KEYS = ("name", "state", "stage", "done", "total", "running", "eta_seconds")


def read_status(sweep: str | Path, results: Path) -> dict[str, Any]:
    """Return the heartbeat of a sweep with the keys of `status --json`; unknown ones are None.

    Raises:
        SpecError: there is no such sweep.
    """
    folder = Folder(find_result(sweep, results))
    heartbeat = folder.read_status() or {}
    if not _is_whole(heartbeat):
        heartbeat = {"name": folder.path.name, "state": "interrupted"}
    return {**dict.fromkeys(KEYS), **heartbeat, **targets_of(folder.path)}


def targets_of(sweep: Path) -> dict[str, Any]:
    """Return the key `targets` with a sweep's target runs, if there are any."""
    runs = [summary(run) for run in runs_of(sweep)]
    return {"targets": runs} if runs else {}


def describe_targets(targets: Iterable[Mapping[str, Any]]) -> list[str]:
    """Describe target runs in a line each."""
    return [describe_run(run) for run in targets]


def _is_whole(heartbeat: dict[str, Any]) -> bool:
    """Tell whether a heartbeat has all required keys; others are ignored."""
    words, numbers = ("name", "state"), ("done", "total", "stage", "stages", "width", "running")
    return all(isinstance(heartbeat.get(key), str) for key in words) and all(
        isinstance(heartbeat.get(key), int) for key in numbers
    )


def describe_status(state: dict[str, Any]) -> str:
    """Describe a sweep's state in one line."""
    line = f"{state['name']}: {state['state']}"
    if state["done"] is None:
        return f"{line}, no heartbeat; `telescope show` reads what it has stored"
    line += f", {state['done']} of {state['total']} trials"
    if state["state"] in ("running", "interrupted"):
        line += f", stage {state['stage'] + 1} of {state['stages']} (width {state['width']})"
    if state["state"] == "running":
        eta = state["eta_seconds"]
        left = "unknown" if eta is None else f"about {eta:.0f} s"
        line += f", {state['running']} running, time left {left}"
    if state["state"] == "interrupted":
        line += "; the same `telescope run` goes on"
    if state["state"] == "stuck":
        line += "; `telescope show` says why"
    return line
