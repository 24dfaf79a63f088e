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

import asyncio
import faulthandler
import logging
import math
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

# Ray reads these two when it is imported. Without the first, a local Ray listens on every address
# of the machine; without the second, each lost worker prints a paragraph to stdout.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "^A worker died or was killed")

import ray
from ray import cloudpickle, tune
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from telescope.dispatch.queue import LOG_TAIL_LINES, Queue, Trainer, attempt, clean
from telescope.dispatch.ray_session import (
    MARK,
    OWNER_FILE,
    LocalRay,
    accepts,
    reap,
    watched,
)
from telescope.errors import LostError, SpecError
from telescope.records import Result, Status, Trial, TrialSource

OBJECT_STORE_BYTES = 100_000_000
"""Shared memory of an embedded Ray; it holds the pickled trainer and little else."""
CONNECT_SECONDS = 5.0
"""How long a cluster may take to accept a connection."""
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
"""What numerical libraries read, once, to size their thread pools."""
SWITCHES = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # the new engine prints tables even at verbosity 0
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths of a trainer keep their meaning
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no CSV, JSON and TensorBoard files per trial
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # a lost worker is a result with a reason
    "TUNE_GLOBAL_CHECKPOINT_S": "86400",  # nobody resumes from Tune's state: ours is the store
}
"""Documented switches of Ray and Tune, set for the time of a run."""
OWNER_SWITCHES = {"TUNE_DISABLE_SIGINT_HANDLER": "1"}
"""Tune's handler takes 12 s; to leave `fit()` in the middle is safe if `ray.shutdown` follows."""
CLUSTER_PATIENCE = 45.0
"""Seconds without its head, which may be started again, after which a cluster counts as dead; Ray
itself ends the driver's process after 60 s."""
HANG_GRACE = 10.0
"""Seconds that a hung trial has to be interrupted in, before its process is ended."""
START_PATIENCE = 15.0
"""Seconds a trial may wait for a worker before it gets one that waits at the gate: a process takes
about 3 to start, and a node that is lost never comes back."""
HANG_TITLE = "Timeout ("
"""How faulthandler heads the stacks of a process that it ends."""
TEMP_ROOM = 20
"""Longest temporary folder in which the paths of Ray's sockets stay below the system's limit."""


@dataclass(frozen=True)
class Size:
    """How many trials run at once, and what each of them holds."""

    workers: int
    cpus: float = 1
    gpus: float = 0


