"""Write files whole or not at all, lock them, and find folders that can be written.

Ray, matplotlib and our own cache keep files in the user's home folder. In a container or under a
service account there may be no HOME or no entry for the user, or the folder may be missing or
read-only. Then a private temporary folder replaces it.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import stat
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

UNFINISHED = ".tmp"
"""Suffix of a file that is being written; a killed process may leave one."""
LOCK_TRIES = 25
"""Number of tries, 20 ms apart, before a lock counts as held by another process."""


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
            sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError):
            error.filename, error.filename2 = str(path), None  # a full disk's error has no name
        raise


def sync_folder(folder: Path) -> None:
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


def lock_file(file: TextIO, *, tries: int = LOCK_TRIES) -> bool:
    """Take a file's exclusive lock; closing the file releases it.

    It is tried for a moment, because `is_locked` holds it for microseconds.

    Args:
        file: open for writing.
        tries: most tries, 20 ms apart.

    Returns:
        False if another process holds it.
    """
    for _ in range(tries):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.02)
        else:
            return True
    return False


def is_locked(path: Path) -> bool:
    """Tell whether a process holds a file's lock: then a shared lock is refused."""
    try:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


NETWORK_FILE_SYSTEMS = {
    *("afs", "beegfs", "ceph", "cifs", "gpfs", "lustre", "nfs", "nfs4", "panfs", "pvfs2", "smb3"),
    *("fuse.beegfs", "fuse.ceph", "fuse.glusterfs", "fuse.juicefs", "fuse.s3fs", "fuse.sshfs"),
    *("glusterfs", "orangefs", "smbfs", "wekafs"),
}
"""Types of file systems that several machines share, as Linux names them."""


def network_file_system(path: Path, mounts: Path = Path("/proc/self/mounts")) -> str | None:
    """Return the type of the network file system on which a path lies; None for others.

    Args:
        path: a file or folder, which need not exist yet.
        mounts: the system's table of what is mounted where; without it, nothing is known.
    """
    path, best, found = path.resolve(), -1, ""
    try:
        lines = mounts.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return None
    for line in lines:
        _, where, kind, *_ = line.split(" ")
        folder = Path(where.replace("\\040", " "))  # the table spells a space so
        if path.is_relative_to(folder) and len(folder.parts) >= best:  # of two, the later is on top
            best, found = len(folder.parts), kind
    return found if found in NETWORK_FILE_SYSTEMS else None


def this_machine() -> str:
    """Return a name that all processes on this machine's kernel share, and no others."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return socket.gethostname()


def this_process() -> str:
    """Name this process for whoever finds a file locked."""
    return f"process {os.getpid()} on {socket.gethostname()}"


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
