"""Read a trial's final result from its output or its result file.

At most a line of a megabyte is kept in memory. The result is the last line
about a loss. If that line cannot be read, there is no result; an earlier line never replaces it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from telescope.dispatch.queue import LOG_TAIL_LINES
from telescope.errors import TrialError
from telescope.foreign.outcome import (
    EXPECTED,
    HELD_OUT_KEYS,
    CurveRows,
    curve_point,
    is_verdict,
    log_end,
)
from telescope.foreign.printed import (
    LONGEST_WORD,
    SPEAKS_BYTES,
    Line,
    read_line,
    shown_line,
    without_control,
)

LONGEST_LINE = 1 << 20
"""Most bytes of a line that is read; a longer one is not a result."""
CHUNK = 1 << 18
"""Bytes read at once."""


class NoResult(TrialError):
    """A trial has ended without an error, but its output has no readable result."""


class _Piece(NamedTuple):
    """A line of a log."""

    text: bytes
    """The line, or the beginning of a line that is too long."""
    size: int
    is_cut: bool = False
    """True if the log ends in this line, without an end of line."""
    speaks: bool = False
    """True if it is about a loss; used only for lines that are too long."""


def read_output(out: Path, file: Path | None) -> tuple[dict[str, Any], CurveRows]:
    """Return a trial's last verdict, and its curve from the lines before.

    Args:
        out: the trial's output.
        file: the file with the verdict; None if it is printed.

    Raises:
        NoResult: there is no verdict, or the last one cannot be read.
    """
    printed = _LastWord("stdout", _pieces(out))
    if file:
        word = _read_file(file)
        return word.taken(), printed.curve
    if not printed.verdict and not printed.problem:
        ends = tail(out)[-1:]
        return printed.taken(f"; it ends with {shown_line(ends[0])!r}" if ends else ""), CurveRows()
    return printed.taken(), printed.curve


class _LastWord:
    """The outcome of a trial by its output: the last line about its end counts."""

    def __init__(self, where: str, pieces: Iterable[_Piece]) -> None:
        """Read all lines."""
        self.curve = CurveRows()
        self.verdict: dict[str, Any] | None = None
        self.problem = ""  # the reason that a line after the verdict cannot be read
        self._other: dict[str, Any] | None = None
        self._where = where
        for piece in pieces:
            self._add(piece)
        if self.verdict and self.curve.rows[-1:] == [curve_point(self.verdict)]:
            self.curve.rows.pop()  # the result itself, not on the way

    def _add(self, piece: _Piece) -> None:
        if piece.size > LONGEST_LINE:
            why = f"it has {piece.size} bytes, at most {LONGEST_LINE} are read"
            line = Line([], why if piece.speaks else "")
        else:
            line = read_line(piece.text, is_cut=piece.is_cut)
        for said in line.objects:
            self.curve.add(said)
            self._other = said
            if is_verdict(said):
                self.verdict, self.problem = said, ""
            elif _holds_loss(said):
                self._cannot_read("its loss is inside another key; print it at the top", piece)
        if line.problem:
            self._cannot_read(line.problem, piece)
        elif self.verdict and line.first_key == next(iter(self.verdict)):
            self._cannot_read("it begins as a result and is garbled", piece)

    def _cannot_read(self, why: str, piece: _Piece) -> None:
        shown = shown_line(piece.text)
        self.problem = f"the last line of {self._where} on a loss cannot be read: {why}: {shown}"

    def taken(self, more: str = "") -> dict[str, Any]:
        """Return the verdict.

        Raises:
            NoResult: there is none; `more` ends the message.
        """
        if self.problem:
            raise NoResult(f"no result: {self.problem}")
        if self.verdict:
            return self.verdict
        if self._other is None:
            raise NoResult(f"no result: {self._where} has no JSON line; expected {EXPECTED}{more}")
        near = [key for key in HELD_OUT_KEYS if key in self._other]
        hint = f"; the last has {near[0]}: call the result loss" if near else more
        raise NoResult(f"no result: {self._where} has JSON, but no line such as {EXPECTED}{hint}")


def _holds_loss(said: object) -> bool:
    """Tell whether there is a key "loss" at any depth."""
    if isinstance(said, dict):
        return "loss" in said or any(map(_holds_loss, said.values()))
    return isinstance(said, list) and any(map(_holds_loss, said))


def _read_file(file: Path) -> _LastWord:
    """Read a result file, which is one JSON object or has one per line."""
    try:
        text = file.read_bytes()
    except OSError as error:
        raise NoResult(f"no result: {file} (trainer.result): {error.strerror}") from error
    whole = read_line(text, is_cut=True)
    if len(whole.objects) == 1 and not whole.problem:  # over as many lines as it likes
        return _LastWord(str(file), [_Piece(text, size=0)])
    return _LastWord(str(file), _pieces(file))


def _pieces(path: Path) -> Iterator[_Piece]:
    """Yield the lines of a file of any size; text before a carriage return counts as a line."""
    with path.open("rb") as file:
        line = _Open()
        while chunk := file.read(CHUNK):
            first, *others = chunk.replace(b"\r", b"\n").split(b"\n")
            line.add(first)
            for part in others:
                yield from line.ended()
                line = _Open()
                line.add(part)
        yield from line.ended(is_cut=True)


class _Open:
    """A line that is being read; of a line that is too long, only the necessary part is kept."""

    def __init__(self) -> None:
        """Begin an empty line."""
        self._parts: list[bytes] = []
        self._size = 0
        self._end = b""
        self._speaks = False

    def add(self, part: bytes) -> None:
        """Add the next part of the line."""
        self._size += len(part)
        self._speaks = self._speaks or SPEAKS_BYTES.search(self._end + part) is not None
        self._end = (self._end + part)[-LONGEST_WORD:]
        if self._size <= LONGEST_LINE or not self._parts:
            self._parts.append(part)
        else:
            del self._parts[1:]

    def ended(self, *, is_cut: bool = False) -> Iterator[_Piece]:
        """Yield the line if it may be relevant."""
        text = b"".join(self._parts)
        if self._speaks or b"{" in text or b"\0" in text:
            yield _Piece(text, self._size, is_cut, self._speaks)


def tail(path: Path) -> list[str]:
    """Return the last lines of a log as a terminal shows them, after carriage returns."""
    lines = log_end(path).decode(errors="backslashreplace").split("\n")
    last = (without_control(line).rstrip().rpartition("\r")[2] for line in lines)
    return [line for line in last if line.strip()][-LOG_TAIL_LINES:]
