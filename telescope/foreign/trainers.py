"""Trains by another program or by a user's Python function: what `[trainer]` names.

Both trainers are plain data, so they are pickled to workers, and work alike inline and on Ray. They
know nothing of how a program trains: it is told a trial and says what came of it.
"""

from __future__ import annotations

import inspect
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from telescope.dispatch.queue import THREAD_VARIABLES, clean
from telescope.errors import SpecError, TrialError
from telescope.foreign import guard
from telescope.foreign.loading import load_function, seen_from
from telescope.foreign.outcome import Curve, Prices, as_result, on_stderr
from telescope.foreign.output import NoResult, read_output, tail
from telescope.foreign.program import read_program
from telescope.records import Result, Status, Trial
from telescope.spec.placeholders import filled, names_in

GRACE = 5.0
"""Seconds between SIGTERM and SIGKILL: a launcher's time to end what it has started."""
MARK = "TELESCOPE_TRIAL"
"""The environment variable by which all processes of a trial are known."""


def check_unchanged(sources: Mapping[str, str]) -> None:
    """Check that the trainer is still the one that the sweep began with.

    Args:
        sources: file → digest of its code then.

    Raises:
        TrialError: it is not; losses of two programs are not one ladder.
    """
    for name, before in sources.items():
        try:
            is_same = read_program(Path(name)).code == before
        except SpecError as error:
            raise TrialError(str(error)) from error
        if not is_same:
            raise TrialError(
                f"{name} has changed since the sweep began; undo the change and the same command "
                "goes on, with --accept-trainer if it trains alike, or use --name for another sweep"
            )


@dataclass(frozen=True)
class Place:
    """What a trial is told besides its own content, and where it may write."""

    base_width: int
    trial_folders: str
    """Where each trial has a folder of its own, made when it is asked for."""
    steps: int | None = None
    prices: Prices = field(default_factory=Prices)

    def values(self, trial: Trial) -> dict[str, object]:
        """Name → value of all that can be said of a trial."""
        steps = {} if self.steps is None else {"steps": self.steps}
        return {
            "width": trial.width,
            "seed": trial.seed,
            **trial.point,
            "base_width": self.base_width,
            "trial_folder": str(Path(self.trial_folders, str(trial))),
            "python": sys.executable,
            **steps,
        }


@dataclass(frozen=True)
class FunctionTrainer:
    """Calls a user's function with keywords: width, seed, and every axis by name.

    It also gets ``base_width``, ``steps`` and ``trial_folder`` where its signature names them. It
    returns a float loss, or a mapping as a command's JSON line, in which ``curve`` may be a list of
    such lines.
    """

    function: str
    directories: tuple[str, ...]
    """Where it is imported from, the first first."""
    place: Place
    sources: Mapping[str, str] = field(default_factory=dict)
    """File → digest of its code when the sweep began."""

    def __call__(self, trial: Trial) -> Result:
        """Call it once.

        Raises:
            SpecError: it cannot be imported here.
            TrialError: it returned what is no result, or its file has changed.
            Exception: whatever it raises.
        """
        start = time.perf_counter()
        check_unchanged(self.sources)
        function = load_function(self.function, self.directories)
        values = self.place.values(trial)
        names = accepted(function, {"width", "seed", *trial.point}, set(values) - {"python"})
        if "trial_folder" in names:
            Path(str(values["trial_folder"])).mkdir(parents=True, exist_ok=True)
        with seen_from(self.directories):
            returned = function(**{name: values[name] for name in values if name in names})
        if isinstance(returned, Result):
            return returned  # which the queue checks, as it does every trainer's
        if returned is None:
            raise TrialError("the function returned nothing: it has loss None, must be a number")
        said = returned if isinstance(returned, Mapping) else {"loss": returned}
        curve = _curve(said.get("curve"))
        seconds = time.perf_counter() - start
        place = self.place
        return as_result(trial, said, place.prices, seconds=seconds, curve=curve, steps=place.steps)


def _curve(rows: object) -> Curve:
    """The rows that a function returned; what is no row is left out."""
    curve = Curve()
    if isinstance(rows, Iterable):
        for row in rows:
            if isinstance(row, Mapping):
                curve.add(row)
    elif rows is not None:
        on_stderr(f"telescope: curve is a {type(rows).__name__}, must be a list: left out")
    return curve


def accepted(function: Callable[..., Any], always: set[str], offered: set[str]) -> set[str]:
    """The keywords that a function is called with: those always, and those offered that it names.

    >>> def train(width, lr, base_width, **others): ...
    >>> sorted(accepted(train, {"width", "lr", "seed"}, {"base_width", "steps"}))
    ['base_width', 'lr', 'seed', 'width']
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # written in C: it says nothing
        return always
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return always | (offered & {parameter.name for parameter in parameters})
    return (always | offered) & {parameter.name for parameter in parameters}


def check_signature(
    name: str, function: Callable[..., Any], required: set[str], offered: set[str]
) -> None:
    """Check that a function takes what a sweep varies, and needs nothing that nobody gives.

    Raises:
        SpecError: naming the parameter.
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    for missing in sorted(required - named) if not takes_all else ():
        raise SpecError(
            f"trainer.function: {name} takes no {missing}; it is called with keywords: "
            f"{', '.join(sorted(required))}"
        )
    for parameter in parameters:
        needed = parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_KEYWORD,
            parameter.VAR_POSITIONAL,
        )
        if needed and parameter.name not in (required | offered) & named:
            raise SpecError(
                f"trainer.function: {name} needs {parameter.name}, which is not given; make it an "
                f"axis, or give it a default: keywords are {', '.join(sorted(required | offered))}"
            )


@dataclass(frozen=True)
class CommandTrainer:
    """Runs a command once per trial; its last JSON line with a verdict is the result."""

    command: tuple[str, ...]
    folder: str
    """Working directory."""
    logs: str
    """Where each trial leaves what it printed, ``.out`` and ``.err``; a retry writes them anew."""
    place: Place
    environment: Mapping[str, str] = field(default_factory=dict)
    result: str | None = None
    """The file in which the result comes back, relative to `folder`; None: stdout."""
    timeout: float = 0.0
    threads: Mapping[int, int] = field(default_factory=dict)
    """Width → threads that numerical libraries are told to use; not said where it is not given."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """File → digest of its code when the sweep began; with another one a trial fails."""

    def __call__(self, trial: Trial) -> Result:
        """Run it to its end; whatever it does is a result, its own failures included."""
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
            check_unchanged(self.sources)  # which of the two texts was read is not known
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
            if isinstance(error, NoResult):  # what is missing is on stdout, and why on either
                said_last = [*tail(out), *tail(err)]
            reason = clean([str(error), *said_last])
            seconds = time.perf_counter() - start
            return Result(trial, Status.FAILED, reason=reason, seconds=seconds)

    def _logs(self, trial: Trial) -> tuple[Path, Path]:
        """The files of a trial's stdout and stderr; apart, so that a result's line stays whole."""
        Path(self.logs).mkdir(parents=True, exist_ok=True)
        return Path(self.logs, f"{trial}.out"), Path(self.logs, f"{trial}.err")

    def _run(
        self, trial: Trial, values: Mapping[str, object], stdout: IO[bytes], stderr: IO[bytes]
    ) -> int:
        """Run the command; returns its exit code, negative for a signal.

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
            # Pushed first, so done last: what the guard has ended is waited for.
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
    """A process group that is gone when the code inside is left, or when this process dies."""
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
    """What an exit code says against a run."""
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
