"""Run a sweep on Ray: one Ray Tune experiment for the whole ladder, across its stages.

Tune's searcher asks the `Queue` for an order whenever a worker is free. Results come back to the
driver, which alone talks to the source. Worker processes live on over trials and stages: each gets
the trainer once and imports torch once. If trials of different widths need different CPUs or GPUs,
there is one experiment per such size, on the same Ray: an actor keeps its resources, so a worker of
another size is a new process anyway.

At the end of a stage a free worker has nothing to do, and Tune would stop it. Instead it gets a
*gate trial*, which sleeps until there is an order again.

On a cluster the workers import the `telescope` that is installed there; only the trainer is sent.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from telescope.dispatch.ray.connect import connected, session_folder  # decides where Ray listens

# isort: split
import ray
from ray import cloudpickle, tune
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from telescope.dispatch.packs import Packs
from telescope.dispatch.process import log_tail
from telescope.dispatch.queue import Order, Queue, Trainer, clean
from telescope.dispatch.ray.gate import Gate
from telescope.dispatch.ray.session import reap
from telescope.dispatch.ray.worker import Worker
from telescope.errors import SpecError
from telescope.records import TrialSource

START_PATIENCE = 15.0
"""Seconds that a trial without room waits for a worker before it gets one that waits at the gate: a
lost node never comes back."""

START_LIMIT = 600.0
"""Seconds that a trial with room waits for its process, about 3 where nothing slows it down."""


@dataclass(frozen=True)
class Size:
    """The number of trials at once, and the resources of each."""

    workers: int
    cpus: float = 1
    gpus: float = 0


@dataclass(frozen=True)
class Session:
    """A Ray ready to run on, with the parts that only one sweep at a time can use."""

    folder: Path
    driver: _Driver
    place: str | None
    """Working directory of the workers; None: the one in which they start."""
    size: Size
    by_width: Mapping[int, Size]
    """Width → another size, with as many workers as there is room for."""

    def part(self, width: int | None) -> tuple[Size, list[int]]:
        """Return the size of a width's trials, and all widths of that size; [] means every width.

        Args:
            width: the width; None for the narrowest.
        """
        size = self.by_width.get(min(self.by_width, default=0) if width is None else width)
        widths = [other for other, its in self.by_width.items() if its == size]
        return size or self.size, widths


@contextmanager
def opened(
    size: Size,
    by_width: Mapping[int, Size] | None = None,
    *,
    owner: str | None = None,
    address: str | None = None,
    takes_any_gpu: bool = False,
) -> Iterator[Session]:
    """Connect to a Ray, or start one, and check that there is room for the trials.

    This process's own connection comes first, then the cluster at `address`; else a Ray is started
    for this machine alone and stopped at the end.

    Args:
        size: the number of trials at once, each in a process of its own, and the resources of each.
            Its CPUs, rounded down, are its number of threads; fractions of a GPU share it.
        by_width: width → another size, of which as many trials run at once as there is room for.
            Trials of widths of one size must be asked for together.
        owner: a name that only one run at a time may use; the leftovers of an earlier, dead run of
            that name are ended first.
        address: ``host:port`` of a running cluster, or ``auto`` to look for one.
        takes_any_gpu: a trial computes on the first GPU that it sees, even without a reservation;
            refused if there are GPUs.

    Raises:
        SpecError: there is no cluster at `address` or no room for the trials, or all trials would
            share GPUs unplanned.
        LostError: Ray's head or this machine's raylet has died. If a call into Ray cannot be
            interrupted, the process ends with that message instead.
    """
    owner = owner or f"process {os.getpid()}"
    reap(owner)
    sizes = by_width or {}
    where = "the cluster" if address else "this machine"
    # Only for a Ray of our own, whose processes start elsewhere; a cluster's have their own folder.
    place = None if address or ray.is_initialized() else os.getcwd()
    with session_folder(owner) as folder:
        driver = _Driver(leave_at_once=not ray.is_initialized(), logs=folder)
        with connected(
            folder,
            owner=owner,
            address=address,
            cpus=_cpus([size, *sizes.values()]),
            on_loss=driver.stop,
        ):
            sizes = {width: _fitting(each, where) for width, each in sizes.items()}
            if not sizes:
                _check_room(size, where)
            if takes_any_gpu:
                _check_reserved(sizes.values() or [size], where)
            yield Session(folder, driver, place, size, sizes)


def run_ray(
    source: TrialSource,
    trainer: Trainer,
    session: Session,
    *,
    timeout: float = 0.0,
    packs: Packs | None = None,
    logs: Path | None = None,
) -> None:
    """Run every trial that `source` asks for; return when it asks for no more.

    Until the source is due, workers start, import their modules and wait at the gate, on all CPUs
    but one. If there are several sizes, these are workers of the narrowest width.

    Args:
        source: asked and told in this process only.
        trainer: pickled once; each worker process keeps one copy for all its trials.
        session: the Ray from `opened`, which also documents the exceptions.
        timeout: seconds after which a trial counts as hung; 0: never. The process of a trial that
            cannot be interrupted is ended `process.HANG_GRACE` later.
        packs: the division of trials into packs; by default none.
        logs: folder for each trial's output as ``TRIAL.log``; by default it is not kept.

    Raises:
        KeyboardInterrupt: Ctrl-C; running trials are killed, finished ones have been told.
    """
    driver, packs = session.driver, packs or Packs()
    if logs:
        logs.mkdir(parents=True, exist_ok=True)
    driver.logs = logs = (logs or session.folder).absolute()
    driver.gate = ray.remote(Gate).options(num_cpus=0).remote()
    given = {
        **{"trainer": cloudpickle.dumps(trainer), "gate": driver.gate, "place": session.place},
        **{"timeout": timeout, "logs": str(logs), "pack": packs.size},
    }
    try:
        while True:
            asked = source.begun().ask() if source.is_due else None  # due a moment later, perhaps
            if asked is not None and not asked:
                break
            size, widths = session.part(asked[0].width if asked else None)
            queue = Queue(source, packs=packs, workers=size.workers, widths=widths)
            driver.serve(queue, ahead=_ahead(size))
            with suppress(_Leave):
                _tuner(_worker(given, size), driver, size.workers, session.folder).fit()
            if driver.error:
                raise driver.error
            if not queue.is_done:
                raise KeyboardInterrupt  # on a user's Ray, Tune's own handler has swallowed it
    finally:
        ray.kill(driver.gate)


def _worker(given: Mapping[str, Any], size: Size) -> Any:
    """Return the worker class for a size, as Tune requires it."""
    # Share of its device: a GPU is shared if it is reserved in fractions, or by nobody.
    share = min(1.0, size.gpus) if size.gpus else 1.0 / size.workers
    worker = tune.with_parameters(Worker, **given, share=share)
    return tune.with_resources(worker, {"cpu": size.cpus, "gpu": size.gpus})


def _ahead(size: Size) -> int:
    """Return the number of workers to start before the source is due.

    One CPU is left for the work that everybody waits for; if all workers started, they would slow
    it down, and the first trial would begin later.
    """
    free = len(os.sched_getaffinity(0)) - 1
    return max(1, min(size.workers, math.floor(free / (size.cpus or 1))))


class _Leave(BaseException):
    """Ends `fit()` at once, as Ctrl-C does; Tune's own way out waits 12 s for running trials."""


