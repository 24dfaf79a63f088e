"""An answer against its neighbours, trained at the target's width: what it truly costs.

An audit trains the answer, and it with one axis changed by a factor of two, with seeds that no
ladder has used. All points have the same seeds, so that a seed's luck cancels in the differences.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
from scipy.stats import t as student

from telescope.errors import SpecError
from telescope.ladder.fit.model import Array
from telescope.ladder.grid import round_value
from telescope.ladder.thresholds import SURE
from telescope.records import LadderSpec, Point, Result, Status, Trial, as_json

FIRST_SEED = 1000
"""Seed of the first trials; ladders count seeds from 0."""
FACTORS = (0.5, 2.0)
"""Multiples of the answer at which each swept axis is tried."""


@dataclass(frozen=True)
class Neighbour:
    """The answer with one axis changed."""

    axis: str
    factor: float
    point: Point
    trials: int
    """Trials with a loss."""
    diverged: int
    """Trials that diverged; with one or more, the point ranks after all others."""
    change: float | None
    """Its loss above the answer's, as a share of the answer's; None without a loss for both."""
    error: float | None
    """Standard error of `change`; None if no point has two seeds."""

    def __str__(self) -> str:
        """Return the form for people: ``lr × 0.5``."""
        return f"{self.axis} × {self.factor:g}"

    @property
    def costs(self) -> str:
        """Describe `change` with its error, or the reason that there is none."""
        if self.diverged:
            return "diverged"
        if self.change is None:
            return "–"
        error = "" if self.error is None else f" ± {100 * self.error:.2f}"
        return f"{100 * self.change:+.2f}{error} %"


@dataclass(frozen=True)
class Audit:
    """The finding of an audit. Costs are shares of the answer's loss."""

    width: int
    point: Point
    """The answer."""
    counts: Mapping[Status, int]
    seeds: tuple[int, ...]
    answered: int
    """Trials of the answer with a loss."""
    loss: float | None
    """Mean loss of the answer; None if it has none, or diverged."""
    noise: float | None
    """Standard deviation between seeds of one point, without what all points of a seed share."""
    neighbours: tuple[Neighbour, ...]
    best: Neighbour | None
    """The neighbour with the lowest loss."""
    excess: float | None
    """The answer's loss above the best setting's near it, by a parabola per axis, 0 or more."""
    error: float | None
    """Standard error of `excess`."""
    bound: float | None
    """Most that the certificate said that the answer costs; None without a certificate."""
    verdict: str
    """"held", "broken", "open" (the error is too large to tell), or "none"."""

    @property
    def sentence(self) -> str:
        """The finding in one sentence."""
        return _sentence(self)

    def as_dict(self) -> dict[str, Any]:
        """The form that JSON takes."""
        return {
            "width": self.width,
            "point": dict(self.point),
            "trials": {str(status): self.counts.get(status, 0) for status in Status},
            "seeds": list(self.seeds),
            "loss": self.loss,
            "noise": self.noise,
            "neighbours": [
                {**as_json(vars(neighbour)), "point": dict(neighbour.point)}
                for neighbour in self.neighbours
            ],
            "excess": self.excess,
            "error": self.error,
            "bound": self.bound,
            "verdict": self.verdict,
            "sentence": self.sentence,
        }


def neighbours_of(spec: LadderSpec, answer: Point) -> dict[tuple[str, float], Point]:
    """Return (axis, factor) → the answer with one axis changed, for every swept axis.

    A value above the most that makes sense for an axis is left out.
    """
    found = {}
    for axis, factor in itertools.product(spec.swept, FACTORS):
        value = round_value(answer[axis.name] * factor)
        if value <= axis.most:
            found[axis.name, factor] = Point.of({**answer, axis.name: value})
    return found


def trials_of_audit(spec: LadderSpec, answer: Point, count: int) -> tuple[Trial, ...]:
    """Return the trials of an audit at the target, in the order of their worth.

    Seed after seed, each with the answer first. More trials are the same ones and further ones.

    Args:
        spec: the ladder's.
        answer: the point to audit.
        count: number of trials.

    Raises:
        SpecError: they are fewer than the answer and its neighbours.
    """
    points = [answer, *neighbours_of(spec, answer).values()]
    if count < len(points):
        raise SpecError(
            f"--trials: got {count}, must be at least {len(points)}: the answer and its "
            f"{len(points) - 1} neighbours; {2 * len(points)} give each a second seed"
        )
    seeds = range(FIRST_SEED, FIRST_SEED + math.ceil(count / len(points)))
    order = (Trial(spec.target, point, seed) for seed in seeds for point in points)
    return tuple(itertools.islice(order, count))


