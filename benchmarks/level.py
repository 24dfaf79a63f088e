"""Does the predicted loss hold? The widest width is left out, predicted, and compared.

    OMP_NUM_THREADS=1 python benchmarks/level.py      about two minutes

A ladder climbs the narrower widths and predicts the loss of a run at the next one, with a 90 %
interval. Each seed that was recorded there is such a run. Families:

- `recorded`: our own grids (`results/reference/{width-rules,ladder,quickstart-ladder}`), with each
  recorded seed as the ladder's first. A cell answers with its own loss; between cells a spline
  through the cells of the seed does (of a seed with fewer cells, seed 0's plus the mean
  difference). Few training runs stand behind them, so their rows are not independent.
- `public`: the levels alone, of mixture-of-experts models of four sizes at four horizons
  (github.com/step-law/steplaw, read from `shared/recorded`; left out where that is not there).
  They grow in depth too, which no ladder of ours does.
- `simulated`: surfaces whose level is a power law with an offset, a logarithm, or a power law whose
  falls depart from it by a fifth; seeds move all losses of a width together.

Writes `level.csv` (one row per prediction) and `level.md` to `results/reference/target/`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from calibration import climb, random_truth
from frozen import folder_of_tables
from recorded_ladder import LADDER_FOLDER, QUICKSTART_FOLDER
from scipy.interpolate import RBFInterpolator
from simulated import Surface
from width_rules import FOLDER

from telescope.files import write_atomic
from telescope.ladder.level import Levels, extrapolate
from telescope.records import Axis, LadderSpec, Point, PredictedLoss, Result, Status, Trial

OUT = FOLDER.parent / "target"
AXES = ("lr", "weight_decay")
LADDERS = {(32, 64): 128, (32, 64, 128): 256, (64, 128): 256}
"""Widths of a ladder → the width left out."""
CONTENDER = 0.03
"""Excess of the cells that tell one seed from another: those near the optimum."""
SIMULATED = 40
"""Ladders of each simulated family."""


@dataclass(frozen=True)
class Seeds:
    """A recorded grid whose seeds differ as they did."""

    rows: pd.DataFrame
    spec: LadderSpec
    first: int = 0
    """The recorded seed that answers as seed 0."""

    @cached_property
    def cells(self) -> dict[tuple[int, int], dict[tuple[float, float], float]]:
        """(width, seed) → (lr, weight decay) → loss."""
        found: dict[tuple[int, int], dict[tuple[float, float], float]] = {}
        complete = self.rows[self.rows.status == "complete"]
        columns = ["width", "seed", *AXES, "loss"]
        for width, seed, lr, decay, loss in complete[columns].to_numpy(dtype=float).tolist():
            found.setdefault((int(width), int(seed)), {})[lr, decay] = loss
        return found

    @cached_property
    def splines(self) -> dict[tuple[int, int], RBFInterpolator]:
        """(width, seed) → the surface through its cells, of seeds that have the cells of seed 0."""
        return {
            (width, seed): RBFInterpolator(
                np.log2(list(cells)), list(cells.values()), kernel="thin_plate_spline"
            )
            for (width, seed), cells in self.cells.items()
            if len({decay for _, decay in cells}) > 1 and len(cells) == len(self.cells[width, 0])
        }

    def seeds(self, width: int) -> list[int]:
        """The recorded seeds of a width, from the ladder's first on."""
        return sorted((s for w, s in self.cells if w == width), key=lambda s: (s < self.first, s))

    def shift(self, width: int, seed: int) -> float:
        """Mean difference of a seed from seed 0 at the cells near the optimum, a share of loss."""
        mine, base = self.cells[width, seed], self.cells[width, 0]
        near = [c for c in mine if c in base and base[c] <= min(base.values()) * (1 + CONTENDER)]
        return float(np.mean([mine[cell] / base[cell] - 1 for cell in near]))

    def loss(self, width: int, point: Point, seed: int) -> float:
        """Loss of one recorded seed at a point."""
        cell = (point.lr, point.weight_decay)
        if cell in self.cells[width, seed]:
            return self.cells[width, seed][cell]
        if (width, seed) in self.splines:
            return float(self.splines[width, seed](np.log2([cell]))[0])
        smooth = float(self.splines[width, 0](np.log2([cell]))[0])
        return smooth * (1 + self.shift(width, seed))

    def __call__(self, trial: Trial) -> Result:
        """Answer a trial."""
        seeds = self.seeds(trial.width)
        loss = self.loss(trial.width, trial.point, seeds[trial.seed % len(seeds)])
        return Result(trial, Status.COMPLETE, loss=loss)


