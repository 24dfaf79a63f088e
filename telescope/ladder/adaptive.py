"""Policy `adaptive`: small rounds of trials, a fitted optimum with an interval, a stopping rule.

At each width the policy asks for rounds of a few trials. Each round takes the trials that say most
about the optimum *at the target*, given all results so far (`fit/acquisition.py`). Before a round,
the fit forecasts the rest of the ladder: the cheapest set of trials, of this width and of wider
ones, that would bring the answer within the tolerance. The stage goes on while that set has trials
of its own width.

The ladder ends when its answer costs no more than the tolerance at the target with 90 %
probability, when another round would hardly lower that cost, or when the budget is spent.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from telescope.ladder import paper
from telescope.ladder.failures import all_diverged, failures_reason
from telescope.ladder.observe import lost_points, observe, unit_of
from telescope.ladder.paper import mean_loss
from telescope.ladder.state import Move, State
from telescope.ladder.thresholds import (
    AHEAD,
    BORDER_TRIALS,
    FAILED_SHARE,
    GOAL,
    LEAST_GAIN,
    LEAST_LOSSES,
    MOST_BEYOND,
    MOST_EXTENSIONS,
    MOST_TRIALS,
    REPEAT_WITHIN,
    REPEATS,
    SURE,
    WORTH,
)
from telescope.ladder.view import PickedPoint, View, round_size
from telescope.ladder.window import (
    EXTENSION_CELLS,
    WINDOW,
    WINDOW_OF_MANY,
    Grid,
    base_grid,
    cells,
    extended,
    grid_around,
    marks_per_step,
    place_of,
    refined,
    star,
)
from telescope.records import Axis, Choice, LadderSpec, Point, Skipped, Stage, Status, Trial

ALL_WALLED = "every cell that is left lies beyond a diverged one"


def next_move(state: State) -> Move | None:
    """Open the next stage, ask for another round, or close; None while results are missing."""
    if not state.spec.swept:  # one point: nothing to search
        return paper.next_move(state)
    stage = state.open_stage
    if stage is None:
        return _open_next(state) if state.stages else _open_first(state)
    if stuck := _too_many_failures(state, stage):
        return Move(stuck=stuck)
    if not state.is_answered(stage):
        return None
    if len(observe(state, widths=state.spec.widths[:1]).losses) < LEAST_LOSSES:
        return _search_lower(state, stage)
    return _decide(View(state, state.spec.target))


def _open_first(state: State) -> Move:
    """Return the base width's first round, whatever the budget: `run` has checked that it fits."""
    spec = state.spec
    stage = Stage(spec.widths[0], base_grid(spec), ())
    if state.given_at(stage.width):
        stage = _taking_over(state, stage)
        if _says_as_much_as_a_first_round(state):
            return Move(stage=stage)
    reason = "first look: the middle of the lattice, and a third of the range up and down each axis"
    new = [trial for point in star(spec) for trial in _missing_seeds(spec, stage, point)]
    trials, rounds = (*stage.trials, *new), (*stage.rounds, reason)
    return Move(stage=replace(stage, trials=trials, rounds=rounds))


def _open_next(state: State) -> Move:
    """Return the next width's first round, around the optimum that the fit predicts there."""
    view = View(state, state.spec.target)
    width = state.spec.widths[len(state.choices)]
    place = view.optimum(width).place
    stage = Stage(width, grid_around(state.spec, place, state.stages[0].grid), ())
    if state.given_at(width):
        stage = _taking_over(state, stage)
        if width in view.surface.data.seen:
            return Move(stage=stage)
    how = "the drift so far" if len(state.stages) > 1 else "one width, drift unknown"
    reason = f"around {view.point(width)}, predicted from {how}"
    points = _best(view, stage, view.candidates(width, stage.grid), round_size(state.spec))
    if grown := _grown(state, stage, points, reason):
        return Move(stage=grown)
    rest = state.spec.widths[len(state.choices) :]
    why = _out_of_budget(state) if points else ALL_WALLED
    return Move(skipped=tuple(Skipped(left, why) for left in rest))


def _taking_over(state: State, stage: Stage) -> Stage:
    """Begin a stage with the trials given at its width; add the seeds that the best points lack."""
    given = state.given_at(stage.width)
    stage = replace(
        stage, trials=given, rounds=(f"{len(given)} trials stored before the spec changed",)
    )
    best = _best_points(state, stage)[: round_size(state.spec)]
    lacking = [t for point in best for t in _missing_seeds(state.spec, stage, point)]
    lacking = lacking[: _affordable(state, stage.width)]
    if not lacking:
        return stage
    reason = "the spec's seeds that the best of these lack"
    return replace(stage, trials=(*given, *lacking), rounds=(*stage.rounds, reason))