def run_ray(
    source: TrialSource,
    trainer: Trainer,
    *,
    workers: int,
    cpus: float = 1,
    gpus: float = 0,
    address: str | None = None,
    timeout: float = 0.0,
    owner: str | None = None,
    on_start: Callable[[Trial], None] | None = None,
    by_width: Mapping[int, Size] | None = None,
    logs: Path | None = None,
) -> None:
    """Run every trial that `source` asks for, `workers` at once; returns when it asks for no more.

    Uses the Ray that this process is connected to, if it is; else the cluster at `address`; else
    starts one for this machine alone, and stops it at the end.

    Args:
        source: asked and told in this process only.
        trainer: pickled once; each worker process keeps one copy for all its trials.
        workers: trials at once, each in a process of its own.
        cpus: CPUs of one trial, and, rounded down, its number of threads.
        gpus: GPUs of one trial; trials share one by fractions.
        address: ``host:port`` of a running cluster, or ``auto`` to look for one.
        timeout: seconds after which a trial counts as hung; 0: never. One that cannot be
            interrupted has its process ended `HANG_GRACE` later.
        owner: a name that only one run at a time may use; what an earlier run of that name, now
            dead, left behind of its own Ray is ended first.
        on_start: called when a worker takes a trial.
        by_width: width → another size than workers, cpus and gpus say; of so many at once as many
            run as there is room for. What widths of one size ask for must come together.
        logs: where each trial's output is kept as ``TRIAL.log``; left out, nowhere.

    Raises:
        SpecError: no cluster at `address`, or no room for `workers` trials at once.
        LostError: Ray's head or this machine's raylet has died. Where a call into Ray cannot be
            interrupted, the process ends with that message instead, as Ray itself ends it later.
        KeyboardInterrupt: Ctrl-C; what ran is killed, what had finished is told.
    """
    if not source.ask():
        return
    default = Size(workers, cpus, gpus)
    sizes = dict(by_width or {})
    owned = not ray.is_initialized()
    owner = owner or f"process {os.getpid()}"
    reap(owner)
    with ExitStack() as stack:
        stack.enter_context(_quiet())
        switches = {**SWITCHES, MARK: owner} | (OWNER_SWITCHES if owned else {})
        stack.enter_context(_environment(switches))
        handlers = stack.enter_context(_signal_handlers_kept())
        folder = tempfile.mkdtemp(prefix="telescope-", dir=_short_folder())
        (Path(folder) / OWNER_FILE).write_text(owner)
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        if logs:
            logs.mkdir(parents=True, exist_ok=True)
        driver = _Driver(leave_at_once=owned, logs=(logs or Path(folder)).absolute())
        heads: list[tuple[str, int]] = []  # of a cluster, when it is connected to
        local = LocalRay(owner)
        leaving = stack.enter_context(
            watched(
                lambda: all(map(accepts, heads)) if address or not owned else local.is_whole(),
                patience=CLUSTER_PATIENCE if address else 0.0,
                on_loss=driver.stop,
                give_up=lambda: reap(owner),
            )
        )
        if owned:
            stack.callback(reap, owner)
            stack.callback(ray.shutdown)
            with _interrupt_deferred():
                _connect(address) if address else _start(folder, _cpus([default, *sizes.values()]))
            stack.callback(leaving.set)
            stack.enter_context(_lost_where_ray_fails())
            if address:
                heads.append(_head())
            _set_signal_handlers({signal.SIGTERM: handlers[signal.SIGTERM]})  # Ray's would exit
        where = "the cluster" if address else "this machine"
        sizes = {width: _fitting(size, where) for width, size in sizes.items()}
        if not sizes:
            _check_room(default, where)
        gate = ray.remote(_Gate).options(num_cpus=0).remote()
        stack.callback(ray.kill, gate)
        parts = {
            **{"trainer": cloudpickle.dumps(trainer), "gate": gate, "timeout": timeout},
            "logs": str(driver.logs),
        }
        driver.gate = gate
        while asked := source.ask():
            size = sizes.get(asked[0].width, default)
            widths = [width for width, other in sizes.items() if other == size] or None
            queue = Queue(_Part(source, widths), on_start=on_start)
            driver.serve(queue)
            with suppress(_Leave):
                _tuner(_sized_worker(parts, size), driver, size.workers, folder).fit()
            if driver.error:
                raise driver.error
            if not queue.is_done:
                raise KeyboardInterrupt  # on a Ray not ours, Tune's own handler swallowed it


class _Part:
    """What a source asks for at some of its widths; all of it where none are named."""

    def __init__(self, source: TrialSource, widths: list[int] | None) -> None:
        self._source = source
        self._widths = widths

    def ask(self) -> Sequence[Trial]:
        """The trials of these widths, which are none when the source has gone on to others."""
        asked = self._source.ask()
        if self._widths is None:
            return asked
        return [trial for trial in asked if trial.width in self._widths]

    def tell(self, result: Result) -> None:
        """Pass it on."""
        self._source.tell(result)


class _Leave(BaseException):
    """Ends `fit()` at once, as Ctrl-C does; Tune's own way out waits 12 s for running trials."""


class _Driver:
    """The driver's side: which worker does what, and the first error of the source."""

    def __init__(self, *, leave_at_once: bool, logs: Path) -> None:
        self.gate: Any = None
        self.logs = logs
        self.error: Exception | None = None
        self._queue: Queue
        self._leave_at_once = leave_at_once
        self._running: dict[str, Trial | None] = {}  # Tune's trial id → trial, None at the gate
        self._turn = 0  # how often the gate was opened
        self._unstarted: dict[str, float] = {}  # Tune's trial id → when it was handed out
        self._opened = 0.0  # when the gate was opened for one of those

    def serve(self, queue: Queue) -> None:
        """Hand out what this queue has from now on; whatever ran before has ended."""
        self._queue = queue
        self._running.clear()
        self._unstarted.clear()

    def __reduce__(self) -> tuple[Any, ...]:
        """Tune pickles its searcher and callbacks into its own folder; nobody reads it."""
        return (object, ())

    def assign(self, tune_id: str) -> dict[str, Any] | None:
        """What a free worker does next: a trial, the gate, or None when the sweep is over.

        An empty order is none for now: the worker is left for a trial that has found no other.
        """
        if self.error:
            return None
        try:
            trial = self._queue.take()
            if trial is None and not self._queue.is_waiting:
                return None
            if trial is None and self._has_stranded():
                return {}
        except Exception as error:
            self.error = error
            return None
        self._running[tune_id] = trial
        if trial:
            self._unstarted[tune_id] = time.monotonic()
        return {"trial": trial} if trial else {"turn": self._turn}

    def answer(self, tune_id: str, result: Result | None) -> None:
        """Take what a worker brought back; from the gate it brings None."""
        del self._running[tune_id]
        self._unstarted.pop(tune_id, None)
        if result is None or self.error:
            return
        try:
            self._queue.answer(result)
            if None in self._running.values() and not self._queue.is_waiting:
                self._turn += 1
                self.gate.open.remote(self._turn)
        except Exception as error:
            self.error = error

    def lose(self, tune_id: str, reason: str) -> None:
        """Take the loss of a worker process: its trial has failed; a gate trial is forgotten."""
        trial = self._running[tune_id]
        if trial:
            reason = clean([reason, *_log_tail(self.logs, trial)])
        self.answer(tune_id, Result(trial, Status.FAILED, reason=reason) if trial else None)

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
        self._free_workers_for_stranded()
        if self.error and self._leave_at_once:
            raise _Leave
        return self.error is not None


