"""Surfaces of simulated losses, and ladders that climb them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from calibration import random_truth
from simulated import ESSENTIAL, Surface

from telescope.ladder.ladder import Ladder
from telescope.records import LadderSpec, Result, Trial

Answer = Callable[[Trial], Result]


def surface(seed: int = 0, **truth: Any) -> Surface:
    """A surface whose optimum lies at random within a step and a half of the lattice's middle."""
    return Surface(ESSENTIAL, random_truth(seed).optimum, seed=seed, **truth)


def climb(
    ladder: Ladder, answer: Answer, order: Callable[[list[Trial]], None] = lambda trials: None
) -> list[Result]:
    """Answer all that the ladder asks; returns the results in the order they were told."""
    told = []
    while trials := list(ladder.ask()):
        order(trials)
        for trial in trials:
            told.append(answer(trial))
            ladder.tell(told[-1])
            if ladder.stuck:
                break
    return told


def run(answer: Answer, spec: LadderSpec = ESSENTIAL) -> Ladder:
    """Climb with a new ladder to its end."""
    ladder = Ladder(spec)
    climb(ladder, answer)
    return ladder
