"""The data of a ladder's figures, from its own fit; `report.figures` draws them.

Like the certificate, everything is a function of a state and of its closed stages, so a figure
never shows another optimum than the certificate states. The excess of a loss is its height above
the fit's lowest loss at the same width. Policy `paper` fits nothing: its portrait has only the
trials and the choices.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

import numpy as np

from telescope.ladder.fit.model import Array
from telescope.ladder.fit.optimum import GRID
from telescope.ladder.fit.surface import Surface
from telescope.ladder.observe import highest_loss, unit_of
from telescope.ladder.state import State
from telescope.ladder.view import View
from telescope.ladder.window import octaves, place_of
from telescope.records import Axis, Choice, Point, Result, Status

CURVE_POINTS = 61
CONTOUR_POINTS = 41
NEAR_ZERO = 0.05
"""Share of a width's median excess below which a loss is too near to 0 to divide by it."""
LEAST_LOSS = 1e-300
"""Loss below which a share of it may overflow a float."""
MOST_EXCESS = 1e290
"""Largest excess kept, so that no sum or multiple of it overflows."""
ROOM = 1.4
"""Height of a figure, in multiples of the highest excess that it has to show; see `_ceiling`."""
LEAST_SHOWN = 2
"""Least number of a width's trials that fit into its figure."""


@dataclass(frozen=True)
class Spot:
    """The answer of one width along one axis, base-width units."""

    width: int
    value: float
    interval: tuple[float, float] | None
    """The range that holds the optimum with 90 % probability; None without a fit, or for an
    unidentified axis."""
    is_measured: bool
    """True if a loss of this width is in the fit; else the answer is predicted."""


@dataclass(frozen=True)
class Track:
    """The answers of one axis over the widths."""

    axis: str
    spots: tuple[Spot, ...]
    """By width; the last one is the target."""
    is_identified: bool
    """False where the fit keeps the prior value because the loss has no measurable curvature."""


@dataclass(frozen=True)
class Dot:
    """One trial."""

    point: Point
    seed: int
    status: Status
    loss: float | None
    excess: float | None
    """Excess over the width's lowest loss; None without a loss."""
    far: tuple[str, ...]
    """The axes along which it lies more than a lattice step from the width's answer."""

    def __str__(self) -> str:
        """Describe the trial, for people who point at it."""
        end = f"loss {self.loss:.4f}" if self.loss is not None else str(self.status)
        return f"{self.point}, seed {self.seed}: {end}"


@dataclass(frozen=True)
class Curve:
    """The lowest fitted excess at each value of an axis, over all values of the other axes."""

    values: tuple[float, ...]
    excess: tuple[float, ...]


@dataclass(frozen=True)
class WidthPortrait:
    """One width that was measured."""

    width: int
    lowest: float
    """The loss that excess is counted from."""
    scale: float
    """Units of excess per nat."""
    dots: tuple[Dot, ...]
    chosen: Point | None
    """None while the stage is open, and for results of a width without a stage."""
    chosen_excess: float
    """Excess of the chosen point by the fit; 0 without a fit."""
    curves: Mapping[str, Curve]
    """Axis → its fitted curve; empty where the width has no fit."""

    @property
    def is_fitted(self) -> bool:
        """Tell whether there is a fit at this width."""
        return bool(self.curves)


@dataclass(frozen=True)
class Contours:
    """The fitted excess over two axes at the widest width, the others at its optimum."""

    across: str
    up: str
    width: int
    across_values: tuple[float, ...]
    up_values: tuple[float, ...]
    excess: tuple[tuple[float, ...], ...]
    """[up][across]; NaN beyond a wall of divergence."""


@dataclass(frozen=True)
class Portrait:
    """Everything that a ladder's figures show."""

    axes: tuple[str, ...]
    """Names of the swept axes."""
    target: int
    tracks: tuple[Track, ...]
    widths: tuple[WidthPortrait, ...]
    """The widths with a result, narrow first."""
    contours: tuple[Contours, ...]
    """One per pair of swept axes; empty without a fit."""
    ceilings: Mapping[str, float]
    """Axis → the height of a figure along it that shows the bottom of the valley well."""
    is_share: bool
    """True: excess is in per cent of the loss. False, for losses near 0: in the loss's own unit."""
    unfitted: str
    """The reason that there is no fit; "" where there is one."""

    @property
    def is_fitted(self) -> bool:
        """Tell whether the numbers come from a fit."""
        return not self.unfitted

    def describe_excess(self, excess: float) -> str:
        """Format an excess with its unit.

        >>> Portrait((), 8, (), (), (), {}, True, "").describe_excess(0.123)
        '+0.12 %'
        """
        return f"{excess:+.2g} %" if self.is_share else f"{excess:+.3g}"


