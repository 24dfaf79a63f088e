"""Where a drawn surface is lowest: downhill over a grid, then to the vertex of a parabola."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from telescope.ladder.fit.data import walled
from telescope.ladder.fit.model import Array, Basis

ZOOMS = 3
STRIDES = (0, -1, 1, -2, 2)
"""Cells that a step downhill takes along an axis: what lies behind a ripple is still seen."""
SIGNS = ((1, 1), (1, -1), (-1, 1), (-1, -1))
PATH = {1: 101, 2: 41, 3: 15, 4: 9}
"""Swept axes → points per axis of the grid on which two places are joined."""
GRID = {1: 61, 2: 25, 3: 13, 4: 9}
"""Swept axes → points per axis of the grid on which a draw's minimum is first looked for."""


@dataclass(frozen=True)
class Optimum:
    """Where the loss of one width is lowest, as far as is known."""

    place: Array
    """(k,) octaves: the lowest expected loss."""
    draws: Array
    """(draws, k) octaves: each draw's own minimum."""
    excess: Array
    """(draws,) nats: what `place` costs in each draw above its own minimum; 0 or more."""

    def interval(self, axis: int, share: float = 0.9) -> tuple[float, float]:
        """The central interval that holds `share` of the draws, octaves."""
        tail = 50 * (1 - share)
        low, high = np.percentile(self.draws[:, axis], [tail, 100 - tail])
        at = float(self.place[axis])
        return min(float(low), at), max(float(high), at)


@dataclass(frozen=True)
class Landscape:
    """The shape of the loss around a centre, and what of it lies behind a wall."""

    basis: Basis
    centre: Array
    """(k,) octaves; the way downhill begins there."""
    origin: Array
    """(k,) octaves; walls are seen from there."""
    walls: Array
    """(m, k) octaves of diverged points."""

    def downhill(self, polynomials: Array, low: Array, high: Array) -> Array:
        """(draws, k) octaves, where each draw leads downhill from the centre in a box.

        The way leads over the cells of a grid, then to the vertex of the parabola through the last
        one and its neighbours. So a draw's optimum is that of the basin that was found: the shape
        of draws in corners that nobody measured says nothing of it.
        """
        count = GRID.get(len(low), 5)
        values = [np.linspace(a, b, count if b > a else 1) for a, b in zip(low, high, strict=True)]
        sizes = [len(axis) for axis in values]
        grid = np.stack([axis.ravel() for axis in np.meshgrid(*values, indexing="ij")], axis=1)
        out = self.is_walled(grid)
        if out.all():
            return np.tile(self.centre, (len(polynomials), 1))
        spacing = np.maximum((high - low) / (count - 1), 1e-9)
        away = (((grid - self.centre) / spacing) ** 2).sum(1) + np.where(out, np.inf, 0.0)
        losses = polynomials @ self.basis.shapes(grid).T
        losses[:, out] = np.inf
        # Numbers of cells with a border all around, so that every cell has all its neighbours.
        bordered = np.pad(np.arange(len(grid)).reshape(sizes), 2, constant_values=len(grid))
        losses = np.concatenate([losses, np.full((len(losses), 1), np.inf)], axis=1)
        shifts = np.array(list(itertools.product(STRIDES, repeat=len(low))))
        beside = np.stack(
            [
                bordered[tuple(slice(2 + d, 2 + d + n) for d, n in zip(shift, sizes, strict=True))]
                for shift in shifts
            ],
            axis=-1,
        ).reshape(len(grid), -1)
        at = np.full(len(polynomials), int(np.argmin(away)))
        rows = np.arange(len(polynomials))[:, None]
        for _ in range(sum(sizes)):
            lower = losses[rows, beside[at]].argmin(axis=1)
            if not lower.any():
                break
            at = beside[at, lower]
        places = grid[at] + spacing * self._vertex(losses[rows, beside[at]], shifts)
        places = np.clip(places, low, high)
        better = self.values(polynomials, places) < losses[rows[:, 0], at]
        lowest: Array = np.where((better & ~self.is_walled(places))[:, None], places, grid[at])
        return lowest

    def _vertex(self, beside: Array, shifts: NDArray[np.int64]) -> Array:
        """(draws, k) cells from the lowest cell to the vertex; none beyond a cell.

        Args:
            beside: (draws, 3^k) losses of a cell and its neighbours; infinite outside.
            shifts: (3^k, k) where they are.
        """
        k = shifts.shape[1]
        number = {tuple(shift): i for i, shift in enumerate(shifts.tolist())}
        unit = np.eye(k, dtype=int)
        here = beside[:, 0]
        up = np.stack([beside[:, number[tuple(e)]] for e in unit.tolist()], axis=1)
        down = np.stack([beside[:, number[tuple((-e).tolist())]] for e in unit], axis=1)
        inside = np.isfinite(up) & np.isfinite(down)
        up, down = np.where(inside, up, here[:, None]), np.where(inside, down, here[:, None])
        gradient, bent = (up - down) / 2, np.maximum(up + down - 2 * here[:, None], 1e-300)
        hessian = np.zeros((len(beside), k, k))
        hessian[:, np.arange(k), np.arange(k)] = bent
        for a, b in self.basis.pairs:
            corners = [
                beside[:, number[tuple((s * unit[a] + t * unit[b]).tolist())]] for s, t in SIGNS
            ]
            known = np.all(np.isfinite(corners), axis=0)
            one, two, three, four = (np.where(known, corner, 0.0) for corner in corners)
            most = 0.95 / max(1, k - 1) * np.sqrt(bent[:, a] * bent[:, b])
            tilt = np.clip((one + four - two - three) / 4, -most, most)
            hessian[:, a, b] = hessian[:, b, a] = tilt
        step = -np.linalg.solve(hessian, gradient[..., None])[..., 0]
        vertex: Array = np.clip(step, -1, 1)
        return vertex

    def values(self, polynomials: Array, places: Array) -> Array:
        """(draws,) of each polynomial at its own place."""
        values: Array = np.einsum("ds,ds->d", polynomials, self.basis.shapes(places))
        return values

    def _grid(self, low: Array, high: Array) -> tuple[Array, Array]:
        """(points, k) of a grid over a box, less what lies beyond a wall; and its spacing (k,)."""
        count = GRID.get(len(low), 5)
        values = [np.linspace(a, b, count if b > a else 1) for a, b in zip(low, high, strict=True)]
        grid = np.stack([axis.ravel() for axis in np.meshgrid(*values, indexing="ij")], axis=1)
        allowed = grid[~self.is_walled(grid)]
        return (allowed if len(allowed) else self.centre[None]), (high - low) / (count - 1)

    def is_walled(self, places: Array) -> NDArray[np.bool_]:
        """(n,) whether places lie at or beyond a diverged point, as seen from the origin."""
        return walled(places, self.walls, self.origin)

    def lowest(self, shape: Array, box: tuple[Array, Array]) -> Array:
        """(k,) the lowest place of one polynomial in a box, by grids that zoom in."""
        low, high = box
        for _ in range(ZOOMS):
            grid, spacing = self._grid(low, high)
            place: Array = grid[np.argmin(self.basis.shapes(grid) @ shape)]
            low, high = np.maximum(place - spacing, low), np.minimum(place + spacing, high)
        return place


