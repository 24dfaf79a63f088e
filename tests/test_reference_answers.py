"""The published sweeps give the answers that were published, byte for byte.

Each folder of results/reference that holds a database is shown and transferred anew, without the
fits that it keeps. When a sweep has been run again, or its answer is meant to change, write the
snapshots again with `.venv/bin/python tests/test_reference_answers.py` and commit what changed.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SWEEPS = sorted(path.parent for path in (ROOT / "results" / "reference").glob("*/trials.db"))
COMMANDS = ("show", "transfer")


def answer(sweep: Path, command: str, place: Path) -> str:
    """Return what a command prints of a copy of a sweep's folder, as JSON."""
    copy = place / sweep.name
    shutil.copytree(sweep, copy, ignore=shutil.ignore_patterns("fits.json"), dirs_exist_ok=True)
    words = [sys.executable, "-m", "telescope", command, str(copy), "--json"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout, done.stderr  # 1, and an answer, where a certificate says FAIL
    return done.stdout


def snapshot(sweep: Path, command: str) -> Path:
    """Return the file that holds a command's answer."""
    return ROOT / "tests" / "data" / f"{sweep.name}.{command}.json"


def test_there_is_a_reference() -> None:
    assert "quickstart" in {sweep.name for sweep in SWEEPS}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("sweep", SWEEPS, ids=lambda sweep: sweep.name)
def test_a_reference_gives_its_published_answer(sweep: Path, command: str, tmp_path: Path) -> None:
    assert answer(sweep, command, tmp_path) == snapshot(sweep, command).read_text()


if __name__ == "__main__":
    for sweep in SWEEPS:
        for command in COMMANDS:
            with tempfile.TemporaryDirectory() as place:
                snapshot(sweep, command).write_text(answer(sweep, command, Path(place)))
                print(f"wrote {snapshot(sweep, command).relative_to(ROOT)}")
