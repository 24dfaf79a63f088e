"""K trials of one width as one model and one optimizer; their different settings are vectors.

The parameters of one role and shape are one tensor (M, K, *shape): M parameters of K trials. So a
Newton–Schulz iteration, and each operation of AdamW, is one call for all of them. The model is the
model file's own module, called with tensors in place of its parameters, for all trials at once.

A trial is loaded from the module and the optimizers that it would have alone, and can be put back
into them, so its checkpoints are those of a trial that is trained alone.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from telescope.packs.folding import Folded
from telescope.train.muon import SETTINGS, Muon, muon_updates, step_scale

Loss = Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], Tensor]
"""(model, inputs, targets) → loss, as `loop.token_loss`."""
MUON_STATE = ("momentum_buffer",)
ADAMW_STATE = ("exp_avg", "exp_avg_sq")


@dataclass
class Block:
    """The parameters of one group of an optimizer, of all trials."""

    names: tuple[str, ...]
    settings: dict[str, Any]
    """The group's settings besides lr and weight_decay, the same for all trials."""
    is_muon: bool
    peak_lr: list[float]
    """Peak learning rate per trial, as torch's optimizer takes it."""
    weight_decay: list[float]
    value: Tensor
    """(M, K, *shape), a leaf."""
    state: dict[str, Tensor]
    """The optimizer's averages, each shaped as `value`."""

    def factors(self, shares: Sequence[float], steps: Sequence[int]) -> list[list[float]]:
        """Return three numbers per trial: the decay, the step size, and √(1 − β₂ᵗ) for AdamW.

        Args:
            shares: per trial, the schedule's share of the peak learning rate.
            steps: per trial, the number t of the step, from 1.
        """
        lrs = [share * peak for share, peak in zip(shares, self.peak_lr, strict=True)]
        decay = [1 - lr * wd for lr, wd in zip(lrs, self.weight_decay, strict=True)]
        if self.is_muon:
            scale = step_scale(self.value.shape)
            return [decay, [lr * scale for lr in lrs], [1.0] * len(lrs)]
        first, second = self.settings["betas"]
        sizes = [lr / (1 - first**t) for lr, t in zip(lrs, steps, strict=True)]
        return [decay, sizes, [math.sqrt(1 - second**t) for t in steps]]

    def update(self, grad: Tensor, factors: Tensor) -> None:
        """Take one step in place.

        Args:
            grad: shaped as `value`.
            factors: (3, K), see `factors`.
        """
        decay, size, root = factors.view(3, 1, -1, *[1] * (self.value.ndim - 2))
        direction = self._muon(grad) if self.is_muon else self._adamw(grad, root)
        self.value.mul_(decay).addcmul_(direction, size, value=-1)

    def _muon(self, grad: Tensor) -> Tensor:
        settings = {key: self.settings[key] for key in SETTINGS}
        buffer = self.state["momentum_buffer"]
        if grad.is_cuda:
            return muon_updates([grad], [buffer], **settings)[0]
        # On a CPU, a batch of large matrices is slower than one after the other; `muon_updates`
        # decides for single matrices.
        grads, buffers = grad.flatten(0, 1).unbind(), buffer.flatten(0, 1).unbind()
        return torch.stack(muon_updates(grads, buffers, **settings)).view_as(grad)

    def _adamw(self, grad: Tensor, root: Tensor) -> Tensor:
        first, second = self.settings["betas"]
        self.state["exp_avg"].lerp_(grad, 1 - first)
        self.state["exp_avg_sq"].mul_(second).addcmul_(grad, grad, value=1 - second)
        denominator = (self.state["exp_avg_sq"].sqrt() / root).add_(self.settings["eps"])
        return self.state["exp_avg"] / denominator

    def keep(self, index: Tensor, left: Sequence[int]) -> None:
        """Drop all trials except those at `left`, which `index` has as a tensor."""
        self.value = self.value.detach().index_select(1, index).requires_grad_()
        self.state = {key: value.index_select(1, index) for key, value in self.state.items()}
        self.peak_lr = [self.peak_lr[k] for k in left]
        self.weight_decay = [self.weight_decay[k] for k in left]

    def load(self, k: int, named: dict[str, nn.Parameter], state: Any) -> None:
        """Copy the k-th trial's parameters and optimizer averages into the stack."""
        for m, name in enumerate(self.names):
            self.value.data[m, k] = named[name].detach()
            for key, stacked in self.state.items():
                if key in state[named[name]]:
                    stacked[m, k] = state[named[name]][key]

    def put(self, k: int, t: int, named: dict[str, nn.Parameter], state: Any) -> None:
        """Copy the k-th trial's parameters and averages back, after t of its steps."""
        for m, name in enumerate(self.names):
            parameter = named[name]
            parameter.copy_(self.value[m, k])
            own = {key: stacked[m, k].clone() for key, stacked in self.state.items()}
            state[parameter] = own if self.is_muon else {"step": torch.tensor(float(t)), **own}


