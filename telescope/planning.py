"""What `telescope plan` says: the costs of a spec, and how long they take."""

from __future__ import annotations

from typing import Any

from telescope.errors import DataError
from telescope.prepare import (
    ASSUMED_FLOP_RATE,
    Prepared,
    check_corpus,
    estimate_seconds,
    over_budget,
    plan_as_json,
    prepare,
    workers,
)
from telescope.records import Point, Trial
from telescope.settle import settled_here
from telescope.spec import Spec
from telescope.train.choose import undecided


def make_plan(spec: Spec, *, probe: bool) -> tuple[dict[str, Any], str | None]:
    """The plan in its JSON keys, and why `run` would refuse it, or None.

    Args:
        spec: the sweep.
        probe: time a few real steps at every width instead of assuming a rate.

    Raises:
        TelescopeError: the spec, its model file or its corpus is wrong.
    """
    prepared = prepare(spec)
    auto = dict.fromkeys(undecided(prepared.trial_config), "decided by the first run")
    if probe:
        check_corpus(prepared.trial_config)
        prepared, measured = settled_here(prepared)
        auto = {key: f"{figures.choice} as measured now" for key, figures in measured.items()}
    number = workers(spec, None, is_cluster=False)
    seconds, basis = _probed(prepared) if probe else _assumed(prepared)
    estimate = estimate_seconds(prepared, seconds, number)
    basis += f"; {number} worker{'s' if number > 1 else ''}, start-up not counted"
    plan = plan_as_json(prepared, {"estimate": estimate, "basis": basis})
    return {**plan, "auto": auto}, _refusal(prepared)


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

    point = Point.of({axis.name: axis.low for axis in prepared.spec.ladder_spec.axes})
    trials = (Trial(width, point, 0) for width in prepared.costs)
    seconds = {trial.width: seconds_per_trial(prepared.trial_config, trial) for trial in trials}
    return seconds, "measured: a few steps at every width, one worker alone on this machine"


def _assumed(prepared: Prepared) -> tuple[dict[int, float], str]:
    """Width → seconds of a trial at a stated rate."""
    compute = prepared.spec.compute
    rate = compute.flop_rate or ASSUMED_FLOP_RATE * compute.cpus
    source = "compute.flop_rate" if compute.flop_rate else "assumed; --probe measures"
    seconds = {width: flops / rate for width, flops in prepared.cost_per_trial.items()}
    return seconds, f"{rate:.3g} FLOP/s per worker ({source})"