class _Asker(Searcher):  # type: ignore[misc]  # Ray's base classes are untyped
    """Tune's searcher: asks the driver, which keeps its errors, for a searcher must not raise."""

    def __init__(self, driver: _Driver) -> None:
        super().__init__()
        self._driver = driver

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next order for a free worker; None: none for now."""
        order = self._driver.assign(trial_id)
        return Searcher.FINISHED if order is None else order or None

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Pass on what a worker brought back; errors go another way, which knows their reason."""
        if result is not None and not error:
            self._driver.answer(trial_id, result.get("result"))

    def save(self, checkpoint_path: str) -> None:
        """Save nothing: the store is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Restore nothing."""


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


class _Worker(tune.Trainable):  # type: ignore[misc]
    """One worker process: runs the order in its config, and is reset for the next one."""

    def setup(
        self,
        config: dict[str, Any],
        *,
        trainer: bytes,
        gate: Any,
        threads: int,
        timeout: float,
        logs: str,
    ) -> None:
        """Size the thread pools, before the trainer brings in torch."""
        self._order = config
        self._pickled = trainer
        self._trainer: Trainer | None = None
        self._gate = gate
        self._threads = threads
        self._timeout = timeout
        self._logs = Path(logs)
        os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(threads)))

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next order in the same, warm process."""
        self._order = new_config
        return True

    def step(self) -> dict[str, Any]:
        """Train a trial, or wait at the gate."""
        if trial := self._order.get("trial"):
            with _logged(self._logs, trial), _ended_if_hung(self._timeout):
                result = attempt(self._train, trial, timeout=self._timeout)
            return {"done": True, "result": result}
        ray.get(self._gate.wait_beyond.remote(self._order["turn"]))
        return {"done": True}

    def _train(self, trial: Trial) -> Result:
        if self._trainer is None:  # here, not in setup: a trainer that cannot load is a failure
            self._trainer = cloudpickle.loads(self._pickled)
            if torch := sys.modules.get("torch"):
                torch.set_num_threads(self._threads)
        return self._trainer(trial)


@contextmanager
def _logged(folder: Path, trial: Trial) -> Iterator[None]:
    """Send what a trial prints to a file of its own, so that a killed one's last words are kept.

    On another machine than the driver's there is no such folder: Ray's own logs have it there.
    """
    if not folder.is_dir():
        yield
        return
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    with (folder / f"{trial}.log").open("wb") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in enumerate(kept, 1):
            os.dup2(copy, number)
            os.close(copy)


@contextmanager
def _ended_if_hung(timeout: float) -> Iterator[None]:
    """End this process if the code inside goes on long after its time limit: it hangs in C."""
    if not timeout:
        yield
        return
    faulthandler.dump_traceback_later(timeout + HANG_GRACE, exit=True, file=2)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def _log_tail(folder: Path, trial: Trial) -> list[str]:
    """The last lines that a trial has printed; none where its log is on another machine."""
    try:
        text = (folder / f"{trial}.log").read_text(errors="backslashreplace")
    except OSError:
        return []
    lines = text.strip().splitlines()
    threads = [number for number, line in enumerate(lines) if "most recent call first" in line]
    if threads and HANG_TITLE in text:  # the main thread comes last, its innermost call first
        title = next(line for line in lines if line.startswith(HANG_TITLE))
        return [title, *lines[threads[-1] :][:LOG_TAIL_LINES]]
    return lines[-LOG_TAIL_LINES:]


def _head() -> tuple[str, int]:
    """Where a cluster's head accepts connections; needs no call to it."""
    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    return host, int(port)


