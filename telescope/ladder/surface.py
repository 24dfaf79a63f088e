"""The loss near its optimum as one surface over axes and width, with what is not known about it.

In octaves u of the swept axes from a centre near the optimum, the loss at width n is

    level(n) + g(n)·u + Σ κ u² + Σ c u u' + Σ s skew(u)

with one curvature κ, tilt c and skew s for all widths, up to a small share of a width's own, and a
gradient g that drifts with the width by one of the laws of `drift`. Near its minimum loss is close
to quadratic in log2 of the learning rate (arXiv 2601.05049), further away it is not: a measurement
counts the less the further it lies above the best of its width, `MISFIT`, so the fit is local
without a cut-off. Noise, misfit and law are averaged over by their evidence, never fixed. What
comes out is a set of draws: any statement about optimum or loss is a share or a mean of these.

Deterministic, whatever the order of the results. Reflecting an axis reflects the draws.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from telescope.ladder.basis import Array, Basis, Frame
from telescope.ladder.drift import LAWS

MISFIT = (0.1, 0.3)
"""Standard deviation of the model's error, as a share of the loss above the best; both count."""
NOISE_SCALES = np.logspace(-1.5, 1.5, 13)
"""Noise between seeds that is considered, in multiples of what is expected."""
NOISE_PRIOR = 1.0
"""Its prior is log-normal around what is expected: the standard deviation of the logarithm."""
SEED_SHIFT = 2.0
"""A further seed's shift of all points of a width, in standard deviations of the noise."""
REACH = 3.0
"""An optimum is looked for within this many lattice steps of the centre."""
DRAWS = 128
"""Draws before they are reflected in every axis."""
ITERATIONS = 4
LEAST_CURVATURE = 1e-3
"""Of the first guess of the curvature: what a flat axis is taken to have, for the priors alone."""
LEAST_BOWLS = 0.05
"""Share of draws that curve upwards in every axis below which none is left out."""
ROUNDING = 1e-4
"""Octaves within which places are the same: values on the lattice are rounded."""
AT_WALL = 0.1
"""Lattice steps from the last place that is allowed before a divergence."""
ZOOMS = 4
NEWTON_STEPS = 3
GRID = {1: 61, 2: 25, 3: 13, 4: 9}
"""Swept axes → points per axis of the grid on which a draw's minimum is first looked for."""


@dataclass(frozen=True)
class Data:
    """What was measured: one row per complete trial, and where trials diverged."""

    places: Array
    """(n, k) octaves: log2 of the axes' values."""
    widths: NDArray[np.int64]
    seeds: NDArray[np.int64]
    losses: Array
    walls: Array
    """(m, k) octaves of diverged points, of any width: none of them is looked beyond."""

    @cached_property
    def above_best(self) -> Array:
        """Loss above the lowest of the same width, nats."""
        lowest = np.array([self.losses[self.widths == w].min() for w in self.widths])
        above: Array = self.losses - lowest
        return above

    @property
    def noise_of_repeats(self) -> float:
        """Nats between seeds at the cells that have several, whatever any fit says; 0 for none."""
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
        """(n, n): 1 where two trials share a width and a further seed, so also its shift."""
        first = {w: self.seeds[self.widths == w].min() for w in self.seen}
        further = self.seeds != np.array([first[w] for w in self.widths])
        alike = (self.widths[:, None] == self.widths) & (self.seeds[:, None] == self.seeds)
        same: Array = (alike & further[:, None]).astype(np.float64)
        return same


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
class _Posterior:
    """What the data say for each hypothesis (law, noise, misfit)."""

    columns: tuple[Array, ...]
    """Per law (n, columns)."""
    covariance: Array
    """(laws, settings, n, n) of the measured losses."""
    weights: Array
    """(laws, settings), sum 1."""
    noise: Array
    """(settings,) nats."""
    misfit: Array
    """(settings,)"""

    def mean(self, losses: Array, variances: Array) -> Array:
        """(columns,) expected coefficients over all hypotheses."""
        solved = np.linalg.solve(self.covariance, losses[:, None])[..., 0]
        per_law = np.einsum("ls,lsn->ln", self.weights, solved)
        moved = [x @ columns for x, columns in zip(per_law, self.columns, strict=True)]
        mean: Array = variances * np.sum(moved, axis=0)
        return mean


