"""The minimum of a drawn surface: downhill over a grid, then to the vertex of a parabola."""

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
"""Cells that a step downhill may take along an axis; two, so that a ripple does not stop it."""
SIGNS = ((1, 1), (1, -1), (-1, 1), (-1, -1))
PATH = {1: 101, 2: 41, 3: 15, 4: 9}
"""Swept axes → points per axis of the grid on which a path between two places is looked for."""
GRID = {1: 61, 2: 25, 3: 13, 4: 9}
"""Swept axes → points per axis of the grid on which a draw's minimum is first looked for."""


@dataclass(frozen=True)
class Optimum:
    """The place of one width's lowest loss, with its uncertainty."""

    place: Array
    """(k,) octaves: the place of the lowest expected loss."""
    draws: Array
    """(draws, k) octaves: each draw's own minimum."""
    excess: Array
    """(draws,) nats, 0 or more: loss of `place` in each draw above that draw's own minimum."""

    def interval(self, axis: int, share: float = 0.9) -> tuple[float, float]:
        """Return the central interval that holds `share` of the draws and `place`, octaves."""
        tail = 50 * (1 - share)
        low, high = np.percentile(self.draws[:, axis], [tail, 100 - tail])
        at = float(self.place[axis])
        return min(float(low), at), max(float(high), at)


@dataclass(frozen=True)
class Landscape:
    """The shape of the loss around a centre, and the walls in it."""

    basis: Basis
    centre: Array
    """(k,) octaves; the descent begins there."""
    origin: Array
    """(k,) octaves; walls are seen from there."""
    walls: Array
    """(m, k) octaves of diverged points."""

    def downhill(self, polynomials: Array, low: Array, high: Array) -> Array:
        """(draws, k) octaves: the minimum that each draw reaches downhill from the centre in a box.

        The descent goes over the cells of a grid, then to the vertex of the parabola through the
        last cell and its neighbours. So a draw's optimum lies in the basin that was measured, and
        the draw's shape in unmeasured corners does not matter.
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
        # Cell numbers, with a border all around so that every cell has all its neighbours.
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
        """(draws, k) offset from the lowest cell to the vertex, in cells, at most 1 per axis.

        Args:
            beside: (draws, 5^k) losses of a cell and its neighbours; infinite outside.
            shifts: (5^k, k) offsets of these cells, the cell itself first.
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
        """(draws,) nats: each polynomial's value at its own place."""
        values: Array = np.einsum("ds,ds->d", polynomials, self.basis.shapes(places))
        return values

    def _grid(self, low: Array, high: Array) -> tuple[Array, Array]:
        """(points, k) grid over a box without places beyond a wall, and its spacing (k,)."""
        count = GRID.get(len(low), 5)
        values = [np.linspace(a, b, count if b > a else 1) for a, b in zip(low, high, strict=True)]
        grid = np.stack([axis.ravel() for axis in np.meshgrid(*values, indexing="ij")], axis=1)
        allowed = grid[~self.is_walled(grid)]
        return (allowed if len(allowed) else self.centre[None]), (high - low) / (count - 1)

    def is_walled(self, places: Array) -> NDArray[np.bool_]:
        """(n,) True for a place at or beyond a diverged point, as seen from the origin."""
        return walled(places, self.walls, self.origin)

    def lowest(self, shape: Array, box: tuple[Array, Array]) -> Array:
        """(k,) place where one polynomial is lowest in a box, found on ever finer grids."""
        low, high = box
        for _ in range(ZOOMS):
            grid, spacing = self._grid(low, high)
            place: Array = grid[np.argmin(self.basis.shapes(grid) @ shape)]
            low, high = np.maximum(place - spacing, low), np.minimum(place + spacing, high)
        return place


def joined(
    losses_at: Callable[[Array], Array], one: Array, other: Array, level: float, margin: Array
) -> bool:
    """Tell whether a path joins two places without an expected loss above `level`.

    Args:
        losses_at: maps (n, k) octaves to (n,) nats.
        one: (k,) octaves.
        other: (k,) octaves.
        level: nats.
        margin: (k,) octaves around both places in which a path may run.
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
        for axis in range(len(sizes)):  # a step along every axis in turn reaches corners too
            padded = np.pad(wider, [(int(a == axis), int(a == axis)) for a in range(len(sizes))])
            size = sizes[axis]
            wider = wider | padded.take(range(size), axis) | padded.take(range(2, size + 2), axis)
        wider &= open_cells
        if wider[end] or (wider == reached).all():
            break
        reached = wider
    return bool(wider[end])
