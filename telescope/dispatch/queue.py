"""The queue of trials: it decides a free worker's next order, and which failures are retried.

All dispatchers use the same `Queue`, so they retry alike.
"""

from __future__ import annotations

import math
import os
import re
import signal
import socket
import threading
import traceback
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

from telescope.dispatch.device import check_device
from telescope.dispatch.packs import Done, Limit, Packs
from telescope.errors import TrialError
from telescope.losses import as_number
from telescope.records import CurvePoint, Result, Status, Trial, TrialSource

RETRIES = 2
"""Number of retries of a failed trial before the failure is its result."""
FIRST_FAILURES = 3
"""Number of trials of a width that must fail alike, while none ends otherwise, to stop retries. One
failure may be a full disk, two the same machine. With more workers, it is the number of workers:
then each has had a trial, and one bad machine is not taken for a bad trainer. Assumption."""
ALIKE_LENGTH = 60
"""Characters of a reason that are compared, without numbers; the rest is specific to the trial."""
LOG_TAIL_LINES = 8
"""Lines of a crash's traceback that are kept in the result's reason."""
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
"""Variables that numerical libraries read, once, for the size of their thread pools."""
LINE_LENGTH = 500
"""Most characters of a line of a reason."""


class Trainer(Protocol):
    """Trains one trial to its end; picklable, and called many times in one warm process."""

    def __call__(self, trial: Trial, /) -> Result:
        """Return a complete or diverged result; raise when the machine or the code is at fault."""
        ...


@dataclass(frozen=True)
class Order:
    """The next task of a free worker."""

    trials: tuple[Trial, ...]
    """Trials of one width, to be trained as one."""
    look: bool = False
    """True to only probe how many such trials can train as one."""


