"""A tracker's process: takes messages from the driver, and reads the rows of running trials itself.

    python -m telescope.log TRACKER RESULTS_FOLDER SWEEP

Messages come on stdin, one JSON line each. On stdout it says that it is ready, that it has
delivered or skipped an end, or what troubles it. It outlives a killed driver for a moment.
"""

from __future__ import annotations

import faulthandler
import json
import os
import queue
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from telescope.files import lock_file
from telescope.log.ledger import Ledger
from telescope.log.records import CLOSING, Ended, Row, Run, Started, from_line
from telescope.log.rows import Follower, read_curve, rising
from telescope.log.tracker import Tracker, make_tracker

LOOK_SECONDS = 1.0
"""Pause between two looks at the rows of running trials."""
LINGER_SECONDS = 20.0
"""Time limit for what is left to do after a driver was killed; one that waits sets its own."""
RETRY_SECONDS = 60.0
"""Pause before another attempt to connect, or to deliver what has failed."""
SECRET = re.compile(
    r"(//[^\s:/@]*):[^\s@]*@|([?&][^\s=&]*(?:key|pass|token)[^\s=&]*=)[^\s&'\"]+", re.IGNORECASE
)
"""A password before a host, or a secret of a query, which a server's address may have."""
NICENESS = 5
"""Priority below that of trials on the same machine."""


def without_secrets(text: str) -> str:
    """Return a library's words without the secrets of the addresses in them."""
    return SECRET.sub(lambda found: f"{found[1]}@" if found[1] else f"{found[2]}…", text)


