"""The data of a ladder's figures, from its own fit: drawn elsewhere, decided nowhere.

Everything is a function of a state, as the certificate is, and of the same closed stages, so a
figure never shows another optimum than the certificate states. Excess is what a loss lies above the
fit's lowest at the same width. Policy `paper` fits nothing: its portrait has the trials and the
choices alone.
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
"""A loss below this share of its width's median excess is too near to 0 to be divided by."""
LEAST_LOSS = 1e-300
"""Smaller losses have no share that a float can hold."""
MOST_EXCESS = 1e290
"""So that no sum or multiple of an excess overflows."""
ROOM = 1.4
"""Height of a figure of excess, in multiples of what the fit has one lattice step off."""
LEAST_SHOWN = 2
"""Trials of a width that its figure shows at least, without being cut off."""


@dataclass(frozen=True)
class Spot:
    """The answer of one width along one axis, base-width units."""

    width: int
    value: float
    interval: tuple[float, float] | None
    """The range that holds the optimum with 90 %; None where there is none."""
    is_measured: bool
    """A loss of this width is in the fit; else it is predicted."""


@dataclass(frozen=True)
class Track:
    """One axis against the width."""

    axis: str
    spots: tuple[Spot, ...]
    """By width, the last of them the target."""
    is_identified: bool
    """False where the fit keeps the prior value, because the loss does not bend measurably."""


@dataclass(frozen=True)
class Dot:
    """One trial."""

    point: Point
    seed: int
    status: Status
    loss: float | None
    excess: float | None
    """Above the width's lowest; None where there is no loss."""
    far: tuple[str, ...]
    """The axes along which it lies more than a lattice step from the width's answer."""

    def __str__(self) -> str:
        """The trial in words, for people who point at it."""
        end = f"loss {self.loss:.4f}" if self.loss is not None else str(self.status)
        return f"{self.point}, seed {self.seed}: {end}"


@dataclass(frozen=True)
class Curve:
    """The lowest fitted excess at each value of an axis, whatever the other axes are."""

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
    """Of the chosen point, by the fit or as measured."""
    curves: Mapping[str, Curve]
    """Axis → the fit; empty where the width has none."""

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
    """All that a ladder's figures show."""

    axes: tuple[str, ...]
    """The swept ones."""
    target: int
    tracks: tuple[Track, ...]
    widths: tuple[WidthPortrait, ...]
    """Those with a result, narrow first."""
    contours: tuple[Contours, ...]
    """One per pair of swept axes; empty without a fit."""
    ceilings: Mapping[str, float]
    """Axis → the excess up to which a figure along it shows its bottom well."""
    is_share: bool
    """Excess is in per cent of the loss; else, where the loss is about 0, in its own unit."""
    unfitted: str
    """The reason for having no fit; "" where there is one."""

    @property
    def is_fitted(self) -> bool:
        """Tell whether the numbers come from a fit."""
        return not self.unfitted

    def describe_excess(self, excess: float) -> str:
        """An excess in words.

        >>> Portrait((), 8, (), (), (), {}, True, "").describe_excess(0.123)
        '+0.12 %'
        """
        return f"{excess:+.2g} %" if self.is_share else f"{excess:+.3g}"


def portrait(state: State, target: int) -> Portrait:
    """Read off the fit what the figures show.

    Args:
        state: the ladder, at any time.
        target: the width to predict.

    Returns:
        Losses of the whole state, and the fit of its closed stages, as the certificate's is.
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
        """The excess of a loss; of one that is too large for a number the largest drawn."""
        return min(max((loss - self.lowest) * self.scale, -MOST_EXCESS), MOST_EXCESS)


@dataclass(frozen=True)
class _Fit:
    """A view, whose losses are in units of their own, as nats."""

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
        """Nats: the lowest expected loss of a width."""
        return float(self.losses(width, self.surface.optimum(width).place[None])[0])

    def box(self) -> tuple[Array, Array]:
        """(low, high), each (k,) octaves, in which the fit is believed."""
        return self.surface.support()


def _unfitted(closed: State) -> str:
    """The reason for which closed stages have no fit."""
    if not closed.spec.swept:
        return "no axis is swept: there is nothing to fit"
    if closed.spec.policy == "paper":
        return "policy paper fits nothing: it takes the lowest point of each grid"
    return "" if closed.choices else "no stage has closed yet: nothing is fitted"


def _by_width(state: State) -> dict[int, list[Result]]:
    """The results of each width that has one, narrow first."""
    found: dict[int, list[Result]] = {}
    for result in sorted(state.evidence, key=lambda r: r.trial.width):
        found.setdefault(result.trial.width, []).append(result)
    return found


def _lowest(
    fit: _Fit | None, width: int, results: Sequence[Result], choice: Choice | None
) -> float:
    """The loss that a width's excess is counted from: the fit's lowest, the choice's, or any."""
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
    """The portrait of one width."""
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
    """One result; a loss beyond the wall is to the figures the divergence that it is to the fit."""
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
    """Octaves within which a trial lies near: a step of the lattice, its rounding aside."""
    return octaves(axis)[0] * 1.01


def _curve(fit: _Fit, width: int, number: int, above: _Excess) -> Curve:
    """The lower edge of the fit of one width, as one axis sees it."""
    low, high = fit.box()
    count = GRID.get(len(low), 5)
    along = np.linspace(low[number], high[number], CURVE_POINTS)
    # The answer's own place on each axis: a grid alone would miss the bottom of the valley.
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
    """One axis against the width."""
    if fit is None:  # the choices, the last of which is taken to hold at the target
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
    """Slices of the widest fitted width's surface through its optimum, one per pair of axes."""
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
    """The excess up to which the bottom along an axis is seen well.

    What the fit has one lattice step off the bottom, the noise three times and a few trials of each
    width fit below it.
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
