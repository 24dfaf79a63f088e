"""Reads the quickstart's dense recorded ladder: optimum, bowl and weight decay per width.

    python benchmarks/recorded_ladder_report.py     seconds: tables and figure, from trials.csv

Reads `results/reference/quickstart-ladder/trials.csv`, whole or in part, and writes beside it
`tables.md` and `bowl.png`.

The surface of a width is a thin-plate spline with a little smoothing through log(1 + excess / 5 %)
in log2 of the axes, which keeps the walls from bending the middle. Not every cell has every seed:
a cell's loss is its own part of the additive model log loss = cell + seed, so that a cell with
seed 0 alone is not judged by that seed's luck. What that model leaves is the noise between cells;
errors are standard deviations over refits with that noise added to all cells. Of a width with one
seed so far, the noise is how far cells near the optimum are from a spline that was not shown them:
its own error is in it too, so it is too large rather than too small.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray
from recorded_ladder import QUICKSTART_FOLDER
from scipy.interpolate import RBFInterpolator

from telescope.files import write_atomic
from telescope.spec.spec import Spec

SCALE = 0.05
"""Excess, as a share of the loss, from which on the spline sees its logarithm."""
SMOOTHING = 0.3
BROKEN = 0.5
"""Cells this far above the best are walls: no spline goes through them."""
REDRAWS = 100
FEWEST_CELLS = 15
"""Below it a width has no table: a spline through less is a guess."""
AXES = ("lr", "weight_decay")
FACTORS = {"lr": (0.25, 0.5, 2.0, 4.0), "weight_decay": (0.125, 0.25, 0.5, 2.0, 4.0, 8.0)}


@dataclass(frozen=True)
class Surface:
    """The recorded losses of a width."""

    width: int
    places: NDArray[np.float64]
    """(cells, 2) log2 of lr and weight decay."""
    losses: NDArray[np.float64]
    """(cells,) of an average seed."""
    errors: NDArray[np.float64]
    """(cells,) standard error of a cell's loss next to other cells', as a share of the loss."""
    noise: float
    """Standard deviation of a cell's loss with one seed, next to other cells with it, as a share
    of the loss."""
    seed_spread: float
    """Standard deviation of the seeds' part, as a share of the loss; NaN of one seed."""
    trials: int
    diverged: int

    @classmethod
    def of(cls, width: int, rows: pd.DataFrame) -> Surface:
        """Split the losses of a width into cells, seeds and noise."""
        complete = rows[rows.status == "complete"]
        cells, cell_of = np.unique(complete[[*AXES]].to_numpy(float), axis=0, return_inverse=True)
        seeds, seed_of = np.unique(complete.seed.to_numpy(int), return_inverse=True)
        design = np.zeros((len(complete), len(cells) + len(seeds)))
        design[np.arange(len(complete)), cell_of.ravel()] = 1.0
        design[np.arange(len(complete)), len(cells) + seed_of.ravel()] = 1.0
        logs = np.log(complete.loss.to_numpy(float))
        # Noise of contenders alone: beside a wall a small shift of it looks like noise.
        near = logs <= logs.min() + SCALE
        solution, *_ = np.linalg.lstsq(design, logs, rcond=None)
        parts = solution[len(cells) :]
        left = (logs - design @ solution)[near]
        free = len(left) - len(set(cell_of.ravel()[near])) - (len(seeds) - 1)
        noise = math.sqrt(np.square(left).sum() / free) if free > 0 else math.nan
        places, losses = np.log2(cells), np.exp(solution[: len(cells)] + parts.mean())
        if math.isnan(noise):
            noise = left_out_error(places, losses)
        counts = np.bincount(cell_of.ravel(), minlength=len(cells))
        return cls(
            width=width,
            places=places,
            losses=losses,
            errors=noise / np.sqrt(counts),
            noise=noise,
            seed_spread=float(parts.std(ddof=1)) if len(seeds) > 1 else math.nan,
            trials=len(rows),
            diverged=int((rows.status == "diverged").sum()),
        )

    @cached_property
    def fit(self) -> Fit:
        """The surface through the losses as recorded."""
        return Fit.through(self.places, self.losses)

    @cached_property
    def redrawn(self) -> list[Fit]:
        """Surfaces after adding the noise of each cell."""
        generator = np.random.default_rng(self.width)
        draws = generator.normal(size=(REDRAWS, len(self.losses))) * self.errors
        return [Fit.through(self.places, self.losses * (1 + draw)) for draw in draws]

    def along_decay(self) -> Iterator[tuple[float, float, float]]:
        """Weight decay, loss and its share above the best, at the learning rate of the best."""
        best_lr = self.places[self.losses.argmin(), 0]
        on_line = self.places[:, 0] == best_lr
        for place, loss in zip(self.places[on_line], self.losses[on_line], strict=True):
            yield 2 ** place[1], loss, loss / self.losses.min() - 1


