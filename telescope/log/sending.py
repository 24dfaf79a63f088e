"""The driver's side of a tracker: a bounded queue, a thread that empties it, and the process.

Nothing here makes the driver wait, except `close`, for a bounded time. The process has a session of
its own, so that neither Ctrl-C nor what a library does to signals passes between the two.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from telescope.dispatch.ray.session import MARK
from telescope.log.records import CLOSING, Ended, Started, as_line

FOLDER = "trackers"
"""Folder of logs and ledgers in a results folder."""
MOST_WAITING = 10_000
"""Messages that wait for a tracker's process; further ones are not delivered in this run."""
START_SECONDS = 60.0
"""Time limit for the process to import its library and to connect, counted from its start."""
SILENT_SECONDS = 10.0
"""Time that `close` waits for the next sign of a delivery."""
CLOSE_SECONDS = 60.0
"""Most time that `close` waits in all."""
LEAVE_SECONDS = 10.0
"""Most time that `close` waits when the sweep has been interrupted."""
END_SECONDS = 2.0
"""Time for a process that has delivered everything to end."""
NOT_INHERITED = (MARK, "WANDB_SERVICE")
"""Variables that would make the process part of our Ray, or of this process's own wandb."""


class Sender:
    """Sends messages to the process of one tracker."""

    def __init__(
        self,
        name: str,
        folder: Path,
        sweep: str,
        say: Callable[[str], None],
        backlog: Sequence[Started | Ended] = (),
    ) -> None:
        """Start the process, in a thread.

        Args:
            name: the tracker.
            folder: the results folder.
            sweep: the sweep's name.
            say: called with a line for people, at the first trouble and at the end.
            backlog: messages from before; those delivered already are skipped by the process.
        """
        self.name = name
        self._folder, self._sweep, self._say = folder, sweep, say
        self._log = folder / FOLDER / f"{name}.log"
        self._queue: queue.Queue[Started | Ended | None] = queue.Queue(MOST_WAITING)
        self._delivered: dict[str, bool] = {}  # run → True once its end has been delivered
        self._trouble = ""
        self._process: subprocess.Popen[bytes] | None = None
        self._closing = threading.Event()
        self._ready, self._over = threading.Event(), threading.Event()
        self._started = self._heard = time.monotonic()
        self._count(backlog)
        self._start(self._serve, backlog)

    def _start(self, target: Callable[..., None], *given: Any) -> None:
        name = f"telescope-log-{self.name}"
        threading.Thread(target=target, args=given, daemon=True, name=name).start()

    def _count(self, messages: Sequence[Started | Ended]) -> None:
        self._delivered |= {m.run.id: False for m in messages if isinstance(m, Ended)}

    def send(self, message: Started | Ended) -> None:
        """Put a message into the queue; where it is full, the message is not delivered."""
        self._count([message])
        with suppress(queue.Full):
            self._queue.put_nowait(message)

    def _serve(self, backlog: Sequence[Started | Ended]) -> None:
        """Start the process, and pass messages on until the driver closes."""
        try:
            self._process = process = self._begin()
        except OSError as error:
            self._lost(f"its process cannot be started: {error}")
            return
        assert process.stdin is not None
        self._start(self._listen, process)
        try:
            for message in backlog:
                process.stdin.write(as_line(message))
            process.stdin.flush()
            while (waiting := self._next()) is not None:
                process.stdin.write(as_line(waiting))
                process.stdin.flush()
            process.stdin.write(CLOSING)
            process.stdin.flush()
        except OSError:  # the process has ended, which `_listen` reports
            return

    def _next(self) -> Started | Ended | None:
        """Return the next message; None once the driver closes and no more is waiting."""
        while True:
            with suppress(queue.Empty):
                if message := self._queue.get(timeout=0.2):
                    return message
            if self._closing.is_set() and self._queue.empty():
                return None

    def _begin(self) -> subprocess.Popen[bytes]:
        """Start the process, with this package in its path however it is in ours."""
        self._log.parent.mkdir(parents=True, exist_ok=True)
        inherited = {k: v for k, v in os.environ.items() if k not in NOT_INHERITED}
        here = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
        command = [sys.executable, "-P", "-m", "telescope.log"]
        with self._log.open("wb") as log:
            return subprocess.Popen(
                [*command, self.name, str(self._log.parent.resolve()), self._sweep],
                env={**inherited, "PYTHONPATH": path},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )

    def _listen(self, process: subprocess.Popen[bytes]) -> None:
        """Take the process's reports until it ends."""
        assert process.stdout is not None
        with process.stdout as reports:
            for line in reports:
                self._heard = time.monotonic()
                said = json.loads(line)
                if "ended" in said:
                    self._delivered[said["ended"]] = said["delivered"]
                elif "trouble" in said:
                    self._warn(said["trouble"])
                elif "ready" in said:
                    self._ready.set()
                else:
                    self._over.set()
        code = process.wait()
        if not self._over.is_set():
            self._lost(f"its process has ended by itself with code {code}")

    def _lost(self, why: str) -> None:
        self._warn(why)
        self._over.set()

    def _warn(self, why: str) -> None:
        """Say the first trouble; the end names it again."""
        is_first, self._trouble = not self._trouble, self._trouble or why
        if is_first and not self._closing.is_set():
            self._say(f"{self.name}: {why}; trials go on without it (log: {self._log})")

    def close(self, *, is_interrupted: bool = False) -> None:
        """Wait for deliveries for a bounded time, and say what has not been delivered."""
        self._closing.set()
        began = self._heard = time.monotonic()
        limit = LEAVE_SECONDS if is_interrupted else CLOSE_SECONDS
        try:
            while not self._over.wait(0.05):
                now = time.monotonic()
                is_silent = now - self._heard > SILENT_SECONDS and (
                    self._ready.is_set() or now - self._started > START_SECONDS
                )
                if is_silent or now - began > limit:
                    self._trouble = self._trouble or "it does not answer"
                    break
        finally:
            self._end()
        left = sum(not is_delivered for is_delivered in self._delivered.values())
        if left:
            self._say(
                f"{self.name}: {left} of {len(self._delivered)} runs not delivered: "
                f"{self._trouble or 'no time'}; the same command delivers them (log: {self._log})"
            )

    def _end(self) -> None:
        """End the process and its children."""
        if (process := self._process) is None:
            return
        with suppress(subprocess.TimeoutExpired):
            process.wait(END_SECONDS if self._over.is_set() else 0)
        if process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        assert process.stdin is not None
        with suppress(OSError):  # what is left in its buffer has no reader
            process.stdin.close()
