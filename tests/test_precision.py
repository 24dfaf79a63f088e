"""bf16 by autocast, and `auto`: measured once, kept in spec.json, never measured again.

The clock is replaced by given seconds, so that what is chosen follows from hand numbers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import as_toml, tiny_spec, trial_config
from rich.console import Console
from torch import nn

from telescope.check.coordcheck import Extent
from telescope.cli import main
from telescope.config import OptimizerConfig, TrialConfig
from telescope.errors import ResumeError, SpecError
from telescope.records import Point, Trial
from telescope.report.live import PlainScreen
from telescope.spec.spec import Spec
from telescope.store.folder import Folder
from telescope.sweep.finished import open_result
from telescope.sweep.planning import make_plan
from telescope.sweep.prepare import prepare
from telescope.sweep.run import Options, run
from telescope.sweep.settle import settled
from telescope.train import choose
from telescope.train.choose import Timings
from telescope.train.loop import held_out_loss_of, set_up, take_step, train

TRIAL = Trial(16, Point.of(lr=0.05, weight_decay=0.1), 0)
AUTO: dict[str, Any] = {"train": {"precision": "auto"}, "optimizer": {"ns_dtype": "auto"}}


def test_bf16_is_in_the_model_alone(corpus_file: Path) -> None:
    setup = set_up(trial_config(corpus_file, precision="bf16"), TRIAL)
    seen: list[torch.dtype] = []
    for module in setup.model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda _m, _i, output: seen.append(output.dtype))
    parts = (setup.model, setup.optimizers, setup.batches, setup.train)
    loss = take_step(*parts, 0, "cpu")
    held_out_loss_of(setup)
    assert set(seen) == {torch.bfloat16}
    assert loss.dtype is torch.float32
    assert {p.dtype for p in setup.model.parameters()} == {torch.float32}
    states = [value for o in setup.optimizers for s in o.state.values() for value in s.values()]
    assert {value.dtype for value in states} == {torch.float32}


def test_bf16_trains_as_fp32_to_its_rounding(corpus_file: Path) -> None:
    losses = [
        train(trial_config(corpus_file, steps=20, precision=precision), TRIAL).loss
        for precision in ("fp32", "bf16")
    ]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_the_choice_is_for_the_sweep_as_a_whole() -> None:
    """bf16 loses 1 s on each of 10 narrow trials, and wins 4 s on each of the wide ones."""
    seconds = {"fp32": {32: 1.0, 64: 9.0}, "bf16": {32: 2.0, 64: 5.0}}
    assert Timings(seconds, {32: 10, 64: 2}, "cpu").choice == "fp32"  # 28 against 30
    assert Timings(seconds, {32: 10, 64: 3}, "cpu").choice == "bf16"  # 37 against 35
    assert Timings(seconds, {32: 4, 64: 1}, "cpu").choice == "fp32"  # 13 each
    assert Timings(seconds, {32: 10, 64: 3}, "cpu").gain == pytest.approx(37 / 35)


def test_both_parts_are_really_timed(corpus_file: Path) -> None:
    config = replace(
        trial_config(corpus_file, precision="auto"), optimizer=OptimizerConfig(ns_dtype="auto")
    )
    measured = choose.measure(config, {16: 3, 32: 1}, TRIAL.point)
    assert list(measured) == ["train.precision", "optimizer.ns_dtype"]
    for figures in measured.values():
        assert figures.trials == {16: 3, 32: 1}
        assert all(0 < figures.seconds[a][w] < 10 for a in ("fp32", "bf16") for w in (16, 32))


def test_the_clock_waits_for_the_device_that_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[object] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device=None: waited.append(device))
    choose._fastest({"fp32": lambda: None}, "cuda:1")
    assert set(waited) == {"cuda:1"}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What the timing says instead of the clock; empty, and nothing may be timed."""
    given = {"fp32": 2.0, "bf16": 1.0}

    def fastest(parts: Mapping[str, Any], device: str) -> dict[str, float]:
        assert given, "measured again"
        return dict(given)

    monkeypatch.setattr(choose, "_fastest", fastest)
    return given


