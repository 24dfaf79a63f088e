"""The facts about a model file and a corpus before a trial runs: FLOPs, defaults, sizes.

Counting executes the model file, checks its keywords, finds its roles and adds up its FLOPs at
every width and at the target. This imports torch; earlier counts are read without it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from telescope.config import ModelConfig, TrainConfig, TrialConfig
from telescope.data.corpus import check_size, load_corpus
from telescope.errors import SpecError
from telescope.spec.spec import Spec
from telescope.store.memory import of_model
from telescope.train.cost import StepCost

ASSUMED_FLOP_RATE = 2e10
"""FLOP/s of one CPU thread on small models. An assumption for `plan`; `--probe` measures."""


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


@dataclass(frozen=True)
class Costs:
    """The cost of one step of a model."""

    per_step: dict[int, StepCost]
    """Width → cost; the ladder's widths."""
    at_target: StepCost
    """At the target, with the target's batch size."""

    def per_trial(self, spec: Spec) -> dict[int, float]:
        """Width → FLOPs of one trial."""
        steps = required_tables(spec)[1].steps
        return {width: cost.total * steps for width, cost in self.per_step.items()}

    def of_target(self, spec: Spec) -> float:
        """FLOPs of the target run."""
        return self.at_target.total * target_train(spec, required_tables(spec)[1]).steps


def count_costs(spec: Spec) -> Costs:
    """Check the model file, and count what a step costs at every width and at the target.

    Raises:
        SpecError: a table is missing, or a keyword is none that the model file takes.
        ModelError: the model file fails, or has a parameter without a clear role.
    """
    from telescope.train.flops import step_cost  # here, as torch takes seconds to import
    from telescope.train.model import check_keywords

    model, train = required_tables(spec)
    check_keywords(model)
    base_width, target = spec.base_width, target_train(spec, train)
    return Costs(
        per_step={
            width: step_cost(model, train, spec.optimizer, width=width, base_width=base_width)
            for width in spec.ladder.widths
        },
        at_target=step_cost(
            model, target, spec.optimizer, width=spec.target.width, base_width=base_width
        ),
    )


@dataclass(frozen=True)
class Inspected:
    """Facts of a built model file."""

    costs: Costs
    defaults: dict[str, Any]
    """The keywords of its `build` that the spec leaves to it, as JSON has them."""


def inspect(spec: Spec) -> Inspected:
    """Check the model file, and count; what the same file turned out to be before is remembered.

    Raises:
        SpecError, ModelError: see `count_costs`.
    """
    model, train = required_tables(spec)

    def make() -> Inspected:
        # Here, as torch takes seconds to import.
        from telescope.train.model import keyword_defaults, ungiven_biases

        costs = count_costs(spec)
        ungiven_biases(model, base_width=spec.base_width)  # a parameter without a start: said here
        return Inspected(costs, json.loads(json.dumps(keyword_defaults(model), default=repr)))

    of = ("inspect", model, train, target_train(spec, train), spec.optimizer)
    return of_model(Inspected, model, (*of, spec.ladder.widths, spec.target.width), make)


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
