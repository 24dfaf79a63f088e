"""A sweep's trials as a table, for `trials.csv` and `show --csv`."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from telescope.files import write_atomic
from telescope.ladder.ladder import Ladder
from telescope.records import Axis, Result

if TYPE_CHECKING:
    import pandas as pd


def trials_frame(ladder: Ladder, results: Sequence[Result]) -> pd.DataFrame:
    """Return one row per answered trial, in the ladder's order.

    Columns: width, seed, one per axis in base-width units, loss (missing unless complete), status,
    reason (its first line), flops, seconds. Trials that the ladder no longer asks for, because the
    spec has changed, come last.
    """
    import pandas as pd

    rows = [_row(result) for result in _ordered(ladder, results)]
    return pd.DataFrame(rows, columns=_columns(ladder.spec.axes))


def _columns(axes: Sequence[Axis]) -> list[str]:
    names = [axis.name for axis in axes]
    return ["width", "seed", *names, "loss", "status", "reason", "flops", "seconds"]


def _ordered(ladder: Ladder, results: Sequence[Result]) -> list[Result]:
    asked = ladder.known
    known = {result.trial for result in asked}
    others = {result.trial: result for result in results if result.trial not in known}
    rest = sorted(
        others.values(), key=lambda r: (r.trial.width, tuple(r.trial.point.values()), r.trial.seed)
    )
    return [*asked, *rest]


def _row(result: Result) -> dict[str, Any]:
    return {
        "width": result.trial.width,
        "seed": result.trial.seed,
        **result.trial.point,
        "loss": result.loss,
        "status": str(result.status),
        "reason": result.reason.split("\n")[0],
        "flops": result.flops,
        "seconds": round(result.seconds, 3),
    }


def write_csv(path: Path, ladder: Ladder, results: Sequence[Result]) -> None:
    """Write `trials.csv` of a sweep; see `write_table`."""
    write_table(path, ladder.spec.axes, _ordered(ladder, results))


def write_table(path: Path, axes: Sequence[Axis], results: Iterable[Result]) -> None:
    """Write a table of results, whole or not at all; without pandas, whose import is slow."""
    text = io.StringIO()
    table = csv.DictWriter(text, _columns(axes), lineterminator="\n")
    table.writeheader()
    table.writerows(map(_row, results))
    write_atomic(path, text.getvalue())
