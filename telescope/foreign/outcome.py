"""Conversion of a foreign trainer's report on a trial, JSON or a mapping, into a result.

    {"loss": 2.31}                          complete; NaN, Infinity and null are a divergence
    {"status": "diverged"}                  or "failed", with an optional "reason"
    {"step": 100, "train_loss": 2.9}        one row of the curve, on a line of its own

A result may also have "step", "tokens" and "flops"; an invalid one of these is left out with a
note, and the result counts. A line with another "status" is a log line, not a result.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Any

from telescope.errors import TrialError
from telescope.foreign.printed import read_line
from telescope.losses import as_number, judged, shown
from telescope.records import CurvePoint, Result, Status, Trial

EXPECTED = '{"loss": 2.31}, or {"status": "diverged"}'
LOSS_KEYS = ("train_loss", "loss")
HELD_OUT_KEYS = ("held_out_loss", "val_loss", "eval_loss")
"""Names of the losses in a row of a curve; the first one present counts."""
TAIL_BYTES = 16_384
"""Bytes read at the end of a log, for a failure's reason or a running trial's progress."""
MOST_ROWS = 2000
"""Most rows kept of a curve; beyond, every second row is dropped, repeatedly."""


@dataclass(frozen=True)
class Prices:
    """The costs of trials that are known in advance."""

    flops: Mapping[int, float] = field(default_factory=dict)
    """Width → FLOPs of a run; empty if unknown."""
    parameters: Mapping[int, float] = field(default_factory=dict)
    """Width → parameters, which give a trial's FLOPs together with the tokens that it reports."""

    def of(self, width: int, said: Mapping[str, Any]) -> float:
        """Return a trial's FLOPs: as reported, else 6 · parameters · tokens, else the plan's.

        Source: 6 per parameter and token is the usual count, without attention: arXiv 2001.08361.
        """
        if (flops := _amount(said, "flops")) is not None:
            return flops
        if width in self.parameters and (tokens := _amount(said, "tokens")) is not None:
            return 6.0 * self.parameters[width] * tokens
        return self.flops.get(width, 0.0)


class CurveRows:
    """The rows of a training curve that a trial has reported, in bounded memory."""

    def __init__(self) -> None:
        """Start without rows."""
        self.rows: list[CurvePoint] = []
        self._every, self._seen = 1, 0

    def add(self, said: Mapping[str, Any]) -> None:
        """Take a line's step and losses, if it has them."""
        row = curve_point(said)
        if row is None:
            return
        if self._seen % self._every == 0:
            self.rows.append(row)
        self._seen += 1
        if len(self.rows) > MOST_ROWS:
            self.rows, self._every = self.rows[::2], self._every * 2


def curve_point(said: Mapping[str, Any]) -> CurvePoint | None:
    """Return one row of a curve; None if a line has no step or no loss.

    >>> row = curve_point({"step": 10, "loss": 2.5, "val_loss": 2.6, "lr": 0.1})
    >>> row.step, row.train_loss, row.held_out_loss
    (10, 2.5, 2.6)
    """
    step = _step(said)
    train, held_out = (_first(said, keys) for keys in (LOSS_KEYS, HELD_OUT_KEYS))
    if step is None or (train is None and held_out is None):
        return None
    return CurvePoint(step, train, held_out)


def latest_row(path: Path) -> CurvePoint | None:
    """Return the last row of a curve in a running trial's output; None if there is none yet."""
    for line in reversed(re.split(rb"[\r\n]+", log_end(path))):
        said = parse_line(line)
        if said and (row := curve_point(said)):
            return row
    return None


def log_end(path: Path) -> bytes:
    """Return the last kilobytes of a log; nothing if there is no log."""
    with suppress(OSError), path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
        return file.read()
    return b""


def _first(said: Mapping[str, Any], keys: tuple[str, ...]) -> float | None:
    """Return the first finite number under one of these keys."""
    values = (as_number(said.get(key)) for key in keys)
    return next((value for value in values if value is not None and math.isfinite(value)), None)


def _step(said: Mapping[str, Any]) -> int | None:
    """Return the reported step; None if it is missing or not an integer."""
    step = said.get("step")
    return int(step) if isinstance(step, Integral) and not isinstance(step, bool) else None


def parse_line(line: bytes | str) -> dict[str, Any] | None:
    """Return the last JSON object of a line; None without one.

    >>> parse_line('{"loss": NaN}'), parse_line("epoch 3"), parse_line("[1]")
    ({'loss': nan}, None, None)
    """
    objects = read_line(line).objects
    return objects[-1] if objects else None


