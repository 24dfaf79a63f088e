"""The cost of a step: floating-point operations of model, attention and optimizer.

The model is built on the meta device, and torch's own counter counts one forward and backward pass.
So a user's model is counted like ours, and 4B parameters cost no memory. A model that does not run
on meta is counted with tensors that have a real device but no values. Newton–Schulz, which the
counter cannot see, is added from its formula. Elementwise work is not counted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from telescope.config import ModelConfig, OptimizerConfig, TrainConfig
from telescope.errors import ModelError
from telescope.rules.scaling import Role, Tag
from telescope.train.cost import StepCost
from telescope.train.model import (
    blamed_on,
    build_meta,
    build_without_values,
    checked_logits,
    without_values,
)


class _AttentionCounter(TorchFunctionMode):
    """Counts the matrix products of every scaled_dot_product_attention call, forward and backward.

    Forward has two; backward has two for each of them, where gradients are needed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is functional.scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value"), args, strict=False)) | dict(kwargs or {})
            query, key, value = (given[name] for name in ("query", "key", "value"))
            rows = query.numel() // query.shape[-1]
            forward = 2 * rows * key.shape[-2] * (query.shape[-1] + value.shape[-1])
            self.flops += forward * (3 if any(t.requires_grad for t in (query, key, value)) else 1)
        return func(*args, **(kwargs or {}))


def step_cost(
    model: ModelConfig,
    train: TrainConfig,
    optimizer: OptimizerConfig,
    *,
    width: int,
    base_width: int,
) -> StepCost:
    """Count one step of one trial at `width`.

    Raises:
        ModelError: the model file fails, or its forward pass returns the wrong shape.
    """
    widths = {"width": width, "base_width": base_width}
    tagged = build_meta(model, **widths)
    try:
        counted, attention = _counted(model, train, tagged.module, "meta")
    except ModelError:
        counted, attention = _counted_elsewhere(model, train, **widths)
    counts = {n: math.prod(t.shape) for n, t in tagged.tags.items() if not t.role.is_vector}
    tables = _tables(tagged.tags, model.kwargs["vocab_size"])
    shares = _active_shares(model, tagged.module)
    return StepCost(
        parameters=sum(counts.values()),
        embeddings=sum(counts[name] for name in tables),
        active=sum(round(counts[n] * shares.get(n, 1.0)) for n in counts.keys() - tables),
        model=float(counted - attention) * train.batch_size,
        attention=float(attention) * train.batch_size,
        optimizer=_optimizer_flops(tagged.tags, optimizer),
    )


def _tables(tags: Mapping[str, Tag], vocab_size: int) -> set[str]:
    """Return the names of embeddings, and of the readout onto the vocabulary."""
    return {
        name
        for name, tag in tags.items()
        if tag.role in (Role.EMBEDDING, Role.TIED)
        or (tag.role is Role.READOUT and tag.shape[0] == vocab_size)
    }


def _active_shares(config: ModelConfig, module: nn.Module) -> dict[str, float]:
    """Map the parameters of modules that say `active_share` to it: what a token uses of them.

    Raises:
        ModelError: it is no number above 0 and at most 1.
    """
    shares: dict[str, float] = {}
    for name, part in module.named_modules():
        share = getattr(part, "active_share", None)
        if share is None:
            continue
        if not (isinstance(share, (int, float)) and 0 < share <= 1):
            raise ModelError(
                f"{config.name}: {name}: active_share is {share!r}, must be above 0 and at most 1: "
                "the share of a module's parameters that one token uses"
            )
        prefix = f"{name}." if name else ""
        shares |= {f"{prefix}{n}": float(share) for n, _ in part.named_parameters()}
    return shares


def _counted_elsewhere(
    config: ModelConfig, train: TrainConfig, *, width: int, base_width: int
) -> tuple[int, int]:
    """Count as on a CPU or, if that fails too, as on this machine's accelerator; see `_counted`."""
    devices = ["cpu"]
    if torch.accelerator.is_available():
        devices.append(str(torch.accelerator.current_accelerator()))
    for device in devices:
        try:
            with without_values():
                tagged = build_without_values(config, device, width=width, base_width=base_width)
                return _counted(config, train, tagged.module, device)
        except ModelError as error:
            failure = error
    raise failure


def _counted(
    config: ModelConfig, train: TrainConfig, module: nn.Module, device: str
) -> tuple[int, int]:
    """Count the FLOPs of one sequence, forward and backward: of everything, and of attention."""
    counter, attention_counter = FlopCounterMode(display=False), _AttentionCounter()
    with blamed_on(config), counter, attention_counter:
        logits = checked_logits(
            config,
            module,
            sequence_length=train.sequence_length,
            vocab_size=config.kwargs["vocab_size"],
            device=device,
        )
        logits.sum().backward()  # type: ignore[no-untyped-call]
    return counter.get_total_flops(), attention_counter.flops


def _optimizer_flops(tags: dict[str, Tag], config: OptimizerConfig) -> float:
    """Return the FLOPs of Newton–Schulz over all hidden matrices; AdamW has no matrix products."""
    if config.name != "muon":
        return 0.0
    hidden = (tag.shape for tag in tags.values() if tag.role.is_hidden)
    return sum(newton_schulz_flops(shape, config.ns_steps) for shape in hidden)


def newton_schulz_flops(shape: tuple[int, ...], steps: int) -> float:
    """Return the FLOPs of orthogonalising one matrix, or a stack of them.

    With n the smaller side and m the larger, a step is X·Xᵀ (2n²m), its square (2n³) and the
    product with X (2n²m): 4n²m + 2n³.

    >>> newton_schulz_flops((16, 16), steps=5) == 5 * 6 * 16**3
    True
    """
    n, m = sorted(shape[-2:])
    return float(math.prod(shape[:-2]) * steps * (4 * n**2 * m + 2 * n**3))
