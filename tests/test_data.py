"""Corpora and batches: nothing held out is trained on, a batch depends on (seed, step) alone."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from telescope.config import PYTHON_STDLIB, DataConfig
from telescope.data.corpus import (
    Batches,
    check_size,
    held_out_batch,
    held_out_mask,
    load_corpus,
)
from telescope.data.sources import STDLIB_BYTES
from telescope.data.views import Tokens
from telescope.errors import DataError


def raw(tokens: Tokens) -> bytes:
    return np.asarray(tokens).astype(np.uint8).tobytes()


TOKENS = np.arange(251, dtype=np.uint8)  # a prime number of different tokens: a window is its start


def test_python_stdlib_is_this_interpreters_source() -> None:
    corpus = load_corpus(DataConfig(source=PYTHON_STDLIB))
    assert 1_000_000 < corpus.size <= STDLIB_BYTES
    text = raw(corpus.train_tokens)
    assert b"def abspath(path)" in text
    assert Path(pytest.__file__).read_bytes() not in text
    # Spread over the corpus, the held-out part looks like the rest: as many blanks per token.
    blanks = [
        raw(part).count(b" ") / len(part) for part in (corpus.train_tokens, corpus.held_out_tokens)
    ]
    assert blanks[0] == pytest.approx(blanks[1], rel=0.1)


def test_files_and_globs_are_read_in_order_and_once(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.md"):
        (tmp_path / name).write_text(name)
    source = (str(tmp_path / "*.txt"), str(tmp_path / "c.md"), str(tmp_path / "a.txt"))
    corpus = load_corpus(DataConfig(source=source, held_out=0.01))
    assert raw(corpus.train_tokens) == b"a.txtb.txtc.md"
    assert corpus.digest == hashlib.sha256(b"a.txtb.txtc.md").hexdigest()


def test_no_file_and_no_text_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file matches .*nix\.txt"):
        load_corpus(DataConfig(source=str(tmp_path / "nix.txt")))
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match="holds no text"):
        load_corpus(DataConfig(source=(str(tmp_path / "empty.txt"),)))


def test_the_held_out_part_is_the_end_of_every_stretch() -> None:
    short = held_out_mask(1000, 0.1)
    assert short.tolist() == [False] * 900 + [True] * 100
    long = held_out_mask(200_000, 0.1)  # five stretches of 40,000
    assert long.tolist() == ([False] * 36_000 + [True] * 4_000) * 5


def test_both_parts_are_the_whole_corpus(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    text = rng.integers(0, 256, 100_000, dtype=np.uint8)
    (tmp_path / "random.txt").write_bytes(text.tobytes())
    config = DataConfig(source=(str(tmp_path / "random.txt"),), format="text")
    corpus, mask = load_corpus(config), held_out_mask(len(text), config.held_out)
    assert np.array_equal(corpus.train_tokens, text[~mask])
    assert np.array_equal(corpus.held_out_tokens, text[mask])


@pytest.mark.parametrize(
    ("key", "data", "batch_size"),
    [
        ("data.held_out", {"held_out": 0.001}, 4),
        ("data.held_out", {"eval_tokens": 10**6}, 4),
        ("data.source", {"eval_tokens": 16}, 10**6),
    ],
)
def test_a_corpus_too_short_is_an_error(
    corpus_file: Path, key: str, data: dict[str, float], batch_size: int
) -> None:
    config = DataConfig(source=str(corpus_file), **data)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=rf"^{key}: .*need(s|ed) "):
        check_size(load_corpus(config), config, batch_size=batch_size, sequence_length=16)


def batches(seed: int = 0, length: int = 10) -> Batches:
    return Batches(TOKENS, batch_size=4, length=length, seed=seed)


def test_targets_are_the_next_tokens() -> None:
    inputs, targets = batches().at(3)
    assert inputs.shape == targets.shape == (4, 10)
    assert inputs.dtype == torch.int64
    assert torch.equal(inputs + 1, targets)


def test_a_pass_reads_every_sequence_once() -> None:
    source = batches()
    starts = torch.cat([source.at(step)[0][:, 0] for step in range(25)]).tolist()  # 4 passes of 25
    for number in range(4):
        assert sorted(starts[25 * number : 25 * (number + 1)]) == list(range(0, 250, 10))
    assert starts[:25] != starts[25:50]


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    forward, backward = batches(), batches()
    there = [forward.at(step)[0] for step in range(30)]
    back = [backward.at(step)[0] for step in reversed(range(30))]
    assert all(torch.equal(a, b) for a, b in zip(there, reversed(back), strict=True))
    assert not torch.equal(batches(seed=1).at(0)[0], there[0])


def test_held_out_sequences_are_spread_and_fixed() -> None:
    inputs, targets = held_out_batch(TOKENS, count=35, length=10)
    assert inputs.shape == (4, 10)
    assert torch.equal(inputs + 1, targets)
    assert inputs[0, 0] == 0
    assert targets[-1, -1] == 250
    assert torch.equal(held_out_batch(TOKENS, count=35, length=10)[0], inputs)