@dataclass(frozen=True)
class Fit:
    """A smooth surface and its lowest point."""

    smooth: RBFInterpolator
    best: float
    low: NDArray[np.float64]
    high: NDArray[np.float64]

    @classmethod
    def through(cls, places: NDArray[np.float64], losses: NDArray[np.float64]) -> Fit:
        """The surface through the losses at (cells, 2) places."""
        best = float(losses.min())
        excess = losses / best - 1
        kept = excess < BROKEN
        bent = np.log1p(excess[kept] / SCALE)
        smooth = RBFInterpolator(
            places[kept], bent, kernel="thin_plate_spline", smoothing=SMOOTHING
        )
        return cls(smooth, best, places.min(axis=0), places.max(axis=0))

    def loss(self, places: NDArray[np.float64]) -> NDArray[np.float64]:
        """Of (n, 2) places; NaN outside the recorded range."""
        inside = ((places >= self.low - 1e-9) & (places <= self.high + 1e-9)).all(axis=1)
        values = self.best * (1 + SCALE * np.expm1(self.smooth(places)))
        return np.where(inside, values, math.nan)

    @cached_property
    def optimum(self) -> NDArray[np.float64]:
        """(2,) log2 of where it is lowest."""
        axes = [np.linspace(low, high, 81) for low, high in zip(self.low, self.high, strict=True)]
        grid = np.stack([g.ravel() for g in np.meshgrid(*axes)], axis=1)
        place: NDArray[np.float64] = grid[self.loss(grid).argmin()]
        return place

    def cost(self, axis: int, factor: float) -> float:
        """Share of the loss that a factor on one axis costs from the optimum."""
        moved = self.optimum.copy()
        moved[axis] += math.log2(factor)
        there, here = self.loss(np.stack([moved, self.optimum]))
        return float(there / here - 1)

    def ridge(self, lr: float) -> float:
        """log2 of the best weight decay at a log2 lr; NaN where that is the range's end."""
        decays = np.linspace(self.low[1], self.high[1], 201)
        losses = self.loss(np.stack([np.full_like(decays, lr), decays], axis=1))
        best = int(losses.argmin())
        return float(decays[best]) if 0 < best < len(decays) - 1 else math.nan

    def coupling(self) -> float:
        """Slope of log2 best weight decay against log2 lr, within an octave of the optimum."""
        lrs = self.optimum[0] + np.linspace(-1, 1, 9)
        ridge = np.array([self.ridge(lr) for lr in lrs])
        known = np.isfinite(ridge)
        return float(np.polyfit(lrs[known], ridge[known], 1)[0]) if known.sum() > 2 else math.nan


def left_out_error(places: NDArray[np.float64], losses: NDArray[np.float64]) -> float:
    """RMS of a cell's loss over that of a surface without it, near the optimum; NaN of no cell."""
    inside = ((places > places.min(axis=0)) & (places < places.max(axis=0))).all(axis=1)
    near = losses <= losses.min() * (1 + SCALE)
    errors = []
    for cell in np.flatnonzero(inside & near):
        others = np.arange(len(losses)) != cell
        fit = Fit.through(places[others], losses[others])
        errors.append(losses[cell] / fit.loss(places[[cell]])[0] - 1)
    return float(np.sqrt(np.mean(np.square(errors)))) if errors else math.nan


def load() -> dict[int, Surface]:
    """The surfaces of the widths with enough cells."""
    rows = pd.read_csv(QUICKSTART_FOLDER / "trials.csv")
    widths: list[int] = sorted(set(rows.width.tolist()))
    surfaces = {width: Surface.of(width, rows[rows.width == width]) for width in widths}
    return {width: s for width, s in surfaces.items() if len(s.losses) >= FEWEST_CELLS}


def percent(value: float, error: float) -> str:
    """Value ± error, per cent of loss."""
    if math.isnan(value):
        return "outside"
    return f"{100 * value:.2f}" + ("" if math.isnan(error) else f" ± {100 * error:.2f}")


