"""The retries of failures, with a source that records everything it is told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import pytest

from telescope.dispatch.inline import run_inline
from telescope.dispatch.queue import Order, Queue
from telescope.records import Point, Result, Status, Trial, TrialSource

TRIALS = [Trial(32, Point.of(lr=lr), 0) for lr in (0.1, 0.2, 0.3)]


class Source(TrialSource):
    """Asks for three trials, then for nothing."""

    def __init__(self) -> None:
        self.told: list[Result] = []

    def ask(self) -> Sequence[Trial]:
        return [t for t in TRIALS if t not in {result.trial for result in self.told}]

    def tell(self, *results: Result) -> None:
        self.told += results


def good(trial: Trial) -> Result:
    return Result(trial, Status.COMPLETE, loss=trial.lr)


def test_a_trial_is_handed_out_once() -> None:
    queue = Queue(Source())
    assert [queue.take() for _ in range(4)] == [*(Order((trial,)) for trial in TRIALS), None]
    queue.answer(good(TRIALS[1]))
    assert queue.take() is None
    assert not queue.is_done
    for trial in (TRIALS[0], TRIALS[2]):
        queue.answer(good(trial))
    assert queue.is_done


def test_a_source_that_comes_later_is_not_asked_before() -> None:
    class Later(Source):
        @property
        def is_due(self) -> bool:
            return bool(due)

        def ask(self) -> Sequence[Trial]:
            assert due, "asked too early"
            return super().ask()

    due: list[bool] = []
    queue = Queue(Later())
    assert (queue.take(), queue.has_work, queue.is_done) == (None, False, False)
    due.append(True)
    assert queue.has_work
    assert queue.take() == Order((TRIALS[0],))


class Rounds(TrialSource):
    """Asks for ten trials at each of two widths, and counts how often each is trained."""

    def __init__(self, failing: Callable[[Trial], str]) -> None:
        self.trials = [Trial(w, Point.of(lr=lr / 10), 0) for w in (8, 16) for lr in range(1, 11)]
        self.told: dict[Trial, Result] = {}
        self.runs: Counter[Trial] = Counter()
        self._failing = failing

    def ask(self) -> Sequence[Trial]:
        """One width after the other; nothing after three failures, as a ladder does."""
        failed = sum(result.status is Status.FAILED for result in self.told.values())
        left = [t for t in self.trials if t not in self.told]
        return [t for t in left if t.width == left[0].width] if failed < 3 else []

    def tell(self, *results: Result) -> None:
        self.told.update({result.trial: result for result in results})

    def train(self, trial: Trial) -> Result:
        self.runs[trial] += 1
        if reason := self._failing(trial):
            return Result(trial, Status.FAILED, reason=reason)
        return good(trial)


def test_every_width_is_tried_anew() -> None:
    source = Rounds(lambda trial: "out of memory" if trial.width == 16 else "")
    run_inline(source, source.train)
    assert [source.runs[trial] for trial in source.trials] == [1] * 10 + [1, 1, 1] + [0] * 7


@pytest.mark.parametrize("other", ["complete", "diverged", "fails otherwise"])
def test_where_one_trial_ends_otherwise_failures_are_tried_again(other: str) -> None:
    first = Trial(8, Point.of(lr=0.1), 0)

    def failing(trial: Trial) -> str:
        return ("another reason" if other == "fails otherwise" else "") if trial == first else "x"

    source = Rounds(failing)
    if other == "diverged":

        def train(trial: Trial) -> Result:
            is_first, result = trial == first, source.train(trial)
            return Result(trial, Status.DIVERGED, reason="nan") if is_first else result

    run_inline(source, train if other == "diverged" else source.train)
    assert sorted(source.runs.values())[-3:] == [3, 3, 3]
    failed = [r.reason for r in source.told.values() if r.status is Status.FAILED]
    assert all(reason.startswith("failed 3 times; last: ") for reason in failed)


def test_many_workers_are_each_asked_before_a_trainer_is_given_up() -> None:
    source = Rounds(lambda trial: "x")
    queue = Queue(source, workers=5)
    orders = [queue.take() for _ in range(5)]
    for number, order in enumerate(orders, 1):
        assert order is not None
        queue.answer(Result(order.trials[0], Status.FAILED, reason="x"))
        assert len(source.told) == (5 if number == 5 else 0)


def test_lost_workers_are_no_fault_of_the_trainer() -> None:
    source = Rounds(lambda trial: "")
    queue = Queue(source)
    for _ in range(6):
        order = queue.take()
        assert order is not None
        queue.lose(order, "the machine has gone")
    assert not source.told
    assert queue.take() == Order((source.trials[6],)), "what has not failed comes first"
