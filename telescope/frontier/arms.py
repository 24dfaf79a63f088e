"""The arms of a frontier: every optimizer with every batch size, and the tokens that each trains.

An arm's tokens lie on the hyperbola of equal loss, (S/S_min − 1)(D/D_min − 1) = 1, on which the
tokens D = S · B grow linearly with the batch B: D = D_min + S_min · B. So all arms end near the
same loss, and the plan is exact before anything has run.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Arm:
    """One optimizer with one batch size."""

    optimizer: str
    batch_size: int
    """Sequences per step."""
    sequence_length: int
    """Tokens per sequence."""
    steps: int
    """Optimizer steps of a run."""

    @property
    def name(self) -> str:
        """Name of its results folder: ``muon-64``."""
        return f"{self.optimizer}-{self.batch_size}"

    @property
    def batch_tokens(self) -> int:
        """Tokens per step."""
        return self.batch_size * self.sequence_length

    @property
    def tokens(self) -> int:
        """Tokens of a run."""
        return self.steps * self.batch_tokens

    def __str__(self) -> str:
        """Return the form for people: ``muon, batch 64 (2,048 tokens)``."""
        return f"{self.optimizer}, batch {self.batch_size} ({self.batch_tokens:,} tokens)"


def plan_arms(
    optimizers: Iterable[str],
    batch_sizes: Iterable[int],
    *,
    sequence_length: int,
    tokens: int,
    steps: int,
) -> tuple[Arm, ...]:
    """Return the arms, small batches first, the optimizers of one batch size side by side.

    Args:
        optimizers: their names.
        batch_sizes: sequences per step.
        sequence_length: tokens per sequence.
        tokens: tokens of a run at a batch size near 0.
        steps: steps of a run at a huge batch size.

    >>> [(arm.name, arm.steps, arm.tokens) for arm in plan_arms(
    ...     ["muon", "adamw"], [8, 1024], sequence_length=32, tokens=256_000, steps=200)]
    ... # doctest: +NORMALIZE_WHITESPACE
    [('muon-8', 1200, 307200), ('adamw-8', 1200, 307200),
     ('muon-1024', 208, 6815744), ('adamw-1024', 208, 6815744)]
    """
    names = tuple(optimizers)
    return tuple(
        Arm(name, size, sequence_length, steps + round(tokens / (size * sequence_length)))
        for size in sorted(batch_sizes)
        for name in names
    )
