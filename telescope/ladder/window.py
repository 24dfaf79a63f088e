"""The cells in which an adaptive stage may place trials: a lattice, in a window that can grow.

The lattice is the spec's: `points` values from `low` to `high`. An adaptive ladder may also ask
between them, at half a step, or at a quarter where a step is long: at base width near the optimum,
at wider widths anywhere in the window. These *marks* are fixed by the spec and counted from `low`.
So a replay of the same spec and results asks for the same values on every machine.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from telescope.ladder.fit.model import Array
from telescope.ladder.grid import round_value
from telescope.records import Axis, LadderSpec, Point

WINDOW = {1: range(-4, 5), 2: range(-4, 5), 3: range(-4, 5, 2), 4: range(-4, 5, 2)}
"""Number of swept axes → a wider stage's window around its predicted optimum, in marks."""
WINDOW_OF_MANY = range(-3, 4, 3)
EXTENSION_CELLS = 2
"""Cells, of the stage's own spacing, that a window grows by at a border."""
LONG_STEP = 1.5
"""Length of a lattice step, in octaves, above which it has three marks inside, not one."""
MAX_CELLS = 800
"""Most cells that are considered; of more, those nearest to the optimum."""

Grid = Mapping[str, tuple[float, ...]]


def marks_per_step(axis: Axis) -> int:
    """Count the parts into which a step of the lattice is divided.

    >>> [marks_per_step(Axis("weight_decay", 0.01, 1.0, points)) for points in (3, 5, 7)]
    [4, 4, 2]
    """
    return 4 if octaves(axis)[0] > LONG_STEP else 2


def value_at(axis: Axis, marks: int) -> float:
    """Return the value that lies `marks` marks above `low`; whole steps give the spec's values.

    >>> [value_at(Axis("lr", 0.01, 1.0, 7), i) for i in (0, 1, 2, 12)]
    [0.01, 0.014678, 0.0215443, 1.0]
    """
    step = math.log(axis.high / axis.low) / (axis.points - 1)
    return round_value(axis.low * math.exp(step * marks / marks_per_step(axis)))


def octaves(axis: Axis) -> tuple[float, float]:
    """Return the lattice's step and the prior range, in octaves."""
    span = math.log2(axis.high / axis.low)
    return span / (axis.points - 1), span


def nearest(axis: Axis, place: float) -> int:
    """Return the mark nearest to a place in octaves."""
    return round(marks_per_step(axis) * (place - math.log2(axis.low)) / octaves(axis)[0])


