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
import math
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.search import Searcher

from telescope.api import Ladder
from telescope.errors import ResumeError, SpecError, TelescopeError
from telescope.files import write_json
from telescope.records import Point, Result, Status, Trial
from telescope.spec import Spec

FORMAT = 1
"""Of the searcher's state in Tune's own folder; a higher one is a newer version's."""
GATE = "telescope_gate"
"""Key of a configuration with which a worker waits instead of training."""
GATE_SECONDS = 60.0
"""A worker leaves the gate after so long and is asked anew: a trial whose machine was lost may wait
for the very place that it holds."""

logger = logging.getLogger(__name__)


class TelescopeSearch(Searcher):  # type: ignore[misc]  # Ray's base classes are untyped
    """Asks a ladder for trials, and tells it what Tune reports of them.

    A trainable gets ``config`` with width, seed and every axis by name, in base-width units, beside
    what `param_space` holds. It reports its loss as a metric, of which the last report counts; NaN,
    an infinite loss or ``{"status": "diverged"}`` mean that the point is at fault. ``{"status":
    "failed"}``, or an exception that Tune's FailureConfig has not healed, is the machine's fault.

    Give the Tuner ``num_samples=-1``: the ladder says when it is done. Leave the scheduler out: one
    that stops trials early makes losses that cannot be compared. `FailureConfig(max_failures=2)`
    retries what crashes; a sweep with too many failures is stuck, and `ladder.stuck` says why.

    Attributes:
        spec: the sweep.
    """

    CKPT_FILE_TMPL = "searcher-state-{}.json"

    def __init__(self, spec: Spec | Mapping[str, Any] | str | Path, *, metric: str = "loss") -> None:
        """Start a ladder.

        Args:
            spec: a sweep, a dict with its keys, or what `Spec.load` takes. It needs neither
                [trainer] nor [model]; without [cost] a trial costs the square of its width.
            metric: name of the reported loss, lower is better; nested ones by ``eval/loss``.

        Raises:
            SpecError: the spec is wrong, or an axis is called as something else in the config.
            RefusedError: the ladder must cost more than the budget allows.
        """
        super().__init__()  # without metric: Tune would raise for a report of a divergence alone
        if not isinstance(spec, Spec):
            spec = Spec.from_dict(spec) if isinstance(spec, Mapping) else Spec.load(spec)
        self.spec = spec
        self._loss = metric
        self._ladder = Ladder(spec)
        self._running: dict[str, Trial | None] = {}  # Tune's trial id → trial, None at the gate
        self._gate: _GateKeeper | None = None
        self._has_loss = False
        self._error: TelescopeError | None = None

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
            raise self._error
        trial = self._next()
        if trial:
            self._running[trial_id] = trial
            return {"width": trial.width, "seed": trial.seed, **trial.point}
        if not any(self._running.values()):
            if self._ladder.stuck:
                logger.warning("%s: stuck: %s", self.spec.name, self._ladder.stuck)
            return Searcher.FINISHED
        if self._gate is None:
            return None
        self._running[trial_id] = None
        return {GATE: self._gate.ticket()}

    def _next(self) -> Trial | None:
        """The first trial that is asked for and does not run."""
        running = set(self._running.values())
        return next((trial for trial in self._ladder.ask() if trial not in running), None)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Tell the ladder; what goes wrong here is raised by the next `suggest`."""
        trial = self._running.pop(trial_id, None)
        if trial is None or (result is None and not error):
            return  # at the gate, another searcher's, or taken back before it ran
        try:
            self._tell(trial, trial_id, None if error else result)
        except TelescopeError as problem:
            self._error = problem
        if self._gate and (self._next() or not any(self._running.values())):
            self._gate.open()

    def _tell(self, trial: Trial, trial_id: str, report: Mapping[str, Any] | None) -> None:
        if report is None:
            reason = f"Tune has given up on it; see error.txt of its trial {trial_id}"
            answer: dict[str, Any] = {"status": Status.FAILED, "reason": reason}
        else:
            answer = self._read(trial, report)
        if answer.get("status") is Status.FAILED:
            logger.warning("%s: failed: %s", trial, answer["reason"])
        self._ladder.tell(trial, **answer)

    def _read(self, trial: Trial, report: Mapping[str, Any]) -> dict[str, Any]:
        """A trial's last report as `Ladder.tell` takes it.

        Raises:
            SpecError: the metric is missing, and no trial has reported it yet.
        """
        status, reason = report.get("status"), str(report.get("reason") or "")
        if status in (Status.DIVERGED, Status.FAILED):
            return {"status": Status(status), "reason": reason or f"the trial reported {status}"}
        if self._loss not in report:
            missing = f"the trial has reported no {self._loss!r}"
            if not self._has_loss:
                numbers = [k for k, v in report.items() if type(v) in (int, float) and k in _own(k)]
                there = f", but {', '.join(numbers)}" if numbers else ""
                raise SpecError(
                    f"{missing}{there}; report it, or name it with TelescopeSearch(metric=...)"
                )
            return {"status": Status.FAILED, "reason": missing}
        self._has_loss = True
        try:
            loss = float(report[self._loss])
        except (TypeError, ValueError):
            got = type(report[self._loss]).__name__
            return {"status": Status.FAILED, "reason": f"{self._loss!r} is a {got}, no number"}
        if not math.isfinite(loss):
            return {"status": Status.DIVERGED, "reason": f"{self._loss} is {loss}"}
        return {"loss": loss}

    def save(self, checkpoint_path: str) -> None:
        """Write what has been answered and what runs, as JSON: the ladder is a replay of it."""
        running = {key: _as_dict(trial) for key, trial in self._running.items() if trial}
        results = [_result_as_dict(result) for result in self._ladder.results]
        state = {"format": FORMAT, "sweep": self.spec.name, "results": results, "running": running}
        write_json(Path(checkpoint_path), state)

    def restore(self, checkpoint_path: str) -> None:
        """Replay what `save` wrote.

        Raises:
            ResumeError: it cannot be read, or is another sweep's or a newer version's.
        """
        try:
            state = json.loads(Path(checkpoint_path).read_text(encoding="utf-8"))
            found = state["format"], state["sweep"]
            if found != (FORMAT, self.spec.name):
                raise ValueError(
                    f"is format {found[0]} of sweep {found[1]!r}, must be {FORMAT} of "
                    f"{self.spec.name!r}"
                )
            results = [_result(item) for item in state["results"]]
            self._running = {key: _trial(item) for key, item in state["running"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ResumeError(f"{checkpoint_path}: cannot be read: {error}") from error
        self._ladder = Ladder(self.spec, [*self._ladder.results, *results])
        self._has_loss = any(result.loss is not None for result in results)
