"""The example of a foreign library, a Llama of transformers, run as its README says.

The check that counts: at a width that was never swept, the settings handed over beat four times
and a quarter of their learning rate. Costs eleven processes of five to eight CPU seconds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

EXAMPLE = ROOT / "examples" / "llama"
MARGIN = 0.01
"""Share of the loss by which the settings must win; a factor of four costs about 5 % of it."""


def run(*command: str, folder: Path = EXAMPLE) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def loss_of(*arguments: str) -> float:
    line = run(sys.executable, "train.py", *arguments).splitlines()[-1]
    return float(json.loads(line)["loss"])


@pytest.mark.timeout(1200)  # about 100 s on a machine that does nothing else
def test_a_llama_swept_at_two_widths_is_trained_at_a_third(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="of the test extra")
    telescope = (sys.executable, "-m", "telescope")
    run(sys.executable, "train.py", "--write-shapes", str(tmp_path / "shapes.json"))
    assert (tmp_path / "shapes.json").read_text() == (EXAMPLE / "shapes.json").read_text()
    run(*telescope, "run", "sweep.toml", "--results", str(tmp_path), "--dispatcher", "inline")
    settings = tmp_path / "settings.json"
    arguments = ("--results", str(tmp_path), "--fold-readout", "--out", str(settings))
    run(*telescope, "transfer", "llama", *arguments)
    answer = json.loads(settings.read_text())
    assert answer["width"] == 128
    assert {group["multiplier"] for group in answer["groups"]} == {1}
    chosen = loss_of("--settings", str(settings))
    for factor in (4, 1 / 4):
        lr = f"{answer['lr'] * factor:.6g}"
        other = loss_of("--width", "128", "--lr", lr, "--weight-decay", "0.1")
        assert chosen < other * (1 - MARGIN), f"lr times {factor:g}: {other} against {chosen}"
