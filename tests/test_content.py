"""A file of another kind is refused in one line, and nothing that is what its source says.

What is wrong is written here by other libraries: gzip, pyarrow, numpy, torch, sqlite3.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import pickle
import random
import sqlite3
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
from conftest import one_line
from corpora import write_llm_c
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pyarrow import feather, parquet

from telescope.config import DataConfig, SourceConfig
from telescope.data import corpus, shards, sources
from telescope.data.corpus import load_corpus, read_corpus
from telescope.data.tokenizer import train_bpe
from telescope.data.tokens import split_passages
from telescope.errors import DataError

TEXT = "The quick brown fox, été 数 🙂 jumps.\n" * 2000
TABLE = pyarrow.table({"text": ["a", "b"]})
IDS = np.minimum(np.random.default_rng(0).zipf(1.3, 60_000), 49_999)


def in_memory(write: Callable[[io.BytesIO], object]) -> bytes:
    stream = io.BytesIO()
    write(stream)
    return stream.getvalue()


def packed(name: str) -> bytes:
    return bytes(pyarrow.Codec(name).compress(TEXT.encode(), asbytes=True))


def zipped(stream: io.BytesIO) -> None:
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("a.txt", TEXT)


def tarred(stream: io.BytesIO) -> None:
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"), io.BytesIO())


def streamed(stream: io.BytesIO) -> None:
    with pyarrow.ipc.new_stream(stream, TABLE.schema) as writer:
        writer.write_table(TABLE)


def database(stream: io.BytesIO) -> None:
    with sqlite3.connect(":memory:") as made:
        made.execute("create table documents(text)")
        stream.write(made.serialize())


def old_torch(stream: io.BytesIO) -> None:
    torch.save(torch.arange(9), stream, _use_new_zipfile_serialization=False)


OTHERS: dict[str, tuple[bytes, str]] = {
    "gzip": (gzip.compress(TEXT.encode()), "is gzip-compressed"),
    "bzip2": (bz2.compress(TEXT.encode()), "is bzip2-compressed"),
    "xz": (lzma.compress(TEXT.encode()), "is xz-compressed"),
    "lzma": (lzma.compress(TEXT.encode(), lzma.FORMAT_ALONE), "is lzma-compressed"),
    "zstd": (packed("zstd"), "is zstd-compressed"),
    "lz4": (packed("lz4"), "is lz4-compressed"),
    "zip": (in_memory(zipped), "is a zip archive"),
    "tar": (in_memory(tarred), "is a tar archive"),
    "npy": (in_memory(lambda s: np.save(s, IDS)), "is a NumPy array"),
    "torch": (in_memory(lambda s: torch.save(torch.arange(9), s)), "is a zip archive"),
    "torch, old": (in_memory(old_torch), "is a pickle"),
    "pickle": (pickle.dumps(list(range(1000))), "is a pickle"),
    "parquet": (in_memory(lambda s: parquet.write_table(TABLE, s)), "is a Parquet file"),
    "feather": (in_memory(lambda s: feather.write_feather(TABLE, s)), "is an Arrow file"),
    "arrow": (in_memory(streamed), "is an Arrow file"),
    "sqlite": (in_memory(database), "is an SQLite database"),
    "pdf": (b"%PDF-1.4\n" + TEXT.encode(), "is a PDF document"),
    "program": (b"\x7fELF\x02\x01\x01" + bytes(99), "is a program"),
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("name", ["a.txt", "a", "a.jsonl", "a.bin"])
def test_a_file_of_another_kind_is_named_whatever_it_is_called(
    name: str, kind: str, tmp_path: Path
) -> None:
    raw, message = OTHERS[kind]
    (tmp_path / name).write_bytes(raw)
    keys: dict[str, Any] = {"dtype": "uint16"} if name == "a.bin" else {}
    config = DataConfig(source=str(tmp_path / name), **keys)
    with pytest.raises(DataError, match=rf"/{name}: {message}.*, must be ") as caught:
        read_corpus(config)
    one_line(caught.value)
    if name == "a.txt":
        insisted = read_corpus(DataConfig(source=str(tmp_path / name), format="text"))
        assert insisted.size == len(raw)
    if name == "a.bin":  # that it is raw is no reason to train on a header
        with pytest.raises(DataError, match=message):
            read_corpus(DataConfig(source=config.source, dtype="uint16", format="raw"))


NOT_UTF8 = {
    **{name: (TEXT.encode(name), f"is {name.upper()} text") for name in ("utf-16", "utf-32")},
    **{
        name: (TEXT.encode(name), r"byte [01]: a NUL")
        for name in ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be")
    },
    "uint16 tokens": (IDS.astype("<u2").tobytes(), r"byte \d+: a NUL"),
    "int64 tokens": (IDS.tobytes(), r"byte \d+: a NUL"),
    "no NUL among them": (
        (IDS[IDS % 256 > 0] + 256).astype("<u2").tobytes(),
        r"is no text: it is no UTF-8 and \d+% control characters",
    ),
    "brotli": (packed("brotli").replace(b"\0", b"\1"), "is no text"),
    "a single NUL": (b"text\n" * 40_000 + b"\0" + b"text\n" * 40_000, "byte 200000: a NUL"),
}


@pytest.mark.parametrize("kind", NOT_UTF8)
def test_what_is_no_text_is_refused_and_can_be_insisted_on(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, message = NOT_UTF8[kind]
    path = tmp_path / "a.txt"
    path.write_bytes(raw)
    config = DataConfig(source=str(path))
    with pytest.raises(DataError, match=rf"a\.txt: {message}.*'text' ") as caught:
        read_corpus(config)
    one_line(caught.value)
    with pytest.raises(DataError, match=message):  # before a tokenizer is trained on it
        list(split_passages(config.parts[0], sources.files_of(config.parts[0]), 0.05))
    insisted = DataConfig(source=str(path), format="text")
    assert read_corpus(insisted).size == len(raw)
    with monkeypatch.context() as patch:  # as of a large file, which is not read whole
        for module in (shards, corpus):
            patch.setattr(module, "SMALL_BYTES", 0)
        with pytest.raises(DataError, match=message):
            read_corpus(config)
        assert read_corpus(insisted).size == len(raw)


def test_jsonl_of_another_encoding_is_named(tmp_path: Path) -> None:
    for encoding, message in {
        "utf-16": "is UTF-16 text, as its byte-order mark says",
        "utf-16-le": "a NUL in it; convert UTF-16",
    }.items():
        (tmp_path / "a.jsonl").write_bytes('{"text": "a"}\n'.encode(encoding))
        with pytest.raises(DataError, match=message):
            read_corpus(DataConfig(source=str(tmp_path / "a.jsonl")))


TEXTS: dict[str, bytes] = {
    "utf-8": TEXT.encode(),
    "latin-1": TEXT.encode("latin-1", "ignore"),
    "shift-jis": ("吾輩は猫である。" * 3000).encode("shift-jis"),
    "colours": b"\x1b[31mred\x1b[0m \x07 page\x0c\x08\n" * 2000,
    "some control characters": b"a\x01b\x02\x1d\x1e\x1f\x7f\n" * 2000,
    "those and no UTF-8": b"caf\xe9 au lait, s'il vous pla\xeet, ma ch\xe8re\n\x01" * 2000,
    "like a magic number": b"PK BZh ORC PAR1 GIF8 7z Rar! MZ Obj\n" * 20,
    "PAR1": b"PAR1SIAN, of Paris\n" * 20,
    "cut in a character": ("數" * 40_000).encode()[: (1 << 16) + 1],
    "empty lines": b"\n" * 5000,
}


@pytest.mark.parametrize("kind", TEXTS)
def test_text_is_text(kind: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(TEXTS[kind])
    assert read_corpus(DataConfig(source=str(tmp_path / "a.txt"))).size == len(TEXTS[kind])


def test_a_byte_order_mark_is_no_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without it a corpus is the same, bytes or tokens, small or large."""
    (tmp_path / "bpe.json").write_text(train_bpe([TEXT], 300))
    for folder, mark in {"plain": b"", "marked": b"\xef\xbb\xbf"}.items():
        (tmp_path / folder).mkdir()
        for name in ("a", "b", "c"):
            text = "" if name == "b" else name + TEXT
            (tmp_path / folder / f"{name}.txt").write_bytes(mark + text.encode())
    tokenizers = [None, str(tmp_path / "bpe.json")]
    for large in (False, True):
        if large:
            for module in (shards, corpus):
                monkeypatch.setattr(module, "SMALL_BYTES", 0)
        for tokenizer in tokenizers:
            plain, marked = (
                read_corpus(DataConfig(source=str(tmp_path / f / "*.txt"), tokenizer=tokenizer))
                for f in ("plain", "marked")
            )
            one, other = [
                np.sort(np.concatenate([c.train_tokens, c.held_out_tokens]))
                for c in (plain, marked)
            ]
            assert np.array_equal(one, other)
            if tokenizer is None:
                assert plain.digest == marked.digest
    (tmp_path / "mark.txt").write_bytes(b"\xef\xbb\xbf")
    with pytest.raises(DataError, match="holds no text"):
        read_corpus(DataConfig(source=str(tmp_path / "mark.txt")))


