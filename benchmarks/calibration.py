"""Does the ladder keep its word? Intervals, PASS, regret, compute and plan over many families.

    OMP_NUM_THREADS=1 python benchmarks/calibration.py      minutes on 2 cores: tables, numbers

Every ladder has a truth that is known (`simulated.py`, `frozen.py`): 90 % intervals are to hold the
optimum in 90 of 100, a PASS is to cost no more than the tolerance in 90 of 100 (0.1 %, of the
quickstart its own 0.5 %). Families: simulated surfaces of several shapes; public tables of real
losses, each as all widths of a ladder; recorded grids of our own, as all widths and as the ladder
that they are; the quickstart as it is, on its dense recorded ladder. But for that one the user's
range is moved by up to half an octave, and the lattice has 3, 5 or 7 points. What was chosen in the
ladder by looking at these was chosen on the even cases; the odd ones are reported beside them.

Beside that, `recorded`: each seed of a recorded grid is fitted alone, and so are the other seeds of
the same width together. The two optima differ by both errors, so the interval of the difference,
1.645 times the root of the summed variances, is to hold 0.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from frozen import Frozen, grid_table, ladder_over, public_tables, table_of
from recorded import load_rows
from recorded_ladder import QUICKSTART_FOLDER
from simulated import ESSENTIAL, Surface
from width_rules import FOLDER, load_spec

from telescope.files import write_atomic
from telescope.ladder.fit.data import Data
from telescope.ladder.fit.model import Frame
from telescope.ladder.fit.surface import Surface as Fit
from telescope.ladder.ladder import Ladder
from telescope.ladder.plan import plan_ladder
from telescope.ladder.window import octaves
from telescope.records import Axis, LadderSpec
from telescope.spec.spec import Spec
from telescope.sweep.counting import count_costs

WITHIN = 1.645
"""Standard deviations that hold 90 % of a normal distribution."""
OUT = FOLDER.parent / "calibration"
LATTICES = ((7, 3), (5, 5), (7, 7), (5, 3), (7, 5))
"""Points per axis, in turn."""
JITTER = 0.5
"""Octaves by which the user's range is moved at most."""
MUON = LadderSpec(
    (Axis("lr", 0.004, 0.5, 7), Axis("weight_decay", 0.01, 1.0, 5)), (32, 64, 128), target_width=256
)
"""The quickstart's geometry."""


def random_truth(seed: int) -> Surface:
    """A surface of random place, noise, curvature, skew, tilt, drift and cliff."""
    place, shape = np.random.default_rng(seed), np.random.default_rng(5000 + seed)
    optimum = {}
    for axis in ESSENTIAL.swept:
        middle = math.log2(axis.low * axis.high) / 2
        optimum[axis.name] = middle + place.uniform(-1.5, 1.5) * octaves(axis)[0]
    return Surface(
        ESSENTIAL,
        optimum,
        seed=seed,
        noise=10 ** shape.uniform(-3.3, -2),
        drift=shape.normal(0, 0.2),
        exponent=shape.choice([1.0, 0.5]),
        skew=shape.uniform(-0.5, 0.5),
        tilt=shape.uniform(-0.5, 0.5),
        curvature={
            "lr": 0.0039 * 2 ** shape.uniform(-0.5, 2),
            "weight_decay": 0.001 * 2 ** shape.uniform(-1, 2),
        },
        cliff=shape.uniform(2.5, 5),
    )


def simulated(seeds: int) -> Iterator[tuple[str, bool]]:
    """(axis, whether the interval holds the optimum) of every choice that has one."""
    for seed in range(seeds):
        truth, ladder = random_truth(seed), Ladder(ESSENTIAL)
        while trials := ladder.ask():
            for trial in trials:
                ladder.tell(truth(trial))
        for choice in ladder.choices:
            best = truth.best(choice.width)
            for axis, interval in choice.intervals.items():
                if interval:
                    yield axis, interval[0] <= 2 ** best[axis] <= interval[1]


def fitted(rows: pd.DataFrame, width: int) -> Fit:
    """The surface through the recorded trials of one width."""
    axes = load_spec("muon", "mup").ladder_spec.swept
    complete = rows[rows.loss.notna()]
    frame = Frame(
        widths=(width,),
        step=np.array([octaves(axis)[0] for axis in axes]),
        span=np.array([octaves(axis)[1] for axis in axes]),
        expected_noise=ESSENTIAL.expected_noise * float(complete.loss.median()),
    )
    data = Data(
        places=np.log2(complete[[axis.name for axis in axes]].to_numpy(dtype=float)),
        widths=np.full(len(complete), width),
        seeds=complete.seed.to_numpy(dtype=np.int64),
        losses=complete.loss.to_numpy(dtype=float),
        walls=np.zeros((0, len(axes))),
    )
    return Fit(frame, data)


