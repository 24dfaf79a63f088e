"""What a sweep will cost before anything trains, and what would fit a budget."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from telescope.ladder.grid import points_at
from telescope.records import LadderSpec


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One width's share of the plan."""

    width: int
    points: Mapping[str, int]
    """Axis → how many values it has."""
    trials: int


def plan_stages(spec: LadderSpec) -> list[StagePlan]:
    """The stages of Algorithm 1, which do not depend on any result."""
    base, swept = spec.widths[0], sum(not axis.is_fixed for axis in spec.axes)
    plans = []
    for width in spec.widths:
        points = {
            axis.name: points_at(axis, width=width, base_width=base, swept=swept)
            for axis in spec.axes
        }
        plans.append(StagePlan(width, points, math.prod(points.values()) * len(spec.seeds)))
    return plans


def sweep_cost(spec: LadderSpec, cost_per_trial: Mapping[int, float]) -> float:
    """The cost of all stages, in the unit of `cost_per_trial` (width → cost of one trial)."""
    return sum(stage.trials * cost_per_trial[stage.width] for stage in plan_stages(spec))


def what_fits(spec: LadderSpec, cost_per_trial: Mapping[int, float], budget: float) -> list[str]:
    """Changes to the spec, each enough alone, that bring the sweep under `budget`.

    Args:
        spec: a ladder that costs more than `budget`.
        cost_per_trial: width → cost of one trial.
        budget: the most that the sweep may cost, in the same unit.

    Returns:
        Sentences' ends such as ``ladder.widths = [32, 64] (1.2)``; empty when nothing fits.
    """
    changes = []
    for count in range(len(spec.widths) - 1, 0, -1):
        shorter = replace(spec, widths=spec.widths[:count])
        if sweep_cost(shorter, cost_per_trial) <= budget:
            changes.append(f"ladder.widths = {list(shorter.widths)}")
            break
    for thinner in _thinner(spec):
        if sweep_cost(thinner, cost_per_trial) <= budget:
            pairs = zip(spec.axes, thinner.axes, strict=True)
            changed = [new for old, new in pairs if new != old]
            changes.append(
                " with ".join(f"axes.{axis.name}.points = {axis.points}" for axis in changed)
            )
            break
    if len(spec.seeds) > 1:
        single = replace(spec, seeds=spec.seeds[:1])
        if sweep_cost(single, cost_per_trial) <= budget:
            changes.append(f"ladder.seeds = {list(single.seeds)}")
    return changes


def _thinner(spec: LadderSpec) -> Iterator[LadderSpec]:
    """The same ladder with fewer points on all axes alike, densest first; never under 3 points."""
    most = max(axis.points for axis in spec.axes)
    for left in range(most - 1, 2, -1):
        counts = (max(min(axis.points, 3), axis.points * left // most) for axis in spec.axes)
        axes = zip(spec.axes, counts, strict=True)
        yield replace(spec, axes=tuple(replace(axis, points=count) for axis, count in axes))
