"""Finds JSON objects in a line as programs and launchers print it.

    [rank0]: 100%|████| 10/10 {"step": 100, "loss": nan},

Before and after an object may stand what a launcher, a logger or a progress bar puts there. A line
that speaks of a loss, or of another end, and cannot be read whole is a *problem*: what it would
have said is not known, and nothing said before it may be taken in its place.
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

from telescope.losses import INFINITE, NOT_A_NUMBER, NULL

LONGEST_SHOWN = 200
"""Characters of a line that a message shows."""
_CONTROL = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]"  # colours, and movements of the cursor
    r"|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)"  # titles and links
    r"|\x1b[@-Z\\-_]"
    r"|[\ufeff\b]"  # a byte order mark; the backspaces of a progress bar
)
_OBJECT = re.compile(r"""\{\s*(?:["'}]|$)""")
"""The beginning of an object; any other brace is text."""
_FIRST_KEY = re.compile(r"""\{\s*["']([^"']*)""")
_ENDS = r"""["']loss\\*["']\s*:|["']status\\*["']\s*:\s*\\*["'](?:diverged|failed)"""
_SPEAKS = re.compile(_ENDS)
SPEAKS_BYTES = re.compile(_ENDS.encode())
"""A line that says how a trial ended, or would."""
LONGEST_WORD = 64
"""Most bytes that `SPEAKS_BYTES` finds, blanks aside."""
_CUT = re.compile(r"""["'](?:l|lo|los|loss|loss["']\s*)$""")
"""A key that was cut off, and may have been loss."""
_INSIDE_BEFORE = re.compile(r"""(?:["']\s*:|[\[{"'])\s*$""")
_INSIDE_AFTER = re.compile(r"""\s*,?\s*["'}\]]""")
"""Text beside an object that is part of something larger."""
_WORDS = re.compile(
    r'(?P<text>"(?:[^"\\]|\\.)*")'
    rf"|(?<![\w.])(?:(?P<nan>{NOT_A_NUMBER})|(?P<infinite>{INFINITE})|(?P<null>{NULL})"
    r"|(?P<truth>true|false))(?![\w.])"
    r"|(?P<comma>,(?=\s*[}\]]))",
    re.IGNORECASE,
)


class Line(NamedTuple):
    """The content of a line."""

    objects: list[dict[str, Any]]
    """Its JSON objects, in order."""
    problem: str = ""
    """The reason for which a word on a loss after these cannot be read; "" where none follows."""
    first_key: str | None = None
    """The first key of an object that cannot be read, which says nothing of a loss."""


def read_line(line: bytes | str, *, is_cut: bool = False) -> Line:
    """Read a line.

    >>> read_line('[rank0]: {"loss": -Inf},').objects, read_line("epoch 3").objects
    ([{'loss': -inf}], [])
    >>> read_line('{"step": 3, "loss": 1.').problem
    'it is cut off or garbled'

    Args:
        line: without what divides it from the next.
        is_cut: it is the last one and no end of line follows, so that it may be cut off.
    """
    text = line.decode(errors="replace") if isinstance(line, bytes) else line
    text = without_control(text).strip().strip("\0")
    if "\0" in text and _SPEAKS.search(text.replace("\0", "")):
        return Line([], "it has NUL bytes, as UTF-16 text has; print UTF-8")
    found, outside, broken = _objects(text)
    if any(_SPEAKS.search(part) for part in outside):
        return Line(found, "it has no whole JSON object with it on one line")
    if broken is not None:
        problem = "it is cut off or garbled"
        if "'" in broken[:10] and '"' not in broken:
            problem = "it is no JSON, which has double quotes; use json.dumps"
        if is_cut or _SPEAKS.search(broken) or _CUT.search(broken):
            return Line(found, problem)
        key = _FIRST_KEY.match(broken)
        return Line(found, first_key=key[1] if key else None)
    if found and (_INSIDE_BEFORE.search(outside[0]) or _INSIDE_AFTER.match(outside[-1])):
        if any(_SPEAKS.search(json.dumps(said)) for said in found):
            return Line([], "its object is part of something larger; print it alone")
        return Line([])
    return Line(found)


def _objects(text: str) -> tuple[list[dict[str, Any]], list[str], str | None]:
    """The objects of a text, what stands before, between and after them, and what is broken."""
    found, outside, end, at = list[dict[str, Any]](), list[str](), 0, 0
    while (start := text.find("{", at)) >= 0:
        at = start + 1
        if not _OBJECT.match(text, start):
            continue
        try:
            said, at = _decoded(text, start)
        except (ValueError, RecursionError):
            plain = text[:start] + _WORDS.sub(_as_json, text[start:])
            try:
                said, at = _decoded(plain, start)
            except (ValueError, RecursionError):
                return found, [*outside, text[end:start]], text[start:]
            text = plain
        found.append(said)
        outside.append(text[end:start])
        end = at
    return found, [*outside, text[end:]], None


def _decoded(text: str, start: int) -> tuple[dict[str, Any], int]:
    return _DECODER.raw_decode(text, start)


def _whole_number(digits: str) -> int | float:
    """A whole number; one beyond all floats, which Python might refuse to read, as infinity."""
    return int(digits) if len(digits) < 400 else float(digits)


_DECODER = json.JSONDecoder(strict=False, parse_int=_whole_number)


def _as_json(word: re.Match[str]) -> str:
    """JSON's spelling of a word, as Python writes and reads it."""
    if word["text"]:
        return word["text"]
    if word["nan"]:
        return "NaN"
    if word["infinite"]:
        return "-Infinity" if word[0][0] == "-" else "Infinity"
    return "" if word["comma"] else word[0].lower().replace("none", "null")


def without_control(text: str) -> str:
    """A text without colours, byte order marks and backspaces."""
    return _CONTROL.sub("", text)


def shown_line(line: bytes | str) -> str:
    """A line for a message: without colours, its beginning and its end where it is long."""
    text = line.decode(errors="replace") if isinstance(line, bytes) else line
    text = " ".join(without_control(text).replace("\0", "").split())
    half = LONGEST_SHOWN // 2
    return text if len(text) <= LONGEST_SHOWN else f"{text[:half]} … {text[-half:]}"
