"""The grids of Algorithm 1 against numbers written by hand, exponents visible."""

from __future__ import annotations

import pytest

from telescope.ladder.grid import paper_stage, points_at
from telescope.records import Axis, LadderSpec, Stage

LR = Axis("lr", 2**-10, 2**-3, 8)  # spacing: one octave
DECAY = Axis("weight_decay", 2**-9, 2**-2, 8)
PAPER = LadderSpec((LR, DECAY), (256, 512, 1024, 2048))
CENTRE = {"lr": 2**-5, "weight_decay": 2**-4}


def stage_at(width: int, spec: LadderSpec = PAPER) -> Stage:
    return paper_stage(spec, width, CENTRE)


def test_two_axes_of_eight_give_the_papers_grids() -> None:
    sizes = [[len(values) for values in stage_at(w).grid.values()] for w in PAPER.widths]
    assert sizes == [[8, 8], [5, 5], [3, 3], [1, 1]]
    assert [len(stage_at(w).trials) for w in PAPER.widths] == [64, 25, 9, 1]


def test_first_stage_covers_the_range() -> None:
    assert stage_at(256).grid["lr"] == pytest.approx([2.0**e for e in range(-10, -2)], rel=1e-5)


def test_spacing_halves_per_doubling_and_the_centre_is_a_point() -> None:
    assert stage_at(512).grid["lr"] == pytest.approx(
        [2 ** (-5 + e / 2) for e in (-2, -1, 0, 1, 2)], rel=1e-5
    )
    assert stage_at(1024).grid["lr"] == pytest.approx(
        [2 ** (-5 + e / 4) for e in (-1, 0, 1)], rel=1e-5
    )
    assert stage_at(2048).grid["lr"] == pytest.approx([2**-5])


@pytest.mark.parametrize(
    ("swept", "expected"),
    [
        (1, [9, 3, 1, 1]),  # 9 · (1/4)^j = 9, 2.25, 0.56, 0.14
        (2, [9, 5, 3, 3]),  # 9 · (1/2)^j = 9, 4.5, 2.25, 1.125
        (3, [9, 7, 5, 3]),  # 9 · (1/4)^(j/3) = 9, 5.67, 3.57, 2.25
    ],
)
def test_points_for_other_numbers_of_axes(swept: int, expected: list[int]) -> None:
    axis = Axis("lr", 0.001, 1.0, 9)
    got = [points_at(axis, width=32 << j, base_width=32, swept=swept) for j in range(4)]
    assert got == expected


def test_a_power_that_is_an_integer_is_not_rounded_up() -> None:
    # 27 · (1/8)^(2/3) = 27/4; 64 · (1/8)^(2/3) = 16 in exact arithmetic, so 17 points, not 19.
    axis = Axis("lr", 0.001, 1.0, 60)
    assert points_at(axis, width=256, base_width=32, swept=3) == 15  # 60/4 exactly


def test_less_than_a_doubling_uses_the_same_formulas() -> None:
    spec = LadderSpec((LR, DECAY), (256, 384))
    stage = paper_stage(spec, 384, CENTRE)
    assert len(stage.grid["lr"]) == 7  # 8 · (2/3) = 5.33
    assert stage.grid["lr"][4] / stage.grid["lr"][3] == pytest.approx(2 ** (2 / 3), rel=1e-5)


def test_a_fixed_axis_stays_and_does_not_count() -> None:
    spec = LadderSpec((LR, Axis("weight_decay", 0.1, 0.1, 1)), (256, 512))
    stage = paper_stage(spec, 512, {"lr": 2**-5, "weight_decay": 0.1})
    assert stage.grid["weight_decay"] == (0.1,)
    assert len(stage.grid["lr"]) == 3  # k = 1: 8/4 = 2


def test_every_point_has_every_seed() -> None:
    spec = LadderSpec((LR, DECAY), (256,), seeds=(3, 5))
    trials = paper_stage(spec, 256, {}).trials
    assert len(trials) == len(set(trials)) == 128
    assert {trial.seed for trial in trials} == {3, 5}
