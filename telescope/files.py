"""Files that are either whole or absent, whatever happens while they are written."""

from __future__ import annotations

import json
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

UNFINISHED = ".tmp"
"""Ends the name of a file that is being written; one that stays was left by a killed process."""


def write_atomic(path: Path, content: str | bytes, *, durable: bool = True) -> None:
    """Replace `path` with `content`: a reader, or a crash, sees the old file or the new one.

    Args:
        path: the file; its folder exists.
        content: text (UTF-8) or bytes.
        durable: wait for the disk, so that the file also outlives a power cut.

    Raises:
        OSError: it cannot be written, with the file's name; the old file is as it was.
    """
    data = content.encode() if isinstance(content, str) else content
    try:
        descriptor, temporary = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.name}.", suffix=UNFINISHED
        )
    except OSError as error:
        error.filename = str(path)
        raise
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        # mkstemp makes the file private; results are for the team to read.
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        if durable:
            _sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError):
            error.filename, error.filename2 = str(path), None  # a full disk names no file
        raise


def _sync_folder(folder: Path) -> None:
    """Wait until a folder's entries, a renamed file's among them, are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_unfinished(folder: Path) -> None:
    """Remove what killed writers left in a folder in which nobody is writing now."""
    for path in folder.glob(f".*{UNFINISHED}"):
        path.unlink(missing_ok=True)


def write_json(path: Path, data: Any, *, durable: bool = True) -> None:
    """Replace `path` with `data` as indented JSON; NaN and inf are refused."""
    write_atomic(path, json.dumps(data, indent=2, allow_nan=False) + "\n", durable=durable)