def _says_as_much_as_a_first_round(state: State) -> bool:
    """Tell whether the given trials replace a first round: as many losses, 3 values per axis."""
    results = [state.known[trial] for trial in state.given_at(state.spec.widths[0])]
    points = {r.trial.point for r in results if r.loss is not None} - lost_points(state, results)
    values = [{point[axis.name] for point in points} for axis in state.spec.swept]
    return len(points) >= len(star(state.spec)) and all(len(found) >= 3 for found in values)


def _decide(view: View) -> Move:
    """Decide between another round at this width and its choice; end the ladder where it is due."""
    state, stage = view.state, view.stage
    if stage.width not in view.surface.data.seen:
        return _without_a_loss(view)
    if move := _grow(view, *_beyond_the_border(view)):
        return move
    if reason := _out_of_reach(view):
        return _close(view, reason, ends=True)
    ending = _reason_to_end(view)
    rest = [] if ending else _rest_of_the_ladder(view)
    widening = None if ending else _reason_to_widen(view, rest)
    if reason := ending or widening or _reason_to_give_up(view):
        if move := _grow(view, *_repeats(view)):
            return move
        next_width = _next_width(view)
        goes_on = next_width is not None and bool(view.state.given_at(next_width))
        return _close(view, reason, ends=not (widening or goes_on))
    best = _next_round(view, rest)
    if move := _grow(
        view, _with(stage, best), best, "these say most about the optimum at the target"
    ):
        return move
    if not best:
        return _close(view, ALL_WALLED, ends=_next_width(view) is None)
    return _close(view, _out_of_budget(state), ends=True, out_of_budget=True)


def _finer(view: View, stage: Stage) -> Grid:
    """Add the marks near the optimum to the base width's grid; a wider stage has them already."""
    if len(view.state.stages) > 1:
        return stage.grid
    return refined(view.spec, stage.grid, view.surface.optimum(stage.width).place)


def _with(stage: Stage, points: Sequence[Point]) -> Stage:
    """Return the stage with the values of `points` added to its grid."""
    grid = {
        name: tuple(sorted({*values, *(point[name] for point in points)}))
        for name, values in stage.grid.items()
    }
    return replace(stage, grid=grid)


def _without_a_loss(view: View) -> Move:
    """Decide for a width without a loss: another round, or end the ladder at the width before."""
    stage, rest = view.stage, view.spec.widths[len(view.state.choices) :]
    points = [] if _is_full(view.state, stage) else view.candidates(stage.width, stage.grid)
    best = _best(view, stage, points, round_size(view.spec))
    if move := _grow(view, stage, best, "no trial of this width has a loss yet"):
        return move
    reason = f"no trial at width {stage.width} has a loss, and there is no room for more"
    return Move(skipped=tuple(Skipped(width, reason) for width in rest))


def _grow(view: View, stage: Stage, points: Sequence[Point], reason: str) -> Move | None:
    """Return one more round of `points`; None without points, or without budget for them."""
    grown = _grown(view.state, stage, points, reason) if points else None
    return Move(stage=grown) if grown else None


def _is_full(state: State, stage: Stage) -> bool:
    """Tell whether a stage has asked for `MOST_TRIALS` per seed; given trials do not count."""
    asked = len(stage.trials) - len(state.given_at(stage.width))
    return asked >= MOST_TRIALS * len(state.spec.seeds)


def _best(view: View, stage: Stage, points: Sequence[Point], count: int) -> list[Point]:
    """Return the `count` points that say most about the optimum at the target."""
    return [picked.point for picked in view.picks({stage.width: points}, count)]


def _next_round(view: View, rest: Sequence[PickedPoint]) -> list[Point]:
    """Return the forecast's points of this width; without any, those that say most."""
    most, stage = round_size(view.spec), view.stage
    ahead = [picked.point for picked in rest if picked.width == stage.width]
    return ahead[:most] or _best(view, stage, view.candidates(stage.width, stage.grid), most)


def _next_width(view: View) -> int | None:
    """Return the next width, if the budget has room for one trial there or some are given."""
    rest = view.spec.widths[len(view.state.stages) :]
    if rest and (_affordable(view.state, rest[0]) >= 1 or view.state.given_at(rest[0])):
        return rest[0]
    return None


