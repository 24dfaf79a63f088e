"""The processes of an embedded Ray, told from all others by a mark; and whether Ray is still there.

A Ray whose driver, head or raylet is killed leaves processes behind: agents for half a minute or
more, workers in the middle of a trial. Every process of a session inherits one environment
variable that names its owner, so that the next run of the same sweep finds them, and only them.

Standard library only. Where there is no /proc, nothing is found and nothing is reaped.
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from telescope.errors import LostError

MARK = "TELESCOPE_RAY_OWNER"
"""The environment variable that a session's processes inherit."""
OWNER_FILE = "owner"
"""In a session's temporary folder: whose it is."""
REAP_SECONDS = 10.0
"""How long killed processes may take to be gone."""
LOOK_SECONDS = 1.0
"""Pause between two looks at Ray's head and raylet."""
LEAVE_SECONDS = 5.0
"""How long the main thread may take to leave a Ray that is gone; then the process ends."""


def marked(owner: str) -> list[int]:
    """The processes of an owner's sessions on this machine, this process aside."""
    wanted, found = f"{MARK}={owner}".encode(), []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # another user's, or just gone
            is_ours = wanted in (folder / "environ").read_bytes().split(b"\0")
            if is_ours and int(folder.name) != os.getpid():
                found.append(int(folder.name))
    return found


def reap(owner: str) -> None:
    """End what an owner's earlier sessions left running, and remove their temporary folders.

    Only for who holds the owner's lock: a session of its own would be ended as well.
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
                if (session / OWNER_FILE).read_text() == owner:
                    shutil.rmtree(session, ignore_errors=True)


@contextmanager
def watched(
    addresses: Sequence[tuple[str, int]],
    *,
    patience: float,
    on_loss: Callable[[LostError], None],
    give_up: Callable[[], None],
) -> Iterator[None]:
    """Watch over Ray: learn in seconds that it has died, which Ray itself tells after a minute.

    Args:
        addresses: where its head and this machine's raylet accept connections.
        patience: seconds without a connection after which it counts as gone.
        on_loss: told once; should make the main thread leave.
        give_up: called before this process ends, if the main thread has not left in time: a call
            into Ray that waits for a dead head cannot be interrupted.
    """
    ended = threading.Event()

    def watch() -> None:
        last_seen = time.monotonic()
        while not ended.wait(LOOK_SECONDS):
            if all(map(_accepts, addresses)):
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
        if not ended.wait(LEAVE_SECONDS):
            _end_process(error, give_up)

    thread = threading.Thread(target=watch, daemon=True, name="telescope-ray-watch")
    thread.start()
    try:
        yield
    finally:
        ended.set()


def _accepts(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, timeout=2).close()
    except OSError:
        return False
    return True


def _end_process(error: LostError, give_up: Callable[[], None]) -> None:
    """End this process at once, as Ray's own library would within a minute, but saying why."""
    if sys.stdout.isatty():
        sys.stdout.write("\x1b[?25h")  # the live view hides the cursor
        sys.stdout.flush()
    os.write(sys.stderr.fileno(), f"telescope: {error}\n".encode())
    give_up()
    os._exit(LostError.exit_code)
