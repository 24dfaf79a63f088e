"""The likelihood of what was measured, and draws of the model's coefficients from the posterior.

For each hypothesis on the width (`laws`) and each setting of noise, misfit and bend, the model is
linear with Gaussian priors. So the losses are Gaussian and their evidence is exact. The posterior
averages over hypotheses and settings by their evidence; it never chooses one.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from telescope.ladder.fit.data import Data
from telescope.ladder.fit.laws import HYPOTHESES, Law
from telescope.ladder.fit.model import Array, Basis
from telescope.ladder.fit.priors import (
    BENDS,
    INDISTINCT,
    MISFIT,
    MOST_BLURRED,
    NOISE_PRIOR,
    NOISE_SCALES,
    SEED_SHIFT,
)

DRAWS = 128
"""Number of draws before each is reflected in every axis."""
NEGLIGIBLE = 1e-3
"""Share of the largest weight below which a hypothesis, setting or noise is left out."""
LEAST_BOWLS = 0.05
"""Share of draws that curve upwards in every axis; below it, the other draws are kept too."""


@dataclass(frozen=True)
class Posterior:
    """The data's verdict on each hypothesis with each setting.

    A hypothesis is one of `laws.HYPOTHESES`; a setting is noise, misfit and share of the bend.
    """

    columns: Array
    """(hypotheses, n, columns) of the linear model at the measured trials."""
    covariance: Array
    """(hypotheses, settings, n, n) of the measured losses, nats²."""
    weights: Array
    """(hypotheses, settings) probabilities; their sum is 1."""
    noise: Array
    """(settings,) standard deviation between seeds, nats."""
    misfit: Array
    """(settings,) the model's error as a share of the loss above the best."""
    variances: Array
    """(settings, columns) prior variances of the coefficients."""

    def mean(self, losses: Array) -> Array:
        """(columns,) expected coefficients, averaged over the probable hypotheses and settings."""
        of_law, setting = np.nonzero(self.weights > NEGLIGIBLE * self.weights.max())
        weights = self.weights[of_law, setting]
        solved = np.linalg.solve(self.covariance[of_law, setting], losses[:, None])[..., 0]
        moved = np.einsum("hn,hnc->hc", solved, self.columns[of_law])
        mean: Array = (weights / weights.sum()) @ (moved * self.variances[setting])
        return mean


def weigh(
    basis: Basis,
    data: Data,
    hypotheses: Sequence[Law] = HYPOTHESES,
    *,
    scales: Array = NOISE_SCALES,
    bends: Sequence[float] = BENDS,
) -> Posterior:
    """Compute the probability of the losses under every hypothesis and setting.

    Args:
        basis: the model's columns.
        data: the measured losses.
        hypotheses: laws of drift and deepening.
        scales: the noises to consider, as multiples of the expected noise.
        bends: the bend's standard deviations to consider, as shares of the bowl.
    """
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
    return Posterior(columns, covariance, weights, noise, misfit, variances[number])


def probable_scales(guess: Posterior) -> Array:
    """Return the `NOISE_SCALES` not ruled out by a first guess, with one more on each side."""
    by_scale = guess.weights.sum(0).reshape(len(NOISE_SCALES), -1).sum(1)
    likely = np.flatnonzero(by_scale > NEGLIGIBLE * by_scale.max())
    kept: Array = NOISE_SCALES[max(0, likely[0] - 1) : likely[-1] + 2]
    return kept


def _log_evidence(covariance: Array, losses: Array) -> Array:
    """Return the log density of the losses (mean 0) under each covariance, up to a constant."""
    n = len(losses)
    # With the losses as one more row, the last row of the Cholesky factor is L⁻¹ losses.
    wider = np.empty((*covariance.shape[:-2], n + 1, n + 1))
    wider[..., :n, :n] = covariance
    wider[..., n, :n] = wider[..., :n, n] = losses
    # Large enough for the matrix to be positive definite; the element itself is never read.
    wider[..., n, n] = 1 + 2 * (losses**2).sum() / np.diagonal(covariance, 0, -2, -1).min() * 1e6
    lower = np.linalg.cholesky(wider)
    diagonal = np.diagonal(lower, axis1=-2, axis2=-1)[..., :n]
    density: Array = -0.5 * (lower[..., n, :n] ** 2).sum(-1) - np.log(diagonal).sum(-1)
    return density