def _weigh(basis: Basis, data: Data) -> _Posterior:
    """Evidence of every hypothesis: how probable the losses are under it."""
    noise, misfit = (
        grid.ravel()
        for grid in np.meshgrid(basis.frame.expected_noise * NOISE_SCALES, MISFIT, indexing="ij")
    )
    prior = -0.5 * (np.log(noise / basis.frame.expected_noise) / NOISE_PRIOR) ** 2
    variance = noise[:, None] ** 2 + (misfit[:, None] * data.above_best) ** 2
    measured = (SEED_SHIFT * noise[:, None, None]) ** 2 * data.same_shift + variance[
        :, None, :
    ] * np.eye(len(data.losses))
    columns = tuple(basis.columns(data.places, data.widths, law) for law in LAWS)
    covariance = np.stack([(rows * basis.deviations**2) @ rows.T + measured for rows in columns])
    lower = np.linalg.cholesky(covariance)
    whitened = np.linalg.solve(lower, data.above_best[:, None])[..., 0]
    log_evidence = -0.5 * (whitened**2).sum(-1)
    log_evidence -= np.log(np.diagonal(lower, axis1=-2, axis2=-1)).sum(-1)
    log_evidence += prior + np.log([law.prior for law in LAWS])[:, None]
    weights = np.exp(log_evidence - log_evidence.max())
    return _Posterior(columns, covariance, weights / weights.sum(), noise, misfit)