# -- shards of tokens ---------------------------------------------------------------------------

WIDE = np.random.default_rng(1).integers(0, 128_256, 20_000)
ALIKE: dict[str, NDArray[Any]] = {
    "zipf": IDS,
    "small vocabulary": IDS % 100,
    "bytes": IDS % 256,
    "two ids": IDS % 2,
    "many zeros": np.where(np.random.default_rng(2).random(len(IDS)) < 0.999, 0, IDS),
    "zeros but for the end": np.where(np.arange(len(IDS)) < 59_000, 0, IDS),
    "one id": np.full(5000, 12345),  # whose bytes are printable
    "short": np.arange(40),
    "every id": np.random.default_rng(3).permutation(1 << 16),
    "documents of two tokens": np.stack([IDS[:5000], np.full(5000, 50256)], 1).ravel(),
}
READ = {"uint16": "<u2", "uint32": "<u4"}
TYPES = ["<u2", ">u2", "<u4", ">u4", "<i8", ">i8", "<f4", ">f4", "<f8", ">f8"]


@pytest.mark.parametrize("dtype", READ)
@pytest.mark.parametrize("kind", ALIKE)
def test_tokens_of_the_type_that_was_given_are_read(kind: str, dtype: str, tmp_path: Path) -> None:
    ALIKE[kind].astype(READ[dtype]).tofile(tmp_path / "t.bin")
    corpus = load_corpus(DataConfig(source=str(tmp_path / "t.bin"), dtype=dtype))  # type: ignore[arg-type]
    assert corpus.size == len(ALIKE[kind])


