"""The learning-rate schedules, as shares of the peak. Standard library only."""

from __future__ import annotations

import math


def share_of_peak(
    step: int, *, name: str, steps: int, warmup_steps: int, final_lr: float, decay_steps: int = 0
) -> float:
    """Return the learning rate of a step as a share of its peak.

    A linear warm-up reaches the peak at its last step. Then ``cosine`` falls to `final_lr`,
    ``constant`` stays, and ``wsd`` stays and falls linearly to `final_lr` over `decay_steps`; both
    reach it at the last step. All later steps have the last step's rate.

    Args:
        step: from 0.
        name: "cosine", "constant" or "wsd".
        steps: length of the run.
        warmup_steps: length of the warm-up.
        final_lr: at the last step, as a share of the peak; `constant` does not use it.
        decay_steps: length of the decay of `wsd`; the others do not use it.

    Raises:
        ValueError: there is no such schedule.

    >>> wsd = {"name": "wsd", "steps": 11, "warmup_steps": 2, "final_lr": 0.0, "decay_steps": 4}
    >>> [share_of_peak(step, **wsd) for step in (0, 1, 6, 8, 10, 12)]
    [0.5, 1.0, 1.0, 0.5, 0.0, 0.0]
    """
    last = steps - 1
    step = min(step, last)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    match name:
        case "constant":
            return 1.0
        case "cosine":
            start = max(warmup_steps - 1, 0)
            progress = (step - start) / max(last - start, 1)
            return final_lr + (1 - final_lr) * (1 + math.cos(math.pi * progress)) / 2
        case "wsd":
            start = max(last - decay_steps, warmup_steps - 1)
            progress = max(step - start, 0) / max(last - start, 1)
            return 1 - (1 - final_lr) * progress
    raise ValueError(f"no schedule {name!r}; there are cosine, constant and wsd")
