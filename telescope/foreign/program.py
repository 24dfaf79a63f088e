"""Tells a trainer's file from an edited one: by its text, and by the part of it that runs."""

from __future__ import annotations

import ast
import hashlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from telescope.errors import SpecError, TrialError

PACKAGES = b"# /// script"
"""Begins a comment that names the packages that a script is run with, which can change losses."""


class ProgramText(NamedTuple):
    """Digests of a file, 16 hex digits of SHA-256 each."""

    text: str
    """Of its bytes."""
    code: str
    """Of what runs: of a Python file without comments, blank lines and layout; else `text`."""


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
    """Check that the trainer is still the one that the sweep began with.

    Args:
        sources: file → digest of its code then.

    Raises:
        TrialError: it is not; losses of two programs are not one ladder.
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
    """The digest of a Python program's syntax; None where it is none, for this Python.

    With docstrings, for a program may read its own, and with the interpreter that it names.
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
