"""Check by their bytes that files hold what their source says.

Text is recognised by its suffix, and tokens by a type that the user gives. So without this check, a
file of another kind would be trained on silently. No file of the right kind is refused here.
"""

from __future__ import annotations

import codecs
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from telescope.config import PYTHON_STDLIB, SourceConfig
from telescope.errors import DataError

UTF8_BOM = b"\xef\xbb\xbf"
"""The mark that some editors put before UTF-8 text. It is not part of the text."""
HEAD_BYTES = 1 << 16
SAMPLE_BYTES = 1 << 14
"""Bytes read in the middle and at the end of a text file."""

UNPACK = "unpack it"
CONVERT = "convert it to text, JSONL or Parquet"
TO_RAW = "write its array with tofile as raw tokens (.bin, with data.dtype)"
MAGIC: list[tuple[str, bytes, str]] = [
    ("gzip-compressed", rb"\x1f\x8b\x08[\x00-\x1f].{4}[\x00\x02\x04][\x00-\x0d\xff]", UNPACK),
    ("zstd-compressed", rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18", UNPACK),
    ("xz-compressed", rb"\xfd7zXZ\x00", UNPACK),
    ("lzma-compressed", rb"\x5d.{4}\xff{8}", UNPACK),
    ("bzip2-compressed", rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)", UNPACK),
    ("lz4-compressed", rb"\x04\x22\x4d\x18|\x02\x21\x4c\x18", UNPACK),
    ("snappy-compressed", rb"\xff\x06\x00\x00sNaPpY", UNPACK),
    ("lzo-compressed", rb"\x89LZO\x00\r\n\x1a\n", UNPACK),
    ("a zip archive (.npz and .pt are such, too)", rb"PK(?:\x03\x04|\x05\x06)", UNPACK),
    ("a 7z archive", rb"7z\xbc\xaf\x27\x1c", UNPACK),
    ("a rar archive", rb"Rar!\x1a\x07", UNPACK),
    ("a tar archive", rb".{257}ustar[\x00 ]", UNPACK),
    ("a NumPy array", rb"\x93NUMPY", TO_RAW),
    ("a Parquet file", rb"PAR[1E][\x00-\x1f]", "say data.format = 'parquet'"),
    ("an Arrow file", rb"ARROW1\x00\x00|FEA1\x00|\xff{4}.{4}\x10\x00\x00\x00", CONVERT),
    ("an Avro file", rb"Obj\x01", CONVERT),
    ("an SQLite database", rb"SQLite format 3\x00", CONVERT),
    ("an HDF5 file", rb"\x89HDF\r\n\x1a\n", CONVERT),
    ("a safetensors file", rb".{3}\x00{5}\{\"", CONVERT),
    (
        "a pickle",
        rb"\x80[\x04\x05]\x95.{5}\x00{3}|\x80[\x02\x03](?:[\]}]q\x00|c\w{3}|\x8a\nl)",
        CONVERT,
    ),
    ("a GGUF model", rb"GGUF[\x01-\x0f]\x00\x00\x00", "leave it out"),
    ("a PDF document", rb"%PDF-\d\.", CONVERT),
    (
        "an image",
        rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff[\xe0\xe1].{2}(?:JFIF|Exif)|GIF8[79]a",
        "leave it out",
    ),
    ("a program", rb"\x7fELF[\x01\x02]|\xcf\xfa\xed\xfe|\xca\xfe\xba\xbe", "leave it out"),
    ("an index of Megatron's", rb"MMIDIDX\x00", "name the .bin beside it"),
    ("a shard of llm.c's", rb"(?:\x88\xd8|\xa1\xd9)\x34\x01", "say data.format = 'llm.c'"),
]
"""Kinds of files: name, beginning (a regular expression), and advice. No text begins like this, and
only about one in 2²⁸ shards of tokens does."""
OTHER_UNICODE = [
    ("UTF-32", rb"\xff\xfe\x00\x00|\x00\x00\xfe\xff"),
    ("UTF-16", rb"\xff\xfe|\xfe\xff"),
]
"""The byte-order marks of Unicode's other forms."""
_MAGIC = [(kind, re.compile(magic, re.DOTALL), advice) for kind, magic, advice in MAGIC]
_OTHER_UNICODE = [(kind, re.compile(magic)) for kind, magic in OTHER_UNICODE]
_ODD = {*range(32), 127} - set(b"\t\n\v\f\r\x1b\b")
_NOT_IN_TEXT = np.array([byte in _ODD for byte in range(256)])
"""Control characters, which are rare in text; a tenth of random bytes are such."""
SELDOM = 0.05
"""Share of control characters above which a file that is not UTF-8 is not text. Assumption."""

BLOCKS, BLOCK_BYTES = 32, 1 << 13
"""Number and size of the blocks, spread over a file of tokens, by which it is judged."""
FEW = 16
"""Values other than 0, next to values that are all 0, that prove a wider type; by chance they occur
once in 2¹⁶ files."""
MANY = 32
"""Values above `HIGH`, next to values that are all at most `HIGH`, that prove a wider type."""
HIGH = 15
"""Largest upper half of a 32-bit token, for a vocabulary of a million."""
DIVERSE = 512
"""Number of different ids at which their lower bytes take nearly all values."""


def is_checked(source: SourceConfig) -> bool:
    """Tell whether text must look like text: not if the user insists, nor in python-stdlib."""
    return source.format != "text" and source.source != PYTHON_STDLIB


def check_content(path: Path, source: SourceConfig) -> None:
    """Check that a file does not begin like a file of another kind.

    `format = "text"` takes any file; the standard library's source is text.

    Raises:
        DataError: it is of another kind; the message says of which, and what to do.
        OSError: it cannot be read.
    """
    if not is_checked(source):
        return
    kind = source.kind
    insist = "; data.format = 'text' takes its bytes as they are" if kind == "text" else ""
    with path.open("rb") as stream:
        head = stream.read(HEAD_BYTES)
    for found, magic, advice in _MAGIC:
        if magic.match(head) and not _is_right(found, source):
            raise DataError(f"{path}: is {found}, must be {_expected(kind)}; {advice}{insist}")
    for found, mark in _OTHER_UNICODE if kind in ("text", "jsonl") else ():
        if mark.match(head):
            raise DataError(
                f"{path}: is {found} text, as its byte-order mark says, must be UTF-8; convert it: "
                f"iconv -f {found} -t UTF-8 OLD > NEW{insist}"
            )
    if kind == "text":
        _check_is_text(path, head)


def _is_right(found: str, source: SourceConfig) -> bool:
    """Tell whether the kind found by a file's beginning is the one that its source says."""
    is_shard = found == "a shard of llm.c's" and source.kind == "tokens"
    return is_shard or (found == "a Parquet file" and source.kind == "parquet")


def _expected(kind: str) -> str:
    """Name a kind of file for messages."""
    names = {"text": "UTF-8 text", "jsonl": "JSONL", "parquet": "Parquet"}
    return names.get(kind, "raw tokens, llm.c's or Megatron's")


def _check_is_text(path: Path, head: bytes) -> None:
    """Check by a sample that a file is UTF-8, or at least has few control characters."""
    if (nul := head.find(b"\0")) >= 0:
        raise nul_error(path, nul)
    size, sample = path.stat().st_size, [head]
    with path.open("rb") as stream:
        for place in (size // 2, size - SAMPLE_BYTES):
            if place > len(head):
                stream.seek(place)
                sample.append(stream.read(SAMPLE_BYTES))
    if all(map(_is_utf8, sample)):
        return
    share = float(_NOT_IN_TEXT[np.frombuffer(b"".join(sample), np.uint8)].mean())
    if share > SELDOM:
        raise DataError(
            f"{path}: is no text: it is no UTF-8 and {share:.0%} control characters; "
            f"{WHAT_IT_MAY_BE}"
        )


WHAT_IT_MAY_BE = (
    "convert UTF-16 (iconv -f UTF-16LE -t UTF-8 OLD > NEW), unpack what is compressed, say "
    "data.format = 'raw' and data.dtype for tokens, or 'text' to take the bytes as they are"
)


def _is_utf8(block: bytes) -> bool:
    """Tell whether a block is UTF-8; a character may be cut off at either end."""
    start = next((i for i, byte in enumerate(block[:4]) if byte & 0xC0 != 0x80), 0)
    try:
        codecs.getincrementaldecoder("utf-8")().decode(block[start:])
    except UnicodeDecodeError:
        return False
    return True


def nul_error(path: Path | str, place: int) -> DataError:
    """Return the error for a text file with a NUL byte; UTF-16 text and tokens have many."""
    return DataError(f"{path}: byte {place}: a NUL; UTF-8 text has none; {WHAT_IT_MAY_BE}")


def bom_bytes(path: Path) -> int:
    """Return the length of a file's UTF-8 byte-order mark, 0 without one."""
    with path.open("rb") as stream:
        return len(UTF8_BOM) if stream.read(len(UTF8_BOM)) == UTF8_BOM else 0


def check_tokens(path: Path, dtype: str, offset: int, count: int) -> None:
    """Check by a sample that tokens have the type with which they are read.

    It finds wider tokens, the other byte order, floats and text: read with a wrong type, half
    of their values would be 0 or nearly so. Real tokens like that, such as pairs of an id and a
    small number, can be written as uint32.

    Args:
        path: the file.
        dtype: numpy's name of the type with which its tokens are read, little-endian.
        offset: bytes before the first token.
        count: number of tokens.

    Raises:
        DataError: the tokens look like another type; the message says which, and what to do.
        OSError: the file cannot be read.
    """
    width = np.dtype(dtype).itemsize
    raw = _sample(path, offset, count * width)
    if width > 1 and _is_plain(raw):
        raise DataError(
            f"{path}: looks like text, and would be read as {dtype} tokens; say data.format = "
            "'text' or 'jsonl', without dtype"
        )
    if len(raw) >= 2 * MANY and not any(raw):
        raise DataError(f"{path}: all {dtype} tokens of a sample are 0; has it been written?")
    for other in _others(width):
        if seen := _looks_like(raw, other, width):
            raise DataError(
                f"{path}: looks like {_in_words(other)}, and would be read as {dtype}: {seen}; "
                f"{_way_out(path, other, dtype)}"
            )


def _sample(path: Path, offset: int, size: int) -> bytes:
    """Read blocks spread over a run of bytes, or all of a short one, in multiples of 8 bytes."""
    size -= size % 8
    if size <= BLOCKS * BLOCK_BYTES:
        starts, length = [0], size
    else:
        spread = np.linspace(0, size - BLOCK_BYTES, BLOCKS).astype(int)
        starts, length = (spread - spread % 8).tolist(), BLOCK_BYTES
    blocks = []
    with path.open("rb") as stream:
        for start in starts:
            stream.seek(offset + start)
            blocks.append(stream.read(length))
    raw = b"".join(blocks)
    return raw[: len(raw) - len(raw) % 8]


def _is_plain(raw: bytes) -> bool:
    """Tell whether bytes are UTF-8 with varied characters and without odd control characters."""
    values = np.frombuffer(raw, np.uint8)
    return (
        len(raw) >= 2 * MANY
        and len(np.unique(values)) >= FEW
        and not _NOT_IN_TEXT[values].any()
        and all(_is_utf8(raw[i : i + BLOCK_BYTES]) for i in range(0, len(raw), BLOCK_BYTES))
    )


def _others(width: int) -> list[np.dtype[np.generic]]:
    """The types that tokens of some bytes may really have, the widest first."""
    floats = [f"{order}f{size}" for size in (8, 4) for order in "<>" if size >= width]
    wider = [f"{order}u{size}" for size in (8, 4, 2) for order in "<>" if size > width]
    return [np.dtype(name) for name in [*floats, *wider, *([f">u{width}"] if width > 1 else [])]]


def _looks_like(raw: bytes, other: np.dtype[np.generic], width: int) -> str:
    """Describe the signs that a sample holds tokens of another type; "" if there are none."""
    values = np.frombuffer(raw, other)
    if other.kind == "f":
        with np.errstate(all="ignore"):
            whole = (values >= 0) & (values < 1 << 24) & (values == np.floor(values))
        return "all values are whole numbers" if whole.all() and (values > 0).sum() >= FEW else ""
    if other.itemsize == width:
        return _swapped(values, width)
    upper, lower = values >> (8 * width), values & ((1 << 8 * width) - 1)
    times = other.itemsize // width
    if not upper.any() and np.count_nonzero(lower) >= FEW:
        place = "first" if other.str.startswith("<") else "last"
        return f"of every {times} values all but the {place} are 0"
    if width == 2 and (upper <= HIGH).all() and (lower > HIGH).sum() >= MANY:
        return f"of every {times} values all but one are at most {HIGH}"
    return ""


def _swapped(values: NDArray[Any], width: int) -> str:
    """Describe the signs that tokens have the other byte order; "" if there are none."""
    if (values < 1 << 8 * (width - 1)).all() and np.count_nonzero(values) >= FEW:
        return "all values are multiples of 256"
    upper, lower = values >> 8 * (width - 1), values & 0xFF
    rare = upper.max(initial=0) < min(250, int(lower.max(initial=0)))
    if rare and len(np.unique(values)) >= DIVERSE:
        return f"their lower bytes are all at most {upper.max()}"
    return ""


def _in_words(dtype: np.dtype[np.generic]) -> str:
    """Name a type of token for messages."""
    kind = {"f": "float", "u": "int" if dtype.itemsize == 8 else "uint"}[dtype.kind]
    order = "big-endian " if dtype.str.startswith(">") else ""
    return f"{order}{kind}{8 * dtype.itemsize} tokens"


def _way_out(path: Path, other: np.dtype[np.generic], dtype: str) -> str:
    """Return the advice for tokens of another type."""
    if other == np.dtype("<u4") and dtype == "uint16":
        return "say data.dtype = 'uint32'"
    return (
        f"convert it: np.fromfile({path.name!r}, {other.str!r}).astype('<u4').tofile(NEW), with "
        "data.dtype = 'uint32'"
    )