def recorded(
    rules: tuple[str, ...] = ("mup", "paper", "moonlight", "standard"),
) -> Iterator[tuple[str, bool]]:
    """(axis, whether the interval of the difference holds 0) of each seed against the others."""
    for rule in rules:
        rows = load_rows(rule)
        for width in (32, 64, 128) if rule == "mup" else (64, 128):
            here = rows[rows.width == width]
            for seed in sorted(here.seed.unique()):
                one = fitted(here[here.seed == seed], width).optimum(width).draws
                others = fitted(here[here.seed != seed], width).optimum(width).draws
                spread = WITHIN * np.hypot(one.std(0), others.std(0))
                for axis, (apart, within) in enumerate(
                    zip(one.mean(0) - others.mean(0), spread, strict=True)
                ):
                    yield ("lr", "weight_decay")[axis], bool(abs(apart) <= within)


def shares(checks: Iterator[tuple[str, bool]]) -> Mapping[str, Any]:
    """Axis → (share that hold, how many)."""
    table = pd.DataFrame(checks, columns=["axis", "holds"])
    by_axis = {str(axis): (rows.holds.mean(), len(rows)) for axis, rows in table.groupby("axis")}
    return {**by_axis, "all": (table.holds.mean(), len(table))}


def jittered(
    spec: LadderSpec, points: tuple[int, ...], generator: np.random.Generator
) -> LadderSpec:
    """The same ladder with its range moved at random, and another lattice."""
    axes = []
    for axis, count in zip(spec.axes, points, strict=True):
        by = 2 ** generator.uniform(-JITTER, JITTER)
        axes.append(replace(axis, low=axis.low * by, high=axis.high * by, points=count))
    return replace(spec, axes=tuple(axes))


