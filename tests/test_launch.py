"""`telescope launch`: the run that a sweep's answer asks for, started, gone on with and shown."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from commands import from_json, output, telescope
from conftest import quiet, tiny_spec

from telescope import Spec
from telescope.answer.finished import Finished, open_result
from telescope.errors import RefusedError, ResumeError, SpecError
from telescope.records import Trial
from telescope.sweep import launching
from telescope.sweep.launch_asked import Launch, check_proven
from telescope.sweep.run import Options, run
from telescope.target.folder import RunFolder
from telescope.target.ranks import Ranks
from telescope.target.train import read_run, train_target
from telescope.train.loop import TelescopeTrainer


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory, corpus_file: Path) -> Path:
    """A folder with the results of a finished sweep."""
    place = tmp_path_factory.mktemp("sweep")
    options = Options(place / "results", dispatcher="inline", check=False)
    run(Spec.from_dict(tiny_spec(corpus_file)), options, quiet)
    return place


@pytest.fixture
def place(sweep: Path, tmp_path: Path) -> Path:
    """A copy of it of one's own."""
    shutil.copytree(sweep / "results", tmp_path / "results")
    return tmp_path


def finished(place: Path) -> Finished:
    return open_result("tiny", place / "results")


def test_the_target_is_the_sweeps_answer_at_its_width(place: Path) -> None:
    opened = finished(place)
    settings = opened.transfer()
    folder = launching.prepare(opened, Launch())
    assert folder.path == place / "results" / "tiny" / "target" / "width-64"
    made = read_run(folder)
    assert (made.trial.width, made.trial.point) == (64, settings.point)
    assert made.as_dict()["groups"] == settings.as_dict()["groups"]
    assert made.parameters > 0
    assert sum(made.flops.values()) == pytest.approx(opened.target_flops / made.steps)
    result = train_target(folder.path, Launch().manner, Ranks())
    trial = Trial(64, settings.point, 0)
    assert result["loss"] == TelescopeTrainer(made.config)(trial).loss


def test_other_steps_rescale_the_decay_and_have_a_folder_of_their_own(place: Path) -> None:
    opened = finished(place)
    folder = launching.prepare(opened, Launch(width=32, steps=8, seed=5))
    assert folder.path.name == "width-32-steps-8"
    made = read_run(folder)
    assert made.steps == 8
    assert made.trial.seed == 5
    swept = opened.transfer(width=32).point.weight_decay
    assert made.trial.point.weight_decay == pytest.approx(swept / 2)


def test_a_folder_with_another_run_is_refused_with_what_differs(place: Path) -> None:
    opened = finished(place)
    launching.prepare(opened, Launch())
    launching.prepare(opened, Launch())
    with pytest.raises(ResumeError, match=r"clip: 0.0, now 1.0; train.precision: fp32, now bf16"):
        launching.prepare(opened, Launch(clip=1.0, precision="bf16"))
    with pytest.raises(ResumeError, match="width: 64, now 32"):
        launching.prepare(opened, Launch(width=32, run="width-64"))
    launching.prepare(opened, Launch(clip=1.0, run="clipped"))


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "x" * 101])
def test_a_runs_name_is_no_path(name: str, place: Path) -> None:
    with pytest.raises(SpecError, match="--run: got"):
        launching.prepare(finished(place), Launch(run=name))


def test_an_answer_that_is_not_to_be_relied_on_is_refused(place: Path) -> None:
    opened = finished(place)
    fail: Any = SimpleNamespace(verdict="FAIL", problems=("the optimum drifts",))
    with pytest.raises(RefusedError, match="certificate FAIL: the optimum drifts; --unproven"):
        check_proven(opened, fail, Launch())
    check_proven(opened, fail, Launch(unproven=True))
    check_proven(opened, SimpleNamespace(verdict="WARN", problems=()), Launch())
    ladder: Any = SimpleNamespace(is_finished=False)
    with pytest.raises(RefusedError, match="has not finished; go on with `telescope run`"):
        check_proven(replace(opened, ladder=ladder), None, Launch())


def test_more_ranks_than_sequences_are_refused(place: Path) -> None:
    with pytest.raises(SpecError, match="--workers: got 9, must be at most the batch's 4"):
        Ranks(0, 9).rows(4)


def test_too_many_ranks_are_refused_before_any_starts(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("telescope.target.launcher.launch", None)
    said = output(place, "launch", "tiny", "--workers", "99", code=2)
    assert said.startswith("telescope: --workers: got 99, must be at most the batch's ")


def test_prepare_writes_the_folder_and_says_how_to_start_it(place: Path) -> None:
    said = output(place, "launch", "tiny", "--prepare")
    assert "torchrun -m telescope.target results/tiny/target/width-64" in said
    (state,) = from_json("status", "tiny", cwd=place)["targets"]
    assert (state["run"], state["state"], state["step"]) == ("width-64", "prepared", None)
    assert "target width-64: prepared; `telescope launch` starts it" in output(
        place, "status", "tiny"
    )


def test_without_a_target_nothing_is_said_of_one(place: Path) -> None:
    assert "targets" not in from_json("status", "tiny", cwd=place)
    assert "targets" not in from_json("show", "tiny", cwd=place)
    assert "width-64" not in output(place, "show", "tiny")


def test_bad_options_are_said_in_one_line(place: Path) -> None:
    assert "--precision: got 'fp8', must be" in output(
        place, "launch", "tiny", "--precision", "fp8", code=2
    )
    assert "--workers: must be given on a cluster" in output(
        place, "launch", "tiny", "--ray-address", "127.0.0.1:1", code=2
    )
    assert "no sweep of that name" in output(place, "launch", "nothing", code=2)


def test_a_run_in_use_is_left_alone(place: Path) -> None:
    folder = launching.prepare(finished(place), Launch())
    with folder.held():
        said = output(place, "launch", "tiny", code=2)
    assert f"in use by process {os.getpid()}" in said


# Ray warns of its own defaults.
OWN_WARNING = "ignore:.use_.* is deprecated"


@pytest.mark.ray
@pytest.mark.filterwarnings(OWN_WARNING)
def test_launched_on_ray_and_shown(place: Path) -> None:
    done = telescope("launch", "tiny", "--cpus-per-worker", "1", cwd=place)
    assert done.returncode == 0, done.stderr
    assert "width 64: held-out loss" in done.stdout
    folder = RunFolder(place / "results" / "tiny" / "target" / "width-64")
    made, result = read_run(folder), folder.read_result()
    assert result["loss"] == TelescopeTrainer(made.config)(made.trial).loss
    assert json.loads(output(place, "launch", "tiny", "--json")) == result, "it has ended"
    (state,) = from_json("show", "tiny", cwd=place)["targets"]
    assert (state["state"], state["loss"]) == ("finished", result["loss"])
    assert f"width-64: finished, loss {result['loss']:.4f}" in output(place, "show", "tiny")
    files = "checkpoints curve.csv lock result.json run.json status.json writer.lock"
    assert sorted(path.name for path in folder.path.iterdir()) == files.split()


@pytest.mark.ray
@pytest.mark.filterwarnings(OWN_WARNING)
def test_a_ranks_error_is_said_once_and_not_tried_again(place: Path) -> None:
    folder = launching.prepare(finished(place), Launch())
    data = folder.read_run() or {}
    data["config"]["corpus_digest"] = "0" * 64
    (folder.path / "run.json").write_text(json.dumps(data))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launching, "prepare", lambda *_: folder)
        said = output(place, "launch", "tiny", code=2)
    assert "this worker reads a corpus with hash" in said
    assert said.count("telescope:") == 1