@pytest.mark.parametrize("ids", [IDS, WIDE, np.arange(40), IDS % 256], ids=len)
@pytest.mark.parametrize("real", TYPES)
@pytest.mark.parametrize("dtype", READ)
@pytest.mark.parametrize("name", ["t.bin", "t.tok"])
def test_tokens_of_another_type_are_refused(
    name: str, dtype: str, real: str, ids: NDArray[Any], tmp_path: Path
) -> None:
    """But for those that could be either: uint16 read as uint32, whose ids are too high."""
    as_16_bits = real[1:] == "u2" and (dtype == "uint32" or ids is WIDE or len(ids) == 40)
    if real == READ[dtype] or as_16_bits:
        return
    ids.astype(real).tofile(tmp_path / name)
    keys: dict[str, Any] = {"dtype": dtype} | ({"format": "raw"} if name == "t.tok" else {})
    words = {"f": "float", "i": "int", "u": "uint"}[real[1]] + str(8 * int(real[2]))
    words = f"big-endian {words}" if real[0] == ">" else words
    if ids is WIDE and real[1:] == "u4" and dtype == "uint16":
        assert ids.max() > 1 << 16  # where every second token is 0 or 1, not always 0
    with pytest.raises(DataError, match=rf"{name}: looks like {words} tokens, and would") as caught:
        read_corpus(DataConfig(source=str(tmp_path / name), **keys))
    one_line(caught.value)
    right = "say data.dtype = 'uint32'" if (real, dtype) == ("<u4", "uint16") else f"'{real[0]}"
    assert right in str(caught.value)


