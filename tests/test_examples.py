"""The examples, run as their README says, from a copy of their folder."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd
import pytest
from commands import telescope
from conftest import ROOT

EXAMPLES = ROOT / "examples"


def run(folder: Path, name: str, *options: str) -> dict[str, Any]:
    """Run an example's sweep; returns what `show` says of it."""
    copy = folder / name
    shutil.copytree(EXAMPLES / name, copy, ignore=shutil.ignore_patterns("results", "__pycache__"))
    done = telescope("run", "sweep.toml", *options, cwd=copy)
    assert done.returncode == 0, done.stderr
    shown: dict[str, Any] = json.loads(telescope("show", name, "--json", cwd=copy).stdout)
    return shown


def digits_loss() -> Callable[[float, int], float]:
    """(lr, seed) → loss of the digits example at its target."""
    found = importlib.util.spec_from_file_location("digits", EXAMPLES / "digits" / "train.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)

    def loss(lr: float, seed: int) -> float:
        with contextlib.redirect_stdout(io.StringIO()):
            return float(module.train(256, 32, seed, lr, 0.1))

    return loss


def test_digits_ends_in_what_a_dense_grid_at_the_target_finds(tmp_path: Path) -> None:
    """A command that is not our model, and not text. The grid is recorded; some of it is redone."""
    pytest.importorskip("sklearn")
    shown = run(tmp_path, "digits", "--dispatcher", "inline")
    certificate = shown["target"]["certificate"]
    assert certificate["verdict"] == "PASS"
    assert shown["cost"]["over_target"] < 2
    assert 256 not in [choice["width"] for choice in shown["choices"]]

    grid = pd.read_csv(EXAMPLES / "digits" / "grid.csv")
    loss = digits_loss()
    for lr, seed, recorded in grid.iloc[[4, 19, 24, 38]].to_numpy():
        assert loss(lr, int(seed)) == pytest.approx(recorded, rel=0.01)  # another BLAS
    best = grid.groupby("lr")["loss"].mean()
    answer = fmean(loss(shown["target"]["lr"], seed) for seed in sorted(set(grid["seed"])))
    assert answer < best.min() * 1.01
    low, high = certificate["intervals"]["lr"]
    assert low / 2 < best.idxmin() < high * 2
    # Not for want of a wrong answer: a factor of four off would be seen.
    assert min(best[0.016], best[0.002]) > best.min() * 1.02


def loss_of_the_function(folder: Path, point: dict[str, float]) -> float:
    """Return the example function's mean loss at its target, over seeds that no sweep saw."""
    code = (
        "import json, sys; from training import train; "
        "losses = [train(width=128, seed=seed, base_width=16, **json.loads(sys.argv[1]))['loss'] "
        "for seed in range(10, 22)]; print(sum(losses) / len(losses))"
    )
    command = [sys.executable, "-c", code, json.dumps(point)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return float(done.stdout)


def test_a_function_from_a_repository_with_a_package_called_models(tmp_path: Path) -> None:
    before = set(sys.modules)
    shown = run(tmp_path, "function", "--dispatcher", "inline")
    assert set(shown["target"]["point"]) == {"lr", "forget"}
    # At the target, 12 seeds each: 0.83 ± 0.02 at best, 1.26 at either end of lr.
    assert loss_of_the_function(tmp_path / "function", shown["target"]["point"]) < 0.83 * 1.15
    assert not {"training", "models.network"} & (set(sys.modules) - before)
    curves = tmp_path / "function" / "results" / "function" / "curves"
    assert len(next(curves.iterdir()).read_text().splitlines()) == 1 + 5


def test_every_example_has_its_paragraph() -> None:
    text = (EXAMPLES / "README.md").read_text()
    for folder in EXAMPLES.iterdir():
        if folder.is_dir() and folder.name != "__pycache__":
            assert f"## {folder.name}/" in text, folder.name
