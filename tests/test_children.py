"""A trial may start processes of its own, in every way that Python has, inline and on Ray."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bowls import bowl_spec
from conftest import as_toml, left_over
from functions import function

from telescope.dispatch.children import plain_children
from telescope.records import Status

HELPERS = """
import concurrent.futures, multiprocessing, signal, subprocess, sys
import torch
def double(x): return 2 * x
class Data(torch.utils.data.Dataset):
    def __len__(self): return 8
    def __getitem__(self, i): return float(i)
"""
WAYS = {
    "fork": "with multiprocessing.get_context('fork').Pool(3) as pool:\n"
    "    total = sum(pool.map(double, range(8)))",
    "spawn": "with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
    "    total = sum(pool.map(double, range(8)))",
    "executor": "with concurrent.futures.ProcessPoolExecutor(2) as pool:\n"
    "    total = sum(pool.map(double, range(8)))",
    "subprocess": "total = int(subprocess.check_output([sys.executable, '-Sc', 'print(56)']))",
    "loader": "loader = torch.utils.data.DataLoader(Data(), num_workers=2)\n"
    "total = sum(2 * x.item() for x in loader)",
}


@pytest.fixture
def sigterm_raises() -> Iterator[None]:
    """As in a process that runs a sweep, whatever Ray, or who started this one, has set."""
    raising = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, signal.default_int_handler) for number in raising}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("way", WAYS)
def test_a_trial_starts_processes(way: str, tmp_path: Path, sigterm_raises: None) -> None:
    body = "".join(f"    {line}\n" for line in WAYS[way].splitlines())
    result = function(tmp_path, f"{HELPERS}\ndef train(**all):\n{body}    return total")
    assert (result.status, result.loss) == (Status.COMPLETE, 56.0), result.reason


def handlers_in_a_child() -> list[str]:
    """The handlers of SIGTERM and SIGINT in a forked process, by name."""
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        found = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
        os.write(write, " ".join(getattr(f, "__name__", str(f)) for f in found).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(write)
    with os.fdopen(read) as file:
        return file.read().split()


def mine(number: int, frame: Any) -> None:
    """A handler of the trial's own."""


def test_a_child_has_the_systems_handlers_and_those_of_its_trial(sigterm_raises: None) -> None:
    raises, dies, ignores = "default_int_handler", str(signal.SIG_DFL), str(signal.SIG_IGN)
    assert handlers_in_a_child() == [raises, raises]
    with plain_children():
        with plain_children():
            pass
        assert handlers_in_a_child() == [dies, raises]
        signal.signal(signal.SIGTERM, mine)
        assert handlers_in_a_child() == ["mine", raises]
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with plain_children():
        assert handlers_in_a_child() == [ignores, raises]


POOL = """
import math, multiprocessing, signal
def loss(lr): return 2 + math.log2(lr / 0.1) ** 2 / 50
def handler(_): return signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
def train(width, seed, lr):
    with multiprocessing.get_context("fork").Pool(3) as pool:
        assert all(pool.map(handler, range(3)))
        return pool.map(loss, [lr] * 6)[0]
"""


@pytest.mark.ray
@pytest.mark.xdist_group("ray")
def test_a_pool_on_ray(tmp_path: Path) -> None:
    pytest.importorskip("telescope.dispatch.ray.tune")
    (tmp_path / "mine.py").write_text(POOL)
    spec = bowl_spec(tmp_path, ladder={"widths": [8]})
    spec["trainer"] = {"function": "mine:train", "folder": str(tmp_path)}
    (tmp_path / "bowl.toml").write_text(as_toml(spec))
    done = subprocess.run(
        [sys.executable, "-m", "telescope", "run", "bowl.toml", "--workers", "2"],
        cwd=tmp_path,
        env={**os.environ, "TELESCOPE_TEST_MARK": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "failed" not in done.stdout
    assert not left_over(str(tmp_path), patience=20)


def test_a_signal_that_comes_as_a_child_is_made_ends_it() -> None:
    """As `Pool.terminate` sends it on a busy machine: a child that lost it waits for ever."""
    script = """if True:
    import os, signal, time
    os.register_at_fork(after_in_child=lambda: os.kill(os.getpid(), signal.SIGTERM))
    from telescope.dispatch.children import plain_children
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with plain_children():
        child = os.fork()
        if not child:
            time.sleep(5)
            os._exit(0)
    _, status = os.waitpid(child, 0)
    print(os.WTERMSIG(status), signal.pthread_sigmask(signal.SIG_BLOCK, ()))
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == f"{int(signal.SIGTERM)} set()\n", done.stderr
