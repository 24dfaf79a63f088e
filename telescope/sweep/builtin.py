"""A sweep whose trials telescope trains itself: its model file checked, its costs counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from telescope.check.verdict import CoordCheck
from telescope.config import BYTES, TrialConfig
from telescope.data.corpus import check_vocabulary, load_corpus, passes
from telescope.data.tokenizer import load_tokenizer
from telescope.dispatch.queue import Trainer
from telescope.errors import DataError, SpecError
from telescope.ladder.plan import StagePlan
from telescope.records import Point, Trial
from telescope.spec.spec import Spec
from telescope.store.folder import Folder
from telescope.sweep.counting import (
    ASSUMED_FLOP_RATE,
    Inspected,
    check_corpus,
    inspect,
    required_tables,
    target_train,
)
from telescope.sweep.machine import check_device, check_usable, pack_size
from telescope.sweep.runnable import (
    MakeCheck,
    Trainable,
    describe_workers,
    estimate_seconds,
)
from telescope.train.cost import StepCost


@dataclass(frozen=True)
class BuiltIn(Trainable):
    """A spec with [model] and [train], checked against its model file and its corpus."""

    found: Inspected
    trial_config: TrialConfig

    @classmethod
    def of(cls, spec: Spec) -> BuiltIn:
        """Check the model file and the corpus, and count the costs.

        Raises:
            SpecError: a keyword that the model file does not take, a device that is not there.
            ModelError: the model file fails, or has a parameter without a clear role.
            DataError: the corpus is missing or empty.
        """
        model, train = required_tables(spec)
        check_device(spec.compute.device)
        found = inspect(spec)
        corpus = load_corpus(spec.data)
        check_vocabulary(corpus, model.kwargs["vocab_size"])
        config = TrialConfig(
            model=model,
            optimizer=spec.optimizer,
            train=train,
            data=spec.data,
            base_width=spec.base_width,
            corpus_digest=corpus.digest,
            device=spec.compute.device,
            threads=spec.compute.cpus_at(spec.base_width),
            threads_at={width: spec.compute.cpus_at(width) for width in spec.ladder.widths},
            flops_per_step={width: cost.total for width, cost in found.costs.per_step.items()},
        )
        return cls(spec, found, config)

    @property
    def costs(self) -> Mapping[int, StepCost]:
        """Width → cost of one step."""
        return self.found.costs.per_step

    @property
    def cost_per_trial(self) -> Mapping[int, float]:
        """Width → FLOPs of one trial."""
        return self.found.costs.per_trial(self.spec)

    @property
    def target_flops(self) -> float:
        """FLOPs of the target run."""
        return self.found.costs.of_target(self.spec)

    @property
    def comparable(self) -> dict[str, Any]:
        """Dotted key → value of all that makes losses incomparable when it differs.

        With the model file's own defaults: to write one into the spec changes nothing.
        """
        defaults = {f"model.{key}": value for key, value in self.found.defaults.items()}
        comparable = self.spec.strict_fields(self.trial_config.corpus_digest) | defaults
        name = self.spec.data.tokenizer_name
        if name not in (None, BYTES):
            comparable["data.tokenizer (hash)"] = load_tokenizer(name).digest
        return comparable

    @property
    def model_text(self) -> str:
        """The model file's text."""
        return self.trial_config.model.text

    @property
    def notes(self) -> tuple[str, ...]:
        """A note on data that is read more than once, if there is any."""
        note = self.repeated_data
        return (note,) if note else ()

    @property
    def repeated_data(self) -> str | None:
        """A sentence on data that a trial reads more than once; None if there is none."""
        corpus = load_corpus(self.spec.data)
        repeated = {
            name: times
            for name, times in passes(corpus, self.trial_config.train.tokens).items()
            if times > 1
        }
        if not repeated:
            return None
        if len(corpus.parts) == 1:
            (times,) = repeated.values()
            return f"every trial reads its training data {times:.1f} times"
        shown = ", ".join(f"{name} {times:.1f} times" for name, times in repeated.items())
        return f"every trial reads parts of its training data more than once: {shown}"

    def model_check(self, *, wanted: bool) -> tuple[MakeCheck | None, str]:
        """The short coordinate check of the model, or None and why it is left out."""
        if not wanted:
            return None, "--no-check"
        if {*self.spec.ladder.widths} == {self.spec.target.width}:
            return None, "there is one width alone, and nothing to transfer"
        try:
            check_usable(self.spec.compute.device)
        except SpecError:  # a cluster's machines have it: a run in place would have been refused
            return None, (
                f"this machine has no device {self.spec.compute.device!r}; `telescope check` makes "
                "it on a machine that has one"
            )
        return partial(_short_check, self), ""

    def check_inputs(self, *, is_cluster: bool) -> None:
        """Check that the corpus is long enough; see `counting.check_corpus`."""
        check_corpus(self.trial_config)

    def make_trainer(self, results: Folder) -> Trainer:
        """The trainer of muP models, alone and in packs, with its checkpoints in the folder."""
        from telescope.packs.trainer import PackedTrainer

        kept, rows = str(results.checkpoints.absolute()), str(results.rows.absolute())
        config = replace(self.trial_config, checkpoint_folder=kept, row_folder=rows)
        return PackedTrainer(config)

    @property
    def timeout(self) -> float:
        """[train]'s."""
        return self.trial_config.train.timeout

    def pack_size(self, *, is_cluster: bool) -> int | Literal["auto"]:
        """See `machine.pack_size`."""
        return pack_size(self.spec, is_cluster=is_cluster)

    def as_plan(self, at_once: Mapping[int, int], *, probe: bool) -> dict[str, Any]:
        """The plan in the keys of `telescope plan --json`; see `Trainable.as_plan`."""
        if probe:
            check_corpus(self.trial_config)
            check_usable(self.spec.compute.device)
        seconds, basis = _probed(self) if probe else _assumed(self)
        estimate = estimate_seconds(self, seconds, at_once)
        basis += f"; {describe_workers(at_once)}, start-up not counted"
        plan = _as_json(self, {"estimate": estimate, "basis": basis})
        return {**plan, "arithmetic": _timed(self) if probe else None}

    @property
    def refused(self) -> str | None:
        """The reason that `run` would refuse it (a short corpus, the budget), or None."""
        try:
            check_corpus(self.trial_config)
        except DataError as error:
            return str(error)
        return self.over_budget


