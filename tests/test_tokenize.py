"""From a user's files to an answer, on the command line: `tokenize`, then `plan` and `run`."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import from_json, telescope
from conftest import GPT, as_toml, tiny_spec
from corpora import sentences, write_jsonl

from telescope.config import DataConfig
from telescope.data import tokenizing
from telescope.data.corpus import load_corpus
from telescope.data.views import TokenView

RUN = ("--dispatcher", "inline", "--no-check")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with documents, a spec, and the tokenizer and shards that `tokenize` made."""
    path = tmp_path_factory.mktemp("tokenize")
    write_jsonl(path / "web.jsonl", sentences(600))
    (path / "code.txt").write_text(Path(__file__).read_text())
    data = {"source": "*.jsonl", "tokenizer": "bpe.json", "eval_tokens": 64}
    spec = {**tiny_spec(path, model={"file": str(GPT)}), "data": data}
    (path / "tiny.toml").write_text(as_toml(spec))
    options = ("--vocab-size", "400", "--out", "bpe.json", "--shards", "shards")
    done = telescope("tokenize", "tiny.toml", *options, cwd=path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    first, second = done.stdout.splitlines()
    assert first.startswith("wrote bpe.json: ")
    assert first.endswith(" bytes per token")
    assert second.startswith("wrote shards: train.bin ")
    return path


def test_a_sweep_on_documents_and_a_bpe(place: Path) -> None:
    done = telescope("run", "tiny.toml", *RUN, cwd=place)
    assert done.returncode == 0, done.stderr
    kept = json.loads((place / "results" / "tiny" / "spec.json").read_text())
    size = kept["spec"]["model"]["vocab_size"]
    assert 257 < size <= 400  # the tokenizer's, written down
    assert kept["comparable_if_equal"]["model.vocab_size"] == size
    tokenizer = (place / "bpe.json").read_text()
    (place / "bpe.json").rename(place / "moved.json")
    try:  # what was kept is read without the tokenizer
        groups = from_json("transfer", "tiny", cwd=place)["groups"]
    finally:
        (place / "moved.json").rename(place / "bpe.json")
    assert [g["shape"] for g in groups if g["role"] == "readout"] == [[size, 64]]
    (place / "bpe.json").write_text(tokenizer + " ")
    try:
        refused = telescope("run", "tiny.toml", *RUN, cwd=place)
    finally:
        (place / "bpe.json").write_text(tokenizer)
    assert refused.returncode == 2
    assert "data.tokenizer (hash) was " in refused.stderr


def test_the_shards_are_the_tokens(place: Path) -> None:
    config = DataConfig(source=str(place / "web.jsonl"), tokenizer=str(place / "bpe.json"))
    corpus = load_corpus(config)
    for name, part in (("train", corpus.train_tokens), ("val", corpus.held_out_tokens)):
        written = np.fromfile(place / "shards" / f"{name}.bin", "<u2")
        assert np.array_equal(written, np.asarray(part))


def test_a_sweep_on_a_shard_and_text(place: Path) -> None:
    sources = [
        {"source": "shards/train.bin", "dtype": "uint16", "weight": 1},
        {"source": "code.txt", "weight": 1.0},
    ]
    data = {"sources": sources, "tokenizer": "bpe.json", "eval_tokens": 64}
    spec = {**tiny_spec(place, model={"file": str(GPT)}), "data": data, "name": "two"}
    text = as_toml({**spec, "data": {k: v for k, v in data.items() if k != "sources"}})
    for source in sources:
        table = "[[data.sources]]\n" + as_toml(source)
        text += f"\n{table}"
    (place / "two.toml").write_text(text)
    done = telescope("run", "two.toml", *RUN, "--set", "ladder.widths=[16]", cwd=place)
    assert done.returncode == 0, done.stderr
    plan = from_json("plan", "two.toml", "--set", "train.steps=2000", cwd=place)
    assert plan["data"]["note"].startswith("every trial reads parts of its training data more than")
    kept = json.loads((place / "results" / "two" / "spec.json").read_text())
    assert kept["comparable_if_equal"]["data.sources.weight"] == [0.5, 0.5]
    assert [s["source"] for s in kept["spec"]["data"]["sources"]] == [
        [str(place / "shards" / "train.bin")],
        [str(place / "code.txt")],
    ]


def test_a_run_that_reads_its_data_twice_says_so(place: Path) -> None:
    quiet = from_json("plan", "tiny.toml", cwd=place)["data"]
    assert quiet["note"] is None
    plan = from_json("plan", "tiny.toml", "--set", "train.steps=1000", cwd=place)["data"]
    (times,) = plan["passes"].values()
    assert times == pytest.approx(1000 * 4 * 16 / plan["train_tokens"])
    assert plan["note"] == f"every trial reads its training data {times:.1f} times"
    few = ("--set", "ladder.widths=[16]", "--set", "axes.lr.points=2", "--name", "again")
    steps = round(1.5 * plan["train_tokens"] / (4 * 16))
    run = telescope("run", "tiny.toml", *RUN, "--set", f"train.steps={steps}", *few, cwd=place)
    assert "again: every trial reads its training data 1.5 times" in run.stdout
    printed = telescope("plan", "tiny.toml", "--set", "train.steps=1000", cwd=place).stdout
    assert f"data       {plan['note']}" in printed


SHARD = 'data={source="shards/train.bin", dtype="uint16"}'
WRONG = [
    (("plan", "tiny.toml", "--set", SHARD), "model.vocab_size: got None, must be"),
    (
        ("plan", "tiny.toml", "--set", SHARD, "--set", "model.vocab_size=100"),
        "is outside the vocabulary of 100; raise model.vocab_size",
    ),
    (
        ("plan", "tiny.toml", "--set", "model.vocab_size=100"),
        "model.vocab_size: got 100, must be an integer >= ",
    ),
    (("plan", "tiny.toml", "--set", "data.tokenizer=no.json"), "data.tokenizer: cannot read"),
    (("plan", "tiny.toml", "--set", "data.sources=[{sauce='a'}]"), "data.sources.0"),
    (("plan", "tiny.toml", "--set", "data.source=tiny.jsonl"), "no file matches"),
    (("tokenize", "tiny.toml", "--vocab-size", "300", "--out", "bpe.json"), "exists already"),
    (("tokenize", "tiny.toml", "--vocab-size", "200"), "--vocab-size: got 200, must be at least"),
    (("tokenize", "no.txt", "--vocab-size", "300"), "no file matches 'no.txt'"),
    (("tokenize", "shards/val.bin", "--vocab-size", "300"), "needs text"),
    (("tokenize", "code.txt", "--vocab-size", "300", "--field", "a"), "left out for text"),
    (("tokenize", "tiny.toml", "--vocab-size", "300", "--field", "a"), "--set data.field"),
    (("tokenize", "code.txt", "--vocab-size", "300", "--set", "name=a"), "--set: is for a sweep"),
    (("tokenize", "code.txt", "--vocab-size", "300", "--out", "no/b.json"), "cannot be written"),
]


def test_shards_that_are_there_stay_and_weights_are_not_lost(tmp_path: Path) -> None:
    """Said before a tokenizer is trained; the other shard is not begun either."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(name + "".join(sentences(50, seed=ord(name))))
    sources = "".join(f"[[data.sources]]\nsource = '{n}.txt'\n" for n in "ab")
    spec = as_toml({**tiny_spec(tmp_path, model={"file": str(GPT)}), "data": {"eval_tokens": 64}})
    (tmp_path / "two.toml").write_text(f"{spec}\n{sources}")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "val.bin").write_bytes(b"mine")
    for command, message in {
        ("a.txt", "old"): "--shards old: val.bin exists already; give another folder",
        ("two.toml", "new"): "--shards new: shards have no weights, and the data have 2 sources",
    }.items():
        corpus, folder = command
        options = ("--vocab-size", "300", "--shards", folder)
        done = telescope("tokenize", corpus, *options, cwd=tmp_path)
        assert done.returncode == 2
        assert message in done.stderr
        assert not (tmp_path / "tokenizer.json").exists()
    assert [path.read_bytes() for path in (tmp_path / "old").iterdir()] == [b"mine"]
    assert not (tmp_path / "new").exists()


def test_no_tokenizer_is_trained_on_a_copy_of_what_is_held_out(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("".join(sentences(50)))
    done = telescope("tokenize", "*.txt", "--vocab-size", "300", cwd=tmp_path)
    assert done.returncode == 2
    assert "b.txt in source 1 is a copy of " in done.stderr
    assert not (tmp_path / "tokenizer.json").exists()


def test_shards_appear_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a disk that is full after the first thousand tokens."""
    (tmp_path / "a.txt").write_text("".join(sentences(200)))
    monkeypatch.setattr(tokenizing, "SHARD_CHUNK", 1000)
    read = TokenView.read

    def full(view: TokenView, start: int, into: Any) -> None:
        if start and len(view) > 1000:
            raise OSError(errno.ENOSPC, "No space left on device")
        read(view, start, into)

    options = ("a.txt", "--vocab-size", "300", "--shards", "shards")
    with monkeypatch.context() as patch:
        patch.setattr(TokenView, "read", full)
        done = telescope("tokenize", *options, cwd=tmp_path)
    assert done.returncode == 2
    assert "--shards shards: cannot be written: No space left on device" in done.stderr
    assert not list((tmp_path / "shards").iterdir())
    again = telescope("tokenize", *options, "--out", "again.json", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert sorted(p.name for p in (tmp_path / "shards").iterdir()) == ["train.bin", "val.bin"]


@pytest.mark.parametrize(("command", "message"), WRONG)
def test_what_is_wrong_is_a_line_each(command: tuple[str, ...], message: str, place: Path) -> None:
    done = telescope(*command, cwd=place)
    assert done.returncode == 2
    assert all(line.startswith("telescope: ") for line in done.stderr.splitlines())
    assert done.stderr.count("\n") == (2 if "sauce" in str(command) else 1)
    assert message in done.stderr
    assert not (place / "tokenizer.json").exists()


def test_a_tokenizer_of_files_leaves_out_what_is_held_out(tmp_path: Path) -> None:
    """A word that only the held-out end has does not become a token."""
    known, secret = "telescope " * 500, "zyzzyva " * 20
    text = known + "\n" + secret
    (tmp_path / "t.txt").write_text(text)
    assert len(secret) < 0.05 * len(text)
    config: dict[str, Any] = {"source": str(tmp_path / "t.txt")}
    assert b"zyz" not in bytes(np.asarray(load_corpus(DataConfig(**config)).train_tokens).tolist())
    done = telescope("tokenize", "t.txt", "--vocab-size", "300", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "no more pairs occur twice; 300 were asked for" in done.stdout
    vocabulary = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]
    assert any("scope" in token for token in vocabulary)
    assert not any("zy" in token for token in vocabulary)
