"""Detect edits of a trainer's file, by its text and by the part of it that runs."""

from __future__ import annotations

import ast
import hashlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from telescope.errors import SpecError, TrialError

PACKAGES = b"# /// script"
"""Beginning of a comment that names a script's packages, which can change losses."""


class ProgramText(NamedTuple):
    """Digests of a file, 16 hex digits of SHA-256 each."""

    text: str
    """Digest of its bytes."""
    code: str
    """Digest of a Python file without comments, blank lines and layout; of other files, `text`."""


def read_program(path: Path) -> ProgramText:
    """Read a file's digests.

    Raises:
        SpecError: it cannot be read.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SpecError(f"trainer: cannot read {path}: {error.strerror}") from error
    text = _digest(data)
    return ProgramText(text, _code(data) or text if path.suffix == ".py" else text)


def check_unchanged(sources: Mapping[str, str]) -> None:
    """Check that the trainer is unchanged since the sweep began.

    Args:
        sources: file → digest of its code at that time.

    Raises:
        TrialError: it has changed; losses of two programs do not fit into one ladder.
    """
    for name, before in sources.items():
        try:
            is_same = read_program(Path(name)).code == before
        except SpecError as error:
            raise TrialError(str(error)) from error
        if not is_same:
            raise TrialError(
                f"{name} has changed since the sweep began; undo the change and the same command "
                "goes on, with --accept-trainer if it trains alike, or use --name for another sweep"
            )


def _code(data: bytes) -> str | None:
    """Return the digest of a Python program's syntax tree; None if this Python cannot parse it.

    It includes docstrings, which a program may read, and the interpreter that the file names.
    """
    if PACKAGES in data:
        return None
    interpreter = data.partition(b"\n")[0] if data.startswith(b"#!") else b""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.dump(ast.parse(data))
        return _digest(interpreter + tree.encode(errors="surrogatepass"))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
