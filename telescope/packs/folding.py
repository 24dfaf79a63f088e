"""Attention, linear layers and RMSNorm under `torch.vmap`, with a pack's trials in a batch.

vmap has poor rules for these. Fused CPU attention has none at all, so vmap calls it trial by
trial and warns; a linear layer becomes many small products instead of one per trial; RMSNorm is
split up although CUDA has one kernel for it. Here each is a `torch.autograd.Function` with its own
vmap rule, and `Folded` replaces torch's functions by them when a model file calls them.

Shapes: K trials, B batch, T tokens, I and O features; … is any number of dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

Options = tuple[float, bool, float | None, bool]
"""Arguments of attention besides tensors: dropout_p, is_causal, scale, enable_gqa."""


class Folded(TorchFunctionMode):
    """While active, these functions of torch fold the dimension that vmap adds."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call a function's folding twin if it has one, else the function."""
        twin = _TWINS.get(func, func)
        return twin(*args, **(kwargs or {}))


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """torch's `scaled_dot_product_attention`, by the same names; without dropout.

    Raises:
        NotImplementedError: `dropout_p` > 0, whose draws would not be those of a trial alone.
    """
    if dropout_p > 0:
        raise NotImplementedError(f"attention with dropout_p = {dropout_p:g}, trials folded")
    options = (dropout_p, is_causal, scale, enable_gqa)
    return _Attention.apply(query, key, value, attn_mask, options)  # type: ignore[no-untyped-call]


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """torch's `linear`, by the same names."""
    return _Linear.apply(input, weight, bias)  # type: ignore[no-untyped-call]


def _rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Any:
    """torch's `rms_norm`, by the same names."""
    return _RMSNorm.apply(input, normalized_shape, weight, eps)  # type: ignore[no-untyped-call]


_TWINS: dict[Any, Callable[..., Any]] = {
    functional.rms_norm: _rms_norm,
    functional.scaled_dot_product_attention: _attention,
    functional.linear: _linear,
}


