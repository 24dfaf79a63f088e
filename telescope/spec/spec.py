"""The sweep spec: the keys of a TOML file, their ranges, and the fingerprint of comparable sweeps.

Validation is strict: an unknown key, a wrong type or a value out of range is a one-line `SpecError`
that names the key, the value given and the values allowed. Reading a spec neither imports torch nor
runs the model file; `telescope.sweep` does that later.
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Self

import pydantic

from telescope.config import (
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
    all_faults,
    require,
    shown,
)
from telescope.data.tokenizer import BYTE_VOCABULARY, vocabulary_size
from telescope.errors import SpecError, did_you_mean
from telescope.records import LadderSpec, as_plain
from telescope.spec.catalog import (
    KEPT_MODEL_FILE,
    LONG_INTEGER,
    find_sweep,
    read_model_file,
    read_toml,
)
from telescope.spec.frontier import DevicesTable, FrontierTable
from telescope.spec.optimizers import OptimizerTable
from telescope.spec.placeholders import OWN, names_in
from telescope.spec.scaling import ScalingTable, SizeTable
from telescope.spec.tables import (
    AxisTable,
    BudgetTable,
    ComputeTable,
    CostTable,
    LadderTable,
    LogTable,
    ModelTable,
    Table,
    TargetTable,
    TrainerTable,
)
from telescope.spec.variants import PLAIN, replaced, table_in

COLUMNS = ("width", "seed", "loss", "status", "reason", "flops", "seconds")
"""Names that an axis cannot have: `trials.csv` has columns of these names."""
STRICT_KEYS = {"command", "function", "environment", "steps", "arguments"}
"""Keys of [trainer] that must be equal for losses to be comparable."""
OWN_TABLES = ("model", "train", "data")
"""The tables of the built-in trainer, which a foreign trainer does not use."""
NO_PART = {"variants", "frontier", "scaling"}
"""Tables on comparisons of sweeps: no part of a single sweep, nor of its record."""
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


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
    trainer: TrainerTable | None = None
    cost: CostTable | None = None
    compute: ComputeTable = ComputeTable()
    budget: BudgetTable = BudgetTable()
    variants: dict[str, dict[str, Any]] = pydantic.Field(default_factory=dict)
    """Name → the keys that it replaces; see `every_variant`."""
    frontier: FrontierTable | None = None
    log: LogTable = LogTable()
    scaling: ScalingTable | None = None

    _model_source: tuple[str, str] | None = pydantic.PrivateAttr(default=None)
    _variants: dict[str, Spec] = pydantic.PrivateAttr(default_factory=dict)

    @classmethod
    def load(cls, sweep: str | Path, overrides: Iterable[str] = ()) -> Spec:
        """Read a sweep by path or bundled name.

        Args:
            sweep: a TOML file, or the name of a bundled sweep.
            overrides: ``key=value`` strings such as ``axes.lr.points=5``; values are TOML, bare
                words are strings.

        Raises:
            SpecError: there is no such sweep, or a key is not allowed.
        """
        path = find_sweep(sweep)
        data = read_toml(path)
        for override in overrides:
            _set_key(data, override)
        try:
            return cls.from_dict(data, folder=path.parent)
        except SpecError as error:
            raise SpecError(*(f"{path.name}: {fault}" for fault in error.faults)) from error

    @classmethod
    def from_dict(
        cls,
        data: Mapping[str, Any],
        *,
        folder: Path | None = None,
        model_source: tuple[str, str] | None = None,
    ) -> Spec:
        """Validate a dict with the spec's keys.

        Args:
            data: tables as nested dicts, as TOML gives them. Numbers of numpy and torch are
                converted to Python's, and arrays to lists.
            folder: the folder to which the paths of model file and corpus are relative; by default
                the current one.
            model_source: name and text of the model file, if it is stored elsewhere; by default
                the file is read.

        Raises:
            SpecError: a key is wrong; the message names it, its value and what is allowed.
        """
        folder = folder or Path.cwd()
        data = as_plain(data)
        faults: list[str] = []
        try:
            spec = cls._of(data, folder, model_source)
        except SpecError as error:
            faults += error.faults
        variants = _variant_tables(data)
        made: dict[str, Spec] = {}
        for name, tables in variants.items():
            own = None if "file" in table_in(data, "variants", name, "model") else model_source
            try:
                made[name] = cls._of(tables, folder, own)
            except SpecError as error:
                new = (fault for fault in error.faults if fault not in faults)
                faults += [f"variants.{name}.{fault}" for fault in new]
        if faults:
            raise SpecError(*faults)
        spec._variants = made
        _require_different(spec)
        return spec

    @classmethod
    def _of(
        cls, data: Mapping[str, Any], folder: Path, model_source: tuple[str, str] | None
    ) -> Spec:
        """Validate a dict of plain values, all but what its variants say; see `from_dict`."""
        # From JSON, because pydantic's strict mode then takes lists for tuples.
        try:
            text = json.dumps(_with_vocabulary(_with_paths(data, folder)), default=str)
        except ValueError as error:  # of Python's limit to the digits of an integer
            raise error if isinstance(error, SpecError) else SpecError(LONG_INTEGER) from error
        try:
            spec = cls.model_validate_json(text)
        except pydantic.ValidationError as error:
            raise SpecError(*_faults(error)) from None
        if spec.model:
            spec._model_source = model_source or read_model_file(spec.model.file, folder)
        return spec

    @property
    def every_variant(self) -> dict[str, Spec]:
        """Name → spec: this one without its variants, named "plain", then each variant.

        A variant is a spec of its own, whose name is this one's and its own: ``quickstart-code``.
        """
        plain = self.model_copy(update={"variants": {}})
        plain._variants = {}
        return {PLAIN: plain, **self._variants}

    @property
    def model_source(self) -> tuple[str, str] | None:
        """Name and text of the model file; None if the spec names none."""
        return self._model_source

    @classmethod
    def from_record(cls, data: Mapping[str, Any], folder: Path) -> Spec:
        """Rebuild the spec of a results folder, which also holds the model file.

        Args:
            data: the output of `as_dict`.
            folder: the results folder.

        Raises:
            SpecError: another version wrote it, with keys that this one does not know.
        """
        table = data.get("model")
        model = {**table, "file": KEPT_MODEL_FILE} if isinstance(table, dict) else table
        return cls.from_dict({**data, "model": model} if model else data, folder=folder)

    @classmethod
    def kept(cls, record: Mapping[str, Any], folder: Path, overrides: Iterable[str] = ()) -> Spec:
        """Rebuild a results folder's spec with some keys changed; see `from_record` and `load`."""
        data = json.loads(json.dumps(record))
        for override in overrides:
            _set_key(data, override)
        try:
            return cls.from_record(data, folder)
        except SpecError as error:
            raise SpecError(*(f"{folder}: {fault}" for fault in error.faults)) from error

    @pydantic.model_validator(mode="after")
    @all_faults()
    def _check(self) -> Self:
        plain = NAME_PATTERN.fullmatch(self.name) is not None
        require(plain, "name", self.name, "letters, digits, '.', '_' and '-', no path, at most 100")
        last = self.ladder.widths[-1]
        require(self.target.width >= last, "target.width", self.target.width, f"at least {last}")
        for variant, changes in self.variants.items():
            plain = NAME_PATTERN.fullmatch(variant) is not None and variant != PLAIN
            allowed = f"a name of letters, digits, '.', '_' and '-', not {PLAIN!r}"
            require(plain, f"variants.{variant}", variant, allowed)
            for key in {"name", "variants"} & changes.keys():
                its_own = f"left out: the variant is named {self.name}-{variant}"
                require(False, f"variants.{variant}.{key}", changes[key], its_own)
        self._check_axes()
        self._check_by_width()
        if self.trainer:
            self._check_trainer(self.trainer)
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
        for name in ("lr", "weight_decay") if self.model else ():
            require(name in self.axes, f"axes.{name}", None, "given, as a range or with `value`")
        for name, axis in self.axes.items():
            require(name.isidentifier(), f"axes.{name}", name, "a plain name")
            taken = f"another name: {', '.join(dict.fromkeys((*COLUMNS, *OWN)))} are taken"
            require(name not in (*COLUMNS, *OWN), f"axes.{name}", name, taken)
            if self.model:
                known = [
                    a for a in TRAINER_AXES if a in ADAMW_AXES or self.optimizer.name == "muon"
                ]
                allowed = f"one of {', '.join(known)}{did_you_mean(name, known)}"
                require(name in known, f"axes.{name}", name, allowed)
            if name in ("lr", "init_scale", "adamw_lr_ratio"):
                require(axis.value != 0, f"axes.{name}.value", axis.value, "> 0")
            if name == "warmup":
                top = axis.high if axis.value is None else axis.value
                require(top is not None and top <= 1, "axes.warmup", top, "a share, at most 1")
        swept = [name for name, axis in self.axes.items() if axis.value is None]
        if self.axes or not self.model:  # else those that are missing have been named
            require(bool(swept), "axes", list(self.axes), "at least one range (low, high, points)")

    def _check_by_width(self) -> None:
        """Check that tables by width have an entry for every width that needs one."""
        ladder, target = self.ladder.widths, self.target.width
        for key in ("cpus", "gpus"):
            table = getattr(self.compute, key)
            if isinstance(table, Mapping):
                _require_widths(f"compute.{key}", table, ladder)
        if self.cost:
            require(self.model is None, "cost", "a table", "left out with [model]: it is counted")
            key, table = self.cost.entries
            _require_widths(f"cost.{key}", table, (*ladder, target), "the target's included")

    def _check_trainer(self, trainer: TrainerTable) -> None:
        """Check the keys that a foreign trainer needs or rules out, and its placeholders."""
        for table in OWN_TABLES:
            own = f"left out beside [trainer], which has its own {table}"
            require(table not in self.model_fields_set, table, "a table", own)
        if self.cost is None:
            raise SpecError(
                "cost: missing; with [trainer] give parameters = { 32 = 53248, ... } or flops, one "
                "entry per width and the target's: what a sweep costs is not known otherwise"
            )
        batch_size, steps = self.target.batch_size, self.target.steps
        known = "left out beside [trainer]: [cost] says what the target costs"
        require(batch_size is None, "target.batch_size", batch_size, known)
        known = "left out, or trainer.steps given too"
        require(steps is None or trainer.steps is not None, "target.steps", steps, known)
        for name, value in trainer.arguments.items():
            is_free = name.isidentifier() and name not in (*COLUMNS, *OWN, *self.axes)
            known = "under a plain name that neither an axis nor the trial has"
            require(is_free, f"trainer.arguments.{name}", value, known)
        if trainer.command is not None:
            self._check_placeholders(trainer)

    def _check_placeholders(self, trainer: TrainerTable) -> None:
        """Check that every placeholder is known, and that every swept axis is used."""
        own = [name for name in OWN if name != "steps" or trainer.steps is not None]
        known, used, in_result = [*own, *self.axes, *trainer.arguments], set[str](), set[str]()
        for key, text in trainer.texts():
            for name in names_in(text):
                if name not in known:
                    raise SpecError(_unknown_placeholder(f"trainer.{key}", name, known))
                (in_result if key == "result" else used).add(name)
        for name, value in trainer.arguments.items():
            require(name in used, f"trainer.arguments.{name}", value, "used in the command")
        for name in ("width", *self.axes):
            if name not in used:
                raise SpecError(
                    f"trainer.command: {{{name}}} is not used, so that all its values would be "
                    "the same run; give it to the command, or in trainer.environment"
                    + ("" if name == "width" else f", or take axes.{name} out")
                )
        if "seed" not in used and self.repeats:
            raise SpecError(
                "trainer.command: {seed} is not used, so that repeats would show no noise where "
                "there is some; give it to the command, or in trainer.environment"
            )
        swept = [name for name, axis in self.axes.items() if axis.value is None]
        apart = {"width", *swept} | ({"seed"} if self.repeats else set())
        if trainer.result and "trial_folder" not in in_result and not apart <= in_result:
            raise SpecError(
                f"trainer.result: got {trainer.result!r}, must be another file for every trial: "
                f"use {{trial_folder}}, or all of {', '.join(f'{{{n}}}' for n in sorted(apart))}"
            )

    @property
    def repeats(self) -> bool:
        """True if a point may be trained with more than one seed."""
        return self.ladder.policy == "adaptive" or len(self.ladder.seeds) > 1

    @property
    def rule(self) -> str | None:
        """The width rule; None if a foreign trainer's is not stated."""
        is_stated = self.model is not None or "optimizer" in self.model_fields_set
        return self.optimizer.rule if is_stated else None

    @property
    def steps(self) -> int | None:
        """Optimizer steps of a trial; None if the spec does not state them."""
        if self.trainer:
            return self.trainer.steps
        return self.train.steps if self.train else None

    @property
    def base_width(self) -> int:
        """The ladder's first width, in whose units every point is given."""
        return self.ladder.widths[0]

    @property
    def ladder_spec(self) -> LadderSpec:
        """The part of the spec that the ladder's decisions depend on, without costs."""
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
        """Return `ladder_spec` with the costs of trials and the budget.

        Args:
            costs: width → FLOPs of one trial.
            target_cost: FLOPs of the target run, of which the budget is a multiple.
        """
        budget = self.budget.max_over_target * target_cost
        return replace(self.ladder_spec, costs=dict(costs), budget=budget)

    @property
    def costs(self) -> dict[int, float]:
        """Width → cost of one trial by the table [cost]; empty without it."""
        entries = self.cost.entries[1] if self.cost else {}
        return {width: entries[width] for width in self.ladder.widths if self.cost}

    @property
    def target_cost(self) -> float:
        """Cost of the target run by the table [cost], which must be there.

        It is the FLOPs as given, or the parameters times the target's steps over a trial's steps.
        """
        assert self.cost is not None
        key, entries = self.cost.entries
        longer = self.target.steps / self.steps if self.target.steps and self.steps else 1.0
        return entries[self.target.width] * (longer if key == "parameters" else 1.0)

    @property
    def resolved_model(self) -> ModelConfig | None:
        """The model file's text with the keywords of `build`, among them vocab_size.

        Raises:
            SpecError: vocab_size is missing or smaller than the tokenizer's.
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
        """Return the resolved spec as JSON values, with defaults filled in, without `NO_PART`."""
        # A written default would count as stated when it is read again, `rule` above all.
        unused = {"optimizer", *OWN_TABLES} if self.trainer else {"optimizer"}
        mute = {*NO_PART, *(unused - self.model_fields_set if self.model is None else ())}
        if not self.log.to:  # versions without the table read the record too
            mute.add("log")
        return self.model_dump(mode="json", exclude_none=True, exclude=mute)

    def strict_fields(self, corpus_digest: str) -> dict[str, Any]:
        """Return dotted key → value of everything that must be equal for comparable losses."""
        if self.trainer:
            # Without [optimizer]: it only states what the trainer does.
            keys = self.trainer.model_dump(mode="json", exclude_none=True, include=STRICT_KEYS)
            used = {name for _, text in self.trainer.texts() for name in names_in(text)}
            if self.trainer.command and "steps" not in used:  # a statement, as the rule is
                keys.pop("steps", None)
            if not self.trainer.arguments:  # a key that older versions did not have
                del keys["arguments"]
            own = {f"trainer.{key}": value for key, value in keys.items()}
            return {"ladder.widths[0]": self.base_width, **own}
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
    """Return the SHA-256 of `strict_fields`, 16 hex digits."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def _variant_tables(data: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return name → tables of the variants, those without a fault of their own."""
    plain = {key: value for key, value in data.items() if key != "variants"}
    given = data.get("name")
    stem = given if isinstance(given, str) and NAME_PATTERN.fullmatch(given) else "sweep"
    return {
        name: {**replaced(plain, changes), "name": f"{stem}-{name}"}
        for name, changes in table_in(data, "variants").items()
        if NAME_PATTERN.fullmatch(str(name)) and isinstance(changes, dict)
    }


