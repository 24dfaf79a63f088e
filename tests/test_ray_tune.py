"""The Ray dispatcher's own promises, also against /proc, in which nobody can hide.

What both dispatchers promise is in test_dispatchers.py. A Ray takes seconds to start, so there are
three: one before the source is due, one for a whole sweep, and one that is somebody else's.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil
import pytest
from stages import Recorded, Stages

from telescope.dispatch.queue import Queue
from telescope.errors import SpecError
from telescope.records import Result, Status, Trial

ray_tune = pytest.importorskip("telescope.dispatch.ray.tune")
ray = pytest.importorskip("ray")  # after ours, which decides where Ray may listen
OBJECT_STORE_BYTES = pytest.importorskip("telescope.dispatch.ray.connect").OBJECT_STORE_BYTES

pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("ray")]


def listening_addresses() -> set[str]:
    """Return the addresses at which this process and its children accept connections."""
    me = psutil.Process()
    addresses = set()
    for process in [me, *me.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            for connection in process.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    addresses.add(connection.laddr.ip)
    return addresses


def own_folders() -> set[Path]:
    """The temporary folders of this process's Rays; other tests have theirs beside them."""
    found = set()
    for owner in Path(tempfile.gettempdir()).glob("telescope-*/owner"):
        with suppress(OSError):  # another's, just gone
            if owner.read_text() == f"process {os.getpid()}":
                found.add(owner.parent)
    return found


WORKER = r"ray::(Worker|ResourceTrainable)"
"""Name of a process that Tune has made a worker."""


def test_workers_start_before_the_source_can_be_asked() -> None:
    """They wait at the gate; a source that then refuses ends the run, one that asks gets them."""

    class Later(Stages):
        refusal: Exception | None = None

        @property
        def is_due(self) -> bool:
            return is_due()

        def ask(self) -> Sequence[Trial]:
            assert is_due(), "asked too early"
            if self.refusal:
                raise self.refusal
            return super().ask()

    # Inside, so that Ray pickles it by value: the workers cannot import this file.
    def quick(trial: Trial) -> Result:
        return Result(trial, Status.COMPLETE, loss=trial.lr)

    due: list[bool] = []

    def is_due() -> bool:
        if not due:
            started = 0
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.NoSuchProcess):  # it has just ended
                    started += bool(re.match(WORKER, " ".join(process.cmdline())))
            due.extend([True] * (started >= 1))
        return bool(due)

    with ray_tune.opened(ray_tune.Size(2)) as session:
        source = Later(2)
        ray_tune.run_ray(source, quick, session)
        assert sorted(result.loss or 0 for result in source.results.values()) == [0.01, 0.02]
        due.clear()
        source = Later(2)
        source.refusal = SpecError("no")
        with pytest.raises(SpecError, match="no"):
            ray_tune.run_ray(source, quick, session)
        assert source.results == {}


