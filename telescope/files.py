"""Write files whole or not at all, and find folders that can be written.

Ray, matplotlib and our own cache keep files in the user's home folder. In a container or under a
service account there may be no HOME or no entry for the user, or the folder may be missing or
read-only. Then a private temporary folder replaces it.
"""

from __future__ import annotations

import json
import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

UNFINISHED = ".tmp"
"""Suffix of a file that is being written; a killed process may leave one."""


def write_atomic(path: Path, content: str | bytes, *, durable: bool = True) -> None:
    """Replace `path` with `content`: a reader, or a crash, sees the old file or the new one.

    Args:
        path: the file; its folder exists.
        content: text (UTF-8) or bytes.
        durable: wait for the disk, so that the file also outlives a power cut.

    Raises:
        OSError: the file cannot be written; the error has its name, and the old file is unchanged.
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
        # mkstemp makes the file private, but others may read results.
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        if durable:
            _sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError):
            error.filename, error.filename2 = str(path), None  # a full disk's error has no name
        raise


def _sync_folder(folder: Path) -> None:
    """Wait until a folder's entries, such as a renamed file, are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_unfinished(folder: Path) -> None:
    """Remove the unfinished files of killed processes; no process may be writing there now."""
    for path in folder.glob(f".*{UNFINISHED}"):
        path.unlink(missing_ok=True)


def write_json(path: Path, data: Any, *, durable: bool = True) -> None:
    """Replace `path` with `data` as indented JSON; NaN and inf are refused."""
    write_atomic(path, json.dumps(data, indent=2, allow_nan=False) + "\n", durable=durable)


def home() -> Path | None:
    """Return the user's home folder; None if it is unknown or missing."""
    try:
        folder = Path.home()
    except (RuntimeError, KeyError):  # neither HOME nor an entry for the user
        return None
    return folder if folder.is_absolute() and folder.is_dir() else None


def can_write(folder: Path) -> bool:
    """Tell whether a folder can be written or created: it or its nearest existing parent."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


def private_folder() -> Path:
    """Return the user's private temporary folder; create it if needed.

    It is the same for all processes of a user, unless another user has taken its name.

    Raises:
        OSError: no temporary folder can be written.
    """
    folder = Path(tempfile.gettempdir(), _name())
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    is_ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    if is_ours and stat.S_IMODE(found.st_mode) & 0o077 == 0:
        return folder
    return Path(tempfile.mkdtemp(prefix=f"{_name()}."))


def is_private(path: Path) -> bool:
    """Tell whether a path lies in `private_folder`, which may be emptied at any time."""
    temporary = Path(tempfile.gettempdir())
    return path.is_relative_to(temporary) and path.relative_to(temporary).parts[:1] == (_name(),)


def _name() -> str:
    return f"telescope.{os.getuid()}"


def stand_in() -> None:
    """Point libraries to a private folder if the home folder cannot be written.

    A read-only home folder stays HOME, because settings and packages may be read from it.
    """
    with suppress(OSError):  # without a temporary folder, the code that needs one reports it
        folder = home()
        if folder is None:
            os.environ["HOME"] = str(private_folder())
        elif not can_write(folder):
            os.environ.setdefault("MPLCONFIGDIR", str(private_folder() / "matplotlib"))
