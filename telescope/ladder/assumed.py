"""Assumptions on what is alike in the sweep and at the target, where nothing measures it."""

from __future__ import annotations

FIND_THE_RULE = "run `telescope check`, and see optimizer.rule"
"""Advice on an optimum that keeps moving, where telescope trains the model itself."""
ALIKE = ("depth", "batch size", "steps", "data", "schedule")
"""Names of all that is taken to be the same at every width and at the target."""


def assumed_alike(*differing: str) -> str:
    """Word the assumption that the target is trained as the widths were, known differences aside.

    >>> assumed_alike("steps", "schedule")
    'depth, batch size and data are the same at every width and at the target'
    """
    *first, last = (name for name in ALIKE if name not in differing)
    return f"{', '.join(first)} and {last} are the same at every width and at the target"
