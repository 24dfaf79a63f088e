"""How long a trial takes on this machine: a few real steps, timed."""

from __future__ import annotations

import time
from dataclasses import replace

import torch

from telescope.records import Trial
from telescope.train.config import TrialConfig
from telescope.train.loop import held_out_loss, set_up, take_step

WARM_UP_STEPS = 2
TIMED_STEPS = 5


def seconds_per_trial(config: TrialConfig, trial: Trial) -> float:
    """Wall time of `trial`, from a few steps and one held-out measurement of a single worker.

    Args:
        config: the sweep's training; its corpus is read, nothing is written.
        trial: which width to train; the point hardly matters.
    """
    torch.set_num_threads(config.threads_at.get(trial.width, config.threads))
    setup = set_up(config, trial)
    train = replace(config.train, steps=WARM_UP_STEPS + TIMED_STEPS, evals=1)
    start = time.perf_counter()
    for step in range(train.steps):
        if step == WARM_UP_STEPS:
            start = time.perf_counter()
        take_step(setup.model, setup.optimizers, setup.batches, train, step, setup.device)
    per_step = (time.perf_counter() - start) / TIMED_STEPS
    start = time.perf_counter()
    held_out_loss(setup.model, setup.held_out, train.batch_size)
    per_eval = time.perf_counter() - start
    return per_step * config.train.steps + per_eval * config.train.evals
