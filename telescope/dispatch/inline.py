"""Runs a sweep in this process, one pack after the other: for debugging, and as the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from telescope.dispatch.packing import Packer, PackSize, largest
from telescope.dispatch.queue import Pack, Queue, Trainer
from telescope.records import Trial, TrialSource


def run_inline(
    source: TrialSource,
    trainer: Trainer,
    *,
    timeout: float = 0.0,
    pack: PackSize = 1,
    on_start: Callable[[Trial], None] | None = None,
    on_hand_out: Callable[[Sequence[Trial]], None] | None = None,
    on_pack: Callable[[Pack], None] | None = None,
) -> None:
    """Run every trial that `source` asks for; returns when it asks for no more.

    What a trial does to its process (exits, is killed, hangs in C) it does to this one.

    Raises:
        LostError: a trial has left this process unable to use its device; no failure is told.
    """
    queue = Queue(source, on_start=on_start, on_hand_out=on_hand_out, pack=largest(pack))
    packer = Packer(lambda: trainer, pack, timeout=timeout)
    while trials := queue.take_pack():
        done = packer(trials, queue.answer)
        queue.settle(done)
        if on_pack:
            on_pack(done)
