"""Memory gives what was made, for as long as what it was made of stays the same."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from telescope.answer.finished import Finished, open_result
from telescope.ladder.ladder import Ladder
from telescope.ladder.state import Move
from telescope.records import Certificate, Choice, LadderSpec, Point, Result, Stage, Status, Trial
from telescope.spec.spec import Spec
from telescope.store import memory
from telescope.store.memory import Memory, code_of, is_self_contained
from telescope.sweep.run import recorded

TRIAL = Trial(32, Point.of(lr=0.1, weight_decay=1e-9), 3)
MOVES = [
    None,
    Move(stage=Stage(32, {"lr": (0.1, 0.2)}, (TRIAL,), ("a first look",))),
    Move(
        choice=Choice(
            width=64,
            point=TRIAL.point,
            loss=1 / 3,
            intervals={"lr": (0.0, math.inf), "weight_decay": None},
            at_edge=("lr",),
            reason="0 % × √",
            counts=Counter({Status.COMPLETE: 3, Status.DIVERGED: 1}),
        )
    ),
    Move(stuck="all diverged"),
]


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """A finished sweep that nobody has looked at."""
    folder = tmp_path / "quickstart"
    shutil.copytree(ROOT / "results" / "reference" / "quickstart", folder)
    (folder / "fits.json").unlink(missing_ok=True)
    return folder


def forgetting(folder: Path) -> Finished:
    """The same sweep by the fit itself, whatever is remembered."""
    kept = folder / "fits.json"
    aside = kept.read_bytes() if kept.exists() else None
    kept.unlink(missing_ok=True)
    finished = open_result(folder, folder.parent)
    assert finished.certificate is not None
    if aside is None:
        kept.unlink()
    else:
        kept.write_bytes(aside)
    return finished


@pytest.mark.parametrize("move", MOVES)
def test_a_move_is_read_as_it_was_made(move: Move | None, tmp_path: Path) -> None:
    first, path = None, tmp_path / "deep" / "fits.json"
    for _ in range(2):
        memory = Memory(path, "code")
        found = memory.recall(Move | None, TRIAL, lambda: move)
        memory.keep()
        assert found == move
        first = first or path.read_bytes()
    assert path.read_bytes() == first


def test_only_the_same_content_under_the_same_code_is_remembered(tmp_path: Path) -> None:
    path, made = tmp_path / "fits.json", []

    def ask(of: object, code: str = "one") -> None:
        memory = Memory(path, code)
        memory.recall(int, of, lambda: made.append(of) or len(made))  # type: ignore[func-returns-value]
        memory.keep()

    spec = LadderSpec((), (32, 64), costs={32: 1.0, 64: 4.0})
    for of in (
        spec,
        replace(spec),
        replace(spec, costs={32: 1.0, 64: 4.5}),
        (1.0,),
        (1.0 + 2e-16,),
    ):
        ask(of)
    assert len(made) == 4, "an equal spec alone is the same"
    ask(spec, "two")
    assert len(made) == 5
    path.write_text('{"code": "two", "made": {"int')
    ask(spec, "two")
    assert len(made) == 6, "a damaged file is none"
    path.write_text(json.dumps({"code": "two", "made": dict.fromkeys(known(path), "x")}))
    ask(spec, "two")
    assert len(made) == 7, "nor is a value of another type"


def known(path: Path) -> list[str]:
    """The keys of a memory's file."""
    return list(json.loads(path.read_text())["made"])


def test_the_code_is_its_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "telescope"
    shutil.copytree(ROOT / "telescope" / "ladder", package / "ladder")
    monkeypatch.setattr(memory, "__file__", str(package / "store" / "memory.py"))
    fresh = code_of.__wrapped__
    before = fresh("ladder", libraries=("numpy",))
    assert before == fresh("ladder", libraries=("numpy",))
    fit = package / "ladder" / "fit" / "surface.py"
    fit.write_text(fit.read_text().replace("1", "2", 1))
    assert fresh("ladder", libraries=("numpy",)) not in (before, "")
    assert fresh("nowhere", libraries=()) == fresh("ladder", libraries=("no-such",)) == ""


