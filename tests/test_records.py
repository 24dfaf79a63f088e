"""Records: identity is content, and a failure is never a number."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from telescope.records import Point, Result, Status, Trial, as_json


def test_trials_are_equal_by_content() -> None:
    one, other = (Trial(32, Point.of(lr=0.1, weight_decay=0.2), 0) for _ in range(2))
    assert one == other
    assert len({one, other}) == 1
    assert one != Trial(32, Point.of(lr=0.1, weight_decay=0.2), 1)


def test_point_is_an_ordered_mapping() -> None:
    point = Point.of({"weight_decay": 1, "lr": 2})
    assert list(point) == ["weight_decay", "lr"]
    assert json.loads(json.dumps(as_json(point))) == {"weight_decay": 1.0, "lr": 2.0}
    with pytest.raises(KeyError):
        point["momentum"]


@pytest.mark.parametrize(
    ("status", "loss"),
    [
        (Status.COMPLETE, None),
        (Status.COMPLETE, math.nan),
        (Status.COMPLETE, math.inf),
        (Status.DIVERGED, 3.0),
        (Status.DIVERGED, math.inf),
        (Status.FAILED, 0.0),
    ],
)
def test_a_failure_is_never_a_number(status: Status, loss: float | None) -> None:
    with pytest.raises(ValueError, match="finite loss"):
        Result(Trial(32, Point.of(lr=0.1), 0), status, loss=loss)


def test_numbers_of_other_libraries_become_plain_ones() -> None:
    trial = Trial(np.int64(32), Point.of(lr=np.float32(0.5)), np.int16(3))  # type: ignore[arg-type]
    assert trial == Trial(32, Point.of(lr=0.5), 3)
    result = Result(trial, Status.COMPLETE, loss=np.float32(2), flops=np.int64(7))  # type: ignore[arg-type]
    assert Result.from_dict(json.loads(json.dumps(result.as_dict()))) == result
    assert type(result.loss) is float
    with pytest.raises(TypeError):
        Trial(32.5, Point.of(lr=0.5), 0)  # type: ignore[arg-type]
