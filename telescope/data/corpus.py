"""A corpus as tokens, its held-out passages, and batches that depend on (seed, step) alone."""

from __future__ import annotations

import filecmp
import functools
import hashlib
import json
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from telescope.config import BYTES, PYTHON_STDLIB, DataConfig, SourceConfig
from telescope.data.content import bom_bytes, is_checked, nul_error
from telescope.data.shards import SMALL_BYTES, Scan, TokenFile, open_shard, scan
from telescope.data.sources import STDLIB_BYTES, files_of
from telescope.data.tokenizer import load_tokenizer
from telescope.data.tokens import Progress, as_bytes, tokenize
from telescope.data.views import Tokens, TokenView, held_out_ranges, rest_of, windows
from telescope.errors import DataError, Faults, SpecError

if TYPE_CHECKING:
    import torch

SMALLEST_COPY = 1000
"""Size in bytes from which copies of a file matter. Smaller ones are such as the licence headers of
empty modules, and hold nothing to memorise. Assumption."""
SHORT_OF_DOCUMENTS = "they are a single document, and documents are not cut; give a second one"
SHORT_OF_LINES = (
    "the last line is longer than the share, and lines stay whole; give more text, or break it"
)
COMPARED_BYTES = 1 << 16
"""Bytes compared at either end of files of one size, before two files are compared whole."""


@dataclass(frozen=True)
class Part:
    """One source: its tokens for training, and its held-out tokens."""

    name: str
    """The source as the spec names it."""
    weight: float
    train: TokenView = field(repr=False)
    held_out: TokenView = field(repr=False)
    digest: str
    indivisible: str = ""
    """The reason that nothing of it is held out, with advice; "" if it can be divided."""
    scan: Scan | None = None
    """The highest token id and its place, for ids that no tokenizer here has made."""

    @property
    def size(self) -> int:
        """Number of all tokens."""
        return len(self.train) + len(self.held_out)


@dataclass(frozen=True)
class Corpus:
    """Tokens, some of which are held out and never trained on."""

    parts: tuple[Part, ...]
    vocabulary: int | None
    """Size of the tokenizer's vocabulary; None without a tokenizer."""

    @property
    def train_tokens(self) -> Tokens:
        """The tokens for training."""
        return Tokens(tuple(part.train for part in self.parts), self._weights)

    @property
    def held_out_tokens(self) -> Tokens:
        """The tokens on which the held-out loss is measured."""
        return Tokens(tuple(part.held_out for part in self.parts), self._weights)

    @property
    def _weights(self) -> tuple[float, ...]:
        return tuple(part.weight for part in self.parts)

    @property
    def digest(self) -> str:
        """SHA-256, hexadecimal, of all tokens; of several sources also of their weights."""
        if len(self.parts) == 1:
            return self.parts[0].digest
        total = sum(self._weights)
        mixed = [[part.digest, part.weight / total] for part in self.parts]
        return hashlib.sha256(json.dumps(mixed).encode()).hexdigest()

    @property
    def size(self) -> int:
        """Number of all tokens."""
        return sum(part.size for part in self.parts)


@functools.lru_cache(maxsize=2)
def load_corpus(config: DataConfig) -> Corpus:
    """Find, check and map the corpus; cached, because a worker trains many trials on it.

    Large files are read once, in bounded memory, for their digest and their highest token id; both
    are remembered. Tokens made from text are kept in the cache folder. Training then reads only
    the tokens that it needs.

    Raises:
        DataError: no file matches, a file is wrong, or all files are empty.
        SpecError: the tokenizer is wrong.
    """
    return read_corpus(config)


def read_corpus(config: DataConfig, progress: Progress | None = None) -> Corpus:
    """Read a corpus as `load_corpus` does; report the progress of tokenizing to `progress`."""
    files = distinct_files(config)
    name = config.tokenizer_name
    vocabulary = load_tokenizer(name).vocabulary if name else None
    parts, faults = [], Faults()
    for source, paths in zip(config.parts, files, strict=True):
        with faults.collected():
            try:
                part = _part(source, paths, config, progress)
            except OSError as error:
                where = error.filename or f"data.source {source.source!r}"
                raise DataError(f"{where}: cannot be read: {error.strerror or error}") from error
            parts.append(part)
    faults.raise_all()
    _check_distinct_parts(parts)
    return Corpus(tuple(parts), vocabulary)