def joined(
    losses_at: Callable[[Array], Array], one: Array, other: Array, level: float, margin: Array
) -> bool:
    """Tell whether a path joins two places on which no expected loss is above a level.

    Args:
        losses_at: takes (n, k) octaves to (n,) nats.
        one: (k,) octaves.
        other: (k,) octaves.
        level: nats.
        margin: (k,) octaves around both in which paths are looked for.
    """
    low, high = np.minimum(one, other), np.maximum(one, other)
    axes = [
        np.linspace(a, b, PATH.get(len(low), 5))
        for a, b in zip(low - margin, high + margin, strict=True)
    ]
    grid = np.stack([axis.ravel() for axis in np.meshgrid(*axes, indexing="ij")], axis=1)
    losses = losses_at(grid)
    sizes = [len(axis) for axis in axes]
    start, end = (
        np.unravel_index(int(((grid - place) ** 2).sum(1).argmin()), sizes)
        for place in (one, other)
    )
    open_cells = (losses <= level).reshape(sizes)
    open_cells[start] = open_cells[end] = True
    reached = np.zeros(sizes, dtype=bool)
    reached[start] = True
    for _ in range(open_cells.size):
        wider = reached.copy()
        for axis in range(len(sizes)):  # a step along every axis: corners too
            padded = np.pad(wider, [(int(a == axis), int(a == axis)) for a in range(len(sizes))])
            size = sizes[axis]
            wider = wider | padded.take(range(size), axis) | padded.take(range(2, size + 2), axis)
        wider &= open_cells
        if wider[end] or (wider == reached).all():
            break
        reached = wider
    return bool(wider[end])
