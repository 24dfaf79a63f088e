"""Remembers what pure functions have made, found again by the content of what they were given.

A key has a function's input and the code that it is: the text of its modules and the versions of
the libraries that they compute with. Nothing has to be thrown away by hand; a file of this kind can
be deleted at any time.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import pydantic
from pydantic_core import to_jsonable_python

from telescope.config import ModelConfig
from telescope.data.cache import cache_folder
from telescope.errors import DataError
from telescope.files import write_atomic

Made = TypeVar("Made")
FIXED_BY_VERSION = {
    *("__future__", "abc", "collections", "dataclasses", "enum", "functools", "itertools", "math"),
    *("operator", "typing", "numpy", "torch", "mup"),
}
"""Modules of which a model file's text and the libraries' versions say all: it may import them."""


class Memory:
    """Values that one version of the code has made, in one JSON file."""

    def __init__(self, path: Path | None, code: str) -> None:
        """Read the file, if there is one.

        Args:
            path: the file; None to remember nothing.
            code: what identifies the code whose results are kept; see `code_of`.
        """
        self._path = path if code else None
        self._code = code
        self._known: dict[str, Any] = _read(self._path, code) if self._path else {}
        self._is_new = False

    def recall(
        self, kind: object, of: object, make: Callable[[], Made], *, only_latest: bool = False
    ) -> Made:
        """The value that `make` makes, from memory where it was made before.

        Args:
            kind: the type of what is made, of records and plain values; `Move | None` too.
            of: all that it depends on: records and plain values.
            make: makes it.
            only_latest: whether what was made before of something else can be forgotten.
        """
        if self._path is None:
            return make()
        name = getattr(kind, "__name__", str(kind))
        key = f"{name} {_digest(of)}"
        if key in self._known:
            with suppress(pydantic.ValidationError):
                made: Made = _adapter(kind).validate_python(self._known[key])
                return made
        plain = _adapter(kind).dump_python(make(), mode="json")
        if only_latest:
            for old in [old for old in self._known if old.startswith(f"{name} ")]:
                del self._known[old]
        self._known[key] = plain
        self._is_new = True
        read: Made = _adapter(kind).validate_python(plain)
        return read  # the same as the next time

    def keep(self) -> None:
        """Write all of it, if any is new; where nothing can be written, nothing is kept."""
        if self._path is None or not self._is_new:
            return
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"code": self._code, "made": self._known})
            write_atomic(self._path, text, durable=False)
            self._is_new = False


def made_before(kind: object, of: object, make: Callable[[], Made], *, code: str) -> Made:
    """The value that `make` makes, from the user's cache folder where it was made before.

    Args:
        kind: see `Memory.recall`.
        of: see `Memory.recall`.
        make: makes it.
        code: see `Memory`.
    """
    try:
        folder = cache_folder()
    except DataError:  # whoever needs one says so
        return make()
    memory = Memory(folder / "made" / f"{_digest(of)}.json", code)
    made = memory.recall(kind, of, make)
    memory.keep()
    return made


def of_model(kind: object, model: ModelConfig, of: object, make: Callable[[], Made]) -> Made:
    """The value that `make` makes of a model file, as `made_before`, if its text says all of it.

    Args:
        kind: see `Memory.recall`.
        model: the model file, which has to be among `of`.
        of: see `Memory.recall`.
        make: makes it.
    """
    code = code_of(
        "config", "rules", "data", "train", "store/memory", libraries=("torch", "mup", "numpy")
    )
    return made_before(kind, of, make, code=code if is_self_contained(model.text) else "")


def is_self_contained(source: str) -> bool:
    """Tell whether a model file's text says all that it builds: it imports nothing of the user's.

    >>> is_self_contained("import torch.nn as nn"), is_self_contained("from layers import Block")
    (True, False)
    """
    try:
        nodes = list(ast.walk(ast.parse(source)))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    froms = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    names |= {node.module or "" for node in froms if not node.level}
    is_known = {name.partition(".")[0] for name in names} <= FIXED_BY_VERSION
    return is_known and not any(node.level for node in froms)


def _digest(of: object) -> str:
    """Of the content alone: a record that was read is the same as one that was made."""
    plain = to_jsonable_python(of, inf_nan_mode="constants")
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:32]


@functools.cache
def _adapter(kind: Any) -> pydantic.TypeAdapter[Any]:
    return pydantic.TypeAdapter(kind)


def _read(path: Path, code: str) -> dict[str, Any]:
    """The values of this code; none where the file is missing, damaged or another code's."""
    with suppress(OSError, ValueError, RecursionError):
        data = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(data, dict) and data.get("code") == code and isinstance(data["made"], dict):
            return data["made"]
    return {}


@functools.cache
def code_of(*rooms: str, libraries: tuple[str, ...]) -> str:
    """A digest of code: its text and its libraries' versions; empty where it cannot be read.

    Args:
        rooms: folders of this package, all of whose modules count, or single modules.
        libraries: what they compute with, by the names under which they are installed.
    """
    package, digest = Path(__file__).parent.parent, hashlib.sha256()
    try:
        for room in rooms:
            place = package / room
            files = sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
            if not files:
                return ""
            for file in files:
                digest.update(
                    f"{file.relative_to(package).as_posix()}\0".encode() + file.read_bytes()
                )
        numbers = [f"{name} {version(name)}" for name in libraries]
    except (OSError, PackageNotFoundError):
        return ""
    digest.update("\n".join([sys.version, *numbers]).encode())
    return digest.hexdigest()
