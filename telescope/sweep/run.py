"""One sweep from its spec to its answer: wires ladder, store, folder, dispatcher and screen.

`Recorder` is what a dispatcher sees as the source of trials: each result goes to its curve file, to
the store in one transaction, to the ladder, then to the heartbeat and the screen. A crash between
any two of these loses nothing that was stored, because the ladder is rebuilt from the store.
"""

from __future__ import annotations

import importlib
import os
import platform
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

from telescope.dispatch.packs import Packs
from telescope.errors import RefusedError, ResumeError, SpecError, StoreError
from telescope.foreign.outcome import latest_row
from telescope.ladder.ladder import Ladder, replay
from telescope.records import Result, Status, Trial
from telescope.report.live import Progress, QuietScreen, Screen
from telescope.spec.spec import Spec
from telescope.store.folder import Folder
from telescope.sweep.checking import Verdict, check_before_run, draw_kept_check
from telescope.sweep.comparing import check_comparable
from telescope.sweep.finished import Kept, given_trials, ladder_memory
from telescope.sweep.machine import (
    check_compiler,
    check_numbered_device,
    check_this_machine,
    gpus,
    takes_any_gpu,
    workers,
)
from telescope.sweep.memory import code_of
from telescope.sweep.prepare import prepare
from telescope.sweep.runnable import Outside, Runnable, Trainable

PACKAGES = ("telescope", "torch", "mup", "optuna", "ray", "numpy")


@dataclass(frozen=True)
class Options:
    """Where and how a sweep runs; nothing here changes its answer."""

    results: Path = Path("results")
    workers: int | None = None
    dispatcher: str = "ray"
    ray_address: str | None = None
    storage: str | None = None
    check: bool = True
    """Whether a sweep without a verdict gets a short coordinate check first."""
    accept_trainer: bool = False
    """Take an edited trainer for the one that made the results so far."""


@dataclass
class Recorder:
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
    """Why packs were smaller than asked for, as far as it has been said."""
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
        self.screen.update(self.beat("running"))

    def tell(self, *results: Result) -> None:
        """Keep results, then let the ladder decide; of a pack all are kept, or none."""
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
        record = {**self.folder.read_spec(), "given": _given_record(self.ladder)}
        self.folder.write_spec(record, None)

    def on_release(self, trials: Sequence[Trial]) -> None:
        """Note that a worker has given trials back."""
        self.running.difference_update(trials)

    def note_pack(self, line: Mapping[str, Any]) -> None:
        """Keep what was decided about packs, and say once why they are not larger."""
        self.folder.note_pack(line)
        why = line.get("why", "")
        if why and why not in self.unpacked:
            self.unpacked.add(why)
            self.screen.note(f"pack of width {line['width']}: {why}")

    def latest(self) -> str:
        """Where the running trials are that print their steps; empty where none does."""
        rows = {
            trial: latest_row(self.folder.logs / f"{trial}.out") for trial in list(self.running)
        }
        return "; ".join(
            f"{trial.point} at step {row.step}, "
            f"loss {row.train_loss if row.held_out_loss is None else row.held_out_loss:.4f}"
            for trial, row in rows.items()
            if row
        )

    def write_table(self) -> None:
        """Write `trials.csv`, and keep what has been decided."""
        from telescope.report.frames import write_csv

        write_csv(self.folder.path / "trials.csv", self.ladder, self.known)
        if self.ladder.memory:
            self.ladder.memory.keep()

    def leave(self, state: str) -> None:
        """Leave table and heartbeat as they are at the end of a run."""
        self.running.clear()
        self.folder.tidy(_ended(self.known))
        self.write_table()
        self.beat(state)

    def beat(self, state: str) -> Progress:
        """Write the heartbeat; returns what it says."""
        progress = self.progress(state)
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "time": time.time()}
        self.folder.write_status({**progress.as_dict(), **owner})
        return progress

    def progress(self, state: str) -> Progress:
        """How far the sweep is."""
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
        """How many of the expected trials have no result yet."""
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


