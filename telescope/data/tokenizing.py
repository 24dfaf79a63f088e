"""The command `telescope tokenize`: train a small BPE, and write tokens as nanoGPT's shards."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from telescope.config import BYTES, DataConfig
from telescope.data.corpus import distinct_files, read_corpus
from telescope.data.sources import files_of
from telescope.data.tokenizer import load_tokenizer, train_bpe
from telescope.data.tokens import Progress, smallest_dtype, split_passages
from telescope.data.views import TokenView
from telescope.errors import SpecError
from telescope.files import UNFINISHED, write_atomic

MEASURED_CHARACTERS = 1_000_000
"""Most held-out text on which a new tokenizer is measured."""
SHARD_CHUNK = 1 << 20
SHARDS = ("train.bin", "val.bin")


def needs_tokenizing(config: DataConfig) -> bool:
    """Tell whether a corpus has documents that must be tokenized before a trial reads them."""
    return any(
        part.kind != "tokens" and (part.kind != "text" or config.tokenizer_name != BYTES)
        for part in config.parts
    )


def make_tokenizer(config: DataConfig, vocabulary: int, out: Path, progress: Progress) -> str:
    """Train a BPE on the training part of a corpus and write it; held-out text is left out.

    Args:
        config: the corpus; its tokenizer plays no part.
        vocabulary: number of ids, bytes and end of text included.
        out: the file to write; must not exist.
        progress: called with the bytes read and their total.

    Returns:
        A line that describes the tokenizer.

    Raises:
        SpecError: the vocabulary is too small, the file exists or cannot be written, or the corpus
            is tokens already.
        DataError: the corpus is wrong.
    """
    if out.exists():
        raise SpecError(f"--out {out}: exists already; give another path")
    if any(part.kind == "tokens" for part in config.parts):
        raise SpecError("tokenize: needs text; shards of tokens have been tokenized already")
    distinct_files(config)
    text = train_bpe(_training_texts(config, progress), vocabulary)
    try:
        write_atomic(out, text)
    except OSError as error:
        raise SpecError(f"--out {out}: cannot be written: {error.strerror}") from error
    tokenizer = load_tokenizer(str(out))
    held_out = _held_out_text(config)
    line = f"wrote {out}: {tokenizer.vocabulary:,} tokens"
    if tokenizer.vocabulary < vocabulary:
        line += f" (no more pairs occur twice; {vocabulary:,} were asked for)"
    if held_out:
        count = len(tokenizer.encode([held_out])[0])
        line += f"; held-out text has {len(held_out.encode()) / count:.2f} bytes per token"
    return line


def _training_texts(config: DataConfig, progress: Progress) -> Iterator[str]:
    """Yield the training text of every source."""
    for source in config.parts:
        for passage, is_held_out in split_passages(
            source, files_of(source), config.held_out, progress
        ):
            if not is_held_out:
                yield passage.text


def _held_out_text(config: DataConfig) -> str:
    """Return some of the held-out text."""
    found, size = list[str](), 0
    for source in config.parts:
        for passage, is_held_out in split_passages(source, files_of(source), config.held_out):
            if is_held_out and size < MEASURED_CHARACTERS:
                found.append(passage.text[:MEASURED_CHARACTERS])
                size += len(found[-1])
            elif size >= MEASURED_CHARACTERS:
                break
    return "".join(found)


def check_shards(config: DataConfig, folder: Path) -> None:
    """Check `write_shards`'s conditions before a tokenizer is trained."""
    if len(config.parts) > 1:
        raise SpecError(
            f"--shards {folder}: shards have no weights, and the data have {len(config.parts)} "
            "sources; leave --shards out (`run` keeps the tokens itself), or name the files of one"
        )
    for name in SHARDS:
        if os.path.lexists(folder / name):
            raise SpecError(f"--shards {folder}: {name} exists already; give another folder")


def write_shards(config: DataConfig, tokenizer: Path, folder: Path, progress: Progress) -> str:
    """Write a corpus as `train.bin` and `val.bin`, raw tokens in nanoGPT's layout.

    Both files appear only once both are whole.

    Returns:
        A line that describes the files.

    Raises:
        SpecError: the folder cannot be written or has one of the files already, or there are
            several sources.
        DataError: the corpus is wrong.
    """
    check_shards(config, folder)
    corpus = read_corpus(replace(config, tokenizer=str(tokenizer.absolute())), progress)
    assert corpus.vocabulary is not None
    dtype = max("uint16", smallest_dtype(corpus.vocabulary), key=lambda d: np.dtype(d).itemsize)
    (part,) = corpus.parts
    unfinished = [folder / f".{name}{UNFINISHED}" for name in SHARDS]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, view in zip(unfinished, (part.train, part.held_out), strict=True):
            _write_shard(path, view, dtype)
        for path, name in zip(unfinished, SHARDS, strict=True):
            os.replace(path, folder / name)
    except OSError as error:
        raise SpecError(f"--shards {folder}: cannot be written: {error.strerror}") from error
    finally:
        for path in unfinished:
            with suppress(OSError):
                path.unlink()
    counts = f"train.bin {len(part.train):,} tokens, val.bin {len(part.held_out):,}"
    return f"wrote {folder}: {counts}, {dtype}"


def _write_shard(path: Path, view: TokenView, dtype: str) -> None:
    """Write a run of tokens to a file."""
    with path.open("wb") as stream:
        for start in range(0, len(view), SHARD_CHUNK):
            tokens = np.empty(min(SHARD_CHUNK, len(view) - start), dtype=np.int64)
            view.read(start, tokens)
            stream.write(tokens.astype(np.dtype(dtype).newbyteorder("<")).data)
