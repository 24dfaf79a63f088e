"""A real Ray cluster of two nodes on loopback, one of which is killed in mid-stage."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import as_toml
from faults import answers, spec_of

pytest.importorskip("telescope.dispatch.ray.tune")

pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("ray")]

MARK = "TELESCOPE_TEST_CLUSTER"
SWITCHES = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",  # with 0 Ray takes no second node
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


class Cluster:
    """A head with one CPU, and a second node with one CPU, each of whose processes is marked."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self.address = f"127.0.0.1:{free_port()}"

    def start(self) -> None:
        port = self.address.split(":")[1]
        self._start("head", "--head", f"--port={port}", f"--temp-dir={self._folder}")
        self._start("second", f"--address={self.address}")

    def _start(self, name: str, *arguments: str) -> None:
        ray = str(Path(sys.executable).parent / "ray")
        common = ["--num-cpus=1", "--node-ip-address=127.0.0.1", "--object-store-memory=100000000"]
        command = [ray, "start", *arguments, *common, "--include-dashboard=false"]
        if name != "head":
            command.pop()
        environment = {**os.environ, **SWITCHES, MARK: f"{self._folder}/{name}"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=90)
        assert done.returncode == 0, done.stdout + done.stderr

    def kill(self, name: str) -> int:
        """End every process of a node at once, as a machine that loses power."""
        processes = [p for p in psutil.process_iter() if mark_of(p) == f"{self._folder}/{name}"]
        for process in processes:
            process.send_signal(signal.SIGKILL)
        return len(processes)


def mark_of(process: psutil.Process) -> str | None:
    try:
        return process.environ().get(MARK)
    except psutil.Error:
        return None


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory(
        dir="/tmp", prefix="rc-", ignore_cleanup_errors=True
    ) as folder:
        made = Cluster(folder)
        try:
            made.start()
            yield made
        finally:
            made.kill("second")
            made.kill("head")


def telescope(place: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "telescope", "run", "tiny.toml", "--no-check", *options]
    return subprocess.Popen(
        command,
        cwd=place,
        env={**os.environ, **SWITCHES},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def spec_in(place: Path, **tables: Any) -> None:
    (place / "tiny.toml").write_text(as_toml(spec_of(place, **tables)))


@pytest.mark.slow
def test_a_node_lost_in_mid_stage(
    tmp_path: Path, cluster: Cluster, record_property: Callable[[str, object], None]
) -> None:
    steps = {"train": {"steps": 400}}
    plain, lost = tmp_path / "plain", tmp_path / "lost"
    for place in (plain, lost):
        place.mkdir()
        spec_in(place, **steps)
    undisturbed = telescope(plain, "--dispatcher", "inline")
    address = ("--ray-address", cluster.address, "--workers", "2")
    driver = telescope(lost, *address)
    curves = lost / "results" / "tiny" / "curves"
    deadline = time.monotonic() + 240
    while not curves.is_dir() or len(list(curves.iterdir())) < 2:
        assert driver.poll() is None, driver.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert cluster.kill("second") > 1
    stored = len(list(curves.iterdir()))
    output, _ = driver.communicate(timeout=240)
    assert driver.returncode == 0, output
    assert stored < 9, "the node was lost after the last trial"
    output, _ = undisturbed.communicate(timeout=120)
    assert undisturbed.returncode == 0, output
    expected, found = answers(plain), answers(lost)
    assert found == expected
    record_property("a node of two killed in mid-stage", f"with {stored} of 9 trials done; same")