def verdict_of(
    spec: LadderSpec, answer: Point, results: Iterable[Result], bound: float | None
) -> Audit:
    """Return the finding from the results so far.

    Args:
        spec: the ladder's.
        answer: the point that was audited.
        results: of trials of `trials_of_audit`; others, and failed ones, say nothing.
        bound: most that the certificate said that the answer costs, as a share of the loss.
    """
    points = neighbours_of(spec, answer)
    asked = {answer, *points.values()}
    mine = [r for r in results if r.trial.width == spec.target and r.trial.point in asked]
    lost = {r.trial.point for r in mine if r.status is Status.DIVERGED}
    complete = [r for r in mine if r.loss is not None and r.trial.point not in lost]
    at_answer = [r.loss for r in complete if r.trial.point == answer and r.loss is not None]
    loss = fmean(at_answer) if at_answer else None
    means = _means(complete, answer, abs(loss) if loss else 1.0) if at_answer else None
    around = tuple(
        _neighbour(axis, factor, point, mine, means) for (axis, factor), point in points.items()
    )
    ranked = sorted(
        (n for n in around if n.change is not None), key=lambda n: (n.change or 0.0, str(n))
    )
    excess, error = _excess(around, means) if means and ranked else (None, None)
    return Audit(
        width=spec.target,
        point=answer,
        counts={status: sum(r.status is status for r in mine) for status in Status},
        seeds=tuple(sorted({r.trial.seed for r in mine if r.status is not Status.FAILED})),
        answered=len(at_answer),
        loss=loss,
        noise=means.noise if means else None,
        neighbours=around,
        best=ranked[0] if ranked else None,
        excess=excess,
        error=error,
        bound=bound,
        verdict="broken" if answer in lost else _verdict(excess, error, means, bound),
    )


@dataclass(frozen=True)
class _Means:
    """Points' losses above the answer's, from a model of the loss as point + seed + noise."""

    points: tuple[Point, ...]
    """The answer first."""
    above: Array
    """(points,) shares of the answer's loss; the answer's is 0."""
    covariance: Array
    """(points, points) of `above` for a noise of 1."""
    noise: float | None
    """Standard deviation; None without a degree of freedom."""
    freedom: int

    def error(self, gradient: Array) -> float | None:
        """Return the standard error of a weighted sum of `above`."""
        variance = float(gradient @ self.covariance @ gradient)
        return None if self.noise is None else self.noise * math.sqrt(max(variance, 0.0))


def _means(complete: Sequence[Result], answer: Point, scale: float) -> _Means:
    """Fit the model by least squares.

    A seed counts only where it has the answer: without, its luck is not known.
    """
    seeds = sorted({r.trial.seed for r in complete if r.trial.point == answer})
    rows = [r for r in complete if r.trial.seed in seeds]
    others = dict.fromkeys(r.trial.point for r in rows if r.trial.point != answer)
    points = (answer, *others)
    design = np.zeros((len(rows), len(seeds) + len(others)))
    for row, result in enumerate(rows):
        design[row, seeds.index(result.trial.seed)] = 1
        if result.trial.point != answer:
            design[row, len(seeds) + points.index(result.trial.point) - 1] = 1
    losses = np.array([r.loss for r in rows], dtype=float) / scale
    solution = np.linalg.lstsq(design, losses, rcond=None)[0]
    freedom = len(rows) - design.shape[1]
    residual = losses - design @ solution
    covariance = np.zeros((len(points), len(points)))
    covariance[1:, 1:] = np.linalg.pinv(design.T @ design)[len(seeds) :, len(seeds) :]
    noise = math.sqrt(float(residual @ residual) / freedom) if freedom > 0 else None
    above = np.concatenate([[0.0], solution[len(seeds) :]])
    return _Means(points, above, covariance, noise, freedom)


