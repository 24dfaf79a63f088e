"""The ladder as a Ray Tune search algorithm, for people who have a Tuner already.

    search = TelescopeSearch("sweep.toml")
    tuner = tune.Tuner(train, tune_config=tune.TuneConfig(search_alg=search, num_samples=-1))
    tuner.fit()
    answer = search.ladder.transfer()

Everything else of the Tuner stays the user's: resources, loggers, callbacks, retries, storage. At a
stage's end a free worker has nothing to do until the stage closes; Tune then lets its process go.
`TelescopeSearch.warm` keeps it, where processes cost more than their trials.
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from numbers import Real
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.search import Searcher

from telescope.api import Ladder
from telescope.dispatch.ray.gate import Gate
from telescope.errors import ResumeError, SpecError, TrialError
from telescope.files import write_json
from telescope.losses import judged
from telescope.records import Result, Status, Trial
from telescope.spec.spec import Spec
from telescope.sweep.recorder import Recorder
from telescope.sweep.run import recorded

FINISHED: str = Searcher.FINISHED
"""The value that tells Tune that there are no more trials."""
FORMAT = 1
"""Of the searcher's state in Tune's own folder; a higher one is a newer version's."""
GATE = "telescope_gate"
"""Key of a configuration with which a worker waits instead of training."""
GATE_SECONDS = 60.0
"""A worker leaves the gate after so long and is asked anew: a trial whose machine was lost may wait
for the very place that it holds."""
IDLE_SECONDS, IDLE_ASKS = 0.9, 10
"""Seconds between two asks that count as slow, and how many slow ones in a row mean that Tune is
idle: it asks ten times a second while trials run, else once. Then what a restored searcher believes
to run is asked for again."""
UNFINISHED = ("PENDING", "RUNNING", "PAUSED")
"""Tune's words for a trial that a restored Tuner goes on with."""

TUNES_OWN = {
    *("timestamp", "done", "training_iteration", "time_this_iter_s", "time_total_s", "pid"),
    *("time_since_restore", "iterations_since_restore", "should_checkpoint"),
}
"""Keys that Tune itself adds to a report."""

logger = logging.getLogger(__name__)


