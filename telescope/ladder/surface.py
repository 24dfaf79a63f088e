"""The loss near its optimum as one surface over axes and width, with what is not known about it.

In octaves u of the swept axes from a centre near the optimum, the loss at width n is

    level(n) + depth(n) · (g(n)·u + Σ κ u² + Σ c u u' + Σ s skew(u) + bend(u) · Σ κ u²)

with one curvature κ, tilt c, skew s and bend for all widths, a gradient g that drifts with the
width and a depth that is a power of it, by the hypotheses of `drift`. Near its minimum loss is
close to quadratic in log2 of the learning rate (arXiv 2601.05049), further away it is not: it may
be one-sided, end in a plateau or in a wall. The skew and the bend, a smooth function (`basis`), are
for that; and a measurement counts the less the further it lies above the best of its width,
`MISFIT`, so the fit is local without a cut-off. Noise, misfit, bend and hypothesis are averaged
over by their evidence, never fixed. What comes out is a set of draws: any statement about optimum
or loss is a share or a mean of these.

Deterministic, whatever the order of the results. Reflecting an axis reflects the draws.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from telescope.ladder.basis import Array, Basis, Frame
from telescope.ladder.drift import DEEPENINGS, HYPOTHESES, LAWS, Law

INDISTINCT = 1 / 60
"""Share of the noise that is expected: so near to its lowest along an axis, a smooth fit does not
know where the optimum is, however many trials there are. Kinks and unequal sides of real surfaces
move a fit's vertex by about so much, 0.005 % of the loss. An assumption, chosen on the families of
results/reference/calibration: without it, half of the intervals missed the optimum of public sweeps
of the lr."""
MOST_BLURRED = 0.3
"""Octaves, standard deviation, by which that moves an optimum at most: along a flat axis."""
MISFIT = (0.05, 0.2)
"""Standard deviation of the model's error, as a share of the loss above the best; both count."""
BENDS = (0.0, 0.2, 0.5)
"""Standard deviation of the bend of the bowl, as a share of it; all count."""
NOISE_SCALES = np.logspace(-1.5, 1.5, 9)
"""Noise between seeds that is considered, in multiples of what is expected."""
NOISE_PRIOR = 1.0
"""Its prior is log-normal around what is expected: the standard deviation of the logarithm."""
SEED_SHIFT = 2.0
"""A further seed's shift of all points of a width, in standard deviations of the noise."""
REACH = 3.0
"""An optimum is looked for within this many lattice steps of the centre."""
DRAWS = 128
"""Draws before they are reflected in every axis."""
ITERATIONS = 3
FIRST_GUESS = tuple(h for h in HYPOTHESES if h.deepening in (0.0, 0.33))
"""The hypotheses of the first guesses, which look for the centre and the curvature alone."""
NEGLIGIBLE = 1e-3
"""Share of the most probable hypothesis's weight below which a first guess leaves one out."""
LEAST_CURVATURE = 1e-3
"""Of the first guess of the curvature: what a flat axis is taken to have, for the priors alone."""
LEAST_BOWLS = 0.05
"""Share of draws that curve upwards in every axis below which none is left out."""
ROUNDING = 1e-4
"""Octaves within which places are the same: values on the lattice are rounded."""
AT_WALL = 0.1
"""Lattice steps from the last place that is allowed before a divergence."""
ZOOMS = 3
STRIDES = (0, -1, 1, -2, 2)
"""Cells that a step downhill takes along an axis: what lies behind a ripple is still seen."""
SIGNS = ((1, 1), (1, -1), (-1, 1), (-1, -1))
PATH = {1: 101, 2: 41, 3: 15, 4: 9}
"""Swept axes → points per axis of the grid on which two places are joined."""
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
    """Findings of the data for each hypothesis with each setting.

    A hypothesis is one of `drift.HYPOTHESES`; a setting is noise, misfit and share of the bend.
    """

    columns: Array
    """(hypotheses, n, columns)."""
    covariance: Array
    """(hypotheses, settings, n, n) of the measured losses."""
    weights: Array
    """(hypotheses, settings), sum 1."""
    noise: Array
    """(settings,) nats."""
    misfit: Array
    """(settings,)"""
    variances: Array
    """(settings, columns) of the coefficients, before any result."""

    def mean(self, losses: Array) -> Array:
        """(columns,) expected coefficients over all that is probable."""
        of_law, setting = np.nonzero(self.weights > NEGLIGIBLE * self.weights.max())
        weights = self.weights[of_law, setting]
        solved = np.linalg.solve(self.covariance[of_law, setting], losses[:, None])[..., 0]
        moved = np.einsum("hn,hnc->hc", solved, self.columns[of_law])
        mean: Array = (weights / weights.sum()) @ (moved * self.variances[setting])
        return mean


