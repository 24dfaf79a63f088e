"""Workers that join: killed at random, paused, given back, refused; and what the commands say."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from boards import Boards, order_of
from commands import telescope
from faults import (
    STARTS,
    answers,
    finish,
    memory_folder,
    numbered,
    run_fast,
    spec_of,
    start,
    stored,
)
from kills import OUTCOME, REFUSED, children, drive, kill_at_random, outlived, serve
from stages import Recorded

from telescope import Spec
from telescope.dispatch.joining.board import (
    Watch,
    order_as_text,
    order_from_text,
    outcome_as_text,
    outcome_from_text,
)
from telescope.dispatch.joining.driver import _Driver
from telescope.dispatch.joining.worker import Joined
from telescope.dispatch.packs import Done, Limit
from telescope.dispatch.queue import Order, Queue
from telescope.errors import LostError, SpecError
from telescope.files import network_file_system
from telescope.records import CurvePoint, Point, Result, Status, Trial
from telescope.store import board
from telescope.store.board import Worker
from telescope.store.database import sqlite_url, without_password
from telescope.store.folder import Folder
from telescope.sweep.announcing import announcement, packer_here
from telescope.sweep.prepare import prepare
from telescope.sweep.run import how_to_join


@pytest.fixture
def places(tmp_path: Path) -> Iterator[Iterator[Path]]:
    with memory_folder(tmp_path) as folder:
        yield numbered(folder)


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


@pytest.fixture
def boards(tmp_path: Path) -> Iterator[Boards]:
    with Boards(sqlite_url(tmp_path)) as boards:
        yield boards


def test_an_order_is_taken_once_by_whoever_asks(boards: Boards) -> None:
    boards.no_order_is_taken_twice()


def test_only_the_first_delivery_counts(boards: Boards) -> None:
    boards.first_delivery_counts()


def test_what_is_given_back_is_on_offer_in_its_place(boards: Boards) -> None:
    boards.given_back_keeps_its_place()


def test_a_driver_that_comes_back_finds_what_workers_have(boards: Boards) -> None:
    boards.driver_comes_back()


def complete(trial: Trial, loss: float = 1.0) -> Done:
    return Done((trial,), (Result(trial, Status.COMPLETE, loss=loss),))


class Play:
    """A driver that is moved by hand."""

    def __init__(self, boards: Boards, source: Recorded, lease: float = 0.3) -> None:
        self.board = boards.driver()
        self.source = source
        self._driver = _Driver(Queue(source), source, self.board, 1, lease, lambda line: None)
        self._driver.begin("{}")

    def turn(self) -> bool:
        return self._driver.turn()

    def states(self) -> list[str]:
        return [row.state for row in self.board.look()[0]]

    def turn_until(self, what: Callable[[], object], *alive: Worker) -> None:
        deadline = time.monotonic() + 20
        while not what():
            assert time.monotonic() < deadline
            for worker in alive:
                worker.beat()
            self.turn()
            time.sleep(0.02)


def test_a_paused_worker_delivers_late_and_the_trial_is_told_once(boards: Boards) -> None:
    """Its trial has been given to another meanwhile, whose delivery is refused."""
    play = Play(boards, Recorded(1))
    (trial,) = play.source.stages[0]
    paused, other = boards.worker("paused"), boards.worker("other")
    play.turn_until(lambda: play.states() == ["open"], paused)
    first = paused.take()
    assert first
    play.turn_until(lambda: play.states() == ["taken"] and play.source.started, paused)
    play.turn_until(lambda: play.states() == ["open"], other)
    second = other.take()
    assert second
    assert (second.key, second.lease) == (first.key, first.lease + 1)
    assert paused.deliver(first, outcome_as_text(complete(trial, 1.0)), only_mine=False)
    assert not other.deliver(second, outcome_as_text(complete(trial, 2.0)), only_mine=False)
    play.turn_until(lambda: play.source.told)
    assert not other.deliver(second, outcome_as_text(complete(trial, 3.0)), only_mine=False)
    assert not play.turn()
    assert [r.loss for results in play.source.told for r in results] == [1.0]


def test_a_worker_that_is_lost_again_and_again_is_a_failure(boards: Boards) -> None:
    play = Play(boards, Recorded(1), lease=0.1)
    for number in range(3):
        worker = boards.worker(f"worker-{number}")
        play.turn_until(lambda: play.states() == ["open"], worker)
        assert worker.take()
        play.turn_until(lambda: play.states() != ["taken"])
    play.turn_until(lambda: play.source.told)
    ((result,),) = play.source.told
    assert result.status is Status.FAILED
    assert result.reason == (
        "failed 3 times; last: worker worker-2 has not been heard of for 0.1 s"
    )
    assert play.states() == [], "what comes now is refused"
    play.turn_until(lambda: play.source.joined[-1] == 0)
    assert play.source.joined[0] == 1


def test_what_was_delivered_while_no_driver_was_there_is_told(boards: Boards) -> None:
    source = Recorded(3)
    first = Play(boards, source)
    worker = boards.worker("w")
    first.turn_until(lambda: len(first.states()) == 3, worker)
    taken = worker.take()
    assert taken
    second = Play(boards, source)  # the first one was killed
    assert worker.deliver(taken, outcome_as_text(complete(source.stages[0][0])), only_mine=False)
    second.turn_until(lambda: source.told)
    second.turn_until(lambda: len(second.states()) == 2, worker)
    with pytest.raises(LostError, match="another driver has taken it over"):
        first.turn()
    assert [r.trial for results in source.told for r in results] == source.stages[0][:1]


def test_a_driver_with_nothing_to_train_misses_no_worker(boards: Boards) -> None:
    said: list[str] = []
    source = Recorded()
    driver = _Driver(Queue(source), source, boards.driver(), 1, 0.3, said.append)
    driver.begin("{}")
    assert not driver.turn()
    assert said == []


def test_the_command_that_joins_is_for_any_folder_and_a_shell(tmp_path: Path) -> None:
    place = tmp_path / "my results"
    url = "postgresql+psycopg://me:secret@host/db?application_name=x&sslmode=require"
    shown = url.replace(":secret", "")
    words = ["telescope", "worker", "tiny", "--storage", shown, "--results", str(place)]
    assert shlex.split(how_to_join("tiny", url, place)) == words


def test_what_nobody_asks_for_any_more_is_evidence_once_delivered(boards: Boards) -> None:
    """The spec's range has changed while no driver was there."""
    before, now = Recorded(1), Recorded(0, 1)
    first = Play(boards, before)
    worker = boards.worker("w")
    first.turn_until(first.states, worker)
    taken = worker.take()
    assert taken
    second = Play(boards, now)
    assert worker.deliver(taken, outcome_as_text(complete(before.stages[0][0])), only_mine=False)
    second.turn_until(lambda: now.told)
    assert now.told[0][0].trial == before.stages[0][0]


