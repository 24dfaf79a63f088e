"""The command `telescope scaling`: what it plans, trains, keeps and answers."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import telescope
from conftest import ROOT, as_toml, one_line, tiny_spec

from telescope.errors import RefusedError, SpecError
from telescope.markup import text
from telescope.records import Result, Status, Trial
from telescope.report.live import QuietScreen
from telescope.report.scaling import laws_table, print_scaling, print_scaling_plan, read_scaling
from telescope.spec.catalog import find_sweep, read_toml
from telescope.spec.spec import Spec
from telescope.sweep import scaling
from telescope.sweep.family import Run
from telescope.sweep.run import Options
from telescope.sweep.scaling import Family, Plan, make_plan, run_scaling

SIZES = [
    {"width": 16, "tokens": 300},
    {"width": 16, "tokens": 600, "depth": 2},
    {"width": 32, "tokens": 900},
    {"width": 48, "tokens": 1500, "batch_size": 8},
]


def small_spec(corpus: Path, **tables: Any) -> dict[str, Any]:
    """A family of four sizes that trains in seconds; two sizes of one width differ in depth."""
    given: dict[str, Any] = {
        "ladder": {"widths": [16]},
        "target": {"width": 48},
        "axes": {"lr": {"low": 0.02, "high": 0.16, "points": 3}, "weight_decay": {"value": 0.1}},
        "scaling": {"sizes": SIZES, "seeds": [0, 1], "adamw": {"betas": [0.9, 0.95]}},
        "budget": {"max_over_target": 1000.0},
    }
    return tiny_spec(corpus, **{**given, **tables})


def asked(spec: Spec, results: Path, said: list[str] | None = None) -> dict[str, Any]:
    options = Options(results=results, dispatcher="inline", check=False)
    say = (said if said is not None else []).append
    return run_scaling(spec, options, QuietScreen, say)


def without_times(found: Mapping[str, Any]) -> dict[str, Any]:
    """An answer without what differs from run to run: seconds and places."""
    plain: dict[str, Any] = json.loads(json.dumps(found))
    for size in plain["sizes"]:
        for run in size["runs"].values():
            del run["seconds"]
    for tuning in plain["tuning"].values():
        del tuning["folder"]
    for variant in plain.get("variants", {}).values():
        variant.update(without_times(variant))
    return plain


def as_toml_inline(size: Mapping[str, Any]) -> str:
    return "{ " + ", ".join(f"{key} = {value}" for key, value in size.items()) + " }"


@pytest.fixture(scope="module")
def found(
    tmp_path_factory: pytest.TempPathFactory, corpus_file: Path
) -> tuple[Spec, Path, dict[str, Any]]:
    """A family with one variant, trained: its spec, the folder of results and the answer."""
    results = tmp_path_factory.mktemp("scaling")
    variants = {"narrow-mlp": {"model": {"mlp_ratio": 1}}}
    spec = Spec.from_dict(small_spec(corpus_file, variants=variants))
    return spec, results, asked(spec, results)


def test_every_size_is_trained_with_every_seed_under_both_optimizers(
    found: tuple[Spec, Path, dict[str, Any]],
) -> None:
    _, _, answer = found
    for one in (answer, answer["variants"]["narrow-mlp"]):
        assert [(s["width"], s["depth"], s["batch_size"]) for s in one["sizes"]] == [
            (16, 1, 4),
            (16, 2, 4),
            (32, 1, 4),
            (48, 1, 8),
        ]
        for size in one["sizes"]:
            assert size["tokens"] == size["steps"] * size["batch_size"] * 16
            assert size["seeds"] == [0, 1]
            for name in ("muon", "adamw"):
                assert set(size["runs"][name]["losses"]) == {"0", "1"}
                assert all(0 < x < 30 for x in size["runs"][name]["losses"].values())
            # lr · weight_decay · steps is the ladder's.
            ladder = one["tuning"]["muon"]["point"]
            point = size["runs"]["muon"]["point"]
            assert point["weight_decay"] * size["steps"] == pytest.approx(
                ladder["weight_decay"] * 4
            )
        assert one["laws"]["optimizers"] == ["muon", "adamw"]
        assert len(one["laws"]["ratios"]) == 4
        assert not one["missing"]
    first, second = (
        a["sizes"][0]["parameters"] for a in (answer, answer["variants"]["narrow-mlp"])
    )
    assert first > second


def test_a_finished_family_is_never_trained_again(
    found: tuple[Spec, Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, results, answer = found

    def refuse(*_: object) -> None:
        raise AssertionError("trains")

    monkeypatch.setattr("telescope.train.loop.train", refuse)
    monkeypatch.setattr("telescope.packs.trainer.train_pack", refuse)
    assert json.dumps(without_times(asked(spec, results))) == json.dumps(without_times(answer))


def test_the_spec_s_own_sweep_tunes_its_own_optimizer(
    found: tuple[Spec, Path, dict[str, Any]],
) -> None:
    _, results, answer = found
    assert answer["tuning"]["muon"]["folder"] == str(results / "tiny")
    assert answer["tuning"]["adamw"]["folder"] == str(results / "tiny" / "scaling" / "adamw")
    assert not (results / "tiny" / "scaling" / "muon").exists()


def test_the_answer_is_kept_shown_and_reported(
    found: tuple[Spec, Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from rich.console import Console

    _, results, answer = found
    kept = read_scaling(results / "tiny")
    assert kept
    assert without_times(kept) == {
        key: value for key, value in without_times(answer).items() if key != "variants"
    }
    assert (results / "tiny" / "scaling" / "scaling.png").read_bytes()[:4] == b"\x89PNG"
    print_scaling(Console(width=80, markup=False, highlight=False), answer)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert "narrow-mlp" in printed
    assert answer["sentence"][:40] in " ".join(printed.split())
    out = tmp_path / "report.html"
    done = telescope("report", "tiny", "--results", str(results), "--out", str(out), cwd=tmp_path)
    assert done.returncode == 0
    page = out.read_text()
    assert 'id="scaling"' in page
    assert text(answer["sentence"].split(" with ")[0]) in page
    assert "α of Muon" in laws_table(answer)
    assert read_scaling(tmp_path) is None


def test_two_runs_of_a_size_differ_in_nothing_but_the_optimizer(corpus_file: Path) -> None:
    spec = Spec.from_dict(small_spec(corpus_file))
    family = Family.of(spec)
    pairs = [family.tuned, *family.sizes.values()]
    assert len(pairs) == 5
    for pair in pairs:
        muon, adamw = (pair[name].as_dict() for name in ("muon", "adamw"))
        tables = {key for key in muon.keys() | adamw.keys() if muon.get(key) != adamw.get(key)}
        assert tables == {"name", "optimizer"}
        differing = {
            key
            for key in muon["optimizer"].keys() | adamw["optimizer"].keys()
            if muon["optimizer"].get(key) != adamw["optimizer"].get(key)
        }
        assert differing == {"name", "betas"}
        assert adamw["optimizer"]["betas"] == [0.9, 0.95]
        assert pair["muon"].model_source == pair["adamw"].model_source
    plan = Plan.of(family)
    tuned = [sweep.ladder_spec for sweep in plan.ladders.values()]
    assert tuned[0].axes == tuned[1].axes
    assert tuned[0].tolerance == tuned[1].tolerance
    for of in plan.sizes.values():
        assert of["muon"].flops_6nd == of["adamw"].flops_6nd
        assert of["muon"].cost.model == of["adamw"].cost.model
        assert of["muon"].flops > of["adamw"].flops, "Newton-Schulz"


def test_axes_of_one_optimizer_alone(corpus_file: Path) -> None:
    own = {"adamw": {"axes": {"lr": {"low": 0.001, "high": 0.1, "points": 4}}}}
    table = {"sizes": SIZES, **own}
    tuned = Family.of(Spec.from_dict(small_spec(corpus_file, scaling=table))).tuned
    assert [spec.axes["lr"].points for spec in tuned.values()] == [3, 4]


WRONG: list[tuple[Any, list[str]]] = [
    # ([scaling], the beginnings of its faults)
    ({"sizes": SIZES[:1]}, ["scaling.sizes: got [{'width': 16, 'tokens': 300}], must be two or"]),
    ({"sizes": [SIZES[0], SIZES[0]]}, ["scaling.sizes.1: got"]),
    ({"sizes": [{"width": 16}, SIZES[0]]}, ["scaling.sizes.0.tokens: missing"]),
    ({"sizes": SIZES, "seeds": []}, ["scaling.seeds: got [], must be one or more"]),
    ({"sizes": SIZES, "optimizers": ["sgd"]}, ["scaling.optimizers.0: got 'sgd', must be 'muon'"]),
    ({"sizes": SIZES, "adamw": {"beta": 1}}, ["scaling.adamw.beta: unknown key; allowed in [sca"]),
    ({"sizes": [{**SIZES[0], "lr": 1}, SIZES[2]]}, ["scaling.sizes.0.lr: unknown key; allowed in"]),
    ({"sizs": SIZES}, ["scaling.sizes: missing", "scaling.sizs: unknown key; allowed in [scaling"]),
]


@pytest.mark.parametrize(("table", "faults"), WRONG, ids=[str(w[0])[:40] for w in WRONG])
def test_wrong_keys_are_named(corpus_file: Path, table: Any, faults: list[str]) -> None:
    with pytest.raises(SpecError) as caught:
        Spec.from_dict(small_spec(corpus_file, scaling=table))
    said = caught.value.faults
    assert len(said) == len(faults), said
    assert all(one.startswith(start) for one, start in zip(said, faults, strict=True)), said
    one_line(caught.value)


def test_sizes_that_cannot_be_are_named_together(corpus_file: Path) -> None:
    sizes = [{"width": 8, "tokens": 300}, {"width": 20, "tokens": 300}, *SIZES]
    with pytest.raises(SpecError) as caught:
        Family.of(Spec.from_dict(small_spec(corpus_file, scaling={"sizes": sizes})))
    assert [fault.split(": got")[0] for fault in caught.value.faults] == [
        "scaling.sizes.0: target.width",
        "scaling.sizes.1: target.width",
    ]
    alike = [{"width": 16, "tokens": 300}, {"width": 16, "tokens": 310}]
    with pytest.raises(SpecError, match=r"^scaling.sizes.1: it has the width and steps of a size"):
        Family.of(Spec.from_dict(small_spec(corpus_file, scaling={"sizes": alike})))


def test_sizes_of_one_compute_are_refused_before_anything_trains(corpus_file: Path) -> None:
    """Two batches of one model on the same tokens: the FLOPs of Muon differ, 6ND does not."""
    sizes = [{"width": 16, "tokens": 1280}, {"width": 16, "tokens": 1280, "batch_size": 8}]
    spec = Spec.from_dict(small_spec(corpus_file, scaling={"sizes": sizes}))
    with pytest.raises(SpecError, match=r"tiny: scaling.sizes: all sizes cost the same compute"):
        make_plan(spec, None)
    other = [*sizes, {"width": 32, "tokens": 1280}]
    assert make_plan(Spec.from_dict(small_spec(corpus_file, scaling={"sizes": other})), None)


def test_the_plan_is_written_too(corpus_file: Path, tmp_path: Path) -> None:
    data = small_spec(corpus_file)
    sizes = ", ".join(map(as_toml_inline, SIZES))
    written = as_toml({key: value for key, value in data.items() if key != "scaling"})
    (tmp_path / "tiny.toml").write_text(f"{written}\n[scaling]\nsizes = [{sizes}]\n")
    done = telescope("scaling", "tiny.toml", "--plan", "--json", "--out", "plan.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "plan.json").read_text()) == json.loads(done.stdout)


def test_without_the_table_and_with_another_trainer_it_says_so(corpus_file: Path) -> None:
    with pytest.raises(SpecError, match="scaling: missing; a table"):
        Family.of(Spec.from_dict(tiny_spec(corpus_file)))
    foreign = {
        "name": "x",
        "ladder": {"widths": [16]},
        "target": {"width": 32},
        "axes": {"lr": {"low": 0.1, "high": 1.0, "points": 3}},
        "trainer": {"command": ["true", "{width}", "{lr}", "{seed}"]},
        "cost": {"parameters": {"16": 1.0, "32": 4.0}},
        "scaling": {"sizes": SIZES},
    }
    with pytest.raises(SpecError, match=r"\[trainer\] trains this sweep, and has no placeholder"):
        Family.of(Spec.from_dict(foreign))


def test_the_budget_is_held_before_anything_trains(corpus_file: Path, tmp_path: Path) -> None:
    spec = Spec.from_dict(small_spec(corpus_file, budget={"max_over_target": 5.0}))
    with pytest.raises(RefusedError, match=r"the family may cost .* budget.max_over_target ="):
        asked(spec, tmp_path)
    assert not list(tmp_path.iterdir())
    assert make_plan(spec, None)["refused"]


def test_the_plan_counts_what_the_runs_cost(
    found: tuple[Spec, Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    from rich.console import Console

    spec, results, answer = found
    plan = make_plan(spec, 1)
    for planned, done in zip(plan["sizes"], answer["sizes"], strict=True):
        for name in ("muon", "adamw"):
            (folder,) = (results / "tiny" / "scaling").glob(
                f"{name}-w{done['width']}-d{done['depth']}-*"
            )
            with (folder / "trials.csv").open() as table:
                rows = list(csv.DictReader(table))
            assert [float(row["flops"]) for row in rows] == [planned["flops"][name]] * 2
    print_scaling_plan(Console(width=80, markup=False, highlight=False), plan)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert "runs       16: seeds 0, 1" in printed


def result_of(trial: Trial, loss: float | None) -> Result:
    if loss is None:
        return Result(trial, Status.DIVERGED, reason="loss nan\nmore")
    return Result(trial, Status.COMPLETE, loss=loss)


def test_a_run_without_a_loss_leaves_its_seed_out_for_both(
    found: tuple[Spec, Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the first size Muon's seed 1 diverged, of the second all of AdamW's."""
    spec, results, _ = found
    gone = {("muon", 16, 1, 1), ("adamw", 16, 2, 0), ("adamw", 16, 2, 1)}

    def trained(runs: list[Run], *_: object) -> list[dict[Trial, Result]]:
        known = []
        for run in runs:
            config = run.sweep.spec
            depth = (config.model.model_extra or {})["depth"] if config.model else 0
            at = (config.optimizer.name, config.target.width, depth)
            known.append(
                {
                    t: result_of(t, None if (*at, t.seed) in gone else 3.0 / at[1] + t.seed / 100)
                    for t in run.trials
                }
            )
        return known

    monkeypatch.setattr(scaling, "train_family", trained)
    plain = spec.every_variant["plain"]
    answer = asked(plain, results)
    assert [size["seeds"] for size in answer["sizes"]] == [[0], [], [0, 1], [0, 1]]
    assert len(answer["laws"]["ratios"]) == 3
    assert [line.split(":")[0] for line in answer["missing"]] == [
        "muon-w16-d1-b4-s5, seed 1",
        "adamw-w16-d2-b4-s9, seed 0",
        "adamw-w16-d2-b4-s9, seed 1",
    ]
    assert answer["missing"][0].endswith("diverged, loss nan")
    gone |= {("muon", 32, 1, s) for s in (0, 1)} | {("muon", 48, 1, s) for s in (0, 1)}
    with pytest.raises(RefusedError, match="nothing to fit: 1 of 4 sizes have a loss under every"):
        asked(plain, results)