@dataclass
class Stack:
    """K trials as one model.

    Args:
        module: the module of any of the trials; its forward is called with the stacked tensors.
        loss: the loss of one trial.
        blocks: all trained parameters.
        buffers: name → (K, *shape) of buffers and frozen parameters, which no optimizer moves.
        device: device of the tensors.
    """

    module: nn.Module
    loss: Loss
    blocks: list[Block]
    buffers: dict[str, Tensor]
    device: str
    size: int = field(init=False)
    """K."""

    def __post_init__(self) -> None:
        """Count the trials."""
        self.size = self.blocks[0].value.shape[1]

    @classmethod
    def empty(
        cls,
        module: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        size: int,
        *,
        loss: Loss,
        device: str,
    ) -> Stack:
        """Make room for `size` trials like the one of this module and these optimizers."""
        names = {parameter: name for name, parameter in module.named_parameters()}
        blocks = []
        for optimizer in optimizers:
            is_muon = isinstance(optimizer, Muon)
            for group in optimizer.param_groups:
                params = group["params"]
                room = torch.zeros(
                    (len(params), size, *params[0].shape),
                    dtype=params[0].dtype,
                    device=params[0].device,
                )
                keys = MUON_STATE if is_muon else ADAMW_STATE
                blocks.append(
                    Block(
                        names=tuple(names[p] for p in params),
                        settings={key: value for key, value in group.items() if key != "params"},
                        is_muon=is_muon,
                        peak_lr=[0.0] * size,
                        weight_decay=[0.0] * size,
                        value=room.requires_grad_(),
                        state={key: torch.zeros_like(room) for key in keys},
                    )
                )
        buffers = {
            name: buffer.expand(size, *buffer.shape).clone() for name, buffer in _constants(module)
        }
        return cls(module, loss, blocks, buffers, device)

    @torch.no_grad()
    def load(self, k: int, module: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Load the k-th trial from the module and optimizers that it would have alone."""
        named = dict(module.named_parameters())
        blocks = iter(self.blocks)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                block = next(blocks)
                block.peak_lr[k], block.weight_decay[k] = group["peak_lr"], group["weight_decay"]
                block.load(k, named, optimizer.state)
        for name, buffer in _constants(module):
            self.buffers[name][k] = buffer

    @torch.no_grad()
    def put(
        self, k: int, t: int, module: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
    ) -> None:
        """Put the k-th trial back into its module and optimizers, after t of its steps."""
        named = dict(module.named_parameters())
        blocks = iter(self.blocks)
        for optimizer in optimizers:
            for _ in optimizer.param_groups:
                next(blocks).put(k, t, named, optimizer.state)
        for name, buffer in _constants(module):
            buffer.copy_(self.buffers[name][k])

    def losses(self, inputs: Tensor, targets: Tensor, *, shared: bool = False) -> Tensor:
        """Compute every trial's loss, (K,).

        Args:
            inputs: (K, batch, sequence) tokens, or (batch, sequence) if `shared`.
            targets: the same, one token later.
            shared: all trials see the same tokens.
        """
        values = {
            name: value
            for block in self.blocks
            for name, value in zip(block.names, block.value.unbind(), strict=True)
        }
        tokens = None if shared else 0
        with Folded(), _no_warning_of_speed():
            losses: Tensor = torch.vmap(self._loss, in_dims=(0, 0, tokens, tokens))(
                values, self.buffers, inputs, targets
            )
        return losses

    def _loss(
        self, values: dict[str, Tensor], buffers: dict[str, Tensor], inputs: Tensor, targets: Tensor
    ) -> Tensor:
        def model(tokens: Tensor) -> Tensor:
            logits: Tensor = torch.func.functional_call(self.module, (values, buffers), (tokens,))
            return logits

        return self.loss(model, inputs, targets)

    def gradients(self, losses: Tensor) -> tuple[Tensor, ...]:
        """Return one gradient per block, of the sum of losses: trials are independent."""
        with _no_warning_of_speed():
            return torch.autograd.grad(losses.sum(), [block.value for block in self.blocks])

    def factors(self, shares: Sequence[float], steps: Sequence[int]) -> Tensor:
        """Return the numbers of a step, (blocks, 3, K), computed in double precision.

        See `Block.factors`. They are one tensor, so that one copy brings them to the device.
        """
        table = np.array([block.factors(shares, steps) for block in self.blocks])
        dtype = self.blocks[0].value.dtype
        return torch.from_numpy(table).to(dtype).to(self.device, non_blocking=True)

    def step(self, inputs: Tensor, targets: Tensor, factors: Tensor) -> Tensor:
        """Take one step of every trial; return their losses before it, (K,).

        Args:
            inputs: (K, batch, sequence) tokens.
            targets: the same, one token later.
            factors: see `factors`.
        """
        losses = self.losses(inputs, targets)
        self.update(self.gradients(losses), factors)
        return losses.detach()

    @torch.no_grad()
    def update(self, grads: Sequence[Tensor], factors: Tensor) -> None:
        """Take one step of every optimizer; see `factors`."""
        for block, grad, row in zip(self.blocks, grads, factors.unbind(), strict=True):
            block.update(grad, row.to(grad.dtype))

    def keep(self, left: Sequence[int]) -> None:
        """Drop all trials except those at `left`, and free their memory."""
        index = torch.tensor(left, device=self.device)
        for block in self.blocks:
            block.keep(index, left)
        self.buffers = {name: b.index_select(0, index) for name, b in self.buffers.items()}
        self.size = len(left)


def _constants(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield buffers and frozen parameters, which each trial has and no optimizer moves."""
    yield from module.named_buffers()
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            yield name, parameter.detach()


@contextmanager
def _no_warning_of_speed() -> Iterator[None]:
    """Mute torch's warning about operations that vmap runs trial by trial."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        yield
