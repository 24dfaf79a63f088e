"""Files of tokens, read in place: raw, llm.c's and Megatron's. Nothing is loaded into memory.

Sources: llm.c, `dev/data/data_common.py`; Megatron-LM, `megatron/core/datasets/indexed_dataset.py`;
nanoGPT's `.bin` is raw uint16. All are little-endian.
"""

from __future__ import annotations

import functools
import hashlib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from telescope.config import SourceConfig
from telescope.data.cache import remembered
from telescope.data.content import check_tokens
from telescope.errors import DataError

LLM_C = {20240520: ("GPT-2", 1, "uint16"), 20240801: ("Llama 3", 7, "uint32")}
"""Magic number → name of the tokenizer, version, type of token."""
LLM_C_HEADER = 256 * 4
MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
MEGATRON_HEADER = struct.Struct("<9sQBQQ")
"""Magic, version, code of the type, sequences, entries of the document index."""
MEGATRON_TYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
CHUNK_BYTES = 1 << 24
SMALL_BYTES = 1 << 26
"""Total size up to which files are read again every time: their digest takes 0.1 seconds, and
a small corpus leaves nothing in the cache folder."""
OPEN_FILES = 400
"""Most files mapped at a time: a mapped file is open, and a process may have 1024 open."""


@dataclass(frozen=True)
class TokenFile:
    """A run of tokens in a file."""

    path: Path
    dtype: str
    """numpy's name; little-endian."""
    count: int
    """Number of tokens."""
    offset: int = 0
    """Bytes before the first token."""
    changed: int = 0
    """Time of the file's last change, ns: a new file of the same name is another run of tokens."""

    @property
    def bytes(self) -> int:
        """Size of the tokens in bytes."""
        return self.count * np.dtype(self.dtype).itemsize

    def map(self) -> NDArray[Any]:
        """Return the tokens, memory-mapped."""
        return _mapped(self)


@functools.lru_cache(maxsize=OPEN_FILES)
def _mapped(file: TokenFile) -> NDArray[Any]:
    dtype = np.dtype(file.dtype).newbyteorder("<")
    mapped = np.memmap(file.path, dtype, mode="r", offset=file.offset, shape=(file.count,))
    return mapped.view(np.ndarray)  # slices of a memmap cost more than the tokens in them


@dataclass(frozen=True)
class Scan:
    """The findings of one pass over all tokens of a source."""

    digest: str
    """SHA-256, hexadecimal, of the tokens' type and of their bytes in the files; for bytes, of the
    bytes alone."""
    highest: int
    """The highest token id."""
    place: str
    """The place of that token: file and number, from 0."""
    first_zero: tuple[str, int] | None
    """The place of the first token that is 0: file and byte. In text this is a NUL."""


def scan(files: Sequence[TokenFile]) -> Scan:
    """Read every token once, in bounded memory, and remember the findings.

    The digest covers all data: with a sample, two corpora that differ elsewhere would seem equal.
    And all ids must be read anyway to find one outside the vocabulary. This takes seconds per
    gigabyte (`benchmarks/data_memory.py`), once per machine: the outcome is remembered as long as
    every file keeps its name, size, inode and times.

    Raises:
        DataError: a file cannot be read, has become shorter, or has a negative token.
    """
    if sum(file.bytes for file in files) <= SMALL_BYTES:
        return _read_all(files)
    layout = [(file.dtype, file.count, file.offset) for file in files]
    paths = [file.path for file in files]
    known = remembered(paths, lambda: vars(_read_all(files)), "scan 2", layout)
    return Scan(**known)


def _read_all(files: Sequence[TokenFile]) -> Scan:
    """Read every token once; see `scan`."""
    hasher, highest, place, zero = hashlib.sha256(), -1, "", None
    if files and files[0].dtype != "uint8":
        hasher.update(files[0].dtype.encode())
    for file in files:
        start = 0
        for chunk in chunks(file):
            hasher.update(chunk.data)
            top, low = int(chunk.argmax()), int(chunk.argmin())
            if chunk[low] < 0:
                at = f"{file.path}: token {start + low}"
                raise DataError(f"{at}: id {chunk[low]}, must be >= 0; is it a file of tokens?")
            if chunk[low] == 0 and zero is None:
                zero = str(file.path), file.offset + (start + low) * chunk.itemsize
            if chunk[top] > highest:
                highest, place = int(chunk[top]), f"{file.path}: token {start + top}"
            start += len(chunk)
    return Scan(hasher.hexdigest(), highest, place, zero)


