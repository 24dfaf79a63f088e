"""One sweep from its spec to its answer: wires ladder, store, folder, dispatcher and screen."""

from __future__ import annotations

import importlib
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from telescope.answer.finished import Finished, Kept, given_trials, ladder_memory
from telescope.dispatch.packs import Packs
from telescope.dispatch.queue import Trainer
from telescope.errors import RefusedError, ResumeError, SpecError, StoreError
from telescope.ladder.ladder import replay
from telescope.records import Result, Trial, TrialSource
from telescope.report.live import QuietScreen, Screen
from telescope.spec.spec import Spec
from telescope.store.folder import Folder
from telescope.store.memory import code_of
from telescope.sweep.checking import Verdict, check_before_run, draw_kept_check
from telescope.sweep.comparing import check_comparable
from telescope.sweep.machine import (
    check_machines,
    gpus,
    takes_any_gpu,
    workers,
)
from telescope.sweep.prepare import prepare
from telescope.sweep.recorder import Recorder, ended, given_record
from telescope.sweep.runnable import Outside, Runnable, Trainable
from telescope.sweep.tracking import SweepLog, trackers
from telescope.sweep.versions import versions

if TYPE_CHECKING:
    from telescope.dispatch.ray.tune import Session


@dataclass(frozen=True)
class Options:
    """The place and manner of a run; nothing here changes the sweep's answer."""

    results: Path = Path("results")
    workers: int | None = None
    dispatcher: str = "ray"
    ray_address: str | None = None
    storage: str | None = None
    check: bool = True
    """Make a short coordinate check first, if the sweep has no verdict yet."""
    accept_trainer: bool = False
    """Take an edited trainer for the one that made the results so far."""

    @property
    def is_cluster(self) -> bool:
        """True if the trials run on other machines than this, as far as is known here."""
        return self.ray_address is not None or self.dispatcher == "workers"


@dataclass
class Lent:
    """A Ray that serves several sweeps in turn, opened for the first that needs one."""

    owner: Path
    """A folder of all of them, that one run at a time holds."""
    stack: ExitStack
    """Closes it."""
    session: Session | None = None


def run(
    spec: Spec,
    options: Options,
    make_screen: Callable[[], Screen],
    *,
    lent: Lent | None = None,
) -> Finished:
    """Run a sweep, or go on with it, until it has its answer or is stuck.

    Args:
        spec: the sweep.
        options: the manner of the run.
        make_screen: shows what happens.
        lent: a Ray shared with other sweeps, whose trials need the same; left out, its own.

    Returns:
        The sweep as it was left, its ladder finished or stuck.

    Raises:
        RefusedError: the plan is over the budget, or the coordinate check failed.
        ResumeError: the folder holds a sweep whose results would not be comparable, or is in use.
        StoreError: the disk is full, the folder gone, the database locked or damaged.
        SpecError, ModelError, DataError: the spec, the model file or the corpus is wrong, or there
            is no trainer to accept.
        KeyboardInterrupt: as it came; what finished is kept.
    """
    is_cluster = options.is_cluster
    if options.accept_trainer and not spec.trainer:
        raise SpecError(
            "--accept-trainer: is for the script or function of [trainer]; this spec has none"
        )
    trackers(spec)
    folder = Folder(options.results / spec.name)
    if options.dispatcher == "workers":
        _check_joining(options, folder)
    sweep = prepare(spec)
    sweep.check_inputs(is_cluster=is_cluster)
    if refusal := sweep.over_budget:
        raise RefusedError(f"{spec.name}: {refusal}")
    at_once = _at_once(spec, options)
    check_machines(spec, is_cluster=is_cluster)
    with (
        told_what_to_mend(folder),
        folder.held(),
        make_screen() as screen,
        _checked(sweep, folder, options, screen, at_once) as start,
        ExitStack() as stack,
    ):
        late = _Late(start, stack)
        with dispatcher(late, sweep, folder, options, at_once, screen, lent=lent) as dispatch:
            if dispatch:
                dispatch(late, sweep.make_trainer(folder))
        return _answer(late.recorder, sweep)


def _answer(recorder: Recorder, sweep: Runnable) -> Finished:
    """Draw the figures, and give the answer to the trackers too."""
    _draw(recorder, sweep.spec)
    finished = _finished(recorder, sweep)
    if recorder.log:
        recorder.log.summarise(finished)
    return finished


