"""Losses far beyond the good ones: finite, stored as they are, and for the ladder a wall."""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable
from dataclasses import replace

import pytest
from surfaces import run

from telescope.ladder.ladder import Ladder
from telescope.ladder.observe import highest_loss
from telescope.ladder.paper import mean_loss
from telescope.records import Axis, LadderSpec, Result, Status, Trial

AXES = (Axis("lr", 0.004, 0.5, 7), Axis("weight_decay", 0.01, 1, 5))
SPEC = LadderSpec(AXES, (32, 64, 128), target_width=256)


def loss(trial: Trial) -> float:
    """A bowl of 2.5 nats at lr 0.05, weight decay 0.125, with a little noise."""
    x, y = math.log2(trial.lr) + 4.3, math.log2(trial.weight_decay) + 3
    noise = zlib.crc32(str(trial).encode()) / 2**32 - 0.5
    return 2.5 * (1 + 0.02 * x * x + 0.002 * y * y) + 0.004 * noise


def chance(trial: Trial) -> float:
    """A number from 0 to 1 that depends on the trial alone."""
    return zlib.crc32(f"chance {trial}".encode()) / 2**32


def climb(huge: Callable[[Trial], float | None], spec: LadderSpec = SPEC) -> Ladder:
    """A ladder on the bowl, where `huge` does not answer instead."""

    def answer(trial: Trial) -> Result:
        beyond = huge(trial)
        return Result(trial, Status.COMPLETE, loss=loss(trial) if beyond is None else beyond)

    return run(answer, spec)


def found(ladder: Ladder) -> tuple[float, float]:
    certificate = ladder.certificate()
    assert certificate
    return certificate.point.lr, certificate.point.weight_decay


@functools.cache
def plain() -> Ladder:
    """The ladder on the bowl itself: climbed once, asked often."""
    return climb(lambda trial: None)


@functools.cache
def diverging(from_lr: float) -> Ladder:
    """The ladder on the bowl, where all above a learning rate diverges."""

    def answer(trial: Trial) -> Result:
        if trial.lr > from_lr:
            return Result(trial, Status.DIVERGED, reason="nan")
        return Result(trial, Status.COMPLETE, loss=loss(trial))

    return run(answer, SPEC)


@pytest.mark.parametrize("value", [1e3, 1e5, 1e30, 1e200, 1e308])
@pytest.mark.parametrize("from_lr", [0.11, 0.0625])
def test_a_huge_loss_is_a_wall_like_a_divergence(value: float, from_lr: float) -> None:
    """However huge, the ladder takes the same trials, and answers as if they had diverged."""

    huge = climb(lambda trial: value if trial.lr > from_lr else None)
    diverged = diverging(from_lr)
    assert [s.trials for s in huge.stages] == [s.trials for s in diverged.stages]
    assert [c.point for c in huge.choices] == [c.point for c in diverged.choices]
    assert found(huge)[0] == pytest.approx(0.05, rel=0.1)
    results = [r for stage in huge.stages for r in huge.results(stage)]
    assert any(r.loss == value and r.status is Status.COMPLETE for r in results)


@pytest.mark.parametrize("value", [20.0, 50.0, 75.0])
def test_a_bad_loss_that_is_no_wall_does_no_harm(value: float) -> None:
    ladder = climb(lambda trial: value if trial.lr > 0.11 else None)
    assert found(ladder)[0] == pytest.approx(0.05, rel=0.15)


@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
def test_huge_losses_here_and_there(seeds: tuple[int, ...]) -> None:
    spec = replace(SPEC, seeds=seeds)
    for huge in (
        lambda t: 10 ** (5 + 300 * chance(t)) if chance(t) < 0.15 and t.width > 32 else None,
        lambda t: 1e30 if t.seed == 1 and chance(t) < 0.3 else None,
        lambda t: 1e30 if t == Ladder(spec).ask()[0] else None,  # the first of all
    ):
        assert found(climb(huge, spec))[0] == pytest.approx(0.05, rel=0.2)


def test_a_width_at_which_all_is_huge_has_no_loss() -> None:
    ladder = climb(lambda trial: 1e12 if trial.width == 64 else None)
    assert [choice.width for choice in ladder.choices] == [32]
    assert "no trial at width 64 has a loss" in ladder.skipped[0].reason


def test_huge_losses_of_every_scale_are_looked_below_and_then_said() -> None:
    ladder = climb(lambda trial: 10 ** (5 + 300 * chance(trial)))
    assert ladder.stuck
    assert min(t.lr for s in ladder.stages for t in s.trials) < 0.004
    low = climb(lambda trial: 1e12 if trial.lr > 0.0041 else None)
    assert found(low)[0] < 0.006


@pytest.mark.parametrize("unit", [1e-306, 1e-20, 1e20, 1e306])
def test_the_unit_of_the_loss_changes_nothing(unit: float) -> None:
    other = climb(lambda trial: loss(trial) * unit)
    assert [len(s.trials) for s in other.stages] == [len(s.trials) for s in plain().stages]
    assert found(other) == pytest.approx(found(plain()), rel=1e-6)
    losses = [choice.loss for choice in plain().choices]
    assert [c.loss / unit for c in other.choices] == pytest.approx(losses, rel=1e-6)


@pytest.mark.parametrize("value", [0.0, 5e-324, 1e-310, -1e308, 1e308, 1e20])
def test_losses_that_are_all_the_same_end(value: float) -> None:
    ladder = climb(lambda trial: value)
    assert ladder.is_finished
    assert found(ladder)[0] == pytest.approx(0.0447, rel=0.01)  # the middle of the lattice


@pytest.mark.parametrize("shift", [-2.5, -3.0, -100.0])
def test_losses_near_zero_and_below_it(shift: float) -> None:
    ladder = climb(lambda t: 1e9 if t.lr > 0.2 else loss(t) + shift)
    assert found(ladder)[0] == pytest.approx(0.05, rel=0.1)


@pytest.mark.parametrize(
    ("losses", "highest"),
    [
        ([2.0, 2.1, 2.5, 3.0], 2 + 30 * 2),  # the best loss is the scale
        ([2.0, 1e10, 1e20], 2 + 30 * 2),
        ([-0.1, 0.9, 1.9, 2.9], -0.1 + 30 * 1.5),  # the median excess is
        ([1e10, 1e20, 1e30], 1e10 + 30 * 1e10),
        ([0.0, 1.0, 2.0], 30.0),
        ([0.0, 0.0, 0.0], 30.0),
    ],
)
def test_where_the_wall_stands(losses: list[float], highest: float) -> None:
    spec = LadderSpec((AXES[0], Axis("weight_decay", 0.1, 0.1, 1)), (32,), policy="paper")
    ladder = Ladder(spec)
    for trial, value in zip(ladder.ask(), losses, strict=False):
        ladder.tell(Result(trial, Status.COMPLETE, loss=value))
    assert highest_loss(ladder._state()) == pytest.approx(highest)


def test_the_mean_of_huge_losses() -> None:
    assert mean_loss([1e308, 1.5e308]) == pytest.approx(1.25e308)
    assert mean_loss([1.5e308, 1e308]) == mean_loss([1e308, 1.5e308])
