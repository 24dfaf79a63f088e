"""Runs a sweep on Ray: one Ray Tune experiment for the whole ladder, whatever its stages.

Tune's searcher asks the `Queue` for a trial whenever a worker is free, and results come back to
the driver, which alone talks to the source. Workers are processes that stay warm over trials and
stages: the trainer is sent to each once, and torch is imported once. Where trials of different
widths need different CPUs or GPUs, there is one experiment for each such size, on the same Ray: an
actor keeps what it was given, so a worker of another size is a new process anyway.

At a stage's end a free worker has nothing to do, and Tune would stop it. It gets a *gate trial*
instead, which sleeps until there is something to hand out again.

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
from telescope.dispatch.queue import Order, Queue, Trainer, clean
from telescope.dispatch.ray.gate import Gate
from telescope.dispatch.ray.session import reap
from telescope.dispatch.ray.worker import Worker, log_tail
from telescope.errors import SpecError
from telescope.records import TrialSource

START_PATIENCE = 15.0
"""Seconds a trial may wait for a worker before it gets one that waits at the gate: a process takes
about 3 to start, and a node that is lost never comes back."""


@dataclass(frozen=True)
class Size:
    """How many trials run at once, and what each of them holds."""

    workers: int
    cpus: float = 1
    gpus: float = 0


@dataclass(frozen=True)
class Session:
    """A Ray that can be run on, with what only one sweep at a time uses."""

    folder: Path
    driver: _Driver
    place: str | None
    """The folder that workers are to be in; None: where they start."""
    size: Size
    by_width: Mapping[int, Size]
    """Width → another size; as many at once as there is room for."""

    def part(self, width: int | None) -> tuple[Size, list[int]]:
        """The size of a width's trials, and all widths of that size; none stands for every width.

        Args:
            width: None for the narrowest.
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

    It is the Ray that this process is connected to, if it is; else the cluster at `address`; else
    one that is started for this machine alone, and stopped at the end.

    Args:
        size: how many trials at once, each in a process of its own, and what each holds. Rounded
            down, its CPUs are its number of threads; it shares a GPU by fractions.
        by_width: width → another size; of so many at once as many run as there is room for. What
            widths of one size ask for must come together.
        owner: a name that only one run at a time may use; what an earlier run of that name, now
            dead, left behind of its own Ray is ended first.
        address: ``host:port`` of a running cluster, or ``auto`` to look for one.
        takes_any_gpu: whether a trial computes on the first GPU that it sees, even if it has
            reserved none; refused where there are GPUs.

    Raises:
        SpecError: no cluster at `address`, no room for so many trials at once, or GPUs that all
            would share unplanned.
        LostError: Ray's head or this machine's raylet has died. Where a call into Ray cannot be
            interrupted, the process ends with that message instead, as Ray itself ends it later.
    """
    owner = owner or f"process {os.getpid()}"
    reap(owner)
    sizes = by_width or {}
    where = "the cluster" if address else "this machine"
    # Of a Ray of our own, whose processes start elsewhere; a cluster's have their own place.
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
    """Run every trial that `source` asks for; returns when it asks for no more.

    Until the source is due, workers start, import what they need and wait at the gate, on all CPUs
    but one; of several sizes, those of the narrowest width.

    Args:
        source: asked and told in this process only.
        trainer: pickled once; each worker process keeps one copy for all its trials.
        session: the Ray; see `opened`, also for what is raised.
        timeout: seconds after which a trial counts as hung; 0: never. One that cannot be
            interrupted has its process ended `worker.HANG_GRACE` later.
        packs: which trials a worker trains as one; left out, none.
        logs: where each trial's output is kept as ``TRIAL.log``; left out, nowhere.

    Raises:
        KeyboardInterrupt: Ctrl-C; what ran is killed, what had finished is told.
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
                raise KeyboardInterrupt  # on a Ray not ours, Tune's own handler swallowed it
    finally:
        ray.kill(driver.gate)


