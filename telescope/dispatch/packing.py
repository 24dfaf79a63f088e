"""A worker's training of its orders, as packs or single trials, and its handling of errors.

Once per width a worker probes how many trials can train as one pack, and how much faster that is.
If a pack fails, as with a point whose forward raises, its trials are trained alone, as without
packs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import Protocol, cast

from telescope.dispatch.children import plain_children
from telescope.dispatch.device import check_device, free_memory, is_out_of_memory
from telescope.dispatch.packs import Done, Limit, PackSize
from telescope.dispatch.queue import (
    Order,
    Trainer,
    checked,
    clean,
    failure,
    message,
    named_worker,
    time_limit,
)
from telescope.records import Result, Trial

MIN_GAIN = 1.2
"""Least gain in trials per second, over trials one after the other, at which "auto" packs.
Assumption: the gain must make up for the noise of a short probe, and for later results."""
MEMORY_SHARE = 0.8
"""Share of a worker's memory that a pack may take: allocators fragment, and others need some."""


class Probed(Protocol):
    """The findings of a short probe of a pack."""

    @property
    def gain(self) -> float:
        """Trials per second as a pack, over those one after the other."""
        ...

    @property
    def alone_seconds(self) -> float:
        """Time of one step of one trial."""
        ...

    def most(self, share: float, /) -> float:
        """Return the trials that fit a share of the device's memory; infinite if unknown."""
        ...


class PackTrainer(Trainer, Protocol):
    """A trainer that can also train several trials of one width as one."""

    def train_pack(self, trials: Sequence[Trial], /) -> Iterator[Result]:
        """Train them; yield each result as soon as its trial has ended."""
        ...

    def obstacle(self, trial: Trial, /) -> str:
        """Say why trials like this one cannot train as one; "" if they can."""
        ...

    def probe_pack(self, trials: Sequence[Trial], /) -> Probed | None:
        """Train a few steps of them on an accelerator; None without one."""
        ...


@dataclass(frozen=True)
class _Problem:
    """The reason that a pack has failed."""

    text: str
    is_memory: bool


class Packer:
    """Carries out one worker's orders, with a trainer that is loaded once.

    Args:
        load: returns the trainer, on first use; a `PackTrainer` trains packs too.
        size: the largest pack.
        timeout: seconds after which a trial counts as hung; 0: never. This interrupts only Python
            code in the main thread; for a call that never returns from C, the process must be
            ended. A pack of K trials may take K times as long.
        share: share of its device that this worker may use.
        guard: makes a context for code that may take a given number of seconds.
    """

    def __init__(
        self,
        load: Callable[[], Trainer],
        size: PackSize = 1,
        *,
        timeout: float = 0.0,
        share: float = 1.0,
        guard: Callable[[float], AbstractContextManager[None]] = lambda seconds: nullcontext(),
    ) -> None:
        """Load nothing yet."""
        self._load = load
        self._trainer: Trainer | None = None
        self._size = size
        self._timeout = timeout
        self._share = share
        self._guard = guard

    def __call__(self, order: Order) -> Done | Limit:
        """Train the order's trials, or probe how many such trials can train as one.

        Raises:
            LostError: this process can no longer use its device.
        """
        trials = order.trials
        with self._guard(self._timeout * len(trials)), plain_children():
            if order.look:
                return self._look(trials)
            if len(trials) > 1:
                return self._train(trials)
            # Any exception of a model file or a library is the trial's failure and must not end the
            # sweep.
            start = time.perf_counter()
            try:
                with time_limit(self._timeout):
                    result = checked(self._loaded()(trials[0]), trials)
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                result = failure(trials[0], error, seconds=time.perf_counter() - start)
            return Done(trials, (named_worker(result),))

    def warm(self) -> None:
        """Do in advance what the first trial needs; an error now will recur with the trial."""
        if self._trainer is not None:
            return
        with suppress(Exception), self._guard(self._timeout), plain_children():
            trainer = self._loaded()
            if hasattr(trainer, "warm"):
                trainer.warm()

    def _loaded(self) -> PackTrainer:
        if self._trainer is None:
            self._trainer = self._load()
        return cast(PackTrainer, self._trainer)

    def _look(self, trials: Sequence[Trial]) -> Limit:
        """Probe how many trials of this width can train as one, and the reason for no more."""
        number = len(trials)
        while number > 1:
            try:
                with time_limit(self._timeout * number):
                    trainer = self._loaded()
                    if not hasattr(trainer, "train_pack"):
                        return Limit(1, "its trainer trains one trial at a time")
                    if why := trainer.obstacle(trials[0]):
                        return Limit(1, why)
                    measured = trainer.probe_pack(trials[:number])
                limit = choose_size(self._size, number, measured, self._share)
                if measured is not None:
                    limit = limit._replace(step_seconds=measured.alone_seconds)
                # Never probe again if a larger pack has just run out of memory.
                return limit if number == len(trials) else limit._replace(until=None)
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                check_device(error)
                problem = _problem(error)
            if not problem.is_memory:
                return Limit(1, problem.text)
            free_memory()
            number = (number + 1) // 2 if number > 2 else 1
        return Limit(1, "two trials need more memory than there is")

    def _train(self, trials: tuple[Trial, ...]) -> Done:
        """Train a pack; an interrupted one has no results, because it is begun again unchanged."""
        ended: list[Result] = []
        problem = self._collect(trials, ended)
        if problem is None:
            return Done(trials, tuple(ended))
        free_memory()
        if not problem.is_memory:
            return Done(trials, tuple(ended), why=problem.text)
        why = f"{len(trials)} trials of width {trials[0].width} need more memory than there is"
        return Done(trials, tuple(ended), Limit(-(-len(trials) // 2), why), why)

    def _collect(self, trials: Sequence[Trial], ended: list[Result]) -> _Problem | None:
        """Train a pack and add each result to `ended`; return what went wrong, or None."""
        try:
            with time_limit(self._timeout * len(trials)):
                for result in self._loaded().train_pack(trials):
                    done = {earlier.trial for earlier in ended}
                    open_trials = [trial for trial in trials if trial not in done]
                    ended.append(named_worker(checked(result, open_trials)))
                    if len(ended) == len(trials):
                        return None
            return _Problem("the pack ended before its trials did", is_memory=False)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            check_device(error)
            return _problem(error)


def choose_size(size: PackSize, number: int, measured: Probed | None, share: float = 1.0) -> Limit:
    """Decide how many trials train as one, with the reason for no more.

    Args:
        size: the spec's pack size.
        number: number of trials in the probe.
        measured: the findings of the probe; None on a CPU.
        share: share of its device that the worker may use.
    """
    if measured is None:
        on_cpu = Limit(1, "on a CPU auto is 1: runs stay bit-equal, and workers share the cores")
        return on_cpu if size == "auto" else Limit(None)
    if size == "auto" and measured.gain < MIN_GAIN:
        why = f"{number} trials as one are {measured.gain:.2f}x as fast as one after the other"
        return Limit(1, why, 2 * number)
    most = max(1.0, measured.most(share) * MEMORY_SHARE)
    if math.isinf(most) or (size != "auto" and most >= size):
        return Limit(None)
    return Limit(math.floor(most), f"memory holds {math.floor(most)} trials at once")


def _problem(error: BaseException) -> _Problem:
    """Keep an exception's message, without its traceback, whose frames hold a pack's tensors."""
    return _Problem(clean([message(error)]), is_out_of_memory(error))
