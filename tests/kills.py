"""Real sweeps on workers that join, whose processes are killed at random moments.

Driver and workers are forked from the warm server of `faults.py`. Each worker runs what `telescope
worker` runs, but for a trainer that takes a twentieth of a second and writes down each start.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import sqlalchemy
from conftest import quiet
from faults import STARTS, finish, formula, log_start, spec_of, start
from stages import Recorded

from telescope import Spec
from telescope.dispatch.joining import board as joining
from telescope.dispatch.joining import driver, worker
from telescope.dispatch.packing import Packer
from telescope.dispatch.queue import Order, Queue
from telescope.errors import TelescopeError
from telescope.files import write_atomic
from telescope.records import CurvePoint, Result, Status, Trial
from telescope.store.database import sqlite_url
from telescope.sweep.joining import join
from telescope.sweep.run import Options, run
from telescope.train import loop

LEASE = 2.0
OUTCOME = "outcome.txt"
REFUSED = "refused.txt"
"""The file with the error that has ended a worker."""


def name_of(place: Path, storage: str | None) -> str:
    """The sweep's name: another one for each place, where a server holds them all."""
    return "tiny" if storage is None else f"{place.parent.name}-{place.name}"


def drive(place: Path, storage: str | None) -> None:
    """One `telescope run --dispatcher workers`."""

    def scribble(path: Path, ladder: Any, title: str) -> None:
        write_atomic(path, b"a figure takes half a second to draw")

    options = Options(place / "results", dispatcher="workers", storage=storage, check=False)
    with (
        patch.object(joining, "LEASE", LEASE),
        # Each may be killed often; elsewhere it is tested that three times are enough.
        patch.object(driver, "Queue", partial(Queue, retries=1000)),
        patch("telescope.report.figures.write_loss_figure", scribble),
    ):
        spec = spec_of(place, name=name_of(place, storage))
        run(Spec.from_dict(spec), options, quiet)


def serve(place: Path, storage: str | None, seconds: float = 0.05) -> None:
    """One `telescope worker`, with a trainer that takes some seconds."""

    def fast(config: Any, trial: Trial) -> Result:
        log_start(place, trial)
        time.sleep(seconds)
        curve = (CurvePoint(2, 3.25, None), CurvePoint(4, 3.0, formula(trial)))
        return Result(trial, Status.COMPLETE, loss=formula(trial), flops=1.5e9, curve=curve)

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with (
        patch.object(loop, "train", fast),
        patch.object(loop.TelescopeTrainer, "warm", lambda self: None),  # imports for seconds
        patch.object(worker, "START_METHOD", "fork"),
        suppress(KeyboardInterrupt),
    ):
        name, results = name_of(place, storage), place / "results"
        try:
            join(name, storage, results, patience=120, note=lambda line: None)
        except TelescopeError as error:
            (place / REFUSED).write_text(str(error))


def outlived(place: Path) -> None:
    """Train a trial whose process ends, and leaves another one behind."""
    (trial,) = Recorded(1).stages[0]

    def fatal(trial: Trial) -> Result:
        if os.fork() == 0:
            time.sleep(20)
        os._exit(3)

    with patch.object(worker, "START_METHOD", "fork"):
        trainee = worker.Trainee(lambda: Packer(lambda: fatal), place)
        outcome = trainee.carry_out(Order((trial,)), lambda: None, 0.1)
    (place / OUTCOME).write_text(str(outcome))


@dataclass
class Kills:
    """Counts over a series of kills."""

    kills: int = 0
    sweeps: int = 0
    by_victim: dict[str, int] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    """Trials that were stored or delivered before a kill, and not after it."""
    twice: list[str] = field(default_factory=list)
    """Trials that were started again although they were stored or delivered."""

    def __str__(self) -> str:
        of = ", ".join(f"{name} {number}" for name, number in sorted(self.by_victim.items()))
        return (
            f"{self.kills} kills ({of}) in {self.sweeps} sweeps: {len(self.lost)} trials lost, "
            f"{len(self.twice)} run again"
        )


