"""Choice of the next trials: those that say most about the optimum at the target, per cost.

Everything is computed from the surface's draws. A trial is worth the expected excess loss at the
target that knowing its loss would remove.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from telescope.ladder.fit.model import Array
from telescope.ladder.fit.priors import MISFIT, SEED_SHIFT
from telescope.ladder.fit.surface import Surface


@dataclass(frozen=True)
class Candidates:
    """Places of one width where a trial may run."""

    width: int
    places: Array
    """(n, k) octaves."""
    repeats: Array
    """(n,) 1 for a cell that was asked for before, whose next trial has a further seed; else 0."""
    cost: float
    """Cost of one trial, in any unit that all candidates share."""


@dataclass(frozen=True)
class Pick:
    """One trial worth asking for."""

    width: int
    index: int
    """Index of its place among its width's candidates."""
    gain: float
    """Fall of the predicted excess loss at the target, nats, after the picks before it."""


def pick(surface: Surface, options: Sequence[Candidates], wanted: Array, count: int) -> list[Pick]:
    """Choose trials greedily by gain per cost, each given that the picks before it are answered.

    Args:
        surface: the fit.
        options: one per width.
        wanted: (draws, k) error of the answer in each draw, scaled so that its squared length is
            the excess loss in nats.
        count: number of trials to choose, all different.
    """
    predicted = [_losses(surface, option) for option in options]
    losses = np.concatenate([values for values, _ in predicted], axis=1)
    error = np.concatenate([variance for _, variance in predicted])
    owner = np.concatenate([np.full(len(o.places), i) for i, o in enumerate(options)])
    cost = np.array([option.cost for option in options])[owner]
    start = np.cumsum([0, *(len(option.places) for option in options)])
    wanted = wanted - wanted.mean(axis=0)
    together = losses.T @ losses / len(losses)
    says = wanted.T @ losses / len(losses)
    picks: list[Pick] = []
    left = np.ones(len(cost), dtype=bool)
    while len(picks) < count and left.any():
        gain = np.where(left, (says**2).sum(axis=0) / (np.diagonal(together) + error), 0.0)
        worth = np.where(left, gain / cost, -1.0)
        # Rounded, so that cells that a reflection swaps tie, whatever the order of the sums.
        scale = worth.max()
        best = int(np.argmax(np.round(worth / scale, 9) if scale > 0 else worth))
        left[best] = False
        option = int(owner[best])
        picks.append(Pick(options[option].width, best - int(start[option]), float(gain[best])))
        row, total = together[best].copy(), together[best, best] + error[best]
        says = says - np.outer(says[:, best], row) / total
        together = together - np.outer(row, row) / total
    return picks


def _losses(surface: Surface, option: Candidates) -> tuple[Array, Array]:
    """(draws, n) losses less their mean, and the (n,) variance of a trial's loss around them."""
    losses = surface.polynomials(option.width) @ surface.basis.shapes(option.places).T
    mean = losses.mean(axis=0)
    variance = surface.noise**2 * (1 + SEED_SHIFT**2 * option.repeats)
    variance = variance + (np.mean(MISFIT) * (mean - mean.min())) ** 2
    if option.width in surface.data.seen:
        losses = losses + surface.levels(option.width)[:, None]
    else:  # nothing is known of its level: only differences between its trials say anything
        losses = losses - losses.mean(axis=1, keepdims=True)
    return losses - losses.mean(axis=0), variance
