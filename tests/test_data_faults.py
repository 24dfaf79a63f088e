"""Data that are wrong in several places: all of them are said at once; copies can be dropped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from telescope.config import BYTES, DataConfig, SourceConfig
from telescope.data.corpus import read_corpus
from telescope.errors import DataError

LINE = json.dumps({"text": "a document of some length, with a few words in it"}) + "\n"


def test_every_wrong_line_of_every_file_is_said(tmp_path: Path) -> None:
    wrong = [(0, 3), (0, 7), (1, 2), (2, 1), (2, 9)]
    for file in range(4):
        lines = [LINE] * 10
        for _, line in (place for place in wrong if place[0] == file):
            lines[line - 1] = '{"body": "x"}\n' if line % 2 else "{broken\n"
        (tmp_path / f"{file}.jsonl").write_text("".join(lines))
    with pytest.raises(DataError) as caught:
        read_corpus(DataConfig(source=str(tmp_path / "*.jsonl")))
    assert len(caught.value.faults) == len(wrong)
    for file, line in wrong:
        assert f"{file}.jsonl:{line}: " in str(caught.value)
    assert str(caught.value).startswith("5 faults in the data: (1) ")
    assert "\n" not in str(caught.value)


def test_every_missing_file_of_every_source_is_said(tmp_path: Path) -> None:
    (tmp_path / "there.txt").write_text("words " * 500)
    names = [f"missing{number}.txt" for number in range(10)]
    sources = tuple(SourceConfig(source=str(tmp_path / n)) for n in ["there.txt", *names])
    with pytest.raises(DataError) as caught:
        read_corpus(DataConfig(sources=sources))
    assert all(name in str(caught.value) for name in names)
    assert "there.txt'" not in str(caught.value)


def test_one_fault_is_said_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^data\.source: no file matches"):
        read_corpus(DataConfig(source=str(tmp_path / "none.txt")))


def test_copies_are_refused_all_at_once_or_dropped(tmp_path: Path) -> None:
    text = "".join(f"line {number} of a text\n" for number in range(400))
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.txt").write_text(text)
    (tmp_path / "d.txt").write_text(text.replace("text", "book"))
    config = DataConfig(source=str(tmp_path / "*.txt"), tokenizer=BYTES)
    with pytest.raises(DataError, match=r'data\.duplicates = "drop"') as caught:
        read_corpus(config)
    assert len(caught.value.faults) == 2, "b and c"
    dropping = DataConfig(source=str(tmp_path / "*.txt"), tokenizer=BYTES, duplicates="drop")
    once = DataConfig(source=(str(tmp_path / "a.txt"), str(tmp_path / "d.txt")), tokenizer=BYTES)
    assert read_corpus(dropping).digest == read_corpus(once).digest
    assert read_corpus(dropping).size == 2 * len(text)


def test_a_source_of_copies_alone_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("some words\n" * 300)
    parts = tuple(SourceConfig(source=str(tmp_path / f"{name}.txt")) for name in ("a", "b"))
    with pytest.raises(DataError, match="are copies of others; leave the source out"):
        read_corpus(DataConfig(sources=parts, duplicates="drop"))
