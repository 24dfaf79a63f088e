"""Every wrong spec is one line that names the key, what was given and what is allowed."""

from __future__ import annotations

import csv
import json
import math
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import telescope
from conftest import ROOT, as_toml, one_line, tiny_spec, trial_config

from telescope import Ladder
from telescope.config import DataConfig, OptimizerConfig, TrainConfig
from telescope.errors import SpecError
from telescope.records import Axis, Point, Trial
from telescope.spec.spec import Spec
from telescope.spec.tables import (
    BudgetTable,
    ComputeTable,
    LadderTable,
    LogTable,
    ModelTable,
    TargetTable,
)
from telescope.train.loop import train

WRONG = [
    # (override, the key that the message starts with, what it says is allowed)
    ("train.stepz=3", "train.stepz: unknown key", "did you mean steps?"),
    ("nix=3", "nix: unknown key", "name, ladder, target"),
    ("axes.lr.pints=3", "axes.lr.pints: unknown key", "low, high, points, value"),
    ("ladder.width=[32]", "ladder.width: unknown key", "did you mean widths?"),
    ("train.steps='a'", "train.steps: got 'a'", "an integer"),
    ("train.steps=true", "train.steps: got True", "an integer"),
    ("train.steps=1.5", "train.steps: got 1.5", "an integer"),
    ("train.steps=0", "train.steps: got 0", "an integer >= 1"),
    ("train.warmup=nan", "train.warmup: got nan", "a share in [0, 1]"),
    ("train.evals=251", "train.evals: got 251", "at most steps (250)"),
    ("train=3", "train: got 3", "a table [train]"),
    ("axes.lr.low=0.5", "axes.lr.low: got 0.5", "less than high (0.5)"),
    ("axes.lr.low=0.0", "axes.lr.low: got 0.0", "log-spaced"),
    ("axes.lr.low=nan", "axes.lr.low: got nan", "a finite number"),
    ("axes.lr.high=0.0040001", "axes.lr.high: got 0.0040001", "less than 1.001 times apart"),
    ("axes.lr.high=inf", "axes.lr.high: got inf", "a finite number"),
    ("axes.lr.points=1", "axes.lr.points: got 1", "from 2 to 1000"),
    ("axes.lr.value=3.0", "axes.lr.low: got 0.004", "left out beside value"),
    ("axes.lr={ value = 0.0 }", "axes.lr.value: got 0.0", "> 0"),
    ("axes.init_scale.value=0.0", "axes.init_scale.value: got 0.0", "> 0"),
    ("axes.init_scale.value=-1.0", "axes.init_scale.value: got -1.0", ">= 0"),
    ("axes.init_scale={ low = 0.0, high = 1.0, points = 3 }", "axes.init_scale.low: got 0", "> 0"),
    ("axes.beta.value=3.0", "axes.beta: got 'beta'", "one of lr, weight_decay"),
    ("axes.lr=3", "axes.lr: got 3", "a table [axes.lr]"),
    ("ladder.widths=[]", "ladder.widths: got []", "one positive width or more"),
    ("ladder.widths=32", "ladder.widths: got 32", "a list"),
    ("ladder.widths=[64,32]", "ladder.widths: got [64, 32]", "rising"),
    ("ladder.widths=[32,32]", "ladder.widths: got [32, 32]", "rising"),
    ("ladder.widths=[32,80]", "ladder.widths: got [32, 80]", "at most double the one before"),
    ("ladder.seeds=[0,0]", "ladder.seeds: got [0, 0]", "each once"),
    ("ladder.seeds=[-1]", "ladder.seeds.0: got -1", ">= 0"),
    ("ladder.policy=best", "ladder.policy: got 'best'", "'paper'"),
    ("target.width=64", "target.width: got 64", "at least 128"),
    ("model.head_dim=24", "ladder.widths: got 32", "divisible by model.head_dim (24)"),
    ("target.width=264", "target.width: got 264", "divisible by model.head_dim (16)"),
    ("model.file=nope.py", "model.file: cannot read", "relative to the sweep file"),
    ("name='../x'", "name: got '../x'", "no path"),
    ("name='a/b'", "name: got 'a/b'", "no path"),
    ("name=''", "name: got ''", "no path"),
    ("optimizer.name=sgd", "optimizer.name: got 'sgd'", "'muon' or 'adamw'"),
    ("optimizer.rule=spectral", "optimizer.rule: got 'spectral'", "'mup', 'paper'"),
    ("optimizer.betas=[0.1,2.0]", "optimizer.betas: got (0.1, 2.0)", "in [0, 1)"),
    ("optimizer.ns_steps=0", "optimizer.ns_steps: got 0", "from 1 to 99"),
    ("data.held_out=0", "data.held_out: got 0.0", "a share in (0, 1)"),
    ("data.source=3", "data.source: got 3", "a string or a list"),
    ("compute.workers=0", "compute.workers: got 0", ">= 1 or 'auto'"),
    ("compute.gpus=-1", "compute.gpus: got -1", ">= 0"),
    *(
        (f"{key}={value}", f"{key}", "")
        for key in (
            *("ladder.round", "target.width", "target.steps", "target.batch_size"),
            *("train.steps", "train.batch_size", "train.sequence_length", "train.evals"),
            *("train.checkpoint_every", "train.timeout", "data.eval_tokens"),
            *("compute.workers", "compute.cpus", "compute.gpus", "compute.pack"),
            *("compute.flop_rate", "budget.max_over_target", "optimizer.ns_steps"),
            *("optimizer.adamw_lr_ratio", "axes.lr.low", "axes.lr.points"),
        )
        for value in (10**40, -(10**20), 10**400, -(10**400), "1e400", "-1e308")
    ),
    *(
        (f"ladder.{key}=[{value}]", f"ladder.{key}", "")
        for key in ("seeds", "widths")
        for value in (2**63, 10**20, -(10**20), 10**400, "1e400")
    ),
    *(
        (f"{key}={value}", key, "")
        for key in ("model.vocab_size", "axes.lr.high")
        for value in (10**40, 10**400, "1e400")
    ),
    ("ladder.seeds=[18446744073709551616]", "ladder.seeds.0: got 18", f"<= {2**62}"),
    ("ladder.widths=[100000001]", "ladder.widths: got [100000001]", "at most 100,000,000"),
    ("train.steps=1000000000001", "train.steps: got 1000000000001", "<= 1,000,000,000,000"),
    ("model.depth=9223372036854775808", "model.depth: got 92", "which torch takes"),
    ("axes.lr.low=1e-320", "axes.lr.low: got 1e-320", "from 1e-30 to 1e+30"),
    ("axes.init_scale.value=1e308", "axes.init_scale.value: got 1e+308", "from 1e-30 to 1e+30"),
    ("train.timeout=1e9", "train.timeout: got 1000000000.0", "at most 1e+08 s"),
    ("budget.max_over_target=nan", "budget.max_over_target: got nan", "a finite number"),
]


