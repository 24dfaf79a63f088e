"""The user's home folder, and what stands in for it where there is none that can be written.

Ray, matplotlib and our own cache keep files there. In a container or under a service's account
there may be no HOME, no entry for the user, a folder that does not exist, or one that is read-only.
"""

from __future__ import annotations

import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path


def home() -> Path | None:
    """The user's home folder; None where it is not known or not there."""
    try:
        folder = Path.home()
    except (RuntimeError, KeyError):  # neither HOME nor an entry for the user
        return None
    return folder if folder.is_absolute() and folder.is_dir() else None


def can_write(folder: Path) -> bool:
    """Tell whether files can be made in a folder, or in the nearest one above it that exists."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


def private_folder() -> Path:
    """The user's own folder among the temporary ones, made when it is asked for.

    The same for all processes of a user, unless somebody else has taken its name.

    Raises:
        OSError: there is no temporary folder that can be written.
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
    """Let libraries find a folder where the home folder cannot be used.

    One that is there and read-only stays HOME: settings and packages may be read from it.
    """
    with suppress(OSError):  # no temporary folder either: the code that needs one says so
        folder = home()
        if folder is None:
            os.environ["HOME"] = str(private_folder())
        elif not can_write(folder):
            os.environ.setdefault("MPLCONFIGDIR", str(private_folder() / "matplotlib"))