class Surface:
    """The fitted surface: draws of its coefficients, and what follows from them.

    Attributes:
        origin: (k,) octaves, the cell with the lowest loss at the widest width measured: walls are
            seen from there.
        centre: (k,) octaves, near the optimum of the widest width measured.
        curvature: (k,) nats per square octave, the expected one.
        noise: nats between seeds, the root of the expected variance.
        law_weights: probability of each of `drift.LAWS`.
        laws: (draws,) the law of each draw, its number among `drift.LAWS`.
        bends: (k,) probability that the loss curves upwards along an axis, before draws of which
            it does not were left out.
    """

    def __init__(self, frame: Frame, data: Data) -> None:
        """Fit; `data` has two losses or more at the base width."""
        self.frame, self.data = frame, data
        above = data.above_best
        at_base = above[data.widths == frame.widths[0]]
        spread = max(float(np.median(at_base)), frame.expected_noise)
        height = max(float(above.max()), spread)
        widest = data.widths == data.seen[-1]
        self.origin = data.places[widest][np.argmin(above[widest])]
        self.centre = self.origin
        self.curvature = spread / (frame.span / 4) ** 2
        least = self.curvature * LEAST_CURVATURE
        for _ in range(ITERATIONS):
            self.basis = Basis(frame, self.centre, self.curvature, spread=spread, height=height)
            posterior = _weigh(self.basis, data)
            mean = posterior.mean(above, self.basis.deviations**2)
            law = LAWS[int(posterior.weights.sum(1).argmax())]
            shape = self.basis.polynomial(data.seen[-1], law) @ mean
            self.centre = self._lowest(shape, self.support())
            k = self.basis.axes
            self.curvature = np.maximum(shape[k : 2 * k], least)
        self.basis = Basis(frame, self.centre, self.curvature, spread=spread, height=height)
        posterior = _weigh(self.basis, data)
        self.law_weights = posterior.weights.sum(1)
        self.noise = float(np.sqrt(posterior.weights.sum(0) @ posterior.noise**2))
        self._coefficients, self.laws = self._draw(posterior)

    def _draw(self, posterior: _Posterior) -> tuple[Array, NDArray[np.int64]]:
        """(draws, columns) coefficients and the law of each; those that are no bowl are left out.

        Every draw comes with its reflections in all axes, so that the set as a whole follows a
        reflection of the data.
        """
        flat = posterior.weights.ravel()
        quantiles = (np.arange(DRAWS) + 0.5) / DRAWS
        chosen = np.minimum(np.searchsorted(np.cumsum(flat), quantiles), len(flat) - 1)
        generator = np.random.default_rng(0)
        normal = generator.standard_normal((DRAWS, len(self.basis.deviations)))
        errors = generator.standard_normal((2, DRAWS, len(self.data.losses)))
        signs = np.array(list(itertools.product((1, -1), repeat=self.basis.axes)))
        reflections = np.where(self.basis.odd, signs[:, :, None], 1).prod(axis=1)
        drawn, laws = [], []
        for hypothesis in np.unique(chosen):
            law, setting = divmod(int(hypothesis), len(posterior.noise))
            mine = chosen == hypothesis
            prior = (normal[mine] * self.basis.deviations)[None] * reflections[:, None]
            drawn.append(
                self._condition(
                    posterior,
                    law,
                    setting,
                    prior.reshape(-1, prior.shape[-1]),
                    np.tile(errors[:, mine], (1, len(signs), 1)),
                )
            )
            laws.append(np.full(len(drawn[-1]), law))
        coefficients, of_law = np.concatenate(drawn), np.concatenate(laws)
        k, start = self.basis.axes, self.basis.shape.start
        self.bends = (coefficients[:, start + k : start + 2 * k] > 0).mean(axis=0)
        bowl = self.basis.is_bowl(coefficients)
        if bowl.mean() < LEAST_BOWLS:
            return coefficients, of_law
        return coefficients[bowl], of_law[bowl]

    def _condition(
        self, posterior: _Posterior, law: int, setting: int, prior: Array, errors: Array
    ) -> Array:
        """Turn draws of the prior into draws of the posterior: add what the data correct.

        A draw of prior and noise gives losses; its coefficients move by what these miss of the
        measured ones (Matheron's rule).
        """
        noise, misfit = posterior.noise[setting], posterior.misfit[setting]
        above, shift = self.data.above_best, self.data.same_shift
        # The shift's covariance is singular: all trials of a seed move together.
        root = np.linalg.cholesky(shift + 1e-9 * np.eye(len(above)))
        error = errors[0] * np.hypot(noise, misfit * above)
        error += SEED_SHIFT * noise * errors[1] @ root.T
        columns = posterior.columns[law]
        missed = above - prior @ columns.T - error
        solved = np.linalg.solve(posterior.covariance[law, setting], missed.T)
        corrected: Array = prior + (solved.T @ columns) * self.basis.deviations**2
        return corrected

    def support(self, margin: float = 0.5) -> tuple[Array, Array]:
        """The box in which an optimum is believed: what was measured, and `margin` steps beyond.

        Returns:
            (low, high), each (k,) octaves; at most `REACH` steps from the centre.
        """
        step, lowest, highest = self.frame.step, self.data.places.min(0), self.data.places.max(0)
        low, high = self._between_walls()
        return (
            np.maximum.reduce([self.centre - REACH * step, lowest - margin * step, low]),
            np.minimum.reduce([self.centre + REACH * step, highest + margin * step, high]),
        )

    def _between_walls(self) -> tuple[Array, Array]:
        """(low, high) per axis: half way from what survived to the nearest divergence beyond it."""
        places, walls = self.data.places, self.data.walls
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

    def at_wall(self, place: Array) -> list[int]:
        """The axes along which a place lies as near to a divergence as it may."""
        low, high = self._between_walls()
        near = AT_WALL * self.frame.step
        return [int(a) for a in np.flatnonzero((place - low < near) | (high - place < near))]

    def polynomials(self, width: int) -> Array:
        """(draws, shape) coefficients of the polynomial at one of the frame's widths."""
        maps = np.stack([self.basis.polynomial(width, law) for law in LAWS])
        of_law = np.eye(len(LAWS))[self.laws]
        shapes: Array = np.einsum("lsc,dc,dl->ds", maps, self._coefficients, of_law, optimize=True)
        return shapes

    def levels(self, width: int) -> Array:
        """(draws,) nats: the loss at the centre, above the lowest measured at that width."""
        levels: Array = self._coefficients[:, self.frame.widths.index(width)]
        return levels

    def loss_at(self, width: int, place: Array) -> float:
        """Nats: the expected loss at a place and a width that was measured."""
        lowest = self.data.losses[self.data.widths == width].min()
        shape = self.polynomials(width) @ self.basis.shapes(place[None])[0]
        return float(lowest + (self.levels(width) + shape).mean())

    def optimum(
        self, width: int, *, margin: float = 0.5, held: Mapping[int, float] | None = None
    ) -> Optimum:
        """Where the loss is lowest at one width.

        Args:
            width: one of the frame's.
            margin: steps beyond what was measured that are allowed.
            held: axis → octaves at which the answer, but not the draws, keeps it.
        """
        low, high = self.support(margin)
        grid, spacing = self._grid(low, high)
        polynomials = self.polynomials(width)
        coarse = grid[np.argmin(polynomials @ self.basis.shapes(grid).T, axis=1)]
        draws = self._polish(polynomials, coarse, spacing, (low.copy(), high.copy()))
        for axis, value in (held or {}).items():
            low[axis] = high[axis] = value
        place = self._lowest(polynomials.mean(axis=0), (low, high))
        lowest = np.einsum("ds,ds->d", polynomials, self.basis.shapes(draws))
        there = polynomials @ self.basis.shapes(place[None])[0]
        return Optimum(place, draws, np.maximum(there - lowest, 0.0))

    def _grid(self, low: Array, high: Array) -> tuple[Array, Array]:
        """(points, k) of a grid over a box, less what lies beyond a wall; and its spacing (k,)."""
        count = GRID.get(len(low), 5)
        values = [np.linspace(a, b, count if b > a else 1) for a, b in zip(low, high, strict=True)]
        grid = np.stack([axis.ravel() for axis in np.meshgrid(*values, indexing="ij")], axis=1)
        allowed = grid[~self.is_walled(grid)]
        return (allowed if len(allowed) else self.centre[None]), (high - low) / (count - 1)

    def is_walled(self, places: Array) -> NDArray[np.bool_]:
        """(n,) whether places lie at or beyond a diverged point, as seen from the origin."""
        return walled(places, self.data.walls, self.origin)

    def _lowest(self, shape: Array, box: tuple[Array, Array]) -> Array:
        """(k,) the lowest place of one polynomial in a box, by grids that zoom in."""
        low, high = box
        for _ in range(ZOOMS):
            grid, spacing = self._grid(low, high)
            place: Array = grid[np.argmin(self.basis.shapes(grid) @ shape)]
            low, high = np.maximum(place - spacing, low), np.minimum(place + spacing, high)
        return place

    def _polish(
        self, polynomials: Array, start: Array, spacing: Array, box: tuple[Array, Array]
    ) -> Array:
        """(draws, k) the minima near the grid's: a few Newton steps, none beyond the next cell."""
        low, high = np.maximum(start - spacing, box[0]), np.minimum(start + spacing, box[1])
        places = start
        for _ in range(NEWTON_STEPS):
            gradient, hessian = self.basis.slopes(places, polynomials, self.curvature)
            step = np.linalg.solve(hessian, gradient[..., None])[..., 0]
            places = np.clip(places - step, low, high)
        before, after = (
            np.einsum("ds,ds->d", polynomials, self.basis.shapes(p)) for p in (start, places)
        )
        return np.where((after < before)[:, None], places, start)


def walled(places: Array, walls: Array, origin: Array) -> NDArray[np.bool_]:
    """(n,) whether a place lies at or beyond a diverged point, as seen from a good one.

    Beyond means at least as far as the diverged point in every axis in which that differs from
    the origin, and in the same direction. So a wall bounds from one side, and says nothing of
    losses.

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
    # Along each axis in units of the way to the wall; where the wall does not differ, anything.
    share = (places[:, None] - origin) / np.where(differs, direction, 1.0)
    beyond: NDArray[np.bool_] = np.any(np.all((share >= 1 - ROUNDING) | ~differs, axis=2), axis=1)
    return beyond
