"""What `telescope plan` says: the costs of a spec, and how long they take."""

from __future__ import annotations

from typing import Any

from telescope.errors import DataError, SpecError
from telescope.records import Point, Trial
from telescope.spec.spec import Spec
from telescope.sweep.answer import UNCONFIRMED, rule_problem
from telescope.sweep.foreign import Foreign, plan_foreign
from telescope.sweep.machine import workers
from telescope.sweep.prepare import (
    ASSUMED_FLOP_RATE,
    Prepared,
    check_corpus,
    check_usable,
    estimate_seconds,
    over_budget,
    plan_as_json,
    prepare,
)


def make_plan(spec: Spec, *, probe: bool) -> tuple[dict[str, Any], str | None]:
    """The plan in its JSON keys, and why `run` would refuse it, or None.

    Args:
        spec: the sweep.
        probe: time a few real steps at every width instead of assuming a rate, and each arithmetic.

    Raises:
        TelescopeError: the spec, its model file or its corpus is wrong.
    """
    at_once = workers(spec, None, is_cluster=False)
    if spec.trainer:
        if probe:
            raise SpecError(
                "--probe: times the built-in trainer; with [trainer] give compute.flop_rate, and "
                "flops in [cost]"
            )
        return _plan_foreign(Foreign.of(spec), at_once)
    prepared = prepare(spec)
    if probe:
        check_corpus(prepared.trial_config)
        check_usable(spec.compute.device)
    seconds, basis = _probed(prepared) if probe else _assumed(prepared)
    estimate = estimate_seconds(prepared, seconds, at_once)
    basis += f"; {_describe_workers(at_once)}, start-up not counted"
    plan = plan_as_json(prepared, {"estimate": estimate, "basis": basis})
    return {**plan, "arithmetic": _timed(prepared) if probe else None}, _refusal(prepared)


def _plan_foreign(foreign: Foreign, at_once: dict[int, int]) -> tuple[dict[str, Any], str | None]:
    """The plan of a sweep that another program trains, as far as the spec says."""
    rate, flops = foreign.spec.compute.flop_rate, foreign.cost.flops
    if rate and flops:
        seconds = {width: cost / rate for width, cost in foreign.cost_per_trial.items()}
        timed = {
            "estimate": estimate_seconds(foreign, seconds, at_once),
            "basis": f"{rate:.3g} FLOP/s per worker (compute.flop_rate); "
            f"{_describe_workers(at_once)}, start-up not counted",
        }
    else:
        timed = {
            "estimate": None,
            "basis": "needs flops in [cost] and compute.flop_rate; `run` says when trials are done",
        }
    notes = [UNCONFIRMED.format(problem)] if (problem := rule_problem(foreign.spec)) else []
    return {**plan_foreign(foreign), "seconds": timed, "notes": notes}, over_budget(foreign)


def _describe_workers(at_once: dict[int, int]) -> str:
    """How many trials run at once, in words."""
    numbers = sorted(set(at_once.values()))
    if len(numbers) == 1:
        return f"{numbers[0]} worker{'s' if numbers[0] > 1 else ''}"
    return f"{numbers[0]} to {numbers[-1]} workers, by width"


def _refusal(prepared: Prepared) -> str | None:
    """Why `run` would refuse what can be planned all the same."""
    try:
        check_corpus(prepared.trial_config)
    except DataError as error:
        return str(error)
    return over_budget(prepared)


def _probed(prepared: Prepared) -> tuple[dict[int, float], str]:
    """Width → seconds of a trial, timed on this machine."""
    from telescope.train.probe import seconds_per_trial

    seconds = {
        trial.width: seconds_per_trial(prepared.trial_config, trial)
        for trial in _lowest_trials(prepared)
    }
    return seconds, "measured: a few steps at every width, one worker alone on this machine"


def _timed(prepared: Prepared) -> dict[str, dict[str, dict[int, float]]]:
    """Key of an arithmetic → "fp32" and "bf16" → width → seconds per step, on this machine."""
    from telescope.train.probe import arithmetic_seconds

    found: dict[str, dict[str, dict[int, float]]] = {}
    for trial in _lowest_trials(prepared):
        for key, times in arithmetic_seconds(prepared.trial_config, trial).items():
            for arithmetic, seconds in times.items():
                found.setdefault(key, {}).setdefault(arithmetic, {})[trial.width] = seconds
    return found


def _lowest_trials(prepared: Prepared) -> list[Trial]:
    """A trial of every width, at the low end of every axis."""
    point = Point.of({axis.name: axis.low for axis in prepared.spec.ladder_spec.axes})
    return [Trial(width, point, 0) for width in prepared.costs]


def _assumed(prepared: Prepared) -> tuple[dict[int, float], str]:
    """Width → seconds of a trial at a stated rate."""
    compute = prepared.spec.compute
    rates = {
        width: compute.flop_rate or ASSUMED_FLOP_RATE * compute.cpus_at(width)
        for width in prepared.costs
    }
    source = "compute.flop_rate" if compute.flop_rate else "assumed; --probe measures"
    seconds = {width: flops / rates[width] for width, flops in prepared.cost_per_trial.items()}
    slow, fast = min(rates.values()), max(rates.values())
    shown = f"{slow:.3g}" if slow == fast else f"{slow:.3g} to {fast:.3g}"
    return seconds, f"{shown} FLOP/s per worker ({source})"
