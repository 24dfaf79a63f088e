"""Optimizers and batch sizes compared: every arm tuned, repeated, and read again.

An arm is a sweep of one width in ``results/NAME/frontier/ARM``, so that tuning, packs, budget,
resuming and other trainers are those of `run`. Its chosen point is then trained with further seeds
in the arm's folder ``repeats``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from telescope.answer.finished import Finished, open_result
from telescope.errors import RefusedError, SpecError
from telescope.frontier.arms import Arm, plan_arms
from telescope.frontier.curves import envelope
from telescope.records import Result, Status, Trial, as_json
from telescope.report.live import Screen
from telescope.spec.frontier import FrontierTable
from telescope.spec.optimizers import optimizer_changes
from telescope.spec.spec import Spec
from telescope.spec.variants import replaced
from telescope.store.folder import Folder
from telescope.sweep.fixed import kept_beside, train_fixed
from telescope.sweep.prepare import prepare
from telescope.sweep.run import Lent, Options, run, told_what_to_mend
from telescope.sweep.runnable import Trainable

FOLDER = "frontier"
"""The folder of all arms in the sweep's."""
REPEATS = "repeats"
"""The folder of an arm's chosen point with further seeds, in the arm's."""


def arm_specs(spec: Spec) -> dict[Arm, Spec]:
    """Return every arm with its sweep; two of one batch size differ in the optimizer alone.

    Raises:
        SpecError: the spec has no [frontier], or an arm's keys are wrong.
    """
    table, train = table_of(spec), spec.train
    if train is None:
        raise SpecError(f"{spec.name}: train: missing; a table [train] must be given")
    arms = plan_arms(
        table.optimizers,
        table.batch_sizes,
        sequence_length=train.sequence_length,
        tokens=table.tokens,
        steps=table.steps,
    )
    made, faults = dict[Arm, Spec](), list[str]()
    for arm in arms:
        try:
            made[arm] = _arm_spec(spec, table, arm)
        except SpecError as error:
            faults += [f"frontier, {arm.name}: {fault}" for fault in error.faults]
    if faults:
        raise SpecError(*faults)
    return made


def table_of(spec: Spec) -> FrontierTable:
    """Return the spec's table [frontier].

    Raises:
        SpecError: it has none.
    """
    if spec.frontier is None:
        raise SpecError(
            f"{spec.name}: frontier: missing; a table [frontier] with batch_sizes, tokens and "
            "steps must be given to compare optimizers"
        )
    return spec.frontier


def _arm_spec(spec: Spec, table: FrontierTable, arm: Arm) -> Spec:
    """Return the sweep that tunes one arm."""
    width = table.width or spec.base_width
    own = table.muon if arm.optimizer == "muon" else table.adamw
    changes = optimizer_changes(arm.optimizer, spec.optimizer.rule, own)
    data = replaced(spec.as_dict(), changes)
    ladder = {"widths": [width], "policy": "adaptive", "until": "predicted"}
    train = {"steps": arm.steps, "batch_size": arm.batch_size, "schedule": "constant"}
    data |= {
        "name": arm.name,
        "ladder": data["ladder"] | ladder,
        "target": {"width": width},
        "train": data["train"] | train | {"evals": min(table.evals, arm.steps)},
        # A trial is the target run, so that the budget counts trials.
        "budget": {"max_over_target": float(table.trials)},
    }
    return Spec.from_dict(data, model_source=spec.model_source)


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
    seconds: float
    """Expected wall time."""
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


def plan_frontier(spec: Spec, specs: Mapping[Arm, Spec], workers: int | None) -> FrontierPlan:
    """Plan all arms.

    Raises:
        SpecError, ModelError, DataError: the spec, its model file or its corpus is wrong.
    """
    from telescope.sweep.machine import workers as workers_at

    arms, seconds, basis = [], 0.0, ""
    for arm, arm_spec in specs.items():
        sweep = prepare(arm_spec)
        if refusal := sweep.over_budget:
            raise SpecError(f"{spec.name}: frontier.trials: {refusal}")
        (stage,) = sweep.plan.stages
        planned = _arm_plan(spec, arm, sweep, stage.trials)
        arms.append(planned)
        at_once = workers_at(arm_spec, workers, is_cluster=False)
        timed = sweep.as_plan(at_once, probe=False)["seconds"]
        basis = timed["basis"]
        seconds += (
            (timed["estimate"] or 0.0) * planned.expected_cost / (planned.cost * planned.expected)
        )
    target = prepare(spec).target_flops
    return FrontierPlan(tuple(arms), target, seconds, basis, spec.budget.max_over_target)


def _arm_plan(spec: Spec, arm: Arm, sweep: Trainable, expected: int) -> ArmPlan:
    (cost,) = sweep.cost_per_trial.values()
    table = table_of(spec)
    return ArmPlan(arm, cost, expected, max(table.trials, expected), table.repeats)


