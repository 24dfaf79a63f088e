"""Ends a command and all that it has started as soon as whoever started it closes this input.

A program of its own, started by path with `python -I -S`, so that it costs milliseconds and
outlives its parent. The parent is a worker or the driver; however that one dies, `kill -9`
included, its end of the pipe closes. This process leads the process group that the command is put
into, so there is no moment at which a command runs unguarded. Then: SIGTERM to the group and to
every process that has the mark in its environment (a launcher may give its children sessions of
their own), and, after a grace, SIGKILL. The output closes when all are gone.

    guard.py MARK GRACE
"""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress

HAS_PROC = os.path.isdir("/proc/self")
"""True if processes can be listed one by one, as on Linux."""
LOOK_SECONDS = 0.02
"""Pause between two looks at the remaining processes."""
KILLED_SECONDS = 5.0
"""Time limit for killed processes to disappear."""


def guard(mark: str, grace: float) -> None:
    """Wait for the end of the input, then end everything."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while os.read(0, 4096):
        pass
    group = os.getpgrp()
    if not HAS_PROC:  # the group can be ended as a whole alone, so not from inside
        if os.fork():
            os._exit(0)
        os.setpgid(0, 0)
    for number, seconds in ((signal.SIGTERM, grace), (signal.SIGKILL, KILLED_SECONDS)):
        deadline = time.monotonic() + seconds
        if not _send(number, group, mark):
            return
        while _left(group, mark) and time.monotonic() < deadline:
            time.sleep(LOOK_SECONDS)
            if number == signal.SIGKILL:  # what was started meanwhile
                _send(number, group, mark)


def _send(number: signal.Signals, group: int, mark: str) -> list[int]:
    """Send a signal to all remaining processes; return them."""
    left = _left(group, mark)
    for process in left:
        with suppress(OSError):
            os.kill(process, number)
    return left


def _left(group: int, mark: str) -> list[int]:
    """Return the live processes of the group or with the mark, without this one."""
    if not HAS_PROC:
        return _group_alone(group)
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            with suppress(OSError, ValueError, IndexError):  # another user's, or just gone
                if _is_alive_and_ours(int(name), group, mark):
                    found.append(int(name))
    return found


def _is_alive_and_ours(process: int, group: int, mark: str) -> bool:
    with open(f"/proc/{process}/stat", "rb") as file:
        state, _, its_group = file.read().rpartition(b")")[2].split()[:3]
    if state in b"ZX":
        return False
    if int(its_group) == group:
        return True
    with open(f"/proc/{process}/environ", "rb") as file:
        return mark.encode() in file.read().split(b"\0")


def _group_alone(group: int) -> list[int]:
    """Return the group as a whole, by its negative number, where there is no /proc."""
    try:
        os.killpg(group, 0)
    except OSError:
        return []
    return [-group]


if __name__ == "__main__":
    guard(sys.argv[1], float(sys.argv[2]))
