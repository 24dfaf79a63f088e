"""A progress bar on stderr for long tasks before a sweep starts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

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
