"""The configuration of one training run: the spec's tables as the trainer takes them.

They are plain dataclasses, so that the trainer runs where pydantic is not installed;
`telescope.spec.spec` fills and type-checks them. Ranges are checked here, in messages that start
with the key.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field, fields
from os.path import splitext
from typing import Any, ClassVar, Literal

from telescope.errors import SpecError
from telescope.records import as_plain

ADAMW_RULES = ("mup", "standard")

TRAINER_AXES = ("lr", "weight_decay", "warmup", "init_scale", "adamw_lr_ratio")
"""The hyperparameters that the built-in trainer can sweep.

warmup and adamw_lr_ratio replace their key. init_scale multiplies every standard deviation at
initialisation, by the same factor at every width; it is 1 if it is not an axis.
"""
ADAMW_AXES = TRAINER_AXES[:-1]
"""The axes that have an effect when AdamW trains everything."""

MUON_ONLY = frozenset(("adamw_lr_ratio", "momentum", "nesterov", "ns", "ns_steps", "ns_dtype"))
"""Keys of [optimizer] that AdamW does not have."""

CARE_KEYS = ("checkpoint_every", "timeout")
"""Keys of [train] that change no loss and are not part of the fingerprint."""

ADDED_KEYS = {"train.precision": "fp32", "train.compile": False}
"""Keys added after the first sweeps → the value that these were trained with. A key with this value
is not part of the fingerprint, so that older results stay comparable."""

PYTHON_STDLIB = "python-stdlib"
"""The corpus that every machine has: the source of Python's standard library."""

BYTES = "bytes"
"""The default tokenizer: a token is a byte."""

Format = Literal["auto", "text", "jsonl", "parquet", "raw", "llm.c", "megatron"]
TOKEN_FORMATS = ("raw", "llm.c", "megatron")
KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".bin": "tokens",
    ".idx": "tokens",
}
"""Suffix → content of the file. Other suffixes mean text."""

STRICT: dict[str, Any] = {"extra": "forbid", "strict": True}
"""Settings of pydantic, where it is installed, for these classes: no unknown key, no conversion."""


MAX_COUNT = 10**12
"""Largest count of steps, sequences, tokens and the like. Products of such counts fit a float; a
larger count is a mistake."""
MAX_WIDTH = 10**8
"""Largest width; torch can still hold the byte count of a matrix four times as wide."""
MAX_NUMBER = 1e30
"""Largest number in a spec; its inverse is the smallest. Beyond them, products overflow."""
MAX_SECONDS = 1e8
"""Longest time limit, three years; the operating system's clocks end not far beyond."""
SHOWN = 60
"""Most characters of a value in a message."""


_faults: ContextVar[dict[str, str] | None] = ContextVar("faults", default=None)
"""Key → its fault, while faults are collected; else None."""


def require(condition: bool, key: str, got: object, allowed: str) -> None:
    """Raise a one-line `SpecError` naming the key, what was given and what is allowed."""
    if condition:
        return
    fault, faults = f"{key}: got {shown(got)}, must be {allowed}", _faults.get()
    if faults is None:
        raise SpecError(fault)
    faults.setdefault(key, fault)


@contextmanager
def all_faults() -> Iterator[None]:
    """Collect the faults found by `require` and raise them together, the first one of each key.

    Other exceptions are dropped if there are faults: an earlier failed check has caused them.
    """
    faults: dict[str, str] = {}
    token = _faults.set(faults)
    try:
        yield
    except SpecError as error:
        raise SpecError(*faults.values(), *error.faults) from None
    except Exception:
        if not faults:
            raise
    finally:
        _faults.reset(token)
    if faults:
        raise SpecError(*faults.values())


