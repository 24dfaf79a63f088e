"""An arm's loss at its best setting, against the tokens trained, with its uncertainty.

At every step at which the held-out loss was measured, the ladder's own fit goes through the losses
that all trials had there. It gives the loss at the best learning rate and its error, which counts
what is not known of the optimum and what another seed changes. Nothing is said about steps beyond
the last: a loss that is not reached is "not reached", never a number.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from telescope.ladder.fit.surface import Surface
from telescope.ladder.level import levels_of
from telescope.ladder.observe import frame_of, observe, unit_of
from telescope.ladder.state import State
from telescope.ladder.thresholds import LEAST_LOSSES
from telescope.records import LadderSpec, Result, Status

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Envelope:
    """Loss at the best setting against tokens, of one arm."""

    tokens: tuple[int, ...]
    """Tokens trained, rising."""
    losses: tuple[float, ...]
    """Expected loss there, nats per token."""
    errors: tuple[float, ...]
    """Standard deviation of each loss, from the seeds and from what is not known of the optimum."""

    def tokens_to(self, loss: float) -> float:
        """Return the tokens after which the expected loss is first `loss`; see `draws_to`.

        >>> Envelope((100, 200, 400), (4.0, 3.0, 2.0), (0.1, 0.1, 0.1)).tokens_to(3.0)
        200.0
        """
        return float(self.draws_to(loss, np.zeros(1))[0])

    def draws_to(self, loss: float, deviations: Array) -> Array:
        """Return the tokens after which a loss is first reached, between measurements.

        Args:
            loss: nats per token.
            deviations: (n,) number of `errors` that are added to every loss.

        Returns:
            (n,) tokens; −∞ if it was reached before the first measurement, ∞ if not by the last.
        """
        levels = np.array(self.losses) + deviations[:, None] * np.array(self.errors)
        below, logs = levels <= loss, np.log(self.tokens)
        first, rows = below.argmax(axis=1), np.arange(len(levels))
        before = np.maximum(first - 1, 0)
        high, low = levels[rows, before], levels[rows, first]
        fall = np.where(high > low, high - low, 1.0)
        share = np.where(high > low, (high - loss) / fall, 1.0)
        tokens = np.exp(logs[before] + share * (logs[first] - logs[before]))
        tokens = np.where(levels[:, 0] < loss, -np.inf, tokens)
        reached: Array = np.where(below.any(axis=1), np.round(tokens, 6), np.inf)
        return reached


def envelope(spec: LadderSpec, results: Iterable[Result], batch_tokens: int) -> Envelope | None:
    """Fit an arm's loss at its best setting at every measured step.

    Args:
        spec: the arm's ladder, of one width.
        results: of that width, with their curves; failed ones say nothing.
        batch_tokens: tokens per step.

    Returns:
        None where too few trials have a loss.
    """
    kept = [result for result in results if result.status is not Status.FAILED]
    levels: list[tuple[int, float, float]] = []
    for step in _steps(kept):
        there = [at for result in kept if (at := _at(result, step)) is not None]
        if found := _level(spec, there):
            levels.append((step * batch_tokens, *found))
    if not levels:
        return None
    tokens, losses, errors = zip(*levels, strict=True)
    return Envelope(tokens, losses, errors)


def _steps(results: Sequence[Result]) -> list[int]:
    """Return the steps at which the held-out loss was measured, of the run with most of them."""
    rows = [sorted(_measured(result)) for result in results if result.status is Status.COMPLETE]
    return max(rows, key=len, default=[])


def _measured(result: Result) -> dict[int, float]:
    """Map steps to held-out losses, that at the end included."""
    return {row.step: row.held_out_loss for row in result.curve if row.held_out_loss is not None}


def _at(result: Result, step: int) -> Result | None:
    """Return the result that a trial would have had at a step; None where nothing was measured."""
    if result.status is Status.DIVERGED:
        return replace(result, curve=())
    rows = _measured(result)
    steps = sorted(rows)
    if not steps or not steps[0] <= step <= steps[-1]:
        return None
    loss = float(np.interp(math.log(step), np.log(steps), [rows[s] for s in steps]))
    return replace(result, loss=loss, curve=())


def _level(spec: LadderSpec, results: Sequence[Result]) -> tuple[float, float] | None:
    """Return the loss at the best setting and its standard deviation, nats per token.

    Returns:
        None where fewer than `LEAST_LOSSES` points have a loss and did not diverge.
    """
    known = {result.trial: result for result in results}
    state = State(spec, (), (), known, tuple(known))
    data = observe(state)
    if len(np.unique(data.places, axis=0)) < LEAST_LOSSES:
        return None
    levels, unit = levels_of(Surface(frame_of(state, spec.target), data)), unit_of(state)
    error = math.sqrt(float(levels.covariance[0, 0]))
    return unit * float(levels.losses[0]), unit * error
