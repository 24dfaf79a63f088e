"""Every kind of source against a ten-line writer of its own; every fault in one is one line.

Shards are written here byte by byte and compared with `np.fromfile`; Parquet is written by pandas,
JSONL by `json`. What is held out is compared as text, document by document.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import one_line
from corpora import IDS, sentences, write_jsonl, write_llm_c, write_megatron
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from telescope.config import PYTHON_STDLIB, DataConfig, SourceConfig
from telescope.data import sources
from telescope.data.corpus import (
    Corpus,
    check_size,
    check_vocabulary,
    held_out_mask,
    load_corpus,
    read_corpus,
)
from telescope.data.tokenizer import load_tokenizer, train_bpe
from telescope.data.tokens import split_passages
from telescope.errors import DataError, SpecError, TelescopeError

SHARDS: dict[str, tuple[Callable[[Path], object], dict[str, Any]]] = {
    "nanoGPT": (lambda p: IDS.astype("<u2").tofile(p), {"dtype": "uint16"}),
    "raw uint32": (lambda p: IDS.astype("<u4").tofile(p), {"dtype": "uint32", "format": "raw"}),
    "llm.c GPT-2": (lambda p: write_llm_c(p, IDS), {}),
    "llm.c Llama 3": (lambda p: write_llm_c(p, IDS, 20240801, 7), {"format": "llm.c"}),
    "Megatron": (lambda p: write_megatron(p, IDS), {}),
    "Megatron int32": (lambda p: write_megatron(p, IDS, "<i4", 4), {"format": "megatron"}),
}


def whole(corpus: Corpus) -> NDArray[Any]:
    """A token-split corpus in its own order: both parts put back where the mask says."""
    mask = held_out_mask(corpus.size, 0.05)
    tokens = np.empty(corpus.size, dtype=np.int64)
    tokens[~mask], tokens[mask] = (
        np.asarray(corpus.train_tokens),
        np.asarray(corpus.held_out_tokens),
    )
    return tokens


@pytest.mark.parametrize("kind", SHARDS)
def test_shards_are_read_as_they_were_written(kind: str, tmp_path: Path) -> None:
    write, keys = SHARDS[kind]
    write(tmp_path / "shard.bin")
    corpus = load_corpus(DataConfig(source=str(tmp_path / "*.bin"), **keys))
    assert np.array_equal(whole(corpus), IDS)
    assert corpus.vocabulary is None
    check_vocabulary(corpus, 1000)
    place = rf"shard\.bin: token {int(IDS.argmax())}: id 999 is outside the vocabulary of 999"
    with pytest.raises(DataError, match=place):
        check_vocabulary(corpus, 999)


def test_shards_follow_each_other_and_their_types_agree(tmp_path: Path) -> None:
    write_llm_c(tmp_path / "b.bin", IDS[2000:])
    write_llm_c(tmp_path / "a.bin", IDS[:2000])
    assert np.array_equal(whole(load_corpus(DataConfig(source=str(tmp_path / "?.bin")))), IDS)
    IDS.astype("<u2").tofile(tmp_path / "one.bin")
    one = load_corpus(DataConfig(source=str(tmp_path / "one.bin"), dtype="uint16"))
    assert one.digest == load_corpus(DataConfig(source=str(tmp_path / "?.bin"))).digest
    other = load_corpus(DataConfig(source=str(tmp_path / "one.bin"), dtype="uint32"))
    assert other.digest != one.digest  # the same bytes, other tokens
    write_llm_c(tmp_path / "c.bin", IDS, 20240801, 7)
    with pytest.raises(
        DataError, match=r"c\.bin: its tokens are uint32, those of .*a\.bin are uint16"
    ):
        load_corpus(DataConfig(source=(str(tmp_path / "a.bin"), str(tmp_path / "c.bin"))))


def test_an_index_stands_for_its_tokens(tmp_path: Path) -> None:
    write_megatron(tmp_path / "m.bin", IDS)
    both = DataConfig(source=(str(tmp_path / "m.idx"), str(tmp_path / "m.bin")))
    assert np.array_equal(whole(load_corpus(both)), IDS)


BAD_SHARDS: dict[str, tuple[Callable[[Path], object], dict[str, Any], str]] = {
    "no type": (lambda p: IDS.astype("<u2").tofile(p), {}, r"s\.bin: has no header .*data\.dtype"),
    "odd": (
        lambda p: p.write_bytes(bytes(5)),
        {"dtype": "uint16"},
        r"s\.bin: 5 bytes are no whole",
    ),
    "empty": (lambda p: p.write_bytes(b""), {"dtype": "uint16"}, r"s\.bin: is empty"),
    "short header": (lambda p: p.write_bytes(bytes(9)), {"format": "llm.c"}, "9 bytes, llm.c's"),
    "other magic": (
        lambda p: write_llm_c(p, IDS, 20240522),
        {"format": "llm.c"},
        r"s\.bin: byte 0: magic number 20240522, llm\.c's are 20240520",
    ),
    "other version": (
        lambda p: write_llm_c(p, IDS, version=2),
        {},
        r"byte 4: version 2, must be 1",
    ),
    "cut off": (
        lambda p: write_llm_c(p, IDS, cut=1024 + 9000),
        {},
        r"byte 8: the header counts 5000 tokens, the file holds 4500",
    ),
    "damaged magic": (
        lambda p: write_llm_c(p, IDS, 20240520 ^ 1 << 30),
        {"dtype": "uint16"},
        r"s\.bin: byte 0: magic number 1093982344, version 1, but byte 8 counts the 5000 tokens",
    ),
    "type said twice": (lambda p: write_llm_c(p, IDS), {"dtype": "uint32"}, "leave dtype out"),
    "no index": (
        lambda p: IDS.astype("<u2").tofile(p),
        {"format": "megatron"},
        r"s\.idx: cannot be read: No such file",
    ),
    "another's index": (
        lambda p: write_megatron(p, IDS, cut=100),
        {},
        r"s\.idx: does not match s\.bin: its sequences have 10000 bytes, the file has 100",
    ),
    "floats": (
        lambda p: write_megatron(p, IDS, "<f4", 7),
        {},
        r"byte 17: type 7 is none of tokens",
    ),
    "negative": (
        lambda p: write_megatron(p, np.where(IDS[77] == IDS, -1, IDS), "<i4", 4),
        {},
        rf"s\.bin: token {int(np.flatnonzero(IDS[77] == IDS)[0])}: id -1, must be >= 0",
    ),
}


@pytest.mark.parametrize("kind", BAD_SHARDS)
def test_a_wrong_shard_is_one_line_with_file_and_place(kind: str, tmp_path: Path) -> None:
    write, keys, message = BAD_SHARDS[kind]
    write(tmp_path / "s.bin")
    with pytest.raises(DataError, match=message) as caught:
        read_corpus(DataConfig(source=str(tmp_path / "s.bin"), **keys))
    assert "\n" not in str(caught.value)


def test_a_flipped_bit_of_a_header_never_becomes_a_token(tmp_path: Path) -> None:
    """Whatever type is given, of magic number, version and count; unless it is said to be raw."""
    path = tmp_path / "s.bin"
    for dtype, kind in {"uint16": "llm.c GPT-2", "uint32": "llm.c Llama 3"}.items():
        keys: dict[str, Any] = {"source": str(path), "dtype": dtype}
        SHARDS[kind][0](path)
        whole_file = path.read_bytes()
        for bit in range(96):
            raw = bytearray(whole_file)
            raw[bit // 8] ^= 1 << bit % 8
            path.write_bytes(raw)
            with pytest.raises(DataError, match=r"s\.bin: byte [048]: "):
                read_corpus(DataConfig(**keys))
        assert read_corpus(DataConfig(**keys, format="raw")).size > len(IDS)


@pytest.mark.parametrize("kind", ["llm.c GPT-2", "Megatron"])
def test_a_shard_cut_anywhere_is_refused(kind: str, tmp_path: Path) -> None:
    SHARDS[kind][0](tmp_path / "s.bin")
    damaged = tmp_path / ("s.idx" if kind == "Megatron" else "s.bin")
    raw = damaged.read_bytes()
    for size in {*range(0, len(raw), 1 + len(raw) // 150), len(raw) - 1}:
        damaged.write_bytes(raw[:size])
        keys: dict[str, Any] = {"format": "llm.c"} if kind != "Megatron" else {}
        with pytest.raises(DataError):
            read_corpus(DataConfig(source=str(tmp_path / "s.bin"), **keys))


@settings(max_examples=150, deadline=None)
@given(at=st.integers(0, 33 + 12 * 7 + 8 * 8), value=st.integers(0, 255))
def test_a_flipped_byte_of_an_index_is_refused(
    at: int, value: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("flipped")
    write_megatron(folder / "m.bin", IDS)
    index = bytearray((folder / "m.idx").read_bytes())
    same, index[at] = index[at] == value, value
    (folder / "m.idx").write_bytes(index)
    try:
        corpus = read_corpus(DataConfig(source=str(folder / "m.bin")))
    except DataError as error:
        one_line(error)
    else:
        # Another type of the same size, and a document's border, are not to be told from the file;
        # nor is it a fault that the tokens' sum would show.
        inner = at == 17 or at >= 34 + 12 * 7
        assert same or inner
        assert corpus.size == len(IDS)


def test_jsonl_and_parquet_give_the_same_documents(tmp_path: Path) -> None:
    texts = sentences(50)
    write_jsonl(tmp_path / "d.jsonl", texts)
    pd.DataFrame({"text": texts, "id": range(50)}).to_parquet(tmp_path / "d.parquet", index=False)
    expected = "".join(f"{text}\n" for text in texts).encode()
    for name in ("d.jsonl", "d.parquet"):
        corpus = load_corpus(DataConfig(source=str(tmp_path / name), held_out=0.1))
        parts = [
            bytes(np.asarray(p).tolist()) for p in (corpus.train_tokens, corpus.held_out_tokens)
        ]
        assert sorted(b"".join(parts).splitlines()) == sorted(expected.splitlines())
        assert parts[0] + parts[1] == expected  # a single stretch, whose end is held out
        assert len(parts[1]) / len(expected) == pytest.approx(0.1, abs=0.03)


BAD_LINES: dict[str, tuple[bytes, str]] = {
    "no JSON": (b'{"text": "a"}\n{"text": \n', r"d\.jsonl:2: not valid JSON: .* at column \d+"),
    "a list": (b"[1]\n", r"d\.jsonl:1: a list, must be an object with 'text'"),
    "no field": (
        b'\n{"body": "a", "id": 1}\n',
        r"d\.jsonl:2: no field 'text'; there: 'body', 'id'",
    ),
    "null": (b'{"text": null}', r"d\.jsonl:1: field 'text' is null, must be a string"),
    "a number": (b'{"text": 3}', r"d\.jsonl:1: field 'text' is int, must be a string"),
    "latin-1": (
        b'{"text": "a"}\n{"text": "caf\xe9"}',
        r"d\.jsonl:2: byte 13 of the line: no UTF-8",
    ),
    "half a pair": (b'{"text": "\\ud800"}', r"d\.jsonl:1: field 'text' has half a surrogate pair"),
    "deep": (b"[" * 100_000, r"d\.jsonl:1: not valid JSON"),
    "nothing": (b"\n\n", "holds no text"),
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_a_wrong_line_is_named(kind: str, tmp_path: Path) -> None:
    raw, message = BAD_LINES[kind]
    (tmp_path / "d.jsonl").write_bytes(raw)
    with pytest.raises(DataError, match=message):
        read_corpus(DataConfig(source=str(tmp_path / "d.jsonl")))


def test_a_wrong_parquet_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "d.parquet"
    config = DataConfig(source=str(path))
    pd.DataFrame({"body": ["a"], "n": [1]}).to_parquet(path)
    with pytest.raises(DataError, match=r"d\.parquet: no column 'text'; there: 'body', 'n'"):
        read_corpus(config)
    pd.DataFrame({"text": [1.5]}).to_parquet(path)
    with pytest.raises(DataError, match=r"d\.parquet: column 'text' is double, must be string"):
        read_corpus(config)
    pd.DataFrame({"text": ["a", None]}).to_parquet(path)
    with pytest.raises(DataError, match=r"d\.parquet: row 1: column 'text' is null"):
        read_corpus(config)
    raw = path.read_bytes()
    for size in (0, 3, len(raw) // 2, len(raw) - 1):
        path.write_bytes(raw[:size])
        with pytest.raises(DataError, match=r"d\.parquet: not a readable Parquet file"):
            read_corpus(config)


@pytest.mark.parametrize("raw", [b"caf\xe9 au lait\n", "text".encode("utf-16")])
def test_mixed_encodings_are_refused_where_text_is_needed(
    raw: bytes, tmp_path: Path, tokenizer_file: Path
) -> None:
    (tmp_path / "a.txt").write_text("good\n" * 10)
    (tmp_path / "b.txt").write_bytes(b"fine\n" * 60_000 + raw)
    source = str(tmp_path / "*.txt")
    assert load_corpus(DataConfig(source=source, format="text")).size > 300_000  # bytes are bytes
    if b"\0" in raw:
        with pytest.raises(DataError, match=r"b\.txt: byte 300003: a NUL"):
            read_corpus(DataConfig(source=source))
    else:
        assert load_corpus(DataConfig(source=source)).size > 300_000
    at = 300_000 + (3 if raw.startswith(b"caf") else 0)
    with pytest.raises(DataError, match=rf"b\.txt: byte {at}: no UTF-8 text"):
        read_corpus(DataConfig(source=source, format="text", tokenizer=str(tokenizer_file)))


def test_folders_and_unknown_suffixes_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.json.gz").write_bytes(b"x")
    (tmp_path / "c.jsonl").write_text("{}")
    for source, message in {
        "": r"is a folder; name its files: .*/\*\.txt",
        "*.gz": r"b\.json\.gz: no known format has the suffix \.gz",
        "[ac].*": r"c\.jsonl: looks like jsonl, but '.*\[ac\]\.\*' like text",
    }.items():
        with pytest.raises(DataError, match=message):
            read_corpus(DataConfig(source=str(tmp_path / source)))


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bpe") / "bpe.json"
    path.write_text(train_bpe(sentences(200), 400))
    return path


def test_a_bpe_is_deterministic_and_loses_nothing(tokenizer_file: Path) -> None:
    assert train_bpe(iter(sentences(200)), 400) == tokenizer_file.read_text()
    theirs, ours = Tokenizer.from_file(str(tokenizer_file)), load_tokenizer(str(tokenizer_file))
    assert 257 < ours.vocabulary <= 400
    for text in [*sentences(5, seed=9), "\x00 tab\t nul"]:
        (ids,) = ours.encode([text])
        assert theirs.decode(list(ids), skip_special_tokens=False) == text
        assert len(ids) < len(text.encode()) or "\x00" in text
    assert theirs.id_to_token(ours.end[0]) == "<|endoftext|>"


def test_wrong_tokenizers_are_one_line(tmp_path: Path, tokenizer_file: Path) -> None:
    good = json.loads(tokenizer_file.read_text())
    dropping = {**good, "model": {**good["model"], "dropout": 0.1}}
    empty = {**good, "added_tokens": [], "model": {**good["model"], "vocab": {}, "merges": []}}
    path = tmp_path / "t.json"
    for content, message in {
        "": "is no Hugging Face tokenizers JSON file",
        "{}": "is no Hugging Face tokenizers JSON file",
        '{"model": {}}': "is no Hugging Face tokenizers JSON file",
        json.dumps(dropping): "drops merges at random",
        json.dumps(empty): "has no vocabulary",
    }.items():
        path.write_text(content)
        with pytest.raises(SpecError, match=rf"^data\.tokenizer: .*t\.json {message}") as caught:
            load_tokenizer(str(path))
        assert "\n" not in str(caught.value)
    with pytest.raises(SpecError, match=r"cannot read .*nix"):
        load_tokenizer(str(tmp_path / "nix.json"))
    with pytest.raises(SpecError, match="at least 258"):
        train_bpe([], 200)


@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet"])
def test_every_tokenizer_holds_the_same_documents_out(
    kind: str, tmp_path: Path, tokenizer_file: Path
) -> None:
    """And what is held out is not in the other part: each document starts with its number."""
    texts = sentences(4000)
    path = tmp_path / f"d.{'txt' if kind == 'text' else kind}"
    if kind == "jsonl":
        write_jsonl(path, texts)
    elif kind == "parquet":
        pd.DataFrame({"text": texts}).to_parquet(path, row_group_size=700)
    else:
        path.write_text("\n".join(texts) + "\n")
    source = SourceConfig(source=str(path))
    split = [
        [p.text for p, held in split_passages(source, [path], 0.1) if held == h] for h in (0, 1)
    ]
    corpus = load_corpus(DataConfig(source=str(path), held_out=0.1, tokenizer=str(tokenizer_file)))
    theirs = Tokenizer.from_file(str(tokenizer_file))
    for part, expected in zip((corpus.train_tokens, corpus.held_out_tokens), split, strict=True):
        decoded = theirs.decode(np.asarray(part).tolist(), skip_special_tokens=False)
        end = "" if kind == "text" else "<|endoftext|>"
        assert decoded.removesuffix("<|endoftext|>") == end.join(expected)
    numbers = [{t.split(":")[0] for t in "\n".join(part).split("\n") if ":" in t} for part in split]
    assert not numbers[0] & numbers[1]
    assert len(numbers[0] | numbers[1]) == 4000
    assert len(numbers[1]) == pytest.approx(400, rel=0.2)


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 150_000), min_size=1, max_size=12))
def test_something_is_held_out_however_long_the_documents_are(
    sizes: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Those that start in a held-out range, against the mask of bytes; else the last of several."""
    path = tmp_path_factory.mktemp("long") / "d.jsonl"
    lines = [json.dumps({"text": "a" * size}) + "\n" for size in sizes]
    path.write_text("\n" + "".join(lines))
    mask = held_out_mask(path.stat().st_size, 0.05)
    starts = np.cumsum([1, *map(len, lines)])[:-1]
    expected = mask[starts].tolist()
    if not any(expected):
        expected[-1] = len(sizes) > 1
    split = list(split_passages(SourceConfig(source=str(path)), [path], 0.05))
    assert [held for _, held in split] == expected
    assert [len(passage.text) for passage, _ in split] == sizes