class Queue:
    """Hands out a source's trials, each to one worker at a time, and retries what fails.

    Args:
        source: gives trials and takes results; until it is due, nothing is handed out.
        retries: number of retries of a failed trial.
        packs: the division of trials into packs.
        workers: number of workers among which trials that are asked for together are divided.
        widths: the widths whose trials are handed out; by default all.
    """

    def __init__(
        self,
        source: TrialSource,
        *,
        retries: int = RETRIES,
        packs: Packs | None = None,
        workers: int = 1,
        widths: Collection[int] = (),
    ) -> None:
        """Begin with nothing handed out."""
        self._source = source
        self._is_begun = False
        self._retries = retries
        self._widths = widths
        self._packs = packs or Packs()
        self._workers = workers
        self._in_flight: set[Trial] = set()
        self._looked_at: set[int] = set()  # widths that a worker is probing
        self._failures: Counter[Trial] = Counter()
        self._works: set[int] = set()  # widths of which a trial has ended without a failure
        self._to_retry: dict[Trial, Result] = {}  # failed in their trainer, not with their worker
        self._alike: dict[int, dict[Trial, str]] = {}  # width → trial → kind of its failure

    def take(self) -> Order | None:
        """Return the next order for one worker; None if every trial asked for is in flight."""
        if order := self.offer():
            self.start(order)
        return order

    def offer(self, *, retries: bool = True) -> Order | None:
        """Return the next order for a worker that is yet to take it, which `start` notes.

        Args:
            retries: offer trials that have failed before, too.
        """
        free = self._free(self._begin().ask()) if self.is_due else []
        for trial in free:
            if trial in self._failures and not retries:
                continue
            if order := self._order(trial, free):
                self.adopt(order)
                return order
        return None

    def start(self, order: Order) -> None:
        """Tell the source that a worker has taken an order."""
        for trial in order.trials if not order.look else ():
            self._source.on_start(trial)

    def give_back(self, order: Order) -> None:
        """Tell the source that a worker has returned an order, which stays on offer."""
        if not order.look:
            self._source.on_release(order.trials)

    def adopt(self, order: Order) -> None:
        """Take an order for handed out, as one that a worker has from an earlier driver."""
        if order.look:
            self._looked_at.add(order.trials[0].width)
        else:
            self._in_flight.update(order.trials)

    def asks_for(self, trial: Trial) -> bool:
        """Tell whether a trial's result is still wanted."""
        return trial in self._begin().ask()

    def resize(self, workers: int) -> None:
        """Take another number of workers among which trials are divided from now on."""
        self._workers = workers

    def _free(self, asked: Sequence[Trial]) -> list[Trial]:
        """Return the trials of this queue that no worker has; failed ones come last."""
        free = [trial for trial in asked if self._is_ours(trial) and trial not in self._in_flight]
        return sorted(free, key=self._failures.__getitem__)

    def _is_ours(self, trial: Trial) -> bool:
        return not self._widths or trial.width in self._widths

    def _is_alone(self, trial: Trial) -> bool:
        """Tell whether a trial must run alone: after a failure, any of its pack may be at fault."""
        return trial in self._failures or self._packs.is_alone(trial)

    def _order(self, trial: Trial, free: Sequence[Trial]) -> Order | None:
        """Return the order for one of the free trials; None while its width is being probed."""
        if self._is_alone(trial):
            return Order((trial,))
        free = [t for t in free if t.width == trial.width and t not in self._failures]
        if pack := self._packs.find(trial, free):
            return Order(pack)
        if trial.width in self._looked_at:
            return None
        new, number = self._packs.to_form(free, self._workers)
        if not self._packs.knows(trial.width, number):
            return Order(tuple(new[:number]), look=True)
        self._packs.form(new, number)
        return Order(self._packs.find(trial, free))

    def settle(self, order: Order, done: Done | Limit) -> None:
        """Take a worker's results, told all at once, or the finding of its probe."""
        if isinstance(done, Limit):
            self._looked_at.discard(order.trials[0].width)
            self._packs.found(order.trials[0].width, done)
            return
        if done.results:
            self.answer(*done.results)
        self._in_flight.difference_update(done.released)
        if done.released:
            self._source.on_release(done.released)
        self._packs.ended(done)

    def lose(self, order: Order, reason: str) -> None:
        """Take the loss of a worker: its trials have failed; a probe is not repeated."""
        why = reason.partition("\n")[0]
        if order.look:
            self.settle(order, Limit(1, f"a worker was lost in trying: {why}"))
            return
        self._packs.ended(Done(order.trials, (), why=why))
        failed = (Result(trial, Status.FAILED, reason=reason) for trial in order.trials)
        self.answer(*failed, is_lost=True)

    def answer(self, *results: Result, is_lost: bool = False) -> None:
        """Take results: pass final ones to the source together, and retry the other trials.

        Args:
            results: results of trials that were handed out.
            is_lost: their worker was lost, which says nothing about their trainer.
        """
        final = []
        for result in results:
            trial = result.trial
            self._in_flight.discard(trial)
            self._to_retry.pop(trial, None)
            if result.status is not Status.FAILED:
                self._works.add(trial.width)
                final.append(result)
                continue
            self._failures[trial] += 1
            times = self._failures[trial]
            if times > self._retries:
                final.append(replace(result, reason=f"failed {times} times; last: {result.reason}"))
            elif not is_lost:
                self._to_retry[trial] = result
                self._alike.setdefault(trial.width, {})[trial] = _kind(result.reason)
        for width in {result.trial.width for result in results}:
            final += self._hopeless(width)
        if final:
            self._source.tell(*final)

    def _hopeless(self, width: int) -> list[Result]:
        """Return the failures that are not worth a retry, because all first trials failed alike.

        So a trainer that cannot work is recognised after a few trials, trained once each. The
        source decides on the consequences.
        """
        failed = self._alike.get(width, {})
        asked = sum(trial.width == width for trial in self._source.ask())
        enough = max(FIRST_FAILURES, min(self._workers, asked))
        if width in self._works or len(set(failed.values())) > 1 or len(failed) < enough:
            return []
        trials = [t for t in self._to_retry if t.width == width and t not in self._in_flight]
        why = f"failed as the first {len(failed)} trials of width {width} did, so tried once"
        results = [self._to_retry.pop(trial) for trial in trials]
        return [replace(result, reason=f"{why}: {result.reason}") for result in results]

    @property
    def is_due(self) -> bool:
        """True once the source can be asked."""
        return self._is_begun or self._source.is_due

    def _begin(self) -> TrialSource:
        """Return the source, which must be due; begin it if needed."""
        if not self._is_begun:
            self._source, self._is_begun = self._source.begun(), True
        return self._source

    @property
    def has_work(self) -> bool:
        """True if a free worker would get an order."""
        return any(
            self._is_alone(trial)
            or self._packs.is_formed(trial)
            or trial.width not in self._looked_at
            for trial in (self._free(self._begin().ask()) if self.is_due else ())
        )

    @property
    def is_done(self) -> bool:
        """True if nothing is in flight and the source asks for nothing more."""
        is_busy = self._in_flight or self._looked_at or not self.is_due
        return not is_busy and not any(map(self._is_ours, self._begin().ask()))


