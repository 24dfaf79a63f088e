"""The fit's priors: every constant with its symbol, unit, status and source.

Symbols are those of docs/ladder.md. An octave is a factor of two along an axis; h is the lattice's
step and R the range of an axis, both in octaves. Two scales come from the losses: S is the median
excess over the best loss at base width, and H is the largest excess at any width. κ is the expected
curvature, found by first guesses. All priors are normal with mean 0, unless noted.

Status: *measured* (by a command of this project, whose results are named), *published* (with its
source), *derived*, or *assumption*.
"""

from __future__ import annotations

import numpy as np

# -- the surface at base width ------------------------------------------------------------------

LEVEL = 3.0
"""σ(level) / H. Wide on purpose: a level is fitted, never predicted. Assumption."""
PLACE = 0.5
"""σ(x₀) / R: the optimum's distance from the centre. Assumption: the range was chosen around it."""
BOWL = 2.0
"""σ(κ) · h² / S: one lattice step off the optimum, the excess is about the median. Assumption."""
TILT = 1.0
"""σ(c) / √(κ κ′): about the strongest tilt without a saddle. Assumption."""
SKEW = 0.5
"""σ(s) / κ, per octave. Published: 0.4 to 0.6 in public sweeps of the lr (arXiv 2503.04715)."""
SKEW_REACH = 2.5
"""r, octaves after which the skew grows no faster than linearly. Assumption."""
BENDS = (0.0, 0.2, 0.5)
"""β: standard deviations of the bend, as shares of the bowl, equally probable. Assumption."""
BEND_LENGTH = 1.75
"""ℓ, octaves: length of the bend's squared-exponential kernel. Assumption: a plateau or a wall
begins about two octaves from the optimum (measured: results/reference/quickstart-ladder)."""

# -- its change with the width ------------------------------------------------------------------

LAW_PRIORS = {"1/width": 0.6, "1/√width": 0.3, "never settles": 0.1}
"""Probabilities of the laws of drift. Assumption: a width rule is right more often than not."""
UNSETTLED_PACE = 2.0
"""σ of the drift under a wrong width rule over that under a right one. Derived: it gives 0.5
octaves, as measured for a rule that is wrong by √width (results/reference/width-rules)."""
DRIFT_OCTAVES = 0.25
"""σ(d), octaves: the drift over the first doubling. Assumption; measured is under 0.1 for `mup`
(results/reference/width-rules)."""
DRIFT_STEPS = 0.25
"""σ(d) in lattice steps, at most. Assumption: nobody sweeps in steps as small as the drift."""
SCATTER = 0.05
"""σ(e), octaves: a width's own departure from the law of drift. Assumption."""
DEEPENINGS = {-0.33: 0.1, 0.0: 0.45, 0.33: 0.3, 0.67: 0.15}
"""δ, octaves of excess loss per doubling of the width → probability. Assumption; measured were 0
to 0.8 (results/reference/ladder)."""

# -- the likelihood -----------------------------------------------------------------------------

NOISE_SCALES = np.logspace(-1.5, 1.5, 9)
"""ν / expected noise: the standard deviations between seeds that are considered. Numerical."""
NOISE_PRIOR = 1.0
"""σ(ln ν) around the expected noise. Assumption."""
SEED_SHIFT = 2.0
"""τ / ν: standard deviation by which a further seed moves all points of a width together.
Assumption."""
MISFIT = (0.05, 0.2)
"""μ: the model's error as a share of the loss above the best; both are equally probable. It makes
the fit local without a cut-off. Assumption."""
FAR = 3.0
"""Loss above the best, in multiples of S, at which μ has doubled. Assumption."""
MOST_MISFIT = 0.6
"""The model's error as a share of the loss above the best, at most. Assumption."""

# -- the optimum --------------------------------------------------------------------------------

INDISTINCT = 1 / 60
"""ε / expected noise: excess loss along an axis below which a smooth fit cannot locate the optimum,
however many trials there are. Kinks and unequal sides of real surfaces move the vertex of a fit by
about this much, 0.005 % of the loss. Assumption, chosen on the families of
results/reference/calibration: without it, half of the intervals missed the optimum of public
sweeps of the lr."""
MOST_BLURRED = 0.3
"""Octaves by which `INDISTINCT` moves an optimum at most, along a flat axis. Assumption."""
MOST_STEPS = 3.0
"""Lattice steps from the centre within which an optimum is looked for. Assumption."""
