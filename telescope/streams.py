"""The three standard streams, made safe to use however this program was started.

Characters that the stream's encoding lacks are spelled in ASCII. A closed stream is opened on the
null device; otherwise a file opened later, such as a database, would get its number and receive the
output. A reader that has left, such as `head`, is not an error.
"""

from __future__ import annotations

import codecs
import fcntl
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

SPELLED = {
    "×": "x",
    "–": "-",
    "−": "-",
    "—": "-",
    "…": "...",
    "√": "sqrt ",
    "±": "+-",
    "·": "*",
    "²": "^2",
    "³": "^3",
    "→": "->",
    "≤": "<=",
    "≥": ">=",
    "★": "*",
    "─": "-",
    "’": "'",
    "‘": "'",
    "“": '"',
    "”": '"',
}
"""Character of the program's own texts → its spelling where an encoding lacks it."""
ERRORS = "telescope.spelled"
"""The name under which Python knows `_spell`."""


def _spell(error: UnicodeError) -> tuple[str | bytes, int]:
    """Spell one character that an encoding lacks; the error handler of the streams.

    A byte of a file name that is not text in this locale is written unchanged.
    """
    if not isinstance(error, UnicodeEncodeError):
        raise error
    character = error.object[error.start]
    if "\udc80" <= character <= "\udcff":
        return bytes([ord(character) - 0xDC00]), error.start + 1
    only_this = UnicodeEncodeError(
        error.encoding, error.object, error.start, error.start + 1, error.reason
    )
    spelled = SPELLED.get(character) or codecs.backslashreplace_errors(only_this)[0]
    return spelled, error.start + 1


codecs.register_error(ERRORS, _spell)


class _Stream(io.FileIO):
    """The file that a standard stream writes to; after a failure, the null device."""

    def __init__(self, number: int, on_failure: Callable[[OSError], None]) -> None:
        super().__init__(number, "w", closefd=False)
        self._on_failure = on_failure

    def write(self, data: Any, /) -> int:
        """Write bytes; after a failure they count as written."""
        try:
            return super().write(data)
        except OSError as error:
            _lead_nowhere(self.fileno())
            self._on_failure(error)
        return len(memoryview(data).cast("B"))


class _Reader:
    """The reader of stdout."""

    is_needed = False

    def lost(self, error: OSError) -> None:
        """Interrupt, as Ctrl-C does, work for a reader that has left; raise other errors."""
        if not isinstance(error, BrokenPipeError):
            error.filename = "stdout"
            raise error
        if self.is_needed:
            raise KeyboardInterrupt


_READER = _Reader()


@contextmanager
def reader_needed() -> Iterator[None]:
    """Interrupt the code inside, as Ctrl-C does, when it prints to a pipe without a reader."""
    _READER.is_needed = True
    try:
        yield
    finally:
        _READER.is_needed = False


def use_utf8_names() -> None:
    """Restart this process in Python's UTF-8 mode if the locale is ASCII only.

    Python does so by itself unless PYTHONUTF8=0 forbids it. Without it, names that are not ASCII
    can be neither in a spec nor in JSON. The output keeps its encoding.
    """
    encoding = codecs.lookup(sys.getfilesystemencoding()).name
    if encoding != "ascii" or "utf8" in sys._xoptions:
        return
    os.environ["PYTHONUTF8"] = "1"  # for Ray's workers too
    os.environ.setdefault("PYTHONIOENCODING", encoding)
    os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def open_streams() -> None:
    """Open closed standard streams, and make them write any text without failing."""
    for number in range(3):
        if not _is_open(number):
            _lead_nowhere(number)
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    ends: tuple[tuple[str, int, Callable[[OSError], None]], ...] = (
        ("stdout", 1, _READER.lost),
        ("stderr", 2, lambda _: None),
    )
    for name, number, on_failure in ends:
        stream = getattr(sys, name)
        if stream is None or stream is getattr(sys, f"__{name}__"):  # else somebody has replaced it
            setattr(sys, name, _opened(stream, _Stream(number, on_failure)))


def _is_open(number: int) -> bool:
    """Tell whether a standard stream is open for its use.

    If a shell was started without it, its number may be the script that the shell reads.
    """
    try:
        mode = fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE
    except OSError:
        return False
    return number == 0 or mode != os.O_RDONLY


def _lead_nowhere(number: int) -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    if nowhere == number:  # `number` was the lowest free one
        os.set_inheritable(number, True)
        return
    os.dup2(nowhere, number)
    os.close(nowhere)


def _opened(stream: TextIO | None, raw: _Stream) -> TextIO:
    """Reopen the stream as text that is written to `raw`."""
    if stream is not None:
        stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(cast(io.RawIOBase, raw)),
        encoding=stream.encoding if stream else "utf-8",
        errors=ERRORS,
        line_buffering=raw.isatty() or raw.fileno() == 2,
    )


def spell_what_is_lacking() -> None:
    """Let stdout and stderr take any text, in a process that another program has started."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=ERRORS)