def is_verdict(said: Mapping[str, Any]) -> bool:
    """Tell whether a line states the trial's end: it has a loss, or a status that is an end.

    >>> is_verdict({"loss": 2.3}), is_verdict({"event": "upload", "status": "ok"})
    (True, False)
    """
    return "loss" in said or _ended_as(said) is not None


def _ended_as(said: Mapping[str, Any]) -> Status | None:
    """Return the reported status if it is diverged or failed, else None."""
    status = said.get("status")
    if isinstance(status, str) and status in (Status.DIVERGED, Status.FAILED):
        return Status(status)
    return None


def on_stderr(note: str) -> None:
    """Print a note on stderr, the default place for notes."""
    print(note, file=sys.stderr)


def as_result(
    trial: Trial,
    said: Mapping[str, Any],
    prices: Prices,
    *,
    seconds: float,
    curve: CurveRows,
    steps: int | None = None,
    note: Callable[[str], None] = on_stderr,
) -> Result:
    """Turn a trainer's final report into a result.

    Args:
        trial: the trial.
        said: its last JSON object with a verdict, or a function's return value.
        prices: the known costs of trials.
        seconds: the trial's duration.
        curve: the rows that it reported on the way.
        steps: the planned number of steps; None if unknown.
        note: called with a line about each field that is left out.

    Raises:
        TrialError: there is neither a loss nor a divergence, the loss is not a number, or the trial
            ended before its last step.
    """
    for problem in _faults(said):
        note(f"telescope: {trial}: left out of the result: {problem}")
    status = _ended_as(said)
    if status is Status.FAILED or not ("loss" in said or status or _is_complete(said)):
        problem = (
            f"says status {said['status']!r}" if "status" in said else "has neither loss nor status"
        )
        reason = f" ({said['reason']})" if said.get("reason") else ""
        raise TrialError(f"the result {shown(dict(said))} {problem}{reason}; expected {EXPECTED}")
    if status is Status.DIVERGED:
        loss, reason = None, str(said.get("reason") or "the trainer says so")
    else:
        status, loss, reason = _judged(said)
    if loss is not None:
        _check_length(said, steps)
    last = curve_point({**said, "loss": said.get("train_loss"), "held_out_loss": loss})
    rows = list(curve.rows)
    if last and rows and rows[-1].step == last.step and last.train_loss is None:
        last = CurvePoint(last.step, rows.pop().train_loss, last.held_out_loss)
    return Result(
        trial,
        status,
        loss=loss,
        reason=reason,
        flops=prices.of(trial.width, said),
        seconds=seconds,
        curve=(*rows, last) if last else tuple(rows),
    )


def _judged(said: Mapping[str, Any]) -> tuple[Status, float | None, str]:
    """Return status, loss and reason of a report that has a loss; see `judged`."""
    try:
        return judged(said.get("loss"))
    except ValueError as error:
        raise TrialError(f"the result {shown(dict(said))} has loss {error}") from None


def _check_length(said: Mapping[str, Any], steps: int | None) -> None:
    """Check that a loss is from the last step, because an earlier one is not comparable."""
    step = _step(said)
    if steps is not None and step is not None and step < steps - 1:  # from 0, the last is steps - 1
        raise TrialError(
            f"ended at step {step} of {steps} (trainer.steps): the loss {shown(dict(said))} is not "
            "the final one; call the losses on the way train_loss"
        )


def _is_complete(said: Mapping[str, Any]) -> bool:
    status = said.get("status")
    return isinstance(status, str) and status == Status.COMPLETE


def _faults(said: Mapping[str, Any]) -> list[str]:
    """Describe the invalid fields of a report, which are left out of the result."""
    faults = [
        f"{key} {said[key]!r}, must be a number >= 0 and finite"
        for key in ("flops", "tokens")
        if said.get(key) is not None and _amount(said, key) is None
    ]
    if said.get("step") is not None and _step(said) is None:
        faults.append(f"step {said['step']!r}, must be a whole number")
    if isinstance(said.get("loss"), str):
        faults.append(f"the quotes of loss {said['loss']!r}: taken as the number that they hold")
    is_known = said.get("status") is None or _ended_as(said) is not None or _is_complete(said)
    if "loss" in said and not is_known:
        faults.append(f"status {said['status']!r}, may be complete, diverged or failed")
    return faults


def _amount(said: Mapping[str, Any], key: str) -> float | None:
    """Return a finite number >= 0 under a key; None if it is missing or invalid."""
    value = as_number(said.get(key))
    return value if value is not None and math.isfinite(value) and value >= 0 else None
