"""Simulated loss surfaces ("truths"), drawn from the ladder's priors, for plans.

The cost of a sweep is random: it depends on the noise, the place of the optimum and its drift, none
of which is known in advance. A plan runs the ladder on several truths and reports the one of median
cost.
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
"""Median curvature, as a share of the loss per square octave. Assumption; measured are 0.004 for
the learning rate in 1,911 public runs (arXiv 2503.04715 by way of 2601.05049), and 0.02 for small
models here."""
CURVATURE_SPREAD = 0.8
"""Standard deviation of the curvature's logarithm. Assumption."""
NOISE_SPREAD = 0.7
"""Standard deviation of the logarithm of the noise around the spec's expected one. Assumption;
smaller than the fit's own prior, which must allow for more."""
OFFSET = 1.0
"""Standard deviation of the distance between an axis's middle and its optimum, lattice steps."""
MOST_OFFSET = 0.35
"""Most that an optimum lies off the middle of an axis, as a share of the axis's range."""


@dataclass(frozen=True)
class Truth:
    """A simulated loss surface over axes and width, which answers trials like training."""

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
        """Answer a trial; the noise is a function of the trial and the truth's seed."""
        gone = self.law.progress(trial.width, self.spec.widths[0])
        places = np.log2([trial.point[axis.name] for axis in self.spec.swept])
        x = places - self.optimum - gone * self.drift
        # Like the fit's skew, but always smaller than the bowl, so that there is one minimum.
        bent = x**2 * (1 + np.clip(self.skew * x / (1 + (x / SKEW_REACH) ** 2), -0.8, None))
        share = (zlib.crc32(f"{self.seed} {trial}".encode()) + 0.5) / 2**32
        noise = self.noise * NormalDist().inv_cdf(share)
        return Result(trial, Status.COMPLETE, loss=1 + float(self.curvature @ bent) + noise)


def draw_truths(spec: LadderSpec, count: int) -> list[Truth]:
    """Draw truths for a ladder, the same ones each time.

    Args:
        spec: the ladder.
        count: number of truths; their noise covers its distribution evenly, from low to high.
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
