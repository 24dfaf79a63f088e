"""From a ladder's state to what the surface is fitted to."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from telescope.ladder.basis import Frame
from telescope.ladder.state import State
from telescope.ladder.surface import Data
from telescope.ladder.window import octaves, place_of
from telescope.records import Point, Result, Status


def frame_of(state: State, target: int) -> Frame:
    """Widths, lattice and scale; the base width has a complete result.

    Args:
        state: the ladder.
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
        expected_noise=spec.expected_noise * reference_loss(state),
    )


def reference_loss(state: State) -> float:
    """The first complete loss at base width, in the order of asking: a scale that stays."""
    first = next(r.loss for r in state.results(state.stages[0]) if r.loss is not None)
    return max(abs(first), 1e-12)


def diverged_points(results: Iterable[Result]) -> set[Point]:
    """Points with a diverged seed: the whole point counts as diverged."""
    return {r.trial.point for r in results if r.status is Status.DIVERGED}


def observe(state: State, *, widths: Iterable[int] | None = None) -> Data:
    """All that was measured, or at some widths alone; failed trials say nothing."""
    spec = state.spec
    of_width: dict[int, list[Result]] = {}
    for result in state.evidence:
        of_width.setdefault(result.trial.width, []).append(result)
    complete: list[Result] = []
    walls: list[Point] = []
    for width in of_width if widths is None else widths:
        results = of_width.get(width, [])
        diverged = diverged_points(results)
        walls += sorted(diverged, key=lambda point: point.axes)
        complete += [r for r in results if r.loss is not None and r.trial.point not in diverged]
    # By loss: an order that neither the order of asking nor a reflection of an axis changes.
    complete.sort(key=lambda r: (r.trial.width, r.loss, r.trial.seed))
    k = len(spec.swept)
    return Data(
        places=np.array([place_of(spec, r.trial.point) for r in complete]).reshape(-1, k),
        widths=np.array([r.trial.width for r in complete], dtype=np.int64),
        seeds=np.array([r.trial.seed for r in complete], dtype=np.int64),
        losses=np.array([r.loss for r in complete], dtype=float),
        walls=np.array([place_of(spec, point) for point in walls]).reshape(-1, k),
    )
