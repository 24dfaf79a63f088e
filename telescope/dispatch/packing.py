"""How many trials a worker trains as one, and what happens when that goes wrong.

A worker is handed trials of one width, tries the largest pack that it may, and hands back those it
has not trained, with the size that worked: the next packs of that width are no larger. What fails
only as a pack, such as a point whose forward raises, is trained alone, as it would be anyway.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Protocol, cast

from telescope.dispatch.device import check_device
from telescope.dispatch.queue import (
    Pack,
    Trainer,
    attempt,
    checked,
    clean,
    message,
    named_worker,
    this_worker,
    time_limit,
)
from telescope.records import Result, Trial

PackSize = int | Literal["auto"]
"""Trials of a pack at most; "auto" packs on an accelerator, as many as fit, where it pays."""
MIN_GAIN = 1.2
"""Trials per second of a pack over those one after the other, below which "auto" does not pack. An
assumption: what is gained must pay for the noise of a probe of a few steps, and for results that
come later."""
MEMORY_SHARE = 0.8
"""How much of a worker's memory a pack may take: allocators fragment, and others may come."""


def largest(size: PackSize) -> int | None:
    """The most trials that a worker may be handed at once; None: as many as there are."""
    return None if size == "auto" else size


class Measured(Protocol):
    """What a short probe of a pack has found."""

    @property
    def gain(self) -> float:
        """Trials per second as a pack over one after the other."""
        ...

    def most(self, share: float, /) -> float:
        """How many trials a share of the device's memory holds; infinite if that is not known."""
        ...


class PackTrainer(Trainer, Protocol):
    """A trainer that can also train several trials of one width as one."""

    def train_pack(self, trials: Sequence[Trial], /) -> Iterator[Result]:
        """Train them; yield each result as soon as its trial has ended."""
        ...

    def obstacle(self, trial: Trial, /) -> str:
        """Why trials like this one cannot be trained as one; "" if they can."""
        ...

    def probe_pack(self, trials: Sequence[Trial], /) -> Measured | None:
        """Train a few steps of them, on an accelerator; None where there is none."""
        ...


class Limit(NamedTuple):
    """How many trials of a width go together."""

    most: float
    """Infinite where nothing limits it."""
    why: str = ""
    """What limits it; "" if nothing does."""
    until: float = math.inf
    """From how many trials on that is to be found out anew: a larger pack gains more."""


@dataclass(frozen=True)
class _Problem:
    """What a pack has failed of."""

    text: str
    is_memory: bool


