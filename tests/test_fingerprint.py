"""Each field of the spec is changed, and the fingerprint with it, or not for a reason given here.

The fields are read from the tables themselves: one that is added fails these tests until it is
decided whether losses stay comparable when it differs.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import shutil
import typing
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import pydantic
import pytest
from bowls import COMMAND, bowl_spec
from conftest import GPT, ROOT, gpt_config, tiny_spec
from corpora import IDS, sentences

from telescope import Spec
from telescope.data.tokenizer import train_bpe
from telescope.spec.spec import NO_PART, fingerprint
from telescope.sweep.builtin import BuiltIn
from telescope.sweep.foreign import Foreign
from telescope.train.model import load_model_file

MAY_DIFFER = {
    # field: the reason why losses stay comparable when it differs
    "name": "the name of the results folder",
    "ladder.policy": "how points are chosen",
    "ladder.tolerance": "when to stop",
    "ladder.until": "when to stop",
    "ladder.round": "how many points are asked for at a time",
    "ladder.seeds": "a seed is a part of each trial",
    "target.width": "the target is not trained",
    "target.steps": "the target is not trained",
    "target.batch_size": "the target is not trained",
    "axes.*.low": "a value is a part of each trial",
    "axes.*.high": "a value is a part of each trial",
    "axes.*.points": "a value is a part of each trial",
    "axes.*.value": "a value is a part of each trial",
    "model.file": "a place: what counts is the file's text",
    "train.checkpoint_every": "a trial that goes on from a checkpoint ends as it would have",
    "train.timeout": "a trial that is ended has no loss",
    "data.source": "a place: what counts is the corpus",
    "data.duplicates": "what is dropped is lacking in the corpus's hash",
    "trainer.folder": "a place: what counts is the script's text",
    "trainer.result": "where the loss is read",
    "trainer.timeout": "a trial that is ended has no loss",
    "trainer.shapes": "what a transfer writes",
    "cost.parameters": "what a trial is said to cost",
    "cost.flops": "what a trial is said to cost",
    "compute.workers": "where trials run",
    "compute.cpus": "where trials run",
    "compute.gpus": "where trials run",
    "compute.pack": "where trials run: it may round otherwise",
    "compute.device": "where trials run: it may round otherwise",
    "compute.flop_rate": "what a plan says of time",
    "budget.max_over_target": "when to stop",
    "log.to": "who is told of the trials",
}
BESIDE_A_TRAINER = {
    # table or field of a sweep that another program trains: the reason, as above
    "optimizer": "a statement about the trainer, which it does not change",
    "trainer.steps": "a statement about the trainer, unless it is told them",
}


class Change(NamedTuple):
    """A field, the spec in which it is changed, and what it becomes."""

    field: str
    base: str
    value: Any
    is_free: bool | None = None
    """True if the fingerprint stays; None if the lists above decide."""

    def __str__(self) -> str:
        return f"{self.field} {self.base} {str(self.value)[-30:]}"


SHARED: dict[str, Any] = {
    # field that a sweep may have whoever trains it: another value
    "name": "other",
    "ladder.policy": "adaptive",
    "ladder.tolerance": 0.01,
    "ladder.until": "proven",
    "ladder.round": 7,
    "ladder.seeds": [0, 1],
    "target.width": 128,
    "axes.*.low": 0.02,
    "axes.*.high": 0.2,
    "axes.*.points": 4,
    "axes.*.value": 0.3,
    "optimizer.name": "adamw",
    "optimizer.rule": "paper",
    "optimizer.adamw_lr_ratio": 0.5,
    "optimizer.momentum": 0.9,
    "optimizer.nesterov": False,
    "optimizer.ns": "polar-express",
    "optimizer.ns_steps": 6,
    "optimizer.ns_dtype": "fp32",
    "optimizer.betas": [0.9, 0.95],
    "optimizer.eps": 1e-7,
    "compute.workers": 1,
    "compute.cpus": 2,
    "compute.gpus": 0.5,
    "compute.pack": 2,
    "compute.device": "cpu",
    "compute.flop_rate": 1e9,
    "budget.max_over_target": 50.0,
    "log.to": ["wandb"],
}
OWN: dict[str, Any] = {
    # field of a sweep of telescope's own trainer: another value
    "target.steps": 100,
    "target.batch_size": 64,
    "train.steps": 5,
    "train.batch_size": 5,
    "train.sequence_length": 8,
    "train.schedule": "constant",
    "train.warmup": 0.2,
    "train.final_lr": 0.2,
    "train.decay": 0.3,
    "train.evals": 2,
    "train.checkpoint_every": 2,
    "train.timeout": 9.0,
    "train.precision": "bf16",
    "train.compile": True,
    "model.depth": 2,
    "model.head_dim": 4,
    "model.heads_per_kv": 2,
    "model.mlp_ratio": 2,
    "model.rope_theta": 99.0,
    "model.tied": True,
    "model.vocab_size": 600,
    "data.held_out": 0.1,
    "data.eval_tokens": 32,
    "data.duplicates": "drop",
    "data.tokenizer": "bpe.json",
}
BY_WIDTH = {"8": 1, "16": 1, "32": 1, "64": 1, "128": 1}
CHANGES = [
    *(Change(field, base, value) for field, value in SHARED.items() for base in ("own", "command")),
    *(Change(field, "own", value) for field, value in OWN.items()),
    Change("ladder.widths", "own", [8, 16]),
    Change("ladder.widths", "command", [8, 16]),
    Change("ladder.widths", "own", [16, 32, 64], is_free=True),
    Change("ladder.widths", "command", [16, 32, 64], is_free=True),
    Change("model.file", "own", "same.py"),
    Change("model.file", "own", "other.py", is_free=False),
    Change("data.source", "own", "same.txt"),
    Change("data.source", "own", "other.txt", is_free=False),
    Change("data.format", "json lines", "text"),
    Change("data.field", "json lines", "title"),
    Change("data.dtype", "raw", "uint16"),
    Change("data.sources.source", "mixed", "other.txt"),
    Change("data.sources.weight", "mixed", 3.0),
    Change("data.sources.format", "mixed json lines", "text"),
    Change("data.sources.field", "mixed json lines", "title"),
    Change("data.sources.dtype", "mixed raw", "uint16"),
    Change("target.steps", "command", 100),
    Change("trainer.command", "command", [*COMMAND, "{weight_decay}", "more"]),
    Change("trainer.function", "function", "mine:other"),
    Change("trainer.folder", "command", "moved"),
    Change("trainer.folder", "command", "edited", is_free=False),
    Change("trainer.environment", "command", {"A": "1"}),
    Change("trainer.result", "command", "{trial_folder}/loss.json"),
    Change("trainer.timeout", "command", 9.0),
    Change("trainer.steps", "command", 8),
    Change("trainer.steps", "told steps", 8, is_free=False),
    Change("trainer.arguments", "told a batch", {"batch_size": 9}),
    Change("trainer.shapes", "command", "shapes.json"),
    Change("cost.parameters", "command", BY_WIDTH),
    Change("cost.flops", "by flops", BY_WIDTH),
]


def fields_of(table: Any, before: str = "") -> Iterator[str]:
    """Dotted names of a table's fields, and of the fields of the tables in it."""
    hints = typing.get_type_hints(table)
    is_plain = dataclasses.is_dataclass(table)
    names = [f.name for f in dataclasses.fields(table)] if is_plain else list(table.model_fields)
    for name in names:
        inner = list(tables_in(hints[name]))
        star = "*." if typing.get_origin(hints[name]) is dict else ""
        for each in inner:
            yield from fields_of(each, f"{before}{name}.{star}")
        if not inner:
            yield before + name


