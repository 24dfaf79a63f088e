"""Observe the inputs of every softmax while a model runs: attention logits, which no module gives.

Under muP their size is the same at every width. If head_dim grows with the width and q·k is divided
by √head_dim, the logits grow as training aligns queries and keys; then divide by head_dim.

Observed are torch's `scaled_dot_product_attention`, whose logits are computed again from its
arguments, torch's softmax under all its names, and `nn.MultiheadAttention`. Other kernels are not
observed; for these the check names the modules that split their features into growing heads.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from telescope.check.verdict import Quantity

ELEMENTS = 2**18
"""Approximate number of logits kept per call, from evenly spread queries. The check's batch has
2048 tokens, and a head has tokens² logits."""
MASKED = -1e4
"""Logit at or below which a place counts as masked: -inf, the least number of a type, or -1e4."""
SOFTMAX = {
    functional.softmax,
    torch.softmax,
    torch.special.softmax,
    Tensor.softmax,
}
SPLITS = {Tensor.view, Tensor.reshape, Tensor.unflatten, torch.reshape, torch.unflatten}
"""Functions with which a model splits its features into heads; einops calls `reshape`."""


class SoftmaxInputs(TorchFunctionMode):
    """While active, keeps the unmasked inputs of every softmax, by the module that calls it.

    Args:
        model: the model whose modules are told apart.
        file: the file name of the model file's code, see `model.module_file`.
    """

    def __init__(self, model: nn.Module, file: str) -> None:
        """Begin without any logits."""
        super().__init__()
        self._model = model
        self._file = file
        self._inside: list[str] = []
        self._logits: dict[tuple[str, int], list[Tensor]] = {}
        self._heads: dict[str, list[int]] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Observe inside this context, with the current module known from hooks.

        An exception inside clears the logits, because the caller may run the model unobserved.
        """

        def enter(name: str) -> Any:
            return lambda module, args: self._inside.append(name)

        def leave(module: nn.Module, args: Any, result: Any) -> None:
            self._inside.pop()

        handles = []
        for name, module in self._model.named_modules():
            handles.append(module.register_forward_pre_hook(enter(name)))
            handles.append(module.register_forward_hook(leave, always_call=True))
        try:
            with self:
                yield
        except Exception:
            self._logits.clear()
            raise
        finally:
            for handle in handles:
                handle.remove()

    @property
    def logits(self) -> dict[Quantity, Tensor]:
        """Quantity → all logits of a place in the model, in one dimension."""
        modules = [name for name, _ in self._logits]
        found = {}
        for (name, line), calls in self._logits.items():
            # Two softmaxes in one module are told apart by their lines.
            words = [name, f"line {line}" if modules.count(name) > 1 else ""]
            place = " ".join(filter(None, words))
            found[Quantity(place, is_softmax=True)] = torch.cat(calls)
        return found

    @property
    def unseen_heads(self) -> dict[str, int]:
        """Module → the size of its heads, where no softmax was observed in it or its parent.

        At least two splits are needed, queries and keys; one alone may be the halves of a gate.
        """
        places = [name for name, _ in self._logits]
        return {
            name: sizes[0]
            for name, sizes in self._heads.items()
            if len(sizes) > 1
            and name.rpartition(".")[0] not in places
            and not any(f"{place}.".startswith(f"{name}.") for place in places)
        }

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call the function; observe it if it is one of those above."""
        kwargs = dict(kwargs or {})
        if func is functional.scaled_dot_product_attention:
            self._keep(*_attention_logits(*args, **kwargs))
        elif func in SOFTMAX:
            self._keep(*_softmax_logits(*args, **kwargs))
        elif func is functional.multi_head_attention_forward:
            asked = {**kwargs, "need_weights": True, "average_attn_weights": False}
            self._keep(*_module_logits(func(*args, **asked)[1], *args, **kwargs))
        result = func(*args, **kwargs)
        if func in SPLITS:
            self._note_heads(args[0], result)
        return result

    def _keep(self, logits: Tensor, is_seen: Tensor) -> None:
        """Keep the unmasked logits of one call."""
        place = (self._inside[-1] if self._inside else "", self._line())
        self._logits.setdefault(place, []).append(logits[is_seen & (logits > MASKED)].float())

    def _line(self) -> int:
        """Return the line of the model file that is running; 0 if the code is another file's."""
        frame = sys._getframe(1)
        while frame.f_back and frame.f_code.co_filename != self._file:
            frame = frame.f_back
        return frame.f_lineno if frame.f_code.co_filename == self._file else 0

    def _note_heads(self, given: Any, result: Any) -> None:
        """Record a head's size where (…, features) becomes (…, heads, size)."""
        if self._inside and given.ndim > 1 and result.shape[: given.ndim - 1] == given.shape[:-1]:
            sizes = self._heads.setdefault(self._inside[-1], [])
            sizes.extend([result.shape[-1]] * (result.ndim - given.ndim))


def _some(count: int, of_each: int, like: Tensor) -> Tensor:
    """Return the indices of as many rows as fit `ELEMENTS`, evenly spread, with the last row."""
    stride = max(1, math.ceil(count * of_each / ELEMENTS))
    return torch.arange(count - 1, -1, -stride, device=like.device).flip(0)


def _attention_logits(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute the logits of some queries in torch's function of these arguments, and a mask.

    A float `attn_mask`, such as a bias by distance, is only used to mask; it is not added.
    """
    length, keys = query.shape[-2], key.shape[-2]
    rows = _some(length, query[..., 0, 0].numel() * keys, query)
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logits = query[..., rows, :].float() @ key.float().mT * scale
    is_seen = torch.ones_like(logits, dtype=torch.bool)
    if is_causal:
        is_seen &= rows[:, None] >= torch.arange(keys, device=rows.device)
    if attn_mask is not None:
        allowed = attn_mask if attn_mask.dtype == torch.bool else attn_mask > MASKED
        is_seen &= allowed.expand(*allowed.shape[:-2], length, keys)[..., rows, :]
    return logits, is_seen


def _module_logits(
    weights: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Compute logits and mask as `_attention_logits` does, for a call by `nn.MultiheadAttention`.

    Args:
        weights: the softmax's output, (…, heads, T, keys); 0 where masked.
        query: (T, …, width); this and the rest are the arguments of torch's function.
    """
    if in_proj_weight is not None:
        projections = in_proj_weight.chunk(3)[:2]
    else:
        projections = kwargs["q_proj_weight"], kwargs["k_proj_weight"]
    biases = in_proj_bias.chunk(3) if in_proj_bias is not None else (None, None)
    q, k = (
        functional.linear(x, weight, bias).reshape(*x.shape[:-1], heads, -1).movedim(0, -2)
        for x, weight, bias in zip((query, key), projections, biases, strict=False)
    )
    assert weights is not None  # it was asked for
    is_seen = weights[..., : k.shape[-2]] > 0  # keys that torch appends come last
    return _attention_logits(q, k, k, is_seen)


def _softmax_logits(
    input: Tensor, dim: int | None = None, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """Return some rows of a softmax's input, the softmax dimension last, and an all-True mask."""
    dim = kwargs.get("dim", dim)
    logits = input.movedim(-1 if dim is None else dim, -1)
    if logits.ndim > 1:
        rows = _some(logits.shape[-2], logits[..., 0, :].numel(), logits)
        logits = logits[..., rows, :]
    return logits, torch.ones_like(logits, dtype=torch.bool)
