"""Runs of experiment trackers: a sweep's trials, its answer and its target runs."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from telescope.answer.finished import Finished
from telescope.files import write_atomic, write_json
from telescope.log.names import check_installed
from telescope.log.records import End, Ended, Row, Run, Started
from telescope.log.sending import FOLDER, Sender
from telescope.records import Result, Status, Trial
from telescope.report.terminal import show_as_json
from telescope.spec.spec import Spec
from telescope.store.folder import Folder
from telescope.target.folder import CURVE_FILE, RunFolder

ID_FILE = "id"
"""File with a random name of the results folder, which is part of every run's id."""
ANSWER_FILE = "answer.json"
"""File with the output of `telescope show --json`, for the summary."""


class SweepLog:
    """The trackers of one sweep's trials; does nothing if the spec names none."""

    def __init__(
        self,
        spec: Spec,
        folder: Folder,
        known: Iterable[Result],
        *,
        say: Callable[[str], None],
        wait: Callable[[str], AbstractContextManager[object]],
    ) -> None:
        """Start the trackers' processes.

        Args:
            spec: the sweep; its ``[log] to`` names the trackers.
            folder: its results folder.
            known: the results that are stored, which are delivered if they have not been.
            say: shows a line.
            wait: shows a phase while it lasts.
        """
        self._spec, self._folder, self._wait = spec, folder, wait
        self._senders: list[Sender] = []
        if not spec.log.to:
            return
        self._id = folder_id(folder.path)
        folder.rows.mkdir(exist_ok=True)
        last = {result.trial: result for result in known}  # a failed trial may have two
        backlog = [self._ended(result) for result in last.values()]
        self._senders = [Sender(name, folder.path, spec.name, say, backlog) for name in spec.log.to]

    def started(self, trial: Trial) -> None:
        """Note that a worker has taken a trial."""
        if self._senders:
            rows, logs = self._folder.rows, self._folder.logs
            files = (rows / f"{trial}.jsonl", logs / f"{trial}.out", logs / f"{trial}.log")
            self._send(Started(self._run(trial), tuple(str(path.absolute()) for path in files)))

    def ended(self, result: Result) -> None:
        """Note a trial's result, after its curve has been written."""
        if self._senders:
            self._send(self._ended(result))

    def _send(self, message: Started | Ended) -> None:
        for sender in self._senders:
            sender.send(message)

    def _run(self, trial: Trial) -> Run:
        of = json.dumps(trial.as_dict(), sort_keys=True)
        spec, rule = self._spec, self._spec.rule or "not stated"
        about = {"sweep": spec.name, "policy": spec.ladder.policy, "rule": rule}
        return Run(
            id=run_id(self._id, "trial", of),
            kind="trial",
            name=str(trial),
            sweep=spec.name,
            stage=f"width-{trial.width}",
            config={**about, "width": trial.width, "seed": trial.seed, **trial.point},
        )

    def _ended(self, result: Result) -> Ended:
        curve = self._folder.path / "curves" / f"{result.trial}.csv"
        numbers = {"loss": result.loss, "seconds": result.seconds, "flops": result.flops}
        end = End(
            status=str(result.status),
            numbers=_finite(numbers),
            texts={"reason": result.reason} if result.reason else {},
            curve=str(curve.absolute()),
        )
        return Ended(self._run(result.trial), end)

    def summarise(self, finished: Finished) -> None:
        """Send the sweep's answer, once its figure is drawn; a sweep that goes on has none yet."""
        ladder = finished.ladder
        if self._senders and (ladder.is_finished or ladder.stuck):
            self._send(_summary(finished, self._id))

    def close(self, *, is_interrupted: bool = False) -> None:
        """Wait for what is left to be delivered, for a bounded time; say what has not been."""
        for sender in self._senders:
            with self._wait(f"delivering to {sender.name}"):
                sender.close(is_interrupted=is_interrupted)
        if self._senders:
            shutil.rmtree(self._folder.rows, ignore_errors=True)


