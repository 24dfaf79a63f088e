"""Memory of a target run's fullest rank, counted before it starts.

The model is built without memory, and torch says which tensors it would save for the backward pass.
Counted are parameters, gradients, optimizer state and saved tensors: all that grows with the run,
without the allocator's spare memory and the libraries' own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from telescope.config import TrialConfig
from telescope.records import Point
from telescope.rules.groups import parameter_groups
from telescope.target.layers import layers_of, recompute_layers
from telescope.target.sharding import partition
from telescope.train.loop import token_loss
from telescope.train.model import TaggedModel, build_without_values, without_values

FP32 = 4
"""Bytes of a weight, a gradient, and a number of optimizer state."""


@dataclass(frozen=True)
class Needs:
    """Bytes on the fullest rank."""

    parameters: int
    gradients: int
    optimizer_state: int
    casts: int
    """Copies of the weights in bf16, which autocast keeps for the backward pass."""
    per_sequence: int
    """Saved for the backward pass of each sequence of a micro-batch."""
    per_sequence_recomputed: int | None
    """The same with `--activation-checkpointing`; None for a model without a list of layers."""


def needs_of(config: TrialConfig, *, width: int, point: Point, ranks: int) -> Needs:
    """Count the memory of a rank, with the state divided and the rest on every rank (ZeRO-1).

    Args:
        config: the training, with the target's precision.
        width: the target's.
        point: any; its values change nothing.
        ranks: number of ranks.

    Raises:
        ModelError: the model's forward pass asks for values.
    """
    with without_values():
        tagged = _built(config, width)
        fixed, per_sequence = _saved(config, tagged)
        recomputed = _recomputed(config, width, per_sequence)
    groups = parameter_groups(tagged.tags, point, config.optimizer)
    loads = [0] * ranks
    for piece in partition(groups, ranks):
        loads[piece.owner] += piece.cost
    count = sum(p.numel() for p in tagged.module.parameters())
    trained = sum(p.numel() for p in tagged.module.parameters() if p.requires_grad)
    return Needs(count * FP32, trained * FP32, max(loads) * FP32, fixed, per_sequence, recomputed)


def _built(config: TrialConfig, width: int) -> TaggedModel:
    return build_without_values(config.model, "cpu", width=width, base_width=config.base_width)


def _recomputed(config: TrialConfig, width: int, whole: int) -> int | None:
    """Return the bytes per sequence if layers are computed again: all inputs, and one layer's."""
    model = _built(config, width)
    layers = [m for m in model.module.modules() if isinstance(m, nn.ModuleList)]
    if not layers:
        return None
    recompute_layers(model.module)
    _, inputs = _saved(config, model)
    return inputs + max(0, whole - inputs) // len(layers_of(model.module, ""))


def _saved(config: TrialConfig, model: TaggedModel) -> tuple[int, int]:
    """Return the bytes saved in a forward pass: those of any batch, and those of each sequence."""
    one, two = (_saved_for(config, model.module, sequences) for sequences in (1, 2))
    return one - (two - one), two - one


def _saved_for(config: TrialConfig, model: nn.Module, sequences: int) -> int:
    # Autocast leaves a norm's gain in fp32 on purpose; torch warns of it.
    warnings.filterwarnings("ignore", "Mismatch dtype between input and weight", UserWarning)
    own = {id(p) for p in model.parameters()} | {id(b) for b in model.buffers()}
    found: dict[int, Tensor] = {}  # keeps them alive, so that no two have one identity

    def note(tensor: Tensor) -> Tensor:
        base = tensor if tensor._base is None else tensor._base
        if id(base) not in own:
            found[id(base)] = base
        return tensor

    tokens = torch.zeros(sequences, config.train.sequence_length, dtype=torch.int64)
    with saved_tensors_hooks(note, lambda tensor: tensor), _FusedAttention():
        loss = token_loss(model, tokens, tokens, config.train.precision)
    assert loss.ndim == 0
    return sum(tensor.numel() * tensor.element_size() for tensor in found.values())


class _Attention(torch.autograd.Function):
    """Saves what fused attention saves: its inputs, its output, and a number per row."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return a tensor of the output's shape."""
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        rows = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, rows)
        return output


class _FusedAttention(TorchFunctionMode):
    """Takes the place of attention, whose form for CPUs without values keeps all its weights."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        call: Callable[..., Any] = func
        if func is functional.scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value"), args, strict=False)) | dict(kwargs or {})
            inputs = given["query"], given["key"], given["value"]
            return _Attention.apply(*inputs)  # type: ignore[no-untyped-call]
        return call(*args, **(kwargs or {}))
