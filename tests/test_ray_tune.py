"""The Ray dispatcher, against the inline one and against /proc, in which nobody can hide.

A Ray takes seconds to start, so there are three: our own for a whole sweep, one in a process that
is interrupted, and one that is somebody else's.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil
import pytest
from conftest import left_over
from stages import Stages

from telescope.dispatch.inline import run_inline
from telescope.dispatch.queue import Queue, Trainer
from telescope.errors import SpecError
from telescope.records import Result, Status, Trial

ray_tune = pytest.importorskip("telescope.dispatch.ray.tune")
ray = pytest.importorskip("ray")  # after ours, which decides where Ray may listen
OBJECT_STORE_BYTES = pytest.importorskip("telescope.dispatch.ray.connect").OBJECT_STORE_BYTES

pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("ray")]


def make_trainer(*, lost: Trial | None = None, crashed: Trial | None = None) -> Trainer:
    """A trainer of three verdicts and two mishaps.

    It is local because Ray then pickles it by value: the workers cannot import this file.
    """

    def train(trial: Trial) -> Result:
        time.sleep(0.3)
        if trial == lost:
            os._exit(3)
        if trial == crashed:
            raise ValueError("no such corpus")
        if trial.lr > 0.055:
            return Result(trial, Status.DIVERGED, reason="loss rose")
        return Result(trial, Status.COMPLETE, loss=trial.width * trial.lr)

    return train


def verdicts(source: Stages, *, without: Trial) -> set[tuple[Trial, Status, float | None]]:
    return {(r.trial, r.status, r.loss) for r in source.results.values() if r.trial != without}


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
        ray_tune.run_ray(source, make_trainer(), session)
        assert len(source.results) == 2
        due.clear()
        source = Later(2)
        source.refusal = SpecError("no")
        with pytest.raises(SpecError, match="no"):
            ray_tune.run_ray(source, make_trainer(), session)
        assert source.results == {}


def test_a_sweep_with_mishaps_on_our_own_ray(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Watched(Stages):
        def on_start(self, trial: Trial) -> None:
            started.append(trial)

        def tell(self, *results: Result) -> None:
            super().tell(*results)
            addresses.update(listening_addresses())
            folders.update(own_folders())

    addresses: set[str] = set()
    folders: set[Path] = set()
    started: list[Trial] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    environment = dict(os.environ)
    source, reference = Watched(7, 3, 2), Stages(7, 3, 2)
    lost, crashed = source.stages[0][:2]

    monkeypatch.setattr(ray_tune, "Queue", partial(Queue, retries=1))  # a new process takes 3 s
    trainer = make_trainer(lost=lost, crashed=crashed)
    with ray_tune.opened(ray_tune.Size(2)) as session:
        ray_tune.run_ray(source, trainer, session)
    run_inline(reference, make_trainer(crashed=crashed))

    assert verdicts(source, without=lost) == verdicts(reference, without=lost)
    assert Counter(started) == Counter({**dict.fromkeys(reference.results, 1), lost: 2, crashed: 2})
    assert source.results[crashed].reason.startswith(
        "failed 2 times; last: ValueError: no such corpus"
    )
    assert source.results[lost].status is Status.FAILED
    assert source.results[lost].reason.startswith("failed 2 times; last: The actor died")
    assert "worker process has died" in source.results[lost].reason
    assert "\n" not in source.results[lost].reason
    assert source.workers(1) == source.workers(2), "workers did not stay warm"
    assert len(source.workers(1)) == 2, "the loss of a process cost a worker for good"

    assert addresses
    assert addresses <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    assert not ray.is_initialized()
    assert dict(os.environ) == environment
    assert {number: signal.getsignal(number) for number in handlers} == handlers
    assert folders
    assert not own_folders()
    assert capfd.readouterr() == ("", "")


def test_interrupt_ends_all_within_seconds(tmp_path: Path) -> None:
    script = tmp_path / "sweep.py"
    script.write_text(
        textwrap.dedent("""
        import time
        from telescope.dispatch.ray.tune import Size, opened, run_ray
        from telescope.records import Point, Result, Status, Trial, TrialSource

        class Source(TrialSource):
            trials = [Trial(32, Point.of(lr=lr), 0) for lr in (0.1, 100.0, 200.0)]
            def ask(self):
                return self.trials
            def tell(self, result):
                self.trials = [t for t in self.trials if t != result.trial]
                print("told", flush=True)

        def train(trial):
            time.sleep(trial.lr)
            return Result(trial, Status.COMPLETE, loss=1.0)

        try:
            with opened(Size(2)) as session:
                run_ray(Source(), train, session)
        except KeyboardInterrupt:
            print("interrupted", flush=True)
        """)
    )
    mark = str(tmp_path)
    path = os.pathsep.join(sys.path)
    with subprocess.Popen(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": path, "TELESCOPE_TEST_MARK": mark},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as sweep:
        assert sweep.stdout is not None
        first = sweep.stdout.readline()
        assert first == "told\n", first + sweep.stdout.read()
        time.sleep(0.5)
        start = time.monotonic()
        os.killpg(sweep.pid, signal.SIGINT)  # a terminal's Ctrl-C reaches the whole group
        assert sweep.stdout.read() == "interrupted\n"
    assert sweep.wait() == 0
    assert time.monotonic() - start < 6
    assert not left_over(mark, patience=3)


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
    finally:
        ray.shutdown()
