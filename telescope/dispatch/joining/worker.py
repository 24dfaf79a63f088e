"""A worker that joins: it takes orders from the board, and keeps a second process that trains.

The first process is light and has one thread. It shows its beat while the other one trains, even
if that hangs in C. If that exits or is killed, the order has failed, and a new process trains the
next one. On SIGTERM or Ctrl-C the first one ends the training at once and gives the order back.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from telescope.dispatch.joining.board import (
    BEATS,
    LONGEST_LOOK,
    Taken,
    Watch,
    WorkerBoard,
    order_from_text,
    outcome_as_text,
)
from telescope.dispatch.packing import Packer
from telescope.dispatch.packs import Done, Limit
from telescope.dispatch.process import end_lost, log_tail, logged
from telescope.dispatch.queue import Order, clean, message
from telescope.errors import LostError, StoreError, TelescopeError
from telescope.records import Status

FIRST_PAUSE, LONGEST_PAUSE = 0.05, 2.0
"""Seconds between two looks at an empty board: the first, and after a while."""
LONGEST_HEARING = 1.0
"""Seconds between two looks at the process that trains."""
SIGNAL_GRACE = 0.5
"""Seconds for which a failure waits for a signal: a batch system sends SIGTERM to all processes of
a job, and what it ends is given back, not failed."""
START_TRIES = 3
"""Tries to start the process that trains, which may be killed for its memory as it begins."""
END_SECONDS = 0.5
"""Seconds for an idle process to end by itself, before it is killed."""
START_METHOD = "spawn"
"""multiprocessing's; the process that trains must not inherit the database's connection."""
Prepare = Callable[[], Packer]
"""Makes what trains, in the process that trains; picklable."""


class Trainee:
    """The process that trains.

    Args:
        prepare: makes what trains.
        logs: folder for each trial's output as ``TRIAL.log``.
    """

    def __init__(self, prepare: Prepare, logs: Path) -> None:
        """Start no process yet."""
        self._prepare, self._logs = prepare, logs
        self._context: Any = multiprocessing.get_context(START_METHOD)
        self._process: Any = None
        self._connection: Connection | None = None

    def start(self, beat: Callable[[], None], every: float) -> None:
        """Start the process, if there is none, and wait until it can train.

        Raises:
            TelescopeError: it cannot, on this machine; or it died in trying.
        """
        if self._process is not None and self._process.is_alive():
            return
        for _ in range(START_TRIES):
            said = self._begin(beat, every)
            if isinstance(said, TelescopeError):
                raise said
            if said is not None:
                return
        code = self._process.exitcode
        raise LostError(
            f"the process that trains has ended {START_TRIES} times before its first trial "
            f"({_end(code)})"
        )

    def _begin(self, beat: Callable[[], None], every: float) -> Any:
        """Start the process; return its first word, or None if it has died."""
        ours, theirs = self._context.Pipe()
        self._process = self._context.Process(
            target=_train_orders, args=(theirs, self._prepare, str(self._logs)), daemon=False
        )
        self._process.start()
        theirs.close()
        self._connection = ours
        return self._hear(beat, every)

    def carry_out(self, order: Order, beat: Callable[[], None], every: float) -> Done | Limit | str:
        """Have an order carried out; show the beat meanwhile.

        Returns:
            Its outcome, or the reason of the process's death.
        """
        self.start(beat, every)
        assert self._connection is not None
        with suppress(OSError):  # it has just died; it is heard below
            self._connection.send(order)
        said = self._hear(beat, every)
        if isinstance(said, (Done, Limit)):
            return said
        reason = f"the process that trained it ended ({_end(self._process.exitcode)})"
        return clean([reason, *log_tail(self._logs, order.trials[0])])

    def _hear(self, beat: Callable[[], None], every: float) -> Any:
        """Wait for the process's next word; None if it has died."""
        assert self._connection is not None
        # A process that the trial has started may outlive it and hold the connection open.
        while not self._connection.poll(min(every, LONGEST_HEARING)) and self._process.is_alive():
            beat()
        try:
            if self._connection.poll():
                return self._connection.recv()
        except (EOFError, OSError):
            pass
        self.end()
        return None

    def end(self, *, at_once: bool = False) -> None:
        """End the process, if there is one; one that is in mid-trial does not end by itself."""
        if self._process is None:
            return
        if self._connection is not None:
            self._connection.close()
        if not at_once:
            self._process.join(END_SECONDS)
        self._process.kill()
        self._process.join()


