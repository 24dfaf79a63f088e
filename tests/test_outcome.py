"""Target runs judged by the loss that was predicted of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from commands import from_json, output
from conftest import ROOT

from telescope.errors import ResumeError
from telescope.ladder.outcome import TargetEnd, judge
from telescope.records import PredictedLoss
from telescope.target.folder import ends_of

QUICKSTART = ROOT / "results" / "reference" / "quickstart"
PREDICTED = PredictedLoss(1.7, (1.6, 1.8), (32, 64, 128))


@pytest.mark.parametrize(
    ("loss", "place", "inside", "says"),
    [
        (1.7, "inside", True, "nothing here speaks against the certificate"),
        (1.6, "inside", True, "as predicted"),
        (1.8, "inside", True, "as predicted"),
        (1.59, "below", False, "the certificate stands"),
        (1.81, "above", False, "do not rely on the certificate"),
        (None, "diverged", False, "the certificate does not either"),
    ],
)
def test_a_run_is_inside_or_not(loss: float | None, place: str, inside: bool, says: str) -> None:
    judged = judge(PREDICTED, TargetEnd("big", 256, loss))
    assert judged.place == place
    assert says in judged.meaning
    found = judged.as_dict()
    assert found["inside"] is inside
    assert (found["predicted"], found["interval"], found["got"]) == (1.7, [1.6, 1.8], loss)


def test_a_run_without_a_prediction_is_not_judged() -> None:
    none = PredictedLoss(None, None, (32,), "one width was trained")
    judged = judge(none, TargetEnd("big", 256, 1.7))
    assert judged.as_dict()["inside"] is None
    assert judged.meaning == "no loss was predicted: one width was trained"
    assert "this policy predicts none" in judge(None, TargetEnd("big", 256, 1.7)).meaning
    assert judge(none, TargetEnd("big", 256, None)).place == "diverged"


def ended(sweep: Path, run: str, **keys: Any) -> Path:
    """Write the end of a target run."""
    end = {"schema": 1, "width": 256, "steps": 250, "tokens": 1, "loss": 1.7, "diverged": False}
    path = sweep / "target" / run / "result.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**end, **keys}))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Copy the published quickstart to the folder of a user's results."""
    shutil.copytree(QUICKSTART, tmp_path / "results" / "quickstart")
    return tmp_path


def test_show_and_report_judge_every_run_by_its_own_width_and_steps(folder: Path) -> None:
    sweep = folder / "results" / "quickstart"
    assert "judged" not in from_json("show", "quickstart", cwd=folder)
    ended(sweep, "as-planned")
    ended(sweep, "lost", loss=None, diverged=True)
    ended(sweep, "longer", steps=1000)
    ended(sweep, "narrow", width=128, loss=1.75)
    ended(sweep, "too-high", loss=2.5)
    shown = from_json("show", "quickstart", cwd=folder)
    judged = {run["run"]: run for run in shown["judged"]}
    of_target = shown["target"]["certificate"]["predicted_loss"]
    assert [*judged] == ["as-planned", "longer", "lost", "narrow", "too-high"]
    assert {name: run["inside"] for name, run in judged.items()} == {
        "as-planned": True,
        "longer": None,
        "lost": False,
        "narrow": True,
        "too-high": False,
    }
    assert judged["as-planned"]["interval"] == of_target["interval"]
    assert judged["narrow"]["width"] == 128
    # The level of a width that was measured is better known.
    low, high = judged["narrow"]["interval"]
    assert high - low < 0.7 * (of_target["interval"][1] - of_target["interval"][0])
    text = output(folder, "show", "quickstart")
    assert "judged     as-planned (width 256): loss 1.7000, predicted 1.68 (1.62 to 1.74): " in text
    assert "judged     lost (width 256): diverged, predicted" in text
    output(folder, "report", "quickstart", "--out", "page.html")
    page = (folder / "page.html").read_text()
    assert "Target run too-high (width 256): loss 2.5000" in page


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"width": 256, "steps": 250, "diverged": false, "loss": NaN}'],
)
def test_a_damaged_end_is_named(tmp_path: Path, text: str) -> None:
    path = ended(tmp_path, "big")
    path.write_text(text)
    with pytest.raises(ResumeError, match="cannot be read") as said:
        ends_of(tmp_path)
    assert str(path) in str(said.value)
    assert "move its folder away" in str(said.value)


def test_another_trainers_steps_may_be_unknown(tmp_path: Path) -> None:
    ended(tmp_path, "big", steps=None)
    assert ends_of(tmp_path)[0]["loss"] == 1.7
