"""Faults injected into real sweeps: processes killed at random moments and between two writes.

A sweep runs in a process that is forked from a warm server, so that a kill costs a second and not
ten. Its trainer is fast and writes down each start, which shows what is trained twice.
"""

from __future__ import annotations

import ctypes
import faulthandler
import functools
import itertools
import json
import multiprocessing
import os
import random
import signal
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import cache
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pandas as pd
from conftest import quiet, tiny_spec

from telescope import Spec
from telescope.answer.derive import transfer
from telescope.answer.finished import open_result
from telescope.files import write_atomic
from telescope.packs import trainer
from telescope.records import CurvePoint, Result, Status, Trial
from telescope.report.terminal import show_as_json
from telescope.sweep.run import Options, run
from telescope.train import loop

STARTS = "starts.log"


def formula(trial: Trial) -> float:
    """A loss with a minimum inside the grid, and digits that a sloppy store would lose."""
    return 2 + (trial.lr - 0.05) ** 2 / 3 + (trial.weight_decay - 0.1) ** 2 / 7 + 1 / trial.width


def log_start(place: Path, trial: Trial) -> None:
    """Write down that a trial is being trained, in one system call."""
    with (place / STARTS).open("a") as log:
        log.write(f"{trial}\n")


def spec_of(place: Path, **tables: Any) -> dict[str, Any]:
    corpus = place / "corpus.txt"
    # Empty if a process was killed between creating and writing it, which is one system call each.
    if not (corpus.exists() and corpus.stat().st_size):
        corpus.write_bytes(b"the quick brown fox jumps over the lazy dog\n" * 200)
    return tiny_spec(corpus, **tables)


def run_fast(place: Path, tables: dict[str, Any]) -> None:
    """One `telescope run`, inline, with a trainer that takes no time."""

    def fast(config: Any, trial: Trial) -> Result:
        log_start(place, trial)
        curve = (CurvePoint(2, 3.25, None), CurvePoint(4, 3.0, formula(trial)))
        return Result(trial, Status.COMPLETE, loss=formula(trial), flops=1.5e9, curve=curve)

    def scribble(path: Path, ladder: Any, title: str) -> None:
        write_atomic(path, b"a figure takes half a second to draw")

    def fast_pack(config: Any, trials: Sequence[Trial]) -> Iterator[Result]:
        return map(functools.partial(fast, config), trials)

    options = Options(place / "results", dispatcher="inline", check=False)
    with (
        patch.object(loop, "train", fast),
        patch.object(trainer, "train_pack", fast_pack),
        patch.object(trainer, "obstacle", lambda config, trial: ""),
        patch("telescope.report.figures.write_loss_figure", scribble),
    ):
        run(Spec.from_dict(spec_of(place, **tables)), options, quiet)


def warm_up() -> None:
    """Load what a sweep loads late, by running one; called in the server, once."""
    with tempfile.TemporaryDirectory() as folder:
        run_fast(Path(folder), {})


@contextmanager
def memory_folder(otherwise: Path) -> Iterator[Path]:
    """A folder in memory, where there is one: fsync on a busy disk takes most of a run's time.

    What a killed process leaves is the same there: the system keeps its writes, not the disk.
    """
    if not Path("/dev/shm").is_dir():
        yield otherwise
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="telescope-test-") as folder:
        yield Path(folder)


def numbered(folder: Path) -> Iterator[Path]:
    """Make one empty folder after the other."""
    for number in itertools.count():
        place = folder / f"place-{number}"
        place.mkdir()
        yield place


@cache
def server() -> Any:
    """Start the server that forks processes: everything imported, one thread, no sweep run yet."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["faults_server"])
    # Python 3.11 does not hand its sys.path on to the server, and passes over what is not found.
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    with patch.dict(os.environ, PYTHONPATH=path):
        forkserver.ensure_running()
    return context


def _warm(environment: dict[str, str], work: Callable[..., None], *arguments: Any) -> None:
    assert "faults_server" in sys.modules, "the server has not loaded what it should"
    # The server has the environment of the test that came first; a password may be of this one.
    os.environ.update(environment)
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    work(*arguments)


def run_real(place: Path, tables: dict[str, Any]) -> None:
    """One `telescope run`, inline, with the trainer that users have."""
    options = Options(place / "results", dispatcher="inline", check=False)
    run(Spec.from_dict(spec_of(place, **tables)), options, quiet)


def start(work: Callable[..., None], *arguments: Any) -> BaseProcess:
    """Run a function of this file in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process: BaseProcess = server().Process(target=_warm, args=(environment, work, *arguments))
    process.start()
    return process


def finish(process: BaseProcess, seconds: float = 120) -> int | None:
    """Wait for a process; its exit code."""
    process.join(seconds)
    if process.exitcode is None and process.pid:
        os.kill(process.pid, signal.SIGUSR2)  # its stacks, on stderr
        process.join(1)
    assert process.exitcode is not None, f"no end after {seconds:g} s"
    return process.exitcode


