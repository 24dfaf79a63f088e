"""Files that are either whole or absent, whatever happens while they are written."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any


def write_atomic(path: Path, content: str | bytes, *, durable: bool = True) -> None:
    """Replace `path` with `content`: a reader, or a crash, sees the old file or the new one.

    Args:
        path: the file; its folder exists.
        content: text (UTF-8) or bytes.
        durable: wait for the disk, so that the file also outlives a power cut.
    """
    data = content.encode() if isinstance(content, str) else content
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        # mkstemp makes the file private; results are for the team to read.
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: Path, data: Any, *, durable: bool = True) -> None:
    """Replace `path` with `data` as indented JSON; NaN and inf are refused."""
    write_atomic(path, json.dumps(data, indent=2, allow_nan=False) + "\n", durable=durable)
