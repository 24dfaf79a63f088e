"""The coordinate check as the verbs use it: in full for `check`, in short before a `run`."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

from telescope.check.coordcheck import (
    SHORT,
    Extent,
    check_config,
    coordinate_check,
)
from telescope.check.verdict import CoordCheck
from telescope.dispatch.device import free_memory
from telescope.errors import RefusedError, SpecError
from telescope.records import Point
from telescope.report.live import describe_seconds
from telescope.spec.spec import Spec
from telescope.spec.tables import AxisTable
from telescope.store.folder import CHECK_FIGURE_FILE, Folder
from telescope.sweep.foreign import Told
from telescope.sweep.prepare import ASSUMED_FLOP_RATE, Prepared, check_corpus, check_usable, prepare
from telescope.train.flops import step_cost
from telescope.train.loop import resolve_device

CHECK_LR = 0.004
"""The check's lr, whatever the grid. Above it even the right rule's logits shrink with the width,
by up to a slope of -0.37 (measured at lr 0.02). Below it three steps do not leave the start, where
a tied readout's logits shrink as 1/√width by right (-0.40 at lr 1e-4, -0.28 at 1e-3, -0.03 at
0.004): together they must be of the order of the tied embedding's standard deviation, 0.02."""
CHECK_INIT_SCALE = 1.0
"""The check's init_scale, whatever the axis: a factor that is the same at every width changes no
rule, and with a large one three steps at CHECK_LR do not leave a tied readout's start (measured at
4, tied: the logits' change has a slope of -0.35 under Muon, -0.29 under AdamW)."""
NO_MODEL = "another trainer's sweep, so there is no model to check"
ANNOUNCED_SECONDS = 300.0
"""A check that is expected to take longer says so first."""


def run_check(
    prepared: Prepared,
    say: Callable[[str], None],
    extent: Extent | None = None,
    progress: Callable[[float, float], None] | None = None,
) -> CoordCheck:
    """Measure the model and the optimizer that the spec names.

    Args:
        prepared: the sweep.
        say: takes a line when the check will be long.
        extent: how much to measure; left out, everything.
        progress: see `coordinate_check`.

    Raises:
        ModelError: the model file cannot be built, or fails, at one of the widths.
        SpecError: this machine has not the device that the spec names.
        DataError: the corpus is too short for the check's small batches.
    """
    extent = extent or Extent()
    check_usable(prepared.spec.compute.device)
    config, point = prepared.trial_config, check_point(prepared.spec)
    check_corpus(check_config(config, extent))
    is_long = seconds_at_most(prepared, extent) > ANNOUNCED_SECONDS
    if is_long and (seconds := expected_seconds(prepared, extent)) > ANNOUNCED_SECONDS:
        widths = ", ".join(map(str, extent.widths(config.base_width)))
        say(
            f"{prepared.spec.name}: coordinate check at widths {widths}: about "
            f"{describe_seconds(seconds)} expected; `run --no-check` leaves it out"
        )
    check = coordinate_check(config, point, extent, progress)
    free_memory()  # which the workers need
    return check


def check_in_full(
    spec: Spec,
    folder: Folder,
    say: Callable[[str], None],
    progress: Callable[[float, float], None] | None = None,
) -> tuple[CoordCheck, bool]:
    """Make the full check, and keep its verdict in the results folder.

    Args:
        spec: the sweep; one that telescope trains itself.
        folder: its results folder, made where there is none.
        say: takes what there is to say, a line each.
        progress: told how far it is, and of how much.

    Returns:
        The check, and whether it was kept; see `write_check`.

    Raises:
        ResumeError: the folder's files cannot be read.
        TelescopeError: the sweep cannot be checked; see `run_check` and `prepare`.
    """
    prepared = prepare(spec)
    check = run_check(prepared, say, progress=progress)
    folder.create()
    is_kept = write_check(folder, check, prepared)
    if is_kept:
        draw_kept_check(folder, spec)
    else:
        say(
            f"{spec.name}: verdict not kept: {folder.path} holds a sweep of other training; "
            "--name keeps it elsewhere"
        )
    return check, is_kept


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


