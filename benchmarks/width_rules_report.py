"""The table of `width_rules.py`: optimum against width, per width rule.

    python benchmarks/width_rules_report.py         seconds: prints the table, writes the figure

Per rule and width the optimum is the vertex of a parabola in log2 lr through the best learning rate
and its two neighbours, at weight decay 0.1, the middle of the grid; at the grid's border or beside
a divergence it is the best cell itself. Noise is one number per width, from the differences between
seeds; intervals are the 5th and 95th percentile of optima refitted after adding that noise to all
cells.

"Handed over" compares two losses at the widest width: at base width's optimum, and at its own. Both
lie between cells, so both are read off the parabola through the three nearest.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from width_rules import ARMS, FOLDER, HIDDEN_ARMS, WEIGHT_DECAY, load_spec

from telescope.files import write_json
from telescope.ladder.grid import values_at
from telescope.spec.spec import Spec

REDRAWS = 2000


@dataclass(frozen=True)
class Optimum:
    """The best learning rate at one width."""

    width: int
    lrs: tuple[float, ...]
    losses: tuple[float, ...]
    """Seed means; NaN where a seed diverged."""
    noise: float
    """Standard deviation between seeds, nats."""
    log2_lr: float
    draws: NDArray[np.float64]
    """Refitted optima, log2 lr."""
    at_edge: bool

    def loss_at(self, log2_lr: float) -> float:
        """A cell's own, else off a parabola through the three nearest; NaN beside a divergence."""
        x = np.log2(self.lrs)
        if np.isclose(x, log2_lr).any():
            return self.losses[int(np.abs(x - log2_lr).argmin())]
        middle = int(np.clip(np.abs(x - log2_lr).argmin(), 1, len(x) - 2))
        near = slice(middle - 1, middle + 2)
        # Coordinates from the middle, or polyfit loses digits.
        bend = np.polyfit(x[near] - x[middle], np.asarray(self.losses[near]), 2)
        return float(np.polyval(bend, log2_lr - x[middle]))

    @property
    def interval(self) -> tuple[float, float]:
        """90 %."""
        low, high = np.percentile(self.draws, [5, 95])
        return float(low), float(high)