def answers(place: Path, name: str = "tiny") -> dict[str, Any]:
    """Return the answers of a sweep that must not depend on how often it was disturbed."""
    finished = open_result(name, place / "results")
    facts = show_as_json(finished)
    del facts["cost"]["seconds"]
    path = place / "results" / name
    handed_over = transfer(finished.spec, finished.ladder, width=None, steps=None).as_dict()
    return {
        "show": json.dumps(facts),
        "transfer": json.dumps(handed_over),
        "trials.csv": pd.read_csv(path / "trials.csv").drop(columns="seconds").to_csv(),
        "curves": {file.name: file.read_text() for file in (path / "curves").iterdir()},
        "files": sorted(file.name for file in path.iterdir()),
    }


def stored(place: Path, name: str = "tiny") -> dict[str, str]:
    """Read a database's rows by trial, at this moment and without this program's code."""
    path = place / "results" / name / "trials.db"
    if not path.exists():
        return {}
    with closing(sqlite3.connect(path, timeout=10)) as database:
        try:
            rows = database.execute(
                "SELECT t.trial_id, v.value, "
                "(SELECT group_concat(param_name || '=' || param_value) FROM "
                "(SELECT * FROM trial_params p WHERE p.trial_id = t.trial_id ORDER BY 1)),"
                "(SELECT value_json FROM trial_user_attributes a WHERE a.trial_id = t.trial_id "
                "AND a.key = 'run') FROM trials t LEFT JOIN trial_values v USING (trial_id)"
            ).fetchall()
        except sqlite3.OperationalError as error:
            if "no such table" not in str(error):  # killed while the tables were being made
                raise
            return {}
    found = {}
    for number, value, params, attributes in rows:
        values = dict(pair.split("=") for pair in params.split(","))
        run_facts = json.loads(attributes)
        axes = "_".join(f"{key}={float(values[key]):.6g}" for key in ("lr", "weight_decay"))
        key = f"width={run_facts['width']}_{axes}_seed={run_facts['seed']}"
        assert key not in found, f"{key} is stored twice"
        found[key] = f"{number} {value} {attributes}"
    return found


@dataclass
class Tally:
    """Counts over a series of faults; docs/fault-tolerance.md states these figures."""

    faults: int = 0
    sweeps: int = 0
    lost: list[str] = field(default_factory=list)
    """Trials that were stored before a fault and not, or not the same, after it."""
    twice: list[str] = field(default_factory=list)
    """Trials that were started again although they were stored."""
    _stored: dict[str, str] = field(default_factory=dict)
    _starts: int = 0

    def new_sweep(self) -> None:
        self.sweeps += 1
        self._stored, self._starts = {}, 0

    def look(self, place: Path) -> None:
        """Compare with the last look: call it when no driver runs."""
        log = place / STARTS
        starts = log.read_text().splitlines() if log.exists() else []
        now = stored(place)
        self.lost += [key for key, row in self._stored.items() if now.get(key) != row]
        self.twice += [key for key in starts[self._starts :] if key in self._stored]
        self._stored, self._starts = now, len(starts)

    def __str__(self) -> str:
        return (
            f"{self.faults} faults in {self.sweeps} sweeps: {len(self.lost)} trials lost, "
            f"{len(self.twice)} finished trials run again"
        )


def kill_at_random(
    places: Iterator[Path], kills: int, seed: int, tables: dict[str, Any], seconds: float
) -> tuple[Tally, list[Path]]:
    """Start sweeps and kill -9 each driver again and again until it ends by itself.

    Args:
        places: an empty folder for each sweep.
        kills: how many kills in all, at least.
        seed: of the moments.
        tables: changes of the spec.
        seconds: what an undisturbed run takes; the moments are uniform up to a little more, and to
            more after each kill, or a machine that has become slow would end none.
    """
    moments, tally, done = random.Random(seed), Tally(), []
    while tally.faults < kills:
        place = next(places)
        tally.new_sweep()
        for attempt in itertools.count():
            driver = start(run_fast, place, tables)
            driver.join(moments.uniform(0, seconds * (1.2 + attempt / 10)))
            was_killed = driver.exitcode is None
            driver.kill()
            code = finish(driver)
            tally.look(place)
            if not was_killed or code == 0:
                assert code == 0, code
                break
            tally.faults += 1
        done.append(place)
    return tally, done


# -- every point between two writes ------------------------------------------------------------

