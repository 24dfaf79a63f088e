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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Protocol

from telescope.dispatch.device import check_device
from telescope.errors import TrialError
from telescope.records import CurvePoint, Result, Status, Trial, TrialSource

RETRIES = 2
"""How often a failed trial is tried again before the failure is its answer."""
LOG_TAIL_LINES = 8
"""How many lines of a crash's traceback are kept in the result's reason."""
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
"""What numerical libraries read, once, to size their thread pools."""
LINE_LENGTH = 500
"""Characters of a line of a reason that are kept."""


class Trainer(Protocol):
    """Trains one trial to its end; picklable, and called many times in one warm process."""

    def __call__(self, trial: Trial, /) -> Result:
        """Return a complete or diverged result; raise when the machine or the code is at fault."""
        ...


@dataclass(frozen=True)
class Pack:
    """What a worker has done with the trials it was handed."""

    trained: tuple[Trial, ...]
    """Those that have ended."""
    released: tuple[Trial, ...] = ()
    """Those that have not, for whoever is free."""
    alone: tuple[Trial, ...] = ()
    """Those of the released that failed as a pack: each has to be trained alone."""
    most: int | None = None
    """How many of this width it can train as one, where something is known to limit it."""
    until: int | None = None
    """From how many trials on `most` is to be found out anew; None: never."""
    why: str = ""
    """What limits it, or why a pack failed; "" if nothing did."""
    members: tuple[Trial, ...] = ()
    """Those that were begun, as one if several; they end or are released."""
    worker: str = ""
    """Whose work it is, and whose limit: ``host:pid``."""

    @property
    def handed(self) -> tuple[Trial, ...]:
        """All that the worker was handed."""
        return (*self.trained, *self.released)


class Queue:
    """Hands out a source's trials, each to one worker at a time, and retries what fails.

    Args:
        source: asked for trials, told of results.
        retries: how often a failed trial is tried again.
        on_start: called whenever a worker takes a trial.
        on_hand_out: called with the trials of a worker that takes several, to train them as one as
            far as they go together.
        pack: how many trials of one width a worker may take at once; None: as many as there are.
        workers: among whom a stage's trials are shared out evenly, if they are taken in packs.
    """

    def __init__(
        self,
        source: TrialSource,
        *,
        retries: int = RETRIES,
        on_start: Callable[[Trial], None] | None = None,
        on_hand_out: Callable[[Sequence[Trial]], None] | None = None,
        pack: int | None = 1,
        workers: int = 1,
    ) -> None:
        """Nothing has been handed out yet."""
        self._source = source
        self._retries = retries
        self._on_start = on_start
        self._on_hand_out = on_hand_out
        self._pack = pack
        self._workers = workers
        self._limits: dict[int, dict[str, Pack]] = {}  # width → worker → its last word
        self._alone: set[Trial] = set()
        self._in_flight: set[Trial] = set()
        self._failures: Counter[Trial] = Counter()

    def take(self) -> Trial | None:
        """The next trial to run, or None when all that is asked for now is in flight."""
        return next(iter(self._take(1)), None)

    def take_pack(self) -> list[Trial]:
        """The next trials of one width for one worker; none when all is in flight.

        As many as the worker's share of what is asked for now. A trial that has failed is alone:
        what killed a worker may have been any of its pack.
        """
        asked = self._source.ask()
        share = math.ceil(len(asked) / self._workers) if asked else 1
        taken = self._take(share if self._pack is None else min(share, self._pack))
        if len(taken) > 1 and self._on_hand_out:
            self._on_hand_out(taken)
        return taken

    def _take(self, most: int) -> list[Trial]:
        taken: list[Trial] = []
        for trial in self._source.ask():
            is_alone = trial in self._alone or trial in self._failures
            if trial in self._in_flight or (taken and (is_alone or trial.width != taken[0].width)):
                continue
            if len(taken) == self._limit(trial.width, most):
                break
            taken.append(trial)
            if is_alone:
                break
        for trial in taken:
            self._in_flight.add(trial)
            if self._on_start:
                self._on_start(trial)
        return taken

    def _limit(self, width: int, most: int) -> int:
        """How many of `most` trials a worker may be handed: what the ablest can train as one.

        Each worker sees its own device and its own memory, so one's limit is none of the others'.
        """
        words = self._limits.get(width, {}).values()
        if len(words) < self._workers:
            return most
        limits = [
            most if w.most is None or (w.until is not None and most >= w.until) else w.most
            for w in words
        ]
        return min(most, max(limits))

    def settle(self, pack: Pack) -> None:
        """Take back what a worker has not trained, which is no failure of theirs, and learn."""
        self._in_flight.difference_update(pack.released)
        self._alone.update(pack.alone)
        self._limits.setdefault(pack.handed[0].width, {})[pack.worker] = pack

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
    """Train one trial; a crash becomes a failed result with its reason, not an exception.

    The one broad `except` of the program: whatever a model file or a library throws is the
    trial's failure, and must not take the sweep with it. KeyboardInterrupt passes.

    Args:
        trainer: what trains it; what it returns is checked, for it is other people's code.
        trial: the trial.
        timeout: seconds after which the trial counts as hung; 0: never. Interrupts Python code in
            the main thread alone: a call that never comes back from C needs its process ended.

    Raises:
        LostError: this process can no longer use its device: whatever it trains next would fail.
    """
    start = time.perf_counter()
    try:
        with time_limit(timeout):
            result = checked(trainer(trial), [trial])
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        check_device(error)
        tail = traceback.format_exc().strip().splitlines()[-LOG_TAIL_LINES:]
        result = Result(
            trial,
            Status.FAILED,
            reason=clean([message(error), *tail]),
            seconds=time.perf_counter() - start,
        )
    return named_worker(result)


def named_worker(result: Result) -> Result:
    """A result that says which process it comes from."""
    return replace(result, worker=this_worker())


def this_worker() -> str:
    """The name of this process, ``host:pid``."""
    return f"{socket.gethostname()}:{os.getpid()}"


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
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


def checked(result: object, trials: Sequence[Trial]) -> Result:
    """A trainer's result as plain data; the types of what others return are not to be trusted.

    Args:
        result: what it returned.
        trials: those that a result is expected of.

    Raises:
        TrialError: it is no result, another trial's, or holds what cannot be stored.
    """
    if not isinstance(result, Result):
        raise TrialError(f"the trainer returned {type(result).__name__}, must be a Result")
    if result.trial not in trials:
        given = " ".join(map(str, trials))
        raise TrialError(f"the trainer returned a result of {result.trial}, was given {given}")
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


def message(error: BaseException) -> str:
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
