"""Checkpoints of one trial: tensors as safetensors, everything else as JSON.

A checkpoint is two files. The JSON is written last and has the hash of the other, so an incomplete
checkpoint does not count and the one before it is used. A checkpoint holds all that the next step
depends on: parameters, buffers, optimizer state, random state and position. The batches are a
function of (seed, step).
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
"""Number of checkpoints that a trial keeps: the latest, and the one before in case of damage."""


@dataclass
class Position:
    """The progress of a trial: everything in a checkpoint besides its tensors."""

    step: int = 0
    """Optimizer steps taken."""
    first_loss: float | None = None
    """The first batch's loss, nats per token."""
    recent: list[float] = field(default_factory=list)
    """Losses of the batches since the curve's last row."""
    curve: list[CurvePoint] = field(default_factory=list)
    seconds: float = 0.0
    """Wall time so far, summed over all processes that have trained the trial."""


class Checkpoints:
    """The checkpoints of one trial.

    Args:
        folder: this trial's own folder; created with the first checkpoint.
        identity: hash of everything that the training depends on; checkpoints with another
            identity are ignored.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        """Remember the folder; nothing is read or written yet."""
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
            OSError: it cannot be written; earlier checkpoints are unchanged.
        """
        from safetensors.torch import save

        tensors = {
            **_model_tensors(model),
            **_optimizer_tensors(optimizers),
            **random_states(device),
        }
        data = save({name: plain_copy(tensor) for name, tensor in tensors.items()})
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
        """Restore model, optimizers and random state from the latest whole checkpoint.

        Args:
            model: the trial's model.
            optimizers: the trial's optimizers.
            device: the device of both.
            at_most: the last step from which the trial may resume.

        Returns:
            The checkpoint's position; the start if there is no checkpoint.
        """
        for position, tensors in self._whole():
            if position.step > at_most:
                continue
            _put_model(model, tensors)
            _put_optimizers(optimizers, tensors)
            put_random(device, tensors)
            return position
        return Position()

    def newest(self) -> int:
        """Return the step of the latest whole checkpoint, 0 without one."""
        return next((position.step for position, _ in self._whole()), 0)

    def save_end(self, position: Position, reason: str) -> None:
        """Store the end of the trial, for a pack whose other trials go on.

        Args:
            position: the position at the end.
            reason: the reason of its divergence, or "".
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        end = {"identity": self._identity, "position": asdict(position), "reason": reason}
        write_json(self._folder / END_FILE, end)

    def end(self) -> tuple[Position, str] | None:
        """Return what `save_end` stored; None if this training has stored nothing."""
        try:
            end = json.loads((self._folder / END_FILE).read_bytes())
            if end["identity"] == self._identity:
                return _position(end["position"]), str(end["reason"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return None

    def _whole(self) -> Iterator[tuple[Position, dict[str, Tensor]]]:
        """Yield this training's undamaged checkpoints, newest first."""
        from safetensors.torch import load

        for path in self._newest_first():
            try:
                facts = json.loads(path.read_bytes())
                data = path.with_suffix(".safetensors").read_bytes()
                is_whole = facts["sha256"] == hashlib.sha256(data).hexdigest()
                if is_whole and facts["identity"] == self._identity:
                    yield _position(facts["position"]), load(data)
            except (OSError, ValueError, KeyError, TypeError):
                continue  # incomplete, or just removed by a process that finished this trial

    def _newest_first(self) -> list[Path]:
        return sorted(self._folder.glob("step-*.json"), reverse=True)


def checkpoints_of(config: TrialConfig, trial: Trial) -> Checkpoints | None:
    """Return a trial's checkpoints; None if the spec asks for none."""
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


def plain_copy(tensor: Tensor) -> Tensor:
    """Copy a tensor to CPU memory of its own, as safetensors requires."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def _model_tensors(model: nn.Module) -> dict[str, Tensor]:
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {f"model.{name}": tensor for name, tensor in named.items()}


def _put_model(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in _model_tensors(model).items():
            tensor.copy_(tensors[name])


def _optimizer_tensors(optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Name each optimizer state ``optimizer.0.3.exp_avg``: optimizer, parameter, key."""
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
    """Return torch's random states on the CPU and on `device`, which dropout draws from."""
    states = {"random.cpu": torch.get_rng_state()}
    if torch.device(device).type != "cpu":
        states["random.device"] = torch.get_device_module(device).get_rng_state(device)
    return states


def put_random(device: str, tensors: Mapping[str, Tensor]) -> None:
    """Set torch's random states to those of `random_states`."""
    torch.set_rng_state(tensors["random.cpu"])
    if "random.device" in tensors and torch.device(device).type != "cpu":
        torch.get_device_module(device).set_rng_state(tensors["random.device"], device)