def test_a_sweep_is_the_same_from_memory(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = open_result(sweep, sweep.parent)
    by_fit, drawn = slow.certificate, slow.portrait
    monkeypatch.setattr("telescope.ladder.ladder._policy", None)
    monkeypatch.setattr("telescope.ladder.portrait.portrait", None)
    monkeypatch.setattr("telescope.store.store.Store", None)
    quick = open_result(sweep, sweep.parent)
    assert isinstance(quick.certificate, Certificate)
    assert quick.certificate == by_fit
    assert repr(quick.portrait) == repr(drawn)  # NaN beyond a wall equals itself
    assert quick.results == slow.results
    for name in ("stages", "choices", "skipped", "stuck", "given", "known", "is_finished"):
        assert getattr(quick.ladder, name) == getattr(slow.ladder, name), name


def test_the_figure_is_drawn_anew_where_it_would_be_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []

    def draw(path: Path, ladder: Ladder, title: str) -> None:
        drawn.append(len(ladder.known))
        path.write_bytes(b"a figure")

    monkeypatch.setattr("telescope.report.figures.write_loss_figure", draw)
    tables: dict[str, Any] = {
        "name": "told",
        "ladder": {"widths": [16]},
        "target": {"width": 32},
        "axes": {"lr": {"low": 0.01, "high": 1.0, "points": 5}},
        "cost": {"parameters": {"16": 256, "32": 1024}},
        "budget": {"max_over_target": 20.0},
    }

    def go_on(tell: bool = True) -> int:
        drawn.clear()
        with recorded(Spec.from_dict(tables), tmp_path) as recorder:
            while tell and (trials := recorder.ask()):
                for trial in trials:
                    loss = 2 + math.log2(trial.lr / 0.1) ** 2 / 40
                    recorder.tell(Result(trial, Status.COMPLETE, loss=loss))
        return len(drawn)

    assert go_on() == 1
    assert go_on() == 0, "it is there as it would be"
    (tmp_path / "told" / "loss.png").unlink()
    assert go_on() == 1
    monkeypatch.setattr("telescope.sweep.run.code_of", lambda *rooms, libraries: "a new version")
    assert go_on() == 1
    assert go_on() == 0
    tables["axes"]["lr"]["high"] = 4.0
    assert go_on(tell=False) == 1, "the same results, another axis"


def test_what_changes_the_answer_is_not_remembered(sweep: Path) -> None:
    assert open_result(sweep, sweep.parent).certificate
    record = json.loads((sweep / "spec.json").read_text())
    for key, value in (("tolerance", 0.02), ("until", "proven"), ("widths", [32, 64, 128, 256])):
        changed = json.loads(json.dumps(record))
        changed["spec"]["ladder"][key] = value
        (sweep / "spec.json").write_text(json.dumps(changed))
        quick, slow = open_result(sweep, sweep.parent), forgetting(sweep)
        assert quick.ladder.choices == slow.ladder.choices
        assert quick.certificate == slow.certificate
    (sweep / "spec.json").write_text(json.dumps(record))
    (sweep / "coordcheck.json").unlink()
    unchecked = open_result(sweep, sweep.parent)
    assert unchecked.certificate == forgetting(sweep).certificate
    assert unchecked.certificate is not None
    assert not any("coordinate check" in text for text in unchecked.certificate.evidence)


def test_a_folder_that_cannot_be_written_is_read(sweep: Path) -> None:
    (sweep / "fits.json").mkdir()
    assert open_result(sweep, sweep.parent).certificate


def test_a_ladder_without_memory_decides_alike(sweep: Path) -> None:
    kept = open_result(sweep, sweep.parent).ladder
    plain = Ladder(kept.spec, given=kept.given)
    results = {result.trial: result for result in kept.known}
    while trials := plain.ask():
        for trial in trials:
            plain.tell(results[trial])
    assert plain.choices == kept.choices


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("from torch.nn import functional as F\nimport math", True),
        ("from .layers import Block", False),
        ("def build(width):\n    import layers", False),
        ("import os", False),
        ("def build(:", False),
    ],
)
def test_a_model_that_imports_the_users_own_is_looked_at_anew(text: str, expected: bool) -> None:
    assert is_self_contained(text) is expected
