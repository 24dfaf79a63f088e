"""Time real steps on this machine: the length of a trial, and a step in each arithmetic."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from telescope.config import TrainConfig, TrialConfig
from telescope.records import Trial
from telescope.train.loop import (
    Setup,
    held_out_loss_of,
    set_up,
    take_step,
    token_loss,
)
from telescope.train.muon import DTYPES, Muon, orthogonalize_all

WARM_UP_STEPS = 2
TIMED_STEPS = 5
ROUNDS = 3
"""Number of times that each arithmetic is timed, in turns; the fastest time counts."""
ARITHMETICS = ("fp32", "bf16")


def seconds_per_trial(config: TrialConfig, trial: Trial) -> float:
    """Estimate the wall time of `trial` from a few steps and one held-out measurement.

    Args:
        config: the sweep's training; its corpus is read, nothing is written.
        trial: the width to time; the point hardly matters.
    """
    setup = set_up(config, trial)
    train = replace(config.train, steps=WARM_UP_STEPS + TIMED_STEPS, evals=1)
    per_step = seconds_per_step(setup, train)
    start = time.perf_counter()
    held_out_loss_of(setup)
    per_eval = time.perf_counter() - start
    return per_step * config.train.steps + per_eval * config.train.evals


def seconds_per_step(setup: Setup, train: TrainConfig) -> float:
    """Return the wall time of a step of one trial, measured after a few warm-up steps."""
    start = time.perf_counter()
    for step in range(WARM_UP_STEPS + TIMED_STEPS):
        if step == WARM_UP_STEPS:
            start = time.perf_counter()
        loss = take_step(setup.model, setup.optimizers, setup.batches, train, step, setup.device)
    loss.item()  # waits until an accelerator has done all steps
    return (time.perf_counter() - start) / TIMED_STEPS


def arithmetic_seconds(config: TrialConfig, trial: Trial) -> dict[str, dict[str, float]]:
    """Time the parts of a step in either arithmetic.

    Args:
        config: the sweep's training; its corpus is read, nothing is written.
        trial: the width to time; the point hardly matters.

    Returns:
        "train.precision" (forward and backward) and, with Muon, "optimizer.ns_dtype"
        (Newton–Schulz) → "fp32" and "bf16" → seconds per step.

    Raises:
        DataError, ModelError: as `loop.set_up`.
    """
    in_bf16 = replace(config, train=replace(config.train, precision="bf16"))
    setup = set_up(in_bf16, trial)  # bf16 so that autocast's warning is off in both timings
    inputs, targets = (tokens.to(setup.device) for tokens in setup.batches.at(0))
    matrices: list[Tensor] = [
        p.detach()
        for optimizer in setup.optimizers
        if isinstance(optimizer, Muon)
        for group in optimizer.param_groups
        for p in group["params"]
    ]
    steps, ns = config.optimizer.ns_steps, config.optimizer.ns

    def train(precision: str) -> None:
        setup.model.zero_grad()
        token_loss(setup.model, inputs, targets, precision).backward()  # type: ignore[no-untyped-call]

    def orthogonalise(dtype: str) -> None:
        orthogonalize_all(matrices, steps=steps, dtype=DTYPES[dtype], ns=ns)

    timed = {"train.precision": _fastest(train, setup.device)}
    if matrices:
        timed["optimizer.ns_dtype"] = _fastest(orthogonalise, setup.device)
    return timed


def _fastest(part: Callable[[str], object], device: str) -> dict[str, float]:
    """Time a part of a step in each arithmetic, in turns, after a warm-up turn."""
    least: dict[str, float] = {}
    for turn in range(ROUNDS + 1):
        for arithmetic in ARITHMETICS:
            start = time.perf_counter()
            part(arithmetic)
            if torch.device(device).type != "cpu":
                torch.accelerator.synchronize(device)
            taken = time.perf_counter() - start
            if turn:
                least[arithmetic] = min(taken, least.get(arithmetic, taken))
    return least
