"""Optimizers and batch sizes compared: every arm tuned and repeated.

An arm is a sweep of one width, so that tuning, packs, budget, resuming and other trainers are those
of `run`. Its chosen point is then trained with further seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from telescope.answer.frontier import (
    FIGURE_FILE,
    FOLDER,
    REPEATS,
    ArmResults,
    answer_of,
    arm_specs,
    foreign_tokens,
    read_arm,
    table_of,
    write_record,
)
from telescope.errors import RefusedError, SpecError
from telescope.frontier.arms import Arm
from telescope.ladder.plan import least_cost
from telescope.report.live import Screen
from telescope.spec.spec import Spec
from telescope.store.folder import Folder
from telescope.sweep.builtin import BuiltIn
from telescope.sweep.fixed import train_fixed
from telescope.sweep.machine import workers as workers_at
from telescope.sweep.prepare import prepare
from telescope.sweep.run import Lent, Options, run, told_what_to_mend
from telescope.sweep.runnable import Trainable


@dataclass(frozen=True)
class ArmPlan:
    """The cost of one arm, before anything trains; costs are FLOPs or as in [cost]."""

    arm: Arm
    cost: float
    """Of one trial."""
    expected: int
    """Trials that tune it."""
    most: int
    """Most trials that tune it."""
    repeats: int
    """Further trials of the chosen point, at most."""

    @property
    def expected_cost(self) -> float:
        """Expected cost of all its trials."""
        return self.cost * (self.expected + self.repeats)

    @property
    def worst_cost(self) -> float:
        """Highest cost of all its trials."""
        return self.cost * (self.most + self.repeats)


@dataclass(frozen=True)
class FrontierPlan:
    """The cost of a frontier, before anything trains."""

    arms: tuple[ArmPlan, ...]
    target_cost: float
    """Of the spec's target run, in the same unit."""
    seconds: float | None
    """Expected wall time; None where a trainer's is not known."""
    basis: str
    """The assumptions of `seconds`."""
    limit: float
    """Most that all may cost, in target runs."""

    @property
    def refused(self) -> str | None:
        """The reason that it would not be run; None if it would."""
        worst = sum(arm.worst_cost for arm in self.arms) / self.target_cost
        if worst <= self.limit:
            return None
        return (
            f"the frontier may cost {worst:.3g} target runs, budget.max_over_target is "
            f"{self.limit:g}; take fewer batch sizes, or less of frontier.tokens, steps, trials or "
            f"repeats, or set budget.max_over_target = {worst + 0.05:.3g}"
        )


def plan_frontier(
    spec: Spec, specs: Mapping[Arm, Spec], workers: int | None, *, probe: bool = False
) -> FrontierPlan:
    """Plan all arms.

    Args:
        spec: with [frontier].
        specs: its arms.
        workers: trials at once; None: as the spec says.
        probe: time a few real steps of every arm instead of assuming a rate.

    Raises:
        SpecError, ModelError, DataError: the spec, its model file or its corpus is wrong.
    """
    arms: list[ArmPlan] = []
    seconds: float | None = 0.0
    basis = ""
    for arm, arm_spec in specs.items():
        sweep = prepare(arm_spec)
        _check_trials(spec, sweep)
        (stage,) = sweep.plan.stages
        planned = _arm_plan(spec, arm, sweep, stage.trials)
        arms.append(planned)
        at_once = workers_at(arm_spec, workers, is_cluster=False)
        timed = sweep.as_plan(at_once, probe=probe)["seconds"]
        basis, estimate = timed["basis"], timed["estimate"]
        whole = planned.expected_cost / (planned.cost * planned.expected)
        seconds = None if seconds is None or estimate is None else seconds + whole * estimate
    target = prepare(spec).target_flops
    return FrontierPlan(tuple(arms), target, seconds, basis, spec.budget.max_over_target)


def _check_trials(spec: Spec, sweep: Trainable) -> None:
    """Check that an arm may have as many trials as its ladder begins with.

    Raises:
        SpecError: it may not.
    """
    (cost,) = sweep.cost_per_trial.values()
    least = round(least_cost(sweep.ladder_spec) / cost)
    if table_of(spec).trials < least:
        axes = ", ".join(axis.name for axis in sweep.ladder_spec.swept)
        raise SpecError(
            f"{spec.name}: frontier.trials: got {table_of(spec).trials}, must be at least {least} "
            f"to tune {axes}"
        )


def _arm_plan(spec: Spec, arm: Arm, sweep: Trainable, expected: int) -> ArmPlan:
    (cost,) = sweep.cost_per_trial.values()
    table = table_of(spec)
    if spec.cost and spec.cost.parameters:  # of runs of equal tokens, which these are not
        cost *= arm.tokens / foreign_tokens(spec)
    return ArmPlan(arm, cost, expected, max(table.trials, expected), table.repeats)


def make_plan(spec: Spec, workers: int | None, *, probe: bool) -> dict[str, Any]:
    """Return the plan as JSON values; see `plan_frontier`."""
    return plan_as_json(spec, plan_frontier(spec, arm_specs(spec), workers, probe=probe))


