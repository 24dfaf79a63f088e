"""Does a learning rate found at width 32 hold at 256? A dense grid at four widths, per width rule.

    python benchmarks/width_rules.py            about an hour and a half on 2 cores, resumable
    python benchmarks/width_rules_report.py     seconds: the tables, the figures, the numbers

Trains 7 learning rates × 3 weight decays × 2 seeds at widths 32, 64 and 128, and 5 × 1 × 2 at 256,
under every rule, and appends each result to `results/reference/width-rules/trials.csv`. All rules
of an optimizer are the same at base width (`tests/test_parametrization.py`), so width 32 is trained
once per optimizer and stands there with rule "any".

There, one learning rate drives Muon and AdamW together. `hidden-lr.csv` is the same for Muon's
alone: AdamW's stays at 0.1, the weight decay at 0.1.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from telescope.dispatch.ray.tune import Size, opened, run_ray
from telescope.files import write_json
from telescope.ladder.grid import grid_trials, values_at
from telescope.records import Point, Result, Status, Trial, TrialSource, as_json
from telescope.spec.spec import Spec
from telescope.sweep.builtin import BuiltIn
from telescope.train.loop import TelescopeTrainer

HERE = Path(__file__).parent
FOLDER = HERE.parent / "results" / "reference" / "width-rules"
ARMS = (
    ("muon", "mup"),
    ("muon", "paper"),
    ("muon", "moonlight"),
    ("muon", "standard"),
    ("adamw", "mup"),
    ("adamw", "standard"),
)
ADAMW_RANGE = (0.0008, 0.1)
"""AdamW's optimum at base width is near 0.01, Muon's near 0.1; the grid's spacing is the same."""
HIDDEN_ARMS = ARMS[:3]
WEIGHT_DECAY = 0.1
"""The middle of the grid: the only one at the widest width, and where Muon's lr is swept alone."""
ADAMW_LR = 0.1
"""Learning rates for the sweep of Muon's alone: near the best that the joint grids found."""
LRS_AT_THE_WIDEST = 5
EVALS = 8
COLUMNS = (
    "optimizer",
    "rule",
    "width",
    "seed",
    "lr",
    "weight_decay",
    "status",
    "loss",
    "reason",
    "seconds",
    *(f"held_out_{i + 1}" for i in range(EVALS)),
)


def load_spec(optimizer: str, rule: str, *more: str) -> Spec:
    """The evidence's spec under one rule, with further overrides."""
    overrides = [
        *more,
        f"optimizer.name={optimizer}",
        f"optimizer.rule={rule}",
        f"train.evals={EVALS}",
    ]
    if optimizer == "adamw":
        overrides += [f"axes.lr.low={ADAMW_RANGE[0]}", f"axes.lr.high={ADAMW_RANGE[1]}"]
    return Spec.load(HERE / "width_rules.toml", overrides)


class Grid(TrialSource):
    """The trials of one rule as a dispatcher's source; every result is a row of the table.

    The widest width is asked for when the others are answered: its learning rates surround the
    best one of the width before and the one that base width would have handed over.
    """

    def __init__(self, spec: Spec, table: Table, *, hidden_alone: bool) -> None:
        """Take what the table already has under the spec's rule."""
        self.spec = spec
        self.hidden_alone = hidden_alone
        self.table = table
        self.optimizer, self.rule = spec.optimizer.name, spec.optimizer.rule
        self.known = dict(table.results(self.optimizer, self.rule, hidden_alone=hidden_alone))

    def ask(self) -> Sequence[Trial]:
        """All trials without a result, narrow widths first."""
        *narrow, widest = self.spec.ladder.widths
        trials = [trial for width in narrow for trial in self.trials_at(width, self.grid())]
        missing = [trial for trial in trials if trial not in self.known]
        if missing:
            return missing
        last = self.trials_at(widest, self.widest_grid())
        return [trial for trial in last if trial not in self.known]

    def tell(self, *results: Result) -> None:
        """Write the rows."""
        for result in results:
            self.known[result.trial] = result
            self.table.add(self.optimizer, self.rule, result)
            print(f"{self.optimizer} {self.rule} {result.trial}: {result.loss or result.reason}")

    def trials_at(self, width: int, grid: Mapping[str, Sequence[float]]) -> Sequence[Trial]:
        """The trials of one width."""
        trials = grid_trials(width, grid, self.spec.ladder.seeds)
        if not self.hidden_alone:
            return trials
        return [replace(trial, point=with_adamw_at(trial.point, ADAMW_LR)) for trial in trials]

    def grid(self) -> dict[str, tuple[float, ...]]:
        """Axis → values, the same at every width but the widest."""
        base = self.spec.base_width
        grid = {
            axis.name: values_at(axis, width=base, base_width=base, swept=2, centre=axis.low)
            for axis in self.spec.ladder_spec.axes
        }
        return {**grid, "weight_decay": (WEIGHT_DECAY,)} if self.hidden_alone else grid

    def widest_grid(self) -> dict[str, tuple[float, ...]]:
        """Five learning rates at one weight decay, the middle of the grid."""
        lrs, widths = self.grid()["lr"], self.spec.ladder.widths
        places = [lrs.index(self.best_lr(width)) for width in (widths[0], widths[-2])]
        start = round(fmean(places) - (LRS_AT_THE_WIDEST - 1) / 2)
        start = max(0, min(start, len(lrs) - LRS_AT_THE_WIDEST))
        return {
            "lr": lrs[start : start + LRS_AT_THE_WIDEST],
            "weight_decay": (WEIGHT_DECAY,),
        }

    def best_lr(self, width: int) -> float:
        """The learning rate with the lowest seed mean at a width and the middle weight decay."""
        losses: dict[float, list[float]] = {}
        for trial in self.trials_at(width, {**self.grid(), "weight_decay": (WEIGHT_DECAY,)}):
            losses.setdefault(trial.lr, []).append(self.known[trial].loss or float("inf"))
        return min(losses, key=lambda lr: fmean(losses[lr]))