def _summary(finished: Finished, folder: str) -> Ended:
    """Return the sweep's answer as a run whose steps are the widths."""
    spec, said, path = finished.spec, show_as_json(finished), finished.folder.path
    answer, certificate = path / FOLDER / ANSWER_FILE, said["target"]["certificate"]
    write_json(answer, said)
    figure = path / "loss.png"
    rows = [
        Row(choice.width, {"choice/loss": choice.loss} | _prefixed("choice", choice.point))
        for choice in finished.ladder.choices
    ]
    numbers = {
        **_prefixed("target", said["target"]["point"] or {}),
        "predicted_excess_loss": certificate and certificate["predicted_excess_loss"],
        "excess_bound": certificate and certificate["excess_bound"],
        "sweep_flops": said["cost"]["flops"],
        "sweep_seconds": said["cost"]["seconds"],
        "sweep_over_target": said["cost"]["over_target"],
    }
    texts = {
        "certificate": certificate and certificate["verdict"],
        "advice": certificate and certificate["advice"],
        "stuck": said["stuck"],
    }
    run = Run(
        id=run_id(folder, "summary", spec.name),
        kind="summary",
        name=spec.name,
        sweep=spec.name,
        stage="answer",
        config={"sweep": spec.name, "policy": spec.ladder.policy, "width": spec.target.width},
    )
    files = {"answer": str(answer.absolute())}
    if figure.is_file():
        files["loss_figure"] = str(figure.absolute())
    return Ended(
        run,
        End(
            status="stuck" if said["stuck"] else "finished",
            numbers=_finite(numbers),
            texts={key: text for key, text in texts.items() if text},
            files=files,
            rows=[Row(row.step, _finite(row.numbers)) for row in rows],
        ),
    )


@contextmanager
def logged_target(
    finished: Finished, to: Sequence[str], folder: RunFolder, say: Callable[[str], None]
) -> Iterator[None]:
    """Log a target run while the block trains it, and its end if it has one.

    Args:
        finished: the sweep.
        to: the trackers.
        folder: the run's folder, with its `run.json`.
        say: shows a line.
    """
    if not to:
        yield
        return
    name, path = finished.spec.name, finished.folder.path
    run = _target(folder, name, folder_id(path))
    trial = Trial.from_dict(folder.read_run() or {})
    # Of another trainer, whose curve comes with the result alone.
    printed = Folder(folder.path).logs / f"{trial}.out"
    follow = [folder.path / CURVE_FILE, printed]
    started = Started(run, tuple(str(file.absolute()) for file in follow))
    senders = [Sender(tracker, path, name, say, [started]) for tracker in to]
    is_interrupted = True
    try:
        yield
        is_interrupted = False
    finally:
        if result := folder.read_result():
            for sender in senders:
                sender.send(Ended(run, _target_end(folder, result)))
        for sender in senders:
            sender.close(is_interrupted=is_interrupted)


def _target(folder: RunFolder, sweep: str, of: str) -> Run:
    record = folder.read_run() or {}
    about = {"sweep": sweep, "run": folder.path.name, "steps": record.get("steps")}
    known = {"width": record["width"], "seed": record["seed"], **record["point"], **about}
    return Run(
        id=run_id(of, "target", f"{folder.path.name} {record.get('fingerprint')}"),
        kind="target",
        name=folder.path.name,
        sweep=sweep,
        stage="target",
        config={key: value for key, value in known.items() if value is not None},
    )


def _target_end(folder: RunFolder, result: Mapping[str, Any]) -> End:
    keys = ("loss", "tokens", "tokens_per_second", "seconds", "flops", "mfu", "parameters")
    return End(
        status=str(Status.DIVERGED if result.get("diverged") else Status.COMPLETE),
        numbers=_finite({key: result.get(key) for key in keys}),
        texts={"reason": result["reason"]} if result.get("reason") else {},
        curve=str((folder.path / CURVE_FILE).absolute()),
    )


def trackers(spec: Spec, asked: Sequence[str] | None = None) -> tuple[str, ...]:
    """Return the trackers that a spec names, or those asked for instead.

    Raises:
        SpecError: there is no such tracker, or it is not installed.
    """
    if not asked:
        names: tuple[str, ...] = spec.log.to
    else:
        given = {**spec.as_dict(), "log": {"to": list(asked)}}
        names = Spec.from_dict(given, model_source=spec.model_source).log.to
    check_installed(names)
    return names


def folder_id(results: Path) -> str:
    """Return the random name of a results folder, made with its first log.

    Two people's sweeps of one name, in one project of a tracker, are two sweeps.
    """
    path = results / FOLDER / ID_FILE
    with suppress(OSError):
        if kept := path.read_text(encoding="utf-8").strip():
            return kept
    path.parent.mkdir(parents=True, exist_ok=True)
    made = uuid.uuid4().hex
    write_atomic(path, f"{made}\n")
    return made


def run_id(folder: str, kind: str, of: str) -> str:
    """Return the id of a run, the same each time that it goes on; 16 hex digits."""
    return hashlib.sha256(f"{folder}\n{kind}\n{of}".encode()).hexdigest()[:16]


def _prefixed(prefix: str, point: Mapping[str, float]) -> dict[str, float]:
    return {f"{prefix}/{axis}": value for axis, value in point.items()}


def _finite(numbers: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers that there are and that are finite."""
    return {
        name: float(number)
        for name, number in numbers.items()
        if isinstance(number, (int, float)) and math.isfinite(number)
    }
