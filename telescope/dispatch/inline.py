"""Runs a sweep in this process, one trial after the other: for debugging, and as the reference."""

from __future__ import annotations

from collections.abc import Callable

from telescope.dispatch.queue import Queue, Trainer, attempt
from telescope.records import Trial, TrialSource


def run_inline(
    source: TrialSource,
    trainer: Trainer,
    *,
    timeout: float = 0.0,
    on_start: Callable[[Trial], None] | None = None,
) -> None:
    """Run every trial that `source` asks for; returns when it asks for no more.

    What a trial does to its process (exits, is killed, hangs in C) it does to this one.
    """
    queue = Queue(source, on_start=on_start)
    while (trial := queue.take()) is not None:
        queue.answer(attempt(trainer, trial, timeout=timeout))
