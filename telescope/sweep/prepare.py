"""From a validated spec to what a sweep needs: model and corpus checked, costs counted.

Here torch comes in: the model file is executed, its keywords checked, its roles found and its FLOPs
counted at every width and at the target, the corpus read and measured. All before a trial runs.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from telescope.config import BYTES, ModelConfig, TrainConfig, TrialConfig
from telescope.data.corpus import check_size, check_vocabulary, load_corpus, passes
from telescope.data.tokenizer import load_tokenizer
from telescope.errors import SpecError
from telescope.ladder import plan
from telescope.ladder.plan import Plan, StagePlan, plan_ladder
from telescope.ladder.view import round_size
from telescope.records import LadderSpec
from telescope.spec.spec import Spec, fingerprint
from telescope.sweep.memory import code_of, made_before, of_model
from telescope.train.flops import StepCost, step_cost
from telescope.train.loop import resolve_device
from telescope.train.model import check_keywords, keyword_defaults, ungiven_biases

ASSUMED_FLOP_RATE = 2e10
"""FLOP/s of one CPU thread on small models. An assumption for `plan`; `--probe` measures."""


@dataclass(frozen=True)
class Priced:
    """A spec whose trials and target run have a cost each, in one unit."""

    spec: Spec

    @property
    def cost_per_trial(self) -> dict[int, float]:
        """Width → cost of one trial."""
        raise NotImplementedError

    @property
    def target_flops(self) -> float:
        """Cost of the target run, in the same unit: FLOPs where they are known."""
        raise NotImplementedError

    @cached_property
    def ladder_spec(self) -> LadderSpec:
        """What the ladder's decisions depend on, costs and budget included."""
        return self.spec.ladder_spec_with(self.cost_per_trial, self.target_flops)

    @cached_property
    def plan(self) -> Plan:
        """What the ladder will ask for."""
        code = code_of("ladder", "records", libraries=("numpy",))
        spec = self.ladder_spec
        return made_before(Plan, ("plan", spec), lambda: plan_ladder(spec), code=code)

    @property
    def planned(self) -> dict[str, float]:
        """Best, expected and worst cost of the sweep, in target runs."""
        plan = self.plan
        costs = {"best": plan.best, "expected": plan.expected, "worst": plan.worst}
        return {case: cost / self.target_flops for case, cost in costs.items()}

    @property
    def comparable(self) -> dict[str, Any]:
        """Dotted key → value of all that makes losses incomparable when it differs."""
        raise NotImplementedError

    @property
    def repeated_data(self) -> str | None:
        """How often a trial reads its data, in words, if more than once; None if not known."""
        return None

    @property
    def fingerprint(self) -> str:
        """Of all that makes losses incomparable when it differs."""
        return fingerprint(self.comparable)


@dataclass(frozen=True)
class Counted(Priced):
    """A spec with the FLOPs of its trials and of the target run."""

    costs: Mapping[int, StepCost]
    """Width → cost of one step; the ladder's widths."""
    target_cost: StepCost
    """Cost of one step at the target, with the target's batch size."""

    @property
    def train(self) -> TrainConfig:
        """[train], which the spec has."""
        return required_tables(self.spec)[1]

    @property
    def cost_per_trial(self) -> dict[int, float]:
        """Width → FLOPs of one trial."""
        steps = self.train.steps
        return {width: cost.total * steps for width, cost in self.costs.items()}

    @property
    def target_train(self) -> TrainConfig:
        """[train] with the target's steps and batch size."""
        return target_train(self.spec, self.train)

    @property
    def target_flops(self) -> float:
        """FLOPs of the target run."""
        return self.target_cost.total * self.target_train.steps


@dataclass(frozen=True)
class Prepared(Counted):
    """A counted spec, checked against its corpus too: ready to run."""

    trial_config: TrialConfig
    defaults: Mapping[str, Any]
    """The keywords of the model file's `build` that the spec leaves to it, as JSON has them."""

    @property
    def comparable(self) -> dict[str, Any]:
        """Dotted key → value of all that makes losses incomparable when it differs.

        With the model file's own defaults: to write one into the spec changes nothing.
        """
        defaults = {f"model.{key}": value for key, value in self.defaults.items()}
        comparable = self.spec.strict_fields(self.trial_config.corpus_digest) | defaults
        name = self.spec.data.tokenizer_name
        if name not in (None, BYTES):
            comparable["data.tokenizer (hash)"] = load_tokenizer(name).digest
        return comparable

    @property
    def repeated_data(self) -> str | None:
        """What to say of a run that reads some of its data more than once; None of another."""
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


