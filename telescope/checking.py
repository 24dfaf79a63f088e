"""The coordinate check as the verbs use it: in full for `check`, in short before a `run`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from telescope.dispatch.folder import Folder
from telescope.errors import RefusedError
from telescope.prepare import ASSUMED_FLOP_RATE, Prepared, check_corpus, check_usable
from telescope.records import Point
from telescope.report.figures import write_check_figure
from telescope.report.live import describe_seconds
from telescope.spec import AxisTable, Spec
from telescope.train.coordcheck import (
    SHORT,
    CoordCheck,
    Extent,
    check_config,
    coordinate_check,
)
from telescope.train.flops import step_cost

HIGHEST_LR = 0.004
"""The check's lr where the grid starts higher: there even the right rule's logits shrink with the
width, by up to a slope of -0.37 (measured at lr 0.02), and the check would say nothing."""
LOWEST_LR = 1e-4
"""The check's lr where the grid starts lower: twenty smaller steps drown in float32's rounding."""
ANNOUNCED_SECONDS = 300.0
"""A check that is expected to take longer says so first."""


def run_check(
    prepared: Prepared, say: Callable[[str], None], extent: Extent | None = None
) -> CoordCheck:
    """Measure the model and the optimizer that the spec names.

    Args:
        prepared: the sweep.
        say: takes a line when the check will be long.
        extent: how much to measure; left out, everything.

    Raises:
        ModelError: the model file cannot be built, or fails, at one of the widths.
        SpecError: this machine has not the device that the spec names.
        DataError: the corpus is too short for the check's small batches.
    """
    extent = extent or Extent()
    check_usable(prepared.spec.compute.device)
    config, point = prepared.trial_config, check_point(prepared.spec)
    check_corpus(check_config(config, extent))
    seconds = expected_seconds(prepared, extent)
    if seconds > ANNOUNCED_SECONDS:
        widths = ", ".join(map(str, extent.widths(config.base_width)))
        say(
            f"{prepared.spec.name}: coordinate check at widths {widths}: about "
            f"{describe_seconds(seconds)} expected; `run --no-check` leaves it out"
        )
    return coordinate_check(config, point, extent)


def check_point(spec: Spec) -> Point:
    """The grid's lowest lr, within `LOWEST_LR` and `HIGHEST_LR`; the middle of every other axis."""
    point = {name: _middle(axis) for name, axis in spec.axes.items()}
    low = spec.axes["lr"].low or point["lr"]
    return Point.of({**point, "lr": min(max(low, LOWEST_LR), HIGHEST_LR)})


def _middle(axis: AxisTable) -> float:
    """The geometric middle of a range, or the fixed value."""
    if axis.value is not None:
        return axis.value
    assert axis.low is not None
    assert axis.high is not None
    return math.sqrt(axis.low * axis.high)


def expected_seconds(prepared: Prepared, extent: Extent) -> float:
    """How long the check takes, by counted FLOPs at the spec's rate or the assumed one."""
    compute = prepared.spec.compute
    rate = compute.flop_rate or ASSUMED_FLOP_RATE * compute.cpus
    config = check_config(prepared.trial_config, extent)
    flops_per_step = sum(
        step_cost(
            config.model, config.train, config.optimizer, width=width, base_width=config.base_width
        ).total
        for width in extent.widths(config.base_width)
    )
    return flops_per_step * config.train.steps * len(extent.seeds) / rate


def write_check(folder: Folder, check: CoordCheck, prepared: Prepared) -> None:
    """Keep the verdict, whose it is, and its figure in the results folder."""
    folder.write_check({**check.as_dict(), "fingerprint": prepared.fingerprint})
    write_check_figure(folder.path / "coordcheck.png", check, check_title(prepared.spec))


def check_before_run(
    prepared: Prepared, folder: Folder, *, wanted: bool, say: Callable[[str], None]
) -> Callable[[], None]:
    """Make the short check, unless the sweep has its verdict already.

    Args:
        prepared: the sweep.
        folder: its results folder; a verdict on the same training is not measured again.
        wanted: False for `--no-check`.
        say: takes what there is to say, a line each.

    Returns:
        What writes the verdict down, to be called when the folder is the sweep's.

    Raises:
        RefusedError: the check failed, and the spec's rule claims to transfer.
    """
    spec, on_purpose = prepared.spec, prepared.spec.optimizer.rule != "mup"
    known = folder.read_check() or {}
    is_settled = known.get("verdict") == "PASS" or on_purpose
    if is_settled and known.get("fingerprint") == prepared.fingerprint:
        return lambda: None
    if not wanted:
        say(f"{spec.name}: no coordinate check (--no-check)")
        return lambda: None
    start = time.monotonic()
    check = run_check(prepared, say, SHORT)
    took = describe_seconds(time.monotonic() - start)
    if check.passed:
        say(f"{spec.name}: coordinate check PASS in {took}: {describe_verdict(check)}")
    elif on_purpose:
        say(
            f"{spec.name}: warning: coordinate check FAIL, expected of rule "
            f"{spec.optimizer.rule!r}: {describe_verdict(check)}; what is found need not hold at "
            "the target"
        )
    else:
        raise RefusedError(
            f"{spec.name}: coordinate check FAIL: {describe_verdict(check)}; `telescope check` "
            "shows all of it; mend the model file, or run with --no-check"
        )
    return lambda: write_check(folder, check, prepared)


def check_title(spec: Spec) -> str:
    """What a figure or a table of the check is headed with."""
    return f"{spec.name}: {spec.optimizer.name}, rule {spec.optimizer.rule}"


def describe_verdict(check: CoordCheck) -> str:
    """The reason of a verdict in a line."""
    if check.problems:
        worst, *others = (f"{name} {problem}" for name, problem in check.problems.items())
        return worst + (f" (and {len(others)} others)" if others else "")
    name, slope = check.steepest
    return f"steepest slope {slope:+.2f} ± {check.errors[name]:.2f} ({name})"
