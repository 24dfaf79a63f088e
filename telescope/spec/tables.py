"""The tables of a sweep's TOML file, each with its keys, their ranges and their defaults.

Each table checks itself; `telescope.spec.spec` checks conditions across tables.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Annotated, Literal, Self, TypeAlias, TypeVar

import pydantic
from pydantic import ConfigDict, Field

from telescope.config import (
    MAX_COUNT,
    MAX_NUMBER,
    MAX_WIDTH,
    all_faults,
    require,
    require_factor,
    require_seconds,
)
from telescope.errors import SpecError
from telescope.records import Axis
from telescope.spec.placeholders import names_in

MAX_POINTS = 1000
MIN_STEP = 1.001
"""Smallest factor between an axis's values; below about 1.2 they differ by less than the noise."""
MAX_INTEGER = 2**63 - 1
"""The largest integer of torch and of databases."""
MAX_SEED = 2**62
"""The largest seed. Repeats use the seeds after it, which numpy and torch must accept too."""

Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
Width = Annotated[int, Field(ge=1, le=MAX_WIDTH)]
Value = TypeVar("Value")
ByWidth: TypeAlias = dict[Width, Value]
"""Width → value; in TOML ``{ 32 = 1, 64 = 2 }``, whose keys are strings of digits."""
Cpus = Count
Gpus = Annotated[float, Field(ge=0, le=MAX_COUNT)]
Amount = Annotated[float, Field(ge=1 / MAX_NUMBER, le=MAX_NUMBER)]


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
    """Adaptive: predicted excess loss at the target, as a share of the loss, that is enough."""
    until: Literal["predicted", "proven"] = "predicted"
    """Adaptive: stop when the prediction is within the tolerance ("predicted"), or once a drift
    that never settles is ruled out too ("proven")."""
    round: Annotated[int, Field(ge=1, le=1000)] | None = None
    """Adaptive: points per round; by default the number of swept axes plus 2, at least 4."""
    seeds: tuple[Seed, ...] = (0,)
    """Seeds of every point; each sets initialisation and data order."""

    @pydantic.model_validator(mode="after")
    @all_faults()
    def _check(self) -> Self:
        widths = self.widths
        require(
            len(widths) >= 1 and widths[0] >= 1,
            "widths",
            list(widths),
            "one positive width or more",
        )
        require(widths[-1] <= MAX_WIDTH, "widths", list(widths), f"at most {MAX_WIDTH:,}")
        for narrow, wide in itertools.pairwise(widths):
            allowed = f"rising, each at most double the one before ({narrow} then {wide})"
            require(narrow < wide <= 2 * narrow, "widths", list(widths), allowed)
        unique = len(set(self.seeds)) == len(self.seeds) >= 1
        require(unique, "seeds", list(self.seeds), "one seed or more, each once")
        return self


class TargetTable(Table):
    """Table ``[target]``: the large run that the sweep is for."""

    width: Annotated[int, Field(le=MAX_WIDTH)]
    """Width of the target, at least the last width of the ladder."""
    steps: Count | None = None
    """Optimizer steps; by default those of [train]."""
    batch_size: Count | None = None
    """Sequences per step; by default as in [train]."""


class AxisTable(Table):
    """Table ``[axes.NAME]``: a log-spaced range, or one fixed value."""

    low: float | None = None
    high: float | None = None
    points: int | None = None
    """Values at the base width, both ends included; at least 2."""
    value: float | None = None

    @pydantic.model_validator(mode="after")
    @all_faults()
    def _check(self) -> Self:
        if self.value is not None:
            for key in ("low", "high", "points"):
                require(
                    getattr(self, key) is None, key, getattr(self, key), "left out beside value"
                )
            require(self.value >= 0, "value", self.value, "a number >= 0")
            if self.value:
                require_factor("value", self.value)
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
        require_factor("low", self.low)
        require_factor("high", self.high)
        allowed = f"an integer from 2 to {MAX_POINTS}; for one value, set `value`"
        is_grid = 2 <= self.points <= MAX_POINTS
        require(is_grid, "points", self.points, allowed)
        if self.low >= self.high or not is_grid:
            return self
        step = (self.high / self.low) ** (1 / (self.points - 1))
        allowed = f"higher: points from {self.low:g} on are less than {MIN_STEP:g} times apart"
        require(step >= MIN_STEP, "high", self.high, allowed)
        return self

    def as_axis(self, name: str) -> Axis:
        """Return the ladder's record of this axis; a fixed one has a single point."""
        if self.value is not None:
            return Axis(name, self.value, self.value, 1)
        assert self.low is not None
        assert self.high is not None
        assert self.points is not None
        most = 1.0 if name == "warmup" else math.inf
        return Axis(name, self.low, self.high, self.points, most)


