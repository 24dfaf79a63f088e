"""Checkpoints of a target run: each rank writes its part, and the folder appears whole or not.

    checkpoints/step-N/
        model.safetensors            parameters and buffers by name, whole, fp32
        optimizer-R-of-N.safetensors the state of rank R: ``key:start-stop:name``, with rows of a
                                     parameter; ``random:…`` and buffers that the model rebuilds
        state.json                   step, number of ranks, position; written last

The ranks write into a hidden folder, which the first one renames when all parts are there. So a
reader, or a crash, sees a whole checkpoint or none. Nothing is unpickled.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from telescope.errors import StoreError
from telescope.files import UNFINISHED, sync_folder, write_json
from telescope.target.fully_sharded import FullyShardedOptimizers, rows_of
from telescope.target.ranks import Ranks
from telescope.target.sharding import ShardedOptimizers
from telescope.train.checkpoint import plain_copy, put_random, random_states

Optimizers = ShardedOptimizers | FullyShardedOptimizers
MODEL_FILE = "model.safetensors"
STATE_FILE = "state.json"
KEPT = 2
"""Number of checkpoints kept besides those of `keep_every`."""
PATIENCE = 600.0
"""Seconds that the first rank waits for the other ranks' files."""


def optimizer_file(rank: int, ranks: int) -> str:
    """Return the name of a rank's file."""
    return f"optimizer-{rank}-of-{ranks}.safetensors"


