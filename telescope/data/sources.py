"""The files that a source names, and the documents in them, one after the other.

At most one document, or a quarter of a megabyte of a text file, is in memory at a time.
"""

from __future__ import annotations

import glob
import itertools
import json
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from telescope.config import PYTHON_STDLIB, SourceConfig
from telescope.data.content import bom_bytes, check_content, is_checked, nul_error
from telescope.errors import DataError, Faults

STDLIB_BYTES = 8_000_000
"""Size at which the standard library's source is cut: enough for small models, quick to read."""
STDLIB_SKIPPED = {"test", "tests", "idle_test", "idlelib", "site-packages"}
NOT_TEXT = {
    *(".gz", ".zst", ".xz", ".bz2", ".zip", ".tar", ".tgz", ".7z", ".lz4"),
    *(".npy", ".npz", ".arrow", ".feather", ".pkl", ".pt", ".pth", ".safetensors", ".h5"),
    *(".json", ".db", ".sqlite", ".pdf", ".png", ".jpg"),
}
"""Suffixes of files whose bytes are not their text."""
TEXT_CHUNK = 1 << 18
LOOKED_ON = 1 << 24
"""Bytes of a JSONL file read after a wrong line, to find further wrong lines."""
LONGEST_LINE = 1 << 16
"""Most bytes read in search of a line's end before a text file is cut inside the line."""


@dataclass(frozen=True)
class Passage:
    """A document, or a part of a long text file."""

    place: float
    """Byte at which it starts, counted from the start of the first file; in Parquet, the byte of
    its row if all rows were equally long."""
    text: str
    ends: bool = True
    """True if the document ends with this passage."""


def files_of(source: SourceConfig) -> list[Path]:
    """Return the files that a source names, in order, each once.

    A file that is named twice, also by a link, counts once: a second copy of a held-out passage
    could be trained on. Of Megatron's two files, the one with the tokens is returned.

    Raises:
        DataError: nothing matches, or a file has another format than its source, by its suffix or
            its first bytes.
    """
    if source.source == PYTHON_STDLIB:
        return _stdlib_files()
    found: dict[Any, Path] = {}
    faults = Faults()
    for pattern in source.patterns:
        paths: list[Path] = []
        with faults.collected():
            paths = _matches(pattern)
        for path in paths:
            if source.kind == "tokens" and path.suffix == ".idx":
                path = path.with_suffix(".bin")
            with faults.collected():
                _check_suffix(path, source)
                try:
                    stat = path.stat()
                    check_content(path, source)
                except OSError as error:
                    raise DataError(f"{path}: cannot be read: {error.strerror}") from error
                found.setdefault((stat.st_dev, stat.st_ino), path.resolve())
    faults.raise_all()
    return list(found.values())


def _check_suffix(path: Path, source: SourceConfig) -> None:
    """Check that a file found by a glob has the format that its source's pattern suggests."""
    if source.format != "auto":
        return
    if path.suffix.lower() in NOT_TEXT:
        raise DataError(
            f"{path}: no known format has the suffix {path.suffix}; unpack or convert it, or say "
            "what it is with data.format"
        )
    kind = SourceConfig(source=str(path)).kind
    if kind != source.kind:
        raise DataError(
            f"{path}: looks like {kind}, but {source.patterns[0]!r} like {source.kind}; name each "
            "format's files by suffix, or say what they are with data.format"
        )


def _stdlib_files() -> list[Path]:
    """Return the standard library's .py files, sorted, up to `STDLIB_BYTES`."""
    found = []
    for folder, inner, names in os.walk(sysconfig.get_paths()["stdlib"]):
        inner[:] = set(inner) - STDLIB_SKIPPED  # not walked: they hold most of the files
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    found.sort()
    before = itertools.accumulate((path.stat().st_size for path in found), initial=0)
    return [path for path, start in zip(found, before, strict=False) if start < STDLIB_BYTES]


def _matches(pattern: str) -> list[Path]:
    """Return the files of one path or glob, sorted."""
    paths = sorted(Path(p) for p in glob.glob(pattern, recursive=True) if Path(p).is_file())
    if not paths and Path(pattern).is_dir():
        raise DataError(f"data.source: {pattern!r} is a folder; name its files: {pattern}/*.txt")
    if not paths:
        raise DataError(f"data.source: no file matches {pattern!r}; give a path or a glob")
    return paths


def passages(
    source: SourceConfig, files: Sequence[Path], cuts: Sequence[float]
) -> Iterator[Passage]:
    """Yield the documents of text, JSONL or Parquet files, in order.

    Args:
        source: states the format, and the field with the text.
        files: the files found by `files_of`.
        cuts: rising places at which text files are cut, at the next end of a line; documents of
            the other formats are never cut.

    Raises:
        DataError: a document is wrong; the message gives the file and the place.
    """
    offset = 0
    for number, path in enumerate(files):
        try:
            if source.kind == "text":
                yield from _text(path, offset, cuts, is_checked(source))
            elif source.kind == "jsonl":
                yield from _jsonl(path, offset, source.field)
            else:
                yield from _parquet(path, offset, source.field)
            offset += path.stat().st_size
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
        except DataError as error:
            if source.kind == "jsonl":
                _look_on(source, files[number + 1 :], error)
            raise


