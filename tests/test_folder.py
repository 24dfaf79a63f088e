"""The results folder: whole files, one driver at a time, and a true state whoever has died."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from telescope.dispatch.folder import Folder
from telescope.errors import ResumeError
from telescope.files import write_atomic, write_json
from telescope.records import CurvePoint, Point, Result, Status, Trial


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
