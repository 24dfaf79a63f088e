"""Figures: panels of a ladder's portrait, training curves, cost and the coordinate check.

Each `draw_` function fills one panel. `loss.png` and `coordcheck.png` combine several; the report
makes a figure of each. There are only a few colours, so that the report can replace them by those
of a light or a dark page.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from telescope.check.verdict import CoordCheck, Kind
from telescope.files import write_atomic
from telescope.ladder.ladder import Ladder
from telescope.ladder.portrait import Contours, Dot, Portrait, Track, WidthPortrait
from telescope.records import CurvePoint, Status, Trial
from telescope.scaling.laws import PFLOPS_DAY, Law

INK, MUTED, GRID, PAPER, BAD, ACCENT = (
    *("#1c1c21", "#6c6c78", "#dcdce3", "#fdfdfe"),
    *("#c8102e", "#2563b8"),
)
WIDTH_COLOURS = ("#0072b2", "#d55e00", "#008a66", "#b8588f", "#a87000", "#3f90bd")
"""Colours of the first six widths, narrow first; further widths repeat them with other markers."""
MARKERS = ("o", "s", "D", "v", "P", "h")
STYLE: dict[Any, Any] = {
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "axes.labelcolor": INK,
    "axes.labelsize": 9,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "font.size": 9,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text, and the file small
    "text.color": INK,
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
}
OPTIMIZERS = {"muon": "Muon", "adamw": "AdamW"}
AXIS_LABELS = {"lr": "learning rate", "weight_decay": "weight decay"}
HOVER, NEXT = "hover:", "\u241e"
"""Beginning of the id of an artist with a title per point, and the mark between titles."""
PANEL = (4.3, 3.0)
"""Size of a panel of the report, inches; a phone shows one and the edge of the next."""
MARGINS = (0.72, 0.5, 0.12, 0.3)
"""Margins for labels left of a panel, below, right and above it, inches."""
LEVELS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
"""Contours of the excess in per cent; in another unit, multiples of the finest visible level."""
LEAST_SPAN = 2.0
"""Least factor that a figure of optima spans, so that noise does not look like a drift."""
FAR_BUDGET = 2.5
"""Multiple of the spent or planned cost above which the budget is not drawn."""
CURVES_SHOWN = 20
"""Most training curves drawn for one width, the best first."""


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Make a function draw in our style, whatever the user's matplotlib settings are."""

    def drawn(*arguments: Any, **keywords: Any) -> Figure:
        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(STYLE)
            return draw(*arguments, **keywords)

    drawn.__doc__ = draw.__doc__
    return drawn


def label_of(axis: str) -> str:
    """Return the name of an axis in figures."""
    return AXIS_LABELS.get(axis, axis)


def width_look(portrait: Portrait, width: int) -> tuple[str, str]:
    """Return colour and marker of a width, the same in every figure."""
    number = [w.width for w in portrait.widths].index(width)
    rounds = number // len(WIDTH_COLOURS)
    return WIDTH_COLOURS[number % len(WIDTH_COLOURS)], MARKERS[rounds % len(MARKERS)]


def entitle(artist: Artist, titles: Sequence[str]) -> None:
    """Give each point of a line or scatter a title, which the report shows on pointing at it."""
    artist.set_gid(HOVER + NEXT.join(titles))


@styled
def loss_figure(ladder: Ladder, title: str) -> Figure:
    """Draw a row per swept axis: its optimum against the width, and the excess loss along it.

    Args:
        ladder: the ladder, at any time.
        title: title of the figure.
    """
    portrait = ladder.portrait()
    rows = max(1, len(portrait.axes))
    figure = Figure(figsize=(10.4, 0.9 + 3.3 * rows), layout="constrained", facecolor="white")
    figure.suptitle(title, fontsize=11)
    panels = figure.subplots(rows, 2, squeeze=False)
    for axis, (left, right) in zip(portrait.axes, panels, strict=False):
        draw_track(left, portrait, axis)
        draw_excess(right, portrait, axis, portrait.widths)
    if not portrait.axes:
        for panel in panels[0]:
            panel.set_axis_off()
        panels[0][0].text(0, 0.5, portrait.unfitted)
    figure.legend(handles=_legend(portrait), loc="outside lower center", ncols=5)
    return figure