def expected_seconds(prepared: Prepared, extent: Extent) -> float:
    """How long the check takes on this machine, by counted FLOPs at the spec's or assumed rate."""
    config = check_config(prepared.trial_config, extent)
    flops_per_step = sum(
        step_cost(
            config.model, config.train, config.optimizer, width=width, base_width=config.base_width
        ).total
        for width in extent.widths(config.base_width)
    )
    return _seconds_of(prepared, extent, flops_per_step)


def seconds_at_most(prepared: Prepared, extent: Extent) -> float:
    """A bound of `expected_seconds` from what is counted already: to count takes a second.

    The check's batches are no larger than the sweep's, and a step's cost grows with the width at
    most as its cube, which that of Newton-Schulz does.
    """
    costs = prepared.costs

    def at_most(width: int) -> float:
        counted = min((other for other in costs if other >= width), default=max(costs))
        return costs[counted].total * max(1.0, width / counted) ** 3

    widths = extent.widths(prepared.spec.base_width)
    return _seconds_of(prepared, extent, sum(map(at_most, widths)))


def _seconds_of(prepared: Prepared, extent: Extent, flops_per_step: float) -> float:
    """How long a check takes whose steps at all widths cost so much together."""
    compute = prepared.spec.compute
    assumed = ASSUMED_FLOP_RATE * min(map(compute.cpus_at, prepared.spec.ladder.widths))
    rate = compute.flop_rate or assumed
    if resolve_device(compute.device) == "cpu":
        # The spec's rate is a worker's, and the worker may be a GPU of a cluster.
        rate = min(rate, assumed)
    return flops_per_step * max(extent.steps) * len(extent.seeds) / rate


def write_check(folder: Folder, check: CoordCheck, prepared: Prepared) -> bool:
    """Keep the verdict, and whose it is, in the results folder; `draw_kept_check` draws it.

    Args:
        folder: the sweep's.
        check: the verdict.
        prepared: the sweep.

    Returns:
        Whether it was kept: not where the folder holds a sweep of other training.
    """
    if folder.exists and folder.read_spec()["fingerprint"] != prepared.fingerprint:
        return False
    folder.write_check({**check.as_dict(), "fingerprint": prepared.fingerprint})
    (folder.path / CHECK_FIGURE_FILE).unlink(missing_ok=True)  # an earlier one's
    return True


def draw_kept_check(folder: Folder, spec: Spec) -> None:
    """Write the figure of a verdict that is kept with its sizes, unless it is there.

    Apart from `write_check`, because a second of imports and drawing is no part of a sweep's start.
    """
    path = folder.path / CHECK_FIGURE_FILE
    if path.is_file():
        return
    try:
        check = CoordCheck.from_dict(folder.read_check() or {})
    except (KeyError, TypeError, ValueError, AttributeError):
        return  # no check was made, or it is of another version
    from telescope.report.figures import write_check_figure

    write_check_figure(path, check, check_title(spec))


_Timed = tuple[CoordCheck, float]
"""A check, and the seconds that it took."""


@dataclass(frozen=True)
class Verdict:
    """A verdict that there is, or that is being made in another thread."""

    settle: Callable[[], Callable[[], object]]
    """Wait for it, and say it; returns what writes it down, to be called when the folder is the
    sweep's. Raises what `check_before_run` does."""
    is_due: Callable[[], bool] = lambda: True
    """Whether there is no more to wait for."""


def _nothing() -> None:
    """Write no verdict down."""


