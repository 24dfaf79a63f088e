"""Which trial a free worker gets next, and which failures are tried again.

Both dispatchers, inline and Ray, drive one `Queue`, so they retry alike.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from numbers import Real
from typing import Any, Protocol

from telescope.errors import TrialError
from telescope.records import CurvePoint, Result, Status, Trial, TrialSource

RETRIES = 2
"""How often a failed trial is tried again before the failure is its answer."""
LOG_TAIL_LINES = 8
"""How many lines of a crash's traceback are kept in the result's reason."""
LINE_LENGTH = 500
"""Characters of a line of a reason that are kept."""


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


class Hung(BaseException):
    """A trial that has not ended in time; no `Exception`, or a trainer's own handlers eat it."""


def attempt(trainer: Trainer, trial: Trial, *, timeout: float = 0.0) -> Result:
    """Train one trial; a crash becomes a failed result with its reason, never an exception.

    The one broad `except` of the program: whatever a model file or a library throws is the
    trial's failure, and must not take the sweep with it. KeyboardInterrupt passes.

    Args:
        trainer: what trains it; what it returns is checked, for it is other people's code.
        trial: the trial.
        timeout: seconds after which the trial counts as hung; 0: never. Interrupts Python code in
            the main thread alone: a call that never comes back from C needs its process ended.
    """
    start = time.perf_counter()
    try:
        with _time_limit(timeout):
            result = _checked(trainer(trial), trial)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        tail = traceback.format_exc().strip().splitlines()[-LOG_TAIL_LINES:]
        result = Result(
            trial,
            Status.FAILED,
            reason=clean([_message(error), *tail]),
            seconds=time.perf_counter() - start,
        )
    return replace(result, worker=f"{socket.gethostname()}:{os.getpid()}")


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise `Hung` in the code inside after so many seconds; 0: never."""
    if not seconds or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(*_: Any) -> None:
        raise Hung(f"no end after {seconds:g} s (the spec's timeout)")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _checked(result: object, trial: Trial) -> Result:
    """A trainer's result as plain data; the types of what others return are not to be trusted.

    Raises:
        TrialError: it is no result, another trial's, or holds what cannot be stored.
    """
    if not isinstance(result, Result):
        raise TrialError(f"the trainer returned {type(result).__name__}, must be a Result")
    if result.trial != trial:
        raise TrialError(f"the trainer returned a result of {result.trial}, was given {trial}")
    for name in ("loss", "flops", "seconds"):
        value = getattr(result, name)
        if not isinstance(value, Real) or not math.isfinite(value):
            if name == "loss" and value is None:
                continue
            kind = type(value).__name__
            raise TrialError(f"the trainer's result has {name} {value!r} ({kind}), must be a float")
    is_curve = isinstance(result.curve, tuple) and all(
        isinstance(row, CurvePoint) for row in result.curve
    )
    if not (is_curve and isinstance(result.reason, str) and isinstance(result.status, Status)):
        raise TrialError("the trainer's result has a curve, reason or status of another type")
    return replace(
        result,
        loss=None if result.loss is None else float(result.loss),
        flops=float(result.flops),
        seconds=float(result.seconds),
        reason=clean(result.reason.splitlines()),
    )


def _message(error: BaseException) -> str:
    """What an exception says on one line, even one that cannot be printed."""
    try:
        text = " ".join(str(error).split())
    except Exception:
        text = "its message cannot be printed"
    return f"{type(error).__name__}: {text or 'no message'}"


def clean(lines: list[str]) -> str:
    """Lines that any file and database takes: no surrogates, no zeros, none very long."""
    texts = (line.encode(errors="backslashreplace").decode().replace("\0", "\\0") for line in lines)
    return "\n".join(
        text if len(text) <= LINE_LENGTH else f"{text[:LINE_LENGTH]} …" for text in texts
    )
