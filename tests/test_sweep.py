"""A whole sweep on real parts in this process: resumed, refused, interrupted, stuck and retried.

The trainer is real but tiny. Resumes are compared with an undisturbed sweep, file by file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import GPT, quiet, tiny_spec, wide_block
from rich.console import Console

from telescope import Spec
from telescope.answer.derive import transfer
from telescope.answer.finished import open_result
from telescope.check.coordcheck import Extent, coordinate_check
from telescope.errors import RefusedError, ResumeError, SpecError
from telescope.ladder.ladder import Ladder, replay
from telescope.records import Point, Result, Trial
from telescope.report.live import PlainScreen
from telescope.report.terminal import show_as_json
from telescope.store.folder import Folder
from telescope.sweep.builtin import BuiltIn
from telescope.sweep.checking import write_check
from telescope.sweep.recorder import Recorder
from telescope.sweep.run import Options, run
from telescope.train import loop

TRIALS = 3 * 2 + 3 * 1  # 3 → 3/2 → 3 and 2 → 1 → 1


def sweep(results: Path, data: dict[str, Any]) -> tuple[Folder, Ladder]:
    """Run inline, without the coordinate check: it has tests of its own."""
    ran = run(Spec.from_dict(data), inline(results), quiet)
    return ran.folder, ran.ladder


def inline(results: Path, storage: str | None = None) -> Options:
    return Options(results, dispatcher="inline", storage=storage, check=False)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Trial]:
    """Every trial that is really trained, in order."""
    calls: list[Trial] = []
    train = loop.train

    def counting(config: Any, trial: Trial) -> Result:
        calls.append(trial)
        return train(config, trial)

    monkeypatch.setattr(loop, "train", counting)
    return calls


def answers(folder: Folder) -> dict[str, Any]:
    """Return the answers of a sweep that must not depend on how often it was disturbed."""
    facts = show_as_json(open_result(folder.path, folder.path.parent))
    del facts["cost"]["seconds"]
    table = pd.read_csv(folder.path / "trials.csv").drop(columns="seconds")
    curves = {path.name: path.read_text() for path in (folder.path / "curves").iterdir()}
    return {"show": facts, "table": table.to_csv(), "curves": curves}


def test_a_sweep_leaves_everything_behind(
    tmp_path: Path, corpus_file: Path, trained: list[Trial]
) -> None:
    folder, ladder = sweep(tmp_path, tiny_spec(corpus_file))
    assert ladder.is_finished
    assert len(trained) == len(set(trained)) == TRIALS
    table = pd.read_csv(folder.path / "trials.csv")
    assert list(table.columns) == (
        ["width", "seed", "lr", "weight_decay", "loss", "status", "reason", "flops", "seconds"]
    )
    assert len(table) == TRIALS
    assert table[table.width == 16].loss.min() == ladder.choices[0].loss
    assert (folder.path / "model.py").read_text() == GPT.read_text()
    assert (folder.path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((folder.path / "curves").iterdir())) == TRIALS
    record = json.loads((folder.path / "spec.json").read_text())
    assert record["spec"]["train"]["schedule"] == "cosine"  # resolved: a default filled in
    assert record["versions"]["torch"]
    status = folder.read_status()
    assert status is not None
    assert (status["state"], status["done"], status["total"]) == ("finished", TRIALS, TRIALS)


def test_the_same_command_again_trains_nothing(
    tmp_path: Path, corpus_file: Path, trained: list[Trial]
) -> None:
    folder, _ = sweep(tmp_path, tiny_spec(corpus_file))
    before = answers(folder)
    trained.clear()
    sweep(tmp_path, tiny_spec(corpus_file))
    assert trained == []
    assert answers(folder) == before


def test_interrupted_every_second_trial_it_ends_the_same(
    tmp_path: Path, corpus_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed, _ = sweep(tmp_path / "undisturbed", tiny_spec(corpus_file))
    train = loop.train
    finished: list[Trial] = []

    def once_more(config: Any, trial: Trial) -> Result:
        if len(finished) == allowed:
            raise KeyboardInterrupt
        finished.append(trial)
        return train(config, trial)

    monkeypatch.setattr(loop, "train", once_more)
    for allowed in range(0, TRIALS, 2):
        with pytest.raises(KeyboardInterrupt):
            sweep(tmp_path / "disturbed", tiny_spec(corpus_file))
        status = Folder(tmp_path / "disturbed" / "tiny").read_status()
        assert status is not None
        assert (status["state"], status["done"]) == ("interrupted", allowed)
    allowed = TRIALS
    folder, _ = sweep(tmp_path / "disturbed", tiny_spec(corpus_file))
    assert len(finished) == len(set(finished)) == TRIALS
    assert answers(folder) == answers(undisturbed)


def test_appended_widths_and_moved_axes_reuse_trials(
    tmp_path: Path, corpus_file: Path, trained: list[Trial]
) -> None:
    sweep(tmp_path, tiny_spec(corpus_file, ladder={"widths": [16]}))
    first = set(trained)
    trained.clear()
    sweep(tmp_path, tiny_spec(corpus_file))
    assert {trial.width for trial in trained} == {32}
    trained.clear()
    # From 0.01 to 0.64 with 4 points: 0.01, 0.04, 0.16 are known, 0.64 is new.
    sweep(
        tmp_path,
        tiny_spec(
            corpus_file,
            axes={
                "lr": {"low": 0.01, "high": 0.64, "points": 4},
                "weight_decay": {"low": 0.05, "high": 0.2, "points": 2},
            },
        ),
    )
    assert {t.lr for t in trained if t.width == 16} == {0.64}
    assert not first & set(trained)


INCOMPARABLE: list[tuple[dict[str, Any], str]] = [
    ({"train": {"steps": 5}}, "train.steps was 4, now 5"),
    ({"optimizer": {"rule": "paper"}}, "optimizer.rule was mup, now paper"),
    ({"model": {"depth": 2}}, "model.depth was 1, now 2"),
    ({"ladder": {"widths": [32]}}, "ladder.widths[0] was 16, now 32"),
]


def test_incomparable_changes_are_refused_with_the_fields(
    tmp_path: Path, corpus_file: Path
) -> None:
    folder, _ = sweep(tmp_path, tiny_spec(corpus_file, ladder={"widths": [16]}))
    before = answers(folder)
    for tables, field in INCOMPARABLE:
        with pytest.raises(ResumeError, match="not comparable") as caught:
            sweep(tmp_path, tiny_spec(corpus_file, **tables))
        assert field in str(caught.value)
        assert answers(folder) == before


def test_a_default_written_into_the_spec_changes_nothing(
    tmp_path: Path, corpus_file: Path, trained: list[Trial]
) -> None:
    data = tiny_spec(corpus_file, ladder={"widths": [16]})
    sweep(tmp_path, data)
    trained.clear()
    sweep(tmp_path, {**data, "model": {**data["model"], "mlp_ratio": 4}})
    assert trained == []
    with pytest.raises(ResumeError, match=r"model.mlp_ratio was 4, now 2"):
        sweep(tmp_path, {**data, "model": {**data["model"], "mlp_ratio": 2}})


def test_over_budget_is_refused_before_anything_is_written(
    tmp_path: Path, corpus_file: Path
) -> None:
    data = tiny_spec(corpus_file, budget={"max_over_target": 0.2})
    with pytest.raises(
        RefusedError, match=r"would cost [\d.]+ target runs.*any of these would fit"
    ):
        sweep(tmp_path, data)
    assert list(tmp_path.iterdir()) == []


def test_all_diverged_is_stuck_and_a_wider_range_goes_on(
    tmp_path: Path, corpus_file: Path, trained: list[Trial]
) -> None:
    high = {"low": 1e4, "high": 1e5, "points": 2}
    decay = {"value": 0.1}
    folder, ladder = sweep(
        tmp_path, tiny_spec(corpus_file, axes={"lr": high, "weight_decay": decay})
    )
    assert ladder.stuck is not None
    assert "lower axes.lr.low" in ladder.stuck
    status = folder.read_status()
    assert status is not None
    assert status["state"] == "stuck"
    assert (folder.path / "loss.png").exists()
    low = {"low": 0.01, "high": 0.1, "points": 2}
    _, ladder = sweep(tmp_path, tiny_spec(corpus_file, axes={"lr": low, "weight_decay": decay}))
    assert ladder.is_finished


def test_failures_are_tried_again_by_the_same_command(
    tmp_path: Path, corpus_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:

        def fail(config: Any, trial: Trial) -> Result:
            raise OSError("the disk is full")

        broken.setattr(loop, "train", fail)
        folder, ladder = sweep(tmp_path, tiny_spec(corpus_file))
        assert ladder.stuck is not None
        assert "the disk is full" in ladder.stuck
    folder, ladder = sweep(tmp_path, tiny_spec(corpus_file))
    assert ladder.is_finished
    undisturbed, _ = sweep(tmp_path / "other", tiny_spec(corpus_file))
    assert answers(folder)["show"]["choices"] == answers(undisturbed)["show"]["choices"]


def test_two_drivers_of_one_sweep(tmp_path: Path, corpus_file: Path) -> None:
    folder, _ = sweep(tmp_path, tiny_spec(corpus_file, ladder={"widths": [16]}))
    with folder.held(), pytest.raises(ResumeError, match="in use by process"):
        sweep(tmp_path, tiny_spec(corpus_file, ladder={"widths": [16]}))


def test_results_in_a_storage_elsewhere(
    tmp_path: Path, corpus_file: Path, trained: list[Trial]
) -> None:
    url = f"sqlite:///{tmp_path / 'team.db'}"
    spec = Spec.from_dict(tiny_spec(corpus_file))
    folder = run(spec, inline(tmp_path, storage=url), quiet).folder
    assert not (folder.path / "trials.db").exists()
    assert len(open_result("tiny", tmp_path).results) == TRIALS
    trained.clear()
    sweep(tmp_path, tiny_spec(corpus_file))  # the folder remembers where
    assert trained == []


def test_compute_reaches_the_trainer(tmp_path: Path, corpus_file: Path) -> None:
    data = tiny_spec(corpus_file, compute={"device": "cpu:0", "cpus": 2})
    config = BuiltIn.of(Spec.from_dict(data)).trial_config
    assert (config.device, config.threads) == ("cpu:0", 2)


@pytest.mark.parametrize(("key", "value"), [("device", "cuda:63"), ("cpus", 4096)])
def test_what_this_machine_has_not_is_refused(
    tmp_path: Path, corpus_file: Path, key: str, value: Any
) -> None:
    with pytest.raises(SpecError, match=rf"^compute\.{key}: got .*this machine"):
        sweep(tmp_path, tiny_spec(corpus_file, compute={key: value}))
    assert list(tmp_path.iterdir()) == []


def test_one_storage_never_mixes_incomparable_sweeps(tmp_path: Path, corpus_file: Path) -> None:
    """Two people, two results folders, one server, one name."""
    url = f"sqlite:///{tmp_path / 'team.db'}"

    def run_in(results: str, **tables: Any) -> None:
        spec = Spec.from_dict(tiny_spec(corpus_file, ladder={"widths": [16]}, **tables))
        run(spec, inline(tmp_path / results, storage=url), quiet)

    run_in("mine")
    with pytest.raises(ResumeError, match="holds another sweep named 'tiny'"):
        run_in("theirs", train={"steps": 5})
    run_in("again")  # the same sweep from another folder is welcome
    spec = Spec.from_dict(tiny_spec(corpus_file, ladder={"widths": [16]}))
    other = inline(tmp_path / "mine", storage="sqlite:///other.db")
    with pytest.raises(ResumeError, match="this sweep's results are in"):
        run(spec, other, quiet)


def test_compute_reaches_ray(
    tmp_path: Path, corpus_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from telescope.dispatch.ray.tune import Size

    given: dict[str, Any] = {}

    @contextmanager
    def fake_opened(size: Any, by_width: Any, **options: Any) -> Iterator[str]:
        given.update(options, size=size, by_width=by_width)
        yield "a session"

    def fake_ray(source: Any, trainer: Any, **options: Any) -> None:
        assert source.is_due, "there is nothing to wait for"
        given.update(options, threads=trainer.config.threads, device=trainer.config.device)

    monkeypatch.setattr("telescope.dispatch.ray.tune.opened", fake_opened)
    monkeypatch.setattr("telescope.dispatch.ray.tune.run_ray", fake_ray)
    compute = {"cpus": 2, "gpus": 0.5, "device": "cpu", "workers": 3}
    data = tiny_spec(corpus_file, compute=compute, train={"timeout": 7.5})
    spec = Spec.from_dict(data)
    run(spec, Options(tmp_path, ray_address="head:6379", check=False), quiet)
    assert given.pop("packs").size == 1  # on a CPU auto is one
    assert given.pop("owner") == str((tmp_path / "tiny").resolve())
    assert given == {
        **{"size": Size(3, cpus=2, gpus=0.5), "by_width": None, "address": "head:6379"},
        **{"threads": 2, "device": "cpu", "timeout": 7.5, "logs": None},
        **{"takes_any_gpu": False, "session": "a session"},
    }


def test_time_left_is_what_remains_at_the_pace_so_far(tmp_path: Path, corpus_file: Path) -> None:
    """Six trials of 10 s at width 16 are done, three at width 32 remain, which cost 4x each."""
    spec = Spec.from_dict(tiny_spec(corpus_file))
    folder, _ = sweep(tmp_path, tiny_spec(corpus_file))
    results = open_result("tiny", tmp_path).results
    narrow = [replace(result, seconds=10.0) for result in results if result.trial.width == 16]
    recorder = Recorder(
        ladder=replay(spec.ladder_spec_with({16: 1.0, 32: 4.0}, 1.0), narrow),
        store=None,  # type: ignore[arg-type]
        folder=folder,
        screen=quiet(),
        name="tiny",
        workers={16: 2, 32: 2},
        planned={16: 6, 32: 3},
        known=narrow,
    )
    assert recorder.progress("running").eta_seconds == pytest.approx(3 * 40 / 2)


def test_the_target_run_counts_with_its_own_steps_and_batch(corpus_file: Path) -> None:
    def target_flops(**target: int) -> float:
        data = tiny_spec(corpus_file, target={"width": 64, **target}, optimizer={"name": "adamw"})
        return BuiltIn.of(Spec.from_dict(data)).target_flops

    assert target_flops(steps=40, batch_size=8) == pytest.approx(20 * target_flops())


def test_the_answer_of_show_is_that_of_transfer(tmp_path: Path, corpus_file: Path) -> None:
    folder, ladder = sweep(tmp_path, tiny_spec(corpus_file, target={"width": 64, "steps": 40}))
    shown = show_as_json(open_result(folder.path, tmp_path))["target"]
    handed = transfer(open_result(folder.path, tmp_path).spec, ladder, width=None, steps=None)
    assert (shown["lr"], shown["weight_decay"]) == (handed.lr, handed.weight_decay)
    assert handed.weight_decay == pytest.approx(ladder.choices[-1].point.weight_decay / 10)


class Notes(PlainScreen):
    """A screen that remembers what it was told in words."""

    def __init__(self) -> None:
        super().__init__(Console(quiet=True))
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def checked(results: Path, data: dict[str, Any]) -> list[str]:
    """Run with the coordinate check; returns what was said of it."""
    screen = Notes()
    run(Spec.from_dict(data), Options(results, dispatcher="inline"), lambda: screen)
    return screen.notes


def test_the_coordinate_check_is_made_once_per_sweep(tmp_path: Path, corpus_file: Path) -> None:
    data = tiny_spec(corpus_file, ladder={"widths": [16]})
    (note,) = checked(tmp_path, data)
    assert note.startswith("tiny: coordinate check PASS in ")
    kept = json.loads((tmp_path / "tiny" / "coordcheck.json").read_text())
    assert kept["verdict"] == "PASS"
    assert (tmp_path / "tiny" / "coordcheck.png").exists()
    assert checked(tmp_path, tiny_spec(corpus_file)) == []  # it goes on, with another width


def test_a_verdict_on_another_training_does_not_count(tmp_path: Path, corpus_file: Path) -> None:
    data = tiny_spec(corpus_file, ladder={"widths": [16]})
    folder = Folder(tmp_path / "tiny")
    folder.create()
    folder.write_check({"verdict": "PASS", "fingerprint": "of another model"})
    assert len(checked(tmp_path, data)) == 1


def test_a_wrong_model_is_refused_before_a_trial_and_can_be_mended(
    tmp_path: Path, corpus_file: Path, trained: list[Trial]
) -> None:
    results = tmp_path / "results"
    results.mkdir()
    wrong = {"ladder": {"widths": [16]}, "model": {"file": wide_block(tmp_path)}}
    with pytest.raises(RefusedError, match=r"coordinate check FAIL: .*grows.*--no-check"):
        checked(results, tiny_spec(corpus_file, **wrong))
    assert trained == []
    assert list(results.iterdir()) == []  # so the mended model is not another sweep's
    url = f"sqlite:///{tmp_path / 'team.db'}"
    with pytest.raises(RefusedError, match="coordinate check FAIL"):
        run(Spec.from_dict(tiny_spec(corpus_file, **wrong)), Options(results, storage=url), quiet)
    assert list(results.iterdir()) == []
    mended = Spec.from_dict(tiny_spec(corpus_file, ladder={"widths": [16]}))
    ran = run(mended, inline(results, storage=url), quiet)
    folder, ladder = ran.folder, ran.ladder
    assert ladder.is_finished
    record = folder.read_check()
    assert record is not None
    assert record["verdict"] is None
    assert not (folder.path / "coordcheck.png").exists()


def test_no_check_runs_a_wrong_model_all_the_same(
    tmp_path: Path, corpus_file: Path, trained: list[Trial]
) -> None:
    wrong = {"ladder": {"widths": [16]}, "model": {"file": wide_block(tmp_path)}}
    folder, ladder = sweep(tmp_path, tiny_spec(corpus_file, **wrong))
    assert ladder.is_finished
    assert trained
    record = folder.read_check()
    assert record is not None
    assert (record["verdict"], record["reason"]) == (None, "--no-check")
    # Having started without, it goes on without; finished, it has nothing to check for.
    wider = tiny_spec(corpus_file, model=wrong["model"])
    assert checked(tmp_path, wider) == []
    assert checked(tmp_path, wider) == []
    assert folder.read_check() == record


def full_check(results: Path, data: dict[str, Any], verdict: str) -> dict[str, Any]:
    """Put a verdict of the full check on this training where `telescope check` does."""
    folder = Folder(results / "tiny")
    folder.create()
    record = {"verdict": verdict, "fingerprint": BuiltIn.of(Spec.from_dict(data)).fingerprint}
    folder.write_check(record)
    return record


def test_a_verdict_of_the_full_check_stands(
    tmp_path: Path, corpus_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The short form, which sees less, is neither made nor put in its place."""
    monkeypatch.setattr("telescope.sweep.modelcheck.coordinate_check", None)
    data = tiny_spec(corpus_file, ladder={"widths": [16]})
    failed = full_check(tmp_path, data, "FAIL")
    with pytest.raises(RefusedError, match=r"FAIL: as kept in .*tiny; .*--no-check"):
        checked(tmp_path, data)
    folder = Folder(tmp_path / "tiny")
    assert folder.read_check() == failed
    sweep(tmp_path, data)  # with --no-check
    assert folder.read_check() == failed
    passed = full_check(tmp_path / "other", data, "PASS")
    assert checked(tmp_path / "other", data) == [
        f"tiny: coordinate check PASS: as kept in {tmp_path / 'other' / 'tiny'}"
    ]
    assert Folder(tmp_path / "other" / "tiny").read_check() == passed


