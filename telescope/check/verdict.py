"""The verdict of a coordinate check: the measured sizes, every slope, and the failures.

Only the record: `judge.py` makes it, tables and figures show it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from telescope.records import Point

SHOWN_QUANTITIES = 24
"""Most quantities in a table or figure; of more it shows only the steepest of each kind."""

INNER = "(inner)"
SOFTMAX = "softmax input"
SOFTMAX_ADVICE = "where head_dim grows, attention must divide q·k by head_dim, not by its root"


class Kind(StrEnum):
    """The kind of a size, of a module or a role."""

    OUTPUT = "output"
    INPUT = "input"
    ADDED = "added"
    """The term that a block adds to its input."""
    GRADIENT = "gradient"
    """The gradient at an output, times the width."""
    CHANGE = "change"
    """The change of an output since the start."""
    START = "start"
    """The parameters of a role before training."""
    UPDATE = "update"
    """The update of a role's parameters since the start."""

    @property
    def is_move(self) -> bool:
        """True if it is 0 before anything is trained."""
        return self in (Kind.CHANGE, Kind.UPDATE)


@dataclass(frozen=True, slots=True)
class Quantity:
    """One size that the check measures."""

    of: str
    """A module or a role; "" is the model."""
    kind: Kind = Kind.OUTPUT
    is_inner: bool = False
    """True for a readout inside a block, such as a router. Among equal experts its gradient is
    mostly noise. Adam's normalised steps turn that into logits that shrink as 1/√width even under
    the right rule (measured: -0.46 ± 0.12 with two experts), so only growth fails."""
    is_softmax: bool = False
    """True for the input of a softmax. If q·k is divided by a head_dim that grows, it rightly
    shrinks at first, and only the part that training adds keeps its size, so only growth fails."""

    @property
    def name(self) -> str:
        """The name in tables, figures and JSON.

        >>> Quantity("").name, Quantity("blocks.0", Kind.CHANGE, is_softmax=True).name
        ('output', 'blocks.0 softmax input change')
        """
        place = self.of or ("" if self.is_softmax else "output")
        marks = (INNER if self.is_inner else "", SOFTMAX if self.is_softmax else "")
        kind = "" if self.kind is Kind.OUTPUT else self.kind
        return " ".join(filter(None, (place, *marks, kind)))

    @property
    def may_shrink(self) -> bool:
        """True if only growth fails."""
        return self.is_inner or self.is_softmax

    @property
    def is_everywhere(self) -> bool:
        """True if it must be above 0 at every width or at none."""
        of_model = self == Quantity("")
        return of_model or self.kind in (Kind.START, Kind.UPDATE)


def steepness(slope: float, *, may_shrink: bool) -> float:
    """Return the steepness of a slope: its size, or, for a quantity that may shrink, its growth."""
    return slope if may_shrink else abs(slope)