def _legend(portrait: Portrait) -> list[Line2D]:
    """Return the legend's handles for the figure of the losses."""
    looks = [width_look(portrait, w.width) for w in portrait.widths]
    handles = [
        Line2D([], [], color=colour, marker=marker, ms=4, label=f"width {w.width}")
        for w, (colour, marker) in zip(portrait.widths, looks, strict=True)
    ]
    plain: dict[str, Any] = {"color": INK, "ls": "none"}
    return [
        *handles,
        Line2D([], [], marker="*", ms=10, label="chosen", **plain),
        Line2D([], [], marker="x", ms=5, label="diverged", **plain),
        Line2D([], [], marker="^", ms=4, label="above the figure", **plain),
        Line2D([], [], marker="*", ms=10, mfc="none", label="predicted for the target", **plain),
    ]


def write_loss_figure(path: Path, ladder: Ladder, title: str) -> None:
    """Write the figure as a PNG, whole or not at all."""
    write_png(path, loss_figure(ladder, title))


def draw_track(panel: Axes, portrait: Portrait, axis: str) -> None:
    """Draw one axis' optimum against the width up to the target, with bars of 90 % intervals.

    Measured optima are filled; predicted ones are hollow, and their band is shaded.
    """
    track = next(t for t in portrait.tracks if t.axis == axis)
    panel.set_title(f"{label_of(axis)}: optimum against width", loc="left")
    panel.set_xlabel("width")
    panel.set_ylabel(f"{label_of(axis)} (base-width units)")
    panel.grid()
    _scale_widths(panel, [spot.width for spot in track.spots] or [portrait.target])
    panel.axvline(portrait.target, color=MUTED, lw=0.8, ls=(0, (2, 3)))
    _draw_band(panel, track)
    for spot in track.spots:
        is_target = spot.width == portrait.target and spot is track.spots[-1]
        colour = INK if not spot.is_measured else width_look(portrait, spot.width)[0]
        if spot.interval:
            panel.plot([spot.width] * 2, spot.interval, color=colour, lw=1.6, solid_capstyle="butt")
        (mark,) = panel.plot(
            [spot.width],
            [spot.value],
            color=colour,
            marker="*" if is_target else "o",
            ms=11 if is_target else 6,
            mfc=colour if spot.is_measured and track.is_identified else PAPER,
            ls="none",
            zorder=3,
        )
        entitle(mark, [_describe_spot(track, spot.width, portrait.target)])
    values = [v for spot in track.spots for v in (spot.value, *(spot.interval or ()))]
    _scale_values(panel, "y", values)
    note = "" if track.is_identified else "not identified: it keeps its prior value"
    if not track.spots:
        note = "no width has an answer yet"
    panel.text(0.02, 0.03, note, transform=panel.transAxes, color=MUTED, fontsize=8)


def _draw_band(panel: Axes, track: Track) -> None:
    """Join the spots, and shade the prediction from the last measured one on."""
    measured = [spot for spot in track.spots if spot.is_measured]
    panel.plot(
        [s.width for s in measured], [s.value for s in measured], color=MUTED, lw=0.9, zorder=1
    )
    if not measured:
        return
    ahead = [s for s in track.spots if s.width >= measured[-1].width]
    panel.plot([s.width for s in ahead], [s.value for s in ahead], color=MUTED, lw=0.9, ls="--")
    bounds = [(s.width, *s.interval) for s in ahead if s.interval]
    if len(bounds) > 1:
        widths, lows, highs = zip(*bounds, strict=True)
        panel.fill_between(widths, lows, highs, color=ACCENT, alpha=0.15, lw=0)


def _describe_spot(track: Track, width: int, target: int) -> str:
    spot = next(s for s in track.spots if s.width == width)
    how = "measured" if spot.is_measured else "predicted"
    name = "target width" if width == target else "width"
    sure = f", 90 % in {spot.interval[0]:.3g} to {spot.interval[1]:.3g}" if spot.interval else ""
    return f"{name} {width}, {how}: {track.axis} {spot.value:.4g}{sure}"