def test_a_failure_of_a_lost_lease_does_not_stand_in_for_the_other_worker(boards: Boards) -> None:
    boards.late_failure_is_refused()


def test_beats_are_watched_on_the_own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    watch = Watch(longest_look=2.0)
    for passed, beat, silent in [(0, 7, 0), (1, 7, 1), (1, 7, 2), (1, 8, 0), (1.5, 8, 1.5)]:
        now[0] += passed
        watch.look({"w": beat})
        assert watch.silent("w") == silent
    now[0] += 3600  # whoever looks has slept, and perhaps the other too
    watch.look({"w": 8})
    assert watch.silent("w") == 3.5
    watch.look({})
    assert watch.silent("w") == 0


def test_texts_on_the_board_lose_nothing() -> None:
    trials = tuple(Trial(32, Point.of(lr=lr, weight_decay=1 / 3), 5) for lr in (0.1, 1e-7 / 3))
    order = Order(trials, look=True)
    assert order_from_text(order_as_text(order)) == order
    curve = (CurvePoint(1, 1 / 3, None), CurvePoint(2, float("inf"), 2.0, {"load": 0.1}))
    result = Result(trials[0], Status.COMPLETE, loss=2 / 3, flops=1e19, seconds=0.1, curve=curve)
    failed = Result(trials[1], Status.FAILED, reason="a\nb", worker="h:1")
    for outcome in (
        Done(trials, (result, failed)),
        Done(trials, (result,), Limit(2, "memory", None), "why"),
        Limit(None, "", 8),
        "killed by signal 9\nlast words",
    ):
        back = outcome_from_text(outcome_as_text(outcome), trials)
        assert back == outcome
        if isinstance(back, Done):
            assert back.results[0].curve == curve