@dataclass(frozen=True)
class Shifted:
    """A simulated surface on which a seed moves all losses of a width together."""

    surface: Surface
    shift: float
    """Standard deviation of that, as a share of the loss."""

    def __call__(self, trial: Trial) -> Result:
        """Answer a trial."""
        result = self.surface(trial)
        if result.loss is None:
            return result
        luck = np.random.default_rng([self.surface.seed, trial.width, trial.seed]).normal()
        return replace(result, loss=result.loss * (1 + self.shift * luck))


def tables() -> Iterator[tuple[str, pd.DataFrame, tuple[int, ...]]]:
    """(name, rows, seeds to begin with) of each recorded grid."""
    rows = pd.concat(
        [pd.read_csv(FOLDER / "trials.csv"), pd.read_csv(LADDER_FOLDER / "trials.csv")]
    )
    for optimizer in ("muon", "adamw"):
        for rule in ("mup", "paper", "moonlight", "standard"):
            mine = rows[(rows.optimizer == optimizer) & rows.rule.isin([rule, "any"])]
            mine = mine.drop_duplicates(["width", "seed", *AXES])
            if rule in set(mine.rule):
                seeds = (0, 1, 2, 3) if (optimizer, rule) == ("muon", "mup") else (0, 1)
                yield f"{optimizer} {rule}", mine, seeds
    yield "quickstart", pd.read_csv(QUICKSTART_FOLDER / "trials.csv"), (0, 1)


def recorded() -> Iterator[dict[str, Any]]:
    """The recorded ladders that have the grids they need."""
    for name, rows, firsts in tables():
        grids = [w for w, mine in rows.groupby("width") if mine.weight_decay.nunique() > 1]
        # The quickstart's grid is wider than what a user would sweep, and not whole at 64 and up.
        points = {axis: rows[axis].nunique() for axis in AXES}
        axes = tuple(
            Axis(axis, rows[axis].min(), rows[axis].max(), min(points[axis], 7)) for axis in AXES
        )
        for widths, target in LADDERS.items():
            if not {*widths, target} <= set(grids):
                continue
            for first in firsts:
                truth = Seeds(rows, LadderSpec(axes, widths, target_width=target), first)
                runs = truth.seeds(target)
                yield from predicted(
                    "recorded", f"{name} from seed {first}", truth.spec, truth, truth.loss, runs
                )


