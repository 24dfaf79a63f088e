"""Sweeps in a row each: what `ls` and `compare` say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from telescope.answer.finished import open_result
from telescope.errors import TelescopeError
from telescope.report.status import read_status


def summary(path: Path, results: Path, now: float) -> dict[str, Any]:
    """One sweep in the keys of `ls --json`; of one that cannot be read, what its heartbeat says.

    Args:
        path: the sweep's folder.
        results: the folder of all results.
        now: seconds since the epoch.
    """
    state = read_status(path, results)
    written = state.get("time")
    row = {
        **{key: state[key] for key in ("name", "state", "done", "total")},
        **dict.fromkeys(("width", "answer", "verdict", "over_target", "problem")),
        "age_seconds": now - written if isinstance(written, (int, float)) else None,
        "path": str(path),
    }
    if state["state"] not in ("finished", "stuck"):
        return row
    try:
        finished = open_result(path, results)
        certificate, point = finished.certificate, finished.target_point()
    except TelescopeError as error:
        return row | {"problem": str(error)}
    return row | {
        "width": finished.spec.target.width,
        "answer": point and dict(point),
        "verdict": certificate and certificate.verdict,
        "over_target": finished.cost()["over_target"],
    }


def compare(sweeps: Sequence[str], results: Path) -> dict[str, Any]:
    """Several sweeps side by side, in the keys of `compare --json`.

    Raises:
        RefusedError: their losses are of other data, or are measured otherwise.
        SpecError, ResumeError: there is no such sweep, or it cannot be read.
    """
    from telescope.sweep.comparing import differences, is_data_seen  # it knows trainers, and torch

    opened = [open_result(sweep, results) for sweep in sweeps]
    records = {name: of.folder.read_spec() for name, of in zip(sweeps, opened, strict=True)}
    unlike = differences(records, of_unseen=True)
    differing = {key: [of.get(name) for name in sweeps] for key, of in unlike.items()}
    rows = []
    for finished in opened:
        certificate, point = finished.certificate, finished.target_point()
        rows.append(
            {
                "name": finished.folder.path.name,
                "path": str(finished.folder.path),
                "width": finished.spec.target.width,
                "answer": point and dict(point),
                "verdict": certificate and certificate.verdict,
                "predicted_excess_loss": certificate and certificate.predicted_excess_loss,
                "losses": {str(c.width): c.loss for c in finished.ladder.choices},
                "over_target": finished.cost()["over_target"],
            }
        )
    return {"sweeps": rows, "differing": differing, "data_seen": is_data_seen(records)}
