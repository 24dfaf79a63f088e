"""The sweep spec: what a TOML file may say, in which ranges, and what makes two sweeps comparable.

Validation is strict: an unknown key, a wrong type or a value out of range is a one-line `SpecError`
that names the key, what was given and what is allowed. Reading a spec neither imports torch nor
runs the model file: that is `telescope.prepare`'s part.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import math
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pydantic
from pydantic import ConfigDict, Field

from telescope.catalog import KEPT_MODEL_FILE, find_sweep, read_model_file, read_toml
from telescope.errors import SpecError
from telescope.records import Axis, LadderSpec
from telescope.train.config import (
    ADAMW_AXES,
    ADDED_KEYS,
    BYTES,
    CARE_KEYS,
    PYTHON_STDLIB,
    TRAINER_AXES,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    SourceConfig,
    TrainConfig,
    require,
)
from telescope.train.tokenizer import BYTE_VOCABULARY, vocabulary_size

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
MAX_POINTS = 1000
MIN_STEP = 1.001
"""Smallest factor between an axis's values; below about 1.2 they are within the noise anyway."""


class Table(pydantic.BaseModel):
    """A table of the spec: strict and immutable."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class LadderTable(Table):
    """Table ``[ladder]``."""

    widths: tuple[int, ...]
    """Widths of the stages, rising, each at most double the one before; the first is the base."""
    policy: Literal["adaptive", "paper"] = "adaptive"
    """"paper" is Algorithm 1 of arXiv 2505.02222 as printed."""
    tolerance: Annotated[float, Field(gt=0, lt=1)] = 0.001
    """Adaptive: predicted excess loss at the target, as a share of the loss, that will do."""
    until: Literal["predicted", "proven"] = "predicted"
    """Adaptive: stop when the prediction is within the tolerance, or when a drift that never
    settles is ruled out too."""
    round: Annotated[int, Field(ge=1, le=1000)] | None = None
    """Adaptive: points asked for at a time; left out, 4, or two more than there are swept axes."""
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = (0,)
    """Seeds of every point: each sets initialisation and data order."""

    @pydantic.model_validator(mode="after")
    def _check(self) -> Self:
        widths = self.widths
        require(
            len(widths) >= 1 and widths[0] >= 1,
            "widths",
            list(widths),
            "one positive width or more",
        )
        for narrow, wide in itertools.pairwise(widths):
            allowed = f"rising, each at most double the one before ({narrow} then {wide})"
            require(narrow < wide <= 2 * narrow, "widths", list(widths), allowed)
        unique = len(set(self.seeds)) == len(self.seeds) >= 1
        require(unique, "seeds", list(self.seeds), "one seed or more, each once")
        return self


class TargetTable(Table):
    """Table ``[target]``: the large run that the sweep is for."""

    width: int
    """At least the last width of the ladder."""
    steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps; left out, as [train]."""
    batch_size: Annotated[int, Field(ge=1)] | None = None
    """Sequences per step; left out, as [train]."""


class AxisTable(Table):
    """Table ``[axes.NAME]``: a log-spaced range, or one fixed value."""

    low: float | None = None
    high: float | None = None
    points: int | None = None
    """Values at the base width, both ends included; at least 2."""
    value: float | None = None

    @pydantic.model_validator(mode="after")
    def _check(self) -> Self:
        if self.value is not None:
            for key in ("low", "high", "points"):
                require(
                    getattr(self, key) is None, key, getattr(self, key), "left out beside value"
                )
            require(self.value >= 0, "value", self.value, "a number >= 0")
            return self
        for key in ("low", "high", "points"):
            require(
                getattr(self, key) is not None, key, None, "given: low, high and points, or value"
            )
        assert self.low is not None
        assert self.high is not None
        assert self.points is not None
        require(self.low > 0, "low", self.low, "> 0, because the grid is log-spaced")
        require(self.low < self.high, "low", self.low, f"less than high ({self.high:g})")
        allowed = f"an integer from 2 to {MAX_POINTS}; for one value, set `value`"
        require(2 <= self.points <= MAX_POINTS, "points", self.points, allowed)
        step = (self.high / self.low) ** (1 / (self.points - 1))
        allowed = f"higher: points from {self.low:g} on are less than {MIN_STEP:g} times apart"
        require(step >= MIN_STEP, "high", self.high, allowed)
        return self

    def as_axis(self, name: str) -> Axis:
        """The ladder's record of this axis; a fixed one has a single point."""
        if self.value is not None:
            return Axis(name, self.value, self.value, 1)
        assert self.low is not None
        assert self.high is not None
        assert self.points is not None
        most = 1.0 if name == "warmup" else math.inf
        return Axis(name, self.low, self.high, self.points, most)


