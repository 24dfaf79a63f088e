"""From text to tokens: bytes, or a Hugging Face `tokenizers` file; and a small BPE of one's own."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from telescope.errors import SpecError
from telescope.train.config import BYTES

if TYPE_CHECKING:
    import tokenizers

BYTE_VOCABULARY = 256
END_OF_TEXT = "<|endoftext|>"
"""What ends a document in a tokenizer trained here. Source: GPT-2's vocabulary."""
ENDS_OF_TEXT = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
"""What ends a document in others' tokenizers: the first that the vocabulary has."""
MIN_VOCABULARY = BYTE_VOCABULARY + 2
"""Bytes, the end of text, and a merge."""


@dataclass(frozen=True)
class Tokenizer:
    """What turns documents into token ids."""

    digest: str
    """SHA-256 of the tokenizer's file, 16 hex digits; "bytes" for bytes."""
    vocabulary: int
    """One more than the highest id."""
    encode: Callable[[list[str]], Sequence[Sequence[int]]]
    """The ids of each text."""
    end: tuple[int, ...]
    """The ids that end a document: the end of text, or a newline where there is no such token."""


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer "bytes", or that of a file.

    Raises:
        SpecError: the file cannot be read, is no tokenizer, has no vocabulary, or draws lots.
    """
    if name == BYTES:
        return Tokenizer(BYTES, BYTE_VOCABULARY, _encode_bytes, tuple(b"\n"))
    inner, text = _read(name)
    ids = inner.get_vocab(with_added_tokens=True)
    found = [ids[token] for token in ENDS_OF_TEXT if token in ids]
    newline = inner.encode("\n", add_special_tokens=False).ids

    def encode(texts: list[str]) -> list[list[int]]:
        encoded = inner.encode_batch_fast(texts, add_special_tokens=False)
        return [item.ids for item in encoded]

    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return Tokenizer(digest, max(ids.values()) + 1, encode, tuple(found[:1] or newline))


def vocabulary_size(name: str) -> int:
    """One more than a tokenizer's highest id; see `load_tokenizer`."""
    return load_tokenizer(name).vocabulary


def _encode_bytes(texts: list[str]) -> list[bytes]:
    return [text.encode() for text in texts]


@functools.lru_cache(maxsize=2)
def _parsed(text: str, name: str) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer as HuggingFace

    try:
        inner = HuggingFace.from_str(text)
    except Exception as error:  # the library raises bare Exceptions
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SpecError(
            f"data.tokenizer: {name} is no Hugging Face tokenizers JSON file: {reason}; "
            "`telescope tokenize` makes one"
        ) from error
    # A file may carry them from another use; here a document keeps its length.
    inner.no_truncation()
    inner.no_padding()
    return inner


def _read(name: str) -> tuple[tokenizers.Tokenizer, str]:
    """A tokenizer file, parsed and checked, and its text."""
    try:
        text = Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise SpecError(
            f"data.tokenizer: cannot read {name} ({reason}); give 'bytes', or the path of a "
            "tokenizers JSON file relative to the sweep file"
        ) from error
    inner = _parsed(text, name)
    if not inner.get_vocab(with_added_tokens=True):
        raise SpecError(f"data.tokenizer: {name} has no vocabulary; it has not been trained")
    if getattr(inner.model, "dropout", None):
        raise SpecError(
            f"data.tokenizer: {name} drops merges at random (dropout = {inner.model.dropout:g}); "
            "set its dropout to null"
        )
    return inner, text


def train_bpe(documents: Iterable[str], vocabulary: int) -> str:
    """A byte-level BPE of documents, as a tokenizers JSON text.

    The same documents in the same order give the same text: pairs that are equally frequent are
    merged in the order of their ids.

    Args:
        documents: what to learn the merges from; texts, any length.
        vocabulary: ids, the 256 bytes and the end of text included; fewer where the documents
            have no more pairs that occur twice.

    Raises:
        SpecError: the vocabulary is too small.
    """
    if vocabulary < MIN_VOCABULARY:
        raise SpecError(
            f"--vocab-size: got {vocabulary}, must be at least {MIN_VOCABULARY}: {BYTE_VOCABULARY} "
            "bytes, the end of text, and a merge"
        )
    from tokenizers import Tokenizer as HuggingFace
    from tokenizers import decoders, models, pre_tokenizers, trainers

    inner = HuggingFace(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(documents, trainer)
    return inner.to_str(pretty=True) + "\n"