def wait_for(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_worker_that_gets_sigterm_gives_its_trial_back_at_once(places: Iterator[Path]) -> None:
    place, whole = next(places), next(places)
    driver, worker = start(drive, place, None), start(serve, place, None, 600)
    wait_for(lambda: (place / STARTS).exists())
    began = time.monotonic()
    assert worker.pid
    os.kill(worker.pid, signal.SIGTERM)
    assert finish(worker) == 0
    other = start(serve, place, None)
    assert finish(driver) == 0
    assert time.monotonic() - began < 60
    assert finish(other) == 0
    starts = Counter((place / STARTS).read_text().splitlines())
    assert sorted(starts.values()) == [1] * 8 + [2], "the one that was given back"
    run_fast(whole, {})
    assert answers(place) == answers(whole)
    # What a driver had stored when it was killed, and not yet taken off the board:
    before = stored(place)
    with Boards(sqlite_url(place / "results" / "tiny"), "tiny") as boards:
        killed, late = boards.driver(), boards.worker("late")
        killed.begin("{}")
        known = Trial(16, Point.of(lr=0.01, weight_decay=0.05), 0)
        assert str(known) in starts
        killed.offer(order_of(known))
        taken = late.take()
        assert taken
        assert late.deliver(taken, outcome_as_text(complete(known)), only_mine=False)
    assert finish(start(drive, place, None)) == 0
    assert stored(place) == before


def test_a_worker_that_is_paused_for_longer_than_its_lease_delivers_nothing_twice(
    places: Iterator[Path],
) -> None:
    place, whole = next(places), next(places)
    driver, paused = start(drive, place, None), start(serve, place, None, 0.5)
    wait_for(lambda: (place / STARTS).exists())
    stopped = [psutil.Process(paused.pid), *children(paused)]
    for process in stopped:
        process.suspend()
    other = start(serve, place, None)
    try:
        wait_for(lambda: len((place / STARTS).read_text().splitlines()) == 10)
    finally:
        for process in stopped:
            process.resume()
    assert [finish(one) for one in (driver, other, paused)] == [0, 0, 0]
    starts = Counter((place / STARTS).read_text().splitlines())
    assert sorted(starts.values()) == [1] * 8 + [2], "the one that was paused"
    run_fast(whole, {})
    assert answers(place) == answers(whole)
    stored(place)  # fails if one is stored twice


def test_the_death_of_a_trial_is_seen_although_what_it_started_lives(tmp_path: Path) -> None:
    assert finish(start(outlived, tmp_path), seconds=15) == 0
    said = (tmp_path / OUTCOME).read_text()
    assert said == "the process that trained it ended (exit code 3)"


def test_a_worker_of_another_corpus_is_refused_before_its_first_trial(
    places: Iterator[Path],
) -> None:
    place = next(places)
    driver = start(drive, place, None)
    folder = Folder(place / "results" / "tiny")
    wait_for(lambda: folder.exists)
    (place / "corpus.txt").write_text("another text, which is no fox and no dog\n" * 200)
    assert finish(start(serve, place, None)) == 0
    driver.terminate()
    driver.join()
    said = (place / REFUSED).read_text()
    assert said.startswith("tiny: this worker's results would not be comparable: data (hash) is ")
    assert "\n" not in said
    assert not (place / STARTS).exists()


def test_versions_and_keys_that_differ_are_named(tmp_path: Path) -> None:
    sweep = prepare(Spec.from_dict(spec_of(tmp_path)))
    folder = Folder(tmp_path / "results" / "tiny")
    folder.create()
    record: dict[str, Any] = {"spec": {}, "comparable_if_equal": {}, "storage": None}
    folder.write_spec({**record, "fingerprint": "f", "target_flops": 1.0}, None)
    told = json.loads(announcement(sweep, folder, lease=60.0))
    packer_here(told, folder)
    older = {**told, "versions": {**told["versions"], "torch": "1.0"}}
    with pytest.raises(SpecError, match=r"torch is \S+, the driver's 1.0; use the same versions"):
        packer_here(older, folder)
    comparable = {**told["comparable"], "train.steps": 5, "new.key": 1}
    with pytest.raises(SpecError, match=r"new.key is None, the driver's 1, train.steps is 4, the"):
        packer_here({**told, "comparable": comparable}, folder)


def said_by(*arguments: str, cwd: Path) -> tuple[int, str]:
    done = telescope("worker", *arguments, cwd=cwd)
    assert done.stderr.count("\n") <= 1
    return done.returncode, done.stderr or done.stdout


def test_what_a_worker_says_of_what_is_not_there(tmp_path: Path, boards: Boards) -> None:
    url = sqlite_url(tmp_path)
    code, said = said_by("tiny", "--storage", url, "--wait", "0", cwd=tmp_path)
    assert (code, "(there: none): start it: telescope run SPEC" in said) == (2, True)
    driver = boards.driver()
    driver.begin("{}")
    code, said = said_by("tiny", "--storage", url, "--wait", "0", cwd=tmp_path)
    assert (code, "no sweep tiny in sqlite" in said, "(there: sweep)" in said) == (2, True, True)
    driver.leave("ended")
    code, said = said_by("sweep", "--storage", url, cwd=tmp_path)
    assert (code, said) == (0, "sweep: has ended; there is nothing to train\n")
    code, said = said_by("tiny", "--wait", "0", cwd=tmp_path)
    assert (code, "results/tiny/trials.db" in said) == (2, True)
    code, said = said_by("of/tiny/", "--wait", "0", cwd=tmp_path)
    assert (code, f"no sweep tiny in sqlite:///{tmp_path}/of/tiny/trials.db" in said) == (2, True)
    assert not (tmp_path / "results").exists(), "nothing is created"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("mysql://me:secret@host/db", "must be PostgreSQL, or an SQLite file|cannot be opened"),
        ("sqlite://", "must be PostgreSQL, or an SQLite file"),
        ("postgresql+psycopg://me:secret@host:port/db", "cannot be opened"),
        ("no url", "cannot be opened"),
        ("postgresql+psycopg://me:a@secret@127.0.0.1:1/db", "an @ in the password .* as %40"),
        ("postgresql+psycopg://me:a@secret@127.0.0.1:x/db", "cannot be opened"),
        ("postgresql+psycopg://me:secret@127.0.0.1:1/db", "cannot be used: .*refused"),
    ],
)
def test_a_database_that_cannot_be_is_one_line_without_a_password(
    url: str, expected: str, tmp_path: Path
) -> None:
    code, said = said_by("tiny", "--storage", url, cwd=tmp_path)
    assert code == 2
    assert re.search(expected, said), said
    assert "secret" not in said
    assert "secret" not in without_password(url)