def distinct_files(config: DataConfig) -> list[list[Path]]:
    """Return the files of every source, each once.

    A file that occurs twice could be held out once and trained on once. So a link to another
    source's file, or a copy of a file, is an error; data.duplicates = "drop" leaves copies out.

    Raises:
        DataError: files are wrong, missing or duplicates; the message names all of them.
    """
    files, faults = [], Faults()
    for source in config.parts:
        with faults.collected():
            files.append(files_of(source))
    faults.raise_all()
    try:
        dropped = _copies(config, files, faults)
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read: {error.strerror or error}") from error
    faults.raise_all()
    kept = [[path for path in paths if path not in dropped] for paths in files]
    for source, paths in zip(config.parts, kept, strict=True):
        with faults.collected():
            if not paths:
                raise DataError(
                    f"data.sources: all files of {source.source!r} are copies of others; leave the "
                    "source out"
                )
    faults.raise_all()
    return kept


def _copies(config: DataConfig, files: Sequence[Sequence[Path]], faults: Faults) -> set[Path]:
    """Find copies by inode and content; return those to drop, and collect the others as faults.

    Copies are found by size first, then by their ends, so that only true ones are read whole.
    """
    seen: dict[tuple[int, int], int] = {}
    alike: dict[int, list[tuple[Path, int]]] = {}
    for number, paths in enumerate(files):
        for path in paths:
            stat = path.stat()
            other = seen.setdefault((stat.st_dev, stat.st_ino), number)
            with faults.collected():
                if other != number:
                    raise DataError(
                        f"data.sources: {path} is in source {other + 1} and in source "
                        f"{number + 1}; name it in one"
                    )
                if stat.st_size >= SMALLEST_COPY:
                    alike.setdefault(stat.st_size, []).append((path, number))
    dropped: set[Path] = set()
    for size, candidates in alike.items():
        if len(candidates) > 1:
            dropped |= _copies_among(config, size, candidates, faults)
    return dropped


def _copies_among(
    config: DataConfig, size: int, files: Sequence[tuple[Path, int]], faults: Faults
) -> set[Path]:
    """Find the copies among files of one size, each with its source's number; see `_copies`."""
    alike: dict[bytes, list[tuple[Path, int]]] = {}
    dropped: set[Path] = set()
    for path, number in files:
        with path.open("rb") as stream:
            ends = stream.read(COMPARED_BYTES)
            stream.seek(max(0, size - COMPARED_BYTES))
            ends = hashlib.sha256(ends + stream.read(COMPARED_BYTES)).digest()
        others = alike.setdefault(ends, [])
        # Copies inside the standard library stay: the results of sweeps on it include them.
        is_stdlib = config.parts[number].source == PYTHON_STDLIB
        first = next(
            (
                (other, source)
                for other, source in others
                if not (is_stdlib and source == number) and filecmp.cmp(path, other, shallow=False)
            ),
            None,
        )
        if first is None:
            others.append((path, number))
        elif config.duplicates == "drop":
            dropped.add(path)
        else:
            with faults.collected():
                raise DataError(
                    f"data.source: {path} in source {number + 1} is a copy of {first[0]} in source "
                    f"{first[1] + 1}: what is held out of one would be trained on in the other; "
                    'leave one out, or set data.duplicates = "drop"'
                )
    return dropped


def _check_distinct_parts(parts: Sequence[Part]) -> None:
    """Check that no two sources hold the same tokens, however they are split into files."""
    first: dict[str, Part] = {}
    for part in parts:
        other = first.setdefault(part.digest, part)
        if other is not part:
            raise DataError(
                f"data.sources: {other.name} and {part.name} hold the same tokens: what is held "
                "out of one would be trained on in the other; leave one out"
            )


def _part(
    source: SourceConfig, paths: list[Path], config: DataConfig, progress: Progress | None
) -> Part:
    """Read one source into tokens, whatever the format of its files."""
    tokenizer = config.tokenizer_name
    found: Scan | None = None
    indivisible = ""
    files: list[TokenFile | NDArray[Any]]
    if source.kind != "tokens" and (source.kind != "text" or tokenizer != BYTES):
        assert tokenizer is not None
        made = tokenize(source, paths, load_tokenizer(tokenizer), config.held_out, progress)
        files, held_out, size, digest = [made.tokens], made.held_out, len(made.tokens), made.digest
        if made.passages == 1:
            indivisible = SHORT_OF_LINES if source.kind == "text" else SHORT_OF_DOCUMENTS
    else:
        if source.kind == "tokens":
            shards, faults = [], Faults()
            for path in paths:
                with faults.collected():
                    shards.append(open_shard(path, source))
            faults.raise_all()
            files, digest, found = [*shards], "", _same_type(shards)
            digest = found.digest
        else:
            files, digest = _text_files(source, paths)
        size = sum(f.count if isinstance(f, TokenFile) else len(f) for f in files)
        held_out = held_out_ranges(size, config.held_out)
    if not size:
        raise DataError(f"data.source: {source.source!r} holds no text; name files with content")
    return Part(
        name=_shown(source),
        weight=source.weight,
        train=TokenView(files, rest_of(held_out, size)),
        held_out=TokenView(files, held_out),
        digest=digest,
        indivisible=indivisible,
        scan=found,
    )