def draw_excess(
    panel: Axes, portrait: Portrait, axis: str, widths: Sequence[WidthPortrait]
) -> None:
    """Draw some widths' excess along one axis: trials, the fit's lower edge, the chosen point.

    The panel ends where the bottom of the valley is still seen well; trials above it are triangles
    at the top. Trials that are off along another axis too are faint.
    """
    ceiling = portrait.ceilings[axis]
    for width in widths:
        colour, marker = width_look(portrait, width.width)
        if curve := width.curves.get(axis):
            panel.plot(curve.values, curve.excess, color=colour, lw=1.4)
        _draw_dots(panel, portrait, axis, width, ceiling)
        if width.chosen:
            _draw_choice(panel, portrait, axis, width)
        panel.plot([], [], color=colour, marker=marker, label=str(width.width))
    if not any(d.excess is not None for w in widths for d in w.dots):
        words = "no trial has a loss"
        panel.text(0.5, 0.5, words, transform=panel.transAxes, ha="center", color=MUTED)
    low = min([0.0, *(d.excess for w in widths for d in w.dots if d.excess is not None)])
    panel.set_ylim(max(low, -ceiling) - 0.07 * ceiling, 1.06 * ceiling)
    panel.set_title(
        f"{label_of(axis)}: excess loss"
        + (f", width {widths[0].width}" if len(widths) == 1 else " per width"),
        loc="left",
    )
    panel.set_ylabel(f"excess loss{' (%)' if portrait.is_share else ''}")
    panel.set_xlabel(f"{label_of(axis)} (base-width units)")
    panel.grid()
    values = [d.point[axis] for w in portrait.widths for d in w.dots]
    curves = [v for w in portrait.widths for c in [w.curves.get(axis)] if c for v in c.values]
    _scale_values(panel, "x", values + curves)


def _draw_dots(
    panel: Axes, portrait: Portrait, axis: str, width: WidthPortrait, ceiling: float
) -> None:
    """Draw the trials of one width; those above the panel at its top, diverged ones as crosses."""
    colour, marker = width_look(portrait, width.width)
    measured = [(dot, dot.excess) for dot in width.dots if dot.excess is not None]
    inside = [(dot, excess) for dot, excess in measured if excess <= ceiling]
    is_near = {id(dot): set(dot.far) <= {axis} for dot, _ in measured}
    groups: list[tuple[list[tuple[Dot, float]], str, float]] = [
        ([d for d in inside if is_near[id(d[0])]], marker, 0.9),
        ([d for d in inside if not is_near[id(d[0])]], marker, 0.35),
        ([(dot, 1.02 * ceiling) for dot, excess in measured if excess > ceiling], "^", 0.6),
        ([(d, 1.02 * ceiling) for d in width.dots if d.status is Status.DIVERGED], "x", 1.0),
    ]
    for dots, shape, alpha in groups:
        if not dots:
            continue
        (line,) = panel.plot(
            [dot.point[axis] for dot, _ in dots],
            [height for _, height in dots],
            *(shape,),
            color=colour,
            alpha=alpha,
            ms=4.5,
            mew=1.2 if shape == "x" else 0,
            clip_on=False,
        )
        entitle(line, [_describe_dot(portrait, width, dot) for dot, _ in dots])


def _describe_dot(portrait: Portrait, width: WidthPortrait, dot: Dot) -> str:
    excess = "" if dot.excess is None else f" ({portrait.describe_excess(dot.excess)})"
    return f"width {width.width}: {dot}{excess}"


def _draw_choice(panel: Axes, portrait: Portrait, axis: str, width: WidthPortrait) -> None:
    """Draw the chosen point of one width, on the bar of its 90 % interval."""
    assert width.chosen
    colour, _ = width_look(portrait, width.width)
    track = next(t for t in portrait.tracks if t.axis == axis)
    for spot in track.spots:
        if spot.width == width.width and spot.interval:
            height = [width.chosen_excess] * 2
            panel.plot(spot.interval, height, color=colour, lw=5, alpha=0.3, solid_capstyle="butt")
    place = min(width.chosen_excess, portrait.ceilings[axis])
    (star,) = panel.plot(
        [width.chosen[axis]],
        [place],
        "*",
        color=colour,
        ms=12,
        mec=PAPER,
        mew=0.7,
        zorder=4,
    )
    entitle(star, [f"width {width.width}: chosen {width.chosen}"])


