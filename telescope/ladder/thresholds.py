"""Every threshold of the adaptive policy and of its verdict, with its status.

The thresholds decide about cost and wording; the beliefs about a surface are in `fit/priors.py`.
Each is an assumption unless noted. Together they were chosen on `benchmarks/regret.py` and
`benchmarks/calibration.py`, which measure their cost and how often PASS keeps its promise.
"""

# -- the promise of an answer that passes --------------------------------------------------------

SURE = 0.9
"""Probability with which a PASS answer costs no more than the tolerance."""
RULED_OUT = 0.03
"""Probability below which a drift that never settles is ruled out."""
CHECKED_ODDS = 0.2
"""Factor by which a passed coordinate check multiplies the odds of a wrong rule. Measured: of 16
variants of the quickstart's optimizer, 0 of 7 wrong ones and 8 of 9 right ones passed. By the rule
of succession this gives 0.14; the value is a little more cautious."""

# -- the rounds ----------------------------------------------------------------------------------

LEAST_LOSSES = 3
"""Losses that the fit needs at base width, of points that did not diverge."""
REPEATS = 3
"""Best cells of the base width that get a further seed before the stage closes."""
REPEAT_WITHIN = 5.0
"""Distance from the best cell's loss within which a cell gets a further seed, in standard
deviations of the noise."""
MOST_TRIALS = 30
"""Trials of one stage, per seed of the spec, after which it asks for no more."""
FAILED_SHARE = 0.1
"""Share of a stage's trials that may fail."""

# -- when a stage goes on, and when the ladder ends ----------------------------------------------

AHEAD = 60
"""Most trials in the forecast of the rest of the ladder, of the open width and all wider ones."""
GOAL = 0.4
"""Goal of the 90 % bound in that forecast, in tolerances; below 1, as forecasts are optimistic."""
WORTH = 0.9
"""Share of the gain of all those trials that the forecast keeps; the rest costs too much."""
LEAST_GAIN = 0.1
"""Least share of the predicted excess that a round at the last width must promise to remove."""

# -- an optimum at a border ----------------------------------------------------------------------

AT_BORDER = 0.25
"""Lattice steps from the outermost value measured within which an optimum lies at the border."""
DRAWN_AHEAD = 1.5
"""Lattice steps beyond the measured range in which the next trials may still find the optimum."""
BORDER_TRIALS = 1
"""Trials of a round that look beyond a border."""
MOST_EXTENSIONS = 3
"""Number of times that an axis's window may grow at one width above the base width."""
MOST_BEYOND = 4
"""Most values of an axis outside of its range at base width: 1, 3, 7 and 15 steps beyond it."""

# -- an axis that hardly matters -----------------------------------------------------------------

UNIDENTIFIED = 0.5
"""Share of its prior range that the 90 % interval of an identified axis may cover."""
LEAST_BENDS = 0.99
"""Least probability that the loss curves upwards along an identified axis."""
KEPT_WITHIN = 1.0
"""Most that keeping an axis at its prior value may cost by the fit, in standard deviations of that
cost; above this or above `MOST_FOR_KEEPING`, the fit's own value is used."""
MOST_FOR_KEEPING = 1.0
"""Most that keeping an axis at its prior value may cost by the fit, in tolerances."""

# -- the verdict ---------------------------------------------------------------------------------

FAIL_EXCESS = 0.02
"""Predicted excess loss, as a share of the loss, above which the verdict is FAIL."""
CONTRADICTION = 3.0
"""Standard errors by which the last width may miss the prediction of the earlier ones."""
NOTICEABLE_DRIFT = 0.1
"""Octaves per doubling below which an unsettled drift is not held against a width rule."""
RIVAL_WITHIN, RIVAL_ABOVE = 3.0, 6.0
"""Two minima: their losses differ by less than the first number of standard deviations of the
noise, and a loss between them lies more than the second number above both."""
MERE_PRIOR = 0.1
"""Change of a law's probability by the results below which the evidence calls it mere prior."""
USABLE = 5.0
"""Most that an unproven answer may cost and be called usable, in tolerances."""