def _neighbour(
    axis: str, factor: float, point: Point, results: Sequence[Result], means: _Means | None
) -> Neighbour:
    """Return what one neighbour costs."""
    here = [r for r in results if r.trial.point == point]
    change = error = None
    if means and point in means.points:
        number = means.points.index(point)
        change = float(means.above[number])
        error = means.error(np.eye(len(means.points))[number])
    return Neighbour(
        axis=axis,
        factor=factor,
        point=point,
        trials=sum(r.loss is not None for r in here),
        diverged=sum(r.status is Status.DIVERGED for r in here),
        change=change,
        error=error,
    )


def _excess(around: Sequence[Neighbour], means: _Means) -> tuple[float, float | None]:
    """Return the answer's loss above the lowest points of parabolas along the axes, with its error.

    A parabola goes through the answer and both neighbours. Where it has no lowest point between
    them, or a neighbour has no loss, the lowest of the losses counts.
    """
    gain, gradient, curved = 0.0, np.zeros(len(means.points)), 0.0
    for axis in dict.fromkeys(n.axis for n in around):
        sides = [n for n in around if n.axis == axis and n.change is not None]
        numbers = [means.points.index(n.point) for n in sides]
        change = means.above[numbers]
        bend = float(change.sum()) / 2 if len(sides) == len(FACTORS) else 0.0
        slope = float(change[-1] - change[0]) / 2 if len(sides) == len(FACTORS) else 0.0
        if bend > 0 and abs(slope) <= 2 * bend:
            gain += slope**2 / (4 * bend)
            part = slope**2 / (4 * bend**2)
            gradient[numbers] += np.array([-1, 1]) * slope / (4 * bend) - part / 2
            tilt = np.zeros(len(means.points))
            tilt[numbers] = -0.5, 0.5
            # Near the lowest point the gain grows as the square of the slope's error.
            curved += 2 * ((means.error(tilt) or 0.0) ** 2 / (4 * bend)) ** 2
        elif len(sides) and change.min() < 0:
            gain -= float(change.min())
            gradient[numbers[int(change.argmin())]] -= 1
    error = means.error(gradient)
    return gain, None if error is None else math.hypot(error, math.sqrt(curved))


def _verdict(
    excess: float | None, error: float | None, means: _Means | None, bound: float | None
) -> str:
    """Compare what the answer costs with what the certificate said, `SURE` on each side."""
    if bound is None or excess is None or error is None or means is None:
        return "none"
    reach = float(student.ppf(SURE, means.freedom)) * error
    if excess + reach <= bound:
        return "held"
    return "broken" if excess - reach > bound else "open"


MEANS = {
    "held": "it keeps its word",
    "broken": "it does not keep its word",
    "open": "more trials would say whether it keeps its word",
}
"""Verdict → what it means for the certificate."""


def _sentence(audit: Audit) -> str:
    """Return the finding in one sentence."""
    said = f"; the certificate said at most {_percent(audit.bound)}" if audit.bound else ""
    if audit.loss is None:
        if audit.verdict == "broken":
            return f"the answer diverged at width {audit.width}{said}: {MEANS['broken']}"
        return f"no trial of the answer at width {audit.width} has a loss yet: nothing is audited"
    if audit.best is None or audit.best.change is None or audit.excess is None:
        return f"no neighbour of the answer at width {audit.width} has a loss: nothing is compared"
    change, side = audit.best.change, "less" if audit.best.change > 0 else "more"
    more = f"{_with_error(abs(change), audit.best.error)} {side} than the best of its neighbours"
    near = f"{_with_error(audit.excess, audit.error)} more than the best setting near it"
    verdict = f": {MEANS[audit.verdict]}" if audit.verdict in MEANS else ""
    alone = "" if audit.error is not None else "; without a second seed there is no error"
    return (
        f"the answer costs {more} ({audit.best}), and by a parabola per axis {near}{said}{verdict}"
        f"{alone}"
    )


def _percent(share: float) -> str:
    """Format a share of the loss.

    >>> _percent(0.00123), _percent(0.02)
    ('0.12 %', '2.00 %')
    """
    return f"{100 * share:.2f} %"


def _with_error(share: float, error: float | None) -> str:
    """Format a share of the loss with its standard error.

    >>> _with_error(0.001, 0.002), _with_error(0.001, None)
    ('0.10 ± 0.20 %', '0.10 %')
    """
    return _percent(share) if error is None else f"{100 * share:.2f} ± {100 * error:.2f} %"
