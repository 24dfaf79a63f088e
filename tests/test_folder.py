"""The results folder: whole files, one driver at a time, and a true state whoever has died."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from telescope.errors import ResumeError
from telescope.files import write_atomic, write_json
from telescope.records import CurvePoint, Point, Result, Status, Trial
from telescope.store.folder import Folder


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    made = Folder(tmp_path / "results" / "sweep")
    made.create()
    return made


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")})
    with pytest.raises(TypeError):
        write_atomic(path, 3)  # type: ignore[arg-type]
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["file.json"]


def test_curves_are_csv_named_by_their_trial(folder: Folder) -> None:
    trial = Trial(32, Point.of(lr=0.0447214, weight_decay=0.1), 0)
    curve = (CurvePoint(10, 3.5, None), CurvePoint(20, None, 2.5))
    folder.write_curve(Result(trial, Status.COMPLETE, loss=2.5, curve=curve))
    file = folder.path / "curves" / "width=32_lr=0.0447214_weight_decay=0.1_seed=0.csv"
    assert file.read_text() == "step,train_loss,held_out_loss\n10,3.5,\n20,,2.5\n"


def test_a_folder_has_one_driver(folder: Folder) -> None:
    with folder.held():
        with pytest.raises(ResumeError, match=r"in use by process \d+ on "), folder.held():
            pass
        folder.write_status({"state": "running", "running": 2})
        assert folder.read_status() == {"state": "running", "running": 2}
    with folder.held():
        pass


def test_a_driver_that_waited_holds_the_folder_alone(tmp_path: Path) -> None:
    """The first is refused and takes its empty folder away while the second waits for its lock."""
    folder = Folder(tmp_path / "sweep")
    holds, leave = threading.Event(), threading.Event()

    def wait_and_hold() -> None:
        with folder.held():
            holds.set()
            leave.wait(10)

    waiter = threading.Thread(target=wait_and_hold)
    with folder.held():
        waiter.start()
        assert not holds.wait(0.1)
    assert holds.wait(10)
    try:
        assert (folder.path / "curves").is_dir()
        with pytest.raises(ResumeError, match="in use by"), folder.held():
            pass
    finally:
        leave.set()
        waiter.join()
    assert not folder.path.exists()


def test_many_drivers_are_never_two_at_once(tmp_path: Path) -> None:
    """Each comes, is refused by something, and takes the folder away, over and over."""
    folder = Folder(tmp_path / "sweep")
    inside: list[int] = []
    most: list[int] = []

    def come_and_go() -> None:
        for _ in range(20):
            with suppress(ResumeError), folder.held():
                inside.append(1)
                most.append(len(inside))
                assert (folder.path / "curves").is_dir()
                inside.pop()

    drivers = [threading.Thread(target=come_and_go) for _ in range(4)]
    for driver in drivers:
        driver.start()
    for driver in drivers:
        driver.join()
    assert max(most) == 1


def _hold_and_die(folder: Folder) -> None:
    with folder.held():
        folder.write_status({"state": "running", "running": 2})
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_driver_is_interrupted_and_lets_go(folder: Folder) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_hold_and_die, args=(folder,))
    process.start()
    process.join(30)
    assert process.exitcode == -9
    status = folder.read_status()
    assert status is not None
    assert (status["state"], status["running"]) == ("interrupted", 0)
    with folder.held():
        pass


def test_no_heartbeat_yet(folder: Folder) -> None:
    assert folder.read_status() is None
    (folder.path / "status.json").write_text("{")
    assert folder.read_status() is None


def test_a_damaged_spec_is_a_line(folder: Folder) -> None:
    (folder.path / "spec.json").write_text("{")
    with pytest.raises(ResumeError, match=r"spec\.json: cannot be read"):
        folder.read_spec()


def test_a_place_that_cannot_hold_results(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResumeError, match="cannot be made"):
        Folder(tmp_path / "file" / "sweep").create()
