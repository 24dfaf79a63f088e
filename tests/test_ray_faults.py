"""Ray's parts killed in mid-sweep: the same command goes on, to the undisturbed inline answer.

The trainer is the real one, so that "the same" means bit for bit.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import pytest
from conftest import quiet
from faults import Tally, answers, finish, spec_of, start

from telescope import Spec
from telescope.dispatch.ray import session as ray_session
from telescope.dispatch.ray.session import marked
from telescope.errors import LostError
from telescope.packs import trainer
from telescope.records import Result, Trial
from telescope.sweep.run import Options, run
from telescope.train import loop

pytest.importorskip("telescope.dispatch.ray.tune")

pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("ray")]

PARTS = {"worker": "ray::", "raylet": "raylet", "head": "gcs_server"}
LOST = {LostError.exit_code, 1}
"""Exit codes of a driver whose Ray has died; 1 if Ray's own library ends it during the start."""


def run_sweep(place: Path, dispatcher: str) -> None:
    """One `telescope run`; on Ray each trial takes a little longer, to be killed in."""
    real, pause = trainer.PackedTrainer, 0.3 if dispatcher == "ray" else 0.0

    def logged(config: Any) -> Callable[[Trial], Result]:
        def train(trial: Trial) -> Result:  # local, so that Ray pickles it by value
            with (place / "starts.log").open("a") as log:
                log.write(f"{trial}\n")
            time.sleep(pause)
            return real(config)(trial)

        return train

    options = Options(place / "results", workers=2, dispatcher=dispatcher, check=False)
    with patch.object(trainer, "PackedTrainer", logged):
        try:
            run(Spec.from_dict(spec_of(place)), options, quiet)
        except LostError:
            os._exit(LostError.exit_code)


def owner_of(place: Path) -> str:
    return str((place / "results" / "tiny").resolve())


def part_of_ray(place: Path, part: str) -> psutil.Process | None:
    """A process of the sweep's own Ray; of the workers, one that trains."""
    for number in marked(owner_of(place)):
        try:
            process = psutil.Process(number)
            line = " ".join(process.cmdline())
        except psutil.Error:
            continue
        is_it = process.name() == PARTS[part] if part != "worker" else "Trainable" in line
        if is_it or (part == "worker" and "::Worker" in line):
            return process
    return None


def kill_part(driver: BaseProcess, place: Path, part: str, pause: float) -> bool:
    """Kill a part of the running sweep after it has been there for a while; False if too late."""
    if part == "driver":
        driver.join(4 + pause)
        is_running = driver.exitcode is None
        driver.kill()
        return is_running
    deadline = time.monotonic() + 60
    while not (victim := part_of_ray(place, part)):
        if driver.exitcode is not None or time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    driver.join(pause)
    victim = part_of_ray(place, part)
    if driver.exitcode is not None or not victim:
        return False
    victim.send_signal(signal.SIGKILL)
    return True


def go_through(place: Path, parts: Iterator[str], moments: random.Random, tally: Tally) -> None:
    """Run one sweep to its end, with a fault in each run until one is too late."""
    tally.new_sweep()
    for part in parts:
        driver = start(run_sweep, place, "ray")
        was_killed = kill_part(driver, place, part, moments.uniform(0, 2.5))
        tally.faults += was_killed
        code = finish(driver, 240)
        tally.look(place)
        if code == 0:
            return
        assert was_killed, f"exit code {code} without a fault"
        assert code in ({-signal.SIGKILL} if part == "driver" else LOST), (part, code)
    assert finish(start(run_sweep, place, "ray")) == 0
    tally.look(place)


def left_behind(place: Path) -> list[Any]:
    """Return processes and temporary folders that a sweep should have removed at its end."""
    folders = []
    for owner in Path(tempfile.gettempdir()).glob("telescope-*/owner"):
        with suppress(OSError):  # another's, just gone
            if owner.read_text() == owner_of(place):
                folders.append(owner.parent)
    return [*marked(owner_of(place)), *folders]