def _require_different(spec: Spec) -> None:
    """Check that no variant is the same as the spec or as another variant.

    Raises:
        SpecError: naming each such pair.
    """
    seen: list[tuple[str, Any]] = []
    faults = []
    for name, variant in spec.every_variant.items():
        content = ({**variant.as_dict(), "name": ""}, variant.model_source)
        alike = next((other for other, its in seen if its == content), None)
        if alike:
            other = "the spec itself" if alike == PLAIN else f"variants.{alike}"
            faults.append(
                f"variants.{name}: got the same as {other}, must be another value for one key of "
                "the spec or more, such as data.source"
            )
        seen.append((name, content))
    if faults:
        raise SpecError(*faults)


def _require_widths(
    key: str, table: Mapping[int, float], widths: Iterable[int], which: str = "of the ladder"
) -> None:
    """Check that a table by width has the widths that it needs."""
    missing = [width for width in dict.fromkeys(widths) if width not in table]
    allowed = f"given too for width {', '.join(map(str, missing))}: one entry per width, {which}"
    require(not missing, key, dict(table), allowed)


def _unknown_placeholder(key: str, name: str, known: Sequence[str]) -> str:
    """Return the message for an unknown placeholder."""
    hint = did_you_mean(f"{{{name}}}", [f"{{{one}}}" for one in known])
    if name == "steps":
        hint = "; give trainer.steps for it"
    shown = ", ".join(f"{{{one}}}" for one in known)
    return f"{key}: unknown placeholder {{{name}}}; allowed: {shown}{hint}"