@pytest.mark.parametrize(("override", "key", "allowed"), WRONG, ids=[w[0] for w in WRONG])
def test_wrong_values_say_where_what_and_what_is_allowed(
    override: str, key: str, allowed: str
) -> None:
    with pytest.raises(SpecError) as caught:
        Spec.load("quickstart", [override])
    message = str(caught.value)
    assert message.startswith(f"quickstart.toml: {key}")
    assert allowed in message
    one_line(caught.value)
    assert max(map(len, caught.value.faults)) < 250


def without(path: str) -> dict[str, Any]:
    data = tomllib.loads((ROOT / "sweeps" / "quickstart.toml").read_text())
    table, key = path.rsplit(".", 1) if "." in path else ("", path)
    owner = data
    for part in filter(None, table.split(".")):
        owner = owner[part]
    del owner[key]
    return data


@pytest.mark.parametrize(
    "key", ["name", "ladder", "target", "axes", "ladder.widths", "target.width", "train.steps"]
)
def test_missing_keys_are_named(key: str) -> None:
    with pytest.raises(SpecError, match=rf"^{key}: missing"):
        Spec.from_dict(without(key), folder=ROOT / "sweeps")


@pytest.mark.parametrize("axis", ["lr", "weight_decay"])
def test_both_axes_must_be_given(axis: str) -> None:
    with pytest.raises(SpecError, match=rf"^axes.{axis}: got None, must be given"):
        Spec.from_dict(without(f"axes.{axis}"), folder=ROOT / "sweeps")


