"""Target runs for several test files: a tiny model, a few steps."""

from __future__ import annotations

import csv
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from conftest import trial_config
from faults import finish, start
from safetensors.torch import load_file
from torch import Tensor

from telescope.config import TrialConfig
from telescope.records import Point, Trial
from telescope.target import train
from telescope.target.folder import RunFolder
from telescope.target.ranks import Ranks
from telescope.target.record import Manner, TargetRun
from telescope.target.train import train_target

STEPS = 12
TRIAL = Trial(32, Point.of(lr=0.02, weight_decay=0.1), 3)


def tiny_run(corpus: Path, *, clip: float = 0.0, **parts: Any) -> TargetRun:
    """A run of a one-layer model of width 32 that takes a second."""
    config: TrialConfig = trial_config(corpus, **{"steps": STEPS, **parts})
    flops = {"model": 1e6, "attention": 1e5, "optimizer": 1e5}
    return TargetRun(sweep="tiny", trial=TRIAL, config=config, clip=clip, flops=flops)


def made(folder: Path, run: TargetRun) -> RunFolder:
    """A run's folder before its first start."""
    made = RunFolder(folder)
    made.write_run(run.as_dict())
    return made


def trained(folder: Path, run: TargetRun, **manner: Any) -> dict[str, Any]:
    """Train a run on one rank, to its end."""
    made(folder, run)
    return train_target(folder, Manner(**manner), Ranks())


def curve(folder: Path) -> list[dict[str, str]]:
    """The rows of a curve, without the seconds."""
    rows = list(csv.DictReader((folder / "curve.csv").read_text().splitlines()))
    for row in rows:
        del row["seconds"]
    return rows


def model_of(folder: Path, step: int) -> dict[str, Tensor]:
    """The parameters of a checkpoint, by name."""
    tensors: dict[str, Tensor] = load_file(
        folder / "checkpoints" / f"step-{step}" / "model.safetensors"
    )
    return tensors


def result_of(folder: Path) -> dict[str, Any]:
    """The result without what a clock has measured."""
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return {k: v for k, v in result.items() if k not in ("seconds", "tokens_per_second", "mfu")}


def rank_of(
    rank: int, size: int, folder: Path, manner: Manner, stop: int | None, meeting: Path
) -> None:
    """Train as one of several ranks, in a process of its own.

    Args:
        rank: its number.
        size: number of ranks.
        folder: the run's.
        manner: the manner of the run.
        stop: the step before which this rank is killed; None: it is not.
        meeting: a new file, by which the ranks find each other.
    """
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
    if stop is not None:
        take_step = train._Training._take_step

        def stopping(self: Any, number: int) -> Any:
            if number == stop:
                os.kill(os.getpid(), signal.SIGKILL)
            return take_step(self, number)

        train._Training._take_step = stopping  # type: ignore[assignment, method-assign]
    train_target(folder, manner, Ranks.of_group("cpu"))
    dist.destroy_process_group()


def on_ranks(size: int, folder: Path, *, stop: int | None = None, **manner: Any) -> dict[str, Any]:
    """Train a run that was made on several ranks; return its result, {} if it was stopped."""
    wanted = 0 if stop is None else -signal.SIGKILL
    codes = codes_of([stop] * size, folder, Manner(**manner))
    assert codes == [wanted] * size
    return {} if stop is not None else result_of(folder)


def codes_of(stops: list[int | None], folder: Path, manner: Manner) -> list[int | None]:
    """Train on as many ranks as there are steps to stop them before; return their exit codes."""
    meeting = folder.with_name(f"{folder.name}.meeting-{time.monotonic_ns()}")
    size = len(stops)
    ranks = [
        start(rank_of, rank, size, folder, manner, stop, meeting) for rank, stop in enumerate(stops)
    ]
    return [finish(rank) for rank in ranks]
