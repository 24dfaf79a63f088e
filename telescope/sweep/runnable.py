"""A sweep that can run: its costs, the conditions of comparable losses, and its trainer.

There is one interface for all trainers: telescope itself (`builtin`), another trainer (`foreign`),
or a loop that asks for trials and tells their losses (`Outside`, here).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol

from telescope.check.verdict import CoordCheck
from telescope.dispatch.queue import Trainer
from telescope.foreign.program import ProgramText
from telescope.ladder import plan
from telescope.ladder.plan import Plan, plan_ladder
from telescope.ladder.view import round_size
from telescope.records import LadderSpec
from telescope.spec.spec import Spec, fingerprint
from telescope.spec.tables import CostTable
from telescope.store.folder import Folder
from telescope.store.memory import code_of, made_before

NO_MODEL = "another trainer's sweep, so there is no model to check"


class MakeCheck(Protocol):
    """Makes the short coordinate check of a model."""

    def __call__(
        self, say: Callable[[str], None], progress: Callable[[float, float], None]
    ) -> CoordCheck:
        """Announce a long check with `say`, and report its progress."""
        ...


@dataclass(frozen=True)
class Runnable(ABC):
    """A spec whose trials and target run have a cost each, in one unit."""

    spec: Spec

    @property
    @abstractmethod
    def cost_per_trial(self) -> Mapping[int, float]:
        """Width → cost of one trial."""

    @property
    @abstractmethod
    def target_flops(self) -> float:
        """Cost of the target run, in the same unit: FLOPs where they are known."""

    @property
    @abstractmethod
    def comparable(self) -> dict[str, Any]:
        """Dotted key → value of all that makes losses incomparable when it differs."""

    @cached_property
    def ladder_spec(self) -> LadderSpec:
        """The part of the spec that the ladder's decisions depend on, with costs and budget."""
        return self.spec.ladder_spec_with(self.cost_per_trial, self.target_flops)

    @cached_property
    def plan(self) -> Plan:
        """The plan of the ladder."""
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
    def over_budget(self) -> str | None:
        """The reason that the plan is over the budget, with changes that would fit; None if not."""
        return plan.over_budget(self.ladder_spec, self.spec.budget.max_over_target)

    @property
    def fingerprint(self) -> str:
        """Of all that makes losses incomparable when it differs."""
        return fingerprint(self.comparable)

    @property
    def program_texts(self) -> Mapping[str, ProgramText]:
        """Key in `comparable` → digests of a file whose text is part of the trainer."""
        return {}

    @property
    def model_text(self) -> str | None:
        """The model file's text; None where telescope sees no model."""
        return None

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes that a user should read before the budget is spent."""
        return ()

    @property
    def prints_steps(self) -> bool:
        """True if the output of a running trial shows its progress."""
        return False

    def model_check(self, *, wanted: bool) -> tuple[MakeCheck | None, str]:
        """The coordinate check to be made before a sweep starts, or None and why there is none.

        Args:
            wanted: False for `--no-check`.
        """
        return None, NO_MODEL


class Trainable(Runnable):
    """A sweep whose trials a dispatcher can have trained."""

    @abstractmethod
    def check_inputs(self, *, is_cluster: bool) -> None:
        """Check what the trials will read and call; a cluster's machines may differ.

        Raises:
            SpecError, DataError: something is missing, or too small.
        """

    @abstractmethod
    def make_trainer(self, results: Folder) -> Trainer:
        """The trainer, whose trials leave their files in a sweep's results folder."""

    @property
    @abstractmethod
    def timeout(self) -> float:
        """Seconds after which a dispatcher ends a trial; 0: never."""

    @property
    def worker_prints(self) -> bool:
        """True if a worker's own output is its trial's log, as with a user's function."""
        return False

    def pack_size(self, *, is_cluster: bool) -> int | Literal["auto"]:
        """Return the pack size of a worker; "auto": as many trials as fit its accelerator."""
        return 1

    @abstractmethod
    def as_plan(self, at_once: Mapping[int, int], *, probe: bool) -> dict[str, Any]:
        """The plan in the keys of `telescope plan --json`.

        Args:
            at_once: width → workers.
            probe: time a few real steps instead of assuming a rate.

        Raises:
            SpecError: this trainer cannot be timed, or not here.
        """

    @property
    def refused(self) -> str | None:
        """The reason that `run` would refuse this plan; None if it would not."""
        return self.over_budget


@dataclass(frozen=True)
class WithCosts(Runnable):
    """A spec with [cost]."""

    cost: CostTable

    @property
    def cost_per_trial(self) -> Mapping[int, float]:
        """Width → FLOPs of a trial where [cost] gives them, or parameters."""
        return self.spec.costs

    @property
    def target_flops(self) -> float:
        """Cost of the target run in the same unit."""
        return self.spec.target_cost


class Outside(WithCosts):
    """A sweep whose trials somebody else's loop trains."""

    @property
    def comparable(self) -> dict[str, Any]:
        """Dotted key → value of what is known of the training: the base width."""
        return {"ladder.widths[0]": self.spec.base_width}


def estimate_seconds(
    sweep: Runnable, seconds_per_trial: Mapping[int, float], at_once: Mapping[int, int]
) -> float:
    """Wall time of the expected ladder: one round after the other, each spread over the workers."""
    spec, stages = sweep.ladder_spec, sweep.plan.stages
    rounds = round_size(spec) * len(spec.seeds) if spec.policy == "adaptive" else math.inf
    total = 0.0
    for stage in stages:
        asked = min(float(stage.trials), rounds) or 1.0
        waves = stage.trials / asked * math.ceil(asked / at_once[stage.width])
        total += waves * seconds_per_trial[stage.width]
    return total


def describe_workers(at_once: Mapping[int, int]) -> str:
    """Describe the number of workers."""
    numbers = sorted(set(at_once.values()))
    if len(numbers) == 1:
        return f"{numbers[0]} worker{'s' if numbers[0] > 1 else ''}"
    return f"{numbers[0]} to {numbers[-1]} workers, by width"
