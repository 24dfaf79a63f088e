"""Text and tokens, and writers of the files that corpora come in."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

IDS = np.random.default_rng(0).integers(0, 1000, 5000)
WORDS = "alpha beta gamma delta epsilon zeta eta theta iota été naïve 数 🙂".split()  # noqa: SIM905


def sentences(count: int, seed: int = 0) -> list[str]:
    """Documents, each of which starts with its number."""
    rng = np.random.default_rng(seed)
    return [f"{i}: " + " ".join(rng.choice(WORDS, rng.integers(3, 12))) for i in range(count)]


def write_llm_c(
    path: Path,
    ids: NDArray[Any],
    magic: int = 20240520,
    version: int = 1,
    cut: int | None = None,
) -> None:
    """Write a shard of llm.c; of its bytes the first `cut`, if given."""
    dtype = "<u4" if magic == 20240801 else "<u2"
    header = struct.pack("<256i", magic, version, len(ids), *[0] * 253)
    path.write_bytes((header + ids.astype(dtype).tobytes())[:cut])


def write_megatron(
    path: Path, ids: NDArray[Any], dtype: str = "<u2", code: int = 8, cut: int | None = None
) -> None:
    """Write a `.bin` of Megatron with its `.idx` of seven documents."""
    path.write_bytes(ids.astype(dtype).tobytes()[:cut])
    lengths = [len(part) for part in np.array_split(ids, 7)]
    width = np.dtype(dtype).itemsize
    starts = [sum(lengths[:i]) * width for i in range(7)]
    path.with_suffix(".idx").write_bytes(
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", 1, code, 7, 8)
        + struct.pack("<7i7q8q", *lengths, *starts, *range(8))
    )


def write_jsonl(path: Path, texts: list[str]) -> None:
    """Write a document to a line, beside its number."""
    path.write_text("".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate(texts)))
