"""Tokens to a loss, with an interval; and the ratio of two optimizers' tokens.

An arm's uncertainty is one number: a seed's luck, or an optimum that is not known well, moves the
loss at every step to the same side. It is drawn for each arm alone, from Student's distribution,
because the noise itself is estimated from few seeds. Two arms of one batch size have seeds in
common, so that the interval of their ratio is, if anything, too wide.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

from telescope.frontier.arms import Arm
from telescope.frontier.curves import Envelope

Array = NDArray[np.float64]

DRAWS = 1001
"""Draws of each arm's uncertainty. Numerical."""
FREEDOM = 6
"""Degrees of freedom of an arm's error: two further seeds, and four that the fit's prior on
a seed's shift counts for. Measured: with normal errors, 90 % intervals held the loss in 85 % of
simulated arms whose noise is all a seed's."""
TAIL = 0.05
"""Probability beyond each end of an interval."""


@dataclass(frozen=True)
class Reached:
    """Tokens after which an arm has come down to a loss."""

    arm: Arm
    loss: float
    """Held-out loss, nats per token."""
    tokens: float | None
    """Expected number; None if the loss was not reached, or before anything was measured."""
    interval: tuple[float | None, float | None] | None
    """The range that holds it with 90 % probability; an end is None where it lies outside of what
    was measured."""
    first: int
    """Tokens at the first measurement."""
    last: int
    """Tokens at the last measurement."""
    draws: Array
    """(draws,) equally probable numbers; −∞ for before `first`, ∞ for after `last`."""

    @property
    def steps(self) -> float | None:
        """Steps to the loss."""
        return None if self.tokens is None else self.tokens / self.arm.batch_tokens

    @property
    def is_late(self) -> bool:
        """True if the loss was not reached."""
        return self.tokens is None and float(np.median(self.draws)) == math.inf

    @property
    def reason(self) -> str:
        """The reason that there is no number; empty where there is one."""
        if self.tokens is not None:
            return ""
        if self.is_late:
            return f"not reached within {self.last:,} tokens"
        return f"reached before the first measurement, at {self.first:,} tokens"


