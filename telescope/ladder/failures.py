"""Messages for a stage that cannot go on, the same under every policy."""

from __future__ import annotations

from collections.abc import Sequence

from telescope.records import Result, Stage


def failures_reason(stage: Stage, failed: Sequence[Result]) -> str:
    """Return the message for a stage with too many failed trials."""
    return (
        f"width {stage.width}: {len(failed)} of {len(stage.trials)} trials failed, at most a "
        f"tenth may; last reason: {first_line(failed[-1].reason)}; run again to retry them"
    )


def first_line(reason: str) -> str:
    """Return the first line of a reason, for a message of one line."""
    return reason.splitlines()[0] if reason else "none given"


def all_diverged(stage: Stage, failed: int) -> str:
    """Return the message for a stage without a single loss; it names the axis to change."""
    but = f" or failed ({failed})" if failed else ""
    what = f"width {stage.width}: every point diverged{but}"
    if "lr" not in stage.grid:
        return f"{what}; move the axes ({', '.join(stage.grid)}) and run again"
    values = stage.grid["lr"]
    lowest, key = values[0], "low" if len(values) > 1 else "value"
    return (
        f"{what}, down to lr {lowest:g}; lower axes.lr.{key}, or lengthen the warm-up, and run "
        "again"
    )
