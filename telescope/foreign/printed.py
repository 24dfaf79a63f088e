"""Find JSON objects in a line as programs and launchers print it.

    [rank0]: 100%|████| 10/10 {"step": 100, "loss": nan},

A launcher, a logger or a progress bar may add text before and after an object. A line about a loss
or another end of the trial that cannot be read whole is a *problem*: its content is unknown, and no
earlier line may replace it.
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

from telescope.losses import INFINITE, NOT_A_NUMBER, NULL

LONGEST_SHOWN = 200
"""Most characters of a line in a message."""
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
"""A line about the end of a trial."""
LONGEST_WORD = 64
"""Most bytes that `SPEAKS_BYTES` matches, not counting blanks."""
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
    """The reason that text about a loss after these cannot be read; "" if there is none."""
    first_key: str | None = None
    """The first key of an unreadable object that is not about a loss."""


def read_line(line: bytes | str, *, is_cut: bool = False) -> Line:
    """Read a line.

    >>> read_line('[rank0]: {"loss": -Inf},').objects, read_line("epoch 3").objects
    ([{'loss': -inf}], [])
    >>> read_line('{"step": 3, "loss": 1.').problem
    'it is cut off or garbled'

    Args:
        line: the line without its end-of-line character.
        is_cut: it is the last line and has no end of line, so it may be cut off.
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
    """Split a text into its objects, the text around them, and the broken rest or None."""
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
    """Convert digits to an integer; to infinity if it is too large for a float or for Python."""
    return int(digits) if len(digits) < 400 else float(digits)


_DECODER = json.JSONDecoder(strict=False, parse_int=_whole_number)


def _as_json(word: re.Match[str]) -> str:
    """Return the spelling of a word that Python's JSON reader accepts."""
    if word["text"]:
        return word["text"]
    if word["nan"]:
        return "NaN"
    if word["infinite"]:
        return "-Infinity" if word[0][0] == "-" else "Infinity"
    return "" if word["comma"] else word[0].lower().replace("none", "null")


def without_control(text: str) -> str:
    """Remove colours, byte-order marks and backspaces from a text."""
    return _CONTROL.sub("", text)


def shown_line(line: bytes | str) -> str:
    """Prepare a line for a message: without colours, and only both ends of a long one."""
    text = line.decode(errors="replace") if isinstance(line, bytes) else line
    text = " ".join(without_control(text).replace("\0", "").split())
    half = LONGEST_SHOWN // 2
    return text if len(text) <= LONGEST_SHOWN else f"{text[:half]} … {text[-half:]}"
