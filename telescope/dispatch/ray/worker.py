"""The code in Ray's worker processes: a worker carries out its orders."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import ray
from ray import cloudpickle, tune

from telescope.dispatch.packing import Packer
from telescope.dispatch.packs import PackSize
from telescope.dispatch.process import end_lost, ended_if_hung, logged
from telescope.dispatch.queue import THREAD_VARIABLES, Trainer
from telescope.errors import LostError
from telescope.streams import spell_what_is_lacking


class Worker(tune.Trainable):  # type: ignore[misc]
    """One worker process: it runs the order in its config and is reset for the next one."""

    def setup(
        self,
        config: dict[str, Any],
        *,
        trainer: bytes,
        gate: Any,
        timeout: float,
        logs: str,
        pack: PackSize,
        share: float,
        place: str | None,
    ) -> None:
        """Enter the driver's folder, and size thread pools before the trainer imports torch."""
        if place:
            os.chdir(place)
        self._pickled = trainer
        # Loaded on first use, so that a trainer that cannot load fails a trial, not the worker.
        self._packer = Packer(self._load, pack, timeout=timeout, share=share, guard=ended_if_hung)
        self._gate = gate
        self._logs = Path(logs)
        cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 1)
        os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(max(1, int(cpus)))))
        spell_what_is_lacking()

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Accept the next order, which Tune puts into `config`, in the same process."""
        return True

    def step(self) -> dict[str, Any]:
        """Carry out the order, or wait at the gate."""
        if order := self.config.get("order"):
            with logged(self._logs, order.trials[0]):
                try:
                    return {"done": True, "work": self._packer(order)}
                except LostError as error:
                    end_lost(error)
        self._packer.warm()
        ray.get(self._gate.wait_beyond.remote(self.config["turn"]))
        return {"done": True}

    def _load(self) -> Trainer:
        trainer: Trainer = cloudpickle.loads(self._pickled)
        return trainer