class Packer:
    """Trains what one worker is handed; remembers what it has learned about each width.

    Args:
        load: gives the trainer when it is first needed; a `PackTrainer` trains packs too.
        size: the largest pack.
        timeout: seconds after which a trial counts as hung, see `attempt`; a pack of K trials may
            take K times as long, as they would one after the other.
        share: of its device, what this worker may take: others may have the rest.
        guard: a context for all that may take so many seconds.
    """

    def __init__(
        self,
        load: Callable[[], Trainer],
        size: PackSize,
        *,
        timeout: float = 0.0,
        share: float = 1.0,
        guard: Callable[[float], AbstractContextManager[None]] = lambda seconds: nullcontext(),
    ) -> None:
        """Know nothing yet."""
        self._load = load
        self._trainer: Trainer | None = None
        self._size = size
        self._timeout = timeout
        self._share = share
        self._guard = guard
        self._known: dict[int, Limit] = {}

    def __call__(self, trials: Sequence[Trial], answer: Callable[[Result], None]) -> Pack:
        """Train the first of the trials, as many as go together, telling each result at once.

        Args:
            trials: of one width, one or more.
            answer: takes each result as soon as it is there; what it raises passes.

        Raises:
            LostError: this process can no longer use its device.
        """
        width = trials[0].width
        if len(trials) > 1 and (
            width not in self._known or len(trials) >= self._known[width].until
        ):
            with self._guard(self._timeout * len(trials)):
                self._known[width] = self._look(trials)
        limit = self._known.get(width, Limit(math.inf))
        members = trials[: int(min(limit.most, len(trials)))]
        if len(members) == 1:
            with self._guard(self._timeout):
                answer(attempt(self._train_alone, trials[0], timeout=self._timeout))
            return self._pack(trials, members, members, limit)
        with self._guard(self._timeout * len(members)):
            ended, problem = self._train(members, answer)
        if problem is None:
            return self._pack(trials, members, ended, limit)
        if problem.is_memory:
            why = f"{len(members)} trials of width {width} need more memory than there is"
            limit = self._known[width] = Limit(-(-len(members) // 2), why)
            return self._pack(trials, members, ended, limit)
        alone = tuple(trial for trial in members if trial not in ended)
        failed = self._pack(trials, members, ended, limit)
        return replace(failed, alone=alone, why=problem.text)

    def _train_alone(self, trial: Trial) -> Result:
        return self._pack_trainer()(trial)

    def _pack_trainer(self) -> PackTrainer:
        if self._trainer is None:
            self._trainer = self._load()
        return cast(PackTrainer, self._trainer)

    def _pack(
        self,
        trials: Sequence[Trial],
        members: Sequence[Trial],
        ended: Sequence[Trial],
        known: Limit,
    ) -> Pack:
        return Pack(
            trained=tuple(ended),
            released=tuple(trial for trial in trials if trial not in ended),
            most=None if math.isinf(known.most) else int(known.most),
            until=None if math.isinf(known.until) else int(known.until),
            why=known.why,
            members=tuple(members),
            worker=this_worker(),
        )

    def _look(self, trials: Sequence[Trial]) -> Limit:
        """How many trials of this width go together, and why no more."""
        wanted = len(trials) if self._size == "auto" else min(len(trials), self._size)
        number = wanted
        while number > 1:
            try:
                with time_limit(self._timeout * number):
                    trainer = self._pack_trainer()
                    if not hasattr(trainer, "train_pack"):
                        return Limit(1, "its trainer trains one trial at a time")
                    if why := trainer.obstacle(trials[0]):
                        return Limit(1, why)
                    measured = trainer.probe_pack(trials[:number])
                limit = choose_size(self._size, number, measured, self._share)
                # A larger one than memory held just now need not be tried again.
                return limit if number == wanted else limit._replace(until=math.inf)
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                check_device(error)
                problem = _problem(error)
            if not problem.is_memory:
                return Limit(1, problem.text)
            _free_memory()
            number = (number + 1) // 2 if number > 2 else 1
        return Limit(1, "two trials need more memory than there is")

    def _train(
        self, trials: Sequence[Trial], answer: Callable[[Result], None]
    ) -> tuple[list[Trial], _Problem | None]:
        """Train a pack; returns those that have ended, and what happened to the others."""
        ended: list[Trial] = []
        until = time.monotonic() + self._timeout * len(trials)
        results: Iterator[Result] | None = None
        while len(ended) < len(trials):
            try:
                with time_limit(max(until - time.monotonic(), 0.001) if self._timeout else 0.0):
                    if results is None:
                        results = self._pack_trainer().train_pack(trials)
                    result = next(results)
                    open_trials = [trial for trial in trials if trial not in ended]
                    result = named_worker(checked(result, open_trials))
            except KeyboardInterrupt:
                raise
            except StopIteration:
                return ended, _Problem("the pack ended before its trials did", is_memory=False)
            except BaseException as error:
                check_device(error)
                problem = _problem(error)
            else:
                ended.append(result.trial)
                answer(result)
                continue
            del results  # and with it the pack's tensors
            _free_memory()
            return ended, problem
        return ended, None


def choose_size(
    size: PackSize, number: int, measured: Measured | None, share: float = 1.0
) -> Limit:
    """How many trials go together, and why no more.

    Args:
        size: what the spec says.
        number: how many trials were measured together.
        measured: what was found; None on a CPU.
        share: what the worker may take of its device.
    """
    if measured is None:
        on_cpu = Limit(1, "on a CPU auto is 1: runs stay bit-equal, and workers share the cores")
        return on_cpu if size == "auto" else Limit(size)
    if size == "auto" and measured.gain < MIN_GAIN:
        why = f"{number} trials as one are {measured.gain:.2f}x as fast as one after the other"
        return Limit(1, why, 2 * number)
    wanted = math.inf if size == "auto" else size
    most = max(1.0, measured.most(share) * MEMORY_SHARE)
    most = most if math.isinf(most) else math.floor(most)
    return Limit(most, f"memory holds {most:g} trials at once") if most < wanted else Limit(wanted)


def _problem(error: BaseException) -> _Problem:
    """An exception without its traceback, whose frames hold the tensors of a whole pack."""
    from telescope.train.fused import is_out_of_memory

    return _Problem(clean([message(error)]), is_out_of_memory(error))


def _free_memory() -> None:
    """Give back what a failed pack held."""
    from telescope.train.probe import free_memory

    free_memory()