PTRACE_GETREGS, PTRACE_ATTACH, PTRACE_SYSCALL = 12, 16, 24
PTRACE_SETOPTIONS, PTRACE_O_TRACESYSGOOD = 0x4200, 1
ALL_CHILDREN = 0x40000000  # __WALL: also a process that is not our child
WRITES = {  # x86-64; name → whether the first argument is a file descriptor
    1: ("write", True),
    18: ("pwrite64", True),
    74: ("fsync", True),
    75: ("fdatasync", True),
    77: ("ftruncate", True),
    82: ("rename", False),
    83: ("mkdir", False),
    84: ("rmdir", False),
    87: ("unlink", False),
    90: ("chmod", False),
    257: ("openat", False),
    263: ("unlinkat", False),
    264: ("renameat", False),
}


class Registers(ctypes.Structure):
    """`struct user_regs_struct` of Linux on x86-64."""

    _fields_ = [
        (name, ctypes.c_ulonglong)
        for name in (
            *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx"),
            *("rdx", "rsi", "rdi", "orig_rax", "rip", "cs", "eflags", "rsp", "ss", "fs_base"),
            *("gs_base", "ds", "es", "fs", "gs"),
        )
    ]


def ptrace(request: int, pid: int, data: Any = 0) -> None:
    """The system call, raising what it refuses."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.ptrace(request, pid, 0, data) == -1:
        raise OSError(ctypes.get_errno(), "ptrace refused")


def can_trace() -> bool:
    """Tell whether this machine lets one process stop another between two system calls."""
    if os.uname().machine != "x86_64":
        return False
    child = start(time.sleep, 10)
    pid = child.pid or 0
    try:
        ptrace(PTRACE_ATTACH, pid)
    except OSError:
        return False
    else:
        os.waitpid(pid, ALL_CHILDREN)
        child.kill()
        os.waitpid(pid, ALL_CHILDREN)  # its parent is told after its tracer
        return True
    finally:
        child.kill()
        child.join()


def wait_to_be_traced(work: Callable[..., None], *arguments: Any) -> None:
    """Do the work, begun when the tracer says so."""
    os.kill(os.getpid(), signal.SIGSTOP)
    work(*arguments)


def kill_between_writes(place: Path, tables: dict[str, Any], number: int) -> list[str]:
    """Run a sweep and kill it just before its write of this number to the results folder.

    Returns:
        The writes that were done; when the sweep has fewer, it ends undisturbed.
    """
    return kill_before_write(number, place / "results", run_fast, place, tables)


def kill_before_write(
    number: int, folder: Path, work: Callable[..., None], *arguments: Any
) -> list[str]:
    """Do work in a process of its own, killed just before its write of this number to a folder.

    Returns:
        The writes that were done; when there are fewer, it ends undisturbed.
    """
    driver = start(wait_to_be_traced, work, *arguments)
    pid, inside = driver.pid or 0, str(folder)
    ptrace(PTRACE_ATTACH, pid)
    os.waitpid(pid, ALL_CHILDREN)
    ptrace(PTRACE_SETOPTIONS, pid, PTRACE_O_TRACESYSGOOD)
    done: list[str] = []
    entering = True
    deliver = 0
    os.kill(pid, signal.SIGCONT)
    while True:
        ptrace(PTRACE_SYSCALL, pid, deliver)
        _, status = os.waitpid(pid, ALL_CHILDREN)
        if os.WIFEXITED(status) or os.WIFSIGNALED(status):
            driver.join()
            return done
        stopped = os.WSTOPSIG(status)
        if stopped != signal.SIGTRAP | 0x80:  # a signal on its way to the driver
            deliver = 0 if stopped in (signal.SIGSTOP, signal.SIGTRAP) else stopped
            continue
        deliver = 0
        if entering and (what := write_of(pid, inside)):
            if len(done) == number:
                driver.kill()
                os.waitpid(pid, ALL_CHILDREN)
                driver.join()
                return done
            done.append(what)
        entering = not entering


def write_of(pid: int, inside: str) -> str | None:
    """The write to the folder that a process is about to do, or None if it is about no such."""
    registers = Registers()
    ptrace(PTRACE_GETREGS, pid, ctypes.byref(registers))
    name, by_descriptor = WRITES.get(registers.orig_rax, ("", False))
    if not name:
        return None
    if by_descriptor:
        try:
            path = os.readlink(f"/proc/{pid}/fd/{registers.rdi}")
        except OSError:
            return None
    else:
        if name == "openat" and not registers.rdx & os.O_CREAT:
            return None
        path = string_at(pid, registers.rsi if name.endswith("at") else registers.rdi)
    return f"{name} {path.removeprefix(inside)}" if path.startswith(inside) else None


def string_at(pid: int, address: int) -> str:
    """A path in another process's memory."""
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        memory.seek(address)
        text = memory.read(4096 - address % 4096)
        while b"\0" not in text:  # it goes on in the next page
            text += memory.read(4096)
        return text.split(b"\0")[0].decode(errors="replace")