def target_train(spec: Spec, train: TrainConfig) -> TrainConfig:
    """[train] as the target run has it."""
    return replace(
        train,
        steps=spec.target.steps or train.steps,
        batch_size=spec.target.batch_size or train.batch_size,
    )


def required_tables(spec: Spec) -> tuple[ModelConfig, TrainConfig]:
    """The tables without which nothing can be trained.

    Raises:
        SpecError: one of them is missing.
    """
    model = spec.resolved_model
    if model is None or spec.train is None:
        missing = "model" if model is None else "train"
        raise SpecError(f"{missing}: missing; a table [{missing}] must be given to train models")
    return model, spec.train


def count_costs(spec: Spec) -> Counted:
    """Check the model file, and count what a step costs at every width and at the target.

    Raises:
        SpecError: a table is missing, or a keyword is none that the model file takes.
        ModelError: the model file fails, or has a parameter without a clear role.
    """
    model, train = required_tables(spec)
    check_keywords(model)
    base_width, target = spec.base_width, target_train(spec, train)
    return Counted(
        spec=spec,
        costs={
            width: step_cost(model, train, spec.optimizer, width=width, base_width=base_width)
            for width in spec.ladder.widths
        },
        target_cost=step_cost(
            model, target, spec.optimizer, width=spec.target.width, base_width=base_width
        ),
    )


@dataclass(frozen=True)
class Inspected:
    """Facts of a built model file."""

    costs: dict[int, StepCost]
    target_cost: StepCost
    defaults: dict[str, Any]


def inspect(spec: Spec) -> Inspected:
    """Check the model file, and count; what the same file turned out to be before is remembered.

    Raises:
        SpecError, ModelError: see `prepare`.
    """
    model, train = required_tables(spec)

    def make() -> Inspected:
        counted = count_costs(spec)
        ungiven_biases(model, base_width=spec.base_width)  # a parameter without a start: said here
        defaults = json.loads(json.dumps(keyword_defaults(model), default=repr))
        return Inspected(dict(counted.costs), counted.target_cost, defaults)

    of = ("inspect", model, train, target_train(spec, train), spec.optimizer)
    return of_model(Inspected, model, (*of, spec.ladder.widths, spec.target.width), make)


def prepare(spec: Spec) -> Prepared:
    """Check the model file and the corpus, and count the costs.

    Raises:
        SpecError: a keyword that the model file does not take, a device that is not there.
        ModelError: the model file fails, or has a parameter without a clear role.
        DataError: the corpus is missing or empty.
    """
    model, train = required_tables(spec)
    _check_device(spec.compute.device)
    found = inspect(spec)
    corpus = load_corpus(spec.data)
    check_vocabulary(corpus, model.kwargs["vocab_size"])
    return Prepared(
        spec=spec,
        costs=found.costs,
        target_cost=found.target_cost,
        defaults=found.defaults,
        trial_config=TrialConfig(
            model=model,
            optimizer=spec.optimizer,
            train=train,
            data=spec.data,
            base_width=spec.base_width,
            corpus_digest=corpus.digest,
            device=spec.compute.device,
            threads=spec.compute.cpus_at(spec.base_width),
            threads_at={width: spec.compute.cpus_at(width) for width in spec.ladder.widths},
            flops_per_step={width: cost.total for width, cost in found.costs.items()},
        ),
    )


def check_corpus(config: TrialConfig) -> None:
    """Check that the corpus is long enough to train and to measure on.

    Raises:
        DataError: naming the part that is too short, its size and what it needs.
    """
    check_size(
        load_corpus(config.data),
        config.data,
        batch_size=config.train.batch_size,
        sequence_length=config.train.sequence_length,
    )


def _check_device(device: str) -> None:
    """Check that torch knows the device's name; whether a worker has it, it finds out itself."""
    try:
        torch.device(resolve_device(device))
    except RuntimeError as error:
        raise SpecError(
            f"compute.device: got {device!r}, must be a torch device such as cpu, cuda, or auto"
        ) from error


