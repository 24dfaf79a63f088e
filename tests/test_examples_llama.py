"""The example of a foreign library, a Llama of transformers, run as its README says.

The check that counts: at a width that was never swept, the settings handed over beat four times
and a quarter of their learning rate. With the README's own commands it costs eleven processes of
six to eight CPU seconds, of which four are the import of the library: that is the slow test.
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
FACTORS = (4, 1 / 4)
# The command line of sweep.toml, called in one process for all trials; prints the losses at the
# target's width: with the settings handed over, and with multiples of their learning rate.
IN_ONE_PROCESS = """
import contextlib, io, json, sys
from pathlib import Path
import train
from telescope import Ladder, Spec

def call(*arguments):
    sys.argv, out = ["train.py", *map(str, arguments)], io.StringIO()
    with contextlib.redirect_stdout(out):
        train.main()
    return json.loads(out.getvalue() or "{}")

def trained(width, lr, weight_decay, seed=0):
    values = {"width": width, "lr": lr, "weight-decay": weight_decay, "seed": seed}
    return call(*(part for name, value in values.items() for part in (f"--{name}", value)))

place, factors = Path(sys.argv[1]), [float(text) for text in sys.argv[2:]]
call("--write-shapes", place / "shapes.json")
ladder = Ladder(Spec.load("sweep.toml"))
while trials := ladder.ask():
    for trial in trials:
        ladder.tell(trial, **trained(trial.width, trial.lr, trial.weight_decay, trial.seed))
answer = ladder.transfer(fold_readout=True).as_dict()
(place / "settings.json").write_text(json.dumps(answer))
losses = [call("--settings", place / "settings.json")["loss"]]
losses += [trained(128, answer["lr"] * factor, 0.1)["loss"] for factor in factors]
print(json.dumps(losses))
"""


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


def check(folder: Path, chosen: float, others: list[float]) -> None:
    """Check the shapes and the settings in a folder; these win by the margin.

    Args:
        folder: with the example's output.
        chosen: the loss with the settings handed over.
        others: those with `FACTORS` times their learning rate.
    """
    assert (folder / "shapes.json").read_text() == (EXAMPLE / "shapes.json").read_text()
    answer = json.loads((folder / "settings.json").read_text())
    assert answer["width"] == 128
    assert {group["multiplier"] for group in answer["groups"]} == {1}
    for factor, other in zip(FACTORS, others, strict=True):
        assert chosen < other * (1 - MARGIN), f"lr times {factor:g}: {other} against {chosen}"


def test_a_llama_swept_at_two_widths_is_trained_at_a_third(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="of the test extra")
    arguments = (str(tmp_path), *map(str, FACTORS))
    chosen, *others = json.loads(run(sys.executable, "-c", IN_ONE_PROCESS, *arguments))
    check(tmp_path, chosen, others)


@pytest.mark.slow
def test_the_commands_of_the_readme(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="of the test extra")
    telescope = (sys.executable, "-m", "telescope")
    run(sys.executable, "train.py", "--write-shapes", str(tmp_path / "shapes.json"))
    run(*telescope, "run", "sweep.toml", "--results", str(tmp_path), "--dispatcher", "inline")
    settings = tmp_path / "settings.json"
    arguments = ("--results", str(tmp_path), "--fold-readout", "--out", str(settings))
    run(*telescope, "transfer", "llama", *arguments)
    lr = json.loads(settings.read_text())["lr"]
    wrong = [f"{lr * factor:.6g}" for factor in FACTORS]
    others = [loss_of("--width", "128", "--lr", lr, "--weight-decay", "0.1") for lr in wrong]
    check(tmp_path, loss_of("--settings", str(settings)), others)