def _wants_wider(view: View) -> str:
    """Say what only a wider model can show, however small the predicted excess; "" if nothing."""
    if view.is_far:
        widest = view.surface.data.seen[-1]
        return f"it is {view.target / widest:.3g} times as wide as the widest model measured"
    if view.spec.until_proven and not view.is_settled():
        return (
            f"a drift that never settles is not ruled out and would cost "
            f"{view.unsettled_excess:.2%}"
        )
    return ""


def _reason_to_widen(view: View, rest: Sequence[PickedPoint]) -> str | None:
    """Say why it is time for the next width, or None."""
    stage = view.stage
    if _next_width(view) is None:
        return None
    if _is_full(view.state, stage):
        return f"{MOST_TRIALS} trials per seed are the most at one width"
    own, at_target = view.excess(stage.width), view.excess(view.target)
    within = view.bound(view.target) <= view.tolerance
    if (why := _wants_wider(view)) and len(view.surface.data.seen) > 1 and within:
        return f"predicted excess loss at width {view.target} is {at_target:.2%}, but {why}"
    if any(picked.width == stage.width for picked in rest):
        return None
    return (
        f"what is not known here costs {own:.2%} of loss, of {at_target:.2%} at width "
        f"{view.target}: wider models say more for their cost"
    )


def _rest_of_the_ladder(view: View) -> list[PickedPoint]:
    """Forecast the cheapest trials that bring the answer within the tolerance.

    They are of this width and of all wider ones. All widths share one shape, which is cheapest to
    learn at the narrowest; the drift shows only at wider ones.
    """
    spec, stage = view.spec, view.stage
    options = {stage.width: view.candidates(stage.width, _finer(view, stage))}
    for width in spec.widths[len(view.state.stages) :]:
        grid = grid_around(spec, view.optimum(width).place, view.state.stages[0].grid)
        options[width] = view.candidates(width, grid)
    picks = view.picks(options, AHEAD)
    if not picks:
        return []
    said = np.cumsum([picked.gain for picked in picks])
    goal = view.excess(view.target) * (
        1 - GOAL * view.tolerance / max(view.bound(view.target), 1e-300)
    )
    picks = picks[: int(np.searchsorted(said, min(goal, WORTH * said[-1]))) + 1]
    if spec.budget is None:
        return picks
    costs = np.cumsum([spec.cost(picked.width) * len(spec.seeds) for picked in picks])
    return picks[: int(np.searchsorted(costs, spec.budget - view.state.spent, side="right"))]


def _beyond_the_border(view: View) -> tuple[Stage, Sequence[Point], str]:
    """Return a round that looks beyond a border at which the optimum lies.

    One trial lies just outside the measured values; the others are those that say most.
    """
    for number, upward in view.open_sides if not _is_full(view.state, view.stage) else ():
        axis = view.spec.swept[number]
        sign, border = (1 if upward else -1), view.measured(number)[upward]
        side = "above" if upward else "below"
        reason = f"{axis.name}: the optimum lies at the border of what was measured, look {side} it"
        for stage in (view.stage, _extended(view.spec, view.stage, axis, upward=upward)):
            points = view.candidates(stage.width, stage.grid) if stage else []
            ahead = {
                point: sign * (float(place_of(view.spec, point)[number]) - border)
                for point in points
            }
            beyond = [distance for distance in ahead.values() if distance > 1e-3]
            if beyond and stage:
                near = min(beyond) + view.surface.frame.step[number] * 0.51
                probes = [point for point, distance in ahead.items() if 1e-3 < distance < near]
                probe = _best(view, stage, probes, BORDER_TRIALS)
                others = [point for point in points if point not in probe]
                return (
                    stage,
                    [*probe, *_best(view, stage, others, round_size(view.spec) - len(probe))],
                    reason,
                )
    return view.stage, (), ""


def _out_of_reach(view: View) -> str | None:
    """Say that the base width's optimum lies beyond all values that may be tried, if it matters."""
    stage = view.stage
    if stage.width != view.spec.widths[0] or view.excess(stage.width) <= view.tolerance:
        return None
    for number, upward in view.open_sides:
        axis = view.spec.swept[number]
        if _extended(view.spec, stage, axis, upward=upward) is None:
            side, border = "above" if upward else "below", 2 ** view.measured(number)[upward]
            return f"{axis.name}: the optimum lies {side} {border:.3g}, far outside of its range"
    return None


