"""The target run of somebody else's trainer: its own command or function, with our bookkeeping."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

from telescope.answer.finished import Finished
from telescope.dispatch.packing import Packer
from telescope.dispatch.packs import Done
from telescope.dispatch.queue import Order
from telescope.errors import ResumeError, SpecError, TrialError
from telescope.foreign.command import CommandTrainer
from telescope.foreign.outcome import latest_row
from telescope.records import Result, Status, Trial
from telescope.spec.placeholders import names_in
from telescope.store.folder import Folder
from telescope.sweep.foreign import Foreign
from telescope.sweep.launch_asked import Launch, check_proven, run_folder
from telescope.sweep.versions import versions
from telescope.target.folder import RunFolder
from telescope.target.record import SCHEMA

OURS = {
    *("workers", "cpus_per_worker", "gpus_per_worker", "ray_address"),
    *("precision", "compile", "clip"),
}
"""Options of models that telescope trains itself."""
LOOK_SECONDS = 1.0
"""Pause between two looks at the trainer's output."""


@dataclass(frozen=True)
class ForeignRun:
    """A target run of another trainer."""

    foreign: Foreign
    trial: Trial
    steps: int | None
    groups: tuple[Mapping[str, Any], ...]

    @property
    def identity(self) -> dict[str, Any]:
        """Dotted key → value of all that telescope knows the loss to depend on."""
        point = {f"point.{axis}": value for axis, value in self.trial.point.items()}
        own = {"width": self.trial.width, "seed": self.trial.seed, **point, "steps": self.steps}
        plain: dict[str, Any] = json.loads(json.dumps({**own, **self.foreign.comparable}))
        return plain

    def as_dict(self) -> dict[str, Any]:
        """Return the content of `run.json`; without a `config`, which is the trainer's own."""
        identity = self.identity
        text = json.dumps(identity, sort_keys=True)
        return {
            "schema": SCHEMA,
            "sweep": self.foreign.spec.name,
            **self.trial.as_dict(),
            "steps": self.steps,
            "groups": list(self.groups),
            "versions": versions(),
            "identity": identity,
            "fingerprint": hashlib.sha256(text.encode()).hexdigest()[:16],
        }


def prepare(finished: Finished, asked: Launch) -> RunFolder:
    """Make the run's folder with its `run.json`, or check that it holds the same run.

    Raises:
        RefusedError: there is no answer, or it is not to be relied on.
        ResumeError: the folder holds another run.
        SpecError: an option is for models that telescope trains, or the trainer is not there.
    """
    _check_options(asked)
    run = _run(finished, asked)
    run.foreign.check_inputs(is_cluster=False)
    folder = run_folder(finished, asked)
    record = folder.read_run()
    if record is None:
        folder.write_run(run.as_dict())
        return folder
    before, now = record.get("identity", {}), run.identity
    differing = [
        f"{key}: {before.get(key)}, now {now.get(key)}"
        for key in dict.fromkeys((*before, *now))
        if before.get(key) != now.get(key)
    ]
    if differing:
        raise ResumeError(
            f"{folder.path}: holds another run: {'; '.join(differing)}; launch under another --run"
        )
    return folder


