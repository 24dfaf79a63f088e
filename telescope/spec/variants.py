"""Variants of a spec: keys of its tables replaced, as a table ``[variants.NAME]`` gives them."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

from telescope.config import MUON_ONLY

PLAIN = "plain"
"""The name of the spec itself among its variants."""
OF_FILES = {"source", "sources", "format", "field", "dtype"}
"""Keys of [data] that describe the files."""
OF_RANGE = {"low", "high", "points"}
"""Keys of an axis that is a range."""


def replaced(data: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a spec's tables with some keys replaced.

    Tables are merged key by key; everything else, lists too, is replaced whole. A new key takes the
    place of those that cannot stand beside it: an axis's `value` of its range, other data of the
    old files' format, another model file of the old one's keywords, AdamW of the keys and axes that
    only Muon has.

    Args:
        data: the tables, as nested dicts.
        changes: the keys to replace, nested alike.

    >>> replaced({"axes": {"lr": {"low": 0.1, "high": 1.0, "points": 3}}},
    ...          {"axes": {"lr": {"value": 0.2}}})
    {'axes': {'lr': {'value': 0.2}}}
    """
    merged = _merged(data, changes, ())
    if table_in(changes, "optimizer").get("name") == "adamw":
        for key in ("optimizer", "axes"):
            if isinstance(table := merged.get(key), dict):
                merged[key] = _without(table, MUON_ONLY - table_in(changes, key).keys())
    return merged


def table_in(data: Any, *path: str) -> Mapping[str, Any]:
    """Return a table of nested dicts by the keys that lead to it; {} where there is none."""
    for key in path:
        data = data.get(key) if isinstance(data, Mapping) else None
    return data if isinstance(data, Mapping) else {}


def _merged(
    data: Mapping[str, Any], changes: Mapping[str, Any], path: tuple[str, ...]
) -> dict[str, Any]:
    """Merge one table, whose path is given, and those in it."""
    merged = _without(data, _superseded(path, set(changes), set(data)))
    for key, value in changes.items():
        before = merged.get(key)
        if isinstance(before, Mapping) and isinstance(value, Mapping):
            value = _merged(before, value, (*path, key))
        merged[key] = value
    return merged


def _superseded(path: tuple[str, ...], given: set[str], there: set[str]) -> set[str]:
    """Return the keys of a table that cannot stand beside those given."""
    match path:
        case ("model",) if "file" in given:
            return there
        case ("data",) if given & {"source", "sources"}:
            return OF_FILES
        case ("axes", _) if "value" in given:
            return OF_RANGE
        case ("axes", _) if given & OF_RANGE:
            return {"value"}
        case ("trainer",) if "function" in given:
            return {"command", "environment", "result"}
        case ("trainer",) if "command" in given:
            return {"function"}
        case ("cost",) if given & {"parameters", "flops"}:
            return {"parameters", "flops"}
    return set()


def _without(table: Mapping[str, Any], keys: Set[str]) -> dict[str, Any]:
    """Return a table without some keys."""
    return {key: value for key, value in table.items() if key not in keys}
