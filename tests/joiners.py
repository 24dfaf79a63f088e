"""Workers that join, for tests."""

from __future__ import annotations

import itertools
import signal
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import cloudpickle

from telescope.dispatch.joining import worker
from telescope.dispatch.joining.driver import run_joining
from telescope.dispatch.joining.worker import Joined, Trainee
from telescope.dispatch.packing import Packer
from telescope.dispatch.packs import Packs, PackSize
from telescope.dispatch.process import ended_if_hung
from telescope.dispatch.queue import Trainer, this_worker
from telescope.records import TrialSource
from telescope.store.board import Driver, Worker

LEASE = 3.0
"""Seconds; short, but longer than what a busy machine holds a process up for."""
_numbers = itertools.count()


def packer_of(trainer: bytes, timeout: float, pack: PackSize) -> Packer:
    return Packer(lambda: cloudpickle.loads(trainer), pack, timeout=timeout, guard=ended_if_hung)


def serve(url: str, sweep: str, logs: str, lease: float, trainer: Any) -> None:
    """One worker, from the announcement of its sweep to the sweep's end."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    worker.SIGNAL_GRACE, worker.START_METHOD = 0.05, "fork"
    with suppress(KeyboardInterrupt), closing(Worker(url, sweep, this_worker())) as board:
        while board.sweep() is None:
            time.sleep(0.02)
        trainee = Trainee(trainer, Path(logs))
        Joined(sweep, board, trainee, lease=lease, patience=60).work()


@contextmanager
def workers(number: int, context: Any, *arguments: Any) -> Iterator[list[BaseProcess]]:
    """Workers that serve until the end of the block."""
    started = [context.Process(target=serve, args=arguments) for _ in range(number)]
    for process in started:
        process.start()
    try:
        yield started
    finally:
        for process in started:
            if process.is_alive():
                process.terminate()
            process.join(10)
            assert process.exitcode is not None, "a worker does not end"


def run_on_workers(
    source: TrialSource,
    trainer: Trainer,
    *,
    folder: Path,
    context: Any,
    timeout: float = 0.0,
    packs: Packs | None = None,
) -> None:
    """Run a sweep on two workers, by an SQLite file."""
    url, name = f"sqlite:///{folder / 'board.db'}", f"sweep-{next(_numbers)}"
    packs = packs or Packs()
    prepare = partial(packer_of, cloudpickle.dumps(trainer), timeout, packs.size)
    with (
        closing(Driver(url, name)) as board,
        workers(2, context, url, name, str(folder), LEASE, prepare),
    ):
        run_joining(source, board, record="", packs=packs, workers=2, lease=LEASE)