class _Driver(Searcher):  # type: ignore[misc]  # Ray's base classes are untyped
    """The driver's side of the experiment: it gives orders and keeps the source's first error.

    It is Tune's searcher, which must not raise, so it stores the error.
    """

    def __init__(self, *, leave_at_once: bool, logs: Path) -> None:
        super().__init__()
        self.gate: Any = None
        self.logs = logs
        self.error: Exception | None = None
        self._queue: Queue
        self._leave_at_once = leave_at_once
        self._running: dict[str, Order | None] = {}  # Tune's trial id → order, none at the gate
        self._ahead = 0
        self._was_due = False
        self._turn = 0  # number of times that the gate was opened
        self._unstarted: dict[str, float] = {}  # Tune's trial id → time of handing it out
        self._opened = 0.0  # last time that the gate was opened for one of those
        self._looked = 0.0  # last time that Ray was asked for what lacks room
        self._lacks_room = False

    def serve(self, queue: Queue, *, ahead: int) -> None:
        """Hand out this queue's orders from now on; earlier trials have ended.

        Args:
            queue: the trials.
            ahead: number of workers that wait at the gate before the queue is due.
        """
        self._queue = queue
        self._ahead = ahead
        self._was_due = queue.is_due
        self._running.clear()
        self._unstarted.clear()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as a plain object: Tune pickles its searcher into a folder that nobody reads."""
        return (object, ())

    def suggest(self, tune_id: str) -> dict[str, Any] | str | None:
        """Return a free worker's next task: trials, or waiting at the gate; FINISHED at the end.

        None means nothing for now: the worker is left for a trial that has found no other worker,
        or its CPU for the work that the queue waits for.
        """
        finished: str = Searcher.FINISHED
        if self.error:
            return finished
        try:
            order = self._queue.take()
            if not order and self._queue.is_done:
                return finished
            if not order and (self._has_stranded() or self._are_enough_ahead()):
                return None
        except Exception as error:
            self.error = error
            return finished
        self._running[tune_id] = order
        if order:
            self._unstarted[tune_id] = time.monotonic()
        return {"order": order} if order else {"turn": self._turn}

    def on_trial_complete(
        self, tune_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Take a worker's outcome; errors go to `lose`, which gets their reason."""
        if result is None or error:
            return
        order = self._end(tune_id)
        with self._keeping_errors():
            if order and not self.error and (done := result.get("work")) is not None:
                self._queue.settle(order, done)
                self._open_gate()

    def lose(self, tune_id: str, reason: str) -> None:
        """Take the loss of a worker process: its trials have failed; a gate trial is ignored."""
        order = self._end(tune_id)
        with self._keeping_errors():
            if order and not self.error:
                reason = clean([reason, *log_tail(self.logs, order.trials[0])])
                self._queue.lose(order, reason)
                self._open_gate()

    def save(self, checkpoint_path: str) -> None:
        """Save nothing: the store is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Restore nothing."""

    def _end(self, tune_id: str) -> Order | None:
        self._unstarted.pop(tune_id, None)
        return self._running.pop(tune_id)

    @contextmanager
    def _keeping_errors(self) -> Iterator[None]:
        """Store an exception of the source."""
        try:
            yield
        except Exception as error:
            self.error = error

    def _open_gate(self) -> None:
        """Release the workers at the gate if there is work, or the queue is done."""
        if None in self._running.values() and (self._queue.has_work or self._queue.is_done):
            self._turn += 1
            self.gate.open.remote(self._turn)

    def _are_enough_ahead(self) -> bool:
        """Tell whether enough workers wait for the queue to be due."""
        return not self._queue.is_due and len(self._running) >= self._ahead

    def stop(self, error: Exception) -> None:
        """Stop because of an error from outside."""
        self.error = self.error or error

    def began(self, tune_id: str) -> None:
        """Note that a worker has been found for a trial."""
        self._unstarted.pop(tune_id, None)

    def _has_stranded(self) -> bool:
        """Tell whether a trial has waited too long for a worker, as when a machine is lost.

        A trial that has room waits for the process that starts for it. Another worker would be
        quicker, but Tune then stops that process; where starts are slow, there would never be a
        second one. A process that has not come after START_LIMIT may never come.
        """
        now = time.monotonic()
        longest = max((now - asked for asked in self._unstarted.values()), default=0.0)
        if longest <= START_PATIENCE:
            return False
        if longest > START_LIMIT:
            return True
        if now - self._looked > 1.0:
            self._looked, self._lacks_room = now, _lacks_room()
        return self._lacks_room

    def _free_workers_for_stranded(self) -> None:
        """Release workers from the gate if a trial has waited too long for one."""
        is_due = time.monotonic() - self._opened > 1.0
        if is_due and None in self._running.values() and self._has_stranded():
            self._opened = time.monotonic()
            self._turn += 1
            self.gate.open.remote(self._turn)

    def is_stopped(self) -> bool:
        """Tell whether the experiment must end early; Tune asks this after every event."""
        if self._queue.is_due and not self._was_due:
            self._was_due = True
            with self._keeping_errors():
                self._open_gate()
        with self._keeping_errors():
            self._free_workers_for_stranded()
        if self.error and self._leave_at_once:
            raise _Leave
        return self.error is not None