@pytest.mark.parametrize("key", ["momentum=0.9", "nesterov=false", "ns_dtype=fp32", "rule=paper"])
def test_adamw_refuses_keys_that_it_would_ignore(key: str) -> None:
    with pytest.raises(SpecError, match=key.split("=")[0]):
        Spec.load("quickstart", ["optimizer.name=adamw", f"optimizer.{key}"])
    Spec.load("quickstart", ["optimizer.name=adamw"])


def test_adamw_refuses_an_axis_that_it_would_ignore() -> None:
    ratio = "axes.adamw_lr_ratio={ low = 0.1, high = 1.0, points = 3 }"
    assert "adamw_lr_ratio" in Spec.load("quickstart", [ratio]).axes
    with pytest.raises(SpecError, match=r"axes\.adamw_lr_ratio"):
        Spec.load("quickstart", [ratio, "optimizer.name=adamw"])


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_init_scale_can_be_swept_or_fixed(name: str) -> None:
    swept = "axes.init_scale={ low = 0.25, high = 4.0, points = 3 }"
    axis = Spec.load("quickstart", [swept, f"optimizer.name={name}"]).ladder_spec.axes[-1]
    assert axis == Axis("init_scale", 0.25, 4.0, 3)
    fixed = Spec.load("quickstart", ["axes.init_scale.value=0.5", f"optimizer.name={name}"])
    assert fixed.ladder_spec.axes[-1] == Axis("init_scale", 0.5, 0.5, 1)


