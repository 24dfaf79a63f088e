"""Variants: keys of a spec replaced, each variant a whole spec of its own."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from conftest import GPT, ROOT, one_line

from telescope.errors import SpecError
from telescope.spec.spec import Spec
from telescope.spec.variants import replaced

PLAIN = tomllib.loads((ROOT / "sweeps" / "quickstart.toml").read_text())


def loaded(tmp_path: Path, variants: str) -> Spec:
    """The quickstart with variants, from a file in a folder with two corpora and two models."""
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "models").mkdir()
    text = GPT.read_text()
    (tmp_path / "models" / "gpt.py").write_text(text)
    (tmp_path / "models" / "other.py").write_text(f"{text}\n# another file\n")
    (tmp_path / "code.txt").write_text("a text\n" * 1000)
    path = tmp_path / "sweeps" / "sweep.toml"
    path.write_text((ROOT / "sweeps" / "quickstart.toml").read_text() + "\n" + variants)
    return Spec.load(path)


def test_a_spec_without_variants_is_its_only_one() -> None:
    spec = Spec.load("quickstart")
    assert spec.every_variant == {"plain": spec}


def test_each_variant_is_the_spec_with_these_keys_and_no_other(tmp_path: Path) -> None:
    spec = loaded(
        tmp_path,
        """
        [variants.code]
        data.source = "../code.txt"
        [variants.thin-mlp]
        model.mlp_ratio = 1
        axes.weight_decay.value = 0.1
        """,
    )
    every = spec.every_variant
    assert list(every) == ["plain", "code", "thin-mlp"]
    assert [one.name for one in every.values()] == [
        "quickstart",
        "quickstart-code",
        "quickstart-thin-mlp",
    ]
    assert not any(one.variants or one.every_variant.keys() - {"plain"} for one in every.values())
    plain = every["plain"].as_dict()
    assert plain == Spec.from_dict(PLAIN, folder=ROOT / "sweeps").as_dict()
    code = every["code"].as_dict()
    assert code.pop("data") == {**plain["data"], "source": [str(tmp_path / "sweeps/../code.txt")]}
    assert code == {**{k: v for k, v in plain.items() if k != "data"}, "name": "quickstart-code"}
    thin = every["thin-mlp"]
    assert thin.axes["weight_decay"].as_axis("").is_fixed, "a value takes the place of the range"
    assert ((thin.model and thin.model.model_extra) or {})["mlp_ratio"] == 1
    assert thin.model_source == every["plain"].model_source
    assert "variants" not in spec.as_dict(), "a results folder is of one spec"
    assert Spec.from_dict(json.loads(json.dumps(thin.as_dict())), model_source=thin.model_source)


def test_another_model_file_takes_its_own_keywords_alone(tmp_path: Path) -> None:
    variants = """
    [variants.other.model]
    file = "../models/other.py"
    depth = 3
    head_dim = 8
    """
    other = loaded(tmp_path, variants).every_variant["other"]
    assert other.model_source == (
        "other.py",
        f"{GPT.read_text()}\n# another file\n",
    )
    assert other.model
    assert other.model.model_extra == {"depth": 3, "head_dim": 8}
    assert other.train == Spec.load("quickstart").train


def test_an_override_on_the_command_line_counts_in_every_variant() -> None:
    spec = Spec.load("quickstart", ["train.steps=7", "variants.deep.model.depth=3"])
    assert [one.steps for one in spec.every_variant.values()] == [7, 7]


WRONG: list[tuple[dict[str, Any], list[str]]] = [
    # (variants, the beginnings of all faults)
    ({"a": {}}, ["variants.a: got the same as the spec itself"]),
    ({"a": {"train": {"steps": 250}}}, ["variants.a: got the same as the spec itself"]),
    (
        {"a": {"train": {"steps": 9}}, "b": {"train": {"steps": 9}}},
        ["variants.b: got the same as variants.a"],
    ),
    ({"a": 3}, ["variants.a: got 3, must be a table [variants.a]"]),
    ({"a/b": {"train": {"steps": 9}}}, ["variants.a/b: got 'a/b', must be a name"]),
    ({"plain": {"train": {"steps": 9}}}, ["variants.plain: got 'plain', must be a name"]),
    ({"a": {"name": "x"}}, ["variants.a.name: got 'x', must be left out"]),
    ({"a": {"variants": {}}}, ["variants.a.variants: got {}, must be left out"]),
    ({"x" * 95: {"train": {"steps": 9}}}, [f"variants.{'x' * 95}.name: got 'quickstart-x"]),
    ({"a": {"modle": {"depth": 3}}}, ["variants.a.modle: unknown key; allowed: name, ladder"]),
    ({"a": {"train": 3}}, ["variants.a.train: got 3, must be a table"]),
    ({"a": {"model": {"file": "nope.py"}}}, ["variants.a.model.file: cannot read"]),
    (
        {
            "a": {"train": {"steps": 0}},
            "b": {"target": {"width": 64}, "axes": {"lr": {"low": 9.0}}},
        },
        [
            "variants.a.train.steps: got 0",
            "variants.b.axes.lr.low: got 9.0, must be less than high",
        ],
    ),
    ({"b": {"target": {"width": 64}}}, ["variants.b.target.width: got 64, must be at least 128"]),
]


@pytest.mark.parametrize(("variants", "faults"), WRONG, ids=[str(w[0])[:50] for w in WRONG])
def test_every_fault_of_every_variant_is_said(variants: Any, faults: list[str]) -> None:
    with pytest.raises(SpecError) as caught:
        Spec.from_dict({**PLAIN, "variants": variants}, folder=ROOT / "sweeps")
    found = caught.value.faults
    assert len(found) == len(faults)
    assert all(one.startswith(start) for one, start in zip(found, faults, strict=True)), found
    one_line(caught.value)


def test_a_fault_of_the_spec_itself_is_said_once() -> None:
    data = {**PLAIN, "name": "../x", "target": {"width": 64}}
    variants = {"a": {"model": {"depth": 3}}, "b": {"train": {"warmup": 2.0}}}
    with pytest.raises(SpecError) as caught:
        Spec.from_dict({**data, "variants": variants}, folder=ROOT / "sweeps")
    starts = ["name: got", "target.width: got 64", "variants.b.train.warmup: got 2.0"]
    assert len(caught.value.faults) == len(starts)
    assert all(f.startswith(s) for f, s in zip(caught.value.faults, starts, strict=True))


REPLACED: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    # (tables, the keys that replace, what comes out)
    ({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}}, {"a": {"b": 3, "c": 2}}),
    ({"a": {"b": [1, 2]}}, {"a": {"b": [3]}}, {"a": {"b": [3]}}),
    ({"a": {"b": {"32": 1}}}, {"a": {"b": 2}}, {"a": {"b": 2}}),
    ({}, {"a": {"b": 2}}, {"a": {"b": 2}}),
    (
        {"axes": {"lr": {"value": 0.1}}},
        {"axes": {"lr": {"low": 0.1, "high": 1.0, "points": 3}}},
        {"axes": {"lr": {"low": 0.1, "high": 1.0, "points": 3}}},
    ),
    (
        {"data": {"source": "a.jsonl", "field": "x", "held_out": 0.1}},
        {"data": {"sources": [{"source": "b.txt"}]}},
        {"data": {"held_out": 0.1, "sources": [{"source": "b.txt"}]}},
    ),
    (
        {"model": {"file": "a.py", "depth": 2}},
        {"model": {"file": "b.py", "layers": 2}},
        {"model": {"file": "b.py", "layers": 2}},
    ),
    (
        {"trainer": {"command": ["x"], "result": "y", "steps": 3}},
        {"trainer": {"function": "a:b"}},
        {"trainer": {"steps": 3, "function": "a:b"}},
    ),
    (
        {"trainer": {"function": "a:b"}},
        {"trainer": {"command": ["x"]}},
        {"trainer": {"command": ["x"]}},
    ),
    (
        {"cost": {"parameters": {"32": 1}}},
        {"cost": {"flops": {"32": 9}}},
        {"cost": {"flops": {"32": 9}}},
    ),
    (
        {"optimizer": {"momentum": 0.9, "eps": 1e-9}, "axes": {"adamw_lr_ratio": {"value": 2.0}}},
        {"optimizer": {"name": "adamw"}},
        {"optimizer": {"eps": 1e-9, "name": "adamw"}, "axes": {}},
    ),
    (
        {"optimizer": {"momentum": 0.9}},
        {"optimizer": {"name": "adamw", "momentum": 0.8}},
        {"optimizer": {"name": "adamw", "momentum": 0.8}},
    ),
]


@pytest.mark.parametrize(("tables", "changes", "out"), REPLACED)
def test_a_key_takes_the_place_of_those_that_cannot_stand_beside_it(
    tables: dict[str, Any], changes: dict[str, Any], out: dict[str, Any]
) -> None:
    before = json.dumps([tables, changes])
    assert replaced(tables, changes) == out
    assert json.dumps([tables, changes]) == before, "pure"
