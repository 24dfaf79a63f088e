"""The certificate: a ladder's prediction for a width that it did not train, with a verdict.

PASS: the answer costs no more than the tolerance with 90 % probability, several widths agree, and
no result makes the prediction worthless. WARN: some evidence is missing; each problem says what
would supply it. FAIL: the results contradict the prediction or the width rule.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from telescope.ladder.assumed import FIND_THE_RULE, assumed_alike
from telescope.ladder.fit.data import Data
from telescope.ladder.fit.laws import LAWS
from telescope.ladder.fit.model import Array
from telescope.ladder.fit.priors import DRIFT_OCTAVES, MISFIT
from telescope.ladder.fit.surface import Surface
from telescope.ladder.level import predict_loss
from telescope.ladder.state import State
from telescope.ladder.thresholds import (
    CONTRADICTION,
    FAIL_EXCESS,
    MERE_PRIOR,
    NOTICEABLE_DRIFT,
    RIVAL_ABOVE,
    RIVAL_WITHIN,
    SURE,
    USABLE,
)
from telescope.ladder.view import View
from telescope.records import Certificate, Skipped, Status

ASSUMPTIONS = (
    f"before any result, an optimum is taken to move by {DRIFT_OCTAVES:g} octaves or less over the "
    "first doubling, and to settle as 1/width (60 %), as 1/√width (30 %) or not at all (10 %)",
    "around its optimum the loss has one basin of the same form at all widths, which may deepen or "
    "flatten with the width by a power of it; how much is measured and counted",
)


def certify(
    state: State, skipped: Sequence[Skipped], width: int, *, rule_checked: bool
) -> Certificate:
    """Judge the answer for one width from the closed stages.

    Args:
        state: a ladder with a choice or more.
        skipped: the widths that it left out.
        width: the width to predict.
        rule_checked: a coordinate check of the model has passed. This changes only the verdict,
            never a decision of the ladder.
    """
    closed = replace(state, stages=state.stages[: len(state.choices)])
    view = View(closed, width)
    failures = _contradictions(view)
    problems = _problems(view, skipped, rule_checked=rule_checked)
    verdict = "FAIL" if failures else "WARN" if problems else "PASS"
    return Certificate(
        verdict=verdict,
        width=width,
        point=view.point(width),
        predicted_excess_loss=view.excess(width),
        intervals=view.intervals(width),
        evidence=tuple(_evidence(view, rule_checked=rule_checked)),
        problems=(*failures, *problems),
        assumptions=(assumed_alike(), *ASSUMPTIONS),
        excess_bound=view.bound(width),
        advice=_advice(view, verdict, width),
        predicted_loss=predict_loss(view),
    )


def _advice(view: View, verdict: str, width: int) -> str:
    """Say in one sentence whether the answer can be used, and what to do next."""
    expected, bound = _percent(view.excess(width)), _percent(view.bound(width))
    if verdict == "PASS":
        return (
            f"use it: the answer costs {expected} of the loss in expectation, at most {bound} with "
            f"{SURE:.0%}"
        )
    if verdict == "FAIL":
        return "do not use it: mend what speaks against it and run again"
    if view.bound(width) <= USABLE * view.spec.tolerance:
        return (
            f"usable if you can spare {bound} of the loss, the most that it costs with {SURE:.0%}; "
            "what is missing below would prove it"
        )
    return (
        f"a start, not an answer: it may cost {bound} of the loss; do what is missing below and "
        "run again"
    )


def _problems(view: View, skipped: Sequence[Skipped], *, rule_checked: bool) -> list[str]:
    """List the evidence that is missing for PASS, each with what would supply it."""
    spec, state = view.spec, view.state
    problems = [_say_border(view, number, upward=up) for number, up in view.open_sides]
    if len(view.surface.data.seen) == 1 and view.target != spec.widths[0] and not problems:
        problems.append(
            "only one width was trained: nothing shows that its optimum transfers; append a width "
            "to ladder.widths"
        )
    elif view.is_far and not problems:
        widest = view.surface.data.seen[-1]
        problems.append(
            f"width {view.target} is {view.target / widest:.3g} times as wide as the widest model "
            f"trained, and the widths trained span a factor of {widest / spec.widths[0]:.3g}: no "
            "result speaks for a drift so far out; "
            + ("raise budget.max_over_target" if skipped else "append a width to ladder.widths")
        )
    if view.floor > spec.tolerance:
        problems.append(
            f"the ladder is noisier than its tolerance: with {_percent(view.noise)} of loss "
            f"between seeds it can show {_percent(view.floor)}, not {_percent(spec.tolerance)}; "
            "train longer, measure the loss on more held-out tokens, or raise ladder.tolerance"
        )
    if view.bound(view.target) > view.tolerance:
        problems.append(
            f"the answer costs {_percent(view.excess(view.target))} of loss in expectation and up "
            f"to {_percent(view.bound(view.target))} with {SURE:.0%}, above the tolerance of "
            f"{_percent(view.tolerance)}; append a width to ladder.widths, or raise "
            "budget.max_over_target"
        )
    elif not view.is_settled(rule_checked=rule_checked):
        wider = 'set ladder.until = "proven"' if skipped else "append a width to ladder.widths"
        problems.append(
            "a drift that never settles, as under a wrong width rule, is not ruled out and would "
            f"cost {_percent(view.unsettled_excess)}; {wider} and run again"
        )
    if any(choice.out_of_budget for choice in state.choices):
        problems.append("the budget ended the ladder; raise budget.max_over_target")
    return [*problems, *_problems_of_axes(view)]


def _problems_of_axes(view: View) -> list[str]:
    """List axes whose optimum is unidentified, next to a divergence, or in two places."""
    last, problems = view.state.choices[-1], []
    for axis in view.unidentified:
        if _interval_before(view, axis) is None:
            problems.append(
                f"{axis} is unidentified: the loss hardly depends on it within its range, it keeps "
                f"{last.point[axis]:.4g}; widen axes.{axis}, train longer, or fix it"
            )
    for number in view.surface.at_wall(view.optimum(view.target).place):
        axis = view.spec.swept[number].name
        problems.append(
            f"{axis} is as near to a divergence as it may be: the optimum may lie at the wall or "
            "beyond it; lengthen the warm-up, or add points between"
        )
    # Not the fit's noise: the fit mistakes two minima for noise. The least is there because few
    # repeats may agree by chance.
    least = view.surface.frame.expected_noise / 3
    noise = max(view.surface.data.noise_of_repeats, least)
    if rivals := two_minima(view.surface.data, noise, view.surface):
        problems.append(
            f"the loss has two minima at width {rivals}; narrow the axes to one of them"
        )
    return problems


def _interval_before(view: View, axis: str) -> tuple[float, float] | None:
    """Return an axis's 90 % interval at the width before the last; None without one.

    An axis that is unidentified at the last width keeps the value of that interval. Then its value
    was found by trials, and what it costs to keep it is part of the bound. In replays of the
    quickstart's recorded ladder (results/reference/quickstart-ladder) half of the answers kept
    their weight decay in this way, and 1 of 15 cost more than the tolerance.
    """
    before = [choice for choice in view.state.choices if choice.width < view.stage.width]
    return before[-1].intervals[axis] if before else None


def _say_border(view: View, number: int, *, upward: bool) -> str:
    """Say that an optimum lies at or beyond the last value tried, and what to change."""
    name, border = view.spec.swept[number].name, 2 ** view.measured(number)[upward]
    low, side, key = ("low", "above", "high") if upward else ("high", "below", "low")
    return (
        f"the range of {name} is too {low}: at width {view.stage.width} the optimum lies at or "
        f"{side} {border:.3g}, the last value that was tried; move axes.{name}.{key}"
    )


def _contradictions(view: View) -> list[str]:
    """List the results that contradict the prediction or the width rule."""
    found = []
    excess = view.excess(view.target)
    if excess > FAIL_EXCESS:
        found.append(f"predicted excess loss is {_percent(excess)}: the optimum was not found")
    if unsettled := unsettled_axes(view):
        moves = " and ".join(f"{axis} by {octave:+.2f} octaves" for axis, octave in unsettled)
        found.append(
            f"the optimum keeps moving, {moves} per doubling, and does not settle "
            f"({view.surface.law_weights[-1]:.0%}): the likely cause is the width rule; "
            f"{FIND_THE_RULE}"
        )
    if missed := _missed_prediction(view):
        found.append(missed)
    return found


def unsettled_axes(view: View) -> list[tuple[str, float]]:
    """(axis, octaves per doubling) of each optimum that moves alike at every doubling."""
    if view.surface.law_weights[-1] < 0.5:
        return []
    base, last = view.spec.widths[0], view.stage.width
    doublings = math.log2(last / base)
    moved = (view.surface.optimum(last).draws - view.surface.optimum(base).draws) / doublings
    return [
        (axis.name, float(np.mean(moves)))
        for axis, moves in zip(view.spec.swept, moved.T, strict=True)
        if np.percentile(np.sign(np.mean(moves)) * moves, 5) > NOTICEABLE_DRIFT
    ]


def _prediction(view: View) -> tuple[Array, Array, Array] | None:
    """(predicted, found, standard error) of the last width's optimum, octaves per axis."""
    state = view.state
    if len(state.stages) < 2:
        return None
    last = view.stage.width
    before = replace(
        state,
        stages=state.stages[:-1],
        choices=state.choices[:-1],
        given=tuple(trial for trial in state.given if trial.width < last),
    )
    predicted = View(before, last).surface.optimum(last).draws
    alone = view.surface.optimum(last).draws
    error = np.hypot(predicted.std(axis=0), alone.std(axis=0))
    return predicted.mean(axis=0), alone.mean(axis=0), np.maximum(error, 1e-9)


