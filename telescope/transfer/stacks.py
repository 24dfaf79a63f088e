"""Stacks of matrices, as experts are kept, for torch's own Muon, which takes single matrices."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class StackMuon(torch.optim.Muon):
    """`torch.optim.Muon`, which sees each matrix of a stack as a parameter of its own.

    These parameters are views: a step changes the stack itself, and their gradients are those of
    the stack. Everything else, the state in a checkpoint too, is torch's.

    Args:
        groups: as torch's, but the tensors may also be stacks (…, out, in).
        kwargs: as torch's.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], **kwargs: Any) -> None:
        """Replace the stacks by their matrices; their gradients follow every backward pass."""
        self._stacks: list[tuple[nn.Parameter, list[nn.Parameter]]] = []
        super().__init__([{**g, "params": self._unbound(g["params"])} for g in groups], **kwargs)

    def _unbound(self, params: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """Return the parameters with every stack replaced by its matrices."""
        single: list[nn.Parameter] = []
        for parameter in params:
            if parameter.ndim <= 2:
                single.append(parameter)
                continue
            matrices = list(map(nn.Parameter, parameter.detach().flatten(0, -3).unbind()))
            self._stacks.append((parameter, matrices))
            parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                lambda _: self._share_gradients()
            )
            single += matrices
        return single

    def _share_gradients(self) -> None:
        """Make each matrix's gradient its part of the stack's; a clipped one is clipped in both."""
        for stack, matrices in self._stacks:
            gradients: Iterable[Tensor | None] = [None] * len(matrices)
            if stack.grad is not None:
                gradients = stack.grad.flatten(0, -3).unbind()
            for matrix, gradient in zip(matrices, gradients, strict=True):
                matrix.grad = gradient

    def step(self, closure: Any = None) -> Any:
        """Take one step with the present gradients."""
        self._share_gradients()
        return super().step(closure)  # type: ignore[no-untyped-call]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of matrices and stacks."""
        super().zero_grad(set_to_none)
        for stack, _ in self._stacks:
            if set_to_none:
                stack.grad = None
            elif stack.grad is not None:
                stack.grad.zero_()
