"""The formats of `telescope transfer --format`, by name."""

from __future__ import annotations

from collections.abc import Callable

from telescope.errors import SpecError, did_you_mean
from telescope.export.deepspeed import deepspeed, deepspeed_json
from telescope.export.handover import Handover, check_transfer
from telescope.export.hf import hf
from telescope.export.levanter import levanter
from telescope.export.maxtext import maxtext
from telescope.export.megatron import megatron, megatron_bridge
from telescope.export.optax import optax
from telescope.export.torch_file import torch_file
from telescope.export.torchtitan import torchtitan

FORMATS: dict[str, Callable[[Handover], str]] = {
    "torch": torch_file,
    "hf": hf,
    "megatron": megatron,
    "megatron-bridge": megatron_bridge,
    "torchtitan": torchtitan,
    "deepspeed": deepspeed,
    "deepspeed-json": deepspeed_json,
    "optax": optax,
    "maxtext": maxtext,
    "levanter": levanter,
}
"""Format → what writes it. ``json``, the transfer's own, is not among them."""
NAMES = ("json", *FORMATS)


def check_format(name: str) -> None:
    """Refuse a format that does not exist.

    Raises:
        SpecError: in words that have all that do, and the nearest.
    """
    if name not in NAMES:
        near = did_you_mean(name, NAMES)
        raise SpecError(f"--format: got {name!r}, must be one of {', '.join(NAMES)}{near}")


def export(handover: Handover, format: str) -> str:
    """The settings as a trainer's own text.

    Args:
        handover: what is handed over.
        format: one of `FORMATS`.

    Raises:
        RefusedError: the trainer cannot be told these settings.
    """
    check_transfer(handover, format)
    return FORMATS[format](handover)
