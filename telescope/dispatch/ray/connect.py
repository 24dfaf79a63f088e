"""The Ray that a sweep runs on: find, connect to or start it, watch it, and leave it as it was."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, chdir, contextmanager
from pathlib import Path
from typing import Any

# Ray reads these two when it is imported. Without the first, a local Ray listens on every address
# of the machine; without the second, each lost worker prints a paragraph to stdout.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "^A worker died or was killed")

import ray

from telescope.dispatch.ray.session import MARK, OWNER_FILE, LocalRay, accepts, reap, watched
from telescope.errors import LostError, SpecError
from telescope.files import can_write, home

OBJECT_STORE_BYTES = 100_000_000
"""Shared memory of an embedded Ray; it holds the pickled trainer and little else."""
CONNECT_SECONDS = 5.0
"""Time limit for a cluster to accept a connection."""
SWITCHES = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # the new engine prints tables even at verbosity 0
    # Ray's workers run at nice 15, at which a machine that does anything else starves them.
    "RAY_worker_niceness": "0",
    # Tune's actors have an environment of their own, so Ray starts new processes for them. The idle
    # ones that it would start in advance, one per CPU, are never used.
    "RAY_prestart_worker_first_driver": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths of a trainer keep their meaning
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no CSV, JSON and TensorBoard files per trial
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # a lost worker is a result with a reason
    "TUNE_GLOBAL_CHECKPOINT_S": "86400",  # nobody resumes from Tune's state: ours is the store
}
"""Documented switches of Ray and Tune, set for the time of a run."""
OWNER_SWITCHES = {"TUNE_DISABLE_SIGINT_HANDLER": "1"}
"""Tune's handler takes 12 s; leaving `fit()` early is safe if `ray.shutdown` follows."""
CLUSTER_PATIENCE = 45.0
"""Seconds without its head, which may be started again, after which a cluster counts as dead; Ray
itself ends the driver's process after 60 s."""
_TOKEN = secrets.token_hex(32)
"""Token of our own Ray; Ray reads it once per process."""
TEMP_ROOM = 20
"""Longest path of a temporary folder for which Ray's socket paths stay below the system's limit."""


@contextmanager
def session_folder(owner: str) -> Iterator[Path]:
    """Create a temporary folder for Ray's sockets and logs, from which `reap` learns its owner."""
    folder = Path(tempfile.mkdtemp(prefix="telescope-", dir=_short_folder()))
    try:
        (folder / OWNER_FILE).write_bytes(os.fsencode(owner))
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def connected(
    folder: Path,
    *,
    owner: str,
    address: str | None,
    cpus: int,
    on_loss: Callable[[LostError], None],
) -> Iterator[None]:
    """The Ray that this process is connected to; else the cluster's; else one of our own.

    One that is connected to or started here is left at the end. What Ray does to the process
    (logging, environment, signal handlers) is undone.

    Args:
        folder: for the files of a Ray of our own.
        owner: whose processes those of a Ray of our own are.
        address: ``host:port`` of a running cluster, or ``auto`` to look for one; None: start one.
        cpus: of a Ray of our own.
        on_loss: told in another thread when Ray has died; should make the main thread leave.

    Raises:
        SpecError: no cluster at `address`.
        LostError: Ray has died, or could not be started.
    """
    owned = not ray.is_initialized()
    heads: list[tuple[str, int]] = []  # of a cluster, when it is connected to
    local = LocalRay(owner)
    with ExitStack() as stack:
        stack.enter_context(_quiet())
        switches = {**SWITCHES, MARK: owner} | (OWNER_SWITCHES if owned else {})
        if owned and not address:
            switches |= _token()
        stack.enter_context(_environment(switches))
        handlers = stack.enter_context(_signal_handlers_kept())
        leaving = stack.enter_context(
            watched(
                lambda: all(map(accepts, heads)) if address or not owned else local.is_whole(),
                patience=CLUSTER_PATIENCE if address else 0.0,
                on_loss=on_loss,
                give_up=lambda: reap(owner),
            )
        )
        if owned:
            stack.callback(reap, owner)
            stack.callback(ray.shutdown)
            with _interrupt_deferred(), _away_in(folder):
                _connect(address) if address else _start(folder, cpus)
            stack.callback(leaving.set)
            stack.enter_context(_lost_where_ray_fails())
            if address:
                heads.append(_head())
            _set_signal_handlers({signal.SIGTERM: handlers[signal.SIGTERM]})  # Ray's would exit
        yield


def _start(folder: Path, cpus: int) -> None:
    try:
        ray.init(
            address="local",
            num_cpus=cpus,
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            log_to_driver=False,
            configure_logging=False,
            _temp_dir=str(folder),
        )
    except Exception as error:  # Ray raises bare ones
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise LostError(
            f"local Ray could not be started: {reason}; the same command tries again"
        ) from error
    if ray.util.get_node_ip_address() != "127.0.0.1":
        warnings.warn(
            "Ray was imported before telescope and listens on every address of "
            "this machine; import telescope first, or set RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0",
            stacklevel=3,
        )


@contextmanager
def _away_in(folder: Path) -> Iterator[None]:
    """Be in another folder than the user's while Ray starts: its workers import from there first.

    In the user's folder they would find a numpy.py or telescope.py of the user's. Where this
    process itself imports from the current folder, as an interactive one does, so do they.
    """
    if sys.path[:1] in ([""], [os.getcwd()]):
        yield
    else:
        with chdir(folder):
            yield


def _token() -> dict[str, str]:
    """The token of a Ray of our own, where its place in the home folder cannot be written."""
    folder = home()
    file = folder and folder / ".ray" / "auth_token"
    if {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys() or (
        file and (file.exists() or can_write(file.parent))
    ):
        return {}
    return {"RAY_AUTH_TOKEN": _TOKEN}


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


def _head() -> tuple[str, int]:
    """Return the address of a cluster's head, without a call to it."""
    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    return host, int(port)


@contextmanager
def _lost_where_ray_fails() -> Iterator[None]:
    """Turn Ray's own exceptions in the driver into `LostError`: a part of Ray is gone.

    Tune raises some of them inside a RuntimeError, as when Ray ends workers to free memory.
    """
    try:
        yield
    except (ray.exceptions.RayError, RuntimeError) as error:
        fault = error if isinstance(error, ray.exceptions.RayError) else error.__cause__
        if not isinstance(fault, ray.exceptions.RayError):
            raise
        reason = " ".join(str(fault).split())[:300] or type(fault).__name__
        is_memory = isinstance(fault, ray.exceptions.OutOfMemoryError)
        advice = "free memory or lower compute.workers; " if is_memory else ""
        raise LostError(
            f"Ray has failed: {reason}; {advice}what finished is kept, the same command goes on"
        ) from error


def _short_folder() -> str:
    folder = tempfile.gettempdir()
    return folder if len(folder) <= TEMP_ROOM else "/tmp"


@contextmanager
def _quiet() -> Iterator[None]:
    """Mute Ray's logger; its news is in the results or raised."""
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
