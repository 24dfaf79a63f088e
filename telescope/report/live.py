"""The view of a running sweep: one live screen on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from telescope.records import Choice, Result, Status


@dataclass(frozen=True)
class Progress:
    """How far a sweep is; what the live view shows and the heartbeat file says."""

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
    """Since this run started."""
    eta_seconds: float | None

    def as_dict(self) -> dict[str, Any]:
        """JSON-able, the best trial as its point and loss."""
        best = self.best and {"point": dict(self.best.trial.point), "loss": self.best.loss}
        return {**{key: value for key, value in vars(self).items() if key != "best"}, "best": best}


class View(AbstractContextManager["View"], Protocol):
    """What a running sweep reports to."""

    def note(self, text: str) -> None:
        """Something worth a line that is no trial."""
        ...

    def start(self, progress: Progress) -> None:
        """The sweep starts, or goes on."""
        ...

    def watch(self, latest: Callable[[], str]) -> None:
        """From now on `latest` says in a line where the running trials are."""
        ...

    def update(self, progress: Progress) -> None:
        """A worker has taken a trial."""
        ...

    def result(self, result: Result, progress: Progress) -> None:
        """A trial has its result."""
        ...

    def choice(self, choice: Choice) -> None:
        """A stage has closed."""
        ...


def describe_start(progress: Progress) -> str:
    """What lies ahead, in a line."""
    if progress.done == progress.total:
        return f"{progress.name}: all {progress.total} trials are stored already"
    if progress.done:
        return f"{progress.name}: going on after {progress.done} of {progress.total} trials"
    return f"{progress.name}: {progress.total} trials at {progress.stages} widths"


def describe_result(result: Result) -> str:
    """One trial in a line."""
    seed = f", seed {result.trial.seed}" if result.trial.seed else ""  # a repeat, mostly
    if result.status is Status.COMPLETE:
        return f"{result.trial.point}{seed}: loss {result.loss:.4f} in {result.seconds:.1f} s"
    reason = result.reason.splitlines()[0] if result.reason else ""
    return f"{result.trial.point}{seed}: {result.status}, {reason}"


def describe_choice(choice: Choice) -> str:
    """One decision in a line."""
    return f"width {choice.width}: chose {choice.point} (loss {choice.loss:.4f}): {choice.reason}"


def describe_seconds(seconds: float | None) -> str:
    """A duration as people say it.

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


class QuietView(View):
    """Says nothing: whoever runs the loop has a screen of their own."""

    def __exit__(self, *exception: object) -> None:
        """Leave nothing behind."""

    def note(self, text: str) -> None:
        """Nothing."""
        return

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


class PlainView(View):
    """One line per result and per decision: for logs and pipes."""

    def __init__(self, console: Console) -> None:
        """Write to `console`."""
        self._console = console

    def __exit__(self, *_: object) -> None:
        """Nothing to close."""

    def _line(self, text: str) -> None:
        self._console.print(text, soft_wrap=True)

    def note(self, text: str) -> None:
        """Say it."""
        self._line(text)

    def watch(self, latest: Callable[[], str]) -> None:
        """Where trials are on the way is not worth a line."""

    def start(self, progress: Progress) -> None:
        """Say what lies ahead."""
        self._line(describe_start(progress))

    def update(self, progress: Progress) -> None:
        """Starts are not worth a line."""

    def result(self, result: Result, progress: Progress) -> None:
        """One line per trial."""
        width = len(str(progress.total))
        self._line(
            f"[{progress.done:{width}}/{progress.total}] width {result.trial.width}: "
            f"{describe_result(result)}"
        )

    def choice(self, choice: Choice) -> None:
        """One line per stage."""
        self._line(describe_choice(choice))


class LiveView(View):
    """A small screen that is redrawn in place; decisions scroll above it."""

    def __init__(self, console: Console) -> None:
        """Draw on `console`."""
        self._last = ""
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
        """Stop drawing, and take the screen away."""
        self._live.__exit__(None, None, None)

    def note(self, text: str) -> None:
        """Let it scroll by above the screen."""
        self._live.console.print(text)

    def watch(self, latest: Callable[[], str]) -> None:
        """Ask it at every redraw."""
        self._latest = latest

    def _screen(self) -> RenderableType:
        """What is drawn, four times a second."""
        if self._progress is None:
            return ""
        return _screen(self._progress, self._last, self._latest and self._latest())

    def start(self, progress: Progress) -> None:
        """Draw the first screen."""
        if progress.done:
            self._live.console.print(describe_start(progress))
        self.update(progress)

    def update(self, progress: Progress) -> None:
        """Redraw."""
        self._progress = progress
        self._live.refresh()

    def result(self, result: Result, progress: Progress) -> None:
        """Redraw with the newest result."""
        self._last = f"width {result.trial.width}: {describe_result(result)}"
        if result.status is Status.FAILED:
            self._live.console.print(self._last, style="red")
        self.update(progress)

    def choice(self, choice: Choice) -> None:
        """Let the decision scroll by above the screen."""
        self._live.console.print(describe_choice(choice))


def _screen(progress: Progress, last: str, latest: str | None) -> RenderableType:
    """The live screen: title, bar, and four facts; five where running trials say where they are."""
    title = Text.assemble(
        (progress.name, "bold"),
        f"  stage {progress.stage + 1} of {progress.stages}, width {progress.width}: "
        f"{progress.stage_done} of {progress.stage_total} trials, {progress.running} running",
    )
    best = progress.best and f"loss {progress.best.loss:.4f} at {progress.best.trial.point}"
    facts = Table.grid(padding=(0, 2))
    for label, text in (
        ("best at this width", best or "none yet"),
        ("last", last or "waiting for the first trial; workers take a few seconds to start"),
        *([("running", latest)] if latest else []),
        ("so far", describe_seconds(progress.seconds)),
        ("left", describe_seconds(progress.eta_seconds)),
    ):
        facts.add_row(Text(label, style="dim"), text)
    bar = Table.grid(padding=(0, 1))
    bar.add_row(
        ProgressBar(progress.total, progress.done, width=40), f"{progress.done}/{progress.total}"
    )
    return Group(title, bar, facts)


def make_view(console: Console) -> View:
    """The live screen on a terminal, plain lines elsewhere."""
    return LiveView(console) if console.is_terminal else PlainView(console)
