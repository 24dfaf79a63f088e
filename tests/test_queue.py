"""Which failures are tried again, by a source that records what it is told."""

from __future__ import annotations

from collections.abc import Sequence

from telescope.dispatch.inline import run_inline
from telescope.dispatch.queue import Order, Queue, attempt
from telescope.records import Point, Result, Status, Trial

TRIALS = [Trial(32, Point.of(lr=lr), 0) for lr in (0.1, 0.2, 0.3)]


class Source:
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


def test_a_crash_is_tried_three_times_then_told_with_its_reason() -> None:
    source, calls = Source(), []

    def crash(trial: Trial) -> Result:
        calls.append(trial)
        if trial == TRIALS[1]:
            raise RuntimeError("out of\nmemory")
        return good(trial)

    run_inline(source, crash)
    assert calls.count(TRIALS[1]) == 3
    (failed,) = [result for result in source.told if result.status is Status.FAILED]
    assert failed.trial == TRIALS[1]
    assert failed.reason.splitlines()[0] == "failed 3 times; last: RuntimeError: out of memory"
    assert "raise RuntimeError" in failed.reason


def test_a_crash_that_heals_is_complete() -> None:
    source, calls = Source(), []

    def flaky(trial: Trial) -> Result:
        calls.append(trial)
        if calls.count(trial) < 3:
            raise OSError("disk")
        return good(trial)

    run_inline(source, flaky)
    assert [result.status for result in source.told] == [Status.COMPLETE] * 3


def test_divergence_is_never_tried_again() -> None:
    source, calls = Source(), []

    def diverge(trial: Trial) -> Result:
        calls.append(trial)
        return Result(trial, Status.DIVERGED, reason="nan")

    run_inline(source, diverge)
    assert len(calls) == 3


def test_a_model_file_that_exits_is_a_failure() -> None:
    def leave(trial: Trial) -> Result:
        raise SystemExit(3)

    assert attempt(leave, TRIALS[0]).reason.startswith("SystemExit: 3")


def test_starts_are_announced() -> None:
    started: list[Trial] = []
    run_inline(Source(), good, on_start=started.append)
    assert started == TRIALS