class ComputeTable(Table):
    """Table ``[compute]``: the resources of trials; not part of the fingerprint."""

    workers: Count | Literal["auto"] = "auto"
    """Trials at once. auto is one per accelerator if trials use one (as many as fit, if gpus is
    given), else as many as the machine's CPUs allow."""
    cpus: Cpus | ByWidth[Cpus] = 1
    """CPUs of a trial, a number or one per width; also its number of threads."""
    gpus: Gpus | ByWidth[Gpus] = 0.0
    """GPUs of a trial, a number or one per width. At 0.5 two trials share one; above 1 it must be
    whole. At 0, each worker of the built-in trainer reserves an even share of this machine's GPUs,
    if the device is one."""
    pack: Count | Literal["auto"] = "auto"
    """Trials of one width that train as one model. auto is 1 on a CPU; on an accelerator it is as
    many as fit its memory, if a short probe shows that this is faster."""
    device: str = "auto"
    """torch's name of the device; auto is the worker's accelerator if it has one, else the CPU."""
    flop_rate: Amount | None = None
    """FLOP/s of one worker, for the times of `plan`; by default a stated guess. `--probe` measures
    it."""

    @pydantic.model_validator(mode="after")
    @all_faults()
    def _check(self) -> Self:
        gpus = self.gpus if isinstance(self.gpus, Mapping) else {None: self.gpus}
        for width, number in gpus.items():
            key = "gpus" if width is None else f"gpus.{width}"
            require(
                number <= 1 or number == int(number), key, number, "at most 1, or a whole number"
            )
        return self

    @property
    def is_by_width(self) -> bool:
        """True if trials of different widths may need different amounts."""
        return isinstance(self.cpus, Mapping) or isinstance(self.gpus, Mapping)

    def cpus_at(self, width: int) -> int:
        """Return the CPUs of a trial at a width of the ladder."""
        return self.cpus[width] if isinstance(self.cpus, Mapping) else self.cpus

    def gpus_at(self, width: int) -> float:
        """Return the GPUs of a trial at a width of the ladder."""
        return self.gpus[width] if isinstance(self.gpus, Mapping) else self.gpus


class BudgetTable(Table):
    """Table ``[budget]``."""

    max_over_target: Amount = 4.0
    """Most that the sweep may cost, in target runs. `run` refuses a sweep that must cost more; the
    adaptive policy stops there."""


class LogTable(Table):
    """Table ``[log]``: experiment trackers; not part of the fingerprint."""

    to: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ()
    """Trackers that get a run per trial while it trains, and the answer at the end."""

    @pydantic.model_validator(mode="after")
    @all_faults()
    def _check(self) -> Self:
        require(len(set(self.to)) == len(self.to), "to", list(self.to), "trackers, each once")
        return self


