"""A corpus as bytes, its held-out passages, and batches that depend on (seed, step) alone."""

from __future__ import annotations

import functools
import glob
import hashlib
import itertools
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from telescope.errors import DataError
from telescope.train.config import PYTHON_STDLIB, DataConfig

STDLIB_BYTES = 8_000_000
"""The standard library's source is cut here: enough for small models, quick to read and hash."""
STRETCH_BYTES = 40_000
"""Shortest stretch of a corpus with a held-out end of its own. An assumption."""
MAX_STRETCHES = 200
STDLIB_SKIPPED = {"test", "tests", "idle_test", "idlelib", "site-packages"}


@dataclass(frozen=True)
class Corpus:
    """Byte tokens, a part of which is never trained on."""

    train_tokens: NDArray[np.uint8] = field(repr=False)
    held_out_tokens: NDArray[np.uint8] = field(repr=False)
    digest: str
    """SHA-256 of the whole text, hexadecimal."""

    @property
    def size(self) -> int:
        """All tokens."""
        return len(self.train_tokens) + len(self.held_out_tokens)


@functools.lru_cache(maxsize=2)
def load_corpus(config: DataConfig) -> Corpus:
    """Read and hash the corpus; kept, because a warm worker trains many trials on it.

    Raises:
        DataError: no file matches, a file cannot be read, or there is not a byte in them.
    """
    if config.source == PYTHON_STDLIB:
        text = _read(_stdlib_files(), limit=STDLIB_BYTES)
    else:
        patterns = (config.source,) if isinstance(config.source, str) else config.source
        paths = [path.resolve() for pattern in patterns for path in _matches(pattern)]
        # Each file once: a second copy of a held-out passage could be trained on.
        text = _read(list(dict.fromkeys(paths)))
    if not text:
        raise DataError(f"data.source: {config.source!r} holds no text; name files with content")
    tokens = np.frombuffer(text, dtype=np.uint8)
    is_held_out = held_out_mask(len(tokens), config.held_out)
    digest = hashlib.sha256(text).hexdigest()
    return Corpus(tokens[~is_held_out], tokens[is_held_out], digest)


def held_out_mask(size: int, share: float) -> NDArray[np.bool_]:
    """Which tokens are held out: the end of each of many equal stretches of the corpus.

    One end alone would be one file, such as a generated table, and no sample of the corpus.
    """
    stretches = max(1, min(MAX_STRETCHES, size // STRETCH_BYTES))
    mask = np.zeros(size, dtype=np.bool_)
    borders = np.linspace(0, size, stretches + 1).round().astype(int)
    for start, end in itertools.pairwise(borders):
        mask[end - round((end - start) * share) : end] = True
    return mask


def _stdlib_files() -> list[Path]:
    """Every .py file of this interpreter's library, sorted, without tests and packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = (path for path in root.rglob("*.py"))
    return sorted(p for p in found if not STDLIB_SKIPPED & set(p.relative_to(root).parts))


def _matches(pattern: str) -> list[Path]:
    """The files of one path or glob, sorted."""
    paths = sorted(Path(p) for p in glob.glob(pattern, recursive=True) if Path(p).is_file())
    if not paths:
        raise DataError(f"data.source: no file matches {pattern!r}; give a path or a glob")
    return paths


def _read(paths: list[Path], limit: int | None = None) -> bytes:
    """The files' bytes in order, cut at `limit`."""
    parts, size = [], 0
    for path in paths:
        if limit is not None and size >= limit:
            break
        try:
            parts.append(path.read_bytes())
        except OSError as error:
            raise DataError(f"data.source: cannot read {path}: {error.strerror}") from error
        size += len(parts[-1])
    return b"".join(parts)[:limit]


def check_size(
    corpus: Corpus, config: DataConfig, *, batch_size: int, sequence_length: int
) -> None:
    """Check that the corpus can fill a training batch and the held-out measurement.

    Raises:
        DataError: naming the split that is too short, its size and what it needs.
    """
    needed = -(-config.eval_tokens // sequence_length) * sequence_length + 1
    if len(corpus.held_out_tokens) < needed:
        raise DataError(
            f"data.held_out: {config.held_out:g} of {corpus.size} tokens leaves "
            f"{len(corpus.held_out_tokens)} held out, {needed} are needed for data.eval_tokens = "
            f"{config.eval_tokens}; give more text, a larger share or fewer eval_tokens"
        )
    needed = batch_size * sequence_length + 1
    if len(corpus.train_tokens) < needed:
        raise DataError(
            f"data.source: {len(corpus.train_tokens)} tokens to train on, one batch needs "
            f"{needed}; give more text or smaller train.batch_size"
        )


class Batches:
    """The batches of one trial: a fixed function of (seed, step), whoever asks and when.

    The training part is cut into sequences; every pass over them is in a new order drawn from
    (seed, pass). The same seed gives the same batches at every point and width.
    """

    def __init__(
        self, tokens: NDArray[np.uint8], *, batch_size: int, length: int, seed: int
    ) -> None:
        """Cut `tokens` into sequences of `length` (plus the token that the last one predicts)."""
        self._tokens = tokens
        self._batch_size = batch_size
        self._length = length
        self._seed = seed
        self._sequences = (len(tokens) - 1) // length
        self._order = functools.lru_cache(maxsize=2)(self._shuffled)

    def _shuffled(self, epoch: int) -> NDArray[np.int64]:
        return np.random.default_rng((self._seed, epoch)).permutation(self._sequences)

    def at(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The inputs and targets of one step, each (batch, sequence) int64 on the CPU."""
        first = step * self._batch_size
        places = (divmod(first + i, self._sequences) for i in range(self._batch_size))
        starts = np.array([self._order(epoch)[place] for epoch, place in places]) * self._length
        return _windows(self._tokens, starts, self._length)


def held_out_batch(
    tokens: NDArray[np.uint8], *, count: int, length: int
) -> tuple[torch.Tensor, ...]:
    """At least `count` held-out tokens as sequences spread evenly over the held-out part.

    Returns:
        inputs and targets, each (⌈count/length⌉, length) int64; always the same ones.
    """
    sequences = -(-count // length)
    starts = np.linspace(0, len(tokens) - 1 - length, sequences).astype(np.int64)
    return _windows(tokens, starts, length)


def _windows(
    tokens: NDArray[np.uint8], starts: NDArray[np.int64], length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences and the same ones shifted by a token."""
    index = starts[:, None] + np.arange(length + 1)
    window = torch.from_numpy(tokens[index].astype(np.int64))
    return window[:, :-1], window[:, 1:]
