"""Tokenizers: bytes, or a Hugging Face `tokenizers` file; and the training of a small BPE."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from telescope.config import BYTES
from telescope.errors import SpecError

if TYPE_CHECKING:
    import tokenizers

BYTE_VOCABULARY = 256
END_OF_TEXT = "<|endoftext|>"
"""Token at the end of a document, for a tokenizer trained here. Source: GPT-2's vocabulary."""
ENDS_OF_TEXT = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
"""Tokens that end a document in other tokenizers; the first one in the vocabulary is used."""
NEVER_IN_TEXT = "ÿ"
"""Byte-level name of byte 255, which no UTF-8 text contains: an end of text for bytes."""
MIN_VOCABULARY = BYTE_VOCABULARY + 2
"""Bytes, the end of text, and a merge."""


@dataclass(frozen=True)
class Tokenizer:
    """An encoder of documents into token ids."""

    digest: str
    """SHA-256 of the tokenizer's file, 16 hex digits; "bytes" for bytes."""
    vocabulary: int
    """One more than the highest id."""
    encode: Callable[[list[str]], Sequence[Sequence[int]]]
    """Function from texts to the ids of each."""
    end: tuple[int, ...]
    """Ids at the end of a document: the end-of-text token or, without one, a newline."""


def load_tokenizer(name: str) -> Tokenizer:
    """Load the tokenizer "bytes", or that of a file.

    Raises:
        SpecError: the file cannot be read, is not a tokenizer, has no vocabulary, or encodes at
            random (dropout).
    """
    if name == BYTES:
        return Tokenizer(BYTES, BYTE_VOCABULARY, _encode_bytes, tuple(b"\n"))
    inner, text = _read(name)
    ids = inner.get_vocab(with_added_tokens=True)
    found = [ids[token] for token in ENDS_OF_TEXT if token in ids]
    losses = _Losses(inner, name)

    def encode(texts: list[str]) -> list[list[int]]:
        losses.check(texts)
        try:
            encoded = inner.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:  # the library raises bare Exceptions
            raise _no_token(inner, name, texts, error) from error
        return [item.ids for item in encoded]

    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return Tokenizer(digest, max(ids.values()) + 1, encode, tuple(found[:1] or _newline(inner)))


@dataclass(frozen=True)
class PortableTokenizer:
    """A tokenizer for other programs: a `tokenizers` JSON text that encodes as `encode` here."""

    text: str
    """The JSON. It adds no tokens to a text, truncates nothing and pads nothing."""
    vocabulary: int
    """One more than the highest id."""
    digest: str
    """As `Tokenizer.digest`."""
    end: tuple[str, int] | None
    """Token and id at the end of a document; None if the vocabulary has no token for it."""
    unknown: str | None
    """Token for text without a token of its own, if there is one."""
    is_bytes: bool
    """True if a token is a byte: then a text cannot have a special token in it."""


def portable_tokenizer(name: str) -> PortableTokenizer:
    """Return the tokenizer "bytes", or that of a file, for other programs.

    Bytes become a byte-level BPE without merges whose ids are the bytes. Their end of text is a
    byte that occurs in no text, so a model trained on bytes never ends a text by itself.

    Raises:
        SpecError: as `load_tokenizer`.
    """
    if name == BYTES:
        never = (NEVER_IN_TEXT, BYTE_VOCABULARY - 1)
        return PortableTokenizer(_bytes_as_bpe(), BYTE_VOCABULARY, BYTES, never, None, True)
    loaded = load_tokenizer(name)
    inner, _ = _read(name)
    ids = inner.get_vocab(with_added_tokens=True)
    end = next(((token, ids[token]) for token in ENDS_OF_TEXT if token in ids), None)
    # It would add tokens such as [CLS], which trained texts have not.
    data = {**json.loads(inner.to_str()), "post_processor": None}
    text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
    unknown = getattr(inner.model, "unk_token", None)
    return PortableTokenizer(text, loaded.vocabulary, loaded.digest, end, unknown, False)


def _bytes_as_bpe() -> str:
    """Return a byte-level BPE without merges, in which a byte's id is its value."""
    from tokenizers import Tokenizer as HuggingFace
    from tokenizers import decoders, models, pre_tokenizers

    names = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    ids = {_byte_level_name(byte): byte for byte in range(BYTE_VOCABULARY)}
    inner = HuggingFace(models.BPE(vocab=ids, merges=[]))
    inner.pre_tokenizer, inner.decoder = names, decoders.ByteLevel()
    return str(inner.to_str(pretty=True)) + "\n"


def _byte_level_name(byte: int) -> str:
    """Return the character that stands for a byte in a byte-level vocabulary, as GPT-2 defined it.

    >>> [_byte_level_name(byte) for byte in (0, 32, 65, 127, 173, 255)]
    ['Ā', 'Ġ', 'A', 'ġ', 'Ń', 'ÿ']
    """
    plain = [*range(33, 127), *range(161, 173), *range(174, BYTE_VOCABULARY)]
    others = [other for other in range(BYTE_VOCABULARY) if other not in plain]
    return chr(byte) if byte in plain else chr(BYTE_VOCABULARY + others.index(byte))


