"""A model's layers: computed again in the backward pass, or divided over the ranks one by one."""

from __future__ import annotations

import functools

from torch import nn
from torch.utils.checkpoint import checkpoint

from telescope.errors import ModelError


def layers_of(model: nn.Module, option: str) -> list[nn.Module]:
    """Return the members of the outermost lists of modules: a transformer's blocks.

    Args:
        model: the model.
        option: the option that needs them, for the message.

    Raises:
        ModelError: the model has no list of modules.
    """
    found: list[nn.Module] = []
    below = [model]
    while below:
        for child in below.pop().children():
            if isinstance(child, nn.ModuleList):
                found += list(child)
            else:
                below.append(child)
    if not found:
        raise ModelError(
            f"{option}: the model has no nn.ModuleList of layers, on which it works; keep the "
            "layers in one, or leave the option out"
        )
    return found


def recompute_layers(model: nn.Module) -> None:
    """Let each layer keep only its inputs for the backward pass, and compute the rest again.

    Raises:
        ModelError: the model has no list of modules.
    """
    for layer in layers_of(model, "--activation-checkpointing"):
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
