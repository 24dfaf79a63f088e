"""The fit's input: places and losses of complete trials, and places of diverged ones."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from telescope.ladder.fit.model import Array

ROUNDING = 1e-4
"""Octaves within which two places count as the same, because lattice values are rounded."""


@dataclass(frozen=True)
class Data:
    """Measurements: one row per complete trial, and the places of diverged ones."""

    places: Array
    """(n, k) octaves: log2 of the axes' values."""
    widths: NDArray[np.int64]
    seeds: NDArray[np.int64]
    losses: Array
    walls: Array
    """(m, k) octaves of diverged points, of any width; no trial is asked for beyond one."""

    @cached_property
    def above_best(self) -> Array:
        """Loss above the lowest of the same width, nats."""
        lowest = np.array([self.losses[self.widths == w].min() for w in self.widths])
        above: Array = self.losses - lowest
        return above

    @property
    def noise_of_repeats(self) -> float:
        """Standard deviation between seeds of repeated cells, nats, without any fit; 0 for none."""
        cells: dict[tuple[float, ...], list[float]] = {}
        for width, place, loss in zip(self.widths, self.places, self.losses, strict=True):
            cells.setdefault((float(width), *place.tolist()), []).append(float(loss))
        variances = [np.var(losses, ddof=1) for losses in cells.values() if len(losses) > 1]
        return float(np.sqrt(np.mean(variances))) if variances else 0.0

    @property
    def seen(self) -> list[int]:
        """Widths with a loss, narrow first."""
        return sorted(set(self.widths.tolist()))

    @cached_property
    def same_shift(self) -> Array:
        """(n, n): 1 where two trials share a width and a further seed, and so the seed's shift."""
        first = {w: self.seeds[self.widths == w].min() for w in self.seen}
        further = self.seeds != np.array([first[w] for w in self.widths])
        alike = (self.widths[:, None] == self.widths) & (self.seeds[:, None] == self.seeds)
        same: Array = (alike & further[:, None]).astype(np.float64)
        return same

    def between_walls(self) -> tuple[Array, Array]:
        """(low, high) per axis: half way from the outermost loss to the next divergence beyond."""
        places, walls = self.places, self.walls
        low, high = np.full(places.shape[1], -np.inf), np.full(places.shape[1], np.inf)
        for axis in range(places.shape[1]):
            first, last = places[:, axis].min(), places[:, axis].max()
            below = walls[walls[:, axis] < first - ROUNDING, axis]
            beyond = walls[walls[:, axis] > last + ROUNDING, axis]
            if len(below):
                low[axis] = (first + below.max()) / 2
            if len(beyond):
                high[axis] = (last + beyond.min()) / 2
        return low, high


def walled(places: Array, walls: Array, origin: Array) -> NDArray[np.bool_]:
    """(n,) True for a place at or beyond a diverged point, as seen from `origin`, a good point.

    A place is beyond if it lies in the same direction as the diverged point and at least as far, in
    every axis in which that point differs from the origin. So a wall bounds one side only, and
    says nothing about losses.

    >>> places, wall = np.array([[1.0, 0.0], [2.0, 5.0], [3.0, -1.0]]), np.array([[2.0, 0.0]])
    >>> walled(places, wall, np.zeros(2)).tolist()
    [False, True, True]
    """
    if not len(walls):
        return np.zeros(len(places), dtype=bool)
    direction = walls - origin
    differs = np.abs(direction) > ROUNDING
    # A point that diverged at another width, but is the best here, is no wall.
    direction, differs = direction[differs.any(axis=1)], differs[differs.any(axis=1)]
    # Distance along each axis, as a multiple of the wall's; meaningless where that is 0.
    share = (places[:, None] - origin) / np.where(differs, direction, 1.0)
    beyond: NDArray[np.bool_] = np.any(np.all((share >= 1 - ROUNDING) | ~differs, axis=2), axis=1)
    return beyond
