"""The columns of the surface's linear model: levels, common shape, drift, a width's own part."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from telescope.ladder.fit.laws import Law
from telescope.ladder.fit.priors import (
    BEND_LENGTH,
    BOWL,
    DRIFT_OCTAVES,
    DRIFT_STEPS,
    FAR,
    LEVEL,
    MOST_MISFIT,
    PLACE,
    SCATTER,
    SKEW,
    SKEW_REACH,
    TILT,
)

Array = NDArray[np.float64]

FINEST = 2.6
"""Highest frequency of the bend's waves, radians per `BEND_LENGTH`: the rest has 3 % of its σ."""


@dataclass(frozen=True)
class Frame:
    """The facts known before any result: widths, lattice and scale."""

    widths: tuple[int, ...]
    """Every width in question, the base first: the ladder's, given ones, then the target."""
    step: Array
    """The lattice's step per swept axis, in octaves."""
    span: Array
    """Length of the prior range per swept axis, in octaves."""
    expected_noise: float
    """Standard deviation between seeds that is expected before any repeat was run, nats."""


class Basis:
    """Columns of the linear model: levels, common shape, drift, and each width's own part.

    The common shape has a gradient, curvatures, tilts, skews and a *bend*: a smooth function of
    the place by which the bowl is multiplied, so that it may end in a plateau or in a wall. The
    bend is a Gaussian process in the eigenfunctions of a box (arXiv 1401.5508), which are even or
    odd about its middle.
    """

    def __init__(
        self,
        frame: Frame,
        centre: Array,
        curvature: Array,
        *,
        spread: float,
        height: float,
        reach: Array,
    ) -> None:
        """Lay out the columns and the standard deviations of their priors, all with mean 0.

        Args:
            frame: widths and lattice.
            centre: (k,) octaves where the polynomial is centred.
            curvature: (k,) nats per square octave, the scale of tilt, skew, bend and drift.
            spread: nats between a middling loss and the best, the scale of the curvature.
            height: nats between the worst loss and the best, the scale of the levels.
            reach: (k,) octaves from the centre within which the shape is evaluated.
        """
        self.frame, self.centre, self._spread = frame, centre, spread
        k, others = len(centre), len(frame.widths) - 1
        self.axes = k
        self._bowl = np.broadcast_to(curvature, (k,))
        self.pairs = list(itertools.combinations(range(k), 2))
        self._box = reach + BEND_LENGTH
        drift = np.minimum(DRIFT_STEPS * frame.step, DRIFT_OCTAVES)
        tilt = [np.sqrt(self._bowl[a] * self._bowl[b]) for a, b in self.pairs]
        per_octave = 2 * curvature  # the gradient that moves an optimum by an octave
        blocks = {
            "levels": np.full(len(frame.widths), LEVEL * height),
            "gradient": per_octave * (PLACE * frame.span),
            "curvature": BOWL * spread / frame.step**2,
            "tilt": TILT * np.asarray(tilt),
            "skew": SKEW * self._bowl,
            "bend": self._bend_deviations(),
            "drift": per_octave * drift,
            "own gradient": np.tile(per_octave * SCATTER, others) * np.ones(k * others),
        }
        self.deviations = np.concatenate([*blocks.values()])
        starts = np.cumsum([0, *(len(block) for block in blocks.values())])
        self.shape = slice(starts[1], starts[6])
        self.shape_size = int(starts[6] - starts[1])
        self.bend = slice(starts[5], starts[6])
        """The columns of the bend, whose deviations are for a share of 1."""
        self.skew = slice(starts[4], starts[5])
        self.drift = slice(starts[6], starts[7])
        self.own_gradient = starts[7]
        self.odd = self._odd()

    def misfit(self, above: Array, share: Array) -> Array:
        """Return the standard deviation of the model's error at some losses, nats.

        Args:
            above: loss above the best, nats.
            share: the error as a share of `above`, close to the best loss. The share grows with
                the loss, because a high loss says little about the optimum.
        """
        error: Array = np.minimum(share * (1 + above / (FAR * self._spread)), MOST_MISFIT) * above
        return error

    @cached_property
    def _waves(self) -> NDArray[np.int64]:
        """(waves, k) half waves per axis across the box; 0 for a wave that does not vary there."""
        finest = FINEST / BEND_LENGTH
        counts = [max(1, int(2 * box * finest / math.pi)) for box in self._box]
        if self.axes > 2:  # only waves along one axis: all combinations would be too many
            rows = [
                [j if a == axis else 0 for a in range(self.axes)]
                for axis, count in enumerate(counts)
                for j in range(1, count + 1)
            ]
            return np.array(rows)
        waves = np.array(list(itertools.product(*(range(1, count + 1) for count in counts))))
        frequency = np.pi * waves / (2 * self._box)
        kept: NDArray[np.int64] = waves[(frequency**2).sum(1) <= finest**2]
        return kept if len(kept) else waves[:1]

    def _bend_deviations(self) -> Array:
        """(waves,) the square root of the kernel's spectral density at each wave."""
        frequency = np.pi * self._waves / (2 * self._box)
        density = (
            math.sqrt(2 * math.pi) * BEND_LENGTH * np.exp(-0.5 * (BEND_LENGTH * frequency) ** 2)
        )
        along = np.where(self._waves > 0, density, 1.0)
        deviations: Array = np.sqrt(along.prod(axis=1))
        return deviations

    def _odd(self) -> NDArray[np.bool_]:
        """(k, columns): True for a column that changes sign when the axis is reflected."""
        k = self.axes
        odd = np.zeros((k, len(self.deviations)), dtype=bool)
        start = self.shape.start
        for axis in range(k):
            odd[axis, [start + axis, self.skew.start + axis, self.drift.start + axis]] = True
            odd[axis, self.own_gradient + axis :: k] = True
            odd[axis, self.bend] = (self._waves[:, axis] > 0) & (self._waves[:, axis] % 2 == 0)
            for number, pair in enumerate(self.pairs):
                odd[axis, start + 2 * k + number] = axis in pair
        return odd

    def shapes(self, places: Array) -> Array:
        """(n, shape) columns of the shape at places (n, k): u, u², u u', skew(u), bend(u)."""
        u = places - self.centre
        cross = [u[:, [a]] * u[:, [b]] for a, b in self.pairs]
        skew = u**3 / (1 + (u / SKEW_REACH) ** 2)
        bend = np.repeat((u**2 @ self._bowl)[:, None], len(self._waves), axis=1)
        for axis, box in enumerate(self._box):
            count = int(self._waves[:, axis].max())
            half_waves = np.pi / (2 * box) * np.arange(1, count + 1)
            inside = np.clip(u[:, [axis]], -box, box)
            waves = np.sin((inside + box) * half_waves) / math.sqrt(box)
            with_none = np.concatenate([np.ones((len(u), 1)), waves], axis=1)
            bend *= with_none[:, self._waves[:, axis]]
        return np.concatenate([u, u**2, *cross, skew, bend], axis=1)

    def polynomial(self, width: int, law: Law) -> Array:
        """(shape, columns): the map from all coefficients to those of the shape at one width."""
        k, number = self.axes, self.frame.widths.index(width)
        to_shape = np.zeros((self.shape_size, len(self.deviations)))
        to_shape[:, self.shape] = np.eye(self.shape_size)
        gradient = np.arange(k)
        base = self.frame.widths[0]
        # The drift has one prior under all laws; a faster law multiplies it.
        to_shape[gradient, np.arange(k) + self.drift.start] = law.pace * law.progress(width, base)
        if number > 0:
            own = np.arange(k) + (number - 1) * k
            to_shape[gradient, own + self.own_gradient] = 1
        return to_shape * law.depth(width, base)

    def columns(self, places: Array, widths: NDArray[np.int64], laws: Sequence[Law]) -> Array:
        """(laws, n, columns) of the linear model at places (n, k) and widths (n,)."""
        shapes = self.shapes(places)
        rows = np.zeros((len(laws), len(places), len(self.deviations)))
        for number, width in enumerate(self.frame.widths):
            here = widths == width
            if here.any():
                maps = np.stack([self.polynomial(width, law) for law in laws])
                rows[:, here] = shapes[here] @ maps
                rows[:, here, number] = 1
        return rows

    def curvatures(self, coefficients: Array) -> Array:
        """(draws, k) curvatures at the centre, at base width."""
        start = self.shape.start + self.axes
        return coefficients[:, start : start + self.axes]