def draw_contours(panel: Axes, portrait: Portrait, contours: Contours) -> None:
    """Draw the fitted excess over two axes, with the trials of that width on it."""
    heights = [[max(0.0, cell) for cell in row] for row in contours.excess]
    highest = max((cell for row in heights for cell in row if math.isfinite(cell)), default=0.0)
    finest = 1.0 if portrait.is_share else 10 ** math.floor(math.log10(highest or 1.0)) / 10
    levels = [level * finest for level in LEVELS if level * finest < highest]
    if levels:
        grid = (contours.across_values, contours.up_values, heights)
        lines = panel.contour(
            *grid, levels=levels, colors=ACCENT, linewidths=[0.7, *[1.0] * (len(levels) - 1)]
        )
        form = "{:g} %" if portrait.is_share else "{:g}"
        panel.clabel(lines, fmt=form.format, fontsize=7.5, colors=INK)
    width = next(w for w in portrait.widths if w.width == contours.width)
    for status, marker in ((Status.COMPLETE, "o"), (Status.DIVERGED, "x")):
        dots = [dot for dot in width.dots if dot.status is status]
        if dots:
            (line,) = panel.plot(
                [dot.point[contours.across] for dot in dots],
                [dot.point[contours.up] for dot in dots],
                marker,
                color=width_look(portrait, width.width)[0],
                ms=5,
                mew=1.2 if marker == "x" else 0,
            )
            entitle(line, [_describe_dot(portrait, width, dot) for dot in dots])
    if width.chosen:
        at = [[width.chosen[contours.across]], [width.chosen[contours.up]]]
        (star,) = panel.plot(*at, "*", color=INK, ms=12, mec=PAPER, mew=0.7, zorder=4)
        entitle(star, [f"width {width.width}: chosen {width.chosen}"])
    panel.set_title(f"fitted excess loss at width {contours.width}", loc="left")
    panel.set_xlabel(f"{label_of(contours.across)} (base-width units)")
    panel.set_ylabel(f"{label_of(contours.up)} (base-width units)")
    for which, axis, values in (
        ("x", contours.across, contours.across_values),
        ("y", contours.up, contours.up_values),
    ):
        _scale_values(panel, which, [*values, *(dot.point[axis] for dot in width.dots)])


Curves = Mapping[Trial, Sequence[CurvePoint]]


def draw_training(panel: Axes, portrait: Portrait, width: WidthPortrait, curves: Curves) -> None:
    """Draw the training losses of one width's trials, the best in full colour, cut at the top."""
    colour, _ = width_look(portrait, width.width)
    ranked = ranked_trials(width, curves)
    lowest, highest = math.inf, -math.inf
    for number, (dot, trial) in reversed(list(enumerate(ranked[:CURVES_SHOWN]))):
        rows = [(r.step, r.train_loss) for r in curves[trial] if r.train_loss is not None]
        rows = [(step, loss) for step, loss in rows if math.isfinite(loss)]
        if not rows:
            continue
        bad, best = dot.status is Status.DIVERGED, number == 0
        steps, losses = zip(*rows, strict=True)
        (line,) = panel.plot(
            steps,
            losses,
            color=BAD if bad else colour,
            lw=1.6 if best else 0.7,
            alpha=1.0 if best else 0.4,
            ls="--" if bad else "-",
        )
        line.set_gid(f"{HOVER}{_describe_dot(portrait, width, dot)}")
        lowest = min(lowest, *losses) if not bad or not math.isfinite(lowest) else lowest
        if best:
            early = [loss for step, loss in rows if step >= 0.1 * steps[-1]]
            highest = max(early)
    for dot, trial in ranked[:1]:
        ends = [(r.step, r.held_out_loss) for r in curves[trial] if r.held_out_loss is not None]
        if ends:
            (line,) = panel.plot(*zip(*ends, strict=True), "o", color=INK, ms=4, clip_on=False)
            entitle(line, [f"held out at step {s}: {loss:.4f}; {dot}" for s, loss in ends])
            lowest, highest = (
                min([lowest, *(e for _, e in ends)]),
                max([highest, *(e for _, e in ends)]),
            )
    if math.isfinite(lowest) and highest > lowest:
        room = 0.08 * (highest - lowest)
        panel.set_ylim(lowest - room, highest + 3 * room)
    panel.set_title(f"width {width.width}: training loss", loc="left")
    panel.set_xlabel("step")
    panel.set_ylabel("loss")
    panel.grid()