def tables_in(hint: Any) -> Iterator[Any]:
    """The tables that a field's type names."""
    if isinstance(hint, type) and (
        dataclasses.is_dataclass(hint) or issubclass(hint, pydantic.BaseModel)
    ):
        yield hint
    for part in typing.get_args(hint):
        yield from tables_in(part)


def test_every_field_is_changed() -> None:
    keywords = inspect.signature(load_model_file(gpt_config()).build).parameters
    known = {*fields_of(Spec), *(f"model.{name}" for name in keywords if name != "width")}
    known = {field for field in known if field.split(".")[0] not in NO_PART}
    assert {change.field for change in CHANGES} == known
    assert known >= MAY_DIFFER.keys()
    assert len(known) > 70


def test_what_only_compares_sweeps_is_no_part_of_one() -> None:
    assert {field.split(".")[0] for field in fields_of(Spec)} >= NO_PART
    assert not Spec.load("quickstart").as_dict().keys() & NO_PART


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, corpus_file: Path) -> Path:
    """Corpora, models and trainers, some of them copies and some not quite."""
    place = tmp_path_factory.mktemp("place")
    text = corpus_file.read_text()
    for name, content in (("corpus", text), ("same", text), ("other", text + "the end")):
        (place / f"{name}.txt").write_text(content)
    (place / "same.py").write_text(GPT.read_text())
    (place / "other.py").write_text(GPT.read_text() + "\n")
    documents = sentences(400)
    rows = [{"text": document, "title": document[::-1]} for document in documents]
    (place / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (place / "bpe.json").write_text(train_bpe(documents, 400))
    for name, ids in (("tokens", IDS), ("more", IDS[::-1])):
        (ids + 20 * 2**16).astype("<u4").tofile(place / f"{name}.bin")  # uint16 can be read of it
    bowl_spec(place)
    for name in ("moved", "edited"):
        (place / name).mkdir()
        shutil.copy(place / "bowl.py", place / name)
    with (place / "edited" / "bowl.py").open("a") as script:
        script.write("print(1)\n")
    (place / "mine.py").write_text("def train(**all): return 1.0\nother = train\n")
    return place


def own_base(**data: Any) -> dict[str, Any]:
    """A sweep of telescope's own trainer, on the corpus that the keys say."""
    axes = {"weight_decay": {"value": 0.1}, "lr": {"low": 0.01, "high": 0.1, "points": 3}}
    spec = tiny_spec(Path("corpus.txt"), axes=axes, model={"vocab_size": 2_000_000})
    return {**spec, "data": {"eval_tokens": 64, **data}}


def command_base(place: Path, *more: str, cost: str = "parameters") -> dict[str, Any]:
    """A sweep that another program trains, which is given `more` arguments."""
    return bowl_spec(
        place,
        ladder={"widths": [16, 32], "policy": "paper"},
        target={"width": 64},
        axes={"weight_decay": {"value": 0.1}},
        trainer={"command": [*COMMAND, "{weight_decay}", *more], "steps": 7},
        cost=None,
    ) | {"cost": {cost: {**BY_WIDTH, "64": 9}}}


def told_a_batch(place: Path) -> dict[str, Any]:
    """A sweep whose command has an argument of its own."""
    spec = command_base(place, "{batch_size}")
    spec["trainer"]["arguments"] = {"batch_size": 8}
    return spec


def base(name: str, place: Path) -> dict[str, Any]:
    """A spec of this name, which is valid."""
    text, rows = {"source": "corpus.txt"}, {"source": "rows.jsonl"}
    tokens, more = ({"source": f"{name}.bin", "dtype": "uint32"} for name in ("tokens", "more"))
    function = {"function": "mine:train", "folder": str(place)}
    bases: dict[str, dict[str, Any]] = {
        "own": own_base(**text),
        "json lines": own_base(**rows),
        "raw": own_base(**tokens),
        "mixed": own_base(sources=[text, rows]),
        "mixed json lines": own_base(sources=[rows, text]),
        "mixed raw": own_base(sources=[tokens, more]),
        "command": command_base(place),
        "told steps": command_base(place, "{steps}"),
        "told a batch": told_a_batch(place),
        "by flops": command_base(place, cost="flops"),
        "function": command_base(place) | {"trainer": function},
    }
    return bases[name]


def changed(spec: dict[str, Any], field: str, value: Any) -> dict[str, Any]:
    """The spec with another value of a field; of several tables in the first."""
    spec = deepcopy(spec)
    axis = "weight_decay" if field.endswith("value") else "lr"
    *tables, key = field.replace("*", axis).split(".")
    table: Any = spec
    for name in tables:
        table = table.setdefault(name, {})
        table = table[0] if isinstance(table, list) else table
    table[key] = value
    return spec


def read(spec: dict[str, Any], place: Path) -> tuple[dict[str, Any], str]:
    """A spec as it is kept, and its fingerprint."""
    valid = Spec.from_dict(spec, folder=place)
    sweep = Foreign.of(valid) if valid.trainer else BuiltIn.of(valid)
    return valid.as_dict(), sweep.fingerprint


def may_differ(change: Change, spec: dict[str, Any]) -> bool:
    """Tell whether losses stay comparable."""
    if change.is_free is not None:
        return change.is_free
    names = {change.field, change.field.partition(".")[0]}
    is_stated = "trainer" in spec and not names.isdisjoint(BESIDE_A_TRAINER)
    return is_stated or change.field in MAY_DIFFER


@pytest.fixture(scope="module")
def bases() -> dict[str, tuple[dict[str, Any], str]]:
    """Each base as it is kept, and its fingerprint, as far as they have been needed."""
    return {}


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_the_fingerprint_differs_where_losses_do(
    change: Change, place: Path, bases: dict[str, tuple[dict[str, Any], str]]
) -> None:
    spec = base(change.base, place)
    if change.base not in bases:
        bases[change.base] = read(spec, place)
    before, old = bases[change.base]
    after, new = read(changed(spec, change.field, change.value), place)
    assert after != before, "nothing is changed"
    assert (new == old) == may_differ(change, spec)


def test_a_sweep_of_an_earlier_version_goes_on() -> None:
    """A field that has come since is no part of the fingerprint at its default."""
    folder = ROOT / "results" / "reference" / "quickstart"
    record = json.loads((folder / "spec.json").read_text())
    sweep = BuiltIn.of(Spec.from_record(record["spec"], folder))
    data = "data (hash)"  # of the Python that it ran on
    now = sweep.comparable | {data: record["comparable_if_equal"][data]}
    assert now == record["comparable_if_equal"]
    assert fingerprint(now) == record["fingerprint"]
