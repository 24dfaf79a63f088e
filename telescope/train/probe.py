"""How long a trial takes on this machine: a few real steps, timed."""

from __future__ import annotations

import time
from dataclasses import replace

from telescope.config import TrainConfig, TrialConfig
from telescope.records import Trial
from telescope.train.loop import (
    Setup,
    held_out_loss_of,
    set_up,
    take_step,
    use_threads,
)

WARM_UP_STEPS = 2
TIMED_STEPS = 5


def seconds_per_trial(config: TrialConfig, trial: Trial) -> float:
    """Wall time of `trial`, from a few steps and one held-out measurement of a single worker.

    Args:
        config: the sweep's training; its corpus is read, nothing is written.
        trial: which width to train; the point hardly matters.
    """
    use_threads(config, trial.width)
    setup = set_up(config, trial)
    train = replace(config.train, steps=WARM_UP_STEPS + TIMED_STEPS, evals=1)
    per_step = seconds_per_step(setup, train)
    start = time.perf_counter()
    held_out_loss_of(setup)
    per_eval = time.perf_counter() - start
    return per_step * config.train.steps + per_eval * config.train.evals


def seconds_per_step(setup: Setup, train: TrainConfig) -> float:
    """Wall time of a step of one trial, from the steps after a few others."""
    start = time.perf_counter()
    for step in range(WARM_UP_STEPS + TIMED_STEPS):
        if step == WARM_UP_STEPS:
            start = time.perf_counter()
        loss = take_step(setup.model, setup.optimizers, setup.batches, train, step, setup.device)
    loss.item()  # an accelerator has done all steps only now
    return (time.perf_counter() - start) / TIMED_STEPS