def test_the_way_out_of_a_message_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The advice of the message, followed word for word, gives the tokens."""
    monkeypatch.chdir(tmp_path)
    IDS.astype(">i8").tofile("t.bin")
    with pytest.raises(DataError) as caught:
        read_corpus(DataConfig(source="t.bin", dtype="uint16"))
    code = str(caught.value).split("convert it: ")[1].split(", with")[0]
    eval(code, {"np": np, "NEW": "new.bin"})
    corpus = read_corpus(DataConfig(source="new.bin", dtype="uint32"))
    assert np.array_equal(np.asarray(corpus.train_tokens)[:1000], IDS[:1000])


def test_a_header_is_no_proof_and_text_is_no_tokens(tmp_path: Path) -> None:
    write_llm_c(tmp_path / "s.bin", np.stack([IDS, IDS * 0], 1).ravel())
    with pytest.raises(DataError, match=r"s\.bin: looks like uint32 tokens"):
        read_corpus(DataConfig(source=str(tmp_path / "s.bin")))
    write_llm_c(tmp_path / "s.u16", IDS)
    with pytest.raises(DataError, match=r"is a shard of llm\.c's.*say data\.format = 'llm\.c'"):
        read_corpus(DataConfig(source=str(tmp_path / "s.u16")))
    (tmp_path / "t.bin").write_text(TEXT[: len(TEXT) // 2 * 2])
    with pytest.raises(DataError, match=r"t\.bin: looks like text, and would be read as uint16"):
        read_corpus(DataConfig(source=str(tmp_path / "t.bin"), dtype="uint16"))
    (tmp_path / "z.bin").write_bytes(bytes(4096))
    with pytest.raises(DataError, match=r"z\.bin: all uint16 tokens of a sample are 0"):
        read_corpus(DataConfig(source=str(tmp_path / "z.bin"), dtype="uint16"))


def test_a_large_shard_is_judged_by_a_sample(tmp_path: Path) -> None:
    """Of 4 GB of holes with tokens here and there no more is read than 32 blocks."""
    path = tmp_path / "t.bin"
    with path.open("wb") as stream:
        stream.truncate(1 << 32)
        for place in np.linspace(0, (1 << 32) - (1 << 20), 40).astype(int) // 8 * 8:
            stream.seek(place)
            IDS.astype("<u4").tofile(stream)
    config = SourceConfig(source=str(path), dtype="uint16")
    with pytest.raises(DataError, match="looks like uint32 tokens"):
        shards.open_shard(path, config)


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**32), size=st.integers(1, 3000), top=st.integers(1, 1 << 16))
def test_no_alarm_for_tokens_at_random(
    seed: int, size: int, top: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    chance = np.random.default_rng(seed)
    ids = (chance.random(size) ** random.Random(seed).choice([1, 3, 9]) * top).astype("<u2")
    path = tmp_path_factory.mktemp("random") / "t.bin"
    ids.tofile(path)
    if ids.any() or size < 32:
        shards.open_shard(path, SourceConfig(source=str(path), dtype="uint16", format="raw"))