def _extended(spec: LadderSpec, stage: Stage, axis: Axis, *, upward: bool) -> Stage | None:
    """Return the stage with a wider window; None once it has grown as often as allowed."""
    values, window = stage.grid[axis.name], WINDOW.get(len(spec.swept), WINDOW_OF_MANY)
    if stage.width != spec.widths[0]:
        if len(values) >= len(window) + MOST_EXTENSIONS * EXTENSION_CELLS:
            return None
        return replace(stage, grid=extended(stage.grid, axis, window.step, upward=upward))
    above = sum(value > axis.high * 1.001 for value in values)
    below = sum(value < axis.low * 0.999 for value in values)
    if above + below >= MOST_BEYOND:
        return None
    # Each step is longer than the last, so that few rounds leave a range that misses by far.
    spacing = marks_per_step(axis) * 2 ** (above if upward else below)
    return replace(stage, grid=extended(stage.grid, axis, spacing, upward=upward, growing=True))


def _repeats(view: View) -> tuple[Stage, Sequence[Point], str]:
    """Return a further seed for the base width's best cells, once, to measure the noise."""
    stage = view.stage
    seeds = {trial.seed for trial in stage.trials}
    if len(view.state.stages) > 1 or len(seeds) > 1:
        return stage, (), ""
    best = _best_points(view.state, stage)[:REPEATS]
    lowest = view.surface.loss_at(stage.width, place_of(view.spec, best[0]))
    near = lowest + REPEAT_WITHIN * view.surface.noise
    alike = [
        point
        for point in best
        if view.surface.loss_at(stage.width, place_of(view.spec, point)) <= near
    ]
    return stage, alike, "a further seed at the best cells, to measure the noise"


def _best_points(state: State, stage: Stage) -> list[Point]:
    """Return a stage's points, lowest mean loss first; without points that diverged."""
    results = state.results(stage)
    diverged = lost_points(state, results)
    losses: dict[Point, list[float]] = {}
    for result in results:
        if result.loss is not None and result.trial.point not in diverged:
            losses.setdefault(result.trial.point, []).append(result.loss)
    return sorted(losses, key=lambda point: (mean_loss(losses[point]), point.axes))


def _reason_to_end(view: View) -> str | None:
    """Say why the answer for the target is good enough, or None."""
    only_width = len(view.spec.widths) == 1
    bound = view.bound(view.target)
    if bound > view.tolerance or not (len(view.surface.data.seen) > 1 or only_width):
        return None
    if _wants_wider(view) and _next_width(view) is not None:
        return None
    what = "the tolerance" if view.tolerance == view.spec.tolerance else "what the noise can show"
    return (
        f"excess loss at width {view.target} is at most {bound:.2%} with {SURE:.0%}, within "
        f"{what}, {view.tolerance:.2%}"
    )


def _reason_to_give_up(view: View) -> str | None:
    """Say why another round at the last width would change nothing, or None."""
    stage, state = view.stage, view.state
    if len(state.stages) < len(view.spec.widths):
        return None
    if _is_full(view.state, stage):
        return f"{MOST_TRIALS} trials per seed are the most at one width"
    points = view.candidates(stage.width, stage.grid)
    gain = sum(picked.gain for picked in view.picks({stage.width: points}, round_size(view.spec)))
    excess = view.excess(view.target)
    if gain >= LEAST_GAIN * excess:
        return None
    return (
        f"predicted excess loss at width {view.target} is {excess:.2%}, and another round at the "
        f"last width would take only {gain:.2%} off: noise is {view.surface.noise / view.loss:.2%}"
    )


def _close(view: View, reason: str, *, ends: bool, out_of_budget: bool = False) -> Move:
    """Close the stage with its choice; where the ladder ends, name the widths it leaves out."""
    state, stage = view.state, view.stage
    optimum = view.optimum(stage.width)
    results = state.results(stage)
    edges = dict.fromkeys(view.spec.swept[number].name for number, _ in view.open_sides)
    complete = sum(result.loss is not None for result in results)
    parts = [f"fit of {complete} losses", *_say_axes(view)]
    if edges:
        parts.append(f"on the border in {' and '.join(edges)}: the optimum may lie outside")
    choice = Choice(
        width=stage.width,
        point=view.point(stage.width),
        loss=view.surface.loss_at(stage.width, optimum.place) * unit_of(state),
        intervals=view.intervals(stage.width),
        at_edge=tuple(edges),
        reason="; ".join([*parts, reason]),
        counts=Counter(result.status for result in results),
        out_of_budget=out_of_budget,
    )
    rest = state.spec.widths[len(state.stages) :] if ends else ()
    return Move(choice=choice, skipped=tuple(Skipped(width, reason) for width in rest))