def test_another_training_in_a_size_s_folder_is_refused(
    found: tuple[Spec, Path, dict[str, Any]], corpus_file: Path
) -> None:
    _, results, _ = found
    folder = next((results / "tiny" / "scaling").glob("muon-w32*"))
    record = json.loads((folder / "spec.json").read_text())
    record["comparable_if_equal"]["train.schedule"] = "constant"
    before = (folder / "spec.json").read_text()
    (folder / "spec.json").write_text(json.dumps(record))
    try:
        with pytest.raises(Exception, match=r"train.schedule was constant, now"):
            asked(Spec.from_dict(small_spec(corpus_file)), results)
    finally:
        (folder / "spec.json").write_text(before)


def test_a_killed_family_goes_on_and_answers_the_same(corpus_file: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle of the sizes: the same command gives the answer of a whole run."""
    sizes = [{**size, "tokens": 8 * int(size["tokens"])} for size in SIZES[:3]]
    data = small_spec(corpus_file)
    inline = f"[{', '.join(map(as_toml_inline, sizes))}]"
    written = as_toml({key: value for key, value in data.items() if key != "scaling"})
    (tmp_path / "tiny.toml").write_text(f"{written}\n[scaling]\nseeds = [0]\nsizes = {inline}\n")
    command = [sys.executable, "-m", "telescope", "scaling", "tiny.toml", "--json"]
    command += ["--dispatcher", "inline", "--results", "killed"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=-3)
    curves = tmp_path / "killed" / "tiny" / "scaling"
    deadline = time.monotonic() + 240
    while len(list(curves.glob("*-w*/curves/*.csv"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    there = len(list(curves.glob("*-w*/curves/*.csv")))
    assert 2 <= there < 6, "killed in the middle"
    spec = Spec.load(tmp_path / "tiny.toml")
    resumed = asked(spec, tmp_path / "killed")
    whole = asked(spec, tmp_path / "whole")
    assert json.dumps(without_times(resumed)) == json.dumps(without_times(whole))


@pytest.mark.ray
def test_it_runs_on_ray_as_inline(corpus_file: Path, tmp_path: Path) -> None:
    table = {"sizes": SIZES[::2], "seeds": [0], "optimizers": ["muon"]}
    spec = Spec.from_dict(small_spec(corpus_file, scaling=table))
    options = Options(results=tmp_path / "ray", workers=2, check=False)
    on_ray = run_scaling(spec, options, QuietScreen, print)
    assert without_times(on_ray) == without_times(asked(spec, tmp_path / "inline"))


PUBLISHED = [
    # layers, width, tokens and sequences of Table 1 in arXiv 2502.16982; parameters that it prints
    (12, 1536, 8.92e9, 96, None),
    (14, 1792, 14.04e9, 128, 545e6),
    (16, 2048, 20.76e9, 160, 822e6),
    (18, 2304, 28.54e9, 192, 1.1e9),
    (20, 2560, 38.91e9, 256, 1.5e9),
]


@pytest.fixture(
    scope="module", params=[(0, 4), pytest.param((0, 1, 2, 3, 4), marks=pytest.mark.slow)]
)
def moonlight(request: pytest.FixtureRequest) -> tuple[tuple[int, ...], dict[str, Any]]:
    """The plan of the published family, and which of its sizes: to count a model takes seconds."""
    sizes = read_toml(find_sweep("moonlight-scaling"))["scaling"]["sizes"]
    written = ", ".join(as_toml_inline(sizes[number]) for number in request.param)
    spec = Spec.load("moonlight-scaling", [f"scaling.sizes=[{written}]"])
    return request.param, make_plan(spec, None)


def test_the_published_family_on_paper(
    moonlight: tuple[tuple[int, ...], dict[str, Any]],
) -> None:
    """Parameters by hand; the paper cuts its numbers: 545.9 M is its 545M, 1.586 B its 1.5B."""
    numbers, sizes = moonlight[0], moonlight[1]["sizes"]
    published = [PUBLISHED[number] for number in numbers]
    for size, (layers, width, tokens, batch, printed) in zip(sizes, published, strict=True):
        hidden = 256 * -(-int(8 * width / 3) // 256)
        matrices = layers * (4 * width**2 + 3 * width * hidden)
        assert size["parameters_without_embeddings"] == matrices
        assert size["parameters"] == matrices + 2 * 163840 * width
        assert size["depth"] == layers
        assert abs(size["tokens"] - tokens) <= batch * 8192 / 2
        assert size["tokens"] == size["steps"] * batch * 8192
        assert size["flops_6nd"] == 6 * matrices * size["tokens"]
        if printed:
            unit = 1e6 if printed < 1e9 else 1e8
            assert matrices // unit * unit == printed
    assert sizes[0]["parameters_without_embeddings"] == 339_738_624, "the paper prints 399M"
    # Twice the multiplications of every matrix forward, and twice that backward; the readout too.
    for size in sizes:
        dense = 6 * (size["parameters"] - 163840 * size["width"]) * size["tokens"]
        attention = 3 * 4 * size["depth"] * size["width"] * 8192 * size["tokens"]
        assert size["flops"]["adamw"] == pytest.approx(dense + attention, rel=0.1)
        share = size["flops"]["muon"] / size["flops"]["adamw"] - 1
        assert 0.0005 < share < 0.01, "Newton-Schulz next to 10^6 tokens per step"


def test_the_published_family_is_of_one_shape_per_parameter(
    moonlight: tuple[tuple[int, ...], dict[str, Any]],
) -> None:
    """Tokens per parameter fall smoothly, 26.3 to 24.5, with 339.7 M, not 399 M, in the table."""
    numbers, plan = moonlight
    ratios = [size["tokens"] / size["parameters_without_embeddings"] for size in plan["sizes"]]
    assert np.all(np.diff(ratios) < 0)
    published = [26.3, 25.7, 25.3, 24.9, 24.5]
    assert ratios == pytest.approx([published[number] for number in numbers], abs=0.06)
    assert (ROOT / "models" / "llama.py").exists()
