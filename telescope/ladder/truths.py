"""Truths drawn from what the ladder takes to be probable before any result, for plans.

A sweep's cost is a random thing: it depends on the noise, on where the optimum lies and on how it
drifts, none of which is known before. A plan climbs the ladder on several truths and tells the
middle one.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from telescope.ladder.fit.laws import LAWS, Law
from telescope.ladder.fit.model import Array
from telescope.ladder.fit.priors import DRIFT_OCTAVES, DRIFT_STEPS, SKEW, SKEW_REACH
from telescope.ladder.window import middle, octaves
from telescope.records import LadderSpec, Result, Status, Trial

CURVATURE = 0.006
"""Share of the loss per square octave, in the middle: 0.004 for the learning rate in 1,911 public
runs (arXiv 2503.04715 by way of 2601.05049), 0.02 for small models here. An assumption."""
CURVATURE_SPREAD = 0.8
"""Standard deviation of its logarithm. An assumption."""
NOISE_SPREAD = 0.7
"""Standard deviation of the logarithm of the noise around the spec's expected one. An assumption;
less than the fit's own, which has to be ready for anything."""
OFFSET = 1.0
"""Lattice steps, standard deviation, between the middle of an axis and its optimum."""
MOST_OFFSET = 0.35
"""Share of an axis's range by which an optimum lies off its middle, at most."""


@dataclass(frozen=True)
class Truth:
    """A loss surface over the swept axes and the width; answers trials as training would."""

    spec: LadderSpec
    seed: int
    noise: float
    """Standard deviation between seeds, as a share of the loss."""
    law: Law
    optimum: Array
    """(k,) octaves at base width."""
    drift: Array
    """(k,) octaves over the first doubling."""
    curvature: Array
    """(k,) share of the loss per square octave."""
    skew: Array
    """(k,) share of the curvature, per octave."""

    def __call__(self, trial: Trial) -> Result:
        """Answer a trial; its noise depends on its content alone."""
        gone = self.law.progress(trial.width, self.spec.widths[0])
        places = np.log2([trial.point[axis.name] for axis in self.spec.swept])
        x = places - self.optimum - gone * self.drift
        # As the fit's own skew, but never more than the bowl: one minimum.
        bent = x**2 * (1 + np.clip(self.skew * x / (1 + (x / SKEW_REACH) ** 2), -0.8, None))
        share = (zlib.crc32(f"{self.seed} {trial}".encode()) + 0.5) / 2**32
        noise = self.noise * NormalDist().inv_cdf(share)
        return Result(trial, Status.COMPLETE, loss=1 + float(self.curvature @ bent) + noise)


def draw_truths(spec: LadderSpec, count: int) -> list[Truth]:
    """Draw truths for a ladder, the same ones each time.

    Args:
        spec: the ladder.
        count: how many; their noise is evenly spread over what is expected, from quiet to loud.
    """
    generator, k = np.random.default_rng(0), len(spec.swept)
    evenly = (np.arange(count) + 0.5) / count
    laws = np.searchsorted(np.cumsum([law.prior for law in LAWS]), generator.permutation(evenly))
    steps = np.array([octaves(axis)[0] for axis in spec.swept])
    spans = np.array([octaves(axis)[1] for axis in spec.swept])
    drift = np.minimum(DRIFT_STEPS * steps, DRIFT_OCTAVES)
    middles = np.log2([middle(axis) for axis in spec.swept])
    truths = []
    for seed, level in enumerate(NormalDist().inv_cdf(share) for share in evenly):
        law = LAWS[laws[seed]]
        off = np.clip(
            OFFSET * steps * generator.standard_normal(k), -MOST_OFFSET * spans, MOST_OFFSET * spans
        )
        truths.append(
            Truth(
                spec,
                seed,
                noise=spec.expected_noise * math.exp(NOISE_SPREAD * level),
                law=law,
                optimum=middles + off,
                drift=law.pace * drift * generator.standard_normal(k),
                curvature=CURVATURE * np.exp(CURVATURE_SPREAD * generator.standard_normal(k)),
                skew=SKEW * generator.standard_normal(k),
            )
        )
    return truths
