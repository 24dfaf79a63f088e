"""The loss near its optimum as one surface over axes and width, with its uncertainty.

`model` has the surface's formula, `priors` its priors, `posterior` the likelihood of the losses.
The fit is a set of draws: every statement about an optimum or a loss is a share or a mean of them.

The fit is deterministic, whatever the order of the results. Reflecting an axis reflects the draws.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from telescope.ladder.fit.data import Data
from telescope.ladder.fit.laws import HYPOTHESES, LAWS
from telescope.ladder.fit.model import Array, Basis, Frame
from telescope.ladder.fit.optimum import Landscape, Optimum, joined
from telescope.ladder.fit.posterior import Posterior, draw, probable_scales, weigh
from telescope.ladder.fit.priors import BENDS, DEEPENINGS, MOST_STEPS

ITERATIONS = 3
"""Number of first guesses of centre and curvature, each from the one before."""
FIRST_GUESS = tuple(h for h in HYPOTHESES if h.deepening in (0.0, 0.33))
"""The hypotheses of the first guesses, which only look for the centre and the curvature."""
LEAST_CURVATURE = 1e-3
"""Least curvature, as a share of its starting value, so that a flat axis still has priors."""
AT_WALL = 0.1
"""Lattice steps from the outermost place allowed before a divergence that count as lying there."""


class Surface:
    """The fitted surface: draws of its coefficients, and what follows from them.

    Attributes:
        frame: widths and lattice.
        data: what was measured.
        origin: (k,) octaves, the cell with the lowest loss at the widest width measured: walls are
            seen from there.
        centre: (k,) octaves, near the optimum of the widest width measured.
        curvature: (k,) nats per square octave, the expected one.
        basis: the model's columns around the centre.
        noise: nats between seeds, the root of the expected variance.
        law_weights: probability of each of `laws.LAWS`.
        deepening: expected growth of the excess loss, octaves per doubling of the width.
        laws: (draws,) each draw's law, as an index in `laws.LAWS`.
        bends: (k,) probability that the loss curves upwards along an axis, counted before draws
            that do not were left out.
    """

    def __init__(self, frame: Frame, data: Data) -> None:
        """Fit the surface; `data` has two losses or more at the base width."""
        self.frame, self.data = frame, data
        self._optima: dict[tuple[object, ...], Optimum] = {}
        above = data.above_best
        at_base = above[data.widths == frame.widths[0]]
        self._spread = max(float(np.median(at_base)), frame.expected_noise)
        self._height = max(float(above.max()), self._spread)
        widest = data.widths == data.seen[-1]
        self.origin = data.places[widest][np.argmin(above[widest])]
        self.centre = self.origin
        self.curvature = self._spread / (frame.span / 4) ** 2
        least = self.curvature * LEAST_CURVATURE
        for _ in range(ITERATIONS):
            guess = self._guess(least)
        self.basis = self._basis_here()
        posterior = weigh(self.basis, data, scales=probable_scales(guess))
        of_hypothesis = posterior.weights.sum(1)
        self.law_weights = of_hypothesis.reshape(len(LAWS), -1).sum(1)
        self.deepening = float(of_hypothesis @ [h.deepening for h in HYPOTHESES])
        self.noise = float(np.sqrt(posterior.weights.sum(0) @ posterior.noise**2))
        self._draws = draw(posterior, self.basis, data, self.curvature)
        self.bends = self._draws.bends
        self.laws = self._draws.hypothesis // len(DEEPENINGS)

    def _guess(self, least: Array) -> Posterior:
        """Move centre and curvature to their expectations under a few of the hypotheses."""
        self.basis = self._basis_here()
        guess = weigh(self.basis, self.data, FIRST_GUESS, bends=BENDS[1:2])
        mean = guess.mean(self.data.above_best)
        law = FIRST_GUESS[int(guess.weights.sum(1).argmax())]
        shape = self.basis.polynomial(self.data.seen[-1], law) @ mean
        self.centre = self._landscape.lowest(shape, self.support())
        k = self.basis.axes
        at_base = self.basis.polynomial(self.frame.widths[0], law) @ mean
        self.curvature = np.maximum(at_base[k : 2 * k], least)
        return guess

    def _basis_here(self) -> Basis:
        """Return the model's columns around the present guess of the centre."""
        low, high = self.data.places.min(0), self.data.places.max(0)
        reach = np.maximum(high - self.centre, self.centre - low) + self.frame.step
        return Basis(
            self.frame,
            self.centre,
            self.curvature,
            spread=self._spread,
            height=self._height,
            reach=reach,
        )

    @property
    def _landscape(self) -> Landscape:
        return Landscape(self.basis, self.centre, self.origin, self.data.walls)

    def support(self, margin: float = 0.5) -> tuple[Array, Array]:
        """Return the box in which an optimum is believed: the measured range and `margin` steps.

        Returns:
            (low, high), each (k,) octaves; at most `MOST_STEPS` lattice steps from the centre.
        """
        step, lowest, highest = self.frame.step, self.data.places.min(0), self.data.places.max(0)
        low, high = self.data.between_walls()
        return (
            np.maximum.reduce([self.centre - MOST_STEPS * step, lowest - margin * step, low]),
            np.minimum.reduce([self.centre + MOST_STEPS * step, highest + margin * step, high]),
        )

    def at_wall(self, place: Array) -> list[int]:
        """List the axes along which a place lies as near to a divergence as is allowed."""
        low, high = self.data.between_walls()
        near = AT_WALL * self.frame.step
        return [int(a) for a in np.flatnonzero((place - low < near) | (high - place < near))]

    def is_walled(self, places: Array) -> NDArray[np.bool_]:
        """(n,) True for a place at or beyond a diverged point, as seen from the origin."""
        return self._landscape.is_walled(places)

    def polynomials(self, width: int) -> Array:
        """(draws, shape) coefficients of the polynomial at one of the frame's widths."""
        coefficients, hypothesis = self._draws.coefficients, self._draws.hypothesis
        maps = np.stack([self.basis.polynomial(width, h) for h in HYPOTHESES])
        shapes = np.empty((len(coefficients), self.basis.shape_size))
        for number in np.unique(hypothesis):
            mine = hypothesis == number
            shapes[mine] = coefficients[mine] @ maps[number].T
        return shapes

    def levels(self, width: int) -> Array:
        """(draws,) nats: the loss at the centre, above the lowest measured at that width."""
        levels: Array = self._draws.coefficients[:, self.frame.widths.index(width)]
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
        """Tell whether a path joins two places without an expected loss above `level`.

        Args:
            width: one that was measured.
            one: (k,) octaves.
            other: (k,) octaves.
            level: nats.
        """
        return joined(
            lambda places: self.losses_at(width, places), one, other, level, self.frame.step
        )

    def optimum(
        self, width: int, *, margin: float = 0.5, held: Mapping[int, float] | None = None
    ) -> Optimum:
        """Return the place where the loss is lowest at one width.

        Args:
            width: one of the frame's.
            margin: lattice steps beyond the measured range within which it may lie.
            held: axis → octaves at which the answer keeps that axis; the draws do not.
        """
        asked = width, margin, tuple(sorted((held or {}).items()))
        if asked not in self._optima:
            self._optima[asked] = self._optimum(width, margin, held or {})
        return self._optima[asked]

    def _optimum(self, width: int, margin: float, held: Mapping[int, float]) -> Optimum:
        low, high = self.support(margin)
        polynomials, landscape = self.polynomials(width), self._landscape
        draws = landscape.downhill(polynomials, low, high)
        shifted = np.clip(draws + self._draws.shift, low, high)
        for axis, value in held.items():
            low[axis] = high[axis] = value
        place = landscape.lowest(polynomials.mean(axis=0), (low, high))
        lowest = landscape.values(polynomials, draws)
        there = landscape.values(polynomials, place - self._draws.shift)
        return Optimum(place, shifted, np.maximum(there - lowest, 0.0))
