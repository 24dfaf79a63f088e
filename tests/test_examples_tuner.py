"""The example of an existing Tuner, run as its README says.

Its answer is checked against the ladder asked and told by hand on the same training.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from telescope import Ladder, Spec
from telescope.answer.finished import open_result

EXAMPLE = ROOT / "examples" / "tuner"


def last_loss(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The example's own training, called without Tune."""
    pytest.importorskip("telescope.dispatch.ray.tune")  # before Ray, so that it listens on loopback
    spec = importlib.util.spec_from_file_location("example_tuner", EXAMPLE / "tuner.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    reports: list[float] = []
    monkeypatch.setattr(module.tune, "report", lambda metrics: reports.append(metrics["loss"]))

    def loss(config: dict[str, Any]) -> float:
        module.train(config)
        return reports[-1]

    return loss


@pytest.mark.ray
@pytest.mark.xdist_group("ray")
def test_a_tuner_with_a_tensorboard_logger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = ["--storage", str(tmp_path / "ray"), "--results", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, str(EXAMPLE / "tuner.py"), *places],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    loss, ladder = last_loss(monkeypatch), Ladder(Spec.load(EXAMPLE / "sweep.toml"))
    while trials := ladder.ask():
        for trial in trials:
            value = loss({"width": trial.width, "seed": trial.seed, **trial.point})
            if value < 1e6:
                ladder.tell(trial, loss=value)
            else:
                ladder.tell(trial, status="diverged")
    finished = open_result("tuner", tmp_path)
    assert [c.point for c in finished.ladder.choices] == [c.point for c in ladder.choices]
    assert [c.counts for c in finished.ladder.choices] == [c.counts for c in ladder.choices]
    assert f"width 128: {ladder.transfer().point}" in done.stdout
    events = list((tmp_path / "ray").rglob("events.out.tfevents.*"))
    assert len({event.parent for event in events}) == len(finished.results)
    assert all(event.stat().st_size > 0 for event in events)