def simulated(kind: str, count: int = SIMULATED) -> Iterator[dict[str, Any]]:
    """Simulated ladders, of two to four widths, whose level falls in one way."""
    for seed in range(count):
        generator = np.random.default_rng(4000 + seed)
        exponent, fall = generator.uniform(0.15, 0.9), generator.uniform(0.02, 0.07)
        departs = generator.normal(1, 0.2 if kind == "departing" else 0.0, 12)
        falls = fall * (np.ones(12) if kind == "logarithm" else 2 ** (-exponent * np.arange(12)))
        levels = np.concatenate([[0], np.cumsum(falls * departs)])

        def level(width: int, levels: Any = levels) -> float:
            return float(3 - 3 * np.interp(math.log2(width / 256), np.arange(13), levels))

        truth = random_truth(seed)
        widths = (256, 512, 1024, 2048)[: 2 + seed % 3]
        spec = replace(truth.spec, widths=widths, target_width=2 * widths[-1], costs={})
        noise = (0.001, 0.003)[seed // 2 % 2]
        surface = replace(truth, spec=spec, level=level, noise=noise)
        run = Shifted(surface, math.sqrt(2) * noise)

        def loss(width: int, point: Point, seed: int, run: Shifted = run) -> float:
            return run(Trial(width, point, 100 + seed)).loss or math.nan

        yield from predicted(f"simulated {kind}", str(seed), spec, run, loss, [0])


def predicted(
    family: str,
    name: str,
    spec: LadderSpec,
    truth: Callable[[Trial], Result],
    loss: Callable[[int, Point, int], float],
    seeds: Iterable[int],
) -> Iterator[dict[str, Any]]:
    """Climb one ladder; yield its prediction beside each run at the width left out.

    Args:
        family: of the ladder.
        name: of the ladder.
        spec: of the ladder; its target is the width left out.
        truth: answers the ladder's trials.
        loss: (width, point, seed) → the loss of such a run.
        seeds: of the runs.
    """
    certificate = climb(spec, truth).certificate()
    prediction = certificate.predicted_loss if certificate else None
    if certificate is None or prediction is None or prediction.loss is None:
        return
    many = len(prediction.widths)  # a ladder may leave widths out
    kind = f"{family}, {many if many < 3 else '3 or more'} widths"
    for seed in seeds:
        got = loss(spec.target, certificate.point, seed)
        line = row(kind, name, spec.target, prediction, got, seed)
        yield {**line, "verdict": certificate.verdict}


def row(
    family: str, name: str, target: int, prediction: PredictedLoss, got: float, seed: int = 0
) -> dict[str, Any]:
    """One line of `level.csv`."""
    assert prediction.loss is not None
    assert prediction.interval
    low, high = prediction.interval
    return {
        "family": family,
        "ladder": name,
        "widths": " ".join(map(str, prediction.widths)),
        "target": target,
        "seed": seed,
        "predicted": round(prediction.loss, 5),
        "low": round(low, 5),
        "high": round(high, 5),
        "got": round(got, 5),
        "inside": low <= got <= high,
    }


def public() -> Iterator[dict[str, Any]]:
    """The largest of four sizes from the three before it, at each horizon; noise of 0.1 %."""
    folder = folder_of_tables()
    if folder is None:
        return
    best = pd.read_csv(folder / "steplaw_moe.csv").groupby(["tokens", "size"]).loss.min()
    for tokens, losses in best.groupby("tokens"):
        sizes, values = losses.index.get_level_values("size"), losses.to_numpy(dtype=float)
        # A width counts as the root of the parameters, in units that keep it an integer.
        widths = tuple(round(1000 * math.sqrt(size / sizes[0])) for size in sizes)
        error = 0.001 * float(values[0])
        known = Levels(widths[:-1], values[:-1], error**2 * np.eye(3), error, 0.0)
        alone = extrapolate(known, widths[-1]).moved(0.0, error**2)
        loss, low, high = (alone.quantile(share) for share in (0.5, 0.05, 0.95))
        prediction = PredictedLoss(loss, (low, high), known.widths)
        name = f"{tokens:.0e} tokens"
        yield row("public, 3 sizes", name, widths[-1], prediction, float(values[-1]))


def summary(rows: pd.DataFrame) -> str:
    """One line per family, as a table in Markdown."""
    lines = [
        "| family | predictions | inside | too low | too high | interval, ± % | error, median % |",
        "|---|---|---|---|---|---|---|",
    ]
    for family, mine in rows.groupby("family", sort=False):
        half = 100 * ((mine.high - mine.low) / 2 / mine.predicted).median()
        error = 100 * (mine.predicted / mine.got - 1).abs().median()
        lines.append(
            f"| {family} | {len(mine)} | {mine.inside.mean():.0%} | {(mine.got > mine.high).sum()} "
            f"| {(mine.got < mine.low).sum()} | {half:.2f} | {error:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Judge every prediction and write the tables."""
    kinds = ("power law", "logarithm", "departing")
    found = [*recorded(), *public(), *(line for kind in kinds for line in simulated(kind))]
    rows = pd.DataFrame(found)
    OUT.mkdir(parents=True, exist_ok=True)
    write_atomic(OUT / "level.csv", rows.to_csv(index=False))
    write_atomic(OUT / "level.md", summary(rows))
    print(summary(rows))


if __name__ == "__main__":
    main()
