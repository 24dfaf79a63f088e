"""The held-out loss of the target run, predicted from the levels of the widths that were measured.

A width's *level* is the loss of its optimum, by the fit. Against the width n it falls about as

    level(n) = E + A · n^−a

with an offset E. Offset and exponent are not chosen: the prediction averages over exponents by
their evidence, and for each one over E and A. No law is exact at a fixed number of steps, so each
doubling's fall may depart from the law's by a share of itself; see `DEPARTURES`.

A single run also has its seed's luck. Part of it is common to all points that share a width and a
seed (their batches and their initial values); the rest is the trial's own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import ndtr

from telescope.ladder.fit.data import Data
from telescope.ladder.fit.model import Array
from telescope.ladder.fit.priors import SEED_SHIFT
from telescope.ladder.fit.surface import Surface
from telescope.ladder.observe import unit_of
from telescope.ladder.view import View
from telescope.records import PredictedLoss

EXPONENTS = np.arange(0.05, 1.51, 0.05)
"""a, from a fall that hardly slows to one that more than halves at each doubling. Numerical."""
EXPONENT, EXPONENT_SPREAD = 0.45, 0.3
"""Mean and standard deviation of a before any result. Published: 0.31 (arXiv 2505.02222), and 0.68
for width² as parameters (arXiv 2203.15556). Measured here: 0.4 to 0.6
(results/reference/quickstart-ladder, results/reference/ladder). The spread is an assumption."""
DEPARTURES = (0.05, 0.1, 0.2, 0.4)
"""Standard deviation of a doubling's fall around the law's, as a share of it; equally probable.
Assumption, judged by results/reference/target."""
FALL_SPREAD = 3.0
"""Standard deviation of the whole fall before any result, in multiples of the one seen: wide, so
that the losses alone decide it."""
SHIFT_COUNT = 4
"""Seeds that the prior of the shift between seeds counts for. Assumption."""
TAIL = 0.05
"""Probability beyond each end of the interval."""


@dataclass(frozen=True)
class Levels:
    """The levels of the measured widths, averaged over the seeds of each, with their errors."""

    widths: tuple[int, ...]
    """Narrow first."""
    losses: Array
    """(n,) nats."""
    covariance: Array
    """(n, n) of the errors of `losses`, nats²."""
    shift: float
    """Standard deviation, nats, of what a seed adds to all losses of a width."""
    noise: float
    """Standard deviation, nats, of what a seed adds to one point beyond that."""


@dataclass(frozen=True)
class Mixture:
    """A mixture of normal distributions: what is believed of one number."""

    weights: Array
    """(n,) their sum is 1."""
    means: Array
    variances: Array

    def quantile(self, share: float) -> float:
        """Return the value below which `share` of the probability lies."""
        deviations = np.sqrt(self.variances)
        low = float((self.means - 10 * deviations).min())
        high = float((self.means + 10 * deviations).max())

        def beyond(value: float) -> float:
            return float(self.weights @ ndtr((value - self.means) / deviations)) - share

        return float(brentq(beyond, low, high, xtol=1e-12, rtol=1e-12))

    def moved(self, by: float, variance: float) -> Mixture:
        """Return the distribution of this number plus an independent normal one."""
        return Mixture(self.weights, self.means + by, self.variances + variance)


def predict_loss(view: View) -> PredictedLoss:
    """Predict the held-out loss of one run at the view's target with the answer's point.

    Args:
        view: the closed stages; the axes need not be identified.

    Returns:
        The median and the 90 % interval, for a run with any seed, trained as the sweep's trials
        are. Neither where a single narrower width was measured.
    """
    levels, unit = levels_of(view.surface), unit_of(view.state)
    widths, target = levels.widths, view.target
    if len(widths) == 1 and target not in widths:
        return PredictedLoss(
            None, None, widths, "one width was trained: it takes two to say how the loss falls"
        )
    excess = view.optimum(target).excess
    luck = levels.shift**2 + levels.noise**2
    run = extrapolate(levels, target).moved(float(excess.mean()), float(excess.var()) + luck)
    median, low, high = (
        float(f"{unit * run.quantile(share):.6g}") for share in (0.5, TAIL, 1 - TAIL)
    )
    return PredictedLoss(median, (low, high), widths)


def levels_of(surface: Surface) -> Levels:
    """Return the levels of a fit's measured widths."""
    data, widths = surface.data, surface.data.seen
    drawn = np.stack([_drawn_level(surface, width) for width in widths])
    shifts = [_shifts(surface, width) for width in widths]
    known = [float(value) ** 2 / 2 for of_width, _ in shifts for value in of_width]
    # Two seeds differ by twice one seed's variance.
    expected = (SEED_SHIFT * surface.noise) ** 2 / 2
    shift = math.sqrt((SHIFT_COUNT * expected + sum(known)) / (SHIFT_COUNT + len(known)))
    seeds = np.array([1 + len(of_width) for of_width, _ in shifts])
    error = shift**2 / seeds
    error += np.array([(surface.noise**2 / counts).sum() for _, counts in shifts]) / seeds**2
    lowest = np.array([data.losses[data.widths == width].min() for width in widths])
    moved = np.array([of_width.sum() for of_width, _ in shifts]) / seeds
    return Levels(
        widths=tuple(widths),
        losses=lowest + drawn.mean(axis=1) + moved,
        covariance=np.atleast_2d(np.cov(drawn)) + np.diag(error),
        shift=shift,
        noise=surface.noise,
    )


