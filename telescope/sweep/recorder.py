"""A ladder as a source of trials, with all that comes of them kept and shown.

Each result goes to its curve file, to the store in one transaction, to the ladder, then to the
heartbeat and the screen. A crash between any two of these loses nothing that was stored, because
the ladder is rebuilt from the store.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from telescope.answer.finished import Kept
from telescope.foreign.outcome import latest_row
from telescope.ladder.ladder import Ladder, replay
from telescope.records import Result, Status, Trial, TrialSource
from telescope.report.live import Progress, Screen
from telescope.store.folder import Folder
from telescope.sweep.tracking import SweepLog


@dataclass
class Recorder(TrialSource):
    """The ladder as a dispatcher's source of trials, with every result kept and shown."""

    ladder: Ladder
    store: Kept
    folder: Folder
    screen: Screen
    name: str
    workers: Mapping[int, int]
    """Width → trials at once."""
    planned: Mapping[int, int]
    """Width → trials that the plan expects."""
    known: list[Result]
    """Results so far, those of earlier runs included."""
    running: set[Trial] = field(default_factory=set)
    started: float = field(default_factory=time.monotonic)
    unpacked: set[str] = field(default_factory=set)
    """Reasons for packs smaller than asked for that have been shown already."""
    log: SweepLog | None = None
    """The trackers, if there may be any."""
    costs: tuple[float, float] | None = None
    """The least and the most that the plan says all trials can cost, in the ladder's unit."""

    def __post_init__(self) -> None:
        """Prepare what progress needs, which is asked for twice per trial."""
        self._seconds: dict[int, list[float]] = {}
        self._stored: dict[Trial, Result] = {}
        for result in self.known:
            self._note_seconds(result)
            if result.status is not Status.FAILED:
                self._stored.setdefault(result.trial, result)

    def _note_seconds(self, result: Result) -> None:
        if result.status is Status.COMPLETE:
            self._seconds.setdefault(result.trial.width, []).append(result.seconds)

    def ask(self) -> Sequence[Trial]:
        """The open stage's trials without a result; what is stored is told, never trained again."""
        while stored := [self._stored[t] for t in self.ladder.ask() if t in self._stored]:
            for result in stored:
                self.ladder.tell(result)
        return self.ladder.ask()

    def on_start(self, trial: Trial) -> None:
        """Note that a worker has taken a trial."""
        self.running.add(trial)
        if self.log:
            self.log.started(trial)
        self.screen.update(self.beat("running"))

    def tell(self, *results: Result) -> None:
        """Keep results, then let the ladder decide; of a pack all are kept, or none.

        A trial that was stored before this run is not stored twice: a worker's delivery may
        outlive the driver that has stored it.
        """
        results = tuple(result for result in results if result.trial not in self._stored)
        for result in results:
            if result.curve:
                self.folder.write_curve(result)
        if len(results) > 1:
            self.folder.write_unstored(results)
        for result in results:
            self.store.add(result)
            self.folder.remove_checkpoints(result.trial)
            self._tell(result)
        if len(results) > 1:
            self.folder.remove_unstored()

    def _tell(self, result: Result) -> None:
        """Let the ladder decide, and show what it does."""
        self.running.discard(result.trial)
        if self.log:
            self.log.ended(result)
        self.known.append(result)
        self._note_seconds(result)
        if not self.ladder.counts(result.trial):
            self._give()
        closed = len(self.ladder.choices)
        if self.ladder.counts(result.trial):
            self.ladder.tell(result)
        self.screen.result(result, self.beat("running"))
        for choice in self.ladder.choices[closed:]:
            self.screen.choice(choice)
        if len(self.ladder.choices) > closed:
            self.write_table()

    def _give(self) -> None:
        """Begin the ladder anew with all results given: a trial of before its spec changed ended.

        A kill before that is written down comes to the same: the next run finds it in the store.
        """
        given = [result.trial for result in self.ladder.given]
        self.ladder = replay(self.ladder.spec, self.known, given=given, memory=self.ladder.memory)
        record = {**self.folder.read_spec(), "given": given_record(self.ladder)}
        self.folder.write_spec(record, None)

    def on_workers(self, number: int) -> None:
        """Note the number of workers, for the time left."""
        self.workers = dict.fromkeys(self.workers, max(1, number))

    def on_release(self, trials: Sequence[Trial]) -> None:
        """Note that a worker has given trials back."""
        self.running.difference_update(trials)

    def note_pack(self, line: Mapping[str, Any]) -> None:
        """Log a decision about packs, and show each reason for smaller packs once."""
        self.folder.note_pack(line)
        why = line.get("why", "")
        if why and why not in self.unpacked:
            self.unpacked.add(why)
            self.screen.note(f"pack of width {line['width']}: {why}")

    def latest(self) -> str:
        """Describe the progress of running trials; see `describe_latest`."""
        return describe_latest(self.folder, list(self.running))

    def write_table(self) -> None:
        """Write `trials.csv`, and keep what has been decided."""
        from telescope.report.frames import write_csv

        write_csv(self.folder.path / "trials.csv", self.ladder, self.known)
        if self.ladder.memory:
            self.ladder.memory.keep()

    def leave(self, state: str) -> None:
        """Write table and heartbeat for the end of a run."""
        self.running.clear()
        self.folder.tidy(ended(self.known))
        self.write_table()
        self.beat(state)

    def beat(self, state: str) -> Progress:
        """Write the heartbeat; return its progress."""
        progress = self.progress(state)
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "time": time.time()}
        self.folder.write_status({**progress.as_dict(), **owner})
        return progress

    def progress(self, state: str) -> Progress:
        """Return the sweep's progress."""
        stage = self.ladder.stages[-1]
        in_stage = self.ladder.results(stage)
        complete = [result for result in in_stage if result.loss is not None]
        closed = sum(len(s.trials) for s in self.ladder.stages[:-1])
        expected = self._expected_trials()
        return Progress(
            name=self.name,
            state=state,
            stage=len(self.ladder.stages) - 1,
            stages=len(self.ladder.spec.widths),
            width=stage.width,
            stage_done=len(in_stage),
            stage_total=expected.get(stage.width, len(stage.trials)),
            done=closed + len(in_stage),
            total=closed + len(in_stage) + self._left(expected),
            running=len(self.running),
            best=min(complete, key=lambda r: r.loss or 0.0, default=None),
            seconds=time.monotonic() - self.started,
            eta_seconds=(eta := self._eta_seconds(expected)),
            eta_range=self._eta_range(eta, expected),
        )

    def _expected_trials(self) -> dict[int, int]:
        """Width → trials that are asked for or expected, from the open stage on.

        Of a policy that asks in rounds, what the plan expects, or what is asked for if more.
        """
        if self.ladder.is_finished or self.ladder.stuck:
            return {}
        stage = self.ladder.stages[-1]
        rest = {width: trials for width, trials in self.planned.items() if width > stage.width}
        return {stage.width: max(len(stage.trials), self.planned[stage.width]), **rest}

    def _left(self, expected: Mapping[int, int]) -> int:
        """Count the expected trials that have no result yet."""
        done = len(self.ladder.results(self.ladder.stages[-1])) if expected else 0
        return sum(expected.values()) - done

    def _eta_seconds(self, expected: Mapping[int, int]) -> float | None:
        """Time left: what remains, at the seconds measured per width, spread over the workers."""
        if not self._seconds:
            return None
        seconds = {width: fmean(times) for width, times in self._seconds.items()}
        widest, spec = max(seconds), self.ladder.spec
        rate = seconds[widest] / spec.cost(widest)
        stage = self.ladder.stages[-1]
        done = {stage.width: len(self.ladder.results(stage))}
        return sum(
            (trials - done.get(width, 0))
            * seconds.get(width, rate * spec.cost(width))
            / self.workers[width]
            for width, trials in expected.items()
        )

    def _eta_range(
        self, eta: float | None, expected: Mapping[int, int]
    ) -> tuple[float, float] | None:
        """The time left at the least and the most that the plan says the sweep can cost.

        At the pace of what is expected to be left; never less than what has been asked for takes.
        """
        spec, stage = self.ladder.spec, self.ladder.stages[-1]
        left = sum(
            (trials - (len(self.ladder.results(stage)) if width == stage.width else 0))
            * spec.cost(width)
            for width, trials in expected.items()
        )
        if not eta or not left or self.costs is None:
            return None
        spent = sum(spec.cost(result.trial.width) for result in self.ladder.known)
        asked = len(self.ladder.ask()) * spec.cost(stage.width)
        least, most = (max(cost - spent, asked) * eta / left for cost in self.costs)
        return min(least, eta), max(most, eta)


def describe_latest(folder: Folder, running: Iterable[Trial]) -> str:
    """Describe the progress of running trials that print their steps; "" if none does."""
    rows = {trial: latest_row(folder.logs / f"{trial}.out") for trial in running}
    return "; ".join(
        f"{trial.point} at step {row.step}, "
        f"loss {row.train_loss if row.held_out_loss is None else row.held_out_loss:.4f}"
        for trial, row in rows.items()
        if row
    )


def given_record(ladder: Ladder) -> list[dict[str, Any]]:
    """The given trials as `spec.json` keeps them, for `given_trials` to read."""
    return [result.trial.as_dict() for result in ladder.given]


def ended(results: Iterable[Result]) -> list[Trial]:
    """The trials that are never trained again; failed ones may be."""
    return [result.trial for result in results if result.status is not Status.FAILED]
