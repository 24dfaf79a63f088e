"""Write a spec as TOML, which the standard library can only read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def as_toml(tables: Mapping[str, Any]) -> str:
    """Convert nested tables of JSON's types to TOML.

    >>> print(as_toml({"name": "a", "target": {"width": 8}}), end="")
    name = "a"
    <BLANKLINE>
    [target]
    width = 8
    """
    return "\n\n".join(_parts(tables, "")).lstrip("\n") + "\n"


def _parts(table: Mapping[str, Any], prefix: str) -> list[str]:
    """Return the text of a table's own keys, then of its tables."""
    plain = {key: value for key, value in table.items() if not isinstance(value, dict)}
    plain = {key: value for key, value in plain.items() if value is not None}
    lines = [f"{_key(key)} = {_value(value)}" for key, value in plain.items()]
    if prefix and (lines or not table):
        lines.insert(0, f"[{prefix}]")
    parts = ["\n".join(lines)] if lines else []
    for key, value in table.items():
        if isinstance(value, dict):
            parts += _parts(value, f"{prefix}.{_key(key)}" if prefix else _key(key))
    return parts


def _key(key: str) -> str:
    is_bare = key.isascii() and key.replace("_", "").replace("-", "").isalnum()
    return key if is_bare else _value(key)


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_key(k)} = {_value(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    # JSON's literals are valid TOML, except for the delete character.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
