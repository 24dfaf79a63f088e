"""The critical batch size: the curve of equal loss through the arms' tokens and steps.

On it (S/S_min − 1)(D/D_min − 1) = 1, with steps S and tokens D = S · B (arXiv 1812.06162). Solved
for the tokens, D = D_min + S_min · B: a line in the batch B. At the critical batch D_min/S_min, a
run takes twice the fewest tokens and twice the fewest steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from telescope.frontier.reach import Array, Reached, quantiles

LEAST_BATCHES = 3
"""Batch sizes that a curve of two numbers needs, so that its fit can be judged."""
LEAST_ERROR = 0.002
"""Least standard deviation of log tokens in the fit, so that no arm counts for everything.
Assumption."""


@dataclass(frozen=True)
class Critical:
    """The critical batch of one optimizer, to one loss."""

    optimizer: str
    loss: float
    tokens: float | None
    """Critical batch, tokens; None without a fit, or outside of the batches measured."""
    interval: tuple[float | None, float | None] | None
    """The range that holds it with 90 % probability; an end is None where it lies outside of the
    batches measured."""
    fewest_tokens: float | None
    """D_min."""
    fewest_steps: float | None
    """S_min."""
    misfit: float | None
    """Root mean square departure of the arms from the curve, as a share of the tokens."""
    reason: str
    """The reason that there is no number; empty where there is one."""


def critical_of(optimizer: str, loss: float, arms: Sequence[Reached]) -> Critical:
    """Fit the curve to the arms of one optimizer that have reached a loss."""
    known = [arm for arm in arms if arm.tokens is not None]
    if len(known) < LEAST_BATCHES:
        sizes = "batch size" if len(known) == 1 else "batch sizes"
        reason = f"reached at {len(known)} {sizes}, the curve needs {LEAST_BATCHES}"
        return Critical(optimizer, loss, None, None, None, None, None, reason)
    batches = np.array([arm.arm.batch_tokens for arm in known], dtype=float)
    logs = np.log([arm.tokens or 1.0 for arm in known])
    drawn = np.stack([_inside(arm) for arm in known])
    errors = np.maximum(drawn.std(axis=1), LEAST_ERROR)
    fewest_tokens, fewest_steps = _fit(batches, logs, errors)
    residual = logs - np.log(fewest_tokens + fewest_steps * batches)
    freedom = len(known) - 2
    # What the curve misses beyond the arms' errors counts as an error of the arms.
    wider = max(1.0, float(np.sqrt(((residual / errors) ** 2).sum() / freedom)))
    draws = logs[:, None] + wider * (drawn - logs[:, None])
    low, high = float(batches.min()), float(batches.max())
    criticals = np.array([_critical(*_fit(batches, draw, errors)) for draw in draws.T])
    criticals = np.where(criticals < low, -np.inf, np.where(criticals > high, np.inf, criticals))
    best = _critical(fewest_tokens, fewest_steps)
    side = "below the smallest" if best < low else "above the largest" if best > high else ""
    return Critical(
        optimizer=optimizer,
        loss=loss,
        tokens=None if side else best,
        interval=quantiles(criticals),
        fewest_tokens=fewest_tokens,
        fewest_steps=fewest_steps,
        misfit=float(np.sqrt((residual**2).mean())),
        reason=f"{side} batch measured" if side else "",
    )


def _inside(arm: Reached) -> Array:
    """(draws,) log tokens; those outside of what was measured are taken at its ends."""
    logs: Array = np.log(np.clip(arm.draws, arm.first, arm.last))
    return logs


def _critical(fewest_tokens: float, fewest_steps: float) -> float:
    return fewest_tokens / fewest_steps if fewest_steps > 0 else math.inf


def _fit(batches: Array, logs: Array, errors: Array) -> tuple[float, float]:
    """Return D_min and S_min, neither negative, by least squares in relative errors."""
    tokens = np.exp(logs)
    columns = np.stack([np.ones(len(batches)), batches], axis=1) / (tokens * errors)[:, None]
    (fewest_tokens, fewest_steps), _ = nnls(columns, 1 / errors)
    return float(fewest_tokens), float(fewest_steps)
