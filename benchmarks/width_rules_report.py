"""What the table of `width_rules.py` says: optimum against width, per width rule.

    python benchmarks/width_rules_report.py         seconds: prints the table, writes the figure

Per rule and width the optimum is the vertex of a parabola in log2 lr through the best learning rate
and its two neighbours, at the weight decay that is best at base width (the one that a transfer
would hand over). Noise is one number per width, from the differences between seeds; intervals are
the 5th and 95th percentile of optima refitted after adding that noise to every cell.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from width_rules import ARMS, FOLDER, load_spec

from telescope.files import write_json
from telescope.ladder.grid import values_at
from telescope.spec import Spec

REDRAWS = 2000


@dataclass(frozen=True)
class Optimum:
    """Where the learning rate is best at one width."""

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
    base_lr, weight_decay = best_cell(rows, widths[0])
    optima = [optimum(rows, width, weight_decay, generator) for width in widths]
    widest = optima[-1]
    losses = dict(zip(widest.lrs, widest.losses, strict=True))
    handed_over = losses[base_lr]
    tuned = min(loss for loss in losses.values() if math.isfinite(loss))
    doublings = np.log2(widths)
    centred = doublings - doublings.mean()
    weights = centred / (centred @ centred)
    drifts = np.stack([o.draws for o in optima], axis=1) @ weights
    summary = {
        "optimizer": spec.optimizer.name,
        "rule": spec.optimizer.rule,
        "weight_decay": {
            "chosen": weight_decay,
            "best": {o.width: best_cell(rows, o.width)[1] for o in optima[:-1]},
        },
        "optimum_lr": {
            o.width: {
                "lr": 2**o.log2_lr,
                "interval": [2**end for end in o.interval],
                "at_edge": o.at_edge,
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
            "handed_over_lr": base_lr,
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


def figure(results: Sequence[tuple[dict[str, Any], list[Optimum]]]) -> Figure:
    """One panel per rule."""
    drawing = Figure(figsize=(12.5, 7), layout="constrained")
    drawing.suptitle(
        "Held-out loss against learning rate at four widths; in the titles the optimum's drift in "
        "log2 lr per doubling of the width, with its 90 % interval",
        fontsize=10,
    )
    panels = drawing.subplots(2, 3, sharey=True)
    for panel, (summary, optima) in zip(panels.flat, results, strict=False):
        draw(panel, summary, optima)
    panels[0, 0].legend(title="width", fontsize=8, title_fontsize=8)
    for panel in panels[1]:
        panel.set_xlabel("learning rate (base-width units)")
    for panel in panels[:, 0]:
        panel.set_ylabel("nats per token")
    panels[0, 0].set_ylim(top=3.0)
    return drawing


def as_row(summary: dict[str, Any]) -> str:
    """One rule as a row of a Markdown table."""
    drift, end = summary["drift_log2_per_doubling"], summary["at_the_widest"]
    optima = " / ".join(
        f"{o['lr']:.3f}{'*' if o['at_edge'] else ''}" for o in summary["optimum_lr"].values()
    )
    lost = summary["window_loses_the_optimum_at"]
    excess = "diverged" if end["excess"] is None else f"{end['excess']:+.1%}"
    return (
        f"| {summary['optimizer']} | `{summary['rule']}` | {optima} "
        f"| {drift['value']:+.2f} [{drift['interval'][0]:+.2f}, {drift['interval'][1]:+.2f}] "
        f"| {f'at {lost}' if lost else 'never'} | {excess} ± {end['noise_of_a_mean']:.1%} |"
    )


def main() -> None:
    """Read the table, print and write what it says."""
    rows = pd.read_csv(FOLDER / "trials.csv")
    results = []
    for optimizer, rule in ARMS:
        spec = load_spec(optimizer, rule)
        mine = rows[(rows.optimizer == optimizer) & rows.rule.isin([rule, "any"])]
        if (mine.width == spec.ladder.widths[-1]).sum() >= 10:
            results.append(summarise(spec, mine))
    widths = " / ".join(map(str, load_spec(*ARMS[0]).ladder.widths))
    print(
        f"| optimizer | rule | best lr at width {widths} | drift | window loses it | handed over |"
    )
    print("|---|---|---|---|---|---|")
    for summary, _ in results:
        print(as_row(summary))
    write_json(FOLDER / "summary.json", json.loads(json.dumps([s for s, _ in results])))
    figure(results).savefig(FOLDER / "width-rules.png", dpi=110)
    print(f"\n* on the grid's border; figure: {Path(FOLDER / 'width-rules.png')}")


if __name__ == "__main__":
    main()