def _shown(source: SourceConfig) -> str:
    """Name a source for messages."""
    first, *others = source.patterns
    return f"{first} and {len(others)} more" if others else first


def _same_type(shards: list[TokenFile]) -> Scan:
    """Scan the shards of a source; they must all have one type of token."""
    for shard in shards:
        if shard.dtype != shards[0].dtype:
            raise DataError(
                f"{shard.path}: its tokens are {shard.dtype}, those of {shards[0].path} are "
                f"{shards[0].dtype}; give each type its own table [[data.sources]]"
            )
    return scan(shards)


def _text_files(
    source: SourceConfig, paths: list[Path]
) -> tuple[list[TokenFile | NDArray[Any]], str]:
    """Return files whose bytes are the tokens, and their digest; read small ones into memory."""
    files = [_without_bom(file) for file in as_bytes(paths)]
    files = [file for file in files if file.count]
    if sum(file.count for file in files) > SMALL_BYTES:
        found = scan(files)
        if found.first_zero and is_checked(source):
            raise nul_error(*found.first_zero)
        return [*files], found.digest
    texts = [file.path.read_bytes()[file.offset :] for file in files]
    for file, text in zip(files, texts, strict=True):
        if is_checked(source) and b"\0" in text:
            raise nul_error(file.path, file.offset + text.index(b"\0"))
    text = b"".join(texts)
    if source.source == PYTHON_STDLIB:
        text = text[:STDLIB_BYTES]
    digest = hashlib.sha256(text).hexdigest()
    return [np.frombuffer(text, dtype=np.uint8)] if text else [], digest


def _without_bom(file: TokenFile) -> TokenFile:
    """Skip the byte-order mark of a text file."""
    before = bom_bytes(file.path)
    return replace(file, offset=before, count=file.count - before)


def held_out_mask(size: int, share: float) -> NDArray[np.bool_]:
    """Return `held_out_ranges` as one boolean per token, for small corpora."""
    mask = np.zeros(size, dtype=np.bool_)
    for start, end in held_out_ranges(size, share):
        mask[start:end] = True
    return mask