def shown(value: object) -> str:
    """Format a value for a message, cut if it is long."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def require_count(key: str, count: int, least: int = 1, allowed: str = "") -> None:
    """Check that a count is at least `least` and at most `MAX_COUNT`."""
    require(count >= least, key, count, allowed or f"an integer >= {least}")
    require(count <= MAX_COUNT, key, count, f"an integer <= {MAX_COUNT:,}")


def require_factor(key: str, number: float) -> None:
    """Check that a factor is finite, positive and within `MAX_NUMBER`."""
    require(math.isfinite(number) and number > 0, key, number, "a finite number > 0")
    within = 1 / MAX_NUMBER <= number <= MAX_NUMBER
    require(within, key, number, f"from {1 / MAX_NUMBER:g} to {MAX_NUMBER:g}")


def require_seconds(key: str, seconds: float) -> None:
    """Check a time limit in seconds."""
    allowed = "a finite number of seconds, or 0 for no limit"
    require(0 <= seconds < math.inf, key, seconds, allowed)
    require(seconds <= MAX_SECONDS, key, seconds, f"at most {MAX_SECONDS:g} s, or 0 for no limit")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A model file's text and the keyword arguments of its `build`."""

    name: str
    """The file's name, for messages: ``gpt.py``."""
    text: str = field(repr=False)
    """The file's whole source, which workers execute; part of the fingerprint."""
    kwargs: Mapping[str, Any]
    """Keyword arguments of `build` besides the width; `vocab_size` included."""

    @property
    def digest(self) -> str:
        """SHA-256 of the text, 16 hex digits."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Table ``[optimizer]``."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    name: Literal["muon", "adamw"] = "muon"
    """Optimizer of the hidden matrices; AdamW trains everything else."""
    rule: Literal["mup", "paper", "moonlight", "standard"] = "mup"
    """Width rule of learning rate and decay, see `telescope.rules.scaling`."""
    adamw_lr_ratio: float = 1.0
    """Muon only: AdamW's learning rate on all other parameters, as a multiple of lr."""
    momentum: float = 0.95
    """Muon only. Source: arXiv 2502.16982."""
    nesterov: bool = True
    """Muon only."""
    ns: Literal["jordan", "polar-express"] = "jordan"
    """Muon only: Newton–Schulz coefficients, torch's own or arXiv 2505.16932's. They shift the
    effective learning rate slightly: choose before the sweep."""
    ns_steps: int = 5
    """Muon only: Newton–Schulz steps. Source: `torch.optim.Muon`."""
    ns_dtype: Literal["bf16", "fp32"] = "bf16"
    """Muon only: arithmetic of Newton–Schulz; torch's own is bf16."""
    betas: tuple[float, float] = (0.95, 0.95)
    """AdamW's decay rates of its averages. Source: arXiv 2505.02222, App. H."""
    eps: float = 1e-8
    """AdamW's denominator term."""

    @all_faults()
    def __post_init__(self) -> None:
        """Check ranges, and that no key is set that this optimizer would ignore."""
        if self.name == "adamw":
            require(self.rule in ADAMW_RULES, "rule", self.rule, f"one of {ADAMW_RULES} for adamw")
            for item in fields(self):
                if item.name in MUON_ONLY:
                    value = getattr(self, item.name)
                    require(value == item.default, item.name, value, "left out for adamw")
        require_factor("adamw_lr_ratio", self.adamw_lr_ratio)
        require(0 <= self.momentum < 1, "momentum", self.momentum, "in [0, 1)")
        require(1 <= self.ns_steps < 100, "ns_steps", self.ns_steps, "an integer from 1 to 99")
        require(all(0 <= b < 1 for b in self.betas), "betas", self.betas, "two numbers in [0, 1)")
        require(0 < self.eps < 1, "eps", self.eps, "in (0, 1)")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Table ``[train]``: the same at every width."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    steps: int
    """Optimizer steps."""
    batch_size: int
    """Sequences per step."""
    sequence_length: int
    """Tokens per sequence."""
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    """After warm-up: cosine to `final_lr`, constant, or constant then linear decay."""
    warmup: float = 0.1
    """Share of the steps with a linearly rising learning rate. Assumption."""
    final_lr: float = 0.1
    """The last learning rate as a share of the peak. Source: arXiv 2505.02222, App. H."""
    decay: float = 0.2
    """Schedule wsd only: share of the steps that decay at the end. Assumption."""
    evals: int = 1
    """Number of measurements of the held-out loss, evenly spaced; the last one is at the end."""
    checkpoint_every: int = 0
    """Steps between two checkpoints, from which a killed trial resumes; 0: none."""
    timeout: float = 0.0
    """Seconds after which a trial that is still running counts as hung and fails; 0: never."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of forward and backward. bf16 is torch's autocast; weights, optimizer and loss
    stay in fp32. It is the same at every width, because losses are compared."""
    compile: bool = False
    """Run a step's forward and backward through torch.compile."""

    @all_faults()
    def __post_init__(self) -> None:
        """Check ranges."""
        allowed = "a number of steps, or 0 for none"
        require_count("checkpoint_every", self.checkpoint_every, 0, allowed)
        require_seconds("timeout", self.timeout)
        for key in ("steps", "batch_size", "sequence_length", "evals"):
            require_count(key, getattr(self, key))
        for key in ("warmup", "final_lr", "decay"):
            require(0 <= getattr(self, key) <= 1, key, getattr(self, key), "a share in [0, 1]")
        fits = self.evals <= max(1, self.steps)
        require(fits, "evals", self.evals, f"at most steps ({self.steps})")

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one batch."""
        return self.batch_size * self.sequence_length

    @property
    def tokens(self) -> int:
        """Tokens of one trial."""
        return self.steps * self.tokens_per_step


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One table of ``[[data.sources]]``: files of one format, and their share of every batch."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    source: str | tuple[str, ...]
    """``python-stdlib``, or paths and globs of files."""
    weight: float = 1.0
    """Share of the sequences, next to the other sources' weights; they need not sum to 1."""
    format: Format = "auto"
    """Kind of the files; auto goes by their suffix, and for ``.bin`` by its first bytes. "text"
    takes the bytes as they are, even where they do not look like text."""
    field: str = "text"
    """JSONL and Parquet only: the field, or column, with the text."""
    dtype: Literal["uint16", "uint32"] | None = None
    """Raw ``.bin`` only: the type of a token, which such a file does not say."""

    @all_faults()
    def __post_init__(self) -> None:
        """Check ranges, and that no key is set which this format would ignore."""
        require_factor("weight", self.weight)
        kinds = {_kind(pattern, self.format) for pattern in self.patterns}
        allowed = "files of one format; give each format its own table [[data.sources]]"
        require(len(kinds) < 2, "source", list(self.patterns), allowed)
        if self.kind not in ("jsonl", "parquet"):
            allowed = f"left out for {self.kind}"
            require(self.field == "text", "field", self.field, allowed)
        if self.format == "raw":
            allowed = "'uint16' (nanoGPT's) or 'uint32' for format raw, which does not say it"
            require(self.dtype is not None, "dtype", self.dtype, allowed)
        elif self.kind != "tokens" or self.format != "auto":
            allowed = f"left out for {self.kind if self.format == 'auto' else self.format}"
            require(self.dtype is None, "dtype", self.dtype, allowed)

    @property
    def patterns(self) -> tuple[str, ...]:
        """The paths and globs."""
        return (self.source,) if isinstance(self.source, str) else self.source

    @property
    def kind(self) -> str:
        """Content of the files: "text", "jsonl", "parquet" or "tokens"."""
        return _kind(self.patterns[0] if self.patterns else "", self.format)


