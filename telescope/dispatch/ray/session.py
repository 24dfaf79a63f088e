"""The processes of an embedded Ray, recognised by a mark, and a watch over Ray's health.

A Ray whose driver, head or raylet is killed leaves processes behind: agents for half a minute or
more, and workers in the middle of a trial. Every process of a session inherits an environment
variable that names its owner, so the next run of the same sweep finds exactly these.

It uses only the standard library. Without /proc, nothing is found and nothing is reaped.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from telescope.errors import LostError

MARK = "TELESCOPE_RAY_OWNER"
"""The environment variable that a session's processes inherit."""
OWNER_FILE = "owner"
"""File with the owner's name in a session's temporary folder."""
VITAL = ("gcs_server", "raylet")
"""The processes without which an embedded Ray is dead: its head and its raylet."""
REAP_SECONDS = 10.0
"""Time limit for killed processes to disappear."""
LOOK_SECONDS = 1.0
"""Pause between two checks of Ray's head and raylet."""
LEAVE_SECONDS = 10.0
"""Time limit for the main thread to leave a dead Ray; then the process ends."""


def marked(owner: str) -> list[int]:
    """Return the processes of an owner's sessions on this machine, without this process."""
    wanted, found = os.fsencode(f"{MARK}={owner}"), []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # another user's, or just gone
            is_ours = wanted in (folder / "environ").read_bytes().split(b"\0")
            if is_ours and int(folder.name) != os.getpid():
                found.append(int(folder.name))
    return found


def reap(owner: str) -> None:
    """Kill the processes of an owner's earlier sessions, and remove their temporary folders.

    Only the holder of the owner's lock may call this: it would end a running session too.
    """
    deadline = time.monotonic() + REAP_SECONDS
    while (left := marked(owner)) and time.monotonic() < deadline:
        for process in left:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.05)
    for folder in {Path(tempfile.gettempdir()), Path("/tmp")}:
        for session in folder.glob("telescope-*"):
            with suppress(OSError):
                if (session / OWNER_FILE).read_bytes() == os.fsencode(owner):
                    shutil.rmtree(session, ignore_errors=True)


class LocalRay:
    """The head and the raylet of an embedded Ray, found among this machine's processes."""

    def __init__(self, owner: str) -> None:
        """Remember the owner of the sessions."""
        self._owner = owner
        self._seen: dict[str, int] = {}  # name → process

    def is_whole(self) -> bool:
        """Tell whether all parts seen so far are still alive; at the start there are none."""
        if len(self._seen) < len(VITAL) or not self._are_alive():
            # A process that the raylet has just forked has its name until it runs its own program.
            # So of several, the one with the lowest number is the raylet.
            for number in sorted(marked(self._owner), reverse=True):
                if (name := _name(number)) in VITAL:
                    self._seen[str(name)] = number
        return self._are_alive()

    def _are_alive(self) -> bool:
        return all(_name(number) == name for name, number in self._seen.items())


def _name(number: int) -> str | None:
    """Return a process's name; None if it has ended, even if it is still a zombie."""
    try:
        text = Path(f"/proc/{number}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    name, _, rest = text.partition("(")[2].rpartition(")")
    return None if rest.split()[0] in "ZX" else name


def accepts(address: tuple[str, int]) -> bool:
    """Tell whether an address accepts connections."""
    try:
        socket.create_connection(address, timeout=2).close()
    except OSError:
        return False
    return True


@contextmanager
def watched(
    is_there: Callable[[], bool],
    *,
    patience: float,
    on_loss: Callable[[LostError], None],
    give_up: Callable[[], None],
) -> Iterator[threading.Event]:
    """Watch Ray, to notice its death within seconds; Ray itself reports it after a minute.

    Args:
        is_there: tells whether Ray is alive; called every `LOOK_SECONDS` in another thread.
        patience: seconds of absence after which Ray counts as dead.
        on_loss: called once; should make the main thread leave.
        give_up: called before this process ends, if the main thread has not left in time: a call
            into Ray that waits for a dead head cannot be interrupted.

    Yields:
        An event to set before Ray is shut down on purpose.
    """
    leaving, left = threading.Event(), threading.Event()

    def watch() -> None:
        last_seen = time.monotonic()
        while not leaving.wait(LOOK_SECONDS):
            if is_there():
                last_seen = time.monotonic()
            elif time.monotonic() - last_seen > patience:
                break
        else:
            return
        error = LostError(
            "Ray has died (its head or this machine's raylet is gone); what finished is kept, the "
            "same command goes on"
        )
        on_loss(error)
        if not left.wait(LEAVE_SECONDS):
            _end_process(error, give_up)

    threading.Thread(target=watch, daemon=True, name="telescope-ray-watch").start()
    try:
        yield leaving
    finally:
        leaving.set()
        left.set()


def _end_process(error: LostError, give_up: Callable[[], None]) -> None:
    """End this process at once with a message; Ray's own library would end it within a minute."""
    if sys.stdout.isatty():
        sys.stdout.write("\x1b[?25h")  # the live view hides the cursor
        sys.stdout.flush()
    os.write(sys.stderr.fileno(), f"telescope: {error}\n".encode())
    give_up()
    os._exit(LostError.exit_code)