class Checkpoints:
    """The checkpoints of one run, as one of its ranks sees them.

    Args:
        folder: of all checkpoints; all ranks see the same one.
        ranks: this rank.
        keep_every: checkpoints at multiples of this many steps are kept for good; 0: none is.
    """

    def __init__(self, folder: Path, ranks: Ranks, *, keep_every: int = 0) -> None:
        """Remember the folder; nothing is written yet."""
        self._folder = folder
        self._ranks = ranks
        self._keep_every = keep_every
        self._writer: _Writer | None = None

    def save(self, model: nn.Module, optimizers: Optimizers, position: Mapping[str, Any]) -> None:
        """Write a checkpoint; called by every rank at the same step.

        On an accelerator the files are written in another thread, while training goes on.

        Args:
            model: the whole model.
            optimizers: this rank's.
            position: "step" and all else that the next step depends on, as JSON.

        Raises:
            StoreError: this one or the one before cannot be written.
        """
        self.finish()
        own = {key: plain_copy(t) for key, t in self._own(model, optimizers).items()}
        copies = {optimizer_file(self._ranks.rank, self._ranks.size): own}
        whole = self._whole(model)
        if self._ranks.is_first:
            copies[MODEL_FILE] = whole
        writer = self._writer = _Writer(lambda: self._write(copies, position))
        if torch.device(self._ranks.device).type == "cpu":
            writer.run()  # the threads of a step would have to share its cores
            self.finish()
        else:
            writer.start()

    def finish(self) -> None:
        """Wait until the last checkpoint is on the disk.

        Raises:
            StoreError: it cannot be written.
        """
        if self._writer:
            if self._writer.is_alive():
                self._writer.join()
            error, self._writer = self._writer.error, None
            if error:
                raise error

    def clear_unfinished(self) -> None:
        """Remove what killed ranks have left; no rank may be writing."""
        for path in self._folder.glob(f".*{UNFINISHED}"):
            shutil.rmtree(path, ignore_errors=True)

    def newest(self) -> int:
        """Return the step of the latest whole checkpoint; 0 without one."""
        return next((step for step in reversed(self._steps()) if self._is_whole(step)), 0)

    def restore(self, step: int, model: nn.Module, optimizers: Optimizers) -> dict[str, Any]:
        """Restore model, this rank's state and its random state; return the position.

        Args:
            step: of a whole checkpoint, the same on all ranks.
            model: of this run.
            optimizers: this rank's; they may be of another number of ranks than the checkpoint's.
        """
        folder = self._path(step)
        state = json.loads((folder / STATE_FILE).read_bytes())
        with _Tensors([folder / MODEL_FILE]) as saved:
            put_model(model, saved, self._ranks)
        names = [optimizer_file(rank, state["ranks"]) for rank in range(state["ranks"])]
        with _Tensors([folder / name for name in names]) as saved:
            optimizers.load(_Rows(saved))
        own = self._ranks.rank
        if own < state["ranks"]:  # a rank that was not there before goes on with its own
            with _Tensors([folder / names[own]]) as saved:
                random = [key for key in saved if key.startswith("random.")]
                put_random(self._ranks.device, {key: saved[key] for key in random})
                _put_buffers(model, saved)
        position: dict[str, Any] = state["position"]
        return position

    def _whole(self, model: nn.Module) -> dict[str, Tensor]:
        """Return copies of the whole model's tensors on the first rank, nothing on the others."""
        whole = {}
        for name, tensor in model_tensors(model).items():
            # Every rank takes part in gathering one that is divided.
            found = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if self._ranks.is_first:
                whole[name] = plain_copy(found)
        return whole

    def _own(self, model: nn.Module, optimizers: Optimizers) -> dict[str, Tensor]:
        """Return this rank's part besides the model."""
        buffers = {f"buffer:{name}": t for name, t in rebuilt_buffers(model).items()}
        return {**optimizers.state(), **random_states(self._ranks.device), **buffers}

    def _write(
        self, files: Mapping[str, Mapping[str, Tensor]], position: Mapping[str, Any]
    ) -> None:
        step = int(position["step"])
        place = self._folder / f".step-{step}{UNFINISHED}"
        place.mkdir(parents=True, exist_ok=True)
        for name, tensors in files.items():
            _write_tensors(place / name, tensors)
        if not self._ranks.is_first:
            return
        parts = [place / optimizer_file(rank, self._ranks.size) for rank in range(self._ranks.size)]
        _wait_for(parts)
        state = {"schema": 1, "step": step, "ranks": self._ranks.size, "position": dict(position)}
        write_json(place / STATE_FILE, state)
        if self._path(step).exists():  # damaged, or it would have been restored
            self._remove(step)
        place.rename(self._path(step))
        sync_folder(self._folder)
        self._remove_old()

    def _remove_old(self) -> None:
        """Remove all but the last checkpoints, and those that are kept for good."""
        for step in self._steps()[:-KEPT]:
            if not (self._keep_every and step % self._keep_every == 0):
                self._remove(step)

    def _remove(self, step: int) -> None:
        """Remove a checkpoint: it disappears at once, before its files do."""
        gone = self._folder / f".gone-{step}{UNFINISHED}"
        shutil.rmtree(gone, ignore_errors=True)
        self._path(step).rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    def _steps(self) -> list[int]:
        """Return the steps of the checkpoints, rising."""
        found = []
        for path in self._folder.glob("step-*"):
            with suppress(ValueError):
                found.append(int(path.name.removeprefix("step-")))
        return sorted(found)

    def _path(self, step: int) -> Path:
        return self._folder / f"step-{step}"

    def _is_whole(self, step: int) -> bool:
        """Tell whether every file of a checkpoint is there and has its length."""
        folder = self._path(step)
        try:
            state = json.loads((folder / STATE_FILE).read_bytes())
            names = [optimizer_file(rank, state["ranks"]) for rank in range(state["ranks"])]
            with _Tensors([folder / name for name in (MODEL_FILE, *names)]):
                return int(state["step"]) == step and bool(names)
        except (OSError, ValueError, KeyError, TypeError, _damaged()):
            return False


class _Writer(Thread):
    """Writes one checkpoint in another thread, and keeps its error."""

    def __init__(self, write: Callable[[], None]) -> None:
        super().__init__(name="telescope-checkpoint", daemon=True)
        self._write = write
        self.error: Exception | None = None

    def run(self) -> None:
        """Write."""
        try:
            self._write()
        except OSError as error:
            self.error = StoreError(
                f"{error.filename or 'checkpoints'}: {error.strerror or error}; earlier "
                "checkpoints are kept: free or mend the place, and the same command goes on"
            )
        except Exception as error:
            self.error = error