def middle(axis: Axis) -> float:
    """Return the prior value of an axis: the lattice's middle value, the lower one of two."""
    return value_at(axis, marks_per_step(axis) * ((axis.points - 1) // 2))


def base_grid(spec: LadderSpec) -> dict[str, tuple[float, ...]]:
    """Return the whole lattice, the grid of the base width."""
    return {
        axis.name: (axis.low,)
        if axis.is_fixed
        else tuple(value_at(axis, marks_per_step(axis) * i) for i in range(axis.points))
        for axis in spec.axes
    }


def grid_around(spec: LadderSpec, place: Array, within: Grid) -> dict[str, tuple[float, ...]]:
    """Return the window of a wider stage around a place.

    Args:
        spec: the ladder.
        place: octaves per swept axis.
        within: the base width's grid, which the window does not leave: the base width has already
            grown it wherever its optimum lay at a border.
    """
    offsets = WINDOW.get(len(spec.swept), WINDOW_OF_MANY)
    grid: dict[str, tuple[float, ...]] = {axis.name: (axis.low,) for axis in spec.axes}
    for axis, at in zip(spec.swept, place, strict=True):
        low, high = within[axis.name][0], within[axis.name][-1]
        lowest, highest = nearest(axis, math.log2(low)), nearest(axis, math.log2(high))
        centre = min(max(nearest(axis, float(at)), lowest), highest)
        values = (value_at(axis, centre + offset) for offset in offsets)
        grid[axis.name] = tuple(v for v in values if low * 0.999 <= v <= high * 1.001)
    return grid


def refined(spec: LadderSpec, grid: Grid, place: Array) -> dict[str, tuple[float, ...]]:
    """Add the marks within a step of a place (octaves per swept axis), inside the grid's range."""
    finer = dict(grid)
    for axis, at in zip(spec.swept, place, strict=True):
        low, high = grid[axis.name][0], grid[axis.name][-1]
        per_step, here = marks_per_step(axis), nearest(axis, float(at))
        marks = (value_at(axis, here + by) for by in range(-per_step, per_step + 1))
        inside = {value for value in marks if low <= value <= high}
        finer[axis.name] = tuple(sorted({*grid[axis.name], *inside}))
    return finer


def extended(
    grid: Grid, axis: Axis, spacing: int, *, upward: bool, growing: bool = False
) -> dict[str, tuple[float, ...]]:
    """Return the grid with `EXTENSION_CELLS` more values on one side of an axis.

    Args:
        grid: the grid.
        axis: the axis that grows.
        spacing: marks from the border to the first new value, and between new ones.
        upward: grow at the high end.
        growing: double the spacing from each new value to the next.
    """
    values = grid[axis.name]
    start = nearest(axis, math.log2(values[-1 if upward else 0]))
    by = spacing if upward else -spacing
    ways = [2 ** (i + 1) - 1 if growing else i + 1 for i in range(EXTENSION_CELLS)]
    new = [value_at(axis, start + by * way) for way in ways]
    allowed = [value for value in new if value <= axis.most]
    return {**grid, axis.name: tuple(sorted((*values, *allowed)))}


def star(spec: LadderSpec) -> list[Point]:
    """Return the first points: the lattice's middle, and a third of the range off it on each axis.

    >>> lr, decay = Axis("lr", 1, 64, 7), Axis("weight_decay", 1, 4, 3)
    >>> [tuple(point.values()) for point in star(LadderSpec((lr, decay), (32,)))]
    [(8.0, 2.0), (2.0, 2.0), (32.0, 2.0), (8.0, 1.0), (8.0, 4.0)]
    """
    centre = {axis.name: axis.low if axis.is_fixed else middle(axis) for axis in spec.axes}
    points = [Point.of(centre)]
    for axis in spec.swept:
        most, at = axis.points - 1, (axis.points - 1) // 2
        offset = max(1, round(most / 3))
        for index in (max(0, at - offset), min(most, at + offset)):
            if index != at:
                points.append(
                    Point.of({**centre, axis.name: value_at(axis, marks_per_step(axis) * index)})
                )
    return points


def place_of(spec: LadderSpec, point: Mapping[str, float]) -> Array:
    """Return a point's place: (k,) octaves of its swept axes."""
    return np.log2([point[axis.name] for axis in spec.swept])


def point_at(spec: LadderSpec, place: Sequence[float] | Array) -> Point:
    """Return the point at a place (octaves per swept axis), rounded like the lattice's values."""
    swept = {
        axis.name: min(round_value(2 ** float(at)), axis.most)
        for axis, at in zip(spec.swept, place, strict=True)
    }
    return Point.of({axis.name: swept.get(axis.name, axis.low) for axis in spec.axes})


def cells(spec: LadderSpec, grid: Grid, near: Array) -> list[Point]:
    """Return a grid's points; of a large grid, those nearest to `near` (octaves) on each axis."""
    most = int(MAX_CELLS ** (1 / max(1, len(spec.swept))))
    kept = dict(grid)
    for axis, at in zip(spec.swept, near, strict=True):
        values = sorted(grid[axis.name], key=lambda v: (abs(math.log2(v) - at), v))
        kept[axis.name] = tuple(sorted(values[:most]))
    return [
        Point.of(dict(zip(kept, values, strict=True)))
        for values in itertools.product(*kept.values())
    ]