@contextmanager
def check_before_run(
    prepared: Prepared | Told,
    folder: Folder,
    *,
    wanted: bool,
    say: Callable[[str], None],
    phase: Callable[[str], AbstractContextManager[object]] = nullcontext,
) -> Iterator[Verdict]:
    """Make the short check of a sweep that has not started, unless it has its verdict already.

    A verdict is about how a sweep starts: one that has started goes on, with or without. The check
    is made in a thread of its own, and given up when the context is left before it is done.

    Args:
        prepared: the sweep.
        folder: its results folder; a verdict on the same training is not measured again.
        wanted: False for `--no-check`.
        say: takes what there is to say, a line each.
        phase: shows what is being done, for as long as its block runs.

    Yields:
        The verdict; to settle it raises RefusedError where the check failed and the spec's rule
        claims to transfer, and what `run_check` raises.
    """
    if folder.exists:
        yield Verdict(lambda: _nothing)
        return
    spec, known = prepared.spec, folder.read_check() or {}
    is_known = known.get("fingerprint") == prepared.fingerprint and known["verdict"]
    reason = NO_MODEL if isinstance(prepared, Told) else _why_not(spec, wanted)
    if isinstance(prepared, Told) or reason:
        say(f"{spec.name}: no coordinate check: {reason}")
        record = {"verdict": None, "reason": reason, "fingerprint": prepared.fingerprint}
        yield Verdict(lambda: _nothing if is_known else (lambda: folder.write_check(record)))
        return
    if is_known:
        _settle(spec, known["verdict"] == "PASS", f": as kept in {folder.path}", say)
        yield Verdict(lambda: _nothing)
        return
    ours = prepared

    def make(progress: Callable[[float, float], None]) -> _Timed:
        start = time.monotonic()
        with phase("checking the model"):
            check = run_check(ours, say, SHORT, progress=progress)
        return check, time.monotonic() - start

    with _beside(make) as outcome:

        def settle() -> Callable[[], object]:
            check, seconds = outcome.result()
            took = f" in {describe_seconds(seconds)}" if check.passed else ""
            _settle(spec, check.passed, f"{took}: {describe_verdict(check)}", say)
            return lambda: write_check(folder, check, ours)

        yield Verdict(settle, outcome.done)


class _Ended(BaseException):
    """Ends a check whose outcome nobody waits for any more."""


@contextmanager
def _beside(
    work: Callable[[Callable[[float, float], None]], _Timed],
) -> Iterator[Future[_Timed]]:
    """Make a check in another thread, while this one does something else.

    One whose outcome nobody waits for any more ends before its next run.
    """
    ending, outcome = threading.Event(), Future[_Timed]()

    def heed(_done: float, _whole: float) -> None:
        if ending.is_set():
            raise _Ended

    def make() -> None:
        try:
            outcome.set_result(work(heed))
        except BaseException as error:
            outcome.set_exception(error)

    thread = threading.Thread(target=make, name="telescope-check", daemon=True)
    thread.start()
    try:
        yield outcome
    finally:
        ending.set()
        thread.join()


def _why_not(spec: Spec, wanted: bool) -> str | None:
    """Why the check before a run is left out; None where it can be made."""
    if not wanted:
        return "--no-check"
    try:
        check_usable(spec.compute.device)
    except SpecError:  # a cluster's machines have it: a run in place would have been refused
        return (
            f"this machine has no device {spec.compute.device!r}; `telescope check` makes it on a "
            "machine that has one"
        )
    return None


def _settle(spec: Spec, is_passed: bool, finding: str, say: Callable[[str], None]) -> None:
    """Say a verdict, or refuse.

    Raises:
        RefusedError: FAIL, and the spec's rule claims to transfer.
    """
    if is_passed:
        say(f"{spec.name}: coordinate check PASS{finding}")
    elif spec.optimizer.rule != "mup":
        say(
            f"{spec.name}: warning: coordinate check FAIL, expected of rule "
            f"{spec.optimizer.rule!r}{finding}; what is found need not hold at the target"
        )
    else:
        raise RefusedError(
            f"{spec.name}: coordinate check FAIL{finding}; `telescope check` shows all of it; mend "
            "the model file, or run with --no-check"
        )


def check_title(spec: Spec) -> str:
    """What a figure or a table of the check is headed with."""
    return f"{spec.name}: {spec.optimizer.name}, rule {spec.optimizer.rule}"


def describe_verdict(check: CoordCheck) -> str:
    """The reason of a verdict in a line."""
    if check.problems:
        worst, *others = (f"{name} {problem}" for name, problem in check.problems.items())
        return worst + (f" (and {len(others)} others)" if others else "")
    name, slope = check.steepest
    doubts = f"; {len(check.uncertain)} uncertain" if check.uncertain else ""
    if check.blind_spot:
        doubts += f"; warning: {check.blind_spot}"
    return f"steepest slope {slope:+.2f} ± {check.errors[name]:.2f} ({name}){doubts}"