def launch(
    folder: RunFolder, finished: Finished, asked: Launch, show: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Run the trainer to its end; it goes on from checkpoints of its own, if it keeps any.

    Args:
        folder: from `prepare`.
        finished: the sweep.
        asked: the same as there.
        show: called with the latest row of its curve.

    Returns:
        The content of `result.json`.

    Raises:
        TrialError: it has failed; nothing is kept as its result.
        ResumeError: another process runs it.
    """
    run = _run(finished, asked)
    with folder.held(), _watched(folder, run, show):
        result = _train(folder, run)
    if result.status is Status.FAILED:
        raise TrialError(
            f"{folder.path}: the trainer failed: {' '.join(result.reason.split())}; the same "
            "command starts it again"
        )
    folder.write_curve(
        (row.step, None, row.train_loss, row.held_out_loss, None, None) for row in result.curve
    )
    end = _as_dict(run, result)
    folder.write_result(end)
    return end


def _run(finished: Finished, asked: Launch) -> ForeignRun:
    """Return the run with the sweep's answer at the target."""
    spec = finished.spec
    settings = finished.transfer(width=asked.width, steps=asked.steps)
    check_proven(finished, settings.certificate, asked)
    foreign = Foreign.of(spec)
    texts = [text for _, text in foreign.trainer.texts()]
    is_deaf = foreign.trainer.command and not any("steps" in names_in(text) for text in texts)
    if is_deaf and settings.steps != foreign.trainer.steps:
        raise SpecError(
            f"trainer.command: names no {{steps}}, so it cannot be told to train for "
            f"{settings.steps}; add it, or leave --steps and [target] steps out"
        )
    trial = Trial(settings.width, settings.point, asked.seed)
    return ForeignRun(foreign, trial, settings.steps, settings.groups or ())


def _train(folder: RunFolder, run: ForeignRun) -> Result:
    """Run the trainer once, as a trial of the sweep but for its folders, steps and time limit."""
    trainer: Any = run.foreign.make_trainer(Folder(folder.path))
    trainer = replace(trainer, place=replace(trainer.place, steps=run.steps))
    if isinstance(trainer, CommandTrainer):
        trainer = replace(trainer, timeout=0.0)
    done = Packer(lambda: trainer)(Order((run.trial,)))
    assert isinstance(done, Done)
    (result,) = done.results
    return result


def _as_dict(run: ForeignRun, result: Result) -> dict[str, Any]:
    """Return the content of `result.json`; what only the trainer knows is None."""
    unknown = ("tokens", "tokens_per_second", "mfu", "parameters", "precision", "peak_memory_bytes")
    is_diverged = result.status is Status.DIVERGED
    return {
        "schema": SCHEMA,
        "sweep": run.foreign.spec.name,
        **run.trial.as_dict(),
        "step": result.curve[-1].step if result.curve else run.steps,
        "steps": run.steps,
        "loss": result.loss,
        "train_loss": result.curve[-1].train_loss if result.curve else None,
        "diverged": is_diverged,
        "reason": result.reason if is_diverged else "",
        "seconds": result.seconds,
        "flops": result.flops,
        "device": "its own trainer",
        "ranks": None,
        **dict.fromkeys(unknown),
    }


def _check_options(asked: Launch) -> None:
    """Refuse options that another trainer would not see.

    Raises:
        SpecError: naming them.
    """
    plain = Launch()
    given = [f.name for f in fields(Launch) if getattr(asked, f.name) != getattr(plain, f.name)]
    ours = [f"--{name.replace('_', '-')}" for name in given if name in OURS]
    ours += [
        f"--{f.name.replace('_', '-')}"
        for f in fields(asked.manner)
        if getattr(asked.manner, f.name) != getattr(plain.manner, f.name)
    ]
    if ours:
        raise SpecError(
            f"{', '.join(ours)}: for models that telescope trains; this sweep has a trainer of its "
            "own, whose command says such things"
        )


@contextmanager
def _watched(
    folder: RunFolder, run: ForeignRun, show: Callable[[dict[str, Any]], None]
) -> Iterator[None]:
    """Write the progress that the trainer prints while the block runs."""
    log = Folder(folder.path).logs / f"{run.trial}.out"
    log.unlink(missing_ok=True)  # an earlier start's
    ended, began = threading.Event(), time.perf_counter()

    def watch() -> None:
        while not ended.wait(LOOK_SECONDS):
            row = latest_row(log)
            status: dict[str, Any] = {
                "step": row.step if row else 0,
                "steps": run.steps,
                "loss": row and (row.train_loss or row.held_out_loss),
                "seconds": time.perf_counter() - began,
            }
            folder.write_status(status)
            show(status)

    watcher = threading.Thread(target=watch, daemon=True, name="telescope-target-watch")
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