@dataclass(frozen=True)
class Draws:
    """Equally probable truths. If the data are reflected in an axis, so is the set of draws."""

    coefficients: Array
    """(draws, columns) of the model."""
    hypothesis: NDArray[np.int64]
    """(draws,) index in `laws.HYPOTHESES`."""
    shift: Array
    """(draws, k) octaves by which a draw's minimum misses the true optimum; see `INDISTINCT`."""
    bends: Array
    """(k,) share of draws that curve upwards along an axis, counted before any were left out."""


def draw(posterior: Posterior, basis: Basis, data: Data, curvature: Array) -> Draws:
    """Draw from the posterior, each draw with its reflections; leave out those that are no bowl.

    Args:
        posterior: the posterior of `data`.
        basis: the columns that it was made with.
        data: the measurements.
        curvature: (k,) nats per square octave, the expected one.
    """
    flat = posterior.weights.ravel()
    quantiles = (np.arange(DRAWS) + 0.5) / DRAWS
    chosen = np.minimum(np.searchsorted(np.cumsum(flat), quantiles), len(flat) - 1)
    of_law, setting = np.divmod(chosen, len(posterior.noise))
    generator, k = np.random.default_rng(0), basis.axes
    normal = generator.standard_normal((DRAWS, len(basis.deviations)))
    errors = generator.standard_normal((2, DRAWS, len(data.losses)))
    signs = np.array(list(itertools.product((1, -1), repeat=k)))
    reflections = np.where(basis.odd, signs[:, :, None], 1).prod(axis=1)
    prior = (normal * np.sqrt(posterior.variances[setting]))[:, None] * reflections
    drawn = _condition(posterior, basis, data, of_law, setting, prior, errors)
    coefficients = drawn.reshape(-1, drawn.shape[-1])
    hypothesis = np.repeat(of_law, len(signs))
    blur = np.sqrt(INDISTINCT * basis.frame.expected_noise / curvature)
    shift = np.minimum(blur, MOST_BLURRED) * generator.standard_normal((DRAWS, k))
    shift = (shift[:, None] * signs).reshape(-1, k)
    bends = (basis.curvatures(coefficients) > 0).mean(axis=0)
    bowl = np.all(basis.curvatures(coefficients) > 0, axis=1)
    if bowl.mean() < LEAST_BOWLS:
        return Draws(coefficients, hypothesis, shift, bends)
    return Draws(coefficients[bowl], hypothesis[bowl], shift[bowl], bends)


def _condition(
    posterior: Posterior,
    basis: Basis,
    data: Data,
    of_law: NDArray[np.int64],
    setting: NDArray[np.int64],
    prior: Array,
    errors: Array,
) -> Array:
    """Turn (draws, reflections, columns) of the prior into draws of the posterior.

    A draw of prior and noise predicts losses. The difference between these and the measured losses
    corrects its coefficients (Matheron's rule).
    """
    noise, misfit = posterior.noise[setting], posterior.misfit[setting]
    above, shift = data.above_best, data.same_shift
    # The shift's covariance is singular: all trials of a seed move together.
    root = np.linalg.cholesky(shift + 1e-9 * np.eye(len(above)))
    error = errors[0] * np.hypot(noise[:, None], basis.misfit(above, misfit[:, None]))
    error += SEED_SHIFT * noise[:, None] * errors[1] @ root.T
    columns = posterior.columns[of_law]
    missed = above - error[:, None] - prior @ columns.transpose(0, 2, 1)
    solved = np.linalg.solve(posterior.covariance[of_law, setting], missed.transpose(0, 2, 1))
    moved = solved.transpose(0, 2, 1) @ columns
    corrected: Array = prior + moved * posterior.variances[setting][:, None]
    return corrected
