"""The table ``[scaling]``: the family of runs whose losses make a scaling law."""

from __future__ import annotations

from typing import Self

import pydantic

from telescope.config import all_faults, require
from telescope.spec.optimizers import ComparedTable
from telescope.spec.tables import Count, Seed, Table, Width


class SizeTable(Table):
    """One of ``[scaling] sizes``: a model and the length of its run."""

    width: Width
    tokens: Count
    """Tokens of the run, which is as many whole steps as come nearest."""
    depth: Count | None = None
    """Keyword `depth` of the model file's `build`; by default as in [model]."""
    batch_size: Count | None = None
    """Sequences per step; by default as in [train]."""


class ScalingTable(ComparedTable):
    """Table ``[scaling]``: what `telescope scaling` trains."""

    sizes: tuple[SizeTable, ...]
    seeds: tuple[Seed, ...] = (0, 1, 2)
    """Seeds of every size, the same under every optimizer."""

    @pydantic.model_validator(mode="after")
    @all_faults()
    def _check(self) -> Self:
        shown = [size.model_dump(exclude_none=True) for size in self.sizes]
        require(len(self.sizes) >= 2, "sizes", shown, "two or more, each a width and tokens")
        for number, size in enumerate(self.sizes):
            again = size in self.sizes[:number]
            require(not again, f"sizes.{number}", shown[number], "another size than those before")
        for key in ("optimizers", "seeds"):
            values = getattr(self, key)
            once = len(set(values)) == len(values) >= 1
            require(once, key, list(values), "one or more, each once")
        return self