def test_the_standard_library_can_be_tokenized(tokenizer_file: Path) -> None:
    source = SourceConfig(source=PYTHON_STDLIB)
    files = sources.files_of(source)
    assert sum(path.stat().st_size for path in files) >= sources.STDLIB_BYTES
    passages = [passage for passage, _ in split_passages(source, files[:20], 0.05)]
    assert "".join(p.text for p in passages) == "".join(
        path.read_bytes().decode() for path in files[:20]
    )
    assert sum(passage.ends for passage in passages) == sum(
        p.stat().st_size > 0 for p in files[:20]
    )


@pytest.mark.parametrize("name", ["a.gz", "b.bin", "c.parquet", "d.jsonl", "e.txt", "f.idx"])
@settings(max_examples=25, deadline=None)
@given(raw=st.binary(max_size=200))
def test_any_bytes_under_any_name_are_a_corpus_or_one_line(
    name: str, raw: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("any") / name
    path.write_bytes(raw)
    try:
        read_corpus(DataConfig(source=str(path)))
    except TelescopeError as error:
        one_line(error)


UNKNOWN = {
    "WordLevel": (models.WordLevel({"a": 0, "b": 1}), "'zzz'"),
    "WordLevel, UNK not there": (models.WordLevel({"a": 0, "b": 1}, unk_token="[UNK]"), "'zzz'"),
    "WordPiece": (models.WordPiece({"a": 0, "b": 1, "##b": 2}), "'zzz'"),
    "Unigram": (models.Unigram([("a", -1.0), ("b", -2.0)]), "'zzz'"),
    "BPE": (models.BPE({"a": 0, "b": 1}, []), "'z' in 'zzz'"),
    "BPE, UNK not there": (models.BPE({"a": 0, "b": 1}, [], unk_token="[UNK]"), "'zzz'"),
    "BPE, few bytes": (models.BPE({"a": 0, "b": 1}, [], byte_fallback=True), "'z' in 'zzz'"),
    "BPE of word ends": (
        models.BPE({"a</w>": 0, "b</w>": 1, "z": 2}, [], end_of_word_suffix="</w>"),
        "'z' in 'zzz'",
    ),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_a_word_without_a_token_is_one_line(kind: str, tmp_path: Path) -> None:
    """The library raises for some of these, and a BPE leaves the character out."""
    model, shown = UNKNOWN[kind]
    inner = Tokenizer(model)
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.save(str(tmp_path / "t.json"))
    (tmp_path / "t.txt").write_text("a b a\n" * 50 + "b zzz a\n" * 50)
    config = DataConfig(source=str(tmp_path / "t.txt"), tokenizer=str(tmp_path / "t.json"))
    with pytest.raises(
        SpecError, match=rf"t\.json has no token for {shown}, .*; add one"
    ) as caught:
        read_corpus(config)
    one_line(caught.value)
    (tmp_path / "t.txt").write_text("a b a\n" * 100)
    assert read_corpus(config).size == 300


def test_a_tokenizer_that_knows_the_unknown_loses_nothing_to_the_check(tmp_path: Path) -> None:
    """With an unknown token, bytes for all, added tokens, a normalizer, or whole words."""
    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    fallback = {f"<0x{b:02X}>": b for b in range(256)}
    added = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    added.add_special_tokens(["<|zzz|>"])
    added.normalizer = normalizers.Lowercase()
    whole = models.BPE({"a": 0, "zzz": 1}, [], ignore_merges=True)
    unknown = {"a": 0, "[UNK]": 1}
    for inner, pre, text, count in (
        (Tokenizer(models.WordLevel(unknown, unk_token="[UNK]")), "words", "a zzz", 2),
        (Tokenizer(models.BPE(unknown, [], unk_token="[UNK]")), "words", "a zzz", 4),
        (Tokenizer(models.BPE(alphabet, [])), "bytes", "é 数", 6),
        (Tokenizer(models.BPE({"a": 256, **fallback}, [], byte_fallback=True)), "words", "a数", 4),
        (added, "", "aB<|zzz|>b", 4),
        (Tokenizer(whole), "words", "a zzz", 2),
    ):
        if pre:
            words, level = pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel
            inner.pre_tokenizer = words if pre == "words" else level(add_prefix_space=False)
        inner.save(str(tmp_path / "t.json"))
        assert [len(ids) for ids in load_tokenizer(str(tmp_path / "t.json")).encode([text])] == [
            count
        ]


def test_a_tokenizer_with_a_byte_order_mark(tmp_path: Path, tokenizer_file: Path) -> None:
    marked = tmp_path / "t.json"
    marked.write_bytes(b"\xef\xbb\xbf" + tokenizer_file.read_bytes())
    assert load_tokenizer(str(marked)).digest == load_tokenizer(str(tokenizer_file)).digest


@pytest.mark.parametrize(
    ("kind", "advice"),
    [
        ("jsonl", "they are a single document, .*; give a second one"),
        ("parquet", "they are a single document, .*; give a second one"),
        ("txt", "the last line is longer than the share.*; give more text, or break it"),
    ],
)
def test_a_single_document_is_told_from_too_little_text(
    kind: str, advice: str, tmp_path: Path, tokenizer_file: Path
) -> None:
    path, text = tmp_path / f"d.{kind}", " ".join(sentences(900))
    second = " ".join(sentences(900, seed=1))

    def write(texts: list[str]) -> None:
        if kind == "jsonl":
            write_jsonl(path, texts)
        elif kind == "parquet":
            pd.DataFrame({"text": texts}).to_parquet(path)
        else:
            path.write_text(texts[0] if len(texts) == 1 else "\n".join(texts[0].split(" ")))

    config = DataConfig(source=str(path), tokenizer=str(tokenizer_file), eval_tokens=64)
    write([text])
    with pytest.raises(DataError, match=rf"^data\.source: of the \d+ tokens of .*: {advice}$"):
        check_size(read_corpus(config), config, batch_size=4, sequence_length=16)
    write([text, second])
    corpus = read_corpus(config)
    check_size(corpus, config, batch_size=4, sequence_length=16)
    assert len(corpus.held_out_tokens.parts[0])
