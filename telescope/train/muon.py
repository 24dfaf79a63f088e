"""Muon: momentum, orthogonalised by Newton–Schulz, with same-shape matrices in one batch.

It agrees with `torch.optim.Muon(adjust_lr_fn="match_rms_adamw")` and adds fp32 arithmetic, Polar
Express, stacks of matrices, and batching. `benchmarks/muon.py` compares its speed with torch's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from telescope.rules.quintics import NS_EPS, POLAR_EXPRESS_HEADROOM, quintics
from telescope.rules.scaling import RMS_MATCH

BATCHED_SIDE = {torch.bfloat16: 256, torch.float32: 64}
"""Largest smaller side of a matrix up to which batching pays on a CPU. Measured speed-up with one
thread, for 32 square matrices in batches of `BATCHED_ELEMENTS` or less: bf16 16x at 32, 8x at 64,
2.2x at 128, 1.2x at 256; fp32 3.3x at 32, 1.4x at 64, 1.0x at 96."""
BATCHED_ELEMENTS = 2**19
"""Most elements of one batch on a CPU, so that it stays in the cache. Measured in bf16: 32 square
matrices of side 128 take 10.3 ms in one batch, 6.8 ms in two."""
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SETTINGS = ("momentum", "nesterov", "ns_steps", "ns_dtype", "ns")
"""Settings that groups must share for their matrices to be batched: all but lr and decay."""


def orthogonalize(
    matrices: Tensor, *, steps: int, dtype: torch.dtype, ns: str = "jordan"
) -> Tensor:
    """Newton–Schulz: push the singular values of each matrix towards 1.

    Args:
        matrices: (…, out, in); leading dimensions are a batch.
        steps: number of quintic steps; five bring singular values to about [0.68, 1.15].
        dtype: the arithmetic; bf16 is 2–3 % off the exact iteration, fp32 is not.
        ns: name of the coefficients, see `quintics`.

    Returns:
        A tensor of the same shape, in `dtype`.
    """
    headroom = 1.0 if ns == "jordan" else POLAR_EXPRESS_HEADROOM
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.to(dtype)
    x = x.mT if is_tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * headroom).clamp(min=NS_EPS)
    for a, b, c in quintics(ns, steps):
        gram = x @ x.mT
        x = _fused(x, _fused(gram, gram, gram, beta=b, alpha=c), x, beta=a, alpha=1.0)
    return x.mT if is_tall else x


def _fused(addend: Tensor, left: Tensor, right: Tensor, *, beta: float, alpha: float) -> Tensor:
    """Compute beta · addend + alpha · left @ right in one kernel, which rounds once."""
    if addend.ndim == 2:
        return torch.addmm(addend, left, right, beta=beta, alpha=alpha)
    flat = [t.flatten(0, -3) for t in (addend, left, right)]
    product = torch.baddbmm(flat[0], flat[1], flat[2], beta=beta, alpha=alpha)
    return product.view(addend.shape)


def orthogonalize_all(
    matrices: Sequence[Tensor], *, steps: int, dtype: torch.dtype, ns: str
) -> list[Tensor]:
    """Orthogonalise many matrices, those of one shape as one batch where that is faster.

    A tall matrix is transposed first, so (out, in) and (in, out) count as one shape.

    Args:
        matrices: each (…, out, in), on one device.
        steps: see `orthogonalize`.
        dtype: see `orthogonalize`.
        ns: see `orthogonalize`.

    Returns:
        For each matrix one of its shape and dtype, contiguous.
    """
    results = list(matrices)
    for tall, wide in _batches(matrices, dtype):
        if len(tall + wide) == 1:
            (index,) = tall + wide
            done = orthogonalize(matrices[index], steps=steps, dtype=dtype, ns=ns)
            results[index] = _plain(done, matrices[0].dtype)
            continue
        stacks = [torch.stack([matrices[i] for i in part]) for part in (tall, wide) if part]
        if tall:
            stacks[0] = stacks[0].mT
        stack = torch.cat(stacks) if len(stacks) > 1 else stacks[0]
        done = orthogonalize(stack, steps=steps, dtype=dtype, ns=ns)
        for part, piece in (tall, done[: len(tall)].mT), (wide, done[len(tall) :]):
            for index, result in zip(part, _plain(piece, matrices[0].dtype), strict=True):
                results[index] = result
    return results


def _batches(
    matrices: Sequence[Tensor], dtype: torch.dtype
) -> Iterator[tuple[list[int], list[int]]]:
    """Yield batches of matrices: the indices of the tall ones, and of the others."""
    alike: dict[tuple[int, ...], tuple[list[int], list[int]]] = {}
    for index, matrix in enumerate(matrices):
        tall, wide = alike.setdefault(_up_to_transposition(matrix), ([], []))
        (tall if matrix.shape[-2] > matrix.shape[-1] else wide).append(index)
    for shape, (tall, wide) in alike.items():
        size = len(tall + wide)
        if matrices[0].device.type == "cpu":
            size = BATCHED_ELEMENTS // math.prod(shape) if shape[-2] <= BATCHED_SIDE[dtype] else 1
        for batch in _chunks(tall + wide, max(size, 1)):
            yield [i for i in batch if i in tall], [i for i in batch if i in wide]


def _chunks(indices: list[int], size: int) -> Iterator[list[int]]:
    return (indices[i : i + size] for i in range(0, len(indices), size))


def _up_to_transposition(matrix: Tensor) -> tuple[int, ...]:
    """Return the shape of a matrix or stack with the matrix's smaller side first."""
    return (*matrix.shape[:-2], *sorted(matrix.shape[-2:]))


