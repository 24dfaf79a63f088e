"""Sources in use: parts that never meet, mixtures by weight, what is kept between processes."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpora import IDS, sentences, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from telescope.config import DataConfig, SourceConfig
from telescope.data import cache, corpus, shards, tokens
from telescope.data.corpus import (
    Batches,
    check_size,
    check_vocabulary,
    held_out_batch,
    held_out_mask,
    load_corpus,
    passes,
    read_corpus,
)
from telescope.data.tokenizer import train_bpe
from telescope.data.views import Tokens, TokenView, held_out_ranges, rest_of
from telescope.errors import DataError, SpecError

WRONG_TABLES: list[tuple[dict[str, Any], str]] = [
    ({}, "source: got None, must be given"),
    ({"source": ("a.txt", "b.jsonl")}, "source: .* files of one format"),
    ({"source": "a.txt", "field": "body"}, "field: got 'body', must be left out for text"),
    ({"source": "a.jsonl", "dtype": "uint16"}, "dtype: .* left out for jsonl"),
    ({"source": "a.bin", "format": "raw"}, "dtype: got None"),
    ({"source": "a.bin", "format": "llm.c", "dtype": "uint16"}, "dtype: .* left out for llm.c"),
    ({"source": "a.bin", "tokenizer": "bytes"}, "tokenizer: .* left out for shards"),
    ({"source": "a", "sources": (SourceConfig(source="b"),)}, "source: .* left out beside sources"),
    (
        {"sources": (SourceConfig(source="a"), SourceConfig(source="b.bin"))},
        "tokenizer: got None, must be given",
    ),
]


@settings(max_examples=200, deadline=None)
@given(size=st.integers(1, 3_000_000), share=st.floats(0.001, 0.999))
def test_the_parts_never_overlap_and_miss_nothing(size: int, share: float) -> None:
    held_out = held_out_ranges(size, share)
    rest = rest_of(held_out, size)
    ends = sorted([*held_out, *rest])
    at = 0
    for start, end in ends:
        assert start == min(at, end)  # an empty range may lie anywhere before
        at = max(at, end)
    assert at == size
    assert sum(b - a for a, b in rest) + sum(b - a for a, b in held_out) == size


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_batch_has_a_held_out_token(data: st.DataObject) -> None:
    """Every kind ends as views: files of any lengths, any ranges; a token's value is its place."""
    sizes = data.draw(st.lists(st.integers(0, 60), min_size=1, max_size=6))
    size = sum(sizes)
    tokens = np.arange(size)
    files = np.split(tokens, np.cumsum(sizes)[:-1])
    borders = sorted(data.draw(st.lists(st.integers(0, size), max_size=8)))
    held_out = list(zip(borders[::2], borders[1::2], strict=False))
    outside = rest_of(held_out, size)
    train, measured = TokenView(files, outside), TokenView(files, held_out)
    mask = np.zeros(size, dtype=bool)
    for start, end in held_out:
        mask[start:end] = True
    assert np.array_equal(np.asarray(Tokens((train,))), tokens[~mask])
    assert np.array_equal(np.asarray(Tokens((measured,))), tokens[mask])
    length = data.draw(st.integers(1, 5))
    if len(train) > length:
        batches = Batches(Tokens((train,)), batch_size=3, length=length, seed=1)
        for step in range(5):
            inputs, targets = batches.at(step)
            assert not mask[inputs.numpy()].any()
            assert not mask[targets.numpy()].any()


def test_one_source_is_read_as_it_always_was(tmp_path: Path) -> None:
    """Against the plain form: mask, permutation, fancy index."""
    text = np.random.default_rng(1).integers(0, 256, 130_000, dtype=np.uint8)
    (tmp_path / "t.txt").write_bytes(text.tobytes())
    corpus = load_corpus(DataConfig(source=str(tmp_path / "t.txt"), format="text"))
    mask = held_out_mask(130_000, 0.05)
    tokens, held_out = text[~mask].astype(np.int64), text[mask].astype(np.int64)
    batches = Batches(corpus.train_tokens, batch_size=7, length=31, seed=5)
    sequences = (len(tokens) - 1) // 31
    orders = [np.random.default_rng((5, epoch)).permutation(sequences) for epoch in range(3)]
    for step in (0, 1, 569, 570, 1200):
        numbers = [divmod(step * 7 + i, sequences) for i in range(7)]
        starts = np.array([orders[epoch][place] for epoch, place in numbers]) * 31
        expected = tokens[starts[:, None] + np.arange(32)]
        inputs, targets = batches.at(step)
        assert np.array_equal(inputs, expected[:, :-1])
        assert np.array_equal(targets, expected[:, 1:])
    starts = np.linspace(0, len(held_out) - 32, 4).astype(int)
    measured = held_out_batch(corpus.held_out_tokens, count=100, length=31)
    assert np.array_equal(measured[0], held_out[starts[:, None] + np.arange(31)])