def check_size(
    corpus: Corpus, config: DataConfig, *, batch_size: int, sequence_length: int
) -> None:
    """Check that every source can fill its part of a training batch and of the measurement.

    Raises:
        DataError: a part is too short; the message gives its size and the size needed.
    """
    sequences = -(-config.eval_tokens // sequence_length)
    measured, trained = (
        corpus.held_out_tokens.split(np.array([count]))[0].tolist()
        for count in (sequences, batch_size)
    )
    for part, to_measure, to_train in zip(corpus.parts, measured, trained, strict=True):
        of = f" of {part.name}" if len(corpus.parts) > 1 else ""
        if to_measure == 0:
            raise DataError(
                f"data.eval_tokens: {config.eval_tokens} tokens are {sequences} sequences, none{of}"
                f" at its weight of {part.weight:g}; give more eval_tokens or a larger weight"
            )
        if part.indivisible:
            raise DataError(
                f"data.source: of the {part.size} tokens of {part.name} nothing is held out: "
                f"{part.indivisible}"
            )
        needed = to_measure * sequence_length + 1
        if len(part.held_out) < needed:
            raise DataError(
                f"data.held_out: {config.held_out:g} of {part.size} tokens{of} leaves "
                f"{len(part.held_out)} held out, {needed} are needed for data.eval_tokens = "
                f"{config.eval_tokens}; give more text, a larger share or fewer eval_tokens"
            )
        needed = max(1, to_train) * sequence_length + 1
        if len(part.train) < needed:
            raise DataError(
                f"data.source: {len(part.train)} tokens{of} to train on, one batch needs "
                f"{needed}; give more text or smaller train.batch_size"
            )


def check_vocabulary(corpus: Corpus, vocab_size: int) -> None:
    """Check that the model knows every token.

    Raises:
        SpecError: the model's vocabulary is smaller than the tokenizer's.
        DataError: a token of a shard is outside it, with file and place.
    """
    if corpus.vocabulary is not None and vocab_size < corpus.vocabulary:
        raise SpecError(
            f"model.vocab_size: got {vocab_size}, must be an integer >= {corpus.vocabulary}, the "
            "tokenizer's"
        )
    known = corpus.vocabulary or vocab_size
    for part in corpus.parts:
        if part.scan and part.scan.highest >= known:
            raise DataError(
                f"{part.scan.place}: id {part.scan.highest} is outside the vocabulary of {known}; "
                + ("are these the tokenizer's shards?" if corpus.vocabulary else "")
                + ("" if corpus.vocabulary else "raise model.vocab_size, or mend data.dtype")
            )


def passes(corpus: Corpus, tokens: int) -> dict[str, float]:
    """Count the passes of a run over the training part of each source.

    Args:
        corpus: the run's corpus.
        tokens: number of tokens that the run trains on.
    """
    total = sum(part.weight for part in corpus.parts)
    return {
        part.name: tokens * part.weight / total / max(1, len(part.train)) for part in corpus.parts
    }


class Batches:
    """The batches of one trial, a fixed function of (seed, step).

    The training part of each source is cut into sequences. Every pass over them has a new order,
    drawn from (seed, pass). Sources take turns by weight. The same seed gives the same batches at
    every point and width.
    """

    def __init__(
        self, tokens: Tokens | NDArray[np.uint8], *, batch_size: int, length: int, seed: int
    ) -> None:
        """Cut `tokens` into sequences of `length` (plus the token that the last one predicts)."""
        self._tokens = Tokens.of(tokens)
        self._batch_size = batch_size
        self._length = length
        self._seed = seed
        self._sequences = [(len(part) - 1) // length for part in self._tokens.parts]
        self._orders: dict[int, tuple[int, NDArray[np.int64]]] = {}  # source → pass, its order

    def at(self, step: int, rows: range | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the inputs and targets of one step, each (batch, sequence) int64 on the CPU.

        Args:
            step: from 0.
            rows: consecutive rows of the batch, one or more; by default all.
        """
        rows = range(self._batch_size) if rows is None else rows
        first = step * self._batch_size + rows.start
        taken = self._tokens.split(np.arange(first, first + len(rows) + 1))
        sources = np.diff(taken, axis=0).argmax(axis=1).tolist()
        starts = [self._start(s, int(row[s])) for s, row in zip(sources, taken, strict=False)]
        return _shifted(windows(self._tokens, sources, starts, self._length))

    def _start(self, source: int, number: int) -> int:
        """Return the first token's number of the `number`th sequence taken from a source."""
        epoch, place = divmod(number, self._sequences[source])
        if source not in self._orders or self._orders[source][0] != epoch:
            self._orders.pop(source, None)  # freed before the next one is made, to save memory
            order = _order(self._seed, epoch, source, self._sequences[source])
            self._orders[source] = epoch, order
        return int(self._orders[source][1][place]) * self._length


_ORDERS: weakref.WeakValueDictionary[tuple[int, ...], NDArray[np.int64]] = (
    weakref.WeakValueDictionary()
)
"""The orders in use by any `Batches`; trials of one seed share them."""


def _order(seed: int, epoch: int, source: int, sequences: int) -> NDArray[np.int64]:
    """Return the order of a pass, 8 bytes per sequence; made once while any `Batches` uses it."""
    key = (seed, epoch, source, sequences)
    order = _ORDERS.get(key)
    if order is None:
        entropy = (seed, epoch, source) if source else (seed, epoch)
        order = _ORDERS[key] = np.random.default_rng(entropy).permutation(sequences)
    return order


def held_out_batch(
    tokens: Tokens | NDArray[np.uint8], *, count: int, length: int
) -> tuple[torch.Tensor, ...]:
    """Return at least `count` held-out tokens as sequences spread evenly over the held-out part.

    Each of several sources gives its share by weight, so that the mean loss is the mixture's.

    Returns:
        inputs and targets, each (⌈count/length⌉, length) int64; the same ones at every call.
    """
    tokens = Tokens.of(tokens)
    sources, starts = list[int](), list[int]()
    shares = tokens.split(np.array([-(-count // length)]))[0].tolist()
    for source, (part, share) in enumerate(zip(tokens.parts, shares, strict=True)):
        sources += [source] * share
        starts += np.linspace(0, len(part) - 1 - length, share).astype(np.int64).tolist()
    return _shifted(windows(tokens, sources, starts, length))


def _shifted(window: NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
    """Split windows into inputs and targets, which are shifted by one token."""
    import torch  # here, as it takes seconds: corpora are read by commands that train nothing

    found = torch.from_numpy(window)
    return found[:, :-1], found[:, 1:]