class ComputeTable(Table):
    """Table ``[compute]``: where trials run; no part of the fingerprint."""

    workers: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Trials at once; auto is as many as the machine's CPUs, or GPUs if trials use them, hold."""
    cpus: Annotated[int, Field(ge=1)] = 1
    """CPUs of a trial; it computes with as many threads."""
    gpus: Annotated[float, Field(ge=0)] = 0.0
    """GPUs of a trial; 0.5 lets two share one."""
    pack: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Trials of one width that train as one model. auto is 1 on a CPU, and on an accelerator as
    many as fit its memory, where a short probe says that it pays."""
    device: str = "auto"
    """torch's name of the device; auto is the worker's accelerator if it has one, else the CPU."""
    flop_rate: Annotated[float, Field(gt=0)] | None = None
    """FLOP/s of one worker, for `plan`'s seconds; left out, a stated guess. `--probe` measures."""


class BudgetTable(Table):
    """Table ``[budget]``."""

    max_over_target: Annotated[float, Field(gt=0)] = 4.0
    """The most that the sweep may cost, in target runs. `run` refuses what must cost more; the
    adaptive policy stops there."""


class ModelTable(pydantic.BaseModel):
    """Table ``[model]``: a file, and keyword arguments of its `build`."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    file: str
    """Path of the model file, relative to the sweep file."""

    @pydantic.model_validator(mode="after")
    def _check(self) -> Self:
        for key, value in (self.model_extra or {}).items():
            finite = not isinstance(value, float) or math.isfinite(value)
            require(finite, key, value, "a finite number")
        return self


class Spec(Table):
    """A validated sweep. Make one with `Spec.load` or `Spec.from_dict`."""

    name: str
    """Name of the results folder."""
    ladder: LadderTable
    target: TargetTable
    axes: dict[str, AxisTable]
    model: ModelTable | None = None
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig | None = None
    data: DataConfig = DataConfig(source=PYTHON_STDLIB)
    compute: ComputeTable = ComputeTable()
    budget: BudgetTable = BudgetTable()

    _model_source: tuple[str, str] | None = pydantic.PrivateAttr(default=None)

    @classmethod
    def load(cls, sweep: str | Path, overrides: Iterable[str] = ()) -> Spec:
        """Read a sweep by path or bundled name.

        Args:
            sweep: a TOML file, or the name of a bundled sweep.
            overrides: ``key=value`` strings such as ``axes.lr.points=5``; values are TOML, bare
                words are strings.

        Raises:
            SpecError: no such sweep, or a key that is not allowed.
        """
        path = find_sweep(sweep)
        data = read_toml(path)
        for override in overrides:
            _set_key(data, override)
        try:
            return cls.from_dict(data, folder=path.parent)
        except SpecError as error:
            raise SpecError(f"{path.name}: {error}") from error

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, folder: Path | None = None) -> Spec:
        """Validate a dict with the spec's keys.

        Args:
            data: tables as nested dicts, as TOML gives them.
            folder: what the model file's and the corpus's paths are relative to; left out, the
                current folder.

        Raises:
            SpecError: naming the key, what was given and what is allowed.
        """
        folder = folder or Path.cwd()
        # Through JSON, where strict takes a list for a tuple and a table for a dataclass.
        text = json.dumps(_with_vocabulary(_with_paths(data, folder)), default=str)
        try:
            spec = cls.model_validate_json(text)
        except pydantic.ValidationError as error:
            raise SpecError(" ".join(_one_line(error).splitlines())) from None
        if spec.model:
            spec._model_source = read_model_file(spec.model.file, folder)
        return spec

    @classmethod
    def from_record(cls, data: Mapping[str, Any], folder: Path) -> Spec:
        """Rebuild the spec of a results folder, whose model file is kept beside it.

        Args:
            data: what `as_dict` gave.
            folder: the results folder.

        Raises:
            SpecError: it was written by another version whose keys this one does not know.
        """
        table = data.get("model")
        model = {**table, "file": KEPT_MODEL_FILE} if isinstance(table, dict) else table
        return cls.from_dict({**data, "model": model} if model else data, folder=folder)

    @pydantic.model_validator(mode="after")
    def _check(self) -> Self:
        plain = NAME_PATTERN.fullmatch(self.name) is not None
        require(plain, "name", self.name, "letters, digits, '.', '_' and '-', no path, at most 100")
        last = self.ladder.widths[-1]
        require(self.target.width >= last, "target.width", self.target.width, f"at least {last}")
        self._check_axes()
        head_dim = (self.model.model_extra or {}).get("head_dim") if self.model else None
        if isinstance(head_dim, int) and head_dim > 0:
            for key, width in [("ladder.widths", w) for w in self.ladder.widths] + [
                ("target.width", self.target.width)
            ]:
                require(
                    width % head_dim == 0, key, width, f"divisible by model.head_dim ({head_dim})"
                )
        return self

    def _check_axes(self) -> None:
        for name in ("lr", "weight_decay"):
            require(name in self.axes, f"axes.{name}", None, "given, as a range or with `value`")
        for name, axis in self.axes.items():
            require(name.isidentifier(), f"axes.{name}", name, "a plain name")
            if self.model:
                known = [
                    a for a in TRAINER_AXES if a in ADAMW_AXES or self.optimizer.name == "muon"
                ]
                require(name in known, f"axes.{name}", name, f"one of {', '.join(known)}")
            if name in ("lr", "init_scale"):
                require(axis.value != 0, f"axes.{name}.value", axis.value, "> 0")
            if name == "warmup":
                top = axis.high if axis.value is None else axis.value
                require(top is not None and top <= 1, "axes.warmup", top, "a share, at most 1")
        swept = [name for name, axis in self.axes.items() if axis.value is None]
        require(bool(swept), "axes", list(self.axes), "at least one range (low, high, points)")

    @property
    def base_width(self) -> int:
        """The ladder's first width, in whose units every point is given."""
        return self.ladder.widths[0]

    @property
    def ladder_spec(self) -> LadderSpec:
        """What the ladder's decisions depend on."""
        axes = tuple(table.as_axis(name) for name, table in self.axes.items())
        return LadderSpec(
            axes,
            self.ladder.widths,
            self.ladder.seeds,
            policy=self.ladder.policy,
            target_width=self.target.width,
            tolerance=self.ladder.tolerance,
            round=self.ladder.round,
            until_proven=self.ladder.until == "proven",
        )

    def ladder_spec_with(self, costs: Mapping[int, float], target_cost: float) -> LadderSpec:
        """The same with what trials cost.

        Args:
            costs: width → FLOPs of one trial.
            target_cost: FLOPs of the target run, of which the budget is a multiple.
        """
        budget = self.budget.max_over_target * target_cost
        return replace(self.ladder_spec, costs=dict(costs), budget=budget)

    @property
    def resolved_model(self) -> ModelConfig | None:
        """The model file's text with the keywords of `build`; vocab_size is at least the bytes'.

        Raises:
            SpecError: there is no vocab_size, and no tokenizer that would tell it.
        """
        if self.model is None or self._model_source is None:
            return None
        name, text = self._model_source
        is_bytes = self.data.tokenizer_name == BYTES
        default = {"vocab_size": BYTE_VOCABULARY} if is_bytes else {}
        kwargs = {**default, **(self.model.model_extra or {})}
        size, least = kwargs.get("vocab_size"), BYTE_VOCABULARY if is_bytes else 1
        enough = isinstance(size, int) and size >= least
        allowed = f"an integer >= {least}"
        allowed += ", the tokenizer's" if is_bytes else "; shards of tokens do not tell it"
        require(enough, "model.vocab_size", size, allowed)
        return ModelConfig(name=name, text=text, kwargs=kwargs)

    def as_dict(self) -> dict[str, Any]:
        """The resolved spec as JSON-able data, defaults filled in."""
        return self.model_dump(mode="json", exclude_none=True)

    def strict_fields(self, corpus_digest: str) -> dict[str, Any]:
        """Dotted key → value of everything that makes losses incomparable when it differs."""
        model = self.resolved_model
        data = self.as_dict()
        fields: dict[str, Any] = {"ladder.widths[0]": self.base_width, "data (hash)": corpus_digest}
        for table in ("optimizer", "train"):
            keys = data.get(table, {}).keys() - CARE_KEYS
            fields |= {f"{table}.{key}": data[table][key] for key in keys}
        fields |= {f"data.{key}": data["data"][key] for key in ("held_out", "eval_tokens")}
        for key, before in ADDED_KEYS.items():
            if fields.get(key) == before:
                del fields[key]
        if self.data.sources:
            total = sum(part.weight for part in self.data.sources)
            fields["data.sources.weight"] = [part.weight / total for part in self.data.sources]
        if model:
            fields["model.file (hash)"] = model.digest
            fields |= {f"model.{key}": value for key, value in model.kwargs.items()}
        return fields