class _Tensors(Mapping[str, Tensor]):
    """The tensors of some safetensors files, read when asked for."""

    def __init__(self, paths: list[Path]) -> None:
        self._paths = paths
        self._files: list[Any] = []
        self._where: dict[str, Any] = {}

    def __enter__(self) -> _Tensors:
        from safetensors import safe_open

        for path in self._paths:
            file: Any = safe_open(path, framework="pt")
            self._files.append(file)
            file.__enter__()
            self._where |= dict.fromkeys(file.keys(), file)
        return self

    def __exit__(self, *exception: object) -> None:
        for file in self._files:
            file.__exit__(None, None, None)

    def __getitem__(self, key: str) -> Tensor:
        tensor: Tensor = self._where[key].get_tensor(key)
        return tensor

    def shape(self, key: str) -> list[int]:
        """Return a tensor's shape, without reading it."""
        shape: list[int] = self._where[key].get_slice(key).get_shape()
        return shape

    def rows(self, key: str, rows: slice) -> Tensor:
        """Return some rows of a tensor, without reading the others."""
        tensor: Tensor = self._where[key].get_slice(key)[rows]
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


class _Rows:
    """Optimizer state by parameter, put together from the pieces of any number of ranks."""

    def __init__(self, saved: _Tensors) -> None:
        self._saved = saved
        self._pieces: dict[str, dict[str, list[tuple[int, int, str]]]] = {}
        for full in saved:
            key, _, rest = full.partition(":")
            rows, _, name = rest.partition(":")
            start, is_piece, stop = rows.partition("-")
            if is_piece and name:
                found = self._pieces.setdefault(name, {}).setdefault(key, [])
                found.append((int(start), int(stop), full))

    def keys(self, name: str) -> list[str]:
        """Return the keys of a parameter's state."""
        return list(self._pieces.get(name, {}))

    def rows(self, name: str, key: str, start: int, stop: int) -> Tensor:
        """Return the rows of a state tensor, or the whole of one that has no rows."""
        taken = []
        for its_start, its_stop, full in sorted(self._pieces[name][key]):
            first, last = max(start, its_start), min(stop, its_stop)
            if first < last:
                if not self._saved.shape(full):
                    return self._saved[full]
                taken.append(self._saved.rows(full, slice(first - its_start, last - its_start)))
        return torch.cat(taken) if len(taken) > 1 else taken[0]


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and the buffers that belong to a model's state, by name, each once."""
    rebuilt = rebuilt_buffers(model).keys()
    buffers = {name: b for name, b in model.named_buffers() if name not in rebuilt}
    return {**dict(model.named_parameters()), **buffers}


def rebuilt_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that are no part of a model's state dict, such as tables of angles."""
    kept = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name not in kept}


def put_model(model: nn.Module, saved: _Tensors, ranks: Ranks) -> None:
    """Copy a checkpoint's parameters and buffers into a model, or this rank's rows of them."""
    with torch.no_grad():
        for name, tensor in model_tensors(model).items():
            if isinstance(tensor, DTensor):
                rows = slice(*rows_of(tensor, ranks.rank, ranks.size))
                tensor.to_local().copy_(saved.rows(name, rows))
            else:
                tensor.copy_(saved[name])


def _put_buffers(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, buffer in rebuilt_buffers(model).items():
            if f"buffer:{name}" in saved:
                buffer.copy_(saved[f"buffer:{name}"])


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file that appears whole, and wait for the disk."""
    from safetensors.torch import save_file

    temporary = path.with_name(f".{path.name}{UNFINISHED}")
    save_file(dict(tensors), temporary)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.rename(path)


def _wait_for(paths: list[Path]) -> None:
    """Wait for files that other ranks write.

    Raises:
        StoreError: they do not come.
    """
    deadline = time.monotonic() + PATIENCE
    while missing := [path for path in paths if not path.exists()]:
        if time.monotonic() > deadline:
            raise StoreError(
                f"{missing[0]}: not written by its rank within {PATIENCE:g} s; all machines must "
                "see the same results folder"
            )
        time.sleep(0.01)


def _damaged() -> type[Exception]:
    """Return the exception of safetensors for a file that is cut off or is none of its own."""
    from safetensors import SafetensorError

    error: type[Exception] = SafetensorError
    return error
