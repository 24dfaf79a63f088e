"""The quantities that the adaptive policy decides by, from the fit of all results so far."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from telescope.ladder.fit.acquisition import Candidates, pick
from telescope.ladder.fit.laws import LAWS
from telescope.ladder.fit.model import Array
from telescope.ladder.fit.optimum import Optimum
from telescope.ladder.fit.surface import Surface
from telescope.ladder.observe import frame_of, observe
from telescope.ladder.state import State
from telescope.ladder.thresholds import (
    AT_BORDER,
    CHECKED_ODDS,
    DRAWN_AHEAD,
    KEPT_WITHIN,
    LEAST_BENDS,
    MOST_FOR_KEEPING,
    MOST_TRIALS,
    RULED_OUT,
    SURE,
    UNIDENTIFIED,
)
from telescope.ladder.window import Grid, cells, middle, octaves, place_of, point_at
from telescope.records import LadderSpec, Point, Stage


def round_size(spec: LadderSpec) -> int:
    """Return the points per round: the spec's, else the swept axes plus 2, at least 4."""
    return spec.round or max(4, len(spec.swept) + 2)


@dataclass(frozen=True)
class PickedPoint:
    """A point worth a trial."""

    width: int
    point: Point
    gain: float
    """Expected fall of the predicted excess loss at the target, as a share of the loss."""


