"""`telescope launch` of a sweep whose trainer is somebody else's: its command, our bookkeeping."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from commands import from_json, output, telescope
from conftest import ROOT, as_toml
from foreign_specs import foreign_spec

TRAINER = """
import json, os, pathlib, sys, time
width, lr, decay, steps, seed, folder = sys.argv[1:]
kept = pathlib.Path(folder, "step")
first = int(kept.read_text()) if kept.exists() else 0
print(f"from step {first}", flush=True)
for step in range(first, int(steps)):
    print(json.dumps({"step": step + 1, "loss": 3 - step / int(steps)}), flush=True)
    kept.write_text(str(step + 1))
    if os.environ.get("SLOW"):
        time.sleep(0.02)
    if os.environ.get("FAIL") and step == 5:
        sys.exit("out of luck")
loss = float("nan") if os.environ.get("NAN") else 1 + abs(float(lr) - 0.04) + 1 / int(width)
print(json.dumps({"loss": loss, "step": int(steps)}))
"""
COMMAND = ["{python}", "train.py", "{width}", "{lr}", "{weight_decay}", "{steps}", "{seed}"]
COMMAND += ["{trial_folder}"]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a finished sweep of a script."""
    (tmp_path / "train.py").write_text(TRAINER)
    parameters = {"16": 100, "32": 400, "64": 1600}
    trainer = {"command": COMMAND, "steps": 10}
    spec = foreign_spec(
        trainer=trainer, cost={"parameters": parameters}, budget={"max_over_target": 99}
    )
    (tmp_path / "sweep.toml").write_text(as_toml(spec))
    assert telescope("run", "sweep.toml", "--dispatcher", "inline", cwd=tmp_path).returncode == 0
    return tmp_path


def read(place: Path, file: str, run: str = "width-64") -> dict[str, Any]:
    path = place / "results" / "foreign" / "target" / run / file
    data: dict[str, Any] = json.loads(path.read_text())
    return data


def test_the_command_runs_at_the_target_with_the_answer(place: Path) -> None:
    said = output(place, "launch", "foreign")
    answer = from_json("show", "foreign", cwd=place)["target"]
    result = read(place, "result.json")
    assert result["loss"] == 1 + abs(answer["lr"] - 0.04) + 1 / 64
    assert (result["width"], result["steps"], result["diverged"]) == (64, 10, False)
    assert f"held-out loss {result['loss']:.4f} after 10 steps" in said
    record = read(place, "run.json")
    assert record["point"]["lr"] == answer["lr"]
    assert "config" not in record, "what only the trainer knows"
    curve = (place / "results/foreign/target/width-64/curve.csv").read_text().splitlines()
    assert curve[0] == "step,tokens,loss,val_loss,lr,seconds"
    assert len(curve) == 11
    assert f"width-64: finished, loss {result['loss']:.4f}" in output(place, "status", "foreign")
    assert from_json("launch", "foreign", cwd=place) == result, "it is not run again"


def test_other_steps_reach_the_command_and_are_another_run(place: Path) -> None:
    output(place, "launch", "foreign", "--steps", "20", "--seed", "3")
    record = read(place, "run.json", "width-64-steps-20")
    assert (record["steps"], record["seed"]) == (20, 3)
    assert record["point"]["weight_decay"] == pytest.approx(0.15)
    said = output(place, "launch", "foreign", "--steps", "20", code=2)
    assert "seed: 3, now 0" in said


def test_a_failure_keeps_no_result_and_the_same_command_goes_on(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAIL", "1")
    said = output(place, "launch", "foreign", code=2)
    assert "the trainer failed: exit code 1 out of luck; the same command starts it again" in said
    assert not (place / "results/foreign/target/width-64/result.json").exists()
    monkeypatch.delenv("FAIL")
    output(place, "launch", "foreign")
    log = next((place / "results/foreign/target/width-64/logs").glob("*.out")).read_text()
    assert log.startswith("from step 6"), "from the trainer's own checkpoint"


def test_a_divergence_is_the_answer_no(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NAN", "1")
    done = telescope("launch", "foreign", cwd=place)
    assert done.returncode == 1
    assert "diverged" in done.stdout
    assert read(place, "result.json")["loss"] is None


def test_options_that_the_trainer_would_not_see_are_refused(place: Path) -> None:
    said = output(place, "launch", "foreign", "--clip", "1", "--shard", "--workers", "2", code=2)
    assert "--workers, --clip, --shard: for models that telescope trains" in said


def test_an_edited_trainer_is_another_run(place: Path) -> None:
    output(place, "launch", "foreign")
    with (place / "train.py").open("a") as script:
        script.write("print()\n")
    assert "trainer.train.py (hash)" in output(place, "launch", "foreign", code=2)


def test_ctrl_c_ends_the_trainer_and_says_how_to_go_on(place: Path) -> None:
    command = [sys.executable, "-m", "telescope", "launch", "foreign", "--steps", "2000"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SLOW": "1"}
    driver = subprocess.Popen(command, cwd=place, env=environment, stderr=subprocess.PIPE)
    folder = place / "results/foreign/target/width-64-steps-2000"
    deadline = time.monotonic() + 60
    while not (folder / "status.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    (state,) = from_json("status", "foreign", cwd=place)["targets"]
    assert (state["state"], state["steps"]) == ("running", 2000)
    driver.send_signal(signal.SIGINT)
    _, said = driver.communicate(timeout=60)
    assert driver.returncode == 130
    assert b"interrupted; the same command goes on" in said
    (state,) = from_json("status", "foreign", cwd=place)["targets"]
    assert state["state"] == "interrupted"
    (kept,) = (folder / "trials").glob("*/step")
    step = kept.read_text()
    time.sleep(0.3)
    assert kept.read_text() == step, "nothing trains on"
