"""A progress bar on stderr for long tasks before a sweep starts, and a target run's line."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from telescope.target.folder import describe_progress

SMALLEST_MOVE = 0.002
"""Least share of the whole by which the bar moves: a call per document would cost more than the
document itself."""


@contextmanager
def progress_bar(title: str, afterwards: str = "") -> Iterator[Callable[[float, float], None]]:
    """Show a bar while the block runs; nothing if stderr is not a terminal.

    Args:
        title: name of the task.
        afterwards: name of a last step without progress, after everything has been read.

    Yields:
        A function to call with the amount done and the whole.
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %", markup=False),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(title, total=None)
        shown = 0.0

        def move(done: float, whole: float) -> None:
            nonlocal shown
            if done >= whole and afterwards:
                bar.update(task, description=afterwards, completed=whole)
            elif done < shown or done - shown >= SMALLEST_MOVE * whole or done >= whole:
                bar.update(task, description=title, completed=done, total=whole)
                shown = done

        yield move


LINES = 20
"""Most lines on a run's progress where the output is no terminal, evenly spaced over its steps."""
LINE_SECONDS = 30.0
"""Most seconds between two such lines; a long run has more of them."""


@contextmanager
def run_progress(console: Console, title: str) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Show a target run while the block runs: one moving line on a terminal, plain lines elsewhere.

    Args:
        console: the console to print on.
        title: the run.

    Yields:
        A function to call with the run's latest progress.
    """
    status = console.status(f"{title}: starting its ranks …") if console.is_terminal else None
    shown_step, shown_at = 0, time.monotonic()

    def show(said: Mapping[str, Any]) -> None:
        nonlocal shown_step, shown_at
        line = f"{title}: {describe_progress(said)}"
        if status:
            status.update(line)
            return
        is_far = bool(said["steps"]) and said["step"] - shown_step >= said["steps"] / LINES
        is_long_ago = said["step"] > shown_step and time.monotonic() - shown_at > LINE_SECONDS
        if is_far or is_long_ago:
            shown_step, shown_at = said["step"], time.monotonic()
            console.print(line, soft_wrap=True)

    if status is None:
        yield show
        return
    with status:
        yield show
