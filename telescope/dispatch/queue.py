"""Which trial a free worker gets next, and which failures are tried again.

Both dispatchers, inline and Ray, drive one `Queue`, so they retry alike.
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
"""How often a failed trial is tried again before the failure is its answer."""
FIRST_FAILURES = 3
"""Trials of a width that must fail alike, while none ends otherwise, for no further try: one may
be a full disk, two the same machine. With more workers than that, as many trials as workers: then
each has had one, and a bad machine among them is not taken for a bad trainer. An assumption."""
ALIKE_LENGTH = 60
"""Characters of a reason that are compared, numbers aside: what follows is the trial's own."""
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
class Order:
    """What a free worker does next."""

    trials: tuple[Trial, ...]
    """Of one width, to be trained as one."""
    look: bool = False
    """Whether only to find out how many of such trials can be trained as one."""


class Queue:
    """Hands out a source's trials, each to one worker at a time, and retries what fails.

    Args:
        source: asked for trials, told of results; until it is due there is nothing to hand out, and
            nothing is done.
        retries: how often a failed trial is tried again.
        packs: which trials go together.
        workers: among whom the trials that are asked for together are shared out evenly.
        widths: whose trials are handed out; left out, all.
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
        """Nothing has been handed out yet."""
        self._source = source
        self._is_begun = False
        self._retries = retries
        self._widths = widths
        self._packs = packs or Packs()
        self._workers = workers
        self._in_flight: set[Trial] = set()
        self._looked_at: set[int] = set()  # widths that a worker is looking at
        self._failures: Counter[Trial] = Counter()
        self._works: set[int] = set()  # widths of which a trial has ended without a failure
        self._to_retry: dict[Trial, Result] = {}  # failed by their trainer, not by a lost worker
        self._alike: dict[int, dict[Trial, str]] = {}  # width → trial → how it failed

    def take(self) -> Order | None:
        """The next order for one worker, or None when all that is asked for now is in flight."""
        free = self._free(self._begin().ask()) if self.is_due else []
        for trial in free:
            if order := self._order(trial, free):
                if order.look:
                    self._looked_at.add(trial.width)
                else:
                    self._hand_out(order.trials)
                return order
        return None

    def _free(self, asked: Sequence[Trial]) -> list[Trial]:
        """Those that are asked for here and that nobody has; those that have failed come last."""
        free = [trial for trial in asked if self._is_ours(trial) and trial not in self._in_flight]
        return sorted(free, key=self._failures.__getitem__)

    def _is_ours(self, trial: Trial) -> bool:
        return not self._widths or trial.width in self._widths

    def _is_alone(self, trial: Trial) -> bool:
        """A trial that has failed is: what killed a worker may have been any of its pack."""
        return trial in self._failures or self._packs.is_alone(trial)

    def _order(self, trial: Trial, free: Sequence[Trial]) -> Order | None:
        """What to do about one of the free trials; None if a look at its width is awaited."""
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

    def _hand_out(self, trials: Sequence[Trial]) -> None:
        for trial in trials:
            self._in_flight.add(trial)
            self._source.on_start(trial)

    def settle(self, order: Order, done: Done | Limit) -> None:
        """Take what a worker has done: results, told all at once, or what its look has found."""
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
        """Take the loss of a worker: its trials have failed; a look is not worth another."""
        why = reason.partition("\n")[0]
        if order.look:
            self.settle(order, Limit(1, f"a worker was lost in trying: {why}"))
            return
        self._packs.ended(Done(order.trials, (), why=why))
        failed = (Result(trial, Status.FAILED, reason=reason) for trial in order.trials)
        self.answer(*failed, is_lost=True)

    def answer(self, *results: Result, is_lost: bool = False) -> None:
        """Give back trials: their results go to the source together, or they are tried again.

        Args:
            results: of trials that were handed out.
            is_lost: their worker has been lost, which says nothing of what trains them.
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
        """Take out the failures that are not worth another try: all first trials failed alike.

        A trainer that cannot work is found out after a few trials, trained once each; the source
        decides what their failures mean.
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
        """Whether the source can be asked already."""
        return self._is_begun or self._source.is_due

    def _begin(self) -> TrialSource:
        """The source, which is due."""
        if not self._is_begun:
            self._source, self._is_begun = self._source.begun(), True
        return self._source

    @property
    def has_work(self) -> bool:
        """Whether a free worker would get something to do."""
        return any(
            self._is_alone(trial)
            or self._packs.is_formed(trial)
            or trial.width not in self._looked_at
            for trial in (self._free(self._begin().ask()) if self.is_due else ())
        )

    @property
    def is_done(self) -> bool:
        """Whether nothing is in flight and the source asks for nothing more."""
        is_busy = self._in_flight or self._looked_at or not self.is_due
        return not is_busy and not any(map(self._is_ours, self._begin().ask()))


def _kind(reason: str) -> str:
    """The beginning of a failure's reason, numbers aside: others of its kind have the same.

    >>> _kind("KeyError: 'lr=0.01'"), _kind("exit code 1\\nstep 3")
    ("KeyError: 'lr=#'", 'exit code #')
    """
    return re.sub(r"\d[\w.+-]*", "#", reason.partition("\n")[0])[:ALIKE_LENGTH]


class Hung(BaseException):
    """A trial that has not ended in time; no `Exception`, or a trainer's own handlers eat it."""


def failure(trial: Trial, error: BaseException, *, seconds: float) -> Result:
    """A crash as a failed result with its reason.

    Args:
        trial: the trial.
        error: what it has raised; called where that is caught, for its traceback.
        seconds: how long it took.

    Raises:
        LostError: this process can no longer use its device: whatever it trains next would fail.
    """
    check_device(error)
    tail = traceback.format_exc().strip().splitlines()[-LOG_TAIL_LINES:]
    reason = clean([message(error), *tail])
    return Result(trial, Status.FAILED, reason=reason, seconds=seconds)


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