def sweep(corpus: Path, results: Path, **tables: Any) -> dict[str, Any]:
    """Run a tiny sweep; returns its spec.json."""
    spec = Spec.from_dict(tiny_spec(corpus, **tables))
    options = Options(results, dispatcher="inline", check=False)
    folder, _ = run(spec, options, lambda: PlainScreen(Console()))
    return json.loads((folder.path / "spec.json").read_text())  # type: ignore[no-any-return]


def test_auto_is_settled_once(corpus_file: Path, tmp_path: Path, clock: dict[str, float]) -> None:
    first = sweep(corpus_file, tmp_path / "a", **AUTO)
    assert first["spec"]["train"]["precision"] == first["spec"]["optimizer"]["ns_dtype"] == "bf16"
    figures = first["measured"]["train.precision"]
    assert figures["seconds"] == {a: {"16": s, "32": s} for a, s in clock.items()}
    assert figures["device"] == "cpu"
    assert first["comparable_if_equal"]["train.precision"] == "bf16"
    assert open_result("tiny", tmp_path / "a").spec.optimizer.ns_dtype == "bf16"
    clock.clear()  # another machine, say
    again = sweep(corpus_file, tmp_path / "a", **AUTO, ladder={"seeds": [0, 1]})
    assert (again["fingerprint"], again["measured"]) == (first["fingerprint"], first["measured"])
    named = {"train": {"precision": "bf16"}, "optimizer": {"ns_dtype": "bf16"}}
    assert sweep(corpus_file, tmp_path / "b", **named)["fingerprint"] == first["fingerprint"]
    with pytest.raises(ResumeError, match=r"train\.precision was bf16, now fp32"):
        sweep(corpus_file, tmp_path / "a", train={"precision": "fp32"})


