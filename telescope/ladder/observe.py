"""Conversion of a ladder's state into the fit's input."""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import median

import numpy as np

from telescope.ladder.fit.data import Data
from telescope.ladder.fit.model import Frame
from telescope.ladder.state import State
from telescope.ladder.window import octaves, place_of
from telescope.records import Point, Result, Status

WALL = 30.0
"""Most that a loss may lie above the best and still be fitted, in multiples of the scale of good
losses. A higher loss says as little about the optimum as a divergence, and is a wall too."""


def frame_of(state: State, target: int) -> Frame:
    """Return the fit's frame: widths, lattice and scale.

    Args:
        state: the ladder; its base width has a complete result.
        target: the width to predict, one of the ladder's or not.
    """
    spec = state.spec
    ahead = sorted({result.trial.width for result in state.given_ahead})
    widths = dict.fromkeys((*spec.widths, *ahead, target))
    steps = [octaves(axis) for axis in spec.swept]
    return Frame(
        widths=tuple(widths),
        step=np.array([step for step, _ in steps]),
        span=np.array([span for _, span in steps]),
        expected_noise=max(spec.expected_noise * (reference_loss(state) / unit_of(state)), 1e-12),
    )


def reference_loss(state: State) -> float:
    """Return the first loss at base width that is no wall, in the order of asking; never 0.

    This scale stays the same, whatever wider widths show.
    """
    base = _base_losses(state)
    wall = highest_loss(state)
    first = next((loss for loss in base if loss <= wall), 0.0)
    return abs(first) or max((abs(loss) for loss in base if loss <= wall), default=0.0) or 1.0


def unit_of(state: State) -> float:
    """Return the power of two that the fit divides losses by, so that no square overflows."""
    wall = highest_loss(state)
    losses = [r.loss for r in state.evidence if r.loss is not None]
    largest = max((abs(loss) for loss in losses if loss <= wall), default=0.0) or 1.0
    return math.ldexp(0.5, math.frexp(largest)[1])


def highest_loss(state: State) -> float:
    """Return the highest loss that is fitted; a higher one counts as a wall, at any width.

    It lies `WALL` scales above the best loss of the base width. The scale is the best loss itself
    or, where that is more (losses near 0), the median excess over it. Losses enter from the best
    upwards, so that huge ones cannot move the limit, however many there are.

    Returns:
        Infinite while the base width has no loss.
    """
    losses = sorted(_base_losses(state))
    if not losses:
        return math.inf
    best = losses[0]
    above = [loss - best for loss in losses]
    least = abs(best) or next((excess for excess in above if excess > 0), 1.0)
    taken = 0
    while taken < len(above) and above[taken] <= _most_above(least, above[:taken]):
        taken += 1
    return best + _most_above(least, above[:taken])


def _base_losses(state: State) -> list[float]:
    """Return the losses of the base width, in the order of asking."""
    base = (r.loss for r in state.evidence if r.trial.width == state.spec.widths[0])
    return [loss for loss in base if loss is not None]


def _most_above(least: float, above: list[float]) -> float:
    """Return the excess up to which a loss is fitted, given the excesses below it."""
    return WALL * max(least, median(above)) if above else math.inf


def lost_points(state: State, results: Iterable[Result]) -> set[Point]:
    """Return points with a seed that diverged or lies beyond the wall: the whole point is lost."""
    wall = highest_loss(state)
    return {
        r.trial.point
        for r in results
        if r.status is Status.DIVERGED or (r.loss is not None and r.loss > wall)
    }


def observe(state: State, *, widths: Iterable[int] | None = None) -> Data:
    """Return all measurements, or those of some widths, without failed trials.

    Losses are in the unit of `unit_of`.
    """
    spec = state.spec
    of_width: dict[int, list[Result]] = {}
    for result in state.evidence:
        of_width.setdefault(result.trial.width, []).append(result)
    complete: list[Result] = []
    walls: list[Point] = []
    for width in of_width if widths is None else widths:
        results = of_width.get(width, [])
        diverged = lost_points(state, results)
        walls += sorted(diverged, key=lambda point: point.axes)
        complete += [r for r in results if r.loss is not None and r.trial.point not in diverged]
    # Sorted by loss, so that neither the order of asking nor a reflected axis changes the order.
    complete.sort(key=lambda r: (r.trial.width, r.loss, r.trial.seed))
    k = len(spec.swept)
    unit = unit_of(state) if complete else 1.0
    return Data(
        places=np.array([place_of(spec, r.trial.point) for r in complete]).reshape(-1, k),
        widths=np.array([r.trial.width for r in complete], dtype=np.int64),
        seeds=np.array([r.trial.seed for r in complete], dtype=np.int64),
        losses=np.array([(r.loss or 0.0) / unit for r in complete], dtype=float),
        walls=np.array([place_of(spec, point) for point in walls]).reshape(-1, k),
    )