def _newline(inner: tokenizers.Tokenizer) -> list[int]:
    """Return the ids of a newline; none if the tokenizer drops it or has no token for it."""
    try:
        return list(inner.encode("\n", add_special_tokens=False).ids)
    except Exception:  # the library raises bare Exceptions
        return []


def _pieces(inner: tokenizers.Tokenizer, text: str) -> list[str]:
    """Normalise a text and split it into words, as the tokenizer does before its model."""
    plain = inner.normalizer.normalize_str(text) if inner.normalizer else text
    if inner.pre_tokenizer is None:
        return [plain] if plain else []
    return [piece for piece, _ in inner.pre_tokenizer.pre_tokenize_str(plain)]


def _no_token(
    inner: tokenizers.Tokenizer, name: str, texts: Sequence[str], error: Exception
) -> SpecError:
    """Return the error for texts that a tokenizer cannot encode; name the piece without a token."""
    for piece in (piece for text in texts for piece in _pieces(inner, text)):
        try:
            inner.model.tokenize(piece)
        except Exception:  # the library raises bare Exceptions
            return _unknown(name, piece)
    return SpecError(f"data.tokenizer: {name} cannot encode the text: {str(error).splitlines()[0]}")


def _unknown(name: str, piece: str, word: str = "") -> SpecError:
    """Return the error for a piece of text without a token; `word` is the word around it."""
    shown, inside = (repr(text if len(text) <= 40 else f"{text[:40]}…") for text in (piece, word))
    where = f" in {inside}" if word not in ("", piece) else ""
    return SpecError(
        f"data.tokenizer: {name} has no token for {shown}{where}, and no unknown token in its "
        "vocabulary (unk_token); add one, or take a byte-level tokenizer (`telescope tokenize` "
        "makes one)"
    )


class _Losses:
    """Finds characters that a BPE would drop silently because it has no token for them."""

    def __init__(self, inner: tokenizers.Tokenizer, name: str) -> None:
        from tokenizers import models

        self._inner, self._name, model = inner, name, inner.model
        self._tokens = inner.get_vocab(with_added_tokens=True)
        self._added = [token.content for token in inner.get_added_tokens_decoder().values()]
        self._can_lose = False
        if isinstance(model, models.BPE):
            self._can_lose = model.unk_token is None and not self._has_every_byte(model)
            self._prefix = model.continuing_subword_prefix or ""
            self._suffix = model.end_of_word_suffix or ""
            self._whole_words = bool(model.ignore_merges)

    def _has_every_byte(self, model: tokenizers.models.BPE) -> bool:
        """Tell whether a model works on bytes, or falls back to them, and has a token for each."""
        from tokenizers import pre_tokenizers

        bytes_ = list[str]()
        if model.byte_fallback:
            bytes_ = [f"<0x{byte:02X}>" for byte in range(BYTE_VOCABULARY)]
        elif "ByteLevel" in repr(self._inner.pre_tokenizer):
            bytes_ = pre_tokenizers.ByteLevel.alphabet()
        return bool(bytes_) and all(byte in self._tokens for byte in bytes_)

    def check(self, texts: Sequence[str]) -> None:
        """Check that every character of some texts has a token.

        Raises:
            SpecError: a character has none; the message names it.
        """
        for text in texts if self._can_lose else ():
            plain = functools.reduce(lambda left, token: left.replace(token, ""), self._added, text)
            words = set(_pieces(self._inner, plain))
            if self._whole_words:
                words -= self._tokens.keys()
            for word in sorted(words):
                for place, character in enumerate(word):
                    prefix = self._prefix if place else ""
                    suffix = self._suffix if place == len(word) - 1 else ""
                    if f"{prefix}{character}{suffix}" not in self._tokens:
                        raise _unknown(self._name, character, word)


def vocabulary_size(name: str) -> int:
    """Return one more than a tokenizer's highest id; see `load_tokenizer`."""
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
    # A file may still have these from another use; here documents keep their length.
    inner.no_truncation()
    inner.no_padding()
    return inner


def _read(name: str) -> tuple[tokenizers.Tokenizer, str]:
    """Read, parse and check a tokenizer file; return it with its text."""
    try:
        text = Path(name).read_text(encoding="utf-8-sig")
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
    """Train a byte-level BPE on documents; return it as a tokenizers JSON text.

    The same documents in the same order give the same text: equally frequent pairs are merged in
    the order of their ids.

    Args:
        documents: the texts to learn the merges from, of any length.
        vocabulary: number of ids, with the 256 bytes and the end of text; there are fewer if the
            documents have no more pairs that occur twice.

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
