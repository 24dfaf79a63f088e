"""Policy `paper`: Algorithm 1 of arXiv 2505.02222 as printed: whole grids, each with its argmin."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import fmean

from telescope.ladder.failures import all_diverged, failures_reason, first_line
from telescope.ladder.grid import paper_stage
from telescope.ladder.state import Move, State
from telescope.ladder.thresholds import FAILED_SHARE
from telescope.records import Choice, Point, Result, Stage, Status


def next_move(state: State) -> Move | None:
    """Open the next width's grid, or choose from the open one; None while results are missing."""
    stage = state.open_stage
    if stage is None:
        centre = state.choices[-1].point if state.choices else {}
        return Move(stage=paper_stage(state.spec, state.spec.widths[len(state.choices)], centre))
    results = state.results(stage)
    if stuck := stuck_reason(stage, results):
        return Move(stuck=stuck)
    return Move(choice=choose(stage, results)) if state.is_answered(stage) else None


def choose(stage: Stage, results: Sequence[Result]) -> Choice:
    """Pick the point with the lowest seed-mean held-out loss of one finished stage.

    The order of `results` never matters. A point with a diverged or failed seed is not ranked; ties
    break to the smaller value of the first axis that differs.

    Args:
        stage: the width and grid that the results belong to.
        results: one per trial of `stage`, at least one point complete for every seed.

    Source: arXiv 2505.02222 Algorithm 1 (argmin); seeds, ties and divergence are ours.
    """
    ranked = _ranked(results)
    loss, point = ranked[0]
    at_edge = _at_edge(stage, point)
    return Choice(
        width=stage.width,
        point=point,
        loss=loss,
        intervals=dict.fromkeys(point),
        at_edge=at_edge,
        reason=_reason(ranked, at_edge),
        counts=Counter(result.status for result in results),
    )


def _ranked(results: Sequence[Result]) -> list[tuple[float, Point]]:
    """(seed-mean loss, point) of every point that completed with all its seeds, best first."""
    losses: dict[Point, list[float]] = {}
    unranked: set[Point] = set()
    for result in results:
        if result.loss is None:
            unranked.add(result.trial.point)
        else:
            losses.setdefault(result.trial.point, []).append(result.loss)
    means = [
        (mean_loss(values), point) for point, values in losses.items() if point not in unranked
    ]
    return sorted(means, key=lambda pair: (pair[0], tuple(pair[1].values())))


def mean_loss(losses: Sequence[float]) -> float:
    """Return the mean of a point's losses, the same in any order and without overflow.

    >>> mean_loss([1e308, 1.5e308]), mean_loss([1, 2])
    (1.25e+308, 1.5)
    """
    try:  # The sum of floats depends on their order; fmean adds exactly.
        return fmean(losses)
    except OverflowError:
        return fmean(sorted(loss / len(losses) for loss in losses)) * len(losses)


def _at_edge(stage: Stage, point: Point) -> tuple[str, ...]:
    """Return the axes (of several values) on whose first or last value the point lies."""
    borders = {
        axis: (values[0], values[-1]) for axis, values in stage.grid.items() if len(values) > 1
    }
    return tuple(axis for axis, border in borders.items() if point[axis] in border)


def _reason(ranked: Sequence[tuple[float, Point]], at_edge: Sequence[str]) -> str:
    """Say why this point was chosen."""
    loss, _ = ranked[0]
    if len(ranked) == 1:
        return "the only point with a loss"
    next_loss, runner_up = ranked[1]
    reason = f"lowest loss of {len(ranked)} points, {next_loss - loss:.4f} below {runner_up}"
    if at_edge:
        reason += f"; on the grid's border in {' and '.join(at_edge)}: the optimum may lie outside"
    return reason


def stuck_reason(stage: Stage, results: Sequence[Result]) -> str | None:
    """Say why the stage cannot be decided, whatever its missing results will be; None if it can.

    Failures are the machine's fault: a few may be missing, but not many and not beside the optimum.
    """
    failed = [result for result in results if result.status is Status.FAILED]
    if len(failed) > FAILED_SHARE * len(stage.trials):
        return failures_reason(stage, failed)
    if len(results) < len(stage.trials):
        return None
    ranked = _ranked(results)
    if not ranked:
        return all_diverged(stage, len(failed))
    neighbours = [r for r in failed if _is_beside(stage, r.trial.point, ranked[0][1])]
    if neighbours:
        return (
            f"width {stage.width}: a trial beside the best point failed ({neighbours[0].trial}: "
            f"{first_line(neighbours[0].reason)}); run again to retry it"
        )
    return None


def _is_beside(stage: Stage, point: Point, other: Point) -> bool:
    """Tell whether two points of the grid are at most one value apart on every axis."""
    return all(
        abs(values.index(point[axis]) - values.index(other[axis])) <= 1
        for axis, values in stage.grid.items()
    )
