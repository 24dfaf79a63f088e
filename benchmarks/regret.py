"""Regret at the target against compute: the adaptive ladder and what else one could do.

    python benchmarks/regret.py             minutes on 2 cores: tables, figures, numbers

On simulated ladders of the published geometry (256 → 2048, target 2560, costs by FLOPs), whose
truth is known, and on recorded ladders of real training (32 → 128, target 256). Compute is in
target runs; regret is the loss at the target above the best setting's, as a share of the loss.

Ladders: `adaptive` at three tolerances and as the budget cuts it short, `paper`, and one hop (a
dense grid at base width, its argmin handed over). At the target itself: random search, Optuna's TPE
and GP samplers, and, on recorded ladders alone, where losses along each trial are recorded,
successive halving.
"""

from __future__ import annotations

import argparse
import functools
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import optuna
import pandas as pd
from matplotlib.figure import Figure
from recorded import CURVE, Recorded, ladder_spec, load_rows
from simulated import ESSENTIAL, Surface
from width_rules import FOLDER

from telescope.files import write_atomic
from telescope.ladder.grid import grid_trials, values_at
from telescope.ladder.ladder import Ladder
from telescope.ladder.plan import plan_ladder
from telescope.records import Axis, LadderSpec, Point, Trial

OUT = FOLDER.parent / "regret"
SEEDS = 16
"""Simulated truths per family; draws of recorded seeds and residuals."""
GP_SEEDS = 4
"""The GP sampler takes a quarter of a second per trial."""
MOST_AT_TARGET = 24
"""Trials of a search at the target: as many target runs."""
BUDGETS = (0.1, 0.15, 0.2, 0.3, 0.5)
"""Shares of what the paper's ladder costs."""
TOLERANCES = (0.001, 0.002, 0.003)
FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "no drift": {},
    "drift 1/n": {"drift": 0.2},
    "drift n^-1/2": {"drift": 0.3, "exponent": 0.5},
    "noise 0.05 %": {"drift": 0.2, "noise": 0.0005},
    "noise 1 %": {"drift": 0.2, "noise": 0.01},
    "sharp": {"drift": 0.2, "curvature": {"lr": 0.02, "weight_decay": 0.005}},
    "skewed, cliff near": {"drift": 0.2, "skew": 0.7, "tilt": 0.6, "cliff": 2.0},
    "flat weight decay": {"drift": 0.2, "curvature": {"lr": 0.0039, "weight_decay": 0.0}},
    "wrong rule": {"drift": 0.5, "exponent": 0.0},
}


@dataclass(frozen=True)
class Problem:
    """A truth to be searched, and the ladder's spec."""

    name: str
    seed: int
    spec: LadderSpec
    truth: Any
    """Answers trials; has `excess(point, width)`."""


def simulated(family: str, seed: int) -> Problem:
    """A surface whose optimum lies at random within a step and a half of the lattice's middle."""
    generator = np.random.default_rng(seed)
    optimum = {}
    for axis in ESSENTIAL.swept:
        step = math.log2(axis.high / axis.low) / (axis.points - 1)
        middle = math.log2(axis.low * axis.high) / 2
        optimum[axis.name] = middle + generator.uniform(-1.5, 1.5) * step
    truth = Surface(ESSENTIAL, optimum, seed=seed, **FAMILIES[family])
    return Problem(family, seed, ESSENTIAL, truth)


def recorded(draw: int) -> Problem:
    """The recorded ladder under the right rule."""
    spec = ladder_spec("mup", widths=(32, 64, 128), target=256)
    return Problem("recorded", draw, spec, Recorded(load_rows("mup"), draw))


Row = tuple[str, str, float, float, str]
"""Contestant, setting, compute in target runs, regret, verdict."""


def climb(problem: Problem, spec: LadderSpec) -> Ladder:
    """Run a ladder to its end."""
    ladder = Ladder(spec)
    while trials := ladder.ask():
        for trial in trials:
            ladder.tell(problem.truth(trial))
    return ladder


def spent(ladder: Ladder) -> float:
    """Cost of all trials asked for, target runs."""
    return sum(len(stage.trials) * ladder.spec.cost(stage.width) for stage in ladder.stages)


def adaptive(problem: Problem) -> Iterator[Row]:
    """The adaptive ladder at several tolerances, and cut short by several budgets."""
    target, whole = problem.spec.target, plan_ladder(replace(problem.spec, policy="paper")).best
    settings: list[tuple[str, dict[str, Any]]] = [
        (f"tolerance {t:g}", {"tolerance": t}) for t in TOLERANCES
    ]
    settings += [(f"budget {b:.0%}", {"budget": b * whole, "tolerance": 0.0001}) for b in BUDGETS]
    for name, changes in settings:
        ladder = climb(problem, replace(problem.spec, **changes))
        if certificate := ladder.certificate(rule_checked=problem.name != "wrong rule"):
            regret = problem.truth.excess(certificate.point, target)
            yield "adaptive", name, spent(ladder), regret, certificate.verdict