@dataclass(frozen=True)
class ArmResults:
    """The content of an arm's folder."""

    arm: Arm
    finished: Finished
    repeats: tuple[Result, ...]
    """Of the chosen point with further seeds, without curves."""

    @property
    def results(self) -> list[Result]:
        """All results, with their curves."""
        at = [(self.finished.folder, result) for result in self.finished.results]
        beside = Folder(self.finished.folder.path / REPEATS)
        at += [(beside, result) for result in self.repeats]
        return [replace(result, curve=folder.read_curve(result.trial)) for folder, result in at]


def make_plan(spec: Spec, workers: int | None) -> dict[str, Any]:
    """Return the plan as JSON values; see `plan_frontier`."""
    return plan_as_json(spec, plan_frontier(spec, arm_specs(spec), workers))


def run_frontier(
    spec: Spec,
    options: Options,
    make_screen: Callable[[], Screen],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Tune and repeat every arm, or go on with that, and compare them.

    Args:
        spec: with [frontier].
        options: the manner of the run; its `storage` and `check` are not used.
        make_screen: shows what happens in an arm.
        say: takes a line about the arms.

    Returns:
        The answer as JSON values; see `answer_as_json`.

    Raises:
        RefusedError: the plan is over the budget.
        TelescopeError: see `run`.
        KeyboardInterrupt: as it came; what finished is kept.
    """
    specs = arm_specs(spec)
    if refusal := plan_frontier(spec, specs, options.workers).refused:
        raise RefusedError(f"{spec.name}: {refusal}")
    place = Folder(options.results / spec.name / FOLDER)
    options = replace(options, results=place.path, storage=None, check=False)
    with told_what_to_mend(place), place.held(), ExitStack() as stack:
        lent = Lent(place.path, stack)
        for number, (arm, arm_spec) in enumerate(specs.items(), 1):
            say(f"{spec.name}: arm {number} of {len(specs)}: {arm}, {arm.steps} steps")
            finished = run(arm_spec, options, make_screen, lent=lent)
            if finished.ladder.stuck:
                say(f"{spec.name}: {arm.name}: stuck: {finished.ladder.stuck}")
                continue
            trials = _repeats(finished, table_of(spec).repeats)
            if _missing(finished, trials):
                sweep = prepare(arm_spec)
                train_fixed(
                    trials, sweep, finished.folder, REPEATS, options, make_screen, lent=lent
                )
    return answer_as_json(spec, open_arms(specs, place.path))


def answer_as_json(spec: Spec, arms: Sequence[ArmResults]) -> dict[str, Any]:
    """Return what the arms say, as JSON values.

    Args:
        spec: with [frontier].
        arms: those that have been started, in the order of the plan.
    """
    return {
        "name": spec.name,
        "stuck": [
            {"arm": arm.arm.name, "reason": arm.finished.ladder.stuck}
            for arm in arms
            if arm.finished.ladder.stuck
        ],
        "arms": [_arm_as_json(arm) for arm in arms],
    }


def _arm_as_json(arm: ArmResults) -> dict[str, Any]:
    """Return an arm's facts as JSON values."""
    finished, facts = arm.finished, arm.arm
    choice = finished.ladder.choices[0] if finished.ladder.choices else None
    all_results = [*finished.results, *arm.repeats]
    found = envelope(finished.ladder.spec, arm.results, facts.batch_tokens)
    return {
        "optimizer": facts.optimizer,
        "batch_size": facts.batch_size,
        "batch_tokens": facts.batch_tokens,
        "steps": facts.steps,
        "tokens": facts.tokens,
        "trials": len(finished.results),
        "repeats": len(arm.repeats),
        "point": choice and dict(choice.point),
        "intervals": choice and as_json(choice.intervals),
        "at_edge": list(choice.at_edge) if choice else [],
        "flops": sum(result.flops for result in all_results),
        "seconds": sum(result.seconds for result in all_results),
        "envelope": found and as_json(vars(found)),
    }


def _repeats(finished: Finished, seeds: int) -> list[Trial]:
    """Return the trials of an arm's chosen point that its tuning has not trained."""
    (choice,), first = finished.ladder.choices, finished.spec.ladder.seeds[0]
    wanted = [Trial(choice.width, choice.point, seed) for seed in range(first, first + seeds)]
    known = {r.trial for r in finished.results if r.status is not Status.FAILED}
    return [trial for trial in wanted if trial not in known]


def _missing(finished: Finished, trials: list[Trial]) -> list[Trial]:
    """Return those of the repeats that have no result yet."""
    known = {r.trial for r in _stored_repeats(finished) if r.status is not Status.FAILED}
    return [trial for trial in trials if trial not in known]


def _stored_repeats(finished: Finished) -> list[Result]:
    """Return the results of an arm's repeats so far."""
    folder, axes = finished.folder, finished.spec.ladder_spec.axes
    if not (folder.path / REPEATS).is_dir():
        return []
    with closing(kept_beside(folder, REPEATS, axes)) as kept:
        known = kept.results()
        kept.memory.keep()
        return known


def open_arms(specs: Mapping[Arm, Spec], place: Path) -> list[ArmResults]:
    """Read every arm that has been started."""
    found = []
    for arm in specs:
        if Folder(place / arm.name).exists:
            finished = open_result(place / arm.name, place)
            found.append(ArmResults(arm, finished, tuple(_stored_repeats(finished))))
    return found


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
