"""Muon: momentum, orthogonalised by Newton–Schulz, same-shape matrices in one batch.

Agrees with `torch.optim.Muon(adjust_lr_fn="match_rms_adamw")` where both can do the thing, and
adds what torch has not: fp32 arithmetic, Polar Express, stacks of matrices, batching.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from telescope.train.quintics import NS_EPS, POLAR_EXPRESS_HEADROOM, quintics
from telescope.train.rules import RMS_MATCH

BATCHED_SIDE = {torch.bfloat16: 192, torch.float32: 64}
"""On a CPU, batching same shapes pays up to this smaller side. Measured, one thread, 8 squares:
bf16 5.8x at 32, 3.1x at 128, 1.8x at 192; fp32 2.7x at 32, 1.4x at 64, 0.8x at 128."""
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def orthogonalize(
    matrices: Tensor, *, steps: int, dtype: torch.dtype, ns: str = "jordan"
) -> Tensor:
    """Newton–Schulz: push the singular values of each matrix towards 1.

    Args:
        matrices: (…, out, in); leading dimensions are a batch.
        steps: how many quintic steps; five land singular values in about [0.68, 1.15].
        dtype: the arithmetic; bf16 is 2–3 % off the exact iteration, fp32 is not.
        ns: whose coefficients, see `quintics`.

    Returns:
        The same shape, in `dtype`.
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
    """beta · addend + alpha · left @ right in one kernel, which rounds once."""
    if addend.ndim == 2:
        return torch.addmm(addend, left, right, beta=beta, alpha=alpha)
    flat = [t.flatten(0, -3) for t in (addend, left, right)]
    product = torch.baddbmm(flat[0], flat[1], flat[2], beta=beta, alpha=alpha)
    return product.view(addend.shape)


class Muon(torch.optim.Optimizer):
    """Muon in torch's convention, with RMS-matched steps.

    Each group holds matrices, or stacks of them, of one shape. A step is
    ``p ← p · (1 − lr · weight_decay) − lr · 0.2 · √max(out, in) · O``.

    Args:
        groups: dicts with ``params``, ``lr``, ``weight_decay``.
        momentum: β of the gradient's average.
        nesterov: whether the step looks ahead by one more average.
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
        """Take one step with the gradients at hand; parameters without one stay."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._step_group(params, group)

    def _step_group(self, params: list[Tensor], group: dict[str, Any]) -> None:
        grads = [cast(Tensor, p.grad) for p in params]
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        beta = group["momentum"]
        torch._foreach_lerp_(buffers, grads, 1 - beta)
        looked_ahead = torch._foreach_lerp(grads, buffers, beta) if group["nesterov"] else buffers
        updates = _orthogonalize_all(
            looked_ahead,
            steps=group["ns_steps"],
            dtype=DTYPES[group["ns_dtype"]],
            ns=group["ns"],
        )
        lr = group["lr"]
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        scale = RMS_MATCH * math.sqrt(max(params[0].shape[-2:]))
        torch._foreach_add_(params, updates, alpha=-lr * scale)


def _orthogonalize_all(
    matrices: Sequence[Tensor], *, steps: int, dtype: torch.dtype, ns: str
) -> list[Tensor]:
    """Orthogonalise same-shape matrices, as one batch where that is faster."""
    first = matrices[0]
    if len(matrices) > 1 and (first.is_cuda or min(first.shape[-2:]) <= BATCHED_SIDE[dtype]):
        batch = orthogonalize(torch.stack(list(matrices)), steps=steps, dtype=dtype, ns=ns)
        return list(batch.to(first.dtype).unbind())
    return [orthogonalize(m, steps=steps, dtype=dtype, ns=ns).to(m.dtype) for m in matrices]
