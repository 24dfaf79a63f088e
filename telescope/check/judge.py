"""The coordinate check's judge: from measured sizes to slopes, and from slopes to a verdict. Pure.

log2 of a size against log2 of the width is a line, whose slope is 0 under the right rule. Each
slope has a standard error; it fails only if it exceeds the threshold by several of them.
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
"""Largest slope that passes, up or down. Mistakes are half powers of the width (a factor of √r
forgotten or applied twice), and a right model's slopes are near 0; a quarter lies half way."""
STANDARD_ERRORS = 2.0
"""Margin around the threshold, in standard errors. A slope above it fails, one below it is flat,
one inside it is uncertain. The check judges dozens of slopes, and narrow models are noisy: without
the margin a right model sometimes fails (measured: tied, AdamW, +0.32 ± 0.10 on a gradient). If a
slope is uncertain, the check trains as many seeds again, and reports slopes that still are."""
CLEAR_ERRORS = 5.0
"""Standard errors beyond the threshold at which a slope fails without more seeds. Two seeds give a
poor estimate of the error: at a margin of two, a right model's -0.57 ± 0.10 fails (tied, AdamW),
while four more seeds show it to be -0.2."""


def judge(
    measured: Mapping[Quantity, Mapping[int, Sequence[Sequence[float]]]],
    *,
    widths: tuple[int, ...],
    steps: tuple[int, ...],
    seeds: tuple[int, ...],
    rule: str,
    point: Point,
) -> CoordCheck:
    """Fit the slopes of measured sizes and judge them.

    Args:
        measured: quantity → step → RMS per width and seed.
        widths: the widths, rising.
        steps: the steps after which sizes were measured.
        seeds: the seeds, one run per width each.
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
    """Tell whether the verdict needs no more seeds: all slopes are flat, or one is far from it."""
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
    """The slope; None if there are too few sizes for a line."""
    error: float | None = None
    """Standard error of `value`."""
    certain: float = -math.inf
    """Steepness less its margin of error; infinite where the sizes fail without a line."""
    problem: str = ""
    """The reason that it fails; "" if it passes."""
    is_uncertain: bool = False
    """True if the threshold lies within its margin of error."""


def _slope(
    quantity: Quantity, step: int, widths: Sequence[int], sizes: Sequence[Sequence[float]]
) -> _Slope:
    """Fit and judge the slope of log2 size against log2 width.

    An idle expert has size 0 at some width or seed; the other sizes make the line. The model's
    output, a role's initial size and its update must be above 0 at every width.

    Args:
        quantity: the quantity measured.
        step: the step after which it was measured.
        widths: the widths, rising.
        sizes: per width, one size per seed.
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
    """Fit one slope for all seeds, with an offset per seed; return it with its standard error.

    The offsets are needed because a seed sets the batches, which move all widths together; without
    them that would count as noise. Returns two None if too few sizes are above 0.

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
    """Return the geometric mean: 0 if any value is 0, NaN if any is not finite."""
    if not all(math.isfinite(value) for value in values):
        return math.nan
    return math.exp(np.mean(np.log(values))) if all(values) else 0.0
