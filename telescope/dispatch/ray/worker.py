"""What runs in Ray's processes: a worker that trains what it is handed."""

from __future__ import annotations

import faulthandler
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import ray
from ray import cloudpickle, tune

from telescope.dispatch.packing import Packer
from telescope.dispatch.packs import PackSize
from telescope.dispatch.queue import LOG_TAIL_LINES, THREAD_VARIABLES, Trainer
from telescope.errors import LostError
from telescope.records import Trial
from telescope.streams import spell_what_is_lacking

HANG_GRACE = 10.0
"""Seconds that a hung trial has to be interrupted in, before its process is ended."""
HANG_TITLE = "Timeout ("
"""How faulthandler heads the stacks of a process that it ends."""


class Worker(tune.Trainable):  # type: ignore[misc]
    """One worker process: runs the order in its config, and is reset for the next one."""

    def setup(
        self,
        config: dict[str, Any],
        *,
        trainer: bytes,
        gate: Any,
        timeout: float,
        logs: str,
        pack: PackSize,
        share: float,
        place: str | None,
    ) -> None:
        """Go where the driver is, and size the thread pools before the trainer brings in torch."""
        if place:
            os.chdir(place)
        self._pickled = trainer
        # Loaded when it is first needed: a trainer that cannot load is a trial's failure.
        self._packer = Packer(self._load, pack, timeout=timeout, share=share, guard=_ended_if_hung)
        self._gate = gate
        self._logs = Path(logs)
        cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 1)
        os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(max(1, int(cpus)))))
        spell_what_is_lacking()

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next order, which `config` has, in the same, warm process."""
        return True

    def step(self) -> dict[str, Any]:
        """Train what was ordered, or wait at the gate."""
        if order := self.config.get("order"):
            with _logged(self._logs, order.trials[0]):
                try:
                    return {"done": True, "work": self._packer(order)}
                except LostError as error:
                    _leave(error)
        self._packer.warm()
        ray.get(self._gate.wait_beyond.remote(self.config["turn"]))
        return {"done": True}

    def _load(self) -> Trainer:
        trainer: Trainer = cloudpickle.loads(self._pickled)
        return trainer


def _leave(error: LostError) -> NoReturn:
    """End this process, whose device is lost to it: the next one starts with it anew.

    At once, because to tidy up would call the device. The driver finds the reason in the log.
    """
    sys.stderr.write(f"{error}\n")
    sys.stderr.flush()
    os._exit(1)


@contextmanager
def _logged(folder: Path, trial: Trial) -> Iterator[None]:
    """Send what a trial prints to a file of its own, so that a killed one's last words are kept.

    On another machine than the driver's there is no such folder: Ray's own logs have it there.
    """
    if not folder.is_dir():
        yield
        return
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    with (folder / f"{trial}.log").open("wb") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in enumerate(kept, 1):
            os.dup2(copy, number)
            os.close(copy)


@contextmanager
def _ended_if_hung(timeout: float) -> Iterator[None]:
    """End this process if the code inside goes on long after its time limit: it hangs in C."""
    if not timeout:
        yield
        return
    faulthandler.dump_traceback_later(timeout + HANG_GRACE, exit=True, file=2)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def log_tail(folder: Path, trial: Trial) -> list[str]:
    """The last lines that a trial has printed; none where its log is on another machine."""
    try:
        text = (folder / f"{trial}.log").read_text(encoding="utf-8", errors="backslashreplace")
    except OSError:
        return []
    lines = text.strip().splitlines()
    threads = [number for number, line in enumerate(lines) if "most recent call first" in line]
    if threads and HANG_TITLE in text:  # the main thread comes last, its innermost call first
        title = next(line for line in lines if line.startswith(HANG_TITLE))
        return [title, *lines[threads[-1] :][:LOG_TAIL_LINES]]
    return lines[-LOG_TAIL_LINES:]