def muon_truth(seed: int, *, drift: bool = True) -> Surface:
    """Plateau-and-wall decay tied to lr, a one-sided lr, and a bowl that deepens with the width."""
    generator = np.random.default_rng(9000 + seed)
    spec = jittered(MUON, LATTICES[seed % len(LATTICES)], generator)
    uniform = generator.uniform
    optimum = {"lr": -4.5 + uniform(-1, 1), "weight_decay": -2.7 + uniform(-1, 1)}
    return Surface(
        spec,
        optimum,
        {"lr": 0.0048 * 2 ** uniform(-0.7, 1), "weight_decay": 0.004 * 2 ** uniform(-1, 1)},
        skew=-uniform(0.3, 1.5),
        tilt=uniform(0, 1),
        drift=generator.normal(0, 0.15) if drift else 0.0,
        exponent=generator.choice([1.0, 0.5]),
        plateau={"weight_decay": 0.004 * 2 ** uniform(0, 2.4)},
        wall=uniform(0.9, 1.5),
        deepening=4 ** uniform(0, 1),
        noise=(0.001, 0.003)[seed // 2 % 2],
        cliff=4.0,
        seed=seed,
    )


def skewed_truth(seed: int) -> Surface:
    """As `random_truth`, with skews to ±1.2."""
    generator = np.random.default_rng(7000 + seed)
    truth = random_truth(seed)
    return replace(truth, skew=generator.uniform(-1.2, 1.2), noise=(0.001, 0.003)[seed // 2 % 2])


def deepening_truth(seed: int) -> Surface:
    """As `random_truth`, with a curvature that grows to up to four times, and a straight valley."""
    generator = np.random.default_rng(8000 + seed)
    spec = jittered(ESSENTIAL, LATTICES[seed % len(LATTICES)], generator)
    wide = 2.0
    axes = tuple(  # the published range is for 8 points: 12 octaves
        replace(a, low=a.low * 2**wide, high=a.high / 2**wide) for a in spec.axes
    )
    optimum = {
        a.name: math.log2(a.low * a.high) / 2 + generator.uniform(-1.2, 1.2) for a in spec.axes
    }
    return replace(
        random_truth(seed),
        spec=replace(spec, axes=axes),
        optimum=optimum,
        deepening=4 ** generator.uniform(0, 1),
        tilt=generator.uniform(0.5, 1),
        noise=(0.001, 0.003)[seed // 2 % 2],
    )


def public_truth(name: str, seed: int) -> Frozen:
    """A public table as all widths of a ladder."""
    cells = len(public_tables(name))
    number, turn = seed % cells, seed // cells
    generator = np.random.default_rng(6000 + seed)
    table = table_of(name, number)
    points = LATTICES[(seed + turn) % 3]
    jitter = generator.uniform(-JITTER, JITTER, 2)
    spec = ladder_over(table, ("lr", "batch_size"), points, jitter)
    return Frozen(spec, {256: table}, (0.001, 0.003)[turn % 2], seed)


def frozen_truth(rows: pd.DataFrame, seed: int) -> Frozen:
    """One width of a recorded grid of ours as all widths of a ladder."""
    widths = [
        w for w in sorted(rows.width.unique()) if rows[rows.width == w].weight_decay.nunique() > 1
    ]
    table = grid_table(rows[rows.width == widths[seed % len(widths)]])
    generator = np.random.default_rng(5500 + seed)
    points = LATTICES[seed // len(widths) % 3]
    spec = ladder_over(table, ("lr", "weight_decay"), points, generator.uniform(-JITTER, JITTER, 2))
    return Frozen(spec, {256: table}, (0.001, 0.003)[seed // 2 % 2], seed)


def ladder_truth(rows: pd.DataFrame, seed: int) -> Frozen:
    """A recorded grid of ours as the ladder that it is, with the noise of a well measured loss."""
    widths = sorted(rows.width.unique())
    tables = {int(w): grid_table(rows[rows.width == w]) for w in widths}
    generator = np.random.default_rng(5600 + seed)
    spec = ladder_over(
        tables[widths[0]],
        ("lr", "weight_decay"),
        LATTICES[seed % len(LATTICES)],
        generator.uniform(-JITTER, JITTER, 2),
    )
    spec = replace(spec, widths=tuple(int(w) for w in widths[:-1]), target_width=int(widths[-1]))
    return Frozen(spec, tables, (0.001, 0.003)[seed // 2 % 2], seed)


def quickstart_truth(seed: int) -> Frozen:
    """The quickstart on its dense recorded ladder, with its own range, tolerance and noise."""
    spec = Spec.load("quickstart")
    counted = count_costs(spec)
    whole = counted.of_target(spec)
    costs = {width: cost / whole for width, cost in counted.per_trial(spec).items()}
    rows = pd.read_csv(QUICKSTART_FOLDER / "trials.csv")
    tables = {int(w): grid_table(rows[rows.width == w]) for w in sorted(rows.width.unique())}
    ladder = replace(spec.ladder_spec, costs={**costs, spec.target.width: 1.0})
    return Frozen(ladder, tables, (0.003, 0.006)[seed % 2], seed)


FAMILIES: Mapping[str, Callable[[int], Any]] = {
    "simulated": random_truth,
    "skew to 1.2": skewed_truth,
    "deepening and tilted": deepening_truth,
    "plateau and wall": muon_truth,
    "public lr x batch": lambda seed: public_truth("dense", seed),
    "public MoE": lambda seed: public_truth("moe", seed),
    "our grid frozen": lambda seed: frozen_truth(load_rows("mup"), seed),
    "our grid as a ladder": lambda seed: ladder_truth(load_rows("mup"), seed),
    "the quickstart": quickstart_truth,
}


def climb(spec: LadderSpec, truth: Any) -> Ladder:
    """Run a ladder to its end."""
    ladder = Ladder(spec)
    while trials := ladder.ask():
        for trial in trials:
            ladder.tell(truth(trial))
    return ladder


def solve(family: str, seed: int) -> dict[str, Any]:
    """One adaptive ladder and the paper's on one truth: what they found, said and spent."""
    truth = FAMILIES[family](seed)
    spec, target = truth.spec, truth.spec.target
    ladder, paper = climb(spec, truth), climb(replace(spec, policy="paper"), truth)
    row: dict[str, Any] = {"family": family, "seed": seed, "tolerance": spec.tolerance}
    for name, one in (("", ladder), ("paper_", paper)):
        cost = sum(len(stage.trials) * spec.cost(stage.width) for stage in one.stages)
        row[f"{name}cost"] = cost / spec.cost(target)
    row["paper_regret"] = truth.excess(paper.choices[-1].point, target)
    plan = plan_ladder(spec)
    row["expected"] = plan.expected / spec.cost(target)
    row["in_plan"] = plan.best - 1e-9 <= row["cost"] * spec.cost(target) <= plan.worst + 1e-9
    row["trials"] = sum(len(stage.trials) for stage in ladder.stages)
    certificate = ladder.certificate(rule_checked=True)
    if certificate is None:
        return row
    row["regret"] = truth.excess(certificate.point, target)
    row["predicted"], row["verdict"] = certificate.predicted_excess_loss, certificate.verdict
    row["bound"] = getattr(certificate, "excess_bound", math.nan)
    row["problems"] = " | ".join(certificate.problems)
    said = [(choice.width, choice.intervals) for choice in ladder.choices]
    for where, width, intervals in (
        *(("trained", w, i) for w, i in said),
        ("target", target, certificate.intervals),
    ):
        best = truth.best(width)
        for number, axis in enumerate(spec.swept):
            if interval := intervals[axis.name]:
                low, high = (math.log2(x) for x in interval)
                key = f"{where}_{('lr', 'second')[number]}"
                # To a thousandth of an octave, in which the truth's own mesh lies.
                held = low - 0.03 <= best[axis.name] <= high + 0.03
                row.setdefault(f"{key}_n", 0)
                row.setdefault(key, 0)
                row[f"{key}_n"] += 1
                row[key] += int(held)
                row[f"{where}_length_{number}"] = high - low
    return row


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per family."""
    lines = []
    for family, mine in rows.groupby("family", sort=False):
        passed = mine[mine.verdict == "PASS"]
        ratio = mine.cost / mine.expected

        def share(key: str, mine: pd.DataFrame = mine) -> float:
            return mine[key].sum() / max(1, mine[f"{key}_n"].sum()) if key in mine else math.nan

        lines.append(
            {
                "family": family,
                "ladders": len(mine),
                **{
                    f"{where} {axis}": share(f"{where}_{axis}")
                    for where in ("trained", "target")
                    for axis in ("lr", "second")
                },
                "PASS": len(passed),
                "false": int((passed.regret > passed.tolerance).sum()),
                "regret": mine.regret.median(),
                "regret 90 %": mine.regret.quantile(0.9),
                "compute": (mine.cost / mine.paper_cost).median(),
                "paper": mine.paper_regret.median(),
                "paper 90 %": mine.paper_regret.quantile(0.9),
                "actual / plan": ratio.median(),
                "in plan": mine.in_plan.mean(),
            }
        )
    return pd.DataFrame(lines)


def as_markdown(table: pd.DataFrame) -> str:
    """The table that people read."""
    lines = [
        "| family | ladders | interval holds, trained: lr / second | at the target: lr / second "
        "| PASS | of which above the tolerance | regret, median / 90 % | compute, of the paper's "
        "| paper's regret, median / 90 % | spent over planned | inside best to worst |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in table.to_dict("records"):
        lines.append(
            f"| {row['family']} | {row['ladders']} | {row['trained lr']:.0%} / "
            f"{row['trained second']:.0%} | {row['target lr']:.0%} / {row['target second']:.0%} "
            f"| {row['PASS']} | {row['false']} | {row['regret']:.3%} / {row['regret 90 %']:.3%} "
            f"| {row['compute']:.0%} | {row['paper']:.3%} / {row['paper 90 %']:.3%} "
            f"| {row['actual / plan']:.2f} | {row['in plan']:.0%} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run all families, and write what they say."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=48, help="ladders per family")
    parser.add_argument("--families", help="comma-separated; all where left out")
    parser.add_argument("--half", choices=("all", "even", "odd"), default="all")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", help="a CSV file of every ladder; the reference where left out")
    arguments = parser.parse_args()
    names = arguments.families.split(",") if arguments.families else list(FAMILIES)
    if not public_tables("dense"):
        print("shared/recorded is not here: the public tables are skipped")
        names = [name for name in names if not name.startswith("public")]
    step, first = (1, 0) if arguments.half == "all" else (2, int(arguments.half == "odd"))
    cases = [(name, seed) for name in names for seed in range(first, arguments.seeds, step)]
    with ProcessPoolExecutor(arguments.workers) as pool:
        rows = pd.DataFrame(list(pool.map(solve, *zip(*cases, strict=True), chunksize=4)))
    text = as_markdown(summary(rows))
    print(text)
    if arguments.out:
        rows.to_csv(arguments.out, index=False)
        return
    for axis, (share, count) in shares(recorded()).items():
        print(f"recorded seeds, {axis:13} {share:.1%} of {count}")
    OUT.mkdir(parents=True, exist_ok=True)
    write_atomic(OUT / "ladders.csv", rows.to_csv(index=False, float_format="%.6g"))
    write_atomic(OUT / "calibration.md", text)


if __name__ == "__main__":
    main()
