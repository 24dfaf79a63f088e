"""Which trial a free worker gets next, and which failures are tried again.

Both dispatchers, inline and Ray, drive one `Queue`, so they retry alike.
"""

from __future__ import annotations

import os
import socket
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from telescope.records import Result, Status, Trial, TrialSource

RETRIES = 2
"""How often a failed trial is tried again before the failure is its answer."""
LOG_TAIL_LINES = 8
"""How many lines of a crash's traceback are kept in the result's reason."""


class Trainer(Protocol):
    """Trains one trial to its end; picklable, and called many times in one warm process."""

    def __call__(self, trial: Trial, /) -> Result:
        """Return a complete or diverged result; raise when the machine or the code is at fault."""
        ...


class Queue:
    """Hands out a source's trials, each to one worker at a time, and retries what fails."""

    def __init__(
        self,
        source: TrialSource,
        *,
        retries: int = RETRIES,
        on_start: Callable[[Trial], None] | None = None,
    ) -> None:
        """Serve `source`; call `on_start` whenever a worker takes a trial."""
        self._source = source
        self._retries = retries
        self._on_start = on_start
        self._in_flight: set[Trial] = set()
        self._failures: Counter[Trial] = Counter()

    def take(self) -> Trial | None:
        """The next trial to run, or None when all that is asked for now is in flight."""
        for trial in self._source.ask():
            if trial not in self._in_flight:
                self._in_flight.add(trial)
                if self._on_start:
                    self._on_start(trial)
                return trial
        return None

    def answer(self, result: Result) -> None:
        """Give back a trial: its result goes to the source, or it is tried again."""
        self._in_flight.discard(result.trial)
        if result.status is Status.FAILED:
            self._failures[result.trial] += 1
            if self._failures[result.trial] <= self._retries:
                return
            times = self._failures[result.trial]
            result = replace(result, reason=f"failed {times} times; last: {result.reason}")
        self._source.tell(result)

    @property
    def is_waiting(self) -> bool:
        """Whether a free worker has to wait: all that is asked for now is in flight."""
        return bool(self._in_flight) and self._in_flight.issuperset(self._source.ask())

    @property
    def is_done(self) -> bool:
        """Whether nothing is in flight and the source asks for nothing more."""
        return not self._in_flight and not self._source.ask()


def attempt(trainer: Trainer, trial: Trial) -> Result:
    """Train one trial; a crash becomes a failed result with its reason, never an exception.

    The one broad `except` of the program: whatever a model file or a library throws is the
    trial's failure, and must not take the sweep with it. KeyboardInterrupt passes.
    """
    start = time.perf_counter()
    try:
        result = trainer(trial)
    except (Exception, SystemExit) as error:
        tail = traceback.format_exc().strip().splitlines()[-LOG_TAIL_LINES:]
        message = " ".join(str(error).split()) or "no message"
        result = Result(
            trial,
            Status.FAILED,
            reason="\n".join([f"{type(error).__name__}: {message}", *tail]),
            seconds=time.perf_counter() - start,
        )
    return replace(result, worker=f"{socket.gethostname()}:{os.getpid()}")