def with_adamw_at(point: Point, lr: float) -> Point:
    """The same point with AdamW's learning rate at `lr`, whatever Muon's is."""
    return Point.of({**point, "adamw_lr_ratio": lr / point.lr})


class Table:
    """The rows so far, appended to as results come."""

    def __init__(self, path: Path, base_width: int, columns: Sequence[str] = COLUMNS) -> None:
        """Read what is there; a new file gets `columns`, any of `COLUMNS`."""
        self.path = path
        self.base_width = base_width
        self.columns = columns
        self.rows: list[dict[str, str]] = []
        if path.exists():
            with path.open(newline="") as file:
                self.rows = list(csv.DictReader(file))

    def results(
        self, optimizer: str, rule: str, *, hidden_alone: bool
    ) -> Iterator[tuple[Trial, Result]]:
        """Return the results under one rule, base width included."""
        for row in self.rows:
            if row["optimizer"] == optimizer and row["rule"] in (rule, "any"):
                point = Point.of(lr=float(row["lr"]), weight_decay=float(row["weight_decay"]))
                if hidden_alone:
                    point = with_adamw_at(point, ADAMW_LR)
                trial = Trial(int(row["width"]), point, int(row["seed"]))
                loss = float(row["loss"]) if row["loss"] else None
                yield trial, Result(trial, Status(row["status"]), loss=loss, reason=row["reason"])

    def add(self, optimizer: str, rule: str, result: Result) -> None:
        """Append a result; a failed one stops the run, because a grid with holes proves nothing."""
        if result.status is Status.FAILED:
            sys.exit(f"{result.trial}: {result.reason}")
        trial = result.trial
        held_out = [p.held_out_loss for p in result.curve if p.held_out_loss is not None]
        row: dict[str, Any] = {
            "optimizer": optimizer,
            "rule": "any" if trial.width == self.base_width else rule,
            "width": trial.width,
            "seed": trial.seed,
            "lr": trial.lr,
            "weight_decay": trial.weight_decay,
            "status": str(result.status),
            "loss": "" if result.loss is None else f"{result.loss:.6f}",
            "reason": result.reason,
            "seconds": f"{result.seconds:.2f}",
        } | {f"held_out_{i + 1}": f"{loss:.6f}" for i, loss in enumerate(held_out)}
        is_new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(
                file, self.columns, restval="", extrasaction="ignore", lineterminator="\n"
            )
            if is_new:
                writer.writeheader()
            writer.writerow(row)


def run(file: str, arms: Sequence[tuple[str, str]], workers: int, *, hidden_alone: bool) -> None:
    """Train what a table misses."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for optimizer, rule in arms:
        spec = load_spec(optimizer, rule)
        prepared = BuiltIn.of(spec)
        fields = spec.strict_fields(prepared.trial_config.corpus_digest)
        check_comparable(f"{optimizer} {rule}", fields)
        grid = Grid(spec, Table(FOLDER / file, spec.base_width), hidden_alone=hidden_alone)
        with opened(Size(workers)) as session:
            run_ray(grid, TelescopeTrainer(prepared.trial_config), session)


def check_comparable(arm: str, fields: Mapping[str, Any], folder: Path = FOLDER) -> None:
    """Keep what makes losses comparable beside the table, and refuse to mix."""
    path = folder / "comparable.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    fields = as_json(fields)
    if known.setdefault(arm, fields) != fields:
        changed = [key for key in fields if known[arm].get(key) != fields[key]]
        sys.exit(f"{path}: {arm} was trained with other {', '.join(changed)}; move the folder away")
    write_json(path, known)


def main() -> None:
    """Parse and go."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    workers = parser.parse_args().workers
    run("trials.csv", ARMS, workers, hidden_alone=False)
    run("hidden-lr.csv", HIDDEN_ARMS, workers, hidden_alone=True)


if __name__ == "__main__":
    main()