def _missed_prediction(view: View) -> str | None:
    """Say that the last width contradicts the earlier widths' prediction noticeably; or None."""
    if (prediction := _prediction(view)) is None:
        return None
    predicted, found, error = prediction
    for number, axis in enumerate(view.spec.swept):
        miss = found[number] - predicted[number]
        costs = view.surface.curvature[number] * miss**2 / view.loss
        if abs(miss) > CONTRADICTION * error[number] and costs > view.spec.tolerance:
            return (
                f"width {view.stage.width} contradicts the widths before it: {axis.name} was "
                f"predicted at {2 ** predicted[number]:.3g} and found at {2 ** found[number]:.3g}, "
                f"{abs(miss) / error[number]:.1f} standard errors away"
            )
    return None


def _evidence(view: View, *, rule_checked: bool) -> list[str]:
    """Describe what was measured, one sentence each."""
    state, surface = view.state, view.surface
    trials = " + ".join(str(len(stage.trials)) for stage in state.stages)
    widths = ", ".join(str(stage.width) for stage in state.stages)
    results = state.evidence
    ended = [
        f"{sum(r.status is status for r in results)} {status}"
        for status in (Status.DIVERGED, Status.FAILED)
        if any(r.status is status for r in results)
    ]
    evidence = [f"{trials} trials at width {widths}{''.join(f', {text}' for text in ended)}"]
    if state.given:
        ahead = sorted({result.trial.width for result in state.given_ahead})
        others = f", some of width {' and '.join(map(str, ahead))}" if ahead else ""
        evidence.append(f"{len(state.given)} trials were stored before the spec changed{others}")
    repeats = int(surface.data.same_shift.diagonal().sum())
    how = f"measured with {repeats} repeats and the fit" if repeats else "from the fit alone"
    evidence.append(f"noise between seeds {_percent(view.noise)} of loss, {how}")
    for number, axis in enumerate(view.spec.swept):
        bend = surface.curvature[number] / view.loss
        if number not in view.held:
            evidence.append(f"{axis.name} off by a factor of two costs {_percent(bend)} of loss")
    evidence += _evidence_of_kept_axes(view)
    if prediction := _prediction(view):
        predicted, found, error = prediction
        for number, axis in enumerate(view.spec.swept):
            if number not in view.held:
                evidence.append(
                    f"{axis.name} at width {view.stage.width}: {2 ** predicted[number]:.3g} "
                    f"predicted from the widths before, {2 ** found[number]:.3g} found; "
                    f"{abs(found[number] - predicted[number]) / error[number]:.1f} standard errors"
                )
        if rule_checked:
            evidence.append("the coordinate check passed: a wrong width rule is improbable")
        laws = ", ".join(
            f"{law.name} {weight:.0%}"
            for law, weight in zip(LAWS, surface.law_weights, strict=True)
        )
        moved = max(abs(w - law.prior) for w, law in zip(surface.law_weights, LAWS, strict=True))
        prior = "; little more than was assumed before any result" if moved < MERE_PRIOR else ""
        evidence.append(f"how the optimum settles: {laws}{prior}")
        evidence.append(
            "what it costs to be off the optimum changes by a factor of "
            f"{2**surface.deepening:.2f} per doubling of the width"
        )
    return evidence