def _short_check(
    sweep: BuiltIn, say: Callable[[str], None], progress: Callable[[float, float], None]
) -> CoordCheck:
    """Make the check that comes before a run; see `MakeCheck`."""
    # Here, as torch takes seconds to import: in the check's own thread, while Ray starts.
    from telescope.sweep.modelcheck import short_check

    return short_check(sweep, say, progress)


def _as_json(sweep: BuiltIn, seconds: Mapping[str, Any]) -> dict[str, Any]:
    """The plan in the keys of `telescope plan --json`.

    Args:
        sweep: the sweep.
        seconds: {"estimate", "basis"}.
    """
    plan = sweep.plan
    train, target = sweep.trial_config.train, target_train(sweep.spec, sweep.trial_config.train)
    by_parameters = sum(
        stage.trials * sweep.costs[stage.width].parameters * train.tokens for stage in plan.stages
    )
    return {
        "name": sweep.spec.name,
        "policy": sweep.spec.ladder.policy,
        "stages": [_stage_as_json(sweep, stage) for stage in plan.stages],
        "target": {
            "width": sweep.spec.target.width,
            **sweep.found.costs.at_target.parameters_as_json,
            "tokens": target.tokens,
            "flops": sweep.target_flops,
        },
        "sweep_flops": plan.expected,
        "sweep_over_target": sweep.planned["expected"],
        "sweep_over_target_parameters": by_parameters
        / (sweep.found.costs.at_target.parameters * target.tokens),
        "range": sweep.planned,
        "data": _data_as_json(sweep),
        "seconds": dict(seconds),
    }


def _data_as_json(sweep: BuiltIn) -> dict[str, Any]:
    """Describe the data: tokens for training and measurement, and passes over each source."""
    corpus = load_corpus(sweep.spec.data)
    return {
        "train_tokens": len(corpus.train_tokens),
        "held_out_tokens": len(corpus.held_out_tokens),
        "vocabulary": corpus.vocabulary,
        "passes": passes(corpus, sweep.trial_config.train.tokens),
        "note": sweep.repeated_data,
    }


def _stage_as_json(sweep: BuiltIn, stage: StagePlan) -> dict[str, Any]:
    """One stage of the plan; flops are of all its trials."""
    cost, train = sweep.costs[stage.width], sweep.trial_config.train
    steps = stage.trials * train.steps
    return {
        "width": stage.width,
        **cost.parameters_as_json,
        "points": dict(stage.points),
        "trials": stage.trials,
        "tokens": stage.trials * train.tokens,
        "flops": {
            "model": cost.model * steps,
            "attention": cost.attention * steps,
            "optimizer": cost.optimizer * steps,
            "total": cost.total * steps,
        },
    }


def _probed(sweep: BuiltIn) -> tuple[dict[int, float], str]:
    """Width → seconds of a trial, timed on this machine."""
    from telescope.train.probe import seconds_per_trial

    seconds = {
        trial.width: seconds_per_trial(sweep.trial_config, trial) for trial in _lowest_trials(sweep)
    }
    return seconds, "measured: a few steps at every width, one worker alone on this machine"


def _timed(sweep: BuiltIn) -> dict[str, dict[str, dict[int, float]]]:
    """Key of an arithmetic → "fp32" and "bf16" → width → seconds per step, on this machine."""
    from telescope.train.probe import arithmetic_seconds

    found: dict[str, dict[str, dict[int, float]]] = {}
    for trial in _lowest_trials(sweep):
        for key, times in arithmetic_seconds(sweep.trial_config, trial).items():
            for arithmetic, seconds in times.items():
                found.setdefault(key, {}).setdefault(arithmetic, {})[trial.width] = seconds
    return found


def _lowest_trials(sweep: BuiltIn) -> list[Trial]:
    """A trial of every width, at the low end of every axis."""
    point = Point.of({axis.name: axis.low for axis in sweep.spec.ladder_spec.axes})
    return [Trial(width, point, 0) for width in sweep.costs]


def _assumed(sweep: BuiltIn) -> tuple[dict[int, float], str]:
    """Width → seconds of a trial at a stated rate."""
    compute = sweep.spec.compute
    rates = {
        width: compute.flop_rate or ASSUMED_FLOP_RATE * compute.cpus_at(width)
        for width in sweep.costs
    }
    source = "compute.flop_rate" if compute.flop_rate else "assumed; --probe measures"
    seconds = {width: flops / rates[width] for width, flops in sweep.cost_per_trial.items()}
    slow, fast = min(rates.values()), max(rates.values())
    shown = f"{slow:.3g}" if slow == fast else f"{slow:.3g} to {fast:.3g}"
    return seconds, f"{shown} FLOP/s per worker ({source})"
