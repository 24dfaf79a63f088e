"""Models that fit no single device: torch's FSDP2, and Muon on whole matrices beside it.

Every parameter is divided by rows over the ranks, with its gradient and its optimizer state. A
layer's parameters are whole only while it computes. AdamW updates a rank's own rows. For Muon the
rows of a matrix are gathered one matrix after the other, every rank orthogonalises it and takes its
own rows: the same arithmetic on all ranks, which costs their number times as much of it. Stacks of
matrices are divided between the matrices, so each rank orthogonalises its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from telescope.config import OptimizerConfig
from telescope.errors import SpecError
from telescope.rules.groups import Group
from telescope.target.layers import layers_of
from telescope.target.ranks import Ranks
from telescope.target.sharding import SavedState
from telescope.train.muon import DTYPES, orthogonalize, step_scale
from telescope.train.optim import optimizers_of, set_lr


def divide(model: nn.Module, ranks: Ranks) -> None:
    """Divide a model over the ranks in its place, layer by layer, and move it to their devices.

    Raises:
        SpecError: there is one rank.
        ModelError: the model has no list of modules.
    """
    if ranks.size == 1:
        raise SpecError("--shard: got 1 rank, must be 2 or more; use --workers")
    mesh = init_device_mesh(torch.device(ranks.device).type, (ranks.size,))
    for layer in layers_of(model, "--shard"):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


@contextmanager
def kept_apart(model: FSDPModule) -> Iterator[None]:
    """Leave gradients unreduced in the block: more of the batch follows."""
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def rows_of(tensor: DTensor, rank: int, ranks: int) -> tuple[int, int]:
    """Return the rows of a tensor that a rank has, as torch divides them.

    >>> rows = torch.arange(10).chunk(4)
    >>> [len(part) for part in rows]  # torch's own way
    [3, 3, 3, 1]
    """
    most = -(-tensor.shape[0] // ranks)
    start = min(rank * most, tensor.shape[0])
    return start, min(start + most, tensor.shape[0])


class FullyShardedOptimizers:
    """The optimizers of a divided model, with the interface of `sharding.ShardedOptimizers`."""

    def __init__(
        self, model: nn.Module, groups: Sequence[Group], config: OptimizerConfig, ranks: Ranks
    ) -> None:
        """Take this rank's rows of all parameters; state is made with the first step."""
        self._config, self._ranks = config, ranks
        self._parameters: dict[str, DTensor] = {
            name: p for name, p in model.named_parameters() if isinstance(p, DTensor)
        }
        self._rows = {
            name: rows_of(p, ranks.rank, ranks.size) for name, p in self._parameters.items()
        }
        self._local = {name: _local(p) for name, p in self._parameters.items()}
        self._muon = [group for group in groups if group.is_muon]
        self._momenta: dict[str, Tensor] = {}
        adamw = self._with_rows(group for group in groups if not group.is_muon)
        self._adamw = optimizers_of(self._local, adamw, config)

    def step(self, share: float) -> None:
        """Take one step with the parameters' gradients, and clear these."""
        set_lr(self._adamw, share)
        for name, parameter in self._parameters.items():
            grad = parameter.grad
            self._local[name].grad = grad.to_local() if isinstance(grad, DTensor) else None
        for optimizer in self._adamw:
            optimizer.step()
        for group in self._muon:
            for name in group.names:
                self._take_muon_step(name, group, share)
        for name, parameter in self._parameters.items():
            self._local[name].grad = parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        """Return this rank's state, ``key:start-stop:name`` → tensor."""
        found = {}
        for name, (start, stop) in self._rows.items():
            for key, value in self._state_of(name).items():
                if stop > start:
                    found[f"{key}:{start}-{stop}:{name}"] = value
        return found

    def load(self, saved: SavedState) -> None:
        """Take this rank's state from a checkpoint, of a divided model or not."""
        for name, (start, stop) in self._rows.items():
            for key in saved.keys(name) if stop > start else ():
                value = saved.rows(name, key, start, stop)
                value = value.to(self._ranks.device if value.ndim else "cpu", copy=True)
                if key == "momentum_buffer":
                    self._momenta[name] = value
                else:
                    self._optimizer_of(name).state[self._local[name]][key] = value

    @property
    def elements(self) -> int:
        """Numbers of this rank's optimizer state."""
        return sum(value.numel() for value in self.state().values())

    def _with_rows(self, groups: Iterable[Group]) -> Iterator[Group]:
        """Yield groups with the parameters of which this rank has rows."""
        for group in groups:
            names = tuple(n for n in group.names if self._rows[n][0] < self._rows[n][1])
            if names:
                yield replace(group, names=names)

    def _optimizer_of(self, name: str) -> torch.optim.Optimizer:
        (optimizer,) = self._adamw  # all that is not Muon's is AdamW's
        assert any(self._local[name] is p for g in optimizer.param_groups for p in g["params"])
        return optimizer

    def _state_of(self, name: str) -> dict[str, Tensor]:
        if name in self._momenta:
            return {"momentum_buffer": self._momenta[name]}
        found: dict[str, Tensor] = {}
        for optimizer in self._adamw:
            found |= optimizer.state.get(self._local[name], {})
        return found

    @torch.no_grad()
    def _take_muon_step(self, name: str, group: Group, share: float) -> None:
        """Update one matrix, or stack, as `train.muon.Muon` does."""
        local = self._local[name]
        if (grad := local.grad) is None:
            return
        momentum, settings = group.kwargs["momentum"], self._config
        buffer = self._momenta.setdefault(name, torch.zeros_like(grad))
        buffer.lerp_(grad, 1 - momentum)
        ahead = grad.lerp(buffer, momentum) if group.kwargs["nesterov"] else buffer
        if is_matrix := len(group.shape) == 2:
            ahead = self._gathered(name, ahead)
        done = orthogonalize(
            ahead, steps=settings.ns_steps, dtype=DTYPES[settings.ns_dtype], ns=settings.ns
        )
        if is_matrix:
            done = done[slice(*self._rows[name])]
        lr = share * group.lr
        local.mul_(1 - lr * group.weight_decay)
        local.add_(done.to(local.dtype), alpha=-lr * step_scale(group.shape))

    def _gathered(self, name: str, rows: Tensor) -> Tensor:
        """Return the whole of a matrix of which each rank has its rows."""
        parameter = self._parameters[name]
        whole: Tensor = DTensor.from_local(
            rows,
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        ).full_tensor()
        return whole


def _local(parameter: DTensor) -> nn.Parameter:
    """Return a rank's rows of a parameter, updated in their place."""
    rows: Tensor = parameter.to_local()
    return nn.Parameter(rows.detach())
