"""Workers that join: killed at random, paused, given back, refused; and what the commands say."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from faults import answers, finish, memory_folder, run_fast, start
from kills import kill_at_random


@pytest.fixture
def places(tmp_path: Path) -> Iterator[Iterator[Path]]:
    def fresh(folder: Path) -> Iterator[Path]:
        for number in itertools.count():
            place = folder / f"place-{number}"
            place.mkdir()
            yield place

    with memory_folder(tmp_path) as folder:
        yield fresh(folder)


@pytest.mark.parametrize("kills", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_killed_at_random_moments(
    kills: int, places: Iterator[Path], record_property: Callable[[str, object], None]
) -> None:
    whole = next(places)
    assert finish(start(run_fast, whole, {})) == 0
    tally, done = kill_at_random(places, kills, seed=1)
    expected = answers(whole)
    for place in done:
        assert answers(place) == expected
    assert not tally.lost
    assert not tally.twice
    record_property("kill -9 of driver, worker or trainer, workers that join by SQLite", str(tally))
