"""What is drawn: loss against each swept axis, and sizes against width in the coordinate check."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from telescope.files import write_atomic
from telescope.ladder.ladder import Ladder
from telescope.records import Choice, Result, Stage, Status

if TYPE_CHECKING:
    from telescope.train.coordcheck_verdict import CoordCheck

AXIS_LABELS = {
    "lr": "learning rate (base-width units)",
    "weight_decay": "weight decay (base-width units)",
}


def loss_figure(ladder: Ladder, title: str) -> Figure:
    """Draw one panel per swept axis.

    A line joins, for each value of the axis, the best loss over the other axes; single trials are
    dots, diverged ones crosses at the top, the choice of each width a star on the bar of its 90 %
    interval.
    """
    axes = [axis for axis in ladder.spec.axes if not axis.is_fixed]
    figure = Figure(figsize=(5.2 * len(axes), 4.2), layout="constrained")
    figure.suptitle(title, fontsize=11)
    panels = figure.subplots(1, len(axes), squeeze=False, sharey=True)[0]
    choices = {choice.width: choice for choice in ladder.choices}
    for axis, panel in zip(axes, panels, strict=True):
        for number, stage in enumerate(ladder.stages):
            _draw_stage(panel, axis.name, stage, ladder.results(stage), choices, f"C{number}")
        panel.set_xscale("log")
        panel.set_xlabel(AXIS_LABELS.get(axis.name, axis.name))
        panel.grid(alpha=0.25, which="both")
    panels[0].set_ylabel("held-out loss (nats per token)")
    panels[0].legend(title="width (★ chosen, – 90 %, × diverged)", fontsize=9, title_fontsize=9)
    return figure


def _draw_stage(
    panel: Axes,
    axis: str,
    stage: Stage,
    results: Sequence[Result],
    choices: Mapping[int, Choice],
    colour: str,
) -> None:
    """One width in one panel."""
    panel.plot([], [], color=colour, marker="o", ms=4, label=stage.width)
    complete = [(r.trial.point[axis], r.loss) for r in results if r.loss is not None]
    if complete:
        xs, ys = zip(*complete, strict=True)
        panel.scatter(xs, ys, s=9, color=colour, alpha=0.35, linewidths=0)
        best: dict[float, float] = {}
        for value, loss in complete:
            best[value] = min(loss, best.get(value, loss))
        values = sorted(best)
        panel.plot(values, [best[v] for v in values], color=colour, marker="o", ms=4)
    diverged = {r.trial.point[axis] for r in results if r.status is Status.DIVERGED}
    if diverged:
        panel.plot(
            sorted(diverged),
            [0.98] * len(diverged),
            "x",
            color=colour,
            transform=panel.get_xaxis_transform(),
        )
    if choice := choices.get(stage.width):
        if interval := choice.intervals.get(axis):
            panel.plot(interval, [choice.loss] * 2, color=colour, lw=5, alpha=0.35)
        panel.plot(choice.point[axis], choice.loss, "*", color=colour, ms=16, mec="black", mew=0.8)


def write_loss_figure(path: Path, ladder: Ladder, title: str) -> None:
    """Write the figure as a PNG, whole or not at all."""
    _write(path, loss_figure(ladder, title))


CHECK_PANELS = {
    "output": "inputs, outputs, gradients, starts",
    "change": "changes since initialisation",
    "update": "updates",
}
"""Kind of quantity, by the last word of its name → what its panel is called; the first has the
rest."""


def check_figure(check: CoordCheck, title: str) -> Figure:
    """Draw each size against the width, as a multiple of the base width's.

    After the step that its slope is from, as in the table. A right model's lines lie flat, inside
    the wedge of slopes that pass; those outside are named.
    """
    figure = Figure(figsize=(12.5, 6.0), layout="constrained")
    figure.suptitle(f"{title}: coordinate check {check.verdict}", fontsize=11)
    panels = dict(zip(CHECK_PANELS, figure.subplots(1, 3, sharey=True), strict=True))
    for name in check.shown():
        panel = panels.get(name.rsplit(" ", 1)[-1], panels["output"])
        sizes = check.sizes[name][check.slope_steps[name]]
        if all(math.isfinite(size) and size > 0 for size in sizes):
            relative = [size / sizes[0] for size in sizes]
            thick = 1.8 if name in check.problems else 0.9
            panel.plot(check.widths, relative, marker="o", ms=3, label=name, lw=thick)
    for kind, panel in panels.items():
        wedge = [(width / check.widths[0]) ** check.threshold for width in check.widths]
        panel.fill_between(
            check.widths, [1 / edge for edge in wedge], wedge, color="0.9", label="passes"
        )
        panel.set_xscale("log", base=2)
        panel.set_yscale("log", base=2)
        panel.set_xticks(check.widths, [str(width) for width in check.widths])
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panel.set_title(CHECK_PANELS[kind], fontsize=10)
        panel.set_xlabel("width")
        panel.grid(alpha=0.25)
        # Below: a dozen names would cover the lines.
        panel.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)
    panels["output"].set_ylabel("size after the step of its slope, over that of the base width")
    return figure


def write_check_figure(path: Path, check: CoordCheck, title: str) -> None:
    """Write the coordinate check's figure as a PNG, whole or not at all."""
    _write(path, check_figure(check, title))


def _write(path: Path, figure: Figure) -> None:
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=130)
    write_atomic(path, image.getvalue())