def paper(problem: Problem) -> Iterator[Row]:
    """Algorithm 1, its choice after each stage handed over."""
    ladder, target = climb(problem, replace(problem.spec, policy="paper")), problem.spec.target
    cost = 0.0
    for stage, choice in zip(ladder.stages, ladder.choices, strict=True):
        cost += len(stage.trials) * ladder.spec.cost(stage.width)
        is_last = choice is ladder.choices[-1]
        name = "whole" if is_last else f"to width {choice.width}"
        yield "paper", name, cost, problem.truth.excess(choice.point, target), ""


def one_hop(problem: Problem) -> Iterator[Row]:
    """A dense grid at base width; its argmin handed over."""
    spec, base = problem.spec, problem.spec.widths[0]
    for points in (3, 4, 5, 6, 8):
        grid = {
            axis.name: values_at(
                replace(axis, points=points), width=base, base_width=base, swept=2, centre=1.0
            )
            for axis in spec.axes
        }
        trials = grid_trials(base, grid, (0,))
        best = min((r for t in trials if (r := problem.truth(t)).loss), key=lambda r: r.loss)
        regret = problem.truth.excess(best.trial.point, spec.target)
        yield "one hop", f"{points} × {points}", len(trials) * spec.cost(base), regret, ""


def sampler_of(name: str, seed: int) -> optuna.samplers.BaseSampler:
    """An Optuna sampler by the name that the tables use."""
    if name == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    if name == "TPE":
        return optuna.samplers.TPESampler(seed=seed)
    return optuna.samplers.GPSampler(seed=seed)


def at_target(problem: Problem, name: str) -> Iterator[Row]:
    """A search at the target: a trial is a whole target run, the best loss seen is the answer."""
    study = optuna.create_study(sampler=sampler_of(name, problem.seed))
    for number in range(1, MOST_AT_TARGET + 1):
        asked = study.ask()
        point = suggest(asked, problem.spec.axes)
        result = problem.truth(Trial(problem.spec.target, point, 0))
        if result.loss is None:
            study.tell(asked, state=optuna.trial.TrialState.PRUNED)
        else:
            study.tell(asked, result.loss)
        complete = [t for t in study.trials if t.state == optuna.trial.TrialState.COMPLETE]
        if complete:
            regret = problem.truth.excess(study.best_params, problem.spec.target)
            yield name, f"{number}", float(number), regret, ""


def suggest(asked: optuna.Trial, axes: tuple[Axis, ...]) -> Point:
    """A point anywhere in the axes' ranges, log-uniform."""
    return Point.of({a.name: asked.suggest_float(a.name, a.low, a.high, log=True) for a in axes})