def _kind(path: str, format: str) -> str:
    """Return the content of a file, by its suffix if the format is auto."""
    if format != "auto":
        return "tokens" if format in TOKEN_FORMATS else format
    return KINDS.get(splitext(path)[1].lower(), "text")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Table ``[data]``, its paths resolved."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    source: str | tuple[str, ...] | None = None
    """``python-stdlib``, or paths and globs of files of one format."""
    format: Format = "auto"
    """Format of the files. auto decides by suffix, and for ``.bin`` by the first bytes. "text"
    takes the bytes as they are, even if they do not look like text."""
    field: str = "text"
    """JSONL and Parquet only: the field, or column, with the text."""
    dtype: Literal["uint16", "uint32"] | None = None
    """Raw ``.bin`` only: the type of a token, which the file itself does not state."""
    sources: tuple[SourceConfig, ...] = ()
    """Several sources in place of `source`, each a table, mixed by weight."""
    tokenizer: str | None = None
    """"bytes", or the path of a Hugging Face `tokenizers` JSON file. The default is bytes for text,
    and none for shards of tokens."""
    held_out: float = 0.05
    """Share of every source, in many passages spread over it, that is never trained on."""
    eval_tokens: int = 16384
    """Number of held-out tokens that a loss is measured on; the same ones every time."""

    duplicates: Literal["refuse", "drop"] = "refuse"
    """Treatment of a file that is an exact copy of another one."""

    @all_faults()
    def __post_init__(self) -> None:
        """Check the ranges and the combination of sources."""
        require(0 < self.held_out < 1, "held_out", self.held_out, "a share in (0, 1)")
        require_count("eval_tokens", self.eval_tokens)
        if self.sources:
            for key, default in (("source", None), ("format", "auto"), ("field", "text")):
                allowed = "left out beside sources, whose tables have it"
                require(getattr(self, key) == default, key, getattr(self, key), allowed)
            require(self.dtype is None, "dtype", self.dtype, "left out beside sources")
        else:
            allowed = "given: python-stdlib, or paths and globs; or tables [[data.sources]]"
            require(self.source is not None, "source", self.source, allowed)
        kinds = {part.kind for part in self.parts}
        if "tokens" in kinds and len(kinds) > 1:
            allowed = "given, for the shards of tokens are mixed with text: 'bytes' or a path"
            require(self.tokenizer is not None, "tokenizer", self.tokenizer, allowed)
        elif "tokens" in kinds:
            allowed = "left out for shards of tokens, or the path of the tokenizer that made them"
            require(self.tokenizer != BYTES, "tokenizer", self.tokenizer, allowed)

    @property
    def parts(self) -> tuple[SourceConfig, ...]:
        """The sources; the short form counts as one."""
        if self.sources or self.source is None:
            return self.sources
        return (
            SourceConfig(
                source=self.source, format=self.format, field=self.field, dtype=self.dtype
            ),
        )

    @property
    def tokenizer_name(self) -> str | None:
        """ "bytes", a tokenizer's path, or None for tokens made by an unknown tokenizer."""
        if self.tokenizer is None and any(part.kind != "tokens" for part in self.parts):
            return BYTES
        return self.tokenizer