class Sight:
    """Looks at one sweep's database and starts while it runs."""

    def __init__(self, place: Path, storage: str | None) -> None:
        self._name = name_of(place, storage)
        url = storage or sqlite_url(place / "results" / self._name)
        self._log, self._engine = place / STARTS, sqlalchemy.create_engine(url)
        self._known, self._starts = set[str](), 0

    def look(self, tally: Kills) -> None:
        """Compare with the last look."""
        known = self.known()  # first: what starts from now on, although it is there, starts again
        starts = self._log.read_text().splitlines() if self._log.exists() else []
        tally.lost += sorted(self._known - known)
        tally.twice += [name for name in starts[self._starts :] if name in self._known]
        self._known, self._starts = known, len(starts)

    def known(self) -> set[str]:
        """The trials that are stored, each once, or delivered."""
        if (
            self._engine.dialect.name == "sqlite"
            and not Path(self._engine.url.database or "").is_file()
        ):
            return set()
        with self._engine.connect() as connection:
            return self._delivered(connection) | set(self.stored(connection))

    def _delivered(self, connection: sqlalchemy.Connection) -> set[str]:
        if not sqlalchemy.inspect(connection).has_table("telescope_orders"):
            return set()
        query = sqlalchemy.text(
            "SELECT outcome FROM telescope_orders WHERE state = 'done' AND sweep = :name"
        )
        # A failure is delivered too, and its trial is rightly tried again.
        return {
            str(Trial.from_dict(result))
            for outcome in connection.scalars(query, {"name": self._name})
            for result in json.loads(outcome).get("results", ())
            if result["status"] != Status.FAILED
        }

    def stored(self, connection: sqlalchemy.Connection) -> list[str]:
        """The stored trials, without this program's code."""
        tables = sqlalchemy.inspect(connection).get_table_names()
        if not {"trial_user_attributes", "trial_params"} <= set(tables):  # they are being made
            return []
        query = sqlalchemy.text(
            "SELECT a.trial_id, a.value_json, p.param_name, p.param_value "
            "FROM trial_user_attributes a JOIN trial_params p ON p.trial_id = a.trial_id "
            "JOIN trials t ON t.trial_id = a.trial_id JOIN studies s ON s.study_id = t.study_id "
            "WHERE a.key = 'run' AND s.study_name LIKE :studies"
        )
        params: dict[int, dict[str, float]] = {}
        runs: dict[int, dict[str, Any]] = {}
        for number, run_facts, name, value in connection.execute(
            query, {"studies": f"{self._name}/%"}
        ):
            params.setdefault(number, {})[name] = value
            runs[number] = json.loads(run_facts)
        names = [
            f"width={facts['width']}_lr={params[n]['lr']:.6g}"
            f"_weight_decay={params[n]['weight_decay']:.6g}_seed={facts['seed']}"
            for n, facts in runs.items()
        ]
        assert len(names) == len(set(names)), f"stored twice: {sorted(names)}"
        return names

    def close(self) -> None:
        self._engine.dispose()


class Cast:
    """The processes of one sweep."""

    def __init__(self, place: Path, storage: str | None, workers: int) -> None:
        self._arguments = (place, storage)
        self.driver = start(drive, *self._arguments)
        self.workers = [start(serve, *self._arguments) for _ in range(workers)]

    def kill(self, moments: random.Random) -> str:
        """Kill -9 one process at random, and start another in its place; return what it was."""
        victim = moments.choice(("driver", "worker", "trainer"))
        if victim == "driver":
            self.driver.kill()
            finish(self.driver)
            self.driver = start(drive, *self._arguments)
            return victim
        number = moments.randrange(len(self.workers))
        process = self.workers[number]
        if victim == "trainer":
            for child in children(process):
                child.kill()
                return victim
        process.kill()
        finish(process)
        self.workers[number] = start(serve, *self._arguments)
        return "worker"

    def revive(self) -> None:
        """Replace workers that have given up: what trained was killed again and again."""
        for number, process in enumerate(self.workers):
            if process.exitcode is not None:
                self.workers[number] = start(serve, *self._arguments)

    def end(self) -> None:
        """End what is left."""
        for process in (self.driver, *self.workers):
            if process.is_alive():
                process.terminate()
        for process in (self.driver, *self.workers):
            process.join(20)
            process.kill()


def children(process: BaseProcess) -> list[psutil.Process]:
    """The processes that a worker has started, itself alive or not."""
    with suppress(psutil.Error):
        return psutil.Process(process.pid).children()
    return []


def kill_at_random(
    places: Iterator[Path],
    kills: int,
    seed: int,
    storage: str | None = None,
    workers: int = 2,
    seconds: float = 1.5,
) -> tuple[Kills, list[Path]]:
    """Run sweeps on workers, and kill drivers, workers and what trains, until each has ended.

    Args:
        places: an empty folder for each sweep.
        kills: how many kills in all, at least.
        seed: of victims and moments.
        storage: a server's URL; None for the file in the sweep's folder.
        workers: how many at once.
        seconds: the longest time between two kills, at first.
    """
    moments, tally, done = random.Random(seed), Kills(), []
    while tally.kills < kills:
        place = next(places)
        tally.sweeps += 1
        with ExitStack() as stack:
            sight = stack.enter_context(closing(Sight(place, storage)))
            cast = Cast(place, storage, workers)
            stack.callback(cast.end)
            patience = seconds
            while True:
                cast.driver.join(moments.uniform(0, patience))
                if cast.driver.exitcode is not None:
                    assert cast.driver.exitcode == 0, cast.driver.exitcode
                    break
                cast.revive()
                victim = cast.kill(moments)
                sight.look(tally)
                tally.kills += 1
                tally.by_victim[victim] = tally.by_victim.get(victim, 0) + 1
                patience += seconds / 5  # or a machine that has become slow would end none
            sight.look(tally)
        done.append(place)
    return tally, done
