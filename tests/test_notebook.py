"""Python and notebooks: a sweep that was run is opened, a ladder is kept in a file and goes on."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import GPT, one_line, quiet, tiny_spec
from matplotlib.figure import Figure

import telescope
from telescope import Ladder, Spec, Trial
from telescope.api import Sweep
from telescope.errors import SpecError, StoreError, TelescopeError
from telescope.sweep.run import Options, run


def loss_of(trial: Trial) -> float:
    return 2 + math.log2(trial.lr / 0.05) ** 2 / 50 + trial.seed / 1000


def bowl_spec(**tables: Any) -> dict[str, Any]:
    return {
        "name": "bowl",
        "ladder": {"widths": [16, 32]},
        "target": {"width": 64},
        "axes": {"lr": {"low": 0.01, "high": 1.0, "points": 7}},
        "budget": {"max_over_target": 20.0},
        **tables,
    }


def answered(ladder: Ladder, most: int) -> Ladder:
    """The ladder with so many more answers, or until it is finished."""
    told = 0
    while trials := ladder.ask():
        for trial in trials:
            if told == most:
                return ladder
            ladder.tell(trial, loss=loss_of(trial))
            told += 1
    return ladder


@pytest.mark.parametrize("so_far", [0, 3, 9, 1000])
def test_a_saved_ladder_goes_on_as_if_it_had_not_been(so_far: int, tmp_path: Path) -> None:
    kept = tmp_path / "ladder.json"
    undisturbed = answered(Ladder(Spec.from_dict(bowl_spec())), 1000)
    answered(Ladder(Spec.from_dict(bowl_spec())), so_far).save(kept)
    loaded = answered(Ladder.load(kept), 1000)
    assert loaded.choices == undisturbed.choices
    assert set(loaded.results) == set(undisturbed.results)
    assert loaded.transfer() == undisturbed.transfer()


def test_what_was_given_and_how_trials_ended_is_kept(tmp_path: Path) -> None:
    first = Ladder(Spec.from_dict(bowl_spec()))
    for number, trial in enumerate(first.ask()):
        if number == 1:
            first.tell(trial, status="diverged", reason="loss nan\nat step 3")
        else:
            first.tell(trial, loss=loss_of(trial))
    wider = Spec.from_dict(bowl_spec(ladder={"widths": [16, 32], "seeds": [0, 1]}))
    changed = Ladder(wider, first.results)
    changed.save(tmp_path / "ladder.json")
    loaded = Ladder.load(tmp_path / "ladder.json")
    assert loaded.results == changed.results
    assert loaded.given == changed.given
    assert loaded.ask() == changed.ask()


def test_a_ladder_with_a_model_file_needs_the_file_no_longer(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(GPT.read_text())
    data = bowl_spec(
        model={"file": "mine.py", "depth": 1, "head_dim": 8},
        train={"steps": 4, "batch_size": 4, "sequence_length": 16},
    )
    data["axes"]["weight_decay"] = {"value": 0.1}
    ladder = answered(Ladder(Spec.from_dict(data, folder=tmp_path)), 1000)
    ladder.save(tmp_path / "ladder.json")
    (tmp_path / "mine.py").unlink()
    loaded = Ladder.load(tmp_path / "ladder.json")
    assert loaded.transfer(width=128).groups == ladder.transfer(width=128).groups
    assert loaded.spec == ladder.spec


GOOD = {"format": 1, "spec": bowl_spec(), "model": None, "results": [], "given": []}
RESULT = {
    "width": 16,
    "point": {"lr": 0.1},
    "seed": 0,
    "status": "complete",
    "loss": 2.0,
    "reason": "",
}
BAD: dict[str, Any] = {
    "empty": "",
    "no JSON": "{",
    "nested": "[" * 100_000,
    "a list": [],
    "a number": 3,
    "a newer version's": {**GOOD, "format": 2},
    "no results": {key: value for key, value in GOOD.items() if key != "results"},
    "a loss that is none": {**GOOD, "results": [{**RESULT, "loss": None}]},
    "a loss that is no number": {**GOOD, "results": [{**RESULT, "loss": "x"}]},
    "an unknown status": {**GOOD, "results": [{**RESULT, "status": "fine"}]},
    "no trial": {**GOOD, "results": [{}]},
    "an unknown key": {**GOOD, "spec": {**bowl_spec(), "ladder": {"width": [16]}}},
    "no spec": {**GOOD, "spec": 3},
    "a model without a text": {**GOOD, "model": 5},
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_one_line_with_its_name(kind: str, tmp_path: Path) -> None:
    path, content = tmp_path / "ladder.json", BAD[kind]
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(StoreError, match=str(path)) as caught:
        Ladder.load(path)
    one_line(caught.value)


def test_a_place_that_cannot_be_read_or_written_is_one_line(tmp_path: Path) -> None:
    ladder = Ladder(Spec.from_dict(bowl_spec()))
    for path in (tmp_path, tmp_path / "no" / "such" / "folder.json"):
        for use in (lambda p: ladder.save(p), Ladder.load):
            with pytest.raises(StoreError, match=str(path)) as caught:
                use(path)
            one_line(caught.value)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory, corpus_file: Path) -> Sweep:
    place = tmp_path_factory.mktemp("results")
    spec = Spec.from_dict(tiny_spec(corpus_file))
    run(spec, Options(place, dispatcher="inline", check=False), quiet)
    return telescope.open("tiny", place)


def test_an_opened_sweep_is_what_the_folder_holds(sweep: Sweep) -> None:
    table = pd.read_csv(sweep.folder / "trials.csv")
    assert list(sweep.trials.columns) == list(table.columns)
    assert sweep.trials.loss.tolist() == pytest.approx(table.loss.tolist())
    assert [choice.width for choice in sweep.choices] == [16, 32]
    assert sweep.transfer(128).groups == sweep.ladder.transfer(128).groups
    assert sweep.cost["over_target"] > 0
    assert len(sweep.results) == len(table)
    assert isinstance(sweep.figure(), Figure)


def test_its_report_is_a_file(sweep: Sweep, tmp_path: Path) -> None:
    assert sweep.report(tmp_path / "page.html").read_text().startswith("<!DOCTYPE html>")
    with pytest.raises(SpecError, match="cannot be written") as caught:
        sweep.report(tmp_path)
    one_line(caught.value)


@pytest.mark.parametrize("place", ["nothing", ""])
def test_what_is_no_sweep_is_one_line(place: str, tmp_path: Path) -> None:
    with pytest.raises(TelescopeError) as caught:
        telescope.open(tmp_path / place, tmp_path)
    one_line(caught.value)


class Balanced(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_reprs_are_short_and_say_the_answer(sweep: Sweep) -> None:
    ladder = Ladder(Spec.from_dict(bowl_spec()))
    assert (
        repr(ladder)
        == f"<Ladder bowl: 0 results, {len(ladder.ask())} trials to answer at width 16>"
    )
    settings = sweep.transfer()
    for shown in (ladder, answered(ladder, 1000), sweep, sweep.ladder, settings):
        assert len(repr(shown)) < 200
        assert "\n" not in repr(shown)
        Balanced(shown._repr_html_())
    assert str(settings.point) in repr(settings)
    assert f"{len(settings.groups or ())} groups" in repr(settings)
    assert settings._repr_html_().count("<tr>") == 1 + len(settings.groups or ())
    assert '<th scope="row">32</th>' in sweep._repr_html_()


def test_what_is_kept_of_a_spec_states_no_rule_that_nobody_stated() -> None:
    for tables in ({}, {"optimizer": {"rule": "mup"}}, {"optimizer": {"rule": "standard"}}):
        spec = Spec.from_dict(bowl_spec(**tables))
        assert Spec.from_dict(spec.as_dict()).rule == spec.rule
