"""An answer audited: the target width trained around it, by the sweep's own trainer.

The trials are kept beside the sweep's, in a folder of their own: as results of the sweep they would
be evidence for its ladder, and change the answer that they audit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from telescope.answer.derive import chosen_point
from telescope.answer.finished import Finished, Kept
from telescope.errors import RefusedError, SpecError
from telescope.ladder.audit import Audit, trials_of_audit, verdict_of
from telescope.records import Result, Status, Trial, TrialSource
from telescope.report.frames import write_table
from telescope.report.live import Progress, Screen
from telescope.spec.spec import Spec
from telescope.store.folder import Folder
from telescope.store.memory import Memory
from telescope.sweep.comparing import check_comparable
from telescope.sweep.machine import check_compiler, check_numbered_device, check_this_machine
from telescope.sweep.machine import workers as workers_at
from telescope.sweep.prepare import prepare
from telescope.sweep.recorder import describe_latest
from telescope.sweep.run import Options, dispatcher, told_what_to_mend

FOLDER = "audit"
"""The audit's folder in the sweep's."""


def audit(
    finished: Finished, count: int, options: Options, make_screen: Callable[[], Screen]
) -> Audit:
    """Train what an audit of a sweep's answer misses, and return its finding.

    Args:
        finished: the sweep.
        count: number of trials; those of an earlier audit of the same answer count.
        options: the manner of the run; its `results` and `storage` are not used.
        make_screen: shows what happens.

    Raises:
        RefusedError: the sweep has no answer yet.
        SpecError: too few trials, or telescope does not train this sweep.
        ResumeError: the sweep's results are of another training, or an audit is running.
        StoreError, ModelError, DataError: see `run`.
        KeyboardInterrupt: as it came; what finished is kept.
    """
    ladder = finished.ladder
    if ladder.stuck or not ladder.is_finished:
        why = ladder.stuck or "the sweep has not finished; go on with `telescope run`"
        raise RefusedError(f"{finished.spec.name}: nothing to audit: {why}")
    if not (finished.spec.model or finished.spec.trainer):
        raise SpecError(
            f"{finished.spec.name}: another program trains this sweep, so telescope cannot audit it"
        )
    certificate = finished.certificate
    # The sweep's own steps: nothing else is compared with the certificate.
    answer = chosen_point(ladder, certificate)
    trials = trials_of_audit(ladder.spec, answer, count)
    known = _train(finished, trials, options, make_screen)
    bound = certificate.excess_bound if certificate else None
    return verdict_of(ladder.spec, answer, [known[t] for t in trials if t in known], bound)


def _train(
    finished: Finished,
    trials: Sequence[Trial],
    options: Options,
    make_screen: Callable[[], Screen],
) -> Mapping[Trial, Result]:
    """Train the trials without a result; return every result of the audit's folder."""
    spec, is_cluster = _with_target(finished.spec), options.ray_address is not None
    sweep = prepare(spec)
    sweep.check_inputs(is_cluster=is_cluster)
    at_once = workers_at(spec, options.workers, is_cluster=is_cluster)
    if not is_cluster:
        check_this_machine(spec)
        check_compiler(spec)
    check_numbered_device(spec)
    folder = Folder(finished.folder.path / FOLDER)
    axes, fingerprint = finished.ladder.spec.axes, finished.folder.read_spec()["fingerprint"]
    kept = Kept(folder, None, spec.name, axes, fingerprint, Memory(None, ""))
    with told_what_to_mend(folder), folder.held(), closing(kept), make_screen() as screen:
        check_comparable(finished.folder, sweep, say=screen.note)
        source = _Trials(trials, kept, folder, screen, spec.name, at_once[spec.target.width])
        if options.dispatcher == "inline":
            at_once = dict.fromkeys(at_once, 1)
        screen.start(source.progress())
        if sweep.prints_steps:
            screen.watch(lambda: describe_latest(folder, list(source.running)))
        with dispatcher(source, sweep, folder, options, at_once, screen) as dispatch:
            if dispatch:
                dispatch(source, sweep.make_trainer(folder))
        folder.tidy([])
        write_table(folder.path / "trials.csv", axes, source.known.values())
        return source.known


def _with_target(spec: Spec) -> Spec:
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
class _Trials(TrialSource):
    """An audit's trials as a dispatcher's source, each result kept and shown."""

    trials: Sequence[Trial]
    store: Kept
    folder: Folder
    screen: Screen
    name: str
    workers: int
    known: dict[Trial, Result] = field(default_factory=dict)
    """Every result; of an earlier audit those that did not fail, which is tried again."""
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
            name=f"{self.name}: audit",
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