def _with_paths(data: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
    """Return the spec with absolute paths, so that every worker finds them."""
    trainer = data.get("trainer")
    if isinstance(trainer, dict):
        paths = {"folder": trainer.get("folder", "."), "shapes": trainer.get("shapes")}
        given = {key: path for key, path in paths.items() if isinstance(path, str)}
        there = {key: str((folder / path).absolute()) for key, path in given.items()}
        data = {**data, "trainer": {**trainer, **there}}
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
    """Return a table's `source` with absolute paths, if it has paths."""
    source = table.get("source")
    sources = (source,) if isinstance(source, str) else source
    if source == PYTHON_STDLIB or not isinstance(sources, (list, tuple)):
        return {}
    if not all(isinstance(item, str) for item in sources):
        return {}
    return {"source": [str((folder / item).absolute()) for item in sources]}


def _with_vocabulary(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """Set the model's vocab_size to the tokenizer's vocabulary if it is not given.

    It is stored like a given key, because a stored spec is read without the tokenizer's file.
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
    except ValueError as error:
        raise SpecError(f"--set {key}: {LONG_INTEGER}") from error
    table = data
    for part in path[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise SpecError(f"--set {override}: {part} is no table")
    table[path[-1]] = value


def _faults(error: pydantic.ValidationError) -> list[str]:
    """Return one line per wrong key: the value given and the values allowed."""
    problems: dict[tuple[str | int, ...], list[Any]] = {}
    for problem in error.errors():
        problems.setdefault(_without_branch(problem["loc"]), []).append(problem)
    faults = [fault for same in problems.values() for fault in _faults_of(same)]
    return [" ".join(fault.splitlines()) for fault in dict.fromkeys(faults)]


def _faults_of(problems: list[Any]) -> list[str]:
    """Return the lines for one key: one, unless the key's own check has found more."""
    if isinstance(problems[0]["input"], dict):  # number or table: for a table the table's problem
        problems = problems[::-1]
    problem, key = problems[0], _key(problems[0]["loc"])
    inner = problem.get("ctx", {}).get("error")
    if isinstance(inner, SpecError):
        return [f"{key}.{fault}" if key else fault for fault in inner.faults]
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return [_unknown_key(key.split("."))]
    if problem["type"] in ("missing", "missing_argument"):
        return [f"{key}: missing; it must be given"]
    # A key of several types gives one problem per type.
    allowed = [_allowed(other, key) for other in problems if _key(other["loc"]) == key]
    return [f"{key}: got {shown(problem['input'])}, must be {' or '.join(dict.fromkeys(allowed))}"]


BRANCH = re.compile(r"(\[key\]|int|str|float|constrained-\w+|(literal|tuple|list|dict)\[.*)")
"""A part of a problem's location that names one of a key's types."""


def _without_branch(location: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """Cut a location before the part that names one of a key's types."""
    branches = (n for n, part in enumerate(location) if BRANCH.fullmatch(str(part)))
    return location[: next(branches, len(location))]


def _key(location: Sequence[str | int]) -> str:
    """Return the dotted key of a problem, without the parts that name a type."""
    return ".".join(str(part) for part in location if not BRANCH.fullmatch(str(part)))


def _allowed(problem: Any, key: str) -> str:
    """Reword pydantic's statement of the allowed values."""
    if problem["type"] in ("dataclass_type", "model_type", "dict_type"):
        is_value = key.startswith("axes.") and isinstance(problem["input"], (int, float))
        one = f"; for one value: {key}.value = {problem['input']!r}" if is_value else ""
        return f"a table [{key}]{one}"
    text: str = problem["msg"].removeprefix("Input should be ")
    return (
        text.replace("a valid integer", "an integer")
        .replace("a valid ", "a ")
        .replace("greater than or equal to", ">=")
        .replace("less than or equal to", "<=")
        .replace("an array", "a list")
        .replace("a array", "a list")
    )


def _unknown_key(location: Sequence[str]) -> str:
    """Return the message for an unknown key, with the known keys and the nearest one."""
    *tables, key = location
    owner = AxisTable if "axes" in tables[-2:-1] else Spec
    owner = _TABLES.get(tables[0], owner) if tables and owner is Spec else owner
    owner = _TABLES.get(".".join(tables[:2]), owner) if owner is not AxisTable else owner
    known = [f.name for f in fields(owner)] if is_dataclass(owner) else list(owner.model_fields)
    elsewhere = [f"{table}.{key}" for table, keys in _keys().items() if key in keys]
    if elsewhere and not tables:
        hint = f"; did you mean {' or '.join(elsewhere)}?"
    else:
        hint = did_you_mean(key, known)
    where = f" in [{'.'.join(tables)}]" if tables else ""
    return f"{'.'.join(location)}: unknown key; allowed{where}: {', '.join(known)}{hint}"


def _keys() -> dict[str, list[str]]:
    """Map each table to its keys."""
    return {
        name: [f.name for f in fields(owner)] if is_dataclass(owner) else list(owner.model_fields)
        for name, owner in _TABLES.items()
    }


_TABLES: dict[str, Any] = {
    "ladder": LadderTable,
    "target": TargetTable,
    "optimizer": OptimizerConfig,
    "train": TrainConfig,
    "data": DataConfig,
    "data.sources": SourceConfig,
    "trainer": TrainerTable,
    "cost": CostTable,
    "compute": ComputeTable,
    "budget": BudgetTable,
    "frontier": FrontierTable,
    "frontier.muon": OptimizerTable,
    "frontier.adamw": OptimizerTable,
    "frontier.devices": DevicesTable,
    "log": LogTable,
    "scaling": ScalingTable,
    "scaling.sizes": SizeTable,
    "scaling.muon": OptimizerTable,
    "scaling.adamw": OptimizerTable,
}
