"""A stand-in for SLURM: jobs run on this machine, get its variables and signals, and come back.

sbatch is here, srun and scontrol are bash scripts in `tests/slurm`. What SLURM promises and the
scripts rely on is written down here once: its documentation is the source, no SLURM was at hand.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil

STAND_INS = Path(__file__).parent / "slurm"
NOT_OF_SLURM = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}


def directives(script: str) -> dict[str, str]:
    """Option → value, as sbatch reads the lines before any command; of two the last counts."""
    found = {}
    for line in script.splitlines()[1:]:
        if line.strip() and not line.startswith("#"):
            break
        if match := re.fullmatch(r"#SBATCH --([\w-]+)(?:=(.*))?", line):
            found[match[1]] = match[2] or ""
    return found


class Task:
    """A job, or a task of an array, that may be started several times."""

    def __init__(self, place: Path, script: Path, number: int, array: int | None) -> None:
        self.given = directives(script.read_text())
        self._place, self._number, self._restarts = place, number, 0
        self._spooled = place / f"job{number}" / "slurm_script"  # sbatch copies the script
        self._spooled.parent.mkdir()
        shutil.copyfile(script, self._spooled)
        self._requeued = place / f"job{number}" / "requeued"
        nodes = int(self.given.get("nodes", 1))
        self._variables = {
            **NOT_OF_SLURM,
            "PATH": f"{STAND_INS}:{os.environ['PATH']}",
            "STAND_IN_REQUEUED": str(self._requeued),
            "SLURM_JOB_ID": str(number),
            "SLURM_JOB_NAME": self.given["job-name"],
            "SLURM_JOB_NUM_NODES": str(nodes),
            "SLURM_NNODES": str(nodes),
            "SLURM_JOB_NODELIST": f"127.0.0.[1-{nodes}]",
            "SLURM_NODELIST": f"127.0.0.[1-{nodes}]",
            "SLURM_CPUS_PER_TASK": self.given.get("cpus-per-task", "1"),
            "SLURM_PROCID": "0",
            "SLURM_NODEID": "0",
            "SLURM_SUBMIT_DIR": str(place),
        }
        if array is not None:
            self._variables |= {"SLURM_ARRAY_TASK_ID": str(array), "SLURM_ARRAY_JOB_ID": "1000"}
        self.output = place / f"job{number}" / "out"
        self._shell: subprocess.Popen[bytes] | None = None

    def start(self) -> Task:
        """Start, or start again, with the output appended: --open-mode."""
        assert self.given["open-mode"] == "append"
        self._requeued.unlink(missing_ok=True)
        restarts = {"SLURM_RESTART_COUNT": str(self._restarts)} if self._restarts else {}
        self._restarts += 1
        with self.output.open("a") as out:
            self._shell = subprocess.Popen(
                ["/bin/bash", self._spooled],
                cwd=self._place,
                env={**self._variables, **restarts},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        return self

    @property
    def shell(self) -> subprocess.Popen[bytes]:
        assert self._shell is not None, "is started"
        return self._shell

    def started(self) -> list[psutil.Process]:
        """All that the shell has started."""
        return psutil.Process(self.shell.pid).children(recursive=True)

    @property
    def said(self) -> str:
        """Its output so far."""
        return self.output.read_text()

    def await_line(self, text: str, seconds: float = 60) -> None:
        """Wait until the output has this text."""
        end = time.monotonic() + seconds
        while text not in self.said:
            assert time.monotonic() < end, f"no {text!r} in: {self.said}"
            assert self.shell.poll() is None or text in self.said, self.said
            time.sleep(0.02)

    def warn(self) -> None:
        """The time limit is near: --signal=B:NAME@SECONDS is for the shell alone."""
        kind = re.fullmatch(r"B:(\w+)@\d+", self.given["signal"])
        assert kind is not None
        self.shell.send_signal(signal.Signals[f"SIG{kind[1]}"])

    def end(self) -> None:
        """As preempted or cancelled: SIGTERM to all of its processes."""
        started = self.started()
        self.shell.terminate()
        for process in started:
            with suppress(psutil.NoSuchProcess):
                process.terminate()

    def kill(self) -> None:
        """End all that is left of it, whatever it is."""
        if self._shell is None:
            return
        for pid in psutil.pids():
            if _session_of(pid) == self._shell.pid:
                os.kill(pid, signal.SIGKILL)
        self._shell.wait()

    def wait(self, seconds: float = 60) -> int:
        """Wait for the end of the shell and of all that it has started; returns its code."""
        code = self.shell.wait(seconds)
        session = self.shell.pid
        while left := [p for p in psutil.pids() if _session_of(p) == session]:
            seconds -= 0.05
            assert seconds > 0, f"processes {left} outlive the job: {self.said}"
            time.sleep(0.05)
        return code

    @property
    def is_requeued(self) -> bool:
        """True if the script has asked for another turn, with the number of its own job."""
        if not self._requeued.exists():
            return False
        assert self._requeued.read_text().split() == [str(self._number)]
        return True


def sbatch(script: Path, place: Path) -> list[Task]:
    """Queue a script; its tasks are not started yet."""
    given = directives(script.read_text())
    if "array" not in given:
        return [Task(place, script, 700, None)]
    first, last = map(int, given["array"].split("-"))
    return [Task(place, script, 1000 + n, n) for n in range(first, last + 1)]


def _session_of(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None