def run(spec: Spec, options: Options, make_screen: Callable[[], Screen]) -> tuple[Folder, Ladder]:
    """Run a sweep, or go on with it, until it has its answer or is stuck.

    Returns:
        The results folder, and the ladder, finished or stuck.

    Raises:
        RefusedError: the plan is over the budget, or the coordinate check failed.
        ResumeError: the folder holds a sweep whose results would not be comparable, or is in use.
        StoreError: the disk is full, the folder gone, the database locked or damaged.
        SpecError, ModelError, DataError: the spec, the model file or the corpus is wrong, or there
            is no trainer to accept.
        KeyboardInterrupt: as it came; what finished is kept.
    """
    is_cluster = options.ray_address is not None
    if options.accept_trainer and not spec.trainer:
        raise SpecError(
            "--accept-trainer: is for the script or function of [trainer]; this spec has none"
        )
    sweep = prepare(spec)
    sweep.check_inputs(is_cluster=is_cluster)
    if refusal := sweep.over_budget:
        raise RefusedError(f"{spec.name}: {refusal}")
    at_once = workers(spec, options.workers, is_cluster=is_cluster)
    if not is_cluster:
        check_this_machine(spec)
        check_compiler(spec)
    check_numbered_device(spec)
    folder = Folder(options.results / spec.name)
    with (
        _told_what_to_mend(folder),
        folder.held(),
        make_screen() as screen,
        _checked(sweep, folder, options, screen, at_once) as start,
        ExitStack() as stack,
    ):
        late = _Late(start, stack)
        _dispatch(late, sweep, folder, options, at_once, screen)
        _draw(late.recorder, spec)
        return folder, late.recorder.ladder


@contextmanager
def recorded(spec: Spec, results: Path) -> Iterator[Recorder]:
    """A sweep that somebody else's loop trains, kept as `run` keeps one.

    Args:
        spec: with [cost].
        results: the folder of all results.

    Yields:
        What is asked for trials and told their results; on leaving, the folder is in a true state.

    Raises:
        RefusedError, ResumeError, StoreError: as `run`.
    """
    assert spec.cost is not None
    told, folder = Outside(spec, spec.cost), Folder(results / spec.name)
    if refusal := told.over_budget:
        raise RefusedError(f"{spec.name}: {refusal}")
    at_once = dict.fromkeys(spec.ladder.widths, 1)
    with (
        _told_what_to_mend(folder),
        folder.held(),
        _checked(told, folder, Options(results), QuietScreen(), at_once) as start,
        start.recording() as recorder,
    ):
        yield recorder
        _draw(recorder, spec)


def _draw(recorder: Recorder, spec: Spec) -> None:
    """Write the figures of the coordinate check, and of the optimum and the excess loss.

    Unless they are there as they would be.
    """
    draw_kept_check(recorder.folder, spec)
    path, memory = recorder.folder.path / "loss.png", recorder.store.memory
    title = f"{spec.name}: rule {spec.rule or 'not stated'}, policy {spec.ladder.policy}"

    def draw() -> bool:
        from telescope.report.figures import write_loss_figure

        write_loss_figure(path, recorder.ladder, title)
        return True

    code = code_of("report/figures", libraries=("matplotlib",))
    of = ("loss.png", recorder.ladder.content, title, code)
    memory.recall(bool, of, draw, only_latest=True)
    if not path.is_file():  # somebody has taken it away
        draw()
    memory.keep()


@contextmanager
def _told_what_to_mend(folder: Folder) -> Iterator[None]:
    """Say what to do about a file that cannot be written: nothing that was stored is lost."""
    try:
        yield
    except BrokenPipeError:  # whoever read what is printed has left: no fault of the place
        raise
    except OSError as error:
        raise StoreError(
            f"{error.filename or folder.path}: {error.strerror or error}; what was stored before "
            "is kept: free or mend the place, and the same command goes on"
        ) from error


