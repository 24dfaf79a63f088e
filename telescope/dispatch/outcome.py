"""What a foreign trainer says of a trial, as JSON or as a mapping, turned into a result.

    {"loss": 2.31}                          complete; also NaN and Infinity, which are a divergence
    {"status": "diverged"}                  with an optional "reason"
    {"step": 100, "train_loss": 2.9}        one row of the curve, on a line of its own

A result may say "step", "tokens" and "flops" too.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Any

from telescope.errors import TrialError
from telescope.records import CurvePoint, Result, Status, Trial

EXPECTED = '{"loss": 2.31}, or {"status": "diverged"}'
LOSS_KEYS = ("train_loss", "loss")
HELD_OUT_KEYS = ("held_out_loss", "val_loss", "eval_loss")
"""What a row of a curve may call its losses; the first that is there counts."""
TAIL_BYTES = 16_384
"""How much of the end of a log is read: for a failure's reason, or while a trial runs."""
MOST_ROWS = 2000
"""Rows of a curve that are kept; of more, every second is dropped, again and again."""


@dataclass(frozen=True)
class Prices:
    """What is known beforehand of what trials cost."""

    flops: Mapping[int, float] = field(default_factory=dict)
    """Width → FLOPs of a run; empty where they are not known."""
    parameters: Mapping[int, float] = field(default_factory=dict)
    """Width → parameters; with the tokens that a trial reports they give its FLOPs."""

    def of(self, width: int, said: Mapping[str, Any]) -> float:
        """FLOPs of a trial: those that it reports, else 6 · parameters · tokens, else the plan's.

        Source: 6 per parameter and token is the usual count, arXiv 2001.08361; no attention.
        """
        if said.get("flops") is not None:
            return _amount(said, "flops")
        if said.get("tokens") is not None and width in self.parameters:
            return 6.0 * self.parameters[width] * _amount(said, "tokens")
        return self.flops.get(width, 0.0)


class Curve:
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
    """One row of a curve; None where a line has no step, or no loss.

    >>> curve_point({"step": 10, "loss": 2.5, "val_loss": 2.6, "lr": 0.1})
    CurvePoint(step=10, train_loss=2.5, held_out_loss=2.6)
    """
    step = said.get("step")
    if not isinstance(step, Integral) or isinstance(step, bool):
        return None
    train, held_out = (_first(said, keys) for keys in (LOSS_KEYS, HELD_OUT_KEYS))
    return None if train is None and held_out is None else CurvePoint(int(step), train, held_out)


def latest_row(path: Path) -> CurvePoint | None:
    """The last row of a curve in what a running trial has printed; None where there is none yet."""
    with suppress(OSError), path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
        for line in reversed(file.read().splitlines()):
            said = parse_line(line)
            if said and (row := curve_point(said)):
                return row
    return None


def _first(said: Mapping[str, Any], keys: tuple[str, ...]) -> float | None:
    """The first finite number under one of these keys."""
    for key in keys:
        value = said.get(key)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    return None


def parse_line(line: bytes | str) -> dict[str, Any] | None:
    """A line that is a JSON object; None for any other line.

    >>> parse_line('{"loss": NaN}'), parse_line("epoch 3"), parse_line("[1]")
    ({'loss': nan}, None, None)
    """
    if line.lstrip()[:1] not in (b"{", "{"):
        return None
    try:
        said = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return said if isinstance(said, dict) else None


def is_verdict(said: Mapping[str, Any]) -> bool:
    """Whether a line says how the trial ended, as far as it knew."""
    return "loss" in said or "status" in said


def as_result(
    trial: Trial, said: Mapping[str, Any], prices: Prices, *, seconds: float, curve: Curve
) -> Result:
    """The result that a trainer's last word means.

    Args:
        trial: the trial.
        said: its last JSON object with a verdict, or what a function returned.
        prices: what is known of its cost.
        seconds: how long it took.
        curve: what it reported on the way.

    Raises:
        TrialError: neither a loss nor a divergence, or a number that is none.
    """
    status = said.get("status", "complete" if "loss" in said else None)
    if status not in ("complete", "diverged"):
        problem = f"says status {status!r}" if "status" in said else "has neither loss nor status"
        reason = f" ({said['reason']})" if said.get("reason") else ""
        raise TrialError(f"the result {_shown(said)} {problem}{reason}; expected {EXPECTED}")
    loss = None
    reason = str(said.get("reason") or "")
    if status == "diverged":
        reason = reason or "the trainer says so"
    else:
        loss = _number(said, "loss")
        if not math.isfinite(loss):
            loss, reason = None, f"loss {loss}"
    last = curve_point({**said, "loss": said.get("train_loss"), "held_out_loss": loss})
    rows = list(curve.rows)
    if last and rows and rows[-1].step == last.step and last.train_loss is None:
        last = CurvePoint(last.step, rows.pop().train_loss, last.held_out_loss)
    return Result(
        trial,
        Status.COMPLETE if loss is not None else Status.DIVERGED,
        loss=loss,
        reason="" if loss is not None else reason,
        flops=prices.of(trial.width, said),
        seconds=seconds,
        curve=(*rows, last) if last else tuple(rows),
    )


def _number(said: Mapping[str, Any], key: str) -> float:
    """A number, of whatever library; no text and no truth value, which Python would take too."""
    value = said.get(key)
    if value is not None and not isinstance(value, (str, bytes, bool)):
        try:
            return float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError):
            pass
    raise TrialError(f"the result {_shown(said)} has {key} {value!r}, must be a number")


def _amount(said: Mapping[str, Any], key: str) -> float:
    """A number that counts something."""
    value = _number(said, key)
    if not (math.isfinite(value) and value >= 0):
        raise TrialError(f"the result {_shown(said)} has {key} {value!r}, must be >= 0 and finite")
    return value


def _shown(said: object) -> str:
    text = repr(said) if not isinstance(said, Mapping) else repr(dict(said))
    return text if len(text) <= 120 else f"{text[:117]}..."
