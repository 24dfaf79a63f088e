"""The display of a running sweep: a live screen on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from telescope.records import Choice, Result, Status


@dataclass(frozen=True)
class Progress:
    """The progress of a sweep, for the screen and the heartbeat file."""

    name: str
    state: str
    """running, interrupted, finished or stuck."""
    stage: int
    """Number of the open stage, from 0."""
    stages: int
    width: int
    stage_done: int
    stage_total: int
    done: int
    total: int
    running: int
    best: Result | None
    """The best trial of the open stage so far."""
    seconds: float
    """Seconds since this run started."""
    eta_seconds: float | None
    eta_range: tuple[float, float] | None = None
    """Range of `eta_seconds`: depending on the results, fewer or more trials follow."""

    def as_dict(self) -> dict[str, Any]:
        """Return JSON values, with the best trial as its point and loss."""
        best = self.best and {"point": dict(self.best.trial.point), "loss": self.best.loss}
        return {**{key: value for key, value in vars(self).items() if key != "best"}, "best": best}


class Screen(AbstractContextManager["Screen"], Protocol):
    """The receiver of a running sweep's reports."""

    def note(self, text: str) -> None:
        """Show a line that is not about a trial."""
        ...

    def phase(self, text: str) -> AbstractContextManager[object]:
        """Show a phase before the first trial, for as long as the block runs."""
        ...

    def start(self, progress: Progress) -> None:
        """Show that the sweep starts or resumes."""
        ...

    def watch(self, latest: Callable[[], str]) -> None:
        """Take a function that describes the running trials' progress in one line."""
        ...

    def update(self, progress: Progress) -> None:
        """Show that a worker has taken a trial."""
        ...

    def result(self, result: Result, progress: Progress) -> None:
        """Show a trial's result."""
        ...

    def choice(self, choice: Choice) -> None:
        """Show the choice of a closed stage."""
        ...


def describe_start(progress: Progress) -> str:
    """Describe the trials ahead in one line."""
    if progress.done == progress.total:
        return f"{progress.name}: all {progress.total} trials are stored already"
    if progress.done:
        return f"{progress.name}: going on after {progress.done} of {progress.total} trials"
    widths = "1 width" if progress.stages == 1 else f"{progress.stages} widths"
    return f"{progress.name}: {progress.total} trials at {widths}"


def describe_result(result: Result) -> str:
    """Describe a trial's result in one line."""
    seed = f", seed {result.trial.seed}" if result.trial.seed else ""  # a repeat, mostly
    if result.status is Status.COMPLETE:
        return f"{result.trial.point}{seed}: loss {result.loss:.4f} in {result.seconds:.1f} s"
    reason = result.reason.splitlines()[0] if result.reason else ""
    return f"{result.trial.point}{seed}: {result.status}, {reason}"


def describe_choice(choice: Choice) -> str:
    """Describe a choice in one line."""
    return f"width {choice.width}: chose {choice.point} (loss {choice.loss:.4f}): {choice.reason}"


def describe_seconds(seconds: float | None) -> str:
    """Format a duration for people.

    >>> describe_seconds(75.4), describe_seconds(4000), describe_seconds(None)
    ('1 min 15 s', '1 h 06 min', 'unknown')
    """
    if seconds is None:
        return "unknown"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes} min {rest:02d} s"
        if minutes < 60
        else f"{minutes // 60} h {minutes % 60:02d} min"
    )


class QuietScreen(Screen):
    """Shows nothing, for callers with a display of their own."""

    def __exit__(self, *exception: object) -> None:
        """Leave nothing behind."""

    def note(self, text: str) -> None:
        """Nothing."""
        return

    def phase(self, text: str) -> AbstractContextManager[object]:
        """Nothing."""
        return nullcontext()

    def watch(self, latest: Callable[[], str]) -> None:
        """Nothing."""
        return

    def start(self, progress: Progress) -> None:
        """Nothing."""
        return

    def update(self, progress: Progress) -> None:
        """Nothing."""
        return

    def result(self, result: Result, progress: Progress) -> None:
        """Nothing."""
        return

    def choice(self, choice: Choice) -> None:
        """Nothing."""
        return


class PlainScreen(Screen):
    """One line per result and per decision: for logs and pipes."""

    def __init__(self, console: Console) -> None:
        """Write to `console`."""
        self._console = console

    def __exit__(self, *_: object) -> None:
        """Nothing to close."""

    def _line(self, text: str) -> None:
        self._console.print(text, soft_wrap=True)

    def note(self, text: str) -> None:
        """Print the line."""
        self._line(text)

    def phase(self, text: str) -> AbstractContextManager[object]:
        """Print nothing: the phase is short."""
        return nullcontext()

    def watch(self, latest: Callable[[], str]) -> None:
        """Ignore the progress of running trials."""

    def start(self, progress: Progress) -> None:
        """Print the trials ahead."""
        self._line(describe_start(progress))

    def update(self, progress: Progress) -> None:
        """Ignore the starts of trials."""

    def result(self, result: Result, progress: Progress) -> None:
        """Print one line per trial."""
        width = len(str(progress.total))
        self._line(
            f"[{progress.done:{width}}/{progress.total}] width {result.trial.width}: "
            f"{describe_result(result)}"
        )

    def choice(self, choice: Choice) -> None:
        """Print one line per stage."""
        self._line(describe_choice(choice))


