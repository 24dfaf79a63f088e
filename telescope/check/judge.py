"""The coordinate check's judge: from measured sizes to slopes, and from slopes to a verdict. Pure.

log2 of a size against log2 of the width is a line, whose slope is 0 under the right rule. Each
slope has a standard error, and only what lies beyond the threshold by its errors fails.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from telescope.check.verdict import SOFTMAX_ADVICE, CoordCheck, Quantity, steepness
from telescope.records import Point

THRESHOLD = 0.25
"""Largest slope that passes, up or down. Mistakes come in half powers of the width (a factor of
√r forgotten or applied twice), and a right model's slopes are near 0: a quarter lies half way."""
STANDARD_ERRORS = 2.0
"""A slope fails when it lies this many standard errors beyond the threshold, and is flat this many
within; between them it is uncertain. Dozens of slopes are looked at, and narrow models are noisy:
without this margin a right model fails now and then (measured: tied, AdamW, +0.32 ± 0.10 on a
gradient). Where one is uncertain, as many seeds again are trained; what then still is, is said."""
CLEAR_ERRORS = 5.0
"""What lies this many standard errors beyond the threshold fails without more seeds. Two seeds make
a poor estimate of the error: at two errors a right model's -0.57 ± 0.10 fails (tied, AdamW), which
four more seeds show to be -0.2."""


def judge(
    measured: Mapping[Quantity, Mapping[int, Sequence[Sequence[float]]]],
    *,
    widths: tuple[int, ...],
    steps: tuple[int, ...],
    seeds: tuple[int, ...],
    rule: str,
    point: Point,
) -> CoordCheck:
    """Slopes and verdict from measured sizes.

    Args:
        measured: quantity → step → RMS per width and seed.
        widths: rising.
        steps: after which it was measured.
        seeds: one run each.
        rule: the width rule, for the record.
        point: the setting, for the record.
    """
    slopes = {
        quantity.name: max(
            (_slope(quantity, step, widths, by_step[step]) for step in steps),
            key=lambda s: s.certain,
        )
        for quantity, by_step in measured.items()
    }
    worst_first = sorted(slopes.items(), key=lambda item: -item[1].certain)
    problems = {name: slope.problem for name, slope in worst_first if slope.problem}
    moves = [slopes[quantity.name] for quantity in measured if quantity.kind.is_move]
    if all(slope.value is None for slope in moves or slopes.values()) and not problems:
        problems["output"] = "nothing moved"
    return CoordCheck(
        rule=rule,
        widths=widths,
        steps=steps,
        seeds=seeds,
        point=point,
        sizes={
            quantity.name: {step: tuple(map(_geometric_mean, by_step[step])) for step in steps}
            for quantity, by_step in measured.items()
        },
        slopes={name: slope.value for name, slope in slopes.items()},
        errors={name: slope.error for name, slope in slopes.items()},
        slope_steps={name: slope.step for name, slope in slopes.items()},
        problems=problems,
        uncertain=tuple(name for name, slope in slopes.items() if slope.is_uncertain),
        threshold=THRESHOLD,
        kinds={quantity.name: quantity.kind for quantity in measured},
        may_shrink=tuple(quantity.name for quantity in measured if quantity.may_shrink),
    )


def is_clear(check: CoordCheck) -> bool:
    """Whether more seeds could not change the verdict: all is flat, or something is far from it."""
    if check.passed:
        return not check.uncertain
    lines = [(check.slopes[name], check.errors[name]) for name in check.problems]
    return any(
        value is None or error is None or abs(value) - CLEAR_ERRORS * error > check.threshold
        for value, error in lines
    )


@dataclass(frozen=True, slots=True)
class _Slope:
    """The slope of log2 size against log2 width at one step."""

    step: int
    value: float | None = None
    """None where there is no line to fit."""
    error: float | None = None
    certain: float = -math.inf
    """The least that its steepness can be, by its errors; infinite where sizes make no line."""
    problem: str = ""
    """Why it fails; empty where it does not."""
    is_uncertain: bool = False
    """Whether it lies on neither side of the threshold by its standard errors."""


def _slope(
    quantity: Quantity, step: int, widths: Sequence[int], sizes: Sequence[Sequence[float]]
) -> _Slope:
    """The slope of log2 size against log2 width, and what it says.

    An idle expert is exactly 0 at some width or seed: the rest makes the line. The model's output,
    what starts and what is updated must be there at every width.

    Args:
        quantity: of which.
        step: after which it was measured.
        widths: rising.
        sizes: per width, one per seed.
    """
    values = np.asarray(sizes, dtype=float)
    if not np.isfinite(values).all():
        return _Slope(step, certain=math.inf, problem="is not finite")
    still = [str(width) for width, row in zip(widths, values, strict=True) if not row.all()]
    if quantity.is_everywhere and still and values.any():
        problem = f"moves at some widths but not at {', '.join(still)}"
        return _Slope(step, certain=math.inf, problem=problem)
    value, error = _fit(np.log2(widths), values)
    if value is None or error is None:
        return _Slope(step)
    margin = STANDARD_ERRORS * error
    steep = steepness(value, may_shrink=quantity.may_shrink)
    certain = steep - margin
    verb = "grows" if value > 0 else "shrinks"
    problem = f"{verb} with the width, slope {value:+.2f} ± {error:.2f}"
    if quantity.is_softmax:
        problem += f" ({SOFTMAX_ADVICE})"
    return _Slope(
        step,
        value,
        error,
        certain,
        problem if certain > THRESHOLD else "",
        is_uncertain=certain < THRESHOLD < steep + margin,
    )


def _fit(
    log_widths: NDArray[np.float64], sizes: NDArray[np.float64]
) -> tuple[float, float] | tuple[None, None]:
    """Slope and its standard error, of a line for all seeds with an offset for each.

    A seed sets the batches, which move all widths together: without the offsets that would count
    as noise. Two None where too little is above 0 for a line and its error.

    Args:
        log_widths: (widths,), log2.
        sizes: (widths, seeds).
    """
    seeds = [(log_widths[seed > 0], np.log2(seed[seed > 0])) for seed in sizes.T if seed.any()]
    freedom = sum(len(x) - 1 for x, _ in seeds) - 1
    if freedom < 1:
        return None, None
    x = np.concatenate([x - x.mean() for x, _ in seeds])
    y = np.concatenate([y - y.mean() for _, y in seeds])
    value = float(x @ y / (x @ x))
    residuals = y - value * x
    return value, math.sqrt(float(residuals @ residuals) / freedom / float(x @ x))


def _geometric_mean(values: Sequence[float]) -> float:
    """Exactly 0 where one of them is; NaN where one of them is not finite."""
    if not all(math.isfinite(value) for value in values):
        return math.nan
    return math.exp(np.mean(np.log(values))) if all(values) else 0.0
