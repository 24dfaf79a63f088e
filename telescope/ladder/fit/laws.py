"""Candidate laws of the surface's change with the width: its optimum's place, and its depth.

Under muP an optimum settles: x(n) = x − α/n when the loss is analytic in 1/n (arXiv 2505.02222
§3.3), at the slowest as 1/√n (the proved bound, arXiv 2511.01734). Under a wrong width rule it
moves by the same factor at every doubling and never settles. All three laws agree at the base width
and at the first doubling, so two widths cannot tell them apart; a third can.

The bowl may also deepen: in our measurements, the same error in weight decay costs five times as
much at width 256 as at 32. It deepens by a power of the width, one of the four in `DEEPENINGS`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from telescope.ladder.fit.priors import DEEPENINGS, LAW_PRIORS, UNSETTLED_PACE


@dataclass(frozen=True, slots=True)
class Law:
    """One law by which the optimum may move with the width n."""

    name: str
    exponent: float
    """p of n^−p; 0 stands for the logarithm, which does not settle."""
    prior: float
    """Probability before any result."""
    pace: float
    """Standard deviation of the drift over the first doubling, as a multiple of `DRIFT_OCTAVES`."""
    deepening: float = 0.0
    """Octaves (factors of two) by which the excess loss grows per doubling of the width."""

    def progress(self, width: float, base_width: float) -> float:
        """Return the distance that the optimum has moved, in drifts over the first doubling.

        >>> [LAWS[0].progress(w, 32) for w in (32, 64, 128)]
        [0.0, 1.0, 1.5]
        >>> [LAWS[2].progress(w, 32) for w in (32, 64, 128)]
        [0.0, 1.0, 2.0]
        """
        ratio = width / base_width
        if self.exponent == 0:
            return math.log2(ratio)
        return float((1 - ratio**-self.exponent) / (1 - 2**-self.exponent))

    def depth(self, width: float, base_width: float) -> float:
        """Return the excess loss at a width over that at base width, equally far from the optimum.

        >>> Law("", 1.0, 1.0, 1.0, deepening=0.5).depth(128, 32)
        2.0
        """
        return float((width / base_width) ** self.deepening)


LAWS = (
    Law("1/width", 1.0, LAW_PRIORS["1/width"], 1.0),
    Law("1/√width", 0.5, LAW_PRIORS["1/√width"], 1.0),
    Law("never settles", 0.0, LAW_PRIORS["never settles"], UNSETTLED_PACE),
)
"""The last one is the effect of a wrong width rule."""
HYPOTHESES = tuple(
    replace(law, prior=law.prior * prior, deepening=deepening)
    for law in LAWS
    for deepening, prior in DEEPENINGS.items()
)
"""Every law of drift with every deepening; those of one law stand together."""
