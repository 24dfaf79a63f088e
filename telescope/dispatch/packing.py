"""How a worker trains what it is handed, as one or alone, and what happens when that goes wrong.

It is asked once per width to look: how many such trials go together, and what is gained. What fails
only as a pack, such as a point whose forward raises, is trained alone, as it would be anyway.
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
"""Trials per second of a pack over those one after the other, below which "auto" does not pack. An
assumption: what is gained must pay for the noise of a probe of a few steps, and for results that
come later."""
MEMORY_SHARE = 0.8
"""How much of a worker's memory a pack may take: allocators fragment, and others may come."""


class Probed(Protocol):
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

    def probe_pack(self, trials: Sequence[Trial], /) -> Probed | None:
        """Train a few steps of them, on an accelerator; None where there is none."""
        ...


@dataclass(frozen=True)
class _Problem:
    """What a pack has failed of."""

    text: str
    is_memory: bool


class Packer:
    """Does what one worker is ordered to, with a trainer that is loaded once.

    Args:
        load: gives the trainer when it is first needed; a `PackTrainer` trains packs too.
        size: the largest pack.
        timeout: seconds after which a trial counts as hung; 0: never. Interrupts Python code in the
            main thread alone: a call that never comes back from C needs its process ended. A pack
            of K trials may take K times as long, as they would one after the other.
        share: of its device, what this worker may take: others may have the rest.
        guard: a context for all that may take so many seconds.
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
        """Train the order's trials, or look how many such trials go together.

        Raises:
            LostError: this process can no longer use its device.
        """
        trials = order.trials
        with self._guard(self._timeout * len(trials)), plain_children():
            if order.look:
                return self._look(trials)
            if len(trials) > 1:
                return self._train(trials)
            # The one broad `except` of the program: whatever a model file or a library throws is
            # the trial's failure, and must not take the sweep with it.
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
        """Do ahead what the first trial needs anyway; what fails now fails with the trial too."""
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
        """How many trials of this width go together, and why no more."""
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
                # A larger one than memory held just now need not be tried again.
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
        """Train a pack; one that is interrupted has no results, for it is begun again as it was."""
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
        """Add each result to `ended`; what happened to the others, or None if they all have one."""
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
    """How many trials go together, and why no more.

    Args:
        size: what the spec says.
        number: how many trials were measured together.
        measured: what was found; None on a CPU.
        share: what the worker may take of its device.
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
    """An exception without its traceback, whose frames hold the tensors of a whole pack."""
    return _Problem(clean([message(error)]), is_out_of_memory(error))