@contextmanager
def _checked(
    sweep: Runnable,
    folder: Folder,
    options: Options,
    screen: Screen,
    at_once: Mapping[int, int],
) -> Iterator[_Start]:
    """Check that the sweep can be run or gone on with; its model is checked in another thread."""
    spec = sweep.spec
    trainer = check_comparable(
        folder, sweep, accept_trainer=options.accept_trainer, say=screen.note
    )
    storage = _chosen_storage(folder, options.storage)
    before = folder.read_spec() if folder.exists else {}
    record = _spec_record(sweep, storage) | trainer
    axes, fingerprint, memory = spec.ladder_spec.axes, record["fingerprint"], ladder_memory(folder)
    kept = Kept(folder, storage, spec.name, axes, fingerprint, memory)
    with closing(kept):
        if storage or folder.exists:  # what is wrong with it is said before the check takes time
            kept.results()
    for note in sweep.notes:
        screen.note(f"{spec.name}: {note}")
    one_by_one = options.dispatcher == "inline"
    with check_before_run(
        sweep, folder, wanted=options.check, say=screen.note, phase=screen.phase
    ) as verdict:
        yield _Start(
            sweep=sweep,
            folder=folder,
            screen=screen,
            workers=dict.fromkeys(at_once, 1) if one_by_one else at_once,
            kept=kept,
            before=before,
            record=record,
            verdict=verdict,
        )


@dataclass(frozen=True)
class _Start:
    """A sweep that begins, or goes on, as soon as its verdict is there."""

    sweep: Runnable
    folder: Folder
    screen: Screen
    workers: Mapping[int, int]
    kept: Kept
    before: Mapping[str, Any]
    """What the folder's `spec.json` says so far."""
    record: dict[str, Any]
    """What it will say."""
    verdict: Verdict

    @contextmanager
    def recording(self) -> Iterator[Recorder]:
        """Wait for the verdict, replay the store, and leave folder and heartbeat in a true state.

        Raises:
            RefusedError: the coordinate check failed.
            TelescopeError: see `run`.
        """
        write_verdict = self.verdict.settle()
        with closing(self.kept) as store:
            recorder = self._replayed(store, write_verdict)
            try:
                if self.sweep.prints_steps:
                    self.screen.watch(recorder.latest)
                self.screen.start(recorder.beat("running"))
                yield recorder
            except BaseException:
                with suppress(OSError):  # a full disk, say, which is being reported already
                    recorder.leave("interrupted")
                raise
            ended = "finished" if recorder.ladder.is_finished else "interrupted"
            recorder.leave("stuck" if recorder.ladder.stuck else ended)

    def _replayed(self, store: Kept, write_verdict: Callable[[], object]) -> Recorder:
        """The ladder with all that is stored, and the folder as the sweep's."""
        sweep, folder = self.sweep, self.folder
        known = store.results()
        for result in folder.unstored():
            if result not in known:
                store.add(result)
                known.append(result)
        folder.remove_unstored()
        write_verdict()  # first: with its spec the folder counts as a sweep that has its verdict
        folder.tidy(_ended(known))
        ladder = replay(
            sweep.ladder_spec,
            known,
            given=given_trials(self.before),
            retry_failures=True,
            memory=store.memory,
        )
        self.record["given"] = _given_record(ladder)
        folder.write_spec(self.record, sweep.model_text)
        return Recorder(
            ladder=ladder,
            store=store,
            folder=folder,
            screen=self.screen,
            name=sweep.spec.name,
            workers=self.workers,
            planned={stage.width: stage.trials for stage in sweep.plan.stages},
            known=known,
            costs=(sweep.plan.best, sweep.plan.worst),
        )


class _Late:
    """A sweep as a source of trials, which begins when it is first asked for one."""

    def __init__(self, start: _Start, stack: ExitStack) -> None:
        """Nothing has begun.

        Args:
            start: how it begins.
            stack: what ends it.
        """
        self._start = start
        self._stack = stack

    @cached_property
    def recorder(self) -> Recorder:
        """The sweep, begun; waits for the verdict."""
        return self._stack.enter_context(self._start.recording())

    def is_due(self) -> bool:
        """Whether there is no verdict to wait for."""
        return self._start.verdict.is_due()

    def ask(self) -> Sequence[Trial]:
        """See `Recorder.ask`."""
        return self.recorder.ask()

    def tell(self, *results: Result) -> None:
        """See `Recorder.tell`."""
        self.recorder.tell(*results)

    def on_start(self, trial: Trial) -> None:
        """See `Recorder.on_start`."""
        self.recorder.on_start(trial)

    def on_release(self, trials: Sequence[Trial]) -> None:
        """See `Recorder.on_release`."""
        self.recorder.on_release(trials)

    def note_pack(self, line: Mapping[str, Any]) -> None:
        """See `Recorder.note_pack`."""
        self.recorder.note_pack(line)


