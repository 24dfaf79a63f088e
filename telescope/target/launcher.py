"""Start a target run's ranks on Ray Train, local or on a cluster, and replace those that are lost.

Ray starts the processes and connects them; all that they say comes by the run's folder.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from telescope.dispatch.ray.connect import connected, session_folder  # decides where Ray listens

# isort: split
os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer

from telescope import errors
from telescope.dispatch.ray.session import reap
from telescope.dispatch.ray.tune import Size, rooms
from telescope.errors import LostError, SpecError, TelescopeError
from telescope.target.folder import RunFolder
from telescope.target.record import Manner

LOSSES = 3
"""Number of times that lost ranks are started again; then the same command goes on."""
LOOK_SECONDS = 0.3
"""Pause between two looks at the run's progress."""
SWITCHES = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # else 2 s pass until it sees that they have ended
    # A rank's threads do not spin while they wait for each other: where something else runs on the
    # same cores, a step would take many times as long.
    "OMP_WAIT_POLICY": "PASSIVE",
}
"""Environment of a Ray of our own."""


@dataclass(frozen=True)
class Place:
    """The ranks' number, their resources, and the Ray that they run on."""

    ranks: int
    cpus: float = 1
    gpus: float = 0
    address: str | None = None
    """``host:port`` of a running cluster, or ``auto``; None: a Ray of our own."""


def launch(
    path: Path, manner: Manner, place: Place, show: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Train a run to its end, its folder held by the caller.

    Args:
        path: the run's folder; all machines see the same one.
        manner: the manner of this start.
        place: the ranks.
        show: called with the latest progress a few times per second.

    Returns:
        The content of `result.json`.

    Raises:
        SpecError: there is no cluster, or no room for the ranks.
        LostError: Ray is lost, or ranks are lost again and again.
        TelescopeError: what the ranks themselves report.
        KeyboardInterrupt: as it came; the ranks are ended.
    """
    owner, folder = str(path.resolve()), RunFolder(path)
    reap(owner)
    lost: queue.SimpleQueue[LostError] = queue.SimpleQueue()
    # A cluster's other machines see the results folder, but not this one's temporary files.
    with ExitStack() as stack:
        session = stack.enter_context(session_folder(owner))
        stack.enter_context(_set(SWITCHES))
        stack.enter_context(
            connected(
                session,
                owner=owner,
                address=place.address,
                cpus=int(place.ranks * place.cpus),
                on_loss=lost.put,
            )
        )
        _check_room(place)
        storage = folder.path / "ray" if place.address else session
        fit = _Fit(_trainer(folder.path, manner, place, storage))
        fit.start()
        while fit.is_alive():
            fit.join(LOOK_SECONDS)
            if not lost.empty():
                raise lost.get()
            if status := folder.read_status():
                show(status)
        return fit.outcome(folder)


class _Fit(threading.Thread):
    """Ray's `fit` outside the main thread, where it would catch Ctrl-C for itself."""

    def __init__(self, trainer: TorchTrainer) -> None:
        super().__init__(daemon=True, name="telescope-fit")
        self._trainer = trainer
        self._said: dict[str, str] | None = None
        self._error: Exception | None = None

    def run(self) -> None:
        """Fit."""
        try:
            # Rays before 2026 do not pass it on; the message is then less exact.
            self._said = getattr(self._trainer.fit(), "return_value", None)
        except Exception as error:
            self._error = error

    def outcome(self, folder: RunFolder) -> dict[str, Any]:
        """Return the run's result.

        Raises:
            TelescopeError: see `launch`.
        """
        if self._error:
            raise _described(self._error) from self._error
        if self._said:
            raise getattr(errors, self._said["error"])(self._said["text"])
        if result := folder.read_result():
            return result
        raise LostError(
            f"{folder.path}: the ranks have ended, and there is no result here; all machines must "
            "see the same results folder"
        )


def _trainer(path: Path, manner: Manner, place: Place, storage: Path) -> TorchTrainer:
    is_local = place.address is None
    resources = {"CPU": place.cpus} | ({"GPU": place.gpus} if place.gpus else {})
    return TorchTrainer(
        _train_rank,
        train_loop_config={
            "path": str(path.resolve()),
            "manner": manner,
            "gpus": place.gpus,
            "place": os.getcwd() if is_local else None,
        },
        torch_config=TorchConfig(backend="nccl" if place.gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=place.ranks, use_gpu=bool(place.gpus), resources_per_worker=resources
        ),
        run_config=RunConfig(
            name=f"train-{time.monotonic_ns()}",
            storage_path=str(storage.resolve()),
            failure_config=FailureConfig(max_failures=LOSSES),
        ),
    )


def _train_rank(given: dict[str, Any]) -> dict[str, str] | None:
    """Train on one rank; called by Ray in each of its workers.

    Returns:
        A user's error, its class and text, which is the same on all ranks; None without one. To
        raise it would make Ray start the ranks again, to end in the same way.
    """
    import torch

    from telescope.target.ranks import Ranks
    from telescope.target.train import train_target

    if given["place"]:
        os.chdir(given["place"])
    device = f"cuda:{torch.cuda.current_device()}" if given["gpus"] else "cpu"
    try:
        train_target(Path(given["path"]), given["manner"], Ranks.of_group(device))
    except TelescopeError as error:
        return {"error": type(error).__name__, "text": str(error)}
    return None


def _check_room(place: Place) -> None:
    """Refuse ranks without room, for which Ray would wait for ever.

    Raises:
        SpecError: saying what there is.
    """
    where = "the cluster" if place.address else "this machine"
    for key, amount, room, have in rooms(Size(place.ranks, place.cpus, place.gpus)):
        if room < place.ranks:
            raise SpecError(
                f"--workers: got {place.ranks} with {amount:g} {key} each, {where} has {have:g}; "
                "lower it"
            )


def _described(error: Exception) -> TelescopeError:
    """Describe a training that Ray has given up, by the exception of its first failed rank."""
    failures = getattr(error, "worker_failures", {})
    for rank, failure in sorted(failures.items()):
        lines = str(failure).strip().splitlines() or [type(failure).__name__]
        return LostError(
            f"rank {rank} failed {LOSSES + 1} times, the last time with: {lines[-1][:300]}; the "
            "same command goes on from the last checkpoint"
        )
    reason = " ".join(str(error).split())[:300]
    what = "Ray Train" if isinstance(error, TrainingFailedError) else "Ray"
    return LostError(f"{what} has failed: {reason}; the same command goes on")


@contextmanager
def _set(variables: dict[str, str]) -> Iterator[None]:
    """Set environment variables, unless the user has, for as long as the block runs."""
    own = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(own)
    try:
        yield
    finally:
        for name in own:
            os.environ.pop(name, None)
