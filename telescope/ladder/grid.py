"""The grids of Algorithm 1: broad at the base width, then finer and smaller per doubling.

Source: arXiv 2505.02222 §3.3 and Algorithm 1. The rounding is ours: it gives their 8, 5, 3, 1.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

from telescope.records import Axis, LadderSpec, Point, Stage, Trial

SIGNIFICANT_DIGITS = 6
"""Digits that grid values are rounded to, so that a point is the same on every machine."""


def round_value(value: float) -> float:
    """Round to the digits that a grid value keeps.

    >>> round_value(0.0447213595)
    0.0447214
    """
    return float(f"{value:.{SIGNIFICANT_DIGITS}g}")


def round_up_to_odd(x: float) -> int:
    """Return the smallest odd integer that is at least `x`, so that a grid has a centre.

    >>> [round_up_to_odd(x) for x in (8, 4, 2, 1, 0.5)]
    [9, 5, 3, 1, 1]
    """
    # Rounding leaves powers such as (1/8)^(2/3) slightly above the exact integer.
    return 2 * math.ceil((x - 1) / 2 - 1e-9) + 1 if x > 1 else 1


def points_at(axis: Axis, *, width: int, base_width: int, swept: int) -> int:
    """Count the values that an axis has at `width`.

    The base width has the spec's m points; a wider stage has m · (base/width)^(2/k), rounded up to
    an odd number, always from the unrounded m. So doubling the width, which costs 4 times as much
    per trial, leaves a quarter of the points.

    Args:
        axis: the axis, m = axis.points.
        width: the stage's width.
        base_width: the first stage's width.
        swept: k, how many axes have more than one value.

    >>> lr = Axis("lr", 0.001, 1.0, 8)
    >>> [points_at(lr, width=w, base_width=256, swept=2) for w in (256, 512, 1024, 2048)]
    [8, 5, 3, 1]
    """
    if width == base_width or axis.is_fixed:
        return axis.points
    return round_up_to_odd(axis.points * (base_width / width) ** (2 / swept))


def values_at(
    axis: Axis, *, width: int, base_width: int, swept: int, centre: float
) -> tuple[float, ...]:
    """Return an axis's values at `width`: its whole range at base width, else around `centre`.

    The spacing in log(value) shrinks as base_width/width. The optimum's drift between n and 2n
    halves with every doubling, so a window that shrinks at the same rate still contains it.
    """
    if axis.is_fixed:
        return (axis.low,)
    count = points_at(axis, width=width, base_width=base_width, swept=swept)
    step = math.log(axis.high / axis.low) / (axis.points - 1)
    if width == base_width:
        return tuple(round_value(axis.low * math.exp(step * i)) for i in range(count))
    step *= base_width / width
    offsets = range(-(count // 2), count // 2 + 1)
    return tuple(round_value(centre * math.exp(step * i)) for i in offsets)


def paper_stage(spec: LadderSpec, width: int, centre: Mapping[str, float]) -> Stage:
    """Return the stage of Algorithm 1 at `width`.

    Args:
        spec: the ladder.
        width: one of its widths.
        centre: axis → the optimum of the stage before; ignored for the first width.
    """
    swept = sum(not axis.is_fixed for axis in spec.axes)
    grid = {
        axis.name: values_at(
            axis,
            width=width,
            base_width=spec.widths[0],
            swept=swept,
            centre=centre.get(axis.name, axis.low),
        )
        for axis in spec.axes
    }
    return Stage(width, grid, grid_trials(width, grid, spec.seeds))


def grid_trials(
    width: int, grid: Mapping[str, Sequence[float]], seeds: Sequence[int]
) -> tuple[Trial, ...]:
    """Return every combination of the grid's values with every seed, in a fixed order."""
    points = (
        Point.of(dict(zip(grid, values, strict=True)))
        for values in itertools.product(*grid.values())
    )
    return tuple(Trial(width, point, seed) for point in points for seed in seeds)
