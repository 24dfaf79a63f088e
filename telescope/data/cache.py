"""A cache between processes for facts about large files: their digests and their tokens.

Everything in it can be deleted at any time; it is made again. Entries are found by content, or by a
file's name, size, times and inode. They are written whole or not at all and carry a checksum. A
lock lets one process make an entry that several need.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from telescope.errors import DataError
from telescope.files import can_write, home, private_folder, write_json

SETTLED_SECONDS = 2.0
"""Least age of a file's last change for it to be remembered: a younger file could change again
within one tick of the file system's clock."""


def cache_folder() -> Path:
    """Return $TELESCOPE_CACHE, else `telescope` in the user's cache folder.

    If that folder cannot be written, the cache is in `files.private_folder`.

    Raises:
        DataError: no temporary folder can be written either.
    """
    if named := os.environ.get("TELESCOPE_CACHE"):
        return Path(named)
    usual, folder = os.environ.get("XDG_CACHE_HOME"), home()
    caches = Path(usual) if usual else folder and folder / ".cache"
    if caches and can_write(caches / "telescope"):
        return caches / "telescope"
    try:
        return private_folder() / ".cache" / "telescope"
    except OSError as error:
        raise unusable(Path(tempfile.gettempdir()), error) from error


def key_of(*parts: Any) -> str:
    """Return a name for an entry made from `parts` (JSON values): 32 hex digits."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def state_of(path: Path) -> tuple[str, int, int, int, int]:
    """Return a file's name, size, inode and times (mtime and ctime, ns): one changes when it does.

    The mtime can be set back, as `cp -p`, `rsync` and `tar` do; the ctime is the kernel's own.
    """
    stat = path.stat()
    return str(path), stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns


def remembered(
    paths: list[Path], make: Callable[[], dict[str, Any]], *recipe: Any
) -> dict[str, Any]:
    """Return the facts that `make` finds in files; call it again only when one of them changes.

    Args:
        paths: the files that it reads.
        make: reads the files and returns JSON values.
        recipe: everything else that the outcome depends on, as JSON values.

    Raises:
        DataError: the cache folder cannot be written.
    """
    states = [state_of(path) for path in paths]
    entry = cache_folder() / "files" / f"{key_of(states, recipe)}.json"
    with made_once(entry):
        known = read_entry(entry)
        if known is None:
            known = make()
            youngest = max(state[-1] for state in states) / 1e9
            unchanged = states == [state_of(path) for path in paths]
            if unchanged and time.time() - youngest > SETTLED_SECONDS:
                keep_entry(entry, known)
    return known


def keep_entry(path: Path, data: dict[str, Any]) -> None:
    """Write a JSON entry and its checksum, whole or not at all.

    Raises:
        DataError: the folder cannot be written.
    """
    try:
        write_json(path, {"known": data, "checksum": key_of(data)})
    except OSError as error:
        raise unusable(path.parent, error) from error


def unusable(folder: Path, error: OSError) -> DataError:
    """Return the error for a cache folder that cannot be written."""
    return DataError(
        f"{folder}: cannot write the data cache: {error.strerror or error}; make the folder "
        "writable, or name another one in TELESCOPE_CACHE"
    )


def read_entry(path: Path) -> dict[str, Any] | None:
    """Read a JSON entry; None if it is missing or not as `keep_entry` wrote it."""
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(entry, dict) or not isinstance(known := entry.get("known"), dict):
        return None
    return known if entry.get("checksum") == key_of(known) else None


@contextmanager
def made_once(path: Path) -> Iterator[None]:
    """Hold the lock of an entry; create its folder.

    Raises:
        DataError: the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(path.with_suffix(".lock"), "w")  # noqa: SIM115
    except OSError as error:
        raise unusable(path.parent, error) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:  # some network file systems have no locks
            raise unusable(path.parent, error) from error
        yield
