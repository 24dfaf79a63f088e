"""A bar on stderr for what takes long before a sweep starts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

SMALLEST_MOVE = 0.002
"""Share of the whole below which the bar is not moved: a call per document would cost more than the
document."""


@contextmanager
def progress_bar(title: str, afterwards: str = "") -> Iterator[Callable[[float, float], None]]:
    """Show a bar while the block runs; nothing where stderr is no terminal.

    Args:
        title: what is being done.
        afterwards: what is done once everything has been read, for as long as it takes.

    Yields:
        What takes how much is done, and of how much.
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