def test_a_lost_process_on_our_own_ray(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its trial has failed, another process takes its place, and nothing of Ray stays behind."""

    class Watched(Recorded):
        def tell(self, *results: Result) -> None:
            super().tell(*results)
            addresses.update(listening_addresses())
            folders.update(own_folders())
            if results[0].trial == lost:
                (tmp_path / "lost").touch()

    # Inside, for the same reason.
    def train(trial: Trial) -> Result:
        if trial == lost:
            os._exit(3)
        # Until the other process is lost, and then until two are at trials of a width.
        (tmp_path / f"{trial.width} {os.getpid()}").touch()
        wanted, number = (f"{trial.width} *", 2) if trial.width > 32 else ("lost", 1)
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob(wanted))) < number and time.monotonic() < deadline:
            time.sleep(0.02)
        return Result(trial, Status.COMPLETE, loss=trial.width * trial.lr)

    addresses: set[str] = set()
    folders: set[Path] = set()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    environment = dict(os.environ)
    source = Watched(4, 3, 2)
    lost, trials = source.stages[0][0], [trial for stage in source.stages for trial in stage]

    monkeypatch.setattr(ray_tune, "Queue", partial(Queue, retries=0))  # a new process takes 3 s
    # As on a machine on which a process takes longer to start than a trial without room may wait.
    monkeypatch.setattr(ray_tune, "START_PATIENCE", 0.0)
    monkeypatch.setattr(ray_tune, "_lacks_room", lambda: False)
    with ray_tune.opened(ray_tune.Size(2)) as session:
        ray_tune.run_ray(source, train, session)

    assert Counter(source.started) == Counter(trials)
    assert source.results[lost].status is Status.FAILED
    assert source.results[lost].reason.startswith("failed 1 times; last: The actor died")
    assert "worker process has died" in source.results[lost].reason
    assert "\n" not in source.results[lost].reason
    losses = [source.results[trial].loss for trial in trials if trial != lost]
    assert losses == [trial.width * trial.lr for trial in trials if trial != lost]
    assert len(source.workers(0) - {""}) == 2, (
        "a trial was taken from the process that starts for it"
    )
    assert len(source.workers(1)) == 2, "the loss of a process cost a worker for good"
    assert source.workers(1) == source.workers(2), "workers did not stay warm"

    assert addresses
    assert addresses <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    assert not ray.is_initialized()
    assert dict(os.environ) == environment
    assert {number: signal.getsignal(number) for number in handlers} == handlers
    assert folders
    assert not own_folders()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("waited", "has_room", "stranded"),
    [
        (10, False, False),
        (20, False, True),
        (20, True, False),
        (590, True, False),
        (610, True, True),
    ],
)
def test_how_long_a_trial_waits_for_its_process(
    waited: float, has_room: bool, stranded: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without room 15 s; with room 10 minutes, in case that process never comes."""
    monkeypatch.setattr(ray_tune, "_lacks_room", lambda: not has_room)
    driver = ray_tune._Driver(leave_at_once=False, logs=tmp_path)
    driver.serve(Queue(Recorded(2)), ahead=1)
    assert driver.suggest("one")
    assert not driver._has_stranded()
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + waited)
    assert driver._has_stranded() == stranded
    driver.began("one")
    assert not driver._has_stranded()


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1"])
def test_no_cluster_is_refused(address: str) -> None:
    refused = pytest.raises(SpecError, match=rf"--ray-address: got '{address}'")
    with refused, ray_tune.opened(ray_tune.Size(1), address=address):
        raise AssertionError("connected")
    assert not ray.is_initialized()


def test_on_a_ray_of_somebody_else() -> None:
    """Threads, a store that fails and too few GPUs; in the end all that was lent is free again."""

    class Full(Stages):
        def tell(self, *results: Result) -> None:
            if self.results:
                raise OSError("disk full")
            super().tell(*results)

    def train(trial: Trial) -> Result:
        import torch

        return Result(trial, Status.COMPLETE, loss=float(torch.get_num_threads()))

    ray.init(
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        log_to_driver=False,
        logging_level=logging.CRITICAL,
    )
    try:
        source = Full(2, 2)
        size = ray_tune.Size(1, cpus=2)
        with pytest.raises(OSError, match="disk full"), ray_tune.opened(size) as session:
            ray_tune.run_ray(source, train, session)
        assert [result.loss for result in source.results.values()] == [2.0]
        refused = pytest.raises(SpecError, match=r"compute\.gpus: got 1 .* this machine has 0")
        with refused, ray_tune.opened(ray_tune.Size(1, gpus=1)):
            raise AssertionError("there is room")
        assert ray.is_initialized()
        deadline = time.monotonic() + 5
        while ray.available_resources().get("CPU") != 2:  # Ray frees them in its own time
            assert time.monotonic() < deadline, "the sweep kept what it was lent"
            time.sleep(0.1)
        assert not ray_tune._lacks_room()
        larger = ray.util.placement_group([{"CPU": 3}])
        assert ray_tune._lacks_room()
        ray.util.remove_placement_group(larger)
    finally:
        ray.shutdown()
