"""Runs of several sweeps at once: one queue over fixed trials of different models and lengths.

Each run keeps its results in its own folder. A dispatcher knows a trial by its content alone, so
the point of a trial on its way through a dispatcher has one more axis: the number of its run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from typing import Any

from telescope.answer.finished import Kept, ladder_memory
from telescope.dispatch.queue import Trainer
from telescope.records import Point, Result, Trial, TrialSource
from telescope.report.frames import write_table
from telescope.report.live import Progress, QuietScreen, Screen
from telescope.spec.spec import Spec
from telescope.store.folder import Folder
from telescope.sweep.comparing import check_comparable
from telescope.sweep.fixed import FixedTrials
from telescope.sweep.machine import check_machines
from telescope.sweep.machine import workers as workers_at
from telescope.sweep.prepare import prepare
from telescope.sweep.run import Lent, Options, dispatcher, told_what_to_mend
from telescope.sweep.runnable import Trainable

RUN = "run"
"""The axis with the number of a trial's run."""


@dataclass(frozen=True)
class Run:
    """Fixed trials of one sweep."""

    sweep: Trainable
    folder: Folder
    trials: tuple[Trial, ...]


def train_family(
    runs: Sequence[Run],
    place: Folder,
    title: str,
    options: Options,
    make_screen: Callable[[], Screen],
    lent: Lent | None,
) -> list[Mapping[Trial, Result]]:
    """Train the trials without a result; return every result of each run.

    Args:
        runs: those that need most time first.
        place: the folder for what concerns all runs.
        title: of the whole.
        options: the manner of the run; its `results` and `storage` are not used.
        make_screen: shows what happens.
        lent: a Ray shared with other sweeps.

    Raises:
        ResumeError: a folder's results are of another training.
        TelescopeError: see `run`.
        KeyboardInterrupt: as it came; what finished is kept.
    """
    is_cluster = options.ray_address is not None
    whole = prepare(_union([run.sweep.spec for run in runs]))
    at_once = workers_at(whole.spec, options.workers, is_cluster=is_cluster)
    check_machines(whole.spec, is_cluster=is_cluster)
    with told_what_to_mend(place), ExitStack() as stack:
        screen = stack.enter_context(make_screen())
        parts = [_opened(run, screen, is_cluster, stack) for run in runs]
        if options.dispatcher == "inline":
            at_once = dict.fromkeys(at_once, 1)
        source = _Family(parts, screen, title, min(at_once.values()))
        screen.start(source.progress())
        trainer = _Trainer(tuple(run.sweep.make_trainer(run.folder) for run in runs))
        with dispatcher(source, whole, place, options, at_once, screen, lent=lent) as dispatch:
            if dispatch:
                dispatch(source, trainer)
        for part in parts:
            part.folder.tidy([])
            write_table(part.folder.path / "trials.csv", part.store.axes, part.known.values())
        return [part.known for part in parts]


def _opened(run: Run, screen: Screen, is_cluster: bool, stack: ExitStack) -> FixedTrials:
    """Check one run's folder, record what it trains, and take what it holds."""
    sweep, folder = run.sweep, run.folder
    sweep.check_inputs(is_cluster=is_cluster)
    check_comparable(folder, sweep, say=screen.note)
    folder.create()
    axes, memory = sweep.spec.ladder_spec.axes, ladder_memory(folder)
    fingerprint = folder.read_spec()["fingerprint"] if folder.exists else sweep.fingerprint
    kept = Kept(folder, None, sweep.spec.name, axes, fingerprint, memory)
    stack.enter_context(closing(kept))
    part = FixedTrials(run.trials, kept, folder, QuietScreen(), sweep.spec.name, 1)
    if not folder.exists:  # last: with it, a folder without a store is a damaged one
        record = {
            "spec": sweep.spec.as_dict(),
            "fingerprint": sweep.fingerprint,
            "comparable_if_equal": sweep.comparable,
            "storage": None,
            "target_flops": sweep.target_flops,
        }
        folder.write_spec(record, sweep.model_text)
    return part


def _union(specs: Sequence[Spec]) -> Spec:
    """Return a spec with the widths and resources of all, without packs: runs are not alike.

    It is not checked again: its widths may be far apart.
    """
    widest = max(specs, key=lambda spec: spec.target.width)
    widths = sorted({width for spec in specs for width in spec.ladder.widths})
    by_width: dict[str, Any] = {}
    for key in ("cpus", "gpus"):
        if isinstance(getattr(widest.compute, key), Mapping):
            by_width[key] = {w: v for spec in specs for w, v in getattr(spec.compute, key).items()}
    return widest.model_copy(
        update={
            "ladder": widest.ladder.model_copy(update={"widths": tuple(widths)}),
            "compute": widest.compute.model_copy(update={**by_width, "pack": 1}),
        }
    )


@dataclass
class _Family(TrialSource):
    """All trials of all runs as a dispatcher's source."""

    parts: Sequence[FixedTrials]
    screen: Screen
    title: str
    workers: int
    started: float = field(default_factory=time.monotonic)

    def ask(self) -> Sequence[Trial]:
        """The trials without a result."""
        return [_tagged(n, trial) for n, part in enumerate(self.parts) for trial in part.ask()]

    def on_start(self, trial: Trial) -> None:
        """Note that a worker has taken a trial."""
        number, trial = _untagged(trial)
        self.parts[number].on_start(trial)
        self.screen.update(self.progress())

    def on_release(self, trials: Sequence[Trial]) -> None:
        """Note that a worker has given trials back."""
        for number, trial in map(_untagged, trials):
            self.parts[number].on_release([trial])

    def tell(self, *results: Result) -> None:
        """Keep results, and show them."""
        for result in results:
            number, trial = _untagged(result.trial)
            result = replace(result, trial=trial)
            self.parts[number].tell(result)
            self.screen.result(result, self.progress(result))

    def note_pack(self, line: Mapping[str, Any]) -> None:
        """Nothing: there are no packs."""

    def progress(self, latest: Result | None = None) -> Progress:
        """Return the progress, as one stage; the time left goes by the runs so far."""
        known = [
            part.known[trial] for part in self.parts for trial in part.trials if trial in part.known
        ]
        done, total = len(known), sum(len(part.trials) for part in self.parts)
        seconds = sum(result.seconds for result in known)
        each = seconds / done if done else None
        return Progress(
            name=self.title,
            state="running",
            stage=0,
            stages=1,
            width=latest.trial.width if latest else self.parts[0].trials[0].width,
            stage_done=done,
            stage_total=total,
            done=done,
            total=total,
            running=sum(len(part.running) for part in self.parts),
            best=latest if latest and latest.loss is not None else None,
            seconds=time.monotonic() - self.started,
            eta_seconds=None if each is None else each * (total - done) / self.workers,
        )


@dataclass(frozen=True)
class _Trainer:
    """Trains each trial with the trainer of its run; picklable."""

    trainers: tuple[Trainer, ...]

    def __call__(self, trial: Trial) -> Result:
        """Train one trial of one run."""
        number, plain = _untagged(trial)
        return replace(self.trainers[number](plain), trial=trial)


def _tagged(number: int, trial: Trial) -> Trial:
    return replace(trial, point=Point.of({**trial.point, RUN: float(number)}))


def _untagged(trial: Trial) -> tuple[int, Trial]:
    plain = {axis: value for axis, value in trial.point.items() if axis != RUN}
    return int(trial.point[RUN]), replace(trial, point=Point.of(plain))
