"""The gate that Ray's workers wait at.

Apart from the workers, whose imports take two seconds that its own process would spend too.
"""

from __future__ import annotations

import asyncio


class Gate:
    """An actor on which idle workers sleep until the driver has something to hand out."""

    def __init__(self) -> None:
        """Start closed."""
        self._turn = 0
        self._opened = asyncio.Condition()

    async def open(self, turn: int) -> None:
        """Let go all who wait for this turn."""
        async with self._opened:
            self._turn = turn
            self._opened.notify_all()

    async def wait_beyond(self, turn: int) -> None:
        """Return as soon as the gate has been opened since `turn`."""
        async with self._opened:
            await self._opened.wait_for(lambda: self._turn > turn)