@dataclass(frozen=True, kw_only=True)
class TrialConfig:
    """Everything that a worker needs to train any trial of a sweep."""

    model: ModelConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    data: DataConfig
    base_width: int
    corpus_digest: str
    """SHA-256 of the driver's corpus; a worker with another corpus refuses to train."""
    device: str = "auto"
    threads: int = 1
    threads_at: Mapping[int, int] = field(default_factory=dict)
    """Width → threads, if they depend on the width."""
    flops_per_step: Mapping[int, float] = field(default_factory=dict)
    """Width → floating-point operations of one step, as planned by the driver."""
    checkpoint_folder: str | None = None
    """Folder of the trials' checkpoints; every worker that can read it can resume any trial."""
    row_folder: str | None = None
    """Folder of the curves of running trials; a worker that sees no such folder writes none."""

    def as_dict(self) -> dict[str, Any]:
        """The form that JSON takes, without the machine: device, threads and folders."""
        tables = {
            key: asdict(getattr(self, key)) for key in ("model", "optimizer", "train", "data")
        }
        own = {"base_width": self.base_width, "corpus_digest": self.corpus_digest}
        plain: dict[str, Any] = as_plain(tables | own)
        return plain

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TrialConfig:
        """Rebuild a configuration from `as_dict`.

        Raises:
            KeyError, TypeError: a key is missing or unknown.
            SpecError: a value is out of range.
        """
        data_table = _with_tuples(data["data"])
        sources = tuple(SourceConfig(**_with_tuples(table)) for table in data_table["sources"])
        return cls(
            model=ModelConfig(**data["model"]),
            optimizer=OptimizerConfig(**_with_tuples(data["optimizer"])),
            train=TrainConfig(**data["train"]),
            data=DataConfig(**{**data_table, "sources": sources}),
            base_width=data["base_width"],
            corpus_digest=data["corpus_digest"],
        )


def _with_tuples(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return a table with tuples where JSON has lists."""
    return {key: tuple(v) if isinstance(v, list) else v for key, v in table.items()}
