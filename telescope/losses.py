"""Read a loss of any library or spelling: one rule for every place that takes one.

A finite number is a loss. NaN, an infinity, null and a number too large for a float count as a
divergence. Anything else is not a loss.
"""

from __future__ import annotations

import math
import re
from typing import Any

from telescope.records import Status

NOT_A_NUMBER = r"[+-]?(?:nan(?:\(\w*\))?|1\.#(?:ind|[qs]?nan)\w*)"
"""Spellings of NaN that programs print, in any case; the last are those of Windows."""
INFINITE = r"[+-]?(?:inf(?:inity)?|1\.#inf\w*)"
"""Spellings of infinity, in any case."""
NULL = r"null|none"
"""Spellings of null, in any case; some JSON writers use it for NaN."""
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?", re.IGNORECASE)
_NAN, _INFINITY, _NULL = (
    re.compile(words, re.IGNORECASE) for words in (NOT_A_NUMBER, INFINITE, NULL)
)


def judged(value: object) -> tuple[Status, float | None, str]:
    """Judge a loss; return the trial's status, the loss or None, and the reason of divergence.

    >>> judged(1.9), judged("-Infinity")
    ((<Status.COMPLETE: 'complete'>, 1.9, ''), (<Status.DIVERGED: 'diverged'>, None, 'loss -inf'))

    Args:
        value: a number of any library, a text with a number, or None (JSON's null).

    Raises:
        ValueError: it is none of these.
    """
    if value is None or (isinstance(value, str) and _NULL.fullmatch(value.strip())):
        return Status.DIVERGED, None, "loss null"
    number = in_text(value) if isinstance(value, str) else as_number(value)
    if number is None:
        raise ValueError(f"{shown(value)}, must be a number")
    if math.isfinite(number):
        return Status.COMPLETE, number, ""
    return Status.DIVERGED, None, f"loss {number}"


def as_number(value: Any) -> float | None:
    """Convert a number of any library to a float; None for text, booleans and arrays.

    An array or tensor with one element counts as that number. An integer too large for a float
    becomes infinite.
    """
    try:
        if hasattr(value, "item"):  # a scalar of numpy, torch or jax
            value = value.item()
        if value is None or isinstance(value, (str, bytes, bytearray, bool)):
            return None
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
    except Exception:  # libraries raise various exceptions for arrays
        return None


def in_text(text: str) -> float | None:
    """Convert a text to a number; None if it is not one.

    >>> in_text(" 1.9 "), in_text("1e999"), in_text("NaN"), in_text("1_000"), in_text("low")
    (1.9, inf, nan, None, None)
    """
    text = text.strip()
    if _NAN.fullmatch(text):
        return math.nan
    if _INFINITY.fullmatch(text):
        return -math.inf if text[0] == "-" else math.inf
    return float(text) if _NUMBER.fullmatch(text) else None


def shown(value: object) -> str:
    """Return a value's repr on one line, cut if it is long."""
    try:
        text = " ".join(repr(value).split())
    except Exception:
        text = f"a {type(value).__name__}"
    return text if len(text) <= 120 else f"{text[:117]}..."
