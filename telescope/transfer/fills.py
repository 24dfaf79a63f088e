"""Finds how parameters start that are built on the meta device, where tensors have no values.

What is written there can still be watched: `torch.ones`, `nn.init.zeros_` and their like fill a
whole tensor with one number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode  # documented, but under no public name

from telescope.rules.scaling import Start, layer_biases, vector_start

NUMBERS = {
    # operation: the number that it writes
    "aten::zeros": 0.0,
    "aten::zeros_like": 0.0,
    "aten::new_zeros": 0.0,
    "aten::zero_": 0.0,
    "aten::ones": 1.0,
    "aten::ones_like": 1.0,
    "aten::new_ones": 1.0,
}
PLACES = {"aten::full": 1, "aten::full_like": 1, "aten::new_full": 2, "aten::fill_": 1}
"""Operation → the place of its argument that is the number."""
COPIES = {"aten::clone": 0, "aten::_to_copy": 0, "aten::copy_": 1}
"""Operation → the place of the argument that is copied."""
UNGIVEN = {
    *("aten::empty", "aten::empty_like", "aten::new_empty", "aten::empty_strided"),
    *("aten::rand", "aten::randn", "aten::rand_like", "aten::randn_like"),
    *("aten::uniform_", "aten::normal_", "aten::bernoulli_", "aten::random_"),
}
"""Operations that leave memory as it was, or draw."""


UNKNOWN = math.nan


class Fills(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes what every tensor was last filled with, while it is entered."""

    def __init__(self) -> None:
        """Nothing has been written."""
        super().__init__()  # type: ignore[no-untyped-call]
        # By the storage's address: what it was filled with, None for nothing or something drawn.
        # With the storage itself, so that its address is not used again.
        self._known: dict[int, tuple[Any, float | None]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operation, and note what it has written."""
        made = func(*args, **(kwargs or {}))
        schema = func._schema
        written = [
            value
            for argument, value in zip(schema.arguments, args, strict=False)
            if isinstance(value, Tensor) and argument.alias_info and argument.alias_info.is_write
        ]
        is_new = isinstance(made, Tensor) and not any(r.alias_info for r in schema.returns)
        for tensor in written or ([made] if is_new else []):
            if not tensor.is_meta:
                continue  # it has values
            storage = tensor.untyped_storage()
            number = self._number(schema.name, args)
            is_drawn = self._of(tensor) is None and schema.name not in COPIES
            if written and number is UNKNOWN and is_drawn:
                continue  # arithmetic makes something drawn of what was drawn
            is_whole = tensor.numel() * tensor.element_size() == storage.nbytes()
            self._known[storage._cdata] = storage, number if is_whole else UNKNOWN
        return made

    def _of(self, tensor: Tensor) -> float | None:
        """Return the number that fills a tensor; None if nothing or a draw does, NaN if unknown."""
        if not tensor.is_meta:
            first = tensor.flatten()[:1]
            return float(first.item()) if len(first) and bool((tensor == first).all()) else UNKNOWN
        return self._known.get(tensor.untyped_storage()._cdata, (None, UNKNOWN))[1]

    def _number(self, name: str, args: tuple[Any, ...]) -> float | None:
        """Return the number that an operation writes; None for none or a draw, NaN if unknown."""
        if name in UNGIVEN:
            return None
        if name in COPIES and isinstance(source := args[COPIES[name]], Tensor):
            return self._of(source)
        value = NUMBERS.get(name, UNKNOWN)
        if name in PLACES and len(args) > PLACES[name]:
            value = args[PLACES[name]]
        return float(value) if isinstance(value, (int, float)) else UNKNOWN

    def starts(self, model: nn.Module) -> Mapping[str, Start]:
        """Return the initialisation of each trained vector and scalar of `model`, by its name.

        The bias of a layer that the model's code leaves to torch starts at zero, as in a model
        file of the program's.
        """
        biases, starts = set(layer_biases(model)), {}
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 or not parameter.requires_grad:
                continue
            number = self._of(parameter)
            is_ungiven = number is None and name in biases
            starts[name] = Start.ZEROS if is_ungiven else vector_start(number)
        return starts


def watched(build: Callable[[int], nn.Module], width: int) -> tuple[nn.Module, Mapping[str, Start]]:
    """Build a model on the meta device, and say how its vectors start."""
    with torch.device("meta"), Fills() as fills:
        model = build(width)
    return model, fills.starts(model)
