"""Optimizer state divided over the ranks (ZeRO-1): each updates its own pieces and sends them out.

A piece is a whole parameter, or some of its rows where an update does not mix rows: AdamW's works
on single numbers, and a stack of matrices is orthogonalised matrix by matrix. A matrix of Muon
stays whole, as in arXiv 2502.16982. torch's ZeroRedundancyOptimizer does the same with whole
parameters only, by their numbers of elements and within one optimizer; a large embedding, with
AdamW's two averages, then fills a rank alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from telescope.config import OptimizerConfig
from telescope.rules.groups import Group
from telescope.target.ranks import Ranks
from telescope.train.optim import optimizers_of, set_lr

SMALL = 0.01
"""Share of a rank's fair part of the state up to which a parameter is never divided."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Some rows of a parameter, whose optimizer state one rank has."""

    name: str
    start: int
    stop: int
    cost: int
    """Numbers of optimizer state."""
    owner: int = 0

    @property
    def key(self) -> str:
        """The piece's name, unique within a model."""
        return f"{self.start}-{self.stop}:{self.name}"


def pieces_of(group: Group, name: str, fair: float, ranks: int) -> list[Piece]:
    """Return a parameter as pieces, one if it is small or its rows belong together.

    Args:
        group: the parameter's group.
        name: the parameter's name.
        fair: a rank's fair part of all state.
        ranks: number of ranks.
    """
    rows = group.shape[0] if group.shape else 1
    cost = state_size(group)
    is_divisible = not group.is_muon or len(group.shape) > 2
    parts = min(rows, ranks) if is_divisible and cost > SMALL * fair else 1
    bounds = [rows * number // parts for number in range(parts + 1)]
    return [
        Piece(name, start, stop, cost * (stop - start) // rows)
        for start, stop in itertools.pairwise(bounds)
    ]


def state_size(group: Group) -> int:
    """Return the numbers of state per parameter of a group: Muon has one average, AdamW two."""
    return math.prod(group.shape) * (1 if group.is_muon else 2)


def partition(groups: Iterable[Group], ranks: int) -> list[Piece]:
    """Divide all state over the ranks: the largest piece first, to the rank with the least.

    Returns:
        All pieces in the order of the groups, each with its owner; the same ones on every rank.
    """
    groups = list(groups)
    fair = sum(state_size(group) * len(group.names) for group in groups) / ranks
    named = [(group, name) for group in groups for name in group.names]
    pieces = [piece for group, name in named for piece in pieces_of(group, name, fair, ranks)]
    loads, owners = [0] * ranks, dict[str, int]()
    for piece in sorted(pieces, key=lambda piece: (-piece.cost, piece.name, piece.start)):
        owners[piece.key] = loads.index(min(loads))
        loads[owners[piece.key]] += piece.cost
    return [replace(piece, owner=owners[piece.key]) for piece in pieces]


class SavedState(Protocol):
    """The optimizer state of a checkpoint, whatever the number of ranks that has written it."""

    def keys(self, name: str) -> Iterable[str]:
        """Return the keys of a parameter's state; none if it has no state yet."""
        ...

    def rows(self, name: str, key: str, start: int, stop: int) -> Tensor:
        """Return the rows of a state tensor, or the whole of one that has no rows."""
        ...


class ShardedOptimizers:
    """A model's optimizers; this rank has those of its own pieces."""

    def __init__(
        self, model: nn.Module, groups: Sequence[Group], config: OptimizerConfig, ranks: Ranks
    ) -> None:
        """Divide the parameters; state is made with the first step."""
        self._parameters = dict(model.named_parameters())
        self._ranks = ranks
        self._pieces = partition(groups, ranks.size)
        self._tensors = {piece.key: self._tensor(piece) for piece in self._pieces}
        self._mine = [piece for piece in self._pieces if piece.owner == ranks.rank]
        self._optimizers = optimizers_of(self._tensors, self._own(groups), config)
        self._optimizer_of = {
            id(tensor): optimizer
            for optimizer in self._optimizers
            for group in optimizer.param_groups
            for tensor in group["params"]
        }

    def step(self, share: float) -> None:
        """Take one step with the parameters' gradients, and clear these.

        Args:
            share: the learning rate as a share of its peak.
        """
        set_lr(self._optimizers, share)
        for piece in self._mine:
            tensor, parameter = self._tensors[piece.key], self._parameters[piece.name]
            if tensor is not parameter:
                grad = parameter.grad
                tensor.grad = None if grad is None else grad[piece.start : piece.stop]
        for optimizer in self._optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for parameter in self._parameters.values():
            parameter.grad = None
        self._send()

    def state(self) -> dict[str, Tensor]:
        """Return this rank's state, ``key:start-stop:name`` → tensor."""
        return {
            f"{key}:{piece.key}": value
            for piece in self._mine
            for key, value in self._state_of(piece).items()
        }

    def load(self, saved: SavedState) -> None:
        """Take this rank's state from a checkpoint."""
        for piece in self._mine:
            state = self._state_of(piece)
            for key in saved.keys(piece.name):
                value = saved.rows(piece.name, key, piece.start, piece.stop)
                # torch keeps AdamW's count of steps, a number, on the CPU. Copied, because what is
                # read twice from a file may be one memory, and the count is raised in its place.
                state[key] = value.to(self._ranks.device if value.ndim else "cpu", copy=True)

    @property
    def elements(self) -> int:
        """Numbers of this rank's optimizer state."""
        return sum(value.numel() for value in self.state().values())

    def _tensor(self, piece: Piece) -> Tensor:
        """Return the parameter itself, or a view of its rows that is updated in its place."""
        parameter = self._parameters[piece.name]
        if piece.stop - piece.start == (parameter.shape[0] if parameter.ndim else 1):
            return parameter
        return nn.Parameter(parameter.detach()[piece.start : piece.stop])

    def _own(self, groups: Iterable[Group]) -> Iterator[Group]:
        """Yield the groups with this rank's pieces as names."""
        for group in groups:
            names = set(group.names)
            keys = tuple(piece.key for piece in self._mine if piece.name in names)
            if keys:
                yield replace(group, names=keys)

    def _state_of(self, piece: Piece) -> dict[str, Tensor]:
        tensor = self._tensors[piece.key]
        state: dict[str, Tensor] = self._optimizer_of[id(tensor)].state[tensor]
        return state

    @torch.no_grad()
    def _send(self) -> None:
        """Send every piece from its owner to the other ranks."""
        if self._ranks.size == 1:
            return
        waiting = [
            dist.broadcast(self._tensors[piece.key].detach(), src=piece.owner, async_op=True)
            for piece in self._pieces
        ]
        for work in waiting:
            work.wait()
