"""The gate at which Ray's idle workers wait.

It is a module of its own because importing the worker's takes two seconds, in the gate's process
too.
"""

from __future__ import annotations

import asyncio


class Gate:
    """An actor on which idle workers sleep until the driver has an order for them."""

    def __init__(self) -> None:
        """Start closed."""
        self._turn = 0
        self._opened = asyncio.Condition()

    async def open(self, turn: int) -> None:
        """Release all workers that wait for this turn."""
        async with self._opened:
            self._turn = turn
            self._opened.notify_all()

    async def wait_beyond(self, turn: int) -> None:
        """Return once the gate has been opened after `turn`."""
        async with self._opened:
            await self._opened.wait_for(lambda: self._turn > turn)