def fingerprint(fields: Mapping[str, Any]) -> str:
    """SHA-256 of `strict_fields`, 16 hex digits."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def _with_paths(data: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
    """The spec with the data's paths made absolute, so that every worker finds them."""
    table = data.get("data")
    if not isinstance(table, dict):
        return data
    table = {**table, **_with_source(table, folder)}
    if isinstance(parts := table.get("sources"), (list, tuple)):
        table["sources"] = [
            {**part, **_with_source(part, folder)} if isinstance(part, dict) else part
            for part in parts
        ]
    if isinstance(name := table.get("tokenizer"), str) and name != BYTES:
        table["tokenizer"] = str((folder / name).absolute())
    return {**data, "data": table}


def _with_source(table: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A table's `source` with absolute paths, where it has paths."""
    source = table.get("source")
    sources = (source,) if isinstance(source, str) else source
    if source == PYTHON_STDLIB or not isinstance(sources, (list, tuple)):
        return {}
    if not all(isinstance(item, str) for item in sources):
        return {}
    return {"source": [str((folder / item).absolute()) for item in sources]}


def _with_vocabulary(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """The spec with the tokenizer's vocabulary as the model's, where the model's is not given.

    Written down like a key that was given: a kept spec is read without the tokenizer's file.
    """
    model, table = data.get("model"), data.get("data")
    if not isinstance(model, dict) or not isinstance(table, dict) or "vocab_size" in model:
        return data
    name = table.get("tokenizer")
    if not isinstance(name, str) or name == BYTES:
        return data
    return {**data, "model": {**model, "vocab_size": vocabulary_size(name)}}


def _set_key(data: dict[str, Any], override: str) -> None:
    """Apply one ``--set key=value``."""
    key, equals, text = override.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise SpecError(f"--set {override}: must be key=value, such as axes.lr.points=5")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    table = data
    for part in path[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise SpecError(f"--set {override}: {part} is no table")
    table[path[-1]] = value


def _one_line(error: pydantic.ValidationError) -> str:
    """The first problem as one line: key, what was given, what is allowed."""
    problems = error.errors()
    problem, key = problems[0], _key(problems[0]["loc"])
    inner = problem.get("ctx", {}).get("error")
    if isinstance(inner, SpecError):
        return f"{key}.{inner}" if key else str(inner)
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return _unknown_key(key.split("."))
    if problem["type"] in ("missing", "missing_argument"):
        return f"{key}: missing; it must be given"
    # A key that may be this or that gives one problem for each.
    allowed = [_allowed(other, key) for other in problems if _key(other["loc"]) == key]
    return f"{key}: got {_shown(problem['input'])}, must be {' or '.join(dict.fromkeys(allowed))}"


def _key(location: Sequence[str | int]) -> str:
    """The dotted key of a problem, without the parts that name a union's branch."""
    branch = re.compile(r"(int|str|float|constrained-\w+|(literal|tuple|list)\[.*)")
    return ".".join(str(part) for part in location if not branch.fullmatch(str(part)))


def _allowed(problem: Any, key: str) -> str:
    """What pydantic says is allowed, in our words."""
    if problem["type"] in ("dataclass_type", "model_type", "dict_type"):
        return f"a table [{key}]"
    text: str = problem["msg"].removeprefix("Input should be ")
    return (
        text.replace("a valid integer", "an integer")
        .replace("a valid ", "a ")
        .replace("greater than or equal to", ">=")
        .replace("an array", "a list")
        .replace("a array", "a list")
    )


def _shown(value: Any) -> str:
    """A value as its TOML reads, cut when long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _unknown_key(location: Sequence[str]) -> str:
    """The message for a key that no table has, with the keys that there are and the nearest one."""
    *tables, key = location
    owner = AxisTable if tables[:1] == ["axes"] else Spec
    owner = _TABLES.get(tables[0], owner) if tables else owner
    if tables[:2] == ["data", "sources"]:
        owner = _TABLES["data.sources"]
    known = [f.name for f in fields(owner)] if is_dataclass(owner) else list(owner.model_fields)
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    where = f" in [{'.'.join(tables)}]" if tables else ""
    return f"{'.'.join(location)}: unknown key; allowed{where}: {', '.join(known)}{hint}"


_TABLES: dict[str, Any] = {
    "ladder": LadderTable,
    "target": TargetTable,
    "optimizer": OptimizerConfig,
    "train": TrainConfig,
    "data": DataConfig,
    "data.sources": SourceConfig,
    "compute": ComputeTable,
    "budget": BudgetTable,
}
