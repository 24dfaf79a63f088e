"""When the adaptive policy acts, and what its verdict asks for: every threshold, with its status.

They decide what is spent, and what is said; what is believed of a surface is in `fit/priors.py`.
Each is an assumption unless said; together they were chosen on `benchmarks/regret.py` and
`benchmarks/calibration.py`, which measure what they cost and whether PASS is kept.
"""

# -- what an answer that passes promises ---------------------------------------------------------

SURE = 0.9
"""Probability with which an answer that passes costs no more than the tolerance."""
RULED_OUT = 0.03
"""Probability below which a drift that never settles is ruled out."""
CHECKED_ODDS = 0.2
"""Factor by which a passed coordinate check multiplies the odds of a wrong rule. Of 16 variants of
the quickstart's optimizer, 0 of 7 wrong ones passed and 8 of 9 right ones: 0.14 by the rule of
succession, taken a little more carefully."""

# -- the rounds ----------------------------------------------------------------------------------

LEAST_LOSSES = 3
"""Losses at base width, of points without a divergence, without which there is nothing to fit."""
REPEATS = 3
"""Best cells of the base width that get a further seed before the stage closes."""
REPEAT_WITHIN = 5.0
"""Standard deviations of the noise above the best within which a cell is worth a further seed."""
MOST_TRIALS = 30
"""Trials of one stage, for each of the spec's seeds, after which it closes as it is."""
FAILED_SHARE = 0.1
"""A stage closes with failures up to this share of its trials."""

# -- when a stage goes on, and when the ladder ends ----------------------------------------------

AHEAD = 60
"""Trials, of all widths from the open one up, that a forecast of the rest looks at."""
GOAL = 0.4
"""Tolerances that the 90 % bound is to fall to in that forecast: forecasts are too bright."""
WORTH = 0.9
"""Share of what all those trials would say that is worth its cost: the rest is dear."""
LEAST_GAIN = 0.1
"""Share of the predicted excess that a round must promise to take off at the last width."""

# -- an optimum at a border ----------------------------------------------------------------------

AT_BORDER = 0.25
"""An optimum within so many steps of the outermost value measured counts as lying at the border."""
DRAWN_AHEAD = 1.5
"""Steps beyond what was measured where a further trial may still find the optimum."""
BORDER_TRIALS = 1
"""Trials of a round that look beyond a border."""
MOST_EXTENSIONS = 3
"""Times that the window of one axis grows at one width above the base width."""
MOST_BEYOND = 4
"""Values of an axis outside of its range at base width: 1, 3, 7 and 15 steps beyond it."""

# -- an axis that hardly matters -----------------------------------------------------------------

UNIDENTIFIED = 0.5
"""An axis whose 90 % interval is longer than this share of its prior range is unidentified."""
LEAST_BENDS = 0.99
"""Probability that the loss curves upwards along an axis without which it is unidentified."""
KEPT_WITHIN = 1.0
"""Standard deviations of what keeping an unidentified axis costs by the fit: above, it is believed
that the axis matters."""
MOST_FOR_KEEPING = 1.0
"""Tolerances that keeping an unidentified axis may cost by the fit; above, the fit is believed."""

# -- the verdict ---------------------------------------------------------------------------------

FAIL_EXCESS = 0.02
"""Predicted excess loss, as a share of the loss, from which an answer is no answer."""
CONTRADICTION = 3.0
"""Standard errors by which the last width may miss what those before it predicted."""
NOTICEABLE_DRIFT = 0.1
"""Octaves per doubling below which a drift that does not settle is not held against a rule."""
RIVAL_WITHIN, RIVAL_ABOVE = 3.0, 6.0
"""Two minima: losses alike within so many standard deviations of the noise, and a loss between
them that lies so many above both."""
MERE_PRIOR = 0.1
"""Change of a law's probability by the results below which it is said to be the prior still."""
USABLE = 5.0
"""Tolerances that an answer may cost at most and be called usable without a proof."""
