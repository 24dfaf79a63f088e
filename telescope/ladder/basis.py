"""The columns of the surface's linear model: levels, common shape, drift, a width's own part."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from telescope.ladder.drift import DRIFT_OCTAVES, SCATTER, Law

Array = NDArray[np.float64]

LEAST_OWN = 0.5
"""A width's curvature is at least this share of the common one."""
SKEW = 0.2
"""Prior standard deviation of the skew, as a share of the curvature, per lattice step."""
SKEW_REACH = 2.5
"""Lattice steps after which the skew grows no faster than linearly, so that it cannot run away."""
OWN_CURVATURE = 0.15
"""Prior standard deviation of a width's own curvature, as a share of the common one."""


@dataclass(frozen=True)
class Frame:
    """What is known before any result: widths, lattice and scale."""

    widths: tuple[int, ...]
    """Every width that is asked about, the base first: those of the ladder, then the target."""
    step: Array
    """The lattice's step per swept axis, in octaves."""
    span: Array
    """Length of the prior range per swept axis, in octaves."""
    expected_noise: float
    """Standard deviation between seeds that is expected before any repeat, nats."""


class Basis:
    """Columns of the linear model: levels, common shape, drift, and each width's own part."""

    def __init__(
        self, frame: Frame, centre: Array, curvature: Array, *, spread: float, height: float
    ) -> None:
        """Lay out the columns and the standard deviations of their priors, all with mean 0.

        Args:
            frame: widths and lattice.
            centre: (k,) octaves where the polynomial is centred.
            curvature: (k,) nats per square octave, the scale of tilt, skew and drift.
            spread: nats between a middling loss and the best, the scale of the curvature.
            height: nats between the worst loss and the best, the scale of the levels.
        """
        self.frame, self.centre = frame, centre
        k, others = len(centre), len(frame.widths) - 1
        self.axes = k
        self.pairs = list(itertools.combinations(range(k), 2))
        self.shape_size = 3 * k + len(self.pairs)
        step = frame.step
        drift = np.minimum(step / 4, DRIFT_OCTAVES)
        tilt = [np.sqrt(curvature[a] * curvature[b]) for a, b in self.pairs]
        # A gradient that moves an optimum by x octaves is 2 · curvature · x.
        blocks = [
            np.full(len(frame.widths), 3 * height),
            2 * curvature * frame.span / 2,
            2 * spread / step**2,
            np.asarray(tilt),
            SKEW * curvature / step,
            2 * curvature * drift,
            np.tile(2 * curvature * SCATTER * step, others),
            np.tile(OWN_CURVATURE * curvature, others),
        ]
        self.deviations = np.concatenate(blocks)
        starts = np.cumsum([0, *(len(block) for block in blocks)])
        self.shape = slice(starts[1], starts[5])
        self.drift = slice(starts[5], starts[6])
        self.own_gradient, self.own_curvature = starts[6], starts[7]
        self.odd = self._odd()

    def _odd(self) -> NDArray[np.bool_]:
        """(k, columns): which columns change sign when an axis is reflected."""
        k = self.axes
        odd = np.zeros((k, len(self.deviations)), dtype=bool)
        start = self.shape.start
        for axis in range(k):
            odd[axis, [start + axis, self.shape.stop - k + axis, self.drift.start + axis]] = True
            odd[axis, self.own_gradient + axis : self.own_curvature : k] = True
            for number, pair in enumerate(self.pairs):
                odd[axis, start + 2 * k + number] = axis in pair
        return odd

    def shapes(self, places: Array) -> Array:
        """(n, shape) columns of the polynomial at places (n, k): u, u², u u', skew(u)."""
        u = places - self.centre
        cross = [u[:, [a]] * u[:, [b]] for a, b in self.pairs]
        bend = SKEW_REACH * self.frame.step
        return np.concatenate([u, u**2, *cross, u**3 / (1 + (u / bend) ** 2)], axis=1)

    def polynomial(self, width: int, law: Law) -> Array:
        """(shape, columns): takes all coefficients to those of the polynomial at one width."""
        k, number = self.axes, self.frame.widths.index(width)
        to_shape = np.zeros((self.shape_size, len(self.deviations)))
        to_shape[:, self.shape] = np.eye(self.shape_size)
        gradient, curvature = np.arange(k), np.arange(k, 2 * k)
        # A faster law has the same prior, and goes further.
        progress = law.pace * law.progress(width, self.frame.widths[0])
        to_shape[gradient, np.arange(k) + self.drift.start] = progress
        if number > 0:
            own = np.arange(k) + (number - 1) * k
            to_shape[gradient, own + self.own_gradient] = 1
            to_shape[curvature, own + self.own_curvature] = 1
        return to_shape

    def columns(self, places: Array, widths: NDArray[np.int64], law: Law) -> Array:
        """(n, columns) of the linear model at places (n, k) and widths (n,)."""
        shapes = self.shapes(places)
        rows = np.zeros((len(places), len(self.deviations)))
        for number, width in enumerate(self.frame.widths):
            here = widths == width
            rows[here] = shapes[here] @ self.polynomial(width, law)
            rows[here, number] = 1
        return rows

    def is_bowl(self, coefficients: Array) -> NDArray[np.bool_]:
        """(draws,) whether the loss curves upwards in every axis, at each width about alike."""
        k, start = self.axes, self.shape.start + self.axes
        common = coefficients[:, None, start : start + k]
        own = coefficients[:, self.own_curvature :].reshape(len(coefficients), -1, k)
        alike = np.all(common + own > LEAST_OWN * common, axis=(1, 2))
        bowl: NDArray[np.bool_] = np.logical_and(np.all(common > 0, axis=(1, 2)), alike)
        return bowl

    def slopes(self, places: Array, polynomials: Array, curvature: Array) -> tuple[Array, Array]:
        """Gradient (n, k) and Hessian (n, k, k) of n polynomials, each at its own place.

        The Hessian is made positive: Newton's step then leads downhill, though not always as far
        as it could.
        """
        k, u = self.axes, places - self.centre
        bend = (SKEW_REACH * self.frame.step) ** 2
        fall = 1 + u**2 / bend
        linear, square, skew = polynomials[:, :k], polynomials[:, k : 2 * k], polynomials[:, -k:]
        gradient = linear + 2 * square * u + skew * (3 * u**2 + u**4 / bend) / fall**2
        bent = 2 * square + skew * (6 * u - 2 * u**3 / bend) / fall**3
        hessian = np.zeros((len(u), k, k))
        hessian[:, np.arange(k), np.arange(k)] = np.maximum(bent, 0.2 * curvature)
        for number, (a, b) in enumerate(self.pairs):
            tilt = polynomials[:, 2 * k + number]
            gradient[:, a] += tilt * u[:, b]
            gradient[:, b] += tilt * u[:, a]
            most = 0.95 / max(1, k - 1) * np.sqrt(hessian[:, a, a] * hessian[:, b, b])
            hessian[:, a, b] = hessian[:, b, a] = np.clip(tilt, -most, most)
        return gradient, hessian
