"""Plans against sums written out by hand, and the published ladder's own numbers."""

from __future__ import annotations

import itertools
import json
import resource
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from simulated import ESSENTIAL, Surface

from telescope.ladder.fit.laws import LAWS
from telescope.ladder.grid import paper_stage
from telescope.ladder.ladder import Ladder
from telescope.ladder.plan import least_cost, plan_ladder, plan_stages, what_fits
from telescope.ladder.truths import draw_truths
from telescope.records import Axis, LadderSpec, Point, Trial
from telescope.spec.spec import Spec
from telescope.sweep.planning import make_plan

SPEC = LadderSpec(
    (Axis("lr", 0.001, 1.0, 7), Axis("weight_decay", 0.01, 1.0, 3)),
    (32, 64, 128),
    seeds=(0, 1),
    policy="paper",
    costs={32: 1.0, 64: 4.0, 128: 16.0},
)


def test_stages_and_cost() -> None:
    assert [stage.trials for stage in plan_stages(SPEC)] == [7 * 3 * 2, 5 * 3 * 2, 3 * 1 * 2]
    plan = plan_ladder(SPEC)
    assert plan.best == plan.expected == plan.worst == 42 * 1 + 30 * 4 + 6 * 16


def test_what_fits_really_fits_and_is_the_largest() -> None:
    # Two widths cost 162, one seed half of 258, 5 × 3 points: 30 + 18·4 + 6·16 = 198.
    assert what_fits(replace(SPEC, budget=200)) == [
        "ladder.widths = [32, 64]",
        "axes.lr.points = 5",
        "ladder.seeds = [0]",
    ]


def test_a_huge_grid_is_planned_at_once() -> None:
    axes = (Axis("lr", 0.001, 1.0, 1000), Axis("weight_decay", 0.01, 1.0, 1000))
    huge = replace(SPEC, axes=axes, seeds=(0,), budget=10**5)
    assert plan_stages(huge)[0].trials == 10**6
    (fits,) = what_fits(huge)
    assert fits.startswith("axes.lr.points = ")


def test_plans_count_what_the_ladder_asks_for() -> None:
    for plan in plan_stages(SPEC):
        stage = paper_stage(SPEC, plan.width, {})
        assert plan.trials == len(stage.trials)
        assert plan.points == {axis: len(values) for axis, values in stage.grid.items()}


def test_nothing_fits_a_budget_of_nothing() -> None:
    assert what_fits(replace(SPEC, budget=1)) == []


TRIALS = [64, 25, 9, 1]
BILLIONS = [0.0663, 0.1994, 0.6661, 2.4018, 3.6707]
"""Parameters at the four widths of the published ladder and at its target."""


def at_depth(depth: int) -> list[tuple[float, float]]:
    """(parameters, FLOPs of a trial) at each width of the published ladder and at its target."""
    plan, _ = make_plan(Spec.load("essential-4b", [f"model.depth={depth}"]), probe=False)
    stages = plan["stages"]
    assert [stage["trials"] for stage in stages] == TRIALS
    trials = [(stage["parameters"], stage["flops"]["total"] / stage["trials"]) for stage in stages]
    return [*trials, (plan["target"]["parameters"], plan["target"]["flops"])]


def test_the_papers_ladder_costs_what_the_paper_spent_layer_by_layer() -> None:
    """As below, from models of one and of two layers: each of the other 32 costs as the second."""
    whole = [
        [a + 33 * (b - a) for a, b in zip(one, two, strict=True)]
        for one, two in zip(at_depth(1), at_depth(2), strict=True)
    ]
    assert [round(parameters / 1e9, 4) for parameters, _ in whole] == BILLIONS
    *swept, target = whole
    spent = [
        sum(n * trial[i] for n, trial in zip(TRIALS, swept, strict=True)) / target[i]
        for i in range(2)
    ]
    assert spent == [pytest.approx(4.80, abs=0.005), pytest.approx(7.9, abs=0.05)]