def check_this_machine(spec: Spec) -> None:
    """Check that this machine has what a trial asks for; a cluster's machines may differ.

    Raises:
        SpecError: naming the key and what there is.
    """
    cpus = len(os.sched_getaffinity(0))
    most = max(map(spec.compute.cpus_at, spec.ladder.widths))
    if most > cpus:
        raise SpecError(f"compute.cpus: got {most}, this machine has {cpus}; lower it")
    if spec.trainer is None:
        check_usable(spec.compute.device)


def check_usable(device: str) -> None:
    """Check that this machine can compute on a device.

    Raises:
        SpecError: it cannot.
    """
    try:
        torch.empty(0, device=torch.device(resolve_device(device)))
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise SpecError(
            f"compute.device: got {device!r}, which this machine cannot use ({reason}); use auto "
            "or cpu"
        ) from error


def check_compiler(spec: Spec) -> None:
    """Check that torch can compile on this machine, where the spec wants it; takes seconds.

    Raises:
        SpecError: it cannot.
    """
    if spec.train is None or not spec.train.compile:
        return
    number = torch.zeros(1, device=torch.device(resolve_device(spec.compute.device)))
    try:
        torch.compile(lambda x: x + 1)(number)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise SpecError(
            f"train.compile: got true, but torch.compile fails on this machine ({reason}); install "
            "a C++ compiler, or leave it false"
        ) from error


def over_budget(prepared: Priced) -> str | None:
    """Why the plan is refused, with what would fit; None when it is within the budget."""
    return plan.over_budget(prepared.ladder_spec, prepared.spec.budget.max_over_target)


def plan_as_json(prepared: Prepared, seconds: Mapping[str, Any]) -> dict[str, Any]:
    """The plan in the keys of `telescope plan --json`.

    Args:
        prepared: the sweep.
        seconds: {"estimate", "basis"}.
    """
    plan = prepared.plan
    train, target = prepared.trial_config.train, prepared.target_train
    by_parameters = sum(
        stage.trials * prepared.costs[stage.width].parameters * train.tokens
        for stage in plan.stages
    )
    return {
        "name": prepared.spec.name,
        "policy": prepared.spec.ladder.policy,
        "stages": [_stage_as_json(prepared, stage) for stage in plan.stages],
        "target": {
            "width": prepared.spec.target.width,
            "parameters": prepared.target_cost.parameters,
            "tokens": target.tokens,
            "flops": prepared.target_flops,
        },
        "sweep_flops": plan.expected,
        "sweep_over_target": prepared.planned["expected"],
        "sweep_over_target_parameters": by_parameters
        / (prepared.target_cost.parameters * target.tokens),
        "range": prepared.planned,
        "data": _data_as_json(prepared),
        "seconds": dict(seconds),
    }


def _data_as_json(prepared: Prepared) -> dict[str, Any]:
    """What is trained and measured on: tokens, and how often a trial reads each source."""
    corpus = load_corpus(prepared.spec.data)
    return {
        "train_tokens": len(corpus.train_tokens),
        "held_out_tokens": len(corpus.held_out_tokens),
        "vocabulary": corpus.vocabulary,
        "passes": passes(corpus, prepared.trial_config.train.tokens),
        "note": prepared.repeated_data,
    }


def _stage_as_json(prepared: Prepared, stage: StagePlan) -> dict[str, Any]:
    """One stage of the plan; flops are of all its trials."""
    cost, train = prepared.costs[stage.width], prepared.trial_config.train
    steps = stage.trials * train.steps
    return {
        "width": stage.width,
        "parameters": cost.parameters,
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


def estimate_seconds(
    prepared: Priced, seconds_per_trial: Mapping[int, float], at_once: Mapping[int, int]
) -> float:
    """Wall time of the expected ladder: one round after the other, each spread over the workers."""
    spec, stages = prepared.ladder_spec, prepared.plan.stages
    rounds = round_size(spec) * len(spec.seeds) if spec.policy == "adaptive" else math.inf
    total = 0.0
    for stage in stages:
        asked = min(float(stage.trials), rounds) or 1.0
        waves = stage.trials / asked * math.ceil(asked / at_once[stage.width])
        total += waves * seconds_per_trial[stage.width]
    return total