def _sdpa(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: Options
) -> Tensor:
    dropout_p, is_causal, scale, enable_gqa = options
    return functional.scaled_dot_product_attention(
        query, key, value, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


class _Recomputed(torch.autograd.Function):
    """Gradients by calling `forward` again, for calls of which no argument is per trial."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep the inputs."""
        ctx.places = [i for i, item in enumerate(inputs) if isinstance(item, Tensor)]
        ctx.inputs = [None if i in ctx.places else item for i, item in enumerate(inputs)]
        ctx.save_for_backward(*(inputs[i] for i in ctx.places))

    @classmethod
    def gradients(cls, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of every input; None for other than floating-point tensors."""
        inputs = list(ctx.inputs)
        for place, tensor in zip(ctx.places, ctx.saved_tensors, strict=True):
            inputs[place] = tensor
        moving = [i for i in ctx.places if ctx.needs_input_grad[i]]

        def again(*tensors: Tensor) -> Any:
            filled = list(inputs)
            for place, tensor in zip(moving, tensors, strict=True):
                filled[place] = tensor
            return cls.forward(*filled)

        pull_back = torch.func.vjp(again, *(inputs[i] for i in moving))[1]
        found = dict(zip(moving, pull_back(grad), strict=True))
        return tuple(found.get(i) for i in range(len(inputs)))


class _Attention(_Recomputed):
    """`scaled_dot_product_attention` with the trials in its batch."""

    @staticmethod
    def forward(
        query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: Options
    ) -> Tensor:
        """As torch's."""
        return _sdpa(query, key, value, mask, options)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        """As torch's."""
        return _Attention.gradients(ctx, grads[0])

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[Any, ...],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        options: Options,
    ) -> tuple[Tensor, int]:
        """Fold (…, heads, T, E) per trial into (K·…, H, T, E), as fast kernels need 4 dimensions.

        Without heads, (…, T, E), the trials take the place of the batch. A tensor with fewer
        dimensions than the others lacks those after the trials.
        """
        per_trial = zip((query, key, value), in_dims[:3], strict=True)
        own = [_leading(tensor, dim, info.batch_size) for tensor, dim in per_trial]
        rank = max(tensor.ndim for tensor in own)
        q, k, v = (_of_rank(tensor, rank) for tensor in own)
        shapes = (q.shape[:-3], k.shape[:-3], v.shape[:-3])
        lead: torch.Size = torch.broadcast_shapes(*shapes)  # type: ignore[no-untyped-call]
        if mask is not None and (in_dims[3] is not None or mask.ndim > 2):
            mask = _of_rank(_leading(mask, in_dims[3], info.batch_size), len(lead) + 3)
            mask = _folded(mask, lead)
        mixed = _sdpa(_folded(q, lead), _folded(k, lead), _folded(v, lead), mask, options)
        return mixed.reshape(*lead, *mixed.shape[-3:]) if len(lead) > 1 else mixed, 0


class _Linear(_Recomputed):
    """`linear` as one product of matrices per trial."""

    @staticmethod
    def forward(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """As torch's."""
        return functional.linear(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        """As torch's."""
        return _Linear.gradients(ctx, grads[0])

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], input: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, int]:
        """Multiply (K, …, I) by (K, O, I), with … flattened to one dimension."""
        input_dim, weight_dim, bias_dim = in_dims
        x = _leading(input, input_dim, info.batch_size)
        if weight_dim is None and (bias is None or bias_dim is None):
            return functional.linear(x, weight, bias), 0
        if weight.ndim - (weight_dim is not None) != 2:  # a vector weight has a single output
            raise NotImplementedError(f"linear with a weight of shape {tuple(weight.shape)}")
        w = _leading(weight, weight_dim, info.batch_size)
        rows = x.flatten(1, -2) if x.ndim > 2 else x.unsqueeze(1)
        if bias is None:
            product = torch.bmm(rows, w.mT)
        else:
            b = _leading(bias, bias_dim, info.batch_size).unsqueeze(1)
            product = torch.baddbmm(b, rows, w.mT)
        return product.reshape(*x.shape[:-1], w.shape[-2]), 0


class _RMSNorm(_Recomputed):
    """`rms_norm` with the trials as one more dimension before the normalised ones."""

    @staticmethod
    def forward(
        input: Tensor, shape: Sequence[int], weight: Tensor | None, eps: float | None
    ) -> Tensor:
        """As torch's."""
        return functional.rms_norm(input, list(shape), weight, eps)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        """As torch's."""
        return _RMSNorm.gradients(ctx, grads[0])

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[Any, ...],
        input: Tensor,
        shape: Sequence[int],
        weight: Tensor | None,
        eps: float | None,
    ) -> tuple[Tensor, int]:
        """Normalise (K, …, *shape), then multiply by the gains (K, 1, …, *shape)."""
        x = _leading(input, in_dims[0], info.batch_size)
        if weight is None or in_dims[2] is None:
            return functional.rms_norm(x, list(shape), weight, eps), 0
        gain = _of_rank(_leading(weight, in_dims[2], info.batch_size), x.ndim)
        # torch rounds to the input's precision after multiplying by the gain, not before.
        wide = x.to(torch.promote_types(x.dtype, gain.dtype))
        return (functional.rms_norm(wide, list(shape), None, eps) * gain).to(x.dtype), 0


def _leading(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """Move the trials to the front; expand a tensor that all share, without a copy."""
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _of_rank(tensor: Tensor, rank: int) -> Tensor:
    """Insert dimensions of size one after K in (K, …) up to the given rank."""
    return tensor[(slice(None), *[None] * (rank - tensor.ndim))]


def _folded(tensor: Tensor, lead: torch.Size) -> Tensor:
    """Flatten the leading dimensions of (*lead, a, b, c) to one; (K, a, b) stays as it is."""
    if not lead:
        return tensor
    return tensor.expand(*lead, *tensor.shape[-3:]).flatten(0, len(lead) - 1)