@dataclass(frozen=True)
class CoordCheck:
    """The measurements and the verdict of a coordinate check."""

    rule: str
    widths: tuple[int, ...]
    steps: tuple[int, ...]
    seeds: tuple[int, ...]
    point: Point
    """The setting that was trained: a low lr."""
    sizes: Mapping[str, Mapping[int, tuple[float, ...]]] = field(repr=False)
    """Quantity → step → one size per width, the geometric mean over seeds; 0 means exactly 0."""
    slopes: Mapping[str, float | None]
    """Quantity → the slope of log2 size against log2 width, at the step where it is steepest after
    its margin of error; None where nothing moved."""
    errors: Mapping[str, float | None]
    """Quantity → the standard error of that slope."""
    slope_steps: Mapping[str, int]
    """Quantity → the step of that slope."""
    problems: Mapping[str, str]
    """Quantity → the reason that it fails, worst first; empty when the verdict is PASS."""
    uncertain: tuple[str, ...]
    """Quantities with the threshold inside the margin of error of their slope."""
    threshold: float
    """The largest slope that passes, up or down."""
    kinds: Mapping[str, Kind]
    """Quantity → its kind."""
    may_shrink: tuple[str, ...] = ()
    """Quantities that only growth fails."""
    unwatched: tuple[str, ...] = ()
    """Matrices in no module that the check could measure."""
    unseen_heads: tuple[str, ...] = ()
    """Modules whose heads grow with the width and whose softmax the check could not observe."""

    @property
    def blind_spot(self) -> str:
        """A warning about a softmax that the check could not observe; "" if there is none."""
        if not self.unseen_heads:
            return ""
        first, *others = self.unseen_heads
        named = first + (f" and {len(others)} others" if others else "")
        return f"softmax in {named} not seen, and heads there grow: {SOFTMAX_ADVICE}"

    @property
    def passed(self) -> bool:
        """True if no slope fails."""
        return not self.problems

    @property
    def verdict(self) -> str:
        """PASS or FAIL."""
        return "PASS" if self.passed else "FAIL"

    @property
    def steepest(self) -> tuple[str, float]:
        """The quantity with the steepest slope, see `steepness`, and that slope."""
        slopes = {name: slope for name, slope in self.slopes.items() if slope is not None}
        return max(
            slopes.items(),
            key=lambda item: steepness(item[1], may_shrink=item[0] in self.may_shrink),
            default=("nothing", 0.0),
        )

    def shown(self, limit: int = SHOWN_QUANTITIES) -> list[str]:
        """Return the quantities to show: all, or, of more than `limit`, the steepest of each group.

        A group has the same name except for digits, like the outputs of 34 blocks.
        """
        if len(self.slopes) <= limit:
            return list(self.slopes)
        steepest: dict[str, str] = {}
        for name, slope in self.slopes.items():
            kind = re.sub(r"\d+", "*", name)
            before = self.slopes[steepest[kind]] if kind in steepest else None
            if kind not in steepest or abs(slope or 0.0) > abs(before or 0.0):
                steepest[kind] = name
        return list(steepest.values())

    def as_dict(self) -> dict[str, Any]:
        """Return the keys of `telescope check --json`."""
        return {
            "verdict": self.verdict,
            "rule": self.rule,
            "widths": list(self.widths),
            "threshold": self.threshold,
            "slopes": dict(self.slopes),
            "errors": dict(self.errors),
            "slope_steps": dict(self.slope_steps),
            "problems": dict(self.problems),
            "uncertain": list(self.uncertain),
            "kinds": dict(self.kinds),
            "may_shrink": list(self.may_shrink),
            "unwatched": list(self.unwatched),
            "unseen_heads": list(self.unseen_heads),
            "steps": list(self.steps),
            "seeds": list(self.seeds),
            "point": dict(self.point),
            "sizes": {
                name: {str(step): [_or_none(v) for v in values] for step, values in by_step.items()}
                for name, by_step in self.sizes.items()
            },
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CoordCheck:
        """Rebuild a check from `as_dict`; a size without a number becomes NaN.

        Raises:
            KeyError, TypeError, ValueError, AttributeError: the data are damaged or of another
                version.
        """
        return cls(
            rule=data["rule"],
            widths=tuple(data["widths"]),
            steps=tuple(data["steps"]),
            seeds=tuple(data["seeds"]),
            point=Point.of(data["point"]),
            sizes={
                name: {
                    int(step): tuple(math.nan if v is None else float(v) for v in values)
                    for step, values in by_step.items()
                }
                for name, by_step in data["sizes"].items()
            },
            slopes=dict(data["slopes"]),
            errors=dict(data["errors"]),
            slope_steps=dict(data["slope_steps"]),
            problems=dict(data["problems"]),
            uncertain=tuple(data["uncertain"]),
            threshold=data["threshold"],
            **_marks(data),
            unwatched=tuple(data["unwatched"]),
            unseen_heads=tuple(data["unseen_heads"]),
        )


def _marks(data: Mapping[str, Any]) -> dict[str, Any]:
    """Read the quantities' kinds; files of older versions have them only in the names."""
    if "kinds" in data:
        return {
            "kinds": {name: Kind(kind) for name, kind in data["kinds"].items()},
            "may_shrink": tuple(data["may_shrink"]),
        }
    words = {name: name.rsplit(" ", 1)[-1] for name in data["slopes"]}
    return {
        "kinds": {
            name: Kind(word) if word in set(Kind) and not name.endswith(SOFTMAX) else Kind.OUTPUT
            for name, word in words.items()
        },
        "may_shrink": tuple(name for name in words if INNER in name or SOFTMAX in name),
    }


def _or_none(value: float) -> float | None:
    """Return the number, or None if JSON cannot hold it."""
    return value if math.isfinite(value) else None
