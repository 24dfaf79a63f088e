"""Checkpoints of one trial: tensors as safetensors, all else as JSON, each whole or ignored.

A checkpoint is two files. The JSON is written last and has the hash of the other, so that one that
was cut off anywhere does not count, and the one before it does. What a trial goes on from is all
that its next step depends on: parameters, buffers, optimizer state, the random state, and how far
it is; its batches are a function of (seed, step).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from telescope.config import TrialConfig
from telescope.files import remove_unfinished, write_atomic, write_json
from telescope.records import CurvePoint, Trial

END_FILE = "end.json"
KEPT = 2
"""How many checkpoints a trial keeps: the last one, and the one before should it be damaged."""


@dataclass
class Position:
    """How far a trial is, besides what its tensors say."""

    step: int = 0
    """Optimizer steps taken."""
    first_loss: float | None = None
    """The first batch's loss, nats per token."""
    recent: list[float] = field(default_factory=list)
    """Losses of the batches since the curve's last row."""
    curve: list[CurvePoint] = field(default_factory=list)
    seconds: float = 0.0
    """Wall time up to here, of all the processes that the trial has been trained in."""


class Checkpoints:
    """The checkpoints of one trial.

    Args:
        folder: of this trial alone; made when the first one is saved.
        identity: a hash of all that the training depends on; others' checkpoints are ignored.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        """Name the place; nothing is read or written yet."""
        self._folder = folder
        self._identity = identity

    def save(
        self,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        device: str,
        position: Position,
    ) -> None:
        """Write a checkpoint, then remove all but the last `KEPT`.

        Raises:
            OSError: it cannot be written; those before it are as they were.
        """
        from safetensors.torch import save

        tensors = {
            **_model_tensors(model),
            **_optimizer_tensors(optimizers),
            **random_states(device),
        }
        data = save({name: _plain(tensor) for name, tensor in tensors.items()})
        self._folder.mkdir(parents=True, exist_ok=True)
        stem = self._folder / f"step-{position.step:09d}"
        write_atomic(stem.with_suffix(".safetensors"), data)
        facts = {"identity": self._identity, "sha256": hashlib.sha256(data).hexdigest()}
        write_json(stem.with_suffix(".json"), {**facts, "position": asdict(position)})
        for old in self._newest_first()[KEPT:]:
            old.unlink(missing_ok=True)
            old.with_suffix(".safetensors").unlink(missing_ok=True)
        remove_unfinished(self._folder)

    def restore(
        self,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        device: str,
        *,
        at_most: float = math.inf,
    ) -> Position:
        """Put model, optimizers and random state where the last whole checkpoint has them.

        Args:
            model: of the trial.
            optimizers: of the trial.
            device: where they are.
            at_most: the last step that may be gone on from.

        Returns:
            How far it is; the start when there is no checkpoint.
        """
        for position, tensors in self._whole():
            if position.step > at_most:
                continue
            _put_model(model, tensors)
            _put_optimizers(optimizers, tensors)
            _put_random(device, tensors)
            return position
        return Position()

    def newest(self) -> int:
        """The step of the last whole checkpoint; 0 when there is none."""
        return next((position.step for position, _ in self._whole()), 0)

    def save_end(self, position: Position, reason: str) -> None:
        """Keep how the trial has ended, for a pack that goes on without it.

        Args:
            position: where.
            reason: why it diverged, or "".
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        end = {"identity": self._identity, "position": asdict(position), "reason": reason}
        write_json(self._folder / END_FILE, end)

    def end(self) -> tuple[Position, str] | None:
        """What `save_end` kept; None if there is none of this training."""
        try:
            end = json.loads((self._folder / END_FILE).read_bytes())
            if end["identity"] == self._identity:
                return _position(end["position"]), str(end["reason"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return None

    def _whole(self) -> Iterator[tuple[Position, dict[str, Tensor]]]:
        """The checkpoints that are this training's and not damaged, the newest first."""
        from safetensors.torch import load

        for path in self._newest_first():
            try:
                facts = json.loads(path.read_bytes())
                data = path.with_suffix(".safetensors").read_bytes()
                is_whole = facts["sha256"] == hashlib.sha256(data).hexdigest()
                if is_whole and facts["identity"] == self._identity:
                    yield _position(facts["position"]), load(data)
            except (OSError, ValueError, KeyError, TypeError):
                continue  # cut off, or removed by whoever trained this trial to its end meanwhile

    def _newest_first(self) -> list[Path]:
        return sorted(self._folder.glob("step-*.json"), reverse=True)


def checkpoints_of(config: TrialConfig, trial: Trial) -> Checkpoints | None:
    """Where a trial's checkpoints are; None where the spec asks for none."""
    if not config.train.checkpoint_every or config.checkpoint_folder is None:
        return None
    training = (
        trial,
        config.model.digest,
        sorted(config.model.kwargs.items()),
        config.optimizer,
        replace(config.train, checkpoint_every=0, timeout=0.0),
        (config.data.held_out, config.data.eval_tokens, config.corpus_digest),
        config.base_width,
    )
    identity = hashlib.sha256(repr(training).encode()).hexdigest()
    return Checkpoints(Path(config.checkpoint_folder) / str(trial), identity)


def _position(facts: Mapping[str, Any]) -> Position:
    curve = [CurvePoint(**row) for row in facts["curve"]]
    return Position(**{**facts, "curve": curve})


def _plain(tensor: Tensor) -> Tensor:
    """A copy on the CPU that shares its memory with no other, as safetensors wants it."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def _model_tensors(model: nn.Module) -> dict[str, Tensor]:
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {f"model.{name}": tensor for name, tensor in named.items()}


def _put_model(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in _model_tensors(model).items():
            tensor.copy_(tensors[name])


def _optimizer_tensors(optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """``optimizer.0.3.exp_avg``: which optimizer, which of its parameters, which of its state."""
    return {
        f"optimizer.{number}.{index}.{key}": value
        for number, optimizer in enumerate(optimizers)
        for index, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }


def _put_optimizers(
    optimizers: Sequence[torch.optim.Optimizer], tensors: Mapping[str, Tensor]
) -> None:
    for number, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, Tensor]] = {}
        prefix = f"optimizer.{number}."
        for name, tensor in tensors.items():
            if name.startswith(prefix):
                index, _, key = name.removeprefix(prefix).partition(".")
                state.setdefault(int(index), {})[key] = tensor
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})


def random_states(device: str) -> dict[str, Tensor]:
    """torch's random states on the CPU and on `device`, which dropout in a model draws from."""
    states = {"random.cpu": torch.get_rng_state()}
    if torch.device(device).type != "cpu":
        states["random.device"] = torch.get_device_module(device).get_rng_state(device)
    return states


def _put_random(device: str, tensors: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(tensors["random.cpu"])
    if "random.device" in tensors and torch.device(device).type != "cpu":
        torch.get_device_module(device).set_rng_state(tensors["random.device"], device)