def _plain(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Make a tensor contiguous in `dtype`, so that it can be added to its parameter in one call."""
    return tensor.to(dtype, memory_format=torch.contiguous_format).contiguous()


def muon_updates(
    grads: Sequence[Tensor],
    buffers: Sequence[Tensor],
    *,
    momentum: float,
    nesterov: bool,
    ns_steps: int,
    ns_dtype: str,
    ns: str,
) -> list[Tensor]:
    """Compute the directions of one step: momentum, then Newton–Schulz; no `step_scale`, no lr.

    Args:
        grads: each (…, out, in); leading dimensions are a batch, of experts or of trials.
        buffers: the momentum of each gradient, of its shape; updated in place.
        momentum: β of the average.
        nesterov: average the gradient in once more (Nesterov's look-ahead).
        ns_steps: Newton–Schulz steps.
        ns_dtype: "bf16" or "fp32".
        ns: "jordan" or "polar-express".

    Returns:
        For each gradient one direction of its shape and dtype.
    """
    torch._foreach_lerp_(list(buffers), list(grads), 1 - momentum)
    looked_ahead = (
        torch._foreach_lerp(list(grads), list(buffers), momentum) if nesterov else buffers
    )
    return orthogonalize_all(looked_ahead, steps=ns_steps, dtype=DTYPES[ns_dtype], ns=ns)


def step_scale(shape: Sequence[int]) -> float:
    """Return the factor of a direction besides lr: 0.2 · √max(out, in).

    >>> step_scale((4, 64, 256)) == 0.2 * 16
    True
    """
    return RMS_MATCH * math.sqrt(max(shape[-2:]))


class Muon(torch.optim.Optimizer):
    """Muon in torch's convention, with RMS-matched steps.

    Each group holds matrices, or stacks of them, of one shape. A step is
    ``p ← p · (1 − lr · weight_decay) − lr · 0.2 · √max(out, in) · O``.

    Args:
        groups: dicts with ``params``, ``lr``, ``weight_decay``.
        momentum: β of the gradient's average.
        nesterov: average the gradient in once more (Nesterov's look-ahead).
        ns_steps: Newton–Schulz steps.
        ns_dtype: "bf16" or "fp32".
        ns: "jordan" or "polar-express".
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        momentum: float,
        nesterov: bool,
        ns_steps: int,
        ns_dtype: str,
        ns: str = "jordan",
    ) -> None:
        """Keep one momentum buffer per parameter."""
        defaults = {
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "ns_dtype": ns_dtype,
            "ns": ns,
        }
        super().__init__(list(groups), defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take one step with the present gradients; parameters without one do not change."""
        for settings, groups in self._alike():
            members = [[p for p in group["params"] if p.grad is not None] for group in groups]
            params = [p for mine in members for p in mine]
            if not params:
                continue
            grads = [cast(Tensor, p.grad) for p in params]
            buffers = [self._buffer(p) for p in params]
            updates = iter(muon_updates(grads, buffers, **settings))
            for group, mine in zip(groups, members, strict=True):
                if mine:
                    lr, scale = group["lr"], step_scale(mine[0].shape)
                    torch._foreach_mul_(mine, 1 - lr * group["weight_decay"])
                    torch._foreach_add_(mine, [next(updates) for _ in mine], alpha=-lr * scale)

    def _alike(self) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
        """Return the groups whose matrices are batched together, with their shared settings.

        Only one shape (and its transpose) at a time: the updates of a whole model would double its
        memory.
        """
        alike: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for group in self.param_groups:
            shared = tuple(group[key] for key in SETTINGS)
            alike.setdefault((shared, _up_to_transposition(group["params"][0])), []).append(group)
        return [({key: groups[0][key] for key in SETTINGS}, groups) for groups in alike.values()]

    def _buffer(self, p: Tensor) -> Tensor:
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        return cast(Tensor, state["momentum_buffer"])