def check_budgets(specs: Iterable[Spec], workers: int | None) -> None:
    """Check that no frontier costs more than its budget at the worst.

    Args:
        specs: with [frontier].
        workers: trials at once; None: as the specs say.

    Raises:
        RefusedError: naming all that do.
        SpecError, ModelError, DataError: see `plan_frontier`.
    """
    plans = {spec.name: plan_frontier(spec, arm_specs(spec), workers) for spec in specs}
    if refusals := [f"{name}: {plan.refused}" for name, plan in plans.items() if plan.refused]:
        raise RefusedError("; ".join(refusals))


def run_frontier(
    spec: Spec,
    options: Options,
    make_screen: Callable[[], Screen],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Tune and repeat every arm, or go on with that, and compare them.

    Args:
        spec: with [frontier].
        options: the manner of the run; its `storage` is not used.
        make_screen: shows what happens in an arm.
        say: takes a line about the arms.

    Returns:
        The answer as JSON values; see `answer_of`.

    Raises:
        TelescopeError: see `run`.
        KeyboardInterrupt: as it came; what finished is kept.
    """
    specs = arm_specs(spec)
    place = Folder(options.results / spec.name / FOLDER)
    options = replace(options, results=place.path, storage=None)
    arms: list[ArmResults] = []
    with told_what_to_mend(place), place.held(), ExitStack() as stack:
        lent = Lent(place.path, stack)
        facts = {arm.name: _facts(prepare(arm_spec)) for arm, arm_spec in specs.items()}
        write_record(spec, facts, place.path)
        for number, (arm, arm_spec) in enumerate(specs.items(), 1):
            say(f"{spec.name}: arm {number} of {len(specs)}: {arm}, {arm.steps:,} steps")
            arms.append(_run_arm(arm, arm_spec, table_of(spec).repeats, options, make_screen, lent))
            if why := arms[-1].stuck:
                say(f"{spec.name}: {arm.name}: stuck: {why}")
        found = answer_of(spec, arms, place.path)
        from telescope.report.frontier_figures import write_frontier_figure  # a plan draws nothing

        write_frontier_figure(place.path / FIGURE_FILE, found)
        return found


def _run_arm(
    arm: Arm,
    spec: Spec,
    seeds: int,
    options: Options,
    make_screen: Callable[[], Screen],
    lent: Lent,
) -> ArmResults:
    """Tune one arm, and train its chosen point with so many seeds."""
    finished = run(spec, options, make_screen, lent=lent)
    found = read_arm(arm, options.results)
    assert found is not None
    if found.stuck or not (trials := found.missing(seeds)):
        return found
    train_fixed(trials, prepare(spec), finished.folder, REPEATS, options, make_screen, lent=lent)
    done = read_arm(arm, options.results)
    assert done is not None
    return done


def _facts(sweep: Trainable) -> dict[str, Any]:
    """Return the cost of an arm's step, as far as it is known: fields of `devices.Step`."""
    width = sweep.spec.base_width
    if not isinstance(sweep, BuiltIn):
        parameters = (sweep.spec.cost and sweep.spec.cost.parameters) or {}
        return {"parameters": parameters.get(width)}
    cost = sweep.costs[width]
    return {
        "model": cost.model + cost.attention,
        "optimizer": cost.optimizer,
        "parameters": cost.parameters,
        "matrices": _hidden_matrices(sweep, width),
    }


def _hidden_matrices(sweep: BuiltIn, width: int) -> int:
    """Count the matrices that Newton–Schulz is applied to, each of a stack by itself."""
    from telescope.train.model import build_meta  # here, as torch takes seconds to import

    tags = build_meta(sweep.trial_config.model, width=width, base_width=width).tags.values()
    return sum(math.prod(tag.shape[:-2]) for tag in tags if tag.role.is_hidden)


def plan_as_json(spec: Spec, plan: FrontierPlan) -> dict[str, Any]:
    """Return the plan as JSON values."""
    return {
        "name": spec.name,
        "arms": [
            {
                "optimizer": planned.arm.optimizer,
                "batch_size": planned.arm.batch_size,
                "batch_tokens": planned.arm.batch_tokens,
                "steps": planned.arm.steps,
                "tokens": planned.arm.tokens,
                "trials": {"expected": planned.expected, "most": planned.most},
                "repeats": planned.repeats,
                "cost": {
                    "trial": planned.cost,
                    "expected": planned.expected_cost,
                    "most": planned.worst_cost,
                },
            }
            for planned in plan.arms
        ],
        "target_cost": plan.target_cost,
        "over_target": {
            "expected": sum(arm.expected_cost for arm in plan.arms) / plan.target_cost,
            "most": sum(arm.worst_cost for arm in plan.arms) / plan.target_cost,
        },
        "seconds": {"estimate": plan.seconds, "basis": plan.basis},
        "refused": plan.refused,
    }
