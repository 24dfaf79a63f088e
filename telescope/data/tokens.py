"""The tokens of documents, made once per machine and kept in a memory-mapped file.

A document is held out if it starts in a held-out range of the source's bytes. This does not depend
on the tokenizer: every tokenizer holds out the same text, and one can be trained on the rest alone.
"""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from telescope.config import BYTES, SourceConfig
from telescope.data.cache import (
    cache_folder,
    keep_entry,
    key_of,
    made_once,
    read_entry,
    remembered,
    unusable,
)
from telescope.data.shards import SMALL_BYTES, TokenFile, chunks, scan
from telescope.data.sources import Passage
from telescope.data.sources import passages as passages_of
from telescope.data.tokenizer import Tokenizer
from telescope.data.views import Ranges, held_out_ranges
from telescope.errors import DataError

BATCH_CHARACTERS = 1 << 21
"""Characters tokenized at a time: enough to keep some threads busy."""
RECIPE = 2
"""Version of the encoding, raised when the same documents give other tokens."""

Progress = Callable[[float, float], None]
"""Called with the bytes of a source that are done, and their total."""


@dataclass(frozen=True)
class Tokenized:
    """The tokens of a source's documents."""

    tokens: NDArray[Any]
    """The tokens, memory-mapped; they stay readable if the file is deleted."""
    held_out: Ranges
    digest: str
    """SHA-256 of the tokens and of the held-out ranges, hexadecimal."""
    passages: int
    """Number of documents or parts of text; each is held out whole or not at all."""


def as_bytes(files: Iterable[Path]) -> list[TokenFile]:
    """Return the non-empty files as tokens that are their bytes."""
    stats = [(path, path.stat()) for path in files]
    return [
        TokenFile(path, "uint8", stat.st_size, changed=stat.st_ctime_ns)
        for path, stat in stats
        if stat.st_size
    ]


def split_passages(
    source: SourceConfig, files: Sequence[Path], share: float, progress: Progress | None = None
) -> Iterator[tuple[Passage, bool]]:
    """Yield every passage of a source with True if it is held out; see `sources.passages`.

    A passage is held out if it starts in a held-out range. A few documents longer than such ranges
    may start in none; then the last one is held out, so that there is something to measure on.
    """
    size = sum(path.stat().st_size for path in files)
    borders = [place for pair in held_out_ranges(size, share) for place in pair]
    count, found, last = 0, False, None
    for passage in passages_of(source, files, borders):
        if last:
            yield last, False
        is_held_out = bisect_right(borders, passage.place) % 2 == 1
        found = found or is_held_out
        last = None if found else passage
        if found:
            yield passage, is_held_out
        count += 1
        if progress:
            progress(passage.place, size)
    if last:
        yield last, count > 1
    if progress:
        progress(size, size)


def tokenize(
    source: SourceConfig,
    files: Sequence[Path],
    tokenizer: Tokenizer,
    share: float,
    progress: Progress | None = None,
) -> Tokenized:
    """Return the tokens of a source, from the cache or made now, while other processes wait.

    Args:
        source: a source of text, JSONL or Parquet.
        files: its files.
        tokenizer: the tokenizer.
        share: the share held out.
        progress: called with the bytes done and their total, if anything is tokenized.

    Raises:
        DataError: a file is wrong, with the place in it, or the cache folder is full.
    """
    raw = as_bytes(files)
    key = key_of(
        *(RECIPE, scan(raw).digest, [file.count for file in raw], source.kind, source.field),
        *(tokenizer.digest, None if tokenizer.digest == BYTES else version("tokenizers"), share),
    )
    entry = cache_folder() / "tokens" / f"{key}.json"
    path = entry.with_suffix(".bin")
    with made_once(entry):
        known = read_entry(entry)
        if known is None or not _is_whole(path, known):
            parts = split_passages(source, files, share, progress)
            known = _write(path, parts, tokenizer)
            keep_entry(entry, known)
        tokens = np.empty(0, known["dtype"]) if not known["count"] else _file(path, known).map()
    held_out = [(start, end) for start, end in known["held_out"]]
    return Tokenized(tokens, held_out, known["digest"], known["passages"])


def _file(path: Path, known: dict[str, Any]) -> TokenFile:
    """Return the file of tokens that an entry describes."""
    return TokenFile(path, known["dtype"], known["count"], changed=path.stat().st_ctime_ns)


def _is_whole(path: Path, known: dict[str, Any]) -> bool:
    """Tell whether a file holds the tokens that its entry describes; read again if it changed."""

    def read() -> dict[str, Any]:
        hasher = hashlib.sha256(file.dtype.encode())
        for chunk in chunks(file):
            hasher.update(chunk.data)
        hasher.update(repr(known["held_out"]).encode())
        return {"digest": hasher.hexdigest()}

    try:
        file = _file(path, known)
        if path.stat().st_size != file.bytes:
            return False
        found = read() if file.bytes <= SMALL_BYTES else remembered([path], read, "tokens", known)
    except (FileNotFoundError, DataError):
        return False
    return bool(found["digest"] == known["digest"])


def _write(
    path: Path, parts: Iterator[tuple[Passage, bool]], tokenizer: Tokenizer
) -> dict[str, Any]:
    """Write the tokens, whole or not at all; return the entry that describes them."""
    dtype = smallest_dtype(tokenizer.vocabulary)
    unfinished = path.with_suffix(".tmp")
    hasher, count, held_out = hashlib.sha256(dtype.encode()), 0, list[list[int]]()
    passages = 0
    try:
        with unfinished.open("wb") as stream:
            for batch in _batches(parts):
                encoded = tokenizer.encode([passage.text for passage, _ in batch])
                for (passage, is_held_out), ids in zip(batch, encoded, strict=True):
                    tokens = _as_array(ids, tokenizer.end if passage.ends else (), dtype)
                    passages += 1
                    stream.write(tokens.data)
                    hasher.update(tokens.data)
                    if is_held_out and held_out and held_out[-1][1] == count:
                        held_out[-1][1] += len(tokens)
                    elif is_held_out:
                        held_out.append([count, count + len(tokens)])
                    count += len(tokens)
        os.replace(unfinished, path)
    except BaseException as error:
        with suppress(OSError):
            unfinished.unlink()
        if isinstance(error, OSError):
            raise unusable(path.parent, error) from error
        raise
    hasher.update(repr(held_out).encode())
    return {
        "dtype": dtype,
        "count": count,
        "held_out": held_out,
        "digest": hasher.hexdigest(),
        "passages": passages,
    }


def smallest_dtype(vocabulary: int) -> str:
    """Return the smallest type that holds a vocabulary's ids."""
    return next(
        name
        for name, most in (("uint8", 1 << 8), ("uint16", 1 << 16), ("uint32", 1 << 32))
        if vocabulary <= most
    )


def _as_array(ids: Sequence[int], end: tuple[int, ...], dtype: str) -> Any:
    """Return a passage's tokens with the end of its document, little-endian."""
    if isinstance(ids, bytes):
        return np.frombuffer(ids + bytes(end), dtype=np.uint8)
    return np.array([*ids, *end], dtype=np.dtype(dtype).newbyteorder("<"))


def _batches(parts: Iterator[tuple[Passage, bool]]) -> Iterator[list[tuple[Passage, bool]]]:
    """Group passages into lists of about `BATCH_CHARACTERS` of text."""
    batch, size = list[tuple[Passage, bool]](), 0
    for part in parts:
        batch.append(part)
        size += len(part[0].text) + 1
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