@contextmanager
def _lost_where_ray_fails() -> Iterator[None]:
    """What Ray itself raises in the driver means that a part of it is gone."""
    try:
        yield
    except ray.exceptions.RayError as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise LostError(
            f"Ray has failed: {reason}; what finished is kept, the same command goes on"
        ) from error


class _Gate:
    """An actor on which idle workers sleep until the driver has something to hand out."""

    def __init__(self) -> None:
        self._turn = 0
        self._opened = asyncio.Condition()

    async def open(self, turn: int) -> None:
        """Let go all who wait for this turn."""
        async with self._opened:
            self._turn = turn
            self._opened.notify_all()

    async def wait_beyond(self, turn: int) -> None:
        """Return as soon as the gate has been opened since `turn`."""
        async with self._opened:
            await self._opened.wait_for(lambda: self._turn > turn)


def _sized_worker(parts: dict[str, Any], size: Size) -> Any:
    """The worker with what it is given once, holding what a trial of this size needs."""
    worker = tune.with_parameters(_Worker, **parts, threads=max(1, int(size.cpus)))
    return tune.with_resources(worker, {"cpu": size.cpus, "gpu": size.gpus})


def _tuner(worker: Any, driver: _Driver, workers: int, folder: str) -> tune.Tuner:
    return tune.Tuner(
        worker,
        tune_config=tune.TuneConfig(
            search_alg=_Asker(driver),
            scheduler=_Scheduler(),
            num_samples=-1,
            max_concurrent_trials=workers,
            reuse_actors=True,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name=f"tune-{time.monotonic_ns()}",
            storage_path=folder,
            stop=_Stopper(driver),
            callbacks=[_Undertaker(driver)],
            failure_config=tune.FailureConfig(max_failures=0),  # the queue retries
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            verbose=0,
        ),
    )


def _start(folder: str, cpus: int) -> None:
    try:
        ray.init(
            address="local",
            num_cpus=cpus,
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            log_to_driver=False,
            configure_logging=False,
            _temp_dir=folder,
        )
    except Exception as error:  # Ray raises bare ones
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise LostError(
            f"local Ray could not be started: {reason}; the same command tries again"
        ) from error
    if ray.util.get_node_ip_address() != "127.0.0.1":
        warnings.warn(
            "Ray was imported before telescope.dispatch.ray_tune and listens on every address of "
            "this machine; import telescope first, or set RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0",
            stacklevel=3,
        )


def _connect(address: str) -> None:
    if address.startswith("ray://"):
        raise SpecError(
            f"--ray-address: got {address!r}, the address of a Ray client server; "
            "run telescope on a machine of the cluster, with host:port or auto"
        )
    try:
        host, _, port = address.rpartition(":")
        if port.isdigit():  # Ray itself tries for a minute
            socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
        ray.init(address=address, log_to_driver=False, configure_logging=False)
    except (OSError, RuntimeError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SpecError(
            f"--ray-address: got {address!r}: {reason}; start a cluster with `ray start --head`, "
            "and set RAY_AUTH_MODE=token if it wants a token"
        ) from error


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


def _short_folder() -> str:
    folder = tempfile.gettempdir()
    return folder if len(folder) <= TEMP_ROOM else "/tmp"


def _death_reason(trial: TuneTrial) -> str:
    """Ray's account of a lost worker on one line, without its identifiers and its advice."""
    lines = Path(trial.error_file).read_text().splitlines()[1:]
    text = " ".join(" ".join(line for line in lines if line[:1] != "\t").split())
    text = text.partition(" Some common causes")[0]
    return text if len(text) < 600 else f"{text[:300]} … {text[-300:]}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Mute Ray's logger: what it has to say is in the results, or raised."""
    logger = logging.getLogger("ray")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set environment variables for a while; what Ray adds to them goes with them."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


@contextmanager
def _signal_handlers_kept() -> Iterator[dict[signal.Signals, Any]]:
    """Put back the signal handlers that Ray (SIGTERM) and Tune (SIGINT, SIGUSR1) replace."""
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield handlers
    finally:
        _set_signal_handlers(handlers)


def _set_signal_handlers(handlers: dict[signal.Signals, Any]) -> None:
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextmanager
def _interrupt_deferred() -> Iterator[None]:
    """Hold back Ctrl-C: in the middle of `ray.init` (4 s) it ends in a segmentation fault."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    interrupts: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _frame: interrupts.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if interrupts:
        raise KeyboardInterrupt