def _say_axes(view: View) -> list[str]:
    """Describe each swept axis: its interval, or that it is unidentified."""
    said = []
    for name, interval in view.intervals(view.stage.width).items():
        if interval:
            said.append(f"{name} in [{interval[0]:.3g}, {interval[1]:.3g}]")
    for name in view.unidentified:
        said.append(f"{name} unidentified, it keeps its prior value")
    return said


def _trials_of(spec: LadderSpec, stage: Stage, point: Point) -> list[Trial]:
    """Return a point's trials: of the spec's seeds that it lacks; if none, of one further seed."""
    # A budget may have cut a round in the middle of a point.
    if missing := _missing_seeds(spec, stage, point):
        return missing
    used = {trial.seed for trial in stage.trials if trial.point == point}
    return [Trial(stage.width, point, max(*used, *spec.seeds) + 1)]


def _missing_seeds(spec: LadderSpec, stage: Stage, point: Point) -> list[Trial]:
    """Return a point's trials for the spec's seeds that the stage has not asked for yet."""
    used = {trial.seed for trial in stage.trials if trial.point == point}
    return [Trial(stage.width, point, seed) for seed in spec.seeds if seed not in used]


def _grown(state: State, stage: Stage, points: Sequence[Point], reason: str) -> Stage | None:
    """Add a round to the stage, cut where the budget ends; None if it has no room for a trial."""
    trials = [trial for point in points for trial in _trials_of(state.spec, stage, point)]
    trials = trials[: _affordable(state, stage.width)]
    if not trials:
        return None
    return replace(stage, trials=(*stage.trials, *trials), rounds=(*stage.rounds, reason))


def _affordable(state: State, width: int) -> int:
    """Count the trials of a width that the budget still has room for."""
    if state.spec.budget is None or math.isinf(state.spec.budget):
        return 10**9
    # A hair of room, so that a budget of exactly n trials is one of n.
    room = (state.spec.budget - state.spent) / state.spec.cost(width)
    return max(0, math.floor(room + 1e-9))


def _out_of_budget(state: State) -> str:
    return f"the budget is spent: {state.spent / (state.spec.budget or math.inf):.0%} of it"


def _too_many_failures(state: State, stage: Stage) -> str | None:
    """Say why failures stop the stage, or None: one failed trial is tolerated, many are a fault."""
    results = state.results(stage)
    failed = [result for result in results if result.status is Status.FAILED]
    if len(failed) <= max(1.0, FAILED_SHARE * len(stage.trials)):
        return None
    return failures_reason(stage, failed)


def _search_lower(state: State, stage: Stage) -> Move:
    """Ask for more losses before the first fit: lower learning rates where trials diverged."""
    spec, results = state.spec, state.results(stage)
    lr = next((axis for axis in spec.swept if axis.name == "lr"), None)
    if lr is None or not lost_points(state, results):
        return _ask_for_more(state, stage)
    tried = {trial.point["lr"] for trial in stage.trials}
    for wider in (stage, _extended(spec, stage, lr, upward=False)):
        below = [value for value in wider.grid["lr"] if value < min(tried)] if wider else []
        points = [Point.of({**star(spec)[0], "lr": value}) for value in below[::-1]]
        reason = "too few losses to fit: look at lower learning rates"
        chosen = points[: round_size(spec)]
        if chosen and wider and (grown := _grown(state, wider, chosen, reason)):
            return Move(stage=grown)
    return _ask_for_more(state, stage)


def _ask_for_more(state: State, stage: Stage) -> Move:
    """Ask for other cells of the lattice, else for further seeds of cells with a loss, or stop."""
    spec, results = state.spec, state.results(stage)
    tried = {trial.point for trial in stage.trials}
    middle = place_of(spec, star(spec)[0])
    fresh = [point for point in cells(spec, stage.grid, middle) if point not in tried]
    fresh.sort(key=lambda point: float(abs(place_of(spec, point) - middle).sum()))
    lost = lost_points(state, results)
    with_loss = dict.fromkeys(r.trial.point for r in results if r.loss is not None)
    survived = [point for point in with_loss if point not in lost]
    chosen = [] if _is_full(state, stage) else (fresh or survived)[: round_size(spec)]
    if grown := _grown(state, stage, chosen, "too few losses to fit: look at more of the lattice"):
        return Move(stage=grown)
    failed = sum(result.status is Status.FAILED for result in results)
    if not survived:
        return Move(stuck=all_diverged(stage, failed))
    return Move(
        stuck=f"width {stage.width}: only {len(survived)} of {len(tried)} points have a loss, too "
        "few to fit; lengthen the warm-up, widen the axes, or raise budget.max_over_target"
    )
