"""The content of a target run's `run.json`: all that its losses depend on, as plain data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from telescope.config import TrialConfig
from telescope.records import Trial, as_plain

SCHEMA = 1
"""Version of `run.json` and `result.json`."""
NO_LOSS = ("evals", "checkpoint_every", "timeout")
"""Keys of [train] that change no loss."""
NO_TOKEN = ("source", "sources", "format", "field", "dtype", "tokenizer", "duplicates")
"""Keys of [data] that say where the tokens come from; their hash says which they are."""


@dataclass(frozen=True, kw_only=True)
class TargetRun:
    """A target run that telescope trains itself."""

    sweep: str
    """Name of the sweep that gave the settings."""
    trial: Trial
    """Width, point (base-width units, weight decay for the run's own steps) and seed."""
    config: TrialConfig
    """The training, as a trial of the sweep has it, with the target's steps and batch."""
    clip: float = 0.0
    """Largest norm of all gradients together; 0: they are not clipped."""
    flops: Mapping[str, float] = field(default_factory=dict)
    """FLOPs of one step: model, attention, optimizer."""
    parameters: int = 0
    """Parameters in matrices and tables."""
    groups: tuple[Mapping[str, Any], ...] = ()
    """The optimizers' groups, as `telescope transfer --json` has them."""
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.config.train.steps

    @property
    def identity(self) -> dict[str, Any]:
        """Dotted key → value of all that the losses depend on."""
        config = self.config.as_dict()
        del config["model"]["name"]
        config["model"]["text"] = f"hash {self.config.model.digest}"
        for table, keys in (("train", NO_LOSS), ("data", NO_TOKEN)):
            for key in keys:
                del config[table][key]
        return dict(_flat({**self.trial.as_dict(), "clip": self.clip, **config}))

    @property
    def fingerprint(self) -> str:
        """Hash of `identity`."""
        text = json.dumps(self.identity, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def as_dict(self) -> dict[str, Any]:
        """Return the content of `run.json`."""
        own: dict[str, Any] = as_plain({k: v for k, v in asdict(self).items() if k != "config"})
        trial = own.pop("trial") and self.trial.as_dict()
        return {
            "schema": SCHEMA,
            "sweep": own.pop("sweep"),
            **trial,
            "steps": self.steps,
            "tokens": self.config.train.tokens,
            **own,
            "config": self.config.as_dict(),
            "fingerprint": self.fingerprint,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TargetRun:
        """Rebuild a run from `as_dict`.

        Raises:
            KeyError, TypeError, ValueError: it is damaged, or of another schema.
        """
        if data["schema"] != SCHEMA:
            raise ValueError(f"schema {data['schema']!r}, this version reads {SCHEMA}")
        return cls(
            sweep=data["sweep"],
            trial=Trial.from_dict(data),
            config=TrialConfig.from_dict(data["config"]),
            clip=float(data["clip"]),
            flops=data["flops"],
            parameters=data["parameters"],
            groups=tuple(data["groups"]),
            versions=data["versions"],
        )

    def differences(self, other: TargetRun) -> list[str]:
        """Return the keys that differ in another run, with both values: "clip: 0.0, now 1.0"."""
        mine, its = self.identity, other.identity
        return [
            f"{key}: {mine.get(key)}, now {its.get(key)}"
            for key in dict.fromkeys((*mine, *its))
            if mine.get(key) != its.get(key)
        ]


@dataclass(frozen=True, kw_only=True)
class Manner:
    """The manner of a run; it may change from one start to the next, and changes only rounding."""

    device: str = "auto"
    threads: int = 1
    """Threads of a rank on a CPU."""
    micro_batch: int = 0
    """Most sequences of a rank's forward pass; gradients are accumulated. 0: all of its rows."""
    checkpoint_every: int = 0
    """Steps between two checkpoints; 0: a twentieth of the run, at most `MOST_BETWEEN`."""
    activation_checkpointing: bool = False
    """Layers keep only their inputs for the backward pass, and compute the rest again."""
    shard: bool = False
    """Parameters and gradients are divided over the ranks too, by torch's FSDP2."""
    keep_every: int = 0
    """Checkpoints at multiples of this many steps are kept for good; 0: only the last ones."""

    def fitted(self, steps: int) -> Manner:
        """Return it with the number of steps between two checkpoints of a run of `steps`."""
        every = self.checkpoint_every or min(max(1, steps // 20), MOST_BETWEEN)
        return replace(self, checkpoint_every=every)


MOST_BETWEEN = 1000
"""Most steps between two checkpoints, unless asked for."""


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested tables to dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