def mixture(weights: tuple[float, ...], size: int = 1000) -> Tokens:
    """Sources whose tokens tell source and place: 10,000 times the source, plus the place."""
    views = [TokenView([np.arange(size) + 10_000 * i], [(0, size)]) for i in range(len(weights))]
    return Tokens(tuple(views), weights)


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.floats(0.05, 20), min_size=2, max_size=4).map(tuple),
    batch_size=st.integers(1, 9),
    seed=st.integers(0, 3),
)
def test_sources_are_mixed_by_weight_and_each_pass_is_whole(
    weights: tuple[float, ...], batch_size: int, seed: int
) -> None:
    def starts(steps: range) -> list[int]:
        batches = Batches(mixture(weights), batch_size=batch_size, length=10, seed=seed)
        return [int(i) for step in steps for i in batches.at(step)[0][:, 0]]

    steps = 400 // batch_size
    taken = starts(range(steps))
    counts = [0] * len(weights)
    passed: list[list[int]] = [[] for _ in weights]
    for number, start in enumerate(taken, 1):
        counts[start // 10_000] += 1
        passed[start // 10_000].append(start % 10_000)
        for count, weight in zip(counts, weights, strict=True):
            assert abs(count - number * weight / sum(weights)) <= len(weights)
    for places in passed:  # 99 sequences of 10 in 1000 tokens
        for first in range(0, len(places) - 98, 99):
            assert sorted(places[first : first + 99]) == list(range(0, 990, 10))
    # A step alone, and steps backwards, give the same: a resumed trial goes on where it was.
    assert starts(range(steps - 1, steps)) == taken[(steps - 1) * batch_size :]


def test_the_order_of_a_pass_is_drawn_once_whatever_trains_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Five seeds and three sources, two trials of each, in turns as a pack reads them."""
    drawn: list[Any] = []
    draw = np.random.default_rng

    def counted(entropy: Any) -> Any:
        drawn.append(entropy)
        return draw(entropy)

    monkeypatch.setattr(np.random, "default_rng", counted)
    members = [
        Batches(mixture((1.0, 1.0, 1.0)), batch_size=6, length=10, seed=seed)
        for seed in (10, 11, 12, 13, 14) * 2
    ]
    for step in range(60):  # 49 and a half are a pass of each source's 99 sequences
        for batches in members:
            batches.at(step)
    assert len(drawn) == len(set(drawn)) == 5 * 3 * 2


def test_the_held_out_loss_is_the_mixtures(tmp_path: Path) -> None:
    inputs, targets = held_out_batch(mixture((1.0, 3.0)), count=160, length=10)
    assert inputs.shape == (16, 10)
    assert (inputs[:, 0] // 10_000).tolist() == [0] * 4 + [1] * 12
    assert inputs[3, 0] == 1000 - 11
    assert (targets == inputs + 1).all()


def test_a_mixture_of_shard_and_text(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("".join(sentences(800)))
    (IDS % 256).astype("<u2").tofile(tmp_path / "s.bin")
    text = SourceConfig(source=str(tmp_path / "t.txt"), weight=1.0)
    shard = SourceConfig(source=str(tmp_path / "s.bin"), dtype="uint16", weight=3.0)
    config = DataConfig(sources=(text, shard), tokenizer="bytes", eval_tokens=64)
    corpus = load_corpus(config)
    assert corpus.vocabulary == 256
    check_vocabulary(corpus, 256)
    check_size(corpus, config, batch_size=4, sequence_length=16)
    read = passes(corpus, 40_000)
    assert read[str(tmp_path / "s.bin")] == pytest.approx(30_000 / 4750)
    weighted = replace(config, sources=(text, replace(shard, weight=1.0)))
    assert load_corpus(weighted).digest != corpus.digest
    with pytest.raises(DataError, match=r"of .*s\.bin to train on, one batch needs"):
        check_size(corpus, config, batch_size=2000, sequence_length=16)
    few = replace(config, sources=(text, replace(shard, weight=1e-6)))
    with pytest.raises(DataError, match=r"data\.eval_tokens: .* none of .*s\.bin"):
        check_size(load_corpus(few), few, batch_size=4, sequence_length=16)
    IDS.astype("<u2").tofile(tmp_path / "s.bin")
    with pytest.raises(DataError, match=r"are these the tokenizer's shards\?"):
        check_vocabulary(read_corpus(config), 2000)


def test_a_file_counts_once_and_in_one_source(tmp_path: Path) -> None:
    text = tmp_path / "t.txt"
    text.write_text("once only\n" * 100)
    (tmp_path / "link.txt").symlink_to(text)
    os.link(text, tmp_path / "hard.txt")
    assert load_corpus(DataConfig(source=str(tmp_path / "*.txt"))).size == 1000
    twice = tuple(SourceConfig(source=str(tmp_path / name)) for name in ("t.txt", "link.txt"))
    with pytest.raises(DataError, match=r"t\.txt is in source 1 and in source 2"):
        load_corpus(DataConfig(sources=twice))


@pytest.mark.parametrize("size", [1000, 400_000])
def test_a_copy_is_refused_and_what_only_looks_like_one_is_not(size: int, tmp_path: Path) -> None:
    """A held-out passage of the one would be trained on in the other."""
    text = bytearray("".join(sentences(size // 40)).encode()[:size].ljust(size, b"."))
    for name in ("a.txt", "b.txt", "c.txt"):
        text[size // 2] = ord(name[0])  # of one size, beginning and end
        (tmp_path / name).write_bytes(text)
    both = (
        SourceConfig(source=str(tmp_path / "[ab].txt")),
        SourceConfig(source=str(tmp_path / "c*.txt")),
    )
    config = DataConfig(sources=both, tokenizer="bytes")
    assert read_corpus(config).size == 3 * size
    shutil.copy(tmp_path / "b.txt", tmp_path / "c2.txt")
    with pytest.raises(DataError, match=r"c2\.txt in source 2 is a copy of .*b\.txt in source 1"):
        read_corpus(config)
    with pytest.raises(DataError, match=r"c2\.txt in source 1 is a copy of .*b\.txt in source 1"):
        read_corpus(DataConfig(source=str(tmp_path / "*.txt")))


def test_two_sources_of_the_same_tokens_are_refused(tmp_path: Path) -> None:
    """Cut into other files, so that no file is a copy."""
    text = "".join(sentences(100))
    (tmp_path / "whole.txt").write_text(text)
    (tmp_path / "half1.txt").write_text(text[:999])
    (tmp_path / "half2.txt").write_text(text[999:])
    both = tuple(SourceConfig(source=str(tmp_path / name)) for name in ("whole.txt", "half?.txt"))
    message = r"whole\.txt and .*half\?\.txt hold the same tokens"
    with pytest.raises(DataError, match=message):
        read_corpus(DataConfig(sources=both))


@pytest.mark.parametrize(("keys", "message"), WRONG_TABLES)
def test_keys_that_do_not_fit_together(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        DataConfig(**keys)


def test_large_files_are_mapped_and_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the border between small and large at nothing."""
    for module in (shards, corpus):
        monkeypatch.setattr(module, "SMALL_BYTES", 0)
    monkeypatch.setattr(shards, "CHUNK_BYTES", 1000)
    monkeypatch.setenv("TELESCOPE_CACHE", str(tmp_path / "cache"))
    text = "".join(sentences(300)).encode()
    path = tmp_path / "t.txt"
    monkeypatch.setattr(cache, "SETTLED_SECONDS", -1)
    path.write_bytes(text)
    large = read_corpus(DataConfig(source=str(path)))
    monkeypatch.undo()
    small = read_corpus(DataConfig(source=str(path)))
    assert large.digest == small.digest
    assert np.array_equal(np.asarray(large.train_tokens), np.asarray(small.train_tokens))

    monkeypatch.setenv("TELESCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(shards, "SMALL_BYTES", 0)
    files = [shards.TokenFile(path, "uint8", len(text))]
    with monkeypatch.context() as patch:
        patch.setattr(shards, "_read_all", lambda files: pytest.fail("read again"))
        assert shards.scan(files).digest == small.digest
    monkeypatch.setattr(cache, "SETTLED_SECONDS", 2)
    path.write_bytes(b"?" + text[1:])
    changed = shards.scan(files)
    assert changed.digest != small.digest
    # Written to just now: it could change again unseen, and is read again.
    path.write_bytes(b"!" + text[1:])
    assert shards.scan(files).digest not in (small.digest, changed.digest)


def test_a_file_rewritten_with_its_old_size_and_time_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an editor in place and `touch -r` leave it: hashlib says what is in it now."""
    monkeypatch.setenv("TELESCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(shards, "SMALL_BYTES", 0)
    monkeypatch.setattr(cache, "SETTLED_SECONDS", -1)
    path = tmp_path / "t.txt"
    digests = []
    for text in (b"one text", b"another!"):
        with path.open("r+b" if path.exists() else "wb") as stream:
            stream.write(text)
        os.utime(path, ns=(10**18, 10**18))
        digests.append(shards.scan([shards.TokenFile(path, "uint8", 8)]).digest)
    assert digests == [hashlib.sha256(text).hexdigest() for text in (b"one text", b"another!")]
    # A time of writing long ago settles nothing: it changed just now, and is not remembered.
    monkeypatch.setattr(cache, "SETTLED_SECONDS", 60)
    made = [cache.remembered([path], lambda: {"at": time.time_ns()}, "at")["at"] for _ in "ab"]
    assert made[0] < made[1]


def test_tokens_are_made_once_and_again_when_something_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TELESCOPE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "d.jsonl"
    write_jsonl(path, sentences(60))
    (tmp_path / "bpe.json").write_text(train_bpe(sentences(200), 400))
    config = DataConfig(source=str(path), tokenizer=str(tmp_path / "bpe.json"))
    told: list[float] = []
    first = read_corpus(config, lambda done, whole: told.append(done / whole))
    assert told[-1] == 1
    told.clear()
    again = read_corpus(config, lambda done, whole: told.append(done / whole))
    assert again.digest == first.digest
    assert not told
    (made,) = (tmp_path / "cache" / "tokens").glob("*.bin")
    made.write_bytes(made.read_bytes()[:-1])  # damaged: made again
    assert read_corpus(config).digest == first.digest
    raw = made.read_bytes()
    (entry,) = (tmp_path / "cache" / "tokens").glob("*.json")
    for content in ("{}", "[]", "", '{"known": {}, "checksum": ""}', entry.read_text()[:-9]):
        entry.write_text(content)
        assert read_corpus(config).digest == first.digest
    entry.write_text(entry.read_text().replace("uint16", "uint32"))
    assert read_corpus(config).digest == first.digest
    made.write_bytes(raw[2:] + raw[:2])  # of the same size: made again
    tokens = np.asarray(read_corpus(config).train_tokens)
    assert np.array_equal(tokens, np.asarray(first.train_tokens))
    assert made.read_bytes() == raw
    write_jsonl(path, sentences(61))
    assert read_corpus(config).digest != first.digest
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_the_cache_can_be_deleted_at_any_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the opening of a corpus and its first batch too, and between two trials."""
    monkeypatch.setenv("TELESCOPE_CACHE", str(tmp_path / "cache"))
    texts = sentences(60)
    write_jsonl(tmp_path / "d.jsonl", texts)
    config = DataConfig(source=str(tmp_path / "d.jsonl"), tokenizer="bytes")
    for _ in range(2):
        corpus = load_corpus(config)
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        parts = np.asarray(corpus.train_tokens), np.asarray(corpus.held_out_tokens)
        assert bytes(np.concatenate(parts).tolist()).decode() == "".join(f"{t}\n" for t in texts)


def test_large_tokens_are_checked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the border between small and large at nothing: read again only if they changed."""
    monkeypatch.setenv("TELESCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "SETTLED_SECONDS", -1)
    for module in (shards, tokens):
        monkeypatch.setattr(module, "SMALL_BYTES", 0)
    write_jsonl(tmp_path / "d.jsonl", sentences(60))
    config = DataConfig(source=str(tmp_path / "d.jsonl"))
    digest = read_corpus(config).digest
    assert read_corpus(config).digest == digest
    with monkeypatch.context() as patch:
        patch.setattr(tokens, "chunks", lambda file: pytest.fail("read again"))
        assert read_corpus(config).digest == digest
    (made,) = (tmp_path / "cache" / "tokens").glob("*.bin")
    raw, written = made.read_bytes(), made.stat().st_mtime_ns
    made.write_bytes(raw[::-1])
    os.utime(made, ns=(written, written))
    assert read_corpus(config).digest == digest
    assert made.read_bytes() == raw


def test_a_cache_folder_that_cannot_be_used_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("TELESCOPE_CACHE", str(tmp_path / "cache"))
    write_jsonl(tmp_path / "d.jsonl", sentences(9))
    with pytest.raises(DataError, match="name another one in TELESCOPE_CACHE"):
        read_corpus(DataConfig(source=str(tmp_path / "d.jsonl")))
    monkeypatch.delenv("TELESCOPE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache.cache_folder() == Path("/xdg/telescope")