@pytest.mark.parametrize(
    ("parts", "sweeps"),
    [
        (["raylet", "driver"], 1),
        pytest.param(["worker", "driver", "raylet", "head"], 5, marks=pytest.mark.slow),
    ],
)
def test_killed_on_ray_it_ends_as_undisturbed_inline(
    parts: list[str], sweeps: int, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    assert finish(start(run_sweep, plain, "inline")) == 0
    expected, tally, moments = answers(plain), Tally(), random.Random(0)
    wanted = len(parts) * sweeps
    endless = itertools.cycle(parts)
    while tally.faults < wanted:
        place = tmp_path / f"sweep-{tally.sweeps}"
        place.mkdir()
        few = itertools.islice(endless, wanted - tally.faults if sweeps == 1 else 5)
        go_through(place, few, moments, tally)
        assert answers(place) == expected
        assert not left_behind(place)
    assert not tally.lost
    assert not tally.twice
    record_property("kill -9 of Ray's worker, raylet, head or driver", str(tally))


def run_with_checkpoints(place: Path, dispatcher: str) -> None:
    """One `telescope run`; each step of each trial is written down and takes 20 ms."""
    real = trainer.PackedTrainer

    def logged(config: Any) -> Callable[[Trial], Result]:
        def train(trial: Trial) -> Result:  # local, so that Ray pickles it by value
            take_step = loop.take_step

            def slow(*arguments: Any) -> Any:
                with (place / "steps.log").open("a") as log:
                    log.write(f"{trial} {os.getpid()} {arguments[4]}\n")
                time.sleep(0.02)
                return take_step(*arguments)

            with patch.object(loop, "take_step", slow):
                return real(config)(trial)

        return train

    steps = {"steps": 40, "evals": 4, "checkpoint_every": 4}
    lr = {"low": 0.01, "high": 0.04, "points": 2}
    tables = {
        "ladder": {"widths": [16], "policy": "paper"},
        "axes": {"lr": lr, "weight_decay": {"value": 0.1}},
        "train": steps,
    }
    options = Options(place / "results", workers=2, dispatcher=dispatcher, check=False)
    with patch.object(trainer, "PackedTrainer", logged):
        run(Spec.from_dict(spec_of(place, **tables)), options, quiet)


def test_a_checkpoint_is_gone_on_from_by_another_worker(tmp_path: Path) -> None:
    plain, killed = tmp_path / "plain", tmp_path / "killed"
    for place in (plain, killed):
        place.mkdir()
    assert finish(start(run_with_checkpoints, plain, "inline")) == 0
    driver = start(run_with_checkpoints, killed, "ray")
    kept, deadline = killed / "results" / "tiny" / "checkpoints", time.monotonic() + 90
    while not (found := list(kept.glob("*/step-000000016.json"))):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    victim = found[0].parent.name
    log = [line.split(" ") for line in (killed / "steps.log").read_text().splitlines()]
    os.kill(next(int(pid) for trial, pid, _ in log if trial == victim), signal.SIGKILL)
    assert finish(driver) == 0
    steps: dict[str, list[int]] = {}
    for line in (killed / "steps.log").read_text().splitlines():
        trial, pid, step = line.split(" ")
        if trial == victim:
            steps.setdefault(pid, []).append(int(step))
    first, second = steps.values()
    assert second == list(range(second[0], 40))
    assert 16 <= second[0] <= first[-1] + 1
    assert answers(killed) == answers(plain)
    assert not kept.exists()


def test_a_fork_of_the_raylet_is_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until it runs its own program it is called raylet too; then it seemed to have died."""
    names = {10: "gcs_server", 11: "raylet", 12: "raylet"}
    monkeypatch.setattr(ray_session, "marked", lambda owner: [12, 10, 11])
    monkeypatch.setattr(ray_session, "_name", names.get)
    ray = ray_session.LocalRay("me")
    assert ray.is_whole()
    names[12] = "ray::IDLE"
    assert ray.is_whole()
    del names[11]
    assert not ray.is_whole()


def test_workers_that_ray_ends_to_free_memory_are_the_machines_fault() -> None:
    """Tune raises this as a RuntimeError; one of our own stays what it is."""
    from ray.exceptions import OutOfMemoryError

    from telescope.dispatch.ray.connect import _lost_where_ray_fails

    evicted = OutOfMemoryError("1 worker(s) were killed due to\nthe node running low on memory.")
    said = r"running low on memory\.; free memory or lower compute.workers; .* same command goes on"
    with pytest.raises(LostError, match=said), _lost_where_ray_fails():
        raise RuntimeError(f"Caught unexpected exception: {evicted}") from evicted
    with pytest.raises(RuntimeError, match=r"^ours$"), _lost_where_ray_fails():
        raise RuntimeError("ours") from ValueError("theirs")


def test_only_its_own_leftovers_are_reaped(tmp_path: Path) -> None:
    from telescope.dispatch.ray.session import MARK, reap

    mine, other = str(tmp_path / "mine"), str(tmp_path / "mine-too")
    sleepers = [
        psutil.Popen(["sleep", "60"], env={**os.environ, MARK: owner}) for owner in (mine, other)
    ]
    sessions = [Path(tempfile.mkdtemp(prefix="telescope-")) for _ in sleepers]
    for session, owner in zip(sessions, (mine, other), strict=True):
        (session / "owner").write_text(owner)
    try:
        reap(mine)
        assert sleepers[0].wait(5) == -signal.SIGKILL
        assert sleepers[1].is_running()
        assert [session.exists() for session in sessions] == [False, True]
    finally:
        reap(other)
        sleepers[1].wait(5)
    assert not sessions[1].exists()