def ranked_trials(width: WidthPortrait, curves: Curves) -> list[tuple[Dot, Trial]]:
    """The trials of a width that have a curve, the lowest loss first, the diverged last."""
    found = [(dot, Trial(width.width, dot.point, dot.seed)) for dot in width.dots]
    found = [(dot, trial) for dot, trial in found if curves.get(trial)]
    is_lost = {True: 1, False: 0}
    return sorted(
        found,
        key=lambda pair: (
            is_lost[pair[0].loss is None or pair[0].status is not Status.COMPLETE],
            0.0 if pair[0].loss is None else pair[0].loss,
            pair[0].point.axes,
            pair[0].seed,
        ),
    )


def draw_cost(
    panel: Axes,
    portrait: Portrait,
    spent: Mapping[int, float],
    planned: Mapping[str, float] | None,
    limit: float,
) -> None:
    """Draw what each width cost beside what was planned, in target runs.

    Args:
        panel: where to.
        portrait: for the widths' colours.
        spent: width → target runs.
        planned: best, expected and worst, where there is a plan.
        limit: the budget, drawn where it is near.
    """
    left = 0.0
    for width, cost in spent.items():
        (bar,) = panel.barh([1.0], [cost], left=left, color=width_look(portrait, width)[0])
        bar.set_gid(f"{HOVER}width {width}: {cost:.3g} target runs")
        left += cost
    panel.text(left, 1.0, f" {left:.2f}", va="center")
    if planned:
        best, expected, worst = (planned[key] for key in ("best", "expected", "worst"))
        if worst > best:
            (bar,) = panel.barh(
                [0.0], [worst - best], left=best, height=0.35, color=ACCENT, alpha=0.25
            )
            bar.set_gid(f"{HOVER}planned: {best:.2f} at best, {worst:.2f} at worst")
        (mark,) = panel.plot([expected], [0.0], "D", color=ACCENT, ms=6, clip_on=False)
        entitle(mark, [f"planned: {expected:.2f} expected"])
    highest = max([left, *(planned or {}).values()]) or limit
    if limit <= FAR_BUDGET * highest:
        panel.axvline(limit, color=MUTED, lw=0.9, ls="--")
        panel.text(limit, 1.62, "budget ", ha="right", va="top", color=MUTED, fontsize=8)
        highest = max(highest, limit)
    panel.set_yticks([1.0, 0.0], ["spent", "planned"] if planned else ["spent", ""])
    panel.set_ylim(-0.6, 1.65)
    panel.set_xlim(0, 1.12 * highest)
    panel.set_xlabel("target runs")


def draw_laws(panel: Axes, found: Mapping[str, Any]) -> None:
    """Draw the loss of every size against its compute, and each optimizer's law.

    Args:
        panel: where to.
        found: an answer of `telescope scaling`.
    """
    laws = found["laws"]["separate"]
    for number, name in enumerate(found["laws"]["optimizers"]):
        sizes = [size for size in found["sizes"] if size["seeds"]]
        flops = [size["flops"][name] for size in sizes]
        losses = [[size["runs"][name]["losses"][str(s)] for s in size["seeds"]] for size in sizes]
        means = [math.exp(fmean(map(math.log, row))) for row in losses]
        law = Law(
            laws["constant"]["value"],
            laws["factor"][name]["value"],
            laws["exponent"][name]["value"],
        )
        colour, ends = WIDTH_COLOURS[number], (min(flops), max(flops))
        line = np.geomspace(*ends, 60)
        panel.plot(line, law.loss(line / PFLOPS_DAY), color=colour, lw=1.4)
        each = [(x, y) for x, row in zip(flops, losses, strict=True) for y in row]
        panel.plot(*zip(*each, strict=True), MARKERS[number], color=colour, ms=3, alpha=0.45)
        title = OPTIMIZERS[name]
        (dots,) = panel.plot(flops, means, MARKERS[number], color=colour, ms=6, label=title)
        entitle(
            dots,
            [
                f"{title}, width {size['width']}: loss {loss:.4f} at {x:.3g} FLOPs"
                for size, loss, x in zip(sizes, means, flops, strict=True)
            ],
        )
    panel.set_xscale("log")
    panel.set_xlabel("FLOPs of a run, optimizer included")
    panel.set_ylabel("held-out loss")
    panel.legend()
    panel.grid(visible=True)