class ModelTable(pydantic.BaseModel):
    """Table ``[model]``: a file, and keyword arguments of its `build`."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    file: str
    """Path of the model file, relative to the sweep file."""

    @pydantic.model_validator(mode="after")
    @all_faults()
    def _check(self) -> Self:
        for key, value in (self.model_extra or {}).items():
            finite = not isinstance(value, float) or math.isfinite(value)
            require(finite, key, value, "a finite number")
            known = not isinstance(value, int) or abs(value) <= MAX_INTEGER
            require(known, key, value, f"an integer of at most {MAX_INTEGER}, which torch takes")
        return self


class TrainerTable(Table):
    """Table ``[trainer]``: another program, or a Python function, that trains the trials.

    Command, environment and result may have placeholders: ``{width}``, ``{seed}``, every axis by
    name, every name of `arguments`, ``{base_width}``, ``{steps}``, ``{trial_folder}`` (the trial's
    own folder, which is kept, for checkpoints and the like) and ``{python}`` (the interpreter that
    runs telescope). ``{{`` and ``}}`` are literal braces.
    """

    command: tuple[str, ...] | None = None
    """A program and its arguments, run without a shell. This or `function`."""
    function: str | None = None
    """``package.module:name``, looked for in `folder`, then in the current folder."""
    folder: str | None = None
    """Working directory of the command; by default the sweep file's folder."""
    environment: dict[str, str] = {}
    """Command only: variables to set besides the inherited ones."""
    result: str | None = None
    """Command only: the JSON file with the result, relative to `folder`, a different one for every
    trial; by default a JSON line on stdout."""
    arguments: dict[str, str | int | float | bool] = {}
    """Name → value of further placeholders, or keywords of the function, the same for all trials.
    `frontier` sets `optimizer` and `batch_size`."""
    timeout: float = 0.0
    """Seconds after which a trial that is still running is killed and fails; 0: never."""
    steps: Count | None = None
    """Optimizer steps of a trial, if known to telescope; `[target] steps` may then differ."""
    shapes: str | None = None
    """A JSON file of the target's parameters, relative to the sweep file, for `transfer`."""

    @pydantic.model_validator(mode="after")
    @all_faults()
    def _check(self) -> Self:
        require_seconds("timeout", self.timeout)
        one = (self.command is None) != (self.function is None)
        both = [key for key in ("command", "function") if getattr(self, key) is not None]
        require(one, "command", both, "given, or else function; one of the two")
        if self.command is not None:
            enough = bool(self.command) and bool(self.command[0])
            require(enough, "command", list(self.command), "a program and its arguments")
        if self.function is not None:
            module, _, name = self.function.partition(":")
            plain = name.isidentifier() and all(map(str.isidentifier, module.split(".")))
            require(plain, "function", self.function, "package.module:name")
            for key in ("environment", "result"):
                require(not getattr(self, key), key, getattr(self, key), "left out with function")
        for name in self.environment:
            plain = bool(name) and "=" not in name and "\0" not in name
            require(plain, "environment", name, "names of variables, without = and NUL")
        for key, text in self.texts():
            require("\0" not in text, key, text, "without NUL: no program can be given one")
            try:
                names_in(text)
            except ValueError as error:
                raise SpecError(
                    f"{key}: got {text!r}: {error}; placeholders are plain names such as "
                    "{lr}, literal braces are {{ and }}"
                ) from None
        return self

    def texts(self) -> list[tuple[str, str]]:
        """Return key and text of everything that may have placeholders."""
        return [
            *(("command", part) for part in self.command or ()),
            *((f"environment.{name}", text) for name, text in self.environment.items()),
            *([("result", self.result)] if self.result else ()),
        ]


class CostTable(Table):
    """Table ``[cost]``: the cost of runs that another program trains; one entry per width."""

    parameters: ByWidth[Amount] | None = None
    """Width → parameters of the model, which count as the cost of a run of equal tokens."""
    flops: ByWidth[Amount] | None = None
    """Width → FLOPs of one run; for the target's width, of the target run. This or `parameters`."""

    @pydantic.model_validator(mode="after")
    @all_faults()
    def _check(self) -> Self:
        both = [key for key in ("parameters", "flops") if getattr(self, key) is not None]
        one = (self.parameters is None) != (self.flops is None)
        require(one, "parameters", both, "given, or else flops; one of the two")
        return self

    @property
    def entries(self) -> tuple[str, Mapping[int, float]]:
        """The given key and its numbers."""
        if self.flops is not None:
            return "flops", self.flops
        assert self.parameters is not None
        return "parameters", self.parameters