def vertex(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[float, bool]:
    """The parabola's vertex around the lowest finite loss; at a border the border itself."""
    finite = np.flatnonzero(np.isfinite(y))
    best = int(finite[np.argmin(y[finite])])
    if best in (0, len(y) - 1) or not np.isfinite(y[[best - 1, best + 1]]).all():
        return float(x[best]), True
    left, middle, right = y[best - 1 : best + 2]
    bend = left - 2 * middle + right
    offset = 0.5 * (left - right) / bend if bend > 0 else 0.0
    return float(x[best] + offset * (x[best + 1] - x[best])), False


def optimum(rows: pd.DataFrame, width: int, weight_decay: float, generator: Any) -> Optimum:
    """Fit one width at one weight decay."""
    here = rows[rows.width == width]
    cells = here[np.isclose(here.weight_decay, weight_decay)].pivot(
        index="lr", columns="seed", values="loss"
    )
    x, y = np.log2(cells.index.to_numpy()), cells.mean(axis=1, skipna=False).to_numpy()
    pairs = here.pivot(index=["lr", "weight_decay"], columns="seed", values="loss").dropna()
    # Noise grows far from the optimum, where it does not matter: the better half alone.
    pairs = pairs[pairs.mean(axis=1) <= pairs.mean(axis=1).median()]
    noise = float(np.sqrt((pairs.diff(axis=1).iloc[:, 1] ** 2).mean() / 2))
    draws = [
        vertex(x, y + generator.normal(0, noise / math.sqrt(2), len(y)))[0] for _ in range(REDRAWS)
    ]
    place, at_edge = vertex(x, y)
    return Optimum(width, tuple(cells.index), tuple(y), noise, place, np.asarray(draws), at_edge)


def best_cell(rows: pd.DataFrame, width: int) -> tuple[float, float]:
    """(lr, weight decay) with the lowest seed mean at a width; diverged cells are no candidates."""
    means = (
        rows[rows.width == width]
        .groupby(["lr", "weight_decay"])
        .loss.agg(lambda losses: losses.mean(skipna=False))
    )
    best: Any = means.idxmin()
    return float(best[0]), float(best[1])


def summarise(spec: Spec, rows: pd.DataFrame) -> tuple[dict[str, Any], list[Optimum]]:
    """All that is said of one rule."""
    generator = np.random.default_rng(0)
    widths = [width for width in spec.ladder.widths if (rows.width == width).any()]
    optima = [optimum(rows, width, WEIGHT_DECAY, generator) for width in widths]
    base, widest = optima[0], optima[-1]
    handed_over, tuned = widest.loss_at(base.log2_lr), widest.loss_at(widest.log2_lr)
    doublings = np.log2(widths)
    centred = doublings - doublings.mean()
    weights = centred / (centred @ centred)
    drifts = np.stack([o.draws for o in optima], axis=1) @ weights
    summary = {
        "optimizer": spec.optimizer.name,
        "rule": spec.optimizer.rule,
        "best_cell": {
            o.width: dict(zip(("lr", "weight_decay"), best_cell(rows, o.width), strict=True))
            for o in optima
        },
        "optimum_lr": {
            o.width: {
                "lr": 2**o.log2_lr,
                "interval": [2**end for end in o.interval],
                "at_edge_or_wall": o.at_edge,
                "noise": o.noise,
            }
            for o in optima
        },
        "drift_log2_per_doubling": {
            "value": float(np.array([o.log2_lr for o in optima]) @ weights),
            "interval": [float(end) for end in np.percentile(drifts, [5, 95])],
        },
        "window_loses_the_optimum_at": lost_at(spec, optima),
        "at_the_widest": {
            "width": widest.width,
            "handed_over_lr": 2**base.log2_lr,
            "handed_over_loss": handed_over if math.isfinite(handed_over) else None,
            "tuned_loss": tuned,
            "excess": (handed_over - tuned) / tuned if math.isfinite(handed_over) else None,
            "noise_of_a_mean": widest.noise / math.sqrt(2) / tuned,
        },
    }
    return summary, optima


def lost_at(spec: Spec, optima: Sequence[Optimum]) -> int | None:
    """The first width whose window, centred on the optimum before, misses its optimum for sure.

    For sure: the whole 90 % interval is outside the window of Algorithm 1; where that has a single
    point, outside half a step of it.
    """
    axis = next(axis for axis in spec.ladder_spec.axes if axis.name == "lr")
    base, swept = optima[0].width, 2
    for before, here in itertools.pairwise(optima):
        centre = 2**before.log2_lr
        grid = values_at(axis, width=here.width, base_width=base, swept=swept, centre=centre)
        step = math.log2(axis.high / axis.low) / (axis.points - 1) * base / here.width
        reach = max(step / 2, math.log2(grid[-1] / centre))
        low, high = here.interval
        if low > before.log2_lr + reach or high < before.log2_lr - reach:
            return here.width
    return None


def draw(panel: Axes, summary: dict[str, Any], optima: Sequence[Optimum]) -> None:
    """Loss against learning rate, one line per width, the optimum marked."""
    for number, o in enumerate(optima):
        panel.plot(o.lrs, o.losses, marker="o", ms=3, color=f"C{number}", label=str(o.width))
        height = min(loss for loss in o.losses if math.isfinite(loss))
        low, high = o.interval
        panel.plot([2**low, 2**high], [height - 0.03] * 2, color=f"C{number}", lw=3, alpha=0.5)
        panel.plot(2**o.log2_lr, height - 0.03, "|", color=f"C{number}", ms=10, mew=2)
    drift = summary["drift_log2_per_doubling"]
    low, high = drift["interval"]
    name = f"{summary['optimizer']}, {summary['rule']}"
    panel.set_title(f"{name}: {drift['value']:+.2f} [{low:+.2f}, {high:+.2f}]", fontsize=9)
    panel.set_xscale("log", base=10)
    panel.grid(alpha=0.25)


def figure(results: Sequence[tuple[dict[str, Any], list[Optimum]]], what: str) -> Figure:
    """One panel per rule, three in a row."""
    rows = -(-len(results) // 3)
    drawing = Figure(figsize=(12.5, 3.4 * rows + 0.4), layout="constrained")
    drawing.suptitle(
        f"Held-out loss against {what} at four widths; in the titles the optimum's drift in "
        "log2 lr per doubling of the width, with its 90 % interval",
        fontsize=10,
    )
    panels = drawing.subplots(rows, 3, sharey=True, squeeze=False)
    for panel, (summary, optima) in zip(panels.flat, results, strict=False):
        draw(panel, summary, optima)
    panels[0, 0].legend(title="width", fontsize=8, title_fontsize=8)
    for panel in panels[-1]:
        panel.set_xlabel(f"{what} (base-width units)")
    for panel in panels[:, 0]:
        panel.set_ylabel("nats per token")
    panels[0, 0].set_ylim(top=3.0)
    return drawing


def as_row(summary: dict[str, Any]) -> str:
    """One rule as a row of a Markdown table."""
    drift, end = summary["drift_log2_per_doubling"], summary["at_the_widest"]
    optima = " / ".join(
        f"{o['lr']:.3f}{'*' if o['at_edge_or_wall'] else ''}"
        for o in summary["optimum_lr"].values()
    )
    lost = summary["window_loses_the_optimum_at"]
    excess = "beside a divergence"
    if end["excess"] is not None:
        excess = f"{end['excess']:+.1%} ± {end['noise_of_a_mean']:.1%}"
    return (
        f"| {summary['optimizer']} | `{summary['rule']}` | {optima} "
        f"| {drift['value']:+.2f} [{drift['interval'][0]:+.2f}, {drift['interval'][1]:+.2f}] "
        f"| {f'at {lost}' if lost else 'never'} | {end['tuned_loss']:.3f} "
        f"| {excess} |"
    )


def report(table: str, arms: Sequence[tuple[str, str]], what: str) -> None:
    """Print what one table says; write its numbers and its figure beside it."""
    rows = pd.read_csv(FOLDER / f"{table}.csv")
    results = []
    for optimizer, rule in arms:
        spec = load_spec(optimizer, rule)
        mine = rows[(rows.optimizer == optimizer) & rows.rule.isin([rule, "any"])]
        results.append(summarise(spec, mine))
    widths = " / ".join(map(str, load_spec(*arms[0]).ladder.widths))
    print(f"\n{what}:\n")
    print(
        f"| optimizer | rule | best at {widths} | drift | window loses it | tuned | handed over |"
    )
    print("|---|---|---|---|---|---|---|")
    for summary, _ in results:
        print(as_row(summary))
    write_json(FOLDER / f"{table}.json", [summary for summary, _ in results])
    figure(results, what).savefig(FOLDER / f"{table}.png", dpi=110)


def main() -> None:
    """Both tables."""
    report("trials", ARMS, "learning rate")
    report("hidden-lr", HIDDEN_ARMS, "Muon's learning rate alone")
    print(f"\n* on the grid's border or beside a divergence; figures and numbers in {FOLDER}")


if __name__ == "__main__":
    main()
