"""Run a sweep in this process, one order after the other: for debugging, and as the reference."""

from __future__ import annotations

from telescope.dispatch.packing import Packer
from telescope.dispatch.packs import Packs
from telescope.dispatch.queue import Queue, Trainer
from telescope.records import TrialSource


def run_inline(
    source: TrialSource,
    trainer: Trainer,
    *,
    timeout: float = 0.0,
    packs: Packs | None = None,
) -> None:
    """Run every trial that `source` asks for; return when it asks for no more.

    A trial that exits, is killed or hangs in C does so to this process.

    Raises:
        LostError: after a trial, this process cannot use its device; no failure is told.
    """
    packs = packs or Packs()
    queue = Queue(source, packs=packs)
    packer = Packer(lambda: trainer, packs.size, timeout=timeout)
    while order := queue.take():
        queue.settle(order, packer(order))