class LiveScreen(Screen):
    """A small screen that is redrawn in place; decisions scroll above it."""

    def __init__(self, console: Console) -> None:
        """Draw on `console`."""
        self._last = ""
        self._phases: dict[str, float] = {}  # phase → time of its start
        self._updated = time.monotonic()
        self._latest: Callable[[], str] | None = None
        self._progress: Progress | None = None
        self._live = Live(  # asks for the screen at once
            console=console, refresh_per_second=4, transient=True, get_renderable=self._screen
        )

    def __enter__(self) -> Self:
        """Start drawing."""
        self._live.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop drawing and remove the screen."""
        self._live.__exit__(None, None, None)

    def note(self, text: str) -> None:
        """Print the line above the screen."""
        self._live.console.print(text)

    @contextmanager
    def phase(self, text: str) -> Iterator[None]:
        """Show a line with a clock, and the phase's duration at its end."""
        start = self._phases[text] = time.monotonic()
        try:
            yield
        finally:
            del self._phases[text]
        took = describe_seconds(time.monotonic() - start)
        self._live.console.print(f"{text}  {took}", style="dim")

    def watch(self, latest: Callable[[], str]) -> None:
        """Call `latest` at every redraw."""
        self._latest = latest

    def _screen(self) -> RenderableType:
        """Return the content to draw, four times a second."""
        now = time.monotonic()
        lines: list[RenderableType] = [
            Text(f"{text} …  {describe_seconds(now - start)}", style="dim")
            for text, start in list(self._phases.items())
        ]
        if self._progress:
            progress = _passed(self._progress, now - self._updated)
            lines.append(_screen(progress, self._last, self._latest and self._latest()))
        return Group(*lines)

    def start(self, progress: Progress) -> None:
        """Draw the first screen."""
        if progress.done:
            self._live.console.print(describe_start(progress))
        self.update(progress)

    def update(self, progress: Progress) -> None:
        """Redraw."""
        self._progress, self._updated = progress, time.monotonic()
        self._live.refresh()

    def result(self, result: Result, progress: Progress) -> None:
        """Redraw with the newest result."""
        self._last = f"width {result.trial.width}: {describe_result(result)}"
        if result.status is Status.FAILED:
            self._live.console.print(self._last, style="red")
        self.update(progress)

    def choice(self, choice: Choice) -> None:
        """Print the decision above the screen."""
        self._live.console.print(describe_choice(choice))


def _passed(progress: Progress, seconds: float) -> Progress:
    """Return the progress some seconds later, if nothing else has happened."""
    left, between = progress.eta_seconds, progress.eta_range
    return replace(
        progress,
        seconds=progress.seconds + seconds,
        eta_seconds=None if left is None else max(left - seconds, 0.0),
        eta_range=between and (max(between[0] - seconds, 0.0), max(between[1] - seconds, 0.0)),
    )


def describe_left(progress: Progress) -> str:
    """Describe the time left, with its range if that is wider than the estimate's own error."""
    if progress.eta_seconds is None or progress.eta_range is None:
        return describe_seconds(progress.eta_seconds)
    low, high = progress.eta_range
    about = f"about {describe_seconds(progress.eta_seconds)}"
    if high < 1.2 * progress.eta_seconds + 1 and low > 0.8 * progress.eta_seconds - 1:
        return about
    return f"{about} ({describe_seconds(low)} to {describe_seconds(high)}, as the results fall)"


def _screen(progress: Progress, last: str, latest: str | None) -> RenderableType:
    """Lay out the live screen: title, bar, facts, and the running trials' progress if known."""
    title = Text.assemble(
        (progress.name, "bold"),
        f"  stage {progress.stage + 1} of {progress.stages}, width {progress.width}, "
        f"{progress.running} running",
    )
    best = progress.best and f"loss {progress.best.loss:.4f} at {progress.best.trial.point}"
    facts = Table.grid(padding=(0, 2))
    for label, text in (
        ("best at this width", best or "none yet"),
        ("last", last or "waiting for the first trial"),
        *([("running", latest)] if latest else []),
        ("so far", describe_seconds(progress.seconds)),
        ("left", describe_left(progress)),
    ):
        facts.add_row(Text(label, style="dim"), text)
    bar = Table.grid(padding=(0, 1))
    bar.add_row(
        ProgressBar(progress.total, progress.done, width=40),
        f"{progress.done} of {progress.total} trials",
    )
    return Group(title, bar, facts)


def make_screen(console: Console) -> Screen:
    """Return the live screen on a terminal, plain lines elsewhere."""
    return LiveScreen(console) if console.is_terminal else PlainScreen(console)
