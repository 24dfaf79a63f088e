"""Tokens of many files read as one run, and several runs mixed by weight."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from telescope.data.shards import TokenFile

STRETCH = 40_000
"""Shortest stretch of a corpus, in tokens or bytes, with a held-out end of its own. Assumption."""
MAX_STRETCHES = 200

Ranges = list[tuple[int, int]]
"""Rising half-open ranges of token numbers."""


def held_out_ranges(size: int, share: float) -> Ranges:
    """Return the held-out ranges: the end of each of many equal stretches of the corpus.

    The end of the corpus alone could be one file, such as a generated table, and no fair sample.

    >>> held_out_ranges(100, 0.1)
    [(90, 100)]
    """
    stretches = max(1, min(MAX_STRETCHES, size // STRETCH))
    borders = np.linspace(0, size, stretches + 1).round().astype(int).tolist()
    return [(end - round((end - start) * share), end) for start, end in itertools.pairwise(borders)]


def rest_of(ranges: Iterable[tuple[int, int]], size: int) -> Ranges:
    """Return the parts of range(size) that are in none of the ranges.

    >>> rest_of([(2, 3), (3, 5)], 6)
    [(0, 2), (5, 6)]
    """
    rest, at = [], 0
    for start, end in ranges:
        if at < start:
            rest.append((at, start))
        at = end
    return [*rest, (at, size)] if at < size else rest


class TokenView:
    """Ranges of tokens of several files, read as one run."""

    def __init__(self, files: Sequence[TokenFile | NDArray[Any]], ranges: Ranges) -> None:
        """Lay out `ranges`, whose numbers count through all `files` in order."""
        sizes = [file.count if isinstance(file, TokenFile) else len(file) for file in files]
        starts = list(itertools.accumulate(sizes, initial=0))
        self._pieces: list[tuple[TokenFile | NDArray[Any], int, int]] = []
        number = 0
        for start, end in ranges:
            while start < end:
                while starts[number + 1] <= start:
                    number += 1
                stop = min(end, starts[number + 1])
                self._pieces.append((files[number], start - starts[number], stop - starts[number]))
                start = stop
        lengths = [end - start for _, start, end in self._pieces]
        self._starts = list(itertools.accumulate(lengths, initial=0))

    def __len__(self) -> int:
        """Return the number of tokens."""
        return self._starts[-1]

    def read(self, start: int, into: NDArray[np.int64]) -> None:
        """Fill `into` with the tokens from number `start` on."""
        number = bisect.bisect_right(self._starts, start) - 1
        done, wanted = 0, len(into)
        while done < wanted:
            file, first, end = self._pieces[number]
            first += start + done - self._starts[number]
            end = min(end, first + wanted - done)
            tokens = file.map() if isinstance(file, TokenFile) else file
            into[done : done + end - first] = tokens[first:end]
            done, number = done + end - first, number + 1


@dataclass(frozen=True)
class Tokens:
    """Tokens of one source, or of several that are mixed by weight."""

    parts: tuple[TokenView, ...]
    weights: tuple[float, ...] = (1.0,)

    @classmethod
    def of(cls, tokens: Tokens | NDArray[Any]) -> Tokens:
        """Wrap an array of tokens as one source; return `Tokens` unchanged."""
        if isinstance(tokens, Tokens):
            return tokens
        return cls((TokenView([tokens], [(0, len(tokens))] if len(tokens) else []),))

    def __len__(self) -> int:
        """Return the number of all tokens; weights play no part."""
        return sum(map(len, self.parts))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """Return all tokens in memory, one source after the other, for small corpora."""
        whole = np.empty(len(self), dtype=np.int64)
        at = 0
        for part in self.parts:
            part.read(0, whole[at : at + len(part)])
            at += len(part)
        return whole if dtype is None else whole.astype(dtype)

    def split(self, sequences: NDArray[np.int64]) -> NDArray[np.int64]:
        """Count the sequences of each source among the first n, for several n.

        Each source has its share at every n, to within a sequence or two, and its count never falls
        when n rises by one. So the source of a sequence is a fixed function of its number.

        Args:
            sequences: the values of n, each >= 0.

        Returns:
            (counts, sources); every row sums to its count.
        """
        rest, columns = sequences, []
        for number, weight in enumerate(self.weights[:-1]):
            share = weight / sum(self.weights[number:])
            mine = np.floor(share * rest + 0.5).astype(np.int64)
            columns.append(mine)
            rest = rest - mine
        return np.stack([*columns, rest], axis=1)


def windows(tokens: Tokens, sources: Sequence[int], starts: Sequence[int], length: int) -> Any:
    """Read sequences of `length` tokens and the one after, as (sequences, length + 1) int64.

    Args:
        tokens: the tokens to read from.
        sources: the source of each sequence.
        starts: its first token's number in that source.
        length: tokens per sequence.
    """
    found = np.empty((len(starts), length + 1), dtype=np.int64)
    for row, source, start in zip(found, sources, starts, strict=True):
        tokens.parts[source].read(start, row)
    return found