def test_run_and_transfer_say_the_same_of_a_settled_sweep(
    corpus_file: Path,
    tmp_path: Path,
    clock: dict[str, float],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Settled on fp32, Newton–Schulz is none that torch.optim.Muon has."""
    clock.update(fp32=1.0, bf16=2.0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    Path("tiny.toml").write_text(as_toml(tiny_spec(corpus_file, **AUTO)))
    said = []
    for command in ("run tiny.toml --dispatcher inline --no-check", "transfer tiny"):
        monkeypatch.setattr("sys.argv", ["telescope", *command.split()])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
        said.append(capsys.readouterr().out.count("see note"))
    assert said[0] == said[1] > 0


def test_an_older_sweep_goes_on_with_what_it_had(
    corpus_file: Path, tmp_path: Path, clock: dict[str, float]
) -> None:
    first = sweep(corpus_file, tmp_path)
    assert "train.precision" not in first["comparable_if_equal"]
    path = tmp_path / "tiny" / "spec.json"
    del first["spec"]["train"]["precision"], first["spec"]["train"]["compile"], first["measured"]
    path.write_text(json.dumps(first))
    clock.clear()
    assert sweep(corpus_file, tmp_path, **AUTO)["fingerprint"] == first["fingerprint"]


def test_auto_on_a_cluster_is_refused(corpus_file: Path) -> None:
    prepared = prepare(Spec.from_dict(tiny_spec(corpus_file, **AUTO)))
    with pytest.raises(SpecError, match=r"^train\.precision: got 'auto'.*set fp32 or bf16"):
        settled(prepared, None, is_cluster=True, say=print)


def test_a_plan_says_what_is_open(corpus_file: Path, clock: dict[str, float]) -> None:
    spec = Spec.from_dict(tiny_spec(corpus_file, **AUTO))
    plan, _ = make_plan(spec, probe=True)
    assert plan["auto"]["train.precision"] == "bf16 as measured now"
    clock.clear()
    plan, _ = make_plan(spec, probe=False)
    assert plan["auto"]["optimizer.ns_dtype"] == "decided by the first run"
    assert make_plan(Spec.from_dict(tiny_spec(corpus_file)), probe=False)[0]["auto"] == {}


def test_a_run_takes_what_the_check_has_settled(
    corpus_file: Path,
    tmp_path: Path,
    clock: dict[str, float],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And its verdict with it, which is on that very arithmetic; on another device neither."""
    one = Extent(width_factors=(1, 2), steps=(1,), seeds=(0,))
    monkeypatch.setattr("telescope.sweep.checking.Extent", lambda: one)
    data = tiny_spec(corpus_file, **AUTO)
    (tmp_path / "tiny.toml").write_text(as_toml(data))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["telescope", "check", "tiny.toml"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code in (0, 1)  # so short a check may say anything
    kept = json.loads((tmp_path / "results" / "tiny" / "coordcheck.json").read_text())
    assert kept["settled"] == {"train.precision": "bf16", "optimizer.ns_dtype": "bf16"}
    clock.clear()
    spec, folder = Spec.from_dict(data), Folder(tmp_path / "results" / "tiny")
    assert (
        "bf16 as kept in"
        in make_plan(spec, probe=True, folder=folder)[0]["auto"]["train.precision"]
    )
    capsys.readouterr()
    record = sweep(corpus_file, tmp_path / "results", **AUTO)
    assert "bf16, as the check has measured" in " ".join(capsys.readouterr().out.split())
    assert (record["fingerprint"], record["measured"]) == (kept["fingerprint"], kept["measured"])
    clock.update(fp32=1.0, bf16=2.0)
    monkeypatch.setitem(kept["measured"]["train.precision"], "device", "cuda")
    prepared, _ = settled(prepare(spec), None, check=kept, say=print)
    assert prepared.trial_config.train.precision == "fp32"


def test_a_plan_reads_what_a_sweep_has_settled(
    corpus_file: Path, tmp_path: Path, clock: dict[str, float]
) -> None:
    sweep(corpus_file, tmp_path, **AUTO)
    clock.clear()
    spec, folder = Spec.from_dict(tiny_spec(corpus_file, **AUTO)), Folder(tmp_path / "tiny")
    for probe in (True, False):
        plan, _ = make_plan(spec, probe=probe, folder=folder)
        assert plan["auto"]["optimizer.ns_dtype"] == f"bf16 as kept in {tmp_path / 'tiny'}"
    other = Spec.from_dict(tiny_spec(corpus_file, **AUTO, target={"width": 64}, name="tiny"))
    longer = other.model_copy(update={"train": replace(other.train, steps=5)})  # type: ignore[type-var]
    plan, _ = make_plan(longer, probe=False, folder=folder)
    assert plan["auto"]["optimizer.ns_dtype"] == "decided by the first run"


def test_the_folder_of_another_trainers_sweep_is_refused_in_words(
    corpus_file: Path, tmp_path: Path, clock: dict[str, float]
) -> None:
    data = tiny_spec(corpus_file, **AUTO)
    foreign = {key: data[key] for key in ("name", "target", "budget")} | {
        "ladder": {"widths": [16]},
        "axes": {"lr": {"low": 0.01, "high": 0.1, "points": 2}},
        "trainer": {"command": ["echo", '{{"loss": 1.0}}', "{width}", "{lr}", "{seed}"]},
        "cost": {"parameters": {"16": 1, "64": 8}},
    }
    run(
        Spec.from_dict(foreign),
        Options(tmp_path, dispatcher="inline", check=False),
        lambda: PlainScreen(Console()),
    )
    with pytest.raises(ResumeError, match="not comparable with this spec"):
        sweep(corpus_file, tmp_path, **AUTO)


@pytest.mark.parametrize("key", ["precision", "ns_dtype"])
def test_no_trial_trains_undecided(corpus_file: Path, key: str) -> None:
    config: TrialConfig = trial_config(corpus_file)
    if key == "precision":
        config = replace(config, train=replace(config.train, precision="auto"))
    else:
        config = replace(config, optimizer=OptimizerConfig(ns_dtype="auto"))
    with pytest.raises(SpecError, match=rf"^{key}: got 'auto'"):
        train(config, TRIAL)
