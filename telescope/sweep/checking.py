"""The coordinate check as the verbs use it: in full for `check`, in short before a `run`."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

from telescope.check.verdict import CoordCheck
from telescope.errors import RefusedError
from telescope.report.live import describe_seconds
from telescope.spec.spec import Spec
from telescope.store.folder import CHECK_FIGURE_FILE, Folder
from telescope.sweep.builtin import BuiltIn
from telescope.sweep.runnable import Runnable


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
    from telescope.sweep.modelcheck import run_check  # here, as torch takes seconds to import

    sweep = BuiltIn.of(spec)
    check = run_check(sweep, say, progress=progress)
    folder.create()
    is_kept = write_check(folder, check, sweep)
    if is_kept:
        draw_kept_check(folder, spec)
    else:
        say(
            f"{spec.name}: verdict not kept: {folder.path} holds a sweep of other training; "
            "--name keeps it elsewhere"
        )
    return check, is_kept


def write_check(folder: Folder, check: CoordCheck, sweep: Runnable) -> bool:
    """Keep the verdict, and whose it is, in the results folder; `draw_kept_check` draws it.

    Args:
        folder: the sweep's.
        check: the verdict.
        sweep: the sweep.

    Returns:
        Whether it was kept: not where the folder holds a sweep of other training.
    """
    if folder.exists and folder.read_spec()["fingerprint"] != sweep.fingerprint:
        return False
    folder.write_check({**check.as_dict(), "fingerprint": sweep.fingerprint})
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
    """A verdict, finished or in the making in another thread."""

    settle: Callable[[], Callable[[], object]]
    """Wait for the verdict and show it. Returns a function that writes it, to be called once the
    folder is the sweep's. Raises the errors of `check_before_run`."""
    is_due: Callable[[], bool] = lambda: True
    """Tells whether the verdict is there."""


def _nothing() -> None:
    """Write no verdict down."""


@contextmanager
def check_before_run(
    sweep: Runnable,
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
        sweep: the sweep.
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
    spec, known = sweep.spec, folder.read_check() or {}
    is_known = known.get("fingerprint") == sweep.fingerprint and known["verdict"]
    make_check, reason = sweep.model_check(wanted=wanted)
    if make_check is None:
        say(f"{spec.name}: no coordinate check: {reason}")
        record = {"verdict": None, "reason": reason, "fingerprint": sweep.fingerprint}
        yield Verdict(lambda: _nothing if is_known else (lambda: folder.write_check(record)))
        return
    if is_known:
        _settle(spec, known["verdict"] == "PASS", f": as kept in {folder.path}", say)
        yield Verdict(lambda: _nothing)
        return

    def make(progress: Callable[[float, float], None]) -> _Timed:
        start = time.monotonic()
        with phase("checking the model"):
            check = make_check(say, progress)
        return check, time.monotonic() - start

    with _beside(make) as outcome:

        def settle() -> Callable[[], object]:
            check, seconds = outcome.result()
            took = f" in {describe_seconds(seconds)}" if check.passed else ""
            _settle(spec, check.passed, f"{took}: {describe_verdict(check)}", say)
            return lambda: write_check(folder, check, sweep)

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
    """Return the title of the check's figure and table."""
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