def _given_record(ladder: Ladder) -> list[dict[str, Any]]:
    """The given trials as `spec.json` keeps them, for `given_trials` to read."""
    return [result.trial.as_dict() for result in ladder.given]


def _ended(results: Iterable[Result]) -> list[Trial]:
    """The trials that are never trained again; failed ones may be."""
    return [result.trial for result in results if result.status is not Status.FAILED]


def _dispatch(
    late: _Late,
    sweep: Trainable,
    folder: Folder,
    options: Options,
    at_once: Mapping[int, int],
    screen: Screen,
) -> None:
    """Run what the ladder asks for; Ray is not even imported when there is nothing to run.

    A Ray of our own and its workers start while the model is being checked; a cluster's places are
    taken only when there is a trial for them.
    """
    is_cluster = options.ray_address is not None
    starts_ahead = options.dispatcher != "inline" and not is_cluster and not late.is_due()
    if not starts_ahead and not late.ask():
        return
    trainer, timeout = sweep.make_trainer(folder), sweep.timeout
    packs = Packs(sweep.pack_size(is_cluster=is_cluster), lines=folder.packs(), note=late.note_pack)
    if options.dispatcher == "inline":
        from telescope.dispatch.inline import run_inline

        run_inline(
            late,
            trainer,
            timeout=timeout,
            packs=packs,
            on_start=late.on_start,
            on_release=late.on_release,
        )
        return
    spec, owner = sweep.spec, str(folder.path.resolve())
    with ExitStack() as stack:
        with screen.phase("starting Ray"):
            from telescope.dispatch.ray.tune import Size, opened, run_ray

            reserved = gpus(spec, at_once, is_cluster=is_cluster)
            sizes = {
                width: Size(number, spec.compute.cpus_at(width), reserved[width])
                for width, number in at_once.items()
            }
            base = sizes[spec.base_width]
            session = (
                None
                if is_cluster
                else stack.enter_context(opened([base, *sizes.values()], owner=owner))
            )
        if not late.is_due():  # the trials wait for this thread once the verdict is there
            importlib.import_module("telescope.store.store")
        run_ray(
            late,
            trainer,
            workers=base.workers,
            cpus=base.cpus,
            gpus=base.gpus,
            by_width=sizes if spec.compute.is_by_width else None,
            address=options.ray_address,
            timeout=timeout,
            packs=packs,
            owner=owner,
            on_start=late.on_start,
            on_release=late.on_release,
            logs=folder.logs if sweep.worker_prints else None,
            takes_any_gpu=is_cluster and takes_any_gpu(spec),
            session=session,
            is_due=late.is_due,
        )


def _spec_record(sweep: Runnable, storage: str | None) -> dict[str, Any]:
    """What `spec.json` holds."""
    return {
        "spec": sweep.spec.as_dict(),
        "fingerprint": sweep.fingerprint,
        "comparable_if_equal": sweep.comparable,
        "storage": storage and _without_password(storage),
        "target_flops": sweep.target_flops,
        "costs": {str(width): cost for width, cost in sweep.cost_per_trial.items()},
        "planned": sweep.planned,
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in PACKAGES},
    }


def _without_password(url: str) -> str:
    from telescope.store.store import without_password  # imports the database's libraries

    return without_password(url)


def _chosen_storage(folder: Folder, asked: str | None) -> str | None:
    """The storage asked for, or the one that an existing sweep named; None is beside the results.

    Raises:
        ResumeError: the sweep's results are in another storage than the one asked for.
    """
    if not folder.exists:
        return asked
    before: str | None = folder.read_spec()["storage"]
    if asked and _without_password(asked) != before:
        raise ResumeError(
            f"--storage {_without_password(asked)}: this sweep's results are in "
            f"{before or folder.path / 'trials.db'}; leave --storage out, or use --name"
        )
    return asked or before