def portrait(state: State, target: int) -> Portrait:
    """Compute the data of a ladder's figures.

    Args:
        state: the ladder, at any time.
        target: the width to predict.

    Returns:
        The losses of the whole state, and the fit of its closed stages, as in the certificate.
    """
    closed = replace(state, stages=state.stages[: len(state.choices)])
    unfitted = _unfitted(closed)
    fit = None if unfitted else _Fit(View(closed, target), unit_of(closed))
    measured = _by_width(state)
    choices = {choice.width: choice for choice in state.choices}
    lowest = {
        width: _lowest(fit, width, results, choices.get(width))
        for width, results in measured.items()
    }
    is_share = all(_is_share(lowest[width], results) for width, results in measured.items())
    scale = {width: 100 / abs(loss) if is_share else 1.0 for width, loss in lowest.items()}
    widths = tuple(
        _width(state, fit, results, choices.get(width), _Excess(lowest[width], scale[width]))
        for width, results in measured.items()
    )
    return Portrait(
        axes=tuple(axis.name for axis in state.spec.swept),
        target=target,
        tracks=tuple(_track(state, fit, axis, target) for axis in state.spec.swept),
        widths=widths,
        contours=tuple(_contours(fit, widths)) if fit else (),
        ceilings={axis.name: _ceiling(fit, widths, axis) for axis in state.spec.swept},
        is_share=is_share,
        unfitted=unfitted,
    )


@dataclass(frozen=True)
class _Excess:
    """The excess of one width's losses over its lowest, in the figures' unit."""

    lowest: float
    scale: float
    """Figures' units per nat."""

    def __call__(self, loss: float) -> float:
        """Return the excess of a loss, at most `MOST_EXCESS`."""
        return min(max((loss - self.lowest) * self.scale, -MOST_EXCESS), MOST_EXCESS)


@dataclass(frozen=True)
class _Fit:
    """A view with its losses converted to nats."""

    view: View
    unit: float
    """Nats per unit."""

    @property
    def surface(self) -> Surface:
        """The fitted surface."""
        return self.view.surface

    def has(self, width: int) -> bool:
        """Tell whether a loss of this width is in the fit."""
        return width in self.surface.data.seen

    def losses(self, width: int, places: Array) -> Array:
        """(n,) nats: the expected losses at places (n, k)."""
        losses: Array = self.unit * self.surface.losses_at(width, places)
        return losses

    def lowest(self, width: int) -> float:
        """Return the lowest expected loss of a width, nats."""
        return float(self.losses(width, self.surface.optimum(width).place[None])[0])

    def box(self) -> tuple[Array, Array]:
        """Return the box in which the fit is believed: (low, high), each (k,) octaves."""
        return self.surface.support()


def _unfitted(closed: State) -> str:
    """Say why the closed stages have no fit; "" where they have one."""
    if not closed.spec.swept:
        return "no axis is swept: there is nothing to fit"
    if closed.spec.policy == "paper":
        return "policy paper fits nothing: it takes the lowest point of each grid"
    return "" if closed.choices else "no stage has closed yet: nothing is fitted"


def _by_width(state: State) -> dict[int, list[Result]]:
    """Group the results by width, narrow first."""
    found: dict[int, list[Result]] = {}
    for result in sorted(state.evidence, key=lambda r: r.trial.width):
        found.setdefault(result.trial.width, []).append(result)
    return found


def _lowest(
    fit: _Fit | None, width: int, results: Sequence[Result], choice: Choice | None
) -> float:
    """Return the loss that a width's excess is counted from.

    It is the fit's lowest loss; without a fit, the choice's; without a choice, the lowest measured.
    """
    if fit and fit.has(width):
        return fit.lowest(width)
    losses = [r.loss for r in results if r.loss is not None]
    return choice.loss if choice else min(losses, default=1.0)


def _is_share(lowest: float, results: Sequence[Result]) -> bool:
    """Tell whether losses lie far enough from 0 to be divided by the lowest."""
    losses = [r.loss for r in results if r.loss is not None]
    spread = median(losses) - lowest if losses else 0.0
    nearest = min([abs(lowest), *(abs(loss) for loss in losses if loss <= median(losses))])
    return nearest > max(NEAR_ZERO * spread, LEAST_LOSS)


def _width(
    state: State,
    fit: _Fit | None,
    results: Sequence[Result],
    choice: Choice | None,
    above: _Excess,
) -> WidthPortrait:
    """Draw up the portrait of one width."""
    width = results[0].trial.width
    mine = fit if fit and fit.has(width) else None
    chosen, chosen_excess = choice.point if choice else None, 0.0
    if mine and chosen:
        at = mine.losses(width, place_of(state.spec, chosen)[None])[0]
        chosen_excess = max(0.0, above(float(at)))
    centre = chosen or (mine.view.point(width) if mine else None)
    wall = highest_loss(state)
    return WidthPortrait(
        width=width,
        lowest=above.lowest,
        scale=above.scale,
        dots=tuple(_dot(state, result, centre, above, wall) for result in results),
        chosen=chosen,
        chosen_excess=chosen_excess,
        curves={
            axis.name: _curve(mine, width, number, above)
            for number, axis in enumerate(state.spec.swept)
            if mine
        },
    )