def spread(draws: Sequence[float]) -> float:
    """Standard deviation of what is known of the draws; NaN of fewer than two."""
    known = [draw for draw in draws if math.isfinite(draw)]
    return float(np.std(known)) if len(known) > 1 else math.nan


def octaves(value: float, draws: Sequence[float]) -> str:
    """A place on an axis and the error of its log2."""
    error = spread(draws)
    return f"{2**value:.3g}" + ("" if math.isnan(error) else f" ± {error:.2f} oct.")


def tables(surfaces: Mapping[int, Surface]) -> Iterator[str]:
    """The tables in Markdown."""
    steps = Spec.load("quickstart").steps or 0
    yield "| width | cells | trials | diverged | best loss | seeds differ by | noise of cells |"
    yield "|---|---|---|---|---|---|---|"
    for width, s in surfaces.items():
        seeds, noise = percent(s.seed_spread, math.nan), percent(s.noise, math.nan)
        yield (
            f"| {width} | {len(s.losses)} | {s.trials} | {s.diverged} | {s.losses.min():.4f} "
            f"| {seeds} % | {noise} % |".replace("outside %", "one seed")
        )
    yield ""
    yield "| width | lr | weight decay | lr · wd · steps | d log wd / d log lr |"
    yield "|---|---|---|---|---|"
    for width, s in surfaces.items():
        lr, decay = s.fit.optimum
        places = [f.optimum for f in s.redrawn]
        product = octaves(lr + decay + math.log2(steps), [float(place.sum()) for place in places])
        slope, error = s.fit.coupling(), spread([f.coupling() for f in s.redrawn])
        coupling = f"{slope:.2f}" + ("" if math.isnan(error) else f" ± {error:.2f}")
        yield (
            f"| {width} | {octaves(lr, [place[0] for place in places])} "
            f"| {octaves(decay, [place[1] for place in places])} | {product} | {coupling} |"
        )
    for axis, name in enumerate(AXES):
        yield ""
        yield f"Cost of a factor on {name} from the optimum, % of loss:"
        yield ""
        yield "| width | " + " | ".join(f"× {factor:g}" for factor in FACTORS[name]) + " |"
        yield "|---" * (1 + len(FACTORS[name])) + "|"
        for width, s in surfaces.items():
            costs = [
                percent(s.fit.cost(axis, f), spread([d.cost(axis, f) for d in s.redrawn]))
                for f in FACTORS[name]
            ]
            yield f"| {width} | " + " | ".join(costs) + " |"
    yield ""
    yield "The cells themselves at the learning rate of the best one, % above it, by weight decay:"
    yield ""
    lines = {width: {f"{d:.3g}": e for d, _, e in s.along_decay()} for width, s in surfaces.items()}
    decays = sorted({d for line in lines.values() for d in line}, key=float)
    yield "| width | lr | " + " | ".join(decays) + " |"
    yield "|---|---" + "|---" * len(decays) + "|"
    for width, line in lines.items():
        lr = 2 ** surfaces[width].places[surfaces[width].losses.argmin(), 0]
        cells = [f"{100 * line[d]:.2f}" if d in line else "" for d in decays]
        yield f"| {width} | {lr:.3g} | " + " | ".join(cells) + " |"


def draw(surfaces: Mapping[int, Surface]) -> Figure:
    """The surfaces along each axis through their optimum, one line per width."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axis, (panel, name) in enumerate(
        zip(panels, ("learning rate", "weight decay"), strict=True)
    ):
        for width, s in surfaces.items():
            values = np.linspace(s.fit.low[axis], s.fit.high[axis], 121)
            places = np.tile(s.fit.optimum, (len(values), 1))
            places[:, axis] = values
            best = s.fit.loss(s.fit.optimum[None])[0]
            panel.plot(2**values, 100 * (s.fit.loss(places) / best - 1), label=f"width {width}")
        panel.set(xscale="log", xlabel=name, ylim=(-0.3, 8))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("loss above the width's best, %")
    panels[0].legend()
    return figure


def main() -> None:
    """Write tables and figure."""
    surfaces = load()
    text = "\n".join([*tables(surfaces), ""])
    write_atomic(QUICKSTART_FOLDER / "tables.md", text)
    draw(surfaces).savefig(QUICKSTART_FOLDER / "bowl.png", dpi=110)
    print(text)


if __name__ == "__main__":
    main()