@dataclass(frozen=True)
class View:
    """A state with its fit; everything is computed once, when first asked for."""

    state: State
    target: int
    """The width to predict."""

    @cached_property
    def surface(self) -> Surface:
        """The fit."""
        return Surface(frame_of(self.state, self.target), observe(self.state))

    @property
    def spec(self) -> LadderSpec:
        """The ladder's spec."""
        return self.state.spec

    @property
    def stage(self) -> Stage:
        """The last stage opened."""
        return self.state.stages[-1]

    @cached_property
    def loss(self) -> float:
        """Lowest loss measured at the widest width that has one; its absolute value, never 0."""
        data = self.surface.data
        return max(abs(float(data.losses[data.widths == data.seen[-1]].min())), 1e-12)

    @cached_property
    def held(self) -> dict[int, float]:
        """Unidentified axis → the octaves that it keeps: the last choice's value, or the middle.

        An axis is unidentified if its curvature cannot be measured or its interval is long, and
        keeping its value costs little.
        """
        width, free = self.stage.width, self.surface.optimum(self.stage.width)
        prior = self.state.choices[-1].point if self.state.choices else None
        held: dict[int, float] = {}
        for number, axis in enumerate(self.spec.swept):
            low, high = free.interval(number)
            is_long = high - low > UNIDENTIFIED * octaves(axis)[1]
            is_flat = self.surface.bends[number] < LEAST_BENDS and not self._falls(free, number)
            if is_long or is_flat:
                keeps = {number: math.log2(prior[axis.name] if prior else middle(axis))}
                costs = self.surface.optimum(width, held=held | keeps).excess - free.excess
                most = min(MOST_FOR_KEEPING * self.tolerance * self.loss, KEPT_WITHIN * costs.std())
                if costs.mean() <= most:
                    held |= keeps
        return held

    def _falls(self, free: Optimum, number: int) -> bool:
        """Tell whether the loss surely falls along an axis towards a measured border."""
        low, high = free.interval(number)
        first, last = (float(side[number]) for side in self.surface.support())
        step = float(self.surface.frame.step[number])
        return high < first + step or low > last - step

    def optimum(self, width: int) -> Optimum:
        """Return the answer at a width; unidentified axes keep their prior value."""
        return self.surface.optimum(width, held=self.held)

    def excess(self, width: int) -> float:
        """Return the expected excess loss of the answer at a width, as a share of the loss."""
        return float(self.optimum(width).excess.mean()) / self.loss

    def bound(self, width: int) -> float:
        """Return the 90 % bound on the answer's excess loss at a width, as a share of the loss."""
        return float(np.percentile(self.optimum(width).excess, 100 * SURE)) / self.loss

    @property
    def noise(self) -> float:
        """Standard deviation between seeds, as a share of the loss."""
        return self.surface.noise / self.loss

    @property
    def floor(self) -> float:
        """Least difference that the noise can show: the standard error of `MOST_TRIALS` losses."""
        return self.noise / math.sqrt(MOST_TRIALS)

    @property
    def tolerance(self) -> float:
        """Excess loss that is good enough: the spec's tolerance, but at least `floor`."""
        return max(self.spec.tolerance, self.floor)

    def never_settles(self, *, rule_checked: bool = False) -> float:
        """Return the probability that the optimum never settles, as under a wrong width rule.

        Args:
            rule_checked: a coordinate check has passed, which makes this less probable.
        """
        weight = float(self.surface.law_weights[-1])
        odds = weight * CHECKED_ODDS if rule_checked else weight
        return odds / (odds + 1 - weight)

    @cached_property
    def unsettled_excess(self) -> float:
        """Expected excess loss at the target if the drift never settles, as a share of the loss."""
        unsettled = self.surface.laws == len(LAWS) - 1
        if not unsettled.any():
            return 0.0
        return float(self.optimum(self.target).excess[unsettled].mean()) / self.loss

    def is_settled(self, *, rule_checked: bool = False) -> bool:
        """Tell whether a drift that never settles is ruled out, or costs no more than tolerated."""
        ruled_out = self.never_settles(rule_checked=rule_checked) < RULED_OUT
        return ruled_out or self.unsettled_excess <= self.tolerance

    @property
    def is_far(self) -> bool:
        """Tell whether the target is further from the widest width measured than the widths span.

        So far out, no measurement supports a law of drift. The quickstart showed it: after widths
        32 and 64 its answer for 256 was wrong, because lr begins to drift at 128
        (results/reference/neighbours).
        """
        base, widest = self.surface.data.seen[0], self.surface.data.seen[-1]
        return self.target / widest > max(1.0, widest / base)

    def point(self, width: int) -> Point:
        """Return the answer at a width, rounded like the lattice's values."""
        return point_at(self.spec, self.optimum(width).place)

    def intervals(self, width: int) -> dict[str, tuple[float, float] | None]:
        """Map each axis to the 90 % interval of its optimum; None if fixed or unidentified."""
        optimum = self.optimum(width)
        intervals: dict[str, tuple[float, float] | None] = dict.fromkeys(
            axis.name for axis in self.spec.axes
        )
        for number, axis in enumerate(self.spec.swept):
            if number not in self.held:
                low, high = optimum.interval(number)
                intervals[axis.name] = (float(f"{2**low:.4g}"), float(f"{2**high:.4g}"))
        return intervals

    @property
    def unidentified(self) -> list[str]:
        """The swept axes whose optimum the results do not show."""
        return [self.spec.swept[number].name for number in self.held]

    def picks(self, options: Mapping[int, Sequence[Point]], count: int) -> list[PickedPoint]:
        """Return the trials that say most about the target per cost, best first.

        Args:
            options: width → points that may be asked for.
            count: number of trials.
        """
        given = {width: points for width, points in options.items() if points}
        if not given:
            return []
        chosen = pick(
            self.surface,
            [self._as_candidates(*item) for item in given.items()],
            self._wanted,
            count,
        )
        return [PickedPoint(p.width, given[p.width][p.index], p.gain / self.loss) for p in chosen]

    def _as_candidates(self, width: int, points: Sequence[Point]) -> Candidates:
        asked = {trial.point for s in self.state.stages if s.width == width for trial in s.trials}
        asked |= {trial.point for trial in self.state.given_at(width)}
        return Candidates(
            width=width,
            places=np.array([place_of(self.spec, point) for point in points]),
            repeats=np.array([float(point in asked) for point in points]),
            cost=self.spec.cost(width),
        )

    @cached_property
    def _wanted(self) -> Array:
        """(draws, k) vectors from the answer to each draw's optimum; length² is its excess loss."""
        optimum = self.surface.optimum(self.target, margin=DRAWN_AHEAD)
        way = (optimum.draws - optimum.place) * np.sqrt(self.surface.curvature)
        length = np.sqrt((way**2).sum(axis=1))
        wanted: Array = way * (np.sqrt(optimum.excess) / np.maximum(length, 1e-12))[:, None]
        return wanted

    def candidates(self, width: int, grid: Grid) -> list[Point]:
        """Return the cells of a grid that do not lie beyond a wall."""
        points = cells(self.spec, grid, self.surface.optimum(width).place)
        places = np.array([place_of(self.spec, point) for point in points])
        out = self.surface.is_walled(places)
        return [point for point, beyond in zip(points, out, strict=True) if not beyond]

    def measured(self, number: int) -> tuple[float, float]:
        """Return an axis's lowest and highest place with a loss at this stage's width, octaves."""
        data = self.surface.data
        places = data.places[data.widths == self.stage.width][:, number]
        return float(places.min()), float(places.max())

    @cached_property
    def open_sides(self) -> list[tuple[int, bool]]:
        """(axis, upward) of each side where the optimum lies at or beyond the measured range.

        Sides with a wall of divergence ahead, and unidentified axes, do not count.
        """
        place, step = self.optimum(self.stage.width).place, self.surface.frame.step
        sides = []
        for number in range(len(place)):
            low, high = self.measured(number)
            for upward, inside in ((False, place[number] - low), (True, high - place[number])):
                ahead = place.copy()
                ahead[number] += step[number] if upward else -step[number]
                wall = self.surface.is_walled(ahead[None])[0]
                if inside < AT_BORDER * step[number] and not wall and number not in self.held:
                    sides.append((number, upward))
        return sides