def _dot(state: State, result: Result, centre: Point | None, above: _Excess, wall: float) -> Dot:
    """Turn a result into a dot; a loss beyond the wall counts as diverged, as in the fit."""
    loss, point = result.loss, result.trial.point
    far = tuple(
        axis.name
        for axis in state.spec.swept
        if centre and abs(math.log2(point[axis.name] / centre[axis.name])) > _near(axis)
    )
    if loss is not None and loss > wall:
        return Dot(point, result.trial.seed, Status.DIVERGED, loss, None, far)
    excess = None if loss is None else above(loss)
    return Dot(point, result.trial.seed, result.status, loss, excess, far)


def _near(axis: Axis) -> float:
    """Return the octaves within which a trial is near: a lattice step, with room for rounding."""
    return octaves(axis)[0] * 1.01


def _curve(fit: _Fit, width: int, number: int, above: _Excess) -> Curve:
    """Return the lowest fitted excess of one width at each value of one axis."""
    low, high = fit.box()
    count = GRID.get(len(low), 5)
    along = np.linspace(low[number], high[number], CURVE_POINTS)
    # The grid has the answer's own place too; without it, it would miss the valley's bottom.
    best = fit.surface.optimum(width).place
    others = [
        along if axis == number else np.union1d(np.linspace(a, b, count), best[axis])
        for axis, (a, b) in enumerate(zip(low, high, strict=True))
    ]
    places = np.stack([axis.ravel() for axis in np.meshgrid(*others, indexing="ij")], axis=1)
    losses = np.where(fit.surface.is_walled(places), np.inf, fit.losses(width, places))
    sizes = [len(values) for values in others]
    edge = np.moveaxis(losses.reshape(sizes), number, 0).reshape(CURVE_POINTS, -1).min(axis=1)
    seen = np.isfinite(edge)
    return Curve(
        tuple(float(2**at) for at in along[seen]), tuple(above(float(e)) for e in edge[seen])
    )


def _track(state: State, fit: _Fit | None, axis: Axis, target: int) -> Track:
    """Collect the answers of one axis over the widths."""
    if fit is None:  # the choices; the last one is assumed to hold at the target
        spots = [Spot(c.width, c.point[axis.name], None, True) for c in state.choices]
        if spots and target > spots[-1].width:
            spots.append(Spot(target, spots[-1].value, None, False))
        return Track(axis.name, tuple(spots), is_identified=True)
    view = fit.view
    return Track(
        axis.name,
        tuple(
            Spot(
                width,
                view.point(width)[axis.name],
                view.intervals(width)[axis.name],
                fit.has(width),
            )
            for width in sorted(fit.surface.frame.widths)
        ),
        is_identified=axis.name not in view.unidentified,
    )


def _contours(fit: _Fit, widths: Sequence[WidthPortrait]) -> Iterator[Contours]:
    """Yield slices through the optimum of the widest fitted width, one per pair of axes."""
    widest = max((w for w in widths if w.is_fitted), key=lambda w: w.width)
    swept, surface = fit.view.spec.swept, fit.surface
    (low, high), best = fit.box(), surface.optimum(widest.width).place
    values = [np.linspace(a, b, CONTOUR_POINTS) for a, b in zip(low, high, strict=True)]
    for across, up in itertools.combinations(range(len(swept)), 2):
        places = np.tile(best, (CONTOUR_POINTS**2, 1))
        places[:, across] = np.tile(values[across], CONTOUR_POINTS)
        places[:, up] = np.repeat(values[up], CONTOUR_POINTS)
        losses = np.where(surface.is_walled(places), np.nan, fit.losses(widest.width, places))
        excess = ((losses - widest.lowest) * widest.scale).reshape(CONTOUR_POINTS, CONTOUR_POINTS)
        yield Contours(
            across=swept[across].name,
            up=swept[up].name,
            width=widest.width,
            across_values=tuple(map(float, 2 ** values[across])),
            up_values=tuple(map(float, 2 ** values[up])),
            excess=tuple(tuple(map(float, row)) for row in excess),
        )


def _ceiling(fit: _Fit | None, widths: Sequence[WidthPortrait], axis: Axis) -> float:
    """Return the height of a figure along an axis that shows the bottom of the valley well.

    Below it lie, for each width: the fitted curve within one lattice step of its bottom, three
    times the noise, and the best trials.
    """
    step, heights = octaves(axis)[0], [0.0]
    for width in widths:
        found = sorted(dot.excess for dot in width.dots if dot.excess is not None)
        if found:
            at_least = LEAST_SHOWN if fit else len(found) / 2
            heights.append(found[min(len(found), math.ceil(at_least)) - 1])
        if curve := width.curves.get(axis.name):
            bottom = int(np.argmin(curve.excess))
            heights += [
                excess
                for value, excess in zip(curve.values, curve.excess, strict=True)
                if abs(math.log2(value / curve.values[bottom])) <= step
            ]
        if fit and width.is_fitted:
            heights.append(3 * fit.surface.noise * fit.unit * width.scale)
    return ROOM * max(heights) or 1.0
