"""Train with another program, started once per trial.

The trainer is plain data, so it can be pickled to workers, and works alike inline and on Ray. It
knows nothing about the program's training; it passes a trial and reads the result.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from telescope.dispatch.queue import THREAD_VARIABLES, clean
from telescope.errors import TrialError
from telescope.foreign import guard
from telescope.foreign.outcome import as_result
from telescope.foreign.output import NoResult, read_output, tail
from telescope.foreign.place import Place
from telescope.foreign.program import check_unchanged
from telescope.records import Result, Status, Trial
from telescope.spec.placeholders import filled, names_in

GRACE = 5.0
"""Seconds between SIGTERM and SIGKILL: a launcher's time to end what it has started."""
MARK = "TELESCOPE_TRIAL"
"""The environment variable by which all processes of a trial are known."""


@dataclass(frozen=True)
class CommandTrainer:
    """Runs a command once per trial; its last JSON line with a verdict is the result."""

    command: tuple[str, ...]
    folder: str
    """Working directory."""
    logs: str
    """Folder for each trial's output, ``.out`` and ``.err``; a retry overwrites them."""
    place: Place
    environment: Mapping[str, str] = field(default_factory=dict)
    result: str | None = None
    """The file with the result, relative to `folder`; None: stdout."""
    timeout: float = 0.0
    threads: Mapping[int, int] = field(default_factory=dict)
    """Width → threads that numerical libraries are told to use; without an entry, they decide."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """File → digest of its code when the sweep began; a trial fails if it has changed."""

    def __call__(self, trial: Trial) -> Result:
        """Run the command to its end; every outcome is a result, failures included."""
        values = self.place.values(trial)
        texts = (*self.command, *self.environment.values(), self.result or "")
        if any("trial_folder" in names_in(text) for text in texts):
            Path(str(values["trial_folder"])).mkdir(parents=True, exist_ok=True)
        file = self.result and Path(self.folder, filled(self.result, values))
        if file:
            Path(file).unlink(missing_ok=True)  # an earlier try's
        out, err = self._logs(trial)
        start = time.perf_counter()
        try:
            with out.open("wb") as stdout, err.open("wb") as stderr:
                check_unchanged(self.sources)
                code = self._run(trial, values, stdout, stderr)
            check_unchanged(self.sources)  # if it changed meanwhile, either text may have been read
            seconds = time.perf_counter() - start
            if problem := _problem(code):
                raise TrialError(problem)
            said, curve = read_output(out, Path(file) if file else None)
            with err.open("a", encoding="utf-8", errors="backslashreplace") as log:
                return as_result(
                    trial,
                    said,
                    self.place.prices,
                    seconds=seconds,
                    curve=curve,
                    steps=self.place.steps,
                    note=lambda text: print(text, file=log),
                )
        except TrialError as error:
            said_last = tail(err) or tail(out)
            if isinstance(error, NoResult):  # the result should be on stdout, the reason on either
                said_last = [*tail(out), *tail(err)]
            reason = clean([str(error), *said_last])
            seconds = time.perf_counter() - start
            return Result(trial, Status.FAILED, reason=reason, seconds=seconds)

    def _logs(self, trial: Trial) -> tuple[Path, Path]:
        """Return two files for stdout and stderr, so that a result's line stays whole."""
        Path(self.logs).mkdir(parents=True, exist_ok=True)
        return Path(self.logs, f"{trial}.out"), Path(self.logs, f"{trial}.err")

    def _run(
        self, trial: Trial, values: Mapping[str, object], stdout: IO[bytes], stderr: IO[bytes]
    ) -> int:
        """Run the command; return its exit code, negative for a signal.

        Raises:
            TrialError: it cannot be started, or has not ended in time.
        """
        command = [filled(part, values) for part in self.command]
        environment = {name: filled(text, values) for name, text in self.environment.items()}
        threads = self.threads.get(trial.width)
        told = dict.fromkeys(THREAD_VARIABLES, str(threads)) if threads else {}
        mark = secrets.token_hex(8)
        with ExitStack() as stack:
            started: list[subprocess.Popen[bytes]] = []
            # Pushed first, so done last: it waits for processes that the guard has ended.
            stack.callback(lambda: [process.wait() for process in started])
            group = stack.enter_context(_guarded(f"{MARK}={mark}"))
            try:
                process = subprocess.Popen(
                    command,
                    cwd=self.folder,
                    env={**os.environ, **told, **environment, MARK: mark},
                    stdin=subprocess.DEVNULL,
                    stdout=stdout,
                    stderr=stderr,
                    process_group=group,
                )
                started.append(process)
                return process.wait(self.timeout or None)
            except subprocess.TimeoutExpired:
                reason = f"no end after {self.timeout:g} s (trainer.timeout)"
            except (OSError, ValueError) as error:
                why = getattr(error, "strerror", None) or error
                reason = f"cannot start {command[0]!r} in {self.folder}: {why}"
            raise TrialError(reason)


@contextmanager
def _guarded(mark: str) -> Iterator[int]:
    """Yield a process group that is ended with this context, or when this process dies."""
    keeper = subprocess.Popen(
        [sys.executable, "-I", "-S", guard.__file__, mark, str(GRACE)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        process_group=0,
    )
    assert keeper.stdin is not None
    assert keeper.stdout is not None
    try:
        yield keeper.pid
    finally:
        keeper.stdin.close()
        keeper.wait()
        keeper.stdout.read()  # ends when the last of the group has
        keeper.stdout.close()


def _problem(code: int) -> str | None:
    """Describe the failure that an exit code means; None for success."""
    if code == 0:
        return None
    if code < 0:
        return f"killed by signal {-code}{_signal_name(-code)}"
    return f"exit code {code}" + (
        f", as after signal {code - 128}{_signal_name(code - 128)}" if code > 128 else ""
    )


def _signal_name(number: int) -> str:
    with suppress(ValueError):
        return f" ({signal.Signals(number).name})"
    return ""