@pytest.mark.parametrize("text", ["name = 'x'\nname = 'y'", "= 3", "name = [", "\x00"])
def test_broken_toml_names_file_and_place(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.toml"
    path.write_text(text)
    with pytest.raises(
        SpecError, match=r"broken.toml: not valid TOML: .*(line \d|end of document)"
    ):
        Spec.load(path)


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path: Path, corpus_file: Path) -> None:
    """Spec and model file, as other systems' editors save them: with line ends of their own."""
    model = (ROOT / "models" / "gpt.py").read_text()
    data = tiny_spec(corpus_file, model={"file": str(tmp_path / "gpt.py")})
    specs = []
    for mark, end in ((b"", "\n"), (b"\xef\xbb\xbf", "\n"), (b"\xef\xbb\xbf", "\r\n")):
        for name, text in (("tiny.toml", as_toml(data)), ("gpt.py", model)):
            (tmp_path / name).write_bytes(mark + text.replace("\n", end).encode())
        specs.append(Spec.load(tmp_path / "tiny.toml"))
    assert specs[0] == specs[1] == specs[2]
    assert len({str(spec.strict_fields("x")) for spec in specs}) == 1


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_a_spec_in_another_encoding_is_refused_in_words(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "wide.toml"
    path.write_bytes("name = 'a'\n".encode(encoding))
    with pytest.raises(SpecError, match="it is UTF-16 text, must be UTF-8; save it as UTF-8"):
        Spec.load(path)
    path.write_bytes("name = 'é'\n".encode("latin-1"))
    with pytest.raises(SpecError, match="byte 8: no UTF-8 text; save it as UTF-8"):
        Spec.load(path)


def test_an_integer_longer_than_python_reads_is_one_line(tmp_path: Path) -> None:
    digits = "9" * 5000
    (tmp_path / "long.toml").write_text(f"name = {digits}\n")
    with pytest.raises(SpecError, match=r"long\.toml: an integer has more digits"):
        Spec.load(tmp_path / "long.toml")
    with pytest.raises(SpecError, match=r"--set ladder\.seeds: an integer has more digits"):
        Spec.load("quickstart", [f"ladder.seeds=[{digits}]"])
    with pytest.raises(SpecError, match="an integer has more digits"):
        Spec.from_dict({"name": "a", "ladder": {"seeds": [10**5000]}})


def test_the_bounds_of_a_foreign_trainers_numbers() -> None:
    good: dict[str, Any] = {
        "name": "f",
        "ladder": {"widths": [32]},
        "target": {"width": 64},
        "axes": {"lr": {"low": 0.1, "high": 1.0, "points": 3}},
        "trainer": {"command": ["true", "{width}", "{lr}", "{seed}"], "steps": 9, "timeout": 3.0},
        "cost": {"flops": {"32": 1e18, "64": 1e26}},
        "compute": {"cpus": {"32": 1}},
    }
    Spec.from_dict(good)
    for table, key, value in (
        *(("trainer", "steps", value) for value in (10**20, -(10**20), 10**400)),
        *(("trainer", "timeout", value) for value in (10**20, -1.0, 10**400, float("inf"))),
        *(("cost", "flops", {"32": value, "64": 1.0}) for value in (1e308, 10**400, -1.0, 5e-324)),
        *(("compute", "cpus", {"32": value}) for value in (10**20, -1, 10**400)),
        ("compute", "cpus", {"9" * 400: 1, "32": 1}),
    ):
        with pytest.raises(SpecError, match=rf"^{table}\.{key}") as caught:
            Spec.from_dict({**good, table: {**good[table], key: value}})
        one_line(caught.value)
        assert len(str(caught.value)) < 600


def test_the_largest_seed_goes_all_the_way(tmp_path: Path, corpus_file: Path) -> None:
    """Trained, stored and shown; and the one after it, which a repeat has, is asked for."""
    spec = tiny_spec(corpus_file, ladder={"seeds": [2**62], "widths": [16]})
    (tmp_path / "tiny.toml").write_text(as_toml(spec))
    done = telescope("run", "tiny.toml", "--dispatcher", "inline", "--no-check", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    shown = telescope("show", "tiny", "--csv", cwd=tmp_path).stdout
    assert {int(row["seed"]) for row in csv.DictReader(shown.splitlines())} == {2**62}
    ladder = Ladder(Spec.load("quickstart", [f"ladder={{widths=[32,64], seeds=[{2**62}]}}"]))
    asked = set[int]()
    while trials := ladder.ask():
        asked |= {trial.seed for trial in trials}
        if asked > {2**62}:
            break
        for trial in trials:
            away = math.log2(trial.lr / 0.04) ** 2 + math.log2(trial.weight_decay / 0.1) ** 2
            ladder.tell(trial, loss=2 + away / 50)
    assert asked == {2**62, 2**62 + 1}
    config = trial_config(corpus_file, steps=2)
    assert train(config, Trial(16, Point.of(lr=0.01, weight_decay=0.1), max(asked))).loss


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "bytes.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(SpecError, match="cannot be read"):
        Spec.load(path)


@pytest.mark.parametrize("override", ["axes.lr.points", "=3", "axes..points=3", "name.x=3"])
def test_malformed_overrides(override: str) -> None:
    with pytest.raises(SpecError, match="--set"):
        Spec.load("quickstart", [override])


def test_overrides_take_toml_values_and_bare_words() -> None:
    spec = Spec.load(
        "quickstart", ["axes.lr.points=5", "train.schedule=wsd", "ladder.seeds=[1, 2]", "name='x'"]
    )
    assert spec.axes["lr"].points == 5
    assert spec.train is not None
    assert spec.train.schedule == "wsd"
    assert spec.ladder.seeds == (1, 2)
    assert spec.name == "x"


def test_unknown_sweep_names_the_bundled_ones() -> None:
    with pytest.raises(SpecError, match=r"nor a bundled sweep .*quickstart"):
        Spec.load("quickstat")


def test_toml_and_dict_agree(tmp_path: Path, corpus_file: Path) -> None:
    data = tiny_spec(corpus_file)
    path = tmp_path / "tiny.toml"
    path.write_text(as_toml(data))
    assert Spec.load(path) == Spec.from_dict(data)


def test_a_record_gives_the_spec_back(tmp_path: Path, corpus_file: Path) -> None:
    spec = Spec.from_dict(tiny_spec(corpus_file))
    (tmp_path / "model.py").write_text((ROOT / "models" / "gpt.py").read_text())
    again = Spec.from_record(spec.as_dict(), tmp_path)
    assert again.strict_fields("x") == spec.strict_fields("x")
    assert again.ladder_spec == spec.ladder_spec


def test_the_starter_explains_every_key() -> None:
    """Each key of every table stands in the starter, given or commented out, below a comment."""
    lines = (ROOT / "telescope" / "spec" / "starter.toml").read_text().splitlines()
    table, seen, explained = "", set(), False
    for line in lines:
        if line.startswith("["):
            table, explained = line.strip("[]"), False
        key = line.removeprefix("# ").split(" = ")[0]
        if " = " in line and key.isidentifier():
            seen.add(f"{table}.{key}".lstrip("."))
            assert explained or table.startswith("axes"), line
        explained = line.startswith("#") or (explained and bool(line))
    tables = {
        "ladder": set(LadderTable.model_fields),
        "target": set(TargetTable.model_fields),
        "axes.weight_decay": {"low", "high", "points"},
        "model": set(ModelTable.model_fields),
        "optimizer": {field.name for field in fields(OptimizerConfig)},
        "train": {field.name for field in fields(TrainConfig)},
        "data": {field.name for field in fields(DataConfig)},
        "compute": set(ComputeTable.model_fields),
        "budget": set(BudgetTable.model_fields),
        "log": set(LogTable.model_fields),
    }
    expected = {f"{table}.{key}" for table, keys in tables.items() for key in keys} | {"name"}
    assert expected <= seen


def test_numbers_of_other_libraries_in_a_dict() -> None:
    """As a loop over an array gives them; text and truth values are still no numbers."""
    given: dict[str, Any] = {
        "name": np.str_("mine"),
        "ladder": {"widths": np.array([16, 32]), "seeds": (np.int64(0), torch.tensor(1))},
        "target": {"width": np.int64(64)},
        "axes": {"lr": {"low": np.float32(0.25), "high": np.float64(1), "points": np.uint8(3)}},
        "cost": {"parameters": {np.int64(16): np.int64(1), 32: torch.tensor(4.0), "64": 16}},
    }
    spec = Spec.from_dict(given)
    assert (spec.ladder.widths, spec.ladder.seeds, spec.target.width) == ((16, 32), (0, 1), 64)
    assert (spec.axes["lr"].low, spec.axes["lr"].points) == (0.25, 3)
    assert spec.costs == {16: 1.0, 32: 4.0}
    json.dumps(spec.as_dict())
    for key, wrong, shown in (
        ("width", np.bool_(True), "target.width: got True, must be an integer"),
        ("width", np.float64(64.5), r"target.width: got 64\.5, must be an integer"),
        ("width", np.str_("64"), "target.width: got '64', must be an integer"),
        ("width", np.array([64]), r"target.width: got \[64\], must be an integer"),
    ):
        with pytest.raises(SpecError, match=shown):
            Spec.from_dict({**given, "target": {key: wrong}})


def test_all_faults_of_a_spec_are_said_each_on_a_line_of_its_own(tmp_path: Path) -> None:
    """Unknown keys, other types, values out of range, missing keys; of each key its first fault."""
    wrong = {
        "ladder": {"widths": [32, 48, 200], "polcy": "paper", "seeds": "a"},
        "target": {},
        "axes": {
            "lr": {"low": 0.5, "high": 0.004, "points": 1},
            "weight_decay": {"value": "x"},
        },
        "train": {"steps": -1, "batch_size": 0, "sequence_length": 8, "warmup": 3.0},
        "compute": {"cpus": {"32": "x"}},
        "optimzer": {"name": "muon"},
    }
    path = ROOT / "sweeps" / "quickstart.toml"
    data = tomllib.loads(path.read_text()) | wrong
    with pytest.raises(SpecError) as caught:
        Spec.from_dict(data, folder=path.parent)
    keys = [fault.split(":")[0] for fault in caught.value.faults]
    assert sorted(keys) == sorted(
        [
            *("ladder.polcy", "ladder.seeds", "target.width", "axes.lr.low", "axes.lr.points"),
            *("axes.weight_decay.value", "train.steps", "train.batch_size", "train.warmup"),
            *("compute.cpus.32", "optimzer"),
        ]
    )
    assert str(caught.value).splitlines() == list(caught.value.faults)
    overrides = ["--set", "train.steps=0", "--set", "axes.lr.points=1", "--set", "compute.cpu=3"]
    done = telescope("plan", "quickstart", *overrides, cwd=tmp_path)
    assert done.returncode == 2
    said = done.stderr.splitlines()
    assert [line.split(": ")[:3] for line in said] == [
        ["telescope", "quickstart.toml", key]
        for key in ("axes.lr.points", "train.steps", "compute.cpu")
    ]


def test_faults_of_tables_that_do_not_fit_together_are_said_at_once() -> None:
    with pytest.raises(SpecError) as caught:
        Spec.load(
            "quickstart",
            ["name=a/b", "target.width=40", "axes.warmpu.value=0.2", "model.head_dim=24"],
        )
    keys = [fault.split(": ")[1] for fault in caught.value.faults]
    assert keys == ["name", "target.width", "axes.warmpu", "ladder.widths"]
