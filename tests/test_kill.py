"""kill -9 of an inline driver at random moments, and between every two writes of its results."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from faults import (
    Tally,
    answers,
    can_trace,
    finish,
    kill_at_random,
    kill_between_writes,
    memory_folder,
    numbered,
    run_fast,
    start,
    stored,
)

ONE_STAGE = {
    "ladder": {"widths": [16], "policy": "paper"},
    "axes": {"lr": {"low": 0.01, "high": 0.16, "points": 3}, "weight_decay": {"value": 0.1}},
}


@pytest.fixture
def places(tmp_path: Path) -> Iterator[Iterator[Path]]:
    with memory_folder(tmp_path) as folder:
        yield numbered(folder)


def undisturbed(place: Path, tables: dict[str, Any]) -> dict[str, Any]:
    assert finish(start(run_fast, place, tables)) == 0
    return answers(place)


@pytest.mark.parametrize("kills", [12, pytest.param(220, marks=pytest.mark.slow)])
def test_killed_at_random_moments(
    kills: int, places: Iterator[Path], record_property: Callable[[str, object], None]
) -> None:
    undisturbed(next(places), {})  # the first one waits for the server
    began = time.monotonic()
    expected = undisturbed(next(places), {})
    seconds = time.monotonic() - began
    tally, done = kill_at_random(places, kills, seed=0, tables={}, seconds=seconds)
    for place in done:
        assert answers(place) == expected
    assert tally.faults >= kills
    assert not tally.lost
    assert not tally.twice
    record_property("kill -9 of an inline driver at random moments", str(tally))


def test_a_table_that_a_kill_left_behind_is_written_anew(places: Iterator[Path]) -> None:
    """Killed after its last result was stored and before the table was written."""
    place = next(places)
    expected = undisturbed(place, ONE_STAGE)
    table = place / "results" / "tiny" / "trials.csv"
    whole = table.read_text()
    table.write_text("".join(whole.splitlines(keepends=True)[:2]))
    assert undisturbed(place, ONE_STAGE) == expected
    assert table.read_text() == whole


IN_PACKS = {**ONE_STAGE, "compute": {"pack": 2}}
SPARE_WRITES = 8
"""By how many writes one run may fall short of another."""


def disturbed_at(place: Path, tables: dict[str, Any], number: int, tally: Tally) -> bool:
    """Kill a sweep before its write of this number, and let it go on; False if it has fewer."""
    writes = kill_between_writes(place, tables, number)
    if len(writes) < number:
        return False
    tally.faults += 1
    tally.new_sweep()
    tally.look(place)
    assert finish(start(run_fast, place, tables)) == 0, writes[-1:]
    tally.look(place)
    return True


def kill_points(number_of_writes: int, points: int | None, part: int) -> list[int]:
    """All of them, every second one from `part` on; or a random sample of a few."""
    if points is None:
        return list(range(part, number_of_writes, 2))
    return random.Random(part).sample(range(number_of_writes), points)


@pytest.mark.parametrize("tables", [ONE_STAGE, IN_PACKS], ids=["alone", "in packs"])
@pytest.mark.parametrize(
    ("points", "part"),
    [
        (10, 0),
        pytest.param(None, 0, marks=pytest.mark.slow),
        pytest.param(None, 1, marks=pytest.mark.slow),
    ],
)
def test_killed_between_two_writes(
    tables: dict[str, Any],
    points: int | None,
    part: int,
    places: Iterator[Path],
    record_property: Callable[[str, object], None],
) -> None:
    """A tracer stops the driver before each system call that changes the results folder."""
    if not can_trace():
        pytest.skip("needs x86-64 Linux that lets processes be traced")
    expected = undisturbed(next(places), tables)
    whole = next(places)
    writes = kill_between_writes(whole, tables, 10**9)
    assert answers(whole) == expected
    of_packs = ("rename /tiny/.unstored.json", "unlink /tiny/unstored.json", "write /tiny/packs")
    for what in (
        *("rename /tiny/.spec.json", "unlink /tiny/trials.db-journal", "fsync /tiny"),
        *(of_packs if tables is IN_PACKS else ()),
    ):
        assert any(what.split()[0] in w and what.split()[1] in w for w in writes), what
    tally = Tally()
    for number in kill_points(len(writes), points, part):
        place = next(places)
        if not disturbed_at(place, tables, number, tally):
            # Runs differ by a few writes, as the sizes of what they write do.
            assert number > len(writes) - SPARE_WRITES, number
            continue
        assert answers(place) == expected, (number, writes[number])
    assert not tally.lost
    assert not tally.twice
    record_property(f"kill -9 before one of {len(writes)} writes", str(tally))


def test_the_harness_sees_what_is_lost_and_what_is_run_twice(places: Iterator[Path]) -> None:
    """A test that cannot fail proves nothing: a lost database is seen, and so is a second run."""
    place, tally = next(places), Tally()
    tally.new_sweep()
    assert finish(start(run_fast, place, ONE_STAGE)) == 0
    tally.look(place)
    assert len(stored(place)) == 3
    (place / "results" / "tiny" / "trials.db").unlink()
    (place / "results" / "tiny" / "spec.json").unlink()  # with it, a run refuses to start anew
    assert finish(start(run_fast, place, ONE_STAGE)) == 0
    tally.look(place)
    assert len(tally.lost) == len(tally.twice) == 3