def write_laws_figure(path: Path, found: Mapping[str, Any]) -> None:
    """Write the laws' figure as a PNG, whole or not at all."""
    write_png(path, laws_figure(found))


@styled
def laws_figure(found: Mapping[str, Any]) -> Figure:
    """Draw the laws of `telescope scaling`, under its answer."""
    figure = Figure(figsize=(6.4, 4.4), layout="constrained", facecolor="white")
    panel = figure.subplots()
    draw_laws(panel, found)
    panel.set_title(textwrap.fill(found["sentence"], 78), loc="left", fontsize=9)
    return figure


CHECK_PANELS = {
    Kind.OUTPUT: "inputs, outputs, gradients, starts",
    Kind.CHANGE: "changes since initialisation",
    Kind.UPDATE: "updates",
}
"""Kind of quantity → the title of its panel; the first panel has the other kinds too."""
NAMED = 3
"""Lines of a panel of the report that are named in it, those that fail and the steepest first."""
CHECK_LOOKS = [
    (colour, dash, marker)
    for dash, marker in (("-", "o"), ("--", "s"), (":", "D"), ("-.", "v"))
    for colour in WIDTH_COLOURS
]
"""Colour, dash and marker: as many as a panel may have lines, no two alike."""


@styled
def check_figure(check: CoordCheck, title: str) -> Figure:
    """Draw each size against the width, as a multiple of the base width's.

    After the step that its slope is from, as in the table. A right model's lines lie flat, inside
    the wedge of slopes that pass; those outside are thick.
    """
    figure = Figure(figsize=(12.5, 6.4), layout="constrained", facecolor="white")
    figure.suptitle(f"{title}: coordinate check {check.verdict}", fontsize=11)
    for kind, panel in zip(CHECK_PANELS, figure.subplots(1, 3, sharey=True), strict=True):
        draw_check(panel, check, kind)
        panel.set_ylabel("")
        # Below: a dozen names would cover the lines.
        panel.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)
    figure.axes[0].set_ylabel("size after the step of its slope, over that of the base width")
    return figure


