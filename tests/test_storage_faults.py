"""Disk full or read-only, folder vanished, database locked, cut off, newer: a line, and it goes on.

The small disk and the read-only one are real, tiny file systems in memory, because root passes over
permissions; where this machine forbids to mount them, those two tests are skipped.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from commands import telescope
from conftest import quiet
from faults import answers, run_fast, spec_of

from telescope import Spec
from telescope.answer.finished import open_result
from telescope.errors import ResumeError, StoreError, TelescopeError
from telescope.records import Result, Trial
from telescope.store import database, store
from telescope.sweep.run import Options, run
from telescope.train import loop

TRIALS = 9


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The answers of an undisturbed sweep."""
    place = tmp_path_factory.mktemp("undisturbed")
    run_fast(place, {})
    return answers(place)


@pytest.fixture
def at_fourth(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], None]:
    """Arrange that something happens while the fourth trial is being trained."""

    def arrange(happens: Callable[[], None]) -> None:
        add, calls = store.Store.add, []

        def adding(self: store.Store, result: Result) -> None:
            calls.append(result)
            if len(calls) == 4:
                happens()
            add(self, result)

        monkeypatch.setattr(store.Store, "add", adding)

    return arrange


def disturbed(place: Path, message: str) -> None:
    """Run until the fault, which must be one line that says what to do."""
    with pytest.raises(StoreError, match=message) as caught:
        run_fast(place, {})
    text = str(caught.value)
    assert "\n" not in text
    assert "the same command goes on" in text


def number_stored(place: Path) -> int:
    return len(open_result("tiny", place / "results").results)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this machine does not let us mount a small file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk(disk: Path, expected: dict[str, Any], at_fourth: Any) -> None:
    ballast = disk / "ballast"

    def fill() -> None:
        with ballast.open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(4096))

    at_fourth(fill)
    disturbed(disk, r"full|No space left on device")
    assert number_stored(disk) == 3  # read on the full disk
    ballast.unlink()
    run_fast(disk, {})
    assert answers(disk) == expected


def test_a_read_only_disk(disk: Path, expected: dict[str, Any], at_fourth: Any) -> None:
    def remount(how: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{how}", str(disk)], check=True)

    run_fast(disk, {"ladder": {"widths": [16]}})
    remount("ro")
    try:
        with pytest.raises(StoreError, match=r"Read-only file system.*the same command goes on"):
            run_fast(disk, {})
        assert number_stored(disk) == 6
        shown = telescope("show", disk / "results" / "tiny", cwd=disk)
        assert (shown.returncode, shown.stderr) == (0, "")
    finally:
        remount("rw")
    run_fast(disk, {})
    assert answers(disk) == expected


def test_a_folder_that_vanishes(place: Path, expected: dict[str, Any], at_fourth: Any) -> None:
    folder, elsewhere = place / "results" / "tiny", place / "elsewhere"
    at_fourth(lambda: folder.rename(elsewhere))
    disturbed(place, "tiny")
    assert not (folder / "spec.json").exists(), "nothing is written where the folder was"
    shutil.rmtree(folder, ignore_errors=True)
    elsewhere.rename(folder)
    assert number_stored(place) >= 3
    run_fast(place, {})
    assert answers(place) == expected


def test_a_database_that_is_deleted_in_mid_run(place: Path, at_fourth: Any) -> None:
    """SQLite would write on into the deleted file; nothing more may count as stored."""
    database = place / "results" / "tiny" / "trials.db"
    at_fourth(database.unlink)
    disturbed(place, r"trials\.db")
    with pytest.raises(ResumeError, match=r"trials\.db: the sweep's results are missing; put"):
        run_fast(place, {})
    assert not database.exists()


def test_a_locked_database(
    place: Path, expected: dict[str, Any], at_fourth: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "LOCK_TIMEOUT", 0.05)
    locks: list[sqlite3.Connection] = []

    def lock() -> None:
        other = sqlite3.connect(place / "results" / "tiny" / "trials.db")
        other.execute("BEGIN EXCLUSIVE")
        locks.append(other)

    at_fourth(lock)
    disturbed(place, "cannot keep a result: database is locked")
    with pytest.raises(TelescopeError, match="database is locked"):
        open_result("tiny", place / "results")
    locks[0].close()
    assert number_stored(place) == 3
    run_fast(place, {})
    assert answers(place) == expected


def test_a_database_cut_off_anywhere_is_never_read_as_fewer_results(
    place: Path, expected: dict[str, Any]
) -> None:
    run_fast(place, {})
    database = place / "results" / "tiny" / "trials.db"
    whole = database.read_bytes()
    refused = 0
    for length in [0, 1, 99, 100, 4095, *range(4096, len(whole), 4096 * 3), len(whole) - 1]:
        database.write_bytes(whole[:length])
        try:
            assert number_stored(place) == TRIALS, length
        except (StoreError, ResumeError):
            refused += 1
            with pytest.raises((StoreError, ResumeError), match=r"^[^\n]+$"):
                run_fast(place, {})
            assert database.read_bytes()[:length] == whole[:length], "what is there stays"
    assert refused >= 10
    database.write_bytes(whole)
    run_fast(place, {})
    assert answers(place) == expected


def test_what_a_newer_version_wrote_is_left_alone(place: Path) -> None:
    run_fast(place, {})
    record = place / "results" / "tiny" / "spec.json"
    before = json.loads(record.read_text())
    record.write_text(json.dumps({**before, "format": 2}))
    for attempt in (lambda: run_fast(place, {}), lambda: open_result("tiny", place / "results")):
        with pytest.raises(ResumeError, match=r"format 2, this version .* reads up to 1; use the"):
            attempt()
    record.write_text(json.dumps(before))
    database = place / "results" / "tiny" / "trials.db"
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = 'v99.0.0'")
    with pytest.raises(ResumeError, match=r"cannot be opened: .*v99|no longer compatible"):
        run_fast(place, {})


def test_half_written_files_of_a_killed_driver_go(place: Path) -> None:
    run_fast(place, {"ladder": {"widths": [16]}})
    folder = place / "results" / "tiny"
    (folder / ".spec.json.abc.tmp").write_text("{")
    (folder / "curves" / ".x.csv.abc.tmp").write_text("")
    run_fast(place, {})
    assert not list(folder.rglob(".*"))


def test_a_bug_in_the_program_is_a_line_too(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("unforeseen\nand long")

    monkeypatch.setattr("telescope.spec.catalog.list_results", broken)
    done = telescope("ls", cwd=place)
    expected = "telescope: a bug in telescope: RuntimeError: unforeseen; --debug shows where\n"
    assert (done.returncode, done.stderr) == (2, expected)


def test_too_many_failures_stop_the_sweep_and_the_same_command_tries_again(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(config: Any, trial: Trial) -> Result:
        raise OSError("no such device")

    with monkeypatch.context() as broken:
        broken.setattr(loop, "train", fails)
        options = Options(place / "results", dispatcher="inline", check=False)
        ladder = run(Spec.from_dict(spec_of(place)), options, quiet).ladder
    assert ladder.stuck is not None
    assert "no such device" in ladder.stuck
    run_fast(place, {})
    assert os.listdir(place / "results" / "tiny" / "curves")
    assert not open_result("tiny", place / "results").ladder.stuck