def _drawn_level(surface: Surface, width: int) -> Array:
    """(draws,) nats: each draw's lowest loss, above the lowest measured at that width."""
    optimum = surface.optimum(width)
    at = surface.basis.shapes(optimum.place[None])[0]
    level: Array = surface.levels(width) + surface.polynomials(width) @ at - optimum.excess
    return level


def _shifts(surface: Surface, width: int) -> tuple[Array, NDArray[np.int64]]:
    """Return what each further seed of a width adds to the fitted losses, and its trials.

    The fit's losses are those of the width's first seed.
    """
    data: Data = surface.data
    here = data.widths == width
    above = data.losses[here] - surface.losses_at(width, data.places[here])
    seeds = data.seeds[here]
    further = [seed for seed in sorted(set(seeds.tolist())) if seed != seeds.min()]
    shifts = np.array([above[seeds == seed].mean() for seed in further])
    return shifts, np.array([(seeds == seed).sum() for seed in further], dtype=np.int64)


def extrapolate(levels: Levels, width: int) -> Mixture:
    """Return what is believed of the level at a width, which may be among the measured ones.

    For each exponent and each departure the levels are jointly normal, so their evidence and the
    level at `width`, given them, are exact.
    """
    octaves = np.log2(np.array([*levels.widths, width]) / levels.widths[0])
    known, span = len(levels.widths), max(float(octaves[:-1].max()), 1e-9)
    fall = float(levels.losses[0] - levels.losses[-1])
    # Where no fall is seen, the errors of the levels say how large one may have been missed.
    scale = math.hypot(fall, math.sqrt(np.diagonal(levels.covariance).max()))
    weights, means, variances = [], [], []
    for exponent in EXPONENTS:
        gone = _progress(exponent, octaves, span)
        travelled = _travelled(exponent, octaves, span)
        prior = -0.5 * ((exponent - EXPONENT) / EXPONENT_SPREAD) ** 2
        for departure in DEPARTURES:
            covariance = (FALL_SPREAD * scale) ** 2 * (np.outer(gone, gone) + 1)
            covariance += (departure * scale) ** 2 * np.minimum.outer(travelled, travelled)
            measured = covariance[:known, :known] + levels.covariance
            away = levels.losses - levels.losses[-1]
            solved = np.linalg.solve(measured, np.stack([away, covariance[:known, known]], axis=1))
            weights.append(prior - 0.5 * (away @ solved[:, 0] + np.linalg.slogdet(measured)[1]))
            means.append(float(covariance[known, :known] @ solved[:, 0]))
            left = covariance[known, known] - covariance[known, :known] @ solved[:, 1]
            variances.append(max(float(left), 1e-18 * scale**2))
    probability = np.exp(np.array(weights) - max(weights))
    return Mixture(
        probability / probability.sum(),
        float(levels.losses[-1]) + np.array(means),
        np.array(variances),
    )


def _progress(exponent: float, octaves: Array, span: float) -> Array:
    """(n,) the fall so many octaves above the base width, over that after `span` octaves.

    >>> _progress(1.0, np.array([0.0, 1.0, 2.0, 3.0]), 2.0).round(4).tolist()
    [0.0, 0.6667, 1.0, 1.1667]
    """
    fallen: Array = (1 - 2 ** (-exponent * octaves)) / (1 - 2 ** (-exponent * span))
    return fallen


def _travelled(exponent: float, octaves: Array, span: float) -> Array:
    """(n,) the integral over the octaves of the squared slope of `_progress`.

    Departures from the law add up like it: each octave's is independent, and as large as its fall.
    """
    rate = exponent * math.log(2)
    whole = 1 - 2 ** (-exponent * span)
    travelled: Array = rate / 2 * (1 - 4 ** (-exponent * octaves)) / whole**2
    return travelled