def test_a_check_of_other_training_does_not_replace_a_sweeps_verdict(
    tmp_path: Path, corpus_file: Path
) -> None:
    data = tiny_spec(corpus_file, ladder={"widths": [16]})
    folder, _ = sweep(tmp_path, data)
    before = folder.read_check()
    mine, other = (
        BuiltIn.of(Spec.from_dict(tiny_spec(corpus_file, optimizer={"rule": rule})))
        for rule in ("mup", "paper")
    )
    one = Extent(width_factors=(1, 2), steps=(1,), seeds=(0,))
    check = coordinate_check(mine.trial_config, Point.of(lr=0.004, weight_decay=0.1), one)
    assert not write_check(folder, check, other)
    assert folder.read_check() == before
    assert write_check(folder, check, mine)
    kept = folder.read_check()
    assert kept is not None
    assert kept["verdict"] == check.verdict


def test_a_device_of_the_clusters_alone_skips_the_check(
    tmp_path: Path, corpus_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("telescope.dispatch.ray.tune.opened", lambda *_, **__: nullcontext())
    monkeypatch.setattr("telescope.dispatch.ray.tune.run_ray", lambda *_, **__: None)
    compute = {"device": "cuda:99", "workers": 1}
    spec = Spec.from_dict(tiny_spec(corpus_file, compute=compute))
    screen = Notes()
    run(spec, Options(tmp_path, ray_address="head:6379"), lambda: screen)
    (note,) = screen.notes
    assert "no coordinate check: this machine has no device 'cuda:99'; `telescope check`" in note
    record = Folder(tmp_path / "tiny").read_check()
    assert record is not None
    assert record["verdict"] is None
    with pytest.raises(SpecError, match=r"compute\.device: got 'cuda:99'"):  # in place it is wrong
        run(spec, Options(tmp_path / "here"), quiet)


def test_another_rule_on_purpose_is_warned_of_and_goes_on(
    tmp_path: Path, corpus_file: Path
) -> None:
    data = tiny_spec(corpus_file, ladder={"widths": [16]}, optimizer={"rule": "paper"})
    (note,) = checked(tmp_path, data)
    assert "warning: coordinate check FAIL, expected of rule 'paper'" in note
    folder = Folder(tmp_path / "tiny")
    verdict = folder.read_check()
    assert verdict is not None
    assert verdict["verdict"] == "FAIL"
    assert open_result("tiny", tmp_path).ladder.is_finished
