"""The coordinate check of a sweep's model: at which setting, how long, and made on this machine."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Protocol

from telescope.check.coordcheck import SHORT, Extent, check_config, coordinate_check
from telescope.check.verdict import CoordCheck
from telescope.config import TrialConfig
from telescope.dispatch.device import free_memory
from telescope.records import Point
from telescope.report.live import describe_seconds
from telescope.spec.spec import Spec
from telescope.spec.tables import AxisTable
from telescope.sweep.counting import ASSUMED_FLOP_RATE, check_corpus
from telescope.sweep.machine import check_usable
from telescope.train.cost import StepCost
from telescope.train.device import resolve_device
from telescope.train.flops import step_cost

CHECK_LR = 0.004
"""The check's lr, whatever the grid. Above it even the right rule's logits shrink with the width,
by up to a slope of -0.37 (measured at lr 0.02). Below it three steps do not leave the start, where
a tied readout's logits shrink as 1/√width by right (-0.40 at lr 1e-4, -0.28 at 1e-3, -0.03 at
0.004): together they must be of the order of the tied embedding's standard deviation, 0.02."""
CHECK_INIT_SCALE = 1.0
"""The check's init_scale, whatever the axis: a factor that is the same at every width changes no
rule, and with a large one three steps at CHECK_LR do not leave a tied readout's start (measured at
4, tied: the logits' change has a slope of -0.35 under Muon, -0.29 under AdamW)."""
ANNOUNCED_SECONDS = 300.0
"""A check that is expected to take longer says so first."""


class Checkable(Protocol):
    """A sweep with a model to check."""

    @property
    def spec(self) -> Spec:
        """The sweep's spec."""
        ...

    @property
    def trial_config(self) -> TrialConfig:
        """Its training."""
        ...

    @property
    def costs(self) -> Mapping[int, StepCost]:
        """Width → cost of one step."""
        ...


def run_check(
    sweep: Checkable,
    say: Callable[[str], None],
    extent: Extent | None = None,
    progress: Callable[[float, float], None] | None = None,
) -> CoordCheck:
    """Measure the model and the optimizer that the spec names.

    Args:
        sweep: the sweep.
        say: takes a line when the check will be long.
        extent: how much to measure; left out, everything.
        progress: see `coordinate_check`.

    Raises:
        ModelError: the model file cannot be built, or fails, at one of the widths.
        SpecError: this machine has not the device that the spec names.
        DataError: the corpus is too short for the check's small batches.
    """
    extent = extent or Extent()
    check_usable(sweep.spec.compute.device)
    config, point = sweep.trial_config, check_point(sweep.spec)
    check_corpus(check_config(config, extent))
    is_long = seconds_at_most(sweep, extent) > ANNOUNCED_SECONDS
    if is_long and (seconds := expected_seconds(sweep, extent)) > ANNOUNCED_SECONDS:
        widths = ", ".join(map(str, extent.widths(config.base_width)))
        say(
            f"{sweep.spec.name}: coordinate check at widths {widths}: about "
            f"{describe_seconds(seconds)} expected; `run --no-check` leaves it out"
        )
    check = coordinate_check(config, point, extent, progress)
    free_memory()  # which the workers need
    return check


def check_point(spec: Spec) -> Point:
    """The check's own lr and init_scale; the middle of every other axis."""
    own = {"lr": CHECK_LR, "init_scale": CHECK_INIT_SCALE}
    return Point.of({name: own.get(name, _middle(axis)) for name, axis in spec.axes.items()})


def _middle(axis: AxisTable) -> float:
    """The geometric middle of a range, or the fixed value."""
    if axis.value is not None:
        return axis.value
    assert axis.low is not None
    assert axis.high is not None
    return math.sqrt(axis.low * axis.high)


def expected_seconds(sweep: Checkable, extent: Extent) -> float:
    """Estimate the check's time on this machine from counted FLOPs and the (assumed) rate."""
    config = check_config(sweep.trial_config, extent)
    flops_per_step = sum(
        step_cost(
            config.model, config.train, config.optimizer, width=width, base_width=config.base_width
        ).total
        for width in extent.widths(config.base_width)
    )
    return _seconds_of(sweep, extent, flops_per_step)


def seconds_at_most(sweep: Checkable, extent: Extent) -> float:
    """Return a bound of `expected_seconds` from costs counted already, as counting takes a second.

    The check's batches are no larger than the sweep's, and a step's cost grows with the width at
    most as its cube, which that of Newton-Schulz does.
    """
    costs = sweep.costs

    def at_most(width: int) -> float:
        counted = min((other for other in costs if other >= width), default=max(costs))
        return costs[counted].total * max(1.0, width / counted) ** 3

    widths = extent.widths(sweep.spec.base_width)
    return _seconds_of(sweep, extent, sum(map(at_most, widths)))


def _seconds_of(sweep: Checkable, extent: Extent, flops_per_step: float) -> float:
    """Return a check's time from the FLOPs of one step at every width together."""
    compute = sweep.spec.compute
    assumed = ASSUMED_FLOP_RATE * min(map(compute.cpus_at, sweep.spec.ladder.widths))
    rate = compute.flop_rate or assumed
    if resolve_device(compute.device) == "cpu":
        # The spec's rate is a worker's, and the worker may be a GPU of a cluster.
        rate = min(rate, assumed)
    return flops_per_step * max(extent.steps) * len(extent.seeds) / rate


def short_check(
    sweep: Checkable, say: Callable[[str], None], progress: Callable[[float, float], None]
) -> CoordCheck:
    """Make the check that comes before a run; see `run_check`."""
    return run_check(sweep, say, SHORT, progress=progress)