def _worker(given: Mapping[str, Any], size: Size) -> Any:
    """The class of a size's workers, as Tune takes it."""
    # Of its device: GPUs that are reserved in fractions are shared, and so is one that nobody does.
    share = min(1.0, size.gpus) if size.gpus else 1.0 / size.workers
    worker = tune.with_parameters(Worker, **given, share=share)
    return tune.with_resources(worker, {"cpu": size.cpus, "gpu": size.gpus})


def _ahead(size: Size) -> int:
    """How many workers start before there is a trial: what is waited for computes on a CPU too.

    Where all of them are started, they and it take turns, and the first trial begins later.
    """
    free = len(os.sched_getaffinity(0)) - 1
    return max(1, min(size.workers, math.floor(free / (size.cpus or 1))))


class _Leave(BaseException):
    """Ends `fit()` at once, as Ctrl-C does; Tune's own way out waits 12 s for running trials."""


class _Driver(Searcher):  # type: ignore[misc]  # Ray's base classes are untyped
    """The driver's side: which worker does what, and the first error of the source.

    Tune's searcher, which must not raise: it keeps the error.
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
        self._turn = 0  # how often the gate was opened
        self._unstarted: dict[str, float] = {}  # Tune's trial id → when it was handed out
        self._opened = 0.0  # when the gate was opened for one of those

    def serve(self, queue: Queue, *, ahead: int) -> None:
        """Hand out what this queue has from now on; whatever ran before has ended.

        Args:
            queue: the trials.
            ahead: how many workers wait for them before the queue is due.
        """
        self._queue = queue
        self._ahead = ahead
        self._was_due = queue.is_due
        self._running.clear()
        self._unstarted.clear()

    def __reduce__(self) -> tuple[Any, ...]:
        """Tune pickles its searcher and callbacks into its own folder; nobody reads it."""
        return (object, ())

    def suggest(self, tune_id: str) -> dict[str, Any] | str | None:
        """What a free worker does next: trials, or wait at the gate; FINISHED when all is over.

        None is none for now: the worker is left for a trial that has found no other, or its CPU for
        what the queue waits for.
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
        """Take what a worker brought back; errors go to `lose`, which knows their reason."""
        if result is None or error:
            return
        order = self._end(tune_id)
        with self._keeping_errors():
            if order and not self.error and (done := result.get("work")) is not None:
                self._queue.settle(order, done)
                self._open_gate()

    def lose(self, tune_id: str, reason: str) -> None:
        """Take the loss of a worker process: its trials have failed; a gate trial is forgotten."""
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
        """Keep what the source raises."""
        try:
            yield
        except Exception as error:
            self.error = error

    def _open_gate(self) -> None:
        """Let go who waits at the gate if there is something to do now."""
        if None in self._running.values() and (self._queue.has_work or self._queue.is_done):
            self._turn += 1
            self.gate.open.remote(self._turn)

    def _are_enough_ahead(self) -> bool:
        """Whether as many workers wait for the queue to be due as should."""
        return not self._queue.is_due and len(self._running) >= self._ahead

    def stop(self, error: Exception) -> None:
        """Give up for a reason that comes from outside."""
        self.error = self.error or error

    def began(self, tune_id: str) -> None:
        """Note that a worker has been found for a trial."""
        self._unstarted.pop(tune_id, None)

    def _has_stranded(self) -> bool:
        """Whether a trial waits in vain for a worker: its machine is gone, the others are full."""
        now = time.monotonic()
        return any(now - asked > START_PATIENCE for asked in self._unstarted.values())

    def _free_workers_for_stranded(self) -> None:
        """Let workers go that wait at the gate for the very trial that needs one of them."""
        is_due = time.monotonic() - self._opened > 1.0
        if is_due and None in self._running.values() and self._has_stranded():
            self._opened = time.monotonic()
            self._turn += 1
            self.gate.open.remote(self._turn)

    def is_stopped(self) -> bool:
        """Whether the experiment has to end before its trials do; asked all the time."""
        if self._queue.is_due and not self._was_due:
            self._was_due = True
            with self._keeping_errors():
                self._open_gate()
        self._free_workers_for_stranded()
        if self.error and self._leave_at_once:
            raise _Leave
        return self.error is not None