class _Scheduler(FIFOScheduler):  # type: ignore[misc]
    """A scheduler that leaves a trial to the worker that is starting up for it.

    Tune's own scheduler gives the trial to the next free worker and stops the starting one. If
    trials are shorter than a start, this repeats: after one lost process, all trials run on the
    other worker.
    """

    def choose_trial_to_run(self, tune_controller: Any) -> None:
        """Prefer no trial: Tune then gives the newest trial to the free worker."""
        return


class _Undertaker(tune.Callback):  # type: ignore[misc]
    """Passes on the reason of a worker's death, which Tune does not tell its searcher."""

    def __init__(self, driver: _Driver) -> None:
        self._driver = driver

    def on_trial_start(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any
    ) -> None:
        """Note that a trial has its worker."""
        self._driver.began(trial.trial_id)

    def on_trial_error(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any
    ) -> None:
        """Report the trial as lost, with Ray's reason."""
        self._driver.lose(trial.trial_id, _death_reason(trial))


class _Stopper(tune.Stopper):  # type: ignore[misc]
    """Ends the experiment when the driver cannot go on."""

    def __init__(self, driver: _Driver) -> None:
        self._driver = driver

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Never stop a single trial."""
        return False

    def stop_all(self) -> bool:
        """Tell whether to stop; Tune asks after every event."""
        return self._driver.is_stopped()


def _tuner(worker: Any, driver: _Driver, workers: int, folder: Path) -> tune.Tuner:
    return tune.Tuner(
        worker,
        tune_config=tune.TuneConfig(
            search_alg=driver,
            scheduler=_Scheduler(),
            num_samples=-1,
            max_concurrent_trials=workers,
            reuse_actors=True,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name=f"tune-{time.monotonic_ns()}",
            storage_path=str(folder),
            stop=_Stopper(driver),
            callbacks=[_Undertaker(driver)],
            failure_config=tune.FailureConfig(max_failures=0),  # the queue retries
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            verbose=0,
        ),
    )


def _lacks_room() -> bool:
    """Tell whether anything on this Ray waits for room: Tune reserves a group for each worker."""
    groups = ray.util.placement_group_table().values()
    return any(group["state"] in ("PENDING", "RESCHEDULING") for group in groups)


def _cpus(sizes: Iterable[Size]) -> int:
    """Return the number of CPUs that a Ray of our own needs."""
    return max(math.ceil(size.workers * size.cpus) for size in sizes)


def _check_room(size: Size, where: str) -> None:
    """Refuse trials without room, because Tune would wait for ever for more machines."""
    for key, amount, room, have in rooms(size):
        if room < size.workers:
            raise SpecError(
                f"compute.{key}: got {amount:g} for each of {size.workers} trials at once, "
                f"{where} has {have:g}; lower compute.{key} or compute.workers"
            )


def _check_reserved(sizes: Iterable[Size], where: str) -> None:
    """Refuse trials that would all use the same GPU: without a reservation Ray hides no GPU."""
    there = sum(node["Resources"].get("GPU", 0) for node in ray.nodes() if node["Alive"])
    if there and not all(size.gpus for size in sizes):
        raise SpecError(
            f"compute.gpus: got 0, {where} has {there:g}, and all trials of a machine would "
            "compute on its first; set compute.gpus = 1 (or 0.5), or compute.device = 'cpu'"
        )


def _fitting(size: Size, where: str) -> Size:
    """Reduce the number of trials at once to the room that there is.

    Raises:
        SpecError: there is not even room for one.
    """
    fewest = min([size.workers, *(room for _, _, room, _ in rooms(size))])
    one = replace(size, workers=max(1, fewest))
    _check_room(one, where)
    return one


def rooms(size: Size) -> Iterator[tuple[str, float, int, float]]:
    """Yield for each resource of a trial: key, amount, trials that fit, total amount."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for key, resource, amount in (("cpus", "CPU", size.cpus), ("gpus", "GPU", size.gpus)):
        if amount:
            room = sum(math.floor(node.get(resource, 0) / amount + 1e-9) for node in nodes)
            yield key, amount, room, sum(node.get(resource, 0) for node in nodes)


def _death_reason(trial: TuneTrial) -> str:
    """Return Ray's reason for a lost worker on one line, without identifiers and advice."""
    lines = (
        Path(trial.error_file)
        .read_text(encoding="utf-8", errors="backslashreplace")
        .splitlines()[1:]
    )
    text = " ".join(" ".join(line for line in lines if line[:1] != "\t").split())
    text = text.partition(" Some common causes")[0]
    return text if len(text) < 600 else f"{text[:300]} … {text[-300:]}"