@pytest.mark.slow  # half a minute of CPU time: five models of 34 layers are traced
def test_the_papers_ladder_costs_what_the_paper_spent() -> None:
    """arXiv 2505.02222: 64, 25, 9 and 1 runs of 0.0663 to 2.4018 B parameters for one of 3.6707 B.

    4.80 target runs by parameters, 7.9 by FLOPs, attention in full: derived from its shapes.
    """
    command = [sys.executable, "-m", "telescope", "plan", "essential-4b", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    stages = plan["stages"]
    assert [stage["trials"] for stage in stages] == TRIALS
    sizes = [stage["parameters"] for stage in [*stages, plan["target"]]]
    assert [round(size / 1e9, 4) for size in sizes] == BILLIONS
    assert plan["sweep_over_target_parameters"] == pytest.approx(4.80, abs=0.005)
    assert plan["sweep_over_target"] == pytest.approx(7.9, abs=0.05)
    assert plan["target"]["tokens"] == 20_000 * 2**23
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 2 * 2**20  # kilobytes


def test_the_adaptive_plan_brackets_what_ladders_spend() -> None:
    truth = Surface(ESSENTIAL, {"lr": -4.0, "weight_decay": -6.0})
    plan = plan_ladder(replace(ESSENTIAL, budget=4.0))
    assert plan.best < plan.expected < plan.worst == 4.0
    assert plan.best == pytest.approx(least_cost(ESSENTIAL))
    # 5 points of the star and 3 repeats at base width, one round of 4 at the next.
    assert plan.best == pytest.approx(8 * ESSENTIAL.cost(256) + 4 * ESSENTIAL.cost(512))
    assert plan.expected == pytest.approx(
        sum(stage.trials * ESSENTIAL.cost(stage.width) for stage in plan.stages)
    )
    for seed, noise in enumerate((0.0, 0.003, 0.01)):
        ladder = Ladder(replace(ESSENTIAL, budget=4.0))
        while trials := ladder.ask():
            for trial in trials:
                ladder.tell(replace(truth, seed=seed, noise=noise)(trial))
        spent = sum(len(s.trials) * ESSENTIAL.cost(s.width) for s in ladder.stages)
        assert plan.best <= spent <= plan.worst + 1e-9


def test_truths_are_spread_evenly_over_what_the_ladder_expects() -> None:
    """Half of them are noisier than expected; the same ones come each time; one minimum each."""
    truths = draw_truths(ESSENTIAL, 40)
    trial = Trial(256, Point.of(lr=0.1, weight_decay=0.1), 0)
    assert truths[7](trial) == draw_truths(ESSENTIAL, 40)[7](trial)
    noise = [truth.noise for truth in truths]
    assert noise == sorted(noise)
    assert noise[19] < ESSENTIAL.expected_noise < noise[20]
    settle = [truth.law.name for truth in truths]
    assert [settle.count(law.name) for law in LAWS] == [24, 12, 4]
    for truth in truths:
        at = {
            axis.name: 2**place for axis, place in zip(ESSENTIAL.swept, truth.optimum, strict=True)
        }
        quiet = replace(truth, noise=0.0)
        best = quiet(Trial(256, Point.of(at), 0)).loss
        assert best == pytest.approx(1.0)
        for name, by in itertools.product(at, (-4, -1, 1, 4)):
            off = Point.of({**at, name: at[name] * 2**by})
            assert (quiet(Trial(256, off, 0)).loss or 0) > 1.0


def test_the_plan_is_the_middle_of_what_ladders_spend_on_drawn_truths() -> None:
    spec = LadderSpec((Axis("lr", 0.004, 0.5, 7),), (32, 64), target_width=128, tolerance=0.005)
    spent = []
    for truth in draw_truths(spec, 9):
        ladder = Ladder(spec)
        while trials := ladder.ask():
            for trial in trials:
                ladder.tell(truth(trial))
        spent.append(sum(len(s.trials) * spec.cost(s.width) for s in ladder.stages))
    assert 0.5 <= np.median(spent) / plan_ladder(spec).expected <= 2


def test_a_plan_never_exceeds_its_budget() -> None:
    plan = plan_ladder(replace(ESSENTIAL, budget=1.0))
    assert plan.best <= plan.expected <= plan.worst <= 1.0
