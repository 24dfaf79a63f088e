"""A test that hangs is ended, and says where each of its threads was."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import LONGER, ROOT

HANGING = """
import threading

def lies_in_wait():
    threading.Event().wait()

def test_before():
    pass

def test_hang():
    threading.Thread(target=lies_in_wait, daemon=True).start()
    threading.Event().wait()

def test_after():
    pass
"""


@pytest.mark.parametrize("options", [[], ["--numprocesses", "1"]], ids=["alone", "xdist"])
def test_a_hanging_test_ends_with_the_stacks_of_all_threads(
    options: list[str], tmp_path: Path
) -> None:
    """With this repository's settings, but for the seconds; xdist goes on with the next test."""
    (tmp_path / "test_hanging.py").write_text(HANGING)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml")),
            *("-o", "addopts=", "-o", "faulthandler_timeout=1", "--timeout", "3"),
            *("--rootdir", str(tmp_path), *options, "test_hanging.py"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    said = done.stdout + done.stderr
    assert "in lies_in_wait" in said
    assert "in test_hang" in said
    if options:
        assert "1 failed, 2 passed" in done.stdout
        assert "crashed while running 'test_hanging.py::test_hang'" in done.stdout


def test_every_test_has_a_limit(request: pytest.FixtureRequest) -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    assert 0 < settings["faulthandler_timeout"] < settings["timeout"] < min(LONGER.values())
    for item in request.session.items:
        limit = item.get_closest_marker("timeout")
        assert limit is None or limit.args[0] >= settings["timeout"], item.nodeid
        assert limit is not None or not item.get_closest_marker("ray"), item.nodeid