def _end(code: int | None) -> str:
    """Describe the end of a process.

    >>> _end(3), _end(-9)
    ('exit code 3', 'killed by signal 9, SIGKILL')
    """
    if code is None or code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by signal {-code}, {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


def _train_orders(connection: Connection, prepare: Prepare, logs: str) -> None:
    """Carry out the orders that come, in a process of its own, until its parent ends."""
    for number in (signal.SIGTERM, signal.SIGINT):  # the parent's to act on
        signal.signal(number, lambda *_: None)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        packer = prepare()
    except TelescopeError as error:
        connection.send(error)
        return
    except Exception as error:
        connection.send(LostError(f"cannot prepare the training: {message(error)}"))
        return
    connection.send("ready")
    while True:
        try:
            order: Order = connection.recv()
        except EOFError:
            return
        with logged(Path(logs), order.trials[0]):
            try:
                outcome = packer(order)
            except LostError as error:
                end_lost(error)
        connection.send(outcome)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


class Joined:
    """A worker's place in a sweep.

    Args:
        name: the sweep's.
        board: its board.
        trainee: trains.
        lease: seconds without a beat after which the order is given to another worker.
        patience: seconds to wait for a driver that is away.
        note: shows a line.
        show: shows an outcome that was delivered.
    """

    def __init__(
        self,
        name: str,
        board: WorkerBoard,
        trainee: Trainee,
        *,
        lease: float,
        patience: float,
        note: Callable[[str], None] = lambda line: None,
        show: Callable[[Done], None] = lambda done: None,
    ) -> None:
        """Join nothing yet."""
        self._name, self._board, self._trainee = name, board, trainee
        self._lease, self._patience, self._note, self._show = lease, patience, note, show
        self._every = lease / BEATS
        self._beaten = -float("inf")
        self._watch = Watch(lease * LONGEST_LOOK)
        self._is_training = False
        self.trained = 0

    def work(self) -> None:
        """Carry out orders until the sweep ends.

        Raises:
            LostError: the driver stayed away too long, or the training process cannot start.
            StoreError: the database did.
            TelescopeError: the sweep cannot be trained on this machine.
            KeyboardInterrupt: as it came; the order has been given back.
        """
        try:
            self._trainee.start(self._beat, self._every)  # whatever is wrong is said before a trial
            pause = FIRST_PAUSE
            while not self._is_ended():
                self._beat()
                if taken := self._board.take():
                    self._carry_out(taken)
                    pause = FIRST_PAUSE
                    continue
                time.sleep(pause)
                pause = min(pause * 1.5, LONGEST_PAUSE, self._every)
        finally:
            self._leave()

    def _beat(self) -> None:
        """Show that this worker is alive, if it is time; a lost database does not stop training."""
        now = time.monotonic()
        if now - self._beaten >= self._every / 2:
            with suppress(StoreError):
                self._board.beat()
            self._beaten = now

    def _is_ended(self) -> bool:
        """Tell whether the sweep has ended."""
        sweep = self._board.sweep()
        if sweep is None or sweep.state == "ended":
            return True
        self._watch.look({"driver": sweep.beat})
        silent = self._watch.silent("driver")
        patience = self._patience + (0 if sweep.state == "away" else self._lease)
        if silent > patience:
            raise LostError(
                f"{self._name}: no driver for {silent:.0f} s; start `telescope run` again with the "
                "same options, and this worker"
            )
        return False

    def _carry_out(self, taken: Taken) -> None:
        """Carry out an order and deliver its outcome."""
        order = order_from_text(taken.order)
        self._is_training = True
        outcome = self._trainee.carry_out(order, self._beat, self._every)
        self._is_training = False
        has_failed = isinstance(outcome, str) or (
            isinstance(outcome, Done)
            and (outcome.released or any(r.status is Status.FAILED for r in outcome.results))
        )
        if has_failed:
            time.sleep(SIGNAL_GRACE)
        accepted = self._board.deliver(taken, outcome_as_text(outcome), only_mine=bool(has_failed))
        if not accepted:
            self._note("not counted: after a pause here, the trial was given to another worker")
        elif isinstance(outcome, Done):
            self.trained += len(outcome.results)
            self._show(outcome)
        elif isinstance(outcome, str):
            self._note(outcome.partition("\n")[0])

    def _leave(self) -> None:
        """End the training, and give back what is not delivered; a second signal is ignored."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        self._trainee.end(at_once=self._is_training)
        with suppress(StoreError):  # a lost database: the lease lapses instead
            self._board.leave()
