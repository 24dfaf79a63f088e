"""Trials that are fixed beforehand, trained in a folder of their own beside a sweep's.

As results of the sweep they would be evidence for its ladder, and change the answer that they are
there to measure.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from telescope.answer.finished import Kept, kept_beside
from telescope.records import Result, Status, Trial, TrialSource
from telescope.report.frames import write_table
from telescope.report.live import Progress, Screen
from telescope.spec.spec import Spec
from telescope.store.folder import Folder
from telescope.sweep.comparing import check_comparable
from telescope.sweep.machine import check_machines
from telescope.sweep.machine import workers as workers_at
from telescope.sweep.recorder import describe_latest
from telescope.sweep.run import Lent, Options, dispatcher, told_what_to_mend
from telescope.sweep.runnable import Trainable


def train_fixed(
    trials: Sequence[Trial],
    sweep: Trainable,
    beside: Folder,
    name: str,
    options: Options,
    make_screen: Callable[[], Screen],
    *,
    lent: Lent | None = None,
) -> Mapping[Trial, Result]:
    """Train the trials without a result; return every result of their folder.

    Args:
        trials: of one width, which is among the sweep's.
        sweep: trains them.
        beside: the sweep's folder, with results of the same training.
        name: of the trials' folder in it.
        options: the manner of the run; its `results` and `storage` are not used.
        make_screen: shows what happens.
        lent: a Ray shared with other sweeps.

    Raises:
        ResumeError: the sweep's results are of another training, or the folder is in use.
        TelescopeError: see `run`.
        KeyboardInterrupt: as it came; what finished is kept.
    """
    spec, is_cluster = sweep.spec, options.ray_address is not None
    sweep.check_inputs(is_cluster=is_cluster)
    at_once = workers_at(spec, options.workers, is_cluster=is_cluster)
    check_machines(spec, is_cluster=is_cluster)
    folder = Folder(beside.path / name)
    kept = kept_beside(beside, name, spec.ladder_spec.axes)
    with told_what_to_mend(folder), folder.held(), closing(kept), make_screen() as screen:
        check_comparable(beside, sweep, say=screen.note)
        title = f"{spec.name}: {name}"
        source = FixedTrials(trials, kept, folder, screen, title, at_once[trials[0].width])
        if options.dispatcher == "inline":
            at_once = dict.fromkeys(at_once, 1)
        screen.start(source.progress())
        if sweep.prints_steps:
            screen.watch(lambda: describe_latest(folder, list(source.running)))
        with dispatcher(source, sweep, folder, options, at_once, screen, lent=lent) as dispatch:
            if dispatch:
                dispatch(source, sweep.make_trainer(folder))
        folder.tidy([])
        write_table(folder.path / "trials.csv", kept.axes, source.known.values())
        return source.known


def with_target(spec: Spec) -> Spec:
    """Return the spec with the target among the widths that are trained.

    It is not checked again: the target may be far more than twice as wide as the last width.
    """
    target, last = spec.target.width, spec.ladder.widths[-1]
    widths = tuple(dict.fromkeys((*spec.ladder.widths, target)))
    by_width = {
        key: {**table, target: table.get(target, table[last])}
        for key in ("cpus", "gpus")
        if isinstance(table := getattr(spec.compute, key), Mapping)
    }
    return spec.model_copy(
        update={
            "ladder": spec.ladder.model_copy(update={"widths": widths}),
            "compute": spec.compute.model_copy(update=by_width),
        }
    )


@dataclass
class FixedTrials(TrialSource):
    """Trials as a dispatcher's source, each result kept and shown."""

    trials: Sequence[Trial]
    store: Kept
    folder: Folder
    screen: Screen
    title: str
    workers: int
    known: dict[Trial, Result] = field(default_factory=dict)
    """Every result; of earlier runs those that did not fail, which is tried again."""
    running: set[Trial] = field(default_factory=set)
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        """Take what the store holds."""
        for result in self.store.results():
            if result.status is not Status.FAILED:
                self.known.setdefault(result.trial, result)

    def ask(self) -> Sequence[Trial]:
        """The trials without a result."""
        return [trial for trial in self.trials if trial not in self.known]

    def on_start(self, trial: Trial) -> None:
        """Note that a worker has taken a trial."""
        self.running.add(trial)
        self.screen.update(self.progress())

    def on_release(self, trials: Sequence[Trial]) -> None:
        """Note that a worker has given trials back."""
        self.running.difference_update(trials)

    def tell(self, *results: Result) -> None:
        """Keep results, and show them."""
        for result in results:
            if result.curve:
                self.folder.write_curve(result)
            self.store.add(result)
            self.folder.remove_checkpoints(result.trial)
            self.running.discard(result.trial)
            self.known[result.trial] = result
            self.screen.result(result, self.progress())

    def note_pack(self, line: Mapping[str, Any]) -> None:
        """Log a decision about packs."""
        self.folder.note_pack(line)

    def progress(self) -> Progress:
        """Return the progress, as one stage."""
        done = [self.known[trial] for trial in self.trials if trial in self.known]
        complete = [result for result in done if result.loss is not None]
        left = len(self.trials) - len(done)
        each = fmean(result.seconds for result in complete) if complete else None
        return Progress(
            name=self.title,
            state="running",
            stage=0,
            stages=1,
            width=self.trials[0].width,
            stage_done=len(done),
            stage_total=len(self.trials),
            done=len(done),
            total=len(self.trials),
            running=len(self.running),
            best=min(complete, key=lambda result: result.loss or 0.0, default=None),
            seconds=time.monotonic() - self.started,
            eta_seconds=None if each is None else each * left / self.workers,
        )
