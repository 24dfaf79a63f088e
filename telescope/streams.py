"""The three standard streams, made safe to use, however this program was started.

Text that the stream's encoding lacks is spelled in ASCII; a stream that was closed is a null
device, so that no file opened later, a database say, gets its number and with it what is printed;
and a reader that has left, `head` say, is no error of the writer.
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
    """Spell one character that an encoding lacks: the error handler of the streams.

    A byte of a file's name that is no text in this locale comes out as it went in.
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
    """The file that a standard stream writes to; nowhere, once that has failed."""

    def __init__(self, number: int, on_failure: Callable[[OSError], None]) -> None:
        super().__init__(number, "w", closefd=False)
        self._on_failure = on_failure

    def write(self, data: Any, /) -> int:
        """Write bytes; those that nobody will ever read count as written."""
        try:
            return super().write(data)
        except OSError as error:
            _lead_nowhere(self.fileno())
            self._on_failure(error)
        return len(memoryview(data).cast("B"))


class _Reader:
    """Whoever reads stdout."""

    is_needed = False

    def lost(self, error: OSError) -> None:
        """End as on Ctrl-C what is done for a reader who has left; a full disk is an error."""
        if not isinstance(error, BrokenPipeError):
            error.filename = "stdout"
            raise error
        if self.is_needed:
            raise KeyboardInterrupt


_READER = _Reader()


@contextmanager
def reader_needed() -> Iterator[None]:
    """Interrupt the code inside, as Ctrl-C does, when it prints to a pipe that nobody reads."""
    _READER.is_needed = True
    try:
        yield
    finally:
        _READER.is_needed = False


def use_utf8_names() -> None:
    """Start this process again in Python's UTF-8 mode, where the locale knows ASCII alone.

    Python does so by itself unless PYTHONUTF8=0 forbids it; without, a name that is not ASCII can
    be neither in a spec nor in JSON. What is printed keeps the encoding that it is told.
    """
    encoding = codecs.lookup(sys.getfilesystemencoding()).name
    if encoding != "ascii" or "utf8" in sys._xoptions:
        return
    os.environ["PYTHONUTF8"] = "1"  # for Ray's workers too
    os.environ.setdefault("PYTHONIOENCODING", encoding)
    os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def open_streams() -> None:
    """Open those of the standard streams that are closed, and let none fail at what is written."""
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
        if stream is None or stream is getattr(sys, f"__{name}__"):  # else it is somebody's own
            setattr(sys, name, _opened(stream, _Stream(number, on_failure)))


def _is_open(number: int) -> bool:
    """Tell whether a standard stream is open; a shell started without may read a script there."""
    try:
        mode = fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE
    except OSError:
        return False
    return number == 0 or mode != os.O_RDONLY


def _lead_nowhere(number: int) -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    if nowhere == number:  # it was the lowest that was free
        os.set_inheritable(number, True)
        return
    os.dup2(nowhere, number)
    os.close(nowhere)


def _opened(stream: TextIO | None, raw: _Stream) -> TextIO:
    """The stream anew, as text that is written to `raw`."""
    if stream is not None:
        stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(cast(io.RawIOBase, raw)),
        encoding=stream.encoding if stream else "utf-8",
        errors=ERRORS,
        line_buffering=raw.isatty() or raw.fileno() == 2,
    )


def spell_what_is_lacking() -> None:
    """Let stdout and stderr of a process that others have started take any text."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=ERRORS)