class Service:
    """One tracker, and the runs that it has open."""

    def __init__(self, connect: Callable[[], tuple[Tracker, Ledger]], say: IO[str]) -> None:
        """Begin with no run open, and unconnected.

        Args:
            connect: makes the tracker, and opens the ledger of its destination.
            say: where to report.
        """
        self._connect, self._say = connect, say
        self._connection: tuple[Tracker, Ledger] | None = None
        self._refused: Exception | None = None  # the error of the last attempt to connect
        self._refused_at = 0.0
        self._following: dict[str, tuple[Run, Follower]] = {}
        self._open: set[str] = set()
        self._undelivered: dict[str, Ended] = {}
        self._tried_at = 0.0
        self._troubles: set[str] = set()

    @property
    def _tracker(self) -> Tracker:
        return self._connected()[0]

    @property
    def _ledger(self) -> Ledger:
        return self._connected()[1]

    def _connected(self) -> tuple[Tracker, Ledger]:
        """Return tracker and ledger; connect if needed, but not again right after a failure."""
        if self._connection is None:
            if self._refused and time.monotonic() - self._refused_at < RETRY_SECONDS:
                raise self._refused
            try:
                self._connection = self._connect()
            except Exception as error:
                self._refused, self._refused_at = error, time.monotonic()
                raise
        return self._connection

    def serve(self, messages: queue.SimpleQueue[bytes | None]) -> None:
        """Carry out messages and follow running trials, until None comes."""
        self._try(self._connected)
        self._tell({"ready": True})
        looked = time.monotonic()
        while True:
            try:
                wait = looked + LOOK_SECONDS - time.monotonic()
                line = messages.get(timeout=max(wait, 0.0))
            except queue.Empty:
                pass
            else:
                if line is None:
                    break
                self._carry_out(line)
            if time.monotonic() - looked >= LOOK_SECONDS:
                self._look()
                looked = time.monotonic()
        self._refused = None
        self._look(is_last=True)
        for run, _ in list(self._following.values()):
            if run.id in self._open:
                self._try(self._tracker.leave, run)
        self._tell({"over": True})

    def _carry_out(self, line: bytes) -> None:
        message = from_line(line)
        if isinstance(message, Started):
            run = message.run
            if run.id not in self._following:
                self._following[run.id] = run, Follower(message.follow)
            self._try(self._start, run)
        else:
            self._following.pop(message.run.id, None)
            self._deliver(message)

    def _deliver(self, message: Ended) -> None:
        is_delivered = self._try(self._finish, message)
        self._undelivered.pop(message.run.id, None)
        if not is_delivered:
            self._undelivered[message.run.id] = message
        self._tell({"ended": message.run.id, "delivered": is_delivered})

    def _start(self, run: Run) -> None:
        """Open a run, unless it is open."""
        if run.id in self._open:
            return
        if self._ledger.knows(run.id) and not self._tracker.holds(run):
            self._ledger.forget(run.id)
        self._tracker.open(run, self._ledger.step(run.id))
        self._open.add(run.id)

    def _finish(self, message: Ended) -> None:
        """Deliver an end and the rows that lead to it, unless that has been done."""
        run, end, ledger = message.run, message.end, self._ledger
        if ledger.end(run.id) == end.digest and self._tracker.holds(run):
            return
        self._start(run)
        rows = read_curve(Path(end.curve)) if end.curve else list(end.rows)
        self._add(run, rising(rows, ledger.step(run.id)))
        step = max((row.step for row in rows), default=ledger.step(run.id))
        self._open.discard(run.id)
        self._tracker.end(run, end, step)
        ledger.note(run.id, step, end.digest)

    def _look(self, *, is_last: bool = False) -> None:
        """Deliver the new rows of running trials, and now and then what could not be delivered."""
        for run, follower in list(self._following.values()):
            self._try(self._follow, run, follower)
        if is_last or time.monotonic() - self._tried_at > RETRY_SECONDS:
            self._tried_at = time.monotonic()
            for message in list(self._undelivered.values()):
                self._deliver(message)

    def _follow(self, run: Run, follower: Follower) -> None:
        if rows := follower.look(self._ledger.step(run.id)):
            self._start(run)
            self._add(run, rows)

    def _add(self, run: Run, rows: list[Row]) -> None:
        if rows:
            self._tracker.add(run, rows)
            self._ledger.note(run.id, rows[-1].step)

    def _try(self, do: Callable[..., object], *given: object) -> bool:
        """Do something with the tracker; report the error and return False if it raises."""
        try:
            do(*given)
            return True
        except Exception as error:
            self._report(error)
            return False

    def _report(self, error: Exception) -> None:
        """Report an error, each kind once, and write its traceback to the log."""
        text = f"{type(error).__name__}: {without_secrets(' '.join(str(error).split()))[:300]}"
        if text[:60] not in self._troubles:
            self._troubles.add(text[:60])
            print(without_secrets("".join(traceback.format_exception(error))), file=sys.stderr)
            self._tell({"trouble": text})

    def _tell(self, said: dict[str, Any]) -> None:
        with suppress(OSError):  # the driver has ended
            print(json.dumps(said), file=self._say, flush=True)


def _read(stdin: IO[bytes], messages: queue.SimpleQueue[bytes | None]) -> None:
    """Pass messages on until the driver closes or ends; after its end there is little time."""
    for line in stdin:
        messages.put(None if line == CLOSING else line)
    faulthandler.dump_traceback_later(LINGER_SECONDS, exit=True)
    messages.put(None)


def main() -> None:
    """Serve one tracker until the driver closes, or has gone."""
    name, folder, sweep = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the driver says when to end
        signal.signal(number, signal.SIG_IGN)
    os.nice(NICENESS)
    stdin = os.fdopen(os.dup(0), "rb")
    say = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # no library may ask, or take our messages
    os.dup2(2, 1)
    messages: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(stdin, messages), daemon=True).start()
    with (folder / f"{name}.lock").open("w") as lock:
        lock_file(lock, tries=int(LINGER_SECONDS / 0.02))  # an earlier driver's process may linger

        def connect() -> tuple[Tracker, Ledger]:
            tracker = make_tracker(name, folder.parent, sweep)
            return tracker, Ledger(folder, name, tracker.destination)

        Service(connect, say).serve(messages)


if __name__ == "__main__":
    main()
