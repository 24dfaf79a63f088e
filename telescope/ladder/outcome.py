"""The loss of a target run, judged by the loss that was predicted of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from telescope.records import PredictedLoss

MEANINGS = {
    "inside": "as predicted, so nothing here speaks against the certificate; that no other setting "
    "is better only `telescope audit` can show",
    "below": "better than predicted: the loss fell faster with the width than the ladder took it "
    "to, which is no fault of the answer, and the certificate stands",
    "above": "worse than predicted: the answer, or what is assumed alike at every width, does not "
    "hold here; do not rely on the certificate before `telescope audit` has tried the neighbours",
    "diverged": "the answer does not hold at this width, and the certificate does not either",
}
"""Place of the loss → what it means."""


@dataclass(frozen=True, slots=True)
class TargetEnd:
    """The end of a target run."""

    run: str
    """Its name."""
    width: int
    loss: float | None
    """Held-out loss, measured as a trial's; None if it diverged."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """A target run's loss beside the prediction."""

    run: str
    width: int
    predicted: float | None
    interval: tuple[float, float] | None
    """90 %."""
    got: float | None
    place: str
    """"inside", "below" or "above" the interval, "diverged", or "" where nothing was predicted."""
    meaning: str
    """One sentence on the certificate, or the reason that nothing was predicted."""

    def as_dict(self) -> dict[str, Any]:
        """The form that JSON takes."""
        return {
            "run": self.run,
            "width": self.width,
            "predicted": self.predicted,
            "interval": self.interval and list(self.interval),
            "got": self.got,
            "inside": self.place == "inside" if self.place else None,
            "meaning": self.meaning,
        }


def judge(predicted: PredictedLoss | None, end: TargetEnd) -> Judgement:
    """Judge a run by the prediction for its own width and steps.

    Args:
        predicted: the prediction; None under a policy that makes none.
        end: the run's; its loss is finite.
    """
    interval = predicted.interval if predicted else None
    loss = predicted.loss if predicted else None
    if end.loss is None or not math.isfinite(end.loss):
        place = "diverged"
    elif interval is None:
        place = ""
    else:
        low, high = interval
        place = "below" if end.loss < low else "above" if end.loss > high else "inside"
    unknown = predicted.reason if predicted else "this policy predicts none"
    meaning = MEANINGS.get(place, f"no loss was predicted: {unknown}")
    got = None if place == "diverged" else end.loss
    return Judgement(end.run, end.width, loss, interval, got, place, meaning)