def chunks(file: TokenFile) -> Iterator[NDArray[Any]]:
    """Yield the tokens, some megabytes at a time; mapped pages would count as memory in use.

    Raises:
        DataError: the file cannot be read, or has become shorter.
    """
    dtype = np.dtype(file.dtype).newbyteorder("<")
    try:
        with open(file.path, "rb") as stream:
            stream.seek(file.offset)
            left = file.count
            while left:
                chunk = np.fromfile(stream, dtype, min(left, CHUNK_BYTES // dtype.itemsize))
                if not len(chunk):
                    raise DataError(f"{file.path}: became shorter while it was read")
                left -= len(chunk)
                yield chunk
    except OSError as error:
        raise DataError(f"{file.path}: cannot be read: {error.strerror}") from error


def open_shard(path: Path, source: SourceConfig) -> TokenFile:
    """Check a shard's header and size, and by a sample the type of its tokens.

    Args:
        path: a ``.bin`` file; Megatron's ``.idx`` lies beside it.
        source: states the format, and the type of a raw file.

    Raises:
        DataError: the shard is wrong; the message names the file and the fault.
    """
    try:
        shard = _opened(path, source)
        check_tokens(path, shard.dtype, shard.offset, shard.count)
        return replace(shard, changed=path.stat().st_ctime_ns)
    except OSError as error:
        raise DataError(f"{error.filename or path}: cannot be read: {error.strerror}") from error


def _opened(path: Path, source: SourceConfig) -> TokenFile:
    """Open a shard by its format; see `open_shard`."""
    index = path.with_suffix(".idx")
    if source.format == "megatron" or (source.format == "auto" and index.exists()):
        shard = _megatron(path, index)
    else:
        size = path.stat().st_size
        if size == 0:
            raise DataError(f"{path}: is empty; leave it out")
        with path.open("rb") as stream:
            header = stream.read(LLM_C_HEADER)
        magic = struct.unpack("<i", header[:4])[0] if len(header) >= 4 else None
        if source.format == "llm.c" or (source.format == "auto" and magic in LLM_C):
            shard = _llm_c(path, size, header)
        else:
            if source.format == "auto":
                _check_no_header(path, size, header)
            return _raw(path, size, source.dtype)
    if source.dtype not in (None, shard.dtype):
        raise DataError(f"{path}: says itself that its tokens are {shard.dtype}; leave dtype out")
    return shard


def _raw(path: Path, size: int, dtype: str | None) -> TokenFile:
    """Open a file of tokens without a header, such as nanoGPT's."""
    if dtype is None:
        raise DataError(
            f"{path}: has no header that says what its tokens are; give data.dtype: 'uint16' "
            "(nanoGPT's) or 'uint32'"
        )
    width = np.dtype(dtype).itemsize
    if size % width:
        raise DataError(
            f"{path}: {size} bytes are no whole number of {dtype} tokens; it is cut off, or has "
            "another data.dtype"
        )
    return TokenFile(path, dtype, size // width)


def _check_no_header(path: Path, size: int, header: bytes) -> None:
    """Check that raw tokens do not start with a header like llm.c's under another magic number.

    The third number of such a header is the count of tokens after it; the third of raw tokens
    equals that count only once in 2³¹ files.
    """
    if len(header) == LLM_C_HEADER:
        magic, version, count = struct.unpack("<3i", header[:12])
        if count > 0 and size - LLM_C_HEADER in (2 * count, 4 * count):
            raise DataError(
                f"{path}: byte 0: magic number {magic}, version {version}, but byte 8 counts the "
                f"{count} tokens after a header of llm.c's: it is damaged, or of another version; "
                "if all of it is tokens, say data.format = 'raw'"
            )


def _llm_c(path: Path, size: int, header: bytes) -> TokenFile:
    """Open llm.c's format: 256 int32 (magic, version, number of tokens, …), then the tokens."""
    if len(header) < LLM_C_HEADER:
        raise DataError(f"{path}: {size} bytes, llm.c's header alone has {LLM_C_HEADER}")
    magic, version, count = struct.unpack("<3i", header[:12])
    if magic not in LLM_C:
        known = ", ".join(f"{number} ({name})" for number, (name, *_) in LLM_C.items())
        raise DataError(f"{path}: byte 0: magic number {magic}, llm.c's are {known}")
    name, right, dtype = LLM_C[magic]
    if version != right:
        raise DataError(f"{path}: byte 4: version {version}, must be {right} for {name}'s tokens")
    held = (size - LLM_C_HEADER) / np.dtype(dtype).itemsize
    if count != held or count < 1:
        raise DataError(
            f"{path}: byte 8: the header counts {count} tokens, the file holds {held:g}; "
            "it is cut off or damaged"
        )
    return TokenFile(path, dtype, count, LLM_C_HEADER)


def _megatron(path: Path, index: Path) -> TokenFile:
    """Open Megatron's format: tokens without gaps, and an index file beside them."""
    size, held = index.stat().st_size, path.stat().st_size
    with index.open("rb") as stream:
        header = stream.read(MEGATRON_HEADER.size)
    if len(header) < MEGATRON_HEADER.size or not header.startswith(MEGATRON_MAGIC):
        raise DataError(f"{index}: byte 0: no Megatron index, which starts with MMIDIDX")
    _, version, code, sequences, documents = MEGATRON_HEADER.unpack(header)
    if version != 1:
        raise DataError(f"{index}: byte 9: version {version}, must be 1")
    if code not in MEGATRON_TYPES:
        raise DataError(
            f"{index}: byte 17: type {code} is none of tokens; "
            f"known: {', '.join(f'{c} ({name})' for c, name in MEGATRON_TYPES.items())}"
        )
    expected = MEGATRON_HEADER.size + 12 * sequences + 8 * documents
    # Multimodal data also have modes, one byte per sequence.
    if size not in (expected, expected + sequences):
        raise DataError(
            f"{index}: {size} bytes, {expected} are needed for the {sequences} sequences and "
            f"{documents} document entries of its header; it is cut off or damaged"
        )
    if not sequences:
        raise DataError(f"{index}: has no sequences; leave it out")
    dtype = MEGATRON_TYPES[code]
    _check_index(index, sequences, documents, np.dtype(dtype).itemsize, held, path)
    return TokenFile(path, dtype, held // np.dtype(dtype).itemsize)


def _check_index(
    index: Path, sequences: int, documents: int, width: int, held: int, path: Path
) -> None:
    """Check that the index's sequences fill the tokens' file without gap or overlap."""
    after_header = MEGATRON_HEADER.size
    lengths = np.fromfile(index, "<i4", sequences, offset=after_header).astype(np.int64)
    pointers = np.fromfile(index, "<i8", sequences, offset=after_header + 4 * sequences)
    borders = np.fromfile(index, "<i8", documents, offset=after_header + 12 * sequences)
    if (bad := np.flatnonzero(lengths < 0)).size:
        raise DataError(f"{index}: sequence {bad[0]}: length {lengths[bad[0]]}, must be >= 0")
    ends = np.cumsum(lengths) * width
    if (bad := np.flatnonzero(pointers != ends - lengths * width)).size:
        raise DataError(
            f"{index}: sequence {bad[0]}: starts at byte {pointers[bad[0]]}, must at "
            f"{(ends - lengths * width)[bad[0]]}, where the one before ends"
        )
    if held != ends[-1] or not held:
        raise DataError(
            f"{index}: does not match {path.name}: its sequences have {ends[-1]} bytes, the file "
            f"has {held}"
        )
    rising = documents == 0 or (
        borders[0] == 0 and borders[-1] == sequences and bool((np.diff(borders) >= 0).all())
    )
    if not rising:
        raise DataError(f"{index}: its document entries do not rise from 0 to {sequences}")