def _evidence_of_kept_axes(view: View) -> list[str]:
    """Say of each axis that is unidentified at the last width where its value comes from."""
    kept = []
    for axis in view.unidentified:
        if interval := _interval_before(view, axis):
            kept.append(
                f"{axis} at width {view.stage.width}: the loss hardly depends on it there, it "
                f"keeps the width before's {view.state.choices[-1].point[axis]:.4g}, with 90 % "
                f"between {interval[0]:.4g} and {interval[1]:.4g}"
            )
    return kept


def two_minima(data: Data, noise: float, surface: Surface | None = None) -> int | None:
    """Return a width at which two points are about equally good and one between them is worse.

    A tilted or bent valley leaves the straight line between two of its points. So where the fitted
    surface explains all three losses and joins the two points by a low path, they count as one
    minimum.

    Args:
        data: what was measured.
        noise: standard deviation between seeds, nats.
        surface: the fit; without one, the straight line alone decides.

    Returns:
        The narrowest such width, or None.
    """
    for width in data.seen:
        here = data.widths == width
        places, losses = data.places[here], data.losses[here]
        best = int(np.argmin(losses))
        for other, middle in itertools.permutations(range(len(losses)), 2):
            ends = places[[best, other]]
            between = (places[middle] >= ends.min(0) - 1e-9) & (
                places[middle] <= ends.max(0) + 1e-9
            )
            apart = (places[middle] != ends).any(axis=1).all()
            alike = losses[other] - losses[best] < RIVAL_WITHIN * noise
            above = losses[middle] - losses[other] > RIVAL_ABOVE * noise
            if between.all() and apart and alike and above:
                three = [best, other, middle]
                if not (surface and _is_one_valley(surface, width, places[three], losses[three])):
                    return width
    return None


def _is_one_valley(surface: Surface, width: int, places: Array, losses: Array) -> bool:
    """Tell whether the fit explains the three losses and joins the first two by a low path.

    Args:
        surface: the fit.
        width: the width of the three points.
        places: (3, k) octaves: the best point, its rival, and the one between them.
        losses: (3,) nats.
    """
    expected = np.array([surface.loss_at(width, place) for place in places])
    error = RIVAL_WITHIN * surface.noise + MISFIT[-1] * (losses - losses[0])
    if np.any(np.abs(expected - losses) > error):
        return False
    level = float(expected[:2].max()) + RIVAL_WITHIN * surface.noise
    return surface.joins(width, places[0], places[1], level)


def _percent(share: float) -> str:
    """Format a share of the loss as a percentage.

    >>> _percent(0.00123), _percent(0.0000123)
    ('0.12 %', '0.0012 %')
    """
    return f"{100 * share:.2g} %"