def reached(arm: Arm, envelope: Envelope, loss: float, number: int) -> Reached:
    """Return when an arm comes down to a loss.

    Args:
        arm: the arm.
        envelope: its loss against tokens.
        loss: nats per token.
        number: the arm's number, by which its draws differ from other arms'.
    """
    deviations = student.ppf((np.arange(DRAWS) + 0.5) / DRAWS, FREEDOM)
    draws = envelope.draws_to(loss, deviations)
    expected = envelope.tokens_to(loss)
    low, high = (_finite(float(np.quantile(draws, q, method="nearest"))) for q in (TAIL, 1 - TAIL))
    is_number = math.isfinite(expected)
    return Reached(
        arm=arm,
        loss=loss,
        tokens=expected if is_number else None,
        interval=(low, high) if is_number else None,
        first=envelope.tokens[0],
        last=envelope.tokens[-1],
        draws=np.random.default_rng(number).permutation(draws),
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def quantiles(draws: Array, low_draws: Array | None = None) -> tuple[float | None, float | None]:
    """Return the ends of the 90 % interval of some draws; None for an end that is unknown.

    Args:
        draws: (draws,) numbers, infinite where they lie beyond what was measured.
        low_draws: the same with other numbers where a draw is unknown, for the lower end.
    """
    lower = draws if low_draws is None else low_draws
    low = float(np.quantile(lower, TAIL, method="nearest"))
    high = float(np.quantile(draws, 1 - TAIL, method="nearest"))
    return _finite(low), _finite(high)


@dataclass(frozen=True)
class Ratio:
    """Tokens that AdamW needs over those that Muon needs, to one loss at one batch size."""

    batch_size: int
    batch_tokens: int
    loss: float
    ratio: float | None
    """None if one of the two has no number of tokens."""
    interval: tuple[float | None, float | None] | None
    """The range that holds it with 90 % probability; an end is None where it is unknown."""
    reason: str
    """The reason that there is no ratio; empty where there is one."""
    logs: tuple[Array, Array] | None
    """(draws,) logarithms, unknown ones as low and as high as can be."""

    @property
    def verdict(self) -> str:
        """ "above" or "below" 1 with 95 % probability, "inside" the noise, or "none"."""
        if self.ratio is None or self.interval is None:
            return "none"
        low, high = self.interval
        if low is not None and low > 1:
            return "above"
        return "below" if high is not None and high < 1 else "inside"


def ratio_of(muon: Reached, adamw: Reached) -> Ratio:
    """Compare two arms of one batch size."""
    missing = [
        f"{side.arm.optimizer}: {side.reason}" for side in (muon, adamw) if side.tokens is None
    ]
    arm = muon.arm
    facts = arm.batch_size, arm.batch_tokens, muon.loss
    if muon.tokens is None or adamw.tokens is None:
        return Ratio(*facts, None, None, "; ".join(missing), None)
    low, high = _log_ratio(adamw, muon)
    ends = quantiles(high, low)
    interval = tuple(None if end is None else math.exp(end) for end in ends)
    return Ratio(*facts, adamw.tokens / muon.tokens, (interval[0], interval[1]), "", (low, high))


def _log_ratio(above: Reached, below: Reached) -> tuple[Array, Array]:
    """Return the logarithm of the ratio of two arms' tokens, as low and as high as it can be."""
    (low_above, high_above), (low_below, high_below) = _bounds(above), _bounds(below)
    with np.errstate(divide="ignore"):
        return np.log(low_above / high_below), np.log(high_above / low_below)


def _bounds(arm: Reached) -> tuple[Array, Array]:
    """Return (low, high) of each draw's tokens: all that is known of one outside the measured."""
    early, late = arm.draws == -np.inf, arm.draws == np.inf
    low = np.where(early, 0.0, np.where(late, arm.last, arm.draws))
    high = np.where(early, arm.first, arm.draws)
    return low, high


@dataclass(frozen=True)
class Trend:
    """Change of the ratio with the batch size, to one loss."""

    loss: float
    slope: float | None
    """Change of log2 of the ratio per doubling of the batch; None with fewer than 3 ratios."""
    interval: tuple[float | None, float | None] | None
    verdict: str
    """"rises", "falls", "inside" the noise, or "none"."""


def trend_of(loss: float, ratios: Sequence[Ratio]) -> Trend:
    """Fit a line to log2 of the ratio against log2 of the batch size."""
    known = [ratio for ratio in ratios if ratio.ratio is not None and ratio.logs is not None]
    if len(known) < 3:
        return Trend(loss, None, None, "none")
    octaves = np.log2([ratio.batch_tokens for ratio in known])
    weights = octaves - octaves.mean()
    weights /= float(weights @ weights)
    logs = np.log2(np.array([ratio.ratio for ratio in known], dtype=float))
    # An unknown ratio is taken at the end that makes the slope lowest, or highest.
    low = np.stack(
        [r.logs[0 if w > 0 else 1] for r, w in zip(known, weights, strict=True) if r.logs]
    )
    high = np.stack(
        [r.logs[1 if w > 0 else 0] for r, w in zip(known, weights, strict=True) if r.logs]
    )
    lowest, highest = _sloped(weights, low), _sloped(weights, high)
    interval = quantiles(highest, lowest)
    rises = interval[0] is not None and interval[0] > 0
    falls = interval[1] is not None and interval[1] < 0
    verdict = "rises" if rises else "falls" if falls else "inside"
    return Trend(loss, float(weights @ logs), interval, verdict)


def _sloped(weights: Array, logs: Array) -> Array:
    """(draws,) slope of each draw per octave; infinite where one of its ratios is."""
    some = weights != 0  # the middle one of an odd number says nothing
    slopes: Array = (weights[some, None] * logs[some] / math.log(2)).sum(axis=0)
    return slopes