def halving(problem: Problem) -> Iterator[Row]:
    """Successive halving (eta 2) on the recorded curves: cells of the target's grid alone.

    At rung i all that are left have trained (i + 1)-th of the recorded evaluations; the better half
    goes on. Losses along the way are the recorded ones, of trials with the whole schedule.
    """
    target = problem.spec.target
    rows = problem.truth.rows
    curves = rows[(rows.width == target)].sample(frac=1.0, random_state=problem.seed)
    for start in (4, 8, 16):
        left, cost = curves.drop_duplicates(["lr", "weight_decay"])[:start], 0.0
        trained = 0
        for rung in (1, 2, 4, 8):
            cost += len(left) * (rung - trained) / len(CURVE)
            trained = rung
            left = left.sort_values(CURVE[rung - 1])
            if rung < 8:
                left = left[: max(1, len(left) // 2)]
        point = Point.of(lr=float(left.lr.iloc[0]), weight_decay=float(left.weight_decay.iloc[0]))
        yield "halving", f"{start} starts", cost, problem.truth.excess(point, target), ""


def solve(name: str, seed: int) -> list[dict[str, Any]]:
    """All contestants on one problem: a family's, or the recorded one."""
    problem = recorded(seed) if name == "recorded" else simulated(name, seed)
    logging.disable(logging.WARNING)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore")
    contestants: list[Callable[[Problem], Iterator[Row]]] = [adaptive, paper, one_hop]
    contestants += [functools.partial(at_target, name=name) for name in ("random", "TPE")]
    if problem.seed < GP_SEEDS:
        contestants.append(functools.partial(at_target, name="GP"))
    if problem.name == "recorded":
        contestants.append(halving)
    keys = ("contestant", "setting", "compute", "regret", "verdict")
    return [
        {"surface": problem.name, "seed": problem.seed, **dict(zip(keys, row, strict=True))}
        for contestant in contestants
        for row in contestant(problem)
    ]


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Median and 90th percentile of regret, and median compute, per surface and setting."""
    grouped = rows.groupby(["surface", "contestant", "setting"], sort=False)
    return grouped.agg(
        compute=("compute", "median"),
        median=("regret", "median"),
        worst=("regret", lambda values: float(np.percentile(values, 90))),
        passed=("verdict", lambda values: float(np.mean(values == "PASS"))),
    ).reset_index()


def needed(table: pd.DataFrame, surface: str, contestant: str, regret: float) -> float:
    """The least compute that brings a contestant's median regret to `regret`; inf if none does."""
    mine = table[(table.surface == surface) & (table.contestant == contestant)]
    enough = mine[mine["median"] <= regret]
    return float(enough.compute.min()) if len(enough) else math.inf


def as_markdown(table: pd.DataFrame) -> str:
    """One row per surface: adaptive, paper, and what searches at the target need to match it."""
    lines = [
        "| surface | adaptive: compute | regret, median / 90 % | PASS | `paper`: compute "
        "| regret, median / 90 % | adaptive to match it | search at the target to match adaptive |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for surface in table.surface.unique():
        here = table[table.surface == surface].set_index(["contestant", "setting"])
        mine, theirs = here.loc[("adaptive", "tolerance 0.001")], here.loc[("paper", "whole")]
        same = needed(table, surface, "adaptive", theirs["median"])
        rivals = {
            name: needed(table, surface, name, mine["median"])
            for name in ("TPE", "GP", "halving")
            if name in here.index.get_level_values(0)
        }
        best = min(rivals, key=lambda name: rivals[name])
        found = (
            f"{best} {rivals[best]:.0f}" if math.isfinite(rivals[best]) else f"> {MOST_AT_TARGET}"
        )
        ratio = (
            f"{same:.2f} ({same / theirs.compute:.0%})" if math.isfinite(same) else "not reached"
        )
        lines.append(
            f"| {surface} | {mine.compute:.2f} | {mine['median']:.3%} / {mine.worst:.3%} "
            f"| {mine.passed:.0%} | {theirs.compute:.2f} | {theirs['median']:.3%} / "
            f"{theirs.worst:.3%} | {ratio} | {found} |"
        )
    return "\n".join(lines) + "\n"


def figure(table: pd.DataFrame) -> Figure:
    """One panel per surface, regret against compute, both logarithmic."""
    surfaces = list(table.surface.unique())
    drawing = Figure(figsize=(13, 3.1 * -(-len(surfaces) // 4) + 0.4), layout="constrained")
    panels = drawing.subplots(-(-len(surfaces) // 4), 4, squeeze=False)
    colours = dict(zip(table.contestant.unique(), (f"C{i}" for i in range(8)), strict=False))
    for panel in panels.flat[len(surfaces) :]:
        panel.set_axis_off()
    for panel, surface in zip(panels.flat, surfaces, strict=False):
        for contestant, colour in colours.items():
            rows = table[(table.surface == surface) & (table.contestant == contestant)]
            line = rows[~rows.setting.str.startswith("tolerance")].sort_values("compute")
            panel.plot(line.compute, line["median"] * 100, color=colour, label=contestant, lw=1.5)
            dots = rows[rows.setting.str.startswith("tolerance")]
            panel.plot(dots.compute, dots["median"] * 100, "o", color=colour, ms=5)
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_title(surface, fontsize=10)
        panel.grid(alpha=0.25, which="both")
    drawing.supxlabel("compute (target runs)")
    drawing.supylabel("median regret at the target (% of loss)")
    handles, labels = panels.flat[len(surfaces) - 1].get_legend_handles_labels()
    drawing.legend(handles, labels, loc="lower right", fontsize=9, ncols=2)
    return drawing


def main() -> None:
    """Solve everything, and write what it says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    names = [name for name in (*FAMILIES, "recorded") for _ in range(arguments.seeds)]
    seeds = [*range(arguments.seeds)] * (len(FAMILIES) + 1)
    with ProcessPoolExecutor(arguments.workers) as pool:
        rows = pd.DataFrame([row for part in pool.map(solve, names, seeds) for row in part])
    OUT.mkdir(parents=True, exist_ok=True)
    table = summary(rows)
    write_atomic(OUT / "regret.csv", table.to_csv(index=False, float_format="%.6g"))
    text = as_markdown(table)
    write_atomic(OUT / "regret.md", text)
    figure(table).savefig(OUT / "regret.png", dpi=100)
    truth = Recorded(load_rows("mup"))
    print(text)
    errors = ", ".join(f"{w}: {truth.leave_one_out(w):.2%}" for w in (32, 64, 128, 256))
    print(f"recorded: noise {truth.noise:.2%}; leave-one-out error of the spline at width {errors}")


if __name__ == "__main__":
    main()
