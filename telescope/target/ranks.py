"""The processes of one run: who this is, its device, its rows, and the few words they exchange."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from telescope import errors
from telescope.errors import SpecError, TelescopeError

Made = TypeVar("Made")


@dataclass(frozen=True)
class Ranks:
    """One process of a run; torch's default process group connects several."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"
    """The rank's own device, with its number."""

    @classmethod
    def of_group(cls, device: str) -> Ranks:
        """Return this process's place in torch's default process group, if there is one."""
        if not dist.is_initialized():
            return cls(device=device)
        return cls(dist.get_rank(), dist.get_world_size(), device)

    @property
    def is_first(self) -> bool:
        """True for the rank that writes."""
        return self.rank == 0

    def rows(self, batch_size: int) -> range:
        """Return the consecutive rows of the global batch that this rank computes.

        Raises:
            SpecError: there are more ranks than rows.

        >>> [list(Ranks(rank, 3).rows(5)) for rank in range(3)]
        [[0, 1], [2, 3], [4]]
        """
        if self.size > batch_size:
            raise SpecError(
                f"--workers: got {self.size}, must be at most the batch's {batch_size} sequences"
            )
        least, more = divmod(batch_size, self.size)
        first = self.rank * least + min(self.rank, more)
        return range(first, first + least + (self.rank < more))

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over all ranks; the tensor itself if there is one rank."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def first_says(self, number: int) -> int:
        """Return the first rank's number to all."""
        if self.size == 1:
            return number
        said = torch.tensor([number], device=self.device)
        dist.broadcast(said, src=0)
        return int(said.item())

    def gather(self, text: str) -> list[str]:
        """Return every rank's text, in their order, to all."""
        if self.size == 1:
            return [text]
        said: list[str] = [""] * self.size
        dist.all_gather_object(said, text)
        return said

    def together(self, make: Callable[[], Made]) -> Made:
        """Do something on every rank; a user's error on one is raised on all.

        Otherwise the other ranks would wait for one that has left.

        Raises:
            TelescopeError: of the class and with the text of the first rank's that has failed.
        """
        made, failure = list[Made](), ""
        try:
            made.append(make())
        except TelescopeError as error:
            if self.size == 1:
                raise
            failure = f"{type(error).__name__}:{error}"
        for rank, said in enumerate(self.gather(failure)):
            if said:
                kind, _, text = said.partition(":")
                where = f" (rank {rank} of {self.size})"
                raise getattr(errors, kind)(text + where)
        return made[0]
