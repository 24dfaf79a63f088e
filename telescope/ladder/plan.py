"""The cost of a sweep before anything trains, and changes that would bring it into its budget."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from telescope.ladder.grid import points_at
from telescope.ladder.ladder import Ladder
from telescope.ladder.thresholds import MOST_TRIALS, REPEATS
from telescope.ladder.truths import Truth, draw_truths
from telescope.ladder.view import round_size
from telescope.ladder.window import star
from telescope.records import LadderSpec

SIMULATED = 3
"""Number of ladders simulated for a plan; the one of median cost is the expected one."""


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One width's share of the plan."""

    width: int
    points: Mapping[str, int]
    """Axis → its number of values; an adaptive stage takes few of their combinations."""
    trials: int
    """Expected number of trials."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The trials that a ladder is expected to ask for; costs are in the unit of the spec's."""

    stages: tuple[StagePlan, ...]
    """One per width; with 0 trials for a width that is expected to be left out."""
    best: float
    """Lowest cost that any results can lead to."""
    expected: float
    worst: float
    """Highest cost that any results can lead to; at most an adaptive ladder's budget."""


def plan_ladder(spec: LadderSpec) -> Plan:
    """Plan a ladder before anything trains.

    Algorithm 1 asks for the same trials whatever their results are. For the adaptive policy, the
    plan runs the ladder on a few simulated loss surfaces, drawn from its own prior, and takes the
    run of median cost.
    """
    if spec.policy == "paper" or not spec.swept:
        stages = plan_stages(spec)
        cost = _cost(spec, stages)
        return Plan(tuple(stages), cost, cost, cost)
    best = _fewest(spec)
    wall = math.inf if spec.budget is None else max(spec.budget, best)
    truths = draw_truths(replace(spec, budget=wall), SIMULATED)
    climbed = sorted((_climb(truth) for truth in truths), key=lambda stages: _cost(spec, stages))
    stages = climbed[SIMULATED // 2]
    expected = _cost(spec, stages)
    worst = min(_cost_of(spec, _most(spec)), wall)
    return Plan(tuple(stages), min(best, expected), expected, max(worst, expected))


def _climb(truth: Truth) -> list[StagePlan]:
    """Run a ladder on one simulated loss surface and count its trials per width."""
    spec, ladder = truth.spec, Ladder(truth.spec)
    while trials := ladder.ask():
        for trial in trials:
            ladder.tell(truth(trial))
    trials_at = {stage.width: len(stage.trials) for stage in ladder.stages}
    lattice = {axis.name: axis.points for axis in spec.axes}
    return [StagePlan(width, lattice, trials_at.get(width, 0)) for width in spec.widths]


def _fewest(spec: LadderSpec) -> float:
    """Return the least cost: the first rounds of two widths, and the base width's repeats."""
    seeds = len(spec.seeds)
    first = len(star(spec))
    base = first * seeds + (min(REPEATS, first) if seeds == 1 else 0)
    least = {spec.widths[0]: base}
    if len(spec.widths) > 1:
        cells = math.prod(axis.points for axis in spec.axes)
        least[spec.widths[1]] = min(round_size(spec), cells) * seeds
    return _cost_of(spec, least)


def _most(spec: LadderSpec) -> dict[int, int]:
    """Map each width to its trials if every stage takes all rounds that it may."""
    repeats = REPEATS if len(spec.seeds) == 1 else 0
    each = (MOST_TRIALS + round_size(spec)) * len(spec.seeds)
    return {width: each + repeats * (width == spec.widths[0]) for width in spec.widths}


def _cost_of(spec: LadderSpec, trials: Mapping[int, int]) -> float:
    return sum(number * spec.cost(width) for width, number in trials.items())


def _cost(spec: LadderSpec, stages: Iterable[StagePlan]) -> float:
    return _cost_of(spec, {stage.width: stage.trials for stage in stages})


def plan_stages(spec: LadderSpec) -> list[StagePlan]:
    """Plan the stages of Algorithm 1, which depend on no result."""
    base, swept = spec.widths[0], len(spec.swept)
    plans = []
    for width in spec.widths:
        points = {
            axis.name: points_at(axis, width=width, base_width=base, swept=swept)
            for axis in spec.axes
        }
        plans.append(StagePlan(width, points, math.prod(points.values()) * len(spec.seeds)))
    return plans


def least_cost(spec: LadderSpec) -> float:
    """Return the least that a ladder can cost; a smaller budget is refused."""
    if spec.policy == "paper" or not spec.swept:
        return _cost(spec, plan_stages(spec))
    return _fewest(spec)


def over_budget(spec: LadderSpec, limit: float) -> str | None:
    """Say why a ladder is refused and which changes would fit; None if it is within its budget.

    Args:
        spec: a ladder with a budget, or without one.
        limit: the budget in target runs, `budget.max_over_target`.
    """
    if spec.budget is None or (cost := least_cost(spec)) <= spec.budget:
        return None
    least = cost / spec.budget * limit
    fits = [*what_fits(spec), f"budget.max_over_target = {math.ceil(least * 10) / 10:g}"]
    would = "would cost" if spec.policy == "paper" else "would cost at least"
    return (
        f"the sweep {would} {least:.3g} target runs, budget.max_over_target is {limit:g}; any of "
        f"these would fit: {'; '.join(fits)}"
    )


def what_fits(spec: LadderSpec) -> list[str]:
    """List changes to the spec that each bring the ladder's least cost under its budget.

    Args:
        spec: a ladder with a budget that it exceeds.

    Returns:
        Settings such as ``ladder.widths = [32, 64]``; empty when nothing fits.
    """

    def fits(changed: LadderSpec) -> bool:
        return spec.budget is None or least_cost(changed) <= spec.budget

    changes = []
    for count in range(len(spec.widths) - 1, 0, -1):
        shorter = replace(spec, widths=spec.widths[:count])
        if fits(shorter):
            changes.append(f"ladder.widths = {list(shorter.widths)}")
            break
    for thinner in _thinner(spec) if spec.policy == "paper" else ():
        if fits(thinner):
            pairs = zip(spec.axes, thinner.axes, strict=True)
            changed = [new for old, new in pairs if new != old]
            changes.append(
                " with ".join(f"axes.{axis.name}.points = {axis.points}" for axis in changed)
            )
            break
    if len(spec.seeds) > 1:
        single = replace(spec, seeds=spec.seeds[:1])
        if fits(single):
            changes.append(f"ladder.seeds = {list(single.seeds)}")
    return changes


def _thinner(spec: LadderSpec) -> Iterator[LadderSpec]:
    """Yield the ladder with fewer points on all axes, densest first; never under 3 points."""
    most = max(axis.points for axis in spec.axes)
    for left in range(most - 1, 2, -1):
        counts = (max(min(axis.points, 3), axis.points * left // most) for axis in spec.axes)
        axes = zip(spec.axes, counts, strict=True)
        yield replace(spec, axes=tuple(replace(axis, points=count) for axis, count in axes))