def _kind(reason: str) -> str:
    """Return the beginning of a failure's reason without numbers, equal for failures of one kind.

    >>> _kind("KeyError: 'lr=0.01'"), _kind("exit code 1\\nstep 3")
    ("KeyError: 'lr=#'", 'exit code #')
    """
    return re.sub(r"\d[\w.+-]*", "#", reason.partition("\n")[0])[:ALIKE_LENGTH]


class Hung(BaseException):
    """A trial has not ended in time. Not an `Exception`, so that no trainer catches it."""


def failure(trial: Trial, error: BaseException, *, seconds: float) -> Result:
    """Turn a crash into a failed result with its reason.

    Args:
        trial: the trial.
        error: its exception; call this inside the handler, for the traceback.
        seconds: the trial's duration.

    Raises:
        LostError: this process can no longer use its device; every further trial would fail.
    """
    check_device(error)
    tail = traceback.format_exc().strip().splitlines()[-LOG_TAIL_LINES:]
    reason = clean([message(error), *tail])
    return Result(trial, Status.FAILED, reason=reason, seconds=seconds)


def named_worker(result: Result) -> Result:
    """Add the name of this process to a result."""
    return replace(result, worker=this_worker())


def this_worker() -> str:
    """Return the name of this process, ``host:pid``."""
    return f"{socket.gethostname()}:{os.getpid()}"


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `Hung` in the code inside after some seconds; 0: never."""
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
    """Check a trainer's result and convert it to plain data, because its types may be wrong.

    Args:
        result: the trainer's return value.
        trials: the trials of which a result is expected.

    Raises:
        TrialError: it is not a result, is of another trial, or has values that cannot be stored.
    """
    if not isinstance(result, Result):
        raise TrialError(f"the trainer returned {type(result).__name__}, must be a Result")
    if result.trial not in trials:
        given = " ".join(map(str, trials))
        raise TrialError(f"the trainer returned a result of {result.trial}, was given {given}")
    numbers: dict[str, Any] = {}
    for name in ("loss", "flops", "seconds"):
        value = getattr(result, name)
        number = as_number(value)
        if (number is None or not math.isfinite(number)) and not (name == "loss" and value is None):
            kind = type(value).__name__
            raise TrialError(f"the trainer's result has {name} {value!r} ({kind}), must be a float")
        numbers[name] = number
    is_curve = isinstance(result.curve, tuple) and all(
        isinstance(row, CurvePoint) for row in result.curve
    )
    if not (is_curve and isinstance(result.reason, str) and isinstance(result.status, Status)):
        raise TrialError("the trainer's result has a curve, reason or status of another type")
    return replace(result, **numbers, reason=clean(result.reason.splitlines()))


def message(error: BaseException) -> str:
    """Return an exception's type and message on one line, even if it cannot be printed."""
    try:
        text = " ".join(str(error).split())
    except Exception:
        text = "its message cannot be printed"
    return f"{type(error).__name__}: {text or 'no message'}"


def clean(lines: list[str]) -> str:
    """Join lines to a text for any file and database: no surrogates, no NUL, no very long line."""
    texts = (line.encode(errors="backslashreplace").decode().replace("\0", "\\0") for line in lines)
    return "\n".join(
        text if len(text) <= LINE_LENGTH else f"{text[:LINE_LENGTH]} …" for text in texts
    )