def test_sqlite_on_a_network_file_system_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(
        "proc /proc proc rw 0 0\n/dev/sda / ext4 rw 0 0\nhost:/home /home nfs4 rw 0 0\n"
        "host:/a\\040b /data/a\\040b lustre rw 0 0\n/dev/sdb /home/local xfs rw 0 0\n"
    )
    for path, kind in {
        "/home/me/trials.db": "nfs4",
        "/data/a b/x": "lustre",
        "/home/local/x": None,
        "/homes/x": None,
    }.items():
        assert network_file_system(Path(path), mounts) == kind
    assert network_file_system(tmp_path, tmp_path / "no such table") is None
    monkeypatch.setattr(board, "network_file_system", lambda path: "nfs4")
    code, said = said_by("tiny", "--storage", "sqlite:////home/x.db", cwd=tmp_path)
    assert (code, "network file system (nfs4)" in said) == (2, True)


def test_a_driver_that_stays_away_is_waited_for_so_long(boards: Boards) -> None:
    class Idle:
        def start(self, beat: object, every: float) -> None:
            """Nothing to start."""

        def end(self, *, at_once: bool) -> None:
            """Nothing to end."""

    driver = boards.driver()
    driver.begin("{}")
    driver.leave("away")
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    joined = Joined("sweep", boards.worker("w"), Idle(), lease=60, patience=0.3)  # type: ignore[arg-type]
    began = time.monotonic()
    try:
        with pytest.raises(LostError, match=r"^sweep: no driver for \d+ s; start `telescope run`"):
            joined.work()
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGINT), handlers, strict=True):
            signal.signal(number, handler)
    assert 0.3 < time.monotonic() - began < 20
    assert driver.look()[1] == {}, "it has left"


def test_an_interrupted_worker_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("telescope.sweep.joining.join", interrupt)
    said = "tiny: interrupted; what was not delivered is on offer again\n"
    assert said_by("tiny", cwd=tmp_path) == (130, said)


def test_workers_join_by_the_database_alone(tmp_path: Path) -> None:
    place = tmp_path / "sweep.toml"
    telescope("init", str(place), cwd=tmp_path)
    options = ("--dispatcher", "workers", "--no-check")
    for more, expected in (
        (("--ray-address", "auto"), "--ray-address: is for --dispatcher ray"),
        (("--storage", "mysql://me:secret@host/db"), "--storage mysql"),
    ):
        done = telescope("run", str(place), *options, *more, cwd=tmp_path)
        assert done.returncode == 2
        assert expected in done.stderr
        assert "secret" not in done.stderr
    done = telescope("audit", "x", "--dispatcher", "workers", cwd=tmp_path)
    assert done.stderr == ("telescope: --dispatcher: got 'workers', must be 'ray' or 'inline'\n")
    assert not (tmp_path / "results").exists()