class TelescopeSearch(Searcher):  # type: ignore[misc]  # Ray's base classes are untyped
    """Asks a ladder for trials, and tells it what Tune reports of them.

    A trainable gets ``config`` with width, seed and every axis by name, in base-width units, beside
    what `param_space` holds. It reports its loss as a metric, of which the last report counts; NaN,
    an infinite loss or ``{"status": "diverged"}`` mean that the point is at fault. ``{"status":
    "failed"}``, or an exception that Tune's FailureConfig has not healed, is the machine's fault.

    Lower is better, always. Tune shows a search the Tuner's ``mode`` only if there is a
    `param_space`: ``mode="max"`` is refused with one, and cannot be seen without.

    Give the Tuner ``num_samples=-1``: the ladder says when it is done. Leave the scheduler out: one
    that stops trials early makes losses that cannot be compared. `FailureConfig(max_failures=2)`
    retries what crashes; a sweep with too many failures is stuck, and `ladder.stuck` says why.

    With `results` every answer is kept as `telescope run` keeps it: `telescope show`, `transfer`
    and `status` work on it, and the same script goes on where it stopped, with a new Tuner.
    `Tuner.restore` works too, with or without; after it, `restore_from_dir` of a new
    `TelescopeSearch`, given the experiment's folder, has the ladder.

    Attributes:
        spec: the sweep.
    """

    CKPT_FILE_TMPL = "searcher-state-{}.json"

    def __init__(
        self,
        spec: Spec | Mapping[str, Any] | str | Path,
        *,
        metric: str = "loss",
        results: str | Path | None = None,
    ) -> None:
        """Start a ladder, or go on with the one in `results`.

        Args:
            spec: a sweep, a dict with its keys, or what `Spec.load` takes. It needs neither
                [trainer] nor [model]; without [cost] a trial costs the square of its width.
            metric: name of the reported loss, lower is better; nested ones by ``eval/loss``.
            results: the folder of all results, in which this sweep gets one by its name; needs
                [cost]. Left out, nothing is kept but what Tune keeps.

        Raises:
            SpecError: the spec is wrong.
            RefusedError: the ladder must cost more than the budget allows.
        """
        super().__init__()  # without metric: Tune would raise for a report of a divergence alone
        if not isinstance(spec, Spec):
            spec = Spec.from_dict(spec) if isinstance(spec, Mapping) else Spec.load(spec)
        self.spec = spec
        if results is not None and spec.cost is None:
            raise SpecError("cost: missing; with results= a table [cost] must be given")
        self._loss = metric
        self._results = results
        self._kept: ExitStack | None = None  # what is open while the results are written
        self._recorder: Recorder | None = None
        self._ladder = Ladder(spec)
        self._running: dict[str, Trial | None] = {}  # Tune's trial id → trial, None at the gate
        self._believed: set[str] = set()  # those that ran before a restore, not heard of since
        self._slow_asks, self._last_ask = 0, time.monotonic()
        self._gate: _GateKeeper | None = None
        self._has_loss = False
        self._error: Exception | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Tune pickles its searcher before it starts: what is needed to make it again."""
        return _again, (self.spec, self._loss, self._results, self._gate)

    @property
    def ladder(self) -> Ladder:
        """The ladder so far: choices, stuck, results, transfer.

        Raises:
            TelescopeError: what ended the search before it was done.
        """
        if self._error:
            raise self._error
        return self._ladder

    def warm(self, trainable: Any) -> Any:
        """Wrap a trainable, so that free workers wait in their process for the next stage.

        Worth it where a process takes longer to start than a trial to run. Give the Tuner
        ``reuse_actors=True`` too; a class must have `reset_config`. The results then hold trials
        without a loss, one per wait.

        Args:
            trainable: a function of the config, or a `tune.Trainable` class; before
                `tune.with_resources` and `tune.with_parameters`.

        Returns:
            The same for the Tuner.
        """
        self._gate = _GateKeeper()
        if isinstance(trainable, type) and issubclass(trainable, tune.Trainable):
            return _gated_class(trainable)
        if callable(trainable):
            return _gated_function(trainable)
        raise SpecError(f"warm: got {type(trainable).__name__}, must be a function or a Trainable")

    def set_search_properties(
        self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any
    ) -> bool:
        """Check what the Tuner says of the metric and of the search space; False: not taken over.

        Tune calls this where the Tuner has a `param_space`, and then refuses one that still holds
        distributions, which a ladder has no use for.

        Raises:
            SpecError: a metric to maximise or another one, or an axis that `param_space` sets.
        """
        if mode == "max":
            raise SpecError("TuneConfig(mode='max'): a ladder minimises; report a loss")
        if metric not in (None, self._loss):
            raise SpecError(
                f"TuneConfig(metric={metric!r}): the search has {self._loss!r}; give "
                f"TelescopeSearch(..., metric={metric!r})"
            )
        for key in ("width", "seed", *self.spec.axes):
            if key in config:
                raise SpecError(f"param_space: {key} is set by the ladder; leave it out")
        return False

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next trial's config; None while a stage's last trials run; FINISHED at the end.

        Raises:
            TelescopeError: what has gone wrong since; it comes out of `Tuner.fit`.
        """
        if self._error:
            self._fail()
        self._hold()
        trial = self._next()
        if trial:
            self._running[trial_id] = trial
            if self._recorder:
                self._recorder.on_start(trial)
            return {"width": trial.width, "seed": trial.seed, **trial.point}
        if not any(self._running.values()):
            if self._ladder.stuck:
                logger.warning("%s: stuck: %s", self.spec.name, self._ladder.stuck)
            self.close()
            return FINISHED
        # Whoever waits at the gate keeps Tune busy, which must be seen idle before a trial that it
        # has dropped is asked for again.
        if self._gate is None or self._believed:
            self._doubt()
            return None
        self._running[trial_id] = None
        return {GATE: self._gate.ticket()}

    def close(self) -> None:
        """Let go of the results folder; done by itself unless Tune has been interrupted."""
        if self._kept:
            self._kept.close()
            self._kept = None

    def _hold(self) -> None:
        """Hold the results folder if there is one, and go on with what it holds."""
        if self._results is None or self._kept is not None:
            return
        self._kept = ExitStack()
        self._recorder = self._kept.enter_context(recorded(self.spec, Path(self._results)))
        self._ladder = Ladder.around(self.spec, self._recorder.ladder)

    def _fail(self) -> None:
        """Raise the kept error, with the results folder left as after any other."""
        assert self._error is not None
        kept, self._kept = self._kept or ExitStack(), ExitStack()
        try:
            with kept:
                raise self._error
        except Exception as error:
            self._error = error
            raise

    def _next(self) -> Trial | None:
        """The first trial that is asked for and does not run."""
        running = set(self._running.values())
        asked = self._recorder.ask() if self._recorder else self._ladder.ask()
        return next((trial for trial in asked if trial not in running), None)

    def _doubt(self) -> None:
        """Ask again for what was believed to run since a restore, if Tune turns out to be idle.

        Such a trial may run after all, where Tune is that slow; its first result counts then.
        """
        now = time.monotonic()
        is_slow = now - self._last_ask > IDLE_SECONDS
        self._slow_asks, self._last_ask = self._slow_asks + 1 if is_slow else 0, now
        if self._believed and self._slow_asks >= IDLE_ASKS:
            self._forget(self._believed)

    def _forget(self, ids: set[str]) -> None:
        """Count trials as not running, so that they are asked for again."""
        for trial_id in sorted(ids):
            trial = self._running.pop(trial_id, None)
            logger.warning(
                "%s: Tune does not run %s any more: it is asked for again", self.spec.name, trial
            )
        self._believed = self._believed - ids

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Note that a trial runs; only its last report counts."""
        self._believed.discard(trial_id)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Tell the ladder; what goes wrong here is raised by the next `suggest`."""
        self._believed.discard(trial_id)
        trial = self._running.pop(trial_id, None)
        if trial is None or (result is None and not error):
            return  # at the gate, another searcher's, or taken back before it ran
        try:
            self._tell(trial, trial_id, None if error else result)
        except Exception as problem:
            self._error = problem
        if self._gate and (self._next() or not any(self._running.values())):
            self._gate.open()

    def _tell(self, trial: Trial, trial_id: str, report: Mapping[str, Any] | None) -> None:
        # After `Tuner.restore`, trials run to their end before Tune asks for another one.
        self._hold()
        if trial in {result.trial for result in self._ladder.results}:
            return  # stored after Tune's last checkpoint, so Tune has run it again
        if report is None:
            reason = f"Tune has given up on it; see error.txt of its trial {trial_id}"
            result = Result(trial, Status.FAILED, reason=reason)
        else:
            result = self._read(trial, report)
        if result.status is Status.FAILED:
            logger.warning("%s: failed: %s", trial, result.reason)
        if self._recorder:
            self._recorder.tell(result)
            self._ladder = Ladder.around(self.spec, self._recorder.ladder)
            return
        try:
            self._ladder.tell(trial, loss=result.loss, status=result.status, reason=result.reason)
        except TrialError:  # it began before a restore, and the spec has changed since
            known = [*self._ladder.results, result]
            self._ladder = Ladder(self.spec, known, given=self._ladder.given)

    def _read(self, trial: Trial, report: Mapping[str, Any]) -> Result:
        """Turn a trial's last report into a result.

        Raises:
            SpecError: the metric is missing, and no trial has reported it yet.
        """
        status, loss, reason = Status.COMPLETE, None, ""
        if report.get("status") in (Status.DIVERGED, Status.FAILED):
            status = Status(report["status"])
            reason = str(report.get("reason") or f"the trial reported {status}")
        elif self._loss not in report:
            if not self._has_loss:
                raise SpecError(self._no_metric(report))
            status, reason = Status.FAILED, f"the trial has reported no {self._loss!r}"
        else:
            self._has_loss = True
            said = report[self._loss]
            try:
                status, loss, reason = judged(said)
            except ValueError:
                kind = type(said).__name__
                status, reason = Status.FAILED, f"{self._loss!r} is a {kind}, must be a number"
            else:
                if isinstance(said, str):
                    logger.warning("%s: %r is text, %r: taken as number", trial, self._loss, said)
        return Result(
            trial,
            status,
            loss=loss,
            reason=reason,
            flops=_flops(self.spec, trial.width),
            seconds=float(report.get("time_total_s", 0.0)),
            worker=f"{report.get('hostname', '')}:{report.get('pid', '')}",
        )

    def _no_metric(self, report: Mapping[str, Any]) -> str:
        """Return the message for a missing metric."""
        own = sorted(
            key
            for key, value in report.items()
            if isinstance(value, Real) and key not in TUNES_OWN and not key.startswith("config/")
        )
        there = f", but {', '.join(own)}" if own else ""
        return (
            f"a trial has reported no {self._loss!r}{there}; report it, or name the right one with "
            "TelescopeSearch(metric=...)"
        )

    def save(self, checkpoint_path: str) -> None:
        """Write results and running trials as JSON, from which `restore` replays the ladder."""
        running = {key: trial.as_dict() for key, trial in self._running.items() if trial}
        state = {
            "format": FORMAT,
            "sweep": self.spec.name,
            "results": [result.as_dict() for result in self._ladder.results],
            "given": [result.as_dict() for result in self._ladder.given],
            "running": running,
        }
        write_json(Path(checkpoint_path), state)

    def restore(self, checkpoint_path: str) -> None:
        """Replay the ladder from the file that `save` wrote.

        Raises:
            ResumeError: the file cannot be read, or is of another sweep or a newer version.
        """
        try:
            state = json.loads(Path(checkpoint_path).read_text(encoding="utf-8"))
            found = state["format"], state["sweep"]
            if found != (FORMAT, self.spec.name):
                raise ValueError(
                    f"is format {found[0]} of sweep {found[1]!r}, must be {FORMAT} of "
                    f"{self.spec.name!r}"
                )
            results = [Result.from_dict(item) for item in state["results"]]
            given = [Result.from_dict(item) for item in state.get("given", ())]
            self._running = {key: Trial.from_dict(item) for key, item in state["running"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ResumeError(f"{checkpoint_path}: cannot be read: {error}") from error
        self._has_loss = any(result.loss is not None for result in results)
        # With a results folder, its store replaces this; it also has later results.
        self._ladder = Ladder(self.spec, results, given=given)
        self._believed = set(self._running)

    def restore_from_dir(self, checkpoint_dir: str) -> None:
        """Replay the ladder as `restore` does, and ask again for trials that Tune does not run.

        Tune writes its own state and the searcher's one after the other. After a kill between the
        two, one of them has trials that the other does not know.

        Raises:
            ResumeError: as `restore`.
        """
        super().restore_from_dir(checkpoint_dir)
        tunes = _trials_of_tune(checkpoint_dir)
        if tunes is None:
            return
        for trial_id in sorted(self._running.keys() & tunes.keys()):
            if tunes[trial_id].status == "TERMINATED" and tunes[trial_id].last_result:
                self.on_trial_complete(trial_id, tunes[trial_id].last_result)
        going = {trial_id for trial_id, trial in tunes.items() if trial.status in UNFINISHED}
        self._forget(self._believed - going)


def _trials_of_tune(folder: str) -> dict[str, Any] | None:
    """Read Tune's own trials from a folder: trial id → trial; None if they cannot be read."""
    try:
        return {trial.trial_id: trial for trial in tune.ExperimentAnalysis(folder).trials}
    except Exception as error:  # a damaged folder may raise anything
        logger.warning("%s: cannot be read: %s", folder, error)
        return None


def _again(
    spec: Spec, metric: str, results: str | Path | None, gate: _GateKeeper | None
) -> TelescopeSearch:
    """Rebuild a search from its pickle."""
    search = TelescopeSearch(spec, metric=metric, results=results)
    search._gate = gate
    return search


def _flops(spec: Spec, width: int) -> float:
    """Return the FLOPs of a trial, 0 if the spec does not give them."""
    table = spec.cost and spec.cost.flops
    return table[width] if table else 0.0


class _Gate(Gate):
    """The gate of a Tuner, at which no worker waits for longer than `GATE_SECONDS`."""

    async def wait_beyond(self, turn: int) -> None:
        """Wait until the gate is opened after `turn`, at most `GATE_SECONDS`."""
        with suppress(TimeoutError):
            await asyncio.wait_for(super().wait_beyond(turn), GATE_SECONDS)


class _GateKeeper:
    """The driver's side of the gate."""

    def __init__(self) -> None:
        self._name = f"telescope-gate-{uuid.uuid4().hex[:12]}"
        self._actor: Any = None
        self._turn = 0

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as a new gate keeper with a new name, because the actor belongs to this driver."""
        return _GateKeeper, ()

    def ticket(self) -> str:
        """Return the ticket with which a worker waits for the next turn; start the actor if new."""
        if self._actor is None:
            self._actor = ray.remote(_Gate).options(num_cpus=0, name=self._name).remote()
        return f"{self._name}:{self._turn}"

    def open(self) -> None:
        """Release all waiting workers."""
        self._turn += 1
        if self._actor is not None:
            self._actor.open.remote(self._turn)


def _wait(ticket: str) -> None:
    """Wait at the gate, in a worker."""
    name, _, turn = ticket.partition(":")
    ray.get(ray.get_actor(name).wait_beyond.remote(int(turn)))


def _gated_function(train: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], Any]:
    """Wrap a function trainable so that it can wait at the gate."""

    @functools.wraps(train)
    def train_or_wait(config: dict[str, Any]) -> Any:
        if GATE in config:
            return _wait(config[GATE])
        return train(config)

    return train_or_wait


def _gated_class(trainable: Any) -> Any:
    """Wrap a class trainable so that it can wait at the gate; its first real trial sets it up."""

    class TrainOrWait(trainable):  # type: ignore[misc]
        _ticket: str | None = None
        _is_set_up = False

        def setup(self, config: dict[str, Any]) -> None:
            self._ticket = config.get(GATE)
            if self._ticket is None:
                self._is_set_up = True
                super().setup(config)

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            self._ticket = new_config.get(GATE)
            if self._ticket is not None:
                return True
            if self._is_set_up:
                return bool(super().reset_config(new_config))
            self.setup(new_config)
            return True

        def step(self) -> Any:
            if self._ticket is None:
                return super().step()
            _wait(self._ticket)
            return {"done": True}

        def save_checkpoint(self, checkpoint_dir: str) -> Any:
            return None if self._ticket else super().save_checkpoint(checkpoint_dir)

        def cleanup(self) -> None:
            if self._is_set_up:
                super().cleanup()

    TrainOrWait.__name__ = trainable.__name__
    return TrainOrWait