def _weigh(
    basis: Basis,
    data: Data,
    hypotheses: Sequence[Law] = HYPOTHESES,
    *,
    scales: Array = NOISE_SCALES,
    bends: Sequence[float] = BENDS,
) -> _Posterior:
    """Evidence of every hypothesis: how probable the losses are under it."""
    noise, misfit, _ = (
        grid.ravel()
        for grid in np.meshgrid(basis.frame.expected_noise * scales, MISFIT, bends, indexing="ij")
    )
    prior = -0.5 * (np.log(noise / basis.frame.expected_noise) / NOISE_PRIOR) ** 2
    variance = noise[:, None] ** 2 + basis.misfit(data.above_best, misfit[:, None]) ** 2
    measured = (SEED_SHIFT * noise[:, None, None]) ** 2 * data.same_shift + variance[
        :, None, :
    ] * np.eye(len(data.losses))
    columns = basis.columns(data.places, data.widths, hypotheses)
    variances = np.tile(basis.deviations**2, (len(bends), 1))
    variances[:, basis.bend] *= np.square(bends)[:, None]
    by_bend = [(columns * v) @ columns.transpose(0, 2, 1) for v in variances]
    number = np.tile(np.arange(len(bends)), len(noise) // len(bends))
    covariance = np.stack(by_bend, axis=1)[:, number] + measured
    log_evidence = _log_evidence(covariance, data.above_best)
    log_evidence += prior + np.log([h.prior for h in hypotheses])[:, None]
    weights = np.exp(log_evidence - log_evidence.max())
    weights /= weights.sum()
    return _Posterior(columns, covariance, weights, noise, misfit, variances[number])


def _probable_scales(guess: _Posterior) -> Array:
    """Those of `NOISE_SCALES` that a first guess has not ruled out, each with its neighbours."""
    by_scale = guess.weights.sum(0).reshape(len(NOISE_SCALES), -1).sum(1)
    likely = np.flatnonzero(by_scale > NEGLIGIBLE * by_scale.max())
    kept: Array = NOISE_SCALES[max(0, likely[0] - 1) : likely[-1] + 2]
    return kept


def _log_evidence(covariance: Array, losses: Array) -> Array:
    """Log density of the losses, mean 0, under each of many covariances, up to a constant."""
    n = len(losses)
    # One more row: the factor's last row is then the losses, solved by the factor.
    wider = np.empty((*covariance.shape[:-2], n + 1, n + 1))
    wider[..., :n, :n] = covariance
    wider[..., n, :n] = wider[..., :n, n] = losses
    # Large enough for the last diagonal element, which nobody reads, to exist.
    wider[..., n, n] = 1 + 2 * (losses**2).sum() / np.diagonal(covariance, 0, -2, -1).min() * 1e6
    lower = np.linalg.cholesky(wider)
    diagonal = np.diagonal(lower, axis1=-2, axis2=-1)[..., :n]
    density: Array = -0.5 * (lower[..., n, :n] ** 2).sum(-1) - np.log(diagonal).sum(-1)
    return density


class Surface:
    """The fitted surface: draws of its coefficients, and what follows from them.

    Attributes:
        origin: (k,) octaves, the cell with the lowest loss at the widest width measured: walls are
            seen from there.
        centre: (k,) octaves, near the optimum of the widest width measured.
        curvature: (k,) nats per square octave, the expected one.
        noise: nats between seeds, the root of the expected variance.
        law_weights: probability of each of `drift.LAWS`.
        deepening: octaves per doubling of the width by which the excess loss grows, expected.
        laws: (draws,) the law of each draw, its number among `drift.LAWS`.
        bends: (k,) probability that the loss curves upwards along an axis, before draws of which
            it does not were left out.
    """

    def __init__(self, frame: Frame, data: Data) -> None:
        """Fit; `data` has two losses or more at the base width."""
        self.frame, self.data = frame, data
        self._optima: dict[tuple[object, ...], Optimum] = {}
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
            self.basis = self._basis_at(spread, height)
            posterior = _weigh(self.basis, data, FIRST_GUESS, bends=BENDS[1:2])
            mean = posterior.mean(above)
            law = FIRST_GUESS[int(posterior.weights.sum(1).argmax())]
            shape = self.basis.polynomial(data.seen[-1], law) @ mean
            self.centre = self._lowest(shape, self.support())
            k = self.basis.axes
            at_base = self.basis.polynomial(frame.widths[0], law) @ mean
            self.curvature = np.maximum(at_base[k : 2 * k], least)
        self.basis = self._basis_at(spread, height)
        posterior = _weigh(self.basis, data, scales=_probable_scales(posterior))
        of_hypothesis = posterior.weights.sum(1)
        self.law_weights = of_hypothesis.reshape(len(LAWS), -1).sum(1)
        self.deepening = float(of_hypothesis @ [h.deepening for h in HYPOTHESES])
        self.noise = float(np.sqrt(posterior.weights.sum(0) @ posterior.noise**2))
        self._coefficients, self._hypothesis = self._draw(posterior)
        self.laws = self._hypothesis // len(DEEPENINGS)

    def _basis_at(self, spread: float, height: float) -> Basis:
        """The columns around the centre as it is taken to be now."""
        low, high = self.data.places.min(0), self.data.places.max(0)
        reach = np.maximum(high - self.centre, self.centre - low) + self.frame.step
        return Basis(
            self.frame, self.centre, self.curvature, spread=spread, height=height, reach=reach
        )

    def _draw(self, posterior: _Posterior) -> tuple[Array, NDArray[np.int64]]:
        """(draws, columns) coefficients and the hypothesis of each; without those that are no bowl.

        Every draw comes with its reflections in all axes, so that the set as a whole follows a
        reflection of the data.
        """
        flat = posterior.weights.ravel()
        quantiles = (np.arange(DRAWS) + 0.5) / DRAWS
        chosen = np.minimum(np.searchsorted(np.cumsum(flat), quantiles), len(flat) - 1)
        of_law, setting = np.divmod(chosen, len(posterior.noise))
        generator = np.random.default_rng(0)
        normal = generator.standard_normal((DRAWS, len(self.basis.deviations)))
        errors = generator.standard_normal((2, DRAWS, len(self.data.losses)))
        signs = np.array(list(itertools.product((1, -1), repeat=self.basis.axes)))
        reflections = np.where(self.basis.odd, signs[:, :, None], 1).prod(axis=1)
        prior = (normal * np.sqrt(posterior.variances[setting]))[:, None] * reflections
        drawn = self._condition(posterior, of_law, setting, prior, errors)
        coefficients = drawn.reshape(-1, drawn.shape[-1])
        hypothesis = np.repeat(of_law, len(signs))
        k, start = self.basis.axes, self.basis.shape.start
        self.bends = (coefficients[:, start + k : start + 2 * k] > 0).mean(axis=0)
        blur = np.sqrt(INDISTINCT * self.frame.expected_noise / self.curvature)
        shift = np.minimum(blur, MOST_BLURRED) * generator.standard_normal((DRAWS, k))
        self._shift = (shift[:, None] * signs).reshape(-1, k)
        bowl = self.basis.is_bowl(coefficients)
        if bowl.mean() < LEAST_BOWLS:
            return coefficients, hypothesis
        self._shift = self._shift[bowl]
        return coefficients[bowl], hypothesis[bowl]

    def _condition(
        self,
        posterior: _Posterior,
        of_law: NDArray[np.int64],
        setting: NDArray[np.int64],
        prior: Array,
        errors: Array,
    ) -> Array:
        """Turn (draws, reflections, columns) of the prior into draws of the posterior.

        A draw of prior and noise gives losses; its coefficients move by what these miss of the
        measured ones (Matheron's rule).
        """
        noise, misfit = posterior.noise[setting], posterior.misfit[setting]
        above, shift = self.data.above_best, self.data.same_shift
        # The shift's covariance is singular: all trials of a seed move together.
        root = np.linalg.cholesky(shift + 1e-9 * np.eye(len(above)))
        error = errors[0] * np.hypot(noise[:, None], self.basis.misfit(above, misfit[:, None]))
        error += SEED_SHIFT * noise[:, None] * errors[1] @ root.T
        columns = posterior.columns[of_law]
        missed = above - error[:, None] - prior @ columns.transpose(0, 2, 1)
        solved = np.linalg.solve(posterior.covariance[of_law, setting], missed.transpose(0, 2, 1))
        moved = solved.transpose(0, 2, 1) @ columns
        corrected: Array = prior + moved * posterior.variances[setting][:, None]
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
        maps = np.stack([self.basis.polynomial(width, h) for h in HYPOTHESES])
        shapes = np.empty((len(self._coefficients), self.basis.shape_size))
        for number in np.unique(self._hypothesis):
            mine = self._hypothesis == number
            shapes[mine] = self._coefficients[mine] @ maps[number].T
        return shapes

    def levels(self, width: int) -> Array:
        """(draws,) nats: the loss at the centre, above the lowest measured at that width."""
        levels: Array = self._coefficients[:, self.frame.widths.index(width)]
        return levels

    def losses_at(self, width: int, places: Array) -> Array:
        """(n,) nats: the expected losses at places (n, k) and a width that was measured."""
        lowest = self.data.losses[self.data.widths == width].min()
        draws = self.basis.shapes(places) @ self.polynomials(width).T + self.levels(width)
        losses: Array = lowest + draws.mean(axis=1)
        return losses

    def loss_at(self, width: int, place: Array) -> float:
        """Nats: the expected loss at a place and a width that was measured."""
        return float(self.losses_at(width, place[None])[0])

    def joins(self, width: int, one: Array, other: Array, level: float) -> bool:
        """Tell whether a path joins two places on which no expected loss is above a level.

        Args:
            width: one that was measured.
            one: (k,) octaves.
            other: (k,) octaves.
            level: nats.
        """
        low, high = np.minimum(one, other), np.maximum(one, other)
        margin = self.frame.step
        axes = [
            np.linspace(a, b, PATH.get(len(low), 5))
            for a, b in zip(low - margin, high + margin, strict=True)
        ]
        grid = np.stack([axis.ravel() for axis in np.meshgrid(*axes, indexing="ij")], axis=1)
        losses = self.losses_at(width, grid)
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
                padded = np.pad(
                    wider, [(int(a == axis), int(a == axis)) for a in range(len(sizes))]
                )
                size = sizes[axis]
                wider = (
                    wider | padded.take(range(size), axis) | padded.take(range(2, size + 2), axis)
                )
            wider &= open_cells
            if wider[end] or (wider == reached).all():
                break
            reached = wider
        return bool(wider[end])

    def optimum(
        self, width: int, *, margin: float = 0.5, held: Mapping[int, float] | None = None
    ) -> Optimum:
        """Where the loss is lowest at one width.

        Args:
            width: one of the frame's.
            margin: steps beyond what was measured that are allowed.
            held: axis → octaves at which the answer, but not the draws, keeps it.
        """
        asked = width, margin, tuple(sorted((held or {}).items()))
        if asked not in self._optima:
            self._optima[asked] = self._optimum(width, margin, held or {})
        return self._optima[asked]

    def _optimum(self, width: int, margin: float, held: Mapping[int, float]) -> Optimum:
        low, high = self.support(margin)
        polynomials = self.polynomials(width)
        draws = self._downhill(polynomials, low, high)
        shifted = np.clip(draws + self._shift, low, high)
        for axis, value in held.items():
            low[axis] = high[axis] = value
        place = self._lowest(polynomials.mean(axis=0), (low, high))
        lowest = self._values(polynomials, draws)
        there = self._values(polynomials, place - self._shift)
        return Optimum(place, shifted, np.maximum(there - lowest, 0.0))

    def _downhill(self, polynomials: Array, low: Array, high: Array) -> Array:
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
        better = self._values(polynomials, places) < losses[rows[:, 0], at]
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

    def _values(self, polynomials: Array, places: Array) -> Array:
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
        return walled(places, self.data.walls, self.origin)

    def _lowest(self, shape: Array, box: tuple[Array, Array]) -> Array:
        """(k,) the lowest place of one polynomial in a box, by grids that zoom in."""
        low, high = box
        for _ in range(ZOOMS):
            grid, spacing = self._grid(low, high)
            place: Array = grid[np.argmin(self.basis.shapes(grid) @ shape)]
            low, high = np.maximum(place - spacing, low), np.minimum(place + spacing, high)
        return place


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
