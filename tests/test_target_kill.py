"""kill -9 of a target run between any two of its writes, of one rank of several, and on Ray."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import psutil
import pytest
from conftest import ROOT, as_toml, left_over, tiny_spec
from faults import can_trace, kill_before_write, memory_folder
from safetensors.torch import load_file
from targets import codes_of, curve, made, on_ranks, result_of, tiny_run

from telescope.target.ranks import Ranks
from telescope.target.record import Manner
from telescope.target.train import train_target

MANNER = Manner(checkpoint_every=3)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    with memory_folder(tmp_path) as folder:
        yield folder


def train_alone(folder: Path) -> None:
    train_target(folder, MANNER, Ranks())


def whole_checkpoints(folder: Path) -> list[int]:
    """The steps of all checkpoints under their final name, each of which must be whole."""
    steps = []
    for path in (folder / "checkpoints").glob("step-*"):
        state = json.loads((path / "state.json").read_text())
        assert path.name == f"step-{state['step']}"
        for file in ("model.safetensors", "optimizer-0-of-1.safetensors"):
            assert load_file(path / file)
        steps.append(state["step"])
    return steps


@pytest.mark.parametrize("points", [3, pytest.param(None, marks=pytest.mark.slow)])
def test_killed_between_two_writes(
    points: int | None,
    corpus_file: Path,
    place: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """A tracer stops the run before each system call that changes its folder."""
    if not can_trace():
        pytest.skip("needs x86-64 Linux that lets processes be traced")
    run = tiny_run(corpus_file)
    whole = made(place / "whole", run).path
    writes = kill_before_write(10**9, whole, train_alone, whole)
    assert result_of(whole)["step"] == 12
    for what in ("rename /checkpoints/.step-3", "rename /checkpoints/.step-6.tmp/.model"):
        assert any(what.split()[0] in w and what.split()[1] in w for w in writes), what
    numbers = range(len(writes))
    picked = list(numbers) if points is None else random.Random(0).sample(numbers, points)
    for number in picked:
        folder = made(place / f"killed-{number}", run).path
        done = kill_before_write(number, folder, train_alone, folder)
        kept = max(whole_checkpoints(folder), default=0)
        step = json.loads((folder / "status.json").read_text())["step"] if kept else 0
        assert step <= kept + 3, "at most the steps since the last checkpoint are lost"
        if not (folder / "result.json").exists():
            train_alone(folder)
        assert result_of(folder) == result_of(whole), (number, done[-1:])
        assert curve(folder) == curve(whole)
        assert not list(folder.rglob("*.tmp")), "nothing half-written stays"
    record_property(f"kill -9 before one of {len(writes)} writes of a target run", len(picked))


def test_the_others_end_when_one_rank_is_killed(corpus_file: Path, place: Path) -> None:
    """So that whoever has started them sees it, and starts all of them again."""
    run = tiny_run(corpus_file)
    whole = made(place / "whole", run).path
    on_ranks(2, whole, checkpoint_every=3)
    folder = made(place / "killed", run).path
    codes = codes_of([None, 7], folder, MANNER)
    assert codes == [1, -signal.SIGKILL], "the first rank has noticed"
    on_ranks(2, folder, checkpoint_every=3)
    assert result_of(folder) == result_of(whole)
    assert curve(folder) == curve(whole)


def wait_for(condition: Callable[[], Any], seconds: float = 120) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(0.1)
    return found


def step_of(folder: Path) -> int:
    try:
        return int(json.loads((folder / "status.json").read_text())["step"])
    except (OSError, ValueError):
        return 0


@pytest.fixture
def output(tmp_path: Path) -> Iterator[IO[str]]:
    """The file that takes what all commands print."""
    with (tmp_path / "log").open("a") as file:
        yield file


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("kills_driver", [False, True])
def test_on_ray_a_killed_rank_a_killed_driver_and_ctrl_c(
    kills_driver: bool, corpus_file: Path, tmp_path: Path, output: IO[str]
) -> None:
    """One run survives all of them, and is that of an undisturbed one, bit for bit."""
    tables = {"train": {"steps": 60, "evals": 1}, "target": {"width": 32, "steps": 1000}}
    spec = tiny_spec(corpus_file, ladder={"widths": [16]}, budget={"max_over_target": 99}, **tables)
    (tmp_path / "tiny.toml").write_text(as_toml(spec))
    mark = f"{os.getpid()}-{time.monotonic_ns()}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TELESCOPE_TEST_MARK": mark}

    log = Path(output.name)

    def telescope(*arguments: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "telescope", *arguments],
            cwd=tmp_path,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )

    def launch() -> subprocess.Popen[bytes]:
        return telescope(
            *("launch", "tiny", "--workers", "2", "--cpus-per-worker", "1"),
            *("--checkpoint-every", "100"),
        )

    assert telescope("run", "tiny.toml", "--dispatcher", "inline", "--no-check").wait(120) == 0
    folder = tmp_path / "results" / "tiny" / "target" / "width-32"
    driver = launch()
    wait_for(lambda: step_of(folder) > 110)
    ranks = [p for p in left_over(mark) if is_new_rank(p, [])]
    assert len(ranks) == 2
    ranks[1].kill()
    wait_for(lambda: [p for p in left_over(mark) if is_new_rank(p, ranks)])
    before = step_of(folder)
    wait_for(lambda: step_of(folder) > before + 60)
    if kills_driver:
        driver.kill()
        driver.wait()
        driver = launch()  # the ranks of the killed one train on until this one ends them
        ranks = [p for p in left_over(mark) if is_new_rank(p, [])]
        wait_for(lambda: [p for p in left_over(mark) if is_new_rank(p, ranks)])
        reached = step_of(folder)
        wait_for(lambda: step_of(folder) > reached + 60)
    driver.send_signal(signal.SIGINT)
    assert driver.wait(120) == 130, log.read_text()
    assert "interrupted; the same command goes on" in log.read_text()
    driver = launch()
    assert driver.wait(300) == 0, log.read_text()
    assert not left_over(mark, patience=30)
    whole = tmp_path / "whole"
    whole.mkdir()
    (whole / "run.json").write_bytes((folder / "run.json").read_bytes())
    on_ranks(2, whole, checkpoint_every=100)
    assert curve(folder) == curve(whole)
    assert result_of(folder) == result_of(whole)


def is_new_rank(process: psutil.Process, old: list[psutil.Process]) -> bool:
    try:
        return process not in old and any("RayTrainWorker" in part for part in process.cmdline())
    except psutil.Error:
        return False
