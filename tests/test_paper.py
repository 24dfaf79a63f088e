"""Policy `paper` on a simulated loss surface with a known optimum, and its invariants.

The surface is a bowl in log2 of both axes whose optimum drifts as 1/width, with a divergence wall:
what a sweep must find is known without training anything.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from telescope.errors import TrialError
from telescope.ladder.ladder import Ladder, replay
from telescope.records import Axis, LadderSpec, Point, Result, Status, Trial

SPEC = LadderSpec(
    (Axis("lr", 2**-8, 2**0, 9), Axis("weight_decay", 2**-6, 2**0, 7)),
    (32, 64, 128, 256),
    policy="paper",
)


def surface(trial: Trial) -> Result:
    """Optimum at log2 lr = -4.3 + 16/width, log2 wd = -2; diverges above lr 2^-1."""
    x, y = math.log2(trial.lr), math.log2(trial.weight_decay)
    if x > -1:
        return Result(trial, Status.DIVERGED, reason="loss nan at step 3")
    optimum = -4.3 + 16 / trial.width
    loss = 2 + 8 / trial.width + 0.02 * (x - optimum) ** 2 + 0.005 * (y + 2) ** 2
    return Result(trial, Status.COMPLETE, loss=loss)


def climb(
    ladder: Ladder,
    answer: Callable[[Trial], Result] = surface,
    order: Callable[[list[Trial]], None] = lambda trials: None,
) -> list[Result]:
    """Answer all that the ladder asks; returns the results in the order they were told."""
    told = []
    while trials := list(ladder.ask()):
        order(trials)
        for trial in trials:
            if trial in ladder.ask():
                told.append(answer(trial))
                ladder.tell(told[-1])
    return told


def test_finds_the_drifting_optimum_to_half_a_step() -> None:
    ladder = Ladder(SPEC)
    climb(ladder)
    assert ladder.is_finished
    last = ladder.choices[-1].point
    # The last window's spacing is 1/8 of an octave of the first; its predecessor's error adds.
    assert abs(math.log2(last.lr) - (-4.3 + 16 / 256)) <= 0.25
    assert abs(math.log2(last.weight_decay) + 2) <= 0.25


def test_choice_counts_and_reasons() -> None:
    ladder = Ladder(SPEC)
    climb(ladder)
    first = ladder.choices[0]
    assert first.counts == {Status.COMPLETE: 8 * 7, Status.DIVERGED: 7}
    assert first.at_edge == ()
    assert "lowest loss of 56 points" in first.reason


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_results_never_matters(seed: int) -> None:
    orderly, shuffled = Ladder(SPEC), Ladder(SPEC)
    climb(orderly)
    climb(shuffled, order=random.Random(seed).shuffle)
    assert shuffled.choices == orderly.choices
    assert shuffled.stages == orderly.stages


def test_replay_at_every_prefix_is_the_fresh_run() -> None:
    fresh = Ladder(SPEC)
    told = climb(fresh)
    for count in range(0, len(told), 7):
        ladder = replay(SPEC, reversed(told[:count]))
        assert not set(ladder.ask()) & {result.trial for result in told[:count]}
        climb(ladder)
        assert ladder.choices == fresh.choices


def test_appending_a_width_reuses_every_result() -> None:
    short = replace(SPEC, widths=SPEC.widths[:2])
    told = climb(Ladder(short))
    ladder = replay(SPEC, told)
    assert len(ladder.choices) == 2
    assert {trial.width for trial in ladder.ask()} == {128}


def test_diverged_never_wins_and_ties_go_to_the_smaller_lr() -> None:
    spec = replace(
        SPEC, axes=(Axis("lr", 1, 4, 3), Axis("weight_decay", 0.1, 0.1, 1)), widths=(32,)
    )
    ladder = Ladder(spec)
    small, middle, large = ladder.ask()
    ladder.tell(Result(small, Status.DIVERGED, reason="nan"))
    ladder.tell(Result(large, Status.COMPLETE, loss=3.0))
    ladder.tell(Result(middle, Status.COMPLETE, loss=3.0))
    assert ladder.choices[0].point.lr == 2


def test_a_point_with_one_diverged_seed_is_not_ranked() -> None:
    spec = replace(
        SPEC,
        axes=(Axis("lr", 1, 2, 2), Axis("weight_decay", 0.1, 0.1, 1)),
        widths=(32,),
        seeds=(0, 1),
    )
    ladder = Ladder(spec)
    for trial in list(ladder.ask()):
        if trial.lr == 1 and trial.seed == 1:
            ladder.tell(Result(trial, Status.DIVERGED, reason="nan"))
        else:
            ladder.tell(Result(trial, Status.COMPLETE, loss=1.0 if trial.lr == 1 else 9.0))
    assert ladder.choices[0].point.lr == 2


def test_edges_are_named() -> None:
    spec = replace(
        SPEC, axes=(Axis("lr", 2**-8, 2**-6, 3), Axis("weight_decay", 2**-6, 1, 7)), widths=(32,)
    )
    ladder = Ladder(spec)
    climb(ladder)
    assert ladder.choices[0].at_edge == ("lr",)
    assert "may lie outside" in ladder.choices[0].reason


def test_everything_diverged_is_stuck_and_says_what_to_change() -> None:
    ladder = Ladder(SPEC)
    climb(ladder, lambda trial: Result(trial, Status.DIVERGED, reason="nan"))
    assert not ladder.choices
    assert ladder.stuck is not None
    assert "width 32" in ladder.stuck
    assert "lower axes.lr.low" in ladder.stuck
    assert ladder.ask() == []


def failing(*points: Point) -> Callable[[Trial], Result]:
    def answer(trial: Trial) -> Result:
        if trial.width == 32 and trial.point in points:
            return Result(trial, Status.FAILED, reason="RuntimeError: disk")
        return surface(trial)

    return answer


def test_a_few_failures_away_from_the_optimum_are_passed_over() -> None:
    far = Ladder(SPEC).stages[0].trials[0].point
    ladder = Ladder(SPEC)
    climb(ladder, failing(far))
    assert ladder.is_finished
    assert ladder.choices[0].counts[Status.FAILED] == 1


def test_a_failure_beside_the_optimum_is_stuck_until_it_is_retried() -> None:
    fresh = Ladder(SPEC)
    climb(fresh)
    best = fresh.choices[0].point
    grid = fresh.stages[0].grid["lr"]
    beside = Point.of({**best, "lr": grid[grid.index(best.lr) + 1]})
    ladder = Ladder(SPEC)
    told = climb(ladder, failing(beside))
    assert ladder.stuck is not None
    assert "beside the best point" in ladder.stuck
    again = replay(SPEC, told, retry_failures=True)
    assert [trial.point for trial in again.ask()] == [beside]
    climb(again)
    assert again.choices == fresh.choices


def test_many_failures_stop_the_stage_early() -> None:
    ladder = Ladder(SPEC)
    told = climb(ladder, lambda trial: Result(trial, Status.FAILED, reason="OSError: no GPU"))
    assert len(told) == 7  # more than a tenth of 63
    assert ladder.stuck is not None
    assert "OSError: no GPU" in ladder.stuck


def test_the_first_answer_counts_unless_it_failed() -> None:
    trial = Ladder(SPEC).stages[0].trials[0]
    failed = Result(trial, Status.FAILED, reason="x")
    good = Result(trial, Status.COMPLETE, loss=1.0)
    better = Result(trial, Status.COMPLETE, loss=0.5)
    for results in ([failed, good, better], [good, failed, better]):
        ladder = replay(SPEC, results)
        assert ladder.results(ladder.stages[0]) == [good]


def test_a_foreign_trial_is_refused() -> None:
    with pytest.raises(TrialError, match="no stage has asked"):
        Ladder(SPEC).tell(surface(Trial(32, Point.of(lr=0.123, weight_decay=0.1), 0)))