class _Scheduler(FIFOScheduler):  # type: ignore[misc]
    """Leaves a trial to the worker that is starting up for it.

    Tune's own gives it to the next worker that becomes free and stops the starting one, again and
    again where trials are shorter than a start: after one lost process all runs on the other.
    """

    def choose_trial_to_run(self, tune_controller: Any) -> None:
        """Prefer none: Tune then serves the newest trial with the worker that is free."""
        return


class _Undertaker(tune.Callback):  # type: ignore[misc]
    """Learns why a worker process died, which Tune does not tell its searcher."""

    def __init__(self, driver: _Driver) -> None:
        self._driver = driver

    def on_trial_start(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any
    ) -> None:
        """Learn that a trial has its worker."""
        self._driver.began(trial.trial_id)

    def on_trial_error(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any
    ) -> None:
        """Report the trial as lost, with Ray's account of it."""
        self._driver.lose(trial.trial_id, _death_reason(trial))


class _Stopper(tune.Stopper):  # type: ignore[misc]
    """Ends the experiment when the driver can no longer go on."""

    def __init__(self, driver: _Driver) -> None:
        self._driver = driver

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Never stop a single trial."""
        return False

    def stop_all(self) -> bool:
        """Asked by Tune after every event."""
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


def _cpus(sizes: Iterable[Size]) -> int:
    """How many CPUs a Ray of our own needs."""
    return max(math.ceil(size.workers * size.cpus) for size in sizes)


def _check_room(size: Size, where: str) -> None:
    """Refuse what could only wait: Tune waits for ever for machines that nobody adds."""
    for key, amount, room, have in _rooms(size):
        if room < size.workers:
            raise SpecError(
                f"compute.{key}: got {amount:g} for each of {size.workers} trials at once, "
                f"{where} has {have:g}; lower compute.{key} or compute.workers"
            )


def _check_reserved(sizes: Iterable[Size], where: str) -> None:
    """Refuse trials that would all find the same GPU: Ray hides none from who reserves none."""
    there = sum(node["Resources"].get("GPU", 0) for node in ray.nodes() if node["Alive"])
    if there and not all(size.gpus for size in sizes):
        raise SpecError(
            f"compute.gpus: got 0, {where} has {there:g}, and all trials of a machine would "
            "compute on its first; set compute.gpus = 1 (or 0.5), or compute.device = 'cpu'"
        )


def _fitting(size: Size, where: str) -> Size:
    """As many at once as there is room for.

    Raises:
        SpecError: not even for one.
    """
    fewest = min([size.workers, *(room for _, _, room, _ in _rooms(size))])
    one = replace(size, workers=max(1, fewest))
    _check_room(one, where)
    return one


def _rooms(size: Size) -> Iterator[tuple[str, float, int, float]]:
    """Of each resource that a trial holds: key, amount, trials there is room for, all there is."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for key, resource, amount in (("cpus", "CPU", size.cpus), ("gpus", "GPU", size.gpus)):
        if amount:
            room = sum(math.floor(node.get(resource, 0) / amount + 1e-9) for node in nodes)
            yield key, amount, room, sum(node.get(resource, 0) for node in nodes)


def _death_reason(trial: TuneTrial) -> str:
    """Ray's account of a lost worker on one line, without its identifiers and its advice."""
    lines = (
        Path(trial.error_file)
        .read_text(encoding="utf-8", errors="backslashreplace")
        .splitlines()[1:]
    )
    text = " ".join(" ".join(line for line in lines if line[:1] != "\t").split())
    text = text.partition(" Some common causes")[0]
    return text if len(text) < 600 else f"{text[:300]} … {text[-300:]}"