def _at_once(spec: Spec, options: Options) -> dict[int, int]:
    """Width → trials at once; of workers that join, those that are promised, or 1."""
    if options.dispatcher != "workers":
        return workers(spec, options.workers, is_cluster=options.is_cluster)
    promised = options.workers or spec.compute.workers
    return dict.fromkeys(spec.ladder.widths, 1 if promised == "auto" else promised)


def _finished(recorder: Recorder, sweep: Runnable) -> Finished:
    """The sweep as it was left: what `open_result` would read of its folder."""
    return Finished(
        folder=recorder.folder,
        spec=sweep.spec,
        ladder=recorder.ladder,
        results=recorder.known,
        target_flops=sweep.target_flops,
        planned=sweep.planned,
        memory=recorder.store.memory,
    )


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
    trackers(spec)
    told, folder = Outside(spec, spec.cost), Folder(results / spec.name)
    if refusal := told.over_budget:
        raise RefusedError(f"{spec.name}: {refusal}")
    at_once = dict.fromkeys(spec.ladder.widths, 1)
    with (
        told_what_to_mend(folder),
        folder.held(),
        _checked(told, folder, Options(results), QuietScreen(), at_once) as start,
        start.recording() as recorder,
    ):
        yield recorder
        _answer(recorder, told)


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
def told_what_to_mend(folder: Folder) -> Iterator[None]:
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
) -> Iterator[_Opening]:
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
        yield _Opening(
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
class _Opening:
    """A sweep that starts or resumes as soon as its verdict is there."""

    sweep: Runnable
    folder: Folder
    screen: Screen
    workers: Mapping[int, int]
    kept: Kept
    before: Mapping[str, Any]
    """The present content of the folder's `spec.json`."""
    record: dict[str, Any]
    """The new content of `spec.json`."""
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
            recorder.log = log = self._log(recorder.known)
            try:
                if self.sweep.prints_steps:
                    self.screen.watch(recorder.latest)
                self.screen.start(recorder.beat("running"))
                yield recorder
            except BaseException:
                with suppress(OSError):  # a full disk, say, which is being reported already
                    recorder.leave("interrupted")
                log.close(is_interrupted=True)
                raise
            ended = "finished" if recorder.ladder.is_finished else "interrupted"
            recorder.leave("stuck" if recorder.ladder.stuck else ended)
            log.close()

    def _log(self, known: Sequence[Result]) -> SweepLog:
        """Start the trackers, which get what is stored if they have not got it yet."""
        screen = self.screen
        return SweepLog(self.sweep.spec, self.folder, known, say=screen.note, wait=screen.phase)

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
        folder.tidy(ended(known))
        ladder = replay(
            sweep.ladder_spec,
            known,
            given=given_trials(self.before),
            retry_failures=True,
            memory=store.memory,
        )
        self.record["given"] = given_record(ladder)
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


class Noting(TrialSource, Protocol):
    """A source of trials that keeps the decisions about packs."""

    def note_pack(self, line: Mapping[str, Any]) -> None:
        """Log a decision about packs."""
        ...


class _Late(TrialSource):
    """A sweep as a source of trials, which begins when it is first asked for one."""

    def __init__(self, start: _Opening, stack: ExitStack) -> None:
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

    @property
    def is_due(self) -> bool:
        """True once there is no verdict to wait for."""
        return self._start.verdict.is_due()

    def begun(self) -> Recorder:
        """The sweep; see `recorder`."""
        return self.recorder

    def ask(self) -> Sequence[Trial]:
        """See `Recorder.ask`."""
        return self.recorder.ask()

    def tell(self, *results: Result) -> None:
        """See `Recorder.tell`."""
        self.recorder.tell(*results)

    def note_pack(self, line: Mapping[str, Any]) -> None:
        """See `Recorder.note_pack`."""
        self.recorder.note_pack(line)


@contextmanager
def dispatcher(
    source: Noting,
    sweep: Trainable,
    folder: Folder,
    options: Options,
    at_once: Mapping[int, int],
    screen: Screen,
    *,
    lent: Lent | None = None,
) -> Iterator[Callable[[TrialSource, Trainer], None] | None]:
    """Yield the function that has trials trained; None, without importing Ray, if there are none.

    A Ray of our own and its workers start while the model is being checked; a cluster's resources
    are taken only once there is a trial for them.

    Args:
        source: the trials.
        sweep: trains them.
        folder: where trials leave their files.
        options: the manner of the run.
        at_once: width → workers.
        screen: shows what happens.
        lent: a Ray shared with other sweeps.
    """
    address = options.ray_address
    if options.dispatcher == "workers":
        with _joining(source, sweep, folder, options, at_once, screen) as dispatch:
            yield dispatch
        return
    starts_ahead = options.dispatcher != "inline" and not address and not source.is_due
    if not starts_ahead and not source.ask():
        yield None
        return
    packs = Packs(
        sweep.pack_size(is_cluster=bool(address)), lines=folder.packs(), note=source.note_pack
    )
    if options.dispatcher == "inline":
        from telescope.dispatch.inline import run_inline

        yield partial(run_inline, timeout=sweep.timeout, packs=packs)
        return
    with ExitStack() as stack:
        lent = lent or Lent(folder.path, stack)
        if lent.session is None:
            with screen.phase("connecting to Ray" if address else "starting Ray"):
                started = _ray(sweep.spec, lent.owner, address, at_once)
                lent.session = lent.stack.enter_context(started)
        from telescope.dispatch.ray.tune import run_ray

        if not source.is_due:  # the trials wait for this thread once the verdict is there
            importlib.import_module("telescope.store.store")
        logs = folder.logs if sweep.worker_prints else None
        yield partial(run_ray, session=lent.session, timeout=sweep.timeout, packs=packs, logs=logs)


def _check_joining(options: Options, folder: Folder) -> None:
    """Check early that workers can join.

    Raises:
        SpecError: an option is of another dispatcher, or workers cannot share the storage.
    """
    from telescope.store.board import check_shareable

    if options.ray_address:
        raise SpecError("--ray-address: is for --dispatcher ray; workers join by the database")
    check_shareable(_shared_storage(options, folder))


def _shared_storage(options: Options, folder: Folder) -> str:
    """Return the URL of the database by which workers join."""
    from telescope.store.database import sqlite_url

    return _chosen_storage(folder, options.storage) or sqlite_url(folder.path)


def how_to_join(name: str, url: str, results: Path) -> str:
    """Return the command of a worker, for a shell in any folder; without the password."""
    from telescope.store.database import without_password

    where = ("--storage", without_password(url), "--results", str(results.absolute()))
    return shlex.join(("telescope", "worker", name, *where))


@contextmanager
def _joining(
    source: Noting,
    sweep: Trainable,
    folder: Folder,
    options: Options,
    at_once: Mapping[int, int],
    screen: Screen,
) -> Iterator[Callable[[TrialSource, Trainer], None]]:
    """Yield the function that has trials trained by workers that join; see `dispatcher`.

    It is called where there is nothing to train too: workers of an earlier run may be waiting.
    """
    from telescope.dispatch.joining import board as joining
    from telescope.dispatch.joining.driver import run_joining
    from telescope.store.board import Driver
    from telescope.sweep.announcing import announcement

    url = _shared_storage(options, folder)
    packs = Packs(sweep.pack_size(is_cluster=True), lines=folder.packs(), note=source.note_pack)
    if source.ask():
        name = sweep.spec.name
        screen.note(f"{name}: workers join with: {how_to_join(name, url, options.results)}")
    with closing(Driver(url, sweep.spec.name)) as board:
        joined = partial(
            run_joining,
            board=board,
            record=announcement(sweep, folder, lease=joining.LEASE),
            packs=packs,
            workers=max(at_once.values()),
            lease=joining.LEASE,
            note=screen.note,
        )
        yield lambda source, _trainer: joined(source)


def _ray(
    spec: Spec, owner: Path, address: str | None, at_once: Mapping[int, int]
) -> AbstractContextManager[Session]:
    """A Ray with room for so many trials at once."""
    from telescope.dispatch.ray.tune import Size, opened

    reserved = gpus(spec, at_once, is_cluster=bool(address))
    sizes = {
        width: Size(number, spec.compute.cpus_at(width), reserved[width])
        for width, number in at_once.items()
    }
    return opened(
        sizes[spec.base_width],
        sizes if spec.compute.is_by_width else None,
        owner=str(owner.resolve()),
        address=address,
        takes_any_gpu=bool(address) and takes_any_gpu(spec),
    )


def _spec_record(sweep: Runnable, storage: str | None) -> dict[str, Any]:
    """Return the content of `spec.json`."""
    return {
        "spec": sweep.spec.as_dict(),
        "fingerprint": sweep.fingerprint,
        "comparable_if_equal": sweep.comparable,
        "storage": storage and _without_password(storage),
        "target_flops": sweep.target_flops,
        "costs": {str(width): cost for width, cost in sweep.cost_per_trial.items()},
        "planned": sweep.planned,
        "versions": versions(),
    }


def _without_password(url: str) -> str:
    from telescope.store.database import without_password  # imports the database's libraries

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
