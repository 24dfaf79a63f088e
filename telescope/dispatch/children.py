"""Give the processes that a trial forks the system's own signal handlers.

This program and Ray's workers turn SIGTERM into an exception, to end in good order. Forked children
inherit that, and `multiprocessing.Pool` ends its children by SIGTERM. A child that raises instead
while it holds its queue's lock leaves the others and its parent waiting for ever.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

DEFAULTS: dict[signal.Signals, Any] = {
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGALRM: signal.SIG_DFL,
    signal.SIGINT: signal.default_int_handler,
}
"""Signals that are handled here → the handler in a new Python process."""

_inherited: dict[signal.Signals, Any] = {}
"""Signal → its handler at the start of the trial; empty while none runs."""


@contextmanager
def plain_children() -> Iterator[None]:
    """Give processes forked by the code inside the handlers of `DEFAULTS`.

    Handlers that this code sets itself stay, and so do ignored signals.
    """
    before = dict(_inherited)
    _inherited.update({number: signal.getsignal(number) for number in DEFAULTS})
    try:
        yield
    finally:
        _inherited.clear()
        _inherited.update(before)


_mask = threading.local()
"""Signals that a forking thread had blocked before."""


def _hold() -> None:
    """Keep signals back while a child is made: one that comes before `_reset` would be lost."""
    if _inherited:
        _mask.before = signal.pthread_sigmask(signal.SIG_BLOCK, DEFAULTS)


def _release() -> None:
    """Let them come."""
    before = _mask.__dict__.pop("before", None)
    if before is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _reset() -> None:
    """Set the default handlers in a child process."""
    for number, inherited in _inherited.items():
        if inherited is not signal.SIG_IGN and signal.getsignal(number) == inherited:
            signal.signal(number, DEFAULTS[number])
    _release()


os.register_at_fork(before=_hold, after_in_parent=_release, after_in_child=_reset)
