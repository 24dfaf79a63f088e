"""A sweep's answer against its neighbours: trained at the target's width with fresh seeds.

    python benchmarks/neighbours.py results/reference/quickstart NAME       minutes, resumable

Trains the answer, and it with one hyperparameter changed by a factor, with seeds that no ladder has
seen, the same for all points, so that a difference is paired. Writes NAME.csv (the trials),
NAME.json (the answer and what its certificate predicted) and NAME.md (the table) to
`results/reference/neighbours/`. The answer is kept: a later version of the ladder may read another
one out of the same trials, and NAME stays the check of this one.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from recorded_ladder import train_all
from width_rules import COLUMNS, EVALS, FOLDER, Table

from telescope.answer.finished import Finished, open_result
from telescope.files import write_atomic, write_json
from telescope.ladder.grid import round_value
from telescope.records import Point, Result, Trial
from telescope.sweep.builtin import BuiltIn
from telescope.train.loop import TelescopeTrainer

OUT = FOLDER.parent / "neighbours"
FACTORS: Mapping[str, tuple[float, ...]] = {
    "lr": (0.5, 0.71, 1.41, 2.0),
    "weight_decay": (0.25, 0.5, 2.0, 4.0),
}
FIRST_SEED = 1000
"""Ladders count seeds from 0."""
ANSWER = ("answer", 1.0)


@dataclass(frozen=True)
class Claim:
    """The answer to check, at a width, and what its certificate says of it."""

    fingerprint: str
    width: int
    point: Point
    predicted: Mapping[str, Any]
    """`verdict`, `predicted_excess_loss` and `intervals`, as `show --json` has them."""

    @classmethod
    def of(cls, finished: Finished) -> Claim:
        """The answer of a results folder."""
        certificate, point = finished.certificate, finished.target_point()
        if certificate is None or point is None:
            sys.exit(f"{finished.folder.path}: no certificate: the sweep has chosen nothing yet")
        predicted = {
            "verdict": certificate.verdict,
            "predicted_excess_loss": certificate.predicted_excess_loss,
            "intervals": certificate.intervals,
        }
        width = finished.spec.target.width
        return cls(finished.folder.read_spec()["fingerprint"], width, point, predicted)

    @property
    def neighbours(self) -> dict[tuple[str, float], Point]:
        """(axis, factor) → point, the answer among them."""
        points = {ANSWER: self.point}
        for axis, factors in FACTORS.items():
            for factor in factors:
                changed = round_value(self.point[axis] * factor)
                points[axis, factor] = Point.of({**self.point, axis: changed})
        return points


def claim_of(finished: Finished, path: Path) -> Claim:
    """The claim as it was when the check began, or a new one."""
    if path.exists():
        kept = json.loads(path.read_text())
        claim = Claim(**{**kept, "point": Point.of(kept["point"])})
        if claim.fingerprint != finished.folder.read_spec()["fingerprint"]:
            sys.exit(f"{path}: checks an answer of another spec; choose another name")
        return claim
    claim = Claim.of(finished)
    write_json(path, {**vars(claim), "point": dict(claim.point)})
    return claim


def losses(
    claim: Claim, known: Mapping[Trial, Result]
) -> tuple[list[int], dict[tuple[str, float], NDArray[np.float64]]]:
    """The seeds with all points answered, and the losses of each point; NaN where it diverged."""
    points = claim.neighbours
    seeds = [
        seed
        for seed in sorted({trial.seed for trial in known})
        if all(Trial(claim.width, point, seed) in known for point in points.values())
    ]
    table = {}
    for place, point in points.items():
        found = [known[Trial(claim.width, point, seed)].loss for seed in seeds]
        table[place] = np.array([math.nan if loss is None else loss for loss in found])
    return seeds, table


def mean_and_error(values: NDArray[np.float64]) -> str:
    """Mean ± standard error, per cent."""
    if np.isnan(values).any():
        return f"diverged with {int(np.isnan(values).sum())} of {len(values)} seeds"
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{100 * values.mean():+.2f} ± {100 * error:.2f}"


def left_out_excess(table: Mapping[tuple[str, float], NDArray[np.float64]]) -> NDArray[np.float64]:
    """(seeds,) excess of the answer over the point that is best by all other seeds.

    A point that is best by luck is not best with the seed left out, so that nothing is gained by
    having had nine to choose from.
    """
    rows = np.nan_to_num(np.array([*table.values()]), nan=math.inf)
    answer = list(table).index(ANSWER)
    excess = []
    for seed in range(rows.shape[1]):
        best = np.delete(rows, seed, axis=1).mean(axis=1).argmin()
        excess.append(rows[answer, seed] / rows[best, seed] - 1)
    return np.array(excess)


def fitted_excess(table: Mapping[tuple[str, float], NDArray[np.float64]]) -> tuple[float, float]:
    """The answer's excess by a parabola per axis through all within a factor of two, and its error.

    The lowest point within that factor counts; the standard error is the jackknife's over seeds.
    """

    def excess(losses: Mapping[tuple[str, float], NDArray[np.float64]]) -> float:
        total = 0.0
        for axis, factors in FACTORS.items():
            near = {0.0: 0.0}
            for factor in factors:
                change = (losses[axis, factor] / losses[ANSWER] - 1).mean()
                if 0.5 <= factor <= 2 and np.isfinite(change):
                    near[math.log2(factor)] = change
            curve = np.poly1d(np.polyfit([*near], [*near.values()], 2))
            total += curve(0.0) - curve(np.linspace(-1, 1, 201)).min()
        return float(total)

    count = len(table[ANSWER])
    without = [excess({k: np.delete(v, i) for k, v in table.items()}) for i in range(count)]
    error = math.sqrt((count - 1) * np.var(without))
    return excess(table), error


def report(claim: Claim, known: Mapping[Trial, Result]) -> Iterator[str]:
    """The table in Markdown, and what it says of the prediction."""
    seeds, table = losses(claim, known)
    yield f"Width {claim.width}, {len(seeds)} fresh seeds, differences paired by seed."
    yield ""
    yield "| point | lr | weight decay | loss against the answer, % |"
    yield "|---|---|---|---|"
    for (axis, factor), point in claim.neighbours.items():
        values = table[axis, factor]
        shown = mean_and_error(values / table[ANSWER] - 1)
        if (axis, factor) == ANSWER:
            shown = f"0, loss {values.mean():.4f}, seeds differ by {values.std(ddof=1):.4f}"
        name = "answer" if (axis, factor) == ANSWER else f"{axis} × {factor:g}"
        yield f"| {name} | {point.lr:.4g} | {point.weight_decay:.4g} | {shown} |"
    yield ""
    fit, error = fitted_excess(table)
    expected = claim.predicted["predicted_excess_loss"]
    yield f"- predicted excess: {100 * expected:.2f} %, verdict {claim.predicted['verdict']}"
    left_out = mean_and_error(left_out_excess(table))
    yield f"- against the point that is best by the other seeds: {left_out} %"
    yield (
        "- by a parabola per axis, to its lowest point within a factor of two: "
        f"{100 * fit:.2f} ± {100 * error:.2f} %"
    )
    for axis, interval in claim.predicted["intervals"].items():
        shown = "unidentified" if interval is None else f"{interval[0]:.3g} to {interval[1]:.3g}"
        yield f"- {axis}: {claim.point[axis]:.3g}, interval {shown}"


def main() -> None:
    """Train what the table misses, and write it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", type=Path, help="a results folder")
    parser.add_argument("name", help="of the files to write")
    parser.add_argument("--seeds", type=int, default=4, help="two or more")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    finished = open_result(args.results, args.results.parent)
    claim = claim_of(finished, OUT / f"{args.name}.json")
    config = BuiltIn.of(finished.spec).trial_config
    arm = finished.spec.optimizer.name, finished.spec.optimizer.rule
    table = Table(OUT / f"{args.name}.csv", finished.spec.base_width, COLUMNS[:-EVALS])
    known = dict(table.results(*arm, hidden_alone=False))
    asked = [
        Trial(claim.width, point, FIRST_SEED + seed)
        for seed in range(args.seeds)
        for point in claim.neighbours.values()
    ]
    missing = [trial for trial in asked if trial not in known]
    for result in train_all(TelescopeTrainer(config), missing, args.workers):
        known[result.trial] = result
        table.add(*arm, result)
        print(f"{result.trial}: {result.loss or result.reason}", flush=True)
    text = "\n".join([*report(claim, known), ""])
    write_atomic(OUT / f"{args.name}.md", text)
    print(text)


if __name__ == "__main__":
    main()