def draw_check(panel: Axes, check: CoordCheck, kind: Kind) -> None:
    """Draw one kind of quantity of the coordinate check; see `CHECK_PANELS`."""
    looks = iter(CHECK_LOOKS * (1 + len(check.slopes) // len(CHECK_LOOKS)))
    wedge = [(width / check.widths[0]) ** check.threshold for width in check.widths]
    panel.fill_between(
        check.widths, [1 / edge for edge in wedge], wedge, color=GRID, alpha=0.6, label="passes"
    )
    highest = wedge[-1]
    for name in of_kind(check, kind):
        sizes = check.sizes[name][check.slope_steps[name]]
        if all(math.isfinite(size) and size > 0 for size in sizes):
            relative = [size / sizes[0] for size in sizes]
            highest = max(highest, *relative, *(1 / size for size in relative))
            colour, dash, marker = next(looks)
            (line,) = panel.plot(
                check.widths,
                relative,
                color=colour,
                ls=dash,
                marker=marker,
                ms=3.5,
                label=name,
                lw=2.4 if name in check.problems else 1.0,
            )
            slope = check.slopes[name] or 0.0
            titles = zip(check.widths, sizes, strict=True)
            entitle(
                line, [f"{name}: {size:.3g} at width {w}, slope {slope:+.2f}" for w, size in titles]
            )
    _scale_widths(panel, check.widths)
    _scale_values(panel, "y", [1 / highest, highest])
    panel.set_title(CHECK_PANELS[kind], loc="left")
    panel.set_ylabel("size, over the base width's")
    panel.grid()
    named = sorted(
        (line for line in panel.get_lines()),
        key=lambda line: (str(line.get_label()) not in check.problems, -_steepness(check, line)),
    )
    panel.legend(handles=named[:NAMED], fontsize=7.5, loc="upper left", labelspacing=0.2)


def _steepness(check: CoordCheck, line: Line2D) -> float:
    return abs(check.slopes[str(line.get_label())] or 0.0)


def of_kind(check: CoordCheck, kind: Kind) -> list[str]:
    """The quantities shown in one panel of the coordinate check."""
    panels = {n: k if (k := check.kinds[n]) in CHECK_PANELS else Kind.OUTPUT for n in check.shown()}
    return [name for name, panel in panels.items() if panel is kind]


def write_check_figure(path: Path, check: CoordCheck, title: str) -> None:
    """Write the coordinate check's figure as a PNG, whole or not at all."""
    write_png(path, check_figure(check, title))


@styled
def panel_figure(draw: Callable[..., None], *arguments: Any, size: tuple[float, float]) -> Figure:
    """Draw one panel on a figure of its own; size in inches."""
    # Fixed margins: to find the right ones would draw every figure twice.
    (width, height), (left, bottom, right, top) = size, MARGINS
    figure = Figure(figsize=size, facecolor="none")
    figure.subplots_adjust(left / width, bottom / height, 1 - right / width, 1 - top / height)
    draw(figure.subplots(), *arguments)
    return figure


def as_svg(draw: Callable[..., None], *arguments: Any, size: tuple[float, float] = PANEL) -> str:
    """One panel as an SVG file's text, the same for the same data."""
    figure = panel_figure(draw, *arguments, size=size)
    image = io.StringIO()
    plain = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "telescope"}):
        figure.savefig(image, format="svg", metadata=plain)
    return image.getvalue()


def _scale_widths(panel: Axes, widths: Iterable[int]) -> None:
    """A logarithmic axis of widths, each named unless they are many."""
    shown = sorted(set(widths))
    panel.set_xscale("log", base=2)
    every = math.ceil(len(shown) / 7)
    named = shown[::-1][::every][::-1]
    panel.xaxis.set_major_locator(FixedLocator(named))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.set_xlim(shown[0] / 2**0.3, shown[-1] * 2**0.3)
    panel.set_xlabel("width")


def _scale_values(panel: Axes, which: str, values: Sequence[float]) -> None:
    """A logarithmic axis of an axis' values, with plain numbers at it; any without values."""
    low, high = min(values, default=0.1), max(values, default=1.0)
    widen = max(1.0, math.sqrt(LEAST_SPAN / (high / low))) * (high / low) ** 0.04
    low, high = low / widen, high * widen
    axis = panel.xaxis if which == "x" else panel.yaxis
    (panel.set_xscale if which == "x" else panel.set_yscale)("log")
    (panel.set_xlim if which == "x" else panel.set_ylim)(low, high)
    axis.set_major_locator(FixedLocator(log_ticks(low, high)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: f"{value:g}")


def log_ticks(low: float, high: float) -> list[float]:
    """Return about three to six round numbers in a range.

    >>> log_ticks(0.004, 0.5), log_ticks(0.03, 0.06)
    ([0.01, 0.03, 0.1, 0.3], [0.03, 0.04, 0.05, 0.06])
    """
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for parts in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        ticks = [float(f"{part}e{decade}") for decade in decades for part in parts]
        inside = [tick for tick in ticks if low <= tick <= high]
        if len(inside) >= 3:
            every = math.ceil(len(inside) / 6)
            return inside[::every]
    found = MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    return [float(f"{tick:.6g}") for tick in found if low <= tick <= high]


def write_png(path: Path, figure: Figure) -> None:
    """Write a figure, whole or not at all."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=130)
    write_atomic(path, image.getvalue())