def _look_on(source: SourceConfig, files: Sequence[Path], error: DataError) -> None:
    """Raise `error` together with the faults of further files, as far as these are small."""
    faults, left = Faults(), LOOKED_ON
    with faults.collected():
        raise error
    for path in files:
        left -= path.stat().st_size
        if left < 0:
            break
        with faults.collected():
            for _ in _jsonl(path, 0, source.field):
                pass
    faults.raise_all()


def _text(path: Path, offset: int, cuts: Sequence[float], checked: bool) -> Iterator[Passage]:
    """Yield a text file in parts of a quarter of a megabyte, cut at line ends."""
    coming = [cut - offset for cut in reversed(cuts) if cut > offset]
    start, size = bom_bytes(path), path.stat().st_size
    with path.open("rb") as stream:
        stream.seek(start)
        while start < size:
            while coming and coming[-1] <= start:
                coming.pop()
            wanted = min(TEXT_CHUNK, coming[-1] - start if coming else TEXT_CHUNK)
            block = stream.read(max(1, int(wanted)))
            if not block.endswith(b"\n"):
                block += stream.readline(LONGEST_LINE)
            block += _rest_of_character(stream)
            if checked and (nul := block.find(b"\0")) >= 0:
                raise nul_error(path, start + nul)
            try:
                text = block.decode()
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}: byte {start + error.start}: no UTF-8 text ({error.reason}); a "
                    "tokenizer needs text: convert the file, or use tokenizer = 'bytes'"
                ) from error
            place = offset + start
            start += len(block)
            yield Passage(place, text, ends=start >= size)


def _rest_of_character(stream: IO[bytes]) -> bytes:
    """Read the rest of a character that the stream is in the middle of, at most three bytes."""
    rest = b""
    while len(rest) < 3 and (byte := stream.read(1)):
        if not 0x80 <= byte[0] < 0xC0:
            stream.seek(-1, 1)
            break
        rest += byte
    return rest


def _jsonl(path: Path, offset: int, field: str) -> Iterator[Passage]:
    """Yield one document per line."""
    start = offset
    with path.open("rb") as stream:
        faults, last = Faults(), start + LOOKED_ON  # `last` moves on until there is a fault
        for number, line in enumerate(stream, 1):
            with faults.collected():
                text = _field_of(line, f"{path}:{number}", field) if line.strip() else None
                if text is not None and not faults:
                    yield Passage(start, text)
            start += len(line)
            if not faults:
                last = start + LOOKED_ON
            elif start > last:
                break
        faults.raise_all()


def _field_of(line: bytes, where: str, field: str) -> str:
    """Return the text in one line of JSON."""
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: byte {error.start} of the line: no UTF-8 text") from error
    except json.JSONDecodeError as error:
        if b"\0" in line:
            hint = "a NUL in it; convert UTF-16 (iconv -f UTF-16LE -t UTF-8 OLD > NEW)"
            raise DataError(f"{where}: not valid JSON: {hint}") from error
        raise DataError(f"{where}: not valid JSON: {error.msg} at column {error.colno}") from error
    except (RecursionError, ValueError) as error:
        raise DataError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(record, dict):
        raise DataError(f"{where}: a {type(record).__name__}, must be an object with {field!r}")
    if field not in record:
        there = ", ".join(map(repr, list(record)[:8])) or "none"
        raise DataError(f"{where}: no field {field!r}; there: {there}; set data.field")
    text = record[field]
    if not isinstance(text, str):
        kind = "null" if text is None else type(text).__name__
        raise DataError(f"{where}: field {field!r} is {kind}, must be a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: field {field!r} has half a surrogate pair, which is no text"
        ) from error
    return text


def _parquet(path: Path, offset: int, field: str) -> Iterator[Passage]:
    """Yield one document per row, read a row group at a time."""
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            if field not in schema.names:
                raise DataError(
                    f"{path}: no column {field!r}; there: {', '.join(map(repr, schema.names))}; "
                    "set data.field"
                )
            kind = schema.field(field).type
            kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
            strings = ("string", "large_string", "string_view")
            if str(kind) not in strings:
                raise DataError(f"{path}: column {field!r} is {kind}, must be string")
            row, each = 0, path.stat().st_size / max(1, file.metadata.num_rows)
            for group in range(file.num_row_groups):
                # For all groups at once the library would keep all that it has read in memory.
                for batch in file.iter_batches(
                    batch_size=100, row_groups=[group], columns=[field], use_threads=False
                ):
                    for text in batch.column(0).to_pylist():
                        if text is None:
                            raise DataError(f"{path}: row {row}: column {field!r} is null")
                        yield Passage(offset + row * each, text)
                        row += 1
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path}: not a readable Parquet file: {reason}") from error
