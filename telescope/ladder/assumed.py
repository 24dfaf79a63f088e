"""Assumptions about what the sweep and the target run have in common, which nothing measures."""

from __future__ import annotations

FIND_THE_RULE = "run `telescope check`, and see optimizer.rule"
"""Advice for an optimum that keeps moving, where telescope trains the model itself."""
ALIKE = ("depth", "batch size", "steps", "data", "schedule")
"""Names of everything that is assumed to be the same at every width and at the target."""


def assumed_alike(*differing: str) -> str:
    """State that the target is trained as the widths were, except for the known differences.

    >>> assumed_alike("steps", "schedule")
    'depth, batch size and data are the same at every width and at the target'
    """
    *first, last = (name for name in ALIKE if name not in differing)
    return f"{', '.join(first)} and {last} are the same at every width and at the target"
